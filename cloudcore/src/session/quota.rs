//! What one node may send in a time.

use skerry_cloudcore_core::admission::{Bucket, Rate};
use skerry_protocol::capability::Capabilities;
use std::time::Instant;

/// Messages of a KubeEdge edge. It sends at most 30 a second with a burst of 60 and a keepalive now and then, so an
/// honest one never gets here (`edgeHub.messageQPS` and `messageBurst`, which an operator may raise).
const MESSAGES_STOCK: Rate = Rate { per_s: 60, burst: 200 };
/// Messages of our own edge, beyond the acknowledgements of what it was sent.
const MESSAGES_OURS: Rate = Rate { per_s: 200, burst: 1000 };
/// Bytes of any node.
const BYTES: Rate = Rate { per_s: 1024 * 1024, burst: 8 * 1024 * 1024 };
/// What is no message, in pieces of [`JUNK_PIECE_LEN`].
const JUNK: Rate = Rate { per_s: 1, burst: 64 };
/// An unreadable message costs one, and one more for each of these.
const JUNK_PIECE_LEN: usize = 64 * 1024;

/// The buckets of one node.
#[derive(Debug)]
pub(super) struct Quota {
    messages: Bucket,
    bytes: Bucket,
    junk: Bucket,
}

impl Quota {
    pub(super) fn new(capabilities: Capabilities, now: Instant) -> Self {
        let stock = capabilities == Capabilities::default();
        let messages = if stock { MESSAGES_STOCK } else { MESSAGES_OURS };
        Self {
            messages: Bucket::new(messages, now),
            bytes: Bucket::new(BYTES, now),
            junk: Bucket::new(JUNK, now),
        }
    }

    /// Charges what came. Over the quota, it is the time before which no more should be read.
    pub(super) fn charge(
        &mut self,
        messages: usize,
        bytes: usize,
        now: Instant,
    ) -> Option<Instant> {
        self.messages.charge(messages, now);
        self.bytes.charge(bytes, now);
        let debt = self.messages.debt(now).max(self.bytes.debt(now));
        debt.map(|debt| now + debt)
    }

    /// Charges something of `len` bytes that is no message; false when that is too much.
    pub(super) fn junk(&mut self, len: usize, now: Instant) -> bool {
        self.junk.charge(1 + len / JUNK_PIECE_LEN, now);
        self.junk.debt(now).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn honest_kubeedge_edge_is_never_slowed() {
        let start = Instant::now();
        let mut quota = Quota::new(Capabilities::default(), start);
        for _ in 0..61 {
            assert_eq!(quota.charge(1, 2000, start), None);
        }
        for sent in 1..3000 {
            let at = start + Duration::from_secs(1) * sent / 30;
            assert_eq!(quota.charge(1, 2000, at), None, "message {sent}");
        }
    }

    #[test]
    fn megabyte_of_junk_a_second_is_soon_too_much_and_a_broken_message_now_and_then_is_not() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut quota = Quota::new(Capabilities::OURS, start);
        let megabyte = 1024 * 1024;
        let lasted = (0..100).take_while(|at| quota.junk(megabyte, start + second * *at)).count();
        assert!((1..10).contains(&lasted), "cut off after {lasted} MiB");
        let mut quota = Quota::new(Capabilities::OURS, start);
        assert!((0..1000).all(|at| quota.junk(200, start + second * at)));
    }
}
