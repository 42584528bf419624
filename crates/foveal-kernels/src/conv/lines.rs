//! f32 memory aligned to cache lines.

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// f32 elements that begin on a cache line.
pub(crate) struct Lines {
    lines: Vec<Line>,
    len: usize,
}

impl Lines {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self { lines: vec![Line([0.0; 16]); len.div_ceil(16)], len }
    }

    /// A copy of `x`.
    pub(crate) fn from(x: &[f32]) -> Self {
        let mut this = Self::zeroed(x.len());
        this.as_mut_slice().copy_from_slice(x);
        this
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        // SAFETY: a line is 16 f32 without padding, and the lines hold at least `len` of them.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}
