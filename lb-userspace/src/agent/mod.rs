//! The agent: changes in, map operations out.
//!
//! [`Agent`] is synchronous and knows no clock of its own; [`run`] gives it a life.

mod check;
mod core;
mod lifeline;
mod run;

pub use self::core::{Agent, Stats};
pub use self::run::{Config, SourceOptions, run};
