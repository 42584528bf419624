//! Hugging Face folders: `config.json` beside one or more safetensors files.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata};
use serde_json::{Map, Value};

use crate::checkpoint::HostTensor;
use crate::config::{Family, ModelConfig, RopeScaling};
use crate::error::{LlmError, Result};
use crate::gguf::first_non_finite;
use crate::weight_file::WeightFile;

/// Text files (configurations, indexes, tokenizers) larger than this are refused unread.
pub(crate) const MAX_TEXT_BYTES: u64 = 256 << 20;

/// One safetensors file: its directory in memory, its tensors on disk.
struct Shard {
    path: PathBuf,
    file: WeightFile,
    metadata: Metadata,
    /// Where tensor data starts.
    data: usize,
}

/// A folder's tensors.
pub struct HfFolder {
    folder: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name → shard.
    index: HashMap<String, usize>,
}

impl std::fmt::Debug for HfFolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HfFolder").field("folder", &self.folder).field("tensors", &self.index.len()).finish()
    }
}

/// Checks a safetensors header: every range within the file, no gaps, no overlaps, sizes that match shapes and types.
/// Returns the directory and where the data starts.
///
/// # Errors
/// A header that contradicts itself or the file's length.
pub fn parse_safetensors(data: &[u8], path: &Path) -> Result<(usize, Metadata)> {
    parse_head(data, data.len() as u64, path)
}

/// Bytes before the header's JSON: its length.
const PREFIX: u64 = 8;
/// Headers longer than this are refused, as by the format's own library.
const MAX_HEADER: u64 = 100_000_000;

/// [`parse_safetensors`] on `data`, the beginning of a file of `len` bytes; the whole header must be in it, if the file has it.
fn parse_head(data: &[u8], len: u64, path: &Path) -> Result<(usize, Metadata)> {
    let damaged = |offset: u64, problem: String| LlmError::Damaged {
        path: path.to_path_buf(),
        format: "safetensors",
        problem,
        offset,
    };
    let header = header_bytes(data, len).map_err(|problem| damaged(0, problem))?;
    let start = PREFIX + header;
    let Some(json) = data.get(PREFIX as usize..start as usize) else {
        return Err(damaged(PREFIX, format!("the header of {header} bytes was cut off")));
    };
    // Deserialising checks order, gaps, overlaps and sizes.
    let metadata: Metadata =
        serde_json::from_slice(json).map_err(|e| damaged(PREFIX, format!("the header does not hold: {e}")))?;
    let (need, have) = (metadata.data_len() as u64, len - start);
    if need != have {
        let problem =
            format!("the tensors need {need} bytes but {have} follow the header: the file was cut or extended");
        return Err(damaged(start, problem));
    }
    Ok((start as usize, metadata))
}

/// Bytes of the header's JSON, from the beginning `data` of a file of `len` bytes.
fn header_bytes(data: &[u8], len: u64) -> std::result::Result<u64, String> {
    let Some(prefix) = data.first_chunk::<8>() else {
        return Err(format!("the file has {len} bytes, too few for a header"));
    };
    let header = u64::from_le_bytes(*prefix);
    if header > len - PREFIX {
        return Err(format!("the header claims {header} bytes but the file has {len}"));
    }
    if header > MAX_HEADER {
        return Err(format!("the header claims {header} bytes; at most {MAX_HEADER} are allowed"));
    }
    Ok(header)
}

/// Reads a text file of bounded size.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let meta = std::fs::metadata(path).map_err(|e| LlmError::io(path, "open the file", e))?;
    if meta.len() > MAX_TEXT_BYTES {
        return Err(LlmError::NotACheckpoint {
            path: path.into(),
            why: format!("{} bytes is too large for a configuration file", meta.len()),
        });
    }
    let bytes = std::fs::read(path).map_err(|e| LlmError::io(path, "read the file", e))?;
    String::from_utf8(bytes)
        .map_err(|e| LlmError::NotACheckpoint { path: path.into(), why: format!("it is not UTF-8 text ({e})") })
}

/// Reads a JSON object from a file.
pub(crate) fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let text = read_text(path)?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(LlmError::NotACheckpoint { path: path.into(), why: "it is JSON but no object".into() }),
        Err(e) => Err(LlmError::NotACheckpoint { path: path.into(), why: format!("it is no JSON: {e}") }),
    }
}

impl HfFolder {
    /// Opens `folder`; `file` restricts it to one safetensors file in it.
    ///
    /// # Errors
    /// A missing, damaged or unsupported file.
    pub fn open(folder: &Path, file: Option<&Path>) -> Result<(Self, ModelConfig)> {
        let config_path = folder.join("config.json");
        if !config_path.is_file() {
            return Err(LlmError::NotACheckpoint { path: folder.into(), why: "there is no config.json in it".into() });
        }
        let json = read_json(&config_path)?;
        let shards = match file {
            Some(file) => vec![Shard::open(file)?],
            None => Self::find_shards(folder)?,
        };
        let mut index = HashMap::new();
        for (number, shard) in shards.iter().enumerate() {
            for name in shard.metadata.tensors().into_keys() {
                if let Some(other) = index.insert(name.clone(), number) {
                    return Err(LlmError::Damaged {
                        path: shard.path.clone(),
                        format: "safetensors",
                        problem: format!("tensor `{name}` is also in {}", shards[other].path.display()),
                        offset: 8,
                    });
                }
            }
        }
        let hf = HfFolder { folder: folder.to_path_buf(), shards, index };
        let mut config = hf_config(&config_path, &json, hf.index.contains_key("lm_head.weight"))?;
        hf.generation_ids(&mut config)?;
        Ok((hf, config))
    }

    fn find_shards(folder: &Path) -> Result<Vec<Shard>> {
        let single = folder.join("model.safetensors");
        if single.is_file() {
            return Ok(vec![Shard::open(&single)?]);
        }
        let index_path = folder.join("model.safetensors.index.json");
        if !index_path.is_file() {
            let why = "there is neither model.safetensors nor model.safetensors.index.json in it".into();
            return Err(LlmError::NotACheckpoint { path: folder.into(), why });
        }
        let json = read_json(&index_path)?;
        let Some(weights) = json.get("weight_map").and_then(Value::as_object) else {
            return Err(LlmError::MissingKey {
                path: index_path,
                key: "weight_map".into(),
                remedy: "download the index again".into(),
            });
        };
        let mut names: Vec<&str> = Vec::new();
        for (tensor, file) in weights {
            let key = || format!("weight_map.{tensor}");
            let Some(file) = file.as_str() else {
                return Err(LlmError::BadValue {
                    path: index_path,
                    key: key(),
                    value: file.to_string(),
                    need: "needs a file name".into(),
                });
            };
            // A shard is a plain file of this folder: an index must not reach anything else on the machine.
            let mut parts = Path::new(file).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            if !plain || file.contains('\\') {
                return Err(LlmError::BadValue {
                    path: index_path,
                    key: key(),
                    value: format!("`{file}`"),
                    need: "needs the plain name of a file in the same folder".into(),
                });
            }
            names.push(file);
        }
        names.sort_unstable();
        names.dedup();
        let mut shards = Vec::with_capacity(names.len());
        for name in names {
            let path = folder.join(name);
            if !path.is_file() {
                return Err(LlmError::NotACheckpoint {
                    path: folder.into(),
                    why: format!("the index names shard `{name}`, which is not there"),
                });
            }
            shards.push(Shard::open(&path)?);
        }
        // The index may promise tensors that the shards lack; the shape check against the configuration finds those that matter.
        Ok(shards)
    }

    /// `generation_config.json` lists the ids that end a generation more fully than `config.json`.
    fn generation_ids(&self, config: &mut ModelConfig) -> Result<()> {
        let path = self.folder.join("generation_config.json");
        if !path.is_file() {
            return Ok(());
        }
        let json = read_json(&path)?;
        for id in token_ids(&path, &json, "eos_token_id", config.vocab_size)? {
            if !config.eos_token_ids.contains(&id) {
                config.eos_token_ids.push(id);
            }
        }
        if config.bos_token_id.is_none() {
            config.bos_token_id = token_ids(&path, &json, "bos_token_id", config.vocab_size)?.first().copied();
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Option<(&Shard, &safetensors::tensor::TensorInfo)> {
        let shard = &self.shards[*self.index.get(name)?];
        Some((shard, shard.metadata.info(name)?))
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.find(name).map(|(_, info)| info.shape.clone())
    }

    /// Storage type of a tensor.
    pub fn dtype(&self, name: &str) -> Option<String> {
        self.find(name).map(|(_, info)| format!("{:?}", info.dtype))
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.index.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    /// Bytes of all shards.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.file.len()).sum()
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Loads a tensor as `f32`; `None` when there is none of this name.
    ///
    /// # Errors
    /// A storage type other than F32, F16 and BF16, a weight that is NaN or infinite, or a file that was shortened since it was opened.
    pub fn tensor(&self, name: &str) -> Result<Option<HostTensor>> {
        let Some((shard, info)) = self.find(name) else { return Ok(None) };
        let (begin, end) = info.data_offsets;
        let bytes = shard.file.read(name, shard.data + begin..shard.data + end)?;
        let total: usize = info.shape.iter().product();
        let mut data = vec![0f32; total];
        const TASK: usize = 16_384;
        let width = match info.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            other => {
                return Err(LlmError::Unsupported {
                    path: shard.path.clone(),
                    what: format!("the type of tensor `{name}`"),
                    value: format!("{other:?}"),
                    supported: "F32, F16, BF16".into(),
                    remedy: "Save the model in one of these.",
                });
            }
        };
        let first_bad = data
            .par_chunks_mut(TASK)
            .zip(bytes.par_chunks(TASK * width))
            .enumerate()
            .filter_map(|(task, (out, bytes))| {
                match info.dtype {
                    Dtype::F32 => {
                        for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                            *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                        }
                    }
                    Dtype::F16 => {
                        for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                            *o = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
                        }
                    }
                    _ => {
                        for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                            *o = half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
                        }
                    }
                }
                first_non_finite(out).map(|i| (task * TASK + i, out[i]))
            })
            .min_by_key(|(index, _)| *index);
        if let Some((index, value)) = first_bad {
            return Err(LlmError::NonFinite { path: shard.path.clone(), tensor: name.into(), index, value });
        }
        Ok(Some(HostTensor { shape: info.shape.clone(), data }))
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let file = WeightFile::open(path, "safetensors")?;
        let header = header_bytes(&file.head(PREFIX)?, file.len()).unwrap_or(0);
        let (data, metadata) = parse_head(&file.head(PREFIX + header)?, file.len(), path)?;
        Ok(Shard { path: path.to_path_buf(), file, metadata, data })
    }
}

/// A JSON object with the path it came from, for messages.
struct Json<'a> {
    path: &'a Path,
    object: &'a Map<String, Value>,
}

impl Json<'_> {
    fn bad(&self, key: &str, value: &Value, need: impl Into<String>) -> LlmError {
        LlmError::BadValue { path: self.path.into(), key: key.into(), value: value.to_string(), need: need.into() }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|v| !v.is_null())
    }

    fn usize(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && *f >= 0.0).map(|f| f as u64)) {
            Some(v) if v <= u64::from(u32::MAX) => Ok(Some(v as usize)),
            _ => Err(self.bad(key, value, format!("needs a whole number from 0 to {}", u32::MAX))),
        }
    }

    fn need(&self, key: &str) -> Result<usize> {
        self.usize(key)?.ok_or_else(|| LlmError::MissingKey {
            path: self.path.into(),
            key: key.into(),
            remedy: "take config.json from the same release as the weights".into(),
        })
    }

    fn f64(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.bad(key, value, "needs a number"))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.bad(key, value, "needs true or false"))
    }

    fn str(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.bad(key, value, "needs a string"))
    }
}

/// One id or a list of ids; ids outside the vocabulary are refused.
fn token_ids(path: &Path, object: &Map<String, Value>, key: &str, vocab: usize) -> Result<Vec<u32>> {
    let json = Json { path, object };
    let Some(value) = json.get(key) else { return Ok(Vec::new()) };
    let list = match value {
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    };
    list.iter()
        .map(|v| match v.as_u64() {
            Some(id) if id < vocab as u64 => Ok(id as u32),
            _ => Err(json.bad(key, value, format!("needs ids below the vocabulary size {vocab}"))),
        })
        .collect()
}

/// Reads `config.json`. `has_head` says whether the weights hold an output projection.
fn hf_config(path: &Path, object: &Map<String, Value>, has_head: bool) -> Result<ModelConfig> {
    let json = Json { path, object };
    let architecture = match json.get("architectures") {
        Some(Value::Array(list)) => list.first().and_then(Value::as_str),
        _ => None,
    };
    let (family, mistral) = match (architecture, json.str("model_type")?) {
        (Some("LlamaForCausalLM"), _) => (Family::Llama, false),
        (Some("MistralForCausalLM"), _) => (Family::Llama, true),
        (Some("Qwen2ForCausalLM"), _) => (Family::Qwen2, false),
        (Some("Qwen3ForCausalLM"), _) => (Family::Qwen3, false),
        (None, Some("llama")) => (Family::Llama, false),
        (None, Some("mistral")) => (Family::Llama, true),
        (None, Some("qwen2")) => (Family::Qwen2, false),
        (None, Some("qwen3")) => (Family::Qwen3, false),
        (found, model_type) => {
            return Err(LlmError::Unsupported {
                path: path.into(),
                what: "the architecture".into(),
                value: format!("`{}`", found.or(model_type).unwrap_or("not given")),
                supported: "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM".into(),
                remedy: "Take a model of one of these families.",
            });
        }
    };
    if let Some(act) = json.str("hidden_act")?
        && act != "silu"
        && act != "swish"
    {
        return Err(LlmError::Unsupported {
            path: path.into(),
            what: "hidden_act".into(),
            value: format!("`{act}`"),
            supported: "silu".into(),
            remedy: "The supported families use it.",
        });
    }
    if json.get("quantization_config").is_some() {
        return Err(LlmError::Unsupported {
            path: path.into(),
            what: "quantization_config".into(),
            value: "a quantised safetensors model".into(),
            supported: "F32, F16 and BF16 safetensors".into(),
            remedy: "Take the unquantised weights, or a GGUF file.",
        });
    }
    let hidden_size = json.need("hidden_size")?;
    let num_layers = json.need("num_hidden_layers")?;
    let num_heads = json.need("num_attention_heads")?;
    let vocab_size = json.need("vocab_size")?;
    let max_position = json.need("max_position_embeddings")?;
    let head_dim = match json.usize("head_dim")? {
        Some(d) => d,
        // Qwen3 fixes 128 unless told otherwise; the others split the residual stream.
        None if family == Family::Qwen3 => 128,
        None if num_heads > 0 && hidden_size % num_heads == 0 => hidden_size / num_heads,
        None => {
            return Err(LlmError::BadValue {
                path: path.into(),
                key: "hidden_size".into(),
                value: hidden_size.to_string(),
                need: format!("needs a multiple of num_attention_heads = {num_heads}, or a key head_dim"),
            });
        }
    };
    let (rope_theta, rope_scaling, partial) = rope(&json, max_position)?;
    let partial = match partial {
        Some(p) => Some(p),
        None => json.f64("partial_rotary_factor")?,
    };
    let rope_dim = match partial {
        None => head_dim,
        Some(part) if part > 0.0 && part <= 1.0 => (head_dim as f64 * part) as usize,
        Some(part) => {
            return Err(LlmError::BadValue {
                path: path.into(),
                key: "partial_rotary_factor".into(),
                value: part.to_string(),
                need: "needs a number above 0 and at most 1".into(),
            });
        }
    };
    let attention_bias = json.bool("attention_bias")?.unwrap_or(false);
    let (qkv_bias, o_bias, mlp_bias) = match family {
        Family::Llama if mistral => (false, false, false),
        Family::Llama => (attention_bias, attention_bias, json.bool("mlp_bias")?.unwrap_or(false)),
        Family::Qwen2 => (true, false, false),
        Family::Qwen3 => (attention_bias, attention_bias, false),
    };
    let windowed = match family {
        Family::Llama => mistral,
        Family::Qwen2 | Family::Qwen3 => json.bool("use_sliding_window")?.unwrap_or(false),
    };
    let sliding_window = if windowed { json.usize("sliding_window")? } else { None };
    let sliding_layers = match (sliding_window, json.get("layer_types")) {
        (None, _) => Vec::new(),
        (Some(_), Some(Value::Array(list))) => {
            if list.len() != num_layers {
                return Err(LlmError::BadValue {
                    path: path.into(),
                    key: "layer_types".into(),
                    value: format!("{} entries", list.len()),
                    need: format!("needs num_hidden_layers = {num_layers} entries"),
                });
            }
            list.iter()
                .map(|v| match v.as_str() {
                    Some("sliding_attention") => Ok(true),
                    Some("full_attention") => Ok(false),
                    _ => Err(json.bad("layer_types", v, "needs `full_attention` or `sliding_attention`")),
                })
                .collect::<Result<_>>()?
        }
        (Some(_), Some(other)) => return Err(json.bad("layer_types", other, "needs a list")),
        (Some(_), None) if mistral => Vec::new(),
        (Some(_), None) => {
            // Older Qwen files: layers below max_window_layers attend to everything.
            let full = json.usize("max_window_layers")?.unwrap_or(28);
            if num_layers > 1 << 16 {
                return Err(json.bad("num_hidden_layers", &Value::from(num_layers), "needs at most 65536"));
            }
            (0..num_layers).map(|layer| layer >= full).collect()
        }
    };
    let config = ModelConfig {
        family,
        hidden_size,
        intermediate_size: json.need("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads: json.usize("num_key_value_heads")?.unwrap_or(num_heads),
        head_dim,
        vocab_size,
        rms_norm_eps: json.f64("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        rope_dim,
        max_position,
        tie_embeddings: json.bool("tie_word_embeddings")?.unwrap_or(!has_head),
        qkv_bias,
        o_bias,
        mlp_bias,
        qk_norm: family == Family::Qwen3,
        sliding_window,
        sliding_layers,
        bos_token_id: token_ids(path, object, "bos_token_id", vocab_size)?.first().copied(),
        eos_token_ids: token_ids(path, object, "eos_token_id", vocab_size)?,
    };
    config.validate().map_err(|(key, value, need)| LlmError::BadValue {
        path: path.into(),
        key: key.into(),
        value,
        need,
    })?;
    Ok(config)
}

/// Rotary base, scaling and partial factor, in the spelling with `rope_theta` and `rope_scaling` or the newer `rope_parameters`.
fn rope(json: &Json<'_>, max_position: usize) -> Result<(f64, RopeScaling, Option<f64>)> {
    let section = match (json.get("rope_parameters"), json.get("rope_scaling")) {
        (Some(Value::Object(object)), _) => Some(("rope_parameters", object)),
        (None, Some(Value::Object(object))) => Some(("rope_scaling", object)),
        (Some(other), _) => return Err(json.bad("rope_parameters", other, "needs an object")),
        (None, Some(other)) => return Err(json.bad("rope_scaling", other, "needs an object or null")),
        (None, None) => None,
    };
    let top_theta = json.f64("rope_theta")?;
    let Some((section, object)) = section else {
        return Ok((top_theta.unwrap_or(10_000.0), RopeScaling::Default, None));
    };
    let scaling = Json { path: json.path, object };
    let theta = scaling.f64("rope_theta")?.or(top_theta).unwrap_or(10_000.0);
    let partial = scaling.f64("partial_rotary_factor")?;
    let kind = match scaling.str("rope_type")? {
        Some(kind) => kind,
        None => scaling.str("type")?.unwrap_or("default"),
    };
    let needed = |key: &str| -> Result<f32> {
        scaling.f64(key)?.map(|v| v as f32).ok_or_else(|| LlmError::MissingKey {
            path: json.path.into(),
            key: format!("{section}.{key}"),
            remedy: format!("{kind} scaling needs it"),
        })
    };
    let optional = |key: &str| -> Result<Option<f32>> { Ok(scaling.f64(key)?.map(|v| v as f32)) };
    let original = || -> Result<usize> {
        match scaling.usize("original_max_position_embeddings")? {
            Some(v) => Ok(v),
            None => Ok(json.usize("original_max_position_embeddings")?.unwrap_or(max_position)),
        }
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: needed("factor")? },
        // The reference implementation grows the base from max_position_embeddings, whatever else the file says.
        "dynamic" => RopeScaling::Dynamic { factor: needed("factor")?, original_max: max_position },
        "yarn" => RopeScaling::Yarn {
            // A file may leave the factor to follow from the two lengths.
            factor: match optional("factor")? {
                Some(factor) => factor,
                None => (max_position as f64 / original()?.max(1) as f64) as f32,
            },
            original_max: original()?,
            beta_fast: optional("beta_fast")?.filter(|&b| b != 0.0).unwrap_or(32.0),
            beta_slow: optional("beta_slow")?.filter(|&b| b != 0.0).unwrap_or(1.0),
            attention_factor: optional("attention_factor")?,
            mscale: optional("mscale")?,
            mscale_all_dim: optional("mscale_all_dim")?,
            truncate: scaling.bool("truncate")?.unwrap_or(true),
        },
        "llama3" => RopeScaling::Llama3 {
            factor: needed("factor")?,
            low_freq_factor: needed("low_freq_factor")?,
            high_freq_factor: needed("high_freq_factor")?,
            original_max: original()?,
        },
        other => {
            return Err(LlmError::Unsupported {
                path: json.path.into(),
                what: format!("{section}.rope_type"),
                value: format!("`{other}`"),
                supported: "default, linear, dynamic, yarn, llama3".into(),
                remedy: "Remove the scaling to run the model at its trained length.",
            });
        }
    };
    Ok((theta, scaling, partial))
}
