//! The header of a safetensors file. Run with `cargo fuzz run safetensors_folder`.
#![no_main]

use std::path::Path;

use foveal_llm::hf::parse_safetensors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok((start, metadata)) = parse_safetensors(data, Path::new("fuzz.safetensors")) {
        // What the parser accepts must lie within the bytes.
        for info in metadata.tensors().values() {
            let (begin, end) = info.data_offsets;
            assert!(begin <= end && start + end <= data.len());
        }
    }
});
