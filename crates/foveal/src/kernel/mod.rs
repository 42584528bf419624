//! Exact kernels (family H).

use crate::system::Card;

pub mod flashattention_2;
pub mod fsa_nsa_kernel;
pub mod fused_neighborhood_attention;

/// Cards of this family.
pub const CARDS: &[&Card] = &[&flashattention_2::CARD, &fsa_nsa_kernel::CARD, &fused_neighborhood_attention::CARD];
