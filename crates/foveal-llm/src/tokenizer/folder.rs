//! The tokenizer of a Hugging Face folder: `tokenizer.json`, with the chat template and special tokens from the files beside it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Map, Value};

use super::{Engine, Library, Specials, Tokenizer};
use crate::config::ModelConfig;
use crate::error::{LlmError, Result};
use crate::hf::{read_json, read_text};

impl Tokenizer {
    /// Reads the tokenizer beside the weights in `folder`.
    ///
    /// # Errors
    /// No `tokenizer.json`, or a file that the library refuses.
    pub fn from_folder(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            let problem = "there is no tokenizer.json in the folder".into();
            return Err(LlmError::NoTokenizer { path: folder.into(), problem });
        }
        let text = read_text(&path)?;
        let bad = |problem: String| LlmError::Tokenizer { path: path.clone(), problem };
        // The library checks most but not all of what a file may claim, and an untrusted file must not end the process.
        let parsing = catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(text.as_bytes())))
            .map_err(|_| bad("the tokenizers library cannot digest it".into()))?
            .map_err(|e| bad(e.to_string()))?;
        let vocab_size = parsing.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size == 0 {
            return Err(bad("the vocabulary is empty".into()));
        }
        let settings_path = folder.join("tokenizer_config.json");
        let settings = if settings_path.is_file() { read_json(&settings_path)? } else { Map::new() };
        let id = |key: &str| token_text(&settings, key).and_then(|t| parsing.token_to_id(&t));
        let bos = id("bos_token").or(config.bos_token_id);
        let eos = id("eos_token").or(config.eos_token_ids.first().copied());
        let mut ends = config.eos_token_ids.clone();
        ends.extend(eos);
        ends.extend(super::END_TOKENS.iter().filter_map(|t| parsing.token_to_id(t)));
        ends.sort_unstable();
        ends.dedup();
        let template_path = folder.join("chat_template.jinja");
        let chat_template = if template_path.is_file() {
            Some(read_text(&template_path)?)
        } else {
            match settings.get("chat_template") {
                Some(Value::String(template)) => Some(template.clone()),
                // Several templates by name: the one called `default`.
                Some(Value::Array(list)) => list
                    .iter()
                    .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
                    .and_then(|t| t.get("template"))
                    .and_then(Value::as_str)
                    .map(str::to_owned),
                _ => None,
            }
        };
        let library = Library { parsing, plain: OnceLock::new(), adds_specials: true };
        Ok(Tokenizer {
            path: path.clone(),
            engine: Engine::Library(Box::new(library)),
            vocab_size,
            specials: Specials { bos, eos, ends, add_bos: false, add_eos: false },
            chat_template,
        })
    }
}

/// A special token, given as a string or as an object with `content`.
fn token_text(settings: &Map<String, Value>, key: &str) -> Option<String> {
    match settings.get(key)? {
        Value::String(text) => Some(text.clone()),
        Value::Object(token) => token.get("content")?.as_str().map(str::to_owned),
        _ => None,
    }
}
