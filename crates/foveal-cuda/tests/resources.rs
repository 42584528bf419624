//! Every kernel compiles for each architecture, with the registers, spills and shared memory of `resources.txt`.
//! `FOVEAL_WRITE_RESOURCES=1` writes that table. Without NVRTC there is nothing to compile with.

use foveal_cuda::compile::{compile, compiler_present, compiler_version};
use foveal_cuda::shipped::shipped;

#[test]
fn kernels_compile_as_recorded() {
    if !compiler_present() {
        return eprintln!("skipped: no NVRTC library on LD_LIBRARY_PATH");
    }
    let (major, minor) = compiler_version().unwrap();
    let head = format!(
        "# NVRTC {major}.{minor}: kernel | architecture | function | registers | bytes of spills | static shared memory"
    );
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/resources.txt");
    let write = std::env::var_os("FOVEAL_WRITE_RESOURCES").is_some();
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    // Another compiler counts otherwise.
    if !write && kept.lines().next() != Some(&head) {
        return eprintln!("skipped: resources.txt is not of this compiler, {major}.{minor}");
    }
    let all: Vec<_> = shipped().into_iter().flat_map(|(s, a)| a.into_iter().map(move |a| (s.clone(), a))).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let mut found: Vec<(usize, String)> = std::thread::scope(|scope| {
        let work = || {
            let mut found = Vec::new();
            while let Some((spec, arch)) = all.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                let binary = compile(spec, arch).unwrap_or_else(|e| panic!("{e}"));
                for line in binary.log.lines().filter(|l| l.contains("arning") || l.contains("C75")) {
                    eprintln!("{} {arch}: {line}", spec.name());
                }
                let at = all.iter().position(|x| x == &(spec.clone(), *arch)).unwrap();
                for r in binary.resources() {
                    let (name, f) = (spec.name(), &r.function);
                    found.push((at, format!("{name} | {arch} | {f} | {} | {} | {}", r.registers, r.spills, r.shared)));
                }
            }
            found
        };
        let tasks: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        tasks.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    found.sort();
    let lines: Vec<String> = found.into_iter().map(|(_, line)| line).collect();
    let table = format!("{head}\n{}\n", lines.join("\n"));
    if write {
        std::fs::write(path, &table).unwrap();
    } else {
        assert_eq!(kept, table, "resources changed; FOVEAL_WRITE_RESOURCES=1 writes them anew");
    }
}
