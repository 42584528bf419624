//! Facts of the machine and the model.

use crate::results::Facts;
use foveal_kernels::Isa;
use foveal_llm::Model;

/// Fill in what this crate can find out; fields already given stay.
pub fn gather(model: &Model, mut f: Facts) -> Facts {
    let c = model.config();
    let keep = |s: &mut String, v: String| {
        if s.is_empty() {
            *s = v;
        }
    };
    keep(&mut f.version, env!("CARGO_PKG_VERSION").into());
    keep(&mut f.cpu, cpu_name());
    keep(&mut f.isa, Isa::active().to_string());
    keep(&mut f.os, format!("{} {}", std::env::consts::OS, std::env::consts::ARCH));
    f.cores = std::thread::available_parallelism().map_or(1, usize::from);
    f.threads = rayon::current_num_threads();
    f.num_layers = c.num_layers;
    f.num_heads = c.num_heads;
    f.num_kv_heads = c.num_kv_heads;
    f.head_dim = c.head_dim;
    keep(&mut f.weights, model.weight_formats());
    f.weight_bytes = model.weight_bytes();
    f
}

/// Name of the processor where the system tells.
pub fn cpu_name() -> String {
    std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|s| {
            s.lines()
                .find(|l| l.starts_with("model name"))
                .and_then(|l| l.split_once(':'))
                .map(|x| x.1.trim().to_string())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.into())
}

/// Peak resident memory of this process in bytes, where the system tells (Linux).
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn peak_memory_is_plausible() {
        let p = super::peak_bytes().unwrap();
        assert!(p > 1 << 20 && p < 1 << 42, "{p}");
    }
}
