//! Nodes, pods and clients made of network namespaces, with agents on the nodes and real sockets.
#![forbid(unsafe_code)]

mod agent;
mod edges;
mod fragments;
mod health;
mod hostports;
mod icmp;
mod lab;
mod matrix;
mod sctp;
mod world;
