"""Writes tokenizers.json: two small vocabularies trained here (byte-pair and score-based) and the ids that llama.cpp gives for varied
texts under every splitting rule, and smollm2_ids.json: its ids for the same texts with the SmolLM2 file given as argument.

    python goldens/make_tokenizers.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf
"""
import io
import json
import sys
import tempfile
from pathlib import Path

import sentencepiece as spm
from gguf import GGUFWriter
from llama_cpp import Llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
TEXTS = [
    "Hello, world!", " leading space", "trailing space ", "two  spaces   three", "", " ", "  ", "\n", "\n\n\n", "a\n", "a\n\nb\r\n\tc",
    "I'm you're THEY'LL we've He'd it's DON'T", "1234567890 3.14159 12 1,000,000 x2y3", "year 2025: 50% off — “now”!",
    "naïve café Ünïcödé ñ ß Æ", "Привет, мир! Как дела?", "日本語のテキスト。漢字とカナ", "한국어 텍스트", "مرحبا بالعالم", "हिन्दी में पाठ",
    "emoji 😀👍🏽👨‍👩‍👧‍👦 🇫🇷", "e\u0301 combining a\u0308", "zero\u200bwidth\u00a0nbsp\u3000wide",
    "fn main() {\n    let x = vec![1, 2, 3];\n    println!(\"{x:?}\"); // done\n}\n", "def f(a, b=None):\n\treturn a**2 + b[0:-1]\n",
    "https://example.org/path?q=1&r=%20#frag user@mail.net", "CamelCaseWords snake_case_words kebab-case", "!!!???...;;;:::",
    "$100 +5 =3 <tag> ^caret ~tilde |pipe `tick`", "½ ² ٣ Ⅳ ① numbers", "a" * 40, "In the beginning God created the heaven and the earth.",
    "<|im_start|>user\nHi<|im_end|>\n", "text <|im_end|> inside<|im_start|><|im_start|>", "<|im_start", "<s>bos</s> eos", "<tool> user defined<tool>x",
    "mixed\ttabs \t and   spaces\n  indented\n\n\n    more\n ", "ThisIsATest ABCdef abcDEF XMLHttpRequest", "٠١٢٣ 4567 ८९",
]
CORPUS = [t for t in TEXTS for _ in range(3)] + [
    "The quick brown fox jumps over the lazy dog and the cat sat on the mat with the rat in the hat.",
    "And God said, Let there be light: and there was light. And God saw the light, that it was good.",
    "for i in range(10): print(i) if i % 2 == 0 else None; return value; let mut count = 0; while count < 10 { count += 1; }",
] * 5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
RULES = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"]


def model_keys(w, vocab):
    """The least that llama.cpp asks of a file it opens for its vocabulary only."""
    w.add_context_length(64), w.add_embedding_length(8), w.add_block_count(1), w.add_feed_forward_length(8)
    w.add_head_count(1), w.add_layer_norm_rms_eps(1e-5), w.add_vocab_size(vocab)


def finish(w):
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


def ids(llama, text, add, parse):
    return llama.tokenize(text.encode(), add_bos=add, special=parse)


def cases(llama):
    return [[i, add, parse, ids(llama, t, add, parse)] for i, t in enumerate(TEXTS)
            for add, parse in ((False, False), (True, True))]


def open_vocab(path):
    return Llama(str(path), vocab_only=True, verbose=False)


out = {"texts": TEXTS}
with tempfile.TemporaryDirectory() as tmp:
    tmp = Path(tmp)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    saved = json.loads(bpe.to_str())["model"]
    tokens = sorted(saved["vocab"], key=saved["vocab"].get) + ["<tool>"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in saved["merges"]]
    types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 1) + [4]
    out["bpe"] = {"tokens": tokens, "merges": merges, "types": types, "rules": {}}
    for rule in RULES:
        path = tmp / f"{rule}.gguf"
        w = GGUFWriter(path, "llama")
        model_keys(w, len(tokens))
        w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre(rule), w.add_token_list(tokens), w.add_token_types(types)
        w.add_token_merges(merges), w.add_bos_token_id(1), w.add_eos_token_id(2)
        finish(w)
        out["bpe"]["rules"][rule] = cases(open_vocab(path))

    buffer = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter([t for t in CORPUS if t.strip()]), model_writer=buffer, vocab_size=520,
                                   model_type="bpe", byte_fallback=True, character_coverage=0.98, minloglevel=2, num_threads=1,
                                   normalization_rule_name="identity", remove_extra_whitespaces=False,
                                   user_defined_symbols=["<tool>"])
    sp = spm.SentencePieceProcessor(model_proto=buffer.getvalue())
    n = sp.vocab_size()
    tokens = [sp.id_to_piece(i) for i in range(n)]
    scores = [sp.get_score(i) for i in range(n)]
    types = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 4 if tokens[i] == "<tool>" else 1
             for i in range(n)]
    out["spm"] = {"tokens": tokens, "scores": scores, "types": types, "space_prefix": {}}
    for prefix in (True, False):
        path = tmp / f"spm{prefix}.gguf"
        w = GGUFWriter(path, "llama")
        model_keys(w, n)
        w.add_tokenizer_model("llama"), w.add_token_list(tokens), w.add_token_scores(scores), w.add_token_types(types)
        w.add_bos_token_id(1), w.add_eos_token_id(2), w.add_unk_token_id(0), w.add_add_space_prefix(prefix)
        finish(w)
        out["spm"]["space_prefix"][str(prefix).lower()] = cases(open_vocab(path))
(HERE / "tokenizers.json").write_text(json.dumps(out, ensure_ascii=True, separators=(",", ":")) + "\n")
real = {"texts": TEXTS, "cases": cases(open_vocab(sys.argv[1]))}
(HERE / "smollm2_ids.json").write_text(json.dumps(real, ensure_ascii=True, separators=(",", ":")) + "\n")
