//! EdgeCore: the agent of one edge node.
//!
//! `agent` is the one owner of the node's state: it turns what the link, the pod engine and the timers say into calls
//! of the machines in `skerry_edge_core`, and carries out what they answer. Everything else here is one kind of I/O.

pub mod adopt;
pub mod agent;
pub mod appliance;
pub mod bus;
pub mod config;
pub mod containerd;
pub mod cri;
pub mod dmi;
pub mod enrol;
mod heap;
mod history;
pub mod history_store;
pub mod jobs;
pub mod kubeedge;
pub mod link;
pub mod meta_store;
pub mod metaserver;
pub mod node;
pub mod objects;
pub mod os;
mod outbox_store;
pub mod pods;
pub mod preload;
pub mod qualification;
mod rules;
pub mod tls;
pub mod tunnel;
mod twin;
mod twin_store;
