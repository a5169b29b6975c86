//! Simulation and fuzzing of the link. The simulation joins the real cores of both ends over seeded links, disks and clocks.
//!
//! [`sim::run`] runs one world from one seed, in one thread and in virtual time. Everything that decides is the code of
//! `protocol`, `cloudcore/core` and `edge-os/core`; what they stand on (sockets, SQLite, the Kubernetes API, containers)
//! is modelled here, with the faults that the real ones have. The same seed gives the same world, event by event.
//!
//! `tests/` and `cargo xtask sim` are the callers; nothing of this is in a product.

pub mod fuzz;
pub mod sim;
