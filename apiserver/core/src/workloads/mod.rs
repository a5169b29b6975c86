//! What the controllers of a bare API decide: scheduling, rollouts, jobs, node health, endpoints.
//!
//! Everything here is a pure function over objects as JSON: no I/O and no clock, time comes in as an argument, and a
//! decision is a value (steps, a status, when to look again). The controllers of the server fetch, call a planner
//! and execute its steps. Facts: the behaviour of the Kubernetes controllers as documented for each kind, and the
//! reasons and messages that `kubectl` looks for.

pub mod cron;
pub mod cron_job;
pub mod daemon_set;
pub mod deployment;
pub mod endpoints;
pub mod job;
pub mod node_health;
pub mod object;
pub mod pod_gc;
pub mod quantity;
pub mod replica_set;
pub mod schedule;
