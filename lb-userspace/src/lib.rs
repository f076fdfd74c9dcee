//! Fairlead's node agent: sources, model, compile, reconcile, datapath.
#![deny(unsafe_code)]

pub mod agent;
pub mod bugreport;
pub mod check;
pub mod cli;
pub mod compile;
pub mod datapath;
pub mod drops;
pub mod edges;
pub mod entries;
pub mod events;
pub mod explain;
pub mod finding;
pub mod flows;
pub mod health;
pub mod inspect;
pub mod kept;
pub mod kube_proxy;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod nodeports;
pub mod owner;
pub mod reconcile;
pub mod report;
pub mod routing;
pub mod settings;
pub mod show;
pub mod source;
pub mod status;
pub mod sys;
pub mod table;
pub mod top;
pub mod trace;
