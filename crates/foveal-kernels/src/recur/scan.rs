//! The selective scan: one decay for every element of the state, which no matrix product serves.
//!
//! Channels are independent given k and q, so a task is a block of channels of one head, with its
//! piece of the state in the first-level cache and channels in lanes. The backward pass keeps the
//! state every [`SPAN`] tokens and computes those between again.

#![allow(unsafe_op_in_unsafe_fn)]

use super::{Gate, Inputs, RecurGrads, Shared, fold_heads, rows};
use crate::dispatch::with_isa;
use crate::exp::exp;
use crate::isa::Isa;
use crate::simd::Simd;
use crate::view::{Element, Rows, View};
use crate::work::Work;
use rayon::prelude::*;

/// Channels of a task's block.
const LANES: usize = 64;
/// Tokens between two kept states.
const SPAN: usize = 64;
/// Most gradients of k and q a head that are summed afterwards (not by threads: sums must repeat).
const PARTS: usize = 8;

/// One token of a block of channels.
struct Token<'a> {
    /// (D, LANES).
    a: &'a [f32],
    /// Scaled.
    q: &'a [f32],
    k: &'a [f32],
    dt: &'a [f32; LANES],
    x: &'a [f32; LANES],
}

#[inline(always)]
unsafe fn token_on<S: Simd>(p: &Token, from: *const f32, to: *mut f32, o: &mut [f32; LANES]) {
    let d = p.k.len();
    for c in (0..LANES).step_by(S::LANES) {
        let dt = S::load(p.dt.as_ptr().add(c));
        let u = S::mul(dt, S::load(p.x.as_ptr().add(c)));
        let mut y = S::splat(0.0);
        for i in 0..d {
            let e = exp::<S>(S::mul(dt, S::load(p.a.as_ptr().add(i * LANES + c))));
            let s = S::fma(e, S::load(from.add(i * LANES + c)), S::mul(S::splat(p.k[i]), u));
            S::store(to.add(i * LANES + c), s);
            y = S::fma(S::splat(p.q[i]), s, y);
        }
        S::store(o.as_mut_ptr().add(c), y);
    }
}
// The state after one token: `from` and `to` reach (D, LANES) elements and may be the same.
with_isa!(simd, unsafe fn token => token_on(p: &Token, from: *const f32, to: *mut f32, o: &mut [f32; LANES]));

/// Gradients of one token, added to.
struct Back<'a> {
    /// (D, LANES): of the state after the token, turned into that of the state before.
    ds: &'a mut [f32],
    /// (D, LANES).
    da: &'a mut [f32],
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    ddt: &'a mut [f32; LANES],
    dx: &'a mut [f32; LANES],
}

#[inline(always)]
unsafe fn token_back_on<S: Simd>(p: &Token, before: &[f32], after: &[f32], dout: &[f32; LANES], r: &mut Back) {
    let d = p.k.len();
    let zero = S::splat(0.0);
    for i in 0..d {
        let (mut dq, mut dk) = (zero, zero);
        for c in (0..LANES).step_by(S::LANES) {
            let at = i * LANES + c;
            let (dt, x, o) =
                (S::load(p.dt.as_ptr().add(c)), S::load(p.x.as_ptr().add(c)), S::load(dout.as_ptr().add(c)));
            let a = S::load(p.a.as_ptr().add(at));
            let ds = S::fma(S::splat(p.q[i]), o, S::load(r.ds.as_ptr().add(at)));
            dq = S::fma(S::load(after.as_ptr().add(at)), o, dq);
            dk = S::fma(ds, S::mul(dt, x), dk);
            // Of u = dt · x.
            let du = S::mul(ds, S::splat(p.k[i]));
            let e = S::mul(exp::<S>(S::mul(dt, a)), ds);
            S::store(r.ds.as_mut_ptr().add(at), e);
            let de = S::mul(e, S::load(before.as_ptr().add(at)));
            let to = r.da.as_mut_ptr().add(at);
            S::store(to, S::fma(dt, de, S::load(to)));
            let to = r.ddt.as_mut_ptr().add(c);
            S::store(to, S::fma(a, de, S::fma(x, du, S::load(to))));
            let to = r.dx.as_mut_ptr().add(c);
            S::store(to, S::fma(dt, du, S::load(to)));
        }
        r.dq[i] += S::sum(dq);
        r.dk[i] += S::sum(dk);
    }
}
with_isa!(
    simd,
    unsafe fn token_back => token_back_on(
        p: &Token,
        before: &[f32],
        after: &[f32],
        dout: &[f32; LANES],
        r: &mut Back,
    )
);

/// A block of channels of one head of one sequence.
struct Block<'a, T> {
    x: &'a Inputs<'a, T>,
    dt: &'a View<'a, f32>,
    isa: Isa,
    i: usize,
    h: usize,
    channels: std::ops::Range<usize>,
    /// (D, LANES), zero beyond the channels.
    a: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    dt_row: [f32; LANES],
    x_row: [f32; LANES],
}

impl<'a, T: Element> Block<'a, T> {
    fn new(x: &'a Inputs<'a, T>, i: usize, h: usize, from: usize) -> Self {
        let Gate::Selective { dt, a } = &x.call.gate else { unreachable!("only the selective scan comes here") };
        let (d, dv) = (x.plan.d, x.plan.dv);
        let channels = from..(from + LANES).min(dv);
        let mut own = vec![0f32; d * LANES];
        for c in channels.clone() {
            for i in 0..d {
                own[i * LANES + c - from] = a[(h * dv + c) * d + i];
            }
        }
        let isa = x.call.isa.min(Isa::detect());
        let (q, k) = (vec![0f32; d], vec![0f32; d]);
        Block { x, dt, isa, i, h, channels, a: own, q, k, dt_row: [0.0; LANES], x_row: [0.0; LANES] }
    }

    fn load(&mut self, t: usize) {
        let (x, b, h) = (self.x, self.x.plan.sequences[self.i].0, self.h);
        rows::widen(self.isa, &mut self.q, x.row(x.q, b, h, t), x.call.scale);
        rows::widen(self.isa, &mut self.k, x.row(x.k, b, h, t), 1.0);
        rows::widen(self.isa, &mut self.dt_row, &x.row(self.dt, b, h, t)[self.channels.clone()], 1.0);
        rows::widen(self.isa, &mut self.x_row, &x.row(x.v, b, h, t)[self.channels.clone()], 1.0);
    }

    fn now(&self) -> Token<'_> {
        Token { a: &self.a, q: &self.q, k: &self.k, dt: &self.dt_row, x: &self.x_row }
    }

    /// (D, LANES) of a state (sequences, H, D, Dv).
    fn state(&self, states: Option<&[f32]>) -> Vec<f32> {
        let (d, dv) = (self.x.plan.d, self.x.plan.dv);
        let mut s = vec![0f32; d * LANES];
        if let Some(states) = states {
            let at = (self.i * self.x.plan.heads + self.h) * d * dv;
            for i in 0..d {
                let from = &states[at + i * dv..][self.channels.clone()];
                s[i * LANES..][..from.len()].copy_from_slice(from);
            }
        }
        s
    }

    /// # Safety
    /// Nobody else holds these channels of the state.
    unsafe fn put_state(&self, s: &[f32], to: &Shared) {
        let (d, dv) = (self.x.plan.d, self.x.plan.dv);
        let at = (self.i * self.x.plan.heads + self.h) * d * dv;
        for i in 0..d {
            let to = to.part(at + i * dv + self.channels.start, self.channels.len());
            to.copy_from_slice(&s[i * LANES..][..to.len()]);
        }
    }

    /// Work of one pass over the tokens: `passes` multiply-adds an element of the state.
    fn work(&self, passes: u64) -> Work {
        let tokens = self.x.plan.sequences[self.i].1.len() as u64;
        let (d, n) = (self.x.plan.d as u64, self.channels.len() as u64);
        let element = std::mem::size_of::<T>() as u64;
        Work {
            flops: tokens * passes * 2 * d * n,
            bytes: tokens * (element * (2 * d + n) + 8 * n),
            tiles: tokens.div_ceil(SPAN as u64),
            pairs: 0,
            fallback: 0,
        }
    }
}

/// (sequence, head, first channel) of task `i`.
fn place<T>(x: &Inputs<T>, i: usize) -> (usize, usize, usize) {
    let blocks = x.plan.dv.div_ceil(LANES);
    (i / blocks / x.plan.heads, i / blocks % x.plan.heads, i % blocks * LANES)
}

fn tasks<T>(x: &Inputs<T>) -> usize {
    x.plan.sequences.len() * x.plan.heads * x.plan.dv.div_ceil(LANES)
}

pub(super) fn forward<T: Element>(
    x: &Inputs<T>,
    initial: Option<&[f32]>,
    out: &Rows<f32>,
    last: Option<&Shared>,
) -> Work {
    let run = |task: usize| {
        let (i, h, from) = place(x, task);
        let mut block = Block::new(x, i, h, from);
        let mut s = block.state(initial);
        let mut o = [0f32; LANES];
        let (b, tokens) = &x.plan.sequences[i];
        for t in tokens.clone() {
            block.load(t);
            // SAFETY: `s` holds (D, LANES); channels `from..` of these rows are this task's alone, and
            // the row's slice is made, written and dropped here; `isa` was lowered to the machine's.
            unsafe {
                token(block.isa, &block.now(), s.as_ptr(), s.as_mut_ptr(), &mut o);
                let to = out.row_ptr(*b, h, t).add(from);
                std::ptr::copy_nonoverlapping(o.as_ptr(), to, block.channels.len());
            }
        }
        if let Some(last) = last {
            // SAFETY: these channels are this task's.
            unsafe { block.put_state(&s, last) };
        }
        block.work(3)
    };
    (0..tasks(x)).into_par_iter().with_max_len(1).map(run).sum()
}

pub(super) fn backward<T: Element>(
    x: &Inputs<T>,
    initial: Option<&[f32]>,
    dout: &View<f32>,
    dlast: Option<&[f32]>,
) -> (RecurGrads, Work) {
    let Gate::Selective { dt, .. } = &x.call.gate else { unreachable!("only the selective scan comes here") };
    let ([b, h, t, dv], d) = (dout.shape, x.plan.d);
    let blocks = dv.div_ceil(LANES);
    // Blocks of channels are dealt to a fixed number of parts, each with its own gradients of q and k.
    let parts = blocks.clamp(1, PARTS);
    let mut dq = vec![0f32; b * h * parts * t * d];
    let mut dk = dq.clone();
    let (mut dx, mut ddt) = (vec![0f32; b * h * t * dv], vec![0f32; b * h * t * dv]);
    let sequences = x.plan.sequences.len();
    let mut dinitial = vec![0f32; sequences * h * d * dv];
    let mut da = vec![0f32; sequences * h * dv * d];
    let work = {
        let to_q = Shared::new_rows(&mut dq, t, d);
        let to_k = Shared::new_rows(&mut dk, t, d);
        let (to_x, to_dt) = (Shared::new(&mut dx), Shared::new(&mut ddt));
        let (states, to_a) = (Shared::new(&mut dinitial), Shared::new(&mut da));
        let run = |task: usize| {
            let (i, hi, part) = (task / parts / h, task / parts % h, task % parts);
            let (bi, tokens) = &x.plan.sequences[i];
            let mut work = Work::default();
            for from in (part..blocks).step_by(parts).map(|i| i * LANES) {
                let mut block = Block::new(x, i, hi, from);
                let n = block.channels.len();
                let size = d * LANES;
                let mut s = block.state(initial);
                let mut o = [0f32; LANES];
                let mut kept = Vec::new();
                for (j, t) in tokens.clone().enumerate() {
                    if j % SPAN == 0 {
                        kept.extend_from_slice(&s);
                    }
                    block.load(t);
                    // SAFETY: `s` holds (D, LANES); `isa` was lowered to the machine's.
                    unsafe { token(block.isa, &block.now(), s.as_ptr(), s.as_mut_ptr(), &mut o) };
                }
                let mut ds = block.state(dlast);
                let mut da = vec![0f32; size];
                let mut span = vec![0f32; (SPAN + 1) * size];
                for (j, start) in tokens.clone().step_by(SPAN).enumerate().collect::<Vec<_>>().into_iter().rev() {
                    let end = (start + SPAN).min(tokens.end);
                    span[..size].copy_from_slice(&kept[j * size..(j + 1) * size]);
                    for t in start..end {
                        block.load(t);
                        let (before, after) = span.split_at_mut((t - start + 1) * size);
                        // SAFETY: as above.
                        unsafe {
                            let before = before[(t - start) * size..].as_ptr();
                            token(block.isa, &block.now(), before, after.as_mut_ptr(), &mut o);
                        }
                    }
                    for t in (start..end).rev() {
                        block.load(t);
                        let (before, after) = (&span[(t - start) * size..], &span[(t - start + 1) * size..]);
                        o = [0.0; LANES];
                        o[..n].copy_from_slice(&dout.row(*bi, hi, t)[block.channels.clone()]);
                        let (mut ddt_row, mut dx_row) = ([0f32; LANES], [0f32; LANES]);
                        let head = bi * h + hi;
                        // SAFETY: rows of this part, channels of this block: nobody else's; as above.
                        unsafe {
                            let mut r = Back {
                                ds: &mut ds,
                                da: &mut da,
                                dq: to_q.token(head * parts + part, t),
                                dk: to_k.token(head * parts + part, t),
                                ddt: &mut ddt_row,
                                dx: &mut dx_row,
                            };
                            token_back(block.isa, &block.now(), &before[..size], &after[..size], &o, &mut r);
                            let at = (head * dout.shape[2] + t) * dv + from;
                            to_x.part(at, n).copy_from_slice(&dx_row[..n]);
                            to_dt.part(at, n).copy_from_slice(&ddt_row[..n]);
                        }
                    }
                }
                // SAFETY: these channels are this task's.
                unsafe {
                    block.put_state(&ds, &states);
                    let to = to_a.part(((i * h + hi) * dv + from) * d, n * d);
                    for c in 0..n {
                        for i in 0..d {
                            to[c * d + i] = da[i * LANES + c];
                        }
                    }
                }
                work += block.work(3) + block.work(3) + block.work(8);
            }
            work
        };
        (0..sequences * h * parts).into_par_iter().with_max_len(1).map(run).sum()
    };
    let all = h * parts;
    let mut q = fold_heads(dq, b, all, x.q.shape[1]);
    // The kernel saw q with its factor.
    q.iter_mut().for_each(|dq| *dq *= x.call.scale);
    let r = RecurGrads {
        q,
        k: fold_heads(dk, b, all, x.k.shape[1]),
        v: fold_heads(dx, b, h, x.v.shape[1]),
        dt: fold_heads(ddt, b, h, dt.shape[1]),
        a: (0..h * dv * d).map(|j| da.iter().skip(j).step_by(h * dv * d).sum()).collect(),
        initial: dinitial,
        ..RecurGrads::default()
    };
    (r, work)
}
