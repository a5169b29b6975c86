//! What our own peers announce to each other: in the WebSocket opening handshake (header [`HEADER`], both directions),
//! and in the first frames of a QUIC connection ([`crate::frame::Hello`]).
//!
//! A stock KubeEdge peer sends no such header and ignores ours, so an absent header means "stock". Every capability is
//! optional and each stands alone: what is in force is what both ends announced ([`Capabilities::and`]). A value is a
//! list of names separated by commas; names that we do not know are ignored, so that a newer peer can say more.

use std::fmt;
use std::time::Duration;

/// The header that carries a comma-separated list of capability names, in both directions.
pub const HEADER: &str = "Skerry-Capabilities";

/// Resume by digest exchange (see [`crate::digest`]) instead of ObjectSync objects.
pub const DIGEST: &str = "digest";
/// Many messages may be unacknowledged; order holds per key only, and nothing is repeated after 5 s.
pub const WINDOW: &str = "window";
/// Several messages may come in one compressed frame (see [`crate::batch`]).
pub const BATCH: &str = "batch";
/// The hub renews the node's Lease while beats arrive; the edge sends no lease messages.
pub const LEASE: &str = "lease";
/// The hub answers every upstream message that has an effect, events included.
pub const RECEIPTS: &str = "receipts";
/// Certificates are renewed over the link (see [`crate::certificate`]).
pub const RENEW: &str = "renew";
/// The hub keeps what nodes say of their kernels (see [`crate::qualification`]).
pub const QUALIFY: &str = "qualify";
/// The edge answers questions about what devices were, over the stream tunnel.
pub const HISTORY: &str = "history";
/// `beat=<s>`: seconds between two beats of the edge.
pub const BEAT: &str = "beat";

/// The shortest interval between beats; a smaller value is read as this one. Beats that come faster cost more than
/// they tell.
pub const BEAT_MIN: Duration = Duration::from_secs(1);
/// The longest interval between beats; a larger value is read as this one. A peer is given up two beats after its last
/// byte, so this bounds how long a dead one is kept.
pub const BEAT_MAX: Duration = Duration::from_secs(600);
/// What a peer is given after its second missing beat.
pub const BEAT_GRACE: Duration = Duration::from_secs(5);

/// Names beyond this many are not looked at.
const NAMES_MAX: usize = 64;

/// What a peer can do beyond stock KubeEdge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Capabilities {
    /// The peer takes part in the digest exchange.
    pub digest: bool,
    /// The peer takes many unacknowledged messages in any order of keys.
    pub window: bool,
    /// The peer reads several messages in one compressed frame.
    pub batch: bool,
    /// The node's Lease is the hub's business.
    pub lease: bool,
    /// Every upstream message that has an effect is answered.
    pub receipts: bool,
    /// Certificates are renewed over the link.
    pub renew: bool,
    /// What a node says of its kernel is kept in the cluster.
    pub qualify: bool,
    /// What devices were can be asked for.
    pub history: bool,
    /// The edge's beats, in whole seconds between [`BEAT_MIN`] and [`BEAT_MAX`]. A beat is a WebSocket ping or a QUIC
    /// datagram and replaces KubeEdge's keepalive messages. A hub announces its own default here, which only says that
    /// it understands beats: the edge's value is in force.
    pub beat: Option<Duration>,
}

impl Capabilities {
    /// Everything that this version can do, without beats: the peer then gets KubeEdge's keepalive messages.
    pub const OURS: Self = Self {
        digest: true,
        window: true,
        batch: true,
        lease: true,
        receipts: true,
        renew: true,
        qualify: true,
        history: true,
        beat: None,
    };

    /// Everything that this version can do, with a beat every `beat`, cut to whole seconds within the bounds.
    pub fn ours(beat: Duration) -> Self {
        Self { beat: Some(bounded(beat.as_secs())), ..Self::OURS }
    }

    /// Reads the value of [`HEADER`]; unknown names are ignored, `None` is a stock peer. A beat out of bounds is moved
    /// into them, one that is no number is ignored.
    pub fn parse(header: Option<&str>) -> Self {
        let mut found = Self::default();
        for name in header.unwrap_or_default().split(',').take(NAMES_MAX) {
            match name.trim().split_once('=') {
                None => match name.trim() {
                    DIGEST => found.digest = true,
                    WINDOW => found.window = true,
                    BATCH => found.batch = true,
                    LEASE => found.lease = true,
                    RECEIPTS => found.receipts = true,
                    RENEW => found.renew = true,
                    QUALIFY => found.qualify = true,
                    HISTORY => found.history = true,
                    _ => {}
                },
                Some((BEAT, seconds)) => {
                    found.beat = seconds.parse().ok().map(bounded).or(found.beat);
                }
                Some(_) => {}
            }
        }
        found
    }

    /// What is in force between an edge that announced `self` and a hub that announced `hub`: what both can do.
    ///
    /// Only the beat has a value: when both announce one, it is the edge's, as the edge knows what its uplink costs.
    /// Both ends compute the same, whatever value the hub sends back.
    #[must_use]
    pub fn and(self, hub: Self) -> Self {
        Self {
            digest: self.digest && hub.digest,
            window: self.window && hub.window,
            batch: self.batch && hub.batch,
            lease: self.lease && hub.lease,
            receipts: self.receipts && hub.receipts,
            renew: self.renew && hub.renew,
            qualify: self.qualify && hub.qualify,
            history: self.history && hub.history,
            beat: self.beat.filter(|_| hub.beat.is_some()),
        }
    }

    /// How long after a peer's last byte it counts as gone: two beats and a grace. `None` without beats, where
    /// KubeEdge's own timeouts hold.
    pub fn silence_max(self) -> Option<Duration> {
        self.beat.map(|beat| beat * 2 + BEAT_GRACE)
    }
}

impl fmt::Display for Capabilities {
    /// The value of [`HEADER`]; empty for a stock peer, which sends no header.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (self.digest, DIGEST),
            (self.window, WINDOW),
            (self.batch, BATCH),
            (self.lease, LEASE),
            (self.receipts, RECEIPTS),
            (self.renew, RENEW),
            (self.qualify, QUALIFY),
            (self.history, HISTORY),
        ];
        let mut separator = "";
        for (_, name) in names.into_iter().filter(|(announced, _)| *announced) {
            write!(f, "{separator}{name}")?;
            separator = ",";
        }
        match self.beat {
            Some(beat) => write!(f, "{separator}{BEAT}={}", beat.as_secs()),
            None => Ok(()),
        }
    }
}

fn bounded(seconds: u64) -> Duration {
    Duration::from_secs(seconds).clamp(BEAT_MIN, BEAT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn unknown_capabilities_and_stock_peers_are_no_error() {
        assert_eq!(Capabilities::parse(None), Capabilities::default());
        let digest = Capabilities { digest: true, ..Capabilities::default() };
        assert_eq!(Capabilities::parse(Some("zstd, digest,level=9,, =")), digest);
        assert_eq!(Capabilities::default().to_string(), "");
    }

    #[test]
    fn announcement_has_one_form() {
        let text = "digest,window,batch,lease,receipts,renew,qualify,history,beat=60";
        assert_eq!(Capabilities::ours(MINUTE).to_string(), text);
        assert_eq!(Capabilities::parse(Some(text)), Capabilities::ours(MINUTE));
    }

    #[test]
    fn beat_of_the_edge_is_in_force_when_both_have_beats() {
        let edge = Capabilities::ours(MINUTE);
        let hub = Capabilities::ours(Duration::from_secs(20));
        assert_eq!(edge.and(hub).beat, Some(MINUTE));
        assert_eq!(edge.and(Capabilities::OURS).beat, None);
        assert_eq!(Capabilities::OURS.and(hub).beat, None);
        assert_eq!(edge.and(hub).silence_max(), Some(Duration::from_secs(125)));
        assert_eq!(edge.and(Capabilities::default()), Capabilities::default());
    }

    #[test]
    fn hostile_beats_are_moved_into_the_bounds_or_ignored() {
        let beat = |text: &str| Capabilities::parse(Some(text)).beat;
        assert_eq!(beat("beat=0"), Some(BEAT_MIN));
        assert_eq!(beat("beat=18446744073709551615"), Some(BEAT_MAX));
        for text in ["beat=", "beat", "beat=-1", "beat=1.5", "beat=18446744073709551616", "beat=x"]
        {
            assert_eq!(beat(text), None, "{text}");
        }
        let late = format!("{}digest", "x,".repeat(NAMES_MAX));
        assert!(!Capabilities::parse(Some(&late)).digest, "the list has an end");
    }

    proptest! {
        #[test]
        fn any_text_is_read_and_what_is_written_reads_the_same(text in "[ -~]{0,64}|([a-z]{4,6}(=[0-9]{0,3})?,){0,9}") {
            let read = Capabilities::parse(Some(&text));
            prop_assert_eq!(Capabilities::parse(Some(&read.to_string())), read);
        }
    }
}
