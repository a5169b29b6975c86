//! What an edge node decides, without doing it: no sockets, files, threads or clock.
//!
//! The shell around it is `edge-os/src`, which owns one loop that feeds these machines and carries out what they ask
//! for. Tests feed them from seeded simulations and from a recorded session between KubeEdge's own peers.

pub mod applications;
pub mod backoff;
pub mod event;
pub mod history;
pub mod jobs;
pub mod lease;
pub mod logs;
pub mod meta;
pub mod node;
pub mod os;
pub mod outbox;
pub mod pods;
pub mod rules;
pub mod status;
pub mod twin;
pub mod uplink;

/// The instant of a call: one clock for intervals, one for what other machines read.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Never goes back; for timers.
    pub mono: std::time::Instant,
    /// May jump; for timestamps in messages.
    pub wall: jiff::Timestamp,
}

impl Now {
    /// Unix milliseconds, as message headers have it.
    pub fn unix_ms(&self) -> i64 {
        self.wall.as_millisecond()
    }
}
