//! Laws of attention layers.

use super::problem::normal;
use super::{Finding, allowed, build, check_card, close, default_int, exponent, flat, law_name};
use crate::error::Result;
use crate::mixer::{self, MixInput, Mixed, Mixer, MixerDims, Weights};
use crate::prim::{AttendOptions, attend};
use crate::sparse::{Domain, Grid};
use crate::system::{Card, Growth, Law, Slot};
use candle_core::{Device, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Agreement within f32 rounding of differently ordered sums.
const ROUNDING: f32 = 3e-4;

/// Relative disagreement allowed between a gradient and a central difference in f32.
const SLOPE: f64 = 2e-2;

pub(super) fn check(card: &'static Card) -> Vec<(String, Finding)> {
    let mut out =
        vec![("card".to_owned(), check_card(card)), ("layer: finite, shaped, same answer twice".into(), basic(card))];
    for law in card.laws {
        let finding = match law {
            Law::Causal => causal(card, 1, true),
            Law::CausalInBlocks(p) => default_int(card, p).and_then(|b| causal(card, b, true)),
            Law::CausalMask => causal(card, 1, false),
            Law::ExactAt(params) => exact(card, params),
            Law::Gradients => gradients(card),
            Law::Work { pairs, flops } => work(card, *pairs, *flops),
            Law::Monotone { param, values } => monotone(card, param, values),
            // Promises of the cache slot.
            Law::StepsAgree | Law::BytesAsDeclared | Law::SmallerThanDense => continue,
        };
        out.push((format!("layer: {}", law_name(law)), finding));
    }
    out
}

/// A layer's input: x, and q, k, v as if x had been projected and rotated.
#[derive(Clone)]
struct Problem {
    /// x (B, T, hidden), q (B, H, T, D), k and v (B, Hkv, T, D), then q and k before rotation.
    tensors: [Tensor; 6],
}

impl Problem {
    fn new(batch: usize, tokens: usize, dims: MixerDims, seed: u64) -> Result<Self> {
        let MixerDims { hidden, heads, kv_heads, head_dim, .. } = dims;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut t =
            |shape: &[usize]| Tensor::from_vec(normal(&mut rng, shape.iter().product(), 1.0), shape, &Device::Cpu);
        let (q, k) = ([batch, heads, tokens, head_dim], [batch, kv_heads, tokens, head_dim]);
        Ok(Self { tensors: [t(&[batch, tokens, hidden])?, t(&q)?, t(&k)?, t(&k)?, t(&q)?, t(&k)?] })
    }

    fn mix(&self, layer: &dyn Mixer) -> Result<Mixed> {
        let [x, q, k, v, q0, k0] = &self.tensors;
        layer.mix(&MixInput { x: Some(x), before_rotation: Some((q0, k0)), ..MixInput::new(q, k, v) })
    }

    /// The same with every tensor's tokens from `at` on replaced by noise (only v's if not `all`).
    fn scrambled(&self, at: usize, all: bool) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(99);
        let mut other = self.clone();
        for (i, t) in other.tensors.iter_mut().enumerate().filter(|(i, _)| all || *i == 3) {
            let axis = if i == 0 { 1 } else { 2 };
            let tail = t.narrow(axis, at, t.dim(axis)? - at)?;
            let noise = normal(&mut rng, tail.elem_count(), 2.0);
            let noise = Tensor::from_vec(noise, tail.dims(), &Device::Cpu)?;
            *t = Tensor::cat(&[&t.narrow(axis, 0, at)?, &noise], axis)?;
        }
        Ok(other)
    }

    fn prefix(&self, n: usize) -> Result<Self> {
        let mut other = self.clone();
        for (i, t) in other.tensors.iter_mut().enumerate() {
            *t = t.narrow(if i == 0 { 1 } else { 2 }, 0, n)?.contiguous()?;
        }
        Ok(other)
    }
}

fn domain(card: &Card, params: &[(&str, &str)]) -> std::result::Result<Domain, String> {
    Ok(build(card, Slot::Mixer, params).map_err(|e| e.to_string())?.domain())
}

fn layer(card: &Card, params: &[(&str, &str)], dims: &MixerDims, weights: &Weights) -> Result<Box<dyn Mixer>> {
    mixer::layer(card.id, build(card, Slot::Mixer, params)?, dims, weights.builder())
}

/// (batch, tokens, dimensions) of a domain.
fn problems(domain: Domain) -> Vec<(usize, usize, MixerDims)> {
    let mut all = Vec::new();
    for causal in [true, false].into_iter().filter(|&c| if c { domain.causal } else { domain.full }) {
        let dims = |heads, kv_heads, head_dim, grid| MixerDims {
            kv_heads,
            grid,
            hidden: 24,
            ..MixerDims::new(heads, head_dim, causal)
        };
        if domain.grid {
            let grid = |t, h, w| Some(Grid::new(t, h, w));
            all.push((2, 96, dims(2, 2, 8, grid(1, 8, 12))));
            all.push((1, 120, dims(4, 2, 16, grid(2, 10, 6))));
            all.push((1, 63, dims(1, 1, 8, grid(1, 7, 9))));
        } else {
            all.push((1, 193, dims(4, 2, 16, None)));
            all.push((2, 64, dims(2, 2, 8, None)));
            all.push((1, 1, dims(1, 1, 8, None)));
            all.push((1, 37, dims(2, 1, 8, None)));
        }
    }
    all
}

/// About `t` tokens of one narrow head.
fn long(domain: Domain, t: usize) -> (usize, MixerDims) {
    let grid = domain.grid.then(|| Grid::new(t.div_ceil(256), 16, 16));
    (grid.map_or(t, |g| g.tokens()), MixerDims { grid, ..MixerDims::new(1, 8, domain.causal) })
}

fn text<T>(r: Result<T>) -> std::result::Result<T, String> {
    r.map_err(|e| e.to_string())
}

fn basic(card: &Card) -> Finding {
    for (i, (b, t, dims)) in problems(domain(card, &[])?).into_iter().enumerate() {
        let what = format!("batch {b}, {t} tokens, {dims:?}");
        let p = text(Problem::new(b, t, dims, 7 + i as u64))?;
        let layer = layer(card, &[], &dims, &Weights::seeded(1)).map_err(|e| format!("{what}: {e}"))?;
        let m = p.mix(layer.as_ref()).map_err(|e| format!("{what}: {e}"))?;
        if m.out.dims() != p.tensors[1].dims() {
            return Err(format!("{what}: output has shape {:?}", m.out.dims()));
        }
        let x = text(flat(&m.out))?;
        if let Some(bad) = x.iter().find(|v| !v.is_finite()) {
            return Err(format!("{what}: output holds {bad}"));
        }
        let again = text(p.mix(layer.as_ref()))?;
        if text(flat(&again.out))? != x || again.work != m.work || again.select != m.select {
            return Err(format!("{what}: two runs on the same input differ in output or work"));
        }
    }
    Ok(())
}

fn causal(card: &Card, block: usize, strict: bool) -> Finding {
    let t = (2 * block + 37).max(150);
    let grid = domain(card, &[])?.grid.then(|| Grid::new(1, 1, block));
    let dims = MixerDims { hidden: 24, kv_heads: 1, grid, ..MixerDims::new(2, 8, true) };
    let layer = text(layer(card, &[], &dims, &Weights::seeded(2)))?;
    let p = text(Problem::new(1, t, dims, 23))?;
    let rows = |m: &Mixed, n: usize| text(m.out.narrow(2, 0, n).map_err(Into::into).and_then(|x| flat(&x)));
    let full = text(p.mix(layer.as_ref()))?;
    let cuts = if block > 1 { vec![block, 2 * block] } else { vec![1, 37, 64, 149] };
    for cut in cuts {
        let other = text(p.scrambled(cut, strict).and_then(|p| p.mix(layer.as_ref())))?;
        let what = format!("tokens from {cut} on changed, rows before it");
        close(&what, &rows(&other, cut)?, &rows(&full, cut)?, ROUNDING)?;
        if strict {
            let short = text(p.prefix(cut).and_then(|p| p.mix(layer.as_ref())))?;
            close(&format!("prefix of {cut}"), &rows(&short, cut)?, &rows(&full, cut)?, ROUNDING)?;
        }
    }
    Ok(())
}

fn exact(card: &Card, params: &[(&str, &str)]) -> Finding {
    for (i, (b, t, dims)) in problems(domain(card, params)?).into_iter().enumerate() {
        let p = text(Problem::new(b, t, dims, 31 + i as u64))?;
        let m = text(layer(card, params, &dims, &Weights::seeded(3)).and_then(|l| p.mix(l.as_ref())))?;
        let [_, q, k, v, ..] = &p.tensors;
        let options = AttendOptions { causal: dims.causal, ..AttendOptions::default() };
        let dense = text(attend(q, k, v, &options, None).and_then(|a| flat(&a.out)))?;
        close(&format!("{t} tokens against exact attention"), &text(flat(&m.out))?, &dense, ROUNDING)?;
    }
    Ok(())
}

/// Slopes of a weighted sum of the outputs (and of the auxiliary loss) along random directions, of each input and each
/// parameter, against central differences. A choice may turn within the step, so two steps are tried and
/// the better one counts; a wrong gradient agrees with neither.
fn gradients(card: &Card) -> Finding {
    let domain = domain(card, &[])?;
    for causal in [true, false].into_iter().filter(|&c| if c { domain.causal } else { domain.full }) {
        let grid = domain.grid.then(|| Grid::new(1, 6, 8));
        let dims = MixerDims { hidden: 16, kv_heads: 1, grid, ..MixerDims::new(2, 8, causal) };
        text(slopes(card, &dims).map_err(|e| crate::Error::Param { system: card.id.into(), message: e.to_string() }))??;
    }
    Ok(())
}

fn slopes(card: &Card, dims: &MixerDims) -> Result<Finding> {
    let weights = Weights::seeded(4);
    let layer = layer(card, &[], dims, &weights)?;
    let p = Problem::new(1, 48, *dims, 41)?;
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let upstream =
        Tensor::from_vec(normal(&mut rng, p.tensors[1].elem_count(), 1.0), p.tensors[1].dims(), &Device::Cpu)?;
    let value = |p: &Problem| -> Result<Tensor> {
        let m = p.mix(layer.as_ref())?;
        let sum = (m.out.contiguous()? * &upstream)?.sum_all()?;
        Ok(match m.loss {
            Some(loss) => (sum + loss)?,
            None => sum,
        })
    };
    let inputs = p.tensors.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
    let tracked = Problem { tensors: std::array::from_fn(|i| inputs[i].as_tensor().clone()) };
    let grads = value(&tracked)?.backward()?;
    let names = ["x", "q", "k", "v", "q before rotation", "k before rotation"];
    let mut all: Vec<(String, Var, bool)> =
        names.iter().zip(inputs).map(|(n, v)| ((*n).to_owned(), v, false)).collect();
    all.extend(weights.all().into_iter().map(|(n, v)| (format!("parameter {n}"), v, true)));
    for (name, var, parameter) in all {
        let base = var.as_tensor().copy()?;
        let grad = grads.get(var.as_tensor()).cloned();
        if parameter && grad.is_none() {
            return Ok(Err(format!("{name} has no gradient: it would never train")));
        }
        let direction = Tensor::from_vec(normal(&mut rng, base.elem_count(), 1.0), base.dims(), &Device::Cpu)?;
        let slope = match &grad {
            Some(g) => f64::from((g.contiguous()? * &direction)?.sum_all()?.to_scalar::<f32>()?),
            None => 0.0,
        };
        let mut best = (f64::INFINITY, 0.0);
        for step in [1e-2, 2e-3] {
            let at = |s: f64| -> Result<f64> {
                var.set(&(&base + (&direction * s)?)?)?;
                Ok(f64::from(value(&tracked)?.to_scalar::<f32>()?))
            };
            let difference = (at(step)? - at(-step)?) / (2.0 * step);
            // Floor: what f32 rounding of the sum leaves of a difference.
            let floor = 1e-6 * (upstream.elem_count() as f64).sqrt() * 10.0 / step;
            let apart = ((difference - slope).abs() - floor).max(0.0) / slope.abs().max(difference.abs()).max(1e-3);
            if apart < best.0 {
                best = (apart, difference);
            }
        }
        var.set(&base)?;
        if best.0 > SLOPE {
            return Ok(Err(format!("{name}: gradient gives a slope of {slope:.5}, differences {:.5}", best.1)));
        }
    }
    Ok(Ok(()))
}

fn work(card: &Card, pairs: Growth, flops: Growth) -> Finding {
    let domain = domain(card, &[])?;
    let at =
        |t: usize| {
            let (t, dims) = long(domain, t);
            text(Problem::new(1, t, dims, 51).and_then(|p| {
                p.mix(layer(card, &[], &dims, &Weights::seeded(6))?.as_ref()).map(|m| (m.work, m.select))
            }))
        };
    let (half, full) = (at(8_192)?, at(16_384)?);
    let e = exponent(half.0.pairs, full.0.pairs);
    if e > allowed(pairs) {
        return Err(format!("pairs grow as T^{e:.2}, declared {pairs:?}"));
    }
    let e = exponent(half.0.flops + half.1.flops, full.0.flops + full.1.flops);
    if e > allowed(flops) {
        return Err(format!("flops grow as T^{e:.2}, declared {flops:?}"));
    }
    Ok(())
}

fn monotone(card: &Card, param: &str, values: &[&str]) -> Finding {
    let (t, dims) = long(domain(card, &[])?, 1024);
    let p = text(Problem::new(1, t, dims, 61))?;
    let mut last = (0, "");
    for v in values {
        let m = text(layer(card, &[(param, v)], &dims, &Weights::seeded(7)).and_then(|l| p.mix(l.as_ref())))?;
        if m.work.pairs < last.0 {
            return Err(format!("{param}={v} visits {} pairs, fewer than {} at {}", m.work.pairs, last.0, last.1));
        }
        last = (m.work.pairs, v);
    }
    Ok(())
}
