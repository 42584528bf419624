//! SeerAttention's gates for a pretrained model: taught by the model's own attention, the model left as it is.
//!
//! The loss of a gate needs nothing of a prompt but pooled rows and the block maxima of its true attention. One
//! pass of the model over each piece of text leaves those behind (`Lessons`), a few megabytes a piece; the gates of
//! each layer are then fitted to them by themselves, over and over, without the model.

use crate::error::{Result, TuneError, setting};
use crate::optim::{AdamW, AdamWConfig, learning_rate};
use candle_core::{Device, Tensor, Var};
use foveal::prim::pool::mean_blocks;
use foveal::prim::rope::Rope;
use foveal::prim::select::topk;
use foveal::sparse::block_map::BlockMap;
use foveal::sparse::seerattention::{BlockGrid, Gates, gate_logits, gate_loss, pool_keys};
use foveal::sparse::{HeadProblem, Mat};
use foveal_llm::rope::Rotary;
use foveal_llm::{LogitsFor, Model, Plan, PrefillOptions, RopeScaling};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// One distillation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GateConfig {
    /// Queries and keys per block.
    pub block_size: usize,
    /// Channels of a gate; 0 = those of a head.
    pub gate_dim: usize,
    /// Tokens of a piece of text.
    pub length: usize,
    /// Pieces that gates are taught on.
    pub sequences: usize,
    /// Pieces after those that they are judged on.
    pub held_out: usize,
    /// Optimiser steps of each layer.
    pub steps: usize,
    /// Pieces a step.
    pub batch: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Steps over which the rate rises.
    pub warmup: usize,
    /// The optimiser.
    pub optimiser: AdamWConfig,
    /// Seed of initial gates and of the order of pieces.
    pub seed: u64,
    /// Blocks per query block, own included, at which choices are compared.
    pub budgets: Vec<usize>,
}

impl Default for GateConfig {
    fn default() -> Self {
        Self {
            block_size: 64,
            gate_dim: 0,
            length: 2048,
            sequences: 32,
            held_out: 4,
            steps: 400,
            batch: 4,
            lr: 2e-3,
            warmup: 20,
            optimiser: AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() },
            seed: 1,
            budgets: vec![2, 4, 8],
        }
    }
}

impl GateConfig {
    /// Tokens of text that are read.
    pub fn tokens(&self) -> usize {
        self.length.saturating_mul(self.sequences.saturating_add(self.held_out))
    }

    fn check(&self, model: &Model, tokens: usize) -> Result<()> {
        let Self { block_size, gate_dim, length, .. } = self;
        if *block_size == 0 || *length < 4 * block_size {
            return Err(setting("length", length, format!("use at least four blocks of {block_size}")));
        }
        if !gate_dim.is_multiple_of(2) {
            return Err(setting("gate_dim", gate_dim, "use an even number, or 0"));
        }
        for (name, x) in [
            ("sequences", self.sequences),
            ("held_out", self.held_out),
            ("steps", self.steps),
            ("batch", self.batch),
            ("budgets", self.budgets.iter().copied().min().unwrap_or(0)),
        ] {
            if x == 0 {
                return Err(setting(name, x, "use at least 1"));
            }
        }
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return Err(setting("lr", self.lr, "use a positive number such as 0.002"));
        }
        if tokens < self.tokens() {
            let remedy = format!("{} pieces of {length} tokens need {}", self.sequences + self.held_out, self.tokens());
            return Err(setting("tokens of text", tokens, remedy + "; give a longer text or fewer, shorter pieces"));
        }
        if matches!(model.config().rope_scaling, RopeScaling::Dynamic { .. }) {
            return Err(setting(
                "rope_scaling",
                "dynamic",
                "gates undo one fixed rotation; this model's changes with the length of a prompt",
            ));
        }
        Ok(())
    }
}

/// What one layer leaves behind of the pieces of text: all that its gates need.
#[derive(Default)]
struct Lessons {
    /// Pooled queries before rotation, (pieces, H, blocks, D).
    q: Vec<f32>,
    /// Pooled keys before rotation, (pieces, H_kv, blocks, 3D).
    k: Vec<f32>,
    /// What gates are taught, (pieces, H, blocks, blocks).
    target: Vec<f32>,
    /// Of held-out pieces: true attention by blocks, and the products of mean rotated rows.
    mass: Vec<f32>,
    plain: Vec<f32>,
}

/// How far one kind of choice gets at one budget.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recall {
    /// How blocks are chosen.
    pub choice: &'static str,
    /// Share of the true attention of held-out pieces inside the chosen blocks: mean over layers, heads and the query
    /// blocks that have more blocks to choose from than the budget.
    pub recall: f64,
    /// The same for each layer.
    pub layers: Vec<f64>,
}

/// All choices at one budget.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AtBudget {
    /// Blocks per query block, own included.
    pub topk: usize,
    /// Share of the causal (query block, key block) pairs that this visits.
    pub density: f64,
    /// Every choice.
    pub choices: Vec<Recall>,
}

/// What a distillation came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GateReport {
    /// Settings.
    pub config: GateConfig,
    /// Numbers that were trained.
    pub parameters: usize,
    /// Mean loss of all layers before, and over the last tenth of the steps.
    pub loss: [f64; 2],
    /// The same of held-out pieces, before and after.
    pub held_out_loss: [f64; 2],
    /// Recall of true attention on held-out pieces.
    pub recall: Vec<AtBudget>,
    /// Seconds that the model took to run and its attention to be pooled, and that fitting took.
    pub seconds: [f64; 2],
}

/// What hears how far the work is (0 to 1) and what runs now.
pub type Told = dyn Fn(f64, &str) + Send + Sync;

/// How a distillation talks and stops.
#[derive(Default, Clone)]
pub struct GateHooks {
    /// Told of the share that is done (0 to 1) and what runs.
    pub progress: Option<Arc<Told>>,
    /// Set from outside to stop: nothing is returned then.
    pub cancel: Option<Arc<AtomicBool>>,
}

impl GateHooks {
    fn tell(&self, done: f64, what: &str) {
        if let Some(f) = &self.progress {
            f(done, what);
        }
    }

    fn check(&self, step: usize) -> Result<()> {
        match &self.cancel {
            Some(c) if c.load(Ordering::Relaxed) => Err(TuneError::Cancelled { step }),
            _ => Ok(()),
        }
    }
}

/// Share of the work that running the model is, for the progress.
const READING: f64 = 0.6;

/// Teach gates on `tokens` of text and judge them on the text after it.
///
/// # Errors
/// Settings out of range, too short a text, a model whose rotation depends on the prompt's length, being stopped.
pub fn distil(model: &Model, tokens: &[u32], config: &GateConfig, hooks: &GateHooks) -> Result<(Gates, GateReport)> {
    config.check(model, tokens.len())?;
    let c = model.config();
    let rope = Rotary::new(c).at(config.length).as_ref().clone();
    let begin = std::time::Instant::now();
    let pieces = config.sequences + config.held_out;
    let mut lessons: Vec<Lessons> = (0..c.num_layers).map(|_| Lessons::default()).collect();
    for (i, piece) in tokens.chunks_exact(config.length).take(pieces).enumerate() {
        hooks.check(i)?;
        hooks.tell(READING * i as f64 / pieces as f64, "recording attention");
        read(model, piece, config, &rope, i >= config.sequences, hooks, &mut lessons)?;
    }
    let reading = begin.elapsed().as_secs_f64();
    // Layers run side by side and end in any order.
    let done = AtomicUsize::new(0);
    let fitted: Vec<Fitted> = lessons
        .par_iter()
        .enumerate()
        .map(|(layer, lessons)| {
            let fitted = fit(layer, lessons, config, [c.num_heads, c.num_kv_heads, c.head_dim], c.rope_theta, hooks);
            let layers = done.fetch_add(1, Ordering::Relaxed) + 1;
            hooks.tell(READING + (1.0 - READING) * layers as f64 / c.num_layers as f64, "fitting gates");
            fitted
        })
        .collect::<Result<_>>()?;
    let fitting = begin.elapsed().as_secs_f64() - reading;
    let mean = |f: &dyn Fn(&Fitted) -> f64| fitted.iter().map(f).sum::<f64>() / fitted.len() as f64;
    let recall = config
        .budgets
        .iter()
        .map(|&budget| {
            let choices = CHOICES.iter().map(|&choice| {
                let of = |(l, f): (&Lessons, &Fitted)| recall(choice, budget, l, f, config, c.num_heads);
                let layers: Vec<f64> = lessons.iter().zip(&fitted).map(of).collect();
                Recall { choice, recall: layers.iter().sum::<f64>() / layers.len() as f64, layers }
            });
            let blocks = config.length.div_ceil(config.block_size);
            let visited: usize = (1..=blocks).map(|n| n.min(budget)).sum();
            AtBudget {
                topk: budget,
                density: visited as f64 / (blocks * (blocks + 1) / 2) as f64,
                choices: choices.collect(),
            }
        })
        .collect();
    let all = |f: &dyn Fn(&Fitted) -> &Vec<f32>| fitted.iter().flat_map(|x| f(x).iter().copied()).collect::<Vec<f32>>();
    let (q, k) = (all(&|f| &f.q), all(&|f| &f.k));
    let report = GateReport {
        config: config.clone(),
        parameters: q.len() + k.len(),
        loss: [mean(&|f| f.loss[0]), mean(&|f| f.loss[1])],
        held_out_loss: [mean(&|f| f.held_out[0]), mean(&|f| f.held_out[1])],
        recall,
        seconds: [reading, fitting],
    };
    let shape = [c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, config.gate(c.head_dim)];
    Ok((Gates::new(shape, config.block_size, c.rope_theta, rope, q, k)?, report))
}

impl GateConfig {
    fn gate(&self, head_dim: usize) -> usize {
        if self.gate_dim > 0 { self.gate_dim } else { head_dim.next_multiple_of(2) }
    }
}

/// Run the model over one piece and keep what each layer's gates need of it.
fn read(
    model: &Model,
    piece: &[u32],
    config: &GateConfig,
    rope: &Rope,
    held_out: bool,
    hooks: &GateHooks,
    lessons: &mut [Lessons],
) -> Result<()> {
    let c = model.config();
    let (heads, d, b) = (c.num_heads, c.head_dim, config.block_size);
    let record = (0..c.num_layers).flat_map(|l| (0..heads).map(move |h| (l, h))).collect();
    let options = PrefillOptions {
        chunk: piece.len(),
        record,
        logits: LogitsFor::None,
        cancel: hooks.cancel.clone(),
        ..PrefillOptions::default()
    };
    let prompt = model.prefill(piece, &Plan::dense(), &options)?;
    // An empty pair of matrices: only the way back through the rotation is used.
    let back = Gates::new([1, 1, 1, d, 0], b, 1.0, rope.clone(), Vec::new(), Vec::new())?;
    let scale = 1.0 / (d as f32).sqrt();
    let group = heads / c.num_kv_heads;
    struct One {
        layer: usize,
        q: Vec<f32>,
        k: Option<Vec<f32>>,
        map: BlockMap,
        plain: Vec<f32>,
    }
    let all: Vec<One> = prompt
        .recorded
        .into_par_iter()
        .with_max_len(1)
        .map(|r| {
            let (q, k) = (Mat::new(&r.q, r.tq, d, d), Mat::new(&r.k, r.tk, d, d));
            let pooled = |x: Vec<f32>, f: &dyn Fn(&Mat, usize) -> Vec<f32>| f(&Mat::new(&x, x.len() / d, d, d), b);
            let map = BlockMap::of(&HeadProblem::new(q, k, scale), b).0;
            let mut plain = Vec::new();
            if held_out {
                let (q, k) = (mean_blocks(&q, b), mean_blocks(&k, b));
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
                plain = q.chunks_exact(d).flat_map(|q| k.chunks_exact(d).map(move |k| dot(q, k))).collect();
            }
            One {
                layer: r.layer,
                q: pooled(back.unrotated(&q, 0), &mean_blocks),
                k: r.head.is_multiple_of(group).then(|| pooled(back.unrotated(&k, 0), &pool_keys)),
                map,
                plain,
            }
        })
        .collect();
    for x in all {
        let to = &mut lessons[x.layer];
        to.q.extend(x.q);
        to.k.extend(x.k.unwrap_or_default());
        to.target.extend(x.map.target());
        if held_out {
            to.mass.extend(x.map.mass);
            to.plain.extend(x.plain);
        }
    }
    Ok(())
}

/// Gates of one layer.
struct Fitted {
    q: Vec<f32>,
    k: Vec<f32>,
    loss: [f64; 2],
    held_out: [f64; 2],
    /// Logits of held-out pieces before and after, (pieces, H, blocks, blocks).
    logits: [Vec<f32>; 2],
}

fn fit(
    layer: usize,
    lessons: &Lessons,
    config: &GateConfig,
    [heads, kv, d]: [usize; 3],
    base: f64,
    hooks: &GateHooks,
) -> Result<Fitted> {
    let g = config.gate(d);
    let blocks = config.length.div_ceil(config.block_size);
    let at = BlockGrid { block: config.block_size, offset: 0, base };
    let pieces = config.sequences + config.held_out;
    let whole =
        |x: &[f32], shape: [usize; 3]| Tensor::from_slice(x, (pieces, shape[0], shape[1], shape[2]), &Device::Cpu);
    let (q, k) = (whole(&lessons.q, [heads, blocks, d])?, whole(&lessons.k, [kv, blocks, 3 * d])?);
    let target = whole(&lessons.target, [heads, blocks, blocks])?;
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed ^ (layer as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let [wq, wk] = start(heads, kv, d, g, &mut rng)?;
    let vars = vec![("gate.q".to_owned(), wq.clone()), ("gate.k".to_owned(), wk.clone())];
    let mut optimiser = AdamW::new(config.optimiser, vars);
    let judged = |from: usize, n: usize| -> Result<(f64, Vec<f32>)> {
        let part = |x: &Tensor| x.narrow(0, from, n)?.contiguous();
        let (wq, wk) = (wq.as_tensor().detach(), wk.as_tensor().detach());
        let logits = gate_logits(&part(&q)?, &part(&k)?, &wq, &wk, at)?;
        let loss = gate_loss(&logits, &part(&target)?, at)?.to_scalar::<f32>()?;
        Ok((f64::from(loss), logits.flatten_all()?.to_vec1()?))
    };
    let before = judged(config.sequences, config.held_out)?;
    let first = judged(0, config.sequences.min(config.batch))?.0;
    let mut order: Vec<u32> = Vec::new();
    let (mut late, mut lates) = (0.0, 0);
    for step in 0..config.steps {
        hooks.check(step)?;
        let mut batch = Vec::with_capacity(config.batch);
        while batch.len() < config.batch.min(config.sequences) {
            if order.is_empty() {
                order = (0..config.sequences as u32).collect();
                for i in (1..order.len()).rev() {
                    order.swap(i, rng.random_range(0..=i));
                }
            }
            batch.extend(order.pop());
        }
        let batch = Tensor::new(batch.as_slice(), &Device::Cpu)?;
        let part = |x: &Tensor| x.index_select(&batch, 0);
        let logits = gate_logits(&part(&q)?, &part(&k)?, wq.as_tensor(), wk.as_tensor(), at)?;
        let loss = gate_loss(&logits, &part(&target)?, at)?;
        let value = loss.to_scalar::<f32>()?;
        let lr = learning_rate(step, config.steps, config.warmup, config.lr);
        if !value.is_finite() {
            return Err(TuneError::Diverged { step, loss: value, lr });
        }
        optimiser.step(&loss.backward()?, lr)?;
        if step >= config.steps - config.steps.div_ceil(10) {
            late += f64::from(value);
            lates += 1;
        }
    }
    let after = judged(config.sequences, config.held_out)?;
    let numbers = |v: &Var| v.as_tensor().flatten_all()?.to_vec1::<f32>();
    Ok(Fitted {
        q: numbers(&wq)?,
        k: numbers(&wk)?,
        loss: [first, late / f64::from(lates.max(1))],
        held_out: [before.0, after.0],
        logits: [before.1, after.1],
    })
}

/// Initial gates: where they are as wide as a head, products of mean rows and a little noise; else noise.
fn start(heads: usize, kv: usize, d: usize, g: usize, rng: &mut ChaCha8Rng) -> Result<[Var; 2]> {
    let mut noise = |n: usize, size: f32| -> Vec<f32> {
        // Sum of four uniforms: near enough to normal.
        (0..n).map(|_| (0..4).map(|_| rng.random_range(-1f32..1.0)).sum::<f32>() * size).collect()
    };
    let size = if g == d { 0.1 } else { 1.0 };
    let mut q = noise(heads * d * g, size / (d as f32).sqrt());
    let mut k = noise(kv * 3 * d * g, size / (3.0 * d as f32).sqrt());
    if g == d {
        q.chunks_exact_mut(d * g).for_each(|w| (0..d).for_each(|i| w[i * g + i] += 1.0));
        k.chunks_exact_mut(3 * d * g).for_each(|w| (0..d).for_each(|i| w[(2 * d + i) * g + i] += 1.0));
    }
    let var = |x: Vec<f32>, shape: (usize, usize, usize)| Var::from_vec(x, shape, &Device::Cpu);
    Ok([var(q, (heads, d, g))?, var(k, (kv, 3 * d, g))?])
}

/// What choices are compared.
const CHOICES: [&str; 6] = [
    "random",
    "first and nearest",
    "mean rows, no gate",
    "gate before training",
    "gate after training",
    "best possible",
];

/// Recall of one choice at one budget in one layer.
fn recall(choice: &str, budget: usize, l: &Lessons, f: &Fitted, config: &GateConfig, heads: usize) -> f64 {
    let n = config.length.div_ceil(config.block_size);
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    let noise: Vec<f32> =
        if choice == "random" { (0..l.mass.len()).map(|_| rng.random()).collect() } else { Vec::new() };
    let (mut sum, mut rows) = (0f64, 0usize);
    for i in 0..config.held_out * heads * n {
        let (own, row) = (i % n, i * n..(i + 1) * n);
        if own < budget {
            continue;
        }
        let past = row.start..row.start + own;
        let kept: Vec<u32> = match choice {
            "random" => topk(&noise[past], budget - 1),
            // The first block, where attention sinks, then the last ones.
            "first and nearest" => (0..own as u32)
                .filter(|&j| (budget > 1 && j == 0) || j as usize + budget.saturating_sub(2) >= own)
                .collect(),
            "mean rows, no gate" => topk(&l.plain[past], budget - 1),
            "gate before training" => topk(&f.logits[0][past], budget - 1),
            "gate after training" => topk(&f.logits[1][past], budget - 1),
            _ => topk(&l.mass[past], budget - 1),
        };
        let mass = &l.mass[row];
        let all: f64 = mass.iter().map(|&x| f64::from(x)).sum();
        let held: f64 = kept.iter().map(|&j| f64::from(mass[j as usize])).sum::<f64>() + f64::from(mass[own]);
        sum += held / all;
        rows += 1;
    }
    sum / rows.max(1) as f64
}
