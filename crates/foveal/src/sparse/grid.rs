//! Token grids: where the tokens of an image or a video stand among those of a sequence.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// Tokens `first..first + t·h·w` form a (t, h, w) grid in row-major order, w fastest; tokens before and after it are
/// text. An image has t = 1, a line of tokens t = h = 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grid {
    /// Number of the grid's first token.
    pub first: usize,
    /// Frames.
    pub t: usize,
    /// Rows of a frame.
    pub h: usize,
    /// Columns of a frame.
    pub w: usize,
}

impl Grid {
    /// A grid that starts at token 0.
    pub fn new(t: usize, h: usize, w: usize) -> Self {
        Self { first: 0, t, h, w }
    }

    /// Number of tokens in the grid.
    pub fn tokens(&self) -> usize {
        self.t * self.h * self.w
    }

    /// Tokens of one frame.
    pub fn frame(&self) -> usize {
        self.h * self.w
    }

    /// The grid's tokens.
    pub fn range(&self) -> Range<usize> {
        self.first..self.first + self.tokens()
    }

    /// Frame, row and column of a token; `None` for text.
    pub fn place(&self, token: usize) -> Option<[usize; 3]> {
        let i = token.checked_sub(self.first).filter(|&i| i < self.tokens())?;
        Some([i / self.frame(), i / self.w % self.h, i % self.w])
    }

    /// The token at a frame, row and column of the grid.
    pub fn token(&self, [t, h, w]: [usize; 3]) -> usize {
        self.first + (t * self.h + h) * self.w + w
    }

    /// Whether the grid lies within `tokens` tokens; the error names both and the remedy.
    pub fn check(&self, tokens: usize) -> Result<()> {
        let end = [self.h, self.w].iter().try_fold(self.t, |n, &x| n.checked_mul(x));
        match end.and_then(|n| n.checked_add(self.first)) {
            Some(end) if end <= tokens && end > self.first => Ok(()),
            end => Err(Error::Grid {
                grid: self.to_string(),
                message: match end {
                    Some(end) if end == self.first => "holds no token; give every side at least 1".into(),
                    Some(end) => format!("ends at token {end} but there are {tokens}; make it smaller"),
                    None => "has more tokens than can be counted; make it smaller".into(),
                },
            }),
        }
    }
}

impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.t, self.h, self.w)?;
        if self.first > 0 { write!(f, "@{}", self.first) } else { Ok(()) }
    }
}

impl FromStr for Grid {
    type Err = Error;

    /// `TxHxW`, `HxW` or `W`, and `@N` where the grid does not start at token 0.
    fn from_str(s: &str) -> Result<Self> {
        let bad = |message: String| Error::Grid { grid: s.into(), message };
        let number = |x: &str| {
            x.trim().parse::<usize>().map_err(|_| bad(format!("{x:?} is no number; write 8x16x16, 16x16 or 16x16@12")))
        };
        let (sides, first) = match s.split_once('@') {
            Some((sides, first)) => (sides, number(first)?),
            None => (s, 0),
        };
        let sides = sides.split('x').map(number).collect::<Result<Vec<_>>>()?;
        let (t, h, w) = match sides[..] {
            [t, h, w] => (t, h, w),
            [h, w] => (1, h, w),
            [w] => (1, 1, w),
            _ => return Err(bad(format!("{} sides; write one to three, such as 8x16x16", sides.len()))),
        };
        let grid = Self { first, t, h, w };
        grid.check(usize::MAX)?;
        Ok(grid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_tokens_are_inverse_and_names_round_trip() {
        let g: Grid = "2x3x5@7".parse().unwrap();
        assert_eq!((g.first, g.t, g.h, g.w, g.tokens()), (7, 2, 3, 5, 30));
        assert_eq!(g.to_string().parse::<Grid>().unwrap(), g);
        assert_eq!((g.place(6), g.place(37)), (None, None));
        for token in g.range() {
            assert_eq!(g.token(g.place(token).unwrap()), token);
        }
        assert_eq!(g.place(7 + 15 + 5 + 4), Some([1, 1, 4]));
        assert_eq!("4x6".parse::<Grid>().unwrap(), Grid::new(1, 4, 6));
        assert!(g.check(37).is_ok() && g.check(36).is_err());
        for bad in ["", "0x4", "1x2x3x4", "ax4", "4x4@", "99999999999x99999999999"] {
            let e = bad.parse::<Grid>().unwrap_err().to_string();
            assert!(e.contains(bad), "{bad}: {e}");
        }
    }
}
