//! MoA: a window of its own for each head, which grows with the input in its own way (Fu et al. 2024, arXiv
//! 2406.14909).
//!
//! Each head visits, causally, the blocks of its first `sinks` keys and a window of α + β·N keys of the N there are, both
//! counted in blocks: ⌊⌊α/block⌋ + β·⌈N/block⌉⌋ blocks, the query's own included.
//!
//! Which head has which (α, β) is found offline: [`candidates`] are tried on recorded q, k, v, and
//! [`super::search::assign`] gives each head one so that the heads' errors are least within a budget of cost at every length
//! recorded. Cost: T·(α + β·N + sinks) pairs a head; nothing is estimated.

use super::pattern::table;
use super::{HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, Spec, System, configure, params_of};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MoaSparse {
    /// Keys of the window whatever the length.
    pub alpha: f64,
    /// Share of the length that the window has besides.
    pub beta: f64,
    /// First keys that every query visits.
    pub sinks: usize,
    /// Queries and keys per block.
    pub block_size: usize,
}

impl Default for MoaSparse {
    fn default() -> Self {
        Self { alpha: 256.0, beta: 0.25, sinks: 64, block_size: 64 }
    }
}

impl Config for MoaSparse {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("alpha", "keys of the window whatever the length; may be negative"),
        ("beta", "share of the length that the window has besides, 0 to 1"),
        ("sinks", "first keys that every query visits, rounded up to blocks"),
        ("block_size", "queries and keys per block"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        let Self { alpha, beta, block_size, .. } = self;
        if !alpha.is_finite() || !(0.0..=1.0).contains(beta) || *block_size == 0 {
            return Err(format!(
                "alpha = {alpha}, beta = {beta}, block_size = {block_size}: use a number of keys, a share from 0 to 1 and blocks of at \
                 least 1"
            ));
        }
        Ok(())
    }
}

impl MoaSparse {
    /// Blocks of the window among `keys`, at least the query's own.
    fn window(&self, keys: usize) -> usize {
        let blocks = keys.div_ceil(self.block_size) as f64;
        // A cast of what is negative or too large saturates.
        (((self.alpha / self.block_size as f64).floor() + self.beta * blocks) as usize).max(1)
    }
}

/// What the offline search tries for a head: (α, β) whose window is neither empty nor longer than all at any length from
/// `shortest` to `longest`, in the authors' grid of shares of the longest.
pub fn candidates(shortest: usize, longest: usize) -> Vec<Spec> {
    let long = longest as f64;
    let alphas = [-0.125, 0.0, 0.03125, 0.0625, 0.125, 0.25, 0.5].map(|share| (share * long).round());
    let betas = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0];
    let span = |a: f64, b: f64, n: usize| (a + b * n as f64) / n as f64;
    let mut all = Vec::new();
    for (a, b) in alphas.iter().flat_map(|&a| betas.map(|b| (a, b))) {
        if [shortest, longest].iter().all(|&n| (1e-9..=1.0).contains(&span(a, b, n))) {
            all.push(Spec::new(CARD.id).with("alpha", &a.to_string()).with("beta", &b.to_string()));
        }
    }
    all
}

impl Selector for MoaSparse {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let window = self.window(p.k.rows);
        let first = self.sinks.div_ceil(self.block_size);
        let blocks = table(self.block_size, p.q.rows, p.offset(), |own| {
            let near = (own + 1).saturating_sub(window);
            (0..first.min(near)).chain(near..own + 1).map(|b| b as u32)
        });
        Ok((HeadSelection::of_blocks(blocks), Work::default()))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "moa-sparse",
    title: "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    authors: "Fu et al., 2024",
    arxiv: "2406.14909",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::CausalMask,
        Law::ExactAt(&[("beta", "1")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "beta", values: &["0", "0.1", "0.25", "0.5", "1"] },
        Law::Monotone { param: "alpha", values: &["-100", "0", "64", "1000", "1000000"] },
    ],
    equation: "query block a visits key block b <= a where a - b < floor(floor(alpha/block) + beta·ceil(N/block)) or b < ceil(sinks/block)\n\
               offline: (alpha, beta) of each head minimise the sum of errors under a budget of mean cost at every length recorded",
    cost: "T·(alpha + beta·N + sinks) pairs of a head; no estimate; the table takes time linear in its entries",
    choices: &[
        "Windows count blocks of 64 with one global first block, as in the authors' code; sinks and block_size make both parameters.",
        "The window is that of the whole input, for every query of it (the code's); so a prefix by itself has a narrower window, and only \
         the mask is causal.",
        "alpha = 256, beta = 0.25 is ours: the paper has no default, as every head has its own.",
        "The paper measures what a candidate loses by first-order influence (gradients of the dense model's loss on its own answers) and \
         solves an integer programme at several lengths with a commercial solver. Here the loss is the relative error of the head's \
         output on recorded q, k, v, and the budget is spent greedily along each head's lower convex hull, which is within one head's \
         step of the best.",
        "Only the prompt is served: stores of different sizes per head belong to cache policies.",
    ],
    params: params_of::<MoaSparse>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<MoaSparse>(CARD.id, params)?)))
}
