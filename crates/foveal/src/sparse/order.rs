//! Token orders: the sequence in which a selection's tables count queries or keys.

use crate::error::{Error, Result};
use std::sync::Arc;

/// A sequence of places, each of which holds one token or none; every token has exactly one place. Tokens that are
/// near one another in space or in meaning get neighbouring places, so that they share a block of a table; places
/// without a token let such a group begin at a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenOrder {
    at: Arc<[u32]>,
    place: Arc<[u32]>,
}

impl TokenOrder {
    /// At a place that holds no token.
    pub const NONE: u32 = u32::MAX;

    /// The order in which place x holds token `at[x]`, or none where that is [`TokenOrder::NONE`]. The other numbers
    /// must be 0, 1, … up to their count, each once.
    pub fn new(at: Vec<u32>) -> Result<Self> {
        let tokens = at.iter().filter(|&&t| t != Self::NONE).count();
        let mut place = vec![Self::NONE; tokens];
        for (x, &t) in at.iter().enumerate().filter(|(_, t)| **t != Self::NONE) {
            match place.get_mut(t as usize) {
                Some(p) if *p == Self::NONE => *p = x as u32,
                _ => {
                    return Err(Error::Param {
                        system: "token order".into(),
                        message: format!("token {t} of {tokens} at place {x}: name each of 0..{tokens} exactly once"),
                    });
                }
            }
        }
        Ok(Self { at: at.into(), place: place.into() })
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.place.len()
    }

    /// Places in all, those without a token included.
    pub fn places(&self) -> usize {
        self.at.len()
    }

    /// The token at each place, or [`TokenOrder::NONE`].
    pub fn at(&self) -> &Arc<[u32]> {
        &self.at
    }

    /// The place of each token.
    pub fn place(&self) -> &Arc<[u32]> {
        &self.place
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_has_one_place() {
        const NONE: u32 = TokenOrder::NONE;
        let o = TokenOrder::new(vec![2, NONE, 0, 1, NONE]).unwrap();
        assert_eq!((o.tokens(), o.places()), (3, 5));
        assert_eq!(&o.place()[..], [2, 3, 0]);
        for bad in [vec![1], vec![0, 0], vec![0, NONE, 2]] {
            assert!(TokenOrder::new(bad).unwrap_err().to_string().contains("exactly once"));
        }
    }
}
