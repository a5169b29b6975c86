//! Tokens of service accounts: JSON Web Tokens that this server signs and recognises.
//!
//! [`ServiceTokens`] holds the key (`pki/sa.key`) and knows the shape of the claims; [`crate::handlers`] decides for
//! whom a token is made, [`crate::api`] whether the account and the object it is bound to still exist. Nothing here is
//! stored: a token is as good as its signature, its times and the objects that it names.
//!
//! Source: Kubernetes 1.36, "Managing Service Accounts" and the claims that its own server writes; RFC 7515, RFC 7518.

use crate::pki::{PkiError, write_private};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::KeyPair;
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, UnparsedPublicKey,
};
use serde_json::{Value, json};
use std::path::Path;

/// Who signs, as in a cluster made with kubeadm; also the audience of tokens that ask for none.
pub(crate) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// Clocks of other machines may differ from ours by this much, in seconds.
const LEEWAY_S: i64 = 60;
/// Bytes of the longest token that is looked at.
const TOKEN_LEN_MAX: usize = 16 << 10;

/// Signs and verifies.
pub(crate) struct ServiceTokens {
    key: EcdsaKeyPair,
    /// The point, uncompressed: `04`, x, y.
    public: Vec<u8>,
    key_id: String,
}

/// What a valid token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claims {
    pub(crate) audiences: Vec<String>,
    pub(crate) namespace: String,
    /// Name and uid of the service account.
    pub(crate) account: (String, String),
    /// Resource (`pods`, `secrets`, `nodes`), name and uid of the object whose end is the token's end too.
    pub(crate) bound: Option<(&'static str, String, String)>,
    /// Name and uid of the node that a bound pod runs on.
    pub(crate) node: Option<(String, String)>,
    /// Seconds since 1970.
    pub(crate) issued_s: i64,
    /// Seconds since 1970.
    pub(crate) expires_s: i64,
}

impl ServiceTokens {
    /// Loads the key from `dir`, or makes it.
    pub(crate) fn open(dir: &Path) -> Result<Self, PkiError> {
        let path = dir.join("sa.key");
        let damaged = |detail: String| PkiError::Damaged { path: path.clone(), detail };
        if !path.exists() {
            let made = KeyPair::generate();
            let made = made.map_err(|source| PkiError::Make { name: "sa.key".into(), source })?;
            write_private(&path, &made.serialize_pem())?;
        }
        let pem = std::fs::read_to_string(&path);
        let pem = pem.map_err(|source| PkiError::Io { path: path.clone(), source })?;
        let pair = KeyPair::from_pem(&pem).map_err(|error| damaged(error.to_string()))?;
        let key = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P256_SHA256_FIXED_SIGNING,
            pair.serialized_der(),
            &SystemRandom::new(),
        )
        .map_err(|error| damaged(error.to_string()))?;
        let public = pair.public_key_raw().to_vec();
        let key_id = URL_SAFE_NO_PAD.encode(digest(&SHA256, &public));
        Ok(Self { key, public, key_id })
    }

    /// The token that says `claims`.
    pub(crate) fn sign(&self, claims: &Claims) -> Option<String> {
        let header = json!({"alg": "ES256", "kid": self.key_id});
        let body = claims.to_value().to_string();
        let text = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(body)
        );
        let signature = self.key.sign(&SystemRandom::new(), text.as_bytes()).ok()?;
        Some(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// The claims of `token` if it is ours and in force at `now_s`.
    pub(crate) fn verify(&self, token: &str, now_s: i64) -> Option<Claims> {
        if token.len() > TOKEN_LEN_MAX {
            return None;
        }
        let (text, signature) = token.rsplit_once('.')?;
        let (header, body) = text.split_once('.')?;
        let header: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).ok()?).ok()?;
        if header["alg"] != "ES256" {
            return None;
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.public)
            .verify(text.as_bytes(), &URL_SAFE_NO_PAD.decode(signature).ok()?)
            .ok()?;
        let body: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(body).ok()?).ok()?;
        let claims = Claims::of(&body)?;
        let in_force = now_s < claims.expires_s + LEEWAY_S && now_s + LEEWAY_S >= claims.issued_s;
        (body["iss"] == ISSUER && in_force).then_some(claims)
    }

    /// The public key as a JSON Web Key Set, for those who verify tokens by themselves.
    pub(crate) fn key_set(&self) -> Value {
        let half = |range: std::ops::Range<usize>| {
            URL_SAFE_NO_PAD.encode(self.public.get(range).unwrap_or_default())
        };
        json!({"keys": [{
            "use": "sig", "kty": "EC", "kid": self.key_id, "crv": "P-256", "alg": "ES256",
            "x": half(1..33), "y": half(33..65),
        }]})
    }
}

impl Claims {
    fn to_value(&self) -> Value {
        let reference = |(name, uid): &(String, String)| json!({"name": name, "uid": uid});
        let mut own = json!({
            "namespace": self.namespace, "serviceaccount": reference(&self.account),
        });
        if let Some((resource, name, uid)) = &self.bound {
            own[singular(resource)] = json!({"name": name, "uid": uid});
        }
        if let Some(node) = &self.node {
            own["node"] = reference(node);
        }
        json!({
            "iss": ISSUER, "aud": self.audiences,
            "sub": subject(&self.namespace, &self.account.0),
            "iat": self.issued_s, "nbf": self.issued_s, "exp": self.expires_s,
            "jti": uuid::Uuid::new_v4().to_string(),
            "kubernetes.io": own,
        })
    }

    fn of(body: &Value) -> Option<Self> {
        let own = &body["kubernetes.io"];
        let reference = |value: &Value| {
            Some((value["name"].as_str()?.to_owned(), value["uid"].as_str()?.to_owned()))
        };
        let node = reference(&own["node"]);
        let bound = ["pods", "secrets", "nodes"].into_iter().find_map(|resource| {
            let (name, uid) = reference(&own[singular(resource)])?;
            Some((resource, name, uid))
        });
        let audiences = body["aud"].as_array()?.iter();
        Some(Self {
            audiences: audiences.filter_map(|one| one.as_str().map(str::to_owned)).collect(),
            namespace: own["namespace"].as_str()?.to_owned(),
            account: reference(&own["serviceaccount"])?,
            node: node.filter(|_| bound.as_ref().is_some_and(|(resource, ..)| *resource == "pods")),
            bound,
            issued_s: body["iat"].as_i64()?,
            expires_s: body["exp"].as_i64()?,
        })
    }
}

/// Name under which a service account acts.
pub(crate) fn subject(namespace: &str, account: &str) -> String {
    format!("system:serviceaccount:{namespace}:{account}")
}

fn singular(resource: &str) -> &str {
    resource.trim_end_matches('s')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims() -> Claims {
        Claims {
            audiences: vec![ISSUER.into()],
            namespace: "default".into(),
            account: ("default".into(), "u1".into()),
            bound: Some(("pods", "p".into(), "u2".into())),
            node: Some(("n".into(), "u3".into())),
            issued_s: 1_000_000,
            expires_s: 1_003_600,
        }
    }

    #[test]
    fn token_is_known_after_a_restart_until_it_expires() {
        let dir = tempfile::tempdir().unwrap();
        let token = ServiceTokens::open(dir.path()).unwrap().sign(&claims()).unwrap();
        let again = ServiceTokens::open(dir.path()).unwrap();
        assert_eq!(again.verify(&token, 1_000_001), Some(claims()));
        assert_eq!(again.verify(&token, 1_003_600 + LEEWAY_S), None);
        assert_eq!(again.verify(&token, 1_000_000 - LEEWAY_S - 1), None);
    }

    #[test]
    fn changed_and_foreign_tokens_are_not_known() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let ours = ServiceTokens::open(here.path()).unwrap();
        let foreign = ServiceTokens::open(there.path()).unwrap().sign(&claims()).unwrap();
        assert_eq!(ours.verify(&foreign, 1_000_001), None);
        let token = ours.sign(&claims()).unwrap();
        let (head, rest) = token.split_once('.').unwrap();
        let (_, signature) = rest.split_once('.').unwrap();
        let other = URL_SAFE_NO_PAD.encode(
            Claims { account: ("admin".into(), "u9".into()), ..claims() }.to_value().to_string(),
        );
        for text in ["", "a", "a.b", "a.b.c", "...", &format!("{head}.{other}.{signature}")] {
            assert_eq!(ours.verify(text, 1_000_001), None, "{text}");
        }
        let none = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
        assert_eq!(ours.verify(&format!("{none}.{rest}"), 1_000_001), None);
    }
}
