//! Nodes, pods and clients made of network namespaces, with agents on the nodes and real sockets.
#![forbid(unsafe_code)]

mod agent;
mod edges;
mod hostports;
mod lab;
mod matrix;
mod world;
