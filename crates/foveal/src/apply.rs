//! One system on raw tensors: what anyone needs to check a system against a reference of their own.

use crate::error::{Error, Result};
use crate::mixer::{self, MixInput, MixerDims, Weights};
use crate::prim::AttendOptions;
use crate::sparse::run::{self, At, NO_LAYER};
use crate::sparse::{Grid, HeadSelection, Selector, mask};
use crate::system::System;
use candle_core::{DType, Device, Tensor};
use foveal_kernels::Work;

/// Attention of one system over raw tensors.
pub struct Applied {
    /// Output, (B, H, Tq, Dv).
    pub out: Tensor,
    /// Log-sum-exp, (B, H, Tq); none of systems that change the weights.
    pub lse: Option<Tensor>,
    /// Work of the attention itself.
    pub work: Work,
    /// Work of choosing what to visit.
    pub select: Work,
    /// What each (batch, query head) visited, batch major; empty when everything visible was.
    pub selections: Vec<HeadSelection>,
    /// (B, H, Tq, Tk).
    pub shape: [usize; 4],
    /// Whether the causal mask was applied.
    pub causal: bool,
}

/// How a system is applied.
#[derive(Debug, Clone, Copy)]
pub struct ApplyOptions {
    /// Factor on q·k; `None` = 1/√D.
    pub scale: Option<f32>,
    /// Whether queries see no later keys.
    pub causal: bool,
    /// The token grid among the keys, for systems that need one.
    pub grid: Option<Grid>,
}

impl ApplyOptions {
    /// Causal attention with the default scale.
    pub const CAUSAL: Self = Self { scale: None, causal: true, grid: None };
}

/// Run a prefill system on q (B, H, Tq, D), k (B, H_kv, Tk, D) and v (B, H_kv, Tk, Dv); f16 and
/// bf16 are converted to f32 first. `id` names the system in errors.
///
/// Errors: shapes that do not fit (both are named), NaN or infinity in an input or (by overflow) in
/// the output, a system that is
/// no prefill system, a problem outside of its domain (a direction that it does not know, a grid that it lacks).
pub fn apply_prefill(
    id: &str,
    system: System,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: ApplyOptions,
) -> Result<Applied> {
    let ApplyOptions { scale, causal, grid } = options;
    let (q, k, v) = (prepare("q", q)?, prepare("k", k)?, prepare("v", v)?);
    let shape = check_shapes(&q, &k, &v, causal)?;
    system.domain().check(id, causal, grid, shape[3])?;
    let at = At { layer: NO_LAYER, grid };
    let selector: Option<Box<dyn Selector>> = match system {
        System::Dense => None,
        System::Selector(s) => Some(s),
        System::Mixer(_) => return apply_mixer(id, system, [&q, &k, &v], shape, options),
        System::Cache(_) => {
            return Err(Error::WrongSlot {
                system: id.into(),
                wanted: "a prefill system",
                slots: "another slot; `foveal show` lists its slots".into(),
            });
        }
    };
    let options = AttendOptions { scale, causal, ..AttendOptions::default() };
    let p = run::prefill(|_| selector.as_deref(), &q, &k, &v, &options, at)?;
    finite(id, &p.attended.out)?;
    let lse = Some(p.attended.lse);
    Ok(Applied {
        out: p.attended.out,
        lse,
        work: p.attended.work,
        select: p.select,
        selections: p.selections,
        shape,
        causal,
    })
}

/// [`apply_prefill`] of a layer without parameters.
fn apply_mixer(
    id: &str,
    system: System,
    [q, k, v]: [&Tensor; 3],
    shape: [usize; 4],
    ApplyOptions { scale, causal, grid }: ApplyOptions,
) -> Result<Applied> {
    let (_, heads, _, head_dim) = q.dims4()?;
    let kv_heads = k.dims4()?.1;
    let dims = MixerDims { kv_heads, grid, ..MixerDims::new(heads, head_dim, causal) };
    let layer = mixer::layer(id, system, &dims, Weights::none().builder())?;
    let m = layer.mix(&MixInput { scale, ..MixInput::new(q, k, v) })?;
    finite(id, &m.out)?;
    Ok(Applied { out: m.out, lse: None, work: m.work, select: m.select, selections: m.selections, shape, causal })
}

fn finite(id: &str, out: &Tensor) -> Result<()> {
    match flat(out)?.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::Param {
            system: id.into(),
            message: format!(
                "the output is not finite at flat index {at}: scores or values overflow f32; scale q, k or v down"
            ),
        }),
    }
}

impl Applied {
    /// Keys that query `i` may see at all.
    fn visible(&self, i: usize) -> usize {
        let [_, _, tq, tk] = self.shape;
        if self.causal { (tk + i + 1).saturating_sub(tq) } else { tk }
    }

    /// (query, key) pairs that exact attention visits, over all batches and heads.
    pub fn dense_pairs(&self) -> u64 {
        let [b, h, tq, _] = self.shape;
        (b * h) as u64 * (0..tq).map(|i| self.visible(i) as u64).sum::<u64>()
    }

    /// (query, key) pairs that were visited: exact, whatever tiles the kernels worked in.
    ///
    /// Of a system that changes the weights, what its counters say.
    pub fn visited_pairs(&self) -> u64 {
        let [.., tq, tk] = self.shape;
        if self.lse.is_none() {
            return self.work.pairs;
        }
        if self.selections.is_empty() {
            return self.dense_pairs();
        }
        self.selections.iter().map(|s| mask::pairs(s, tq, tk, self.causal)).sum()
    }

    /// Dense 0/1 mask u8 (B, H, Tq, Tk): 1 where the query attended to the key. Refused for a system that changes
    /// the weights: its output is not attention under a mask.
    pub fn mask(&self) -> Result<Tensor> {
        if self.lse.is_none() {
            return Err(Error::Param {
                system: "apply".into(),
                message: "mask: this system is not exact attention under a mask; leave the mask out".into(),
            });
        }
        let [b, h, tq, tk] = self.shape;
        let mut all = vec![0u8; b * h * tq * tk];
        if tk > 0 {
            for (r, row) in all.chunks_exact_mut(tk).enumerate() {
                let (bh, i) = (r / tq, r % tq);
                match self.selections.get(bh) {
                    None => row[..self.visible(i)].fill(1),
                    Some(s) => mask::mask_row(s, i, tq, self.causal, row),
                }
            }
        }
        Ok(Tensor::from_vec(all, (b, h, tq, tk), &Device::Cpu)?)
    }
}

fn flat(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.flatten_all()?.to_vec1()?)
}

fn prepare(name: &'static str, t: &Tensor) -> Result<Tensor> {
    if t.dims().len() != 4 {
        return Err(Error::Shape {
            op: "apply",
            tensor: name,
            shape: t.dims().to_vec(),
            expected: "(batch, heads, tokens, head_dim)".into(),
        });
    }
    if !matches!(t.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(Error::Dtype {
            op: "apply",
            tensor: name,
            dtype: format!("{:?}", t.dtype()),
            expected: "f32, f16, bf16",
        });
    }
    let t = t.to_dtype(DType::F32)?.contiguous()?;
    if let Some(at) = flat(&t)?.iter().position(|x| !x.is_finite()) {
        return Err(Error::Param {
            system: "apply".into(),
            message: format!("{name} holds NaN or infinity at flat index {at}; attention over it is undefined"),
        });
    }
    Ok(t)
}

fn check_shapes(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<[usize; 4]> {
    let ([b, h, tq, d], [kb, hkv, tk, kd], [vb, vh, vt, vd]) = (dims(q)?, dims(k)?, dims(v)?);
    let bad = |tensor, t: &Tensor, expected: String| {
        Err(Error::Shape { op: "apply", tensor, shape: t.dims().to_vec(), expected })
    };
    let of_q = format!("for q of shape {:?}", q.dims());
    if d == 0 || h == 0 || vd == 0 {
        return bad("q", q, format!("at least one head and one channel; v has shape {:?}", v.dims()));
    }
    if kb != b || kd != d {
        return bad("k", k, format!("({b}, H_kv, Tk, {d}) {of_q}"));
    }
    if hkv == 0 || h % hkv != 0 {
        return bad("k", k, format!("a number of heads that divides {h} {of_q}"));
    }
    if [vb, vh, vt] != [kb, hkv, tk] {
        return bad("v", v, format!("({b}, {hkv}, {tk}, Dv) for k of shape {:?}", k.dims()));
    }
    if causal && tk < tq {
        return bad("k", k, format!("at least {tq} tokens {of_q}, because query i sees keys up to Tk - Tq + i"));
    }
    Ok([b, h, tq, tk])
}

fn dims(t: &Tensor) -> Result<[usize; 4]> {
    let (a, b, c, d) = t.dims4()?;
    Ok([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry;
    use crate::system::{Slot, Spec};
    use foveal_kernels::twin;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(seed: u64, shape: [usize; 4]) -> (Tensor, Vec<f32>) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n = shape.iter().product();
        // Sum of uniforms: near enough to normal, no extra dependency.
        let x: Vec<f32> = (0..n).map(|_| (0..4).map(|_| rng.random_range(-1f32..1.0)).sum::<f32>()).collect();
        (Tensor::from_vec(x.clone(), shape.to_vec(), &Device::Cpu).unwrap(), x)
    }

    fn wide(x: &[f32]) -> Vec<f64> {
        x.iter().map(|&x| f64::from(x)).collect()
    }

    /// Plain f32 attention under a mask: how far honest f32 arithmetic is from f64.
    fn plain_f32(q: &[f32], k: &[f32], v: &[f32], shape: [usize; 4], hkv: usize, d: usize, mask: &[u8]) -> Vec<f32> {
        let [b, h, tq, tk] = shape;
        let mut out = vec![0f32; b * h * tq * d];
        for r in 0..b * h * tq {
            let kv = r / (h * tq) * hkv + r / tq % h / (h / hkv);
            let row = |x: &[f32], j: usize| x[(kv * tk + j) * d..(kv * tk + j + 1) * d].to_vec();
            let s: Vec<(usize, f32)> = (0..tk)
                .filter(|j| mask[r * tk + j] == 1)
                .map(|j| {
                    (
                        j,
                        q[r * d..(r + 1) * d].iter().zip(row(k, j)).map(|(a, b)| a * b).sum::<f32>()
                            / (d as f32).sqrt(),
                    )
                })
                .collect();
            let m = s.iter().map(|x| x.1).fold(f32::NEG_INFINITY, f32::max);
            let l: f32 = s.iter().map(|x| (x.1 - m).exp()).sum();
            for (j, x) in s {
                let p = (x - m).exp() / l;
                out[r * d..(r + 1) * d].iter_mut().zip(row(v, j)).for_each(|(o, v)| *o += p * v);
            }
        }
        out
    }

    /// Output and lse of `id` agree with f64 attention restricted to the mask that it reports.
    fn agrees_with_twin(id: &str, [b, h, tq, tk]: [usize; 4], hkv: usize, causal: bool, grid: Option<Grid>) {
        let d = 32;
        let (q, qx) = random(1, [b, h, tq, d]);
        let (k, kx) = random(2, [b, hkv, tk, d]);
        let (v, vx) = random(3, [b, hkv, tk, d]);
        let system = registry::build(&Spec::new(id), Slot::Prefill).unwrap();
        let a = apply_prefill(id, system, &q, &k, &v, ApplyOptions { scale: None, causal, grid }).unwrap();
        let mask = a.mask().unwrap().flatten_all().unwrap().to_vec1::<u8>().unwrap();
        assert_eq!(mask.iter().map(|&x| u64::from(x)).sum::<u64>(), a.visited_pairs(), "{id}: mask and count");
        assert!(a.visited_pairs() <= a.dense_pairs() && a.visited_pairs() > 0, "{id}: density");
        let seen = |bi: usize, hi: usize, i: usize, j: usize| mask[((bi * h + hi) * tq + i) * tk + j] == 1;
        let scale = 1.0 / (d as f64).sqrt();
        let (out, lse) =
            twin::attend(&wide(&qx), &wide(&kx), &wide(&vx), [b, h, tq, d], [hkv, tk, d], scale, None, None, &seen);
        let f32_out = plain_f32(&qx, &kx, &vx, [b, h, tq, tk], hkv, d, &mask);
        let far = |x: &[f32]| x.iter().zip(&out).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        let got = a.out.contiguous().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (ours, honest) = (far(&got), far(&f32_out));
        // Floor of one part in 10⁷ of the values' size: below it, both errors are single roundings.
        assert!(ours <= 2.0 * honest.max(2e-7), "{id}: output off by {ours:e}, plain f32 by {honest:e}");
        let got = a.lse.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (g, w) in got.iter().zip(&lse) {
            assert!(
                *w == f64::from(*g) || (f64::from(*g) - w).abs() < 1e-5 * w.abs().max(1.0),
                "{id}: lse {g} for {w}"
            );
        }
    }

    #[test]
    fn dense_agrees_with_twin() {
        agrees_with_twin("flashattention-2", [2, 4, 37, 53], 2, true, None);
        agrees_with_twin("flashattention-2", [1, 3, 40, 19], 1, false, None);
    }

    #[test]
    fn every_prefill_system_computes_exactly_what_its_mask_says() {
        for card in registry::cards().iter().filter(|c| c.has_slot(Slot::Prefill)) {
            let system = registry::build(&Spec::new(card.id), Slot::Prefill).unwrap();
            if matches!(system, System::Mixer(_)) {
                continue; // Not attention under a mask.
            }
            let domain = system.domain();
            let grid = domain.grid.then_some(Grid { first: 5, t: 3, h: 9, w: 8 });
            if domain.causal {
                agrees_with_twin(card.id, [1, 2, 301, 301], 1, true, grid);
                agrees_with_twin(
                    card.id,
                    [2, 2, 65, 130],
                    2,
                    true,
                    grid.map(|_| Grid { first: 9, t: 1, h: 11, w: 11 }),
                );
            }
            if domain.full {
                agrees_with_twin(card.id, [1, 2, 301, 301], 1, false, grid);
            }
        }
    }

    #[test]
    fn half_precision_inputs_are_widened() {
        let (q, _) = random(5, [1, 2, 9, 16]);
        for t in [DType::BF16, DType::F16] {
            let low = q.to_dtype(t).unwrap();
            let want = low.to_dtype(DType::F32).unwrap();
            let a = apply_prefill("flashattention-2", System::Dense, &low, &low, &low, ApplyOptions::CAUSAL).unwrap();
            let b =
                apply_prefill("flashattention-2", System::Dense, &want, &want, &want, ApplyOptions::CAUSAL).unwrap();
            let x = |t: &Applied| t.out.contiguous().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(x(&a), x(&b));
        }
    }

    #[test]
    fn bad_inputs_name_tensor_and_both_shapes() {
        let t = |s: [usize; 4]| Tensor::zeros(s.to_vec(), DType::F32, &Device::Cpu).unwrap();
        let go = |q: &Tensor, k: &Tensor, v: &Tensor| {
            apply_prefill("flashattention-2", System::Dense, q, k, v, ApplyOptions::CAUSAL).err().unwrap().to_string()
        };
        let q = t([1, 4, 8, 16]);
        let m = go(&q, &t([1, 2, 8, 32]), &t([1, 2, 8, 16]));
        assert!(m.contains("k has shape [1, 2, 8, 32]") && m.contains("[1, 4, 8, 16]"), "{m}");
        let m = go(&q, &t([1, 3, 8, 16]), &t([1, 3, 8, 16]));
        assert!(m.contains("divides 4"), "{m}");
        let m = go(&q, &t([1, 2, 8, 16]), &t([1, 2, 9, 16]));
        assert!(m.contains("v has shape [1, 2, 9, 16]") && m.contains("k of shape [1, 2, 8, 16]"), "{m}");
        let m = go(&q, &t([1, 2, 7, 16]), &t([1, 2, 7, 16]));
        assert!(m.contains("at least 8 tokens"), "{m}");
        let nan = Tensor::from_vec(vec![0f32, f32::NAN], (1, 1, 1, 2), &Device::Cpu).unwrap();
        let m = go(&nan, &nan, &nan);
        assert!(m.contains("q holds NaN or infinity at flat index 1"), "{m}");
        let huge = Tensor::full(1e30f32, (1, 1, 2, 2), &Device::Cpu).unwrap();
        let m = go(&huge, &huge, &huge);
        assert!(m.contains("output is not finite at flat index 0") && m.contains("scale q"), "{m}");
        let int = Tensor::zeros((1, 1, 1, 2), DType::U32, &Device::Cpu).unwrap();
        assert!(go(&int, &int, &int).contains("dtype U32"), "integers");
    }
}
