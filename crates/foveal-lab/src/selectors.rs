//! `bench selectors`: what every causal selector keeps of the attention mass, at what density and in what time.
//!
//! All run on the same q, k, v: random ones, or those of a real prompt. Time is the choice and the attention over it,
//! in bf16 where the machine has tiles for it, in rounds that take turns with dense attention by the same kernels;
//! what is reported is the median of the rounds over dense's median. Kept mass is exact softmax weight on sampled
//! query rows, one row at a time: no matrix of all scores is ever made.

use crate::bench::stopped;
use crate::compare::median;
use crate::error::{LabError, Result};
use candle_core::{DType, Device, Tensor};
use foveal::mixer::{self, MixInput, Mixer, MixerDims, Weights};
use foveal::prim::{AttendOptions, attend, attend_selected};
use foveal::sparse::{HeadProblem, HeadSelection, Mat, Precision, Selector, mask};
use foveal::system::Law;
use foveal::{Slot, Spec, System, registry};
use foveal_llm::model::AttentionDtype;
use foveal_llm::{LogitsFor, Model, Plan, PrefillOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// q, k and v of some heads of as many tokens, (heads, tokens, head_dim) each.
#[derive(Debug, Clone)]
pub struct Operands {
    /// "random", or what was recorded.
    pub source: String,
    /// Heads.
    pub heads: usize,
    /// Tokens.
    pub tokens: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Queries after rotation.
    pub q: Vec<f32>,
    /// Keys after rotation, one head for each query head.
    pub k: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
}

/// Standard normal numbers (Box-Muller).
fn normal(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    let mut one = || {
        let (u, v): (f32, f32) = (rng.random_range(1e-7..1.0), rng.random());
        (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
    };
    (0..n).map(|_| one()).collect()
}

impl Operands {
    /// Independent standard normal numbers: nothing to find, the worst case of every estimate.
    pub fn random(heads: usize, tokens: usize, head_dim: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n = heads * tokens * head_dim;
        let [q, k, v] = std::array::from_fn(|_| normal(&mut rng, n));
        Self { source: "random".into(), heads, tokens, head_dim, q, k, v }
    }

    /// `heads` query heads of a model's prompt of all `tokens`, spread over its layers; each with the keys of its
    /// group. Values are random: no time or mass depends on them.
    ///
    /// # Errors
    /// A prompt that the model refuses, more heads than it has layers, cancellation.
    pub fn record(
        model: &Model,
        tokens: &[u32],
        heads: usize,
        cancel: Option<Arc<AtomicBool>>,
        progress: Option<foveal_llm::model::Progress>,
    ) -> Result<Self> {
        let c = model.config();
        if heads == 0 || heads > c.num_layers {
            return Err(LabError::Setting {
                name: "heads",
                value: heads.to_string(),
                remedy: format!("use 1 to {}: one a layer", c.num_layers),
            });
        }
        // One head from every so manyth layer, another one each time.
        let places: Vec<(usize, usize)> =
            (0..heads).map(|i| ((2 * i + 1) * c.num_layers / (2 * heads), (5 * i + 2) % c.num_heads)).collect();
        let o = PrefillOptions {
            chunk: tokens.len().max(1),
            logits: LogitsFor::None,
            record: places.clone(),
            attention: AttentionDtype::fastest(),
            cancel,
            progress,
            ..PrefillOptions::default()
        };
        let prompt = model.prefill(tokens, &Plan::dense(), &o)?;
        let (mut q, mut k) = (Vec::new(), Vec::new());
        for &(layer, head) in &places {
            let r = prompt.recorded.iter().find(|r| (r.layer, r.head) == (layer, head)).ok_or_else(|| {
                LabError::Report { what: "the recording".into(), problem: format!("no layer {layer}, head {head}") }
            })?;
            q.extend_from_slice(&r.q);
            k.extend_from_slice(&r.k);
        }
        let named: Vec<String> = places.iter().map(|(l, h)| format!("{l}.{h}")).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let v = normal(&mut rng, q.len());
        let source = format!("recorded: layer.head {}", named.join(" "));
        Ok(Self { source, heads, tokens: tokens.len(), head_dim: c.head_dim, q, k, v })
    }

    /// Write q and k to a safetensors file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let t = |x: &[f32]| Tensor::from_slice(x, (self.heads, self.tokens, self.head_dim), &Device::Cpu);
        let both = |q, k| std::collections::HashMap::from([("q", q), ("k", k)]);
        let done =
            t(&self.q).and_then(|q| Ok(both(q, t(&self.k)?))).and_then(|t| candle_core::safetensors::save(&t, path));
        done.map_err(|e| LabError::Report { what: path.display().to_string(), problem: e.to_string() })
    }

    /// Read what [`Operands::save`] wrote.
    ///
    /// # Errors
    /// A file that cannot be read or holds no q and k of one shape (heads, tokens, head_dim).
    pub fn load(path: &Path) -> Result<Self> {
        let bad = |problem: String| LabError::Report { what: path.display().to_string(), problem };
        let all = candle_core::safetensors::load(path, &Device::Cpu).map_err(|e| bad(e.to_string()))?;
        let get = |name: &str| all.get(name).ok_or_else(|| bad(format!("it has no tensor {name}")));
        let (q, k) = (get("q")?, get("k")?);
        let (heads, tokens, head_dim) = q.dims3().map_err(|e| bad(e.to_string()))?;
        if k.dims() != q.dims() || q.elem_count() == 0 {
            return Err(bad(format!("q has shape {:?} and k {:?}; both must be the same", q.dims(), k.dims())));
        }
        let flat = |t: &Tensor| {
            t.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1::<f32>()).map_err(|e| bad(e.to_string()))
        };
        let v = normal(&mut ChaCha8Rng::seed_from_u64(0), heads * tokens * head_dim);
        let source = format!("recorded: {}", path.file_name().unwrap_or_default().to_string_lossy());
        Ok(Self { source, heads, tokens, head_dim, q: flat(q)?, k: flat(k)?, v })
    }
}

/// One system at one setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SelectorRow {
    /// Where q and k come from.
    pub source: String,
    /// Tokens.
    pub tokens: usize,
    /// System and parameters.
    pub system: String,
    /// Mean softmax weight of the visited keys over sampled queries and heads, 0 to 1; none for a system that
    /// names no keys.
    pub recall: Option<f64>,
    /// The least of the heads' means.
    pub worst_head: Option<f64>,
    /// Visited over causal pairs; none for a system that names no keys.
    pub density: Option<f64>,
    /// Pairs that the kernels computed over those of dense attention.
    pub computed: f64,
    /// Median seconds, choice included.
    pub seconds: f64,
    /// Median seconds of the choice.
    pub select_seconds: f64,
    /// Median seconds of dense attention in the same rounds.
    pub dense_seconds: f64,
    /// dense_seconds / seconds.
    pub speedup: f64,
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct SelectorBench {
    /// Systems with parameters; empty = every causal selector at the budgets of [`sweep`].
    pub systems: Vec<Spec>,
    /// Timed rounds; 0 measures mass and density alone.
    pub rounds: usize,
    /// Query rows of each head on which mass is measured.
    pub rows: usize,
}

impl Default for SelectorBench {
    fn default() -> Self {
        Self { systems: Vec::new(), rounds: 3, rows: 64 }
    }
}

/// Budgets of the systems whose laws sweep others than are of use on thousands of tokens.
const SWEEPS: &[(&str, &[&str])] = &[
    ("anchorattention", &["theta=4", "theta=8", "theta=12", "theta=16"]),
    ("dhsa", &["topk=512", "topk=1024", "topk=2048", "topk=4096"]),
    ("fsa-nsa-kernel", &["topk=8", "topk=16", "topk=32", "topk=64"]),
    ("hip-attention", &["k=256", "k=512", "k=1024", "k=2048"]),
    ("hyperattention", &["block_size=128,sample_size=128", "", "block_size=512,sample_size=512"]),
    (
        "minference",
        &[
            "pattern=a-shape",
            "vertical_size=0.01,slash_size=0.01",
            "vertical_size=0.02,slash_size=0.03",
            "vertical_size=0.05,slash_size=0.1",
            "vertical_size=0.1,slash_size=0.2",
        ],
    ),
    (
        "moba",
        &[
            "block_size=64,topk=8,sink_blocks=1",
            "block_size=64,topk=16,sink_blocks=1",
            "block_size=64,topk=32,sink_blocks=1",
            "block_size=64,topk=64,sink_blocks=1",
        ],
    ),
    (
        "routing-transformer",
        &["clusters=64,sinks=16", "clusters=32,sinks=16", "clusters=16,sinks=16", "clusters=8,sinks=16"],
    ),
    ("s2-attention", &["vert_stride=32", "vert_stride=16", "vert_stride=8", "vert_stride=4"]),
    ("sale", &["threshold=0.1", "threshold=0.02", "threshold=0.004", "threshold=0.001"]),
    ("superlinear", &["spans=1,sinks=16", "spans=3,sinks=16", "spans=6,sinks=16", "spans=12,sinks=16"]),
    ("xattention", &["threshold=0.5", "threshold=0.7", "threshold=0.8", "threshold=0.9", "threshold=0.95"]),
];

/// Every causal selector that needs no token grid, at growing budgets: those listed here, or the values that its own law
/// of growing budgets names; and the systems that serve whole layers of which this list has budgets.
pub fn sweep() -> Vec<Spec> {
    let mut all = Vec::new();
    for card in registry::cards().iter().filter(|c| c.has_slot(Slot::Prefill)) {
        let Ok(system) = registry::build(&Spec::new(card.id), Slot::Prefill) else { continue };
        let domain = system.domain();
        if matches!(system, System::Dense) || !domain.causal || domain.grid {
            continue;
        }
        if let Some((_, budgets)) = SWEEPS.iter().find(|s| s.0 == card.id) {
            all.extend(budgets.iter().filter_map(|b| format!("{}:{b}", card.id).parse::<Spec>().ok()));
        } else if matches!(system, System::Selector(_)) {
            let law = card.laws.iter().find_map(|l| match l {
                Law::Monotone { param, values } => Some((param, values)),
                _ => None,
            });
            match law {
                Some((param, values)) => all.extend(values.iter().map(|v| Spec::new(card.id).with(param, v))),
                None => all.push(Spec::new(card.id)),
            }
        }
    }
    all
}

/// A system, ready to run on whole heads.
enum Ready {
    Selector(Box<dyn Selector>),
    Mixer(Box<dyn Mixer>),
}

/// One measured call.
struct Done {
    select_seconds: f64,
    seconds: f64,
    pairs: u64,
    selections: Vec<HeadSelection>,
}

struct Bench<'a> {
    o: &'a Operands,
    scale: f32,
    /// q, k, v as the kernels read them.
    tensors: [Tensor; 3],
    precision: Precision,
}

impl Bench<'_> {
    fn dense(&self) -> Result<(f64, u64)> {
        let [q, k, v] = &self.tensors;
        let begin = Instant::now();
        let a = attend(q, k, v, &AttendOptions::causal(), None)?;
        Ok((begin.elapsed().as_secs_f64(), a.work.pairs))
    }

    fn run(&self, system: &Ready) -> Result<Done> {
        let [q, k, v] = &self.tensors;
        let (o, begin) = (self.o, Instant::now());
        match system {
            Ready::Mixer(m) => {
                let m = m.mix(&MixInput::new(q, k, v))?;
                let seconds = begin.elapsed().as_secs_f64();
                Ok(Done { select_seconds: 0.0, seconds, pairs: m.work.pairs, selections: m.selections })
            }
            Ready::Selector(s) => {
                let chosen = (0..o.heads)
                    .into_par_iter()
                    .with_max_len(1)
                    .map(|h| {
                        let of = |x| Mat::new(head(x, o, h), o.tokens, o.head_dim, o.head_dim);
                        let p = HeadProblem {
                            head: h,
                            precision: self.precision,
                            ..HeadProblem::new(of(&o.q), of(&o.k), self.scale)
                        };
                        Ok(s.select(&p)?.0)
                    })
                    .collect::<Result<Vec<_>>>()?;
                let select_seconds = begin.elapsed().as_secs_f64();
                let a = attend_selected(q, k, v, &AttendOptions::causal(), chosen.clone())?;
                let seconds = begin.elapsed().as_secs_f64();
                Ok(Done { select_seconds, seconds, pairs: a.work.pairs, selections: chosen })
            }
        }
    }
}

/// Rows of one head.
fn head<'a>(x: &'a [f32], o: &Operands, h: usize) -> &'a [f32] {
    &x[h * o.tokens * o.head_dim..(h + 1) * o.tokens * o.head_dim]
}

/// Mean softmax weight of the keys that a head's selection visits, over `rows` queries spread evenly.
fn kept(o: &Operands, h: usize, s: &HeadSelection, scale: f32, rows: usize) -> f64 {
    let (q, k, d) = (head(&o.q, o, h), head(&o.k, o, h), o.head_dim);
    let n = rows.clamp(1, o.tokens);
    let of = |r: usize| {
        let i = (r + 1) * o.tokens / n - 1;
        let mut seen = vec![0u8; o.tokens];
        mask::mask_row(s, i, o.tokens, true, &mut seen);
        let qi = &q[i * d..(i + 1) * d];
        let scores: Vec<f32> = k[..(i + 1) * d]
            .chunks_exact(d)
            .map(|k| qi.iter().zip(k).map(|(a, b)| a * b).sum::<f32>() * scale)
            .collect();
        let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (mut all, mut held) = (0f64, 0f64);
        for (x, seen) in scores.iter().zip(&seen) {
            let w = f64::from((x - top).exp());
            all += w;
            held += if *seen == 1 { w } else { 0.0 };
        }
        held / all
    };
    (0..n).into_par_iter().map(of).sum::<f64>() / n as f64
}

/// Measure; `progress` is told the share that is done and what runs.
///
/// # Errors
/// An unknown system or one that is no causal prefill system, a kernel's refusal, cancellation.
pub fn measure(
    o: &Operands,
    b: &SelectorBench,
    cancel: Option<&AtomicBool>,
    progress: &mut dyn FnMut(f64, &str),
) -> Result<Vec<SelectorRow>> {
    let specs = if b.systems.is_empty() { sweep() } else { b.systems.clone() };
    let dims = MixerDims::new(o.heads, o.head_dim, true);
    let mut systems = Vec::with_capacity(specs.len());
    for spec in &specs {
        let system = registry::build(spec, Slot::Prefill)?;
        system.domain().check(&spec.id, true, None, o.tokens)?;
        systems.push(match system {
            System::Selector(s) => Ready::Selector(s),
            other => Ready::Mixer(mixer::layer(&spec.id, other, &dims, Weights::none().builder())?),
        });
    }
    let tiles = AttentionDtype::fastest() == AttentionDtype::Bf16;
    let tensor = |x: &[f32]| -> Result<Tensor> {
        let t = Tensor::from_slice(x, (1, o.heads, o.tokens, o.head_dim), &Device::Cpu).map_err(foveal::Error::from)?;
        Ok(t.to_dtype(if tiles { DType::BF16 } else { DType::F32 }).map_err(foveal::Error::from)?)
    };
    let bench = Bench {
        o,
        scale: 1.0 / (o.head_dim.max(1) as f32).sqrt(),
        tensors: [tensor(&o.q)?, tensor(&o.k)?, tensor(&o.v)?],
        precision: if tiles { Precision::Bf16 } else { Precision::F32 },
    };
    let steps = (b.rounds + 1) * systems.len().max(1);
    let mut rows = Vec::with_capacity(specs.len());
    let (_, pairs) = bench.dense()?;
    // The first round warms up and looks at what was chosen.
    for (i, (spec, system)) in specs.iter().zip(&systems).enumerate() {
        stopped(cancel)?;
        let name = spec.to_string();
        progress(i as f64 / steps as f64, &name);
        let done = bench.run(system)?;
        let named = done.selections.len() == o.heads;
        let heads: Vec<f64> =
            done.selections.iter().enumerate().map(|(h, s)| kept(o, h, s, bench.scale, b.rows)).collect();
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len().max(1) as f64;
        let density: Vec<f64> =
            done.selections.par_iter().map(|s| mask::density(s, o.tokens, o.tokens, true)).collect();
        rows.push(SelectorRow {
            source: o.source.clone(),
            tokens: o.tokens,
            system: name,
            recall: named.then(|| mean(&heads)),
            worst_head: named.then(|| heads.iter().copied().fold(f64::INFINITY, f64::min)),
            density: named.then(|| mean(&density)),
            computed: done.pairs as f64 / pairs.max(1) as f64,
            seconds: 0.0,
            select_seconds: 0.0,
            dense_seconds: 0.0,
            speedup: 0.0,
        });
    }
    let mut dense = Vec::with_capacity(b.rounds);
    let mut times = vec![(Vec::new(), Vec::new()); rows.len()];
    for round in 0..b.rounds {
        dense.push(bench.dense()?.0);
        for (i, (system, (all, select))) in systems.iter().zip(&mut times).enumerate() {
            stopped(cancel)?;
            progress(((round + 1) * systems.len() + i) as f64 / steps as f64, &rows[i].system);
            let done = bench.run(system)?;
            all.push(done.seconds);
            select.push(done.select_seconds);
        }
    }
    if b.rounds > 0 {
        let dense = median(&mut dense);
        for (row, (mut all, mut select)) in rows.iter_mut().zip(times) {
            (row.seconds, row.select_seconds) = (median(&mut all), median(&mut select));
            (row.dense_seconds, row.speedup) = (dense, dense / row.seconds);
        }
    }
    Ok(rows)
}

/// Of the rows of one source and length that keep at least `mass`, the fastest (the sparsest if nothing was timed).
pub fn best(rows: &[SelectorRow], mass: f64) -> Option<&SelectorRow> {
    let rank = |r: &SelectorRow| if r.seconds > 0.0 { r.speedup } else { -r.density.unwrap_or(1.0) };
    rows.iter().filter(|r| r.recall.is_some_and(|x| x >= mass)).max_by(|a, b| rank(a).total_cmp(&rank(b)))
}

/// Rows as a Markdown table, aligned.
pub fn markdown(rows: &[SelectorRow]) -> String {
    let head =
        ["system", "mass kept", "worst head", "density", "computed", "choice ms", "ms", "dense ms", "times dense"];
    let share = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{:.1}%", 100.0 * x));
    let cells = |r: &SelectorRow| {
        vec![
            r.system.clone(),
            share(r.recall),
            share(r.worst_head),
            share(r.density),
            share(Some(r.computed)),
            format!("{:.1}", 1e3 * r.select_seconds),
            format!("{:.1}", 1e3 * r.seconds),
            format!("{:.1}", 1e3 * r.dense_seconds),
            format!("{:.2}", r.speedup),
        ]
    };
    crate::report::markdown(&head, &rows.iter().map(cells).collect::<Vec<_>>(), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mass_density_and_times_of_every_selector() {
        let o = Operands::random(2, 300, 16, 1);
        let all = sweep();
        for id in ["minference", "moba", "sale", "fsa-nsa-kernel"] {
            assert!(all.iter().any(|s| s.id == id), "{id}");
        }
        let pick = |s: &str| s.parse::<Spec>().unwrap();
        let systems = vec![
            pick("moba:block_size=16,topk=2"),
            pick("moba:block_size=16,topk=1000"),
            pick("s2-attention:block_size=16,local_blocks=2"),
            pick("hyperattention"),
        ];
        let b = SelectorBench { systems, rounds: 1, rows: 300 };
        let mut at = 0.0;
        let rows = measure(&o, &b, None, &mut |done, _| {
            assert!((at..1.0).contains(&done));
            at = done;
        })
        .unwrap();
        assert_eq!(rows.len(), 4);
        let full = &rows[1];
        assert!((full.recall.unwrap() - 1.0).abs() < 1e-9 && (full.density.unwrap() - 1.0).abs() < 1e-12);
        assert!(rows[0].recall < full.recall && rows[0].density < full.density && rows[0].worst_head <= rows[0].recall);
        assert!(rows[3].recall.is_none() && rows[3].seconds > 0.0);
        assert_eq!(best(&rows, 0.99).unwrap().system, full.system);
        assert_eq!(markdown(&rows).lines().count(), 6);
        let svg = crate::report::mass(&rows);
        assert!(svg.starts_with("<svg") && svg.contains("moba") && !svg.contains("NaN"));
        // A recording comes back from its file.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qk.safetensors");
        o.save(&path).unwrap();
        let back = Operands::load(&path).unwrap();
        assert_eq!((back.q, back.k, back.heads, back.tokens), (o.q, o.k, 2, 300));
        assert!(Operands::load(&dir.path().join("none")).is_err());
        let stop = AtomicBool::new(true);
        assert!(matches!(
            measure(&Operands::random(1, 20, 4, 0), &b, Some(&stop), &mut |_, _| {}),
            Err(LabError::Cancelled)
        ));
    }
}
