//! `foveal pull`.

use crate::Context;
use crate::cli::{DEFAULT_MODEL, PullArgs};
use crate::error::{CliError, Result};
use crate::models;
use foveal::error::nearest_hint;
use foveal_llm::pull;
use std::io::Write;

pub fn run(a: &PullArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    let names = || pull::MODELS.iter().map(|m| m.name).chain([pull::TEXT.name]);
    let wanted: Vec<String> = match &a.name {
        None => vec![DEFAULT_MODEL.into(), pull::TEXT.name.into()],
        Some(n) => vec![n.to_ascii_lowercase()],
    };
    for name in wanted {
        let path = if name == pull::TEXT.name {
            models::default_text(false, ctx)?
        } else if names().any(|n| n == name) {
            models::model_path(&name, false, ctx)?
        } else {
            return Err(CliError::Arguments(format!(
                "nothing known as {name:?}{}; known: {}",
                nearest_hint(&name, names()),
                names().collect::<Vec<_>>().join(", ")
            )));
        };
        writeln!(out, "{}", path.display())?;
    }
    Ok(())
}
