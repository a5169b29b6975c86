//! Who may join: the rules for join tokens, certificate requests and renewals.
//!
//! Wire texts and codes are KubeEdge's. The rules are stricter on purpose: KubeEdge's token is good for any name and any
//! number of times, and any of its certificates obtains another one with any subject. Here a token is for one node and
//! one key, and a certificate request must name the node that asks.
//!
//! "Once" means one key: the same token with the same key is accepted again until it expires, because the answer to the
//! first request may have been lost on the way. Another key is refused.
//!
//! The enrolment listener of `cloudcore/` is the caller; it keeps the records and checks signatures.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/servers/httpserver/certificate/certs.go.

use skerry_protocol::enrol::{
    Claims, JwtError, NODE_ORGANIZATION, common_name, node_of_common_name,
};

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
            | Self::Certificate { .. } => 401,
            Self::NoNodeName { .. } => 400,
            Self::Request { .. } | Self::Cluster { .. } => 500,
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
            | Self::Used { node, .. } => Some(create(node)),
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

/// What the cloud remembers of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRecord {
    /// The node for which it was made.
    pub node: String,
    /// Fingerprint of the key with which it was used, once it was.
    pub used_by: Option<String>,
}

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

/// The identity of a verified token that may be used by `node`; its record decides the rest.
///
/// # Errors
///
/// [`EnrolError::Unbound`] and [`EnrolError::ForeignNode`].
pub fn token_id<'a>(claims: &'a Claims, node: &str) -> Result<&'a str, EnrolError> {
    let (Some(token_node), Some(id)) = (&claims.node, &claims.jti) else {
        return Err(EnrolError::Unbound);
    };
    if token_node != node {
        return Err(EnrolError::ForeignNode { token_node: token_node.clone(), node: node.into() });
    }
    Ok(id)
}

/// Decides by the record of a token whether `node` may use it with the key of this fingerprint.
///
/// # Errors
///
/// [`EnrolError::Revoked`] without a record, [`EnrolError::ForeignNode`] and [`EnrolError::Used`].
pub fn admit(
    id: &str,
    record: Option<TokenRecord>,
    node: &str,
    key_fingerprint: &str,
) -> Result<Admission, EnrolError> {
    let Some(record) = record else {
        return Err(EnrolError::Revoked { id: id.into(), node: node.into() });
    };
    if record.node != node {
        return Err(EnrolError::ForeignNode { token_node: record.node, node: node.into() });
    }
    match &record.used_by {
        None => {
            let used_by = Some(key_fingerprint.into());
            Ok(Admission::Record(TokenRecord { used_by, ..record }))
        }
        Some(used_by) if used_by == key_fingerprint => Ok(Admission::Repeat),
        Some(_) => Err(EnrolError::Used { id: id.into(), node: node.into() }),
    }
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
        assert_eq!(token_id(&claims, "edge1").expect("its own"), "t");
        let error = token_id(&claims, "edge2").expect_err("another node");
        assert_eq!(
            error.body(),
            "token validation failure, err: token is for node `edge1`, not for node `edge2`\n\
             hint: run `skerry token create edge2` for a new token"
        );
        let stock = Claims { exp: 0, node: None, jti: None };
        assert!(matches!(token_id(&stock, "edge1"), Err(EnrolError::Unbound)));
    }

    #[test]
    fn token_is_for_one_key() {
        let fresh = TokenRecord { node: "edge1".into(), used_by: None };
        let used = TokenRecord { used_by: Some("key1".into()), ..fresh.clone() };
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
