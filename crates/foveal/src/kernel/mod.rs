//! Exact kernels (family H).

use crate::system::Card;

pub mod flashattention_2;

/// Cards of this family.
pub const CARDS: &[&Card] = &[&flashattention_2::CARD];
