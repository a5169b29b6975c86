//! A framework for mappers: programs that connect devices of one protocol to EdgeCore.
//!
//! An author implements [`Protocol`] (open a device) and [`Driver`] (read, write), and calls
//! [`main()`]; `docs/mappers.md` walks through it and `examples/counter.rs` is there to be copied. The
//! framework does the rest: registration with EdgeCore, again after EdgeCore was restarted; devices
//! and models with their settings; cycles of reading and reporting, batched per device and within
//! the calls that EdgeCore takes; desired values, written once and told back when the device took
//! them; states, retries, deadlines; health and metrics.
//!
//! | module | what it is |
//! |---|---|
//! | [`core`] | what to do and when; no I/O, no clock |
//! | [`driver`] | the traits, and the task that runs one driver |
//! | [`device`], [`settings`], [`value`] | what drivers are given and give back |
//! | [`config`] | the configuration file, as KubeEdge's mappers have it |
//!
//! Never here: anything of a protocol (that is `src/bin/`), and anything of the cloud.

#![warn(missing_docs)]

pub mod config;
pub mod core;
pub mod device;
pub mod driver;
mod edge;
mod metrics;
mod program;
mod runtime;
mod service;
pub mod settings;
pub mod value;

pub use config::Config;
pub use core::DriverError;
pub use device::{Device, DeviceId, Property};
pub use driver::{Driver, Protocol, Updates};
pub use program::main;
pub use runtime::{RunError, run};
pub use settings::{SettingError, Settings};
pub use value::{Kind, Value};
