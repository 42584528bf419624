//! Convolutions along time: long filters through a fast transform, short depthwise filters directly, and the
//! damped exponential moving average, which is both a long filter and a recurrence.
//!
//! Operands are [`Signal`]s of shape (batch, channels, time) with a stride for every axis, so that (B, C, T)
//! and (B, T, C) memory are both read in place. Filters, outputs and gradients are f32; the signal may be bf16.

mod cyclic;
pub mod ema;
pub(crate) mod lines;
pub mod long;
mod panel;
pub(crate) mod ring;
pub mod short;
mod signal;
pub mod twin;

use rayon::prelude::*;

pub use ema::{DampedEma, EmaGrads, EmaParameterGrads};
pub use long::{Boundary, LongConv, LongGrads, long_conv, long_conv_backward};
pub use short::{ShortConv, ShortGrads};
pub use signal::{Signal, SignalMut};

/// Elements of a call below which it stays on its thread.
const PARALLEL: usize = 1 << 14;

/// Run `f` on every task with a worker's buffers; `elements` is the size of the call.
fn over_tasks<S>(tasks: usize, elements: usize, scratch: impl Fn() -> S + Sync, f: impl Fn(&mut S, usize) + Sync) {
    let threads = rayon::current_num_threads();
    if tasks <= 1 || threads == 1 || elements < PARALLEL {
        let mut s = scratch();
        return (0..tasks).for_each(|i| f(&mut s, i));
    }
    // A few runs of tasks a thread: buffers are made once a run.
    let step = tasks.div_ceil(8 * threads);
    (0..tasks.div_ceil(step)).into_par_iter().for_each(|r| {
        let mut s = scratch();
        (r * step..((r + 1) * step).min(tasks)).for_each(|i| f(&mut s, i));
    });
}
