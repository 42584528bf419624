//! Work counters equal those of the CPU kernels (bytes aside: outputs are 16 bits here). Needs no device.

use foveal_cuda::Attend;
use foveal_cuda::attend::Shape;
use foveal_cuda::recur::work as recur_work;
use foveal_kernels::recur::{Gate, Recur};
use foveal_kernels::{Band, BlockTable, HeadTable, View, ViewMut};
use half::bf16;

fn table(heads: usize, tq: usize, tk: usize, [bq, bk]: [usize; 2], masks: bool) -> BlockTable {
    let head = |h: usize| {
        let lists = (0..tq.div_ceil(bq))
            .map(|i| (0..tk.div_ceil(bk) as u32).filter(move |j| (*j as usize + i + h).is_multiple_of(2)));
        let mut t = HeadTable::from_lists(bq, bk, lists.map(Iterator::collect).collect());
        t.rows = masks.then(|| (0..t.blocks.len() as u64).map(|e| e.wrapping_mul(0x9e37_79b9)).collect());
        t
    };
    BlockTable { heads: (0..heads).map(head).collect() }
}

#[test]
fn attention_counts_as_the_cpu_does() {
    let (b, h, hkv, d, dv) = (2, 4, 2, 16, 8);
    for (tq, tk) in [(1, 1), (130, 130), (100, 300), (200, 77), (64, 64)] {
        let tables =
            [None, Some(([64, 64], false)), Some(([128, 128], false)), Some(([32, 16], false)), Some(([64, 32], true))];
        for choice in tables {
            let t = choice.map(|(block, masks)| table(b * h, tq, tk, block, masks));
            for (causal, band) in [
                (false, None),
                (true, None),
                (true, Some(Band::window(50))),
                (false, Some(Band { left: 20, right: 7 })),
            ] {
                let zeros = |n: usize| vec![bf16::ZERO; n];
                let (q, k, v) = (zeros(b * h * tq * d), zeros(b * hkv * tk * d), zeros(b * hkv * tk * dv));
                let mut out = vec![0f32; b * h * tq * dv];
                let cpu = foveal_kernels::Attend::new(0.25)
                    .causal(causal)
                    .band(band)
                    .table(t.as_ref())
                    .run(
                        &View::contiguous("q", &q, [b, h, tq, d]).unwrap(),
                        &View::contiguous("k", &k, [b, hkv, tk, d]).unwrap(),
                        &View::contiguous("v", &v, [b, hkv, tk, dv]).unwrap(),
                        &mut ViewMut::contiguous("out", &mut out, [b, h, tq, dv]).unwrap(),
                        None,
                    )
                    .unwrap();
                let shape = Shape { batch: b, heads: h, kv_heads: hkv, tq, tk, d, dv };
                let ours = Attend::new(0.25).causal(causal).band(band).table(t.as_ref()).work(&shape).unwrap();
                let says = format!("{tq} {tk} {choice:?} {causal} {band:?}");
                assert_eq!((ours.flops, ours.tiles, ours.pairs), (cpu.flops, cpu.tiles, cpu.pairs), "{says}");
                assert_eq!(ours.bytes, cpu.bytes - 2 * (b * h * tq * dv) as u64, "{says}");
            }
        }
    }
}

#[test]
fn recurrences_count_as_the_cpu_does() {
    let (b, h, t, d, dv) = (1, 2, 150, 64, 32);
    let (q, v, g) = (vec![bf16::ZERO; b * h * t * d], vec![bf16::ZERO; b * h * t * dv], vec![0f32; b * h * t]);
    let view = View::contiguous("q", &q, [b, h, t, d]).unwrap();
    let values = View::contiguous("v", &v, [b, h, t, dv]).unwrap();
    let one = View::contiguous("g", &g, [b, h, t, 1]).unwrap();
    for (gate, rates) in [
        (Gate::Identity, [false, false]),
        (Gate::Scalar { g: one }, [true, false]),
        (Gate::Delta { beta: one }, [false, true]),
        (Gate::GatedDelta { g: one, beta: one }, [true, true]),
    ] {
        let mut out = vec![0f32; b * h * t * dv];
        let mut o = ViewMut::contiguous("out", &mut out, [b, h, t, dv]).unwrap();
        let cpu = Recur::new(gate, 1.0).forward(&view, &view, &values, None, &mut o, None).unwrap();
        let ours = recur_work([b, h, t], d, dv, rates, false);
        assert_eq!((ours.flops, ours.tiles, ours.pairs), (cpu.flops, cpu.tiles, cpu.pairs));
        assert_eq!(ours.bytes, cpu.bytes - 2 * (b * h * t * dv) as u64);
    }
}
