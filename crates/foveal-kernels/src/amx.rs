//! The tile registers of AMX: who uses them configures them through [`Tiles`].
//!
//! A core renames tiles from a small pool that its hyperthreads share. Next to a neighbour that holds all of
//! its eight, hardly one is left for a thread that holds eight too, and every load and product waits for the
//! one before: the usual loop of four loads and four products then takes 4.3 times as long (measured: 132 ns
//! against 31 ns). A tile that is zeroed takes no place in the pool. So kernels zero each operand right after
//! its last use (79 ns there, still 31 ns without a neighbour) and leave no sums behind.

use std::arch::asm;
use std::marker::PhantomData;

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    colsb: [u16; 16],
    rows: [u8; 16],
}

/// Configured tiles of this thread; gives them back when dropped, so that the thread's state is small
/// again in a context switch. Bound to its thread by the pointer type.
pub(crate) struct Tiles(PhantomData<*const u8>);

impl Tiles {
    /// Eight tiles of 16 rows of 64 bytes.
    ///
    /// # Safety
    /// The machine has AMX and the process may use it.
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: by the contract.
        unsafe { Self::with_rows([16; 8]) }
    }

    /// Eight tiles of rows of 64 bytes, tile i of `rows[i]` (at most 16).
    ///
    /// # Safety
    /// As of [`Tiles::new`].
    pub(crate) unsafe fn with_rows(rows: [u8; 8]) -> Self {
        let mut c = Config { palette: 1, start_row: 0, reserved: [0; 14], colsb: [0; 16], rows: [0; 16] };
        c.colsb[..8].fill(64);
        c.rows[..8].copy_from_slice(&rows);
        // SAFETY: reads 64 bytes, all of `c` (no `nomem`: the compiler must have written every one of
        // them before).
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const c, options(nostack, preserves_flags)) }
        Tiles(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `with_rows` ran on this thread; only tile state is touched.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) }
    }
}
