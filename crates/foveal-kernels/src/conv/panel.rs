//! Panels: pieces of a signal brought together so that one vector loop serves every memory order.
//!
//! A panel is 16 channels side by side, time by time, or (`Unit::Row`) consecutive samples of one channel. The
//! same time step of the next tap lies 16 or 1 elements on; a loop over 16-wide chunks is the same for both.

use super::signal::{Cells, Signal};
use crate::view::Element;
use std::ops::Range;

/// Width of a panel in f32.
pub(super) const WIDTH: usize = 16;

/// Which channels a task handles, and in which order.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    /// One channel, samples side by side.
    Row(usize),
    /// From this channel on, up to 16 of them side by side.
    Panel(usize),
}

impl Unit {
    /// Rows where time is the innermost axis, panels elsewhere.
    pub(super) fn prefers_rows(strides: [usize; 3], shape: [usize; 3]) -> bool {
        strides[2] == 1 && (strides[1] != 1 || shape[1] == 1)
    }

    pub(super) fn count(rows: bool, channels: usize) -> usize {
        if rows { channels } else { channels.div_ceil(WIDTH) }
    }

    pub(super) fn nth(rows: bool, i: usize) -> Self {
        if rows { Unit::Row(i) } else { Unit::Panel(i * WIDTH) }
    }

    /// Elements from one time step to the next.
    pub(super) fn tap(self) -> usize {
        match self {
            Unit::Row(_) => 1,
            Unit::Panel(_) => WIDTH,
        }
    }

    /// The channels, of `all`.
    pub(super) fn channels(self, all: usize) -> Range<usize> {
        match self {
            Unit::Row(c) => c..c + 1,
            Unit::Panel(c) => c..(c + WIDTH).min(all),
        }
    }

    /// A 16-wide vector of one value a channel: repeated for a row, zero past the last channel of a panel.
    pub(super) fn spread(self, all: usize, value: impl Fn(usize) -> f32) -> [f32; WIDTH] {
        let mut out = [0.0; WIDTH];
        match self {
            Unit::Row(c) => out.fill(value(c)),
            Unit::Panel(_) => self.channels(all).zip(&mut out).for_each(|(c, o)| *o = value(c)),
        }
        out
    }

    /// The sum for each channel of a 16-wide vector of partial sums.
    pub(super) fn collect(self, all: usize, sums: &[f32], mut give: impl FnMut(usize, f32)) {
        match self {
            Unit::Row(c) => give(c, sums.iter().sum()),
            Unit::Panel(_) => self.channels(all).zip(sums).for_each(|(c, s)| give(c, *s)),
        }
    }

    /// Copy times `times` of batch row `b` to the front of `out`.
    pub(super) fn gather<T: Element>(self, x: &Signal<T>, b: usize, times: Range<usize>, out: &mut [f32]) {
        match self {
            Unit::Row(c) => match x.row(b, c) {
                Some(row) => out.iter_mut().zip(&row[times]).for_each(|(o, x)| *o = x.to_f32()),
                None => times.zip(out).for_each(|(t, o)| *o = x.at(b, c, t).to_f32()),
            },
            Unit::Panel(_) => {
                let cs = self.channels(x.shape[1]);
                if cs.len() < WIDTH {
                    out[..times.len() * WIDTH].fill(0.0);
                }
                if x.strides[1] == 1 {
                    for (t, out) in times.zip(out.chunks_exact_mut(WIDTH)) {
                        let from = x.line(b, cs.start, t, cs.len());
                        out.iter_mut().zip(from).for_each(|(o, x)| *o = x.to_f32());
                    }
                    return;
                }
                for (k, c) in cs.enumerate() {
                    for (i, t) in times.clone().enumerate() {
                        out[i * WIDTH + k] = x.at(b, c, t).to_f32();
                    }
                }
            }
        }
    }

    /// Write `x`, gathered in this unit's order, to times `times` of batch row `b`.
    ///
    /// # Safety
    /// No other thread touches these channels at these times.
    pub(super) unsafe fn scatter(self, x: &[f32], y: &Cells<f32>, b: usize, times: Range<usize>) {
        let cs = self.channels(y.shape[1]);
        let contiguous = match self {
            Unit::Row(_) => y.strides[2] == 1,
            Unit::Panel(_) => y.strides[1] == 1,
        };
        let tap = self.tap();
        for (i, t) in times.clone().enumerate() {
            if contiguous {
                // One copy for a row, one for each time of a panel.
                let len = if tap == 1 { times.len() } else { cs.len() };
                // SAFETY: the indices are below the shape, the axis is contiguous, and the caller owns it.
                unsafe { std::ptr::copy_nonoverlapping(x[i * tap..].as_ptr(), y.ptr(b, cs.start, t), len) };
                if tap == 1 {
                    return;
                }
                continue;
            }
            for (k, c) in cs.clone().enumerate() {
                // SAFETY: as above, one element.
                unsafe { *y.ptr(b, c, t) = x[i * tap + k] };
            }
        }
    }
}
