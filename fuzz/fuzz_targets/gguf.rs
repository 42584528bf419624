//! A whole GGUF file: header, every tensor, configuration, tokenizer, chat template, model. Run with `cargo fuzz run gguf`.
#![no_main]

use foveal_llm::chat::Message;
use foveal_llm::gguf::Gguf;
use foveal_llm::{Checkpoint, LoadOptions, Model, Plan, PrefillOptions};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(g) = Gguf::from_bytes(data) else { return };
    for info in g.header().tensors() {
        let _ = g.dequantize(info, None);
    }
    let Ok(checkpoint) = Checkpoint::from_gguf(g) else { return };
    let _ = checkpoint.describe();
    for name in checkpoint.tensor_names() {
        let _ = checkpoint.tensor(&name);
        let _ = checkpoint.qtensor(&name);
    }
    if let Ok(tokenizer) = checkpoint.tokenizer() {
        if let Ok(ids) = tokenizer.encode("A text, 12 <s> ü\n", true, true) {
            let _ = tokenizer.decode(&ids, false);
        }
        let _ = tokenizer.apply_chat(&[Message::user("A question?")], true);
    }
    if let Ok(model) = Model::load(&checkpoint, &LoadOptions::default()) {
        let _ = model.prefill(&[0; 3], &Plan::dense(), &PrefillOptions::default());
    }
});
