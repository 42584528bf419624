//! Few queries over a long, possibly compressed, key/value store.
//!
//! Each K/V head is a list of segments (pages, or an old part and a recent part). A segment
//! stores rows in one codec and, for keys, possibly only some channels. Work is cut into
//! (K/V head, span of keys) of about equal length, however ragged the heads, and the parts are
//! merged by log-sum-exp; all query heads of a group share each row read. Codecs are
//! decoded in registers.

mod block;
mod vector;

use crate::error::{KernelError, Result, same};
use crate::isa::Isa;
use crate::merge::merge_row;
use crate::table::KeyLists;
use crate::work::Work;
use block::{BLOCK, Queries, Running, Step};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::OnceLock;

/// Rows of one K/V head in one codec. `width` elements a row, `stride` elements from row to row.
#[derive(Clone, Copy, Debug)]
pub enum Codec<'a> {
    /// f32 rows.
    F32 {
        /// Elements.
        data: &'a [f32],
        /// Elements from row to row.
        stride: usize,
    },
    /// bf16 rows.
    Bf16 {
        /// Elements.
        data: &'a [bf16],
        /// Elements from row to row.
        stride: usize,
    },
    /// int8 rows with one f32 scale a row: x ≈ scale · q.
    Int8 {
        /// Elements.
        data: &'a [i8],
        /// Elements from row to row.
        stride: usize,
        /// One scale a row.
        scales: &'a [f32],
    },
}

impl Codec<'_> {
    /// Bytes of one stored row of `width` elements.
    pub fn row_bytes(&self, width: usize) -> usize {
        match self {
            Codec::F32 { .. } => 4 * width,
            Codec::Bf16 { .. } => 2 * width,
            Codec::Int8 { .. } => width + 4,
        }
    }

    /// Rows that the memory can hold at this width.
    fn capacity(&self, width: usize) -> usize {
        let rows = |len: usize, stride: usize| match (len >= width, stride) {
            (false, _) => 0,
            (true, 0) => 1,
            (true, s) => (len - width) / s + 1,
        };
        match self {
            Codec::F32 { data, stride } => rows(data.len(), *stride),
            Codec::Bf16 { data, stride } => rows(data.len(), *stride),
            Codec::Int8 { data, stride, scales } => rows(data.len(), *stride).min(scales.len()),
        }
    }

    /// Decode row `j` into `out`.
    #[inline]
    pub fn row(&self, j: usize, out: &mut [f32]) {
        let w = out.len();
        match self {
            Codec::F32 { data, stride } => out.copy_from_slice(&data[j * stride..j * stride + w]),
            Codec::Bf16 { data, stride } => {
                for (o, x) in out.iter_mut().zip(&data[j * stride..j * stride + w]) {
                    *o = x.to_f32();
                }
            }
            Codec::Int8 { data, stride, scales } => {
                for (o, x) in out.iter_mut().zip(&data[j * stride..j * stride + w]) {
                    *o = f32::from(*x) * scales[j];
                }
            }
        }
    }
}

/// Consecutive tokens of one K/V head.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Keys, `channels.len()` (or head_dim) wide.
    pub k: Codec<'a>,
    /// Values, `v_dim` wide.
    pub v: Codec<'a>,
    /// Tokens.
    pub len: usize,
    /// The head channels that the keys hold, ascending; `None` = all.
    pub channels: Option<&'a [u32]>,
}

/// One decode call. See [`Decode::run`].
#[derive(Clone, Copy, Debug)]
pub struct Decode {
    /// Factor on q·k.
    pub scale: f32,
    /// `cap * tanh(s / cap)` on the scaled score.
    pub softcap: Option<f32>,
    /// Instruction set.
    pub isa: Isa,
}

impl Decode {
    /// Plain softmax decode.
    pub fn new(scale: f32) -> Self {
        Self { scale, softcap: None, isa: Isa::active() }
    }

    /// Queries `q` (H, n, D contiguous) over `kv[kv_head]`, causal bottom-right among the n
    /// queries: row i of n sees tokens up to total − n + i. With `select` (one entry per query
    /// head, `group` 1 or n) a row sees only its listed tokens. Writes `out` (H, n, v_dim) and
    /// `lse` (H, n).
    ///
    /// The work counts each K and V row once for all the queries that share it: the queries of a
    /// group of heads, or those among them with equal lists.
    pub fn run(
        &self,
        q: &[f32],
        [h, n, d]: [usize; 3],
        kv: &[Vec<Segment>],
        v_dim: usize,
        select: Option<&KeyLists>,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<Work> {
        let hkv = kv.len();
        if hkv == 0 || !h.is_multiple_of(hkv) {
            return Err(KernelError::Groups { op: "decode", heads: h, kv_heads: hkv });
        }
        let need = |name, have, want| same("decode", "elements", name, have, "heads*queries*width", want);
        need("q", q.len(), h * n * d)?;
        need("out", out.len(), h * n * v_dim)?;
        need("lse", lse.len(), h * n)?;
        for segs in kv {
            for s in segs {
                let kw = s.channels.map_or(d, <[u32]>::len);
                if s.k.capacity(kw) < s.len || s.v.capacity(v_dim) < s.len || s.len > u32::MAX as usize {
                    return Err(too_long("decode", s.len));
                }
                if let Some(c) = s.channels
                    && c.iter().any(|&c| c as usize >= d)
                {
                    return Err(KernelError::Param {
                        op: "decode",
                        name: "channels",
                        value: format!("{c:?}"),
                        remedy: format!("channel numbers must be below head_dim {d}"),
                    });
                }
            }
        }
        if let Some(lists) = select {
            same("decode", "heads", "key lists", lists.heads.len(), "q", h)?;
            for (hi, l) in lists.heads.iter().enumerate() {
                l.check(n, tokens(&kv[hi / (h / hkv)]))?;
            }
        }
        out.fill(0.0);
        lse.fill(f32::NEG_INFINITY);
        let problem = Problem { q, n, d, kv, v_dim, call: self, isa: self.isa.min(Isa::detect()) };
        let jobs = problem.jobs(h, select);
        let mut work = Work::default();
        let mut parts = Vec::new();
        let total: usize = jobs.iter().map(|j| j.keys.len()).sum();
        // By the problem alone, not the number of threads, so that the answer is too.
        let span = total.div_ceil(64).max(MIN_SPAN);
        for (at, job) in jobs.iter().enumerate() {
            work += problem.work(job);
            let pieces = job.keys.len().div_ceil(span);
            let step = job.keys.len().div_ceil(pieces.max(1)).next_multiple_of(BLOCK);
            parts.extend((0..pieces).map(|p| (at, p * step..((p + 1) * step).min(job.keys.len()))));
        }
        let run = |(at, range): &(usize, Range<usize>)| problem.part(&jobs[*at], range.clone());
        let results: Vec<Running> = if parts.len() > 1 && work.bytes >= PARALLEL_BYTES {
            parts.par_iter().with_max_len(1).map(run).collect()
        } else {
            parts.iter().map(run).collect()
        };
        let mut o = vec![0f32; v_dim];
        for ((at, _), part) in parts.iter().zip(&results) {
            for (i, &r) in jobs[*at].rows.iter().enumerate() {
                let l = part.finish(i, &mut o);
                merge_row(&mut out[r * v_dim..(r + 1) * v_dim], &mut lse[r], &o, l);
            }
        }
        Ok(work)
    }
}

/// Fewest keys worth a part of their own.
const MIN_SPAN: usize = 512;
/// Bytes of K and V under which a call stays on its thread.
const PARALLEL_BYTES: u64 = 128 << 10;

/// Tokens of a K/V head.
fn tokens(segments: &[Segment]) -> usize {
    segments.iter().map(|s| s.len).sum()
}

/// Keys that a job visits.
enum Keys<'a> {
    /// The first so many.
    First(usize),
    /// These.
    Listed(&'a [u32]),
}

impl Keys<'_> {
    fn len(&self) -> usize {
        match self {
            Keys::First(n) => *n,
            Keys::Listed(l) => l.len(),
        }
    }

    /// Of the visited keys numbered `range`, those in tokens `base..base + len`.
    fn inside(&self, range: &Range<usize>, base: usize, len: usize) -> Range<usize> {
        let (a, b) = match self {
            Keys::First(_) => (base, base + len),
            Keys::Listed(l) => {
                let before = |token: usize| l.partition_point(|&k| (k as usize) < token);
                (before(base), before(base + len))
            }
        };
        let a = a.clamp(range.start, range.end);
        a..b.clamp(a, range.end)
    }
}

/// Query rows of one K/V head that visit the same keys.
struct Job<'a> {
    kv_head: usize,
    /// Rows of q.
    rows: Vec<usize>,
    /// Tokens that each row may see, by causality.
    visible: Vec<usize>,
    keys: Keys<'a>,
    /// All channels of the rows, made by the first part that needs them.
    queries: OnceLock<Queries>,
}

impl<'a> Job<'a> {
    fn new(kv_head: usize, keys: Keys<'a>) -> Self {
        Self { kv_head, rows: vec![], visible: vec![], keys, queries: OnceLock::new() }
    }
}

/// A checked call.
struct Problem<'a> {
    q: &'a [f32],
    n: usize,
    d: usize,
    kv: &'a [Vec<Segment<'a>>],
    v_dim: usize,
    call: &'a Decode,
    isa: Isa,
}

impl<'a> Problem<'a> {
    fn jobs<'l>(&self, h: usize, select: Option<&'l KeyLists>) -> Vec<Job<'l>> {
        let (n, group) = (self.n, h / self.kv.len());
        let mut jobs: Vec<Job> = Vec::new();
        for (kv_head, segments) in self.kv.iter().enumerate() {
            let total = tokens(segments);
            let visible = |i: usize| (total + i + 1).saturating_sub(n).min(total);
            let heads = kv_head * group..(kv_head + 1) * group;
            let Some(lists) = select else {
                if n > 0 {
                    let mut job = Job::new(kv_head, Keys::First(total));
                    job.rows.extend(heads.flat_map(|hi| hi * n..(hi + 1) * n));
                    job.visible.extend(job.rows.iter().map(|r| visible(r % n)));
                    jobs.push(job);
                }
                continue;
            };
            let first = jobs.len();
            for hi in heads {
                let list = &lists.heads[hi];
                for g in 0..n.div_ceil(list.group) {
                    let queries = g * list.group..((g + 1) * list.group).min(n);
                    let row = list.row(g);
                    let row = &row[..row.partition_point(|&k| (k as usize) < visible(queries.end - 1))];
                    // Heads of a group often choose together; then they read together.
                    let recent = first.max(jobs.len().saturating_sub(16));
                    let same = jobs[recent..].iter_mut().find(|j| matches!(j.keys, Keys::Listed(l) if l == row));
                    let job = match same {
                        Some(job) => job,
                        None => {
                            jobs.push(Job::new(kv_head, Keys::Listed(row)));
                            let last = jobs.len() - 1;
                            &mut jobs[last]
                        }
                    };
                    job.visible.extend(queries.clone().map(visible));
                    job.rows.extend(queries.map(|i| hi * n + i));
                }
            }
        }
        jobs
    }

    fn work(&self, job: &Job) -> Work {
        let mut work = Work::default();
        let all = 0..job.keys.len();
        let mut base = 0;
        for s in &self.kv[job.kv_head] {
            let keys = job.keys.inside(&all, base, s.len).len();
            base += s.len;
            if keys > 0 {
                let width = s.channels.map_or(self.d, <[u32]>::len);
                let pairs = (keys * job.rows.len()) as u64;
                work += Work {
                    flops: 2 * (width + self.v_dim) as u64 * pairs,
                    bytes: (keys * (s.k.row_bytes(width) + s.v.row_bytes(self.v_dim))) as u64,
                    tiles: 1,
                    pairs,
                    fallback: 0,
                };
            }
        }
        work
    }

    /// The visited keys numbered `range` of one job.
    fn part(&self, job: &Job, range: Range<usize>) -> Running {
        let mut run = Running::new(job.rows.len(), self.v_dim);
        let segments = &self.kv[job.kv_head];
        let mut pruned: Option<(&[u32], Queries)> = None;
        let mut seen = vec![0usize; job.rows.len()];
        let mut base = 0;
        for s in segments {
            let inside = job.keys.inside(&range, base, s.len);
            for from in inside.clone().step_by(BLOCK) {
                let block = from..(from + BLOCK).min(inside.end);
                let mut at = [0u32; BLOCK];
                let at = &mut at[..block.len()];
                match job.keys {
                    Keys::First(_) => {
                        for (at, token) in at.iter_mut().zip((block.start - base) as u32..) {
                            *at = token;
                        }
                    }
                    Keys::Listed(l) => {
                        for (at, &token) in at.iter_mut().zip(&l[block]) {
                            *at = token - base as u32;
                        }
                    }
                }
                let last = base + at[at.len() - 1] as usize;
                for (seen, &visible) in seen.iter_mut().zip(&job.visible) {
                    *seen =
                        if last < visible { at.len() } else { at.partition_point(|&j| base + (j as usize) < visible) };
                }
                let queries = match s.channels {
                    None => job.queries.get_or_init(|| self.gather(&job.rows, None)),
                    Some(channels) => {
                        let ready = pruned.take().filter(|(have, _)| std::ptr::eq(*have, channels));
                        let fresh = || (channels, self.gather(&job.rows, s.channels));
                        &pruned.insert(ready.unwrap_or_else(fresh)).1
                    }
                };
                let step = Step {
                    queries,
                    keys: s.k,
                    values: s.v,
                    at,
                    seen: &seen,
                    scale: self.call.scale,
                    softcap: self.call.softcap,
                };
                // SAFETY: `isa` was lowered to the machine's; `Decode::run` checked that each segment
                // holds `len` rows of its widths, and `inside` keeps `at` below `len`.
                unsafe { block::step(self.isa, &step, &mut run) };
            }
            base += s.len;
        }
        run
    }

    /// The channels of some rows of q that a segment's keys hold.
    fn gather(&self, rows: &[usize], channels: Option<&[u32]>) -> Queries {
        match channels {
            None => Queries::new(rows.len(), self.d, |r, c| self.q[rows[r] * self.d + c]),
            Some(ch) => Queries::new(rows.len(), ch.len(), |r, c| self.q[rows[r] * self.d + ch[c] as usize]),
        }
    }
}

/// Output of the score workers, which write disjoint columns.
#[derive(Clone, Copy)]
struct Columns(*mut f32);
// SAFETY: each worker writes columns of its own span of keys.
unsafe impl Send for Columns {}
// SAFETY: as above.
unsafe impl Sync for Columns {}
impl Columns {
    fn at(self, i: usize) -> *mut f32 {
        self.0.wrapping_add(i)
    }
}

/// Raw scores q·k over the first `q_width` elements of each stored row: `q` (rows, q_width)
/// against `len` rows of `keys`, into `out` (rows, len). The estimators' primitive: no scale,
/// no softmax. Reading a prefix of each row is how low-rank scoring (Loki) stays cheap.
pub fn key_scores(q: &[f32], q_width: usize, keys: Codec, len: usize, out: &mut [f32], isa: Isa) -> Result<Work> {
    let rows = q.len() / q_width.max(1);
    same("key_scores", "rows*len", "out", out.len(), "q and keys", rows.saturating_mul(len))?;
    if keys.capacity(q_width) < len || len > u32::MAX as usize {
        return Err(too_long("key_scores", len));
    }
    let isa = isa.min(Isa::detect());
    let queries = Queries::new(rows, q_width, |r, c| q[r * q_width + c]);
    let work = Work {
        flops: 2 * (rows * len * q_width) as u64,
        bytes: (len * keys.row_bytes(q_width)) as u64,
        ..Work::default()
    };
    let dst = Columns(out.as_mut_ptr());
    let span = |from: usize| {
        let count = MIN_SPAN.min(len - from);
        // SAFETY: the machine has `isa`; capacity and the size of `out` were checked above; spans are
        // disjoint.
        unsafe { block::raw(isa, &queries, &keys, from, count, dst.at(from), len) };
    };
    if rows > 0 {
        let spans = len.div_ceil(MIN_SPAN);
        if work.bytes >= PARALLEL_BYTES && spans > 1 {
            (0..spans).into_par_iter().for_each(|i| span(i * MIN_SPAN));
        } else {
            (0..spans).for_each(|i| span(i * MIN_SPAN));
        }
    }
    Ok(work)
}

/// Fewer stored rows than tokens claimed.
fn too_long(op: &'static str, len: usize) -> KernelError {
    KernelError::Param {
        op,
        name: "segment length",
        value: len.to_string(),
        remedy: "the stored rows are fewer; shorten the segment".into(),
    }
}
