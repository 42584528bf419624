//! Which weight format to load: quality and speed of each, and of candle's quantised matmul.
//!
//!     cargo run --release -p foveal-llm --example weights_bench -- MODEL TEXT [all|ppl|speed|linear]
//!
//! `ppl`: perplexity of the first 2,048 tokens. `speed`: prefill tokens/s at 2,048 and decode
//! tokens/s at depth 0 and 2,048. `linear`: one gate/up projection per format against
//! candle's `QMatMul` on the file's own blocks, at 1 and 512 rows.

use candle_core::quantized::QMatMul;
use candle_core::{Device, Module, Tensor};
use foveal_kernels::Isa;
use foveal_kernels::linear::PackedLinear;
use foveal_llm::model::AttentionDtype;
use foveal_llm::{Checkpoint, LoadOptions, LogitsFor, Model, Plan, PrefillOptions, WeightFormat};
use std::path::Path;
use std::time::Instant;

const TOKENS: usize = 2048;
const STEPS: usize = 32;
const FORMATS: [Option<WeightFormat>; 5] =
    [None, Some(WeightFormat::F32), Some(WeightFormat::Bf16), Some(WeightFormat::Int8), Some(WeightFormat::Int4)];

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, rest @ ..] = args.as_slice() else {
        return Err("usage: weights_bench MODEL TEXT [all|ppl|speed|linear]".into());
    };
    let what = rest.first().map_or("all", String::as_str);
    let ck = Checkpoint::open(Path::new(model))?;
    let text = std::fs::read_to_string(text)?;
    let head: String = text.chars().take(16 * TOKENS).collect();
    let mut ids = ck.tokenizer()?.encode(&head, false, false)?;
    ids.truncate(TOKENS);
    if ids.len() < TOKENS {
        return Err(format!("the text has {} tokens; give one of at least {TOKENS}", ids.len()).into());
    }
    println!("{}\n{} tokens, {}", ck.describe(), ids.len(), Isa::active());
    if what == "all" || what == "linear" {
        linear(&ck)?;
    }
    if what == "linear" {
        return Ok(());
    }
    println!("weights        attention  MiB   ppl       prefill t/s  attention s  decode t/s @0  @{TOKENS}");
    for weights in FORMATS {
        let m = Model::load(&ck, &LoadOptions { weights })?;
        let mib = m.weight_bytes() >> 20;
        for attention in [AttentionDtype::F32, AttentionDtype::Bf16] {
            print!("{:14} {:10} {mib:<5} ", m.weight_formats(), attention.to_string());
            let o = PrefillOptions { attention, logits: LogitsFor::LastN(TOKENS), ..Default::default() };
            if what != "speed" {
                let p = m.prefill(&ids, &Plan::dense(), &o)?;
                let nll = m.nll(&p.hidden, &ids[1..]);
                print!("{:<9.4} ", (nll.iter().sum::<f64>() / nll.len() as f64).exp());
            } else {
                print!("-         ");
            }
            if what != "ppl" {
                let o = PrefillOptions { attention, logits: LogitsFor::Last, ..Default::default() };
                let best = |n: usize| -> Result<(f64, f64), Failure> {
                    let mut best = (f64::INFINITY, 0.0);
                    for _ in 0..n {
                        let s = m.prefill(&ids, &Plan::dense(), &o)?.stats;
                        if s.seconds < best.0 {
                            best = (s.seconds, s.attention_seconds);
                        }
                    }
                    Ok(best)
                };
                let (seconds, attention) = best(3)?;
                let decode = |from: usize| -> Result<f64, Failure> {
                    let (mut session, prompt) = m.start(&ids[..from], &Plan::dense(), None, &o)?;
                    let mut hidden = prompt.hidden;
                    let mut best = f64::INFINITY;
                    for i in 0..STEPS {
                        let begin = Instant::now();
                        let logits = m.logits(&hidden);
                        let next = foveal_llm::sample::argmax(&logits);
                        std::hint::black_box(next);
                        hidden = session.extend(&ids[i..=i])?.hidden;
                        best = best.min(begin.elapsed().as_secs_f64());
                    }
                    Ok(1.0 / best)
                };
                print!(
                    "{:<12.0} {attention:<12.3} {:<14.1} {:.1}",
                    TOKENS as f64 / seconds,
                    decode(1)?,
                    decode(TOKENS)?
                );
            }
            println!();
        }
    }
    Ok(())
}

/// One projection: milliseconds of the fastest of some calls.
fn linear(ck: &Checkpoint) -> Result<(), Failure> {
    let name = "model.layers.0.mlp.gate_proj.weight";
    let t = ck.tensor(name)?;
    let (n, k) = (t.shape[0], t.shape[1]);
    println!("{name} ({n}, {k}), stored as {}: milliseconds at 1 and 512 rows", ck.source_dtype(name));
    let time = |f: &mut dyn FnMut() -> Result<(), Failure>, calls: usize| -> Result<f64, Failure> {
        let mut best = f64::INFINITY;
        for _ in 0..calls {
            let begin = Instant::now();
            f()?;
            best = best.min(begin.elapsed().as_secs_f64());
        }
        Ok(best * 1e3)
    };
    let x: Vec<f32> = (0..512 * k).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    for format in FORMATS.into_iter().flatten() {
        let w = PackedLinear::pack(&t.data, n, k, format)?;
        let mut out = vec![0f32; 512 * n];
        let mut run = |m: usize, calls| {
            time(&mut || Ok(w.forward(&x[..m * k], m, &mut out[..m * n], Isa::active()).map(drop)?), calls)
        };
        println!("  {:9} {:8.4} {:8.3}", format.to_string(), run(1, 200)?, run(512, 20)?);
    }
    if let Some(q) = ck.qtensor(name)? {
        let q = QMatMul::from_qtensor(q)?;
        let run = |m: usize, calls| -> Result<f64, Failure> {
            let x = Tensor::from_slice(&x[..m * k], (m, k), &Device::Cpu)?;
            time(&mut || Ok(q.forward(&x).map(drop)?), calls)
        };
        println!("  {:9} {:8.4} {:8.3}", "QMatMul", run(1, 200)?, run(512, 20)?);
    }
    Ok(())
}
