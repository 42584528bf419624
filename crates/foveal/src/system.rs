//! What a published system is to Foveal: a card, parameters, laws, and one trait impl.

use crate::cache::CachePolicy;
use crate::error::{Error, Result, nearest_hint};
use crate::mixer::MixerSystem;
use crate::sparse::{Domain, Selector};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fmt;
use std::str::FromStr;

/// Family of the catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// A: head layouts and K/V projections.
    HeadLayout,
    /// B: sparse patterns.
    Sparse,
    /// C: linear, kernel, recurrent and convolutional mixers.
    Linear,
    /// D: low rank over the length axis.
    LowRank,
    /// E: score, normalisation, gating, head mixing.
    Score,
    /// F: position and bias.
    Position,
    /// G: KV cache.
    Cache,
    /// H: exact kernels.
    Kernel,
    /// I: distributed and serving.
    Parallel,
    /// J: conversion of pretrained weights.
    Conversion,
    /// K: adapters and low-rank training.
    Adapter,
    /// L: token reduction.
    Reduction,
    /// M: evaluation.
    Evaluation,
    /// N: theory.
    Theory,
    /// O: vision blocks.
    Vision,
    /// P: applications.
    Application,
}

impl Family {
    /// The catalogue's letter.
    pub fn letter(self) -> char {
        (b'A' + self as u8) as char
    }

    /// Family of a catalogue letter.
    pub fn from_letter(c: char) -> Option<Family> {
        use Family::*;
        let all = [
            HeadLayout,
            Sparse,
            Linear,
            LowRank,
            Score,
            Position,
            Cache,
            Kernel,
            Parallel,
            Conversion,
            Adapter,
            Reduction,
            Evaluation,
            Theory,
            Vision,
            Application,
        ];
        all.into_iter().find(|f| f.letter() == c)
    }

    /// What the family holds, in a few words.
    pub fn title(self) -> &'static str {
        match self {
            Family::HeadLayout => "head layout and K/V projections",
            Family::Sparse => "sparse patterns",
            Family::Linear => "linear, kernel, recurrent, convolutional mixers",
            Family::LowRank => "low rank over the length axis",
            Family::Score => "score, normalisation, gating, head mixing",
            Family::Position => "position and bias",
            Family::Cache => "KV cache",
            Family::Kernel => "exact kernels",
            Family::Parallel => "distributed and serving",
            Family::Conversion => "conversion of pretrained weights",
            Family::Adapter => "adapters and low-rank training",
            Family::Reduction => "token reduction",
            Family::Evaluation => "evaluation",
            Family::Theory => "theory",
            Family::Vision => "vision blocks",
            Family::Application => "applications",
        }
    }
}

/// Where a system plugs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Slot {
    /// Training-free on the prompt of a pretrained softmax model.
    Prefill,
    /// Decode-time storage and selection.
    Cache,
    /// A trainable layer.
    Mixer,
    /// Score modification.
    Score,
    /// Position encoding.
    Position,
    /// Token reduction.
    Reduce,
    /// Checkpoint to checkpoint.
    Convert,
    /// Weight reparameterisation.
    Adapter,
    /// Optimiser.
    Optimiser,
    /// Parallel run.
    Parallel,
    /// An exact kernel.
    Kernel,
    /// A claim of theory.
    Check,
    /// A benchmark.
    Task,
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// How a work counter grows with the number of tokens T at default parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Growth {
    /// O(T).
    Linear,
    /// O(T log T).
    LogLinear,
    /// O(T²), usually at a fraction of dense.
    Quadratic,
}

/// A promise that the conformance suite tests. Beside these every system is held to the
/// unwritten ones: finite outputs, zero (never NaN) for rows that see no key, shape and dtype
/// kept, same input and seed give the same answer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Law {
    /// Changing q, k, v after token t changes no output up to t, and the output on a prefix is
    /// the prefix of the output.
    Causal,
    /// As [`Law::Causal`] for t at multiples of the named block parameter: selection looks at
    /// its own query block as a whole.
    CausalInBlocks(&'static str),
    /// No query attends to a later key, but which earlier keys it attends to may depend on later
    /// queries (estimators that look at the end of the prompt).
    CausalMask,
    /// With these parameters the output equals exact attention.
    ExactAt(&'static [(&'static str, &'static str)]),
    /// How the exact part (pairs) and the whole (flops, estimator included) grow.
    Work {
        /// Growth of `Work::pairs`.
        pairs: Growth,
        /// Growth of `Work::flops`.
        flops: Growth,
    },
    /// Mixer: gradients with respect to q, k, v, the layer's input and every parameter match finite differences.
    Gradients,
    /// Cache: processing n tokens at once equals one by one.
    StepsAgree,
    /// Cache: bytes resident, measured from the allocations, equal the bytes declared.
    BytesAsDeclared,
    /// Cache: bytes resident are below the dense store's at default parameters.
    SmallerThanDense,
    /// The named set of parameters spends exactly this share of dense work or bytes.
    Monotone {
        /// Parameter that is raised.
        param: &'static str,
        /// Values, in the order in which density or bytes must not fall.
        values: &'static [&'static str],
    },
}

impl fmt::Display for Law {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Law::Causal => f.write_str("causal: later tokens change no earlier output"),
            Law::CausalInBlocks(b) => write!(f, "causal in blocks of {b}: later blocks change no earlier output"),
            Law::CausalMask => {
                f.write_str("causal mask: no query attends to a later key (the estimator may look at later queries)")
            }
            Law::ExactAt([]) => f.write_str("exact: equals softmax attention"),
            Law::ExactAt(with) => {
                let with: Vec<String> = with.iter().map(|(k, v)| format!("{k} = {v}")).collect();
                write!(f, "exact at {}: equals softmax attention", with.join(", "))
            }
            Law::Work { pairs, flops } => {
                write!(f, "work at default parameters: pairs {pairs}, operations with the estimator {flops}")
            }
            Law::Gradients => f.write_str("gradients: match finite differences for inputs and parameters"),
            Law::StepsAgree => f.write_str("steps agree: many tokens at once equal one by one"),
            Law::BytesAsDeclared => f.write_str("bytes as declared: resident bytes equal the policy's own arithmetic"),
            Law::SmallerThanDense => {
                f.write_str("smaller than dense: fewer bytes than a dense store at default parameters")
            }
            Law::Monotone { param, values } => {
                write!(f, "monotone: raising {param} over {} never lowers density or bytes", values.join(", "))
            }
        }
    }
}

impl fmt::Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Growth::Linear => "O(T)",
            Growth::LogLinear => "O(T log T)",
            Growth::Quadratic => "O(T²)",
        })
    }
}

/// Raw parameters by name.
pub type Params = serde_json::Map<String, Value>;

/// One parameter as shown to people.
#[derive(Debug, Clone, Serialize)]
pub struct ParamDoc {
    /// Name.
    pub name: &'static str,
    /// The paper's default (or ours, said in the card).
    pub default: Value,
    /// Meaning, unit and range.
    pub doc: &'static str,
}

/// A system's parameters: every field has a default and a line of documentation.
pub trait Config: Default + Serialize + DeserializeOwned {
    /// (field, meaning) for every field, in order.
    const DOCS: &'static [(&'static str, &'static str)];
    /// Range checks; the message names the parameter, its value and the remedy.
    fn validate(&self) -> std::result::Result<(), String>;
}

/// Documentation of a config type's parameters.
pub fn params_of<C: Config>() -> Vec<ParamDoc> {
    let defaults = serde_json::to_value(C::default()).unwrap_or(Value::Null);
    C::DOCS
        .iter()
        .map(|(name, doc)| ParamDoc { name, default: defaults.get(name).cloned().unwrap_or(Value::Null), doc })
        .collect()
}

/// serde's words without the names of Rust's types.
fn plain(message: &str) -> String {
    let Some((found, wanted)) = message.rsplit_once("expected ") else { return message.into() };
    let wanted = match wanted {
        "usize" | "u64" | "u32" => "a whole number of 0 or more",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        other => other,
    };
    format!("{found}expected {wanted}")
}

/// Defaults overridden by `params`, validated.
pub fn configure<C: Config>(system: &str, params: &Params) -> Result<C> {
    let known: Vec<&str> = C::DOCS.iter().map(|d| d.0).collect();
    let mut all = match serde_json::to_value(C::default()) {
        Ok(Value::Object(m)) => m,
        _ => Params::new(),
    };
    for (name, value) in params {
        if !known.contains(&name.as_str()) {
            return Err(Error::UnknownParam {
                system: system.into(),
                name: name.clone(),
                hint: nearest_hint(name, known.iter().copied()),
                known: if known.is_empty() { "no parameters".into() } else { known.join(", ") },
            });
        }
        all.insert(name.clone(), value.clone());
    }
    // Field by field first, so that a wrong type is reported with the parameter's name.
    for (name, value) in params {
        let mut one = match serde_json::to_value(C::default()) {
            Ok(Value::Object(m)) => m,
            _ => Params::new(),
        };
        one.insert(name.clone(), value.clone());
        if let Err(e) = serde_json::from_value::<C>(Value::Object(one)) {
            return Err(Error::Param {
                system: system.into(),
                message: format!("{name} = {value}: {}", plain(&e.to_string())),
            });
        }
    }
    let c: C = serde_json::from_value(Value::Object(all))
        .map_err(|e| Error::Param { system: system.into(), message: e.to_string() })?;
    c.validate().map_err(|message| Error::Param { system: system.into(), message })?;
    Ok(c)
}

/// A built system, ready to run.
pub enum System {
    /// Exact attention; nothing to choose.
    Dense,
    /// Chooses what each query visits in the prompt.
    Selector(Box<dyn Selector>),
    /// Chooses what the decode-time store keeps and reads.
    Cache(Box<dyn CachePolicy>),
    /// Makes attention layers that change more than which keys are visited.
    Mixer(Box<dyn MixerSystem>),
}

impl System {
    /// What problems the system can serve as prefill or as a layer.
    pub fn domain(&self) -> Domain {
        match self {
            System::Dense => Domain::ANY,
            System::Selector(s) => s.domain(),
            System::Cache(_) => Domain::CAUSAL,
            System::Mixer(m) => m.domain(),
        }
    }
}

/// One published system.
pub struct Card {
    /// Id of the catalogue, used in code, on the command line and in every table.
    pub id: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// First author and year.
    pub authors: &'static str,
    /// arXiv number, or "" where there is none.
    pub arxiv: &'static str,
    /// Family.
    pub family: Family,
    /// Where it can be used.
    pub slots: &'static [Slot],
    /// Its promises.
    pub laws: &'static [Law],
    /// The mechanism as formulas, a few lines of plain text.
    pub equation: &'static str,
    /// Cost in time and memory.
    pub cost: &'static str,
    /// What the sources left open or contradict, and what was settled here and why.
    pub choices: &'static [&'static str],
    /// Parameters with defaults.
    pub params: fn() -> Vec<ParamDoc>,
    /// Construct from raw parameters.
    pub build: fn(&Params) -> Result<System>,
}

impl Card {
    /// Whether the system plugs in at `slot`.
    pub fn has_slot(&self, slot: Slot) -> bool {
        self.slots.contains(&slot)
    }

    /// Slots as one string.
    pub fn slot_names(&self) -> String {
        self.slots.iter().map(Slot::to_string).collect::<Vec<_>>().join(", ")
    }
}

/// A system id with parameters, as written on the command line and in plans:
/// `xattention:threshold=0.9,stride=8`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Spec {
    /// System id.
    pub id: String,
    /// Parameters given.
    pub params: Params,
}

impl Spec {
    /// A system with default parameters.
    pub fn new(id: impl Into<String>) -> Self {
        Self { id: id.into(), params: Params::new() }
    }

    /// The same with one more parameter, its value parsed as on the command line.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.params.insert(name.into(), parse_value(value));
        self
    }
}

/// A number, a boolean, else a string; `a;b;c` is a list, and so is `a;`.
pub fn parse_value(s: &str) -> Value {
    if s.contains(';') {
        return Value::Array(s.split(';').map(str::trim).filter(|x| !x.is_empty()).map(parse_value).collect());
    }
    if let Ok(i) = s.parse::<i64>() {
        return i.into();
    }
    if let Ok(x) = s.parse::<f64>()
        && let Some(n) = serde_json::Number::from_f64(x)
    {
        return Value::Number(n);
    }
    match s {
        "true" => true.into(),
        "false" => false.into(),
        _ => s.into(),
    }
}

impl FromStr for Spec {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let (id, rest) = s.split_once(':').unwrap_or((s, ""));
        let mut spec = Spec::new(id.trim());
        for part in rest.split(',').filter(|p| !p.trim().is_empty()) {
            let Some((k, v)) = part.split_once('=') else {
                return Err(Error::Param {
                    system: spec.id.clone(),
                    message: format!("{part:?} is not name=value; write {}:name=value,name=value", spec.id),
                });
            };
            spec.params.insert(k.trim().into(), parse_value(v.trim()));
        }
        Ok(spec)
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        for (i, (k, v)) in self.params.iter().enumerate() {
            let v = match v {
                Value::String(s) => s.clone(),
                Value::Array(a) => {
                    let items: Vec<_> =
                        a.iter().map(|x| x.as_str().map_or_else(|| x.to_string(), str::to_owned)).collect();
                    // Without the mark a list of one would be read back as its element.
                    if items.len() < 2 { items.concat() + ";" } else { items.join(";") }
                }
                v => v.to_string(),
            };
            write!(f, "{}{k}={v}", if i == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}
