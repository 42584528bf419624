//! Perplexity of the last quarter of a text given the rest.

use crate::error::{LabError, Result};
use foveal_llm::{Model, Prompt, Session};

/// Tokens appended to a cache at once. Every policy treats them as if they came one by one.
pub const PIECE: usize = 128;

/// Where the last quarter of `length` tokens begins.
///
/// # Errors
/// Fewer than 8 tokens.
pub fn split(length: usize) -> Result<usize> {
    if length < 8 {
        return Err(LabError::Length { length, problem: "perplexity needs at least 8 tokens".into() });
    }
    Ok(length - length / 4)
}

/// exp of the mean of negative log-likelihoods.
pub fn perplexity(nll: &[f64]) -> f64 {
    (nll.iter().sum::<f64>() / nll.len().max(1) as f64).exp()
}

/// −ln p of `tokens[from..]`, from a prompt of all of `tokens`, run with `LogitsFor::LastN(n + 1)` or
/// more, n the tokens from `from` on.
///
/// # Errors
/// Rows that the prompt did not keep.
pub fn of_prompt(model: &Model, prompt: &Prompt, tokens: &[u32], from: usize) -> Result<Vec<f64>> {
    let n = tokens.len() - from;
    let h = model.config().hidden_size;
    if prompt.hidden_rows < n + 1 {
        return Err(LabError::Setting {
            name: "hidden rows kept",
            value: prompt.hidden_rows.to_string(),
            remedy: format!("run the prompt with the last {} rows", n + 1),
        });
    }
    // Row t predicts token t + 1; the last row predicts a token that is not scored.
    let first = prompt.hidden_rows - n - 1;
    Ok(model.nll(&prompt.hidden[first * h..(first + n) * h], &tokens[from..]))
}

/// −ln p of `rest`, from a session that stands before it; `last_row` is the final hidden row of what
/// stands before.
///
/// # Errors
/// The engine refused.
pub fn of_session(
    model: &Model,
    session: &mut Session,
    last_row: &[f32],
    rest: &[u32],
    piece: usize,
) -> Result<Vec<f64>> {
    let mut nll = model.nll(last_row, &rest[..1]);
    let mut at = 0;
    while at + 1 < rest.len() {
        // The very last token only serves as a target.
        let n = piece.clamp(1, rest.len() - 1 - at);
        let e = session.extend(&rest[at..at + n])?;
        nll.extend(model.nll(&e.hidden, &rest[at + 1..at + n + 1]));
        at += n;
    }
    Ok(nll)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_quarter() {
        assert_eq!(split(8192).unwrap(), 6144);
        assert_eq!(split(513).unwrap(), 385);
        assert!(split(7).is_err());
    }

    #[test]
    fn perplexity_of_a_uniform_guess_is_the_number_of_choices() {
        assert!((perplexity(&[f64::ln(50.0); 7]) - 50.0).abs() < 1e-9);
        // e^((ln 2 + ln 8) / 2) = 4.
        assert!((perplexity(&[f64::ln(2.0), f64::ln(8.0)]) - 4.0).abs() < 1e-12);
    }
}
