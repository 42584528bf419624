//! A whole GGUF file: header, every tensor, configuration, tokenizer. Run with `cargo fuzz run gguf`.
#![no_main]

use foveal_llm::Checkpoint;
use foveal_llm::gguf::Gguf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(g) = Gguf::from_bytes(data) else { return };
    for info in g.header().tensors() {
        let _ = g.dequantize(info, None);
    }
    let Ok(checkpoint) = Checkpoint::from_gguf(g) else { return };
    if let Ok(tokenizer) = checkpoint.tokenizer()
        && let Ok(ids) = tokenizer.encode("A text, 12 <s> ü\n", true, true)
    {
        let _ = tokenizer.decode(&ids, false);
    }
});
