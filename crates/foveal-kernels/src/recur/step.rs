//! Token by token on a state in place: one or two passes over its rows for each token.

#![allow(unsafe_op_in_unsafe_fn)]

use super::chunk::Rule;
use super::{Gate, Inputs, rows};
use crate::dispatch::with_isa;
use crate::exp::{self, Fun};
use crate::isa::Isa;
use crate::simd::Simd;
use crate::view::{Element, Rows};
use crate::work::Work;

/// One token of one head.
struct Token<'a> {
    rule: Rule,
    dv: usize,
    /// Factor on each row of the state (D), or on each element (D, Dv).
    decay: &'a [f32],
    by_element: bool,
    q: &'a [f32],
    k: &'a [f32],
    a: &'a [f32],
    b: &'a [f32],
    v: &'a [f32],
    beta: f32,
}

/// Move `s` (D, Dv) on by one token and write what q reads to `o`; `p` (Dv) is scratch.
#[inline(always)]
unsafe fn token_on<S: Simd>(x: &Token, s: &mut [f32], p: &mut [f32], o: &mut [f32]) {
    let (d, dv) = (x.k.len(), x.dv);
    p.fill(0.0);
    o.fill(0.0);
    if x.rule != Rule::Add {
        let reader = if x.rule == Rule::Delta { x.k } else { x.b };
        for i in 0..d {
            let row = &s[i * dv..(i + 1) * dv];
            let f = if x.rule == Rule::Delta { reader[i] * x.decay[i] } else { reader[i] };
            for c in 0..dv {
                p[c] += f * row[c];
            }
        }
    }
    match x.rule {
        Rule::Delta => {
            for c in 0..dv {
                p[c] = x.beta * (x.v[c] - p[c]);
            }
        }
        Rule::Add => {
            for c in 0..dv {
                p[c] = x.beta * x.v[c];
            }
        }
        Rule::LowRank => {}
    }
    for i in 0..d {
        let row = &mut s[i * dv..(i + 1) * dv];
        let (q, k) = (x.q[i], x.k[i]);
        if x.by_element {
            let decay = &x.decay[i * dv..(i + 1) * dv];
            for c in 0..dv {
                row[c] = decay[c] * row[c] + k * p[c];
                o[c] += q * row[c];
            }
        } else if x.rule == Rule::LowRank {
            let (decay, a) = (x.decay[i], x.a[i]);
            for c in 0..dv {
                row[c] = decay * row[c] + k * x.v[c] + a * p[c];
                o[c] += q * row[c];
            }
        } else {
            let decay = x.decay[i];
            for c in 0..dv {
                row[c] = decay * row[c] + k * p[c];
                o[c] += q * row[c];
            }
        }
    }
}
with_isa!(simd, unsafe fn token => token_on(x: &Token, s: &mut [f32], p: &mut [f32], o: &mut [f32]));

/// All tokens of one head of one sequence.
///
/// # Safety
/// Nobody else holds the head's rows of `out`; the machine has `isa`.
pub(super) unsafe fn run<T: Element>(
    x: &Inputs<T>,
    isa: Isa,
    i: usize,
    h: usize,
    state: &mut [f32],
    out: &Rows<f32>,
) -> Work {
    let (bi, tokens) = &x.plan.sequences[i];
    let (d, dv) = (x.plan.d, x.plan.dv);
    let rule = x.call.gate.kind().map_or(Rule::Add, |k| k.1);
    let by_element = matches!(x.call.gate, Gate::Selective { .. });
    let mut decay = vec![1f32; if by_element { d * dv } else { d }];
    let (mut q, mut k, mut a, mut b) = (vec![0f32; d], vec![0f32; d], vec![0f32; d], vec![0f32; d]);
    let (mut v, mut p) = (vec![0f32; dv], vec![0f32; dv]);
    let mut work = Work::default();
    for t in tokens.clone() {
        let widen = |to: &mut [f32], from: &[T], f: f32| rows::widen(isa, to, from, f);
        widen(&mut q, x.row(x.q, *bi, h, t), x.call.scale);
        widen(&mut k, x.row(x.k, *bi, h, t), 1.0);
        widen(&mut v, x.row(x.v, *bi, h, t), 1.0);
        let mut beta = 1.0;
        if let Some(g) = x.call.gate.g() {
            match x.row(g, *bi, h, t) {
                [g] => decay.fill(*g),
                g => decay.copy_from_slice(g),
            }
        }
        if let Some(rows) = x.call.gate.beta() {
            beta = x.row(rows, *bi, h, t)[0];
        }
        match &x.call.gate {
            Gate::LowRank { a: rows_a, b: rows_b, .. } => {
                widen(&mut a, x.row(rows_a, *bi, h, t), 1.0);
                widen(&mut b, x.row(rows_b, *bi, h, t), 1.0);
            }
            Gate::Ssd { dt, a } => {
                beta = x.row(dt, *bi, h, t)[0];
                decay.fill(beta * a[h]);
            }
            Gate::Selective { dt, a } => {
                let dt = x.row(dt, *bi, h, t);
                for c in 0..dv {
                    v[c] *= dt[c];
                    for i in 0..d {
                        decay[i * dv + c] = dt[c] * a[(h * dv + c) * d + i];
                    }
                }
            }
            _ => {}
        }
        if x.call.gate.g().is_some() || x.call.gate.dt().is_some() {
            exp::apply(Fun::Exp, &mut decay, isa);
        }
        let now = Token { rule, dv, decay: &decay, by_element, q: &q, k: &k, a: &a, b: &b, v: &v, beta };
        // SAFETY: the row is this task's by the contract; the machine has `isa`.
        unsafe { token(isa, &now, state, &mut p, out.row_mut(*bi, h, t)) };
        let passes = match rule {
            Rule::Add => 2,
            Rule::Delta => 3,
            Rule::LowRank => 4,
        };
        let (d, dv, element) = (d as u64, dv as u64, std::mem::size_of::<T>() as u64);
        let vectors = 2 * d + dv + if rule == Rule::LowRank { 2 * d } else { 0 };
        work += Work {
            flops: passes * 2 * d * dv,
            // The state is read and written.
            bytes: element * vectors + 4 * (x.call.gate.width(d as usize, dv as usize) as u64 + dv + 2 * d * dv),
            tiles: 0,
            pairs: 0,
            fallback: 0,
        };
    }
    work
}
