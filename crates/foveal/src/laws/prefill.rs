//! Laws of prefill systems.

use super::problem::PrefillProblem;
use super::{Finding, allowed, build, check_card, close, default_int, exponent, flat, law_name};
use crate::mixer::{self, MixInput, MixerDims, Weights};
use crate::prim::{AttendOptions, attend};
use crate::sparse::run::{At, prefill};
use crate::sparse::{Domain, Grid, HeadSelection, Selector};
use crate::system::{Card, Growth, Law, Slot, System};
use foveal_kernels::Work;

/// [B, H, Hkv, Tq, Tk, D]: odd lengths, ragged chunks, grouped heads, one token.
const SHAPES: [[usize; 6]; 7] = [
    [1, 4, 2, 333, 333, 16],
    [2, 3, 1, 129, 129, 8],
    [1, 2, 2, 64, 64, 20],
    [1, 1, 1, 1, 1, 16],
    [1, 2, 1, 1, 300, 16],
    [1, 4, 2, 77, 411, 16],
    [1, 2, 1, 7, 7, 5],
];

/// Agreement within f32 rounding of differently ordered sums.
const ROUNDING: f32 = 2e-4;

pub(super) fn check(card: &'static Card) -> Vec<(String, Finding)> {
    let mut out = vec![
        ("card".to_owned(), check_card(card)),
        ("finite, shaped, every row sees a key, same answer twice".into(), basic(card)),
        ("extreme logits stay finite".into(), extreme(card)),
    ];
    for law in card.laws {
        let finding = match law {
            Law::Causal => causal(card, 1, true),
            Law::CausalInBlocks(p) => default_int(card, p).and_then(|b| causal(card, b, true)),
            Law::CausalMask => causal(card, 1, false),
            Law::ExactAt(params) => exact(card, params),
            Law::Work { pairs, flops } => work(card, *pairs, *flops),
            Law::Monotone { param, values } => monotone(card, param, values),
            // Promises of other slots.
            Law::Gradients | Law::StepsAgree | Law::BytesAsDeclared | Law::SmallerThanDense => continue,
        };
        out.push((law_name(law), finding));
    }
    out
}

/// What a run gave.
#[derive(PartialEq)]
struct Run {
    out: Vec<f32>,
    dims: Vec<usize>,
    /// None of systems that change the weights.
    lse: Option<Vec<f32>>,
    work: Work,
    select: Work,
    selections: Vec<HeadSelection>,
}

/// A kind of problem: with a direction or without, on a grid or not.
#[derive(Clone, Copy)]
struct Kind {
    causal: bool,
    grid: Option<Grid>,
}

/// Problems of a domain: [`SHAPES`] and grids with and without text around them, with each direction it knows.
fn problems(domain: Domain) -> Vec<([usize; 6], Kind)> {
    let mut all = Vec::new();
    for causal in [true, false].into_iter().filter(|&c| if c { domain.causal } else { domain.full }) {
        if domain.grid {
            let grid = |first, t, h, w| Some(Grid { first, t, h, w });
            all.extend(
                [
                    ([1, 4, 2, 117, 117, 16], grid(0, 1, 9, 13)),
                    ([2, 3, 1, 217, 217, 8], grid(3, 5, 7, 6)),
                    ([1, 2, 2, 64, 64, 20], grid(0, 1, 1, 64)),
                    ([1, 1, 1, 1, 1, 16], grid(0, 1, 1, 1)),
                    ([1, 2, 1, 320, 320, 16], grid(0, 4, 8, 10)),
                ]
                .map(|(shape, grid)| (shape, Kind { causal, grid })),
            );
        } else {
            let square = |s: &&[usize; 6]| causal || s[3] == s[4];
            all.extend(SHAPES.iter().filter(square).map(|&s| (s, Kind { causal, grid: None })));
        }
    }
    all
}

/// The kind and length of problem on which work and budgets are measured: about `t` tokens.
fn long(domain: Domain, t: usize) -> (usize, Kind) {
    let grid = domain.grid.then(|| Grid::new(t.div_ceil(256), 16, 16));
    (grid.map_or(t, |g| g.tokens()), Kind { causal: domain.causal, grid })
}

fn domain(card: &Card, params: &[(&str, &str)]) -> Result<Domain, String> {
    Ok(build(card, Slot::Prefill, params).map_err(|e| e.to_string())?.domain())
}

/// The card's system under `params`, run on a problem.
fn run(card: &Card, params: &[(&str, &str)], p: &PrefillProblem, kind: Kind) -> Result<Run, String> {
    let system = build(card, Slot::Prefill, params).map_err(|e| e.to_string())?;
    try_run(card.id, system, p, kind).map_err(|e| e.to_string())
}

fn try_run(id: &str, system: System, p: &PrefillProblem, kind: Kind) -> crate::Result<Run> {
    let (q, k, v) = p.tensors()?;
    let selector: Option<Box<dyn Selector>> = match system {
        System::Selector(s) => Some(s),
        System::Mixer(_) => {
            let [_, h, hkv, .., d] = p.shape;
            let dims = MixerDims { kv_heads: hkv, grid: kind.grid, ..MixerDims::new(h, d, kind.causal) };
            let m = mixer::layer(id, system, &dims, Weights::none().builder())?.mix(&MixInput::new(&q, &k, &v))?;
            return Ok(Run {
                dims: m.out.dims().to_vec(),
                out: flat(&m.out)?,
                lse: None,
                work: m.work,
                select: m.select,
                selections: m.selections,
            });
        }
        _ => None,
    };
    let options = AttendOptions { causal: kind.causal, ..AttendOptions::default() };
    let at = At { grid: kind.grid, ..At::NOWHERE };
    let p = prefill(|_| selector.as_deref(), &q, &k, &v, &options, at)?;
    Ok(Run {
        dims: p.attended.out.dims().to_vec(),
        out: flat(&p.attended.out)?,
        lse: Some(flat(&p.attended.lse)?),
        work: p.attended.work,
        select: p.select,
        selections: p.selections,
    })
}

fn basic(card: &Card) -> Finding {
    for (i, (shape, kind)) in problems(domain(card, &[])?).into_iter().enumerate() {
        let p = PrefillProblem::new(shape, 1.0, 11 + i as u64);
        let a = run(card, &[], &p, kind).map_err(|e| format!("{shape:?}: {e}"))?;
        let [b, h, _, tq, _, d] = shape;
        if a.dims != [b, h, tq, d] {
            return Err(format!("{shape:?}: output has shape {:?}", a.dims));
        }
        if let Some(bad) = a.out.iter().find(|v| !v.is_finite()) {
            return Err(format!("{shape:?}: output holds {bad}"));
        }
        if let Some(row) = a.lse.as_ref().and_then(|lse| lse.iter().position(|v| !v.is_finite())) {
            return Err(format!("{shape:?}: row {row} sees no key"));
        }
        if run(card, &[], &p, kind)? != a {
            return Err(format!("{shape:?}: two runs on the same input differ in output, selection or work"));
        }
    }
    Ok(())
}

fn extreme(card: &Card) -> Finding {
    let (t, kind) = long(domain(card, &[])?, 200);
    for loud in [1e4, 0.0] {
        let p = PrefillProblem::new([1, 2, 1, t, t, 16], loud, 5);
        let x = run(card, &[], &p, kind)?.out;
        if let Some(bad) = x.iter().find(|v| !v.is_finite()) {
            return Err(format!("queries scaled by {loud}: output holds {bad}"));
        }
    }
    Ok(())
}

/// Behavioural causality at multiples of `block`. With `strict`, q, k and v of the future change and
/// the prefix alone gives the same rows; without, only v changes: no later key is attended to.
fn causal(card: &Card, block: usize, strict: bool) -> Finding {
    let t = (2 * block + 37).max(301);
    let [h, hkv, d] = [2, 1, 16];
    let p = PrefillProblem::new([1, h, hkv, t, t, d], 1.0, 23);
    // A grid inside the shortest prefix, so that prefixes have it too.
    let grid = domain(card, &[])?.grid.then_some(Grid { first: 0, t: 1, h: 1, w: block });
    let kind = Kind { causal: true, grid };
    let full = run(card, &[], &p, kind)?.out;
    let rows = |x: &[f32], n: usize| -> Vec<f32> { x.chunks_exact(t * d).flat_map(|r| r[..n * d].to_vec()).collect() };
    let cuts = if block > 1 { vec![block, 2 * block] } else { vec![1, 64, 130, 300] };
    for cut in cuts {
        let mut changed = p.clone();
        PrefillProblem::scramble(&mut changed.v, t, d, cut, 1);
        if strict {
            PrefillProblem::scramble(&mut changed.k, t, d, cut, 2);
            PrefillProblem::scramble(&mut changed.q, t, d, cut, 3);
        }
        let other = run(card, &[], &changed, kind)?.out;
        let what = format!("tokens from {cut} on changed, rows before it");
        close(&what, &rows(&other, cut), &rows(&full, cut), ROUNDING)?;
        if strict {
            let short = run(card, &[], &p.prefix(cut), kind)?.out;
            close(&format!("prefix of {cut}"), &short, &rows(&full, cut), ROUNDING)?;
        }
    }
    Ok(())
}

fn exact(card: &Card, params: &[(&str, &str)]) -> Finding {
    for (i, (shape, kind)) in problems(domain(card, params)?).into_iter().enumerate() {
        let p = PrefillProblem::new(shape, 1.0, 31 + i as u64);
        let a = run(card, params, &p, kind)?.out;
        let options = AttendOptions { causal: kind.causal, ..AttendOptions::default() };
        let dense = p.tensors().and_then(|(q, k, v)| flat(&attend(&q, &k, &v, &options, None)?.out));
        close(&format!("{shape:?} against exact attention"), &a, &dense.map_err(|e| e.to_string())?, ROUNDING)?;
    }
    Ok(())
}

fn work(card: &Card, pairs: Growth, flops: Growth) -> Finding {
    let domain = domain(card, &[])?;
    let at = |t: usize| {
        let (t, kind) = long(domain, t);
        run(card, &[], &PrefillProblem::new([1, 1, 1, t, t, 8], 1.0, 41), kind)
    };
    let (half, full) = (at(16_384)?, at(32_768)?);
    let e = exponent(half.work.pairs, full.work.pairs);
    if e > allowed(pairs) {
        return Err(format!("pairs grow as T^{e:.2}, declared {pairs:?}"));
    }
    let total = |p: &Run| p.work.flops + p.select.flops;
    let e = exponent(total(&half), total(&full));
    if e > allowed(flops) {
        return Err(format!("flops grow as T^{e:.2}, declared {flops:?}"));
    }
    Ok(())
}

fn monotone(card: &Card, param: &str, values: &[&str]) -> Finding {
    let (t, kind) = long(domain(card, &[])?, 1500);
    let p = PrefillProblem::new([1, 2, 1, t, t, 16], 1.0, 51);
    let mut last = (0, "");
    for v in values {
        let pairs = run(card, &[(param, v)], &p, kind)?.work.pairs;
        if pairs < last.0 {
            return Err(format!("{param}={v} visits {pairs} pairs, fewer than {} at {}", last.0, last.1));
        }
        last = (pairs, v);
    }
    Ok(())
}
