//! Linear recurrences, forward: the semantics of [`foveal_kernels::recur::Recur`] for the identity, scalar decays and the
//! delta rule with and without them, on Hopper (`kernels/recur_sm90.cu`, `kernels/recur_delta.cu`). Other gates and
//! devices are refused: the CPU kernels have them.

use crate::compile::Spec;
use crate::device::{Device, Launch, arg};
use crate::error::{Result, bad};
use crate::tensor::{Dtype, Layout, Tensor, TensorMut};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use foveal_kernels::Work;

const OP: &str = "recur";
/// Tokens of a chunk.
const CHUNK: usize = 64;
/// Value channels of a block.
const COLUMNS: usize = 32;
/// Chunks that a block holds.
const STAGES: usize = 4;

/// One number a token: (B, heads, T) contiguous, `heads` a divisor of those of the output.
#[derive(Clone, Copy, Debug)]
pub struct Rate<'a> {
    /// The numbers.
    pub data: &'a CudaSlice<f32>,
    /// Their heads.
    pub heads: usize,
}

/// The transition. Operands may have any number of heads that divides that of the output.
#[derive(Clone, Copy, Debug)]
pub enum Gate<'a> {
    /// S_t = S_{t−1} + k vᵀ.
    Identity,
    /// S_t = e^g S_{t−1} + k vᵀ, g ≤ 0.
    Scalar {
        /// Log decays.
        g: Rate<'a>,
    },
    /// S_t = (I − β k kᵀ) S_{t−1} + β k vᵀ.
    Delta {
        /// Strength of writing.
        beta: Rate<'a>,
    },
    /// S_t = e^g (I − β k kᵀ) S_{t−1} + β k vᵀ, g ≤ 0.
    GatedDelta {
        /// Log decays.
        g: Rate<'a>,
        /// Strength of writing.
        beta: Rate<'a>,
    },
}

impl<'a> Gate<'a> {
    fn g(&self) -> Option<Rate<'a>> {
        match *self {
            Gate::Scalar { g } | Gate::GatedDelta { g, .. } => Some(g),
            Gate::Identity | Gate::Delta { .. } => None,
        }
    }

    fn beta(&self) -> Option<Rate<'a>> {
        match *self {
            Gate::Delta { beta } | Gate::GatedDelta { beta, .. } => Some(beta),
            Gate::Identity | Gate::Scalar { .. } => None,
        }
    }
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

#[repr(C)]
struct Systems {
    t: u64,
    k: u64,
    g: u64,
    beta: u64,
    k_steps: [i64; 3],
    g_steps: [i64; 2],
    beta_steps: [i64; 2],
    heads: i32,
    groups: [i32; 3],
    tokens: i32,
    chunks: i32,
}

/// Work of a call with or without decays and the delta rule, from a given state or not: that of the CPU's chunks of 64,
/// with outputs of 16 bits.
pub fn work([b, h, t]: [usize; 3], d: usize, dv: usize, [decay, delta]: [bool; 2], initial: bool) -> Work {
    let mut sum = Work::default();
    let width = u64::from(decay) + u64::from(delta);
    for from in (0..t).step_by(CHUNK) {
        let n = (t - from).min(CHUNK) as u64;
        let (d, dv, pairs, strict) = (d as u64, dv as u64, n * (n + 1) / 2, n * (n - 1) / 2);
        let mut one = Work {
            flops: 2 * d * pairs + 4 * n * d * dv + 2 * pairs * dv,
            bytes: n * (2 * (2 * d + dv) + 4 * width + 2 * dv),
            tiles: 1,
            pairs,
            fallback: 0,
        };
        if delta {
            // Pairs of keys, what the state says at each, and the system.
            one.flops += 2 * d * strict + 2 * n * d * dv + 2 * strict * dv;
            one.pairs += strict;
        }
        sum += one;
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
        let rate = |name, r: Option<Rate>| match r {
            Some(r) if r.heads == 0 || !h.is_multiple_of(r.heads) || r.data.len() != b * r.heads * t => {
                let want = format!("{b} x a divisor of {h} x {t}");
                bad(OP, name, format!("{} elements, {} heads", r.data.len(), r.heads), &want)
            }
            Some(r) => Ok((r.data.device_ptr(device.stream()).0, [r.heads * t, t], h / r.heads)),
            None => Ok((0, [0, 0], 1)),
        };
        let (g, g_steps, g_group) = rate("g", self.gate.g())?;
        let (beta, beta_steps, beta_group) = rate("beta", self.gate.beta())?;
        groups[3] = g_group as i32;
        let states = b * h * d * dv;
        for (name, len) in [("initial", initial.map(CudaSlice::len)), ("last", last.as_ref().map(|s| s.len()))] {
            if len.is_some_and(|n| n != states) {
                return bad(OP, name, format!("{len:?}"), &format!("give {states} elements"));
            }
        }
        let (decay, delta) = (self.gate.g().is_some(), self.gate.beta().is_some());
        let work = work([b, h, t], d, dv, [decay, delta], initial.is_some());
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
            .flag("DELTA", delta)
            .flag("F16", out.layout.dtype == Dtype::F16);
        let kernel = device.prepare(&spec, OP)?;
        let chunks = t.div_ceil(CHUNK);
        let steps = |s: [usize; 2]| s.map(|x| x as i64);
        let systems = if delta { Some(device.uninit::<u16>(b * h * chunks * CHUNK * CHUNK)?) } else { None };
        let at = systems.as_ref().map_or(0, |s| s.device_ptr(stream).0);
        if delta {
            let spec =
                Spec::recur_delta().with("D", d).flag("DECAY", decay).flag("F16", out.layout.dtype == Dtype::F16);
            let params = Systems {
                t: at,
                k: k.layout.at,
                g,
                beta,
                k_steps: k.layout.steps(),
                g_steps: steps(g_steps),
                beta_steps: steps(beta_steps),
                heads: h as i32,
                groups: [groups[1], g_group as i32, beta_group as i32],
                tokens: t as i32,
                chunks: chunks as i32,
            };
            let launch = Launch { blocks: [b * h * chunks, 1], threads: 128, shared: 0 };
            // SAFETY: parameters as the kernel declares them; k and the rates were checked against their memory.
            unsafe { device.launch("recur_delta", &device.prepare(&spec, "solve")?, launch, &mut [arg(&params)]) }?;
        }
        let maps = [
            q.layout.map("q", 64, CHUNK / cluster)?,
            k.layout.map("k", 64, CHUNK / cluster)?,
            v.layout.map("v", COLUMNS, CHUNK)?,
        ];
        let params = Params {
            out: out.layout.at,
            g,
            initial: initial.map_or(0, |s| s.device_ptr(stream).0),
            last: last.map_or(0, |s| s.device_ptr_mut(stream).0),
            g_steps: [g_steps[0] as i64, g_steps[1] as i64, 1],
            o_steps: out.layout.steps(),
            heads: h as i32,
            groups,
            t: t as i32,
            dv: dv as i32,
            chunks: chunks as i32,
            scale: self.scale,
        };
        let stage = CHUNK * 2 * (2 * d + COLUMNS + if delta { CHUNK } else { 0 });
        let tile = CHUNK * COLUMNS * 2;
        let shared = 1024 + STAGES * stage + 2 * d * COLUMNS * 2 + tile * if delta { 5 } else { STAGES };
        let at_blocks = Launch { blocks: [b * h * parts, 1], threads: 512, shared };
        let whole = [b, h, chunks * CHUNK, CHUNK];
        let strides = [h * chunks * CHUNK * CHUNK, chunks * CHUNK * CHUNK, CHUNK];
        let map_t = Layout { at, dtype: out.layout.dtype, shape: whole, strides };
        let map_t = if delta { Some(map_t.map("T", CHUNK, CHUNK)?) } else { None };
        let mut args = vec![arg(&maps[0]), arg(&maps[1]), arg(&maps[2])];
        args.extend(map_t.as_ref().map(arg));
        args.push(arg(&params));
        // SAFETY: parameters as the kernel declares them; all views and states were checked against their memory.
        unsafe { device.launch(OP, &kernel, at_blocks, &mut args) }?;
        Ok(work)
    }
}
