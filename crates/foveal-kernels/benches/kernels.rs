//! Every kernel at one small shape: `cargo bench -p foveal-kernels` (less than a minute), or a part of it with
//! `cargo bench -p foveal-kernels -- decode`. `FOVEAL_ISA` picks the instruction set, `RAYON_NUM_THREADS` the threads.
//!
//! "item/s" are operations a second, as the kernel counts them.

mod cases;

use cases::{NAMES, Size};
use divan::Bencher;
use divan::counter::ItemsCount;

const SIZE: Size = Size {
    heads: 6,
    tokens: 1024,
    keys: 16_384,
    channels: 64,
    samples: 8192,
    width: 1024,
    rows: 256,
    numbers: 1 << 14,
};

#[divan::bench(args = NAMES, max_time = 1)]
fn kernel(bencher: Bencher, name: &str) {
    let mut call = cases::make(name, &SIZE);
    let work = call();
    bencher.counter(ItemsCount::new(work.flops)).bench_local(call);
}

fn main() {
    divan::main();
}
