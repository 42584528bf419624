//! A comparison as tables, JSON, CSV and one self-contained page.

pub mod base64;
mod csv;
mod files;
mod html;
mod mass;
pub(crate) mod png;
mod roofline;
mod svg;
mod table;

pub use csv::csv;
pub use files::{Written, write_all};
pub use html::html;
pub use mass::mass;
pub use roofline::roofline;
pub(crate) use svg::esc as escape;
pub use table::{table, tables, verdicts};

use crate::error::{LabError, Result};
use crate::results::{Results, SCHEMA};

/// The report as JSON.
///
/// # Errors
/// Never in practice: every number of a [`Results`] is finite.
pub fn json(r: &Results) -> Result<String> {
    serde_json::to_string_pretty(r)
        .map(|s| s + "\n")
        .map_err(|e| LabError::Report { what: "the report".into(), problem: e.to_string() })
}

/// Read a JSON report back.
///
/// # Errors
/// A text that is no report, or one of another schema version.
pub fn parse_json(text: &str) -> Result<Results> {
    let bad = |problem: String| LabError::Report { what: "the JSON text".into(), problem };
    let v: serde_json::Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    match v.get("schema").and_then(serde_json::Value::as_u64) {
        Some(s) if s == u64::from(SCHEMA) => {}
        Some(s) => return Err(bad(format!("it has schema {s}, this build reads {SCHEMA}"))),
        None => return Err(bad("it has no field schema".into())),
    }
    serde_json::from_value(v).map_err(|e| bad(e.to_string()))
}

/// A number with about three significant digits, for people.
pub(crate) fn num(x: f64) -> String {
    let a = x.abs();
    if a == 0.0 {
        "0".into()
    } else if a >= 99.95 {
        format!("{x:.0}")
    } else if a >= 9.995 {
        format!("{x:.1}")
    } else if a >= 0.9995 {
        format!("{x:.2}")
    } else if a >= 0.09995 {
        format!("{x:.3}")
    } else if a >= 0.001 {
        format!("{x:.4}")
    } else {
        format!("{x:.0e}")
    }
}

/// A Markdown table with its columns set under each other, those from `figures` on to the right.
pub(crate) fn markdown(head: &[&str], rows: &[Vec<String>], figures: usize) -> String {
    let width: Vec<usize> = (0..head.len())
        .map(|i| rows.iter().map(|r| r[i].chars().count()).chain([head[i].chars().count()]).max().unwrap_or(0))
        .collect();
    let mut s = String::new();
    let mut line = |cells: Vec<&str>| {
        for (i, c) in cells.iter().enumerate() {
            let w = width[i];
            s += &if i < figures { format!("| {c:<w$} ") } else { format!("| {c:>w$} ") };
        }
        s += "|\n";
    };
    line(head.to_vec());
    let rules: Vec<String> = width
        .iter()
        .enumerate()
        .map(|(i, &w)| if i < figures { format!(":{}", "-".repeat(w - 1)) } else { format!("{}:", "-".repeat(w - 1)) })
        .collect();
    line(rules.iter().map(String::as_str).collect());
    rows.iter().for_each(|r| line(r.iter().map(String::as_str).collect()));
    s
}
