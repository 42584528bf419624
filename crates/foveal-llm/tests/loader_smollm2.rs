//! The real SmolLM2 file, where this machine has it: set FOVEAL_TEST_GGUF, or run `foveal pull smollm2-135m-instruct` once.

mod common;

use std::path::PathBuf;

use foveal_llm::chat::Message;
use foveal_llm::{Checkpoint, pull};

fn smollm2() -> Option<PathBuf> {
    let path = std::env::var_os("FOVEAL_TEST_GGUF").map(PathBuf::from).or_else(|| pull::MODELS[0].path().ok())?;
    if path.is_file() {
        return Some(path);
    }
    eprintln!("skipped: no SmolLM2 file (set FOVEAL_TEST_GGUF)");
    None
}

#[test]
fn tokenizes_as_llama_cpp_does() {
    let Some(path) = smollm2() else { return };
    let c = Checkpoint::open(&path).unwrap();
    let t = c.tokenizer().unwrap();
    let golden: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(common::goldens().join("smollm2_ids.json")).unwrap()).unwrap();
    let wrong =
        common::compare_ids(&golden["texts"], &golden["cases"], |text, add, parse| t.encode(text, add, parse).unwrap());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for text in golden["texts"].as_array().unwrap() {
        let text = text.as_str().unwrap();
        let ids = t.encode(text, false, false).unwrap();
        assert_eq!(t.decode(&ids, false).unwrap(), text);
        let mut stream = t.stream(&[]);
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|p| !p.contains('\u{fffd}')));
    }
}

#[test]
fn loads_every_tensor_and_the_chat_template() {
    let Some(path) = smollm2() else { return };
    let start = std::time::Instant::now();
    let c = Checkpoint::open(&path).unwrap();
    let opened = start.elapsed();
    let mut weights = 0;
    for spec in c.config().tensor_shapes() {
        weights += c.tensor(&spec.name).unwrap().data.len();
    }
    eprintln!("open {opened:?}, all tensors {:?}, {}", start.elapsed(), c.describe());
    assert_eq!(weights, 134_515_008);
    assert_eq!(c.source_dtype("model.layers.0.self_attn.q_proj.weight"), "Q4_1");
    let t = c.tokenizer().unwrap();
    eprintln!("with tokenizer {:?}", start.elapsed());
    assert_eq!(t.eos_ids(), [0, 2]);
    let chat = t.apply_chat(&[Message::user("Hi")], true).unwrap();
    let expected = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(chat, expected);
    let ids = t.encode(&chat, false, true).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 3);
}
