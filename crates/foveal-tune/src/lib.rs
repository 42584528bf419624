//! Training: small models of any attention layer ([`model`]), the loop that fits them ([`trainer`]), and the tasks that
//! tell layers apart ([`tasks`]).
//!
//! Every run is a function of its configuration: parameters come from a seed and their names, batch n from the seed and
//! n, so that a run resumed from a checkpoint goes on to the same losses.

#![warn(missing_docs)]

pub mod baseline;
pub mod data;
pub mod error;
pub mod gates;
pub mod model;
pub mod optim;
pub mod tasks;
pub mod trainer;

pub use error::{Result, TuneError};
pub use model::{Net, NetConfig};
pub use trainer::{Report, TrainConfig, train};
