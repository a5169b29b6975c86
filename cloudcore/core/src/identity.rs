//! What a node's certificate is good for: the rules for revoked, expired and denied certificates.
//!
//! The CA says who a certificate is for; this says whether that still counts. A certificate of the CA that has expired
//! proves one thing more than no certificate: that its holder has the key that was once admitted. With amnesty it is
//! good for its own renewal and for nothing else, so that a node may come back after any time offline.
//!
//! `cloudcore/` is the caller: `tls` fills [`Peer`] from a handshake, `gate` keeps the [`Record`]s. Nothing here reads
//! a clock; `now_s` is Unix time in seconds. The decision is described in docs/decisions/0006-identity.md.

use std::fmt;
use std::str::FromStr;

/// SHA-256 of a public key (SubjectPublicKeyInfo, DER) or of a CA certificate (DER).
pub type Fingerprint = [u8; 32];

/// Lower-case hex of a fingerprint.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The identity that a client proved in a TLS handshake, or proved once and now resumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The node named by the certificate.
    pub node: String,
    /// Serial number, lower-case hex.
    pub serial: String,
    /// Begin of its validity, Unix seconds.
    pub not_before_s: i64,
    /// End of its validity, Unix seconds.
    pub not_after_s: i64,
    /// Whether it had expired when it was shown.
    pub expired: bool,
    /// Of its public key.
    pub key_fingerprint: Fingerprint,
    /// Of the CA certificate that signed it.
    pub issuer: Fingerprint,
}

/// What an admitted peer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Everything that its node may do.
    Full,
    /// Renew its certificate, and then dial again.
    RenewOnly,
}

/// Why a peer is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// `skerry node revoke`.
    #[error("the certificate of node `{node}` was revoked")]
    Revoked {
        /// Whose.
        node: String,
    },
    /// Signed by a CA in which trust has ended, `skerry ca finish`.
    #[error("the certificate of node `{node}` is of a certificate authority that was replaced")]
    RetiredAuthority {
        /// Whose.
        node: String,
    },
    /// Expired, and no amnesty for this node.
    #[error(
        "the certificate of node `{node}` expired {age_s} s ago, and the node is denied amnesty"
    )]
    Denied {
        /// Whose.
        node: String,
        /// Seconds since it expired.
        age_s: i64,
    },
    /// Expired, and longer ago than amnesty reaches.
    #[error("the certificate of node `{node}` expired {age_s} s ago, and amnesty is `{amnesty}`")]
    Expired {
        /// Whose.
        node: String,
        /// Seconds since it expired.
        age_s: i64,
        /// The policy in force.
        amnesty: Amnesty,
    },
    /// Its first second is in the future, which amnesty would overlook.
    #[error("the certificate of node `{node}` is valid in {wait_s} s only, and amnesty is `never`")]
    NotYetValid {
        /// Whose.
        node: String,
        /// Seconds until it is valid.
        wait_s: i64,
    },
}

impl Refusal {
    /// What the operator can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Revoked { node } => format!(
                "run `skerry token create {node}` and give the node the new token, or `skerry node allow {node}`"
            ),
            Self::RetiredAuthority { node } => {
                format!("run `skerry token create {node}` and give the node the new token")
            }
            Self::Denied { node, .. } => format!(
                "run `skerry node allow {node}`, or `skerry token create {node}` and give the node the new token"
            ),
            Self::Expired { node, .. } => format!(
                "run `skerry token create {node}` and give the node the new token, or `skerry node amnesty unlimited`"
            ),
            Self::NotYetValid { .. } => {
                "check the clock of the machine on which cloudcore runs".into()
            }
        }
    }
}

/// For how long an expired certificate is good for its own renewal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Amnesty {
    /// Not at all.
    Never,
    /// This many seconds after it expired.
    For(i64),
    /// Always; the default, since a node that was offline for a year is the reason for this product.
    #[default]
    Unlimited,
}

/// Why a text is no [`Amnesty`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no amnesty: expected `never`, `unlimited`, or a number and s, m, h or d")]
pub struct AmnestyError(pub String);

impl FromStr for Amnesty {
    type Err = AmnestyError;

    fn from_str(text: &str) -> Result<Self, AmnestyError> {
        let bad = || AmnestyError(text.chars().take(100).collect());
        match text {
            "never" => return Ok(Self::Never),
            "unlimited" => return Ok(Self::Unlimited),
            _ => {}
        }
        let unit = match text.chars().last() {
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3600,
            Some('d') => 86_400,
            _ => return Err(bad()),
        };
        let count: u32 = text[..text.len() - 1].parse().map_err(|_| bad())?;
        Ok(Self::For(i64::from(count) * unit))
    }
}

impl fmt::Display for Amnesty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Unlimited => f.write_str("unlimited"),
            Self::For(seconds) if seconds % 86_400 == 0 => write!(f, "{}d", seconds / 86_400),
            Self::For(seconds) => write!(f, "{seconds}s"),
        }
    }
}

/// What the cloud remembers of a node's identity: its last certificate, and what its owner decided.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// Fingerprint of the last certificate's key, hex.
    pub key: Option<String>,
    /// Serial number of the last certificate, hex.
    pub serial: Option<String>,
    /// Its end, Unix seconds.
    pub not_after_s: Option<i64>,
    /// Fingerprint of the CA certificate that signed it, hex.
    pub issuer: Option<String>,
    /// Fingerprint of the trust bundle that the node has confirmed.
    pub bundle: Option<String>,
    /// Certificates that began before this time (Unix milliseconds) no longer count.
    pub revoked_before_ms: Option<i64>,
    /// Serial numbers that no longer count, hex: for a certificate from a machine whose clock was ahead.
    pub revoked_serials: Vec<String>,
    /// No amnesty for this node.
    pub denied: bool,
}

/// The most serial numbers kept per node; the oldest go first, which `revoked_before_ms` covers.
pub const REVOKED_SERIALS_MAX: usize = 32;

/// Decides what `peer` may do at `now_s`.
///
/// # Errors
///
/// [`Refusal`].
pub fn check(
    peer: &Peer,
    record: Option<&Record>,
    amnesty: Amnesty,
    now_s: i64,
) -> Result<Standing, Refusal> {
    let node = || peer.node.clone();
    if let Some(record) = record {
        let begin_ms = peer.not_before_s.saturating_mul(1000);
        let is_old = record.revoked_before_ms.is_some_and(|before_ms| begin_ms < before_ms);
        if is_old || record.revoked_serials.contains(&peer.serial) {
            return Err(Refusal::Revoked { node: node() });
        }
    }
    if peer.not_before_s > now_s && amnesty == Amnesty::Never {
        return Err(Refusal::NotYetValid { node: node(), wait_s: peer.not_before_s - now_s });
    }
    let age_s = now_s.saturating_sub(peer.not_after_s);
    if age_s <= 0 {
        return Ok(Standing::Full);
    }
    if record.is_some_and(|record| record.denied) {
        return Err(Refusal::Denied { node: node(), age_s });
    }
    match amnesty {
        Amnesty::Unlimited => Ok(Standing::RenewOnly),
        Amnesty::For(reach_s) if age_s <= reach_s => Ok(Standing::RenewOnly),
        Amnesty::Never | Amnesty::For(_) => Err(Refusal::Expired { node: node(), age_s, amnesty }),
    }
}

/// Whether a node may join with a token that was made at `token_created_ms` (Unix milliseconds); `None` for KubeEdge's shared token, which
/// does not say. A revoked node needs a token that was made after the revocation, or a batch token that lies around
/// would undo it.
///
/// # Errors
///
/// [`Refusal::Revoked`].
pub fn may_join(
    node: &str,
    record: Option<&Record>,
    token_created_ms: Option<i64>,
) -> Result<(), Refusal> {
    let Some(before_ms) = record.and_then(|record| record.revoked_before_ms) else { return Ok(()) };
    match token_created_ms {
        Some(created_ms) if created_ms >= before_ms => Ok(()),
        _ => Err(Refusal::Revoked { node: node.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn peer(not_before_s: i64, not_after_s: i64) -> Peer {
        Peer {
            node: "edge1".into(),
            serial: "0a".into(),
            not_before_s,
            not_after_s,
            expired: not_after_s < NOW,
            key_fingerprint: [1; 32],
            issuer: [2; 32],
        }
    }

    #[test]
    fn valid_certificate_has_full_standing_and_an_expired_one_may_renew() {
        let valid = peer(NOW - 10, NOW + 10);
        assert_eq!(check(&valid, None, Amnesty::Never, NOW), Ok(Standing::Full));
        let expired = peer(NOW - 100, NOW - 50);
        let check = |amnesty| check(&expired, None, amnesty, NOW);
        assert_eq!(check(Amnesty::Unlimited), Ok(Standing::RenewOnly));
        assert_eq!(check(Amnesty::For(50)), Ok(Standing::RenewOnly));
        let refused = check(Amnesty::For(49)).expect_err("too late");
        assert_eq!(
            refused.to_string(),
            "the certificate of node `edge1` expired 50 s ago, and amnesty is `49s`"
        );
        assert!(matches!(check(Amnesty::Never), Err(Refusal::Expired { age_s: 50, .. })));
    }

    #[test]
    fn denied_node_keeps_its_valid_certificate_and_gets_no_amnesty() {
        let record = Record { denied: true, ..Record::default() };
        let check = |peer: Peer| check(&peer, Some(&record), Amnesty::Unlimited, NOW);
        assert_eq!(check(peer(NOW - 10, NOW + 10)), Ok(Standing::Full));
        assert!(matches!(check(peer(NOW - 10, NOW - 5)), Err(Refusal::Denied { age_s: 5, .. })));
    }

    #[test]
    fn revocation_ends_certificates_of_before_and_not_those_of_after() {
        let record = Record {
            revoked_before_ms: Some(NOW * 1000),
            revoked_serials: vec!["0b".into()],
            ..Record::default()
        };
        let check = |peer: &Peer| check(peer, Some(&record), Amnesty::Unlimited, NOW + 5);
        assert!(matches!(check(&peer(NOW - 1, NOW + 100)), Err(Refusal::Revoked { .. })));
        // Expired as well: revoked counts first, so amnesty does not bring it back.
        assert!(matches!(check(&peer(NOW - 9, NOW - 1)), Err(Refusal::Revoked { .. })));
        assert_eq!(check(&peer(NOW, NOW + 100)), Ok(Standing::Full));
        let same_second = Peer { serial: "0b".into(), ..peer(NOW, NOW + 100) };
        assert!(matches!(check(&same_second), Err(Refusal::Revoked { .. })));
    }

    #[test]
    fn revoked_node_joins_only_with_a_token_made_after_the_revocation() {
        let record = Record { revoked_before_ms: Some(NOW), ..Record::default() };
        let join = |created_ms| may_join("edge1", Some(&record), created_ms);
        assert!(join(None).is_err());
        assert!(join(Some(NOW - 1)).is_err());
        assert_eq!(join(Some(NOW)), Ok(()));
        assert_eq!(may_join("edge1", None, None), Ok(()));
    }

    #[test]
    fn clock_of_the_hub_that_is_behind_locks_nobody_out_unless_amnesty_is_never() {
        let future = peer(NOW + 100, NOW + 200);
        assert_eq!(check(&future, None, Amnesty::Unlimited, NOW), Ok(Standing::Full));
        assert!(matches!(
            check(&future, None, Amnesty::Never, NOW),
            Err(Refusal::NotYetValid { wait_s: 100, .. })
        ));
    }

    #[test]
    fn amnesty_is_read_as_it_is_written() {
        for text in ["never", "unlimited", "90d", "45s"] {
            assert_eq!(text.parse::<Amnesty>().expect(text).to_string(), text);
        }
        for text in ["", "d", "-1d", "1y", "forever", "é", "99999999999d"] {
            assert!(text.parse::<Amnesty>().is_err(), "{text}");
        }
    }
}
