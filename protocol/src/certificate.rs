//! Certificates renewed over the link, between peers that both announced [`crate::capability::RENEW`].
//!
//! The edge sends one `query` for [`request_resource`] with a [`CertificateRequest`]; the hub answers a `response` with
//! a [`CertificateReply`], or an `error` with a text. When the CAs in force change, the hub pushes an `update` of
//! [`bundle_resource`] with a [`Bundle`], acknowledged like any other push. CloudCore's identity service and EdgeCore's
//! enrolment are the callers; nothing here looks into a certificate.
//!
//! DER travels as padded base64, as everything does that KubeEdge sends as bytes in JSON.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// First segment of both resources.
pub const NAMESPACE: &str = "skerry";
/// The largest certificate signing request, in bytes; one with an RSA key of 4096 bits has about 1.7 KiB.
pub const REQUEST_LEN_MAX: usize = 8 * 1024;
/// The largest certificate, in bytes.
pub const CERTIFICATE_LEN_MAX: usize = 16 * 1024;
/// CA certificates in one bundle; a rotation has two in force.
pub const BUNDLE_MAX: usize = 16;

/// Body of the edge's request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRequest {
    /// The signing request.
    pub csr: RequestDer,
}

/// Body of the hub's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateReply {
    /// The node's new certificate.
    pub certificate: CertificateDer,
    /// Every CA in force; at most [`BUNDLE_MAX`].
    #[serde(deserialize_with = "bundle")]
    pub bundle: Vec<CertificateDer>,
}

/// Body of a push of the CAs in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// Every CA in force; at most [`BUNDLE_MAX`].
    #[serde(deserialize_with = "bundle")]
    pub bundle: Vec<CertificateDer>,
}

/// Up to `MAX` bytes of DER; base64 in JSON. Read from a peer it is within the bound, and nobody has looked into it.
#[derive(Clone, PartialEq, Eq)]
pub struct Der<const MAX: usize>(pub Vec<u8>);

/// DER of a signing request.
pub type RequestDer = Der<REQUEST_LEN_MAX>;
/// DER of a certificate.
pub type CertificateDer = Der<CERTIFICATE_LEN_MAX>;

/// Resource of the request of `node`, and of its answer.
pub fn request_resource(node: &str) -> String {
    format!("{NAMESPACE}/certificate/{node}")
}

/// Resource of the CAs in force, for `node`.
pub fn bundle_resource(node: &str) -> String {
    format!("{NAMESPACE}/bundle/{node}")
}

/// The node that a request, or its answer, is about; `None` for any other resource.
pub fn request_node(resource: &str) -> Option<&str> {
    node(resource, "certificate")
}

/// The node that a pushed bundle is for; `None` for any other resource.
pub fn bundle_node(resource: &str) -> Option<&str> {
    node(resource, "bundle")
}

fn node<'a>(resource: &'a str, kind: &str) -> Option<&'a str> {
    let rest = resource.strip_prefix(NAMESPACE)?.strip_prefix('/')?.strip_prefix(kind)?;
    rest.strip_prefix('/').filter(|node| !node.is_empty() && !node.contains('/'))
}

impl<const MAX: usize> Serialize for Der<MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(&self.0))
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for Der<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text<const MAX: usize>;
        impl<const MAX: usize> Visitor<'_> for Text<MAX> {
            type Value = Der<MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "base64 of at most {MAX} bytes")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Der<MAX>, E> {
                if text.len() > MAX.div_ceil(3) * 4 {
                    return Err(E::invalid_length(text.len() / 4 * 3, &self));
                }
                match BASE64.decode(text) {
                    Ok(bytes) if bytes.len() <= MAX => Ok(Der(bytes)),
                    Ok(bytes) => Err(E::invalid_length(bytes.len(), &self)),
                    Err(error) => Err(E::custom(error)),
                }
            }
        }
        deserializer.deserialize_str(Text)
    }
}

impl<const MAX: usize> fmt::Debug for Der<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Der({} bytes)", self.0.len())
    }
}

impl<const MAX: usize> From<Vec<u8>> for Der<MAX> {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl<const MAX: usize> AsRef<[u8]> for Der<MAX> {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn bundle<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<CertificateDer>, D::Error> {
    struct List;
    impl<'de> Visitor<'de> for List {
        type Value = Vec<CertificateDer>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {BUNDLE_MAX} certificates")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut found = Vec::new();
            while let Some(certificate) = list.next_element()? {
                if found.len() == BUNDLE_MAX {
                    return Err(A::Error::invalid_length(BUNDLE_MAX + 1, &self));
                }
                found.push(certificate);
            }
            Ok(found)
        }
    }
    deserializer.deserialize_seq(List)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn bodies_have_one_form() {
        let request = CertificateRequest { csr: Der(vec![1, 2, 3]) };
        assert_eq!(serde_json::to_value(&request).expect("json"), json!({"csr": "AQID"}));
        let reply = CertificateReply { certificate: Der(vec![1]), bundle: vec![Der(vec![2])] };
        let value = json!({"certificate": "AQ==", "bundle": ["Ag=="]});
        assert_eq!(serde_json::to_value(&reply).expect("json"), value);
        assert_eq!(serde_json::from_value::<CertificateReply>(value).expect("ours"), reply);
        let bundle: Bundle = serde_json::from_str(r#"{"bundle":[]}"#).expect("an empty bundle");
        assert_eq!(bundle, Bundle { bundle: Vec::new() });
    }

    #[test]
    fn oversized_and_malformed_bodies_are_refused() {
        let csr = |bytes: usize| json!({"csr": BASE64.encode(vec![0; bytes])});
        assert!(serde_json::from_value::<CertificateRequest>(csr(REQUEST_LEN_MAX)).is_ok());
        assert!(serde_json::from_value::<CertificateRequest>(csr(REQUEST_LEN_MAX + 1)).is_err());
        assert!(serde_json::from_value::<CertificateRequest>(csr(REQUEST_LEN_MAX + 9)).is_err());
        let list = |count: usize| json!({"bundle": vec!["AQ=="; count]});
        assert!(serde_json::from_value::<Bundle>(list(BUNDLE_MAX)).is_ok());
        assert!(serde_json::from_value::<Bundle>(list(BUNDLE_MAX + 1)).is_err());
        for body in
            [json!({"bundle": "AQ=="}), json!({"bundle": [1]}), json!({"bundle": ["A"]}), json!({})]
        {
            assert!(serde_json::from_value::<Bundle>(body.clone()).is_err(), "{body}");
        }
    }

    #[test]
    fn resources_name_the_node() {
        assert_eq!(request_resource("edge1"), "skerry/certificate/edge1");
        assert_eq!(request_node(&request_resource("edge1")), Some("edge1"));
        assert_eq!(bundle_node(&bundle_resource("edge1")), Some("edge1"));
        for other in [
            "skerry/certificate",
            "skerry/certificate/",
            "skerry/certificate/a/b",
            "skerry/bundle/a",
            "a/certificate/b",
            "",
        ] {
            assert_eq!(request_node(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn any_json_never_panics(text in "[\\[\\]{}\":,a-z=A0-9]{0,48}") {
            let _ = serde_json::from_str::<CertificateReply>(&text);
            let _ = serde_json::from_str::<CertificateRequest>(&text);
        }

        #[test]
        fn any_bytes_travel(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let request = CertificateRequest { csr: Der(bytes) };
            let text = serde_json::to_string(&request).expect("json");
            prop_assert_eq!(serde_json::from_str::<CertificateRequest>(&text).expect("ours"), request);
        }
    }
}
