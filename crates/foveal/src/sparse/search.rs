//! The offline search that static patterns share: what a candidate costs and how far it is off on the recorded q, k, v of a
//! head, the cheapest one within a bound on the error, and the best mixture over heads within a budget.

use super::mask::tile_pairs;
use super::{HeadProblem, HeadSelection, Mat, Selector};
use crate::error::{Error, Result};
use crate::prim::gemm::packed;
use crate::prim::{AttendOptions, attend, attend_selected};
use crate::registry;
use crate::system::{Slot, Spec, System};
use candle_core::{Device, Tensor};

/// Cost of a pair visited as a single key over that of a pair inside a block: how much dearer gathering is on our kernels.
pub const GATHER_COST: f64 = 1.3;

/// What a candidate does to one head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judged {
    /// ‖O − O_exact‖ / ‖O_exact‖ over the head's whole output.
    pub error: f64,
    /// Cost as a share of dense attention: tiles, gathers and the estimate.
    pub cost: f64,
}

/// One head on a calibration prompt, with its exact output.
pub struct Judge<'a> {
    problem: HeadProblem<'a>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttendOptions,
    exact: Vec<f32>,
    norm: f64,
    dv: usize,
}

impl<'a> Judge<'a> {
    /// `v` is (Tk, Dv). The prompt should be of the length at which the pattern will run, or near it.
    pub fn new(p: &HeadProblem<'a>, v: &Mat) -> Result<Self> {
        let (tq, tk) = (p.q.rows, p.k.rows);
        if v.rows != tk || tq == 0 {
            return Err(Error::Shape {
                op: "pattern search",
                tensor: "v",
                shape: vec![v.rows, v.cols],
                expected: format!("({tk}, head_dim) as k, and at least one query"),
            });
        }
        let tensor = |m: &Mat| -> Result<Tensor> {
            Ok(Tensor::from_vec(packed(m, m.rows).into_owned(), (1, 1, m.rows, m.cols), &Device::Cpu)?)
        };
        let (q, k, vals) = (tensor(&p.q)?, tensor(&p.k)?, tensor(v)?);
        let options = AttendOptions { scale: Some(p.scale), causal: p.causal, ..AttendOptions::default() };
        let exact: Vec<f32> = attend(&q, &k, &vals, &options, None)?.out.flatten_all()?.to_vec1()?;
        let norm = exact.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        Ok(Self { problem: *p, q, k, v: vals, options, exact, norm, dv: v.cols })
    }

    /// Relative error of the output under a selection.
    pub fn error(&self, selection: HeadSelection) -> Result<f64> {
        let out = attend_selected(&self.q, &self.k, &self.v, &self.options, vec![selection])?.out;
        let out: Vec<f32> = out.flatten_all()?.to_vec1()?;
        let off = out.iter().zip(&self.exact).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        Ok(if self.norm > 0.0 { off / self.norm } else { off })
    }

    /// Error and cost of a system.
    pub fn judge(&self, selector: &dyn Selector) -> Result<Judged> {
        let cost = cost(selector, &self.problem, self.dv, GATHER_COST)?;
        Ok(Judged { error: self.error(selector.select(&self.problem)?.0)?, cost })
    }
}

/// Cost of a system on a head with values of `dv` elements, as a share of dense attention.
///
/// Kernel-aware: what counts is not the pairs that a pattern names but the tiles that the kernel runs for them, the
/// dearer gathered keys, and the estimate.
pub fn cost(selector: &dyn Selector, p: &HeadProblem, dv: usize, gather_cost: f64) -> Result<f64> {
    let (tq, tk) = (p.q.rows, p.k.rows);
    let per_pair = (2 * (p.q.cols + dv)) as f64;
    let (dense, _) = tile_pairs(&HeadSelection::dense(p), tq, tk);
    let (selection, work) = selector.select(p)?;
    let (tiles, keys) = tile_pairs(&selection, tq, tk);
    let flops = (tiles as f64 + keys as f64 * gather_cost) * per_pair + work.flops as f64;
    Ok(flops / (dense as f64 * per_pair).max(1.0))
}

/// Error and cost of every candidate on one head, in their order.
pub fn table(p: &HeadProblem, v: &Mat, candidates: &[Spec]) -> Result<Vec<Judged>> {
    let judge = Judge::new(p, v)?;
    let one = |spec: &Spec| match registry::build(spec, Slot::Prefill)? {
        System::Selector(s) => {
            s.domain().check(&spec.id, p.causal, p.grid, p.k.rows)?;
            judge.judge(s.as_ref())
        }
        System::Dense => Ok(Judged { error: 0.0, cost: 1.0 }),
        _ => Err(Error::Param {
            system: spec.id.clone(),
            message: "changes more than which keys are visited; search among selectors".into(),
        }),
    };
    candidates.iter().map(one).collect()
}

/// The cheapest candidate whose error is at most `max_error`, by its place; `None` where there is none, and the head should
/// stay dense. Of equally cheap ones the most exact.
pub fn cheapest(judged: &[Judged], max_error: f64) -> Option<usize> {
    let order = |a: &Judged, b: &Judged| a.cost.total_cmp(&b.cost).then(a.error.total_cmp(&b.error));
    let within = judged.iter().enumerate().filter(|(_, j)| j.error <= max_error);
    within.min_by(|a, b| order(a.1, b.1)).map(|(i, _)| i)
}

/// One candidate a head, so that the sum of errors over heads and lengths is small while at every length the mean cost is
/// at most `budget`. `judged[length][head][candidate]`, as many candidates everywhere.
///
/// Starts with every head's cheapest candidate and takes, one at a time, the change that buys most error for its cost
/// and still fits: the greedy solution of the multiple-choice knapsack, which among the candidates on
/// each head's lower convex hull is within one change of one head of the best.
/// Where even the cheapest do not fit they are the answer.
pub fn assign(judged: &[Vec<Vec<Judged>>], budget: f64) -> Vec<usize> {
    let heads = judged.first().map_or(0, Vec::len);
    let sum = |head: usize, c: usize, f: &dyn Fn(&Judged) -> f64| judged.iter().map(|l| f(&l[head][c])).sum::<f64>();
    let candidates = |head: usize| judged.iter().map(|l| l[head].len()).min().unwrap_or(0);
    let cost = |head: usize, c: usize| sum(head, c, &|j| j.cost);
    let error = |head: usize, c: usize| sum(head, c, &|j| j.error);
    let mut chosen: Vec<usize> = (0..heads)
        .map(|h| (0..candidates(h)).min_by(|&a, &b| cost(h, a).total_cmp(&cost(h, b))).unwrap_or(0))
        .collect();
    if (0..heads).any(|h| candidates(h) == 0) {
        return chosen;
    }
    let mut spent: Vec<f64> =
        judged.iter().map(|l| l.iter().zip(&chosen).map(|(head, &c)| head[c].cost).sum()).collect();
    let room = budget * heads as f64 + 1e-9;
    loop {
        let mut best: Option<(f64, usize, usize)> = None;
        for h in 0..heads {
            for c in 0..candidates(h) {
                let (dearer, better) = (cost(h, c) - cost(h, chosen[h]), error(h, chosen[h]) - error(h, c));
                let gain = better / dearer.max(1e-12);
                let fits = || spent.iter().zip(judged).all(|(s, l)| s + l[h][c].cost - l[h][chosen[h]].cost <= room);
                if better > 0.0 && best.is_none_or(|b| gain > b.0) && fits() {
                    best = Some((gain, h, c));
                }
            }
        }
        let Some((_, h, c)) = best else { return chosen };
        for (s, l) in spent.iter_mut().zip(judged) {
            *s += l[h][c].cost - l[h][chosen[h]].cost;
        }
        chosen[h] = c;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn j(error: f64, cost: f64) -> Judged {
        Judged { error, cost }
    }

    #[test]
    fn the_cheapest_within_the_bound() {
        let all = [j(0.5, 0.1), j(0.2, 0.3), j(0.1, 0.3), j(0.0, 1.0)];
        assert_eq!([0.6, 0.3, 0.05].map(|e| cheapest(&all, e)), [Some(0), Some(2), Some(3)]);
        assert_eq!(cheapest(&all[..2], 0.1), None);
    }

    #[test]
    fn budgets_go_where_they_buy_most() {
        // Head 0 gains little from more, head 1 much.
        let one = [vec![vec![j(0.2, 0.1), j(0.15, 0.5), j(0.0, 1.0)], vec![j(0.9, 0.1), j(0.1, 0.5), j(0.0, 1.0)]]];
        assert_eq!([0.3, 0.05, 1.0].map(|budget| assign(&one, budget)), [[0, 1], [0, 0], [2, 2]]);
        // At a second length the step of head 1 is too dear, and head 0 has what is left.
        let [heads] = one;
        let mut longer = heads.clone();
        longer[1][1].cost = 0.9;
        assert_eq!(assign(&[heads, longer], 0.3), [1, 0]);
        assert!(assign(&[], 0.5).is_empty());
    }
}
