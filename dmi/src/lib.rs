//! The device-management interface (DMI) between EdgeCore and mappers, both halves of it.
//!
//! EdgeCore serves [`v1beta1::device_manager_service_server`] on `dmi.sock`; a mapper serves
//! [`v1beta1::device_mapper_service_server`] on a socket of its own and tells EdgeCore the path.
//! Both use [`bind`] and [`serve`] to serve, [`connect`] to call, and [`CustomizedValue`]'s
//! conversions ([`unbox_map`], [`box_map`]) for configuration.
//!
//! Never here: what a call means. Plain HTTP/2 without TLS or tokens, as the interface is defined:
//! the directory of the socket decides who may connect.
//!
//! # Why there is a front before HTTP/2
//!
//! Clients built with grpc-go send the socket's path as `:authority` (`%2Fetc%2Fkubeedge%2Fdmi.sock`,
//! older ones the raw path). Neither is an authority by RFC 3986, and the HTTP/2 stack below tonic
//! resets such a stream before any service sees it. [`Incoming`] stands between the accepted socket
//! and that stack, and replaces the authority of every request with `localhost`; see [`front`].
//!
//! Source: kubeedge/kubeedge, staging/src/github.com/kubeedge/api/apis/dmi/v1beta1/api.proto (names,
//! numbers), edge/pkg/devicetwin/dmiserver/server.go (socket), edge/pkg/devicetwin/dtcommon/util.go
//! (configuration values).
//!
//! [`CustomizedValue`]: v1beta1::CustomizedValue

#![warn(missing_docs)]

mod boxing;
mod client;
pub mod front;
mod hpack;
mod server;

/// Messages, clients and servers of the interface, as generated.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1beta1 {
    tonic::include_proto!("v1beta1");
}

pub use boxing::{box_map, box_value, unbox, unbox_map};
pub use client::connect;
pub use server::{CONNECTIONS_MAX, Incoming, Peer, ServeError, bind, serve};

/// Largest message taken or sent, in bytes: the answer to a registration carries every device of a
/// protocol on the node (1,000 devices of 50 properties are about 10 MB).
pub const MESSAGE_MAX: usize = 64 << 20;
