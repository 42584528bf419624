//! From a call to strip × tile visits.

use super::bias::Room;
use super::scope::{Listed, MASKS, Scope, Source, WORK_TILE, no_lse};
use super::strip::{Finish, KEY_PAD, KEY_TILE, Kernels, MAX_STRIP, NO_MAX, Step};
use super::{Attend, Normalizer};
use crate::error::{Result, same as equal};
use crate::exp::LOG2_E;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::fallback::{Reason, tell};
use crate::view::{Element, Rows, View, ViewMut};
use crate::work::Work;
use half::bf16;
use rayon::prelude::*;
use std::any::TypeId;
use std::ops::Range;
use std::ptr::null;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most queries that share one pass over the keys.
const MAX_TASK: usize = 4 * WORK_TILE;

/// Consecutive queries of one head of one sequence.
struct Task {
    sequence: usize,
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
    pub(super) fn new() -> Self {
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
    pub(super) bias: Room,
    pub(super) wide_q: Buf,
    pub(super) wide_k: Buf,
    pub(super) wide_v: Buf,
    pub(super) listed: Listed,
    pub(super) masks: [u64; MASKS],
    pub(super) k_rows: [*const f32; KEY_TILE + KEY_PAD],
    pub(super) v_rows: [*const f32; KEY_TILE + KEY_PAD],
    /// Of the task's K/V head, on tiles.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) packed: Option<std::sync::Arc<super::packed::Packed>>,
}

/// One call, or one sequence of a ragged one, shared by its tasks.
pub(super) struct Call<'a, T> {
    pub(super) scope: Scope<'a>,
    pub(super) kernels: &'static Kernels,
    pub(super) q: View<'a, T>,
    pub(super) k: View<'a, T>,
    pub(super) v: View<'a, T>,
    pub(super) out: Rows<'a, f32>,
    pub(super) lse: Rows<'a, f32>,
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) shelf: Option<super::packed::Shelf>,
}

/// Run a call whose shapes were checked.
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
    let scopes = Scope::all(op, p, source, q.shape, k.shape)?;
    no_lse(op, p, "lse", lse.is_some())?;
    let mut own_lse = Vec::new();
    let lse = match lse {
        Some(l) => {
            equal(op, "batch*heads*tokens", "lse", l.len(), "q", b * h * tq)?;
            l
        }
        None => {
            own_lse.resize(b * h * tq, 0.0);
            &mut own_lse
        }
    };
    let mut lse = ViewMut::contiguous("lse", lse, [b, h, tq, 1])?;
    let (out, lse) = (out.rows(), lse.rows());
    let threads = rayon::current_num_threads();
    let tasks = tasks(&scopes.iter().map(|s| s.1).collect::<Vec<_>>(), [b, h, k.shape[1]], threads);
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    let (group, heads) = (h / k.shape[1], b * k.shape[1]);
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    let mut counts = vec![0; scopes.len() * heads];
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    tasks.iter().for_each(|t| counts[t.sequence * heads + t.bh / group] += 1);
    let calls: Vec<_> = scopes
        .into_iter()
        .enumerate()
        .map(|(sequence, (piece, scope))| {
            let (d, dv) = (q.shape[3], v.shape[3]);
            #[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(unused_mut))]
            let mut call = Call {
                kernels: scope.kernels,
                scope,
                q: q.part(piece.q.clone(), 0..d),
                k: k.part(piece.k.clone(), 0..d),
                v: v.part(piece.k, 0..dv),
                out: out.part(piece.q.clone(), 0..dv),
                lse: lse.part(piece.q, 0..1),
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                shelf: None,
            };
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            {
                let counts = &counts[sequence * heads..(sequence + 1) * heads];
                call.shelf = call.on_tiles().and_then(|c| c.shelf(counts.to_vec()));
            }
            call
        })
        .collect();
    // Each thread starts in a part of the list of its own, so that keys of a head go to the caches of one core, and
    // goes on in those of others. Sequences of a ragged batch share one part: their tasks start in their order, the
    // longest first, so that the tail is short tasks.
    let workers = threads.min(tasks.len());
    let parts = if calls.len() > 1 { 1 } else { workers.max(1) };
    let starts: Vec<_> = (0..parts).map(|i| AtomicUsize::new(i * tasks.len() / parts)).collect();
    let next = |worker: usize| {
        (0..parts).find_map(|i| {
            let part = (worker + i) % parts;
            let at = starts[part].fetch_add(1, Ordering::Relaxed);
            tasks[..(part + 1) * tasks.len() / parts].get(at)
        })
    };
    let work = (0..workers)
        .into_par_iter()
        .with_max_len(1)
        .map(|worker| {
            let mut scratch = Scratch {
                q: Buf::new(),
                o: Buf::new(),
                stat: Buf::new(),
                s: Buf::new(),
                bias: Room::new(),
                wide_q: Buf::new(),
                wide_k: Buf::new(),
                wide_v: Buf::new(),
                listed: Listed::default(),
                masks: [0; MASKS],
                k_rows: [null(); KEY_TILE + KEY_PAD],
                v_rows: [null(); KEY_TILE + KEY_PAD],
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                packed: None,
            };
            let mut work = Work::default();
            while let Some(task) = next(worker) {
                let call = &calls[task.sequence];
                let block = call.scope.source.block(task.bh);
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                if let Some(shelf) = &call.shelf {
                    scratch.packed = Some(shelf.open(task.bh / group));
                }
                let mut at = task.rows.start;
                while at < task.rows.end {
                    let end = (at / block + 1).saturating_mul(block).min(task.rows.end);
                    work += call.rows_on_best(&mut scratch, task.bh, at..end);
                    at = end;
                }
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                if let (Some(shelf), Some(room)) = (&call.shelf, scratch.packed.take()) {
                    shelf.close(task.bh / group, room);
                }
            }
            work
        })
        .sum();
    Ok(work)
}

/// Cut the queries of every head of every sequence into tasks.
fn tasks(scopes: &[Scope], [b, h, hkv]: [usize; 3], threads: usize) -> Vec<Task> {
    // Long passes share each key tile among more queries; short ones feed all threads.
    let mut size = MAX_TASK;
    while size > WORK_TILE && scopes.iter().map(|s| b * h * s.tq.div_ceil(size)).sum::<usize>() < 8 * threads {
        size /= 2;
    }
    let group = h / hkv;
    let mut list = Vec::new();
    for (sequence, scope) in scopes.iter().enumerate() {
        for bk in 0..b * hkv {
            let first = list.len();
            for bh in bk * group..(bk + 1) * group {
                let block = scope.source.block(bh);
                let mut at = 0;
                while at < scope.tq {
                    // Large blocks are cut on the work grid, small ones collected up to it.
                    let end = if block >= WORK_TILE {
                        let start = at / block * block;
                        (at + size).min(start.saturating_add(block))
                    } else {
                        at + WORK_TILE / block * block
                    };
                    list.push(Task { sequence, bh, rows: at..end.min(scope.tq) });
                    at = end;
                }
            }
            list[first..].sort_by_key(|t| std::cmp::Reverse(t.rows.start));
        }
    }
    if scopes.len() > 1 {
        // Sequences differ: the longest tasks first, wherever they are.
        list.sort_by_key(|t| std::cmp::Reverse(scopes[t.sequence].cost(t.bh, &t.rows)));
    }
    list
}

/// `data` as elements of type `U` when that is what `T` is.
fn same<T: 'static, U: 'static>(data: &[T]) -> Option<*const U> {
    (TypeId::of::<T>() == TypeId::of::<U>()).then(|| data.as_ptr().cast())
}

/// Row `r` as f32: in place, or widened to `to`, which has room for it.
pub(super) fn wide<T: Element>(kernels: &Kernels, r: &[T], to: *mut f32) -> *const f32 {
    if let Some(p) = same::<T, f32>(r) {
        return p;
    }
    if let Some(p) = same::<T, bf16>(r) {
        // SAFETY: `to` has room for the row; bf16 is two bytes of bits; `kernels` suits the machine.
        unsafe { (kernels.widen)(p.cast(), r.len(), to) };
    } else {
        for (c, x) in r.iter().enumerate() {
            // SAFETY: `to` has room for the row.
            unsafe { *to.add(c) = x.to_f32() };
        }
    }
    to
}

impl<T: Element> Call<'_, T> {
    /// List the keys of `rows`, all of one block, and count the work.
    pub(super) fn list(&self, s: &mut Listed, bh: usize, rows: &Range<usize>) -> Work {
        let (mut work, keys) = self.scope.list(s, bh, rows, &(0..self.scope.tk));
        let (d, dv, size) = (self.q.shape[3], self.v.shape[3], size_of::<T>());
        let r = self.scope.rank();
        work.flops = 2 * work.pairs * (d + dv + r) as u64;
        work.bytes = keys * ((d + dv) * size + 4 * r) as u64 + (rows.len() * (d * size + (dv + r) * 4)) as u64;
        work
    }

    /// Whether AMX tiles were asked for: bf16, the machine has them, and the system lets us use them.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn wants_tiles(&self) -> bool {
        TypeId::of::<T>() == TypeId::of::<bf16>() && self.scope.isa == crate::Isa::Amx
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
        let work = self.list(&mut s.listed, bh, &rows);

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
        let (sign, squash, unit) = match (self.scope.p.softcap, self.scope.p.scale) {
            (_, 0.0) => (0.0, 0.0, 1.0),
            (Some(cap), scale) => (1.0, scale / cap, cap),
            (None, scale) => (scale.signum(), 0.0, scale.abs()),
        };
        let c = unit * LOG2_E;
        let mut ptrs = [null(); MAX_STRIP];
        for i in (0..n).step_by(full) {
            let (a, b, w) = strips(i);
            for (x, p) in ptrs[..b - a].iter_mut().enumerate() {
                // SAFETY: MAX_STRIP rows of d.
                let to = unsafe { wide_q.add(if wide_k.is_null() { 0 } else { x * d }) };
                *p = wide(self.kernels, self.q.row(bi, hi, rows.start + a + x), to);
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

        for at in (0..s.listed.keys.len()).step_by(KEY_TILE) {
            let keys = &s.listed.keys[at..(at + KEY_TILE).min(s.listed.keys.len())];
            for (x, &j) in keys.iter().enumerate() {
                // SAFETY: KEY_TILE rows of d and dv; null is only offset by 0 (f32 rows are used in place).
                let (to_k, to_v) = unsafe {
                    if wide_k.is_null() { (wide_k, wide_v) } else { (wide_k.add(x * d), wide_v.add(x * dv)) }
                };
                s.k_rows[x] = wide(self.kernels, self.k.row(bi, kh, j as usize), to_k);
                s.v_rows[x] = wide(self.kernels, self.v.row(bi, kh, j as usize), to_v);
            }
            let pad = s.k_rows[keys.len() - 1];
            s.k_rows[keys.len()..keys.len() + KEY_PAD].fill(pad);
            for i in (0..n).step_by(full) {
                let (a, b, w) = strips(i);
                let of = rows.start + a..rows.start + b;
                let marks = s.listed.marks_of(at, keys.len());
                let Some(part) = self.scope.part(&mut s.masks, keys, marks, &of, a, 1) else { continue };
                let (from, to) = (part.keys.start, part.keys.end);
                let width = if few { n } else { w };
                let bias = self.scope.bias_tile(&mut s.bias, [bi, hi], &keys[from..to], of, width, c);
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
                    masks: part.masks,
                    squash,
                    bias,
                    c,
                    sigmoid: self.scope.p.normalizer.sigmoid().map(|b| b * LOG2_E),
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
                let parts = Finish {
                    w,
                    dv,
                    o,
                    m,
                    l,
                    unit,
                    summed: self.scope.p.normalizer == Normalizer::Softmax,
                    sink: None,
                    rows: &[],
                    lse: std::ptr::null_mut(),
                };
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
        let sink = self.scope.p.sinks.map(|x| x[hi]);
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
}
