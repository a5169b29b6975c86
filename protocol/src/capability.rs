//! What our own peers announce to each other in the WebSocket opening handshake.
//!
//! A stock KubeEdge peer sends no such header and ignores ours, so an absent header means "stock".

/// The header that carries a comma-separated list of capability names, in both directions.
pub const HEADER: &str = "Skerry-Capabilities";

/// Resume by digest exchange (see [`crate::digest`]) instead of ObjectSync objects.
pub const DIGEST: &str = "digest";

/// What a peer can do beyond stock KubeEdge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The peer takes part in the digest exchange.
    pub digest: bool,
}

impl Capabilities {
    /// Everything that this version can do.
    pub const OURS: Self = Self { digest: true };

    /// Reads the value of [`HEADER`]; unknown names are ignored, `None` is a stock peer.
    pub fn parse(header: Option<&str>) -> Self {
        let mut found = Self::default();
        for name in header.unwrap_or_default().split(',') {
            if name.trim() == DIGEST {
                found.digest = true;
            }
        }
        found
    }

    /// What both ends can do.
    pub fn and(self, other: Self) -> Self {
        Self { digest: self.digest && other.digest }
    }
}

impl std::fmt::Display for Capabilities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.digest { DIGEST } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_capabilities_and_stock_peers_are_no_error() {
        assert_eq!(Capabilities::parse(None), Capabilities::default());
        assert_eq!(Capabilities::parse(Some("zstd, digest")), Capabilities::OURS);
        assert_eq!(Capabilities::parse(Some(&Capabilities::OURS.to_string())), Capabilities::OURS);
    }
}
