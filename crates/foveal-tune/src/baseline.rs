//! What a learned or estimated choice of keys has to beat: a random choice of the same size.

use candle_core::Tensor;
use foveal::mixer::{MixInput, Mixed, Mixer};
use foveal::prim::{AttendOptions, attend_selected};
use foveal::sparse::HeadSelection;
use foveal_kernels::{HeadKeys, HeadTable};
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::atomic::{AtomicU64, Ordering};

/// The layer `inner` with its choice of keys replaced by a random one of the same size: every group of queries visits as
/// many blocks (and single keys) as before, drawn anew for each call among those that it may see, its own block
/// always among them. A layer that reports no choice of keys stays as it is.
pub fn random_at_budget(inner: Box<dyn Mixer>, causal: bool, seed: u64) -> Box<dyn Mixer> {
    Box::new(Random { inner, causal, seed, calls: AtomicU64::new(0) })
}

struct Random {
    inner: Box<dyn Mixer>,
    causal: bool,
    seed: u64,
    calls: AtomicU64,
}

impl Mixer for Random {
    fn mix(&self, i: &MixInput) -> foveal::Result<Mixed> {
        let detach = |t: &Tensor| t.detach();
        let (q, k, v) = (detach(i.q), detach(i.k), detach(i.v));
        let x = i.x.map(detach);
        let before = i.before_rotation.map(|(q, k)| (q.detach(), k.detach()));
        let before = before.as_ref().map(|(q, k)| (q, k));
        // Without gradients: only what it would have visited is of interest.
        let m = self.inner.mix(&MixInput {
            x: x.as_ref(),
            before_rotation: before,
            scale: i.scale,
            ..MixInput::new(&q, &k, &v)
        })?;
        if m.selections.is_empty() {
            return self.inner.mix(i);
        }
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ call.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let (tq, tk) = (i.q.dim(2)?, i.k.dim(2)?);
        let selections: Vec<_> = m.selections.iter().map(|s| self.shuffled(s, tq, tk, &mut rng)).collect();
        let options = AttendOptions { scale: i.scale, causal: self.causal, ..AttendOptions::default() };
        let a = attend_selected(i.q, i.k, i.v, &options, selections.clone())?;
        Ok(Mixed { out: a.out, work: a.work, select: m.select, loss: None, selections })
    }
}

impl Random {
    /// A random selection of the size of `s`. Row masks become lists of the mean size per query.
    fn shuffled(&self, s: &HeadSelection, tq: usize, tk: usize, rng: &mut ChaCha8Rng) -> HeadSelection {
        // Keys in all that each query visits on the whole, as blocks of one size: the budget is what counts.
        let (group, block) = match (&s.blocks, &s.keys) {
            (Some(b), _) if b.rows.is_none() => (b.block_q, b.block_k),
            (Some(b), _) => (1, b.block_k),
            (None, Some(k)) => (k.group, 1),
            (None, None) => return s.clone(),
        };
        let lists = (0..tq.div_ceil(group))
            .map(|g| {
                let last = ((g + 1) * group).min(tq) - 1;
                let end = if self.causal { tk - tq + last + 1 } else { tk };
                let all = end.div_ceil(block);
                let n = self.entries(s, g * group, block).clamp(1, all);
                let own = ((tk - tq + last) / block).min(all - 1);
                let mut list: Vec<u32> = sample(rng, all, n).into_iter().map(|x| x as u32).collect();
                if !list.contains(&(own as u32)) {
                    let at = rng.random_range(0..list.len());
                    list[at] = own as u32;
                }
                list
            })
            .collect();
        if s.blocks.is_none() {
            HeadSelection { keys: Some(HeadKeys::from_lists(group, lists)), ..HeadSelection::default() }
        } else {
            HeadSelection { blocks: Some(HeadTable::from_lists(group, block, lists)), ..HeadSelection::default() }
        }
    }

    /// Entries of size `block` that the query `i` visits in `s`.
    fn entries(&self, s: &HeadSelection, i: usize, block: usize) -> usize {
        let blocks = s.blocks.as_ref().map_or(0, |b| {
            let g = i / b.block_q;
            let entries = b.indptr[g]..b.indptr[g + 1];
            match &b.rows {
                Some(rows) => entries.filter(|&e| rows[e] >> (i % b.block_q) & 1 == 1).count(),
                None => entries.len(),
            }
        });
        let keys = s.keys.as_ref().map_or(0, |k| {
            let g = i / k.group;
            k.indptr[g + 1] - k.indptr[g]
        });
        blocks + keys.div_ceil(block)
    }
}
