//! Boots appliances in QEMU, links them to a hub and watches them.
//!
//! A [`machine::Machine`] is one QEMU process with a console log, a monitor and disks of its own; every frame between
//! its network card and the world passes a [`link::Link`], which delays, loses, cuts and counts. A [`hub::Hub`] is a
//! `skerry up` without nodes. A [`scenario::Stage`] joins them and keeps the evidence, and [`report`] writes what was
//! seen. The scenarios and the `skerry-pilot` program are the callers.
//!
//! Everything is driven from outside through built programs and files, as a customer would; nothing of the product is
//! linked. The image is never changed: machines run on overlays or copies.
//!
//! Time is told twice: wall time, and CPU seconds of the QEMU process, which stay steady on a busy host.

pub mod console;
pub mod disk;
pub mod erofs;
pub mod firmware;
pub mod gpt;
pub mod hub;
pub mod image;
pub mod lab;
pub mod link;
pub mod machine;
pub mod ntp;
pub mod nvram;
mod plot;
pub mod qmp;
pub mod release;
pub mod report;
pub mod scenario;
pub mod uki;
pub mod writelog;
