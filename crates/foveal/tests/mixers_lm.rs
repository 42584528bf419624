//! Learned gates: their gradients, what teaching them does, and that a gate read from a file on rotated rows chooses
//! what the layer chose before rotation.

use candle_core::{Device, Tensor, Var};
use foveal::mixer::{self, MixInput, MixerDims, Weights};
use foveal::prim::rope::Rope;
use foveal::sparse::seerattention::Gates;
use foveal::sparse::{HeadProblem, HeadSelection, Mat};
use foveal::{Slot, Spec, System, registry};

/// Rows (n, d) that drift slowly, with some noise and a few loud ones.
fn rows(n: usize, d: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let row = |i: usize, c: usize| if i % 37 == 3 { 1.5 } else { ((i / 11 + 3 * c) as f32).sin() };
    (0..n * d).map(|x| noise() + row(x / d, x % d)).collect()
}

struct Problem {
    t: usize,
    dims: MixerDims,
    /// Before rotation.
    q0: Tensor,
    k0: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

fn problem(t: usize, rope: &Rope) -> Problem {
    let dims = MixerDims { kv_heads: 2, ..MixerDims::new(4, 16, true) };
    let make = |heads: usize, seed: u64, turn: bool| {
        let mut all = Vec::new();
        for h in 0..heads {
            let mut x = rows(t, 16, seed + h as u64);
            if turn {
                rope.rotate(&mut x, 16, 0);
            }
            all.extend(x);
        }
        Tensor::from_vec(all, (1, heads, t, 16), &Device::Cpu).unwrap()
    };
    Problem {
        t,
        dims,
        q0: make(4, 10, false),
        k0: make(2, 20, false),
        q: make(4, 10, true),
        k: make(2, 20, true),
        v: make(2, 30, false),
    }
}

impl Problem {
    fn mix(&self, spec: &str, weights: &Weights) -> mixer::Mixed {
        let spec: Spec = spec.parse().unwrap();
        let system = registry::build(&spec, Slot::Mixer).unwrap();
        let layer = mixer::layer(&spec.id, system, &self.dims, weights.builder()).unwrap();
        let input =
            MixInput { before_rotation: Some((&self.q0, &self.k0)), ..MixInput::new(&self.q, &self.k, &self.v) };
        layer.mix(&input).unwrap()
    }

    fn loss(&self, spec: &str, weights: &Weights) -> Tensor {
        self.mix(spec, weights).loss.expect("a loss")
    }
}

fn numbers(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn value(t: &Tensor) -> f64 {
    f64::from(t.to_scalar::<f32>().unwrap())
}

/// The slope of the loss along the gradient of each parameter equals the gradient's square.
fn slopes(spec: &str, names: &[&str]) {
    let p = problem(75, &Rope::new(16, 100.0));
    let weights = Weights::seeded(3);
    let grads = p.loss(spec, &weights).backward().unwrap();
    for (name, var) in weights.all().into_iter().filter(|(n, _)| names.iter().any(|m| n.starts_with(m))) {
        let base = var.as_tensor().copy().unwrap();
        let grad = grads.get(var.as_tensor()).unwrap_or_else(|| panic!("{name} has no gradient")).clone();
        let size = value(&grad.sqr().unwrap().sum_all().unwrap()).sqrt();
        assert!(size > 1e-6, "{spec}: the gradient of {name} is {size}");
        let mut apart = f64::INFINITY;
        // A rectifier may turn within a step: the best of three counts, a wrong gradient agrees with none.
        for step in [5e-3 / size, 1e-3 / size, 2e-4 / size] {
            let at = |s: f64| {
                var.set(&(&base + (&grad * s).unwrap()).unwrap()).unwrap();
                value(&p.loss(spec, &weights))
            };
            apart = apart.min(((at(step) - at(-step)) / (2.0 * step) / (size * size) - 1.0).abs());
        }
        var.set(&base).unwrap();
        assert!(apart < 3e-2, "{spec}: the slope along {name} is off by a share of {apart}");
    }
}

#[test]
fn the_losses_of_estimators_have_the_gradients_they_claim() {
    slopes("seerattention:learn=true,block_size=8,topk=3", &["gate"]);
    slopes(
        "sea-estimated-mask:width=8,keys=8,distil=true",
        &["performer", "encoder", "decoder", "conv1", "conv2", "map"],
    );
}

#[test]
fn a_taught_gate_is_nearer_to_the_map() {
    let spec = "seerattention:learn=true,block_size=8,topk=3";
    let p = problem(120, &Rope::new(16, 100.0));
    let weights = Weights::seeded(1);
    let first = value(&p.loss(spec, &weights));
    for _ in 0..60 {
        let grads = p.loss(spec, &weights).backward().unwrap();
        for (_, var) in weights.all() {
            let g = grads.get(var.as_tensor()).unwrap();
            let size = value(&g.sqr().unwrap().mean_all().unwrap()).sqrt().max(1e-9);
            var.set(&(var.as_tensor() - (g * (0.02 / size)).unwrap()).unwrap()).unwrap();
        }
    }
    let last = value(&p.loss(spec, &weights));
    assert!(last < 0.7 * first, "loss {first} became {last}");
}

#[test]
fn a_gate_from_a_file_chooses_what_the_layer_chose() {
    let rope = Rope { factor: 1.2, ..Rope::new(12, 1000.0) };
    let p = problem(150, &rope);
    let spec = "seerattention:learn=true,block_size=16,topk=3,rope_base=500";
    let weights = Weights::seeded(5);
    let learned = p.mix(spec, &weights);
    // The second of two layers.
    let of = |name: &str| -> Vec<f32> {
        let (_, var): (String, Var) = weights.all().into_iter().find(|x| x.0 == name).unwrap();
        let x = numbers(var.as_tensor());
        [vec![0.0; x.len()], x].concat()
    };
    let gates = Gates::new([2, 4, 2, 16, 16], 16, 500.0, rope, of("gate.q"), of("gate.k")).unwrap();
    let path = std::env::temp_dir().join(format!("foveal-gates-{}.safetensors", std::process::id()));
    std::fs::write(&path, gates.bytes().unwrap()).unwrap();
    let built = |more: &str| {
        let spec = Spec::new("seerattention").with("gates", path.to_str().unwrap()).with("topk", "3");
        registry::build(&if more.is_empty() { spec } else { spec.with("block_size", more) }, Slot::Prefill)
    };
    let wrong = built("").err().unwrap().to_string();
    assert!(wrong.contains("blocks of 16") && wrong.contains("block_size=16"), "{wrong}");
    let Ok(System::Selector(selector)) = built("16") else { panic!("not a selector") };
    let (q, k) = (numbers(&p.q), numbers(&p.k));
    for head in 0..4 {
        let at = |x: &[f32], h: usize| x[h * p.t * 16..(h + 1) * p.t * 16].to_vec();
        let (q, k) = (at(&q, head), at(&k, head / 2));
        let m = |x| Mat::new(x, p.t, 16, 16);
        let problem = HeadProblem { layer: 1, head, ..HeadProblem::new(m(&q), m(&k), 0.25) };
        let (selection, _): (HeadSelection, _) = selector.select(&problem).unwrap();
        assert_eq!(selection, learned.selections[head], "head {head}");
        let stranger = HeadProblem { layer: 2, ..problem };
        assert!(selector.select(&stranger).unwrap_err().to_string().contains("2 layers of 4 heads"));
    }
    std::fs::write(&path, b"{}").unwrap();
    let wrong = built("16").err().unwrap().to_string();
    assert!(wrong.contains("gates =") && wrong.contains("foveal tune gates"), "{wrong}");
    std::fs::remove_file(&path).unwrap();
}
