//! One generic kernel, compiled once for each instruction set.

/// `with_isa!(module, unsafe fn name => body(args…) -> ret)` defines `name(isa, args…)`, which runs
/// `body::<crate::module::{Avx512, Avx2 or Portable}>(args…)`.
///
/// `body` must be `#[inline(always)] unsafe fn`, so that it is compiled inside the function that
/// carries the target feature; closures in it may miss that, loops do not. The defined function
/// is safe only with an `isa` at most `Isa::detect()`, besides `body`'s own contract.
macro_rules! with_isa {
    ($module:ident, $vis:vis unsafe fn $name:ident => $body:ident $(<$($g:ident : $b:path),*>)? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)?) => {
        $vis unsafe fn $name $(<$($g: $b),*>)? (isa: $crate::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                unsafe fn avx512 $(<$($g: $b),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: the contract is passed on from the caller.
                    unsafe { $body::<$crate::$module::Avx512 $($(, $g)*)?>($($arg),*) }
                }
                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2 $(<$($g: $b),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: the contract is passed on from the caller.
                    unsafe { $body::<$crate::$module::Avx2 $($(, $g)*)?>($($arg),*) }
                }
                match isa {
                    // SAFETY: the machine has `isa` by the caller's promise.
                    $crate::Isa::Avx512 | $crate::Isa::Amx => return unsafe { avx512 $(::<$($g),*>)? ($($arg),*) },
                    // SAFETY: as above.
                    $crate::Isa::Avx2 => return unsafe { avx2 $(::<$($g),*>)? ($($arg),*) },
                    $crate::Isa::Portable => {}
                }
            }
            let _ = isa;
            // SAFETY: the contract is passed on from the caller.
            unsafe { $body::<$crate::$module::Portable $($(, $g)*)?>($($arg),*) }
        }
    };
}
pub(crate) use with_isa;
