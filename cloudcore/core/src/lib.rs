//! CloudCore's decisions: what each node should have, and who may join.
//!
//! [`downstream::Downstream`] turns what the Kubernetes API says and what nodes say into messages for nodes;
//! [`objectsync`] is what it remembers in the cluster about nodes of KubeEdge.
//! [`jobs`] says which node is told its share of a job, [`router`] where data of applications goes;
//! [`enrol`] has the rules for join tokens and certificate requests, [`identity`] those for certificates. The shell (`cloudcore/`) is the caller. Nothing
//! here opens a socket, asks an API or looks at a clock.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod admission;
pub mod applications;
pub mod downstream;
pub mod enrol;
pub mod identity;
pub mod jobs;
pub mod leases;
pub mod objectsync;
pub mod references;
pub mod router;
pub mod upstream;
