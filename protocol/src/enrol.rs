//! Join tokens, and the names in a node's certificate.
//!
//! A token is `hex(sha256(CA certificate, DER)) "." JWT`. The first part lets a new node check the CA that it fetched
//! over an unverified connection; the rest goes to the cloud as a bearer token. KubeEdge's JWT has the single claim
//! `exp`; ours adds the node's name and an id, which make it usable by one node, once. Both ends read both forms; only
//! CloudCore decides which ones it accepts.
//!
//! CloudCore and EdgeCore are the callers. Nothing here holds a key: the HMAC-SHA256 comes in as a function.
//!
//! Source: kubeedge/kubeedge, pkg/security/token/token.go and
//! cloud/pkg/cloudhub/servers/httpserver/certificate/certs.go; RFC 7515 and RFC 7519.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;

/// Path of the CA certificate (DER) on the enrolment listener.
pub const CA_PATH: &str = "/ca.crt";
/// Path of the certificate request on the enrolment listener: GET with the CSR (DER) as body.
pub const CERTIFICATE_PATH: &str = "/edge.crt";
/// Header with the node's name on a certificate request.
pub const NODE_NAME_HEADER: &str = "NodeName";
/// Header with a JSON array of Go's `ExtKeyUsage` numbers on a certificate request.
pub const KEY_USAGES_HEADER: &str = "ExtKeyUsages";
/// The largest certificate request, in bytes.
pub const REQUEST_LEN_MAX: usize = 1024 * 1024;
/// Organization of every node certificate.
pub const NODE_ORGANIZATION: &str = "system:nodes";

/// The longest JWT that is looked at, in bytes; ours have about 200.
const JWT_LEN_MAX: usize = 4096;

/// Common name of the certificate of `node`.
pub fn common_name(node: &str) -> String {
    format!("system:node:{node}")
}

/// The node named by a certificate's common name.
pub fn node_of_common_name(common_name: &str) -> Option<&str> {
    common_name.strip_prefix("system:node:").filter(|node| !node.is_empty())
}

/// Fingerprint of a CA certificate, as in the first part of a join token.
pub fn ca_hash(ca_der: &[u8]) -> String {
    Sha256::digest(ca_der).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a node needs to join: the fingerprint of the CA, and the bearer token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    ca_hash: String,
    jwt: String,
}

/// Why a text is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenFormatError {
    /// Not four parts.
    #[error("join token has {parts} parts separated by dots instead of 4")]
    Parts {
        /// How many there were.
        parts: usize,
    },
    /// The first part is not a SHA-256 in hex.
    #[error("join token does not begin with the sha256 of a CA certificate in lower-case hex")]
    Hash,
    /// A part of the JWT is not base64url.
    #[error("join token holds characters that are not base64url")]
    Characters,
}

impl JoinToken {
    /// Joins the fingerprint of `ca_der` with a JWT made by [`Claims::sign`].
    pub fn new(ca_der: &[u8], jwt: String) -> Self {
        Self { ca_hash: ca_hash(ca_der), jwt }
    }

    /// Whether `ca_der` is the CA that this token was made for.
    pub fn is_for_ca(&self, ca_der: &[u8]) -> bool {
        same(self.ca_hash.as_bytes(), ca_hash(ca_der).as_bytes())
    }

    /// Hex SHA-256 of the CA certificate.
    pub fn ca_hash(&self) -> &str {
        &self.ca_hash
    }

    /// The bearer token for the certificate request.
    pub fn jwt(&self) -> &str {
        &self.jwt
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.ca_hash, self.jwt)
    }
}

impl FromStr for JoinToken {
    type Err = TokenFormatError;

    fn from_str(text: &str) -> Result<Self, TokenFormatError> {
        let text = text.trim();
        let parts = text.split('.').count();
        let (hash, jwt) = match text.split_once('.') {
            Some(split) if parts == 4 => split,
            _ => return Err(TokenFormatError::Parts { parts }),
        };
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if hash.len() != 64 || !hash.bytes().all(hex) {
            return Err(TokenFormatError::Hash);
        }
        let url = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !jwt.bytes().all(url) {
            return Err(TokenFormatError::Characters);
        }
        Ok(Self { ca_hash: hash.into(), jwt: jwt.into() })
    }
}

/// The claims of a JWT.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Expiry, Unix seconds.
    pub exp: i64,
    /// The only node that may use the token; absent in a token made by KubeEdge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Identity of the token, under which its use is recorded; absent in a token made by KubeEdge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jti: Option<String>,
}

/// Why a bearer token does not hold.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JwtError {
    /// Over the bound on length.
    #[error("token of {len} bytes is over the bound of {JWT_LEN_MAX} bytes")]
    TooLong {
        /// Length in bytes.
        len: usize,
    },
    /// Not three parts; four parts are a whole join token.
    #[error("token contains an invalid number of segments: {segments} instead of 3")]
    Segments {
        /// How many there were.
        segments: usize,
    },
    /// A segment is not base64url.
    #[error("token is not base64url")]
    Encoding(#[source] base64::DecodeError),
    /// A segment is not the JSON that it should be.
    #[error("token does not hold the expected JSON")]
    Json(#[source] serde_json::Error),
    /// Another algorithm than HS256, `none` included.
    #[error("token algorithm `{algorithm}` is not `HS256`")]
    Algorithm {
        /// What the header says.
        algorithm: String,
    },
    /// Made with another key, or changed on the way.
    #[error("token signature is invalid")]
    Signature,
    /// Too old.
    #[error("token is expired by {age_s} s")]
    Expired {
        /// Seconds since the expiry.
        age_s: i64,
        /// What the token says otherwise; the signature was good.
        claims: Claims,
    },
}

#[derive(Serialize, Deserialize)]
struct JwtHeader {
    alg: String,
    #[serde(default)]
    typ: String,
}

impl Claims {
    /// Makes the JWT. `hmac` is HMAC-SHA256 under the key of the cluster (the raw DER of the CA's private key).
    pub fn sign(&self, hmac: impl Fn(&[u8]) -> [u8; 32]) -> String {
        let encode = |json: serde_json::Result<Vec<u8>>| {
            URL_SAFE_NO_PAD.encode(json.expect("claims have only string keys"))
        };
        let header = JwtHeader { alg: "HS256".into(), typ: "JWT".into() };
        let signed =
            format!("{}.{}", encode(serde_json::to_vec(&header)), encode(serde_json::to_vec(self)));
        let signature = URL_SAFE_NO_PAD.encode(hmac(signed.as_bytes()));
        format!("{signed}.{signature}")
    }

    /// Reads and checks a JWT at `now_s` (Unix seconds). The signature is compared before anything in the token is
    /// believed; only HS256 is accepted, where KubeEdge takes any HMAC.
    ///
    /// # Errors
    ///
    /// [`JwtError`] says which of the checks failed.
    pub fn verify(
        jwt: &str,
        now_s: i64,
        hmac: impl Fn(&[u8]) -> [u8; 32],
    ) -> Result<Self, JwtError> {
        if jwt.len() > JWT_LEN_MAX {
            return Err(JwtError::TooLong { len: jwt.len() });
        }
        let segments: Vec<_> = jwt.split('.').collect();
        let [header, claims, signature] = segments[..] else {
            return Err(JwtError::Segments { segments: segments.len() });
        };
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(JwtError::Encoding);
        let (header_json, claims_json, signature) =
            (decode(header)?, decode(claims)?, decode(signature)?);
        let header: JwtHeader = serde_json::from_slice(&header_json).map_err(JwtError::Json)?;
        if header.alg != "HS256" {
            return Err(JwtError::Algorithm { algorithm: header.alg });
        }
        let signed_len = jwt.rfind('.').expect("three segments were found");
        if !same(&hmac(&jwt.as_bytes()[..signed_len]), &signature) {
            return Err(JwtError::Signature);
        }
        let claims: Self = serde_json::from_slice(&claims_json).map_err(JwtError::Json)?;
        if claims.exp <= now_s {
            return Err(JwtError::Expired { age_s: now_s.saturating_sub(claims.exp), claims });
        }
        Ok(claims)
    }
}

/// Compares without stopping at the first difference, so that timing says nothing about a signature.
fn same(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len()
        && left.iter().zip(right).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Stands in for HMAC: keyed, and different for different input, which is all that these tests need.
    fn tag(key: u8) -> impl Fn(&[u8]) -> [u8; 32] {
        move |bytes| Sha256::digest([&[key], bytes].concat()).into()
    }

    fn claims() -> Claims {
        Claims { exp: 1000, node: Some("edge1".into()), jti: Some("t1".into()) }
    }

    #[test]
    fn join_token_is_hash_and_jwt() {
        let token = JoinToken::new(b"der", claims().sign(tag(1)));
        let read: JoinToken = format!(" {token}\n").parse().expect("our own token");
        assert_eq!(read, token);
        assert_eq!(read.ca_hash().len(), 64);
        assert!(read.is_for_ca(b"der") && !read.is_for_ca(b"other"));
        assert_eq!(Claims::verify(read.jwt(), 999, tag(1)).expect("valid"), claims());
    }

    #[test]
    fn texts_of_another_shape_are_refused_with_the_reason() {
        let check = |text: &str, expected: TokenFormatError| {
            assert_eq!(text.parse::<JoinToken>().expect_err(text), expected);
        };
        check("", TokenFormatError::Parts { parts: 1 });
        check("a.b.c", TokenFormatError::Parts { parts: 3 });
        check("xyz.b.c.d", TokenFormatError::Hash);
        check(&format!("{}.b.c.d", "A".repeat(64)), TokenFormatError::Hash);
        check(&format!("{}.b.c.d=", "a".repeat(64)), TokenFormatError::Characters);
    }

    #[test]
    fn jwt_of_kubeedge_has_exp_only() {
        let stock = Claims { node: None, jti: None, ..claims() };
        let jwt = stock.sign(tag(1));
        assert!(jwt.starts_with("eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9."));
        assert_eq!(Claims::verify(&jwt, 0, tag(1)).expect("valid"), stock);
    }

    #[test]
    fn wrong_key_expiry_algorithm_and_shape_are_told_apart() {
        let jwt = claims().sign(tag(1));
        let verify = |jwt: &str, now_s| Claims::verify(jwt, now_s, tag(1));
        assert!(matches!(Claims::verify(&jwt, 0, tag(2)), Err(JwtError::Signature)));
        assert!(matches!(verify(&jwt, 1060), Err(JwtError::Expired { age_s: 60, .. })));
        assert!(matches!(verify(&jwt, 1000), Err(JwtError::Expired { age_s: 0, .. })));
        let whole = JoinToken::new(b"der", jwt.clone()).to_string();
        assert!(matches!(verify(&whole, 0), Err(JwtError::Segments { segments: 4 })));
        let none = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
        let (_, rest) = jwt.split_once('.').expect("three segments");
        assert!(matches!(verify(&format!("{none}.{rest}"), 0), Err(JwtError::Algorithm { .. })));
        assert!(matches!(verify("a.b.!", 0), Err(JwtError::Encoding(_) | JwtError::Json(_))));
        assert!(matches!(verify(&"a".repeat(5000), 0), Err(JwtError::TooLong { len: 5000 })));
    }

    proptest! {
        #[test]
        fn a_changed_token_never_verifies(position in 0..200usize, byte in any::<u8>()) {
            let jwt = claims().sign(tag(1));
            let mut bytes = jwt.clone().into_bytes();
            let position = position % bytes.len();
            prop_assume!(bytes[position] != byte);
            bytes[position] = byte;
            if let Ok(changed) = String::from_utf8(bytes) {
                prop_assert!(Claims::verify(&changed, 0, tag(1)).is_err());
            }
        }

        #[test]
        fn any_text_is_refused_without_panic(text in "[ -~]{0,300}") {
            let _ = text.parse::<JoinToken>();
            prop_assert!(Claims::verify(&text, 0, tag(1)).is_err());
        }
    }
}
