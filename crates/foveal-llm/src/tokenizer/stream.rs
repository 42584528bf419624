//! Decoding while tokens arrive.

use super::Tokenizer;
use crate::error::Result;

/// Tokens of context that are kept when the window is cut.
const CONTEXT: usize = 6;
/// The window is cut once it is this long, so that the cost of a token does not grow with the text.
const MAX_WINDOW: usize = 32;
/// A character has at most four bytes, so after this many tokens without a whole one the bytes are no UTF-8 and are let go as U+FFFD.
const MAX_PENDING: usize = 4;
/// What a decoder writes for bytes that are no (or not yet a) character.
const BROKEN: char = '\u{fffd}';

/// Turns a growing list of ids into text piece by piece, whole characters only. Control tokens give no text.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The latest ids: context first, then those still to be settled.
    ids: Vec<u32>,
    /// How many bytes of the window's text have been emitted (or belong to the context).
    sent: usize,
    /// Tokens taken since the window's text last ended in a whole character or grew by one.
    pending: usize,
}

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, context: &[u32]) -> Self {
        let ids = context[context.len().saturating_sub(CONTEXT)..].to_vec();
        // An id of the context that the vocabulary lacks cannot give text; the window then starts empty.
        match tokenizer.decode(&ids, true) {
            Ok(text) => StreamDecoder { tokenizer, ids, sent: text.len(), pending: 0 },
            Err(_) => StreamDecoder { tokenizer, ids: Vec::new(), sent: 0, pending: 0 },
        }
    }

    /// Takes the next id and returns the text that became complete, possibly empty.
    ///
    /// # Errors
    /// An id outside the vocabulary; the decoder goes on as if it had not come.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = match self.tokenizer.decode(&self.ids, true) {
            Ok(text) => text,
            Err(e) => {
                self.ids.pop();
                return Err(e);
            }
        };
        // An unfinished character can only be at the end; everything before it is settled.
        let whole = text.trim_end_matches(BROKEN).len();
        self.pending = match () {
            () if whole == text.len() => 0,
            () if whole > self.sent => 1,
            () => self.pending + 1,
        };
        let hopeless = self.pending > MAX_PENDING;
        let upto = if hopeless { text.len() } else { whole };
        let out = text.get(self.sent..upto).unwrap_or("").to_owned();
        self.sent = self.sent.max(upto);
        if hopeless || (self.pending == 0 && self.ids.len() > MAX_WINDOW) {
            let keep = if hopeless { 1 } else { CONTEXT };
            self.ids.drain(..self.ids.len() - keep);
            self.sent = self.tokenizer.decode(&self.ids, true)?.len();
            self.pending = 0;
        }
        Ok(out)
    }

    /// What is left at the end of a generation: bytes of an unfinished character become U+FFFD.
    ///
    /// # Errors
    /// None beyond those of [`StreamDecoder::push`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids, true)?;
        let out = text.get(self.sent..).unwrap_or("").to_owned();
        self.sent = text.len();
        Ok(out)
    }
}
