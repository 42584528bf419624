//! Few queries over many keys, split over keys with an equal share for every warp of the device, then merged
//! (`kernels/decode.cu`). The semantics of [`foveal_kernels::decode::Decode`], for stores that are one tensor each.

use crate::compile::Spec;
use crate::device::{Device, Launch, arg};
use crate::error::{CudaError, Result, bad};
use crate::tensor::{Dtype, Tensor, TensorMut};
use cudarc::driver::{CudaFunction, CudaSlice, DevicePtr, DevicePtrMut};
use foveal_kernels::{KernelError, Work};

const OP: &str = "decode";
/// Keys of a unit of work, of 16-bit rows and of int8 rows.
const KEYS: [usize; 2] = [16, 32];
/// Rows (heads of a group times queries) that one pass over the keys serves.
const ROWS: usize = 16;
/// Warps of a block, and blocks that a multiprocessor holds.
const WARPS: usize = 4;
const BLOCKS: usize = 2;
/// Fewest units of a worker: what it leaves to be merged costs as much as reading a few.
const SHARE: usize = 8;

/// Keys and values of all sequences, (B, Hkv, room, D) and (B, Hkv, room, Dv).
#[derive(Clone, Copy, Debug)]
pub enum Store<'a> {
    /// bf16 or f16, as the queries.
    Half {
        /// Keys.
        k: Tensor<'a>,
        /// Values.
        v: Tensor<'a>,
    },
    /// int8 rows with one f32 scale a row, x ≈ scale · q, all contiguous.
    Int8 {
        /// Keys.
        k: &'a CudaSlice<i8>,
        /// Values.
        v: &'a CudaSlice<i8>,
        /// (B, Hkv, room).
        k_scales: &'a CudaSlice<f32>,
        /// (B, Hkv, room).
        v_scales: &'a CudaSlice<f32>,
        /// (B, Hkv, room, D).
        shape: [usize; 4],
        /// Channels of the values.
        dv: usize,
    },
}

impl Store<'_> {
    fn shape(&self) -> [usize; 4] {
        match self {
            Store::Half { k, .. } => k.shape(),
            Store::Int8 { shape, .. } => *shape,
        }
    }

    fn dv(&self) -> usize {
        match self {
            Store::Half { v, .. } => v.shape()[3],
            Store::Int8 { dv, .. } => *dv,
        }
    }

    /// Bytes of a token of one head, scales among them.
    fn token_bytes(&self) -> usize {
        let width = self.shape()[3] + self.dv();
        match self {
            Store::Half { .. } => 2 * width,
            Store::Int8 { .. } => width + 8,
        }
    }
}

/// One decode call.
#[derive(Clone, Copy, Debug)]
pub struct Decode {
    /// Factor on q·k.
    pub scale: f32,
    /// `cap * tanh(s / cap)` on the scaled score.
    pub softcap: Option<f32>,
}

/// A call made ready for its lengths. May run many times, on operands of the same shapes.
#[derive(Debug)]
pub struct Plan {
    call: Decode,
    work: Work,
    kernels: [CudaFunction; 2],
    units: CudaSlice<i64>,
    lens: CudaSlice<i32>,
    part: CudaSlice<f32>,
    part_lse: CudaSlice<f32>,
    workers: usize,
    row_tiles: usize,
    /// Shape of q, of the store, channels of the values, whether int8.
    of: ([usize; 4], [usize; 4], usize, bool),
}

#[repr(C)]
struct Params {
    q: u64,
    k: u64,
    v: u64,
    scales: [u64; 2],
    units: u64,
    lens: u64,
    part: u64,
    part_lse: u64,
    out: u64,
    lse: u64,
    q_steps: [i64; 3],
    k_steps: [i64; 3],
    v_steps: [i64; 3],
    s_steps: [i64; 2],
    o_steps: [i64; 3],
    segments: i32,
    kv_heads: i32,
    group: i32,
    n: i32,
    workers: i32,
    row_tiles: i32,
    scale: f32,
    cap: f32,
}

/// Units before each (sequence, key head), and all of them.
fn units(lens: &[usize], kv_heads: usize, keys: usize) -> Vec<i64> {
    let each = lens.iter().flat_map(|&n| std::iter::repeat_n(n.div_ceil(keys) as i64, kv_heads));
    std::iter::once(0)
        .chain(each.scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        }))
        .collect()
}

impl Decode {
    /// Plain softmax decode.
    pub fn new(scale: f32) -> Self {
        Self { scale, softcap: None }
    }

    /// Work of a call: each row of keys and values counts once for all the queries that share it, as on the CPU.
    fn work(&self, q: [usize; 4], store: &Store, lens: &[usize]) -> Work {
        let ([_, h, n, d], [_, kv, ..]) = (q, store.shape());
        let keys = lens.iter().sum::<usize>();
        let pairs = (keys * h * n) as u64;
        Work {
            flops: 2 * pairs * (d + store.dv()) as u64,
            bytes: (keys * kv * store.token_bytes()) as u64,
            tiles: (lens.iter().filter(|&&n| n > 0).count() * kv) as u64,
            pairs,
            fallback: 0,
        }
    }

    /// Make ready a call on operands like these; sequence i has `lens[i]` keys.
    ///
    /// Errors: widths other than 64 and 128; more keys than the store has room for; heads that do not divide.
    pub fn plan(&self, device: &Device, q: &Tensor, store: &Store, lens: &[usize]) -> Result<Plan> {
        let ([b, h, n, d], [bk, kv, room, dk], dv) = (q.shape(), store.shape(), store.dv());
        let same = |dim, left, a, right, b| {
            if a == b {
                return Ok(());
            }
            Err(CudaError::from(KernelError::Mismatch { op: OP, dim, left, left_len: a, right, right_len: b }))
        };
        same("batch", "q", b, "k", bk)?;
        same("batch", "q", b, "lengths", lens.len())?;
        same("head_dim", "q", d, "k", dk)?;
        if kv == 0 || !h.is_multiple_of(kv) {
            return Err(KernelError::Groups { op: OP, heads: h, kv_heads: kv }.into());
        }
        if ![64, 128].contains(&d) || ![64, 128].contains(&dv) {
            return bad(OP, "head_dim", format!("{d} and {dv}"), "the CUDA kernel serves 64 and 128; use attend");
        }
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            return bad(OP, "scale", self.scale, "use a positive factor");
        }
        if let Some(cap) = self.softcap
            && (cap.is_nan() || cap <= 0.0)
        {
            return bad(OP, "softcap", cap, "use a positive cap, or none");
        }
        if let Some(&long) = lens.iter().find(|&&l| l > room) {
            return bad(OP, "lengths", long, &format!("the store has room for {room}"));
        }
        match store {
            Store::Half { k, v } => {
                let [vb, vh, vt, _] = v.shape();
                same("batch", "k", bk, "v", vb)?;
                same("heads", "k", kv, "v", vh)?;
                same("tokens", "k", room, "v", vt)?;
                if k.layout.dtype != q.layout.dtype || v.layout.dtype != q.layout.dtype {
                    return bad(OP, "dtype", format!("{:?}", k.layout.dtype), "use that of q");
                }
                if b * kv * room > 0 && !(k.layout.aligned() && v.layout.aligned()) {
                    return bad(OP, "alignment", format!("{:?}", k.layout.strides), "rows at multiples of 16 bytes");
                }
            }
            Store::Int8 { k, v, k_scales, v_scales, .. } => {
                let rows = b * kv * room;
                same("elements", "k", k.len().min(rows * d), "store", rows * d)?;
                same("elements", "v", v.len().min(rows * dv), "store", rows * dv)?;
                same("scales", "k", k_scales.len().min(rows), "store", rows)?;
                same("scales", "v", v_scales.len().min(rows), "store", rows)?;
            }
        }
        let int8 = matches!(store, Store::Int8 { .. });
        let spec = Spec::decode()
            .with("D", d)
            .with("DV", dv)
            .flag("INT8", int8)
            .flag("SOFTCAP", self.softcap.is_some())
            .flag("F16", q.layout.dtype == Dtype::F16);
        let units = units(lens, kv, KEYS[usize::from(int8)]);
        let all = *units.last().unwrap_or(&0) as usize;
        let row_tiles = (h / kv * n).div_ceil(ROWS);
        let most = device.facts().multiprocessors * BLOCKS * WARPS;
        let workers = all.div_ceil(SHARE).clamp(1, most);
        let slots = (workers + units.len()) * row_tiles * ROWS;
        Ok(Plan {
            call: *self,
            work: self.work(q.shape(), store, lens),
            kernels: [device.prepare(&spec, "decode")?, device.prepare(&spec, "merge")?],
            units: device.upload(&units)?,
            lens: device.upload(&lens.iter().map(|&n| n as i32).collect::<Vec<_>>())?,
            part: device.scratch(slots * dv)?,
            part_lse: device.scratch(slots)?,
            workers,
            row_tiles,
            of: (q.shape(), store.shape(), dv, int8),
        })
    }

    /// Run: queries (B, H, n, D) over `lens[i]` keys of sequence i, causal bottom-right among the n queries, into out
    /// (B, H, n, Dv) and, if given, `lse` (B, H, n contiguous).
    pub fn run(
        &self,
        device: &Device,
        q: &Tensor,
        store: &Store,
        lens: &[usize],
        out: &mut TensorMut,
        lse: Option<&mut CudaSlice<f32>>,
    ) -> Result<Work> {
        self.plan(device, q, store, lens)?.run(device, q, store, out, lse)
    }
}

impl Plan {
    /// Run on operands of the shapes it was made for; see [`Decode::run`].
    pub fn run(
        &mut self,
        device: &Device,
        q: &Tensor,
        store: &Store,
        out: &mut TensorMut,
        lse: Option<&mut CudaSlice<f32>>,
    ) -> Result<Work> {
        let (shape, dv) = (q.shape(), store.dv());
        let now = (shape, store.shape(), dv, matches!(store, Store::Int8 { .. }));
        if now != self.of || out.layout.dtype != q.layout.dtype {
            return bad(OP, "operands", format!("{now:?}"), &format!("the plan is for {:?}", self.of));
        }
        let [b, h, n, d] = shape;
        if out.layout.shape != [b, h, n, dv] {
            return bad(OP, "out", format!("{:?}", out.layout.shape), &format!("make it {:?}", [b, h, n, dv]));
        }
        if let Some(lse) = &lse
            && lse.len() < b * h * n
        {
            return bad(OP, "lse", lse.len(), &format!("give {} elements", b * h * n));
        }
        if b * h * n == 0 {
            return Ok(self.work);
        }
        let [_, kv, room, _] = store.shape();
        let stream = device.stream();
        let bytes = |t: &Tensor| t.layout.strides.map(|s| 2 * s as i64);
        let (k, v, scales, k_steps, v_steps) = match store {
            Store::Half { k, v } => (k.layout.at, v.layout.at, [0; 2], bytes(k), bytes(v)),
            Store::Int8 { k, v, k_scales, v_scales, .. } => {
                let steps = |d: usize| [kv * room * d, room * d, d].map(|s| s as i64);
                let scales = [k_scales.device_ptr(stream).0, v_scales.device_ptr(stream).0];
                (k.device_ptr(stream).0, v.device_ptr(stream).0, scales, steps(d), steps(dv))
            }
        };
        let params = Params {
            q: q.layout.at,
            k,
            v,
            scales,
            units: self.units.device_ptr(stream).0,
            lens: self.lens.device_ptr(stream).0,
            part: self.part.device_ptr(stream).0,
            part_lse: self.part_lse.device_ptr(stream).0,
            out: out.layout.at,
            lse: lse.map_or(0, |l| l.device_ptr_mut(stream).0),
            q_steps: q.layout.steps(),
            k_steps,
            v_steps,
            s_steps: [(kv * room) as i64, room as i64],
            o_steps: out.layout.steps(),
            segments: (b * kv) as i32,
            kv_heads: kv as i32,
            group: (h / kv) as i32,
            n: n as i32,
            workers: self.workers as i32,
            row_tiles: self.row_tiles as i32,
            scale: self.call.scale,
            cap: self.call.softcap.unwrap_or(0.0),
        };
        let stage = match store {
            Store::Half { .. } => 3 * KEYS[0] * 2 * (d + dv),
            Store::Int8 { .. } => 3 * (KEYS[1] * (d + dv) + 8 * KEYS[1]),
        };
        let at = Launch {
            blocks: [self.workers.div_ceil(WARPS), self.row_tiles],
            threads: 32 * WARPS,
            shared: WARPS * stage,
        };
        // SAFETY: parameters as the kernel declares them; views, lengths and scratch were checked against their memory.
        unsafe { device.launch(OP, &self.kernels[0], at, &mut [arg(&params)]) }?;
        let at = Launch { blocks: [b * kv, h / kv * n], threads: dv, shared: 0 };
        // SAFETY: as above.
        unsafe { device.launch("merge", &self.kernels[1], at, &mut [arg(&params)]) }?;
        Ok(self.work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_end_to_end() {
        assert_eq!(units(&[1, 0, 33], 2, 16), [0, 1, 2, 2, 2, 5, 8]);
        assert_eq!(units(&[], 2, 16), [0]);
    }
}
