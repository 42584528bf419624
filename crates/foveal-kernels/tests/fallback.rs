//! A call that the fast path of the instruction set cannot serve says so in its work.

use foveal_kernels::{Attend, BlockTable, HeadTable, Isa, PackedLinear, View, ViewMut, WeightFormat, Work};
use half::bf16;

/// One head of 64 queries and keys, 32 channels, in bf16.
fn attend(isa: Isa, scale: f32, table: Option<&BlockTable>) -> Work {
    const T: usize = 64;
    const D: usize = 32;
    let x: Vec<bf16> = (0..T * D).map(|i| bf16::from_f32((i % 7) as f32 / 7.0 - 0.4)).collect();
    let view = || View::contiguous("x", &x, [1, 1, T, D]).unwrap();
    let mut out = vec![0f32; T * D];
    let mut o = ViewMut::contiguous("out", &mut out, [1, 1, T, D]).unwrap();
    Attend::new(scale).isa(isa).table(table).run(&view(), &view(), &view(), &mut o, None).unwrap()
}

#[test]
fn attention_that_misses_the_tiles_is_counted() {
    let pairs = BlockTable { heads: vec![HeadTable::from_lists(4, 64, (0..16).map(|_| vec![0]).collect())] };
    for isa in Isa::available() {
        assert_eq!(attend(isa, 0.2, None).fallback, 0, "{isa}: tiles or vectors serve 64 queries");
        for work in [attend(isa, -0.2, None), attend(isa, 0.2, Some(&pairs))] {
            let all = if isa == Isa::Amx { work.flops } else { 0 };
            assert_eq!(work.fallback, all, "{isa}");
        }
    }
}

#[test]
fn an_int8_layer_with_an_infinite_input_is_counted() {
    let w = vec![0.5; 32 * 32];
    let layer = PackedLinear::pack(&w, 32, 32, WeightFormat::Int8).unwrap();
    let run = |isa, x: &[f32]| layer.forward(x, 1, &mut [0.0; 32], isa).unwrap();
    for isa in Isa::available() {
        let mut x = [1.0; 32];
        x[3] = f32::INFINITY;
        let work = run(isa, &x);
        assert_eq!(work.fallback, if isa >= Isa::Avx512 { work.flops } else { 0 }, "{isa}");
        let float = run(isa, &[1.0; 32]).fallback;
        #[cfg(target_arch = "x86_64")]
        let vnni = std::is_x86_feature_detected!("avx512vnni");
        #[cfg(not(target_arch = "x86_64"))]
        let vnni = false;
        assert_eq!(float, if isa >= Isa::Avx512 && !vnni { work.flops } else { 0 }, "{isa}");
    }
}
