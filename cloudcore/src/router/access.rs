//! Who may send what to the router: a bearer token that the cluster knows, of somebody whom it lets create
//! `rules/messages` of `rules.kubeedge.io` with the name of the rule, in the rule's namespace.
//!
//! The cluster decides, by TokenReview and SubjectAccessReview; its word counts for [`WORD_LASTS`], so that a busy client
//! costs it two requests in that time and one that is shut out is out soon. Tokens are kept as digests only.
//!
//! [`super`] is the only caller.
//!
//! Source: Kubernetes 1.36, authentication/v1 TokenReview, authorization/v1 SubjectAccessReview.

use super::Id;
use http::{HeaderMap, StatusCode, header};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::{Api, PostParams};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long a word of the cluster counts.
const WORD_LASTS: Duration = Duration::from_secs(10);
/// Words that are kept; then all are forgotten and asked for again.
const WORDS_MAX: usize = 4_096;
/// Longest token that is looked at, in bytes.
const TOKEN_LEN_MAX: usize = 16 * 1024;
/// How long the cluster may take for an answer.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a request goes no further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Denied {
    #[error("a bearer token of the cluster is needed, in the header `Authorization`")]
    NoToken,
    #[error("the cluster does not know this token, or it has expired")]
    Unknown,
    #[error("`{user}` may not create `rules/messages` named `{rule}` in namespace `{namespace}`")]
    Forbidden { user: String, namespace: String, rule: String },
    #[error("the cluster could not be asked who this is")]
    Unavailable,
}

impl Denied {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NoToken | Self::Unknown => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

type Key = [u8; 32];

/// Asks the cluster, and remembers what it said.
pub(super) struct Access {
    client: kube::Client,
    words: Mutex<HashMap<Key, (Instant, Result<(), Denied>)>>,
}

impl Access {
    pub(super) fn new(client: kube::Client) -> Self {
        Self { client, words: Mutex::default() }
    }

    /// Whether whoever sent these headers may use a rule.
    ///
    /// # Errors
    ///
    /// [`Denied`].
    pub(super) async fn check(&self, headers: &HeaderMap, rule: &Id) -> Result<(), Denied> {
        let token = bearer(headers).ok_or(Denied::NoToken)?;
        let key = key(token, rule);
        {
            let words = self.words.lock().expect("never held over a panic");
            if let Some((_, word)) = words.get(&key).filter(|(at, _)| at.elapsed() < WORD_LASTS) {
                return word.clone();
            }
        }
        let asked = tokio::time::timeout(REVIEW_TIMEOUT, self.ask(token, rule)).await;
        let word = match asked {
            Ok(Ok(word)) => word,
            Ok(Err(error)) => {
                tracing::warn!(%error, "the cluster was not asked who sends to the router");
                return Err(Denied::Unavailable);
            }
            Err(_) => return Err(Denied::Unavailable),
        };
        let mut words = self.words.lock().expect("never held over a panic");
        if words.len() >= WORDS_MAX {
            words.clear();
        }
        words.insert(key, (Instant::now(), word.clone()));
        word
    }

    async fn ask(&self, token: &str, (namespace, name): &Id) -> kube::Result<Result<(), Denied>> {
        let spec = TokenReviewSpec { token: token.to_owned(), ..Default::default() };
        let review = TokenReview { spec, ..Default::default() };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let status = reviews.create(&PostParams::default(), &review).await?.status;
        let status = status.filter(|status| status.authenticated == Some(true));
        let Some(user) = status.and_then(|status| status.user) else {
            return Ok(Err(Denied::Unknown));
        };
        let resource = ResourceAttributes {
            group: Some("rules.kubeedge.io".into()),
            resource: Some("rules".into()),
            subresource: Some("messages".into()),
            verb: Some("create".into()),
            namespace: Some(namespace.clone()),
            name: Some(name.clone()),
            ..Default::default()
        };
        let spec = SubjectAccessReviewSpec {
            user: user.username.clone(),
            groups: user.groups,
            extra: user.extra,
            uid: user.uid,
            resource_attributes: Some(resource),
            ..Default::default()
        };
        let review = SubjectAccessReview { spec, ..Default::default() };
        let reviews: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let status = reviews.create(&PostParams::default(), &review).await?.status;
        Ok(match status.is_some_and(|status| status.allowed && status.denied != Some(true)) {
            true => Ok(()),
            false => Err(Denied::Forbidden {
                user: user.username.unwrap_or_default(),
                namespace: namespace.clone(),
                rule: name.clone(),
            }),
        })
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    let fits =
        scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= TOKEN_LEN_MAX;
    fits.then_some(token)
}

fn key(token: &str, (namespace, name): &Id) -> Key {
    let mut digest = Sha256::new();
    for part in [token, namespace, name] {
        digest.update(part.len().to_be_bytes());
        digest.update(part);
    }
    digest.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bearer_token_counts() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, text.parse().expect("a header"));
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(of("Bearer a.b.c").as_deref(), Some("a.b.c"));
        assert_eq!(of("bearer  x ").as_deref(), Some("x"));
        for bad in ["Bearer", "Bearer ", "Basic eDp5", "a.b.c"] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(of(&format!("Bearer {}", "x".repeat(TOKEN_LEN_MAX + 1))), None);
        assert_eq!(bearer(&HeaderMap::new()), None);
    }

    #[test]
    fn a_word_is_about_one_token_and_one_rule() {
        let id = |namespace: &str, name: &str| (namespace.to_owned(), name.to_owned());
        let keys = [
            key("t", &id("a", "b")),
            key("t", &id("ab", "")),
            key("t", &id("", "ab")),
            key("ta", &id("", "b")),
            key("u", &id("a", "b")),
        ];
        let all: std::collections::HashSet<Key> = keys.into_iter().collect();
        assert_eq!(all.len(), keys.len());
    }
}
