//! A sequence being decoded: one cache per layer, filled from a prompt and stepped token by token.

use crate::error::{LlmError, Result};
use crate::model::{LayerKv, Model, Prompt, Scratch, Stats, difference, interrupted, room};
use foveal::cache::{LayerCache, Resident, Step};
use foveal::prim::rope::Rope;
use foveal_kernels::decode::{Codec, Decode, Segment};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// What [`Session::extend`] returns.
#[derive(Debug, Clone, Default)]
pub struct Extended {
    /// Final hidden rows of the new tokens after the last normalisation, (n, hidden).
    pub hidden: Vec<f32>,
    /// Time and work.
    pub stats: Stats,
    /// Relative error of the attention output per layer, after [`Session::probe_next`]; else empty.
    pub probe: Vec<f32>,
}

/// A sequence with its caches.
pub struct Session<'m> {
    model: &'m Model,
    caches: Vec<Box<dyn LayerCache>>,
    /// Per layer, whether the cache wants keys before rotation.
    pre: Vec<bool>,
    len: usize,
    scratch: Scratch,
    /// Head-major q, k before rotation, k, v and the output of the new tokens.
    heads: [Vec<f32>; 5],
    probe: Option<Arc<Vec<LayerKv>>>,
    /// A step failed half-way: layers disagree about the tokens they hold.
    broken: bool,
    /// Set to stop at the next layer.
    cancel: Option<Arc<AtomicBool>>,
}

impl<'m> Session<'m> {
    pub(crate) fn new(model: &'m Model, caches: Vec<Box<dyn LayerCache>>, pre: Vec<bool>, len: usize) -> Self {
        Self {
            model,
            caches,
            pre,
            len,
            scratch: Scratch::default(),
            heads: Default::default(),
            probe: None,
            broken: false,
            cancel: None,
        }
    }

    /// Watch `cancel`: once it is set, the next layer of a step of this session or of its forks
    /// ends in [`LlmError::Interrupted`].
    pub fn cancel_with(mut self, cancel: Option<Arc<AtomicBool>>) -> Self {
        self.cancel = cancel;
        self
    }

    pub(crate) fn fill(&mut self, layer: usize, prompt: &foveal::cache::Prompt) -> Result<()> {
        Ok(self.caches[layer].fill(prompt)?)
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// An independent copy, for branching one prompt into several continuations.
    pub fn fork(&self) -> Session<'m> {
        let caches = self.caches.iter().map(|c| c.fork()).collect();
        let mut s = Session::new(self.model, caches, self.pre.clone(), self.len);
        s.probe = self.probe.clone();
        s.broken = self.broken;
        s.cancel_with(self.cancel.clone())
    }

    /// Bytes held by all caches, measured from their allocations.
    pub fn resident(&self) -> Resident {
        self.caches.iter().fold(Resident::default(), |mut a, c| {
            a += c.resident();
            a
        })
    }

    /// Positions that the last token attended to in a layer, per query head; `None` = all.
    pub fn last_visited(&self, layer: usize) -> Option<Vec<Vec<u32>>> {
        self.caches.get(layer)?.last_visited()
    }

    /// Let the next [`Session::extend`] also compute exact attention for its rows against the
    /// dense keys and values that `prompt` captured. The session must stand at the prompt's end.
    ///
    /// # Errors
    /// A prompt that was not captured, or a session that has moved on.
    pub fn probe_next(&mut self, prompt: &Prompt) -> Result<()> {
        if prompt.kv.len() != self.caches.len() {
            return Err(LlmError::Input {
                problem: "probing needs a captured prompt; run prefill with capture".into(),
            });
        }
        if prompt.len != self.len {
            return Err(LlmError::Input {
                problem: format!(
                    "the session holds {} tokens and the prompt {}; probe right after the prompt",
                    self.len, prompt.len
                ),
            });
        }
        self.probe = Some(prompt.kv.clone());
        Ok(())
    }

    /// Append `tokens` and run them at once, causally.
    ///
    /// # Errors
    /// No token, a token outside the vocabulary, a cache that refused the step, or an interruption;
    /// after the last two the session cannot go on.
    pub fn extend(&mut self, tokens: &[u32]) -> Result<Extended> {
        if self.broken {
            return Err(LlmError::Input { problem: "an earlier step of this session failed; start it again".into() });
        }
        if tokens.is_empty() {
            return Err(LlmError::Input { problem: "no tokens to append; give at least one".into() });
        }
        let begin = Instant::now();
        // On a thread of the pool: from outside, each of some hundred parallel calls of a step would put this
        // thread to sleep and wake it again.
        rayon::scope(|_| {
            let x = self.model.embed(tokens)?;
            self.broken = true;
            let done = self.run(x, tokens.len(), begin)?;
            self.broken = false;
            self.len += tokens.len();
            Ok(done)
        })
    }

    fn run(&mut self, mut x: Vec<f32>, n: usize, begin: Instant) -> Result<Extended> {
        let model = self.model;
        let c = model.config();
        let (h, hkv, d) = (c.num_heads, c.num_kv_heads, c.head_dim);
        let (width, half) = ((h + 2 * hkv) * d, c.rope_dim / 2);
        let (cos, sin) = model.rotary.at(self.len + n).tables(self.len, n);
        let probing = self.probe.take();
        let mut out = Extended { stats: Stats { tokens: n, ..Stats::default() }, ..Extended::default() };
        let mut untimed = 0f64;
        for l in 0..c.num_layers {
            if interrupted(self.cancel.as_deref()) {
                return Err(LlmError::Interrupted);
            }
            model.project(l, &x, n, &mut self.scratch)?;
            let rows = &self.scratch.qkv[..n * width];
            let [q, k_pre, k, v, o] = &mut self.heads;
            let q = room(q, h * n * d);
            let k = room(k, hkv * n * d);
            let v = room(v, hkv * n * d);
            let k_pre = room(k_pre, if self.pre[l] { hkv * n * d } else { 0 });
            let o = room(o, h * n * d);
            split(rows, width, 0, n, d, q);
            split(rows, width, h * d, n, d, k);
            split(rows, width, (h + hkv) * d, n, d, v);
            if self.pre[l] {
                k_pre.copy_from_slice(k);
            }
            for r in [&mut *q, &mut *k] {
                for (i, r) in r.chunks_exact_mut(d).enumerate() {
                    let at = i % n * half;
                    Rope::rotate_row(r, &cos[at..at + half], &sin[at..at + half]);
                }
            }
            let attention = Instant::now();
            let step = Step { n, pos: self.len, q, k_pre, k, v };
            out.stats.attend += self.caches[l].step(&step, o)?;
            out.stats.attention_seconds += attention.elapsed().as_secs_f64();
            if let Some(kv) = &probing {
                let probe = Instant::now();
                out.probe.push(step_error(&kv[l], &step, o, [h, hkv, d], c.window(l), model.scale())?);
                untimed += probe.elapsed().as_secs_f64();
            }
            // (H, n, D) to (n, H·D); for one token they are the same.
            let attended = if n == 1 {
                &*o
            } else {
                for (i, r) in q.chunks_exact_mut(h * d).enumerate() {
                    for (head, r) in r.chunks_exact_mut(d).enumerate() {
                        r.copy_from_slice(&o[(head * n + i) * d..(head * n + i + 1) * d]);
                    }
                }
                &*q
            };
            model.finish_layer(l, attended, &mut x, n, &mut self.scratch)?;
        }
        out.hidden = model.final_norm(&x)?;
        out.stats.seconds = begin.elapsed().as_secs_f64() - untimed;
        Ok(out)
    }
}

/// Columns `from..` of (n, width) rows as head-major (heads, n, d).
fn split(rows: &[f32], width: usize, from: usize, n: usize, d: usize, out: &mut [f32]) {
    for (head, out) in out.chunks_exact_mut(n * d).enumerate() {
        for (i, out) in out.chunks_exact_mut(d).enumerate() {
            let at = i * width + from + head * d;
            out.copy_from_slice(&rows[at..at + d]);
        }
    }
}

/// Rows `rows` of (·, d) keys and values.
fn segment<'a>(k: &'a [f32], v: &'a [f32], rows: Range<usize>, d: usize) -> Segment<'a> {
    let part = |x: &'a [f32]| Codec::F32 { data: &x[rows.start * d..rows.end * d], stride: d };
    Segment { k: part(k), v: part(v), len: rows.len(), channels: None }
}

/// Relative error of `o` (H, n, D) against exact attention over the captured and the new keys.
fn step_error(
    kv: &LayerKv,
    step: &Step,
    o: &[f32],
    [h, hkv, d]: [usize; 3],
    window: Option<usize>,
    scale: f32,
) -> Result<f32> {
    let n = step.n;
    let old = kv.k.len() / (hkv * d);
    // A window's start differs from row to row.
    let most = if window.is_some() { 1 } else { 8 };
    let (mut error, mut norm) = (0f64, 0f64);
    for a in (0..n).step_by(most) {
        let m = most.min(n - a);
        let skip = window.map_or(0, |w| (old + a + m).saturating_sub(w));
        let store: Vec<Vec<Segment>> = (0..hkv)
            .map(|g| {
                let kept = g * old + skip.min(old)..(g + 1) * old;
                let new = g * n + skip.saturating_sub(old)..g * n + a + m;
                vec![segment(&kv.k, &kv.v, kept, d), segment(step.k, step.v, new, d)]
            })
            .collect();
        let rows =
            |x: &[f32]| -> Vec<f32> { x.chunks_exact(n * d).flat_map(|x| &x[a * d..(a + m) * d]).copied().collect() };
        let mut exact = vec![0f32; h * m * d];
        Decode::new(scale).run(&rows(step.q), [h, m, d], &store, d, None, &mut exact, &mut vec![0f32; h * m])?;
        let (e, of) = difference(&rows(o), &exact);
        error += e;
        norm += of;
    }
    Ok(if norm > 0.0 { (error / norm).sqrt() as f32 } else { 0.0 })
}
