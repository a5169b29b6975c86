//! KubeEdge's wire, both ends, and what our own peers add to it: messages, resource paths, frames, delivery to one
//! node, enrolment tokens and the stream tunnel.
//!
//! | module | what it is for |
//! |---|---|
//! | [`message`], [`resource`] | one message and what it is about |
//! | [`capability`] | what a peer can do beyond stock KubeEdge, told in the opening handshake |
//! | [`websocket`] | RFC 6455 frames and opening handshake, without a socket |
//! | [`frame`] | frames of a QUIC stream between our own ends |
//! | [`batch`] | several messages in one compressed frame |
//! | [`priority`], [`delivery`] | which message goes first, and what becomes of it |
//! | [`digest`], [`certificate`] | exchanges of our own: resume, renewal of certificates over the link |
//! | [`application`], [`job`], [`bus`] | requests of applications, node jobs, data for and from applications |
//! | [`enrol`], [`tunnel`] | KubeEdge's enrolment and its stream tunnel |
//!
//! What reads a peer's bytes or texts, and so is fuzzed: [`Message::decode`], [`batch::decode`],
//! [`websocket::Decoder::decode`], [`websocket::check_request`], [`websocket::check_response`],
//! [`frame::Decoder::decode`], [`frame::Hello::decode`], [`frame::HelloReply::decode`], [`tunnel::Frame::decode`],
//! [`enrol::Claims::verify`], [`Capabilities::parse`], the `FromStr` of [`ResourcePath`] and [`enrol::JoinToken`], and
//! [`Message::content_as`] with [`digest::Digest`], [`certificate::CertificateRequest`],
//! [`certificate::CertificateReply`], [`certificate::Bundle`], [`tunnel::Connect`], and the payloads of [`job`] and
//! [`bus`]. [`delivery::ack_required`] and [`Class::of`] look at messages that nobody has checked.
//!
//! Nothing here opens a socket, reads a file or looks at a clock. CloudCore (`cloudcore/`) and EdgeCore (`edge-os/`)
//! are the callers. Every parser takes any bytes without a panic, and takes no more memory than a small multiple of
//! the bytes that have arrived (of its own bound, where the bytes are compressed). Facts come from kubeedge/kubeedge at
//! 16cd8548 and from the recorded session in `golden/`.

pub mod application;
pub mod batch;
pub mod bus;
pub mod capability;
pub mod certificate;
pub mod delivery;
pub mod digest;
pub mod enrol;
pub mod frame;
pub mod job;
pub mod message;
pub mod priority;
pub mod qualification;
pub mod resource;
pub mod tunnel;
pub mod websocket;

pub use capability::Capabilities;
pub use message::{Content, Header, Message, MessageError, MessageId, Operation, Route};
pub use priority::Class;
pub use resource::{ResourceError, ResourcePath};
