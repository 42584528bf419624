//! KV cache policies (family G): what decode-time storage keeps, how, and what is read.
//!
//! A policy makes one [`LayerCache`] per layer. The engine runs the prompt with a prefill
//! system on dense keys and values, hands all of them over once with [`LayerCache::fill`], and
//! from then on calls [`LayerCache::step`] for every new token (or a few at once).

use crate::error::Result;
use crate::prim::kv::KvDtype;
use crate::prim::rope::Rope;
use crate::system::Card;
use foveal_kernels::Work;
use std::sync::Arc;

pub mod alisa;
mod batch;
pub mod dense;
pub mod loki;
pub mod palu;
pub mod think;
pub mod tokenselect;

/// Cards of this family.
pub const CARDS: &[&Card] = &[&think::CARD, &loki::CARD, &tokenselect::CARD, &alisa::CARD, &palu::CARD];

/// The layer that a cache serves.
#[derive(Clone)]
pub struct CacheCtx {
    /// Layer number.
    pub layer: usize,
    /// Layers in the model.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of q, k and v heads.
    pub head_dim: usize,
    /// Factor on q·k.
    pub scale: f32,
    /// Sliding window of the model itself, in keys, if it has one.
    pub window: Option<usize>,
    /// Rotation applied to q and k.
    pub rope: Arc<Rope>,
    /// Storage type asked for.
    pub dtype: KvDtype,
    /// Key and value projection weights, for policies that factorise them
    /// ([`Needs::weights`]).
    pub weights: Option<Arc<KvWeights>>,
    /// Statistics from a calibration text, for policies that ask for them
    /// ([`Needs::calibration`]).
    pub calibration: Option<Arc<LayerCalibration>>,
}

/// Key and value projections of one layer, f32 row-major.
pub struct KvWeights {
    /// Input width.
    pub hidden: usize,
    /// (num_kv_heads·head_dim, hidden).
    pub wk: Vec<f32>,
    /// (num_kv_heads·head_dim, hidden).
    pub wv: Vec<f32>,
    /// (num_kv_heads·head_dim) or empty.
    pub bk: Vec<f32>,
    /// (num_kv_heads·head_dim) or empty.
    pub bv: Vec<f32>,
    /// Gain of the normalisation of keys per head before rotation (Qwen3), or empty.
    pub k_norm: Vec<f32>,
}

/// Second moments of one layer on a calibration text.
pub struct LayerCalibration {
    /// Tokens seen.
    pub tokens: usize,
    /// Per K/V head: Σ k kᵀ of keys after rotation, (D, D) row-major.
    pub key_moment: Vec<Vec<f64>>,
    /// Per K/V head: Σ k kᵀ of keys before rotation, (D, D) row-major.
    pub key_pre_moment: Vec<Vec<f64>>,
    /// Σ x xᵀ of the layer's attention input (hidden, hidden), or empty if not collected.
    pub input_moment: Vec<f64>,
}

/// What a policy must be given through [`CacheCtx`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// Projection weights.
    pub weights: bool,
    /// Calibration statistics.
    pub calibration: bool,
    /// [`LayerCalibration::input_moment`] among them.
    pub input_moment: bool,
    /// Keys before rotation in [`Prompt`] and [`Step`].
    pub pre_rotation: bool,
}

/// Keys and values of a whole prompt, each (num_kv_heads, len, head_dim) contiguous f32.
#[derive(Clone, Copy)]
pub struct Prompt<'a> {
    /// Tokens.
    pub len: usize,
    /// Keys before rotation; empty unless [`Needs::pre_rotation`].
    pub k_pre: &'a [f32],
    /// Keys after rotation.
    pub k: &'a [f32],
    /// Values.
    pub v: &'a [f32],
    /// The last `q_len` queries after rotation, (num_heads, q_len, head_dim).
    pub q_obs: &'a [f32],
    /// Queries in `q_obs` (the engine gives min(len, 64)).
    pub q_len: usize,
}

/// `n` new tokens: append, then attend, causally.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// New tokens.
    pub n: usize,
    /// Position of the first (= tokens stored so far).
    pub pos: usize,
    /// Queries after rotation, (num_heads, n, head_dim).
    pub q: &'a [f32],
    /// Keys before rotation (num_kv_heads, n, head_dim); empty unless [`Needs::pre_rotation`].
    pub k_pre: &'a [f32],
    /// Keys after rotation, (num_kv_heads, n, head_dim).
    pub k: &'a [f32],
    /// Values, (num_kv_heads, n, head_dim).
    pub v: &'a [f32],
}

/// Bytes held by a cache, measured from its allocations' lengths.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Resident {
    /// Key storage.
    pub keys: usize,
    /// Value storage.
    pub values: usize,
    /// Everything else that grows or stays per sequence: indices, bases, statistics.
    pub aux: usize,
}

impl Resident {
    /// Sum.
    pub fn total(&self) -> usize {
        self.keys + self.values + self.aux
    }
}

impl std::ops::AddAssign for Resident {
    fn add_assign(&mut self, o: Self) {
        self.keys += o.keys;
        self.values += o.values;
        self.aux += o.aux;
    }
}

/// Makes the caches of a model's layers.
pub trait CachePolicy: Send + Sync {
    /// What the policy must be given.
    fn needs(&self) -> Needs {
        Needs::default()
    }
    /// A fresh cache for one layer.
    fn layer(&self, ctx: &CacheCtx) -> Result<Box<dyn LayerCache>>;
    /// Bytes that a layer of `tokens` prompt tokens (no decoded ones) should hold, from the
    /// policy's own arithmetic: the law compares it with [`LayerCache::resident`].
    fn declared_bytes(&self, ctx: &CacheCtx, tokens: usize) -> usize;
}

/// Keys and values of one layer of one sequence.
pub trait LayerCache: Send + Sync {
    /// Take over the prompt. Called once, before any step.
    fn fill(&mut self, prompt: &Prompt) -> Result<()>;
    /// Append `step.n` tokens and attend from each to what is stored up to and including
    /// itself; `out` is (num_heads, n, head_dim).
    fn step(&mut self, step: &Step, out: &mut [f32]) -> Result<Work>;
    /// Tokens appended so far, kept or not.
    fn len(&self) -> usize;
    /// Whether nothing was appended yet.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Bytes held now.
    fn resident(&self) -> Resident;
    /// An independent copy, for branching one prompt into several continuations.
    fn fork(&self) -> Box<dyn LayerCache>;
    /// Positions that the last row of the last step attended to, per query head, ascending;
    /// `None` = all. For pictures and recall.
    fn last_visited(&self) -> Option<Vec<Vec<u32>>> {
        None
    }
}
