//! Errors of the CUDA layer.

use foveal_kernels::KernelError;

/// Why a CUDA call failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No driver on this machine.
    #[error("no CUDA driver (libcuda) on this machine; install one, or use the CPU kernels")]
    NoDriver,
    /// A driver without such a device.
    #[error("no CUDA device {ordinal}: the driver lists {count}; give a smaller number, or use the CPU kernels")]
    NoDevice {
        /// Asked for.
        ordinal: usize,
        /// Devices there are.
        count: usize,
    },
    /// No compiler library, and the kernel was not in the cache.
    #[error("no NVRTC library (libnvrtc of CUDA 13) to compile {kernel} with; put its folder on LD_LIBRARY_PATH")]
    NoCompiler {
        /// The kernel.
        kernel: String,
    },
    /// The kernels need a newer device.
    #[error("{name} is sm_{arch}; the kernels need sm_80 or newer: use the CPU kernels")]
    TooOld {
        /// Device.
        name: String,
        /// Compute capability, ten times.
        arch: u32,
    },
    /// A kernel did not compile.
    #[error("{kernel} does not compile for {arch}:\n{log}")]
    Compile {
        /// Kernel and its options.
        kernel: String,
        /// Architecture.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// The driver refused.
    #[error("{what}: the CUDA driver says {code}{}", remedy(code))]
    Driver {
        /// What was being done.
        what: String,
        /// Name of the driver's error.
        code: String,
    },
    /// Shapes and tables that do not fit together.
    #[error(transparent)]
    Call(#[from] KernelError),
}

/// Result of a CUDA call.
pub type Result<T> = std::result::Result<T, CudaError>;

fn remedy(code: &str) -> &'static str {
    match code {
        "CUDA_ERROR_OUT_OF_MEMORY" => "; free device memory or make the problem smaller",
        "CUDA_ERROR_ILLEGAL_ADDRESS" | "CUDA_ERROR_LAUNCH_FAILED" | "CUDA_ERROR_MISALIGNED_ADDRESS" => {
            "; an earlier kernel failed, and the device must be opened anew"
        }
        _ => "",
    }
}

/// Say what was being done when the driver refused.
pub(crate) trait During<T> {
    fn during(self, what: &str) -> Result<T>;
}

impl<T> During<T> for std::result::Result<T, cudarc::driver::DriverError> {
    fn during(self, what: &str) -> Result<T> {
        self.map_err(|e| CudaError::Driver { what: what.into(), code: format!("{:?}", e.0) })
    }
}

pub(crate) fn bad<T>(op: &'static str, name: &'static str, value: impl ToString, remedy: &str) -> Result<T> {
    Err(KernelError::Param { op, name, value: value.to_string(), remedy: remedy.into() }.into())
}
