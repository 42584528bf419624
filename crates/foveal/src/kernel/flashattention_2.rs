//! FlashAttention-2: exact attention in tiles (Dao 2023, arXiv 2307.08691).
//!
//! For each tile of queries, over tiles of keys j: S = scale·Q Kⱼᵀ, m' = max(m, rowmax S),
//! P = e^{S − m'}, l = e^{m − m'} l + rowsum P, O = e^{m − m'} O + P Vⱼ; at the end O / l and
//! lse = m + ln l. The N×N matrix is never stored: O(T²·D) time, O(T) extra memory.
//! The work partition of the paper is kept: the outer loop over query tiles is the parallel
//! one, and the division by l happens once per row.

use crate::error::Result;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use serde::{Deserialize, Serialize};

/// Parameters: none; exactness leaves nothing to choose.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlashAttention2 {}

impl Config for FlashAttention2 {
    const DOCS: &'static [(&'static str, &'static str)] = &[];
    fn validate(&self) -> std::result::Result<(), String> {
        Ok(())
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "flashattention-2",
    title: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
    authors: "Dao, 2023",
    arxiv: "2307.08691",
    family: Family::Kernel,
    slots: &[Slot::Prefill, Slot::Cache, Slot::Kernel],
    laws: &[Law::Causal, Law::ExactAt(&[]), Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic }],
    equation: "S = scale·Q·K_jᵀ;  m' = max(m, rowmax S);  P = exp(S − m')\n\
               l = exp(m − m')·l + rowsum P;  O = exp(m − m')·O + P·V_j\n\
               at the end O / l, lse = m + ln l",
    cost: "O(T²·D) time, O(T) extra memory; no N×N matrix",
    choices: &["Tile sizes follow the CPU's caches and registers instead of a GPU's shared memory."],
    params: params_of::<FlashAttention2>,
    build,
};

fn build(params: &Params) -> Result<System> {
    configure::<FlashAttention2>(CARD.id, params)?;
    Ok(System::Dense)
}
