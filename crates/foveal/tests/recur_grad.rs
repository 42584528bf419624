//! Linear recurrences inside candle's autograd: every gate's gradients against central differences, and the forms
//! against each other.

mod gradients;

use candle_core::{DType, Device, Tensor, Var};
use foveal::prim::{RecurGate, RecurOptions, recur, recur_step};
use gradients::{check, number, wave};

const H: usize = 2;
const T: usize = 70;
const D: usize = 8;
const DV: usize = 6;

/// A gate's name, its operands, and how they make the gate.
type Case = (&'static str, Vec<Tensor>, fn(&[Tensor]) -> RecurGate);

fn cases(b: usize) -> Vec<Case> {
    let g = |width: usize| wave(11, &[b, H, T, width], -0.6, -0.01);
    let beta = || wave(12, &[b, H, T, 1], 0.1, 0.9);
    let row = |seed: usize| wave(seed, &[b, H, T, D], -0.3, 0.3);
    let dt = |width: usize| wave(13, &[b, H, T, width], 0.05, 0.5);
    vec![
        ("identity", vec![], |_| RecurGate::Identity),
        ("scalar", vec![g(1)], |x| RecurGate::Scalar { g: x[0].clone() }),
        ("channel", vec![g(D)], |x| RecurGate::Channel { g: x[0].clone() }),
        ("delta", vec![beta()], |x| RecurGate::Delta { beta: x[0].clone() }),
        ("gated delta", vec![g(1), beta()], |x| RecurGate::GatedDelta { g: x[0].clone(), beta: x[1].clone() }),
        ("channel delta", vec![g(D), beta()], |x| RecurGate::ChannelDelta { g: x[0].clone(), beta: x[1].clone() }),
        ("low rank", vec![g(D), row(14), row(15)], |x| RecurGate::LowRank {
            g: x[0].clone(),
            a: x[1].clone(),
            b: x[2].clone(),
        }),
        ("ssd", vec![dt(1), wave(16, &[H], -2.0, -0.1)], |x| RecurGate::Ssd { dt: x[0].clone(), a: x[1].clone() }),
        ("selective", vec![dt(DV), wave(17, &[H, DV, D], -2.0, -0.1)], |x| RecurGate::Selective {
            dt: x[0].clone(),
            a: x[1].clone(),
        }),
    ]
}

/// q, k of half norm, v.
fn qkv(b: usize, hk: usize) -> Vec<Tensor> {
    vec![wave(1, &[b, H, T, D], -1.0, 1.0), wave(2, &[b, hk, T, D], -0.4, 0.4), wave(3, &[b, H, T, DV], -1.0, 1.0)]
}

#[test]
fn gradients_are_differences() {
    for (name, gate, make) in cases(1) {
        // All of them with an initial state and the final one, two sequences in a ragged batch, k shared by heads.
        let mut inputs = qkv(1, 1);
        inputs.push(wave(4, &[2, H, D, DV], -1.0, 1.0));
        inputs.extend(gate);
        check(name, &inputs, 2e-3, |x| {
            let options = RecurOptions {
                initial: Some(x[3].clone()),
                cu_seqlens: Some(vec![0, 3, T as u32]),
                ..RecurOptions::default()
            };
            let y = recur(&x[0], &x[1], &x[2], &make(&x[4..]), &options).unwrap();
            vec![y.out, y.state]
        });
    }
}

/// Tracked and direct calls run the same kernel; steps continue what chunks began.
#[test]
fn forms_agree() {
    for (name, gate, make) in cases(2) {
        let x = qkv(2, H);
        let options = RecurOptions { scale: Some(0.5), ..RecurOptions::default() };
        let whole = recur(&x[0], &x[1], &x[2], &make(&gate), &options).unwrap();
        assert_eq!(whole.out.dims(), [2, H, T, DV]);
        assert_eq!(whole.state.dims(), [2, H, D, DV]);
        assert!(whole.work.flops > 0 && whole.work.fallback == 0);
        // (B, T, H, Dv) memory: the projection's view is free.
        assert!(whole.out.transpose(1, 2).unwrap().is_contiguous());
        let var = Var::from_tensor(&x[0]).unwrap();
        let tracked = recur(var.as_tensor(), &x[1], &x[2], &make(&gate), &options).unwrap();
        for (a, b) in [(&tracked.out, &whole.out), (&tracked.state, &whole.state)] {
            assert_eq!(number(&(a - b).unwrap().abs().unwrap()), 0.0, "{name}");
        }
        assert_eq!(tracked.work, whole.work);
        // 40 tokens in chunks, the others one by one, read from strided views.
        let cut =
            |x: &Tensor, at: usize, n: usize| if x.dims().len() == 4 { x.narrow(2, at, n).unwrap() } else { x.clone() };
        let part = |at: usize, n: usize, state: Option<Tensor>, step: bool| {
            let gate: Vec<Tensor> = gate
                .iter()
                .map(|g| {
                    if name == "selective" && g.dims()[0] == H && g.dims().len() == 3 {
                        g.clone()
                    } else {
                        cut(g, at, n)
                    }
                })
                .collect();
            let options = RecurOptions { initial: state, ..options.clone() };
            let f = if step { recur_step } else { recur };
            f(&cut(&x[0], at, n), &cut(&x[1], at, n), &cut(&x[2], at, n), &make(&gate), &options).unwrap()
        };
        let mut last = part(0, 40, None, false);
        let mut outs = vec![last.out.clone()];
        for t in 40..T {
            last = part(t, 1, Some(last.state), true);
            outs.push(last.out.clone());
        }
        let joined = Tensor::cat(&outs, 2).unwrap();
        for (a, b) in [(&joined, &whole.out), (&last.state, &whole.state)] {
            let worst = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(number(&worst) < 2e-5, "{name}: {}", number(&worst));
        }
    }
}

/// bf16 operands keep their dtype in gradients; the result is near that of f32.
#[test]
fn bf16_operands() {
    for (name, gate, make) in cases(1) {
        let x: Vec<Tensor> = qkv(1, H).iter().map(|x| x.to_dtype(DType::BF16).unwrap()).collect();
        let narrow = |g: &Tensor| {
            if name == "low rank" && g.dims()[3] == D { g.to_dtype(DType::BF16).unwrap() } else { g.clone() }
        };
        let mut gate16: Vec<Tensor> = gate.iter().map(narrow).collect();
        if let Some(g) = gate.first() {
            gate16[0] = g.clone();
        }
        let var = Var::from_tensor(&x[1]).unwrap();
        let y = recur(&x[0], var.as_tensor(), &x[2], &make(&gate16), &RecurOptions::default()).unwrap();
        let grads = y.out.sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&var).unwrap().dtype(), DType::BF16, "{name}");
        let wide: Vec<Tensor> = x.iter().map(|x| x.to_dtype(DType::F32).unwrap()).collect();
        let gate32: Vec<Tensor> = gate16.iter().map(|x| x.to_dtype(DType::F32).unwrap()).collect();
        let z = recur(&wide[0], &wide[1], &wide[2], &make(&gate32), &RecurOptions::default()).unwrap();
        let size = number(&z.out.abs().unwrap().flatten_all().unwrap().max(0).unwrap());
        let worst = number(&(y.out - z.out).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap());
        assert!(worst < 0.02 * size, "{name}: {worst} of {size}");
    }
}

#[test]
fn refusals_name_the_trouble() {
    let x = qkv(1, H);
    let say = |gate: RecurGate, o: &RecurOptions| recur(&x[0], &x[1], &x[2], &gate, o).unwrap_err().to_string();
    let options = RecurOptions::default();
    let g = wave(5, &[1, H, T, 2], -1.0, 0.0);
    assert!(say(RecurGate::Scalar { g: g.clone() }, &options).contains("g"));
    assert!(say(RecurGate::Scalar { g: g.squeeze(0).unwrap() }, &options).contains("(batch, heads, tokens, width)"));
    let initial = Some(Tensor::zeros((1, H, D, DV + 1), DType::F32, &Device::Cpu).unwrap());
    assert!(say(RecurGate::Identity, &RecurOptions { initial, ..options.clone() }).contains("initial"));
    let e = recur(&x[0], &x[1].to_dtype(DType::BF16).unwrap(), &x[2], &RecurGate::Identity, &options).unwrap_err();
    assert!(e.to_string().contains("the dtype of q"), "{e}");
    let var = Var::from_tensor(&x[0]).unwrap();
    let e = recur_step(var.as_tensor(), &x[1], &x[2], &RecurGate::Identity, &options).unwrap_err();
    assert!(e.to_string().contains("recur_step"), "{e}");
}
