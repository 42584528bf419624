//! One file a command.

pub mod apply;
pub mod bench;
pub mod compare;
pub mod docs;
pub mod doctor;
pub mod eval;
pub mod list;
pub mod picture;
pub mod plan;
pub mod pull;
pub mod run;
pub mod show;
pub mod train;
pub mod tune;

use crate::error::Result;
use serde::Serialize;
use std::io::Write;

/// One JSON value, indented, and a newline.
pub fn print_json(out: &mut dyn Write, value: &impl Serialize) -> Result {
    let text = serde_json::to_string_pretty(value).map_err(std::io::Error::from)?;
    writeln!(out, "{text}")?;
    Ok(())
}
