//! Passkey retrieval: several named passkeys hidden in one real text, asked for one by one.
//!
//! One haystack serves all trials of a system and length: it is read once, the session is forked
//! for each passkey and extended by the question and the beginning of the answer. A trial is
//! found when greedy decoding gives back every token of the passkey; feeding the true passkey and
//! comparing the argmax at each of its tokens is the same test in one call.
//!
//! The wording matters for small models. "The passkey is Alice 48213." puts the distinguishing
//! word right before the digits, where a small model's copying heads can use it: SmolLM2-135M
//! (4 bits) finds 9 or 10 of 10 so worded at 512 tokens, but 3 to 6 of "The passkey of Alice is
//! 48213.", mixing up first digits of its neighbours.

use crate::error::{LabError, Result};
use crate::results::{Needle, Trial};
use foveal_llm::chat::Message;
use foveal_llm::{Model, Session, Tokenizer};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const NAMES: [&str; 20] = [
    "Alice", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jacob", "Karen", "Louis", "Maria",
    "Nathan", "Olivia", "Peter", "Rachel", "Simon", "Teresa", "Victor",
];
const INTRO: &str = "Read the text below. It hides the passkeys of several people. Remember them.\n\n";
const DIGITS: usize = 5;
const HAY: &str = "HAYSTACK0GOES0HERE";
const ASK: &str = "QUESTION0GOES0HERE";
/// Tokens around an even spacing in which the end of a sentence is looked for.
const SEARCH: usize = 48;

/// What the prompt is made with; a trait so that tests need no vocabulary.
pub trait Words {
    /// Tokens of a text in which control tokens stand for themselves.
    ///
    /// # Errors
    /// The vocabulary cannot express it.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;
    /// Text of tokens.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    fn decode(&self, tokens: &[u32]) -> Result<String>;
    /// A user's message in the model's template, ready for the answer.
    ///
    /// # Errors
    /// The template refuses.
    fn chat(&self, user: &str) -> Result<String>;
}

impl Words for Tokenizer {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(Tokenizer::encode(self, text, false, true)?)
    }
    fn decode(&self, tokens: &[u32]) -> Result<String> {
        Ok(Tokenizer::decode(self, tokens, false)?)
    }
    fn chat(&self, user: &str) -> Result<String> {
        Ok(self.apply_chat(&[Message::user(user)], true)?)
    }
}

/// How many passkeys, and which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeedleOptions {
    /// Passkeys, at evenly spread depths; at most 20.
    pub trials: usize,
    /// Seed of names and digits.
    pub seed: u64,
}

impl Default for NeedleOptions {
    fn default() -> Self {
        Self { trials: 10, seed: 0 }
    }
}

/// A prompt full of text and passkeys, up to but without the question.
#[derive(Debug, Clone, PartialEq)]
pub struct Haystack {
    /// The chat up to the end of the text.
    pub prompt: Vec<u32>,
    /// Of each token of the prompt, whether it is the text's own (neither template nor passkey).
    pub text: Vec<bool>,
    /// One per passkey, shallowest first.
    pub questions: Vec<Question>,
}

/// The rest of the chat for one passkey.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// Whose passkey.
    pub name: String,
    /// The passkey.
    pub passkey: String,
    /// Share of the prompt's tokens that stand before it.
    pub depth: f64,
    /// Question, template and answer; the last `answer` tokens are the passkey's.
    pub tokens: Vec<u32>,
    /// Tokens of the passkey.
    pub answer: usize,
}

/// Make a haystack such that prompt and any question together are at most `length` tokens.
///
/// # Errors
/// More than 20 trials, a length too short to hold them, a text shorter than the length, a
/// template that changes the message.
pub fn haystack(words: &dyn Words, text: &[u32], length: usize, o: &NeedleOptions) -> Result<Haystack> {
    if o.trials == 0 || o.trials > NAMES.len() {
        return Err(LabError::Setting {
            name: "needle trials",
            value: o.trials.to_string(),
            remedy: format!("use 1 to {}", NAMES.len()),
        });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(o.seed);
    let mut names: Vec<&str> = NAMES.to_vec();
    names.shuffle(&mut rng);
    names.truncate(o.trials);
    let mut keys: Vec<String> = Vec::new();
    while keys.len() < o.trials {
        let k: String = (0..DIGITS).map(|_| char::from(b'0' + rng.random_range(0..10u8))).collect();
        if !keys.contains(&k) {
            keys.push(k);
        }
    }

    let chat = words.chat(&format!("{INTRO}{HAY}\n\n{ASK}"))?;
    let (before, rest) = chat.split_once(HAY).ok_or(LabError::Template)?;
    let (middle, after) = rest.split_once(ASK).ok_or(LabError::Template)?;
    if after.contains(HAY) || after.contains(ASK) {
        return Err(LabError::Template);
    }
    let mut questions = Vec::new();
    for (name, key) in names.iter().zip(&keys) {
        let asked = format!("What is the passkey that begins with {name}?{after}The passkey is {name} {key}");
        let tokens = words.encode(&asked)?;
        // The fewest last tokens that spell the passkey: how its first digit joins the space
        // before it depends on the vocabulary.
        let mut answer = 0;
        for n in 1..=tokens.len() {
            if words.decode(&tokens[tokens.len() - n..])?.trim() == key {
                answer = n;
                break;
            }
        }
        if answer == 0 || answer == tokens.len() {
            return Err(LabError::Template);
        }
        questions.push(Question { name: (*name).into(), passkey: key.clone(), depth: 0.0, tokens, answer });
    }

    let head = words.encode(before)?;
    let tail = words.encode(middle)?;
    let needles: Vec<Vec<u32>> = questions
        .iter()
        .map(|q| words.encode(&format!(" The passkey is {} {}.", q.name, q.passkey)))
        .collect::<Result<_>>()?;
    let longest = questions.iter().map(|q| q.tokens.len()).max().unwrap_or(0);
    let fixed = head.len() + tail.len() + needles.iter().map(Vec::len).sum::<usize>() + longest;
    // Less text than passkeys is no haystack.
    let Some(hay) = length.checked_sub(fixed).filter(|&h| h >= 8 * o.trials) else {
        return Err(LabError::Length {
            length,
            problem: format!("{} passkeys need at least {} tokens; use fewer trials", o.trials, fixed + 8 * o.trials),
        });
    };
    if text.len() < hay {
        return Err(LabError::TextTooShort {
            what: format!("a haystack of {length} tokens"),
            have: text.len(),
            need: hay,
        });
    }
    let text = &text[..hay];

    let mut own = vec![false; head.len()];
    let mut prompt = head;
    let mut from = 0;
    for (i, needle) in needles.iter().enumerate() {
        let want = ((i as f64 + 0.5) / o.trials as f64 * hay as f64) as usize;
        let at = sentence_end(words, text, want, from)?;
        prompt.extend_from_slice(&text[from..at]);
        own.resize(prompt.len(), true);
        questions[i].depth = prompt.len() as f64;
        prompt.extend_from_slice(needle);
        own.resize(prompt.len(), false);
        from = at;
    }
    prompt.extend_from_slice(&text[from..]);
    own.resize(prompt.len(), true);
    prompt.extend_from_slice(&tail);
    own.resize(prompt.len(), false);
    let all = prompt.len() as f64;
    questions.iter_mut().for_each(|q| q.depth /= all);
    Ok(Haystack { prompt, text: own, questions })
}

/// The place nearest to `want` (not before `from`) that follows the end of a sentence or line.
fn sentence_end(words: &dyn Words, text: &[u32], want: usize, from: usize) -> Result<usize> {
    for step in 0..SEARCH {
        for at in [want.checked_sub(step), want.checked_add(step)].into_iter().flatten() {
            if at > from && at <= text.len() {
                let token = words.decode(&text[at - 1..at])?;
                if token.trim_end_matches(['"', '\'', ')']).ends_with(['.', '!', '?', '\n', ';']) {
                    return Ok(at);
                }
            }
        }
    }
    Ok(want.max(from))
}

/// Ask for one passkey on a fork of `session`, which stands at the haystack's end.
///
/// # Errors
/// The engine refused.
pub fn ask(model: &Model, session: &Session, q: &Question) -> Result<Trial> {
    Ok(score(model, &ask_rows(session.fork(), q)?, q))
}

/// Final hidden rows that predict the passkey's tokens.
///
/// # Errors
/// The engine refused.
pub(crate) fn ask_rows(mut session: Session, q: &Question) -> Result<foveal_llm::Extended> {
    Ok(session.extend(&q.tokens[..q.tokens.len() - 1])?)
}

/// Compare the argmax at each passkey token with the truth.
pub(crate) fn score(model: &Model, e: &foveal_llm::Extended, q: &Question) -> Trial {
    let h = model.config().hidden_size;
    let rows = q.tokens.len() - 1;
    let logits = model.logits(&e.hidden[(rows - q.answer) * h..rows * h]);
    let truth = &q.tokens[q.tokens.len() - q.answer..];
    let right = logits
        .chunks_exact(model.config().vocab_size)
        .zip(truth)
        .filter(|(row, t)| argmax(row) == **t as usize)
        .count();
    Trial { name: q.name.clone(), depth: q.depth, hit: right == q.answer, right: right as f64 / q.answer as f64 }
}

fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold((0, f32::NEG_INFINITY), |m, (i, &x)| if x > m.1 { (i, x) } else { m }).0
}

/// All trials on a session that stands at the haystack's end.
///
/// # Errors
/// The engine refused.
pub fn run(model: &Model, session: &Session, hay: &Haystack) -> Result<Needle> {
    let trials = hay.questions.iter().map(|q| ask(model, session, q)).collect::<Result<_>>()?;
    Ok(Needle { trials, tokens: hay.prompt.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token a character.
    struct Chars;

    impl Words for Chars {
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            Ok(text.chars().map(u32::from).collect())
        }
        fn decode(&self, tokens: &[u32]) -> Result<String> {
            Ok(tokens.iter().filter_map(|&t| char::from_u32(t)).collect())
        }
        fn chat(&self, user: &str) -> Result<String> {
            Ok(format!("<user>{user}</user><assistant>"))
        }
    }

    fn text() -> Vec<u32> {
        "The river ran on. It was late in the year; nobody came. ".repeat(200).chars().map(u32::from).collect()
    }

    #[test]
    fn same_seed_same_prompt_another_seed_another() {
        let make = |seed| haystack(&Chars, &text(), 4000, &NeedleOptions { trials: 10, seed }).unwrap();
        assert_eq!(make(3), make(3));
        assert_ne!(make(3), make(4));
    }

    #[test]
    fn passkeys_lie_at_even_depths_after_sentences_and_all_fits() {
        let o = NeedleOptions::default();
        let h = haystack(&Chars, &text(), 4000, &o).unwrap();
        let prompt = Chars.decode(&h.prompt).unwrap();
        assert!(prompt.starts_with("<user>Read the text"), "{prompt}");
        assert!(prompt.ends_with("\n\n"));
        for (i, q) in h.questions.iter().enumerate() {
            assert!(h.prompt.len() + q.tokens.len() <= 4000);
            let needle = format!(" The passkey is {} {}.", q.name, q.passkey);
            assert_eq!(prompt.matches(&needle).count(), 1);
            let at = prompt.find(&needle).unwrap();
            assert!(matches!(prompt.as_bytes()[at - 1], b'.' | b';'), "{}", &prompt[at - 20..at]);
            assert!((at as f64 / prompt.len() as f64 - q.depth).abs() < 1e-12);
            assert!((q.depth - (i as f64 + 0.5) / 10.0).abs() < 0.05, "{i}: {}", q.depth);
            let start = prompt.find(&needle).unwrap();
            assert!(h.text[start - 1] && !h.text[start] && !h.text[start + needle.len() - 1]);
            assert!(h.text[start + needle.len()]);
            let asked = Chars.decode(&q.tokens).unwrap();
            assert!(asked.ends_with(&format!("</user><assistant>The passkey is {} {}", q.name, q.passkey)));
            assert_eq!(q.answer, 5);
        }
        let longest = h.questions.iter().map(|q| q.tokens.len()).max().unwrap();
        assert_eq!(h.prompt.len() + longest, 4000);
        // Template and passkeys taken away, the text is left.
        let own: Vec<u32> = h.prompt.iter().zip(&h.text).filter(|x| *x.1).map(|x| *x.0).collect();
        assert_eq!(own, text()[..own.len()]);
        assert!(own.len() > 3000);
    }

    #[test]
    fn impossible_requests_are_refused() {
        let o = NeedleOptions::default();
        assert!(matches!(haystack(&Chars, &text(), 300, &o), Err(LabError::Length { .. })));
        assert!(matches!(haystack(&Chars, &text()[..100], 4000, &o), Err(LabError::TextTooShort { .. })));
        let many = NeedleOptions { trials: 21, seed: 0 };
        assert!(matches!(haystack(&Chars, &text(), 4000, &many), Err(LabError::Setting { .. })));
        struct Shouting;
        impl Words for Shouting {
            fn encode(&self, t: &str) -> Result<Vec<u32>> {
                Chars.encode(t)
            }
            fn decode(&self, t: &[u32]) -> Result<String> {
                Chars.decode(t)
            }
            fn chat(&self, user: &str) -> Result<String> {
                Ok(user.to_lowercase())
            }
        }
        assert!(matches!(haystack(&Shouting, &text(), 4000, &o), Err(LabError::Template)));
    }
}
