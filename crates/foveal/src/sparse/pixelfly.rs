//! Pixelated butterfly: a flat block butterfly as attention mask (Chen et al. 2021, arXiv 2112.00029).
//!
//! Tokens form blocks. The butterfly factor of stride 2^x joins block a with itself and with a XOR 2^x; the flat butterfly
//! is the union of the factors, a sum where a butterfly matrix is their product. The low-rank part beside it is a few
//! global blocks: the first ones are visited by all and (without a direction) visit all.
//!
//! Nothing is estimated. Cost: T·block_size·(log₂(T/block_size) + 1 + global_blocks) pairs.

use super::pattern::table;
use super::{Domain, HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pixelfly {
    /// Queries and keys per block.
    pub block_size: usize,
    /// Factors, of strides 1, 2, 4, … blocks.
    pub butterfly: usize,
    /// First blocks that every query visits.
    pub global_blocks: usize,
}

impl Default for Pixelfly {
    fn default() -> Self {
        Self { block_size: 64, butterfly: 0, global_blocks: 1 }
    }
}

impl Config for Pixelfly {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_size", "queries and keys per block"),
        ("butterfly", "factors of the butterfly, of strides 1, 2, 4, … blocks; 0 for all that there are"),
        (
            "global_blocks",
            "first blocks that every query visits, and that visit everything where there is no direction",
        ),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_size == 0 { Err("block_size = 0: use at least 1".into()) } else { Ok(()) }
    }
}

impl Selector for Pixelfly {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let blocks = p.k.rows.div_ceil(self.block_size);
        let factors = if self.butterfly == 0 { usize::BITS as usize } else { self.butterfly };
        let table = table(self.block_size, p.q.rows, p.offset(), |own| {
            let last = if p.causal { own + 1 } else { blocks };
            let global = self.global_blocks.min(last);
            if !p.causal && own < self.global_blocks {
                return (0..blocks as u32).collect::<Vec<_>>();
            }
            let strides = (0..factors).map_while(|x| 1usize.checked_shl(x as u32)).take_while(|s| *s < blocks);
            let mut near: Vec<usize> = strides.map(|s| own ^ s).filter(|&b| b >= global && b < last).collect();
            near.extend((own >= global).then_some(own));
            near.sort_unstable();
            (0..global).chain(near).map(|b| b as u32).collect()
        });
        Ok((HeadSelection::of_blocks(table), Work::default()))
    }

    fn domain(&self) -> Domain {
        Domain::ANY
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "pixelfly",
    title: "Pixelated Butterfly: Simple and Efficient Sparse training for Neural Network Models",
    authors: "Chen et al., 2021",
    arxiv: "2112.00029",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("global_blocks", "1000000000")]),
        Law::Work { pairs: Growth::LogLinear, flops: Growth::LogLinear },
        Law::Monotone { param: "butterfly", values: &["1", "2", "3", "4", "0"] },
        Law::Monotone { param: "global_blocks", values: &["0", "1", "4", "1000"] },
    ],
    equation: "query block a visits key block b where a = b, a XOR b is a power of two below 2^butterfly, or b < global_blocks",
    cost: "T·block_size·(log2(T/block_size) + 1 + global_blocks) pairs, half of that in causal attention; no estimate",
    choices: &[
        "The paper sparsifies weight matrices, γ·B + (1 − γ)·U·Vᵀ, and uses the mask of B for attention. Built is the mask; weights \
         are another family's matter.",
        "The low-rank part of an attention matrix is made of global blocks, as the paper's own attention does with global tokens: \
         a separate low-rank product beside the softmax would be no attention under a mask.",
        "block_size = 64 fits our tiles (the paper uses 32 on GPUs); where the number of blocks is no power of two the butterfly is that \
         of the next one, cut off.",
        "In causal attention blocks later than a query's own are left out.",
    ],
    params: params_of::<Pixelfly>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<Pixelfly>(CARD.id, params)?)))
}
