//! What stands in the README and in `docs/`, against what it is about.
#![forbid(unsafe_code)]

mod generated;
mod links;
mod maps;
mod numbers;
