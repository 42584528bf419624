//! Kernels from source to machine code, by NVRTC, once: machine code is kept on disk under a digest of all it was
//! made from (source, headers, options, compiler, driver), written to a temporary name and renamed.

use crate::error::{CudaError, Result};
use cudarc::nvrtc::sys as nvrtc;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const HEADERS: [(&str, &str); 2] =
    [("common.cuh", include_str!("../kernels/common.cuh")), ("attend.cuh", include_str!("../kernels/attend.cuh"))];

/// The text of a kernel file: the one built in, or for work on the kernels that in the folder
/// `FOVEAL_CUDA_KERNELS`, so that a change needs no build.
fn text_of(file: &str, built_in: &'static str) -> Cow<'static, str> {
    let folder = std::env::var_os("FOVEAL_CUDA_KERNELS").filter(|f| !f.is_empty());
    match folder.map(|f| std::fs::read_to_string(Path::new(&f).join(file))) {
        Some(Ok(text)) => Cow::Owned(text),
        Some(Err(e)) => {
            tracing::warn!("{file} of FOVEAL_CUDA_KERNELS: {e}; the one built in is taken");
            Cow::Borrowed(built_in)
        }
        None => Cow::Borrowed(built_in),
    }
}

/// A kernel: a source file and its compile-time constants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Spec {
    /// Name of the file without its ending.
    pub file: &'static str,
    source: &'static str,
    /// `NAME` or `NAME=VALUE`.
    pub defines: Vec<String>,
}

macro_rules! sources {
    ($($name:ident),* $(,)?) => {
        impl Spec { $(
            #[doc = concat!("`kernels/", stringify!($name), ".cu`.")]
            pub fn $name() -> Self {
                let source = include_str!(concat!("../kernels/", stringify!($name), ".cu"));
                Self { file: stringify!($name), source, defines: Vec::new() }
            }
        )* }
    };
}
sources!(ceiling, attend_sm90, attend_backward_sm90, attend_sm80, attend_rows, decode, recur_sm90, recur_delta,);

impl Spec {
    /// With `NAME=VALUE`.
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.defines.push(format!("{name}={}", value.to_string()));
        self
    }

    /// With `NAME`, if `on`.
    pub fn flag(mut self, name: &str, on: bool) -> Self {
        if on {
            self.defines.push(name.into());
        }
        self
    }

    /// File and constants.
    pub fn name(&self) -> String {
        std::iter::once(self.file).chain(self.defines.iter().map(String::as_str)).collect::<Vec<_>>().join(" ")
    }

    fn text(&self) -> Cow<'static, str> {
        text_of(&format!("{}.cu", self.file), self.source)
    }

    fn options(&self, arch: &str) -> Vec<String> {
        let mut options: Vec<String> =
            ["--std=c++17", "--ptxas-options=-v", "-default-device"].iter().map(ToString::to_string).collect();
        options.push(format!("--gpu-architecture={arch}"));
        options.extend(self.defines.iter().map(|d| format!("-D{d}")));
        options
    }
}

/// Machine code, and what the compiler says of it.
#[derive(Clone, Debug)]
pub struct Binary {
    /// A cubin.
    pub code: Vec<u8>,
    /// The compiler's words; empty if it came from the cache.
    pub log: String,
}

/// Registers, spills and shared memory of one kernel, as the assembler reports them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Name of the function.
    pub function: String,
    /// Registers a thread.
    pub registers: usize,
    /// Bytes of spills, stores and loads together.
    pub spills: usize,
    /// Static shared memory in bytes.
    pub shared: usize,
}

impl Binary {
    /// What the assembler said of each function, in the order of the file; none of code from the cache.
    pub fn resources(&self) -> Vec<Resources> {
        let number = |line: &str, before: &str| {
            let at = line.find(before)?;
            line[..at].trim_end().rsplit(|c: char| !c.is_ascii_digit()).next()?.parse::<usize>().ok()
        };
        let mut all: Vec<Resources> = Vec::new();
        for line in self.log.lines() {
            if let Some(name) = line.split("Function properties for ").nth(1) {
                all.push(Resources { function: name.trim().into(), ..Default::default() });
            }
            let Some(last) = all.last_mut() else { continue };
            if let (Some(s), Some(l)) = (number(line, " bytes spill stores"), number(line, " bytes spill loads")) {
                last.spills = s + l;
            }
            if let Some(n) = number(line, " registers") {
                last.registers = n;
                last.shared = number(line, " bytes smem").unwrap_or(0);
            }
        }
        all
    }
}

/// Whether the compiler's library can be loaded.
pub fn compiler_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: loads a library by its well-known names and drops it.
    *PRESENT.get_or_init(|| unsafe { nvrtc::is_culib_present() })
}

/// Version of the compiler, if there is one.
pub fn compiler_version() -> Option<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there, and both pointers are to integers.
    let said = compiler_present().then(|| unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) })?;
    said.result().ok().map(|()| (major, minor))
}

/// The wrappers of wgmma, one type a width: their operands are too many to write by hand.
fn wgmma_header() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| {
        let mut t = String::from("#pragma once\ntemplate <int N> struct Wgmma;\n");
        for n in (16..=256).step_by(16) {
            let regs = n / 2;
            let list = |range: std::ops::Range<usize>| range.map(|i| format!("%{i}")).collect::<Vec<_>>().join(",");
            let outs = (0..regs).map(|i| format!("\"+f\"(d[{i}])")).collect::<Vec<_>>().join(",");
            let head = format!("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.\" TY \".\" TY \" {{{}}}", list(0..regs));
            let pred = |at: usize| format!("{{.reg .pred p; setp.ne.b32 p, %{at}, 0; ");
            let _ = write!(
                t,
                "template <> struct Wgmma<{n}> {{\n\
                 template <int TA, int TB> DEV void ss(float (&d)[{regs}], u64 a, u64 b, int add) {{\n\
                 asm volatile(\"{}{head}, %{regs}, %{}, p, 1, 1, %{}, %{};}}\" : {outs} : \
                 \"l\"(a), \"l\"(b), \"r\"(add), \"n\"(TA), \"n\"(TB));\n}}\n\
                 template <int TB> DEV void rs(float (&d)[{regs}], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int add) {{\n\
                 asm volatile(\"{}{head}, {{{}}}, %{}, p, 1, 1, %{};}}\" : {outs} : \
                 \"r\"(a0), \"r\"(a1), \"r\"(a2), \"r\"(a3), \"l\"(b), \"r\"(add), \"n\"(TB));\n}}\n}};\n",
                pred(regs + 2),
                regs + 1,
                regs + 3,
                regs + 4,
                pred(regs + 5),
                list(regs..regs + 4),
                regs + 4,
                regs + 6,
            );
        }
        t
    })
}

/// Compile for `arch` (`sm_80`, `sm_90a`, …) without a look at the cache.
pub fn compile(spec: &Spec, arch: &str) -> Result<Binary> {
    if !compiler_present() {
        return Err(CudaError::NoCompiler { kernel: spec.name() });
    }
    let text = |s: &str| CString::new(s).unwrap_or_default();
    let headers: Vec<(CString, CString)> = HEADERS
        .iter()
        .map(|(n, s)| (text(n), text(&text_of(n, s))))
        .chain([(text("wgmma.cuh"), text(wgmma_header()))])
        .collect();
    let names: Vec<_> = headers.iter().map(|h| h.0.as_ptr()).collect();
    let texts: Vec<_> = headers.iter().map(|h| h.1.as_ptr()).collect();
    let (source, file) = (text(&spec.text()), text(&format!("{}.cu", spec.file)));
    let options: Vec<CString> = spec.options(arch).iter().map(|o| text(o)).collect();
    let options: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
    let failed = |log: String| CudaError::Compile { kernel: spec.name(), arch: arch.into(), log };
    let said = |r: nvrtc::nvrtcResult| r.result().map_err(|e| failed(format!("{:?}", e.0)));
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings live to the end of this function; sizes are asked for before buffers are made; the
    // program is destroyed on every path.
    unsafe {
        said(nvrtc::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            file.as_ptr(),
            headers.len() as i32,
            texts.as_ptr(),
            names.as_ptr(),
        ))?;
        let done = nvrtc::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr());
        let result = (|| {
            let mut size = 0;
            said(nvrtc::nvrtcGetProgramLogSize(program, &mut size))?;
            let mut log = vec![0u8; size.max(1)];
            said(nvrtc::nvrtcGetProgramLog(program, log.as_mut_ptr().cast()))?;
            let log = CStr::from_bytes_until_nul(&log).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
            if done.result().is_err() {
                return Err(failed(log));
            }
            said(nvrtc::nvrtcGetCUBINSize(program, &mut size))?;
            let mut code = vec![0u8; size];
            said(nvrtc::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()))?;
            Ok(Binary { code, log })
        })();
        let _ = nvrtc::nvrtcDestroyProgram(&mut program);
        result
    }
}

/// Where machine code is kept: `FOVEAL_CUDA_CACHE`, or `foveal/cubin` in the user's cache folder.
pub fn cache_folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("FOVEAL_CUDA_CACHE").or_else(|| {
        let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|h| h.join(".cache")))?;
        Some(base.join("foveal").join("cubin"))
    })
}

/// Compile, or take it from `folder`. `driver` is part of the key. A folder that cannot be written is no error.
pub fn compile_cached(spec: &Spec, arch: &str, driver: i32, folder: Option<&Path>) -> Result<Binary> {
    let Some(folder) = folder else { return compile(spec, arch) };
    let path = folder.join(format!("{}-{}.cubin", spec.file, key(spec, arch, driver)));
    if let Ok(code) = std::fs::read(&path)
        && code.starts_with(b"\x7fELF")
    {
        return Ok(Binary { code, log: String::new() });
    }
    let binary = compile(spec, arch)?;
    if let Err(e) = keep(folder, &path, &binary.code) {
        tracing::warn!("{} is not kept in {}: {e}; it will be compiled again", spec.name(), folder.display());
    }
    Ok(binary)
}

/// Digest of all that the machine code depends on.
fn key(spec: &Spec, arch: &str, driver: i32) -> String {
    let mut digest = Sha256::new();
    let mut add = |part: &str| {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    };
    add(&spec.text());
    HEADERS.iter().for_each(|(name, text)| add(&text_of(name, text)));
    add(wgmma_header());
    spec.options(arch).iter().for_each(|o| add(o));
    add(&format!("{driver} {:?}", compiler_version()));
    digest.finalize()[..16].iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

fn keep(folder: &Path, path: &Path, code: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(code)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_follow_all_that_code_depends_on() {
        let spec = Spec::attend_sm80().with("D", 64);
        let base = key(&spec, "sm_80", 1);
        assert_eq!(base, key(&spec.clone(), "sm_80", 1));
        assert_ne!(base, key(&spec, "sm_90a", 1));
        assert_ne!(base, key(&spec, "sm_80", 2));
        assert_ne!(base, key(&spec.clone().flag("MASK", true), "sm_80", 1));
        assert_ne!(base, key(&Spec::attend_rows().with("D", 64), "sm_80", 1));
    }

    #[test]
    fn what_is_kept_is_found_and_rubbish_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let spec = Spec::attend_sm80().with("D", 64);
        let path = folder.path().join(format!("attend_sm80-{}.cubin", key(&spec, "sm_80", 1)));
        keep(folder.path(), &path, b"\x7fELFcode").unwrap();
        let found = compile_cached(&spec, "sm_80", 1, Some(folder.path())).unwrap();
        assert_eq!(found.code, b"\x7fELFcode");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
        std::fs::write(&path, b"rubbish").unwrap();
        match compile_cached(&spec.with("DV", 64), "sm_80", 1, Some(folder.path())) {
            Ok(b) => assert!(b.code.starts_with(b"\x7fELF")),
            Err(e) => assert!(matches!(e, CudaError::NoCompiler { .. }), "{e}"),
        }
    }

    #[test]
    fn reads_what_the_assembler_says() {
        let log = "ptxas info    : Compiling entry function 'a' for 'sm_90a'\n\
                   ptxas info    : Function properties for a\n    \
                   8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
                   ptxas info    : Used 168 registers, used 1 barriers, 104 bytes smem, 1224 bytes cmem[0]\n";
        let all = Binary { code: Vec::new(), log: log.into() }.resources();
        assert_eq!(all, [Resources { function: "a".into(), registers: 168, spills: 16, shared: 104 }]);
    }
}
