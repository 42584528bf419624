//! Blocks of bf16 and int8 rows on AMX tiles, as exact as f32.
//!
//! Vector instructions for a stored row grow with its queries. Tiles multiply stored rows as they lie, by many
//! queries at once: those of many heads over latent rows, or of several tokens. What meets the rows, the queries
//! and then the weights, is split so that nothing is lost: into three bf16 numbers whose sum is the f32, or into
//! three signed bytes of a 24-bit integer with one scale a query (for weights, one a block and query). The three
//! parts of four queries are 12 of the 16 columns (rows) that a tile has anyway.
//!
//! Scores: A = 16 rows of keys, in place where they are equally far apart and whole lines wide; B = the parts of
//! four queries; C = 16 keys × 12, whose parts are added and turned into lanes of keys. Values: A = the
//! parts of the weights of four queries, B = values interleaved in pairs (bf16) or quads (int8) of rows inside
//! 128 bits, which permutes channels in a way that the sums undo.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod none {
    use super::super::block::{Block, Queries, Running, Step};

    /// Nothing to pack.
    pub(in super::super) type Packs = ();

    /// No tiles.
    pub(in super::super) struct State;

    impl State {
        pub(in super::super) fn with<R>(f: impl FnOnce(&mut State) -> R) -> R {
            f(&mut State)
        }

        pub(in super::super) unsafe fn step(&mut self, _: &Step, _: &mut Running) -> bool {
            false
        }

        pub(in super::super) unsafe fn scores<'a>(
            &mut self,
            _: &'a Queries,
            _: &Block,
            _: &Block,
            _: *mut f32,
        ) -> Option<&'a [f32]> {
            None
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) use none::{Packs, State};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use imp::{Packs, State};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod imp {
    // One contract for the whole module: the caller runs under `Isa::Amx`, and pointers reach what is named.
    #![allow(unsafe_op_in_unsafe_fn)]

    use super::super::block::{self, BLOCK, Block, Queries, Running, Step, prefetch};
    use super::super::codec::Kind;
    use crate::amx::Tiles;
    use crate::fallback::{Reason, tell};
    use crate::simd::Avx512;
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::cell::Cell;
    use std::sync::OnceLock;

    /// Bytes of a row, rows, and bytes of a tile.
    const LINE: usize = 64;
    const ROWS: usize = 16;
    const TILE: usize = LINE * ROWS;
    /// Keys of four tiles.
    const STRIDE: usize = 4 * ROWS;
    /// Queries whose parts share a tile, and their parts.
    const GROUP: usize = 4;
    const PARTS: usize = 3;
    /// Fewest queries for which tiles are faster than vectors: fewer leave most of a tile empty.
    const MIN_ROWS: usize = 8;
    /// The largest integer that splits into three signed bytes, less one part in 256.
    const MOST: f32 = 8_323_072.0;

    /// Queries as the tiles read them.
    pub(in super::super) struct Pack {
        /// For each group of four queries and each line of a key row, one tile.
        tiles: Vec<Line>,
        /// Factor on each query's scores.
        units: Vec<f32>,
    }

    /// Of f32 queries, what meets bf16 and int8 keys; `None` inside where a query is not finite.
    #[derive(Default)]
    pub(in super::super) struct Packs {
        bf16: OnceLock<Option<Pack>>,
        int8: OnceLock<Option<Pack>>,
    }

    #[derive(Clone, Copy)]
    #[repr(C, align(64))]
    struct Line([u8; LINE]);

    fn lines(n: usize) -> Vec<Line> {
        vec![Line([0; LINE]); n]
    }

    /// Three signed bytes, the highest first, of |x| ≤ 8,355,711.
    fn bytes(x: i32) -> [u8; PARTS] {
        // The offset makes each byte's range begin at zero, the exclusive or moves it back.
        let t = (x + 0x0080_8080) as u32 ^ 0x0080_8080;
        [(t >> 16) as u8, (t >> 8) as u8, t as u8]
    }

    /// Three bf16 whose sum is `x`, the highest first.
    fn halves(x: f32) -> [u16; PARTS] {
        let cut = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        let high = cut(x);
        let mid = cut(x - high);
        [high, mid, x - high - mid].map(|x| (x.to_bits() >> 16) as u16)
    }

    fn pack(q: &Queries, kind: Kind) -> Option<Pack> {
        let int8 = kind == Kind::Int8;
        let chunks = kind.bytes(q.width).div_ceil(LINE);
        let mut tiles = lines(q.rows.div_ceil(GROUP) * chunks * ROWS);
        let mut units = vec![1f32; q.rows];
        for (r, unit) in units.iter_mut().enumerate() {
            let x = &q.data[r * q.stride..r * q.stride + q.width];
            if !x.iter().all(|x| x.is_finite()) {
                return None;
            }
            let mut inv = 0.0;
            if int8 {
                let top = x.iter().fold(0f32, |m, x| m.max(x.abs()));
                *unit = top / MOST;
                // The inverse of a scale that is no normal number would overflow; such a query is zero.
                inv = if *unit >= f32::MIN_POSITIVE { 1.0 / *unit } else { 0.0 };
            }
            let (group, column) = (r / GROUP * chunks * ROWS, r % GROUP);
            for (c, &x) in x.iter().enumerate() {
                // A row of B holds four int8 or two bf16 of consecutive channels for each column.
                if int8 {
                    let line = &mut tiles[group + c / 4].0;
                    for (part, b) in bytes((x * inv).round_ties_even() as i32).into_iter().enumerate() {
                        line[(part * GROUP + column) * 4 + c % 4] = b;
                    }
                } else {
                    let line = &mut tiles[group + c / 2].0;
                    for (part, h) in halves(x).into_iter().enumerate() {
                        let at = (part * GROUP + column) * 4 + c % 2 * 2;
                        line[at..at + 2].copy_from_slice(&h.to_ne_bytes());
                    }
                }
            }
        }
        Some(Pack { tiles, units })
    }

    /// Whether tiles multiply bytes (CPUID leaf 7, EDX bit 25); `Isa::Amx` promises bf16 only.
    fn int8_tiles() -> bool {
        static HAVE: OnceLock<bool> = OnceLock::new();
        *HAVE.get_or_init(|| __cpuid_count(7, 0).edx & (1 << 25) != 0)
    }

    /// Whether a codec is one that tiles are meant for.
    fn meant(kind: Kind) -> bool {
        matches!(kind, Kind::Bf16 | Kind::Int8)
    }

    fn able(kind: Kind) -> bool {
        kind == Kind::Bf16 || (kind == Kind::Int8 && int8_tiles())
    }

    /// Configured tiles and room to work, of one part of a call.
    #[derive(Default)]
    pub(in super::super) struct State {
        tiles: Option<Tiles>,
        /// Four tiles of keys that do not lie in place.
        keys: Vec<Line>,
        /// Scores of four tiles of keys with all groups of queries, twice; sums of values.
        c: Vec<Line>,
        /// Parts of the weights: for each group of queries 16 rows of BLOCK, the last four zero.
        weights: Vec<Line>,
        /// Values of a block, 64 channels wide, interleaved.
        values: Vec<Line>,
        units: Units,
    }

    fn grow(v: &mut Vec<Line>, n: usize) -> *mut u8 {
        if v.len() < n {
            *v = lines(n);
        }
        v.as_mut_ptr().cast()
    }

    thread_local! {
        /// Kept from call to call, without the tiles; taken out meanwhile.
        static ROOM: Cell<State> = Cell::default();
    }

    impl State {
        /// Run `f` with this thread's room.
        pub(in super::super) fn with<R>(f: impl FnOnce(&mut State) -> R) -> R {
            let mut state = ROOM.take();
            let result = f(&mut state);
            state.tiles = None;
            ROOM.set(state);
            result
        }

        fn configure(&mut self) {
            // SAFETY: this module runs under a detected `Isa::Amx` only.
            self.tiles.get_or_insert_with(|| unsafe { Tiles::new() });
        }

        /// Take a block into the running softmax; false, with nothing done, where queries are few or neither keys nor
        /// values are stored in a way that suits tiles.
        ///
        /// # Safety
        /// As of [`block::step`], under `Isa::Amx`.
        pub(in super::super) unsafe fn step(&mut self, b: &Step, run: &mut Running) -> bool {
            if b.queries.rows < MIN_ROWS || !(meant(b.block.k_kind) || meant(b.block.v_kind)) {
                return false;
            }
            step(self, b, run);
            true
        }

        /// Scores as of [`block::scores`] of a multiple of four rows, and the factors that they lack;
        /// `None`, with nothing written, where tiles cannot.
        ///
        /// # Safety
        /// As of [`block::raw`], under `Isa::Amx`.
        pub(in super::super) unsafe fn scores<'a>(
            &mut self,
            q: &'a Queries,
            block: &Block,
            next: &Block,
            out: *mut f32,
        ) -> Option<&'a [f32]> {
            if q.rows < MIN_ROWS {
                return None;
            }
            let packs = &q.packed;
            let cell = match block.k_kind {
                Kind::Int8 if int8_tiles() => &packs.int8,
                Kind::Bf16 => &packs.bf16,
                _ => return None,
            };
            let Some(pack) = cell.get_or_init(|| pack(q, block.k_kind)) else {
                tell(Reason::DecodeTiles);
                return None;
            };
            self.configure();
            let groups = q.rows.div_ceil(GROUP);
            let stage = grow(&mut self.keys, block.k_kind.bytes(q.width).div_ceil(LINE) * STRIDE);
            let c = grow(&mut self.c, 8 * groups * ROWS);
            match block.k_kind {
                Kind::Int8 => scores::<true>(q, pack, block, next, stage, c, out),
                _ => scores::<false>(q, pack, block, next, stage, c, out),
            }
            Some(&pack.units)
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn step(s: &mut State, b: &Step, run: &mut Running) {
        let (queries, block) = (b.queries, b.block);
        let seen = (block.len * queries.rows) as u64;
        let units = s.scores(queries, block, b.next, run.p.as_mut_ptr());
        if units.is_none() {
            block::scores::<Avx512>(queries, block, b.next, run.p.as_mut_ptr());
            if meant(block.k_kind) {
                run.fallback += 2 * queries.width as u64 * seen;
            }
        }
        block::softmax::<Avx512>(b, units, run);
        if block.v_kind == Kind::Int8 {
            block::scale_weights::<Avx512>(b, run);
        }
        let done = able(block.v_kind) && values(s, b, run);
        if !done {
            block::values::<Avx512>(block, b.next, queries.rows, run);
            if meant(block.v_kind) {
                tell(Reason::DecodeTiles);
                run.fallback += 2 * run.width as u64 * seen;
            }
        }
    }

    macro_rules! tile {
        ($op:literal, $p:expr, $line:expr) => {
            asm!($op, p = in(reg) $p, l = in(reg) $line, options(nostack, preserves_flags))
        };
    }

    /// A line of which only the first `n` bytes are there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn load_part(p: *const u8, n: usize) -> __m512i {
        if n >= LINE { _mm512_loadu_si512(p.cast()) } else { _mm512_maskz_loadu_epi8((1u64 << n) - 1, p.cast()) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn scores<const INT8: bool>(
        q: &Queries,
        pack: &Pack,
        block: &Block,
        next: &Block,
        stage: *mut u8,
        c: *mut u8,
        out: *mut f32,
    ) {
        let width = block.k_kind.bytes(q.width);
        let ahead = next.k_kind.bytes(q.width);
        let chunks = width.div_ceil(LINE);
        let groups = q.rows.div_ceil(GROUP);
        let b: *const u8 = pack.tiles.as_ptr().cast();
        // Four tiles of keys at a time, so that four products are under way at once.
        let fours = block.len.div_ceil(STRIDE);
        for f in 0..fours {
            let mut a = [(stage.cast_const(), 0); 4];
            for (i, a) in a.iter_mut().enumerate() {
                let t = f * STRIDE + i * ROWS;
                for row in &next.k[t..t + ROWS] {
                    prefetch(*row, ahead);
                }
                *a = in_place(&block.k[t..t + ROWS], width).unwrap_or_else(|| {
                    let stage = stage.add(i * ROWS * chunks * LINE);
                    gather(&block.k[t..t + ROWS], width, stage);
                    (stage.cast_const(), chunks * LINE)
                });
            }
            let half = c.add(f % 2 * groups * 4 * TILE);
            for g in 0..groups / 2 {
                let b = [b.add(2 * g * chunks * TILE), b.add((2 * g + 1) * chunks * TILE)];
                for i in 0..2 {
                    let c = half.add((2 * i * groups + 2 * g) * TILE);
                    two_by_two::<INT8>([a[2 * i], a[2 * i + 1]], b, chunks, c, groups * TILE);
                }
            }
            if groups % 2 == 1 {
                let g = groups - 1;
                four_by_one::<INT8>(a, b.add(g * chunks * TILE), chunks, half.add(g * TILE), groups * TILE);
            }
            // The four before these: their stores have landed meanwhile.
            if f > 0 {
                turn::<INT8>(c.add((f - 1) % 2 * groups * 4 * TILE), groups, out.add((f - 1) * STRIDE));
            }
        }
        turn::<INT8>(c.add((fours - 1) % 2 * groups * 4 * TILE), groups, out.add((fours - 1) * STRIDE));
    }

    /// Where 16 rows lie if they are equally far apart and whole lines wide, and how far.
    #[inline(always)]
    fn in_place(rows: &[*const u8], width: usize) -> Option<(*const u8, usize)> {
        let line = (rows[1] as usize).wrapping_sub(rows[0] as usize);
        let odd = (1..ROWS).fold(0, |odd, i| odd | ((rows[i] as usize).wrapping_sub(rows[i - 1] as usize) ^ line));
        (odd == 0 && width.is_multiple_of(LINE)).then_some((rows[0], line))
    }

    /// Copy rows to whole lines, zeros after their end.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn gather(rows: &[*const u8], width: usize, stage: *mut u8) {
        let line = width.next_multiple_of(LINE);
        for (i, &row) in rows.iter().enumerate() {
            for at in (0..width).step_by(LINE) {
                _mm512_store_si512(stage.add(i * line + at).cast(), load_part(row.add(at), width - at));
            }
        }
    }

    /// Give up tiles: a core renames them from a pool that its hyperthreads share (see `crate::amx`).
    macro_rules! done {
        ($($t:literal),*) => {
            asm!($(concat!("tilezero tmm", $t)),*, options(nostack, preserves_flags))
        };
    }

    macro_rules! dot {
        ($int8:expr, $c:literal, $a:literal, $b:literal) => {
            if $int8 {
                asm!(concat!("tdpbssd tmm", $c, ", tmm", $a, ", tmm", $b), options(nostack, preserves_flags));
            } else {
                asm!(concat!("tdpbf16ps tmm", $c, ", tmm", $a, ", tmm", $b), options(nostack, preserves_flags));
            }
        };
    }

    /// Four tiles of keys (where, bytes from row to row) with one tile of queries for each line.
    #[inline(always)]
    unsafe fn four_by_one<const INT8: bool>(
        a: [(*const u8, usize); 4],
        b: *const u8,
        chunks: usize,
        c: *mut u8,
        next: usize,
    ) {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
        for i in 0..chunks {
            tile!("tileloadd tmm6, [{p} + {l}*1]", b.add(i * TILE), LINE);
            tile!("tileloadd tmm4, [{p} + {l}*1]", a[0].0.add(i * LINE), a[0].1);
            dot!(INT8, "0", "4", "6");
            done!("4");
            tile!("tileloadd tmm5, [{p} + {l}*1]", a[1].0.add(i * LINE), a[1].1);
            dot!(INT8, "1", "5", "6");
            done!("5");
            tile!("tileloadd tmm4, [{p} + {l}*1]", a[2].0.add(i * LINE), a[2].1);
            dot!(INT8, "2", "4", "6");
            done!("4");
            tile!("tileloadd tmm5, [{p} + {l}*1]", a[3].0.add(i * LINE), a[3].1);
            dot!(INT8, "3", "5", "6");
            done!("5", "6");
        }
        tile!("tilestored [{p} + {l}*1], tmm0", c, LINE);
        tile!("tilestored [{p} + {l}*1], tmm1", c.add(next), LINE);
        tile!("tilestored [{p} + {l}*1], tmm2", c.add(2 * next), LINE);
        tile!("tilestored [{p} + {l}*1], tmm3", c.add(3 * next), LINE);
        done!("0", "1", "2", "3");
    }

    /// Two tiles of keys with two groups of queries; the second tile's results are `next` bytes on.
    #[inline(always)]
    unsafe fn two_by_two<const INT8: bool>(
        a: [(*const u8, usize); 2],
        b: [*const u8; 2],
        chunks: usize,
        c: *mut u8,
        next: usize,
    ) {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
        for i in 0..chunks {
            tile!("tileloadd tmm6, [{p} + {l}*1]", b[0].add(i * TILE), LINE);
            tile!("tileloadd tmm4, [{p} + {l}*1]", a[0].0.add(i * LINE), a[0].1);
            dot!(INT8, "0", "4", "6");
            tile!("tileloadd tmm7, [{p} + {l}*1]", b[1].add(i * TILE), LINE);
            dot!(INT8, "1", "4", "7");
            done!("4");
            tile!("tileloadd tmm5, [{p} + {l}*1]", a[1].0.add(i * LINE), a[1].1);
            dot!(INT8, "2", "5", "6");
            done!("6");
            dot!(INT8, "3", "5", "7");
            done!("5", "7");
        }
        tile!("tilestored [{p} + {l}*1], tmm0", c, LINE);
        tile!("tilestored [{p} + {l}*1], tmm1", c.add(TILE), LINE);
        tile!("tilestored [{p} + {l}*1], tmm2", c.add(next), LINE);
        tile!("tilestored [{p} + {l}*1], tmm3", c.add(next + TILE), LINE);
        done!("0", "1", "2", "3");
    }

    /// 2^16 H + 2^8 M + L of integers, or the sum of three f32.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn join<const INT8: bool>(parts: [__m512; PARTS]) -> __m512 {
        let [h, m, l] = parts;
        if INT8 {
            let wide = |x| _mm512_cvtepi32_ps(_mm512_castps_si512(x));
            let low = _mm512_fmadd_ps(wide(m), _mm512_set1_ps(256.0), wide(l));
            _mm512_fmadd_ps(wide(h), _mm512_set1_ps(65536.0), low)
        } else {
            _mm512_add_ps(h, _mm512_add_ps(m, l))
        }
    }

    /// Parts of the scores of four tiles of 16 keys (rows) and groups of four queries to one row of keys a query.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn turn<const INT8: bool>(c: *const u8, groups: usize, out: *mut f32) {
        for i in 0..4 * groups {
            let (t, g) = (i / groups, i % groups);
            let (c, out) = (c.add(i * TILE).cast::<f32>(), out.add(t * ROWS));
            // y[k]: queries in lanes of 32 bits, keys k, k + 4, k + 8 and k + 12 in lanes of 128.
            let mut y = [_mm512_setzero_ps(); 4];
            for k in 0..4 {
                let row = |j: usize| _mm512_load_ps(c.add((k + 4 * j) * 16));
                let (r0, r1, r2, r3) = (row(0), row(1), row(2), row(3));
                let (a, b) = (_mm512_shuffle_f32x4::<0x44>(r0, r1), _mm512_shuffle_f32x4::<0x44>(r2, r3));
                let (d, e) = (_mm512_shuffle_f32x4::<0xee>(r0, r1), _mm512_shuffle_f32x4::<0xee>(r2, r3));
                y[k] = join::<INT8>([
                    _mm512_shuffle_f32x4::<0x88>(a, b),
                    _mm512_shuffle_f32x4::<0xdd>(a, b),
                    _mm512_shuffle_f32x4::<0x88>(d, e),
                ]);
            }
            let (a, b) = (_mm512_unpacklo_ps(y[0], y[1]), _mm512_unpacklo_ps(y[2], y[3]));
            let (d, e) = (_mm512_unpackhi_ps(y[0], y[1]), _mm512_unpackhi_ps(y[2], y[3]));
            let pd = |x: __m512| _mm512_castps_pd(x);
            let q = [
                _mm512_unpacklo_pd(pd(a), pd(b)),
                _mm512_unpackhi_pd(pd(a), pd(b)),
                _mm512_unpacklo_pd(pd(d), pd(e)),
                _mm512_unpackhi_pd(pd(d), pd(e)),
            ];
            for (i, q) in q.into_iter().enumerate() {
                _mm512_storeu_ps(out.add((g * GROUP + i) * BLOCK), _mm512_castpd_ps(q));
            }
        }
    }

    /// acc = acc · decay + p · V; false, with nothing done, where the weights have no integers.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn values(s: &mut State, b: &Step, run: &mut Running) -> bool {
        let int8 = b.block.v_kind == Kind::Int8;
        let rows = b.queries.rows;
        let groups = rows.div_ceil(GROUP);
        s.configure();
        // A row of weights is BLOCK bytes, or BLOCK bf16.
        let row_bytes = if int8 { BLOCK } else { 2 * BLOCK };
        let weights = grow(&mut s.weights, groups * ROWS * row_bytes / LINE);
        let units = &mut s.units;
        if int8 {
            if !units.fill(run, b.block.len, rows) {
                return false;
            }
        } else {
            units.0.clear();
            units.0.resize(rows, 1.0);
        }
        let depth = if int8 { LINE } else { LINE / 2 };
        let padded = b.block.len.next_multiple_of(depth);
        for r in 0..rows {
            let p = run.p.as_ptr().add(r * BLOCK);
            let a = weights.add((r / GROUP * ROWS + r % GROUP) * row_bytes);
            let part = GROUP * row_bytes;
            let inv = if units.0[r] > 0.0 { 1.0 / units.0[r] } else { 0.0 };
            for t in (0..padded).step_by(16) {
                // Beyond the last vector of the block lie weights of another one.
                let x = if t < b.block.len { _mm512_loadu_ps(p.add(t)) } else { _mm512_setzero_ps() };
                if int8 {
                    let x = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inv)));
                    let off = _mm512_set1_epi32(0x0080_8080);
                    let x = _mm512_xor_si512(_mm512_add_epi32(x, off), off);
                    let a = a.add(t);
                    _mm_storeu_si128(a.cast(), _mm512_cvtepi32_epi8(_mm512_srli_epi32::<16>(x)));
                    _mm_storeu_si128(a.add(part).cast(), _mm512_cvtepi32_epi8(_mm512_srli_epi32::<8>(x)));
                    _mm_storeu_si128(a.add(2 * part).cast(), _mm512_cvtepi32_epi8(x));
                } else {
                    let cut = |x: __m512| {
                        let top = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                        _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), top))
                    };
                    let high = cut(x);
                    let rest = _mm512_sub_ps(x, high);
                    let mid = cut(rest);
                    let parts = [high, mid, _mm512_sub_ps(rest, mid)];
                    for (i, x) in parts.into_iter().enumerate() {
                        let x = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_castps_si512(x)));
                        _mm256_storeu_si256(a.add(i * part + 2 * t).cast(), x);
                    }
                }
            }
        }
        let stage = grow(&mut s.values, (BLOCK / depth) * 4 * ROWS);
        let c = grow(&mut s.c, 4 * ROWS);
        if int8 {
            product::<true>(b, run, weights, &units.0, stage, c);
        } else {
            product::<false>(b, run, weights, &units.0, stage, c);
        }
        true
    }

    /// What one step of the integers of each query's weights is worth; 1 for bf16.
    #[derive(Default)]
    struct Units(Vec<f32>);

    impl Units {
        /// False where a weight is not finite. Weights under 1e-30 have no integers and are dropped: beside
        /// the sum of all weights, which is at least 1, they are nothing.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn fill(&mut self, run: &Running, len: usize, rows: usize) -> bool {
            self.0.clear();
            for r in 0..rows {
                let p = run.p.as_ptr().add(r * BLOCK);
                // Magnitudes order like their bits, infinities and NaN last.
                let mut top = _mm512_setzero_si512();
                for t in (0..len).step_by(16) {
                    top = _mm512_max_epi32(top, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(p.add(t)))));
                }
                let top = f32::from_bits(_mm512_reduce_max_epi32(top) as u32);
                if !top.is_finite() {
                    return false;
                }
                self.0.push(if top < 1e-30 { 0.0 } else { top / MOST });
            }
            true
        }
    }

    /// The product of weights and values, 64 channels after another.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn product<const INT8: bool>(
        b: &Step,
        run: &mut Running,
        weights: *const u8,
        units: &[f32],
        stage: *mut u8,
        c: *mut u8,
    ) {
        // Rows that share a line of B, and lines of 64 channels.
        let (share, wide) = if INT8 { (4, 1) } else { (2, 2) };
        let depth = ROWS * share;
        let (block, rows) = (b.block, b.queries.rows);
        let depths = block.len.div_ceil(depth);
        let width = block.v_kind.bytes(run.width);
        let ahead = b.next.v_kind.bytes(run.width);
        let row_bytes = if INT8 { BLOCK } else { 2 * BLOCK };
        for at in (0..width).step_by(wide * LINE) {
            for j in 0..depths * ROWS {
                let v = &block.v[j * share..(j + 1) * share];
                let dst = stage.add((j / ROWS * 4 * ROWS + j % ROWS) * LINE);
                let load = |i: usize, line: usize| {
                    let at = at + line * LINE;
                    load_part(v[i].wrapping_add(at), width.saturating_sub(at))
                };
                if INT8 {
                    let (a, b) = (load(0, 0), load(1, 0));
                    let (c, d) = (load(2, 0), load(3, 0));
                    let (ab, ab2) = (_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
                    let (cd, cd2) = (_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d));
                    _mm512_store_si512(dst.cast(), _mm512_unpacklo_epi16(ab, cd));
                    _mm512_store_si512(dst.add(TILE).cast(), _mm512_unpackhi_epi16(ab, cd));
                    _mm512_store_si512(dst.add(2 * TILE).cast(), _mm512_unpacklo_epi16(ab2, cd2));
                    _mm512_store_si512(dst.add(3 * TILE).cast(), _mm512_unpackhi_epi16(ab2, cd2));
                } else {
                    for line in 0..2 {
                        let (a, b) = (load(0, line), load(1, line));
                        let dst = dst.add(2 * line * TILE);
                        _mm512_store_si512(dst.cast(), _mm512_unpacklo_epi16(a, b));
                        _mm512_store_si512(dst.add(TILE).cast(), _mm512_unpackhi_epi16(a, b));
                    }
                }
                if at == 0 {
                    for row in &b.next.v[j * share..(j + 1) * share] {
                        prefetch(*row, ahead);
                    }
                }
            }
            for g in 0..rows.div_ceil(GROUP) {
                let a = weights.add(g * ROWS * row_bytes);
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, preserves_flags)
                );
                for k in 0..depths {
                    let b = stage.add(k * 4 * TILE).cast_const();
                    tile!("tileloadd tmm4, [{p} + {l}*1]", a.add(k * LINE), row_bytes);
                    tile!("tileloadd tmm5, [{p} + {l}*1]", b, LINE);
                    dot!(INT8, "0", "4", "5");
                    done!("5");
                    tile!("tileloadd tmm6, [{p} + {l}*1]", b.add(TILE), LINE);
                    dot!(INT8, "1", "4", "6");
                    done!("6");
                    tile!("tileloadd tmm7, [{p} + {l}*1]", b.add(2 * TILE), LINE);
                    dot!(INT8, "2", "4", "7");
                    done!("7");
                    tile!("tileloadd tmm5, [{p} + {l}*1]", b.add(3 * TILE), LINE);
                    dot!(INT8, "3", "4", "5");
                    done!("4", "5");
                }
                tile!("tilestored [{p} + {l}*1], tmm0", c, LINE);
                tile!("tilestored [{p} + {l}*1], tmm1", c.add(TILE), LINE);
                tile!("tilestored [{p} + {l}*1], tmm2", c.add(2 * TILE), LINE);
                tile!("tilestored [{p} + {l}*1], tmm3", c.add(3 * TILE), LINE);
                done!("0", "1", "2", "3");
                for q in 0..GROUP.min(rows - g * GROUP) {
                    let r = g * GROUP + q;
                    let part =
                        |i: usize, part: usize| _mm512_load_ps(c.add(i * TILE + (part * GROUP + q) * LINE).cast());
                    let unit = _mm512_set1_ps(units[r]);
                    let decay = _mm512_set1_ps(run.decay[r]);
                    let sum = |i: usize| _mm512_mul_ps(join::<INT8>([part(i, 0), part(i, 1), part(i, 2)]), unit);
                    let x = [sum(0), sum(1), sum(2), sum(3)];
                    // Back to the order of channels: 128 bits of a tile are 4 channels of each 16 (int8), or of
                    // each 8 of one line (bf16).
                    let y = if INT8 {
                        let (a, b) =
                            (_mm512_shuffle_f32x4::<0x44>(x[0], x[1]), _mm512_shuffle_f32x4::<0x44>(x[2], x[3]));
                        let (d, e) =
                            (_mm512_shuffle_f32x4::<0xee>(x[0], x[1]), _mm512_shuffle_f32x4::<0xee>(x[2], x[3]));
                        [
                            _mm512_shuffle_f32x4::<0x88>(a, b),
                            _mm512_shuffle_f32x4::<0xdd>(a, b),
                            _mm512_shuffle_f32x4::<0x88>(d, e),
                            _mm512_shuffle_f32x4::<0xdd>(d, e),
                        ]
                    } else {
                        let first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
                        let second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
                        let mix = |a, order, b| {
                            let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
                            _mm512_castpd_ps(_mm512_permutex2var_pd(a, order, b))
                        };
                        [
                            mix(x[0], first, x[1]),
                            mix(x[0], second, x[1]),
                            mix(x[2], first, x[3]),
                            mix(x[2], second, x[3]),
                        ]
                    };
                    // Accumulators are padded to 16 channels.
                    let channel = if INT8 { at } else { at / 2 };
                    let acc = run.acc.as_mut_ptr().add(r * run.stride + channel);
                    for (i, y) in y.into_iter().enumerate().take((run.stride - channel) / 16) {
                        let acc = acc.add(16 * i);
                        _mm512_storeu_ps(acc, _mm512_fmadd_ps(_mm512_loadu_ps(acc), decay, y));
                    }
                }
            }
        }
    }
}
