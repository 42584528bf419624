//! Cache lines that the next tile of keys, or the next task, will ask for: fetched a few at a time between products.
//!
//! A dense task reads K and V so often that the caches hold them. Tasks of a sparse call read each key once or twice, here
//! and there, and would wait for it.

use super::amx::LINE;
use std::arch::x86_64::*;

/// Rows of so many bytes, `step` bytes apart.
struct Piece {
    at: *const u8,
    bytes: usize,
    rows: usize,
    step: usize,
    write: bool,
}

#[derive(Default)]
pub(super) struct Ahead {
    pieces: Vec<Piece>,
    /// Lines of all pieces.
    lines: usize,
    /// Lines at a time.
    share: usize,
    /// Where the next line lies: piece, row, bytes into the row.
    piece: usize,
    row: usize,
    byte: usize,
}

impl Ahead {
    /// Forget what is left.
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
        (self.lines, self.share, self.piece, self.row, self.byte) = (0, 0, 0, 0, 0);
    }

    /// Add `rows` of `bytes`, `step` bytes apart, which will be read or written.
    pub(super) fn add(&mut self, at: *const u8, bytes: usize, rows: usize, step: usize, write: bool) {
        let (bytes, rows) = if step == bytes { (bytes * rows, 1) } else { (bytes, rows) };
        // From the start of a line, so that steps of a line miss none.
        let skew = at.addr() % LINE;
        let (at, bytes) = (at.wrapping_sub(skew), bytes + skew);
        self.lines += rows * bytes.div_ceil(LINE);
        self.pieces.push(Piece { at, bytes, rows, step, write });
    }

    /// Fetch in so many turns what was added.
    pub(super) fn spread(&mut self, turns: usize) {
        self.share = self.lines.div_ceil(turns.max(1));
    }

    /// One turn.
    #[inline(always)]
    pub(super) fn turn(&mut self) {
        for _ in 0..self.share {
            let Some(p) = self.pieces.get(self.piece) else { return };
            let at = p.at.wrapping_add(self.row * p.step + self.byte).cast();
            // SAFETY: a hint, whatever lies there.
            unsafe { if p.write { _mm_prefetch::<_MM_HINT_ET0>(at) } else { _mm_prefetch::<_MM_HINT_T1>(at) } }
            self.byte += LINE;
            if self.byte >= p.bytes {
                self.byte = 0;
                self.row += 1;
                if self.row == p.rows {
                    self.row = 0;
                    self.piece += 1;
                }
            }
        }
    }
}
