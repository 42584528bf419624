//! Laws of prefill systems.

use super::problem::PrefillProblem;
use super::{Finding, allowed, build, check_card, close, default_int, exponent, law_name};
use crate::prim::{AttendOptions, attend};
use crate::sparse::Selector;
use crate::sparse::run::{NO_LAYER, Prefilled, prefill};
use crate::system::{Card, Growth, Law, Slot, System};
use candle_core::Tensor;

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
            // Promises of the cache slot.
            Law::StepsAgree | Law::BytesAsDeclared | Law::SmallerThanDense => continue,
        };
        out.push((law_name(law), finding));
    }
    out
}

/// The card's system under `params`, run on a problem.
fn run(card: &Card, params: &[(&str, &str)], p: &PrefillProblem) -> Result<Prefilled, String> {
    let system = build(card, Slot::Prefill, params).map_err(|e| e.to_string())?;
    let selector: Option<&dyn Selector> = match &system {
        System::Selector(s) => Some(s.as_ref()),
        System::Dense => None,
        System::Cache(_) => return Err("built as a cache policy".into()),
    };
    let (q, k, v) = p.tensors().map_err(|e| e.to_string())?;
    prefill(|_| selector, &q, &k, &v, &AttendOptions::causal(), NO_LAYER).map_err(|e| e.to_string())
}

fn flat(t: &Tensor) -> Result<Vec<f32>, String> {
    t.flatten_all().and_then(|t| t.to_vec1()).map_err(|e| e.to_string())
}

fn basic(card: &Card) -> Finding {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        let p = PrefillProblem::new(shape, 1.0, 11 + i as u64);
        let a = run(card, &[], &p).map_err(|e| format!("{shape:?}: {e}"))?;
        let [b, h, _, tq, _, d] = shape;
        if a.attended.out.dims() != [b, h, tq, d] {
            return Err(format!("{shape:?}: output has shape {:?}", a.attended.out.dims()));
        }
        let x = flat(&a.attended.out)?;
        if let Some(bad) = x.iter().find(|v| !v.is_finite()) {
            return Err(format!("{shape:?}: output holds {bad}"));
        }
        let lse = flat(&a.attended.lse)?;
        if let Some(row) = lse.iter().position(|v| !v.is_finite()) {
            return Err(format!("{shape:?}: row {row} sees no key (lse {})", lse[row]));
        }
        let again = run(card, &[], &p)?;
        if flat(&again.attended.out)? != x || again.selections != a.selections {
            return Err(format!("{shape:?}: two runs on the same input differ"));
        }
        if again.attended.work != a.attended.work || again.select != a.select {
            return Err(format!("{shape:?}: work counters of two runs differ"));
        }
    }
    Ok(())
}

fn extreme(card: &Card) -> Finding {
    for loud in [1e4, 0.0] {
        let p = PrefillProblem::new([1, 2, 1, 200, 200, 16], loud, 5);
        let x = flat(&run(card, &[], &p)?.attended.out)?;
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
    let full = flat(&run(card, &[], &p)?.attended.out)?;
    let rows = |x: &[f32], n: usize| -> Vec<f32> { x.chunks_exact(t * d).flat_map(|r| r[..n * d].to_vec()).collect() };
    let cuts = if block > 1 { vec![block, 2 * block] } else { vec![1, 64, 130, 300] };
    for cut in cuts {
        let mut changed = p.clone();
        PrefillProblem::scramble(&mut changed.v, t, d, cut, 1);
        if strict {
            PrefillProblem::scramble(&mut changed.k, t, d, cut, 2);
            PrefillProblem::scramble(&mut changed.q, t, d, cut, 3);
        }
        let other = flat(&run(card, &[], &changed)?.attended.out)?;
        let what = format!("tokens from {cut} on changed, rows before it");
        close(&what, &rows(&other, cut), &rows(&full, cut), ROUNDING)?;
        if strict {
            let short = flat(&run(card, &[], &p.prefix(cut))?.attended.out)?;
            close(&format!("prefix of {cut}"), &short, &rows(&full, cut), ROUNDING)?;
        }
    }
    Ok(())
}

fn exact(card: &Card, params: &[(&str, &str)]) -> Finding {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        let p = PrefillProblem::new(shape, 1.0, 31 + i as u64);
        let a = flat(&run(card, params, &p)?.attended.out)?;
        let (q, k, v) = p.tensors().map_err(|e| e.to_string())?;
        let dense = attend(&q, &k, &v, &AttendOptions::causal(), None).map_err(|e| e.to_string())?;
        close(&format!("{shape:?} against exact attention"), &a, &flat(&dense.out)?, ROUNDING)?;
    }
    Ok(())
}

fn work(card: &Card, pairs: Growth, flops: Growth) -> Finding {
    let at = |t: usize| run(card, &[], &PrefillProblem::new([1, 1, 1, t, t, 8], 1.0, 41));
    let (half, full) = (at(16_384)?, at(32_768)?);
    let e = exponent(half.attended.work.pairs, full.attended.work.pairs);
    if e > allowed(pairs) {
        return Err(format!("pairs grow as T^{e:.2}, declared {pairs:?}"));
    }
    let total = |p: &Prefilled| p.attended.work.flops + p.select.flops;
    let e = exponent(total(&half), total(&full));
    if e > allowed(flops) {
        return Err(format!("flops grow as T^{e:.2}, declared {flops:?}"));
    }
    Ok(())
}

fn monotone(card: &Card, param: &str, values: &[&str]) -> Finding {
    let p = PrefillProblem::new([1, 2, 1, 1500, 1500, 16], 1.0, 51);
    let mut last = (0, "");
    for v in values {
        let pairs = run(card, &[(param, v)], &p)?.attended.work.pairs;
        if pairs < last.0 {
            return Err(format!("{param}={v} visits {pairs} pairs, fewer than {} at {}", last.0, last.1));
        }
        last = (pairs, v);
    }
    Ok(())
}
