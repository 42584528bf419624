//! The recurrences against PyTorch, token by token with autograd (`goldens/make_recur.py`).

use foveal_kernels::recur::{Gate, Recur};
use foveal_kernels::{Isa, View, ViewMut};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

struct Golden<'a> {
    file: &'a SafeTensors<'a>,
    gate: &'a str,
}

impl Golden<'_> {
    fn get(&self, name: &str) -> Vec<f32> {
        let t = self.file.tensor(&format!("{}.{name}", self.gate)).unwrap();
        assert_eq!(t.dtype(), Dtype::F32);
        t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn has(&self, name: &str) -> bool {
        self.file.tensor(&format!("{}.{name}", self.gate)).is_ok()
    }

    /// An operand that the gate may lack.
    fn maybe(&self, name: &str) -> Vec<f32> {
        if self.has(name) { self.get(name) } else { Vec::new() }
    }

    fn near(&self, name: &str, got: &[f32], isa: Isa) {
        let want = self.maybe(name);
        assert_eq!(want.len(), got.len(), "{} {name}", self.gate);
        let top = want.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (i, (a, b)) in got.iter().zip(&want).enumerate() {
            assert!((a - b).abs() <= 1e-5 * top, "{} {name}[{i}] on {isa}: {a}, golden {b}", self.gate);
        }
    }
}

#[test]
fn gates_match_their_papers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/recur.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let gates =
        ["identity", "scalar", "channel", "delta", "gated_delta", "channel_delta", "low_rank", "ssd", "selective"];
    for gate in gates {
        let x = Golden { file: &file, gate };
        let shape = file.tensor(&format!("{gate}.v")).unwrap().shape().to_vec();
        let (h, t, dv) = (shape[0], shape[1], shape[2]);
        let d = file.tensor(&format!("{gate}.k")).unwrap().shape()[2];
        let [q, k, v, initial, dout, dlast] = ["q", "k", "v", "initial", "dout", "dlast"].map(|n| x.get(n));
        let [g, beta, a, b, dt, fixed] = ["g", "beta", "a", "b", "dt", "fixed"].map(|n| x.maybe(n));
        fn view<'a>(x: &'a [f32], h: usize, t: usize) -> View<'a, f32> {
            View::contiguous("operand", x, [1, h, t, x.len() / (h * t)]).unwrap()
        }
        let view = |x| view(x, h, t);
        let built = match gate {
            "identity" => Gate::Identity,
            "scalar" => Gate::Scalar { g: view(&g) },
            "channel" => Gate::Channel { g: view(&g) },
            "delta" => Gate::Delta { beta: view(&beta) },
            "gated_delta" => Gate::GatedDelta { g: view(&g), beta: view(&beta) },
            "channel_delta" => Gate::ChannelDelta { g: view(&g), beta: view(&beta) },
            "low_rank" => Gate::LowRank { g: view(&g), a: view(&a), b: view(&b) },
            "ssd" => Gate::Ssd { dt: view(&dt), a: &fixed },
            _ => Gate::Selective { dt: view(&dt), a: &fixed },
        };
        for isa in Isa::available() {
            let r = Recur::new(built, 1.0 / (d as f32).sqrt()).isa(isa);
            let mut out = vec![f32::NAN; h * t * dv];
            let mut last = vec![f32::NAN; h * d * dv];
            let mut o = ViewMut::contiguous("out", &mut out, [1, h, t, dv]).unwrap();
            let (qv, kv, vv) = (view(&q), view(&k), view(&v));
            r.forward(&qv, &kv, &vv, Some(&initial), &mut o, Some(&mut last)).unwrap();
            x.near("out", &out, isa);
            x.near("last", &last, isa);
            let dout = view(&dout);
            let (r, _) = r.backward(&qv, &kv, &vv, Some(&initial), &dout, Some(&dlast)).unwrap();
            for (name, got) in [
                ("q", &r.q),
                ("k", &r.k),
                ("v", &r.v),
                ("g", &r.g),
                ("beta", &r.beta),
                ("b", &r.b),
                ("dt", &r.dt),
                ("initial", &r.initial),
            ] {
                x.near(&format!("grad.{name}"), got, isa);
            }
            x.near(if fixed.is_empty() { "grad.a" } else { "grad.fixed" }, &r.a, isa);
        }
    }
}
