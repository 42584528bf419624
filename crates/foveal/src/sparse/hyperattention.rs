//! HyperAttention: large entries found by sorting, the rest sampled (Han et al. 2023, arXiv 2310.05869).
//!
//! Without a mask: queries and keys are hashed by the signs of `projections` random directions, codes in an order in
//! which neighbours differ by one sign; both are sorted by code and cut into as many blocks. A query attends exactly
//! to the keys of its own block, and to `sample_size` of the n keys drawn at random, those of its block left out,
//! each of which stands for n/sample_size: with parts (o₁, l₁) and (o₂, l₂ + ln(n/sample_size)) merged by log-sum-exp.
//! A causal square is two causal halves and, between them, a rectangle without a mask; squares of at most
//! `min_seq_len` are exact.
//!
//! q (B, H, Tq, D), k (B, H_kv, Tk, D). Cost: 2·D·projections flops a token for codes, sorting, and block_size +
//! sample_size keys a query on each of log₂(T/min_seq_len) levels besides min_seq_len/2 of its own square. The
//! weights differ from softmax's by what the sample misses; its sum of e^score is unbiased over seeds.

use crate::error::Result;
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::gemm::abt;
use crate::prim::{AttendOptions, attend, attend_indexed};
use crate::sparse::Domain;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use foveal_kernels::{BlockTable, HeadKeys, HeadTable, KeyLists, Work};
use rand::seq::index;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HyperAttention {
    /// Random directions of the hash.
    pub projections: usize,
    /// Keys per block of the sorted order.
    pub block_size: usize,
    /// Keys drawn for each rectangle; all are exact.
    pub sample_size: usize,
    /// Causal squares and rectangles of at most so many queries are exact.
    pub min_seq_len: usize,
    /// Seed of directions and samples.
    pub seed: u64,
}

impl Default for HyperAttention {
    fn default() -> Self {
        Self { projections: 7, block_size: 256, sample_size: 256, min_seq_len: 4096, seed: 0 }
    }
}

impl Config for HyperAttention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("projections", "random directions whose signs are a token's code, 1 to 16"),
        ("block_size", "keys per block of the sorted order"),
        ("sample_size", "keys drawn at random for each rectangle of the recursion; as many as it has keys is exact"),
        ("min_seq_len", "causal squares of at most so many tokens, and rectangles of fewer queries, are exact"),
        ("seed", "seed of the directions and of the samples"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if !(1..=16).contains(&self.projections) {
            return Err(format!("projections = {}: use 1 to 16", self.projections));
        }
        if self.block_size == 0 || self.sample_size == 0 || self.min_seq_len == 0 {
            return Err(format!(
                "block_size = {}, sample_size = {}, min_seq_len = {}: use at least 1",
                self.block_size, self.sample_size, self.min_seq_len
            ));
        }
        Ok(())
    }
}

/// Output (B, H, n, Dv) and log-sum-exp (B, H, n) over some keys.
struct Part {
    out: Tensor,
    lse: Tensor,
}

/// Both parts as one softmax; the first sees a key for every query.
fn merge(a: &Part, b: &Part) -> Result<Part> {
    let top = a.lse.maximum(&b.lse)?.detach();
    let (x, y) = (a.lse.sub(&top)?.exp()?, b.lse.sub(&top)?.exp()?);
    let sum = (&x + &y)?;
    let share = |w: &Tensor, o: &Tensor| -> Result<Tensor> { Ok(o.broadcast_mul(&w.div(&sum)?.unsqueeze(3)?)?) };
    Ok(Part { out: (share(&x, &a.out)? + share(&y, &b.out)?)?, lse: (sum.log()? + top)? })
}

/// The place of each code in an order in which neighbours differ by one bit.
fn places(bits: usize) -> Vec<u32> {
    let mut place = vec![0u32; 1 << bits];
    (0..1u32 << bits).for_each(|i| place[(i ^ (i >> 1)) as usize] = i);
    place
}

/// Rows of (B, H, n, D) by an index (n) of each (batch, head).
fn gather(t: &Tensor, index: &[Vec<u32>]) -> Result<Tensor> {
    let (b, h, _, d) = t.dims4()?;
    let n = index.first().map_or(0, Vec::len);
    let flat = t.flatten(0, 1)?;
    let heads = index.iter().enumerate().map(|(x, i)| {
        let i = Tensor::from_slice(i, n, &Device::Cpu)?;
        flat.get(x)?.contiguous()?.index_select(&i, 0)
    });
    Ok(Tensor::stack(&heads.collect::<candle_core::Result<Vec<_>>>()?, 0)?.reshape((b, h, n, d))?)
}

struct Run<'a> {
    c: &'a HyperAttention,
    scale: f32,
    /// (projections, D) directions.
    directions: Vec<f32>,
    place: Vec<u32>,
    work: Work,
    select: Work,
    /// Rectangles so far: each draws its own sample.
    drawn: u64,
}

impl Run<'_> {
    fn options(&self, causal: bool) -> AttendOptions {
        AttendOptions { scale: Some(self.scale), causal, ..AttendOptions::default() }
    }

    /// Exact attention.
    fn exact(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Part> {
        let a = attend(q, k, v, &self.options(causal), None)?;
        self.work += a.work;
        Ok(Part { out: a.out, lse: a.lse })
    }

    /// Causal attention of as many queries as keys.
    fn square(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Part> {
        let n = q.dim(2)?;
        if n <= self.c.min_seq_len.max(1) {
            return self.exact(q, k, v, true);
        }
        let half = n / 2;
        let part = |t: &Tensor, r: Range<usize>| t.narrow(2, r.start, r.len());
        let [q0, k0, v0] = [part(q, 0..half)?, part(k, 0..half)?, part(v, 0..half)?];
        let [q1, k1, v1] = [part(q, half..n)?, part(k, half..n)?, part(v, half..n)?];
        let upper = self.square(&q0, &k0, &v0)?;
        let own = self.square(&q1, &k1, &v1)?;
        let before = self.rectangle(&q1, &k0, &v0)?;
        let lower = merge(&own, &before)?;
        Ok(Part { out: Tensor::cat(&[&upper.out, &lower.out], 2)?, lse: Tensor::cat(&[&upper.lse, &lower.lse], 2)? })
    }

    /// Order of the rows of each (batch, head) by code, (B, H, n, D) in place.
    fn orders(&mut self, t: &Tensor) -> Result<Vec<Vec<u32>>> {
        let (b, h, n, d) = t.dims4()?;
        let x: Vec<f32> = t.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let r = self.c.projections;
        let mut signs = vec![0f32; n * r];
        let mut orders = Vec::with_capacity(b * h);
        for x in x.chunks_exact((n * d).max(1)) {
            self.select.flops += abt(n, r, d, 1.0, x, d, &self.directions, d, &mut signs);
            let codes = signs.chunks_exact(r).map(|s| {
                let code = s.iter().enumerate().fold(0usize, |c, (i, s)| c | usize::from(*s > 0.0) << i);
                self.place[code]
            });
            let codes: Vec<u32> = codes.collect();
            let mut order: Vec<u32> = (0..n as u32).collect();
            order.sort_by_key(|&i| codes[i as usize]);
            orders.push(order);
        }
        self.select.bytes += (b * h * n * d * 4) as u64;
        Ok(orders)
    }

    /// Attention without a mask.
    fn rectangle(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Part> {
        let ((b, h, nq, _), (_, hkv, nk, _)) = (q.dims4()?, k.dims4()?);
        let (block_k, sample) = (self.c.block_size, self.c.sample_size);
        if nq < self.c.min_seq_len || sample >= nk || block_k >= nk {
            return self.exact(q, k, v, false);
        }
        let (of_q, of_k) = (self.orders(q)?, self.orders(k)?);
        let (qs, ks, vs) = (gather(q, &of_q)?, gather(k, &of_k)?, gather(v, &of_k)?);
        // As many query blocks as key blocks.
        let blocks = nk.div_ceil(block_k);
        let block_q = nq.div_ceil(blocks);
        let lists: Vec<Vec<u32>> = (0..nq.div_ceil(block_q) as u32).map(|x| vec![x]).collect();
        let diagonal = HeadTable::from_lists(block_q, block_k, lists);
        let table = BlockTable { heads: vec![diagonal; b * h] };
        let near = attend(&qs, &ks, &vs, &self.options(false), Some(&table))?;
        self.work += near.work;
        // A sample of the sorted keys for each K/V head; a block of queries leaves out those of its own block.
        let draw = |x: usize| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.c.seed);
            rng.set_stream(1 + self.drawn * (b * hkv) as u64 + x as u64);
            let mut at = index::sample(&mut rng, nk, sample).into_iter().map(|x| x as u32).collect::<Vec<_>>();
            at.sort_unstable();
            at
        };
        let drawn: Vec<Vec<u32>> = (0..b * hkv).map(draw).collect();
        self.drawn += 1;
        let (kr, vr) = (gather(&ks, &drawn)?, gather(&vs, &drawn)?);
        let heads = (0..b * h).map(|bh| {
            let at = &drawn[bh / h * hkv + bh % h / (h / hkv)];
            let lists = (0..nq.div_ceil(block_q)).map(|x| {
                let place = |x: usize| at.partition_point(|&j| (j as usize) < x * block_k) as u32;
                (0..place(x)).chain(place(x + 1)..sample as u32).collect()
            });
            HeadKeys::from_lists(block_q, lists.collect())
        });
        let lists = KeyLists { heads: heads.collect() };
        let far = attend_indexed(&qs, &kr, &vr, &self.options(false), &lists)?;
        self.work += far.work;
        let far = Part { out: far.out, lse: (far.lse + (nk as f64 / sample as f64).ln())? };
        let both = merge(&Part { out: near.out, lse: near.lse }, &far)?;
        // Back to the order of the queries.
        let back: Vec<Vec<u32>> = of_q
            .iter()
            .map(|order| {
                let mut back = vec![0u32; order.len()];
                order.iter().zip(0..).for_each(|(&i, x)| back[i as usize] = x);
                back
            })
            .collect();
        Ok(Part { out: gather(&both.out, &back)?, lse: gather(&both.lse.unsqueeze(3)?, &back)?.squeeze(3)? })
    }
}

impl MixerSystem for HyperAttention {
    fn layer(&self, dims: &MixerDims, _: VarBuilder) -> Result<Box<dyn Mixer>> {
        Ok(Box::new(Layer { c: self.clone(), causal: dims.causal }))
    }

    fn domain(&self) -> Domain {
        Domain::ANY
    }
}

/// A layer with a direction or without.
struct Layer {
    c: HyperAttention,
    causal: bool,
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let ((_, h, tq, d), (_, hkv, tk, _)) = (i.q.dims4()?, i.k.dims4()?);
        if hkv == 0 || !h.is_multiple_of(hkv) {
            return Err(foveal_kernels::KernelError::Groups { op: CARD.id, heads: h, kv_heads: hkv }.into());
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.c.seed);
        // Standard normal directions (Box-Muller).
        let mut normal = || {
            let (u, v): (f32, f32) = (rng.random_range(1e-7..1.0), rng.random());
            (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
        };
        let directions = (0..self.c.projections * d).map(|_| normal()).collect();
        let place = places(self.c.projections);
        let mut run = Run {
            c: &self.c,
            scale: i.scale()?,
            directions,
            place,
            work: Work::default(),
            select: Work::default(),
            drawn: 0,
        };
        let part = if !self.causal {
            run.rectangle(i.q, i.k, i.v)?
        } else if tq == tk {
            run.square(i.q, i.k, i.v)?
        } else {
            // A later chunk: what came before it is a rectangle.
            let off = tk - tq;
            let own = run.square(i.q, &i.k.narrow(2, off, tq)?, &i.v.narrow(2, off, tq)?)?;
            merge(&own, &run.rectangle(i.q, &i.k.narrow(2, 0, off)?, &i.v.narrow(2, 0, off)?)?)?
        };
        Ok(Mixed { out: part.out, work: run.work, select: run.select, loss: None, selections: Vec::new() })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "hyperattention",
    title: "HyperAttention: Long-context Attention in Near-Linear Time",
    authors: "Han et al., 2023",
    arxiv: "2310.05869",
    family: Family::Sparse,
    slots: &[Slot::Prefill, Slot::Mixer],
    laws: &[
        Law::CausalMask,
        Law::ExactAt(&[("min_seq_len", "1000000000")]),
        Law::ExactAt(&[("min_seq_len", "1"), ("sample_size", "1000000000")]),
        Law::Gradients,
        Law::Work { pairs: Growth::LogLinear, flops: Growth::LogLinear },
        Law::Monotone { param: "min_seq_len", values: &["512", "1024", "4096", "1000000"] },
    ],
    equation: "sort q and k by the signs of random projections; (o1, l1): attention within blocks of the sorted order\n\
               (o2, l2): attention to sampled keys outside the block;  merge (o1, l1) and (o2, l2 + ln(n/sample_size))\n\
               causal: two causal halves, and the second half's queries over the first half's keys without a mask",
    cost: "block_size + sample_size keys per query and level, log2(T/min_seq_len) levels, min_seq_len/2 exact: O(T log T)",
    choices: &[
        "As in the authors' code one uniform sample serves the row sums and the product with the values; the paper's theory \
         samples the latter by row norms of V.",
        "The sample is drawn without repetition (the code's is with): as unbiased, less varied, and exact once it holds every \
         key. Keys of a query's own block are left out of it, as in the code's path without a fused kernel.",
        "The code pads the last block with zero rows, which then attend; here it is shorter.",
        "Heads share the directions, as in the code; each rectangle and K/V head draws a sample of its own from the seed.",
        "Both halves of the recursion depend on the length of the prompt, so a prefix is split elsewhere: only the mask is \
         promised causal.",
        "Perplexity of SmolLM2-135M, 2,048 tokens: dense 6.92, min_seq_len=256 27.9 with 67% of the pairs computed, with \
         block_size=64,sample_size=64 23.4 with 32%. The first keys, where attention sinks, are single large entries that a \
         uniform sample seldom holds and then overweighs.",
    ],
    params: params_of::<HyperAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<HyperAttention>(CARD.id, params)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laws::PrefillProblem;

    fn run(c: &HyperAttention, q: &Tensor, k: &Tensor, v: &Tensor) -> Part {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let directions = (0..c.projections * q.dim(3).unwrap()).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        let mut r = Run {
            c,
            scale: 0.3,
            directions,
            place: places(c.projections),
            work: Work::default(),
            select: Work::default(),
            drawn: 0,
        };
        r.rectangle(q, k, v).unwrap()
    }

    #[test]
    fn neighbouring_codes_differ_by_one_sign() {
        for bits in [1, 4, 7] {
            let place = places(bits);
            let mut code = vec![0u32; place.len()];
            place.iter().zip(0..).for_each(|(&p, c)| code[p as usize] = c);
            assert!(code.windows(2).all(|w| (w[0] ^ w[1]).count_ones() == 1));
        }
    }

    #[test]
    fn row_sums_are_unbiased_over_seeds() {
        let (q, k, v) = PrefillProblem::new([1, 2, 1, 96, 160, 8], 1.0, 4).tensors().unwrap();
        let sums = |p: &Part| p.lse.exp().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let c = HyperAttention { block_size: 16, sample_size: 24, min_seq_len: 1, ..Default::default() };
        let exact = sums(&run(&HyperAttention { sample_size: 160, ..c.clone() }, &q, &k, &v));
        let runs = 200;
        let (mut mean, mut square) = (vec![0f64; exact.len()], vec![0f64; exact.len()]);
        for seed in 0..runs {
            for (i, x) in sums(&run(&HyperAttention { seed, ..c.clone() }, &q, &k, &v)).iter().enumerate() {
                mean[i] += f64::from(*x) / runs as f64;
                square[i] += f64::from(*x).powi(2) / runs as f64;
            }
        }
        // Rows share their samples, so only each row's own deviation is known: 5 standard errors fail one row in
        // two million.
        for (i, want) in exact.iter().enumerate() {
            let error = ((square[i] - mean[i].powi(2)).max(0.0) / runs as f64).sqrt();
            let apart = (mean[i] - f64::from(*want)).abs();
            assert!(apart < 5.0 * error + 1e-5 * f64::from(*want), "row {i}: {} for {want} ± {error}", mean[i]);
        }
    }
}
