//! S2-Attention: heterogeneous context sharding among heads (Lin et al. 2024, arXiv 2407.17678).
//!
//! Positions form blocks of `block_size`. Head h's query in block a visits, causally, its `local_blocks` nearest
//! blocks (a − b < local_blocks) and the blocks of its shard: every `vert_stride`-th one, with an offset that
//! moves from head to head, (b + h·head_step + 1) mod vert_stride = 0. The shards of `vert_stride` heads together are
//! the whole context. We add, off by default, the first `sink_blocks` for every head.
//!
//! Nothing is estimated. Cost: T·(local_blocks·block_size + T/(2·vert_stride)) pairs, a table of
//! (T/block_size)·(local_blocks + T/(2·block_size·vert_stride)) entries built in time linear in them.

use super::pattern::table;
use super::{HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct S2Attention {
    /// Queries and keys per block.
    pub block_size: usize,
    /// Nearest blocks that a query visits, its own included.
    pub local_blocks: usize,
    /// One block in so many belongs to a head's shard.
    pub vert_stride: usize,
    /// Blocks by which the shard moves from head to head; 0 gives all heads one shard.
    pub head_step: usize,
    /// Every so many layers one stays dense, the last of each; 0 for none.
    pub dense_every: usize,
    /// First blocks that every head visits besides.
    pub sink_blocks: usize,
}

impl Default for S2Attention {
    fn default() -> Self {
        Self { block_size: 64, local_blocks: 16, vert_stride: 8, head_step: 1, dense_every: 2, sink_blocks: 0 }
    }
}

impl Config for S2Attention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_size", "queries and keys per block"),
        ("local_blocks", "nearest blocks that a query visits, its own included"),
        ("vert_stride", "one block in so many belongs to a head's shard of the rest"),
        ("head_step", "blocks by which the shard moves from head to head; 0 gives all heads one shard"),
        ("dense_every", "of so many layers the last stays dense; 0 for none"),
        (
            "sink_blocks",
            "first blocks that every head visits besides; not in the paper (0), for models that were not trained with it",
        ),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        let Self { block_size, local_blocks, vert_stride, .. } = self;
        if *block_size == 0 || *local_blocks == 0 || *vert_stride == 0 {
            return Err(format!(
                "block_size = {block_size}, local_blocks = {local_blocks}, vert_stride = {vert_stride}: use at least 1"
            ));
        }
        Ok(())
    }
}

impl Selector for S2Attention {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        if self.dense_every > 0 && p.layer != super::run::NO_LAYER && (p.layer + 1).is_multiple_of(self.dense_every) {
            return Ok((HeadSelection::dense(p), Work::default()));
        }
        let stride = self.vert_stride;
        // The first block of the shard: −1 − h·head_step, taken into 0..stride.
        let shift = (p.head % stride) * (self.head_step % stride) % stride;
        let first = stride - 1 - shift;
        let blocks = table(self.block_size, p.q.rows, p.offset(), |own| {
            let near = (own + 1).saturating_sub(self.local_blocks);
            let sinks = self.sink_blocks.min(near);
            let shard = first + sinks.saturating_sub(first).next_multiple_of(stride);
            (0..sinks).chain((shard..near).step_by(stride)).chain(near..own + 1).map(|b| b as u32)
        });
        Ok((HeadSelection::of_blocks(blocks), Work::default()))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "s2-attention",
    title: "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
    authors: "Lin et al., 2024",
    arxiv: "2407.17678",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("vert_stride", "1")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "local_blocks", values: &["1", "2", "5", "16", "1000000"] },
    ],
    equation: "query block a of head h visits block b <= a where a - b < local_blocks or \
               (b + h·head_step + 1) mod vert_stride = 0",
    cost: "T·(local_blocks·block_size + T/(2·vert_stride)) pairs; no estimate; the table takes time linear in its entries",
    choices: &[
        "block_size 64, local_blocks 16, vert_stride 8, and every second layer dense are the setting of Phi-3-small, the model that was \
         trained this way; the pattern of its published code is the one here.",
        "There the offset moves by max(1, vert_stride / heads) blocks a head, which is 1 unless a model has fewer heads than the stride: \
         head_step is that number, as a selector does not know how many heads there are.",
        "Heads of a K/V group choose different shards, as in the published setting; nothing is thrown away from the cache here.",
        "Models are meant to be trained with the pattern. In one that was not, a head whose shard leaves out the first block loses its \
         attention sink; sink_blocks=1 gives it back, which is not in the paper. Perplexity of SmolLM2-135M, 2,048 tokens: dense 6.63, \
         default 14.6, sink_blocks=1 6.52, local_blocks=8,dense_every=0,sink_blocks=1 6.83; 8,192 tokens: 8.71, 15.6, 9.08, 9.75.",
        "A chunk whose first query does not begin a block of positions keeps the pattern exactly: its tiles carry a bit a query.",
    ],
    params: params_of::<S2Attention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<S2Attention>(CARD.id, params)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::Mat;
    use crate::sparse::mask::dense_mask;
    use crate::sparse::run::NO_LAYER;

    fn mask(config: &S2Attention, head: usize, layer: usize, tq: usize, tk: usize) -> Vec<u8> {
        let rows = vec![0f32; tk];
        let (q, k) = (Mat::new(&rows, tq, 1, 1), Mat::new(&rows, tk, 1, 1));
        let p = HeadProblem { layer, head, ..HeadProblem::new(q, k, 1.0) };
        dense_mask(&config.select(&p).unwrap().0, tq, tk, true)
    }

    #[test]
    fn pattern_is_the_definition_for_every_head_and_chunk() {
        let c = S2Attention { block_size: 5, local_blocks: 2, vert_stride: 3, ..S2Attention::default() };
        for (tq, tk) in [(64, 64), (30, 64), (7, 61), (1, 40), (70, 163)] {
            for (head, sink_blocks, head_step) in [(0, 0, 1), (1, 0, 1), (2, 1, 1), (7, 4, 2), (5, 0, 0)] {
                let c = S2Attention { sink_blocks, head_step, ..c.clone() };
                let got = mask(&c, head, NO_LAYER, tq, tk);
                for i in 0..tq {
                    for j in 0..tk {
                        let pos = tk - tq + i;
                        let (a, b) = (pos / 5, j / 5);
                        let want = j <= pos && (a - b < 2 || (b + head * head_step + 1) % 3 == 0 || b < sink_blocks);
                        assert_eq!(got[i * tk + j], u8::from(want), "head {head}, ({tq}, {tk}), query {i}, key {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn shards_of_as_many_heads_as_the_stride_are_the_whole_context() {
        let c = S2Attention { block_size: 4, local_blocks: 1, vert_stride: 6, ..S2Attention::default() };
        let mut seen = vec![0u8; 100 * 100];
        for head in 0..6 {
            seen.iter_mut().zip(mask(&c, head, NO_LAYER, 100, 100)).for_each(|(s, m)| *s |= m);
        }
        let all = (0..100).all(|i| (0..=i).all(|j| seen[i * 100 + j] == 1));
        assert!(all, "some pair belongs to no head");
    }

    #[test]
    fn every_second_layer_stays_dense() {
        let c = S2Attention { block_size: 4, local_blocks: 1, ..S2Attention::default() };
        let visited = |layer| mask(&c, 0, layer, 64, 64).iter().map(|&x| usize::from(x)).sum::<usize>();
        assert_eq!(visited(1), 64 * 65 / 2);
        assert!(visited(0) < visited(1) / 2 && visited(2) == visited(0));
    }
}
