//! A decoder-only transformer with prepacked weights.
//!
//! Llama (with Mistral and SmolLM2), Qwen2 and Qwen3 differ by a few switches of [`ModelConfig`]:
//! biases, normalisation of heads before rotation, sliding windows. Everything runs on plain f32
//! rows (tokens, hidden); attention is handed to the systems that the [`Plan`] names.

mod calibrate;
mod ops;
mod prefill;

pub use calibrate::Calibration;
pub(crate) use prefill::difference;

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{LlmError, Result};
use crate::plan::{Plan, Resolved};
use crate::rope::Rotary;
use crate::session::Session;
use foveal::Work;
use foveal::cache::{CacheCtx, CachePolicy, KvWeights, LayerCache};
use foveal::sparse::HeadSelection;
use foveal_kernels::Isa;
use foveal_kernels::elementwise::{self, Heads};
use foveal_kernels::linear::PackedLinear;
pub use foveal_kernels::linear::WeightFormat;
use half::bf16;
use rayon::prelude::*;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rows that the linear layers take at once: enough to reuse weights, few enough that a block's
/// MLP activations stay in the last-level cache.
pub(crate) const ROWS: usize = 512;
/// Queries at the prompt's end that caches may look at.
pub const OBSERVED: usize = 64;

/// Storage type of q, k and v in prompt attention. Accumulation is f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AttentionDtype {
    /// As computed.
    #[default]
    F32,
    /// Rounded to bf16: the fast path on machines with tile units.
    Bf16,
}

impl AttentionDtype {
    /// The fastest on this machine: bf16 where the kernels have tile units for it, else f32.
    pub fn fastest() -> Self {
        if foveal_kernels::Isa::active() == foveal_kernels::Isa::Amx {
            AttentionDtype::Bf16
        } else {
            AttentionDtype::F32
        }
    }
}

impl fmt::Display for AttentionDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AttentionDtype::F32 => "f32",
            AttentionDtype::Bf16 => "bf16",
        })
    }
}

impl FromStr for AttentionDtype {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "f32" => Ok(AttentionDtype::F32),
            "bf16" => Ok(AttentionDtype::Bf16),
            _ => Err(format!("attention dtype {s:?}: use f32 or bf16")),
        }
    }
}

/// Weight format of a name: `f32`, `bf16`, `int8` or `int4`.
///
/// # Errors
/// Any other name.
pub fn parse_weights(s: &str) -> std::result::Result<WeightFormat, String> {
    match s {
        "f32" => Ok(WeightFormat::F32),
        "bf16" => Ok(WeightFormat::Bf16),
        "int8" => Ok(WeightFormat::Int8),
        "int4" => Ok(WeightFormat::Int4),
        _ => Err(format!("weight format {s:?}: use f32, bf16, int8 or int4")),
    }
}

/// How a model is loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Storage of linear weights and of a tied embedding; `None` = no wider than the file needs, tensor by
    /// tensor: int4 for Q4_0 and Q4_1 (where they fit without loss), int8 for the other quantised types, else
    /// bf16.
    pub weights: Option<WeightFormat>,
}

/// The narrowest format that holds all of `types`, storage types of a file, as well as bf16 does.
fn format_for<'a>(types: impl Iterator<Item = &'a str>) -> WeightFormat {
    types.fold(WeightFormat::Int4, |widest, t| match (t, widest) {
        ("Q4_0" | "Q4_1", f) => f,
        ("Q5_0" | "Q5_1" | "Q8_0" | "Q4_K" | "Q5_K" | "Q6_K", WeightFormat::Int4 | WeightFormat::Int8) => {
            WeightFormat::Int8
        }
        _ => WeightFormat::Bf16,
    })
}

/// Pack in four bits if they hold every weight to within f32 rounding, else in eight.
fn pack_four_bits(w: &[f32], n: usize, k: usize) -> Result<PackedLinear> {
    let packed = PackedLinear::pack_int4(w, n, k)?;
    let lossless = w.par_chunks_exact(k.max(1)).enumerate().all(|(i, row)| {
        let mut held = vec![0f32; k];
        let top = row.iter().fold(0f32, |a, x| a.max(x.abs()));
        packed.row(i, &mut held).is_ok() && row.iter().zip(&held).all(|(a, b)| (a - b).abs() <= 1e-5 * top)
    });
    Ok(if lossless { packed } else { PackedLinear::pack_int8(w, n, k)? })
}

/// Which positions' final hidden rows a prompt keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogitsFor {
    /// None.
    None,
    /// The last.
    #[default]
    Last,
    /// The last n (all if there are fewer).
    LastN(usize),
}

/// Called with (steps done, steps in all) while a prompt runs.
pub type Progress = Arc<dyn Fn(usize, usize) + Send + Sync>;

/// How a prompt runs.
#[derive(Clone)]
pub struct PrefillOptions {
    /// Queries processed at once; a longer prompt runs chunk by chunk, each chunk seeing all keys so far.
    pub chunk: usize,
    /// Keep every layer's keys and values in the [`Prompt`].
    pub capture: bool,
    /// Keep keys before rotation too.
    pub capture_pre: bool,
    /// Which final hidden rows to keep.
    pub logits: LogitsFor,
    /// Rows per layer whose attention output is compared with exact attention; not timed.
    pub probe_rows: usize,
    /// (layer, query head) pairs whose q, k and selection are kept.
    pub record: Vec<(usize, usize)>,
    /// Storage type of q, k and v in attention.
    pub attention: AttentionDtype,
    /// Set to stop at the next chunk.
    pub cancel: Option<Arc<AtomicBool>>,
    /// Told of each chunk of each layer.
    pub progress: Option<Progress>,
}

impl Default for PrefillOptions {
    fn default() -> Self {
        Self {
            chunk: 8192,
            capture: false,
            capture_pre: false,
            logits: LogitsFor::Last,
            probe_rows: 0,
            record: Vec::new(),
            attention: AttentionDtype::F32,
            cancel: None,
            progress: None,
        }
    }
}

/// Time and work of a run.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Wall time; probes excluded.
    pub seconds: f64,
    /// Of it in attention, selection included.
    pub attention_seconds: f64,
    /// Of it in selection.
    pub select_seconds: f64,
    /// Of `seconds`, keeping keys and values: filling stores, capturing.
    pub store_seconds: f64,
    /// Work of exact attention over what was selected.
    pub attend: Work,
    /// Work of the estimators.
    pub select: Work,
    /// Tokens processed.
    pub tokens: usize,
}

impl Stats {
    /// Tokens a second.
    pub fn tokens_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens as f64 / self.seconds } else { 0.0 }
    }

    /// Add another run.
    pub fn add(&mut self, o: &Stats) {
        self.seconds += o.seconds;
        self.attention_seconds += o.attention_seconds;
        self.select_seconds += o.select_seconds;
        self.store_seconds += o.store_seconds;
        self.attend += o.attend;
        self.select += o.select;
        self.tokens += o.tokens;
    }

    /// Share of attention's operations that a slower path did than the one asked for, 0 to 1.
    pub fn fallback(&self) -> f64 {
        let work = self.attend + self.select;
        if work.flops > 0 { work.fallback as f64 / work.flops as f64 } else { 0.0 }
    }
}

/// Keys and values of one layer of a captured prompt, f32.
#[derive(Debug, Clone, Default)]
pub struct LayerKv {
    /// Keys before rotation (num_kv_heads, T, head_dim); empty unless asked for.
    pub k_pre: Vec<f32>,
    /// Keys after rotation (num_kv_heads, T, head_dim).
    pub k: Vec<f32>,
    /// Values (num_kv_heads, T, head_dim).
    pub v: Vec<f32>,
    /// The last `q_len` queries after rotation (num_heads, q_len, head_dim).
    pub q_obs: Vec<f32>,
    /// Queries in `q_obs`: min(T, [`OBSERVED`]).
    pub q_len: usize,
}

/// What one head looked at, with the q and k to compare it with.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// Layer.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// Queries after rotation of the last chunk, (tq, d).
    pub q: Vec<f32>,
    /// Keys after rotation of the head's group, (tk, d).
    pub k: Vec<f32>,
    /// Queries.
    pub tq: usize,
    /// Keys.
    pub tk: usize,
    /// Head width.
    pub d: usize,
    /// What the last chunk's queries visited; `None` = everything.
    pub selection: Option<HeadSelection>,
}

/// A prompt that has run.
#[derive(Debug, Clone, Default)]
pub struct Prompt {
    /// Tokens.
    pub len: usize,
    /// Final hidden rows after the last normalisation, (hidden_rows, hidden): input of
    /// [`Model::logits`] and [`Model::nll`].
    pub hidden: Vec<f32>,
    /// Rows in `hidden`; they belong to the prompt's last positions.
    pub hidden_rows: usize,
    /// Per layer keys and values; empty unless captured. Shared, so that clones are cheap.
    pub kv: Arc<Vec<LayerKv>>,
    /// Time and work.
    pub stats: Stats,
    /// Relative error ‖o − o*‖ / ‖o*‖ (Frobenius) of the attention output per layer against
    /// exact attention on the same q, k, v, over the probed rows; empty without probes.
    pub probe: Vec<f32>,
    /// Recorded heads.
    pub recorded: Vec<Recorded>,
}

/// One decoder layer.
pub(crate) struct Layer {
    pub attn_norm: Vec<f32>,
    /// Query, key and value rows in this order.
    pub qkv: PackedLinear,
    /// Bias of `qkv`, also inside it; kept for policies that factorise the projections.
    pub qkv_bias: Vec<f32>,
    pub q_norm: Vec<f32>,
    pub k_norm: Vec<f32>,
    pub o: PackedLinear,
    pub mlp_norm: Vec<f32>,
    /// Gate rows, then up rows.
    pub gate_up: PackedLinear,
    pub down: PackedLinear,
}

/// An embedding that is not shared with the output projection: only rows are ever read.
enum Embedding {
    Tied,
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// Whether the caller asked to stop.
pub(crate) fn interrupted(cancel: Option<&AtomicBool>) -> bool {
    cancel.is_some_and(|c| c.load(Ordering::Relaxed))
}

/// A loaded model.
pub struct Model {
    config: Arc<ModelConfig>,
    pub(crate) rotary: Rotary,
    pub(crate) layers: Vec<Layer>,
    embed: Embedding,
    norm: Vec<f32>,
    head: PackedLinear,
    pub(crate) isa: Isa,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.config;
        write!(f, "Model({} layers, hidden {}, {} weight bytes)", c.num_layers, c.hidden_size, self.weight_bytes())
    }
}

impl Model {
    /// Read and pack all weights.
    ///
    /// # Errors
    /// A missing, misshapen or non-finite tensor.
    pub fn load(ck: &Checkpoint, o: &LoadOptions) -> Result<Model> {
        Self::load_until(ck, o, None)
    }

    /// As [`Model::load`]; once `cancel` is set, the next tensor ends in [`LlmError::Interrupted`].
    ///
    /// # Errors
    /// As [`Model::load`], and the interruption.
    pub fn load_until(ck: &Checkpoint, o: &LoadOptions, cancel: Option<&AtomicBool>) -> Result<Model> {
        let c = ck.config().clone();
        let (h, inter) = (c.hidden_size, c.intermediate_size);
        let (q_rows, kv_rows) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let get = |name: &str| {
            if interrupted(cancel) { Err(LlmError::Interrupted) } else { ck.tensor(name).map(|t| t.data) }
        };
        let join = |names: &[String]| -> Result<Vec<f32>> {
            let mut out = Vec::new();
            for n in names {
                out.extend_from_slice(&get(n)?);
            }
            Ok(out)
        };
        let pack = |names: &[String], n: usize, k: usize, bias: &[f32]| -> Result<PackedLinear> {
            let w = &join(names)?;
            let types: Vec<String> = names.iter().map(|n| ck.source_dtype(n)).collect();
            let p = match o.weights.unwrap_or_else(|| format_for(types.iter().map(String::as_str))) {
                WeightFormat::Int4 if o.weights.is_none() => pack_four_bits(w, n, k)?,
                format => PackedLinear::pack(w, n, k, format)?,
            };
            Ok(if bias.is_empty() { p } else { p.with_bias(bias)? })
        };
        let optional = |on: bool, names: &[String]| if on { join(names) } else { Ok(Vec::new()) };
        let mut layers = Vec::with_capacity(c.num_layers);
        for l in 0..c.num_layers {
            let name = |s: &str| format!("model.layers.{l}.{s}");
            let qkv = |s: &str| ["q", "k", "v"].map(|x| name(&format!("self_attn.{x}_proj.{s}")));
            let gate_up = |s: &str| ["gate", "up"].map(|x| name(&format!("mlp.{x}_proj.{s}")));
            let qkv_bias = optional(c.qkv_bias, &qkv("bias"))?;
            layers.push(Layer {
                attn_norm: get(&name("input_layernorm.weight"))?,
                qkv: pack(&qkv("weight"), q_rows + 2 * kv_rows, h, &qkv_bias)?,
                qkv_bias,
                q_norm: optional(c.qk_norm, &[name("self_attn.q_norm.weight")])?,
                k_norm: optional(c.qk_norm, &[name("self_attn.k_norm.weight")])?,
                o: pack(
                    &[name("self_attn.o_proj.weight")],
                    h,
                    q_rows,
                    &optional(c.o_bias, &[name("self_attn.o_proj.bias")])?,
                )?,
                mlp_norm: get(&name("post_attention_layernorm.weight"))?,
                gate_up: pack(&gate_up("weight"), 2 * inter, h, &optional(c.mlp_bias, &gate_up("bias"))?)?,
                down: pack(
                    &[name("mlp.down_proj.weight")],
                    h,
                    inter,
                    &optional(c.mlp_bias, &[name("mlp.down_proj.bias")])?,
                )?,
            });
        }
        let head = pack(&["lm_head.weight".into()], c.vocab_size, h, &[])?;
        let embed = match (c.tie_embeddings, o.weights) {
            (true, _) => Embedding::Tied,
            (false, Some(WeightFormat::F32)) => Embedding::F32(get("model.embed_tokens.weight")?),
            (false, _) => {
                Embedding::Bf16(get("model.embed_tokens.weight")?.par_iter().map(|&x| bf16::from_f32(x)).collect())
            }
        };
        Ok(Model {
            rotary: Rotary::new(&c),
            norm: get("model.norm.weight")?,
            config: Arc::new(c),
            layers,
            embed,
            head,
            isa: Isa::active(),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Formats of the linear weights, such as `int4` or `int4 + int8`.
    pub fn weight_formats(&self) -> String {
        let linear = |l: &'_ Layer| [&l.qkv, &l.o, &l.gate_up, &l.down].map(PackedLinear::format);
        let mut all: Vec<String> =
            self.layers.iter().flat_map(linear).chain([self.head.format()]).map(|f| f.to_string()).collect();
        all.sort();
        all.dedup();
        all.join(" + ")
    }

    /// Bytes of all weights as they are held.
    pub fn weight_bytes(&self) -> usize {
        let layer = |l: &Layer| {
            l.qkv.bytes()
                + l.o.bytes()
                + l.gate_up.bytes()
                + l.down.bytes()
                + 4 * (l.attn_norm.len() + l.mlp_norm.len() + l.q_norm.len() + l.k_norm.len() + l.qkv_bias.len())
        };
        let embed = match &self.embed {
            Embedding::Tied => 0,
            Embedding::F32(e) => size_of_val(e.as_slice()),
            Embedding::Bf16(e) => size_of_val(e.as_slice()),
        };
        self.layers.iter().map(layer).sum::<usize>() + embed + self.head.bytes() + 4 * self.norm.len()
    }

    /// Run a prompt without building caches.
    ///
    /// # Errors
    /// An empty prompt, a token outside the vocabulary, a plan that does not fit the model,
    /// cancellation.
    pub fn prefill(&self, tokens: &[u32], plan: &Plan, o: &PrefillOptions) -> Result<Prompt> {
        let resolved = plan.resolve(&self.config)?;
        self.run_prompt(tokens, &resolved, o, false, |_, _| Ok(()))
    }

    /// Build caches from a captured prompt, which can serve several plans. The plan's prefill
    /// part does not matter here.
    ///
    /// # Errors
    /// A prompt that was not captured, missing keys before rotation or calibration where a
    /// policy needs them, a plan that does not fit the model.
    pub fn session(&self, prompt: &Prompt, plan: &Plan, calib: Option<&Calibration>) -> Result<Session<'_>> {
        self.session_until(prompt, plan, calib, None)
    }

    /// As [`Model::session`]; once `cancel` is set, the next layer's cache ends in
    /// [`LlmError::Interrupted`], and so do steps of the session afterwards.
    ///
    /// # Errors
    /// As [`Model::session`], and the interruption.
    pub fn session_until(
        &self,
        prompt: &Prompt,
        plan: &Plan,
        calib: Option<&Calibration>,
        cancel: Option<Arc<AtomicBool>>,
    ) -> Result<Session<'_>> {
        let resolved = plan.resolve(&self.config)?;
        if prompt.kv.len() != self.config.num_layers {
            return Err(LlmError::Input {
                problem: format!(
                    "the prompt holds keys and values of {} layers, the model has {}; run prefill with capture",
                    prompt.kv.len(),
                    self.config.num_layers
                ),
            });
        }
        let mut session = self.empty_session(&resolved, plan, prompt.len, calib, cancel.clone())?;
        for (l, kv) in prompt.kv.iter().enumerate() {
            if interrupted(cancel.as_deref()) {
                return Err(LlmError::Interrupted);
            }
            if resolved.cache[l].needs().pre_rotation && kv.k_pre.len() != kv.k.len() {
                return Err(LlmError::Input {
                    problem: format!(
                        "{} needs keys before rotation; run prefill with capture_pre",
                        resolved.cache_names[l]
                    ),
                });
            }
            session.fill(l, &kv.view(prompt.len))?;
        }
        Ok(session)
    }

    /// Run a prompt and fill the caches layer by layer, without keeping all layers' dense keys
    /// and values at once. The returned prompt has no `kv` unless `o.capture`; the session watches
    /// `o.cancel`.
    ///
    /// # Errors
    /// As [`Model::prefill`] and [`Model::session`].
    pub fn start(
        &self,
        tokens: &[u32],
        plan: &Plan,
        calib: Option<&Calibration>,
        o: &PrefillOptions,
    ) -> Result<(Session<'_>, Prompt)> {
        let resolved = plan.resolve(&self.config)?;
        let mut session = self.empty_session(&resolved, plan, tokens.len(), calib, o.cancel.clone())?;
        let prompt =
            self.run_prompt(tokens, &resolved, o, resolved.needs().pre_rotation, |l, kv| session.fill(l, kv))?;
        Ok((session, prompt))
    }

    fn empty_session(
        &self,
        resolved: &Resolved,
        plan: &Plan,
        len: usize,
        calib: Option<&Calibration>,
        cancel: Option<Arc<AtomicBool>>,
    ) -> Result<Session<'_>> {
        let c = &self.config;
        let rope = self.rotary.at(len);
        let layer = |(l, policy): (usize, &Arc<dyn CachePolicy>)| -> Result<Box<dyn LayerCache>> {
            if interrupted(cancel.as_deref()) {
                return Err(LlmError::Interrupted);
            }
            let needs = policy.needs();
            let calibration = calib.and_then(|c| c.layers.get(l)).cloned();
            if needs.calibration && calibration.is_none() {
                return Err(foveal::Error::Missing {
                    system: resolved.cache_names[l].clone(),
                    what: "statistics of a calibration text",
                    remedy: "run Model::calibrate on a text and hand its result over".into(),
                }
                .into());
            }
            Ok(policy.layer(&CacheCtx {
                layer: l,
                num_layers: c.num_layers,
                num_heads: c.num_heads,
                num_kv_heads: c.num_kv_heads,
                head_dim: c.head_dim,
                scale: self.scale(),
                window: c.window(l),
                rope: rope.clone(),
                dtype: plan.kv_dtype,
                weights: if needs.weights { Some(Arc::new(self.kv_weights(l)?)) } else { None },
                calibration,
            })?)
        };
        // A policy may factorise a layer's weights here: long work, and of each layer its own.
        let caches = resolved.cache.par_iter().enumerate().with_max_len(1).map(layer).collect::<Result<_>>()?;
        let pre = resolved.cache.iter().map(|c| c.needs().pre_rotation).collect();
        Ok(Session::new(self, caches, pre, len).cancel_with(cancel))
    }

    /// Key and value projections of a layer, as the model uses them (rounded to the weight format).
    ///
    /// # Errors
    /// None in practice; rows are in range.
    pub fn kv_weights(&self, layer: usize) -> Result<KvWeights> {
        let c = &self.config;
        let (q, kv, h) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size);
        let l = self.layers.get(layer).ok_or_else(|| LlmError::Input {
            problem: format!("layer {layer} is out of range; the model has {}", c.num_layers),
        })?;
        let rows = |from: usize| -> Result<Vec<f32>> {
            let mut out = vec![0f32; kv * h];
            out.par_chunks_exact_mut(h).enumerate().try_for_each(|(i, row)| l.qkv.row(from + i, row))?;
            Ok(out)
        };
        let bias = |from: usize| l.qkv_bias.get(from..from + kv).map(<[f32]>::to_vec).unwrap_or_default();
        Ok(KvWeights {
            hidden: h,
            wk: rows(q)?,
            wv: rows(q + kv)?,
            bk: bias(q),
            bv: bias(q + kv),
            k_norm: l.k_norm.clone(),
        })
    }

    /// Logits of final hidden rows: (n, hidden) to (n, vocab). 4·vocab bytes a row: ask for few
    /// rows, or use [`Model::nll`].
    pub fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        let n = hidden.len() / self.config.hidden_size;
        let mut out = vec![0f32; n * self.config.vocab_size];
        self.logits_into(&hidden[..n * self.config.hidden_size], n, &mut out);
        out
    }

    fn logits_into(&self, hidden: &[f32], n: usize, out: &mut [f32]) {
        if let Err(e) = self.head.forward(hidden, n, out, self.isa) {
            unreachable!("lengths are multiples of the head's shape: {e}");
        }
    }

    /// −ln p of `targets[i]` after hidden row i, natural log, in row blocks so that memory stays
    /// small. Uses min(rows, targets) rows; a target outside the vocabulary gives +∞.
    pub fn nll(&self, hidden: &[f32], targets: &[u32]) -> Vec<f64> {
        const BLOCK: usize = 64;
        let (h, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let n = (hidden.len() / h).min(targets.len());
        let mut logits = vec![0f32; n.min(BLOCK) * vocab];
        let mut out = Vec::with_capacity(n);
        for (x, t) in hidden[..n * h].chunks(BLOCK * h).zip(targets[..n].chunks(BLOCK)) {
            let logits = &mut logits[..t.len() * vocab];
            self.logits_into(x, t.len(), logits);
            let block = logits.par_chunks_exact_mut(vocab).zip(t).map(|(row, &t)| {
                let Some(&target) = row.get(t as usize) else { return f64::INFINITY };
                ops::log_sum_exp(row) - f64::from(target)
            });
            out.par_extend(block);
        }
        out
    }

    /// Factor on q·k.
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.config.head_dim as f32).sqrt()
    }

    /// Embedding rows, (tokens, hidden).
    pub(crate) fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let (h, vocab) = (self.config.hidden_size, self.config.vocab_size);
        if let Some(&id) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(LlmError::TokenId { id, vocab });
        }
        let mut out = vec![0f32; tokens.len() * h];
        out.par_chunks_exact_mut(h).with_min_len(16).zip(tokens).try_for_each(|(row, &t)| {
            let at = t as usize * h;
            match &self.embed {
                Embedding::Tied => self.head.row(t as usize, row)?,
                Embedding::F32(e) => row.copy_from_slice(&e[at..at + h]),
                Embedding::Bf16(e) => row.iter_mut().zip(&e[at..at + h]).for_each(|(o, x)| *o = x.to_f32()),
            }
            Ok::<(), LlmError>(())
        })?;
        Ok(out)
    }

    /// The last normalisation.
    pub(crate) fn final_norm(&self, x: &[f32]) -> Result<Vec<f32>> {
        let mut out = vec![0f32; x.len()];
        elementwise::rms_norm(x, &self.norm, self.config.rms_norm_eps as f32, &mut out, self.isa)?;
        Ok(out)
    }
}

impl LayerKv {
    /// As the caches take it.
    pub fn view(&self, len: usize) -> foveal::cache::Prompt<'_> {
        foveal::cache::Prompt { len, k_pre: &self.k_pre, k: &self.k, v: &self.v, q_obs: &self.q_obs, q_len: self.q_len }
    }
}

/// The tail of a layer, (rows, ·) scratch reused from block to block and token to token.
#[derive(Default, Clone)]
pub(crate) struct Scratch {
    pub normed: Vec<f32>,
    pub qkv: Vec<f32>,
    pub wide: Vec<f32>,
    pub act: Vec<f32>,
    pub delta: Vec<f32>,
}

/// `v` with at least `n` elements, its first `n` as a slice; contents are whatever was there.
pub(crate) fn room(v: &mut Vec<f32>, n: usize) -> &mut [f32] {
    if v.len() < n {
        v.resize(n, 0.0);
    }
    &mut v[..n]
}

impl Model {
    /// Fused projections of `n` rows, queries and keys normalised where the family does so:
    /// (n, (H + 2·H_kv)·D) in `s.qkv`.
    pub(crate) fn project(&self, layer: usize, x: &[f32], n: usize, s: &mut Scratch) -> Result<()> {
        let (l, c) = (&self.layers[layer], &self.config);
        let normed = room(&mut s.normed, n * c.hidden_size);
        elementwise::rms_norm(x, &l.attn_norm, c.rms_norm_eps as f32, normed, self.isa)?;
        let (width, d, eps) = (l.qkv.n(), c.head_dim, c.rms_norm_eps as f32);
        let qkv = room(&mut s.qkv, n * width);
        l.qkv.forward(normed, n, qkv, self.isa)?;
        for (gain, first, heads) in [(&l.q_norm, 0, c.num_heads), (&l.k_norm, c.num_heads, c.num_kv_heads)] {
            if !gain.is_empty() {
                let rows = Heads::in_rows(n, width, first * d, heads, d);
                elementwise::rms_norm_heads(qkv, rows, gain, eps, self.isa)?;
            }
        }
        Ok(())
    }

    /// What follows attention: `x` (n, hidden) += o-projection of `attended` (n, H·D), then the MLP.
    pub(crate) fn finish_layer(
        &self,
        layer: usize,
        attended: &[f32],
        x: &mut [f32],
        n: usize,
        s: &mut Scratch,
    ) -> Result<()> {
        let (l, c) = (&self.layers[layer], &self.config);
        let (h, inter, eps) = (c.hidden_size, c.intermediate_size, c.rms_norm_eps as f32);
        let delta = room(&mut s.delta, n * h);
        l.o.forward(attended, n, delta, self.isa)?;
        let normed = room(&mut s.normed, n * h);
        elementwise::add_rms_norm(x, delta, &l.mlp_norm, eps, normed, self.isa)?;
        let wide = room(&mut s.wide, n * 2 * inter);
        l.gate_up.forward(normed, n, wide, self.isa)?;
        let act = room(&mut s.act, n * inter);
        elementwise::swiglu(wide, inter, act, self.isa)?;
        l.down.forward(act, n, delta, self.isa)?;
        elementwise::add(x, delta, self.isa)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foveal::cache::dense::DenseCache;
    use std::path::Path;
    use std::sync::atomic::AtomicUsize;

    /// A dense store whose making asks for a stop.
    struct Stopping {
        cancel: Arc<AtomicBool>,
        made: Arc<AtomicUsize>,
    }

    impl CachePolicy for Stopping {
        fn layer(&self, ctx: &CacheCtx) -> foveal::Result<Box<dyn LayerCache>> {
            self.made.fetch_add(1, Ordering::Relaxed);
            self.cancel.store(true, Ordering::Relaxed);
            DenseCache.layer(ctx)
        }
        fn declared_bytes(&self, ctx: &CacheCtx, tokens: usize) -> usize {
            DenseCache.declared_bytes(ctx, tokens)
        }
    }

    #[test]
    fn making_caches_ends_at_the_layer_after_a_request_to_stop() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/llm/gguf_llama.gguf");
        let model = Model::load(&Checkpoint::open(&path).unwrap(), &LoadOptions::default()).unwrap();
        assert!(model.config().num_layers > 1);
        let (cancel, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let plan = Plan::dense();
        let mut resolved = plan.resolve(model.config()).unwrap();
        let stopping: Arc<dyn CachePolicy> = Arc::new(Stopping { cancel: cancel.clone(), made: made.clone() });
        resolved.cache = vec![stopping; model.config().num_layers];
        // On one thread, so that no other layer is being made meanwhile.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let session = pool.install(|| model.empty_session(&resolved, &plan, 8, None, Some(cancel)));
        assert!(matches!(session.map(drop), Err(LlmError::Interrupted)));
        assert_eq!(made.load(Ordering::Relaxed), 1);

        let o = PrefillOptions { capture: true, ..Default::default() };
        let prompt = model.prefill(&[1, 2, 3], &plan, &o).unwrap();
        let stop = Some(Arc::new(AtomicBool::new(true)));
        let session = model.session_until(&prompt, &plan, None, stop);
        assert!(matches!(session.map(drop), Err(LlmError::Interrupted)));
        assert_eq!(model.session(&prompt, &plan, None).unwrap().len(), 3);
    }
}
