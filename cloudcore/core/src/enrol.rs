//! Who may join: the rules for join tokens, certificate requests and renewals.
//!
//! Wire texts and codes are KubeEdge's. The rules are stricter on purpose: KubeEdge's token is good for any name and any
//! number of times, and any of its certificates obtains another one with any subject. Here a token is for one node and
//! one key, or for a bounded number of nodes whose names match a pattern, each with one key; and a certificate request
//! must name the node that asks. KubeEdge's shared token is taken only where the operator has switched it on.
//!
//! "Once" means one key: the same token with the same key is accepted again until it expires, because the answer to the
//! first request may have been lost on the way. Another key is refused.
//!
//! The enrolment listener of `cloudcore/` is the caller; it keeps the records and checks signatures.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/servers/httpserver/certificate/certs.go.

use crate::identity::Refusal;
use skerry_protocol::enrol::{
    Claims, JwtError, NODE_ORGANIZATION, common_name, node_of_common_name,
};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Why a node was not given a certificate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrolError {
    /// Neither a bearer token nor a client certificate.
    #[error("token validation failure, token is empty")]
    NoToken,
    /// The header is not `Bearer <token>`.
    #[error("token validation failure, token cannot be split")]
    NotBearer,
    /// The token does not hold.
    #[error("token validation failure, err: {source}")]
    Jwt {
        /// Which check failed.
        source: JwtError,
    },
    /// A token of KubeEdge's form, good for any node.
    #[error("token validation failure, err: token is not bound to a node")]
    Unbound,
    /// The token was made for another node.
    #[error(
        "token validation failure, err: token is for node `{token_node}`, not for node `{node}`"
    )]
    ForeignNode {
        /// The node in the token.
        token_node: String,
        /// The node that asks.
        node: String,
    },
    /// There is no record of this token: it was revoked, or its cluster was set up anew.
    #[error("token validation failure, err: token `{id}` for node `{node}` was revoked")]
    Revoked {
        /// Identity of the token.
        id: String,
        /// The node that asks.
        node: String,
    },
    /// The token has been used with another key.
    #[error("token validation failure, err: token `{id}` for node `{node}` has been used already")]
    Used {
        /// Identity of the token.
        id: String,
        /// The node that asks.
        node: String,
    },
    /// As many nodes as the token is good for have used it.
    #[error(
        "token validation failure, err: token `{id}` has been used by {uses} node(s), which is all it is good for"
    )]
    Exhausted {
        /// Identity of the token.
        id: String,
        /// The node that asks.
        node: String,
        /// How often it was used.
        uses: usize,
    },
    /// The token holds, but its owner keeps this node out.
    #[error("token validation failure, err: {refusal}")]
    Barred {
        /// The node that asks.
        node: String,
        /// Why.
        refusal: Refusal,
    },
    /// The client certificate is one of this node, and no longer counts.
    #[error("failed to verify the certificate for edgenode: {node}, err: {refusal}")]
    Refused {
        /// The node that asks.
        node: String,
        /// Why.
        refusal: Refusal,
    },
    /// The key in the certificate request is another node's.
    #[error("failed to sign certs for edgenode {node}, err: its key is that of node `{owner}`")]
    KeyOfAnother {
        /// The node that asks.
        node: String,
        /// Whose key it is.
        owner: String,
    },
    /// The header with the node's name is missing or is no name.
    #[error("failed to sign certs, err: header `NodeName` has no node name: `{value}`")]
    NoNodeName {
        /// What it has.
        value: String,
    },
    /// The client certificate is not one of this node.
    #[error("failed to verify the certificate for edgenode: {node}, err: {reason}")]
    Certificate {
        /// The node that asks.
        node: String,
        /// What is wrong.
        reason: String,
    },
    /// The certificate request is for somebody else.
    #[error("failed to sign certs for edgenode {node}, err: {reason}")]
    Request {
        /// The node that asks.
        node: String,
        /// What is wrong.
        reason: String,
    },
    /// The cluster is at fault, not the node.
    #[error("failed to sign certs for edgenode {node}, err: {reason}")]
    Cluster {
        /// The node that asks.
        node: String,
        /// What went wrong.
        reason: String,
    },
}

impl EnrolError {
    /// HTTP status of the answer.
    pub fn status(&self) -> u16 {
        match self {
            Self::NoToken
            | Self::NotBearer
            | Self::Jwt { .. }
            | Self::Unbound
            | Self::ForeignNode { .. }
            | Self::Revoked { .. }
            | Self::Used { .. }
            | Self::Exhausted { .. }
            | Self::Barred { .. }
            | Self::Refused { .. }
            | Self::Certificate { .. } => 401,
            Self::NoNodeName { .. } => 400,
            Self::Request { .. } | Self::KeyOfAnother { .. } | Self::Cluster { .. } => 500,
        }
    }

    /// Whether the same request may succeed later, with nothing changed by the caller.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Cluster { .. })
    }

    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        let create = |node: &str| format!("run `skerry token create {node}` for a new token");
        match self {
            Self::Jwt { source: JwtError::Expired { claims, .. } } => {
                claims.node.as_deref().map(create)
            }
            Self::Jwt { source: JwtError::Segments { segments: 4 } } => Some(
                "send the token without the CA hash, that is its part before the first dot".into(),
            ),
            Self::Jwt { source: JwtError::Signature } => {
                Some("the token was made by another cluster, or changed on the way".into())
            }
            Self::ForeignNode { node, .. }
            | Self::Revoked { node, .. }
            | Self::Used { node, .. }
            | Self::Exhausted { node, .. } => Some(create(node)),
            Self::Barred { refusal, .. } | Self::Refused { refusal, .. } => Some(refusal.hint()),
            Self::KeyOfAnother { .. } => {
                Some("the disk was copied from that node; remove the copied key, each node makes its own".into())
            }
            Self::Unbound | Self::NoToken => {
                Some("run `skerry token create <node>` for a token".into())
            }
            Self::Request { .. } => Some(
                "the request must have the subject `O=system:nodes, CN=system:node:<node name>`"
                    .into(),
            ),
            _ => None,
        }
    }

    /// The body of the answer: the error, and the hint on a line of its own.
    pub fn body(&self) -> String {
        match self.hint() {
            Some(hint) => format!("{self}\nhint: {hint}"),
            None => self.to_string(),
        }
    }
}

/// Names in a certificate or a certificate request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Subject {
    /// The only common name; `None` when there is none, or more than one.
    pub common_name: Option<String>,
    /// Organizations, in order.
    pub organizations: Vec<String>,
}

/// Which nodes a token is for: one name, or a pattern in which `*` stands for any characters a name can have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePattern(String);

/// Why a text is no [`NodePattern`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no node name, nor a pattern of one: lower-case letters, digits, `-`, `.` and `*`"
)]
pub struct NodePatternError(pub String);

impl NodePattern {
    /// The name, when it is for one node only.
    pub fn exact(&self) -> Option<&str> {
        (!self.0.contains('*')).then_some(self.0.as_str())
    }

    /// Whether the token is for `node`.
    pub fn matches(&self, node: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = node.strip_prefix(first) else { return false };
        let mut parts: Vec<&str> = parts.collect();
        let Some(last) = parts.pop() else { return rest.is_empty() };
        for part in parts {
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

impl FromStr for NodePattern {
    type Err = NodePatternError;

    fn from_str(text: &str) -> Result<Self, NodePatternError> {
        // A name when each star stands for one character.
        match node_name(Some(&text.replace('*', "a"))) {
            Ok(_) => Ok(Self(text.into())),
            Err(_) => Err(NodePatternError(text.chars().take(300).collect())),
        }
    }
}

impl fmt::Display for NodePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The most nodes that one token may admit; its record lists them all.
pub const USES_MAX: u32 = 1000;

/// What the cloud remembers of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRecord {
    /// The nodes for which it was made.
    pub nodes: NodePattern,
    /// How many different nodes it admits.
    pub uses_max: u32,
    /// Fingerprint of the key of each node that used it.
    pub used_by: BTreeMap<String, String>,
}

/// What a verified token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind<'a> {
    /// One of ours, with this id; its record decides.
    Recorded(&'a str),
    /// KubeEdge's shared token.
    Shared,
}

/// Kind and size of the key in a certificate request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// RSA.
    Rsa {
        /// Of the modulus.
        bits: usize,
    },
    /// On a NIST curve.
    Ec {
        /// Of the field.
        bits: usize,
    },
    /// Edwards curve.
    Ed25519,
    /// Anything else.
    Other,
}

/// The smallest and the largest RSA key that is certified. Verifying a larger one costs the hub more than it should.
pub const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// What an admitted token asks for before the certificate may be issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Store this record; only when that has succeeded the token counts as used, and the node is admitted.
    Record(TokenRecord),
    /// The same token with the same key as before.
    Repeat,
}

/// Reads the `NodeName` header.
///
/// # Errors
///
/// [`EnrolError::NoNodeName`] when it is no Kubernetes node name (a DNS subdomain of at most 253 characters).
pub fn node_name(header: Option<&str>) -> Result<&str, EnrolError> {
    let value = header.unwrap_or_default();
    let is_label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !label.is_empty()
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if value.len() > 253 || !value.split('.').all(is_label) {
        return Err(EnrolError::NoNodeName { value: value.chars().take(300).collect() });
    }
    Ok(value)
}

/// Reads the `Authorization` header.
///
/// # Errors
///
/// [`EnrolError::NoToken`] and [`EnrolError::NotBearer`].
pub fn bearer(authorization: Option<&str>) -> Result<&str, EnrolError> {
    let authorization = authorization.unwrap_or_default();
    if authorization.is_empty() {
        return Err(EnrolError::NoToken);
    }
    match authorization.split(' ').collect::<Vec<_>>()[..] {
        ["Bearer", token] if !token.is_empty() => Ok(token),
        _ => Err(EnrolError::NotBearer),
    }
}

/// What kind of token `node` shows, from its verified claims. `shared` says whether KubeEdge's is accepted.
///
/// # Errors
///
/// [`EnrolError::Unbound`] and [`EnrolError::ForeignNode`].
pub fn token_kind<'a>(
    claims: &'a Claims,
    node: &str,
    shared: bool,
) -> Result<TokenKind<'a>, EnrolError> {
    match (&claims.node, &claims.jti) {
        (Some(token_node), _) if token_node != node => {
            Err(EnrolError::ForeignNode { token_node: token_node.clone(), node: node.into() })
        }
        (_, Some(id)) => Ok(TokenKind::Recorded(id)),
        (None, None) if shared => Ok(TokenKind::Shared),
        _ => Err(EnrolError::Unbound),
    }
}

/// Decides by the record of a token whether `node` may use it with the key of this fingerprint.
///
/// # Errors
///
/// [`EnrolError::Revoked`] without a record, [`EnrolError::ForeignNode`], [`EnrolError::Used`] and
/// [`EnrolError::Exhausted`].
pub fn admit(
    id: &str,
    record: Option<TokenRecord>,
    node: &str,
    key_fingerprint: &str,
) -> Result<Admission, EnrolError> {
    let Some(mut record) = record else {
        return Err(EnrolError::Revoked { id: id.into(), node: node.into() });
    };
    if !record.nodes.matches(node) {
        let token_node = record.nodes.to_string();
        return Err(EnrolError::ForeignNode { token_node, node: node.into() });
    }
    match record.used_by.get(node) {
        Some(used_by) if used_by == key_fingerprint => Ok(Admission::Repeat),
        Some(_) => Err(EnrolError::Used { id: id.into(), node: node.into() }),
        None => {
            let uses = record.used_by.len();
            if uses >= record.uses_max.min(USES_MAX) as usize {
                return Err(EnrolError::Exhausted { id: id.into(), node: node.into(), uses });
            }
            record.used_by.insert(node.into(), key_fingerprint.into());
            Ok(Admission::Record(record))
        }
    }
}

/// Checks the key in a certificate request of `node`.
///
/// # Errors
///
/// [`EnrolError::Request`] says which keys are taken.
pub fn check_key_kind(kind: KeyKind, node: &str) -> Result<(), EnrolError> {
    let found = match kind {
        KeyKind::Ec { bits: 256 | 384 } | KeyKind::Ed25519 => return Ok(()),
        KeyKind::Rsa { bits } if RSA_BITS.contains(&bits) => return Ok(()),
        KeyKind::Rsa { bits } => format!("RSA with {bits} bits"),
        KeyKind::Ec { bits } => format!("on a curve of {bits} bits"),
        KeyKind::Other => "of an unknown kind".into(),
    };
    let reason = format!(
        "its key is {found}; taken are P-256, P-384, Ed25519, and RSA of 2048 to 8192 bits"
    );
    Err(EnrolError::Request { node: node.into(), reason })
}

/// Checks that a certificate request names `node`.
///
/// # Errors
///
/// [`EnrolError::Request`] says what it names instead.
pub fn check_request(subject: &Subject, node: &str) -> Result<(), EnrolError> {
    check_subject(subject, node).map_err(|reason| EnrolError::Request { node: node.into(), reason })
}

/// Checks that a verified client certificate, with which a renewal is asked for, is one of `node`.
///
/// # Errors
///
/// [`EnrolError::Certificate`] says what it is instead.
pub fn check_renewal(subject: &Subject, node: &str) -> Result<(), EnrolError> {
    check_subject(subject, node)
        .map_err(|reason| EnrolError::Certificate { node: node.into(), reason })
}

fn check_subject(subject: &Subject, node: &str) -> Result<(), String> {
    let wanted = common_name(node);
    match &subject.common_name {
        None => return Err("the subject needs exactly one common name".into()),
        Some(name) if *name != wanted => {
            return Err(match node_of_common_name(name) {
                Some(other) => format!("it is for node `{other}`"),
                None => format!("its common name is `{name}` instead of `{wanted}`"),
            });
        }
        Some(_) => {}
    }
    if subject.organizations != [NODE_ORGANIZATION] {
        let found = subject.organizations.join("`, `");
        return Err(format!("its organization is `{found}` instead of `{NODE_ORGANIZATION}`"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(name: &str, organization: &str) -> Subject {
        Subject { common_name: Some(name.into()), organizations: vec![organization.into()] }
    }

    #[test]
    fn bearer_texts_are_those_of_kubeedge() {
        let check = |header: Option<&str>, expected: &str| {
            let error = bearer(header).expect_err(expected);
            assert_eq!((error.to_string().as_str(), error.status()), (expected, 401));
        };
        check(None, "token validation failure, token is empty");
        check(Some(""), "token validation failure, token is empty");
        check(Some("abc"), "token validation failure, token cannot be split");
        check(Some("Bearer a b"), "token validation failure, token cannot be split");
        assert_eq!(bearer(Some("Bearer abc")).expect("good"), "abc");
    }

    #[test]
    fn token_is_for_one_node() {
        let claims = Claims { exp: 0, node: Some("edge1".into()), jti: Some("t".into()) };
        let kind = |claims, node, shared| token_kind(claims, node, shared);
        assert_eq!(kind(&claims, "edge1", false).expect("its own"), TokenKind::Recorded("t"));
        let error = kind(&claims, "edge2", true).expect_err("another node");
        assert_eq!(
            error.body(),
            "token validation failure, err: token is for node `edge1`, not for node `edge2`\n\
             hint: run `skerry token create edge2` for a new token"
        );
        let batch = Claims { node: None, ..claims.clone() };
        assert_eq!(kind(&batch, "edge2", false).expect("any"), TokenKind::Recorded("t"));
        let stock = Claims { exp: 0, node: None, jti: None };
        assert!(matches!(kind(&stock, "edge1", false), Err(EnrolError::Unbound)));
        assert_eq!(kind(&stock, "edge1", true).expect("switched on"), TokenKind::Shared);
        let half = Claims { jti: None, ..claims.clone() };
        assert!(matches!(kind(&half, "edge1", true), Err(EnrolError::Unbound)));
    }

    #[test]
    fn token_is_for_one_key() {
        let fresh = TokenRecord {
            nodes: "edge1".parse().expect("a name"),
            uses_max: 1,
            used_by: BTreeMap::new(),
        };
        let mut used = fresh.clone();
        used.used_by.insert("edge1".into(), "key1".into());
        let check =
            |record: Option<&TokenRecord>, key: &str| admit("t", record.cloned(), "edge1", key);
        assert_eq!(check(Some(&fresh), "key1").expect("fresh"), Admission::Record(used.clone()));
        assert_eq!(check(Some(&used), "key1").expect("again"), Admission::Repeat);
        assert!(matches!(check(Some(&used), "key2"), Err(EnrolError::Used { .. })));
        assert!(matches!(check(None, "key1"), Err(EnrolError::Revoked { .. })));
        assert!(matches!(
            admit("t", Some(fresh), "edge2", "k"),
            Err(EnrolError::ForeignNode { .. })
        ));
    }

    #[test]
    fn batch_token_admits_so_many_nodes_that_match() {
        let mut record = TokenRecord {
            nodes: "lisbon-*".parse().expect("a pattern"),
            uses_max: 2,
            used_by: BTreeMap::new(),
        };
        for (node, key) in [("lisbon-1", "k1"), ("lisbon-2", "k2")] {
            record = match admit("t", Some(record), node, key).expect("room") {
                Admission::Record(record) => record,
                Admission::Repeat => panic!("{node} is new"),
            };
        }
        let check = |node: &str, key: &str| admit("t", Some(record.clone()), node, key);
        assert_eq!(check("lisbon-1", "k1").expect("again"), Admission::Repeat);
        assert!(matches!(check("lisbon-1", "k9"), Err(EnrolError::Used { .. })));
        assert!(matches!(check("lisbon-3", "k3"), Err(EnrolError::Exhausted { uses: 2, .. })));
        assert!(matches!(check("porto-1", "k3"), Err(EnrolError::ForeignNode { .. })));
    }

    #[test]
    fn patterns_match_whole_names() {
        let check = |pattern: &str, node: &str, expected: bool| {
            let pattern: NodePattern = pattern.parse().expect(pattern);
            assert_eq!(pattern.matches(node), expected, "{pattern} {node}");
        };
        check("edge1", "edge1", true);
        check("edge1", "edge12", false);
        check("*", "anything", true);
        check("a*", "a", true);
        check("a*b*c", "a-b-b-c", true);
        check("a*b*c", "a-c-b", false);
        check("*-1", "lisbon-1", true);
        check("*-1", "lisbon-11", false);
        check("a*a", "a", false);
        for bad in ["", "Edge*", "a/*", "a..*", "-*"] {
            assert!(bad.parse::<NodePattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn weak_and_strange_keys_are_refused() {
        for good in [
            KeyKind::Ec { bits: 256 },
            KeyKind::Ec { bits: 384 },
            KeyKind::Ed25519,
            KeyKind::Rsa { bits: 2048 },
        ] {
            assert!(check_key_kind(good, "edge1").is_ok(), "{good:?}");
        }
        for bad in [
            KeyKind::Ec { bits: 224 },
            KeyKind::Ec { bits: 0 },
            KeyKind::Rsa { bits: 1024 },
            KeyKind::Rsa { bits: 16384 },
            KeyKind::Other,
        ] {
            assert_eq!(check_key_kind(bad, "edge1").expect_err("weak").status(), 500);
        }
    }

    #[test]
    fn request_and_renewal_must_name_the_node() {
        assert!(check_request(&subject("system:node:edge1", "system:nodes"), "edge1").is_ok());
        let check = |found: &Subject, expected: &str| {
            let request = check_request(found, "edge1").expect_err(expected);
            assert_eq!(
                request.to_string(),
                format!("failed to sign certs for edgenode edge1, err: {expected}")
            );
            let renewal = check_renewal(found, "edge1").expect_err(expected);
            assert_eq!(renewal.status(), 401);
        };
        check(&subject("system:node:edge2", "system:nodes"), "it is for node `edge2`");
        check(
            &subject("admin", "system:nodes"),
            "its common name is `admin` instead of `system:node:edge1`",
        );
        check(
            &subject("system:node:edge1", "system:masters"),
            "its organization is `system:masters` instead of `system:nodes`",
        );
        check(&Subject::default(), "the subject needs exactly one common name");
    }

    #[test]
    fn node_names_are_dns_subdomains() {
        for good in ["edge1", "a.b-c.d", "0"] {
            assert_eq!(node_name(Some(good)).expect(good), good);
        }
        let long = "a".repeat(254);
        for bad in ["", "Edge", "a/b", "a..b", "-a", "a-", "a b", long.as_str()] {
            assert!(node_name(Some(bad)).is_err(), "{bad}");
        }
        assert!(node_name(None).is_err());
    }
}
