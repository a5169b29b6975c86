//! What a long step says while it runs. Builders call it; the command line decides how it looks.

/// Listener of a build. Called from the thread that builds, never more often than a few times a second.
pub trait Progress: Sync {
    /// A step begins, for example "unpacking `containerd`". Called for steps that may take over two seconds.
    fn step(&self, text: &str);

    /// How far the current step is, in the step's own unit (bytes or pieces). `total` is `None` when it is unknown.
    fn at(&self, done: u64, total: Option<u64>) {
        let _ = (done, total);
    }
}

/// Nobody listens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn step(&self, _text: &str) {}
}
