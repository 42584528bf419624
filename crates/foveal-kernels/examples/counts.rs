//! One call of each kernel on one thread, for `benches/counts/check`, which counts its instructions under callgrind.
//!
//! Prints the names in the order of the calls. Only what happens inside [`counted`] is meant to be counted.

#[path = "../benches/cases/mod.rs"]
mod cases;

use cases::{Call, NAMES, Size};

/// Small: a simulated processor is some fifty times slower.
const SIZE: Size =
    Size { heads: 3, tokens: 160, keys: 1024, channels: 8, samples: 2048, width: 256, rows: 24, numbers: 1 << 14 };

#[inline(never)]
fn counted(call: &mut Call) {
    std::hint::black_box(call());
}

#[inline(never)]
fn told(name: &str) {
    println!("{name}");
}

fn main() {
    // The pool is this very thread, so that all of the work is done, and counted, here.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
    let _pool = pool.expect("the pool is built once");
    for name in NAMES {
        let mut call = cases::make(name, &SIZE);
        // What a process does only once.
        call();
        counted(&mut call);
        told(name);
    }
}
