//! Linear recurrences, forward: the semantics of [`foveal_kernels::recur::Recur`] for identity and scalar decays on
//! Hopper (`kernels/recur_sm90.cu`). Other gates and devices are refused: the CPU kernels have them.

use crate::compile::Spec;
use crate::device::{Device, Launch, arg};
use crate::error::{Result, bad};
use crate::tensor::{Dtype, Tensor, TensorMut};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use foveal_kernels::Work;

const OP: &str = "recur";
/// Tokens of a chunk.
const CHUNK: usize = 64;
/// Value channels of a block.
const COLUMNS: usize = 32;
/// Chunks that a block holds.
const STAGES: usize = 5;

/// The transition. Operands may have any number of heads that divides that of the output.
#[derive(Clone, Copy, Debug)]
pub enum Gate<'a> {
    /// S_t = S_{t−1} + k vᵀ.
    Identity,
    /// S_t = e^g S_{t−1} + k vᵀ.
    Scalar {
        /// ≤ 0, (B, heads, T) contiguous.
        g: &'a CudaSlice<f32>,
        /// Its heads.
        heads: usize,
    },
}

/// A recurrence call.
#[derive(Clone, Copy, Debug)]
pub struct Recur<'a> {
    /// The transition.
    pub gate: Gate<'a>,
    /// Factor on q.
    pub scale: f32,
    /// Blocks that load q and k together: 1, 2 or 4, a divisor of Dv / 32; `None` is 1.
    pub cluster: Option<usize>,
}

#[repr(C)]
struct Params {
    out: u64,
    g: u64,
    initial: u64,
    last: u64,
    g_steps: [i64; 3],
    o_steps: [i64; 3],
    heads: i32,
    groups: [i32; 4],
    t: i32,
    dv: i32,
    chunks: i32,
    scale: f32,
}

/// Work of a call: that of the CPU's chunks of 64, with outputs of 16 bits.
pub fn work([b, h, t]: [usize; 3], d: usize, dv: usize, decay: bool, initial: bool) -> Work {
    let mut sum = Work::default();
    for from in (0..t).step_by(CHUNK) {
        let n = (t - from).min(CHUNK) as u64;
        let (d, dv, pairs) = (d as u64, dv as u64, n * (n + 1) / 2);
        sum += Work {
            flops: 2 * d * pairs + 4 * n * d * dv + 2 * pairs * dv,
            bytes: n * (2 * (2 * d + dv) + 4 * u64::from(decay) + 2 * dv),
            tiles: 1,
            pairs,
            fallback: 0,
        };
    }
    // States before and after.
    sum.bytes += 4 * (d * dv) as u64 * (u64::from(initial) + 1);
    let n = (b * h) as u64;
    Work { flops: sum.flops * n, bytes: sum.bytes * n, tiles: sum.tiles * n, pairs: sum.pairs * n, fallback: 0 }
}

impl<'a> Recur<'a> {
    /// With this gate and scale.
    pub fn new(gate: Gate<'a>, scale: f32) -> Self {
        Self { gate, scale, cluster: None }
    }

    /// Run: q and k (B, heads, T, D), v (B, heads, T, Dv) into out (B, H, T, Dv) of the same type, from the state
    /// `initial` (B, H, D, Dv) or zero, and if wanted into `last`. D is 64 or 128, Dv a multiple of 32.
    pub fn forward(
        &self,
        device: &Device,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        initial: Option<&CudaSlice<f32>>,
        out: &mut TensorMut,
        last: Option<&mut CudaSlice<f32>>,
    ) -> Result<Work> {
        let ([b, h, t, dv], d) = (out.layout.shape, q.shape()[3]);
        if !device.facts().hopper() {
            return bad(OP, "device", &device.facts().arch, "the kernel is for sm_90a; use the CPU kernels");
        }
        if ![64, 128].contains(&d) || dv == 0 || !dv.is_multiple_of(COLUMNS) {
            return bad(
                OP,
                "head_dim",
                format!("{d} and {dv}"),
                "64 or 128, and a multiple of 32; use the CPU kernels",
            );
        }
        let operands = [("q", q, d), ("k", k, d), ("v", v, dv)];
        let mut groups = [1i32; 4];
        for (i, (name, x, width)) in operands.into_iter().enumerate() {
            let s = x.shape();
            if [s[0], s[2], s[3]] != [b, t, width] || s[1] == 0 || !h.is_multiple_of(s[1]) {
                let want = format!("({b}, a divisor of {h}, {t}, {width})");
                return bad(OP, name, format!("{s:?}"), &format!("make its shape {want}"));
            }
            if x.layout.dtype != out.layout.dtype {
                return bad(OP, "dtype", format!("{:?} of {name}", x.layout.dtype), "use one type for all");
            }
            if !x.layout.aligned() || !out.layout.aligned() {
                return bad(OP, "alignment", name, "rows at multiples of 16 bytes");
            }
            groups[i] = (h / s[1]) as i32;
        }
        let mut g_steps = [0; 3];
        if let Gate::Scalar { g, heads } = self.gate {
            if heads == 0 || !h.is_multiple_of(heads) || g.len() != b * heads * t {
                let want = format!("{b} x a divisor of {h} x {t}");
                return bad(OP, "g", format!("{} elements, {heads} heads", g.len()), &want);
            }
            groups[3] = (h / heads) as i32;
            g_steps = [(heads * t) as i64, t as i64, 1];
        }
        let states = b * h * d * dv;
        for (name, len) in [("initial", initial.map(CudaSlice::len)), ("last", last.as_ref().map(|s| s.len()))] {
            if len.is_some_and(|n| n != states) {
                return bad(OP, name, format!("{len:?}"), &format!("give {states} elements"));
            }
        }
        let decay = matches!(self.gate, Gate::Scalar { .. });
        let work = work([b, h, t], d, dv, decay, initial.is_some());
        let stream = device.stream();
        if b * h == 0 || t == 0 {
            if let Some(last) = last
                && states > 0
            {
                let said = match initial {
                    Some(initial) => stream.memcpy_dtod(initial, last),
                    None => stream.memset_zeros(last),
                };
                crate::error::During::during(said, "passing the state on")?;
            }
            return Ok(work);
        }
        let parts = dv / COLUMNS;
        let cluster = self.cluster.unwrap_or(1);
        if ![1, 2, 4].contains(&cluster) || !parts.is_multiple_of(cluster) {
            return bad(OP, "cluster", cluster, "1, 2 or 4, and a divisor of dv / 32");
        }
        let spec = Spec::recur_sm90()
            .with("D", d)
            .with("CLUSTER", cluster)
            .flag("DECAY", decay)
            .flag("F16", out.layout.dtype == Dtype::F16);
        let kernel = device.prepare(&spec, OP)?;
        let maps = [
            q.layout.map("q", 64, CHUNK / cluster)?,
            k.layout.map("k", 64, CHUNK / cluster)?,
            v.layout.map("v", COLUMNS, CHUNK)?,
        ];
        let params = Params {
            out: out.layout.at,
            g: match self.gate {
                Gate::Scalar { g, .. } => g.device_ptr(stream).0,
                Gate::Identity => 0,
            },
            initial: initial.map_or(0, |s| s.device_ptr(stream).0),
            last: last.map_or(0, |s| s.device_ptr_mut(stream).0),
            g_steps,
            o_steps: out.layout.steps(),
            heads: h as i32,
            groups,
            t: t as i32,
            dv: dv as i32,
            chunks: t.div_ceil(CHUNK) as i32,
            scale: self.scale,
        };
        let stage = CHUNK * 2 * (2 * d + COLUMNS);
        let shared = 1024 + STAGES * stage + 2 * d * COLUMNS * 2 + 2 * CHUNK * COLUMNS * 2;
        let at = Launch { blocks: [b * h * parts, 1], threads: 512, shared };
        let mut args = [arg(&maps[0]), arg(&maps[1]), arg(&maps[2]), arg(&params)];
        // SAFETY: parameters as the kernel declares them; all views and states were checked against their memory.
        unsafe { device.launch(OP, &kernel, at, &mut args) }?;
        Ok(work)
    }
}
