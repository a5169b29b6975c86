//! The appliance image: from Debian packages and our own programs to a disk that boots.
//!
//! Everything here is planned, then written. Gathering ([`packages`], [`deb`], [`modules`]) reads packages into a
//! cache that is addressed by digest; [`root::plan`] decides, without touching a disk, which path of the image gets
//! which content; writing ([`erofs`], and the modules of the disk) turns the planned trees into bytes. The same
//! inputs give the same bytes: paths are sorted, every time stamp is the build's epoch, every identifier is derived.
//! Nothing needs root or a loop device, and no maintainer script ever runs.
//!
//! The way of a build, each arrow one public function:
//!
//! ```text
//! Catalogue (packages.toml), Lock (packages.lock)
//!   │ root::gather(&request, &catalogue, &lock, &cache, &source, progress)   fetch, verify, unpack, read modules
//!   ▼
//! root::Inputs ── root::plan(&request, &catalogue, &inputs) ──► root::Plan { root, initramfs: Tree, boot, … }
//!   │ erofs::write(&plan.root, out, level, epoch, &inputs.tools, &cache, progress)   the root, no verity yet
//!   │ sbom::document(&plan, &request)                                                SPDX 2.3 JSON
//!   ▼ verity, initramfs, UKI, FAT, GPT, manifest, bundle
//! ```
//!
//! `packages::lock(…)` moves the lock file forward and is never called by a build.

pub mod build;
pub mod cpio;
mod crates;
pub mod deb;
pub mod disk;
pub mod elf;
pub mod erofs;
pub mod fat;
pub mod modules;
pub mod oci;
pub mod packages;
pub mod progress;
pub mod publish;
pub mod root;
pub mod sbom;
pub mod sign;
pub mod tree;
pub mod uki;
pub mod verity_file;

// Shared with PID 1, which reads what is written here.
pub use skerry_init::{blocks, bundle, manifest, trust};
