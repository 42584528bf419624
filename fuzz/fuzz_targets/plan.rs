//! A plan file. Run with `cargo fuzz run plan`.
#![no_main]

use foveal_llm::Plan;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = Plan::parse(text);
});
