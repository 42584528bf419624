//! Made-up results for unit tests.

use crate::results::*;
use crate::verdict::Verdict;

/// Dense's description.
pub fn dense_info() -> SystemInfo {
    info("dense", Role::Dense)
}

/// A system's description.
pub fn info(name: &str, role: Role) -> SystemInfo {
    SystemInfo {
        name: name.into(),
        prefill: if role == Role::Prefill { name.into() } else { "flashattention-2".into() },
        cache: if role == Role::Cache { name.into() } else { "flashattention-2".into() },
        kv_dtype: "bf16".into(),
        role,
        plan: format!("version = 1\nname = \"{name}\"\n"),
        title: format!("A paper on {name} <&>"),
        arxiv: "2410.10819".into(),
    }
}

/// A row in which the system needs `seconds` for the prompt and decodes `speed` times as fast as
/// dense; dense's own prompt times are 1, 4.5 and 24 seconds.
pub fn row(system: usize, length: usize, seconds: f64, speed: f64) -> Row {
    let dense = match length {
        512 => 1.0,
        2048 => 4.5,
        _ => 24.0,
    };
    Row {
        system,
        length,
        prefill: Prefill {
            seconds,
            fastest: seconds * 0.98,
            slowest: seconds * 1.02,
            repeats: 3,
            attention_seconds: seconds / 2.0,
            select_seconds: 0.0,
            ratio: seconds / dense,
            attention_ratio: seconds / dense,
            pairs: (length * length) as u64 * 15,
            flops: 1000,
            fallback_flops: 0,
            density: if seconds == dense { 1.0 } else { 0.5 },
            shared: false,
        },
        decode: Decode {
            tokens_per_second: 50.0 * speed,
            step_seconds: 0.02 / speed,
            steps: 16,
            depth: length - 48,
            ratio: speed,
            pairs: 1000,
            density: 1.0,
            shared: false,
        },
        bytes: Bytes { keys: 1 << 20, values: 1 << 20, aux: 0, tokens: length - 48, ratio: 1.0 },
        error: None,
        ppl: None,
        needle: None,
        verdict: if system == 0 { Verdict::Reference } else { Verdict::Pays { gains: Vec::new() } },
    }
}

/// A small but complete comparison of three systems at two lengths.
pub fn results() -> Results {
    let systems = vec![dense_info(), info("xattention:threshold=0.9", Role::Prefill), info("think", Role::Cache)];
    let needle = |n: usize| Needle {
        trials: (0..10)
            .map(|i| Trial {
                name: format!("Name{i}"),
                depth: (i as f64 + 0.5) / 10.0,
                hit: i < n,
                right: if i < n { 1.0 } else { 0.4 },
            })
            .collect(),
        tokens: 500,
    };
    let mut rows = Vec::new();
    for (i, length) in [512usize, 2048].into_iter().enumerate() {
        for s in 0..3 {
            let dense = if i == 0 { 1.0 } else { 4.5 };
            let mut r = row(s, length, if s == 1 { dense * (1.2 - 0.6 * i as f64) } else { dense }, 1.0);
            let p = 20.0 + 0.3 * s as f64;
            r.ppl = Some(Ppl { ppl: p, tokens: length / 4, difference: p - 20.0, percent: (p / 20.0 - 1.0) * 100.0 });
            r.needle = Some(needle(9 - 4 * usize::from(s == 1)));
            if s > 0 {
                let place = if s == 1 { Place::Prompt } else { Place::Decode };
                r.error = OutputError::of(vec![0.1, 0.3, 0.05], place);
            }
            if s == 1 {
                r.prefill.density = 0.4;
            }
            if s == 2 {
                r.bytes = Bytes { keys: 1 << 19, values: 1 << 20, aux: 64, tokens: length - 48, ratio: 0.75 };
                r.prefill.shared = true;
            }
            rows.push(r);
        }
    }
    let maps = Maps {
        layer: 15,
        head: 0,
        length: 2048,
        maps: vec![
            Map { system: 0, caption: "exact attention".into(), rows: 2, cols: 3, cells: vec![0, 10, 20, 30, 40, 255] },
            Map { system: 1, caption: "blocks visited".into(), rows: 2, cols: 3, cells: vec![0, 255, 0, 255, 0, 255] },
        ],
    };
    let mut r = Results {
        schema: SCHEMA,
        facts: Facts {
            version: "0.1.0".into(),
            date: "2026-11-22".into(),
            cpu: "A processor".into(),
            cores: 2,
            threads: 2,
            isa: "avx512".into(),
            os: "linux x86_64".into(),
            model: "SmolLM2-135M-Instruct".into(),
            num_layers: 30,
            num_heads: 9,
            num_kv_heads: 3,
            head_dim: 64,
            weights: "bf16".into(),
            weight_bytes: 269_000_000,
            text: "A text".into(),
            text_tokens: 10_000,
            calibration: "Another text".into(),
            seed: 7,
            command: "foveal compare --seed 7".into(),
        },
        lengths: vec![512, 2048],
        systems,
        rows,
        summaries: Vec::new(),
        maps: Some(maps),
        seconds: 123.0,
        peak_bytes: Some(1 << 30),
        notes: vec!["A note with <angle> & \"quotes\"".into()],
    };
    crate::compare::judge_all(&mut r);
    r
}

/// Equal, numbers within the last digit that decimal text may lose.
pub fn close(a: &serde_json::Value, b: &serde_json::Value) -> bool {
    use serde_json::Value;
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => {
            let (x, y) = (x.as_f64().unwrap(), y.as_f64().unwrap());
            (x - y).abs() <= 1e-14 * x.abs().max(y.abs())
        }
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| close(x, y)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(k, v)| y.get(k).is_some_and(|w| close(v, w)))
        }
        _ => a == b,
    }
}
