//! Windows on the axes of a grid, as the neighborhood systems share them.

use super::axes::{Axis, Sides, check_tile, select, tile_of};
use super::{Grid, HeadProblem, HeadSelection};

/// Windows of three axes.
pub(crate) struct Neighborhood<'a> {
    /// Keys in all; 0 for the whole axis.
    pub(crate) window: &'a Sides,
    /// Neighbouring queries that share a window.
    pub(crate) stride: &'a Sides,
    /// Distance of the keys of a window.
    pub(crate) dilation: [usize; 3],
    /// Axes on which no later key is visited.
    pub(crate) causal: [bool; 3],
}

impl Neighborhood<'_> {
    /// The axes of a grid.
    pub(crate) fn axes(&self, grid: Grid) -> [Axis; 3] {
        let (sides, window, stride) = ([grid.t, grid.h, grid.w], self.window.three(), self.stride.three());
        std::array::from_fn(|a| axis(sides[a], window[a], stride[a], self.dilation[a], self.causal[a]))
    }

    /// The selection of a problem. Of a causal one the first axis of more than one place is causal, so that windows
    /// at it hold as many earlier keys as there are.
    pub(crate) fn select(mut self, p: &HeadProblem, tile: &Sides) -> HeadSelection {
        let grid = super::axes::grid_of(p);
        if p.causal {
            let first = [grid.t, grid.h, grid.w].iter().position(|&n| n > 1).unwrap_or(2);
            self.causal[first] = true;
        }
        let axes = self.axes(grid);
        select(p, &axes, tile_of(tile, &axes))
    }
}

/// One axis of `n`: the window of `window` members of a class around the leader of each `stride` queries, moved
/// inwards at both ends so that it stays full; with `causal` it ends with the query.
fn axis(n: usize, window: usize, stride: usize, dilation: usize, causal: bool) -> Axis {
    Axis::new(n, dilation, |i, len| {
        let window = if window == 0 { len } else { window.min(len) };
        let stride = stride.min(window);
        let group = i / stride * stride;
        let lead = |from: usize| (group + from).min(len - 1);
        if causal {
            return (lead(stride - 1) + 1).saturating_sub(window)..i + 1;
        }
        let first = lead(stride / 2).saturating_sub(window / 2).min(len - window);
        first..first + window
    })
}

/// Complaint about windows that cannot be.
pub(crate) fn check(window: &Sides, stride: &Sides, tile: &Sides) -> Result<(), String> {
    for (w, s) in window.three().into_iter().zip(stride.three()) {
        if s == 0 || (w > 0 && s > w) {
            return Err(format!(
                "stride = {stride}, window = {window}: use strides from 1 to the window of their axis"
            ));
        }
    }
    check_tile(tile)
}

/// Axes named by letters of `t`, `h` and `w`.
pub(crate) fn causal_axes(letters: &str) -> [bool; 3] {
    ['t', 'h', 'w'].map(|a| letters.contains(a))
}

/// Complaint about letters that name no axis.
pub(crate) fn check_letters(letters: &str) -> Result<(), String> {
    match letters.chars().find(|c| !"thw".contains(*c)) {
        None => Ok(()),
        Some(c) => Err(format!("causal_axes = {letters:?}: {c:?} is no axis; name some of t, h and w, as in th")),
    }
}
