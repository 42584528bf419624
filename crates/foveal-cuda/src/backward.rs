//! Gradients of exact attention on Hopper (`kernels/attend_backward_sm90.cu`), dense, causal or banded; other devices,
//! widths, tables and softcaps are refused: the CPU kernels have them.

use crate::attend::Attend;
use crate::compile::Spec;
use crate::device::{Device, Launch, arg};
use crate::error::{During, Result, bad};
use crate::tensor::{Dtype, Tensor, TensorMut};
use cudarc::driver::{CudaFunction, CudaSlice, DevicePtr};
use foveal_kernels::Work;

const OP: &str = "attend_backward";
/// Queries and keys of a tile.
const QUERIES: usize = 64;
const KEYS: usize = 128;

/// What a forward call read and gave, and the gradients that come in.
#[derive(Clone, Copy, Debug)]
pub struct Upstream<'a> {
    /// (B, H, Tq, D).
    pub q: Tensor<'a>,
    /// (B, Hkv, Tk, D).
    pub k: Tensor<'a>,
    /// (B, Hkv, Tk, D).
    pub v: Tensor<'a>,
    /// (B, H, Tq, D).
    pub out: Tensor<'a>,
    /// (B, H, Tq), as the forward call gave it.
    pub lse: &'a CudaSlice<f32>,
    /// Gradient of `out`.
    pub dout: Tensor<'a>,
    /// Gradient of `lse`, if it has one.
    pub dlse: Option<&'a CudaSlice<f32>>,
}

/// Scratch memory and kernels for calls of one shape.
#[derive(Debug)]
pub struct Plan {
    kernels: [CudaFunction; 3],
    rows: [CudaSlice<f32>; 2],
    sums: CudaSlice<f32>,
    work: Work,
    band: [i32; 2],
    scale: f32,
    /// Shapes of q and k.
    of: [[usize; 4]; 2],
    dtype: Dtype,
}

#[repr(C)]
struct Params {
    grads: [u64; 3],
    rows: [u64; 2],
    sums: u64,
    out: u64,
    dout: u64,
    lse: u64,
    dlse: u64,
    steps: [[i64; 3]; 5],
    batch: i32,
    heads: i32,
    kv_heads: i32,
    tq: i32,
    tk: i32,
    q_tiles: i32,
    left: i32,
    right: i32,
    scale: f32,
}

impl Attend<'_> {
    /// Make gradients of this call ready, for operands like these.
    ///
    /// Errors: anything but Hopper, D = Dv = 64 or 128, rows at multiples of 16 bytes, no table and no softcap.
    pub fn plan_backward(&self, device: &Device, up: &Upstream) -> Result<Plan> {
        let (q, k) = (up.q.shape(), up.k.shape());
        let s = self.shape_of(&up.q, &up.k, &up.v)?;
        let refuse = |name, value: String, remedy| bad(OP, name, value, remedy);
        if !device.facts().hopper() {
            return refuse("device", device.facts().arch.clone(), "the kernel is for sm_90a; use the CPU kernels");
        }
        if ![64, 128].contains(&s.d) || s.dv != s.d {
            return refuse("head_dim", format!("{} and {}", s.d, s.dv), "64 or 128 for both; use the CPU kernels");
        }
        if self.table.is_some() || self.softcap.is_some() || self.sinks.is_some() {
            return refuse("table, softcap or sinks", "given".into(), "the CUDA kernel has none; use the CPU kernels");
        }
        let mut work = self.work(&s)?;
        // As the CPU counts: rows of k and v, sums for their gradients in and out; rows of queries likewise.
        let rows = (s.batch * s.heads * s.tq) as u64;
        let (d, keys) = (s.d as u64, work.bytes / 4 / (s.d.max(1) as u64) - rows);
        work.flops = 2 * work.pairs * 5 * d;
        work.bytes = keys * 2 * d * 10 + rows * d * 14;
        let spec = Spec::attend_backward_sm90()
            .with("D", s.d)
            .flag("MASK", self.causal || self.band.is_some())
            .flag("F16", up.q.layout.dtype == Dtype::F16);
        let padded = s.batch * s.heads * s.tq.div_ceil(QUERIES) * QUERIES;
        let band = self.reach();
        Ok(Plan {
            kernels: [
                device.prepare(&spec, "prepare")?,
                device.prepare(&spec, "backward")?,
                device.prepare(&spec, "finish")?,
            ],
            rows: [device.scratch(padded)?, device.scratch(padded)?],
            sums: device.scratch(padded * s.d)?,
            work,
            band: [band.left as i32, band.right as i32],
            scale: self.scale,
            of: [q, k],
            dtype: up.q.layout.dtype,
        })
    }

    /// Gradients of Σ out · dout + Σ lse · dlse into dq (as q), dk and dv (as k and v). The order in which the sums of
    /// dq are made varies from run to run.
    pub fn backward(
        &self,
        device: &Device,
        up: &Upstream,
        dq: &mut TensorMut,
        dk: &mut TensorMut,
        dv: &mut TensorMut,
    ) -> Result<Work> {
        self.plan_backward(device, up)?.run(device, up, dq, dk, dv)
    }
}

impl Plan {
    /// Run on operands of the shapes it was made for; see [`Attend::backward`].
    pub fn run(
        &mut self,
        device: &Device,
        up: &Upstream,
        dq: &mut TensorMut,
        dk: &mut TensorMut,
        dv: &mut TensorMut,
    ) -> Result<Work> {
        let [q, k] = self.of;
        let inputs = [("q", &up.q, q), ("k", &up.k, k), ("v", &up.v, k), ("out", &up.out, q), ("dout", &up.dout, q)];
        let layouts = inputs.iter().map(|(n, t, s)| (*n, t.layout, *s));
        let outputs = [("dq", dq.layout, q), ("dk", dk.layout, k), ("dv", dv.layout, k)];
        for (name, layout, shape) in layouts.chain(outputs) {
            if layout.shape != shape || layout.dtype != self.dtype {
                let value = format!("{:?} of {:?}", layout.shape, layout.dtype);
                return bad(OP, name, value, &format!("make it {shape:?} of {:?}", self.dtype));
            }
            if !layout.aligned() {
                return bad(OP, "alignment", name, "rows at multiples of 16 bytes");
            }
        }
        let ([b, h, tq, d], [_, kv, tk, _]) = (q, k);
        for (name, x) in [("lse", Some(up.lse)), ("dlse", up.dlse)] {
            if x.is_some_and(|x| x.len() < b * h * tq) {
                return bad(OP, name, "too short", &format!("give {} elements", b * h * tq));
            }
        }
        let stream = device.stream();
        let q_tiles = tq.div_ceil(QUERIES);
        let params = Params {
            grads: [dk.layout.at, dv.layout.at, dq.layout.at],
            rows: [self.rows[0].device_ptr(stream).0, self.rows[1].device_ptr(stream).0],
            sums: self.sums.device_ptr(stream).0,
            out: up.out.layout.at,
            dout: up.dout.layout.at,
            lse: up.lse.device_ptr(stream).0,
            dlse: up.dlse.map_or(0, |x| x.device_ptr(stream).0),
            steps: [dk.layout, dv.layout, dq.layout, up.out.layout, up.dout.layout].map(|l| l.steps()),
            batch: b as i32,
            heads: h as i32,
            kv_heads: kv as i32,
            tq: tq as i32,
            tk: tk as i32,
            q_tiles: q_tiles as i32,
            left: self.band[0],
            right: self.band[1],
            scale: self.scale,
        };
        stream.memset_zeros(&mut self.sums).during("clearing the sums of dq")?;
        let rows = b * h * q_tiles * QUERIES;
        let at = |blocks, threads, shared| Launch { blocks: [blocks, 1], threads, shared };
        // SAFETY: parameters as the kernels declare them; all views and rows were checked against their memory.
        unsafe { device.launch("prepare", &self.kernels[0], at(rows.div_ceil(8), 256, 0), &mut [arg(&params)]) }?;
        if tk * kv * b > 0 {
            let [one, two] = [QUERIES, KEYS];
            // Nothing has no map; where there are no queries none is read.
            let [q, dout] = [up.q.layout, up.dout.layout].map(|l| if rows > 0 { l } else { up.k.layout });
            let maps = [
                q.map("q", 64, one)?,
                up.k.layout.map("k", 64, two)?,
                up.v.layout.map("v", 64, two)?,
                dout.map("dout", 64, one)?,
            ];
            let shared = 1024 + 2 * d * (2 * two + 4 * one) + 2 * two * 128 + 4 * d * one;
            let mut args = [arg(&maps[0]), arg(&maps[1]), arg(&maps[2]), arg(&maps[3]), arg(&params)];
            let launch = at(b * kv * tk.div_ceil(KEYS), 384, shared);
            // SAFETY: as above.
            unsafe { device.launch(OP, &self.kernels[1], launch, &mut args) }?;
        }
        // SAFETY: as above.
        unsafe { device.launch("finish", &self.kernels[2], at(b * h * q_tiles, 256, 0), &mut [arg(&params)]) }?;
        Ok(self.work)
    }
}
