//! What a comparison measured: the data behind every table, file and picture.
//!
//! The JSON report is exactly [`Results`]; it is versioned by [`SCHEMA`] and complete, so that
//! tables and pages can be made again from it.

use crate::verdict::{Summary, Verdict};
use serde::{Deserialize, Serialize};

/// Version of the JSON report. Raised whenever a field changes its meaning or goes.
pub const SCHEMA: u32 = 1;

/// A whole comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`] of the writer.
    pub schema: u32,
    /// Machine, model, text, versions, seeds.
    pub facts: Facts,
    /// Prompt lengths in tokens, ascending.
    pub lengths: Vec<usize>,
    /// What was compared; the first is dense attention.
    pub systems: Vec<SystemInfo>,
    /// One row per system and length: all systems of the first length, then of the next.
    pub rows: Vec<Row>,
    /// One summary per system over all lengths.
    pub summaries: Vec<Summary>,
    /// What one layer and head looked at.
    pub maps: Option<Maps>,
    /// Wall time of the comparison in seconds, model loading left out.
    pub seconds: f64,
    /// Peak resident memory of the process in bytes, where the system tells.
    pub peak_bytes: Option<u64>,
    /// Things a reader must know: fallbacks, lengths cut short, systems that failed.
    pub notes: Vec<String>,
}

impl Results {
    /// The row of one system at one length.
    pub fn row(&self, system: usize, length: usize) -> Option<&Row> {
        self.rows.iter().find(|r| r.system == system && r.length == length)
    }

    /// Rows of one length, in the order of the systems.
    pub fn at(&self, length: usize) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(move |r| r.length == length)
    }

    /// Rows of one system, in the order of the lengths.
    pub fn of(&self, system: usize) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(move |r| r.system == system)
    }
}

/// Where the numbers come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct Facts {
    /// Version of Foveal.
    pub version: String,
    /// Date of the run as given by the caller.
    pub date: String,
    /// Processor name.
    pub cpu: String,
    /// Logical processors of the machine.
    pub cores: usize,
    /// Threads used.
    pub threads: usize,
    /// Instruction set in force.
    pub isa: String,
    /// Operating system and architecture.
    pub os: String,
    /// Model, one line.
    pub model: String,
    /// Layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Head width.
    pub head_dim: usize,
    /// Storage of the weights in memory.
    pub weights: String,
    /// Bytes of the weights in memory.
    pub weight_bytes: usize,
    /// Text, one line.
    pub text: String,
    /// Tokens in the text.
    pub text_tokens: usize,
    /// Calibration text, one line.
    pub calibration: String,
    /// Seed of the needles.
    pub seed: u64,
    /// The command that repeats the run.
    pub command: String,
}

/// What a system changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Exact attention and a dense store: the reference.
    Dense,
    /// Only the prompt's attention.
    Prefill,
    /// Only the store.
    Cache,
    /// Both.
    Both,
}

/// One compared system.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SystemInfo {
    /// Name in tables.
    pub name: String,
    /// Prefill system with its parameters.
    pub prefill: String,
    /// Cache policy with its parameters.
    pub cache: String,
    /// Storage type asked of the store.
    pub kv_dtype: String,
    /// What it changes.
    pub role: Role,
    /// The whole plan as TOML.
    pub plan: String,
    /// Title of the paper(s).
    pub title: String,
    /// arXiv number(s), comma separated.
    pub arxiv: String,
}

/// One system at one length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Index into [`Results::systems`].
    pub system: usize,
    /// Prompt length in tokens.
    pub length: usize,
    /// Prompt processing.
    pub prefill: Prefill,
    /// One token at a time after the prompt.
    pub decode: Decode,
    /// K/V store after the prompt.
    pub bytes: Bytes,
    /// Attention output against exact attention on the same queries.
    pub error: Option<OutputError>,
    /// Perplexity of the last quarter of the text.
    pub ppl: Option<Ppl>,
    /// Passkeys.
    pub needle: Option<Needle>,
    /// Judgement.
    pub verdict: Verdict,
}

/// Time and work of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Prefill {
    /// Whole model, median over the repeats, seconds.
    pub seconds: f64,
    /// Fastest repeat, seconds.
    pub fastest: f64,
    /// Slowest repeat, seconds.
    pub slowest: f64,
    /// Repeats.
    pub repeats: usize,
    /// Attention alone, the choice of what to visit included, seconds (of the median repeat).
    pub attention_seconds: f64,
    /// The choice of what to visit alone, seconds.
    pub select_seconds: f64,
    /// `seconds` over dense's in the same run.
    pub ratio: f64,
    /// `attention_seconds` over dense's.
    pub attention_ratio: f64,
    /// Query-key pairs computed.
    pub pairs: u64,
    /// FLOPs of attention, the choice included.
    pub flops: u64,
    /// Of `flops`, those that a slower kernel path did than the one asked for.
    #[serde(default)]
    pub fallback_flops: u64,
    /// `pairs` over dense's.
    pub density: f64,
    /// Whether this is dense's own measurement, the system leaving the prompt alone.
    pub shared: bool,
}

/// Decoding speed and work.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Decode {
    /// Tokens a second (from the median step).
    pub tokens_per_second: f64,
    /// Median seconds of one step.
    pub step_seconds: f64,
    /// Steps timed.
    pub steps: usize,
    /// Tokens stored before the first step.
    pub depth: usize,
    /// `tokens_per_second` over dense's: above 1 is faster.
    pub ratio: f64,
    /// Query-key pairs of all steps.
    pub pairs: u64,
    /// `pairs` over dense's.
    pub density: f64,
    /// Whether this is dense's own measurement, the system leaving the store alone.
    pub shared: bool,
}

/// Bytes held by the store, measured from its allocations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bytes {
    /// Keys.
    pub keys: usize,
    /// Values.
    pub values: usize,
    /// Indices, bases, statistics.
    pub aux: usize,
    /// Tokens stored.
    pub tokens: usize,
    /// All of it over dense's.
    pub ratio: f64,
}

impl Bytes {
    /// Sum.
    pub fn total(&self) -> usize {
        self.keys + self.values + self.aux
    }
}

/// Relative error ‖o − o*‖ / ‖o*‖ of the attention output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutputError {
    /// Mean over layers.
    pub mean: f64,
    /// Worst layer's.
    pub worst: f64,
    /// The worst layer.
    pub worst_layer: usize,
    /// Per layer.
    pub layers: Vec<f64>,
    /// Whether the rows came from the prompt or were decoded.
    pub place: Place,
}

impl OutputError {
    /// From errors per layer; `None` when there are none or one is not a number.
    pub fn of(layers: Vec<f64>, place: Place) -> Option<Self> {
        if layers.is_empty() || layers.iter().any(|x| !x.is_finite()) {
            return None;
        }
        let mean = layers.iter().sum::<f64>() / layers.len() as f64;
        let (worst_layer, worst) =
            layers.iter().copied().enumerate().fold((0, f64::MIN), |m, x| if x.1 > m.1 { x } else { m });
        Some(Self { mean, worst, worst_layer, layers, place })
    }
}

/// Which queries an error was measured on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Rows of the prompt.
    Prompt,
    /// Rows after the prompt, against the stored prompt.
    Decode,
}

/// Perplexity of the last quarter of the text given the rest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ppl {
    /// exp of the mean negative log-likelihood.
    pub ppl: f64,
    /// Tokens scored.
    pub tokens: usize,
    /// Against dense.
    pub difference: f64,
    /// Against dense, percent of dense's.
    pub percent: f64,
}

/// Passkey retrieval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Needle {
    /// One per passkey, shallowest first.
    pub trials: Vec<Trial>,
    /// Tokens of the prompt.
    pub tokens: usize,
}

impl Needle {
    /// Passkeys given back exactly.
    pub fn hits(&self) -> usize {
        self.trials.iter().filter(|t| t.hit).count()
    }
}

/// One passkey.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Whose passkey.
    pub name: String,
    /// Where in the prompt, 0 = start, 1 = end.
    pub depth: f64,
    /// Greedy decoding gives back every token of it.
    pub hit: bool,
    /// Share of its tokens that greedy decoding gets right given the ones before.
    pub right: f64,
}

/// Pictures of one layer and head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Maps {
    /// Layer.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// Prompt length.
    pub length: usize,
    /// The exact attention map, then one per system that chooses.
    pub maps: Vec<Map>,
}

/// A picture as a grid of bytes, 0 = nothing, 255 = most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// Index into [`Results::systems`]; dense is the exact map.
    pub system: usize,
    /// What it shows.
    pub caption: String,
    /// Rows (queries, first at the top).
    pub rows: usize,
    /// Columns (keys, first at the left).
    pub cols: usize,
    /// `rows * cols` bytes, row by row, in base64.
    #[serde(with = "crate::report::base64")]
    pub cells: Vec<u8>,
}
