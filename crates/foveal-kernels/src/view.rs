//! Strided (batch, heads, tokens, head_dim) views over plain slices.
//!
//! The head dimension is contiguous; the other three may have any stride, so
//! that both (B,H,T,D) and (B,T,H,D) memory is read in place.

use crate::error::{KernelError, Result};
use rayon::prelude::*;
use std::ops::Range;

/// Storage element of q, k and v. Arithmetic is always f32.
pub trait Element: Copy + Send + Sync + 'static {
    /// Name for messages and tables.
    const NAME: &'static str;
    /// Widen to f32.
    fn to_f32(self) -> f32;
    /// Round from f32 (nearest even).
    fn from_f32(x: f32) -> Self;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Element for half::bf16 {
    const NAME: &'static str = "bf16";
    fn to_f32(self) -> f32 {
        half::bf16::to_f32(self)
    }
    fn from_f32(x: f32) -> Self {
        half::bf16::from_f32(x)
    }
}

/// Elements spanned by a view, or `None` on overflow.
fn span(shape: [usize; 4], strides: [usize; 3]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut last = shape[3];
    for i in 0..3 {
        last = last.checked_add((shape[i] - 1).checked_mul(strides[i])?)?;
    }
    Some(last)
}

/// Read-only view.
#[derive(Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    /// (batch, heads, tokens, head_dim).
    pub shape: [usize; 4],
    /// Strides of batch, heads and tokens, in elements.
    pub strides: [usize; 3],
}

impl<'a, T: Copy> View<'a, T> {
    /// View with explicit strides; `what` names the operand in errors.
    pub fn new(what: &'static str, data: &'a [T], shape: [usize; 4], strides: [usize; 3]) -> Result<Self> {
        let need = span(shape, strides).unwrap_or(usize::MAX);
        if need > data.len() {
            return Err(KernelError::View { op: "view", what, shape, strides, need, have: data.len() });
        }
        Ok(Self { data, shape, strides })
    }

    /// View of contiguous (B, H, T, D) memory.
    pub fn contiguous(what: &'static str, data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        let [_, h, t, d] = shape;
        Self::new(what, data, shape, [h * t * d, t * d, d])
    }

    /// One row: `head_dim` elements of token `t`.
    #[inline]
    pub fn row(&self, b: usize, h: usize, t: usize) -> &'a [T] {
        let at = b * self.strides[0] + h * self.strides[1] + t * self.strides[2];
        &self.data[at..at + self.shape[3]]
    }

    /// These tokens, and these channels of them.
    pub(crate) fn part(&self, tokens: Range<usize>, channels: Range<usize>) -> Self {
        debug_assert!(tokens.end <= self.shape[2] && channels.end <= self.shape[3]);
        let [b, h, ..] = self.shape;
        let at = tokens.start * self.strides[2] + channels.start;
        // An empty part may start past the end.
        let data = self.data.get(at..).unwrap_or(&[]);
        Self { data, shape: [b, h, tokens.len(), channels.len()], strides: self.strides }
    }

    /// The memory from token 0 of one head on, with the token stride in `strides[2]`.
    #[inline]
    pub fn head(&self, b: usize, h: usize) -> &'a [T] {
        if self.shape[2] == 0 {
            return &[];
        }
        let at = b * self.strides[0] + h * self.strides[1];
        &self.data[at..at + (self.shape[2] - 1) * self.strides[2] + self.shape[3]]
    }
}

/// Writable view. Rows must not overlap.
pub struct ViewMut<'a, T> {
    data: &'a mut [T],
    /// (batch, heads, tokens, head_dim).
    pub shape: [usize; 4],
    /// Strides of batch, heads and tokens, in elements.
    pub strides: [usize; 3],
}

impl<'a, T: Copy> ViewMut<'a, T> {
    /// View with explicit strides. Refuses strides under which two rows overlap.
    pub fn new(what: &'static str, data: &'a mut [T], shape: [usize; 4], strides: [usize; 3]) -> Result<Self> {
        let need = span(shape, strides).unwrap_or(usize::MAX);
        if need > data.len() {
            return Err(KernelError::View { op: "view", what, shape, strides, need, have: data.len() });
        }
        // Rows are disjoint when, sorted by stride, each axis steps past all that lies below it.
        let some = !shape.contains(&0);
        let mut axes: Vec<(usize, usize)> =
            (0..3).filter(|&i| some && shape[i] > 1).map(|i| (strides[i], shape[i])).collect();
        axes.sort_unstable();
        let mut reach = shape[3];
        for (stride, len) in axes {
            if stride < reach {
                return Err(KernelError::Param {
                    op: "view",
                    name: "strides",
                    value: format!("{strides:?} for {what} of shape {shape:?}"),
                    remedy: "rows overlap; use a layout in which every row has its own memory".into(),
                });
            }
            reach += (len - 1) * stride;
        }
        Ok(Self { data, shape, strides })
    }

    /// View of contiguous (B, H, T, D) memory.
    pub fn contiguous(what: &'static str, data: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        let [_, h, t, d] = shape;
        Self::new(what, data, shape, [h * t * d, t * d, d])
    }

    /// A handle that worker threads write disjoint rows through.
    pub(crate) fn rows(&mut self) -> Rows<'_, T> {
        Rows { ptr: self.data.as_mut_ptr(), shape: self.shape, strides: self.strides, _life: std::marker::PhantomData }
    }
}

/// Shared handle on the disjoint rows of a [`ViewMut`].
pub(crate) struct Rows<'a, T> {
    ptr: *mut T,
    shape: [usize; 4],
    strides: [usize; 3],
    _life: std::marker::PhantomData<&'a mut [T]>,
}

impl Rows<'_, f32> {
    /// Zero it all, while nobody else has rows of it.
    pub(crate) fn clear(&self) {
        let [b, h, t, _] = self.shape;
        (0..b * h).into_par_iter().for_each(|bh| {
            for i in 0..t {
                // SAFETY: this task alone has these rows, each once.
                unsafe { self.row_mut(bh / h, bh % h, i).fill(0.0) };
            }
        });
    }
}

// SAFETY: `Rows` only hands out rows through `row_mut`, whose caller promises that no two
// threads ask for the same row; rows are disjoint by the check in `ViewMut::new`.
unsafe impl<T: Send> Sync for Rows<'_, T> {}
// SAFETY: as above; the handle is a pointer into a uniquely borrowed slice.
unsafe impl<T: Send> Send for Rows<'_, T> {}

impl<'a, T> Rows<'a, T> {
    /// As [`View::part`].
    pub(crate) fn part(&self, tokens: Range<usize>, channels: Range<usize>) -> Rows<'a, T> {
        debug_assert!(tokens.end <= self.shape[2] && channels.end <= self.shape[3]);
        let [b, h, ..] = self.shape;
        let ptr = self.ptr.wrapping_add(tokens.start * self.strides[2] + channels.start);
        Rows { ptr, shape: [b, h, tokens.len(), channels.len()], strides: self.strides, _life: self._life }
    }

    /// (batch, heads, tokens, head_dim).
    pub(crate) fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Where the row of token `t` starts, for tasks that share a row.
    #[inline]
    pub(crate) fn row_ptr(&self, b: usize, h: usize, t: usize) -> *mut T {
        assert!(b < self.shape[0] && h < self.shape[1] && t < self.shape[2]);
        // In bounds by the constructor's span check.
        self.ptr.wrapping_add(b * self.strides[0] + h * self.strides[1] + t * self.strides[2])
    }

    /// Elements from token to token.
    #[inline]
    pub(crate) fn token_stride(&self) -> usize {
        self.strides[2]
    }

    /// Some columns of the row of token `t`, for tasks that share it.
    ///
    /// # Safety
    /// No other reference to these columns may be alive.
    #[inline]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part_mut(&self, b: usize, h: usize, t: usize, cols: std::ops::Range<usize>) -> &mut [T] {
        assert!(cols.start <= cols.end && cols.end <= self.shape[3]);
        // SAFETY: in bounds by the constructor's span check and the assertion; unique by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.row_ptr(b, h, t).add(cols.start), cols.len()) }
    }

    /// Row of token `t`.
    ///
    /// # Safety
    /// No other reference to this row may be alive.
    #[inline]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row_mut(&self, b: usize, h: usize, t: usize) -> &mut [T] {
        debug_assert!(b < self.shape[0] && h < self.shape[1] && t < self.shape[2]);
        let at = b * self.strides[0] + h * self.strides[1] + t * self.strides[2];
        // SAFETY: in bounds by the constructor's span check; unique by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at), self.shape[3]) }
    }
}
