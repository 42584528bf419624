//! Chat templates: the model's own Jinja template turns messages into the text that it was trained on.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};

use crate::error::{LlmError, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }

    /// A user's turn.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// The model's turn.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// Instructions ahead of the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }
}

/// The template used when a model carries none.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Steps that a template may take: real ones take a few dozen a message.
const MAX_STEPS: u64 = 2_000_000;
/// Bytes that a template may write.
const MAX_OUTPUT: usize = 64 << 20;

/// Renders `messages` with a Jinja template as Hugging Face tokenizers do: blocks trimmed, `bos_token` and `eos_token` given.
///
/// # Errors
/// A template that does not compile, that raises an exception for these messages, or that does not come to an end.
pub fn render(
    template: &str,
    messages: &[Message],
    add_generation_prompt: bool,
    bos_token: &str,
    eos_token: &str,
) -> Result<String> {
    let fail = |e: Error| LlmError::ChatTemplate { problem: one_line(&e) };
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(fail)?;
    env.set_syntax(syntax);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> std::result::Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    // Rendering must not depend on the day it runs; templates use the date only as decoration.
    env.add_function("strftime_now", |_format: String| String::from("01 Jan 2025"));
    // Templates come with untrusted files: loops within loops must not run or write without end.
    env.set_fuel(Some(MAX_STEPS));
    env.add_template("chat", template).map_err(fail)?;
    let messages: Vec<Value> = messages.iter().map(|m| context! { role => &m.role, content => &m.content }).collect();
    let chat = env.get_template("chat").map_err(fail)?;
    let mut out = Bounded(Vec::new());
    chat.render_captured_to(
        context! {
            messages => Value::from(messages),
            add_generation_prompt => add_generation_prompt,
            bos_token => bos_token,
            eos_token => eos_token,
        },
        &mut out,
    )
    .map_err(fail)?;
    String::from_utf8(out.0).map_err(|e| LlmError::ChatTemplate { problem: e.to_string() })
}

/// Takes what a template writes, up to [`MAX_OUTPUT`].
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > MAX_OUTPUT - self.0.len() {
            return Err(std::io::Error::other(format!("it writes more than {MAX_OUTPUT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An engine error with its causes on one line.
fn one_line(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_that_run_or_write_without_end_are_refused() {
        let problem = |template: &str| render(template, &[Message::user("x")], true, "", "").unwrap_err().to_string();
        let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(problem(loops).contains("fuel"), "{}", problem(loops));
        let writes = "{% for a in range(9999) %}{{ 'x' * 1000000 }}{% endfor %}";
        assert!(problem(writes).contains("writes more than"), "{}", problem(writes));
        let many = vec![Message::user("a question"); 10_000];
        assert!(render(CHATML, &many, true, "", "").unwrap().len() > 200_000);
    }
}
