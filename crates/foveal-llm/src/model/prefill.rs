//! Running a prompt: layer by layer, and inside a layer chunk by chunk.
//!
//! Layers are the outer loop although a prompt may be longer than a chunk: a layer's keys and
//! values are then complete before the next layer begins, so only one layer's are ever held in
//! f32 (unless captured), and nothing is copied from chunk to chunk.

use super::{
    AttentionDtype, LayerKv, LogitsFor, Model, OBSERVED, PrefillOptions, Prompt, ROWS, Recorded, Scratch, Stats,
    interrupted,
};
use crate::error::{LlmError, Result};
use crate::plan::{LayerMixer, LayerPrefill, Resolved};
use candle_core::{CpuStorage, Device, Storage, Tensor};
use foveal::Work;
use foveal::mixer::MixInput;
use foveal::prim::rope::Rope;
use foveal::prim::{AttendOptions, attend, attend_selected};
use foveal::sparse::{HeadProblem, HeadSelection, Mat, Precision, Selector};
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;
use std::time::Instant;

/// q, k and v of a whole prompt in one layer.
struct Qkv {
    /// (T, H, D).
    q: Vec<f32>,
    /// (H_kv, T, D) before rotation, or empty.
    k_pre: Vec<f32>,
    /// (H_kv, T, D).
    k: Vec<f32>,
    /// (H_kv, T, D).
    v: Vec<f32>,
}

/// What one layer of one chunk returned.
struct Chunk {
    /// (1, H, Tq, D) f32, in (1, Tq, H, D) memory.
    out: Tensor,
    work: Work,
    select: Work,
    select_seconds: f64,
    selections: Vec<HeadSelection>,
}

impl Model {
    /// [`Model::run_watched`] without a watcher.
    pub(super) fn run_prompt(
        &self,
        tokens: &[u32],
        plan: &Resolved,
        o: &PrefillOptions,
        pre: bool,
        keep: impl FnMut(usize, &foveal::cache::Prompt) -> Result<()>,
    ) -> Result<Prompt> {
        self.run_watched(tokens, plan, o, pre, &|_, _| Ok(()), keep)
    }

    /// Run `tokens`; `watch` sees each layer's input rows (T, hidden), `keep` its keys and values
    /// as soon as they are complete. `pre` asks for keys before rotation.
    pub(super) fn run_watched(
        &self,
        tokens: &[u32],
        plan: &Resolved,
        o: &PrefillOptions,
        pre: bool,
        watch: &dyn Fn(&[f32], usize) -> Result<()>,
        mut keep: impl FnMut(usize, &foveal::cache::Prompt) -> Result<()>,
    ) -> Result<Prompt> {
        let c = self.config();
        let t = tokens.len();
        if t == 0 {
            return Err(LlmError::Input { problem: "the prompt is empty; give at least one token".into() });
        }
        if let Some((l, h)) = o.record.iter().find(|(l, h)| *l >= c.num_layers || *h >= c.num_heads) {
            return Err(LlmError::Input {
                problem: format!(
                    "layer {l}, head {h} cannot be recorded; the model has {} layers of {} heads",
                    c.num_layers, c.num_heads
                ),
            });
        }
        let begin = Instant::now();
        let mut untimed = 0f64;
        let mut stats = Stats { tokens: t, ..Stats::default() };
        let chunk = o.chunk.clamp(1, t);
        let steps = c.num_layers * t.div_ceil(chunk);
        let wanted = match o.logits {
            LogitsFor::None => 0,
            LogitsFor::Last => 1,
            LogitsFor::LastN(n) => n.min(t),
        };
        let (hidden, d) = (c.hidden_size, c.head_dim);
        let row = c.num_heads * d;
        let rope = self.rotary.at(t);
        let tables = rope.tables(0, t);
        let mut x = self.embed(tokens)?;
        let mut s = Scratch::default();
        let mut out = Prompt { len: t, hidden_rows: wanted, ..Prompt::default() };
        let mut captured = Vec::new();
        for l in 0..c.num_layers {
            watch(&x, l)?;
            let Qkv { q, k_pre, k, v } = self.project_prompt(l, &x, &tables, pre || o.capture_pre, &mut s)?;
            let q_len = t.min(OBSERVED);
            let q_obs = last_queries(&q, [c.num_heads, q_len, d]);
            let heads = |v: Vec<f32>| Tensor::from_vec(v, (1, c.num_kv_heads, t, d), &Device::Cpu);
            let q = Tensor::from_vec(q, (1, t, c.num_heads, d), &Device::Cpu)?.transpose(1, 2)?;
            let (k, v) = (heads(k)?, heads(v)?);
            let window = c.window(l);
            let options = AttendOptions { causal: true, window, scale: Some(self.scale()), ..Default::default() };
            let attention = Instant::now();
            let low = match o.attention {
                AttentionDtype::F32 => None,
                AttentionDtype::Bf16 => Some((rounded(&q)?, rounded(&k)?, rounded(&v)?)),
            };
            stats.attention_seconds += attention.elapsed().as_secs_f64();
            let (mut error, mut norm) = (0f64, 0f64);
            for (i, from) in (0..t).step_by(chunk).enumerate() {
                if interrupted(o.cancel.as_deref()) {
                    return Err(LlmError::Interrupted);
                }
                let n = chunk.min(t - from);
                let part = |q: &Tensor, k: &Tensor, v: &Tensor| -> Result<(Tensor, Tensor, Tensor)> {
                    Ok((q.narrow(2, from, n)?, k.narrow(2, 0, from + n)?, v.narrow(2, 0, from + n)?))
                };
                let exact = part(&q, &k, &v)?;
                let used = low.as_ref().map(|(q, k, v)| part(q, k, v)).transpose()?;
                let attention = Instant::now();
                let done = match &plan.prefill[l] {
                    LayerPrefill::Heads(systems) => attend_chunk(systems, &exact, used.as_ref(), &options, l)?,
                    LayerPrefill::Layer(m) => mix_chunk(m, &exact, &options, &tables, c.rope_dim / 2)?,
                };
                stats.attention_seconds += attention.elapsed().as_secs_f64();
                stats.select_seconds += done.select_seconds;
                stats.attend += done.work;
                stats.select += done.select;

                let probing = Instant::now();
                if o.probe_rows > 0 {
                    for r in probed(o.probe_rows, t).filter(|r| (from..from + n).contains(r)) {
                        let (e, m) = row_error(&q, &k, &v, &done.out, r, r - from, &options)?;
                        error += e;
                        norm += m;
                    }
                }
                if from + n == t {
                    for &(_, head) in o.record.iter().filter(|x| x.0 == l) {
                        let selection = done.selections.get(head).cloned();
                        out.recorded.push(record(&exact, l, head, c.num_heads / c.num_kv_heads, selection)?);
                    }
                }
                untimed += probing.elapsed().as_secs_f64();

                // The last layer's MLP is of use only where a hidden row is wanted.
                let first = if l + 1 == c.num_layers { (t - wanted).max(from) } else { from };
                let (storage, layout) = done.out.storage_and_layout();
                let Storage::Cpu(CpuStorage::F32(attended)) = &*storage else {
                    return Err(LlmError::Input { problem: "attention returned no f32 tensor on the CPU".into() });
                };
                let attended = &attended[layout.start_offset()..];
                for a in (first..from + n).step_by(ROWS) {
                    let m = ROWS.min(from + n - a);
                    self.finish_layer(
                        l,
                        &attended[(a - from) * row..(a - from + m) * row],
                        &mut x[a * hidden..(a + m) * hidden],
                        m,
                        &mut s,
                    )?;
                }
                if let Some(p) = &o.progress {
                    p(l * t.div_ceil(chunk) + i + 1, steps);
                }
            }
            if o.probe_rows > 0 {
                out.probe.push(if norm > 0.0 { (error / norm).sqrt() as f32 } else { 0.0 });
            }
            drop(q);
            let keeping = Instant::now();
            with_slice(&k, |k| {
                with_slice(&v, |v| -> Result<()> {
                    keep(l, &foveal::cache::Prompt { len: t, k_pre: &k_pre, k, v, q_obs: &q_obs, q_len })?;
                    if o.capture {
                        let k_pre = if o.capture_pre { k_pre.clone() } else { Vec::new() };
                        captured.push(LayerKv { k_pre, k: k.to_vec(), v: v.to_vec(), q_obs: q_obs.clone(), q_len });
                    }
                    Ok(())
                })?
            })??;
            stats.store_seconds += keeping.elapsed().as_secs_f64();
        }
        out.hidden = self.final_norm(&x[(t - wanted) * hidden..])?;
        out.kv = Arc::new(captured);
        stats.seconds = begin.elapsed().as_secs_f64() - untimed;
        out.stats = stats;
        Ok(out)
    }

    /// q, k, v of all rows of `x`, heads normalised and rotated.
    fn project_prompt(
        &self,
        layer: usize,
        x: &[f32],
        (cos, sin): &(Vec<f32>, Vec<f32>),
        pre: bool,
        s: &mut Scratch,
    ) -> Result<Qkv> {
        let c = self.config();
        let (h, hkv, d) = (c.num_heads, c.num_kv_heads, c.head_dim);
        let (hidden, width, half) = (c.hidden_size, (h + 2 * hkv) * d, c.rope_dim / 2);
        let t = x.len() / hidden;
        let kv = || vec![0f32; hkv * t * d];
        let mut out = Qkv { q: vec![0f32; t * h * d], k_pre: if pre { kv() } else { Vec::new() }, k: kv(), v: kv() };
        let angle = |pos: usize| (&cos[pos * half..(pos + 1) * half], &sin[pos * half..(pos + 1) * half]);
        for a in (0..t).step_by(ROWS) {
            let n = ROWS.min(t - a);
            self.project(layer, &x[a * hidden..(a + n) * hidden], n, s)?;
            let qkv = &s.qkv[..n * width];
            let q = &mut out.q[a * h * d..(a + n) * h * d];
            q.par_chunks_exact_mut(h * d).zip(qkv.par_chunks_exact(width)).with_min_len(16).enumerate().for_each(
                |(i, (q, x))| {
                    q.copy_from_slice(&x[..h * d]);
                    let (cos, sin) = angle(a + i);
                    for q in q.chunks_exact_mut(d) {
                        Rope::rotate_row(q, cos, sin);
                    }
                },
            );
            // Keys and values go to head-major memory: what caches take and attention streams.
            let row = |head: usize, i: usize| &qkv[i * width + head * d..i * width + (head + 1) * d];
            let keys = |head: usize, k: &mut [f32], rotate: bool| {
                for (i, k) in k[a * d..(a + n) * d].chunks_exact_mut(d).enumerate() {
                    k.copy_from_slice(row(h + head, i));
                    if rotate {
                        let (cos, sin) = angle(a + i);
                        Rope::rotate_row(k, cos, sin);
                    }
                }
            };
            out.k.par_chunks_exact_mut(t * d).enumerate().for_each(|(head, k)| keys(head, k, true));
            out.k_pre.par_chunks_exact_mut(t * d).enumerate().for_each(|(head, k)| keys(head, k, false));
            out.v.par_chunks_exact_mut(t * d).enumerate().for_each(|(head, v)| {
                for (i, v) in v[a * d..(a + n) * d].chunks_exact_mut(d).enumerate() {
                    v.copy_from_slice(row(h + hkv + head, i));
                }
            });
        }
        Ok(out)
    }
}

/// Attention of one chunk: selection on the f32 tensors `exact`, attention on `used` (bf16) if given.
fn attend_chunk(
    systems: &[Option<Arc<dyn Selector>>],
    exact: &(Tensor, Tensor, Tensor),
    used: Option<&(Tensor, Tensor, Tensor)>,
    options: &AttendOptions,
    layer: usize,
) -> Result<Chunk> {
    let (q, k, v) = used.unwrap_or(exact);
    if systems.iter().all(Option::is_none) {
        let a = attend(q, k, v, options, None)?;
        let (select, selections) = (Work::default(), Vec::new());
        return Ok(Chunk { out: a.out, work: a.work, select, select_seconds: 0.0, selections });
    }
    // An estimate need not be more exact than the attention that it serves.
    let precision = if used.is_some() { Precision::Bf16 } else { Precision::F32 };
    let begin = Instant::now();
    let (_, heads, tq, d) = exact.0.dims4()?;
    let (_, kv_heads, tk, _) = exact.1.dims4()?;
    let chosen = with_strided(&exact.0, |q, qs| {
        with_strided(&exact.1, |k, ks| {
            systems
                .par_iter()
                .enumerate()
                .with_max_len(1)
                .map(|(head, system)| {
                    let problem = HeadProblem {
                        q: Mat::new(&q[head * qs[1]..], tq, d, qs[2]),
                        k: Mat::new(&k[head / (heads / kv_heads) * ks[1]..], tk, d, ks[2]),
                        scale: options.scale.unwrap_or(1.0 / (d as f32).sqrt()),
                        layer,
                        head,
                        precision,
                        causal: true,
                        grid: None,
                    };
                    match system {
                        Some(s) => s.select(&problem),
                        None => Ok((HeadSelection::dense(&problem), Work::default())),
                    }
                })
                .collect::<foveal::Result<Vec<_>>>()
        })
    })???;
    let select_seconds = begin.elapsed().as_secs_f64();
    let select = chosen.iter().map(|c| c.1).sum();
    let selections: Vec<HeadSelection> = chosen.into_iter().map(|c| c.0).collect();
    let a = attend_selected(q, k, v, options, selections.clone())?;
    Ok(Chunk { out: a.out, work: a.work, select, select_seconds, selections })
}

/// Attention of one chunk by a system that serves all heads together, in f32. Its choosing cannot be timed apart.
fn mix_chunk(
    m: &LayerMixer,
    (q, k, v): &(Tensor, Tensor, Tensor),
    options: &AttendOptions,
    tables: &(Vec<f32>, Vec<f32>),
    half: usize,
) -> Result<Chunk> {
    let before = match m.before_rotation {
        true => Some((unrotated(q, k.dim(2)? - q.dim(2)?, tables, half)?, unrotated(k, 0, tables, half)?)),
        false => None,
    };
    let input = MixInput {
        scale: options.scale,
        before_rotation: before.as_ref().map(|(q, k)| (q, k)),
        ..MixInput::new(q, k, v)
    };
    let mixed = m.mixer.mix(&input)?;
    // The engine reads rows of all heads together.
    let out = mixed.out.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    Ok(Chunk { out, work: mixed.work, select: mixed.select, select_seconds: 0.0, selections: mixed.selections })
}

/// Rows (1, H, T, D) as they were before their rotation at positions from `first` on.
fn unrotated(x: &Tensor, first: usize, (cos, sin): &(Vec<f32>, Vec<f32>), half: usize) -> Result<Tensor> {
    let x = x.contiguous()?;
    let (_, _, t, d) = x.dims4()?;
    let back: Vec<f32> = sin.iter().map(|s| -s).collect();
    let rows = with_slice(&x, |x| {
        let mut rows = x.to_vec();
        rows.par_chunks_exact_mut(t * d).for_each(|head| {
            for (i, row) in head.chunks_exact_mut(d).enumerate() {
                let at = (first + i) * half..(first + i + 1) * half;
                Rope::rotate_row(row, &cos[at.clone()], &back[at]);
            }
        });
        rows
    })?;
    Ok(Tensor::from_vec(rows, x.dims(), &Device::Cpu)?)
}

/// Hand a tensor's f32 memory from its first element on, and its strides, to `f`.
fn with_strided<R>(t: &Tensor, f: impl FnOnce(&[f32], &[usize]) -> R) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(x)) => Ok(f(&x[layout.start_offset()..], layout.stride())),
        _ => Err(LlmError::Input { problem: "a tensor of the engine is not f32 on the CPU".into() }),
    }
}

/// [`with_strided`] of a contiguous tensor.
fn with_slice<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    with_strided(t, |x, _| f(&x[..t.elem_count()]))
}

/// A f32 tensor without gaps in memory, in bf16 and with the same strides; on all threads, which
/// candle's own conversion is not.
fn rounded(t: &Tensor) -> Result<Tensor> {
    let x = with_strided(t, |x, _| x[..t.elem_count()].par_iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>())?;
    let order = t.stride().is_sorted_by(|a, b| a >= b);
    let shape = t.dims4()?;
    Ok(if order {
        Tensor::from_vec(x, shape, &Device::Cpu)?
    } else {
        Tensor::from_vec(x, (shape.0, shape.2, shape.1, shape.3), &Device::Cpu)?.transpose(1, 2)?
    })
}

/// The last `q_len` rows of q (T, H, D) as (H, q_len, D).
fn last_queries(q: &[f32], [h, q_len, d]: [usize; 3]) -> Vec<f32> {
    let tail = &q[q.len() - q_len * h * d..];
    let mut out = vec![0f32; tail.len()];
    for (head, o) in out.chunks_exact_mut(q_len * d).enumerate() {
        for (i, o) in o.chunks_exact_mut(d).enumerate() {
            o.copy_from_slice(&tail[(i * h + head) * d..(i * h + head + 1) * d]);
        }
    }
    out
}

/// `n` rows of `t` spread evenly, the last one included.
fn probed(n: usize, t: usize) -> impl Iterator<Item = usize> {
    let n = n.min(t);
    (1..=n).map(move |i| i * t / n - 1)
}

/// (‖o − o*‖², ‖o*‖²) of one row over all heads; `at` is the row's place in `out`.
fn row_error(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &Tensor,
    row: usize,
    at: usize,
    options: &AttendOptions,
) -> Result<(f64, f64)> {
    let exact = attend(&q.narrow(2, row, 1)?, &k.narrow(2, 0, row + 1)?, &v.narrow(2, 0, row + 1)?, options, None)?.out;
    Ok(difference(&flat(&out.narrow(2, at, 1)?)?, &flat(&exact)?))
}

fn flat(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.flatten_all()?.to_vec1()?)
}

/// (‖a − b‖², ‖b‖²).
pub(crate) fn difference(a: &[f32], b: &[f32]) -> (f64, f64) {
    let square = |x: f64| x * x;
    a.iter()
        .zip(b)
        .fold((0.0, 0.0), |(e, n), (a, b)| (e + square(f64::from(*a) - f64::from(*b)), n + square(f64::from(*b))))
}

fn record(
    (q, k, _): &(Tensor, Tensor, Tensor),
    layer: usize,
    head: usize,
    group: usize,
    selection: Option<HeadSelection>,
) -> Result<Recorded> {
    let (_, _, tq, d) = q.dims4()?;
    Ok(Recorded {
        layer,
        head,
        q: flat(&q.narrow(1, head, 1)?)?,
        k: flat(&k.narrow(1, head / group, 1)?)?,
        tq,
        tk: k.dims4()?.2,
        d,
        selection,
    })
}
