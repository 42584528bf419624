//! The training loop: batches by number, clipped AdamW, evaluation, checkpoints that resume exactly.

use crate::error::{Result, TuneError, setting};
use crate::model::{Net, NetConfig, Output, Passed};
use crate::optim::{AdamW, AdamWConfig, learning_rate};
use crate::tasks::{Batch, Split, Task};
use candle_core::{D, Device, Tensor};
use foveal::mixer::Weights;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// One run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// The model.
    pub net: NetConfig,
    /// Steps in all.
    pub steps: usize,
    /// Examples a step.
    pub batch: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Steps over which the rate rises.
    pub warmup: usize,
    /// The optimiser.
    pub optimiser: AdamWConfig,
    /// Seed of parameters and batches.
    pub seed: u64,
    /// Steps between evaluations; the last step is always evaluated.
    pub eval_every: usize,
    /// Batches of an evaluation.
    pub eval_batches: usize,
}

impl TrainConfig {
    /// Defaults for a task: `layers` systems, 64 channels in `heads` heads.
    pub fn for_task(task: &dyn Task, layers: Vec<String>, hidden: usize, heads: usize) -> Self {
        let net = NetConfig {
            input: task.input(),
            output: task.output(),
            tokens: task.tokens(),
            hidden,
            heads,
            kv_heads: heads,
            layers,
            causal: task.causal(),
            grid: task.grid(),
            random: false,
        };
        Self {
            net,
            steps: 1000,
            batch: 32,
            lr: 2e-3,
            warmup: 50,
            optimiser: AdamWConfig::default(),
            seed: 1,
            eval_every: 250,
            eval_batches: 8,
        }
    }
}

/// Where a run stands after a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Step {
    /// Steps done.
    pub step: usize,
    /// Loss of the step's batch (a layer's own losses included).
    pub loss: f32,
    /// Norm of the gradients before clipping.
    pub norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Accuracy on the test split, where it was evaluated.
    pub accuracy: Option<f64>,
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The last step's standing.
    pub last: Step,
    /// Best accuracy of all evaluations.
    pub best_accuracy: f64,
    /// Number of parameters.
    pub parameters: usize,
    /// (query, key) pairs that the attention layers visited, as a share of exact attention's, in the last evaluation.
    pub density: f64,
    /// Loss of every step.
    pub losses: Vec<f32>,
}

/// How a run talks and stops.
#[derive(Default)]
pub struct Hooks<'a> {
    /// Called after every step.
    pub on_step: Option<&'a mut dyn FnMut(&Step)>,
    /// Set from outside to stop before the next step; the checkpoint is written first.
    pub cancel: Option<&'a AtomicBool>,
    /// File to resume from if it is there, and to write to at every evaluation and when stopped.
    pub checkpoint: Option<PathBuf>,
}

/// Train a model of `config` on `task`; the model with its parameters, and the report.
///
/// Errors: settings out of range, a checkpoint of another run, a loss that is no number, being stopped.
pub fn train(task: &dyn Task, config: &TrainConfig, mut hooks: Hooks) -> Result<(Net, Weights, Report)> {
    if config.steps == 0 || config.batch == 0 || config.eval_batches == 0 || config.eval_every == 0 {
        return Err(setting("steps, batch, eval_batches, eval_every", 0, "use at least 1 of each"));
    }
    let resumed = match &hooks.checkpoint {
        Some(path) if path.exists() => Some(Saved::load(path, config)?),
        _ => None,
    };
    let weights = match &resumed {
        Some(s) => Weights::from_tensors(s.weights.clone())?,
        None => Weights::seeded(config.seed),
    };
    let net = Net::new(config.net.clone(), weights.builder())?;
    let mut optimiser = AdamW::new(config.optimiser, weights.all());
    let mut losses = Vec::with_capacity(config.steps);
    let mut best = 0f64;
    if let Some(s) = resumed {
        optimiser.restore(s.meta.step, &s.moments);
        losses = s.meta.losses;
        best = s.meta.best;
    }
    let mut last = Step { step: losses.len(), loss: f32::NAN, norm: 0.0, lr: 0.0, accuracy: None };
    let mut density = 1.0;
    for i in losses.len()..config.steps {
        if hooks.cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
            if let Some(path) = &hooks.checkpoint {
                save(path, config, &weights, &optimiser, &losses, best)?;
            }
            return Err(TuneError::Cancelled { step: i });
        }
        let batch = task.batch(Split::Train, config.seed, i as u64, config.batch)?;
        let passed = net.pass(&batch.input)?;
        let mut loss = candle_nn::loss::cross_entropy(&judged(&passed, &batch, &config.net)?, &answers(&batch)?)?;
        if let Some(own) = &passed.loss {
            loss = (loss + own)?;
        }
        let lr = learning_rate(i, config.steps, config.warmup, config.lr);
        let value = loss.to_scalar::<f32>()?;
        if !value.is_finite() {
            return Err(TuneError::Diverged { step: i, loss: value, lr });
        }
        let norm = optimiser.step(&loss.backward()?, lr)?;
        losses.push(value);
        last = Step { step: i + 1, loss: value, norm, lr, accuracy: None };
        if (i + 1) % config.eval_every == 0 || i + 1 == config.steps {
            let (accuracy, share) = evaluate(task, &net, config)?;
            (last.accuracy, density) = (Some(accuracy), share);
            best = best.max(accuracy);
            if let Some(path) = &hooks.checkpoint {
                save(path, config, &weights, &optimiser, &losses, best)?;
            }
        }
        if let Some(f) = &mut hooks.on_step {
            f(&last);
        }
    }
    if last.accuracy.is_none() {
        // A checkpoint of a finished run.
        let (accuracy, share) = evaluate(task, &net, config)?;
        (last.accuracy, density) = (Some(accuracy), share);
        last.loss = losses.last().copied().unwrap_or(f32::NAN);
    }
    let report = Report { last, best_accuracy: best, parameters: weights.elements(), density, losses };
    Ok((net, weights, report))
}

/// Accuracy on the test split, and the share of exact attention's pairs that was visited.
pub fn evaluate(task: &dyn Task, net: &Net, config: &TrainConfig) -> Result<(f64, f64)> {
    let (mut right, mut all, mut pairs, mut dense) = (0usize, 0usize, 0u64, 0u64);
    for n in 0..config.eval_batches as u64 {
        let batch = task.batch(Split::Test, config.seed, n, config.batch)?;
        let passed = net.pass(&batch.input)?;
        let said: Vec<u32> = judged(&passed, &batch, &config.net)?.argmax(D::Minus1)?.to_vec1()?;
        right += said.iter().zip(&batch.answers).filter(|(a, b)| a == b).count();
        all += said.len();
        pairs += passed.pairs;
        dense += passed.dense_pairs;
    }
    Ok((right as f64 / all.max(1) as f64, pairs as f64 / dense.max(1) as f64))
}

/// The logits of the judged rows.
fn judged(passed: &Passed, batch: &Batch, net: &NetConfig) -> Result<Tensor> {
    let flat = match net.output {
        Output::Tokens(_) => passed.logits.flatten(0, 1)?,
        Output::Classes(_) => passed.logits.clone(),
    };
    Ok(flat.index_select(&Tensor::new(batch.rows.as_slice(), &Device::Cpu)?, 0)?)
}

fn answers(batch: &Batch) -> Result<Tensor> {
    Ok(Tensor::new(batch.answers.as_slice(), &Device::Cpu)?)
}

/// What a checkpoint knows beside tensors.
#[derive(Serialize, Deserialize)]
struct Meta {
    step: usize,
    config: TrainConfig,
    losses: Vec<f32>,
    best: f64,
}

struct Saved {
    meta: Meta,
    weights: Vec<(String, Tensor)>,
    moments: HashMap<String, Tensor>,
}

impl Saved {
    fn load(path: &Path, config: &TrainConfig) -> Result<Self> {
        let file = |action, message: String| TuneError::File { path: path.into(), action, message };
        let bytes = std::fs::read(path).map_err(|e| file("read", e.to_string()))?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| file("read", e.to_string()))?;
        let meta: Meta =
            header.metadata().as_ref().and_then(|m| serde_json::from_str(m.get("run")?).ok()).ok_or_else(|| {
                file("resume from", "it is no checkpoint of a training run; name another file".into())
            })?;
        if meta.config != *config {
            let message = "it belongs to a run with other settings; name another file or repeat those settings";
            return Err(file("resume from", message.into()));
        }
        if meta.losses.len() != meta.step {
            return Err(file(
                "resume from",
                format!("{} losses for {} steps; it is damaged", meta.losses.len(), meta.step),
            ));
        }
        let (mut weights, mut moments) = (Vec::new(), HashMap::new());
        for (name, t) in candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)? {
            match name.strip_prefix("w.") {
                Some(w) => weights.push((w.to_owned(), t)),
                None => drop(moments.insert(name, t)),
            }
        }
        Ok(Self { meta, weights, moments })
    }
}

/// Write a checkpoint: to a temporary name beside it first, so that no file is half written.
fn save(
    path: &Path,
    config: &TrainConfig,
    weights: &Weights,
    optimiser: &AdamW,
    losses: &[f32],
    best: f64,
) -> Result<()> {
    let file = |action, message: String| TuneError::File { path: path.into(), action, message };
    let mut tensors: BTreeMap<String, Tensor> =
        weights.all().into_iter().map(|(n, v)| (format!("w.{n}"), v.as_tensor().clone())).collect();
    tensors.extend(optimiser.tensors());
    let meta = Meta { step: optimiser.steps(), config: config.clone(), losses: losses.to_vec(), best };
    let run = serde_json::to_string(&meta).map_err(|e| file("write", e.to_string()))?;
    let bytes = safetensors::serialize(&tensors, Some(HashMap::from([("run".to_owned(), run)])))
        .map_err(|e| file("write", e.to_string()))?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = path.with_file_name(name);
    std::fs::write(&part, bytes).map_err(|e| file("write", e.to_string()))?;
    std::fs::rename(&part, path).map_err(|e| file("write", e.to_string()))
}
