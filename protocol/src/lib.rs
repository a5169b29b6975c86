//! KubeEdge's wire, both ends: messages, resource paths, delivery to one node, enrolment tokens and the stream tunnel.
//!
//! Nothing here opens a socket, reads a file or looks at a clock. CloudCore (`cloudcore/`) and EdgeCore (`edge-os/`)
//! are the callers. Facts come from kubeedge/kubeedge at 16cd8548 and from the recorded session in `golden/`.

pub mod capability;
pub mod delivery;
pub mod digest;
pub mod enrol;
pub mod message;
pub mod resource;
pub mod tunnel;

pub use message::{Content, Header, Message, MessageError, MessageId, Operation, Route};
pub use resource::{ResourceError, ResourcePath};
