//! Nodes, pods and clients made of network namespaces, with agents on the nodes and real sockets.
#![forbid(unsafe_code)]

mod affinity;
mod agent;
mod captures;
mod cells;
mod edges;
mod fragments;
mod health;
mod hostports;
mod icmp;
mod lab;
mod masquerade;
mod matrix;
mod policies;
mod replacement;
mod sctp;
mod services;
mod source_ranges;
mod survive;
mod takeover;
mod tuples;
mod udp;
mod world;
