//! Nodes, pods and clients made of network namespaces, with agents on the nodes and real sockets.
#![forbid(unsafe_code)]

mod affinity;
mod agent;
mod captures;
mod cells;
mod check;
mod confined;
mod devices;
mod edges;
mod flows;
mod fragments;
mod health;
mod hostports;
mod icmp;
mod kube_proxy;
mod lab;
mod masquerade;
mod matrix;
mod policies;
mod repair;
mod replacement;
mod resize;
mod sctp;
mod services;
mod sharing;
mod source_ranges;
mod survive;
mod takeover;
mod trace;
mod tuples;
mod udp;
mod vlan;
mod world;
