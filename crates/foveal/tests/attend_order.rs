//! Attention over tables that count places of a token order, against plain candle operations under the mask.

use candle_core::{D, DType, Device, Tensor, Var};
use foveal::prim::{AttendOptions, attend_selected, softmax};
use foveal::sparse::mask::dense_mask;
use foveal::sparse::{HeadSelection, TokenOrder};
use foveal_kernels::{HeadKeys, HeadTable};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const B: usize = 2;
const H: usize = 4;
const HKV: usize = 2;
const TQ: usize = 37;
const TK: usize = 41;
const WIDTH: usize = 8;

fn shuffled(n: usize, padding: usize, rng: &mut ChaCha8Rng) -> TokenOrder {
    let mut at: Vec<u32> = (0..n as u32).chain(std::iter::repeat_n(TokenOrder::NONE, padding)).collect();
    at.shuffle(rng);
    TokenOrder::new(at).expect("an order")
}

/// Every kind of head in turn: rows of blocks with and without masks, single keys, with and without orders.
fn selection(head: usize, k_order: Option<TokenOrder>, rng: &mut ChaCha8Rng) -> HeadSelection {
    let q_order = (head != 2).then(|| shuffled(TQ, [11, 0, 0, 3][head % 4], rng));
    let places = q_order.as_ref().map_or(TQ, TokenOrder::places);
    let mut lists = |n: usize, last: u32| -> Vec<Vec<u32>> {
        (0..n).map(|_| (0..=last).filter(|&b| b == 1 || rng.random_bool(0.5)).collect()).collect()
    };
    let s = match head % 4 {
        1 => {
            let mut t = HeadTable::from_lists(16, 1, lists(places.div_ceil(16), TK as u32 - 1));
            t.rows = Some(t.blocks.iter().map(|&b| if b == 1 { u64::MAX } else { rng.random() }).collect());
            HeadSelection::of_blocks(t)
        }
        3 => HeadSelection::of_keys(HeadKeys::from_lists(8, lists(places.div_ceil(8), TK as u32 - 1))),
        _ => HeadSelection::of_blocks(HeadTable::from_lists(12, 10, lists(places.div_ceil(12), TK as u32 / 10))),
    };
    s.in_order(q_order, k_order)
}

/// Largest distance of `a` and `b`.
fn far(a: &Tensor, b: &Tensor) -> f32 {
    let d = (a - b).and_then(|d| d.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>());
    d.expect("tensors of one shape")
}

#[test]
fn ordered_attention_and_its_gradients_are_those_of_the_mask() -> Result<(), Box<dyn std::error::Error>> {
    for alike in [None, Some(true), Some(false)] {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut keys = None;
        let selections: Vec<HeadSelection> = (0..B * H)
            .map(|bh| {
                if bh % (H / HKV) == 0 || alike == Some(false) {
                    keys = alike.is_some().then(|| shuffled(TK, 0, &mut rng));
                }
                selection(bh % H, keys.clone(), &mut rng)
            })
            .collect();
        let dev = Device::Cpu;
        let q = Var::randn(0f32, 1.0, (B, H, TQ, WIDTH), &dev)?;
        let k = Var::randn(0f32, 1.0, (B, HKV, TK, WIDTH), &dev)?;
        let v = Var::randn(0f32, 1.0, (B, HKV, TK, WIDTH), &dev)?;
        let weight = Tensor::randn(0f32, 1.0, (B, H, TQ, WIDTH), &dev)?;
        let o = AttendOptions::default();
        let got = attend_selected(&q, &k, &v, &o, selections.clone())?;
        assert!(got.out.transpose(1, 2)?.is_contiguous(), "memory is (B, T, H, D)");

        let masks: Vec<f32> = selections
            .iter()
            .flat_map(|s| dense_mask(s, TQ, TK, false))
            .map(|m| if m == 1 { 0.0 } else { f32::NEG_INFINITY })
            .collect();
        let mask = Tensor::from_vec(masks, (B, H, TQ, TK), &dev)?;
        let wide = |x: &Tensor| -> candle_core::Result<Tensor> {
            x.unsqueeze(2)?.broadcast_as((B, HKV, H / HKV, TK, WIDTH))?.reshape((B, H, TK, WIDTH))
        };
        let s = (q.matmul(&wide(&k)?.transpose(2, 3)?.contiguous()?)? / (WIDTH as f64).sqrt())?.add(&mask)?;
        let want = softmax(&s)?.0.matmul(&wide(&v)?)?;
        assert!(far(&got.out, &want) < 1e-5, "{alike:?}: output");
        let lse = s.exp()?.sum(D::Minus1)?.log()?;
        assert!(far(&got.lse, &lse) < 1e-5, "{alike:?}: log-sum-exp");

        let (a, b) = (got.out.mul(&weight)?.sum_all()?.backward()?, want.mul(&weight)?.sum_all()?.backward()?);
        for (name, x) in [("q", &q), ("k", &k), ("v", &v)] {
            let (a, b) = (a.get(x).expect("a gradient"), b.get(x).expect("a gradient"));
            assert!(far(a, b) < 2e-5, "{alike:?}: gradient of {name}");
        }
        let [q, k, v] = [&q, &k, &v].map(|x| x.detach().to_dtype(DType::BF16).expect("bf16"));
        let low = attend_selected(&q, &k, &v, &o, selections.clone())?;
        assert!(far(&low.out, &want) < 0.1, "{alike:?}: bf16");
        let e = attend_selected(&q, &k, &v, &AttendOptions::causal(), selections).expect_err("causal").to_string();
        assert!(e.contains("causal") && e.contains("without an order"), "{e}");
    }
    Ok(())
}
