//! How the allocator gives memory back.
//!
//! glibc maps large blocks on their own and unmaps them when they are freed, but each one that is freed raises the size
//! from which it does so, up to 32 MiB. After a node's first message of 3 MiB the next ones come from the heaps of the
//! threads, which keep them: one node that sends nothing else cost the hub three messages of memory and not one.
//!
//! Source: mallopt(3), `M_MMAP_THRESHOLD`: a value that is set is not adjusted any more.

#![allow(unsafe_code)]

/// Blocks from this size on are mapped on their own, always: larger than any message of an ordinary node.
#[cfg(target_env = "gnu")]
const LARGE_LEN: nix::libc::c_int = 256 * 1024;

/// Keeps large blocks out of the heaps of this process from now on. Other C libraries than glibc do so anyway.
pub(crate) fn keep_large_blocks_apart() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers, may be called at any time, and reads nothing of ours.
    let done = unsafe { nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, LARGE_LEN) };
    #[cfg(target_env = "gnu")]
    if done != 1 {
        tracing::debug!("the allocator does not take a fixed threshold for large blocks");
    }
}
