//! From a call to strip × tile visits: tasks, visible keys, masks, work.

use super::strip::{Finish, KEY_PAD, KEY_TILE, Kernels, MAX_STRIP, NO_MAX, Step};
use super::{Attend, Bias};
use crate::error::{KernelError, Result};
use crate::exp::LOG2_E;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::fallback::{Reason, tell};
use crate::table::{HeadKeys, HeadTable};
use crate::view::{Element, Rows, View, ViewMut};
use crate::work::Work;
use half::bf16;
use rayon::prelude::*;
use std::any::TypeId;
use std::ops::Range;
use std::ptr::null;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What each query visits, before causality and window.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Every key.
    Dense,
    /// Blocks; one table a (batch, head).
    Table(&'a [HeadTable]),
    /// Key lists; one a (batch, head).
    Keys(&'a [HeadKeys]),
    /// Blocks without row masks and, besides them, single keys. One of block and group divides the other.
    Both(&'a [HeadTable], &'a [HeadKeys]),
}

impl Source<'_> {
    /// Queries of a (batch, head) that share a list of keys.
    fn block(&self, bh: usize) -> usize {
        match self {
            Source::Dense => usize::MAX,
            Source::Table(t) => t[bh].block_q,
            Source::Keys(k) => k[bh].group,
            Source::Both(t, k) => t[bh].block_q.min(k[bh].group),
        }
    }
}

/// Queries of a work tile, and the alignment of task boundaries. Work is counted on this grid
/// whatever the strips of an instruction set, so that counters are the same everywhere.
pub(super) const WORK_TILE: usize = 64;
/// Most queries that share one pass over the keys.
const MAX_TASK: usize = 4 * WORK_TILE;

/// Keys of the longest tile of any path.
const MASKS: usize = 256;

/// Consecutive queries of one head.
struct Task {
    bh: usize,
    rows: Range<usize>,
}

/// 64-byte aligned scratch.
#[derive(Clone, Copy)]
#[repr(align(64))]
#[allow(dead_code)]
struct Line([f32; 16]);

pub(super) struct Buf(Vec<Line>);

impl Buf {
    fn new() -> Self {
        Buf(Vec::new())
    }
    /// At least `n` elements, of any content.
    pub(super) fn at_least(&mut self, n: usize) -> *mut f32 {
        let lines = n.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; 16]));
        }
        self.0.as_mut_ptr().cast()
    }
}

/// What a worker thread keeps between tasks.
pub(super) struct Scratch {
    pub(super) q: Buf,
    pub(super) o: Buf,
    pub(super) stat: Buf,
    pub(super) s: Buf,
    pub(super) bias: Buf,
    pub(super) wide_q: Buf,
    pub(super) wide_k: Buf,
    pub(super) wide_v: Buf,
    pub(super) keys: Vec<u32>,
    /// Row mask of each key, when the table has them.
    pub(super) marks: Vec<u64>,
    pub(super) masks: [u64; MASKS],
    pub(super) k_rows: [*const f32; KEY_TILE + KEY_PAD],
    pub(super) v_rows: [*const f32; KEY_TILE + KEY_PAD],
}

/// One call, shared by its tasks.
pub(super) struct Call<'a, T> {
    pub(super) p: &'a Attend<'a>,
    pub(super) source: Source<'a>,
    pub(super) kernels: &'static Kernels,
    pub(super) q: &'a View<'a, T>,
    pub(super) k: &'a View<'a, T>,
    pub(super) v: &'a View<'a, T>,
    pub(super) out: Rows<'a, f32>,
    pub(super) lse: Rows<'a, f32>,
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) packed: Option<super::amx::PackedValues>,
    /// Of the longest of each 32 keys, (B, H_kv, Tk / 32 rounded up), or empty.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) key_lengths: Vec<f32>,
}

/// Run a call whose shapes and tables were checked.
pub(crate) fn run<T: Element>(
    op: &'static str,
    p: &Attend,
    source: Source,
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    out: &mut ViewMut<f32>,
    lse: Option<&mut [f32]>,
) -> Result<Work> {
    let [b, h, tq, _] = q.shape;
    let mut own_lse = Vec::new();
    let lse = match lse {
        Some(l) if l.len() == b * h * tq => l,
        Some(l) => {
            return Err(KernelError::Mismatch {
                op,
                dim: "batch*heads*tokens",
                left: "lse",
                left_len: l.len(),
                right: "q",
                right_len: b * h * tq,
            });
        }
        None => {
            own_lse.resize(b * h * tq, 0.0);
            &mut own_lse
        }
    };
    let mismatch = |dim, left, left_len, right, right_len| {
        if left_len == right_len {
            Ok(())
        } else {
            Err(KernelError::Mismatch { op, dim, left, left_len, right, right_len })
        }
    };
    if let Some(cap) = p.softcap
        && (cap.is_nan() || cap <= 0.0)
    {
        return Err(KernelError::Param {
            op,
            name: "softcap",
            value: cap.to_string(),
            remedy: "use a positive cap, or none".into(),
        });
    }
    match p.bias {
        None => {}
        Some(Bias::Alibi(slopes)) => mismatch("heads", "slopes", slopes.len(), "q", h)?,
        Some(Bias::Dense(x)) => {
            mismatch("batch", "bias", x.shape[0], "q", b)?;
            mismatch("heads", "bias", x.shape[1], "q", h)?;
            mismatch("tokens", "bias", x.shape[2], "q", tq)?;
            mismatch("keys", "bias", x.shape[3], "k", k.shape[2])?;
        }
    }
    if let Some(s) = p.sinks {
        mismatch("heads", "sinks", s.len(), "q", h)?;
    }
    let mut lse = ViewMut::contiguous("lse", lse, [b, h, tq, 1])?;
    let threads = rayon::current_num_threads();
    let tasks = tasks(source, [b, h, k.shape[1], tq], threads);
    #[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(unused_mut))]
    let mut call = Call {
        p,
        source,
        kernels: Kernels::of(p.isa),
        q,
        k,
        v,
        out: out.rows(),
        lse: lse.rows(),
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        packed: None,
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        key_lengths: Vec::new(),
    };
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(same) = call.on_tiles() {
        // SAFETY: a call on tiles is on a machine with AVX-512.
        let packed = unsafe { same.pack_all_values() };
        call.key_lengths = same.lengths_of_keys();
        call.packed = packed;
    }
    // A shared counter rather than a split of the list: tasks start in their order (long causal
    // rows of a head first, heads of a group together), so the tail is short tasks.
    let next = AtomicUsize::new(0);
    let work = (0..threads.min(tasks.len()))
        .into_par_iter()
        .with_max_len(1)
        .map(|_| {
            let mut scratch = Scratch {
                q: Buf::new(),
                o: Buf::new(),
                stat: Buf::new(),
                s: Buf::new(),
                bias: Buf::new(),
                wide_q: Buf::new(),
                wide_k: Buf::new(),
                wide_v: Buf::new(),
                keys: Vec::new(),
                marks: Vec::new(),
                masks: [0; MASKS],
                k_rows: [null(); KEY_TILE + KEY_PAD],
                v_rows: [null(); KEY_TILE + KEY_PAD],
            };
            let mut work = Work::default();
            while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                let block = call.source.block(task.bh);
                let mut at = task.rows.start;
                while at < task.rows.end {
                    let end = (at / block + 1).saturating_mul(block).min(task.rows.end);
                    work += call.rows_on_best(&mut scratch, task.bh, at..end);
                    at = end;
                }
            }
            work
        })
        .sum();
    Ok(work)
}

/// Cut the queries of every head into tasks.
fn tasks(source: Source, [b, h, hkv, tq]: [usize; 4], threads: usize) -> Vec<Task> {
    // Long passes share each key tile among more queries; short ones feed all threads.
    let mut size = MAX_TASK;
    while size > WORK_TILE && b * h * tq.div_ceil(size) < 8 * threads {
        size /= 2;
    }
    let group = h / hkv;
    let mut list = Vec::new();
    for bk in 0..b * hkv {
        let first = list.len();
        for bh in bk * group..(bk + 1) * group {
            let block = source.block(bh);
            let mut at = 0;
            while at < tq {
                // Large blocks are cut on the work grid, small ones collected up to it.
                let end = if block >= WORK_TILE {
                    let start = at / block * block;
                    (at + size).min(start.saturating_add(block))
                } else {
                    at + WORK_TILE / block * block
                };
                list.push(Task { bh, rows: at..end.min(tq) });
                at = end;
            }
        }
        list[first..].sort_by_key(|t| std::cmp::Reverse(t.rows.start));
    }
    list
}

/// `data` as elements of type `U` when that is what `T` is.
fn same<T: 'static, U: 'static>(data: &[T]) -> Option<*const U> {
    (TypeId::of::<T>() == TypeId::of::<U>()).then(|| data.as_ptr().cast())
}

/// The part of an ascending list that lies in `seen`.
fn within<'k>(keys: &'k [u32], seen: &Range<usize>) -> &'k [u32] {
    let lo = keys.partition_point(|&j| (j as usize) < seen.start);
    let hi = keys.partition_point(|&j| (j as usize) < seen.end);
    &keys[lo..hi.max(lo)]
}

/// Count single keys in every work tile (what it sees, its queries) that sees some of them; returns
/// how many are read.
fn count_singles(tiles: &[(Range<usize>, usize)], keys: &[u32], work: &mut Work) -> u64 {
    let mut read = 0;
    for (seen, n) in tiles {
        let keys = within(keys, seen).len();
        work.tiles += u64::from(keys > 0);
        work.pairs += (keys * n) as u64;
        read += keys as u64;
    }
    read
}

impl<T: Element> Call<'_, T> {
    /// Keys that query `i` may see by causality and window.
    pub(super) fn visible(&self, i: usize) -> Range<usize> {
        let (tq, tk) = (self.q.shape[2], self.k.shape[2]);
        if !self.p.causal {
            return 0..tk;
        }
        let hi = (tk + i + 1).saturating_sub(tq);
        hi.saturating_sub(self.p.window.unwrap_or(hi))..hi
    }

    /// Row `r` of `n` elements as f32: in place, or widened to `to`.
    fn wide(&self, r: &[T], to: *mut f32) -> *const f32 {
        if let Some(p) = same::<T, f32>(r) {
            return p;
        }
        if let Some(p) = same::<T, bf16>(r) {
            // SAFETY: `to` has room for the row; bf16 is two bytes of bits; `kernels` suits the machine.
            unsafe { (self.kernels.widen)(p.cast(), r.len(), to) };
        } else {
            for (c, x) in r.iter().enumerate() {
                // SAFETY: `to` has room for the row.
                unsafe { *to.add(c) = x.to_f32() };
            }
        }
        to
    }

    /// List the keys (and row marks) of `rows`, all of one block, and count the work.
    pub(super) fn list(&self, s: &mut Scratch, bh: usize, rows: &Range<usize>) -> Work {
        s.keys.clear();
        s.marks.clear();
        let (first, last) = (self.visible(rows.start), self.visible(rows.end - 1));
        let seen = first.start..last.end;
        let mut work = Work::default();
        let tiles: Vec<(Range<usize>, usize)> = (rows.start..rows.end)
            .step_by(WORK_TILE)
            .map(|i| {
                let end = (i + WORK_TILE).min(rows.end);
                (self.visible(i).start..self.visible(end - 1).end, end - i)
            })
            .collect();
        let mut keys = 0u64;
        // Count a run of keys in every work tile that sees some of it.
        let mut count = |run: Range<usize>, width: usize| {
            for (seen, n) in &tiles {
                let (lo, hi) = (run.start.max(seen.start), run.end.min(seen.end));
                if lo < hi {
                    work.tiles += (hi.div_ceil(width) - lo / width) as u64;
                    work.pairs += ((hi - lo) * n) as u64;
                    keys += (hi - lo) as u64;
                }
            }
        };
        // A window may start anywhere, but packed values start at multiples of 32; what that adds
        // is cut from each strip (or masked).
        let aligned = seen.start / 32 * 32;
        match self.source {
            Source::Dense => {
                count(seen.clone(), WORK_TILE);
                s.keys.extend(aligned as u32..seen.end.max(aligned) as u32);
            }
            Source::Table(t) | Source::Both(t, _) => {
                let t = &t[bh];
                let qb = rows.start / t.block_q;
                // Single keys take their places between the blocks.
                let mut singles = match self.source {
                    Source::Both(_, k) => within(k[bh].row(rows.start / k[bh].group), &seen),
                    _ => &[],
                };
                let all = singles;
                for (e, &kb) in t.row(qb).iter().enumerate() {
                    let lo = kb as usize * t.block_k;
                    let run = lo.max(seen.start)..(lo + t.block_k).min(seen.end);
                    let mark = match &t.rows {
                        None => u64::MAX,
                        Some(m) => m[t.indptr[qb] + e] >> (rows.start % t.block_q),
                    };
                    // Bits past the block's rows mean nothing.
                    if run.is_empty() || mark & (u64::MAX >> (MAX_STRIP - rows.len().min(MAX_STRIP))) == 0 {
                        continue;
                    }
                    count(run.clone(), t.block_k);
                    let from = lo.max(aligned);
                    let (before, rest) = singles.split_at(singles.partition_point(|&j| (j as usize) < from));
                    s.keys.extend_from_slice(before);
                    singles = &rest[rest.partition_point(|&j| (j as usize) < run.end)..];
                    if t.rows.is_some() {
                        s.marks.resize(s.marks.len() + run.end - from, mark);
                    }
                    s.keys.extend(from as u32..run.end as u32);
                }
                s.keys.extend_from_slice(singles);
                keys += count_singles(&tiles, all, &mut work);
            }
            Source::Keys(t) => {
                s.keys.extend_from_slice(within(t[bh].row(rows.start / t[bh].group), &seen));
                keys += count_singles(&tiles, &s.keys, &mut work);
            }
        }
        let (d, dv, size) = (self.q.shape[3], self.v.shape[3], size_of::<T>());
        work.flops = 2 * work.pairs * (d + dv) as u64;
        work.bytes = keys * ((d + dv) * size) as u64 + (rows.len() * (d * size + dv * 4)) as u64;
        work
    }

    /// Whether AMX tiles were asked for: bf16, the machine has them, and the system lets us use them.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn wants_tiles(&self) -> bool {
        TypeId::of::<T>() == TypeId::of::<bf16>() && self.p.isa.min(crate::Isa::detect()) == crate::Isa::Amx
    }

    /// This call as one that runs on AMX tiles, if it does.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn on_tiles(&self) -> Option<&Call<'_, bf16>> {
        if !self.wants_tiles() {
            return None;
        }
        // SAFETY: T is bf16, so the types are one.
        let same = unsafe { &*std::ptr::from_ref(self).cast::<Call<'_, bf16>>() };
        same.suits_amx().then_some(same)
    }

    /// Attend `rows` of one head, all of one block and at most MAX_TASK.
    fn rows_on_best(&self, s: &mut Scratch, bh: usize, rows: Range<usize>) -> Work {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if self.wants_tiles() {
            let reason = match self.on_tiles() {
                // SAFETY: a call on tiles is on a machine with AMX.
                Some(same) if rows.len() > self.kernels.few => return unsafe { same.rows_amx(s, bh, rows) },
                Some(_) => Reason::AttendFewQueries,
                None => Reason::AttendScale,
            };
            tell(reason);
            return self.rows(s, bh, rows).on_slower_path();
        }
        self.rows(s, bh, rows)
    }

    /// The f32 path, to which bf16 is widened.
    fn rows(&self, s: &mut Scratch, bh: usize, rows: Range<usize>) -> Work {
        let h = self.q.shape[1];
        let (bi, hi) = (bh / h, bh % h);
        let kh = hi / (h / self.k.shape[1]);
        let (d, dv) = (self.q.shape[3], self.v.shape[3]);
        let work = self.list(s, bh, &rows);

        let lanes = self.kernels.lanes;
        let full = lanes * self.kernels.vecs;
        let n = rows.len();
        let padded = n.next_multiple_of(lanes);
        let few = n <= self.kernels.few;
        let strips = |i: usize| (i, (i + full).min(n), full.min(padded - i));
        let (q, o) = (s.q.at_least(padded * d), s.o.at_least(padded * dv));
        let stat = s.stat.at_least(2 * padded);
        let scores = s.s.at_least((KEY_TILE + KEY_PAD) * full);
        let wide_q = s.wide_q.at_least(MAX_STRIP * d);
        let (wide_k, wide_v) = if TypeId::of::<T>() == TypeId::of::<f32>() {
            (std::ptr::null_mut(), std::ptr::null_mut())
        } else {
            (s.wide_k.at_least(KEY_TILE * d), s.wide_v.at_least(KEY_TILE * dv))
        };

        // The factor inside the 2^x must be positive for maxima to be maxima: a sign moves into q.
        // With a softcap it is the cap, and the tanh takes scale/cap.
        let (sign, squash, c) = match (self.p.softcap, self.p.scale) {
            (_, 0.0) => (0.0, 0.0, LOG2_E),
            (Some(cap), scale) => (1.0, scale / cap, cap * LOG2_E),
            (None, scale) => (scale.signum(), 0.0, scale.abs() * LOG2_E),
        };
        let mut ptrs = [null(); MAX_STRIP];
        for i in (0..n).step_by(full) {
            let (a, b, w) = strips(i);
            for (x, p) in ptrs[..b - a].iter_mut().enumerate() {
                // SAFETY: MAX_STRIP rows of d.
                let to = unsafe { wide_q.add(if wide_k.is_null() { 0 } else { x * d }) };
                *p = self.wide(self.q.row(bi, hi, rows.start + a + x), to);
            }
            // SAFETY: `ptrs` are rows of d elements; strip i starts after i lanes of d (dv) elements and
            // has w; `stat` holds two values a lane.
            unsafe {
                if few {
                    for x in 0..n * d {
                        *q.add(x) = *ptrs[x / d].add(x % d) * sign;
                    }
                } else {
                    (self.kernels.pack)(&ptrs[..b - a], d, sign, w, q.add(i * d));
                }
                std::slice::from_raw_parts_mut(o.add(i * dv), w * dv).fill(0.0);
                std::slice::from_raw_parts_mut(stat.add(i), w).fill(NO_MAX);
                std::slice::from_raw_parts_mut(stat.add(padded + i), w).fill(0.0);
            }
        }

        for at in (0..s.keys.len()).step_by(KEY_TILE) {
            let keys = &s.keys[at..(at + KEY_TILE).min(s.keys.len())];
            for (x, &j) in keys.iter().enumerate() {
                // SAFETY: KEY_TILE rows of d and dv; null is only offset by 0 (f32 rows are used in place).
                let (to_k, to_v) = unsafe {
                    if wide_k.is_null() { (wide_k, wide_v) } else { (wide_k.add(x * d), wide_v.add(x * dv)) }
                };
                s.k_rows[x] = self.wide(self.k.row(bi, kh, j as usize), to_k);
                s.v_rows[x] = self.wide(self.v.row(bi, kh, j as usize), to_v);
            }
            let pad = s.k_rows[keys.len() - 1];
            s.k_rows[keys.len()..keys.len() + KEY_PAD].fill(pad);
            for i in (0..n).step_by(full) {
                let (a, b, w) = strips(i);
                let (first, last) = (self.visible(rows.start + a), self.visible(rows.start + b - 1));
                // Keys ascend: what this strip cannot see lies at the two ends of the tile.
                let from = keys.partition_point(|&j| (j as usize) < first.start);
                let to = keys.partition_point(|&j| (j as usize) < last.end);
                if from >= to {
                    continue;
                }
                let marks = (!s.marks.is_empty()).then(|| &s.marks[at + from..at + to]);
                let edge = (keys[to - 1] as usize) >= first.end || (keys[from] as usize) < last.start;
                if edge || marks.is_some() {
                    self.masks(&mut s.masks, &keys[from..to], rows.start + a, marks.map(|m| (m, a)));
                }
                let width = if few { n } else { w };
                let of = rows.start + a..rows.start + b;
                let bias = self.bias_tile(&mut s.bias, [bi, hi], &keys[from..to], of, width, c);
                let step = Step {
                    nv: if few { 0 } else { w / lanes },
                    nq: b - a,
                    d,
                    dv,
                    nk: to - from,
                    // SAFETY: offsets as in the loop above; `from` is within the tile.
                    q: unsafe { q.add(i * d) },
                    // SAFETY: as above.
                    k: unsafe { s.k_rows.as_ptr().add(from) },
                    // SAFETY: as above.
                    v: unsafe { s.v_rows.as_ptr().add(from) },
                    masks: if edge || marks.is_some() { s.masks.as_ptr() } else { null() },
                    squash,
                    bias,
                    c,
                    s: scores,
                    // SAFETY: as above.
                    o: unsafe { o.add(i * dv) },
                    // SAFETY: as above.
                    m: unsafe { stat.add(i) },
                    // SAFETY: as above.
                    l: unsafe { stat.add(padded + i) },
                };
                // SAFETY: `kernels` suits the machine; all pointers reach what `Step` says: K rows are
                // valid to KEY_PAD past the tile, hence past any part of it.
                unsafe { (self.kernels.step)(&step) };
            }
        }

        for i in (0..n).step_by(full) {
            let (a, b, w) = strips(i);
            // SAFETY: offsets as above.
            unsafe {
                let (o, m, l) = (o.add(i * dv), stat.add(i), stat.add(padded + i));
                let w = if few { 0 } else { w };
                let parts = Finish { w, dv, o, m, l, c, sink: None, rows: &[], lse: std::ptr::null_mut() };
                self.finish([bi, hi], rows.start + a..rows.start + b, &parts);
            }
        }
        work
    }

    /// Write the rows of one strip of a head; sink and targets of `parts` are filled in here.
    ///
    /// # Safety
    /// The pointers of `parts` are as it says, and no other task writes these rows.
    pub(super) unsafe fn finish(&self, [bi, hi]: [usize; 2], rows: Range<usize>, parts: &Finish) {
        let sink = self.p.sinks.map(|x| x[hi] * LOG2_E);
        let mut targets = [std::ptr::null_mut(); MAX_STRIP];
        let mut lse = [0f32; MAX_STRIP];
        for (x, i) in rows.clone().enumerate() {
            // SAFETY: each row belongs to one task and is borrowed only here.
            targets[x] = unsafe { self.out.row_mut(bi, hi, i) }.as_mut_ptr();
        }
        let parts = Finish { sink, rows: &targets[..rows.len()], lse: lse.as_mut_ptr(), ..*parts };
        // SAFETY: by the contract; `targets` are distinct rows of dv elements; `kernels` suits the machine.
        unsafe { (self.kernels.finish)(&parts) };
        for (x, i) in rows.enumerate() {
            // SAFETY: as for the output rows.
            unsafe { self.lse.row_mut(bi, hi, i)[0] = lse[x] };
        }
    }

    /// The bias of `keys` for the queries `rows` in rows of `w`, in units in which `c` takes scores to
    /// base 2; null without a bias.
    pub(super) fn bias_tile(
        &self,
        buf: &mut Buf,
        [bi, hi]: [usize; 2],
        keys: &[u32],
        rows: Range<usize>,
        w: usize,
        c: f32,
    ) -> *const f32 {
        let Some(bias) = self.p.bias else { return null() };
        let unit = LOG2_E / c;
        let to = buf.at_least(keys.len() * w);
        // SAFETY: `at_least` gave so many elements, initialised.
        let to = unsafe { std::slice::from_raw_parts_mut(to, keys.len() * w) };
        match bias {
            Bias::Alibi(slopes) => {
                let slope = slopes[hi] * unit;
                let own = self.k.shape[2] as i64 - self.q.shape[2] as i64 + rows.start as i64;
                for (line, &j) in to.chunks_exact_mut(w).zip(keys) {
                    let first = (own - i64::from(j)) as i32;
                    for (x, lane) in line.iter_mut().zip(0..) {
                        *x = -slope * (first + lane).abs() as f32;
                    }
                }
            }
            Bias::Dense(view) => {
                to.fill(0.0);
                for (x, i) in rows.enumerate() {
                    let row = view.row(bi, hi, i);
                    for (line, &j) in to.chunks_exact_mut(w).zip(keys) {
                        line[x] = row[j as usize] * unit;
                    }
                }
            }
        }
        to.as_ptr()
    }

    /// For each key, the lanes that see it; lane 0 is query `i0`. Marks come with their shift.
    pub(super) fn masks(&self, masks: &mut [u64; MASKS], keys: &[u32], i0: usize, marks: Option<(&[u64], usize)>) {
        // Key j is visible from query j − (tk − tq) on, for `window` queries.
        let offset = self.k.shape[2] as isize - self.q.shape[2] as isize + i0 as isize;
        for (x, &j) in keys.iter().enumerate() {
            let mut m = u64::MAX;
            if self.p.causal {
                let first = j as isize - offset;
                m = match first {
                    ..=0 => m,
                    1..64 => m << first,
                    _ => 0,
                };
                if let Some(w) = self.p.window {
                    m &= match first.saturating_add_unsigned(w) {
                        ..=0 => 0,
                        end @ 1..64 => u64::MAX >> (64 - end),
                        _ => u64::MAX,
                    };
                }
            }
            if let Some((marks, shift)) = marks {
                m &= marks[x] >> shift;
            }
            masks[x] = m;
        }
    }
}
