//! Can this box carry this network? Checks of kernels and hosts as data, probes that prove them, verdicts per profile.
//!
//! Called by `skerry qualify`, by the appliance at the first boot of a kernel, and by the fleet's gate over stored reports. Depends on no
//! other room. [`judge`] is pure; [`probe`] is the only part that touches the running kernel.
//!
//! Facts: Linux' uapi headers and Kconfig files, and the requirement pages of the projects named in profiles.toml.

pub mod command;
pub mod expr;
pub mod judge;
pub mod kconfig;
pub mod live;
pub mod modules;
pub mod probe;
pub mod publish;
pub mod report;
pub mod sign;
pub mod table;
