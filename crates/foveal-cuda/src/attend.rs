//! Exact attention, dense or over a block table: the semantics of [`foveal_kernels::Attend`] on device memory.
//!
//! Three kernels serve it: `attend_sm90` (Hopper, aligned rows), `attend_sm80` (any width up to 256, any alignment), and
//! `attend_rows` (block sizes that the tiles of the others do not divide, row masks). [`Done::path`] says which.

use crate::compile::Spec;
use crate::device::{Device, Launch, arg};
use crate::error::{Result, bad};
use crate::tensor::{Dtype, Layout, Tensor, TensorMut};
use cudarc::driver::{CudaFunction, CudaSlice, DevicePtr, DevicePtrMut};
use foveal_kernels::{Band, BlockTable, KernelError, Work};
use std::marker::PhantomData;
use std::ops::Range;

const OP: &str = "attend";
/// Larger than any distance between a query and a key.
const FAR: usize = 1 << 30;
/// Queries of a work tile, as on the CPU.
const WORK_TILE: usize = 64;

/// Parameters of one attention call. Build with [`Attend::new`] and the chained setters.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// Factor on q·k.
    pub scale: f32,
    /// Query i of n sees keys up to m − n + i (bottom-right).
    pub causal: bool,
    /// Only keys near the query; with `causal` those of them that are not later.
    pub band: Option<Band>,
    /// `cap * tanh(s / cap)` on the scaled score.
    pub softcap: Option<f32>,
    /// One logit per query head added to the denominator only, on the device.
    pub sinks: Option<&'a CudaSlice<f32>>,
    /// Visit only these blocks; one table a (batch, query head).
    pub table: Option<&'a BlockTable>,
    /// Which kernel, and with what tiles; `None` chooses.
    pub path: Option<Path>,
}

/// Which kernel serves a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// TMA and wgmma, tiles of 128 queries by `keys`; whether the two warpgroups take turns on the tensor cores.
    Hopper {
        /// Keys of a tile, a multiple of 16.
        keys: usize,
        /// Taking turns.
        turns: bool,
    },
    /// mma.sync, tiles of 64 by 64.
    Warps,
    /// A warp a query.
    Rows,
}

/// What a call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Counted as on the CPU, with 16-bit outputs; `fallback` is all of it where a slower kernel than the device's
    /// best served.
    pub work: Work,
    /// The kernel.
    pub path: Path,
}

/// Shapes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Queries.
    pub tq: usize,
    /// Keys.
    pub tk: usize,
    /// Channels of q and k.
    pub d: usize,
    /// Channels of v and the output.
    pub dv: usize,
}

/// A call made ready for its shapes: kernel loaded, tables on the device. May run many times.
#[derive(Debug)]
pub struct Plan<'a> {
    shape: Shape,
    dtype: Dtype,
    aligned: bool,
    done: Done,
    kernel: CudaFunction,
    scale: f32,
    cap: f32,
    band: [i32; 2],
    table: Option<Blocks>,
    counter: CudaSlice<i32>,
    /// Where the sinks are, which the call that made the plan borrows.
    sinks: u64,
    life: PhantomData<&'a ()>,
}

/// A block table on the device, in the kernel's tiles or (for `attend_rows`) as it came.
#[derive(Debug)]
struct Blocks {
    indptr: CudaSlice<i32>,
    tiles: CudaSlice<i32>,
    masks: Option<CudaSlice<u64>>,
    block: [i32; 2],
    q_tiles: usize,
}

#[repr(C)]
struct Params {
    out: u64,
    lse: u64,
    sinks: u64,
    indptr: u64,
    tiles: u64,
    counter: u64,
    out_steps: [i64; 3],
    batch: i32,
    heads: i32,
    group: i32,
    tq: i32,
    tk: i32,
    q_tiles: i32,
    left: i32,
    right: i32,
    scale: f32,
    cap: f32,
}

#[repr(C)]
struct Source {
    at: [u64; 3],
    steps: [[i64; 3]; 3],
    d: i32,
    dv: i32,
}

#[repr(C)]
struct RowBlocks {
    masks: u64,
    block_q: i32,
    block_k: i32,
    table: i32,
}

impl Path {
    /// Queries and keys of a tile.
    fn tile(self) -> [usize; 2] {
        match self {
            Path::Hopper { keys, .. } => [128, keys],
            Path::Warps => [64, 64],
            Path::Rows => [1, 1],
        }
    }

    /// The kernel for a call of these widths. `masked`: causality or a band; `aligned`: see `Layout::aligned`.
    pub(crate) fn spec(self, s: &Shape, dtype: Dtype, masked: bool, table: bool, softcap: bool, aligned: bool) -> Spec {
        let spec = match self {
            Path::Hopper { keys, turns } => {
                Spec::attend_sm90().with("D", s.d).with("DV", s.dv).with("BN", keys).with("PINGPONG", i32::from(turns))
            }
            Path::Warps => Spec::attend_sm80().with("D", wide(s.d)).with("DV", wide(s.dv)).flag("ALIGNED", aligned),
            Path::Rows => return Spec::attend_rows().flag("F16", dtype == Dtype::F16),
        };
        spec.flag("MASK", masked).flag("TABLE", table).flag("SOFTCAP", softcap).flag("F16", dtype == Dtype::F16)
    }
}

/// Width that the warps' kernel is compiled for: a power of two, so that a swizzle stays within its row.
fn wide(d: usize) -> usize {
    d.next_power_of_two().max(32)
}

/// Keys of a Hopper tile for these widths, as many as registers and shared memory hold or as were fastest, and whether
/// taking turns paid (`docs/cuda-notes.md`).
pub(crate) fn hopper_tile(s: &Shape, masked: bool, table: Option<&BlockTable>) -> Option<Path> {
    let fits = |d: usize| d.is_multiple_of(16) && (32..=256).contains(&d);
    if !fits(s.d) || !fits(s.dv) {
        return None;
    }
    let widest = s.d.max(s.dv);
    let plain = !masked && table.is_none();
    let (keys, turns) = match (widest, plain) {
        (..=64, true) => (192, true),
        (65..=128, true) => (176, false),
        (..=128, false) => (128, false),
        (129..=192, _) if s.dv <= 128 => (128, false),
        (129..=192, _) => (96, false),
        _ => (80, false),
    };
    let Some(table) = table else { return Some(Path::Hopper { keys, turns }) };
    let whole = |k: usize| table.heads.iter().all(|t| t.block_q % 128 == 0 && t.block_k % k == 0);
    [128, 64].into_iter().find(|&k| k <= keys && whole(k)).map(|keys| Path::Hopper { keys, turns })
}

impl<'a> Attend<'a> {
    /// Dense attention without a mask.
    pub fn new(scale: f32) -> Self {
        Self { scale, causal: false, band: None, softcap: None, sinks: None, table: None, path: None }
    }
    /// Set causality.
    pub fn causal(mut self, on: bool) -> Self {
        self.causal = on;
        self
    }
    /// Set the band.
    pub fn band(mut self, band: Option<Band>) -> Self {
        self.band = band;
        self
    }
    /// Set the band to a window of so many keys in all, the query's own included.
    pub fn window(self, keys: Option<usize>) -> Self {
        self.band(keys.map(Band::window))
    }
    /// Set the softcap.
    pub fn softcap(mut self, cap: Option<f32>) -> Self {
        self.softcap = cap;
        self
    }
    /// Set the sinks.
    pub fn sinks(mut self, sinks: Option<&'a CudaSlice<f32>>) -> Self {
        self.sinks = sinks;
        self
    }
    /// Set the block table.
    pub fn table(mut self, t: Option<&'a BlockTable>) -> Self {
        self.table = t;
        self
    }
    /// Insist on a kernel.
    pub fn path(mut self, path: Option<Path>) -> Self {
        self.path = path;
        self
    }

    pub(crate) fn reach(&self) -> Band {
        let band = self.band.unwrap_or(Band { left: usize::MAX, right: usize::MAX });
        Band { left: band.left.min(FAR), right: if self.causal { 0 } else { band.right.min(FAR) } }
    }

    fn masked(&self) -> bool {
        self.causal || self.band.is_some()
    }

    /// Keys that query `i` may see by causality and band.
    fn visible(&self, s: &Shape, i: usize) -> Range<usize> {
        let (next, band) = (s.tk + i + 1, self.reach());
        next.saturating_sub(band.left + s.tq)..(next + band.right).saturating_sub(s.tq).min(s.tk)
    }

    /// Work of a call of these shapes: the counters of the CPU kernels, but for outputs of 16 bits.
    ///
    /// Errors: a table that does not fit.
    pub fn work(&self, s: &Shape) -> Result<Work> {
        self.check(s)?;
        let mut work = Work::default();
        let mut keys = 0u64;
        let mut count = |run: Range<usize>, seen: &Range<usize>, rows: usize, width: usize| {
            let (lo, hi) = (run.start.max(seen.start), run.end.min(seen.end));
            if lo < hi {
                work.tiles += (hi.div_ceil(width) - lo / width) as u64;
                work.pairs += ((hi - lo) * rows) as u64;
                keys += (hi - lo) as u64;
            }
        };
        let seen = |rows: &Range<usize>| self.visible(s, rows.start).start..self.visible(s, rows.end - 1).end;
        let mut heads = 0;
        match self.table {
            None => {
                for i in (0..s.tq).step_by(WORK_TILE) {
                    let rows = i..(i + WORK_TILE).min(s.tq);
                    count(0..s.tk, &seen(&rows), rows.len(), WORK_TILE);
                }
                heads = (s.batch * s.heads) as u64;
            }
            Some(table) => {
                for t in &table.heads {
                    for (qb, from) in (0..s.tq).step_by(t.block_q).enumerate() {
                        let end = (from + t.block_q).min(s.tq);
                        for i in (from..end).step_by(WORK_TILE) {
                            let rows = i..(i + WORK_TILE).min(end);
                            for (e, &kb) in t.row(qb).iter().enumerate() {
                                let mark = t.rows.as_ref().map_or(u64::MAX, |m| m[t.indptr[qb] + e] >> (i - from));
                                if mark & (u64::MAX >> (64 - rows.len())) != 0 {
                                    let lo = kb as usize * t.block_k;
                                    count(lo..lo + t.block_k, &seen(&rows), rows.len(), t.block_k);
                                }
                            }
                        }
                    }
                }
            }
        }
        let each = heads.max(1);
        let rows = (s.batch * s.heads * s.tq) as u64;
        let width = (s.d + s.dv) as u64;
        Ok(Work {
            flops: 2 * work.pairs * each * width,
            bytes: 2 * (keys * each * width + rows * width),
            tiles: work.tiles * each,
            pairs: work.pairs * each,
            fallback: 0,
        })
    }

    fn check(&self, s: &Shape) -> Result<()> {
        if !self.scale.is_finite() {
            return bad(OP, "scale", self.scale, "use a finite factor");
        }
        if let Some(cap) = self.softcap
            && (cap.is_nan() || cap <= 0.0)
        {
            return bad(OP, "softcap", cap, "use a positive cap, or none");
        }
        if let Some(sinks) = self.sinks {
            same("heads", ("sinks", sinks.len()), ("q", s.heads))?;
        }
        if let Some(t) = self.table {
            same("batch*heads", ("block table", t.heads.len()), ("q", s.batch * s.heads))?;
            t.heads.iter().try_for_each(|t| t.check(s.tq, s.tk))?;
        }
        Ok(())
    }

    /// The best kernel of the device for a call.
    fn choose(&self, device: &Device, s: &Shape, aligned: bool) -> Path {
        // A maximum is taken before the scale, so it must not turn order around. Maps of nothing do not exist.
        let by_tiles = self.scale > 0.0 && s.d.max(s.dv) <= 256;
        if by_tiles
            && aligned
            && s.tk > 0
            && s.batch * s.heads * s.tq > 0
            && device.facts().hopper()
            && self.table.is_none_or(|t| t.heads.iter().all(|t| t.rows.is_none()))
            && let Some(path) = hopper_tile(s, self.masked(), self.table)
        {
            return path;
        }
        let whole = self.table.is_none_or(|t| {
            t.heads.iter().all(|t| t.block_q.is_multiple_of(64) && t.block_k.is_multiple_of(64) && t.rows.is_none())
        });
        if by_tiles && whole { Path::Warps } else { Path::Rows }
    }

    /// Make a call ready. `aligned`: whether all of q, k and v have rows at multiples of 16 bytes.
    fn plan_for(&self, device: &Device, s: Shape, dtype: Dtype, aligned: bool) -> Result<Plan<'a>> {
        let mut work = self.work(&s)?;
        let best = self.choose(device, &s, aligned);
        let path = self.path.unwrap_or(best);
        if s.d.max(s.dv) > 256 {
            return bad(OP, "head_dim", s.d.max(s.dv), "the CUDA kernels serve at most 256; use the CPU kernels");
        }
        let row_masks = self.table.is_some_and(|t| t.heads.iter().any(|t| t.rows.is_some()));
        let (row_masks, path) = (row_masks, if row_masks { Path::Rows } else { path });
        if device.facts().hopper() && !matches!(path, Path::Hopper { .. }) {
            work.fallback = work.flops;
            tracing::debug!("attend: {path:?} serves q {s:?}, aligned {aligned}, row masks {row_masks}");
        }
        let spec = path.spec(&s, dtype, self.masked(), self.table.is_some(), self.softcap.is_some(), aligned);
        let kernel = device.prepare(&spec, OP)?;
        let band = self.reach();
        Ok(Plan {
            shape: s,
            dtype,
            aligned,
            done: Done { work, path },
            kernel,
            scale: self.scale,
            cap: self.softcap.unwrap_or(0.0),
            band: [band.left as i32, band.right as i32],
            table: self.table.map(|t| self.upload(device, &s, t, path)).transpose()?,
            counter: device.zeros(1)?,
            sinks: self.sinks.map_or(0, |s| s.device_ptr(device.stream()).0),
            life: PhantomData,
        })
    }

    /// The table in the kernel's tiles, without those that no query of a tile sees.
    fn upload(&self, device: &Device, s: &Shape, table: &BlockTable, path: Path) -> Result<Blocks> {
        let (mut indptr, mut tiles, mut masks) = (vec![0i32], Vec::new(), Vec::new());
        let [bq, bk] = path.tile();
        let block = table.heads.first().map_or([1, 1], |t| [t.block_q, t.block_k]);
        if path == Path::Rows {
            for t in &table.heads {
                if [t.block_q, t.block_k] != block {
                    return bad(OP, "block size", format!("{}x{}", t.block_q, t.block_k), "one size for all heads");
                }
                for qb in 0..t.indptr.len() - 1 {
                    tiles.extend(t.row(qb).iter().map(|&b| b as i32));
                    indptr.push(tiles.len() as i32);
                }
                masks.extend(t.rows.iter().flatten().copied());
            }
            if !masks.is_empty() && masks.len() != tiles.len() {
                return bad(OP, "row masks", "of some heads", "give them for all heads or none");
            }
        } else {
            for t in &table.heads {
                if t.block_q % bq != 0 || t.block_k % bk != 0 {
                    let value = format!("{}x{}", t.block_q, t.block_k);
                    return bad(OP, "block size", value, &format!("{path:?} needs multiples of {bq}x{bk}"));
                }
                for from in (0..s.tq).step_by(bq) {
                    let last = (from + bq).min(s.tq) - 1;
                    let seen = self.visible(s, from).start..self.visible(s, last).end;
                    for &kb in t.row(from / t.block_q) {
                        let lo = kb as usize * t.block_k;
                        let keys = (lo..(lo + t.block_k).min(s.tk)).step_by(bk);
                        let seen = keys.filter(|&k| k < seen.end && k + bk > seen.start);
                        tiles.extend(seen.map(|k| (k / bk) as i32));
                    }
                    indptr.push(tiles.len() as i32);
                }
            }
        }
        Ok(Blocks {
            indptr: device.upload(&indptr)?,
            tiles: device.upload(&tiles)?,
            masks: (!masks.is_empty()).then(|| device.upload(&masks)).transpose()?,
            block: block.map(|n| n as i32),
            q_tiles: s.tq.div_ceil(if path == Path::Rows { block[0] } else { bq }),
        })
    }

    /// Shapes of a call on these, checked.
    pub(crate) fn shape_of(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Shape> {
        shape(q, k, v)
    }

    /// Make ready a call on operands like these.
    pub fn plan(&self, device: &Device, q: &Tensor, k: &Tensor, v: &Tensor, out: &TensorMut) -> Result<Plan<'a>> {
        self.plan_for(device, shape(q, k, v)?, q.layout.dtype, aligned(q, k, v, out))
    }

    /// Run: q (B,H,Tq,D), k (B,Hkv,Tk,D), v (B,Hkv,Tk,Dv) into out (B,H,Tq,Dv) of the same type and, if given, `lse`
    /// (B,H,Tq contiguous; natural log; −∞ for a row that sees no key). A row that sees no key is zero.
    pub fn run(
        &self,
        device: &Device,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &mut TensorMut,
        lse: Option<&mut CudaSlice<f32>>,
    ) -> Result<Done> {
        self.plan(device, q, k, v, out)?.run(device, q, k, v, out, lse)
    }
}

/// Whether all rows start at multiples of 16 bytes.
fn aligned(q: &Tensor, k: &Tensor, v: &Tensor, out: &TensorMut) -> bool {
    [q.layout, k.layout, v.layout, out.layout].iter().all(Layout::aligned)
}

fn same(dim: &'static str, left: (&'static str, usize), right: (&'static str, usize)) -> Result<()> {
    if left.1 == right.1 {
        return Ok(());
    }
    let (left, left_len, right, right_len) = (left.0, left.1, right.0, right.1);
    Err(KernelError::Mismatch { op: OP, dim, left, left_len, right, right_len }.into())
}

fn shape(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Shape> {
    let (a, b, c) = (q.shape(), k.shape(), v.shape());
    same("batch", ("q", a[0]), ("k", b[0]))?;
    same("batch", ("k", b[0]), ("v", c[0]))?;
    same("head_dim", ("q", a[3]), ("k", b[3]))?;
    same("heads", ("k", b[1]), ("v", c[1]))?;
    same("tokens", ("k", b[2]), ("v", c[2]))?;
    if b[1] == 0 || !a[1].is_multiple_of(b[1]) {
        return Err(KernelError::Groups { op: OP, heads: a[1], kv_heads: b[1] }.into());
    }
    if [k, v].iter().any(|x| x.layout.dtype != q.layout.dtype) {
        return bad(OP, "dtype", format!("{:?} and {:?}", k.layout.dtype, v.layout.dtype), "use that of q");
    }
    Ok(Shape { batch: a[0], heads: a[1], kv_heads: b[1], tq: a[2], tk: b[2], d: a[3], dv: c[3] })
}

impl Plan<'_> {
    /// What each run does.
    pub fn done(&self) -> Done {
        self.done
    }

    /// Run on operands of the shapes it was made for; see [`Attend::run`].
    pub fn run(
        &mut self,
        device: &Device,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &mut TensorMut,
        lse: Option<&mut CudaSlice<f32>>,
    ) -> Result<Done> {
        let s = self.shape;
        if shape(q, k, v)? != s || q.layout.dtype != self.dtype || out.layout.dtype != self.dtype {
            return bad(OP, "operands", format!("{:?}", shape(q, k, v)?), &format!("the plan is for {s:?}"));
        }
        let want = [s.batch, s.heads, s.tq, s.dv];
        if out.layout.shape != want {
            return bad(OP, "out", format!("{:?}", out.layout.shape), &format!("make its shape {want:?}"));
        }
        let rows = s.batch * s.heads * s.tq;
        if let Some(lse) = &lse
            && lse.len() < rows
        {
            return bad(OP, "lse", lse.len(), &format!("give {rows} elements"));
        }
        if rows == 0 || s.dv == 0 {
            return Ok(self.done);
        }
        let stream = device.stream();
        if self.aligned && !aligned(q, k, v, out) {
            return bad(OP, "alignment", "not a multiple of 16 bytes", "the plan is for aligned rows: make another");
        }
        let tile = self.done.path.tile();
        let q_tiles = self.table.as_ref().map_or(s.tq.div_ceil(tile[0]), |t| t.q_tiles);
        let params = Params {
            out: out.layout.at,
            lse: lse.map_or(0, |l| l.device_ptr_mut(stream).0),
            sinks: self.sinks,
            indptr: self.table.as_ref().map_or(0, |t| t.indptr.device_ptr(stream).0),
            tiles: self.table.as_ref().map_or(0, |t| t.tiles.device_ptr(stream).0),
            counter: self.counter.device_ptr(stream).0,
            out_steps: out.layout.steps(),
            batch: s.batch as i32,
            heads: s.heads as i32,
            group: (s.heads / s.kv_heads) as i32,
            tq: s.tq as i32,
            tk: s.tk as i32,
            q_tiles: q_tiles as i32,
            left: self.band[0],
            right: self.band[1],
            scale: self.scale,
            cap: self.cap,
        };
        let source = Source {
            at: [q.layout.at, k.layout.at, v.layout.at],
            steps: [q.layout.steps(), k.layout.steps(), v.layout.steps()],
            d: s.d as i32,
            dv: s.dv as i32,
        };
        match self.done.path {
            Path::Hopper { keys, .. } => {
                let chunks = |d: usize| d.div_ceil(64) * 128;
                let shared = 1024 + chunks(s.d) * 128 + 2 * keys * (chunks(s.d) + chunks(s.dv));
                let maps = [q.layout.map("q", 64, 128)?, k.layout.map("k", 64, keys)?, v.layout.map("v", 64, keys)?];
                stream.memset_zeros(&mut self.counter).map_err(|e| crate::CudaError::Driver {
                    what: "clearing the counter of tiles".into(),
                    code: format!("{:?}", e.0),
                })?;
                let blocks = (q_tiles * s.batch * s.heads).min(device.facts().multiprocessors);
                let at = Launch { blocks: [blocks, 1], threads: 384, shared };
                let mut args = [arg(&maps[0]), arg(&maps[1]), arg(&maps[2]), arg(&params)];
                // SAFETY: parameters as the kernel declares them; all views were checked against their memory.
                unsafe { device.launch(OP, &self.kernel, at, &mut args) }?;
            }
            Path::Warps => {
                let shared = 2 * 64 * 2 * (wide(s.d) + wide(s.dv)) + 64 * 2 * wide(s.d);
                let at = Launch { blocks: [q_tiles * s.batch * s.heads, 1], threads: 128, shared };
                // SAFETY: as above.
                unsafe { device.launch(OP, &self.kernel, at, &mut [arg(&source), arg(&params)]) }?;
            }
            Path::Rows => {
                let blocks = RowBlocks {
                    masks: self.table.as_ref().and_then(|t| t.masks.as_ref()).map_or(0, |m| m.device_ptr(stream).0),
                    block_q: self.table.as_ref().map_or(1, |t| t.block[0]),
                    block_k: self.table.as_ref().map_or(1, |t| t.block[1]),
                    table: i32::from(self.table.is_some()),
                };
                let at = Launch { blocks: [rows.div_ceil(4), 1], threads: 128, shared: 0 };
                // SAFETY: as above.
                unsafe { device.launch(OP, &self.kernel, at, &mut [arg(&source), arg(&params), arg(&blocks)]) }?;
            }
        }
        Ok(self.done)
    }
}
