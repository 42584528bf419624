//! K and V of a call as AMX tiles, each 32 keys packed by the task that first visits them.
//!
//! Packed on the way, keys are still in that core's cache when they are used, nothing is packed that nobody visits,
//! and no pass over all of K and V comes before the first task. Tiles are whole cache lines in one piece, which rows
//! of a tensor are not (memory from the system's allocator starts 16 bytes into a line, and rows may lie far apart).

#![allow(unsafe_op_in_unsafe_fn)]

use super::amx::{CHUNK, LINE, ROWS, TILE};
use crate::simd::transpose;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where the left operands of the scores of 32 keys lie; distances in bytes.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    pub(super) at: *const u8,
    /// From key to key.
    pub(super) line: usize,
    /// From 32 channels to the next.
    pub(super) step: usize,
    /// From 16 keys to the next.
    pub(super) next: usize,
}

impl Keys {
    pub(super) const NONE: Keys = Keys { at: std::ptr::null(), line: 0, step: 0, next: 0 };

    /// Rows `line` bytes apart.
    pub(super) fn rows(at: *const u8, line: usize) -> Self {
        Self { at, line, step: LINE, next: ROWS * line }
    }

    /// Tiles of keys `dp` wide, as [`pack_keys`] leaves them.
    pub(super) fn tiles(at: *const u8, dp: usize) -> Self {
        Self { at, line: LINE, step: TILE, next: dp / 32 * TILE }
    }
}

const EMPTY: u8 = 0;
const BUSY: u8 = 1;
const READY: u8 = 2;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
#[allow(dead_code)]
struct Line([u8; LINE]);

/// Room for K and Vᵀ of one (batch, K/V head), 32 keys after 32 keys.
pub(super) struct Packed {
    /// Held for the tiles' sake.
    _room: Vec<MaybeUninit<Line>>,
    tiles: *mut u8,
    state: Vec<AtomicU8>,
    dp: usize,
    k_bytes: usize,
    bytes: usize,
}

// SAFETY: the tiles of 32 keys are written by whom `state` lets in, and read once it says that they are there.
unsafe impl Send for Packed {}
// SAFETY: as above.
unsafe impl Sync for Packed {}

impl Packed {
    /// Room for `tk` keys, `dp` (a multiple of 32) wide, with values of `dv_tiles` · 16 channels.
    fn new(tk: usize, dp: usize, dv_tiles: usize) -> Self {
        let chunks = tk.div_ceil(CHUNK);
        let k_bytes = CHUNK * dp * 2;
        let bytes = k_bytes + dv_tiles * TILE;
        let mut room: Vec<MaybeUninit<Line>> = Vec::with_capacity(chunks * bytes / LINE);
        // SAFETY: what is not initialised may be anything.
        unsafe { room.set_len(room.capacity()) };
        let state = (0..chunks).map(|_| AtomicU8::new(EMPTY)).collect();
        Self { tiles: room.as_mut_ptr().cast(), _room: room, state, dp, k_bytes, bytes }
    }

    /// K and Vᵀ of the 32 keys `chunk`, for which `pack` is called if nobody packed them yet.
    pub(super) fn get(&self, chunk: usize, pack: impl FnOnce(*mut u8, *mut u8)) -> (Keys, *const u8) {
        let state = &self.state[chunk];
        // In range since `state[chunk]` is; offsets alone are no access.
        let k = self.tiles.wrapping_add(chunk * self.bytes);
        let v = k.wrapping_add(self.k_bytes);
        if state.load(Ordering::Acquire) != READY {
            match state.compare_exchange(EMPTY, BUSY, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => {
                    pack(k, v);
                    state.store(READY, Ordering::Release);
                }
                // Another thread is at it, and done in less than a microsecond unless it lost its core.
                Err(_) => {
                    let mut turns = 0;
                    while state.load(Ordering::Acquire) != READY {
                        turns += 1;
                        if turns < 10_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
                    }
                }
            }
        }
        (Keys::tiles(k, self.dp), v)
    }
}

/// Packed keys and values of the (batch, K/V head)s that tasks are at. Tasks of one head follow each other, so there
/// are rooms for a few heads only, and those stay in the caches.
pub(super) struct Shelf {
    /// Keys, their width, and tiles of value channels.
    shape: [usize; 3],
    rooms: Mutex<Rooms>,
}

struct Rooms {
    /// Tasks of each head that are not done.
    left: Vec<usize>,
    open: Vec<Option<Arc<Packed>>>,
    free: Vec<Packed>,
}

impl Shelf {
    /// For heads of `tk` keys, `dp` wide, with values of `dv_tiles` · 16 channels; `tasks` come to each.
    pub(super) fn new(tasks: Vec<usize>, tk: usize, dp: usize, dv_tiles: usize) -> Self {
        let open = tasks.iter().map(|_| None).collect();
        Self { shape: [tk, dp, dv_tiles], rooms: Mutex::new(Rooms { left: tasks, open, free: Vec::new() }) }
    }

    fn rooms(&self) -> MutexGuard<'_, Rooms> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The room of `head`, for one of its tasks.
    pub(super) fn open(&self, head: usize) -> Arc<Packed> {
        let mut rooms = self.rooms();
        if let Some(room) = &rooms.open[head] {
            return room.clone();
        }
        let [tk, dp, dv_tiles] = self.shape;
        let room = Arc::new(rooms.free.pop().unwrap_or_else(|| Packed::new(tk, dp, dv_tiles)));
        rooms.open[head] = Some(room.clone());
        room
    }

    /// A task of `head` is done.
    pub(super) fn close(&self, head: usize, room: Arc<Packed>) {
        let mut rooms = self.rooms();
        drop(room);
        rooms.left[head] -= 1;
        if rooms.left[head] == 0
            && let Some(Ok(mut room)) = rooms.open[head].take().map(Arc::try_unwrap)
        {
            room.state.iter_mut().for_each(|s| *s.get_mut() = EMPTY);
            rooms.free.push(room);
        }
    }
}

/// Up to 32 rows of `d` as tiles of 16 keys and 32 channels, those of the first 16 keys first; missing rows and channels
/// (up to `dp`) are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pack_keys(rows: &[*const u16], d: usize, dp: usize, to: *mut u8) {
    for y in 0..CHUNK {
        let to = to.add(y / ROWS * (dp / 32) * TILE + y % ROWS * LINE);
        for s in 0..dp / 32 {
            let x = match rows.get(y) {
                Some(r) if d >= 32 * s + 32 => _mm512_loadu_si512(r.add(32 * s).cast()),
                Some(r) if d > 32 * s => _mm512_maskz_loadu_epi16((1u32 << (d - 32 * s)) - 1, r.add(32 * s).cast()),
                _ => _mm512_setzero_si512(),
            };
            _mm512_storeu_si512(to.add(s * TILE).cast(), x);
        }
    }
}

/// Vᵀ of up to 32 rows as tiles of 16 channels; missing rows and channels are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pack_values(rows: &[*const u16], dv: usize, to: *mut u8) {
    for i in 0..dv.div_ceil(16) {
        let some = if dv - i * 16 >= 16 { 0xffff } else { (1u16 << (dv - i * 16)) - 1 };
        let mut x = [_mm512_setzero_si512(); 16];
        if rows.len() == CHUNK && some == 0xffff {
            // Lane c of row 2r, lane c of row 2r + 1, and so on.
            let order: [u16; 32] = std::array::from_fn(|c| (c / 2 + c % 2 * 16) as u16);
            let order = _mm512_loadu_si512(order.as_ptr().cast());
            for r in 0..16 {
                let a = _mm256_loadu_si256(rows[2 * r].add(i * 16).cast());
                let b = _mm256_loadu_si256(rows[2 * r + 1].add(i * 16).cast());
                let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
                x[r] = _mm512_permutexvar_epi16(order, both);
            }
        } else {
            let row = |j: usize| match rows.get(j) {
                None => _mm512_setzero_si512(),
                Some(r) => _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, r.add(i * 16).cast())),
            };
            for r in 0..16 {
                x[r] = _mm512_or_si512(row(2 * r), _mm512_slli_epi32::<16>(row(2 * r + 1)));
            }
        }
        let y = transpose(x);
        for r in 0..16 {
            _mm512_storeu_si512(to.add(i * TILE + r * LINE).cast(), y[r]);
        }
    }
}
