//! Text to token ids and back, from `tokenizer.json` or from a GGUF file's own vocabulary.
//!
//! Byte-pair vocabularies (GPT-2 style) run on the `tokenizers` library with the splitting rule that the file names; score-based
//! ones (SentencePiece style, Llama 2 and Mistral) run on [`spm`]. The ids are those that llama.cpp gives for the same file.

mod bpe;
mod folder;
pub mod spm;
mod stream;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::chat::{self, Message};
use crate::error::{LlmError, Result};
use crate::gguf::Gguf;
use spm::Spm;
pub use stream::StreamDecoder;

/// A model's tokenizer.
pub struct Tokenizer {
    path: PathBuf,
    engine: Engine,
    vocab_size: usize,
    specials: Specials,
    chat_template: Option<String>,
}

/// What runs the vocabulary.
enum Engine {
    /// The `tokenizers` library.
    Library(Box<Library>),
    /// Score-based merging.
    Spm(Box<Spm>),
}

/// A `tokenizers` pipeline and, made on first use, the same one with special tokens read as plain text.
struct Library {
    parsing: tokenizers::Tokenizer,
    plain: OnceLock<tokenizers::Tokenizer>,
    /// Whether the pipeline itself adds beginning and end tokens (`tokenizer.json` does, GGUF leaves it to us).
    adds_specials: bool,
}

/// The ids with a meaning of their own.
#[derive(Debug, Clone, Default)]
struct Specials {
    bos: Option<u32>,
    eos: Option<u32>,
    /// Every id that ends a generation.
    ends: Vec<u32>,
    add_bos: bool,
    add_eos: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("path", &self.path).field("vocab_size", &self.vocab_size).finish()
    }
}

/// Tokens that end a turn or a text in the supported families, whatever the metadata forgets to say.
const END_TOKENS: [&str; 8] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<|EOT|>",
];

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file carries.
    ///
    /// # Errors
    /// No vocabulary in the file, an unsupported kind of it, or one that contradicts itself.
    pub fn from_gguf(g: &Gguf) -> Result<Self> {
        let no = |problem: String| LlmError::NoTokenizer { path: g.path().into(), problem };
        let tokens =
            g.get_strings("tokenizer.ggml.tokens")?.ok_or_else(|| no("there is no tokenizer.ggml.tokens".into()))?;
        if tokens.is_empty() {
            return Err(no("tokenizer.ggml.tokens is empty".into()));
        }
        let vocab_size = tokens.len();
        let id = |key: &str| -> Result<Option<u32>> {
            Ok(g.get_u64(key)?.filter(|&v| v < vocab_size as u64).map(|v| v as u32))
        };
        let model = g
            .get_str("tokenizer.ggml.model")?
            .ok_or_else(|| no("there is no tokenizer.ggml.model to say of which kind it is".into()))?;
        let kinds = bpe::token_kinds(g, vocab_size)?;
        let (engine, bos_default) = match model {
            "gpt2" => {
                let (pipeline, add_bos) = bpe::from_gguf(g, &tokens, &kinds)?;
                let library = Library { parsing: pipeline, plain: OnceLock::new(), adds_specials: false };
                (Engine::Library(Box::new(library)), add_bos)
            }
            "llama" => {
                let scores = g.get_f32s("tokenizer.ggml.scores")?.ok_or_else(|| LlmError::Tokenizer {
                    path: g.path().into(),
                    problem: "a `llama` vocabulary needs tokenizer.ggml.scores".into(),
                })?;
                let add_space_prefix = g.get_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
                let unknown = id("tokenizer.ggml.unknown_token_id")?;
                let spm = Spm::new(&tokens, &scores, &kinds, add_space_prefix, unknown)
                    .map_err(|problem| LlmError::Tokenizer { path: g.path().into(), problem })?;
                (Engine::Spm(Box::new(spm)), true)
            }
            other => {
                return Err(LlmError::Unsupported {
                    path: g.path().into(),
                    what: "tokenizer.ggml.model".into(),
                    value: format!("`{other}`"),
                    supported: "gpt2 (byte-pair), llama (scores)".into(),
                    remedy: "Take a model of a supported family.",
                });
            }
        };
        let eos = id("tokenizer.ggml.eos_token_id")?;
        let mut specials = Specials {
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos,
            ends: Vec::new(),
            add_bos: g.get_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(bos_default),
            add_eos: g.get_bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
        };
        specials.ends.extend(eos);
        specials.ends.extend(id("tokenizer.ggml.eot_token_id")?);
        for (i, token) in tokens.iter().enumerate() {
            if END_TOKENS.iter().any(|end| end.as_bytes() == *token) {
                specials.ends.push(i as u32);
            }
        }
        specials.ends.sort_unstable();
        specials.ends.dedup();
        let chat_template = g.get_str("tokenizer.chat_template")?.map(str::to_owned);
        Ok(Tokenizer { path: g.path().into(), engine, vocab_size, specials, chat_template })
    }

    /// Where it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Token ids of `text`. `add_special` puts the beginning (and end) token where the model expects one; `parse_special` reads
    /// control tokens such as `<|im_start|>` in the text as themselves and not as characters.
    ///
    /// # Errors
    /// The vocabulary cannot express the text.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        match &self.engine {
            Engine::Library(library) => {
                let pipeline = if parse_special {
                    &library.parsing
                } else {
                    library.plain.get_or_init(|| {
                        let mut plain = library.parsing.clone();
                        plain.set_encode_special_tokens(true);
                        plain
                    })
                };
                let encoding = pipeline
                    .encode_fast(text, add_special && library.adds_specials)
                    .map_err(|e| LlmError::Tokenizer { path: self.path.clone(), problem: e.to_string() })?;
                let ids = encoding.get_ids();
                if library.adds_specials { Ok(ids.to_vec()) } else { Ok(self.with_specials(ids, add_special)) }
            }
            Engine::Spm(spm) => {
                let ids = spm
                    .encode(text, parse_special)
                    .map_err(|problem| LlmError::Tokenizer { path: self.path.clone(), problem })?;
                Ok(self.with_specials(&ids, add_special))
            }
        }
    }

    fn with_specials(&self, ids: &[u32], add_special: bool) -> Vec<u32> {
        let s = &self.specials;
        let mut out = Vec::with_capacity(ids.len() + 2);
        if add_special && s.add_bos {
            out.extend(s.bos);
        }
        out.extend_from_slice(ids);
        if add_special && s.add_eos {
            out.extend(s.eos);
        }
        out
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves control tokens out.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(LlmError::TokenId { id, vocab: self.vocab_size });
        }
        match &self.engine {
            Engine::Library(library) => library
                .parsing
                .decode(ids, skip_special)
                .map_err(|e| LlmError::Tokenizer { path: self.path.clone(), problem: e.to_string() }),
            Engine::Spm(spm) => Ok(spm.decode(ids, skip_special)),
        }
    }

    /// A decoder for generation that never emits half a character. `context` is what precedes the generation (the prompt's ids):
    /// some vocabularies drop the first space of a text, and the context says that this is not the first.
    pub fn stream(&self, context: &[u32]) -> StreamDecoder<'_> {
        StreamDecoder::new(self, context)
    }

    /// The id of a token given as it is stored (`Ġthe`, `<|im_end|>`).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.engine {
            Engine::Library(library) => library.parsing.token_to_id(token),
            Engine::Spm(spm) => spm.token_to_id(token.as_bytes()),
        }
    }

    /// The token of an id as it is stored.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.engine {
            Engine::Library(library) => library.parsing.id_to_token(id),
            Engine::Spm(spm) => spm.id_to_token(id),
        }
    }

    /// Beginning-of-sequence id.
    pub fn bos_id(&self) -> Option<u32> {
        self.specials.bos
    }

    /// Whether [`Tokenizer::encode`] with `add_special` starts with the beginning token (GGUF only; a `tokenizer.json` decides itself).
    pub fn adds_bos(&self) -> bool {
        self.specials.add_bos
    }

    /// Every id that ends a generation, ascending.
    pub fn eos_ids(&self) -> &[u32] {
        &self.specials.ends
    }

    /// Whether `id` ends a generation.
    pub fn is_end(&self, id: u32) -> bool {
        self.specials.ends.contains(&id)
    }

    /// The model's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Renders a conversation with the model's template, or with ChatML and a warning when it has none. Encode the result with
    /// `add_special` off and `parse_special` on: the template writes the control tokens itself.
    ///
    /// # Errors
    /// A template that does not compile or that refuses the messages.
    pub fn apply_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.chat_template.as_deref().unwrap_or_else(|| {
            tracing::warn!(model = %self.path.display(), "no chat template in the model; using ChatML");
            chat::CHATML
        });
        let text = |id: Option<u32>| id.and_then(|id| self.id_to_token(id)).unwrap_or_default();
        chat::render(template, messages, add_generation_prompt, &text(self.specials.bos), &text(self.specials.eos))
    }
}
