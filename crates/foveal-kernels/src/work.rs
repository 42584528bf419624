//! What a call really did, counted where it was done.
//!
//! Counters are exact and repeatable, so that a claim such as "linear in the
//! number of keys" is tested on counters and never on a clock.

use std::ops::{Add, AddAssign};

/// Work done by one or more kernel calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Work {
    /// Floating-point operations (a fused multiply-add counts two).
    pub flops: u64,
    /// Bytes of q, k, v and o that the algorithm reads and writes, each operand
    /// counted once per visit of a tile.
    pub bytes: u64,
    /// Tiles (query block × key block) or key lists visited.
    pub tiles: u64,
    /// Attention scores q·k of full width computed, masked entries inside a
    /// visited tile included. The ratio to the dense call's is the density.
    pub pairs: u64,
    /// Of `flops`, those that a slower path did because the fast path of the instruction set asked
    /// for could not serve the call. Alone among the counters it depends on the machine.
    pub fallback: u64,
}

impl Work {
    /// Say that a slower path did all of this.
    pub(crate) fn on_slower_path(self) -> Work {
        Work { fallback: self.flops, ..self }
    }
}

impl Add for Work {
    type Output = Work;
    fn add(self, o: Work) -> Work {
        Work {
            flops: self.flops + o.flops,
            bytes: self.bytes + o.bytes,
            tiles: self.tiles + o.tiles,
            pairs: self.pairs + o.pairs,
            fallback: self.fallback + o.fallback,
        }
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, o: Work) {
        *self = *self + o;
    }
}

impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Work>>(it: I) -> Work {
        it.fold(Work::default(), Add::add)
    }
}
