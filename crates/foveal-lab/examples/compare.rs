//! Compare systems on a model from code: `compare MODEL TEXT [LENGTHS [PREFILL [CACHE]]]`.
//!
//! LENGTHS, PREFILL and CACHE are lists separated by commas and spaces respectively, for example
//! `512,2048 "moba xattention:threshold=0.9" "think"`; `-` is an empty list.

use foveal::Spec;
use foveal::prim::kv::KvDtype;
use foveal_lab::compare::{CompareOptions, Comparison, plans};
use foveal_lab::report;
use foveal_lab::results::Facts;
use foveal_llm::{Checkpoint, LoadOptions, Model};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let get = |i: usize| args.get(i).map(String::as_str).filter(|s| *s != "-");
    let (Some(model), Some(text)) = (get(0), get(1)) else {
        return Err("usage: compare MODEL TEXT [LENGTHS [PREFILL [CACHE]]]".into());
    };
    let list = |s: Option<&str>| -> Result<Vec<Spec>, foveal::Error> {
        s.unwrap_or("").split_whitespace().map(str::parse).collect()
    };
    let lengths = get(2).unwrap_or("512").split(',').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let tokenizer = checkpoint.tokenizer()?;
    let engine = Model::load(&checkpoint, &LoadOptions::default())?;
    let tokens = tokenizer.encode(&std::fs::read_to_string(text)?, false, false)?;
    let c = Comparison {
        model: &engine,
        tokenizer: &tokenizer,
        text: &tokens,
        calibration: &[],
        lengths,
        plans: plans(&list(get(3))?, &list(get(4))?, KvDtype::default()),
        options: CompareOptions::default(),
        facts: Facts { model: checkpoint.describe(), text: text.into(), ..Facts::default() },
    };
    let begin = std::time::Instant::now();
    let r = c.run(
        &mut |p| eprintln!("{:6.1}s {:3.0}%  {}", begin.elapsed().as_secs_f64(), p.fraction * 100.0, p.what),
        None,
    )?;
    print!("{}", report::tables(&r));
    print!("{}", report::verdicts(&r));
    println!("{:.1} s, peak {} MiB", r.seconds, r.peak_bytes.unwrap_or(0) >> 20);
    let w = report::write_all(&r, Path::new("foveal-report"))?;
    println!("{} {} {}", w.html.display(), w.json.display(), w.csv.display());
    Ok(())
}
