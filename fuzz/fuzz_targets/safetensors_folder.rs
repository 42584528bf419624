//! A Hugging Face folder: `config.json`, a byte 0, then the safetensors file. Input without that byte is the file alone.
//! Run with `cargo fuzz run safetensors_folder`.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use foveal_llm::hf::parse_safetensors;
use foveal_llm::{Checkpoint, LoadOptions, Model, Plan, PrefillOptions};
use libfuzzer_sys::fuzz_target;

/// One folder for the whole run; every input overwrites its files.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a temporary folder"));

fuzz_target!(|data: &[u8]| {
    let cut = data.iter().position(|&b| b == 0).filter(|_| data.first() == Some(&b'{'));
    let (config, weights) = match cut {
        Some(at) => (Some(&data[..at]), &data[at + 1..]),
        None => (None, data),
    };
    let Ok((start, metadata)) = parse_safetensors(weights, Path::new("fuzz.safetensors")) else { return };
    // What the parser accepts must lie within the bytes.
    for info in metadata.tensors().values() {
        let (begin, end) = info.data_offsets;
        assert!(begin <= end && start + end <= weights.len());
    }
    let Some(config) = config else { return };
    std::fs::write(FOLDER.path().join("config.json"), config).expect("config.json is written");
    std::fs::write(FOLDER.path().join("model.safetensors"), weights).expect("the weights are written");
    let Ok(checkpoint) = Checkpoint::open(FOLDER.path()) else { return };
    let _ = checkpoint.describe();
    for name in checkpoint.tensor_names() {
        let _ = checkpoint.tensor(&name);
    }
    if let Ok(model) = Model::load(&checkpoint, &LoadOptions::default()) {
        let _ = model.prefill(&[0; 3], &Plan::dense(), &PrefillOptions::default());
    }
});
