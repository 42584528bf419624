//! What the machine offers: cores, memory.

use std::collections::BTreeSet;

/// Physical cores that this process may use: hyper-threads of one core count once, and affinity
/// masks and control-group quotas are honoured. Matrix kernels gain nothing from a second
/// hyper-thread on the same vector units.
pub fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    let cores: BTreeSet<String> = allowed_cpus()
        .into_iter()
        .filter_map(|n| {
            std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list")).ok()
        })
        .collect();
    if cores.is_empty() { logical } else { cores.len().min(logical) }
}

/// Numbers of the logical CPUs in this process's affinity mask (Linux; empty elsewhere).
fn allowed_cpus() -> Vec<usize> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap_or("");
    cpu_list(list)
}

/// `0-3,8` as numbers; parts that are no numbers are skipped.
fn cpu_list(s: &str) -> Vec<usize> {
    s.trim()
        .split(',')
        .filter_map(|part| {
            let (a, b) = part.split_once('-').unwrap_or((part, part));
            Some(a.trim().parse::<usize>().ok()?..=b.trim().parse::<usize>().ok()?)
        })
        .flatten()
        .collect()
}

/// Memory in bytes: (total, available to a new program). `None` where the system does not say.
pub fn memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find(|l| l.starts_with(name))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

/// `1.5 GiB`, `17 KiB`: three digits at most.
pub fn size(bytes: u64) -> String {
    let mut x = bytes as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if x < 1024.0 {
            break;
        }
        x /= 1024.0;
        unit = next;
    }
    if x < 10.0 && unit != "B" { format!("{x:.1} {unit}") } else { format!("{x:.0} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(cpu_list("7"), [7]);
        assert!(cpu_list("").is_empty());
    }

    #[test]
    fn cores_are_at_least_one_and_at_most_the_logical_ones() {
        let n = physical_cores();
        assert!(n >= 1 && n <= std::thread::available_parallelism().map_or(n, usize::from));
    }

    #[test]
    fn sizes() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(150 * 1024 * 1024), "150 MiB");
    }
}
