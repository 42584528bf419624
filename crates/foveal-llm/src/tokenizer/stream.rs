//! Decoding while tokens arrive.

use super::Tokenizer;
use crate::error::Result;

/// Tokens of context that a decoder looks back on.
const CONTEXT: usize = 6;
/// A character has at most four bytes, so after this many tokens without a whole one the bytes are no UTF-8 and are let go as U+FFFD.
const MAX_PENDING: usize = 4;

/// Turns a growing list of ids into text piece by piece, whole characters only. Control tokens give no text.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// A window of ids: context, then those whose text is still out.
    ids: Vec<u32>,
    /// How many of `ids` have had their text emitted.
    done: usize,
}

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, context: &[u32]) -> Self {
        let ids = context[context.len().saturating_sub(CONTEXT)..].to_vec();
        let done = ids.len();
        StreamDecoder { tokenizer, ids, done }
    }

    /// Takes the next id and returns the text that became complete, possibly empty.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let pending = self.ids.len() - self.done;
        let text = self.pending_text()?;
        if text.ends_with('\u{fffd}') && pending <= MAX_PENDING {
            return Ok(String::new());
        }
        self.settle();
        Ok(text)
    }

    /// What is left at the end of a generation: bytes of an unfinished character become U+FFFD.
    ///
    /// # Errors
    /// None beyond those of [`StreamDecoder::push`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.pending_text()?;
        self.settle();
        Ok(text)
    }

    /// Text of the window minus text of its settled part.
    fn pending_text(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.done], true)?;
        let mut after = self.tokenizer.decode(&self.ids, true)?;
        let common = before.bytes().zip(after.bytes()).take_while(|(a, b)| a == b).count();
        let mut at = common.min(after.len());
        while !after.is_char_boundary(at) {
            at -= 1;
        }
        Ok(after.split_off(at))
    }

    fn settle(&mut self) {
        let drop = self.ids.len().saturating_sub(CONTEXT);
        self.ids.drain(..drop);
        self.done = self.ids.len();
    }
}
