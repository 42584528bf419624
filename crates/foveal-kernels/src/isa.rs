//! Which instructions a kernel may use, found at run time.
//!
//! Every kernel takes an [`Isa`], by default [`Isa::active`]: the best the machine has, or
//! the one named in the environment variable `FOVEAL_ISA` (`portable`, `avx2`, `avx512`,
//! `amx`). Tests run every kernel under each of [`Isa::available`].

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

static ACTIVE: OnceLock<Isa> = OnceLock::new();

/// Instruction set, in rising order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, any architecture.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with BF16 conversion, and AMX tiles for bf16.
    Amx,
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        })
    }
}

impl FromStr for Isa {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "portable" => Ok(Isa::Portable),
            "avx2" => Ok(Isa::Avx2),
            "avx512" => Ok(Isa::Avx512),
            "amx" => Ok(Isa::Amx),
            _ => Err(format!("FOVEAL_ISA = {s:?}: use portable, avx2, avx512 or amx")),
        }
    }
}

impl Isa {
    /// The best instruction set of this machine.
    pub fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                if std::is_x86_feature_detected!("avx512f")
                    && std::is_x86_feature_detected!("avx512bw")
                    && std::is_x86_feature_detected!("avx512dq")
                    && std::is_x86_feature_detected!("avx512vl")
                {
                    if amx_ready() {
                        return Isa::Amx;
                    }
                    return Isa::Avx512;
                }
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// The instruction set in force: [`Isa::detect`] lowered by `FOVEAL_ISA`.
    ///
    /// A name the machine cannot honour, or no known name, is reported once on standard
    /// error and the detected set is used.
    pub fn active() -> Isa {
        *ACTIVE.get_or_init(|| {
            let best = Isa::detect();
            match std::env::var("FOVEAL_ISA") {
                Err(_) => best,
                Ok(s) => match s.parse::<Isa>() {
                    Ok(isa) if isa <= best => isa,
                    Ok(isa) => {
                        eprintln!("foveal: FOVEAL_ISA={isa} is not available on this machine; using {best}");
                        best
                    }
                    Err(e) => {
                        eprintln!("foveal: {e}; using {best}");
                        best
                    }
                },
            }
        })
    }

    /// Put `isa` in force for the whole process, over `FOVEAL_ISA`. Call it before any kernel runs.
    ///
    /// Errors: the machine lacks it, or another one is already in force.
    pub fn set_active(isa: Isa) -> Result<(), String> {
        let best = Isa::detect();
        if isa > best {
            return Err(format!("instruction set {isa} is not available on this machine; the best here is {best}"));
        }
        let now = *ACTIVE.get_or_init(|| isa);
        if now == isa {
            Ok(())
        } else {
            Err(format!("instruction set {now} is already in force; choose {isa} earlier"))
        }
    }

    /// Every instruction set this machine can run, lowest first.
    pub fn available() -> Vec<Isa> {
        let best = Isa::detect();
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx].into_iter().filter(|i| *i <= best).collect()
    }
}

/// Whether AMX bf16 tiles exist and the kernel lets this process use them (one `arch_prctl`).
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx_ready() -> bool {
    static READY: OnceLock<bool> = OnceLock::new();
    *READY.get_or_init(|| {
        // CPUID leaf 7, sub-leaf 0, EDX: bit 22 AMX-BF16, bit 24 AMX-TILE; sub-leaf 1, EAX: bit 5 AVX512-BF16.
        let l0 = std::arch::x86_64::__cpuid_count(7, 0);
        let l1 = std::arch::x86_64::__cpuid_count(7, 1);
        if l0.edx & (1 << 22) == 0 || l0.edx & (1 << 24) == 0 || l1.eax & (1 << 5) == 0 {
            return false;
        }
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: arch_prctl(ARCH_REQ_XCOMP_PERM) takes a feature number and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    })
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn amx_ready() -> bool {
    false
}
