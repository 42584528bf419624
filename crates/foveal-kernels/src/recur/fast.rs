//! The commonest case without detours: identity or scalar decay, bf16 inputs, AMX tiles.
//!
//! The same sums as in `chunk`, but operands go from the inputs' memory straight into tiles: queries as they
//! lie; keys turned once, which gives the right operand of the scores and, decayed to the chunk's end on the
//! way, the left one of the state; values paired up. What is decayed is rounded to bf16, as are scores and the
//! state where they are multiplied; sums and the state itself are f32.
//!
//! Decays between sub-chunks of 16 tokens are products of two exponentials, from the end of the earlier
//! one and to its end; factors under e⁻⁴¹ are dropped, as their products could be subnormal, which is
//! slow, and count for nothing beside the newer tokens'.

#![allow(unsafe_op_in_unsafe_fn)]

use super::chunk::CHUNK;
use super::tiles::{LINE, Square, TILE, Term, interleave, narrow, square};
use crate::amx::Tiles;
use crate::exp::exp;
use crate::simd::{Avx512, transpose};
use std::arch::asm;
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

/// Rows of an operand: the first one, and bytes from row to row.
#[derive(Clone, Copy)]
pub(super) struct RowsOf<P> {
    pub(super) first: P,
    pub(super) line: usize,
}

/// What a chunk needs besides the state.
pub(super) struct Input {
    pub(super) q: RowsOf<*const u8>,
    pub(super) k: RowsOf<*const u8>,
    pub(super) v: RowsOf<*const u8>,
    pub(super) out: RowsOf<*mut u8>,
    pub(super) tokens: usize,
    /// Tokens of the next chunk, which lies behind this one.
    pub(super) coming: usize,
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
    /// q, k and v of a chunk that is short, or whose rows are not whole tiles: padded with zeros.
    padded: [Vec<Bytes>; 3],
    /// q · scale · decay from the start; of each 32 channels first the even ones.
    q_far: Vec<Bytes>,
    /// Kᵀ as right operand (of the scores), and decayed to the end as left one (of the state).
    k_right: Vec<Bytes>,
    k_left: Vec<Bytes>,
    v: Vec<Bytes>,
    /// The state in bf16, channels in the order of `q_far`.
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
}

/// e^x, zero below `least`.
#[inline(always)]
unsafe fn exp_above(x: __m512, least: f32) -> __m512 {
    let keep = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(least));
    _mm512_maskz_mov_ps(keep, exp::<Avx512>(x))
}

/// Lane i: the sum of lanes 0..=i, or (`BACK`) of lanes i.. .
#[inline(always)]
unsafe fn running<const BACK: bool>(x: __m512) -> __m512 {
    let (mut x, zero) = (_mm512_castps_si512(x), _mm512_setzero_si512());
    macro_rules! step {
        ($n:literal) => {
            let y = if BACK { _mm512_alignr_epi32::<$n>(zero, x) } else { _mm512_alignr_epi32::<{ 16 - $n }>(x, zero) };
            x = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y)));
        };
    }
    step!(1);
    step!(2);
    step!(4);
    step!(8);
    _mm512_castsi512_ps(x)
}

impl Decays {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    unsafe fn new(p: &Input) -> Self {
        let mut r = Decays {
            from_start: [p.scale; CHUNK],
            to_end: p.strength.unwrap_or([1.0; CHUNK]),
            from_sub: [1.0; CHUNK],
            to_sub: [r_to_sub(p); ROWS],
            total: 1.0,
        };
        let Some(g) = &p.g else { return r };
        // Sums of the terms themselves: differences of long sums would lose the short ones.
        let mut sums = [0.0; ROWS];
        let (mut from, mut to) = ([_mm512_setzero_ps(); ROWS], [_mm512_setzero_ps(); ROWS]);
        for i in 0..ROWS {
            let x = _mm512_loadu_ps(g.as_ptr().add(16 * i));
            from[i] = running::<false>(x);
            let back = running::<true>(x);
            sums[i] = _mm512_cvtss_f32(back);
            // Without the token's own decay.
            let (back, zero) = (_mm512_castps_si512(back), _mm512_setzero_si512());
            to[i] = _mm512_castsi512_ps(_mm512_alignr_epi32::<1>(zero, back));
        }
        let store = |to: &mut [f32; CHUNK], i: usize, x: __m512| _mm512_storeu_ps(to.as_mut_ptr().add(16 * i), x);
        let times =
            |from: &[f32; CHUNK], i: usize, x: __m512| _mm512_mul_ps(_mm512_loadu_ps(from.as_ptr().add(16 * i)), x);
        let mut before = 0.0;
        for i in 0..ROWS {
            let x = exp_above(_mm512_add_ps(from[i], _mm512_set1_ps(before)), f32::NEG_INFINITY);
            let x = times(&r.from_start, i, x);
            store(&mut r.from_start, i, x);
            store(&mut r.from_sub, i, exp_above(from[i], LEAST));
            before += sums[i];
        }
        r.total = before.exp();
        for i in 1..=ROWS {
            let mut after = 0.0;
            for j in (0..i).rev() {
                let x = _mm512_add_ps(to[j], _mm512_set1_ps(after));
                if i == ROWS {
                    let x = times(&r.to_end, j, exp_above(x, f32::NEG_INFINITY));
                    store(&mut r.to_end, j, x);
                } else {
                    let x = times(&r.to_sub[i], j, exp_above(x, LEAST));
                    store(&mut r.to_sub[i], j, x);
                }
                after += sums[j];
            }
        }
        r
    }
}

/// Scale times strength.
fn r_to_sub(p: &Input) -> [f32; CHUNK] {
    p.strength.map_or([p.scale; CHUNK], |s| s.map(|s| s * p.scale))
}

/// Columns `32 s..` of a row that exist.
#[inline(always)]
fn mask(width: usize, s: usize) -> u32 {
    let left = width - 32 * s;
    if left >= 32 { u32::MAX } else { (1 << left) - 1 }
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

/// The even and the odd elements of a vector of bf16, widened.
#[inline(always)]
unsafe fn halves(x: __m512i) -> [__m512; 2] {
    let odd = _mm512_and_si512(x, _mm512_set1_epi32(0xffff_0000_u32 as i32));
    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)), _mm512_castsi512_ps(odd)]
}

#[inline(always)]
unsafe fn store(to: *mut u8, x: __m512i) {
    _mm512_store_si512(to.cast(), x);
}

#[inline(always)]
unsafe fn load(from: *const u8) -> __m512i {
    _mm512_loadu_si512(from.cast())
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
            padded: [d_steps, d_steps, dv_tiles / 2].map(|steps| room(ROWS * steps)),
            q_far: room(ROWS * d_steps),
            k_right: room(ROWS * d_steps),
            k_left: room(2 * d_steps * STEPS),
            v: room(dv_tiles * STEPS),
            s: room(dv_tiles * d_steps),
            p: room(ROWS * STEPS),
            scores: room(ROWS * ROWS),
            out: room(ROWS * dv_tiles),
            state: room(2 * d_steps * dv_tiles),
            // SAFETY: by the contract.
            _tiles: unsafe { Tiles::new() },
        }
    }

    /// Row `i` of the state: its first `dv` elements count.
    pub(super) fn state_row(&mut self, i: usize) -> &mut [f32] {
        let width = 16 * self.dv_tiles;
        assert!(i < self.d);
        // SAFETY: the state has 32 · d_steps ≥ d rows of `width` f32, each tile row 64 bytes.
        unsafe { std::slice::from_raw_parts_mut(self.state.as_mut_ptr().cast::<f32>().add(i * width), self.dv) }
    }

    /// Rows of `x` (its `tokens` first ones, `width` wide) where whole tiles can be read.
    #[inline(always)]
    unsafe fn whole(to: &mut [Bytes], x: RowsOf<*const u8>, tokens: usize, width: usize) -> RowsOf<*const u8> {
        if tokens == CHUNK && width.is_multiple_of(32) {
            return x;
        }
        let steps = width.div_ceil(32);
        let line = steps * LINE;
        let to: *mut u8 = to.as_mut_ptr().cast();
        for t in 0..CHUNK {
            for s in 0..steps {
                let at = x.first.wrapping_add(t * x.line + s * LINE);
                let some = if t < tokens { mask(width, s) } else { 0 };
                store(to.add(t * line + s * LINE), _mm512_maskz_loadu_epi16(some, at.cast()));
            }
        }
        RowsOf { first: to, line }
    }

    /// One chunk: outputs, and the state moved on.
    ///
    /// # Safety
    /// The machine has AMX; `tokens` rows of q and k reach D elements, those of v and out Dv; out rows are
    /// nobody else's.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    pub(super) unsafe fn chunk(&mut self, p: &Input) {
        let [q, k, v] = &mut self.padded;
        let q = Self::whole(q, p.q, p.tokens, self.d);
        let k = Self::whole(k, p.k, p.tokens, self.d);
        let v = Self::whole(v, p.v, p.tokens, self.dv);
        let direct = p.tokens == CHUNK && self.dv.is_multiple_of(32);
        let rows = p.tokens.div_ceil(16).next_multiple_of(2);
        let (ds, width) = (self.d_steps, 16 * self.dv_tiles);

        let mut ahead = Ahead::new(p, self.d, self.dv);
        self.turn_keys(k);
        // Scores of 32 queries and 32 keys at a time.
        let scores: *mut u8 = self.scores.as_mut_ptr().cast();
        for i in (0..rows).step_by(2) {
            for j in (0..=i).step_by(2) {
                ahead.ask();
                let c = scores.add(i * 16 * CHUNK * 4 + j * LINE);
                let a = q.first.wrapping_add(16 * i * q.line);
                let b = tile(&self.k_right, j * ds);
                let term =
                    Term { a, a_line: q.line, a_step: LINE, a_next: 16 * q.line, b, b_next: ds * TILE, count: ds };
                square::<true, true>(&Square { c, c_line: CHUNK * 4, add: false }, &[term]);
            }
        }
        // While the tiles are busy, what does not need the scores.
        let decays = Decays::new(p);
        ahead.ask();
        self.decay_queries(q, &decays);
        ahead.ask();
        self.pack_values(v);
        ahead.ask();
        self.decay_keys(&decays);
        ahead.ask();
        self.pack_state(decays.total);
        ahead.ask();
        self.decay_scores(p, &decays, rows);

        // Outputs: the state's part and the chunk's own.
        let (out, out_line) =
            if direct { (p.out.first, p.out.line) } else { (self.out.as_mut_ptr().cast(), width * 4) };
        for j in (0..self.dv_tiles).step_by(2) {
            for i in (0..rows).step_by(2) {
                ahead.ask();
                let c = out.wrapping_add(i * 16 * out_line + j * LINE);
                let far = Term::tiles(tile(&self.q_far, i * ds), tile(&self.s, j * ds), ds, ds);
                let near = Term::tiles(tile(&self.p, i * STEPS), tile(&self.v, j * STEPS), STEPS, i / 2 + 1);
                square::<true, true>(&Square { c, c_line: out_line, add: false }, &[far, near]);
            }
        }
        if !direct {
            for t in 0..p.tokens {
                let from: *const f32 = self.out.as_ptr().cast();
                let to = p.out.first.wrapping_add(t * p.out.line).cast::<f32>();
                std::ptr::copy_nonoverlapping(from.add(t * width), to, self.dv);
            }
        }

        // The state.
        let state: *mut u8 = self.state.as_mut_ptr().cast();
        for j in (0..self.dv_tiles).step_by(2) {
            for i in (0..2 * ds).step_by(2) {
                ahead.ask();
                let c = state.add((i * 16 * width + j * 16) * 4);
                let term = Term::tiles(tile(&self.k_left, i * STEPS), tile(&self.v, j * STEPS), STEPS, rows / 2);
                square::<true, true>(&Square { c, c_line: width * 4, add: true }, &[term]);
            }
        }
    }

    /// Kᵀ: a dword holds two channels of a token.
    #[inline(always)]
    unsafe fn turn_keys(&mut self, k: RowsOf<*const u8>) {
        let to: *mut u8 = self.k_right.as_mut_ptr().cast();
        for i in 0..ROWS {
            for s in 0..self.d_steps {
                let mut x = [_mm512_setzero_si512(); 16];
                for r in 0..16 {
                    x[r] = load(k.first.wrapping_add((i * 16 + r) * k.line + s * LINE));
                }
                let y = transpose(x);
                for r in 0..16 {
                    store(to.add((i * self.d_steps + s) * TILE + r * LINE), y[r]);
                }
            }
        }
    }

    /// From the turned keys: a row a channel, a column a token.
    #[inline(always)]
    unsafe fn decay_keys(&mut self, decays: &Decays) {
        let (from, ds): (*const u8, usize) = (self.k_right.as_ptr().cast(), self.d_steps);
        let to: *mut u8 = self.k_left.as_mut_ptr().cast();
        for step in 0..STEPS {
            let f = |i: usize| _mm512_loadu_ps(decays.to_end.as_ptr().add(32 * step + 16 * i));
            let (f0, f1) = (f(0), f(1));
            for s in 0..ds {
                for r in 0..16 {
                    let at = |i: usize| from.add(((2 * step + i) * ds + s) * TILE + r * LINE);
                    let (a, b) = (halves(load(at(0))), halves(load(at(1))));
                    for odd in 0..2 {
                        // Channel 32 s + 2 r + odd.
                        let x = narrow(_mm512_mul_ps(b[odd], f1), _mm512_mul_ps(a[odd], f0));
                        store(to.add(((2 * s + r / 8) * STEPS + step) * TILE + (2 * r + odd) % 16 * LINE), x);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn decay_queries(&mut self, q: RowsOf<*const u8>, decays: &Decays) {
        let (to, ds): (*mut u8, usize) = (self.q_far.as_mut_ptr().cast(), self.d_steps);
        for t in 0..CHUNK {
            let f = _mm512_set1_ps(decays.from_start[t]);
            for s in 0..ds {
                let [even, odd] = halves(load(q.first.wrapping_add(t * q.line + s * LINE)));
                let x = narrow(_mm512_mul_ps(odd, f), _mm512_mul_ps(even, f));
                store(to.add((t / 16 * ds + s) * TILE + t % 16 * LINE), x);
            }
        }
    }

    /// Two tokens to a dword.
    #[inline(always)]
    unsafe fn pack_values(&mut self, v: RowsOf<*const u8>) {
        let to: *mut u8 = self.v.as_mut_ptr().cast();
        for t in (0..CHUNK).step_by(2) {
            for j in 0..self.dv_tiles / 2 {
                let from = v.first.wrapping_add(t * v.line + j * LINE);
                let x = pair_up(load(from), load(from.wrapping_add(v.line)));
                let at = (2 * j * STEPS + t / 32) * TILE + t % 32 / 2 * LINE;
                store(to.add(at), x[0]);
                store(to.add(at + STEPS * TILE), x[1]);
            }
        }
    }

    /// The state in bf16, and decayed over the chunk.
    #[inline(always)]
    unsafe fn pack_state(&mut self, total: f32) {
        let (ds, width) = (self.d_steps, 16 * self.dv_tiles);
        let state: *mut f32 = self.state.as_mut_ptr().cast();
        let s: *mut u8 = self.s.as_mut_ptr().cast();
        let f = _mm512_set1_ps(total);
        for i in 0..16 * ds {
            // Even channels in the first eight rows of a tile.
            let row = i / 16 * 32 + i % 8 * 4 + i % 16 / 8;
            let from = state.add(row * width);
            for j in 0..self.dv_tiles {
                let (a, b) = (from.add(j * 16), from.add(2 * width + j * 16));
                let (x, y) = (_mm512_load_ps(a), _mm512_load_ps(b));
                store(s.add((j * ds + i / 16) * TILE + i % 16 * LINE), interleave(narrow(y, x)));
                _mm512_store_ps(a, _mm512_mul_ps(x, f));
                _mm512_store_ps(b, _mm512_mul_ps(y, f));
            }
        }
    }

    /// Scores times decay, as left operand.
    #[inline(always)]
    unsafe fn decay_scores(&mut self, p: &Input, decays: &Decays, rows: usize) {
        self.decay_block::<0>(p, decays);
        self.decay_block::<1>(p, decays);
        if rows > 2 {
            self.decay_block::<2>(p, decays);
            self.decay_block::<3>(p, decays);
        }
    }

    /// [`Fast::decay_scores`] for row tile `I`.
    #[inline(always)]
    unsafe fn decay_block<const I: usize>(&mut self, p: &Input, decays: &Decays) {
        let scores: *const f32 = self.scores.as_ptr().cast::<f32>().add(16 * I * CHUNK);
        let to: *mut u8 = self.p.as_mut_ptr().cast::<u8>().add(I * STEPS * TILE);
        let zero = _mm512_setzero_ps();
        let mut own = _mm512_set1_ps(p.scale);
        if let Some(s) = &p.strength {
            own = _mm512_mul_ps(own, _mm512_loadu_ps(s.as_ptr().add(16 * I)));
        }
        let mut earlier = [zero; ROWS];
        for j in 0..I {
            earlier[j] = _mm512_loadu_ps(decays.to_sub[I].as_ptr().add(16 * j));
        }
        // Log decay from each token of the sub-chunk to the current one.
        let mut x = zero;
        for r in 0..16 {
            let t = 16 * I + r;
            let upto = (1u32 << r) as u16;
            let mut block = [zero; ROWS];
            let mut factor = own;
            if let Some(g) = &p.g {
                // Tokens before this one.
                x = _mm512_mask_add_ps(x, upto - 1, x, _mm512_set1_ps(g[t]));
                factor = _mm512_mul_ps(own, exp::<Avx512>(x));
            }
            block[I] = _mm512_maskz_mul_ps(upto | (upto - 1), _mm512_load_ps(scores.add(r * CHUNK + 16 * I)), factor);
            let f = _mm512_set1_ps(decays.from_sub[t]);
            for j in 0..I {
                block[j] = _mm512_mul_ps(_mm512_load_ps(scores.add(r * CHUNK + 16 * j)), _mm512_mul_ps(earlier[j], f));
            }
            for s in 0..=I / 2 {
                store(to.add(s * TILE + r * LINE), narrow(block[2 * s + 1], block[2 * s]));
            }
        }
    }
}

/// What the next chunk reads and writes, asked for a little at a time: tiles wait for memory badly, and many
/// requests at once wait for each other.
struct Ahead {
    /// First row, bytes from row to row and of a row; the last is for writing.
    rows: [(*const u8, usize, usize); 4],
    coming: usize,
    at: usize,
}

impl Ahead {
    fn new(p: &Input, d: usize, dv: usize) -> Self {
        let of = |x: RowsOf<*const u8>, width: usize| (x.first.wrapping_add(CHUNK * x.line), x.line, width);
        let out = RowsOf { first: p.out.first.cast_const(), line: p.out.line };
        Ahead { rows: [of(p.k, 2 * d), of(p.q, 2 * d), of(p.v, 2 * dv), of(out, 4 * dv)], coming: p.coming, at: 0 }
    }

    /// A sixteenth of a whole chunk.
    #[inline(always)]
    unsafe fn ask(&mut self) {
        let (from, write) = (self.at % CHUNK, self.at >= 3 * CHUNK);
        if self.at >= 4 * CHUNK {
            return;
        }
        let (first, line, width) = self.rows[self.at / CHUNK];
        self.at += ROWS * ROWS;
        for t in from..(from + ROWS * ROWS).min(self.coming) {
            for c in (0..width).step_by(LINE) {
                // A prefetch of any address has no effect but on caches (asm because the intrinsic becomes a
                // prefetch for reading without a further target feature).
                let p = first.wrapping_add(t * line + c);
                if write {
                    asm!("prefetchw [{}]", in(reg) p, options(nostack, preserves_flags, readonly));
                } else {
                    _mm_prefetch::<_MM_HINT_T0>(p.cast());
                }
            }
        }
    }
}

#[inline(always)]
fn tile(x: &[Bytes], i: usize) -> *const u8 {
    x[i * 16..].as_ptr().cast()
}
