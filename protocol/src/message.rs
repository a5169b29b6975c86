//! One message of the link: a JSON document with `header`, `route` and `content`.
//!
//! Encoding follows kubeedge/kubeedge, staging/src/github.com/kubeedge/beehive/pkg/core/model/message.go: the field
//! order, and which fields are left out when empty. `content` stays raw JSON until somebody names a payload type, so
//! that an object passes through without losing a field that we do not know.

use bytes::{BufMut, BytesMut};
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, LazyLock};

/// Identifier of a message: a version 4 UUID in text form from our peers, any text from others.
pub type MessageId = String;

/// Raw JSON of a message body. Shared: a change for 10,000 nodes has one body and 10,000 headers.
pub type Content = Arc<RawValue>;

/// The largest message that an edge accepts, in bytes (32 MiB).
///
/// KubeEdge has no bound on WebSocket; an object is at most about 3 MiB in a Kubernetes API, so this leaves room and
/// keeps a broken or hostile peer from filling the memory of the other end.
pub const MESSAGE_LEN_MAX: usize = 32 * 1024 * 1024;

/// The largest message that a hub accepts from one node, in bytes: the 3 MiB that a Kubernetes API takes as the body of
/// a request, and 64 KiB around it.
///
/// Nodes send patches of their own objects and what applications write. The bound is smaller than [`MESSAGE_LEN_MAX`]
/// because a hub holds this much for every node that wants it to.
///
/// Source of the 3 MiB: kubernetes/apiserver, pkg/server/config.go (`MaxRequestBodyBytes`).
pub const UPSTREAM_LEN_MAX: usize = (3 * 1024 + 64) * 1024;

/// What a message takes on the wire beside its body and its texts, at most.
const ENVELOPE_LEN: usize = 256;

/// A message, as sent in one WebSocket message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Message {
    /// Identity, parent, time and version.
    #[serde(deserialize_with = "object")]
    pub header: Header,
    /// Sender, group, operation and resource.
    #[serde(deserialize_with = "object")]
    pub route: Route,
    /// Body; JSON `null` when absent.
    #[serde(default = "null")]
    pub content: Content,
}

/// Bodies are compared as texts.
impl PartialEq for Message {
    fn eq(&self, other: &Self) -> bool {
        let Self { header, route, content } = self;
        *header == other.header && *route == other.route && content.get() == other.content.get()
    }
}

impl Eq for Message {}

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

/// Defines [`Operation`]: one line per operation, so that a name cannot be forgotten in one of two directions.
macro_rules! operations {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Operations of the protocol, by their name on the wire. Names are case-sensitive: `update` changes an object,
        /// `Update` is the first action of a node job.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Operation {
            $($(#[$doc])* $variant,)*
        }

        impl Operation {
            /// Every operation.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Name on the wire.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// The operation with this name, if it is one that this crate names.
            pub fn parse(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

operations! {
    /// An object appeared (down), or the edge asks to create one (up).
    Insert = "insert",
    /// An object changed; also the first sight of an object after an outage.
    Update = "update",
    /// An object is gone (down), or the edge asks to delete one (up).
    Delete = "delete",
    /// A status or event patch (up).
    Patch = "patch",
    /// The edge reads one object (up).
    Query = "query",
    /// Answer or acknowledgement.
    Response = "response",
    /// A failed request; not an acknowledgement.
    Error = "error",
    /// The edge is alive (up, every 15 s).
    Keepalive = "keepalive",
    /// Data of an application for a rule of the cloud (up, group `user`).
    Upload = "upload",
    /// Asks for the device membership (up, `membership/detail`); a cloud gives no answer.
    Get = "get",
    /// A request to the Kubernetes API through MetaServer (up, resource `null` or `watchapp/sync`).
    Application = "null",
    /// The answer to [`Self::Application`] (down).
    ApplicationResponse = "applicationResponse",
    /// Data of a rule for the edge's MQTT broker (down, group `user`).
    Publish = "publish",
    /// A rule wants a topic of the edge's broker (down, group `user`).
    Subscribe = "subscribe",
    /// A rule does not want a topic any more (down, group `user`).
    Unsubscribe = "unsubscribe",
    /// The edge opens the port of its service bus (down, group `user`).
    Start = "start",
    /// The edge closes the port of its service bus (down, group `user`).
    Stop = "stop",
    /// HTTP request for the service bus (down, group `user`).
    HttpGet = "GET",
    /// HTTP request for the service bus (down, group `user`).
    HttpHead = "HEAD",
    /// HTTP request for the service bus (down, group `user`).
    HttpPost = "POST",
    /// HTTP request for the service bus (down, group `user`).
    HttpPut = "PUT",
    /// HTTP request for the service bus (down, group `user`).
    HttpPatch = "PATCH",
    /// HTTP request for the service bus (down, group `user`).
    HttpDelete = "DELETE",
    /// HTTP request for the service bus (down, group `user`).
    HttpOptions = "OPTIONS",
    /// CSI request (down); the answer carries its result.
    CreateVolume = "createvolume",
    /// CSI request (down); the answer carries its result.
    DeleteVolume = "deletevolume",
    /// CSI request (down); the answer carries its result.
    PublishVolume = "controllerpublishvolume",
    /// CSI request (down); the answer carries its result.
    UnpublishVolume = "controllerunpublishvolume",
    /// First action of a node job, version v1alpha2 (down).
    JobCheck = "Check",
    /// First action of a node job, version v1alpha2 (down).
    JobConfirm = "WaitingConfirmation",
    /// First action of a node job, version v1alpha2 (down).
    JobBackUp = "BackUp",
    /// First action of a node job, version v1alpha2 (down).
    JobUpgrade = "Upgrade",
    /// First action of a node job, version v1alpha2 (down).
    JobRollBack = "RollBack",
    /// First action of a node job, version v1alpha2 (down).
    JobPull = "Pull",
    /// First action of a node job, version v1alpha2 (down).
    JobUpdate = "Update",
    /// Report of a node job, version v1alpha2 (up).
    UpdateNodeActionStatus = "UpdateNodeActionStatus",
    /// Node task, version v1alpha1 (down), and its report (up).
    Upgrade = "upgrade",
    /// Node task, version v1alpha1 (down), and its report (up).
    Prepull = "prepull",
    /// Node task, version v1alpha1 (down), and its report (up).
    Rollback = "rollback",
    /// Node task, version v1alpha1 (down), and its report (up).
    Backup = "backup",
}

impl Operation {
    /// Whether this is a CSI request; its answer is awaited by whoever sent it.
    pub fn is_volume(self) -> bool {
        matches!(
            self,
            Self::CreateVolume | Self::DeleteVolume | Self::PublishVolume | Self::UnpublishVolume
        )
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

    /// Appends what [`Self::encode`] returns to `out`.
    pub fn encode_to(&self, out: &mut BytesMut) {
        out.reserve(self.len_hint());
        serde_json::to_writer(out.writer(), self).expect("a message has only string keys");
        out.put_u8(b'\n');
    }

    /// About how many bytes the message takes on the wire; never much less than it does.
    pub fn len_hint(&self) -> usize {
        let Self { header, route, content } = self;
        ENVELOPE_LEN
            + header.msg_id.len()
            + header.parent_msg_id.len()
            + header.resourceversion.len()
            + route.source.len()
            + route.group.len()
            + route.resource.len()
            + content.get().len()
    }

    /// Reads one WebSocket message, text or binary. A caller with a smaller bound than [`MESSAGE_LEN_MAX`] has checked
    /// it on the frame.
    ///
    /// # Errors
    ///
    /// [`MessageError::TooLong`] over the bound, [`MessageError::Invalid`] when it is not a message.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        if bytes.len() > MESSAGE_LEN_MAX {
            return Err(MessageError::TooLong { len: bytes.len() });
        }
        if !bytes.trim_ascii_start().starts_with(b"{") {
            return Err(MessageError::Invalid(serde_json::Error::custom("it is no object")));
        }
        serde_json::from_slice(bytes).map_err(MessageError::Invalid)
    }
}

/// Turns any serialisable value into raw JSON.
pub fn raw<T: Serialize + ?Sized>(value: &T) -> Content {
    serde_json::value::to_raw_value(value).expect("message bodies have only string keys").into()
}

/// Reads a struct from an object only. Derived code takes an array of the fields too, and an empty one for nothing
/// but defaults; Go's decoder takes neither.
fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct Object<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }
    deserializer.deserialize_map(Object(PhantomData))
}

fn null() -> Content {
    static NULL: LazyLock<Content> = LazyLock::new(|| raw(&()));
    Arc::clone(&NULL)
}

fn new_id() -> MessageId {
    uuid::Uuid::new_v4().to_string()
}
