//! The mappers as programs: against an EdgeCore that remembers what it is told, and against devices
//! and brokers that are not ours (pymodbus, mosquitto).
//!
//! Each test has a directory of its own and ends what it started. Without the programs, which
//! `cargo xtask setup --tests` installs, a test says so and passes.

mod edgecore;
mod foreign;
mod modbus;
mod mqtt;
mod simulator;
