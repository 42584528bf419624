//! What laws and goldens of single calls do not catch of the visual layers: steps, and gradients of parameters that
//! are off by default.

use candle_core::{Device, Tensor, Var};
use foveal::mixer::{self, MixInput, Mixer, MixerDims, Weights};
use foveal::sparse::svg2::Svg2;
use foveal::sparse::{Grid, HeadProblem, Mat};
use foveal::{Slot, Spec, registry};

fn layer(spec: &str, dims: &MixerDims, weights: &Weights) -> Box<dyn Mixer> {
    let spec: Spec = spec.parse().expect("a spec");
    let system = registry::build(&spec, Slot::Mixer).expect("a system");
    mixer::layer(&spec.id, system, dims, weights.builder()).expect("a layer")
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().and_then(|t| t.to_vec1()).expect("elements")
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    flat(a).iter().zip(flat(b)).fold(0.0, |m, (x, y)| m.max((x - y).abs()))
}

/// Numbers that look random, the same on every machine.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| 1.2 * (next() + next())).collect()
}

#[test]
fn re_ttention_follows_its_steps() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../goldens/re_ttention.safetensors");
    let t = candle_core::safetensors::load(path, &Device::Cpu).expect("goldens/re_ttention.safetensors");
    let dims = MixerDims { grid: Some(Grid { first: 4, t: 2, h: 5, w: 9 }), ..MixerDims::new(2, 8, false) };
    let layer = layer("re-ttention:share=0.2,warmup=1,period=3,group=8", &dims, &Weights::none());
    let mut sparse = 0;
    for step in 0..7 {
        let get = |n: &str| &t[&format!("{step}.{n}")];
        let m = layer.mix(&MixInput::new(get("q"), get("k"), get("v"))).expect("a step");
        let far = distance(&m.out, get("out"));
        assert!(far < 3e-5, "step {step}: off by {far}");
        sparse += usize::from(!m.selections.is_empty());
    }
    assert_eq!(sparse, 4);
}

#[test]
fn re_ttention_is_exact_while_nothing_changes_and_begins_anew_with_another_shape() {
    let dims = MixerDims::new(2, 8, false);
    let layer = layer("re-ttention:share=0.1,warmup=0,period=4,ratio_step=0", &dims, &Weights::none());
    let x = |seed, n: usize| Tensor::from_vec(noise(seed, 2 * n * 8), (1, 2, n, 8), &Device::Cpu).expect("a tensor");
    let (q, k, v) = (x(1, 90), x(2, 90), x(3, 90));
    let dense = layer.mix(&MixInput::new(&q, &k, &v)).expect("a dense step");
    for _ in 0..3 {
        let m = layer.mix(&MixInput::new(&q, &k, &v)).expect("a sparse step");
        assert!(distance(&m.out, &dense.out) < 1e-5);
        assert!(m.work.pairs < dense.work.pairs / 2);
    }
    let (q, k, v) = (x(4, 50), x(5, 50), x(6, 50));
    let m = layer.mix(&MixInput::new(&q, &k, &v)).expect("a dense step");
    assert!(m.selections.is_empty(), "another image begins with a dense step");
}

#[test]
fn biformer_trains_with_its_convolution() {
    let grid = Grid { first: 2, t: 2, h: 4, w: 5 };
    let dims = MixerDims { kv_heads: 1, grid: Some(grid), ..MixerDims::new(2, 4, false) };
    let weights = Weights::seeded(3);
    let layer = layer("biformer-bra:side=2,topk=2,lce=3", &dims, &weights);
    let n = 44;
    let x = |seed, h: usize| Tensor::from_vec(noise(seed, h * n * 4), (1, h, n, 4), &Device::Cpu).expect("a tensor");
    let inputs = [("q", x(1, 2)), ("k", x(2, 1)), ("v", x(3, 1))];
    let inputs = inputs.map(|(name, x)| (name.to_owned(), Var::from_tensor(&x).expect("a variable")));
    let [q, k, v] = [0, 1, 2].map(|i| inputs[i].1.as_tensor().clone());
    let up = x(4, 2);
    let value = || -> Tensor {
        let m = layer.mix(&MixInput::new(&q, &k, &v)).expect("a layer");
        (m.out.contiguous().expect("rows") * &up).and_then(|x| x.sum_all()).expect("a sum")
    };
    let grads = value().backward().expect("gradients");
    let mut all = weights.all();
    assert_eq!(all.len(), 2);
    all.extend(inputs.clone());
    for (name, var) in all {
        let base = var.as_tensor().copy().expect("a copy");
        let along = Tensor::from_vec(noise(7, base.elem_count()), base.dims(), &Device::Cpu).expect("a direction");
        let grad = grads.get(var.as_tensor()).unwrap_or_else(|| panic!("{name} has no gradient"));
        let slope: f32 = flat(grad).iter().zip(flat(&along)).map(|(a, b)| a * b).sum();
        let at = |s: f64| {
            var.set(&(&base + (&along * s).expect("a step")).expect("a step")).expect("a value");
            value().to_scalar::<f32>().expect("a number")
        };
        let difference = (at(4e-3) - at(-4e-3)) / 8e-3;
        var.set(&base).expect("a value");
        assert!((slope - difference).abs() < 2e-2 * slope.abs().max(1.0), "{name}: {slope} for {difference}");
    }
}

#[test]
fn svg2_needs_fewer_rounds_from_the_centres_of_the_step_before() {
    let (n, d) = (600, 12);
    // Tokens around 15 points; the next step moves all a little.
    let points = noise(1, 15 * d);
    let rows = |seed: u64, by: f32| -> Vec<f32> {
        let noise = noise(seed, n * d);
        (0..n * d).map(|i| 2.0 * points[i / d * 7 % 15 * d + i % d] + by * noise[i]).collect()
    };
    let (q, k) = (rows(2, 0.5), rows(3, 0.5));
    let shifted: Vec<f32> = k.iter().zip(noise(4, n * d)).map(|(x, y)| x + 0.05 * y).collect();
    let mat = |x| Mat::new(x, n, d, d);
    let problem = |k| HeadProblem { causal: false, ..HeadProblem::new(mat(&q), mat(k), 0.3) };
    let svg2 = Svg2 { q_clusters: 15, k_clusters: 30, iterations: 50, ..Svg2::default() };
    let (_, cold, centres) = svg2.step(&problem(&k), None).expect("a step");
    let few = Svg2 { iterations: 2, ..svg2.clone() };
    let (warm_selection, warm, _) = few.step(&problem(&shifted), Some(&centres)).expect("a step");
    let (full_selection, full, _) = svg2.step(&problem(&shifted), Some(&centres)).expect("a step");
    assert!(warm.flops < cold.flops, "{} for {}", warm.flops, cold.flops);
    assert!(warm.flops <= full.flops);
    let pairs = |s| foveal::sparse::mask::pairs(s, n, n, false) as f64;
    assert!((pairs(&warm_selection) / pairs(&full_selection) - 1.0).abs() < 0.1);
}
