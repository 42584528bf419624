//! Comparisons, quality tasks, benchmarks and reports.

#![warn(missing_docs)]

pub mod bench;
pub mod ceilings;
pub mod compare;
pub mod error;
pub mod eval;
pub mod facts;
pub mod files;
pub mod maps;
pub mod model_bench;
pub mod needle;
pub mod picture;
pub mod ppl;
pub mod report;
pub mod results;
pub mod roofline;
pub mod selectors;
#[cfg(test)]
mod testing;
pub mod verdict;

pub use error::{LabError, Result};
