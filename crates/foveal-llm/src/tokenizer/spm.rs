//! Score-based vocabularies (SentencePiece's byte-pair kind, as Llama 2 and Mistral use): of all adjacent pieces whose union is a token,
//! the union with the highest score is made first, the leftmost on a tie; what no token covers falls back to bytes.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::bpe::TokenKind;

/// What stands for a space inside a piece.
const SPACE: &str = "\u{2581}";

/// A score-based vocabulary.
pub struct Spm {
    pieces: Vec<Box<[u8]>>,
    kinds: Vec<TokenKind>,
    scores: Vec<f32>,
    ids: HashMap<Box<[u8]>, u32>,
    /// Ids of the 256 byte tokens, where the vocabulary has them.
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
    /// Tokens matched whole in text, longest first.
    whole: Vec<(String, u32)>,
    add_space_prefix: bool,
}

/// One piece of the text during merging: a node of a doubly linked list.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    prev: usize,
    next: usize,
}

/// No neighbour.
const NONE: usize = usize::MAX;

/// A candidate union of two neighbours.
struct Bigram {
    left: usize,
    right: usize,
    score: f32,
    /// Length of the union; a stale candidate no longer matches it.
    len: usize,
}

impl PartialEq for Bigram {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Bigram {}
impl PartialOrd for Bigram {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Bigram {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl Spm {
    /// A vocabulary from its pieces with scores and kinds, one of each per id.
    pub(crate) fn new(
        tokens: &[&[u8]],
        scores: &[f32],
        kinds: &[TokenKind],
        add_space_prefix: bool,
        unknown: Option<u32>,
    ) -> Result<Self, String> {
        if scores.len() != tokens.len() {
            return Err(format!("{} tokens but {} scores", tokens.len(), scores.len()));
        }
        if let Some(i) = scores.iter().position(|s| s.is_nan()) {
            return Err(format!("the score of token {i} is NaN"));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        let mut bytes = vec![None; 256];
        let mut whole = Vec::new();
        for (id, token) in tokens.iter().enumerate() {
            if token.is_empty() {
                continue;
            }
            ids.insert(Box::from(*token), id as u32);
            match kinds[id] {
                TokenKind::Byte => {
                    if let Some(byte) = byte_of(token) {
                        bytes[byte as usize] = Some(id as u32);
                    }
                }
                TokenKind::Control | TokenKind::UserDefined | TokenKind::Unknown => {
                    if let Ok(text) = std::str::from_utf8(token) {
                        whole.push((text.to_owned(), id as u32));
                    }
                }
                TokenKind::Normal | TokenKind::Unused => {}
            }
        }
        // Stable: equal lengths keep the order of ids.
        whole.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        Ok(Spm {
            pieces: tokens.iter().map(|t| Box::from(*t)).collect(),
            kinds: kinds.to_vec(),
            scores: scores.to_vec(),
            ids,
            bytes,
            unknown,
            whole,
            add_space_prefix,
        })
    }

    /// The id of a stored piece.
    pub fn token_to_id(&self, token: &[u8]) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The stored piece of an id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.pieces.get(id as usize).map(|p| String::from_utf8_lossy(p).into_owned())
    }

    /// Token ids of `text` without beginning or end tokens.
    ///
    /// # Errors
    /// A byte for which there is neither a piece nor a byte token nor an unknown token.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, String> {
        enum Fragment<'a> {
            Text(&'a str),
            Token(u32),
        }
        let mut fragments = vec![Fragment::Text(text)];
        for (whole, id) in &self.whole {
            if !parse_special && self.kinds[*id as usize] != TokenKind::UserDefined {
                continue;
            }
            if !text.contains(whole.as_str()) {
                continue;
            }
            let mut next = Vec::with_capacity(fragments.len() + 2);
            for fragment in fragments {
                match fragment {
                    Fragment::Token(id) => next.push(Fragment::Token(id)),
                    Fragment::Text(mut rest) => {
                        while let Some(at) = rest.find(whole.as_str()) {
                            if at > 0 {
                                next.push(Fragment::Text(&rest[..at]));
                            }
                            next.push(Fragment::Token(*id));
                            rest = &rest[at + whole.len()..];
                        }
                        if !rest.is_empty() {
                            next.push(Fragment::Text(rest));
                        }
                    }
                }
            }
            fragments = next;
        }
        let mut out = Vec::new();
        let mut after_token = true;
        for fragment in fragments {
            match fragment {
                Fragment::Token(id) => {
                    out.push(id);
                    after_token = true;
                }
                Fragment::Text("") => {}
                Fragment::Text(text) => {
                    let mut escaped = String::with_capacity(text.len() * 2);
                    if self.add_space_prefix && after_token {
                        escaped.push_str(SPACE);
                    }
                    for c in text.chars() {
                        if c == ' ' {
                            escaped.push_str(SPACE);
                        } else {
                            escaped.push(c);
                        }
                    }
                    self.merge(&escaped, &mut out)?;
                    after_token = false;
                }
            }
        }
        Ok(out)
    }

    fn candidate(&self, text: &[u8], symbols: &[Symbol], left: usize, right: usize) -> Option<Bigram> {
        if left == NONE || right == NONE {
            return None;
        }
        let (start, len) = (symbols[left].start, symbols[left].len + symbols[right].len);
        let id = *self.ids.get(&text[start..start + len])?;
        Some(Bigram { left, right, score: self.scores[id as usize], len })
    }

    fn merge(&self, text: &str, out: &mut Vec<u32>) -> Result<(), String> {
        let bytes = text.as_bytes();
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol { start, len: c.len_utf8(), prev: i.wrapping_sub(1), next: i + 1 })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        let mut heap: BinaryHeap<Bigram> =
            (1..symbols.len()).filter_map(|i| self.candidate(bytes, &symbols, i - 1, i)).collect();
        while let Some(Bigram { left, right, len, .. }) = heap.pop() {
            let (l, r) = (symbols[left], symbols[right]);
            if l.len == 0 || r.len == 0 || l.len + r.len != len {
                continue;
            }
            symbols[left].len = len;
            symbols[left].next = r.next;
            symbols[right].len = 0;
            if r.next != NONE {
                symbols[r.next].prev = left;
            }
            heap.extend(self.candidate(bytes, &symbols, l.prev, left));
            heap.extend(self.candidate(bytes, &symbols, left, r.next));
        }
        for symbol in symbols.iter().filter(|s| s.len > 0) {
            let piece = &bytes[symbol.start..symbol.start + symbol.len];
            if let Some(&id) = self.ids.get(piece) {
                out.push(id);
                continue;
            }
            for &byte in piece {
                match self.bytes[byte as usize].or(self.unknown) {
                    Some(id) => out.push(id),
                    None => {
                        return Err(format!("the vocabulary has no token for byte {byte:#04x} and no unknown token"));
                    }
                }
            }
        }
        Ok(())
    }

    /// The text of `ids`, each below the vocabulary's size.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut out: Vec<u8> = Vec::new();
        let mut first = true;
        for &id in ids {
            let piece = &self.pieces[id as usize];
            match self.kinds[id as usize] {
                TokenKind::Control | TokenKind::Unknown => {
                    if !skip_special {
                        out.extend_from_slice(piece);
                    }
                    continue;
                }
                TokenKind::UserDefined => out.extend_from_slice(piece),
                TokenKind::Byte => match byte_of(piece) {
                    Some(byte) => out.push(byte),
                    None => out.extend_from_slice(piece),
                },
                TokenKind::Normal | TokenKind::Unused => {
                    let text = String::from_utf8_lossy(piece).replace(SPACE, " ");
                    let text =
                        if first && self.add_space_prefix { text.strip_prefix(' ').unwrap_or(&text) } else { &text };
                    out.extend_from_slice(text.as_bytes());
                }
            }
            first = false;
        }
        String::from_utf8_lossy(&out).into_owned()
    }
}

/// The byte that `<0x0A>` stands for.
fn byte_of(token: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(token).ok()?;
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok()
}
