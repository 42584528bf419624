//! Few queries over long, possibly compressed, key/value stores.
//!
//! Each K/V head is a list of segments (pages, or an old part and a recent part). A segment
//! stores rows in one codec and, for keys, possibly only some channels. The work of all heads of all
//! sequences is cut into parts of equal size, however ragged they are (`plan`), and the parts are
//! merged by log-sum-exp; all query heads of a group share each row read. Codecs are
//! decoded in registers; where there are AMX tiles, bf16 and int8 rows are multiplied as they lie (`tiles`).

mod block;
mod codec;
mod plan;
mod tiles;
mod vector;
mod walk;

pub use codec::{Codec, INT4_GROUP, INT4_GROUP_BYTES, int4_row_bytes, pack_int4};

use crate::error::{KernelError, Result, same};
use crate::isa::Isa;
use crate::merge::merge_row;
use crate::table::KeyLists;
use crate::work::Work;
use block::{BLOCK, Block, Queries, Running, Step};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::OnceLock;
use walk::{Head, Keys, Walk};

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

impl<'a> Segment<'a> {
    /// Latent rows from which all heads read both keys and values (multi-head latent attention, DeepSeek-AI 2024,
    /// "DeepSeek-V2", arXiv 2405.04434, section 2.1): row j is (c_j, k^R_j), the compressed latent and the
    /// rotated key that all heads share, and K/V head 0 is the only one.
    ///
    /// There k_j = (W^UK c_j, k^R_j) and v_j = W^UV c_j in each head. Since q · W^UK c = (W^UKᵀ q) · c, the caller
    /// absorbs the up-projections: head i asks with (W^UKᵀ_i q_i, q^R_i), which is as wide as a row,
    ///
    /// s_ij = scale · ((W^UKᵀ_i q_i) · c_j + q^R_i · k^R_j), u_i = Σ_j softmax(s_i)_j c_j,
    ///
    /// with scale = 1/√(width of q_i + width of q^R_i) as before absorbing, `v_dim` = the width of c, and
    /// o_i = W^UV_i u_i is left to the caller. A row is read once for both, and its bytes count once.
    pub fn latent(rows: Codec<'a>, len: usize) -> Self {
        Segment { k: rows, v: rows, len, channels: None }
    }

    /// Bytes of a token: what keys and values share counts once.
    fn token_bytes(&self, width: usize, v_dim: usize) -> usize {
        let (k, v) = (self.k.row_bytes(width), self.v.row_bytes(v_dim));
        if self.k.is(&self.v) { k.max(v) } else { k + v }
    }

    fn width(&self, head_dim: usize) -> usize {
        self.channels.map_or(head_dim, <[u32]>::len)
    }
}

/// One sequence of a ragged batch.
#[derive(Debug)]
pub struct Sequence<'a> {
    /// Queries (H, n, D contiguous).
    pub q: &'a [f32],
    /// Queries of each head.
    pub n: usize,
    /// Segments of each K/V head.
    pub kv: &'a [Vec<Segment<'a>>],
    /// Key lists, as of [`Decode::run`].
    pub select: Option<&'a KeyLists>,
    /// Where the output goes (H, n, v_dim).
    pub out: &'a mut [f32],
    /// Where the log-sum-exp goes (H, n).
    pub lse: &'a mut [f32],
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
    /// group of heads, or those among them with equal lists. `fallback` counts what AMX tiles could not do.
    ///
    /// Errors: heads that are no multiple of the K/V heads; slices or lists that do not fit the shape; a segment that
    /// claims more tokens than its rows; channels beyond D. Nothing was written then.
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
        self.run_batch(&mut [Sequence { q, n, kv, select, out, lse }], [h, d, v_dim])
    }

    /// [`Decode::run`] over sequences of different lengths and stores at once, all with `h` query heads of width
    /// `d` and values of `v_dim`. The work of all is cut into parts of equal size, so that one long
    /// sequence among short ones keeps no thread waiting. The answer does not depend on the number of threads.
    ///
    /// Errors: as of [`Decode::run`], for any sequence; nothing was written then.
    pub fn run_batch(&self, sequences: &mut [Sequence], [h, d, v_dim]: [usize; 3]) -> Result<Work> {
        for s in &*sequences {
            self.check(s, [h, d, v_dim])?;
        }
        let isa = self.isa.min(Isa::detect());
        let mut problem = Problem { d, v_dim, call: self, isa, heads: Vec::new(), jobs: Vec::new() };
        for (at, s) in sequences.iter().enumerate() {
            problem.add(at, s, h);
        }
        let mut work = Work::default();
        let mut costs = Vec::with_capacity(problem.jobs.len());
        for job in &problem.jobs {
            let w = problem.work(job);
            // A byte and 16 operations take about the same time.
            costs.push((job.keys.len(), (w.bytes + w.flops / 16) / job.keys.len().max(1) as u64));
            work += w;
        }
        let shares = plan::shares(&costs);
        let run = |pieces: &Vec<plan::Piece>| {
            tiles::State::with(|tiles| {
                let piece = |(job, range): &plan::Piece| problem.piece(&problem.jobs[*job], range.clone(), tiles);
                pieces.iter().map(piece).collect()
            })
        };
        let results: Vec<Vec<Running>> = match &shares[..] {
            [one] => vec![run(one)],
            many => many.par_iter().with_max_len(1).map(run).collect(),
        };
        let places: Vec<(usize, Vec<usize>)> = problem.jobs.into_iter().map(|j| (j.sequence, j.rows)).collect();
        for s in &mut *sequences {
            s.out.fill(0.0);
            s.lse.fill(f32::NEG_INFINITY);
        }
        let mut o = vec![0f32; v_dim];
        for ((job, _), part) in shares.iter().flatten().zip(results.iter().flatten()) {
            let (at, rows) = &places[*job];
            let s = &mut sequences[*at];
            for (i, &r) in rows.iter().enumerate() {
                let l = part.finish(i, &mut o);
                merge_row(&mut s.out[r * v_dim..(r + 1) * v_dim], &mut s.lse[r], &o, l);
            }
            work.fallback += part.fallback;
        }
        Ok(work)
    }

    fn check(&self, s: &Sequence, [h, d, v_dim]: [usize; 3]) -> Result<()> {
        let (n, hkv) = (s.n, s.kv.len());
        if hkv == 0 || !h.is_multiple_of(hkv) {
            return Err(KernelError::Groups { op: "decode", heads: h, kv_heads: hkv });
        }
        let need = |name, have, want| same("decode", "elements", name, have, "heads*queries*width", want);
        need("q", s.q.len(), h * n * d)?;
        need("out", s.out.len(), h * n * v_dim)?;
        need("lse", s.lse.len(), h * n)?;
        // Pages of one head mostly share their channels, which are then looked at once.
        let mut good: Option<&[u32]> = None;
        for s in s.kv.iter().flatten() {
            for (rows, what, width) in [(&s.k, "keys", s.width(d)), (&s.v, "values", v_dim)] {
                if !rows.holds(s.len, width) || s.len > u32::MAX as usize {
                    return Err(too_long("decode", what, s.len, width));
                }
            }
            if let Some(c) = s.channels
                && !good.is_some_and(|g| std::ptr::eq(g, c))
            {
                if c.iter().any(|&c| c as usize >= d) {
                    return Err(KernelError::Param {
                        op: "decode",
                        name: "channels",
                        value: format!("{c:?}"),
                        remedy: format!("channel numbers must be below head_dim {d}"),
                    });
                }
                good = Some(c);
            }
        }
        if let Some(lists) = s.select {
            same("decode", "heads", "key lists", lists.heads.len(), "q", h)?;
            for (hi, l) in lists.heads.iter().enumerate() {
                l.check(n, s.kv[hi / (h / hkv)].iter().map(|s| s.len).sum())?;
            }
        }
        Ok(())
    }
}

/// Query rows of one K/V head that visit the same keys.
struct Job<'a> {
    sequence: usize,
    q: &'a [f32],
    /// Number of the K/V head among those of all sequences.
    head: usize,
    /// Rows of q.
    rows: Vec<usize>,
    /// Tokens that each row may see, by causality.
    visible: Vec<usize>,
    keys: Keys<'a>,
    /// All channels of the rows, made by the first part that needs them.
    queries: OnceLock<Queries>,
}

/// A checked call.
struct Problem<'a> {
    d: usize,
    v_dim: usize,
    call: &'a Decode,
    isa: Isa,
    heads: Vec<Head<'a>>,
    jobs: Vec<Job<'a>>,
}

impl<'a> Problem<'a> {
    fn add(&mut self, sequence: usize, s: &Sequence<'a>, h: usize) {
        let (q, n, kv, select) = (s.q, s.n, s.kv, s.select);
        let group = h / kv.len();
        let new = |head, keys| {
            let (rows, visible) = (vec![], vec![]);
            Job { sequence, q, head, rows, visible, keys, queries: OnceLock::new() }
        };
        for (kv_head, segments) in kv.iter().enumerate() {
            let head = self.heads.len();
            self.heads.push(Head::new(segments));
            let total = self.heads[head].tokens;
            let visible = |i: usize| (total + i + 1).saturating_sub(n).min(total);
            let heads = kv_head * group..(kv_head + 1) * group;
            let Some(lists) = select else {
                if n > 0 {
                    let mut job = new(head, Keys::First(total));
                    job.rows.extend(heads.flat_map(|hi| hi * n..(hi + 1) * n));
                    job.visible.extend(job.rows.iter().map(|r| visible(r % n)));
                    self.jobs.push(job);
                }
                continue;
            };
            let jobs = &mut self.jobs;
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
                            jobs.push(new(head, Keys::Listed(row)));
                            let last = jobs.len() - 1;
                            &mut jobs[last]
                        }
                    };
                    job.visible.extend(queries.clone().map(visible));
                    job.rows.extend(queries.map(|i| hi * n + i));
                }
            }
        }
    }

    fn work(&self, job: &Job) -> Work {
        let mut work = Work::default();
        let head = &self.heads[job.head];
        job.keys.visit(head, |s, keys| {
            let width = s.width(self.d);
            let pairs = (keys * job.rows.len()) as u64;
            work += Work {
                flops: 2 * (width + self.v_dim) as u64 * pairs,
                bytes: (keys * s.token_bytes(width, self.v_dim)) as u64,
                tiles: 1,
                pairs,
                fallback: 0,
            };
        });
        work
    }

    /// The visited keys numbered `range` of one job.
    fn piece(&self, job: &Job, range: Range<usize>, tiles: &mut tiles::State) -> Running {
        let mut run = Running::new(job.rows.len(), self.v_dim);
        let mut walk = Walk::new(&self.heads[job.head], &job.keys, range);
        let mut pruned: Option<(&[u32], Queries)> = None;
        let mut seen = vec![0usize; job.rows.len()];
        let mut blocks = [Block::new(), Block::new()];
        let mut now = walk.fill(&mut blocks[0]);
        while let Some(here) = now {
            // One block ahead, so that its rows are fetched while this one is computed.
            let (block, ahead) = {
                let [a, b] = &mut blocks;
                if here.even { (&*a, b) } else { (&*b, a) }
            };
            now = walk.fill(ahead);
            let next = if now.is_some() { &*ahead } else { block };
            job.keys.seen(&here.keys, &job.visible, &mut seen);
            let queries = match here.channels {
                None => job.queries.get_or_init(|| self.gather(job, None)),
                Some(channels) => {
                    let ready = pruned.take().filter(|(have, _)| *have == channels);
                    let fresh = || (channels, self.gather(job, here.channels));
                    &pruned.insert(ready.unwrap_or_else(fresh)).1
                }
            };
            let (scale, softcap) = (self.call.scale, self.call.softcap);
            let step = Step { queries, block, next, seen: &seen, scale, softcap };
            // SAFETY: `isa` was lowered to the machine's; `Decode::check` found that each segment holds `len`
            // rows of its widths, and the walk stays below `len`.
            unsafe { block::step(self.isa, &step, &mut run, tiles) };
        }
        run
    }

    /// The channels of a job's rows of q that a segment's keys hold.
    fn gather(&self, job: &Job, channels: Option<&[u32]>) -> Queries {
        let (rows, q) = (&job.rows, job.q);
        match channels {
            None => Queries::new(rows.len(), self.d, |r, c| q[rows[r] * self.d + c]),
            Some(ch) => Queries::new(rows.len(), ch.len(), |r, c| q[rows[r] * self.d + ch[c] as usize]),
        }
    }
}

/// Keys to a part of [`key_scores`].
const MIN_SPAN: usize = 512;
/// Bytes of keys under which [`key_scores`] stays on its thread.
const PARALLEL_BYTES: u64 = 128 << 10;

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
    if !keys.holds(len, q_width) || len > u32::MAX as usize {
        return Err(too_long("key_scores", "keys", len, q_width));
    }
    let isa = isa.min(Isa::detect());
    let queries = Queries::new(rows, q_width, |r, c| q[r * q_width + c]);
    let work = Work {
        flops: 2 * (rows * len * q_width) as u64,
        bytes: (len * keys.row_bytes(q_width)) as u64,
        ..Work::default()
    };
    let segments = [Segment { k: keys, v: keys, len, channels: None }];
    let (head, all) = (Head::new(&segments), Keys::First(len));
    let dst = Columns(out.as_mut_ptr());
    let span = |from: usize| {
        let mut scores = vec![0f32; rows.next_multiple_of(4) * BLOCK];
        let mut block = Block::new();
        let mut walk = Walk::new(&head, &all, from..len.min(from + MIN_SPAN));
        while let Some(here) = walk.fill(&mut block) {
            // SAFETY: the machine has `isa`; the rows and the size of `out` were checked above; spans are
            // disjoint.
            unsafe {
                tiles::State::with(|tiles| block::raw(isa, &queries, &block, &mut scores, tiles));
                for r in 0..rows {
                    let dst = dst.at(r * len + here.keys.start);
                    std::ptr::copy_nonoverlapping(scores.as_ptr().add(r * BLOCK), dst, here.keys.len());
                }
            }
        }
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
fn too_long(op: &'static str, what: &str, len: usize, width: usize) -> KernelError {
    KernelError::Param {
        op,
        name: "segment length",
        value: len.to_string(),
        remedy: format!("the stored rows of {what} {width} wide (or their scales) are fewer; shorten the segment"),
    }
}
