//! y = x · Wᵀ (+ bias) with weights packed once: f32, bf16, int8 or int4 in groups of 32.
//!
//! All formats share one order of memory: panels of 16 output features, and inside a panel
//! blocks of 32 inputs. In a bf16 block the two inputs of a pair sit side by side, which is
//! at once the operand order of the AMX tile product and, widened by a shift and a mask, two
//! vectors of 16 output features: one copy of the weights serves prefill (compute bound) and
//! decode (bandwidth bound, each weight read once for all rows). An int8 block holds quads of
//! inputs, the operand order of the byte dot product; in an int4 block two quads share their bytes.

mod amx;
mod integer;
mod pack;
mod wide;

use crate::error::{Result, same};
use crate::fallback::{Reason, tell};
use crate::isa::Isa;
use crate::work::Work;

pub use pack::WeightFormat;

/// Output features of a panel.
const PANEL: usize = 16;
/// Inputs of a block; also the group of int8 or int4 weights that shares a scale.
const BLOCK: usize = 32;
/// Fewest rows for which the tile unit beats reading the weights with vector code.
const AMX_ROWS: usize = 5;
/// Multiply-adds below which a call stays on the calling thread.
const PARALLEL_MACS: usize = 1 << 16;

/// Packed weights W (n, k) of a linear layer, with an optional bias (n).
///
/// ```
/// use foveal_kernels::{Isa, linear::PackedLinear};
/// let w = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // (n = 2, k = 3)
/// let layer = PackedLinear::pack_f32(&w, 2, 3).unwrap();
/// let mut y = [0.0; 2];
/// layer.forward(&[1.0, 1.0, 1.0], 1, &mut y, Isa::active()).unwrap();
/// assert_eq!(y, [6.0, 15.0]);
/// ```
pub struct PackedLinear {
    format: WeightFormat,
    n: usize,
    k: usize,
    /// Panels, rounded up to an even number so that every kernel may take two at a time.
    panels: usize,
    data: pack::Lines,
    /// Power of two on the integers' scales, so that they fit f16 whatever the weights' size.
    unit: f32,
    /// Zeros where there is no bias; `panels * 16` long.
    bias: pack::Lines,
    has_bias: bool,
}

impl std::fmt::Debug for PackedLinear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedLinear({}, n {}, k {}, bias {})", self.format, self.n, self.k, self.has_bias)
    }
}

/// A pointer to an output that tasks write disjoint rectangles of.
#[derive(Clone, Copy)]
struct OutPtr(*mut f32);
// SAFETY: the tasks of one call write disjoint rectangles of a uniquely borrowed slice.
unsafe impl Send for OutPtr {}
// SAFETY: as above.
unsafe impl Sync for OutPtr {}
impl OutPtr {
    fn get(self) -> *mut f32 {
        self.0
    }
}

impl PackedLinear {
    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How the weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Bytes resident: packed weights with padding and scales, and the bias.
    pub fn bytes(&self) -> usize {
        self.data.bytes() + self.bias.bytes()
    }

    /// Add a bias of `n` elements to every output row.
    pub fn with_bias(mut self, bias: &[f32]) -> Result<Self> {
        same("linear", "n", "bias", bias.len(), "weight", self.n)?;
        self.bias.f32_mut()[..self.n].copy_from_slice(bias);
        self.has_bias = true;
        Ok(self)
    }

    /// `x` (m, k) contiguous into `out` (m, n) contiguous: out = x · Wᵀ + bias.
    ///
    /// Accumulates in f32. Under [`Isa::Amx`] with bf16 or integer weights and more than a few rows,
    /// x and the weights are rounded to bf16. With integer weights, up to 8 rows and AVX-512 VNNI, x is
    /// rounded to 16-bit integers with a scale for each 32 inputs. Otherwise x stays f32. `isa` is
    /// lowered to what the machine has. Runs on the current rayon pool; small calls stay on
    /// their thread. A whole token inside one `ThreadPool::install` saves the wake-up of each call.
    pub fn forward(&self, x: &[f32], m: usize, out: &mut [f32], isa: Isa) -> Result<Work> {
        same("linear", "m*k", "x", x.len(), "m and weight", m.saturating_mul(self.k))?;
        same("linear", "m*n", "out", out.len(), "m and weight", m.saturating_mul(self.n))?;
        if m == 0 || self.n == 0 {
            return Ok(Work::default());
        }
        // The kernels rely on the machine having `isa`; a caller can name any.
        let isa = isa.min(Isa::detect());
        let out_ptr = OutPtr(out.as_mut_ptr());
        let quantised = self.format.is_integer() && isa >= Isa::Avx512 && m <= integer::MAX_ROWS;
        let served = quantised && integer::forward(self, x, m, out_ptr);
        if served {
            // Nothing is left to do.
        } else if self.format != WeightFormat::F32 && isa >= Isa::Amx && m >= AMX_ROWS {
            amx::forward(self, x, m, out_ptr);
        } else if self.k.is_multiple_of(BLOCK) {
            wide::forward(self, x, m, out_ptr, isa);
        } else {
            // The kernels read whole blocks of inputs.
            let kp = self.blocks() * BLOCK;
            let mut padded = vec![0f32; m * kp];
            for (p, x) in padded.chunks_exact_mut(kp).zip(x.chunks_exact(self.k.max(1))) {
                p[..self.k].copy_from_slice(x);
            }
            wide::forward(self, &padded, m, out_ptr, isa);
        }
        let work = Work {
            flops: 2 * (m * self.n * self.k) as u64,
            bytes: (self.data.bytes() + 4 * (x.len() + out.len())) as u64,
            ..Work::default()
        };
        if quantised && !served {
            tell(Reason::LinearInteger);
            return Ok(work.on_slower_path());
        }
        Ok(work)
    }

    /// Blocks of 32 inputs in a panel.
    fn blocks(&self) -> usize {
        self.k.div_ceil(BLOCK)
    }

    /// Bytes of a panel.
    fn panel_bytes(&self) -> usize {
        self.blocks() * self.format.block_bytes()
    }
}

/// Split `units` (of 32 output features) and `rows` into a grid of tasks: (row step, unit step).
///
/// Enough tasks to keep every thread busy when another process takes a core, but no more:
/// a small product costs less than waking a thread.
fn grid(m: usize, units: usize, k: usize, max_rows: usize) -> (usize, usize) {
    let threads = rayon::current_num_threads();
    if threads == 1 || m * units * 2 * PANEL * k < PARALLEL_MACS {
        return (max_rows, units);
    }
    let row_tasks = m.div_ceil(max_rows);
    // Even out the row blocks, in whole tiles.
    let row_step = m.div_ceil(row_tasks).next_multiple_of(16).min(max_rows);
    let want = (4 * threads).div_ceil(m.div_ceil(row_step));
    (row_step, units.div_ceil(want.min(units)))
}
