//! Attention and its gradients against PyTorch's autograd in f64, under every instruction set.

use foveal_kernels::{Attend, AttendGrads, Band, Bias, BiasGrad, CuSeqlens, Isa, Normalizer, Upstream, View, ViewMut};
use safetensors::SafeTensors;
use std::path::Path;

/// A file of operands and results, named `case.result`.
struct Golden(Vec<u8>);

impl Golden {
    fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(name);
        Self(std::fs::read(path).unwrap())
    }

    /// Numbers and their last three dimensions, leading ones filled in.
    fn find(&self, name: &str) -> Option<(Vec<f32>, [usize; 3])> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let t = file.tensor(name).ok()?;
        let mut dims = [1; 3];
        let n = t.shape().len();
        dims[3 - n..].copy_from_slice(t.shape());
        Some((t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(), dims))
    }

    fn get(&self, name: &str) -> (Vec<f32>, [usize; 3]) {
        self.find(name).unwrap_or_else(|| panic!("{name} is in the file"))
    }
}

fn view<'a>(x: &'a [f32], [h, t, d]: [usize; 3]) -> View<'a, f32> {
    View::contiguous("operand", x, [1, h, t, d]).unwrap()
}

fn view_mut<'a>(x: &'a mut [f32], [h, t, d]: [usize; 3]) -> ViewMut<'a, f32> {
    ViewMut::contiguous("gradient", x, [1, h, t, d]).unwrap()
}

/// Forward and backward of one case, each result that the file has against it; how many it has.
fn check(file: &Golden, case: &str, p: &Attend) -> usize {
    let [(q, qs), (k, ks), (v, vs), (dout, os), (dlse, _)] = ["q", "k", "v", "dout", "dlse"].map(|n| file.get(n));
    let softmax = p.normalizer == Normalizer::Softmax;
    let mut out = vec![0f32; dout.len()];
    let mut lse = vec![0f32; if softmax { dlse.len() } else { 0 }];
    let (q, k, v) = (view(&q, qs), view(&k, ks), view(&v, vs));
    p.run(&q, &k, &v, &mut view_mut(&mut out, os), softmax.then_some(lse.as_mut_slice())).unwrap();
    let poison = |name: &str| vec![f32::NAN; file.find(name).map_or(0, |x| x.0.len())];
    let [mut dq, mut dk, mut dv, mut dsinks] = ["q", "k", "v", "sinks"].map(poison);
    let (name, second) = match &p.bias {
        None => ("", ""),
        Some(Bias::Dense(_)) => ("bias", ""),
        Some(Bias::Alibi(_)) => ("slopes", ""),
        Some(Bias::Keys(_)) => ("keys", ""),
        Some(Bias::Relative { .. }) => ("table", ""),
        Some(Bias::Factors { .. }) => ("fq", "fk"),
    };
    let (mut first, mut other) = (poison(name), poison(second));
    let shape = |name| file.find(name).map_or([0; 3], |x| x.1);
    // One row a head.
    let [_, h, tk] = shape("keys");
    let of_first = if name == "keys" { [h, 1, tk] } else { shape(name) };
    let slice = matches!(name, "slopes" | "table");
    let mut numbers = if slice { first.clone() } else { Vec::new() };
    let mut whole = view_mut(&mut first, of_first);
    let mut of_keys = view_mut(&mut other, shape(second));
    p.backward(
        &q,
        &k,
        &v,
        &Upstream { out: &view(&out, os), lse: &lse, dout: &view(&dout, os), dlse: softmax.then_some(&dlse) },
        AttendGrads {
            dq: &mut view_mut(&mut dq, qs),
            dk: &mut view_mut(&mut dk, ks),
            dv: &mut view_mut(&mut dv, vs),
            dsinks: p.sinks.is_some().then_some(dsinks.as_mut_slice()),
            dbias: match name {
                "" => None,
                "bias" => Some(BiasGrad::Dense(&mut whole)),
                "keys" => Some(BiasGrad::Keys(&mut whole)),
                "slopes" => Some(BiasGrad::Slopes(&mut numbers)),
                "table" => Some(BiasGrad::Relative(&mut numbers)),
                _ => Some(BiasGrad::Factors { q: &mut whole, k: &mut of_keys }),
            },
        },
    )
    .unwrap();
    let first = if slice { numbers } else { first };
    let results = [("out", &out), ("lse", &lse), ("dq", &dq), ("dk", &dk), ("dv", &dv), ("dsinks", &dsinks)];
    let (name, second) = (format!("d{name}"), format!("d{second}"));
    let results = results.into_iter().chain([(name.as_str(), &first), (second.as_str(), &other)]);
    let mut found = 0;
    for (name, got) in results {
        let Some((want, _)) = file.find(&format!("{case}.{name}")) else { continue };
        found += 1;
        assert_eq!(got.len(), want.len(), "{case} {name}");
        for (a, b) in got.iter().zip(want) {
            let near = *a == b || (a - b).abs() < 4e-6 * (1.0 + b.abs());
            assert!(near, "{case} {name} on {}: {a}, golden {b}", p.isa);
        }
    }
    found
}

#[test]
fn backward() {
    let file = Golden::open("attend_backward.safetensors");
    let ((bias, of_bias), (sinks, _), tk) = (file.get("bias"), file.get("sinks"), file.get("k").1[1]);
    for case in ["full", "causal", "window", "softcap", "sinks", "all", "sigmoid", "sigmoid_all"] {
        for isa in Isa::available() {
            let (all, sigmoid) = (case.ends_with("all"), case.starts_with("sigmoid"));
            let mut p = Attend::new(0.7).causal(!["full", "sigmoid"].contains(&case)).isa(isa);
            if sigmoid {
                p.normalizer = Normalizer::Sigmoid { bias: -(tk as f32).ln() };
            }
            p = p.window((all || case == "window").then_some(6));
            p.softcap = (all || case == "softcap").then_some(3.0);
            p.sinks = (case == "all" || case == "sinks").then_some(&sinks);
            p.bias = all.then(|| Bias::Dense(view(&bias, of_bias)));
            let want = 5 + usize::from(all) + usize::from(p.sinks.is_some()) - usize::from(sigmoid);
            assert_eq!(check(&file, case, &p), want, "{case}");
        }
    }
}

#[test]
fn options() {
    let file = Golden::open("attend_options.safetensors");
    let [(sinks, _), (slopes, _), (keys, _), (table, _), (fq, fqs), (fk, fks)] =
        ["sinks", "slopes", "keys", "table", "fq", "fk"].map(|n| file.get(n));
    let tk = file.get("k").1[1];
    let cu = CuSeqlens { q: &[0, 5, 5, 8, 13], k: &[0, 4, 9, 9, 17] };
    // Causal, banded, capped, with sinks.
    for (case, [causal, band, softcap, sunk], bias) in [
        ("softcap_sinks", [true, false, true, true], ""),
        ("band", [false, true, false, false], ""),
        ("band_sinks", [false, true, false, true], ""),
        ("slopes", [true, false, false, false], "slopes"),
        ("keys", [true, false, false, false], "keys"),
        ("table", [false, false, true, false], "table"),
        ("factors", [false, true, true, false], "factors"),
        ("ragged", [true, false, false, false], ""),
        ("ragged_table", [false, true, false, true], "table"),
        ("ragged_factors", [false; 4], "factors"),
        ("sigmoid_factors", [true, false, false, false], "factors"),
    ] {
        let sigmoid = case.starts_with("sigmoid");
        for isa in Isa::available() {
            let mut p = Attend::new(0.7).causal(causal).isa(isa);
            p = p.band(band.then_some(Band { left: 4, right: 3 })).cu_seqlens(case.starts_with("ragged").then_some(cu));
            p.softcap = softcap.then_some(3.0);
            p.sinks = sunk.then_some(&sinks);
            if sigmoid {
                p.normalizer = Normalizer::Sigmoid { bias: -(tk as f32).ln() };
            }
            p.bias = match bias {
                "slopes" => Some(Bias::Alibi(&slopes)),
                "keys" => Some(Bias::Keys(view(&keys, [slopes.len(), 1, tk]))),
                "table" => Some(Bias::Relative { table: &table, left: 5 }),
                "factors" => Some(Bias::Factors { q: view(&fq, fqs), k: view(&fk, fks) }),
                _ => None,
            };
            let of_bias = [0, 1, 2][usize::from(!bias.is_empty()) + usize::from(bias == "factors")];
            assert_eq!(check(&file, case, &p), 5 + of_bias + usize::from(sunk) - usize::from(sigmoid), "{case}");
        }
    }
}
