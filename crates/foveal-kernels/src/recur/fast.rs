//! The commonest case without detours: identity or scalar decay, bf16 inputs, AMX tiles.
//!
//! The same sums as in `chunk`, but operands go from the inputs' memory straight into tiles, and what
//! is exact in bf16 stays so: the decay to the chunk's end is put on the values (split into two bf16)
//! instead of the keys, the strength (of [`super::Gate::Ssd`]) on scores and values.
//!
//! Decays between sub-chunks of 16 tokens are products of two exponentials, from the end of the earlier
//! one and to its end; factors under e⁻⁴¹ are dropped, as their products could be subnormal, which is
//! slow, and count for nothing beside the newer tokens'.

#![allow(unsafe_op_in_unsafe_fn)]

use super::chunk::CHUNK;
use super::tiles::{LINE, Square, TILE, Term, interleave, narrow, round, square, widen_half};
use crate::amx::Tiles;
use crate::exp::exp;
use crate::simd::{Avx512, transpose};
use std::arch::x86_64::*;

/// Row tiles and inner steps over the tokens of a chunk.
const ROWS: usize = CHUNK / 16;
const STEPS: usize = CHUNK / 32;
/// Logarithm of the least factor.
const LEAST: f32 = -41.0;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Bytes([u8; LINE]);

const ZERO: Bytes = Bytes([0; LINE]);

/// A chunk's rows of one operand; null beyond its tokens.
pub(super) type RowsOf = [*const u16; CHUNK];

/// What a chunk needs besides the state.
pub(super) struct Input {
    pub(super) q: RowsOf,
    pub(super) k: RowsOf,
    pub(super) v: RowsOf,
    /// Output rows.
    pub(super) out: [*mut f32; CHUNK],
    pub(super) tokens: usize,
    pub(super) scale: f32,
    /// Log decays, zero beyond the tokens; `None` where nothing decays.
    pub(super) g: Option<[f32; CHUNK]>,
    /// Factor on what a token writes.
    pub(super) strength: Option<[f32; CHUNK]>,
}

/// Packed operands and the state of one head. Tile (i, s) of an operand with `steps` inner steps is
/// number i · steps + s.
pub(super) struct Fast {
    d: usize,
    dv: usize,
    /// Inner steps over D; column tiles over Dv, an even number.
    d_steps: usize,
    dv_tiles: usize,
    q: Vec<Bytes>,
    /// q · scale · decay from the start.
    q_far: Vec<Bytes>,
    /// Kᵀ as right operand (of the scores) and as left one (of the state).
    k_right: Vec<Bytes>,
    k_left: Vec<Bytes>,
    v: Vec<Bytes>,
    /// v · decay to the end, in two parts.
    v_far: [Vec<Bytes>; 2],
    /// The state in bf16.
    s: Vec<Bytes>,
    p: Vec<Bytes>,
    scores: Vec<Bytes>,
    out: Vec<Bytes>,
    /// f32, rows of 16 · dv_tiles.
    state: Vec<Bytes>,
    _tiles: Tiles,
}

/// Decay factors of a chunk.
struct Decays {
    /// scale · e^ from the chunk's start to t.
    from_start: [f32; CHUNK],
    /// strength · e^ from t to the chunk's end.
    to_end: [f32; CHUNK],
    /// e^ from the start of t's sub-chunk.
    from_sub: [f32; CHUNK],
    /// For sub-chunk I, from each earlier token to its start, times scale and strength.
    to_sub: [[f32; CHUNK]; ROWS],
    /// Over the whole chunk.
    total: f32,
    /// Whether to_end is one throughout: then v serves as it is.
    plain: bool,
}

#[inline(always)]
unsafe fn exps(x: &mut [f32; CHUNK], least: f32) {
    for i in (0..CHUNK).step_by(16) {
        let v = _mm512_loadu_ps(x.as_ptr().add(i));
        let keep = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(v, _mm512_set1_ps(least));
        _mm512_storeu_ps(x.as_mut_ptr().add(i), _mm512_maskz_mov_ps(keep, exp::<Avx512>(v)));
    }
}

impl Decays {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    unsafe fn new(p: &Input) -> Self {
        let mut r = Decays {
            from_start: [0.0; CHUNK],
            to_end: [0.0; CHUNK],
            from_sub: [0.0; CHUNK],
            to_sub: [[0.0; CHUNK]; ROWS],
            total: 1.0,
            plain: p.strength.is_none() && p.g.is_none(),
        };
        if let Some(g) = &p.g {
            // Sums of the terms themselves: differences of long sums would lose the short ones.
            let mut sum = 0.0;
            for t in 0..CHUNK {
                sum += g[t];
                r.from_start[t] = sum;
                r.from_sub[t] = if t % 16 == 0 { g[t] } else { r.from_sub[t - 1] + g[t] };
            }
            r.total = sum.exp();
            let mut end = 0.0;
            for t in (0..CHUNK).rev() {
                r.to_end[t] = end;
                end += g[t];
            }
            for i in 1..ROWS {
                let mut sum = 0.0;
                for t in (0..16 * i).rev() {
                    r.to_sub[i][t] = sum;
                    sum += g[t];
                }
            }
        }
        exps(&mut r.from_start, f32::NEG_INFINITY);
        exps(&mut r.to_end, f32::NEG_INFINITY);
        exps(&mut r.from_sub, LEAST);
        for i in 1..ROWS {
            exps(&mut r.to_sub[i], LEAST);
        }
        for t in 0..CHUNK {
            r.from_start[t] *= p.scale;
            let f = p.strength.map_or(1.0, |s| s[t]);
            r.to_end[t] *= f;
            for i in 1..ROWS {
                r.to_sub[i][t] *= f * p.scale;
            }
        }
        r
    }
}

/// Columns `32 s..` of a row that exist.
#[inline(always)]
fn mask(width: usize, s: usize) -> u32 {
    let left = width - 32 * s;
    if left >= 32 { u32::MAX } else { (1 << left) - 1 }
}

/// 32 elements of a row; zero for a row that is not there.
#[inline(always)]
unsafe fn row(p: *const u16, s: usize, some: u32) -> __m512i {
    if p.is_null() {
        return _mm512_setzero_si512();
    }
    _mm512_maskz_loadu_epi16(some, p.add(32 * s).cast())
}

/// Two rows of 32 elements as pairs: of the first 16 columns, and of the others.
#[inline(always)]
unsafe fn pair_up(a: __m512i, b: __m512i) -> [__m512i; 2] {
    const ORDER: [[u16; 32]; 2] = {
        let mut order = [[0; 32]; 2];
        let mut i = 0;
        while i < 64 {
            order[i / 32][i % 32] = (i / 2 + 32 * (i % 2)) as u16;
            i += 1;
        }
        order
    };
    let [low, high] = [_mm512_loadu_si512(ORDER[0].as_ptr().cast()), _mm512_loadu_si512(ORDER[1].as_ptr().cast())];
    [_mm512_permutex2var_epi16(a, low, b), _mm512_permutex2var_epi16(a, high, b)]
}

#[inline(always)]
unsafe fn store(to: *mut u8, x: __m512i) {
    _mm512_store_si512(to.cast(), x);
}

#[inline(always)]
unsafe fn store_turned(to: *mut u8, x: [__m512i; 16]) {
    let y = transpose(x);
    for r in 0..16 {
        store(to.add(r * LINE), y[r]);
    }
}

impl Fast {
    /// Zero state.
    ///
    /// # Safety
    /// The machine has AMX and the process may use it; the value stays on this thread.
    pub(super) unsafe fn new(d: usize, dv: usize) -> Self {
        let (d_steps, dv_tiles) = (d.div_ceil(32), dv.div_ceil(32) * 2);
        let room = |tiles: usize| vec![ZERO; tiles * 16];
        Fast {
            d,
            dv,
            d_steps,
            dv_tiles,
            q: room(ROWS * d_steps),
            q_far: room(ROWS * d_steps),
            k_right: room(ROWS * d_steps),
            k_left: room(2 * d_steps * STEPS),
            v: room(dv_tiles * STEPS),
            v_far: [room(dv_tiles * STEPS), room(dv_tiles * STEPS)],
            s: room(dv_tiles * d_steps),
            p: room(ROWS * STEPS),
            scores: room(ROWS * ROWS),
            out: room(ROWS * dv_tiles),
            state: room(2 * d_steps * dv_tiles),
            _tiles: Tiles::new(),
        }
    }

    /// Row `i` of the state: its first `dv` elements count.
    pub(super) fn state_row(&mut self, i: usize) -> &mut [f32] {
        let width = 16 * self.dv_tiles;
        assert!(i < self.d);
        // SAFETY: the state has 32 · d_steps ≥ d rows of `width` f32, each tile row 64 bytes.
        unsafe { std::slice::from_raw_parts_mut(self.state.as_mut_ptr().cast::<f32>().add(i * width), self.dv) }
    }

    /// One chunk: outputs, and the state moved on.
    ///
    /// # Safety
    /// The machine has AMX; rows of q and k reach D elements, those of v and out Dv; out rows are
    /// nobody else's.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    pub(super) unsafe fn chunk(&mut self, p: &Input) {
        let decays = Decays::new(p);
        self.pack_tokens(p, &decays);
        self.pack_state(decays.total);
        let rows = p.tokens.div_ceil(16).next_multiple_of(2);
        let (ds, width) = (self.d_steps, 16 * self.dv_tiles);

        // Scores of 32 queries and 32 keys at a time.
        let scores: *mut u8 = self.scores.as_mut_ptr().cast();
        for i in (0..rows).step_by(2) {
            for j in (0..=i).step_by(2) {
                let c = scores.add(i * 16 * CHUNK * 4 + j * LINE);
                let (a, b) = (tile(&self.q, i * ds), tile(&self.k_right, j * ds));
                let terms = [Term { a, b, count: ds, next: ds * TILE }];
                square::<true, true>(&Square { c, c_line: CHUNK * 4, add: false }, &terms);
            }
        }
        self.decay_scores(p, &decays, rows);

        // Outputs: the state's part and the chunk's own.
        let out: *mut u8 = self.out.as_mut_ptr().cast();
        for i in (0..rows).step_by(2) {
            for j in (0..self.dv_tiles).step_by(2) {
                let c = out.add((i * 16 * width + j * 16) * 4);
                let far = Term { a: tile(&self.q_far, i * ds), b: tile(&self.s, j * ds), count: ds, next: ds * TILE };
                let near = Term {
                    a: tile(&self.p, i * STEPS),
                    b: tile(&self.v, j * STEPS),
                    count: i / 2 + 1,
                    next: STEPS * TILE,
                };
                square::<true, true>(&Square { c, c_line: width * 4, add: false }, &[far, near]);
            }
        }
        for t in 0..p.tokens {
            std::ptr::copy_nonoverlapping(self.out.as_ptr().cast::<f32>().add(t * width), p.out[t], self.dv);
        }

        // The state.
        let state: *mut u8 = self.state.as_mut_ptr().cast();
        for i in (0..2 * ds).step_by(2) {
            for j in (0..self.dv_tiles).step_by(2) {
                let c = state.add((i * 16 * width + j * 16) * 4);
                let part = |v: &[Bytes]| Term {
                    a: tile(&self.k_left, i * STEPS),
                    b: tile(v, j * STEPS),
                    count: rows / 2,
                    next: STEPS * TILE,
                };
                let c = Square { c, c_line: width * 4, add: true };
                if decays.plain {
                    square::<true, true>(&c, &[part(&self.v)]);
                } else {
                    square::<true, true>(&c, &[part(&self.v_far[0]), part(&self.v_far[1])]);
                }
            }
        }
    }

    /// q, k and v of the chunk's tokens.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    unsafe fn pack_tokens(&mut self, p: &Input, decays: &Decays) {
        let ds = self.d_steps;
        let q: *mut u8 = self.q.as_mut_ptr().cast();
        let q_far: *mut u8 = self.q_far.as_mut_ptr().cast();
        let k_right: *mut u8 = self.k_right.as_mut_ptr().cast();
        let k_left: *mut u8 = self.k_left.as_mut_ptr().cast();
        let v: *mut u8 = self.v.as_mut_ptr().cast();
        let [v_high, v_low] = self.v_far.each_mut().map(|v| v.as_mut_ptr().cast::<u8>());
        for s in 0..ds {
            let some = mask(self.d, s);
            for t in 0..CHUNK {
                let x = row(p.q[t], s, some);
                let at = (t / 16 * ds + s) * TILE + t % 16 * LINE;
                store(q.add(at), x);
                let f = _mm512_set1_ps(decays.from_start[t]);
                let (lo, hi) = (_mm512_mul_ps(widen_half::<0>(x), f), _mm512_mul_ps(widen_half::<1>(x), f));
                store(q_far.add(at), narrow(hi, lo));
            }
            for i in 0..ROWS {
                let mut x = [_mm512_setzero_si512(); 16];
                for r in 0..16 {
                    x[r] = row(p.k[i * 16 + r], s, some);
                }
                store_turned(k_right.add((i * ds + s) * TILE), x);
            }
            for i in 0..STEPS {
                let mut x = [[_mm512_setzero_si512(); 16]; 2];
                for r in 0..16 {
                    let t = i * 32 + 2 * r;
                    [x[0][r], x[1][r]] = pair_up(row(p.k[t], s, some), row(p.k[t + 1], s, some));
                }
                store_turned(k_left.add((2 * s * STEPS + i) * TILE), x[0]);
                store_turned(k_left.add(((2 * s + 1) * STEPS + i) * TILE), x[1]);
            }
        }
        for j in 0..self.dv_tiles / 2 {
            let some = mask(self.dv, j);
            for t in (0..CHUNK).step_by(2) {
                let (a, b) = (row(p.v[t], j, some), row(p.v[t + 1], j, some));
                let at = (2 * j * STEPS + t / 32) * TILE + t % 32 / 2 * LINE;
                let next = STEPS * TILE;
                let x = pair_up(a, b);
                store(v.add(at), x[0]);
                store(v.add(at + next), x[1]);
                if decays.plain {
                    continue;
                }
                let (fa, fb) = (_mm512_set1_ps(decays.to_end[t]), _mm512_set1_ps(decays.to_end[t + 1]));
                let low = round::<true>(_mm512_mul_ps(widen_half::<0>(a), fa), _mm512_mul_ps(widen_half::<0>(b), fb));
                let high = round::<true>(_mm512_mul_ps(widen_half::<1>(a), fa), _mm512_mul_ps(widen_half::<1>(b), fb));
                store(v_high.add(at), interleave(low.0));
                store(v_low.add(at), interleave(low.1));
                store(v_high.add(at + next), interleave(high.0));
                store(v_low.add(at + next), interleave(high.1));
            }
        }
    }

    /// The state in bf16, and decayed over the chunk.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    unsafe fn pack_state(&mut self, total: f32) {
        let (ds, width) = (self.d_steps, 16 * self.dv_tiles);
        let state: *mut f32 = self.state.as_mut_ptr().cast();
        let s: *mut u8 = self.s.as_mut_ptr().cast();
        let f = _mm512_set1_ps(total);
        for i in 0..16 * ds {
            let from = state.add(2 * i * width);
            for j in 0..self.dv_tiles {
                let (a, b) = (from.add(j * 16), from.add(width + j * 16));
                let (x, y) = (_mm512_load_ps(a), _mm512_load_ps(b));
                store(s.add((j * ds + i / 16) * TILE + i % 16 * LINE), interleave(narrow(y, x)));
                _mm512_store_ps(a, _mm512_mul_ps(x, f));
                _mm512_store_ps(b, _mm512_mul_ps(y, f));
            }
        }
    }

    /// Scores times decay, as left operand.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    unsafe fn decay_scores(&mut self, p: &Input, decays: &Decays, rows: usize) {
        let scores: *const f32 = self.scores.as_ptr().cast();
        let to: *mut u8 = self.p.as_mut_ptr().cast();
        let zero = _mm512_setzero_ps();
        for i in 0..rows {
            // Log decay from each token of the sub-chunk to the current one.
            let mut x = zero;
            let mut own = _mm512_set1_ps(p.scale);
            if let Some(s) = &p.strength {
                own = _mm512_mul_ps(own, _mm512_loadu_ps(s.as_ptr().add(16 * i)));
            }
            for r in 0..16 {
                let t = i * 16 + r;
                let upto = (1u32 << r) as u16;
                let mut factor = own;
                if let Some(g) = &p.g {
                    // Tokens before this one.
                    x = _mm512_mask_add_ps(x, upto - 1, x, _mm512_set1_ps(g[t]));
                    factor = _mm512_mul_ps(own, exp::<Avx512>(x));
                }
                let line = scores.add(t * CHUNK);
                let earlier = _mm512_set1_ps(decays.from_sub[t]);
                for s in 0..=i / 2 {
                    let mut block = [zero; 2];
                    for (j, block) in (2 * s..).zip(&mut block) {
                        let a = _mm512_load_ps(line.add(16 * j));
                        if j < i {
                            let f = _mm512_loadu_ps(decays.to_sub[i].as_ptr().add(16 * j));
                            *block = _mm512_mul_ps(a, _mm512_mul_ps(earlier, f));
                        } else if j == i {
                            *block = _mm512_maskz_mul_ps(upto | (upto - 1), a, factor);
                        }
                    }
                    store(to.add((i * STEPS + s) * TILE + r * LINE), narrow(block[1], block[0]));
                }
            }
        }
    }
}

#[inline(always)]
fn tile(x: &[Bytes], i: usize) -> *const u8 {
    x[i * 16..].as_ptr().cast()
}
