//! Decode on candle tensors, and stores in every type.

use candle_core::{DType, Device, Tensor, Var};
use foveal::prim::kv::{KvDtype, RowStore};
use foveal::prim::{AttendOptions, DecodeOptions, attend, decode};

fn some(shape: &[usize], seed: f32) -> Tensor {
    let n = shape.iter().product::<usize>();
    let x: Vec<f32> = (0..n).map(|i| ((i as f32 + seed) * 12.9898).sin()).collect();
    Tensor::from_vec(x, shape, &Device::Cpu).unwrap()
}

fn apart(a: &Tensor, b: &Tensor) -> f32 {
    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    flat(a).iter().zip(flat(b)).map(|(a, b)| if *a == b { 0.0 } else { (a - b).abs() }).fold(0.0, f32::max)
}

#[test]
fn agrees_with_attend_in_each_type_and_layout() {
    let q = some(&[2, 6, 3, 32], 1.0);
    // Rows of a store laid out by token, a part of its room in use.
    let k = some(&[2, 90, 2, 32], 2.0).transpose(1, 2).unwrap();
    let v = some(&[2, 90, 2, 48], 3.0).transpose(1, 2).unwrap();
    let options = DecodeOptions { lengths: Some(vec![70, 2]), softcap: Some(4.0), ..Default::default() };
    for dtype in [DType::F32, DType::BF16] {
        let (q, k, v) = (q.clone(), k.to_dtype(dtype).unwrap(), v.to_dtype(dtype).unwrap());
        let got = decode(&q, &k, &v, &options).unwrap();
        assert_eq!((got.out.dims(), got.lse.dims()), (&[2, 6, 3, 48][..], &[2, 6, 3][..]));
        for (b, len) in [(0, 70), (1, 2)] {
            let part =
                |x: &Tensor, n| x.narrow(0, b, 1).unwrap().narrow(2, 0, n).unwrap().to_dtype(DType::F32).unwrap();
            let exact = AttendOptions { softcap: Some(4.0), ..AttendOptions::causal() };
            let want = attend(&part(&q, 3), &part(&k, len), &part(&v, len), &exact, None).unwrap();
            assert!(apart(&got.out.narrow(0, b, 1).unwrap(), &want.out) < 1e-5, "{dtype:?} {b}");
            assert!(apart(&got.lse.narrow(0, b, 1).unwrap(), &want.lse) < 1e-5, "{dtype:?} {b}");
        }
        let element = if dtype == DType::F32 { 4 } else { 2 };
        assert_eq!(got.work.bytes, 2 * 72 * (32 + 48) * element);
    }
}

#[test]
fn refusals() {
    let (q, k, v) = (some(&[1, 4, 1, 8], 1.0), some(&[1, 2, 9, 8], 2.0), some(&[1, 2, 9, 8], 3.0));
    let error = |q: &Tensor, k: &Tensor, v: &Tensor, o: &DecodeOptions| decode(q, k, v, o).unwrap_err().to_string();
    let plain = DecodeOptions::default();
    assert!(decode(&q, &k, &v, &plain).is_ok());
    let var = Var::from_tensor(&k).unwrap();
    assert!(error(&q, var.as_tensor(), &v, &plain).contains("k tracks gradients"));
    assert!(error(&q, &some(&[1, 2, 9, 7], 2.0), &v, &plain).contains("k has shape"));
    assert!(error(&q, &k, &some(&[1, 2, 8, 8], 2.0), &plain).contains("v has shape"));
    assert!(error(&q, &some(&[1, 3, 9, 8], 2.0), &some(&[1, 3, 9, 8], 2.0), &plain).contains("not a multiple of 3"));
    for lengths in [vec![10], vec![3, 3]] {
        let o = DecodeOptions { lengths: Some(lengths), ..Default::default() };
        assert!(error(&q, &k, &v, &o).contains("each at most the 9 tokens"));
    }
    assert!(error(&q.to_dtype(DType::F64).unwrap(), &k, &v, &plain).contains("F64"));
}

#[test]
fn stores_of_every_type_keep_their_rows_and_count_their_bytes() {
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8, KvDtype::Int4] {
        assert_eq!(dtype.to_string().parse::<KvDtype>(), Ok(dtype));
        for width in [7, 32, 64, 100] {
            let rows = some(&[50, width], 4.0).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut s = RowStore::new(dtype, width);
            s.push(&rows[..20 * width]);
            s.push(&rows[20 * width..]);
            assert_eq!(s.bytes(), dtype.bytes(50, width), "{dtype} {width}");
            let limit = match dtype {
                KvDtype::F32 => 0.0,
                KvDtype::Bf16 => 0.004,
                KvDtype::Int8 => 0.004,
                KvDtype::Int4 => 0.07,
            };
            let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= limit);
            assert!(near(&s.to_f32(), &rows), "{dtype} {width}");
            let mut copy = s.clone();
            copy.drop_front(9);
            copy.retain(&[0, 3, 40]);
            assert_eq!((copy.len(), copy.bytes()), (3, dtype.bytes(3, width)));
            let (mut row, mut from) = (vec![0.0; width], vec![0.0; width]);
            for (i, j) in [(0, 9), (1, 12), (2, 49)] {
                copy.read(i, &mut row);
                assert!(near(&row, &rows[j * width..(j + 1) * width]), "{dtype} {width} {j}");
                s.codec_from(j).row(0, &mut from);
                assert_eq!(row, from);
            }
        }
    }
}
