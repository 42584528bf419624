//! One face for both checkpoint kinds: Hugging Face tensor names, `f32` row-major data, a checked configuration.

use std::path::{Path, PathBuf};

use candle_core::quantized::QTensor;

use crate::config::{Family, ModelConfig, RopeScaling};
use crate::error::{LlmError, Result, nearest};
use crate::gguf::{Gguf, TensorInfo};
use crate::hf::HfFolder;
use crate::tokenizer::Tokenizer;

/// A tensor in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Shape, rows first.
    pub shape: Vec<usize>,
    /// Row-major values, `shape.iter().product()` of them.
    pub data: Vec<f32>,
}

/// An opened checkpoint: the configuration is read and every tensor the model needs is known to be there with the right shape.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Gguf(Gguf),
    Hf(HfFolder),
}

impl Checkpoint {
    /// Opens a GGUF file, a Hugging Face folder, or a `.safetensors` file inside such a folder.
    ///
    /// # Errors
    /// A path that is none of these, a damaged file, an unsupported architecture, a missing or misshapen tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| LlmError::io(path, "open the checkpoint", e))?;
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        if meta.is_dir() {
            return Self::open_hf(path, None);
        }
        if extension == "safetensors" {
            let folder = match path.parent() {
                Some(p) if !p.as_os_str().is_empty() => p,
                _ => Path::new("."),
            };
            return Self::open_hf(folder, Some(path));
        }
        if extension == "json" && path.file_name().is_some_and(|n| n == "config.json") {
            let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            return Self::open_hf(folder, None);
        }
        Self::from_gguf(Gguf::open(path)?)
    }

    /// Uses a parsed GGUF file.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_gguf(gguf: Gguf) -> Result<Self> {
        let config = gguf_config(&gguf)?;
        let path = gguf.path().to_path_buf();
        Self { path, config, source: Source::Gguf(gguf) }.checked()
    }

    fn open_hf(folder: &Path, file: Option<&Path>) -> Result<Self> {
        let (hf, config) = HfFolder::open(folder, file)?;
        let path = file.unwrap_or(folder).to_path_buf();
        Self { path, config, source: Source::Hf(hf) }.checked()
    }

    /// Every tensor that the configuration calls for must be there with its shape.
    fn checked(self) -> Result<Self> {
        for spec in self.config.tensor_shapes() {
            match self.stored_shape(&spec.name) {
                None => {
                    let nearest = nearest(&spec.name, self.tensor_names().iter().map(String::as_str))
                        .map(|n| format!(" (nearest: `{n}`)"))
                        .unwrap_or_default();
                    return Err(LlmError::MissingTensor { path: self.path.clone(), tensor: spec.name, nearest });
                }
                Some(found) if found != spec.shape => {
                    return Err(LlmError::Shape {
                        path: self.path.clone(),
                        tensor: spec.name,
                        found,
                        expected: spec.shape,
                        keys: spec.keys,
                    });
                }
                Some(_) => {}
            }
        }
        Ok(self)
    }

    fn stored_shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.source {
            Source::Gguf(g) => Some(g.header().tensor(&gguf_name(name)?)?.shape.clone()),
            Source::Hf(h) => h.shape(name),
        }
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// `lm_head.weight` of a tied model is the embedding.
    fn resolve<'a>(&self, name: &'a str) -> &'a str {
        if name == "lm_head.weight" && self.config.tie_embeddings { "model.embed_tokens.weight" } else { name }
    }

    fn missing(&self, name: &str) -> LlmError {
        let nearest = nearest(name, self.tensor_names().iter().map(String::as_str))
            .map(|n| format!(" (nearest: `{n}`)"))
            .unwrap_or_default();
        LlmError::MissingTensor { path: self.path.clone(), tensor: name.into(), nearest }
    }

    /// Loads one tensor by its Hugging Face name as row-major `f32`. `lm_head.weight` of a tied model gives the embedding.
    /// Query and key rows of Llama-architecture GGUF files are put back into the half-split rotary layout that `config.json`
    /// models use, so that one rotary code serves both.
    ///
    /// # Errors
    /// A tensor that is not there, or a weight that is NaN or infinite.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let name = self.resolve(name);
        match &self.source {
            Source::Gguf(g) => {
                let info = self.gguf_info(g, name).ok_or_else(|| self.missing(name))?;
                let order = self.row_order(name, info);
                let data = match order {
                    // The rows of a bias are single numbers within one stored row.
                    Some(order) if info.shape.len() == 1 => {
                        let data = g.dequantize(info, None)?;
                        order.iter().map(|&from| data[from]).collect()
                    }
                    order => g.dequantize(info, order.as_deref())?,
                };
                Ok(HostTensor { shape: info.shape.clone(), data })
            }
            Source::Hf(h) => h.tensor(name)?.ok_or_else(|| self.missing(name)),
        }
    }

    /// The tensor in its stored quantisation as candle's `QTensor` on the CPU, rows in the same order as [`Checkpoint::tensor`].
    /// `None` for safetensors folders. Weights are not searched for NaN here.
    ///
    /// # Errors
    /// A tensor that is not there, or one that candle refuses.
    pub fn qtensor(&self, name: &str) -> Result<Option<QTensor>> {
        let name = self.resolve(name);
        match &self.source {
            Source::Gguf(g) => {
                let info = self.gguf_info(g, name).ok_or_else(|| self.missing(name))?;
                let order = self.row_order(name, info).filter(|_| info.shape.len() > 1);
                g.qtensor(info, order.as_deref()).map(Some)
            }
            Source::Hf(_) => Ok(None),
        }
    }

    fn gguf_info<'a>(&self, g: &'a Gguf, name: &str) -> Option<&'a TensorInfo> {
        g.header().tensor(&gguf_name(name)?)
    }

    /// Which stored row each row of the returned tensor comes from; `None` keeps the order.
    ///
    /// Llama-architecture GGUF files store the rows of each query and key head so that rotary pairs are neighbours (2i, 2i + 1);
    /// here they become (i, i + rope_dim / 2).
    fn row_order(&self, name: &str, info: &TensorInfo) -> Option<Vec<usize>> {
        let c = &self.config;
        let heads = match name {
            n if n.contains(".self_attn.q_proj.") => c.num_heads,
            n if n.contains(".self_attn.k_proj.") => c.num_kv_heads,
            _ => return None,
        };
        let rows = info.shape[0];
        // A tensor of such a name that the configuration does not call for may have any shape: it has no heads to put in order.
        if c.family != Family::Llama || info.shape.len() > 2 || rows != heads * c.head_dim {
            return None;
        }
        let (head_dim, half) = (self.config.head_dim, self.config.rope_dim / 2);
        let order = (0..rows)
            .map(|row| {
                let (head, i) = (row / head_dim * head_dim, row % head_dim);
                head + if i < half {
                    2 * i
                } else if i < 2 * half {
                    2 * (i - half) + 1
                } else {
                    i
                }
            })
            .collect();
        Some(order)
    }

    /// Whether the file stores a tensor of this name (a tied `lm_head.weight` is not stored).
    pub fn has(&self, name: &str) -> bool {
        self.stored_shape(name).is_some()
    }

    /// Every stored tensor by its Hugging Face name, where it has one.
    pub fn tensor_names(&self) -> Vec<String> {
        match &self.source {
            Source::Gguf(g) => g.header().tensors().iter().map(|t| hf_name(&t.name)).collect(),
            Source::Hf(h) => h.names(),
        }
    }

    /// Storage type of a tensor, such as `Q4_1` or `BF16`; `absent` when there is none.
    pub fn source_dtype(&self, name: &str) -> String {
        let name = self.resolve(name);
        match &self.source {
            Source::Gguf(g) => self.gguf_info(g, name).map_or("absent".into(), |t| t.dtype.name.into()),
            Source::Hf(h) => h.dtype(name).unwrap_or_else(|| "absent".into()),
        }
    }

    /// Bytes of all weight files.
    pub fn file_bytes(&self) -> u64 {
        match &self.source {
            Source::Gguf(g) => g.file_bytes(),
            Source::Hf(h) => h.file_bytes(),
        }
    }

    /// The GGUF file, if it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(g) => Some(g),
            Source::Hf(_) => None,
        }
    }

    /// The tokenizer that comes with the weights, checked against the embedding's size.
    ///
    /// # Errors
    /// No tokenizer, a broken one, or one with more ids than the model embeds.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = match &self.source {
            Source::Gguf(g) => Tokenizer::from_gguf(g)?,
            Source::Hf(h) => Tokenizer::from_folder(h.folder(), &self.config)?,
        };
        if tokenizer.vocab_size() > self.config.vocab_size {
            return Err(LlmError::VocabMismatch {
                path: self.path.clone(),
                tokenizer: tokenizer.vocab_size(),
                model: self.config.vocab_size,
            });
        }
        Ok(tokenizer)
    }

    /// One line: name, family, size, storage.
    pub fn describe(&self) -> String {
        let c = &self.config;
        let name = match &self.source {
            Source::Gguf(g) => gguf_title(&self.path, g.get_str("general.name").ok().flatten()),
            Source::Hf(h) => h.folder().file_name().map(|n| n.to_string_lossy().into_owned()),
        }
        .unwrap_or_else(|| self.path.display().to_string());
        format!(
            "{name}: {} {:.0}M parameters, {} layers, {}/{} heads of {}, vocabulary {}, context {}, {} ({:.0} MB)",
            c.family.name(),
            c.num_parameters() as f64 / 1e6,
            c.num_layers,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.vocab_size,
            c.max_position,
            self.source_dtype("model.layers.0.mlp.down_proj.weight"),
            self.file_bytes() as f64 / 1e6,
        )
    }
}

/// What people call a GGUF file: the name it was published under. Many files carry in `general.name`
/// whatever the converter was told, so the file name counts first, unless it is one that any file has.
fn gguf_title(path: &Path, name: Option<&str>) -> Option<String> {
    let stem = path.file_stem()?.to_string_lossy().into_owned();
    let any = ["model", "ggml-model", "gguf", "weights", "sha256-"];
    let name = name.map(|n| n.split_whitespace().collect::<Vec<_>>().join(" ")).filter(|n| !n.is_empty());
    match name {
        Some(n) if any.iter().any(|a| stem.to_lowercase().starts_with(a)) => Some(n),
        _ => Some(stem),
    }
}

/// Hugging Face and GGUF spellings of the per-layer names.
const LAYER_NAMES: [(&str, &str); 12] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("self_attn.rotary_emb.inv_freq", "attn_rot_embd"),
];

/// The GGUF name of a Hugging Face tensor name.
fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let rest = name.strip_prefix("model.layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let (part, suffix) = rest.rsplit_once('.')?;
    let (_, gguf) = LAYER_NAMES.iter().find(|(hf, _)| *hf == part)?;
    Some(format!("blk.{layer}.{gguf}.{suffix}"))
}

/// The Hugging Face name of a GGUF tensor name, or the name itself where there is none.
fn hf_name(name: &str) -> String {
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".into(),
        "output_norm.weight" => return "model.norm.weight".into(),
        "output.weight" => return "lm_head.weight".into(),
        _ => {}
    }
    let translate = || {
        let rest = name.strip_prefix("blk.")?;
        let (layer, rest) = rest.split_once('.')?;
        let (part, suffix) = rest.rsplit_once('.')?;
        let (hf, _) = LAYER_NAMES.iter().find(|(_, gguf)| *gguf == part)?;
        Some(format!("model.layers.{layer}.{hf}.{suffix}"))
    };
    translate().unwrap_or_else(|| name.to_owned())
}

/// Reads the configuration out of GGUF metadata.
fn gguf_config(g: &Gguf) -> Result<ModelConfig> {
    let path = g.path();
    let missing = |key: &str| LlmError::MissingKey {
        path: path.to_path_buf(),
        key: key.to_owned(),
        remedy: "the file is no complete language model; convert it again".into(),
    };
    let bad = |key: &str, value: String, need: String| LlmError::BadValue {
        path: path.to_path_buf(),
        key: key.to_owned(),
        value,
        need,
    };
    let unsupported = |what: &str, value: String, supported: &str, remedy: &'static str| LlmError::Unsupported {
        path: path.to_path_buf(),
        what: what.into(),
        value,
        supported: supported.into(),
        remedy,
    };
    let arch = g.get_str("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
    let family = match arch {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        other => {
            return Err(unsupported(
                "general.architecture",
                format!("`{other}`"),
                "llama (Llama, SmolLM2, Mistral), qwen2, qwen3",
                "Take a model of one of these families.",
            ));
        }
    };
    if let Some(parts) = g.get_u64("split.count")?
        && parts > 1
    {
        return Err(unsupported(
            "split.count",
            parts.to_string(),
            "1 file",
            "Merge the parts into one GGUF file first.",
        ));
    }
    let key = |suffix: &str| format!("{arch}.{suffix}");
    if let Some(experts) = g.get_u64(&key("expert_count"))?
        && experts > 0
    {
        return Err(unsupported(
            &key("expert_count"),
            experts.to_string(),
            "dense models (0 experts)",
            "Take a dense model of the family.",
        ));
    }
    let optional = |suffix: &str| -> Result<Option<usize>> {
        let key = key(suffix);
        match g.get_u64(&key)? {
            None => Ok(None),
            Some(v) => match usize::try_from(v) {
                Ok(v) => Ok(Some(v)),
                Err(_) => Err(bad(&key, v.to_string(), "needs a smaller number".into())),
            },
        }
    };
    let number = |suffix: &str| -> Result<usize> { optional(suffix)?.ok_or_else(|| missing(&key(suffix))) };

    let hidden_size = number("embedding_length")?;
    let num_heads = number("attention.head_count")?;
    if num_heads == 0 {
        return Err(bad(&key("attention.head_count"), "0".into(), "needs at least 1".into()));
    }
    let head_dim = match optional("attention.key_length")? {
        Some(d) => d,
        None if hidden_size % num_heads == 0 => hidden_size / num_heads,
        None => {
            let need = format!("needs a multiple of {} = {num_heads}", key("attention.head_count"));
            return Err(bad(&key("embedding_length"), hidden_size.to_string(), need));
        }
    };
    if let Some(v) = optional("attention.value_length")?
        && v != head_dim
    {
        let need = format!("needs the key length {head_dim}; heads with narrower values are not supported");
        return Err(bad(&key("attention.value_length"), v.to_string(), need));
    }
    let vocab_size = match g.header().tensor("token_embd.weight") {
        Some(t) if t.shape.len() == 2 => t.shape[0],
        Some(t) => {
            return Err(LlmError::Shape {
                path: path.into(),
                tensor: "token_embd.weight".into(),
                found: t.shape.clone(),
                expected: vec![optional("vocab_size")?.unwrap_or(0), hidden_size],
                keys: "vocab_size and embedding_length",
            });
        }
        None => {
            let tensor = "token_embd.weight".into();
            return Err(LlmError::MissingTensor { path: path.into(), tensor, nearest: String::new() });
        }
    };
    let max_position = number("context_length")?;
    let rope_dim = optional("rope.dimension_count")?.unwrap_or(head_dim);
    let float = |suffix: &str| g.get_f64(&key(suffix));

    let rope_scaling = if let Some(t) = g.header().tensor("rope_freqs.weight") {
        if t.shape.len() != 1 || t.shape[0] != rope_dim / 2 {
            return Err(LlmError::Shape {
                path: path.into(),
                tensor: "rope_freqs.weight".into(),
                found: t.shape.clone(),
                expected: vec![rope_dim / 2],
                keys: "rope.dimension_count",
            });
        }
        RopeScaling::Divisors { factors: g.dequantize(t, None)? }
    } else {
        // Files of 2023 spell the linear factor on its own.
        let legacy = float("rope.scale_linear")?.filter(|&f| f != 0.0 && f != 1.0);
        let factor = float("rope.scaling.factor")?.filter(|&f| f != 0.0).or(legacy);
        let kind = match g.get_str(&key("rope.scaling.type"))? {
            Some(kind) => kind,
            None if factor.is_some() => "linear",
            None => "none",
        };
        let factor = factor.unwrap_or(1.0) as f32;
        let original_max = || optional("rope.scaling.original_context_length").map(|v| v.unwrap_or(max_position));
        match kind {
            "none" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor },
            "yarn" => RopeScaling::Yarn {
                factor,
                original_max: original_max()?,
                beta_fast: float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0) as f32,
                beta_slow: float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0) as f32,
                attention_factor: float("rope.scaling.attn_factor")?
                    .filter(|&f| f != 1.0)
                    .map(|f| f as f32 * (1.0 + 0.1 * factor.ln())),
                mscale: None,
                mscale_all_dim: None,
                truncate: true,
            },
            other => {
                return Err(unsupported(
                    &key("rope.scaling.type"),
                    format!("`{other}`"),
                    "none, linear, yarn, or a tensor rope_freqs.weight",
                    "Convert the model without this scaling.",
                ));
            }
        }
    };

    let id = |key: &str| -> Result<Option<u32>> {
        match g.get_u64(key)? {
            None => Ok(None),
            Some(v) if (v as usize) < vocab_size => Ok(Some(v as u32)),
            // 2^32 − 1 is how some converters write "none".
            Some(v) if v == u64::from(u32::MAX) => Ok(None),
            Some(v) => Err(bad(key, v.to_string(), format!("needs an id below the vocabulary size {vocab_size}"))),
        }
    };
    let mut eos_token_ids: Vec<u32> = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        if let Some(id) = id(key)?
            && !eos_token_ids.contains(&id)
        {
            eos_token_ids.push(id);
        }
    }
    let has = |name: &str| g.header().tensor(name).is_some();
    let config = ModelConfig {
        family,
        hidden_size,
        intermediate_size: number("feed_forward_length")?,
        num_layers: number("block_count")?,
        num_heads,
        num_kv_heads: optional("attention.head_count_kv")?.unwrap_or(num_heads),
        head_dim,
        vocab_size,
        rms_norm_eps: float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| missing(&key("attention.layer_norm_rms_epsilon")))?,
        rope_theta: float("rope.freq_base")?.unwrap_or(10_000.0),
        rope_scaling,
        rope_dim,
        max_position,
        tie_embeddings: !has("output.weight"),
        qkv_bias: has("blk.0.attn_q.bias"),
        o_bias: has("blk.0.attn_output.bias"),
        mlp_bias: has("blk.0.ffn_down.bias"),
        qk_norm: family == Family::Qwen3,
        // llama.cpp applies no window to these architectures, whatever the metadata says.
        sliding_window: None,
        sliding_layers: Vec::new(),
        bos_token_id: id("tokenizer.ggml.bos_token_id")?,
        eos_token_ids,
    };
    config.validate().map_err(|(key, value, need)| bad(key, value, need))?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gguf_file_is_called_by_its_file_name_unless_that_says_nothing() {
        let title = |path: &str, name| gguf_title(Path::new(path), name).unwrap();
        let odd = Some("Smollm2 135M 8k Lc100K Mix1 Ep2");
        assert_eq!(title("x/SmolLM2-135M-Instruct.Q4_1.gguf", odd), "SmolLM2-135M-Instruct.Q4_1");
        assert_eq!(title("x/ggml-model-q4_0.gguf", Some(" Tiny\n Llama ")), "Tiny Llama");
        assert_eq!(title("x/model.gguf", None), "model");
        assert_eq!(title("x/model.gguf", Some("  ")), "model");
    }
}
