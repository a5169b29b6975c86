//! How the allocator gives memory back.
//!
//! glibc keeps what was freed below a block that is still in use, in a heap per thread. An agent that has made one large
//! answer would be as large for ever.
//!
//! Source: malloc_trim(3).

#![allow(unsafe_code)]

/// Gives free memory of this process back to the system. Takes some milliseconds. Other C libraries than glibc do so by
/// themselves.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number, may be called at any time and by any thread, and reads nothing of ours.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
