//! One message of the link: a JSON document with `header`, `route` and `content`.
//!
//! Encoding follows kubeedge/kubeedge, staging/src/github.com/kubeedge/beehive/pkg/core/model/message.go: the field
//! order, and which fields are left out when empty. `content` stays raw JSON until somebody names a payload type, so
//! that an object passes through without losing a field that we do not know.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

/// Identifier of a message: a version 4 UUID in text form from our peers, any text from others.
pub type MessageId = String;

/// Raw JSON of a message body.
pub type Content = Box<RawValue>;

/// The largest message that we accept, in bytes (16 MiB).
///
/// KubeEdge has no bound on WebSocket; an object is at most about 3 MiB in a Kubernetes API, so this leaves room and
/// keeps a broken or hostile peer from filling the memory of the other end.
pub const MESSAGE_LEN_MAX: usize = 16 * 1024 * 1024;

/// A message, as sent in one WebSocket message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Message {
    /// Identity, parent, time and version.
    pub header: Header,
    /// Sender, group, operation and resource.
    pub route: Route,
    /// Body; JSON `null` when absent.
    #[serde(default = "null")]
    pub content: Content,
}

/// `header` of a [`Message`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Unique per message.
    #[serde(default)]
    pub msg_id: MessageId,
    /// `msg_id` of the message that this one answers; empty when it answers none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub parent_msg_id: MessageId,
    /// Creation time, Unix milliseconds.
    #[serde(default)]
    pub timestamp: i64,
    /// `metadata.resourceVersion` of the object in `content`, on object pushes and most object responses.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub resourceversion: String,
    /// In-process flag of the Go peers, never true on the wire.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sync: bool,
    /// In-process context kind of the Go peers; always left empty by us.
    #[serde(default, rename = "type", skip_serializing_if = "String::is_empty")]
    pub kind: String,
}

/// `route` of a [`Message`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Sending module.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Never set by the Go peers.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub destination: String,
    /// Decides who handles the message on the edge.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// What to do; see [`Operation`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub operation: String,
    /// What it is about; see [`crate::ResourcePath`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub resource: String,
}

/// Operations of this part of the protocol, by their name on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// An object appeared (down), or the edge asks to create one (up).
    Insert,
    /// An object changed; also the first sight of an object after an outage.
    Update,
    /// An object is gone (down), or the edge asks to delete one (up).
    Delete,
    /// A status or event patch (up).
    Patch,
    /// The edge reads one object (up).
    Query,
    /// Answer or acknowledgement.
    Response,
    /// A failed request; not an acknowledgement.
    Error,
    /// The edge is alive (up, every 15 s).
    Keepalive,
}

impl Operation {
    /// Name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::Patch => "patch",
            Self::Query => "query",
            Self::Response => "response",
            Self::Error => "error",
            Self::Keepalive => "keepalive",
        }
    }

    /// The operation with this name, if it is one of ours.
    pub fn parse(name: &str) -> Option<Self> {
        [
            Self::Insert,
            Self::Update,
            Self::Delete,
            Self::Patch,
            Self::Query,
            Self::Response,
            Self::Error,
            Self::Keepalive,
        ]
        .into_iter()
        .find(|operation| operation.as_str() == name)
    }
}

/// Why bytes are not a message, or a body is not what the caller expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// Over [`MESSAGE_LEN_MAX`].
    #[error("message of {len} bytes is over the bound of {MESSAGE_LEN_MAX} bytes")]
    TooLong {
        /// Length of the message, in bytes.
        len: usize,
    },
    /// Not JSON, or JSON of another shape.
    #[error("message is not valid")]
    Invalid(#[source] serde_json::Error),
    /// The body is not of the type that its resource and operation promise.
    #[error("content of {operation} {resource} is not valid")]
    Content {
        /// `route.operation`.
        operation: String,
        /// `route.resource`.
        resource: String,
        /// What the parser said.
        source: serde_json::Error,
    },
}

impl Message {
    /// A new message with a fresh id. `now_ms` is Unix time in milliseconds; `content` is any JSON value.
    pub fn new<T: Serialize + ?Sized>(
        now_ms: i64,
        source: &str,
        group: &str,
        operation: Operation,
        resource: impl Into<String>,
        content: &T,
    ) -> Self {
        Self {
            header: Header { msg_id: new_id(), timestamp: now_ms, ..Header::default() },
            route: Route {
                source: source.into(),
                destination: String::new(),
                group: group.into(),
                operation: operation.as_str().into(),
                resource: resource.into(),
            },
            content: raw(content),
        }
    }

    /// The same message with `header.resourceversion` set.
    #[must_use]
    pub fn with_version(mut self, resource_version: impl Into<String>) -> Self {
        self.header.resourceversion = resource_version.into();
        self
    }

    /// A response to this message: source, group and resource copied, parent set.
    pub fn response<T: Serialize + ?Sized>(&self, now_ms: i64, content: &T) -> Self {
        Self {
            header: Header {
                msg_id: new_id(),
                parent_msg_id: self.header.msg_id.clone(),
                timestamp: now_ms,
                kind: self.header.kind.clone(),
                ..Header::default()
            },
            route: Route { operation: Operation::Response.as_str().into(), ..self.route.clone() },
            content: raw(content),
        }
    }

    /// The acknowledgement of this message: a response with content `"OK"`.
    pub fn ack(&self, now_ms: i64) -> Self {
        self.response(now_ms, "OK")
    }

    /// An `error` answer to this message. It is no acknowledgement; a Go edge hands `text` to its kubelet.
    pub fn error(&self, now_ms: i64, source: &str, group: &str, text: &str) -> Self {
        let mut answer = self.response(now_ms, text);
        answer.route.operation = Operation::Error.as_str().into();
        answer.route.source = source.into();
        answer.route.group = group.into();
        answer
    }

    /// The operation, if it is one that this crate names.
    pub fn operation(&self) -> Option<Operation> {
        Operation::parse(&self.route.operation)
    }

    /// Reads the body as `T`.
    ///
    /// # Errors
    ///
    /// [`MessageError::Content`] when the body has another shape.
    pub fn content_as<T: DeserializeOwned>(&self) -> Result<T, MessageError> {
        serde_json::from_str(self.content.get()).map_err(|source| MessageError::Content {
            operation: self.route.operation.clone(),
            resource: self.route.resource.clone(),
            source,
        })
    }

    /// The bytes of one WebSocket text message: JSON followed by a line feed, as Go's encoder writes it.
    pub fn encode(&self) -> String {
        let mut text = serde_json::to_string(self).expect("a message has only string keys");
        text.push('\n');
        text
    }

    /// Reads one WebSocket message, text or binary.
    ///
    /// # Errors
    ///
    /// [`MessageError::TooLong`] over the bound, [`MessageError::Invalid`] when it is not a message.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        if bytes.len() > MESSAGE_LEN_MAX {
            return Err(MessageError::TooLong { len: bytes.len() });
        }
        serde_json::from_slice(bytes).map_err(MessageError::Invalid)
    }
}

/// Turns any serialisable value into raw JSON.
pub fn raw<T: Serialize + ?Sized>(value: &T) -> Content {
    serde_json::value::to_raw_value(value).expect("message bodies have only string keys")
}

fn null() -> Content {
    raw(&())
}

fn new_id() -> MessageId {
    uuid::Uuid::new_v4().to_string()
}
