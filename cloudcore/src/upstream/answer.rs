//! Why a request was not done, and the answers in KubeEdge's shapes.
//!
//! A failed read is answered with the operation `error` and a text: a KubeEdge edge would store an error body as if it
//! were the object. Where its edge reads `ObjectResp` or `ErrStatus`, it gets those.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/edgecontroller/controller/upstream.go; edge/pkg/metamanager/process.go.

use super::rest::{ANSWER_LEN_MAX, Done};
use skerry_cloudcore_core::upstream::answer::{ErrStatus, ObjectAnswer, Status, version};
use skerry_protocol::Message;

/// Module in whose name a cloud answers an edge's kubelet.
pub(crate) const SOURCE: &str = "edgecontroller";
/// Group of everything about objects.
pub(crate) const GROUP: &str = "resource";

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// The API said no; it goes to the node as it is.
    #[error("{}", .0.message)]
    Api(Box<Status>),
    /// The API did not answer.
    #[error("the Kubernetes API is not available: {0}")]
    Unavailable(kube::Error),
    /// The API took too long.
    #[error("the Kubernetes API did not answer in time")]
    Slow,
    /// The API answered something else.
    #[error("the answer of the Kubernetes API is not readable: {0}")]
    Unreadable(String),
    /// The API has more to say than is held here.
    #[error("the answer is over the bound of {ANSWER_LEN_MAX} bytes; ask for parts with `limit`")]
    TooLong,
    /// The hub's task has ended.
    #[error("cloudcore is stopping")]
    Stopping,
    /// The node asks for what is not its own.
    #[error("{0}")]
    Forbidden(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The API cannot do it yet.
    #[error("not yet: {0}")]
    Unready(String),
    /// There is nothing here that could do it.
    #[error("{0}")]
    Unsupported(String),
}

impl Refused {
    /// What Go calls an API status.
    pub(crate) fn to_status(&self) -> Status {
        match self {
            Self::Api(status) => (**status).clone(),
            Self::Unavailable(_) | Self::Unreadable(_) | Self::Stopping | Self::Unready(_) => {
                Status::new(503, "ServiceUnavailable", self.to_string())
            }
            Self::Slow => Status::new(504, "Timeout", self.to_string()),
            Self::TooLong => Status::new(413, "RequestEntityTooLarge", self.to_string()),
            Self::Forbidden(message) => Status::new(403, "Forbidden", message),
            Self::Invalid(message) => Status::new(400, "BadRequest", message),
            Self::Unsupported(message) => Status::new(405, "MethodNotAllowed", message),
        }
    }

    /// Whether the API said that there is no such object.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Api(status) if status.code == 404)
    }

    /// Whether the API said that the object is there already.
    pub(crate) fn is_already_exists(&self) -> bool {
        matches!(self, Self::Api(status) if status.reason == "AlreadyExists")
    }

    /// Whether the object, or a precondition on it, has changed meanwhile.
    pub(crate) fn is_conflict(&self) -> bool {
        matches!(self, Self::Api(status) if status.reason == "Conflict")
    }

    /// Whether the same request may succeed soon.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Api(status) => status.code == 429 || status.code >= 500,
            Self::Unavailable(_) | Self::Slow | Self::Unreadable(_) | Self::Unready(_) => true,
            _ => false,
        }
    }
}

/// The answer `{"Object": …, "Err": …}`.
pub(crate) fn object(request: &Message, done: &Done, with_version: bool) -> Message {
    match done {
        Ok(object) => {
            let answer = reply(request, &ObjectAnswer { object: Some(object), err: None });
            if with_version { answer.with_version(version(object)) } else { answer }
        }
        Err(refused) => {
            let err = Some(ErrStatus { status: refused.to_status() });
            reply(request, &ObjectAnswer { object: None, err })
        }
    }
}

/// The object itself with its version, or an error with a text.
pub(crate) fn read(request: &Message, done: &Done) -> Message {
    match done {
        Ok(object) => reply(request, object).with_version(version(object)),
        Err(refused) => failed(request, refused),
    }
}

/// `"OK"`, or an API error that our own edge and KubeEdge's kubelet can read.
pub(crate) fn ok(request: &Message, done: &Result<(), Refused>) -> Message {
    match done {
        Ok(()) => reply(request, "OK"),
        Err(refused) => reply(request, &ErrStatus { status: refused.to_status() }),
    }
}

/// A response in the name of the cloud's edge controller.
pub(crate) fn reply<T: serde::Serialize + ?Sized>(request: &Message, content: &T) -> Message {
    let mut answer = request.response(now_ms(), content);
    answer.route.source = SOURCE.into();
    answer.route.group = GROUP.into();
    answer
}

/// An `error` with a text. A Go edge hands it to its kubelet and stores nothing.
pub(crate) fn failed(request: &Message, refused: &Refused) -> Message {
    request.error(now_ms(), SOURCE, GROUP, &refused.to_string())
}

/// Unix time in milliseconds.
pub(crate) fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use skerry_protocol::Operation;

    fn request() -> Message {
        Message::new(0, "edged", "meta", Operation::Insert, "null/node/edge1", &())
    }

    #[test]
    fn answers_with_an_object_always_have_both_keys() {
        let done = Ok(json!({"metadata": {"resourceVersion": "7"}}));
        let answer = object(&request(), &done, true);
        assert_eq!(
            answer.content.get(),
            r#"{"Object":{"metadata":{"resourceVersion":"7"}},"Err":null}"#
        );
        assert_eq!(
            (answer.header.resourceversion.as_str(), answer.route.source.as_str()),
            ("7", SOURCE)
        );
        assert_eq!(object(&request(), &done, false).header.resourceversion, "");
        let refused = object(&request(), &Err(Refused::Forbidden("no".into())), true);
        assert_eq!(
            refused.content.get(),
            r#"{"Object":null,"Err":{"ErrStatus":{"metadata":{},"status":"Failure","message":"no","reason":"Forbidden","code":403}}}"#
        );
    }

    #[test]
    fn failures_are_never_an_empty_object() {
        let not_found = Status::new(404, "NotFound", "m");
        for refused in [
            Refused::Api(Box::new(not_found)),
            Refused::Unavailable(kube::Error::LinesCodecMaxLineLengthExceeded),
            Refused::Slow,
            Refused::TooLong,
            Refused::Unreadable("x".into()),
            Refused::Stopping,
            Refused::Invalid("x".into()),
            Refused::Unsupported("x".into()),
        ] {
            let answer = ok(&request(), &Err(refused));
            let body: Value = answer.content_as().expect("json");
            assert!(body["ErrStatus"]["code"].as_u64().is_some_and(|code| code >= 400), "{body}");
            assert!(!body["ErrStatus"]["reason"].as_str().unwrap_or_default().is_empty(), "{body}");
        }
    }
}
