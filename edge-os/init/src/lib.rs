//! PID 1 of the appliance, and the formats that it shares with the builder of the image.
//!
//! Formats, pure: [`gpt`], [`verity`], [`modindex`], [`site`], and those of updates: [`manifest`], [`bundle`],
//! [`blocks`], [`trust`]. What is asked of the machine goes through
//! [`kernel::Kernel`]; [`linux`] is the machine itself. [`stage0`] runs from the initramfs, [`stage1`] from the verified
//! root; [`supervise`] decides who is started, stopped and started again, in a time that it is told; [`update`]
//! puts another version beside the running one.

pub mod blocks;
pub mod boot;
pub mod bundle;
pub mod clock;
pub mod cmdline;
pub mod cni;
pub mod confirm;
pub mod console;
pub mod control;
pub mod disk;
pub mod gpt;
pub mod kernel;
pub mod linux;
pub mod logring;
pub mod manifest;
pub mod mapper;
pub mod modindex;
pub mod modprobe;
pub mod modules;
pub mod mounts;
pub mod netlink;
pub mod network;
pub mod provision;
#[cfg(test)]
mod recorder;
pub mod service;
pub mod site;
pub mod stage0;
pub mod stage1;
pub mod state;
pub mod supervise;
pub mod trust;
pub mod uevent;
pub mod update;
pub mod verity;
