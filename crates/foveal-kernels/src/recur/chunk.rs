//! One chunk of one head, forward and backward, for every gate that a matrix product can serve.
//!
//! With the cumulated log decay G (G₀ = 0 before the chunk) the state inside a chunk is
//! S_t = e^{G_t} S₀ + Σ_{j≤t} e^{G_t−G_j} x_j y_jᵀ. Vectors that are written, x, with their values y:
//! k with v; under a delta rule k with u; under diagonal-plus-low-rank also a with p. Vectors that
//! read: q after the write; k after the decay (delta) or b before it (low rank), which give p. So all
//! gates are one computation:
//!
//! 1. scores A = reader · writerᵀ ∘ decay, lower triangular, strictly so for the second reader;
//! 2. values: a unit lower triangular system for u or p, from what the second reader sees of S₀;
//! 3. O = (q e^G) S₀ + A_qk U (+ A_qa P);
//! 4. S ← e^{G_C} S₀ + Σ (e^{G_C−G_j} x_j) y_jᵀ.
//!
//! No exponential of a positive number is taken. A scalar decay multiplies the scores. A decay by
//! channel is put into the vectors, by sub-chunks of 16 tokens: rows of sub-chunk I are decayed from
//! its start, earlier writers up to its start, and pairs inside a sub-chunk one by one (secondary
//! chunking of GLA, Yang et al. 2023, arXiv 2312.06635). The system is the WY form of the delta rule
//! (Yang et al. 2024, arXiv 2406.06484), here solved by blocked substitution in f32.

use super::mat::{Engine, Mat, Op, PAD, Ref, Tri};
use super::rows::{self, Diagonal, Factor};
use crate::exp::{self, Fun};
use crate::isa::Isa;

/// Tokens of a chunk.
pub(super) const CHUNK: usize = 64;

/// Shape of the decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decay {
    None,
    Scalar,
    Channel,
}

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// k vᵀ.
    Add,
    /// β k (v − what k reads after the decay)ᵀ.
    Delta,
    /// k vᵀ + a (what b reads before the decay)ᵀ.
    LowRank,
}

/// Inputs of a chunk and everything computed from them. Rows from the chunk's tokens to its padded
/// length are zero.
pub(super) struct Chunk {
    pub(super) decay: Decay,
    pub(super) rule: Rule,
    /// Whether `beta` scales what is written.
    pub(super) strength: bool,
    /// Tokens, and tokens padded.
    n: usize,
    np: usize,
    /// q (scaled) and, under `Rule::Delta`, a copy of k, or b.
    pub(super) readers: [Mat; 2],
    /// k and, under `Rule::LowRank`, a.
    pub(super) writers: [Mat; 2],
    pub(super) v: Mat,
    pub(super) beta: Vec<f32>,
    /// Log decay by channel, or one a token.
    pub(super) g: Mat,
    pub(super) g_row: Vec<f32>,
    /// e^ of the log decay from the chunk's start to t, from the sub-chunk's start to t, from t to
    /// the chunk's end; the last first as logarithm.
    from_start: Mat,
    from_sub: Mat,
    to_end: Mat,
    from_start_row: Vec<f32>,
    to_end_row: Vec<f32>,
    between: Mat,
    /// Scores by reader and writer.
    scores: [[Mat; 2]; 2],
    system: Mat,
    /// v less what k reads of S₀.
    seen: Mat,
    /// What is written beside each writer.
    values: [Mat; 2],
    /// Decayed copies.
    far: Mat,
    near: Mat,
    e: Mat,
    line: Mat,
    pub(super) out: Mat,
    back: Option<Box<Back>>,
}

/// Gradients of a chunk.
struct Back {
    readers: [Mat; 2],
    writers: [Mat; 2],
    scores: [[Mat; 2]; 2],
    values: [Mat; 2],
    seen: Mat,
    dv: Mat,
    dbeta: Vec<f32>,
    dg: Mat,
    dg_row: Vec<f32>,
    ds: Mat,
    tmp: Mat,
}

/// Gradients of a chunk, by token.
pub(super) struct Gradients<'a> {
    /// Of the scaled q.
    pub(super) q: &'a Mat,
    /// Of k as it is written, and (delta) as it reads.
    pub(super) k: &'a Mat,
    pub(super) second: &'a Mat,
    pub(super) a: &'a Mat,
    pub(super) v: &'a Mat,
    pub(super) beta: &'a [f32],
    pub(super) g: &'a Mat,
    pub(super) g_row: &'a [f32],
}

fn squares(c: usize, used: [[bool; 2]; 2]) -> [[Mat; 2]; 2] {
    used.map(|r| r.map(|u| if u { Mat::new(c, c) } else { Mat::new(0, 0) }))
}

impl Chunk {
    /// Room for chunks of up to `len` tokens.
    pub(super) fn new(decay: Decay, rule: Rule, strength: bool, d: usize, dv: usize, len: usize, back: bool) -> Self {
        let c = len.clamp(1, CHUNK).next_multiple_of(PAD);
        let some = |on: bool, cols: usize| if on { Mat::new(c, cols) } else { Mat::new(0, cols) };
        let (second, low_rank, channel) = (rule != Rule::Add, rule == Rule::LowRank, decay == Decay::Channel);
        let used = [[true, low_rank], [second, low_rank]];
        let back = back.then(|| {
            Box::new(Back {
                readers: [Mat::new(c, d), some(second, d)],
                writers: [Mat::new(c, d), some(low_rank, d)],
                scores: squares(c, used),
                values: [Mat::new(c, dv), some(low_rank, dv)],
                seen: some(second, dv),
                dv: Mat::new(c, dv),
                dbeta: vec![0.0; c],
                dg: some(decay != Decay::None, d),
                dg_row: vec![0.0; c],
                ds: Mat::new(d, dv),
                tmp: Mat::new(c, d),
            })
        });
        Chunk {
            decay,
            rule,
            strength,
            n: 0,
            np: 0,
            readers: [Mat::new(c, d), some(second, d)],
            writers: [Mat::new(c, d), some(low_rank, d)],
            v: Mat::new(c, dv),
            beta: vec![0.0; c],
            g: some(channel, d),
            g_row: vec![0.0; c],
            from_start: some(channel, d),
            from_sub: some(channel, d),
            to_end: some(channel, d),
            from_start_row: vec![0.0; c],
            to_end_row: vec![0.0; c],
            between: if decay == Decay::Scalar { Mat::new(c, c) } else { Mat::new(0, 0) },
            scores: squares(c, used),
            system: if second { Mat::new(c, c) } else { Mat::new(0, 0) },
            seen: some(second, dv),
            values: [Mat::new(c, dv), some(low_rank, dv)],
            far: Mat::new(c, d),
            near: Mat::new(c, d),
            e: some(channel, d),
            line: Mat::new(2 * PAD, d),
            out: Mat::new(c, dv),
            back,
        }
    }

    fn reader_count(&self) -> usize {
        1 + usize::from(self.rule != Rule::Add)
    }

    fn writer_count(&self) -> usize {
        1 + usize::from(self.rule == Rule::LowRank)
    }

    /// Whether reader `r` reads before its own token's decay.
    fn late(&self, r: usize) -> bool {
        r == 1 && self.rule == Rule::LowRank
    }

    /// Inputs are in place for `n` tokens: decays and scores.
    pub(super) fn begin(&mut self, eng: &mut Engine, n: usize) {
        (self.n, self.np) = (n, n.next_multiple_of(PAD));
        self.decays(eng);
        self.scores(eng);
    }

    fn decays(&mut self, eng: &Engine) {
        let np = self.np;
        match self.decay {
            Decay::None => {}
            Decay::Scalar => {
                let mut x = 0.0;
                for t in 0..np {
                    x += self.g_row[t];
                    self.from_start_row[t] = x;
                }
                x = 0.0;
                for t in (0..np).rev() {
                    self.to_end_row[t] = x;
                    x += self.g_row[t];
                }
                exp::apply(Fun::Exp, &mut self.from_start_row[..np], eng.isa);
                exp::apply(Fun::Exp, &mut self.to_end_row[..np], eng.isa);
                rows::decay_matrix(eng.isa, &mut self.between, &self.g_row, np);
            }
            Decay::Channel => {
                let cols = self.g.cols;
                for (to, period) in [(&mut self.from_start, CHUNK), (&mut self.from_sub, PAD)] {
                    for t in 0..np {
                        let all = &mut to.all_mut()[..(t + 1) * cols];
                        let (before, now) = all.split_at_mut(t * cols);
                        now.copy_from_slice(self.g.row(t));
                        if t % period > 0 {
                            rows::add(eng.isa, now, &before[(t - 1) * cols..]);
                        }
                    }
                    exp::apply(Fun::Exp, &mut to.all_mut()[..np * cols], eng.isa);
                }
            }
        }
    }

    /// Lengthen the logarithms in `to_end` by the sub-chunk at `at`: afterwards row j ≤ at + 15 is the
    /// sum of g over j < i ≤ at + 15.
    fn lengthen(&mut self, eng: &Engine, at: usize) {
        let cols = self.g.cols;
        let sum = &mut self.line.row_mut(0)[..cols];
        sum.fill(0.0);
        for j in (at..at + PAD).rev() {
            self.to_end.row_mut(j).copy_from_slice(sum);
            rows::add(eng.isa, sum, self.g.row(j));
        }
        for j in 0..at {
            rows::add(eng.isa, self.to_end.row_mut(j), sum);
        }
    }

    /// Operands of the block on the diagonal at `at`.
    fn diagonal(&mut self, at: usize, back: Option<&mut Back>) -> (u8, Diagonal) {
        let cols = self.g.cols;
        let null = std::ptr::null_mut();
        let from = |m: &Mat| if m.rows == 0 { std::ptr::null() } else { m.row(at).as_ptr() };
        let (x, e) = self.line.all_mut().split_at_mut(cols);
        let mut p = Diagonal {
            cols,
            g: from(&self.g),
            readers: [from(&self.readers[0]), from(&self.readers[1])],
            writers: [from(&self.writers[0]), from(&self.writers[1])],
            scores: [[null; 2]; 2],
            ld: self.scores[0][0].cols,
            x: x.as_mut_ptr(),
            e: e.as_mut_ptr(),
            d_readers: [null; 2],
            d_writers: [null; 2],
        };
        let to = |m: &mut Mat| if m.rows == 0 { null } else { m.row_mut(at).as_mut_ptr() };
        let scores = match back {
            None => &mut self.scores,
            Some(b) => {
                p.d_readers = b.readers.each_mut().map(to);
                p.d_writers = b.writers.each_mut().map(to);
                &mut b.scores
            }
        };
        for r in 0..2 {
            for w in 0..2 {
                if scores[r][w].rows > 0 {
                    p.scores[r][w] = scores[r][w].row_mut(at)[at..].as_mut_ptr();
                }
            }
        }
        let rule = match self.rule {
            Rule::Add => rows::ADD,
            Rule::Delta => rows::DELTA,
            Rule::LowRank => rows::LOW_RANK,
        };
        (rule, p)
    }

    fn scores(&mut self, eng: &mut Engine) {
        let np = self.np;
        let (readers, writers) = (self.reader_count(), self.writer_count());
        if self.decay == Decay::Channel {
            let cols = self.g.cols;
            for at in (0..np).step_by(PAD) {
                if at > 0 {
                    self.decay_earlier(eng, at);
                    for w in 0..writers {
                        rows::scale(
                            eng.isa,
                            &mut self.far,
                            &self.writers[w],
                            Factor::Element(&self.e),
                            at,
                            false,
                            false,
                        );
                        for r in 0..readers {
                            let (late, e) = (self.late(r), Factor::Element(&self.from_sub));
                            rows::scale_from(eng.isa, self.near.all_mut(), &self.readers[r], e, at..at + PAD, late);
                            let to = self.scores[r][w].part_mut(at..at + PAD, 0..at);
                            eng.mm(
                                Op::Nt,
                                Tri::Full,
                                1.0,
                                self.near.part(0..PAD, 0..cols),
                                self.far.top(at),
                                to,
                                false,
                            );
                        }
                    }
                }
                let (rule, p) = self.diagonal(at, None);
                // SAFETY: `diagonal` points at rows at..at + 16 of matrices at least that long.
                unsafe { rows::diagonal(eng.isa, rule, &p) };
                self.lengthen(eng, at);
            }
            exp::apply(Fun::Exp, &mut self.to_end.all_mut()[..np * cols], eng.isa);
        }
        for r in 0..readers {
            for w in 0..writers {
                let late = self.late(r);
                let a = &mut self.scores[r][w];
                if self.decay != Decay::Channel {
                    let to = a.part_mut(0..np, 0..np);
                    eng.mm(Op::Nt, Tri::LowerOut, 1.0, self.readers[r].top(np), self.writers[w].top(np), to, false);
                }
                let m = (self.decay == Decay::Scalar).then_some(&self.between);
                rows::mask(eng.isa, a, m, np, r == 1, late);
            }
        }
    }

    /// `e`: the decay of rows before `at` up to the token before `at`.
    fn decay_earlier(&mut self, eng: &Engine, at: usize) {
        let n = at * self.g.cols;
        self.e.all_mut()[..n].copy_from_slice(&self.to_end.all()[..n]);
        exp::apply(Fun::Exp, &mut self.e.all_mut()[..n], eng.isa);
    }

    /// `far` = reader `r` decayed from the chunk's start; or the reader itself where nothing decays.
    fn reader_from_start(&mut self, eng: &Engine, r: usize) {
        let e = match self.decay {
            Decay::None => return,
            Decay::Scalar => Factor::Row(&self.from_start_row),
            Decay::Channel => Factor::Element(&self.from_start),
        };
        let late = r == 1 && self.rule == Rule::LowRank;
        rows::scale(eng.isa, &mut self.far, &self.readers[r], e, self.np, late, false);
    }

    fn started(&self, r: usize) -> Ref<'_> {
        if self.decay == Decay::None { self.readers[r].top(self.np) } else { self.far.top(self.np) }
    }

    /// `near` = writer `w` decayed to the chunk's end.
    fn writer_to_end(&mut self, eng: &Engine, w: usize) {
        let e = match self.decay {
            Decay::None => return,
            Decay::Scalar => Factor::Row(&self.to_end_row),
            Decay::Channel => Factor::Element(&self.to_end),
        };
        rows::scale(eng.isa, &mut self.near, &self.writers[w], e, self.np, false, false);
    }

    fn ended(&self, w: usize) -> Ref<'_> {
        if self.decay == Decay::None { self.writers[w].top(self.np) } else { self.near.top(self.np) }
    }

    /// What is written beside each writer, given the state before the chunk.
    pub(super) fn values(&mut self, eng: &mut Engine, s: Ref) {
        let np = self.np;
        let one = if self.strength { Factor::Row(&self.beta) } else { Factor::One };
        match self.rule {
            Rule::Add => rows::scale(eng.isa, &mut self.values[0], &self.v, one, np, false, false),
            Rule::Delta => {
                self.seen.all_mut().copy_from_slice(self.v.all());
                self.reader_from_start(eng, 1);
                let far = if self.decay == Decay::None { self.readers[1].top(np) } else { self.far.top(np) };
                eng.mm(Op::Nn, Tri::Full, -1.0, far, s, self.seen.top_mut(np), true);
                let beta = Factor::Row(&self.beta);
                rows::scale(eng.isa, &mut self.values[0], &self.seen, beta, np, false, false);
                rows::scale(eng.isa, &mut self.system, &self.scores[1][0], beta, np, false, false);
                eng.solve(&self.system, &mut self.values[0], np, false);
            }
            Rule::LowRank => {
                rows::scale(eng.isa, &mut self.values[0], &self.v, Factor::One, np, false, false);
                self.reader_from_start(eng, 1);
                let far = if self.decay == Decay::None { self.readers[1].top(np) } else { self.far.top(np) };
                eng.mm(Op::Nn, Tri::Full, 1.0, far, s, self.values[1].top_mut(np), false);
                let a = self.scores[1][0].part(0..np, 0..np);
                eng.mm(Op::Nn, Tri::LowerA, 1.0, a, self.v.top(np), self.values[1].top_mut(np), true);
                for t in 0..np {
                    let (to, from) = (self.system.row_mut(t), self.scores[1][1].row(t));
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = -from);
                }
                eng.solve(&self.system, &mut self.values[1], np, false);
            }
        }
    }

    /// `out`, given the state before the chunk.
    pub(super) fn output(&mut self, eng: &mut Engine, s: Ref) {
        let np = self.np;
        self.reader_from_start(eng, 0);
        let far = if self.decay == Decay::None { self.readers[0].top(np) } else { self.far.top(np) };
        eng.mm(Op::Nn, Tri::Full, 1.0, far, s, self.out.top_mut(np), false);
        for w in 0..self.writer_count() {
            let a = self.scores[0][w].part(0..np, 0..np);
            eng.mm(Op::Nn, Tri::LowerA, 1.0, a, self.values[w].top(np), self.out.top_mut(np), true);
        }
    }

    /// S ← S after the chunk. `exact` splits operands: for the gradient of a decay, and where what is read goes
    /// back into the state, which would carry errors on.
    pub(super) fn advance(&mut self, eng: &mut Engine, s: &mut Mat, exact: bool) {
        self.decay_state(eng.isa, s);
        let rows = s.rows;
        let split = eng.split;
        eng.split = split || exact || self.rule != Rule::Add;
        for w in 0..self.writer_count() {
            self.writer_to_end(eng, w);
            eng.mm(Op::Tn, Tri::Full, 1.0, self.ended(w), self.values[w].top(self.np), s.top_mut(rows), true);
        }
        eng.split = split;
    }

    /// S ← e^{G_C} S.
    fn decay_state(&self, isa: Isa, s: &mut Mat) {
        let last = self.np - 1;
        match self.decay {
            Decay::None => {}
            Decay::Scalar => {
                let e = self.from_start_row[last];
                rows::times(isa, s.all_mut(), e);
            }
            Decay::Channel => {
                for i in 0..s.rows {
                    let e = self.from_start.row(last)[i];
                    rows::times(isa, s.row_mut(i), e);
                }
            }
        }
    }

    /// Given the states before and after the chunk, the gradient of `out` (in `self.out`) and that of
    /// the state after, `ds`: gradients of the inputs; `ds` becomes that of the state before.
    pub(super) fn backward(&mut self, eng: &mut Engine, before: Ref, after: Ref, ds: &mut Mat) {
        let Some(mut b) = self.back.take() else { unreachable!("a chunk for backward has room for gradients") };
        let (n, np, isa) = (self.n, self.np, eng.isa);
        let (readers, writers) = (self.reader_count(), self.writer_count());
        // What a mere decay writes does not enter the decay's gradient.
        let split = eng.split;
        eng.split = split && self.rule != Rule::Add;
        self.values(eng, before);

        // Through the state after the chunk and the outputs to what was written.
        let d_rows = ds.rows;
        for w in 0..writers {
            self.writer_to_end(eng, w);
            eng.mm(Op::Nn, Tri::Full, 1.0, self.ended(w), ds.top(d_rows), b.values[w].top_mut(np), false);
            let a = self.scores[0][w].part(0..np, 0..np);
            eng.mm(Op::Tn, Tri::LowerA, 1.0, a, self.out.top(np), b.values[w].top_mut(np), true);
        }
        // Through the system, to what the second reader saw (`b.seen`).
        match self.rule {
            Rule::Add => {
                let e = if self.strength { Factor::Row(&self.beta) } else { Factor::One };
                rows::scale(isa, &mut b.dv, &b.values[0], e, np, false, false);
                for t in 0..n {
                    b.dbeta[t] = rows::dot(isa, b.values[0].row(t), self.v.row(t));
                }
            }
            Rule::Delta => {
                eng.solve(&self.system, &mut b.values[0], np, true);
                // v − p: what beta multiplies.
                let a = self.scores[1][0].part(0..np, 0..np);
                eng.mm(Op::Nn, Tri::LowerA, -1.0, a, self.values[0].top(np), self.seen.top_mut(np), true);
                for t in 0..n {
                    b.dbeta[t] = rows::dot(isa, b.values[0].row(t), self.seen.row(t));
                }
                rows::scale(isa, &mut b.dv, &b.values[0], Factor::Row(&self.beta), np, false, false);
                for t in 0..np {
                    let (to, from) = (b.seen.row_mut(t), b.dv.row(t));
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = -from);
                }
            }
            Rule::LowRank => {
                eng.solve(&self.system, &mut b.values[1], np, true);
                rows::scale(isa, &mut b.seen, &b.values[1], Factor::One, np, false, false);
                rows::scale(isa, &mut b.dv, &b.values[0], Factor::One, np, false, false);
                let a = self.scores[1][0].part(0..np, 0..np);
                eng.mm(Op::Tn, Tri::LowerA, 1.0, a, b.seen.top(np), b.dv.top_mut(np), true);
            }
        }
        // Readers and writers through the states at both ends.
        eng.split = split;
        for r in 0..readers {
            let given = if r == 0 { self.out.top(np) } else { b.seen.top(np) };
            eng.mm(Op::Nt, Tri::Full, 1.0, given, before, b.tmp.top_mut(np), false);
            let e = match self.decay {
                Decay::None => Factor::One,
                Decay::Scalar => Factor::Row(&self.from_start_row),
                Decay::Channel => Factor::Element(&self.from_start),
            };
            rows::scale(isa, &mut b.readers[r], &b.tmp, e, np, self.late(r), false);
        }
        for w in 0..writers {
            eng.mm(Op::Nt, Tri::Full, 1.0, self.values[w].top(np), ds.top(d_rows), b.tmp.top_mut(np), false);
            let e = match self.decay {
                Decay::None => Factor::One,
                Decay::Scalar => Factor::Row(&self.to_end_row),
                Decay::Channel => Factor::Element(&self.to_end),
            };
            rows::scale(isa, &mut b.writers[w], &b.tmp, e, np, false, false);
        }
        // What the decay of the whole chunk receives from the state after it.
        if self.decay != Decay::None {
            b.dg.row_mut(n - 1).fill(0.0);
            for i in 0..d_rows {
                b.line_end(n, i, rows::dot(isa, &after.data[i * after.ld..][..ds.cols], ds.row(i)));
            }
        }
        // The state before.
        b.ds.all_mut().copy_from_slice(ds.all());
        std::mem::swap(&mut b.ds, ds);
        self.decay_state(isa, ds);
        for r in 0..readers {
            self.reader_from_start(eng, r);
            let given = if r == 0 { self.out.top(np) } else { b.seen.top(np) };
            eng.mm(Op::Tn, Tri::Full, 1.0, self.started(r), given, ds.top_mut(d_rows), true);
        }
        // Scores.
        for r in 0..readers {
            for w in 0..writers {
                let given = if r == 0 { self.out.top(np) } else { b.seen.top(np) };
                let to = b.scores[r][w].part_mut(0..np, 0..np);
                eng.mm(Op::Nt, Tri::LowerOut, 1.0, given, self.values[w].top(np), to, false);
                let m = (self.decay == Decay::Scalar).then_some(&self.between);
                rows::mask(isa, &mut b.scores[r][w], m, np, r == 1, self.late(r));
            }
        }
        self.scores_back(eng, &mut b);
        self.decays_back(eng, &mut b);
        self.back = Some(b);
    }

    fn scores_back(&mut self, eng: &mut Engine, b: &mut Back) {
        let (np, isa) = (self.np, eng.isa);
        let (readers, writers) = (self.reader_count(), self.writer_count());
        if self.decay != Decay::Channel {
            for r in 0..readers {
                for w in 0..writers {
                    let da = b.scores[r][w].part(0..np, 0..np);
                    eng.mm(Op::Nn, Tri::LowerA, 1.0, da, self.writers[w].top(np), b.readers[r].top_mut(np), true);
                    eng.mm(Op::Tn, Tri::LowerA, 1.0, da, self.readers[r].top(np), b.writers[w].top_mut(np), true);
                }
            }
            return;
        }
        let cols = self.g.cols;
        for at in (0..np).step_by(PAD) {
            if at > 0 {
                self.decay_earlier(eng, at);
                let sub = at..at + PAD;
                for r in 0..readers {
                    let (late, e) = (self.late(r), Factor::Element(&self.from_sub));
                    // The rows' own gradient, decayed from the start of the sub-chunk.
                    for w in 0..writers {
                        rows::scale(isa, &mut self.far, &self.writers[w], Factor::Element(&self.e), at, false, false);
                        let da = b.scores[r][w].part(sub.clone(), 0..at);
                        let to = self.near.part_mut(0..PAD, 0..cols);
                        eng.mm(Op::Nn, Tri::Full, 1.0, da, self.far.top(at), to, w > 0);
                    }
                    let to = &mut b.readers[r].all_mut()[at * cols..];
                    rows::scale_rows(isa, to, self.near.all(), cols, e, sub.clone(), late, true);
                    // That of the earlier rows.
                    rows::scale_from(isa, self.near.all_mut(), &self.readers[r], e, sub.clone(), late);
                    for w in 0..writers {
                        let da = b.scores[r][w].part(sub.clone(), 0..at);
                        let near = self.near.part(0..PAD, 0..cols);
                        eng.mm(Op::Tn, Tri::Full, 1.0, da, near, b.tmp.top_mut(at), false);
                        rows::scale(isa, &mut b.writers[w], &b.tmp, Factor::Element(&self.e), at, false, true);
                    }
                }
            }
            let (rule, p) = self.diagonal(at, Some(b));
            // SAFETY: `diagonal` points at rows at..at + 16 of matrices at least that long.
            unsafe { rows::diagonal_back(isa, rule, &p) };
            self.lengthen(eng, at);
        }
    }

    /// Gradient of the log decays: a vector decayed by e^{+G_t} gives x ∘ dx to G_t, by e^{−G_t}
    /// takes it; g_t collects all G from t on.
    fn decays_back(&mut self, eng: &Engine, b: &mut Back) {
        if self.decay == Decay::None {
            return;
        }
        let isa = eng.isa;
        if self.decay == Decay::Scalar {
            // Channels share a decay: sums over them are enough.
            let mut sum: f32 = b.dg.row(self.n - 1).iter().sum();
            for t in (0..self.n).rev() {
                for r in 0..self.reader_count() {
                    sum += rows::dot(isa, self.readers[r].row(t), b.readers[r].row(t));
                }
                for w in 0..self.writer_count() {
                    sum -= rows::dot(isa, self.writers[w].row(t), b.writers[w].row(t));
                }
                b.dg_row[t] = sum;
            }
            return;
        }
        for t in (0..self.n).rev() {
            if t + 1 < self.n {
                let cols = b.dg.cols;
                b.dg.all_mut().copy_within((t + 1) * cols..(t + 2) * cols, t * cols);
                if self.rule == Rule::LowRank {
                    rows::add_product(isa, b.dg.row_mut(t), self.readers[1].row(t + 1), b.readers[1].row(t + 1), 1.0);
                }
            }
            let dg = b.dg.row_mut(t);
            rows::add_product(isa, dg, self.readers[0].row(t), b.readers[0].row(t), 1.0);
            if self.rule == Rule::Delta {
                rows::add_product(isa, dg, self.readers[1].row(t), b.readers[1].row(t), 1.0);
            }
            for w in 0..self.writer_count() {
                rows::add_product(isa, dg, self.writers[w].row(t), b.writers[w].row(t), -1.0);
            }
        }
    }

    /// What the last [`Chunk::backward`] found.
    pub(super) fn gradients(&self) -> Gradients<'_> {
        let Some(b) = &self.back else { unreachable!("only called after `backward`") };
        Gradients {
            q: &b.readers[0],
            k: &b.writers[0],
            second: &b.readers[1],
            a: &b.writers[1],
            v: &b.dv,
            beta: &b.dbeta,
            g: &b.dg,
            g_row: &b.dg_row,
        }
    }
}

impl Back {
    /// Start the last token's row of `dg` with x at channel i.
    fn line_end(&mut self, n: usize, i: usize, x: f32) {
        self.dg.row_mut(n - 1)[i] = x;
    }
}
