//! Strided (batch, channels, time) views: the operands of convolutions.

use crate::error::{KernelError, Result};

/// The error of a view that reaches past its data.
fn short(what: &'static str, [b, c, t]: [usize; 3], strides: [usize; 3], need: usize, have: usize) -> KernelError {
    KernelError::View { op: "signal", what, shape: [b, c, t, 1], strides, need, have }
}

/// Elements spanned, `usize::MAX` on overflow.
fn span(shape: [usize; 3], strides: [usize; 3]) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    let reach = (0..3).try_fold(1usize, |n, i| n.checked_add((shape[i] - 1).checked_mul(strides[i])?));
    reach.unwrap_or(usize::MAX)
}

/// Read-only view of (batch, channels, time), every axis with its own stride: (B, C, T) and (B, T, C)
/// memory are read in place.
#[derive(Clone, Copy)]
pub struct Signal<'a, T> {
    data: &'a [T],
    /// (batch, channels, time).
    pub shape: [usize; 3],
    /// Strides of the three axes, in elements.
    pub strides: [usize; 3],
}

impl<'a, T: Copy> Signal<'a, T> {
    /// View with explicit strides; `what` names the operand in errors.
    pub fn new(what: &'static str, data: &'a [T], shape: [usize; 3], strides: [usize; 3]) -> Result<Self> {
        let need = span(shape, strides);
        if need > data.len() {
            return Err(short(what, shape, strides, need, data.len()));
        }
        Ok(Self { data, shape, strides })
    }

    /// View of contiguous (B, C, T) memory.
    pub fn channel_major(what: &'static str, data: &'a [T], shape: [usize; 3]) -> Result<Self> {
        Self::new(what, data, shape, [shape[1].saturating_mul(shape[2]), shape[2], 1])
    }

    /// View, still of shape (B, C, T), of contiguous (B, T, C) memory.
    pub fn time_major(what: &'static str, data: &'a [T], shape: [usize; 3]) -> Result<Self> {
        Self::new(what, data, shape, [shape[1].saturating_mul(shape[2]), 1, shape[1]])
    }

    /// Element at (b, c, t).
    #[inline]
    pub fn at(&self, b: usize, c: usize, t: usize) -> T {
        self.data[b * self.strides[0] + c * self.strides[1] + t * self.strides[2]]
    }

    /// The T elements of a channel, if they lie side by side.
    pub(crate) fn row(&self, b: usize, c: usize) -> Option<&'a [T]> {
        let t = self.shape[2];
        if t == 0 {
            return Some(&[]);
        }
        let at = b * self.strides[0] + c * self.strides[1];
        (self.strides[2] == 1 || t == 1).then(|| &self.data[at..at + t])
    }

    /// `n` channels from `c` on at one time, where channels lie side by side.
    pub(crate) fn line(&self, b: usize, c: usize, t: usize, n: usize) -> &'a [T] {
        debug_assert!(self.strides[1] == 1 && c + n <= self.shape[1]);
        let at = b * self.strides[0] + c + t * self.strides[2];
        &self.data[at..at + n]
    }
}

/// Writable view in which every element has memory of its own.
pub struct SignalMut<'a, T> {
    data: &'a mut [T],
    /// (batch, channels, time).
    pub shape: [usize; 3],
    /// Strides of the three axes, in elements.
    pub strides: [usize; 3],
}

impl<'a, T: Copy> SignalMut<'a, T> {
    /// View with explicit strides. Refuses strides under which two elements share memory.
    pub fn new(what: &'static str, data: &'a mut [T], shape: [usize; 3], strides: [usize; 3]) -> Result<Self> {
        let need = span(shape, strides);
        if need > data.len() {
            return Err(short(what, shape, strides, need, data.len()));
        }
        let mut axes: Vec<(usize, usize)> =
            (0..3).filter(|&i| need > 0 && shape[i] > 1).map(|i| (strides[i], shape[i])).collect();
        axes.sort_unstable();
        let mut reach = 1;
        for (stride, len) in axes {
            if stride < reach {
                return Err(KernelError::Param {
                    op: "signal",
                    name: "strides",
                    value: format!("{strides:?} for {what} of shape {shape:?}"),
                    remedy: "elements overlap; use a layout in which each has its own memory".into(),
                });
            }
            reach += (len - 1) * stride;
        }
        Ok(Self { data, shape, strides })
    }

    /// View of contiguous (B, C, T) memory.
    pub fn channel_major(what: &'static str, data: &'a mut [T], shape: [usize; 3]) -> Result<Self> {
        Self::new(what, data, shape, [shape[1].saturating_mul(shape[2]), shape[2], 1])
    }

    /// View, still of shape (B, C, T), of contiguous (B, T, C) memory.
    pub fn time_major(what: &'static str, data: &'a mut [T], shape: [usize; 3]) -> Result<Self> {
        Self::new(what, data, shape, [shape[1].saturating_mul(shape[2]), 1, shape[1]])
    }

    /// A handle that worker threads write disjoint elements through.
    pub(crate) fn cells(&mut self) -> Cells<'_, T> {
        let ptr = self.data.as_mut_ptr();
        Cells { ptr, shape: self.shape, strides: self.strides, _life: std::marker::PhantomData }
    }
}

/// Shared handle on the elements of a [`SignalMut`].
#[derive(Clone, Copy)]
pub(crate) struct Cells<'a, T> {
    ptr: *mut T,
    pub(crate) shape: [usize; 3],
    pub(crate) strides: [usize; 3],
    _life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: the handle only gives out pointers and rows, whose users promise that no two threads touch the
// same element; elements are disjoint by the check in `SignalMut::new`.
unsafe impl<T: Send> Sync for Cells<'_, T> {}
// SAFETY: as above; the handle is a pointer into a uniquely borrowed slice.
unsafe impl<T: Send> Send for Cells<'_, T> {}

impl<T> Cells<'_, T> {
    /// Address of (b, c, t); inside the data for indices below the shape.
    pub(crate) fn ptr(&self, b: usize, c: usize, t: usize) -> *mut T {
        self.ptr.wrapping_add(b * self.strides[0] + c * self.strides[1] + t * self.strides[2])
    }

    /// Do the elements of a channel lie side by side?
    pub(crate) fn has_rows(&self) -> bool {
        self.strides[2] == 1 || self.shape[2] <= 1
    }

    /// The T elements of a channel.
    ///
    /// # Safety
    /// `has_rows()`, and no other reference to this channel is alive.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row_mut(&self, b: usize, c: usize) -> &mut [T] {
        debug_assert!(self.has_rows());
        // SAFETY: in bounds by the constructor's span check; unique by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(b, c, 0), self.shape[2]) }
    }
}
