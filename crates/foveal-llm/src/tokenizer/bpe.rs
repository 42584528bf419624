//! GPT-2 style byte-pair vocabularies of GGUF files: which splitting rule each name stands for, and the pipeline built from it.

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::error::{LlmError, Result};
use crate::gguf::Gguf;

/// What a token is for, as GGUF numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// Ordinary text.
    Normal,
    /// Stands for text the vocabulary lacks.
    Unknown,
    /// A control token such as `<|im_start|>`.
    Control,
    /// A token that is always matched whole in text.
    UserDefined,
    /// A row of the embedding without a token.
    Unused,
    /// One byte, `<0x0A>`.
    Byte,
}

/// Reads `tokenizer.ggml.token_type`; every token is normal when it is absent.
pub(crate) fn token_kinds(g: &Gguf, vocab_size: usize) -> Result<Vec<TokenKind>> {
    let Some(types) = g.get_i64s("tokenizer.ggml.token_type")? else {
        return Ok(vec![TokenKind::Normal; vocab_size]);
    };
    if types.len() != vocab_size {
        return Err(LlmError::Tokenizer {
            path: g.path().into(),
            problem: format!("{vocab_size} tokens but {} token types", types.len()),
        });
    }
    Ok(types
        .into_iter()
        .map(|t| match t {
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => TokenKind::Normal,
        })
        .collect())
}

/// How text is cut before merging. Patterns apply one after the other, each to the pieces the one before left.
struct Rule {
    /// The names GGUF files use for it.
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// A piece that is itself a token is taken whole, whatever the merges say.
    ignore_merges: bool,
    /// Whether the beginning token is added when the file does not say.
    add_bos: bool,
    /// Compose characters first.
    nfc: bool,
}

/// Contractions, words, numbers, punctuation, spaces: the rule of GPT-2.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// GPT-4's rule: digits in threes, any case of contraction, line ends kept with what precedes them.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's: words split where lower case meets upper case.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const RULES: [Rule; 6] = [
    Rule {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Rule {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"],
        patterns: &[GPT2],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Rule {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        patterns: &[r"\p{N}", GPT2],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Rule {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"],
        patterns: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
        nfc: false,
    },
    Rule {
        names: &["qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"],
        patterns: &[QWEN2],
        ignore_merges: false,
        add_bos: false,
        nfc: true,
    },
    Rule { names: &["tekken"], patterns: &[TEKKEN], ignore_merges: true, add_bos: true, nfc: false },
];

/// Builds the pipeline of a `gpt2` vocabulary. Also says whether the beginning token is added by default.
pub(crate) fn from_gguf(g: &Gguf, tokens: &[&[u8]], kinds: &[TokenKind]) -> Result<(tokenizers::Tokenizer, bool)> {
    let bad = |problem: String| LlmError::Tokenizer { path: g.path().into(), problem };
    let rule = match g.get_str("tokenizer.ggml.pre")? {
        None => {
            tracing::warn!(file = %g.path().display(), "the file names no tokenizer.ggml.pre; using the default splitting");
            &RULES[0]
        }
        Some(name) => match RULES.iter().find(|r| r.names.contains(&name)) {
            Some(rule) => rule,
            None => {
                let names: Vec<&str> = RULES.iter().flat_map(|r| r.names.iter().copied()).collect();
                return Err(LlmError::Unsupported {
                    path: g.path().into(),
                    what: "tokenizer.ggml.pre".into(),
                    value: format!("`{name}`"),
                    supported: names.join(", "),
                    remedy: "Use the safetensors folder with its tokenizer.json.",
                });
            }
        },
    };
    let mut vocab = ahash_map(tokens.len());
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let text = std::str::from_utf8(token).map_err(|_| bad(format!("token {id} is not UTF-8")))?;
        if text.is_empty() {
            continue;
        }
        match kinds[id] {
            TokenKind::Control | TokenKind::Unknown => added.push(AddedToken::from(text, true).normalized(false)),
            TokenKind::UserDefined => added.push(AddedToken::from(text, false).normalized(false)),
            TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => {}
        }
        vocab.insert(text.to_owned(), id as u32);
    }
    let merges = g
        .get_strings("tokenizer.ggml.merges")?
        .ok_or_else(|| bad("a `gpt2` vocabulary needs tokenizer.ggml.merges".into()))?;
    let mut pairs = Vec::with_capacity(merges.len());
    for (i, merge) in merges.iter().enumerate() {
        let text = std::str::from_utf8(merge).map_err(|_| bad(format!("merge {i} is not UTF-8")))?;
        // The separator is the first space that is not the first character.
        let split = text.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let Some(at) = split.filter(|&at| at + 1 < text.len()) else {
            return Err(bad(format!("merge {i} is `{text}`, not two tokens")));
        };
        pairs.push((text[..at].to_owned(), text[at + 1..].to_owned()));
    }
    let model = BPE::builder()
        .vocab_and_merges(vocab, pairs)
        .ignore_merges(rule.ignore_merges)
        .build()
        .map_err(|e| bad(e.to_string()))?;
    let mut pipeline = tokenizers::Tokenizer::new(model);
    let mut steps = Vec::with_capacity(rule.patterns.len() + 1);
    for &pattern in rule.patterns {
        let split = Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false)
            .map_err(|e| bad(e.to_string()))?;
        steps.push(PreTokenizerWrapper::Split(split));
    }
    steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)));
    pipeline.with_pre_tokenizer(Some(Sequence::new(steps)));
    pipeline.with_decoder(Some(ByteLevel::default()));
    if rule.nfc {
        pipeline.with_normalizer(Some(NFC)).map_err(|e| bad(e.to_string()))?;
    }
    let (special, plain): (Vec<_>, Vec<_>) = added.into_iter().partition(|t| t.special);
    pipeline.add_special_tokens(special).map_err(|e| bad(e.to_string()))?;
    pipeline.add_tokens(plain).map_err(|e| bad(e.to_string()))?;
    Ok((pipeline, rule.add_bos))
}

/// The map type that the library wants, named through its own alias.
fn ahash_map(capacity: usize) -> tokenizers::models::bpe::Vocab {
    let mut map = tokenizers::models::bpe::Vocab::new();
    map.reserve(capacity);
    map
}
