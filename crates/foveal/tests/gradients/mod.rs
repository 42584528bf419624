//! Gradients inside candle's autograd against central differences.

use candle_core::{DType, Device, Tensor, Var};
use std::f32::consts::TAU;

/// Smooth, seeded, the same everywhere.
pub fn wave(seed: usize, shape: &[usize], low: f32, high: f32) -> Tensor {
    let n: usize = shape.iter().product();
    let at = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 1009.0;
    let x: Vec<f32> = (0..n).map(|i| low + (high - low) * (0.5 + 0.5 * (TAU * at(i)).sin())).collect();
    Tensor::from_vec(x, shape, &Device::Cpu).unwrap()
}

pub fn number(x: &Tensor) -> f64 {
    f64::from(x.to_dtype(DType::F32).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap())
}

/// For each input: ⟨gradient, v⟩ equals (L(x + εv) − L(x − εv)) / 2ε, for a fixed weighting L of the outputs.
pub fn check(name: &str, inputs: &[Tensor], step: f32, f: impl Fn(&[Tensor]) -> Vec<Tensor>) {
    let weigh = |outs: &[Tensor]| -> Tensor {
        let terms: Vec<Tensor> = outs
            .iter()
            .enumerate()
            .map(|(i, o)| (o * wave(90 + i, o.dims(), -1.0, 1.0)).unwrap().sum_all().unwrap())
            .collect();
        terms.into_iter().reduce(|a, b| (a + b).unwrap()).unwrap()
    };
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let grads = weigh(&f(&tensors)).backward().unwrap();
    for (i, x) in inputs.iter().enumerate() {
        let dir = wave(40 + i, x.dims(), -1.0, 1.0);
        let loss = |s: f64| {
            let mut moved = inputs.to_vec();
            moved[i] = (x + (&dir * s).unwrap()).unwrap();
            number(&weigh(&f(&moved)))
        };
        let quotient = (loss(f64::from(step)) - loss(f64::from(-step))) / (2.0 * f64::from(step));
        let grad = grads.get(&tensors[i]).unwrap_or_else(|| panic!("{name}: input {i} has no gradient"));
        assert_eq!(grad.dims(), x.dims());
        let product = number(&(grad * &dir).unwrap());
        let size = number(&(grad * &dir).unwrap().abs().unwrap()).max(1.0);
        assert!((quotient - product).abs() < 2e-3 * size, "{name} input {i}: {quotient} against {product}");
    }
}
