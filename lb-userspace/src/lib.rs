//! Fairlead's node agent: sources, model, compile, reconcile, datapath.
#![deny(unsafe_code)]

pub mod datapath;
pub mod edges;
pub mod entries;
pub mod inspect;
pub mod sys;
