//! Arithmetic without memory: what one thread can do at most, a ceiling to hold kernels against.

// One contract, that of `crate::simd`.
#![allow(unsafe_op_in_unsafe_fn)]

use crate::dispatch::with_isa;
use crate::isa::Isa;
use crate::simd::Simd;
use crate::work::Work;

/// Independent sums: enough to hide the latency of a multiply-add, few enough for the registers of every set.
const CHAINS: usize = 12;

#[inline(always)]
unsafe fn multiply_add_on<S: Simd>(rounds: usize, factor: f32, term: f32) -> f32 {
    let (m, a) = (S::splat(factor), S::splat(term));
    let mut x = [a; CHAINS];
    for _ in 0..rounds {
        for x in &mut x {
            *x = S::fma(*x, m, a);
        }
    }
    x.into_iter().fold(0.0, |sum, x| sum + S::sum(x))
}

with_isa!(simd, unsafe fn multiply_add => multiply_add_on(rounds: usize, factor: f32, term: f32) -> f32);

/// f32 lanes of an instruction set's registers.
fn lanes(isa: Isa) -> usize {
    match isa {
        Isa::Portable => 4,
        Isa::Avx2 => 8,
        Isa::Avx512 | Isa::Amx => 16,
    }
}

/// `rounds` of multiply-adds of f32 vectors in registers, on this thread. Time the call.
pub fn f32_arithmetic(isa: Isa, rounds: usize) -> Work {
    let isa = isa.min(Isa::detect());
    // SAFETY: no memory is touched, and `isa` is at most what the machine has.
    let sum = unsafe { multiply_add(isa, rounds, std::hint::black_box(0.5), std::hint::black_box(1.0)) };
    std::hint::black_box(sum);
    Work { flops: (2 * CHAINS * lanes(isa) * rounds) as u64, ..Work::default() }
}

/// `rounds` of products of bf16 tiles in their registers, on this thread; `None` where `isa` has no tiles.
pub fn bf16_arithmetic(isa: Isa, rounds: usize) -> Option<Work> {
    if isa.min(Isa::detect()) < Isa::Amx {
        return None;
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        /// Sums of 16 x 16, each product over 32 pairs of bf16.
        const SUMS: usize = 4;
        let ones = [half::bf16::ONE; 16 * 32];
        // SAFETY: `Isa::Amx` was found, so tiles exist and may be used; `ones` holds the 16 rows of 64 bytes that a
        // load reads. All tiles are zeroed at the end, as `crate::amx` asks for.
        unsafe {
            let _tiles = crate::amx::Tiles::new();
            std::arch::asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tileloadd tmm4, [{ones} + {stride}*1]",
                "tileloadd tmm5, [{ones} + {stride}*1]",
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tdpbf16ps tmm1, tmm4, tmm5",
                "tdpbf16ps tmm2, tmm4, tmm5",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "dec {n}",
                "jnz 2b",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tilezero tmm4",
                "tilezero tmm5",
                ones = in(reg) ones.as_ptr(),
                stride = in(reg) 64usize,
                n = inout(reg) rounds => _,
                options(nostack),
            );
        }
        return Some(Work { flops: (2 * 16 * 16 * 32 * SUMS * rounds) as u64, ..Work::default() });
    }
    #[allow(unreachable_code)]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_counted_and_nothing_is_left_out() {
        for isa in Isa::available() {
            assert_eq!(f32_arithmetic(isa, 7).flops, (2 * 12 * 7 * lanes(isa)) as u64);
            assert_eq!(bf16_arithmetic(isa, 3).map(|w| w.flops), (isa == Isa::Amx).then_some(2 * 16 * 16 * 32 * 4 * 3));
            // x = x/2 + 1 comes to rest at 2 in every lane of every chain.
            // SAFETY: as in `f32_arithmetic`.
            let sum = unsafe { multiply_add(isa, 60, 0.5, 1.0) };
            assert!((sum - (2 * CHAINS * lanes(isa)) as f32).abs() < 1e-3, "{isa}: {sum}");
        }
    }
}
