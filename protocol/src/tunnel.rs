//! Frames of the stream tunnel: logs, and later exec, attach and metrics, over one WebSocket per node.
//!
//! One WebSocket message is one frame: `uvarint connection`, `uvarint type`, `data` (unsigned LEB128 as in Go's
//! encoding/binary). A KubeEdge cloud wants Text messages and ends the tunnel at any other, although they hold arbitrary
//! bytes, which is not valid WebSocket; [`crate::websocket`] does not check that. Its edge takes Binary messages too.
//!
//! CloudCore's tunnel listener and EdgeCore's tunnel are the callers.
//!
//! Source: kubeedge/kubeedge, pkg/stream/message.go and cloud/pkg/cloudstream.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Path of the tunnel on its listener.
pub const PATH: &str = "/v1/kubeedge/connect";
/// Header with the node's name.
pub const NODE_HEADER: &str = "SessionHostNameOverride";
/// Header with the node's internal address.
pub const ADDRESS_HEADER: &str = "SessionInternalIP";
/// Resource of the message by which our hub asks our own edge, over the link, to open the tunnel: until then there is
/// none, as an idle one costs more than an idle link. A KubeEdge edge keeps its tunnel open and is never asked. Not
/// acknowledged: the tunnel is the answer.
pub const DEMAND: &str = "tunnel/demand";
/// Path of a stream that asks one of our own edges what a device was, `/deviceHistory/<namespace>/<device>?property=…`;
/// the answer is one JSON object. Only for edges that announce [`crate::capability::HISTORY`].
pub const HISTORY_PATH: &str = "/deviceHistory/";
/// The most data that one frame carries; a KubeEdge receiver drops what is over it, we refuse the frame.
pub const DATA_LEN_MAX: usize = 1024 * 1024;
/// The most data that we put into one frame.
pub const CHUNK_LEN: usize = 32 * 1024;

/// What a frame is for, with its number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum FrameKind {
    /// Opens a log stream; data is a [`Connect`].
    LogsConnect = 0,
    /// Opens an exec stream.
    ExecConnect = 1,
    /// Opens a metrics stream.
    MetricConnect = 2,
    /// Bytes of a stream.
    Data = 3,
    /// Ends one stream.
    RemoveConnect = 4,
    /// Ends the tunnel; data is a text that says why.
    CloseConnect = 5,
    /// Opens an attach stream.
    AttachConnect = 6,
}

impl FrameKind {
    fn parse(number: u64) -> Option<Self> {
        Some(match number {
            0 => Self::LogsConnect,
            1 => Self::ExecConnect,
            2 => Self::MetricConnect,
            3 => Self::Data,
            4 => Self::RemoveConnect,
            5 => Self::CloseConnect,
            6 => Self::AttachConnect,
            _ => return None,
        })
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Number of the stream, counted by the cloud from 1; 0 is the tunnel itself.
    pub connection: u64,
    /// What it is for.
    pub kind: FrameKind,
    /// Depends on the kind.
    pub data: Vec<u8>,
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The bytes end inside one of the two numbers.
    #[error("tunnel frame ends inside its header")]
    Short,
    /// A number has more than 64 bits.
    #[error("tunnel frame holds a number of more than 64 bits")]
    Overflow,
    /// A type that nobody has defined.
    #[error("tunnel frame has the unknown type {0}")]
    Kind(u64),
    /// Over [`DATA_LEN_MAX`].
    #[error("tunnel frame with {len} bytes of data is over the bound of {DATA_LEN_MAX} bytes")]
    TooLong {
        /// Length of the data in bytes.
        len: usize,
    },
}

impl Frame {
    /// A frame of `kind` for `connection`.
    pub fn new(connection: u64, kind: FrameKind, data: impl Into<Vec<u8>>) -> Self {
        Self { connection, kind, data: data.into() }
    }

    /// The bytes of one WebSocket message.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.data.len() + 11);
        push_uvarint(&mut bytes, self.connection);
        push_uvarint(&mut bytes, self.kind as u64);
        bytes.extend_from_slice(&self.data);
        bytes
    }

    /// Reads one WebSocket message.
    ///
    /// # Errors
    ///
    /// [`FrameError`] when it is not a frame; the tunnel itself is still in step, as every message stands alone.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let mut rest = bytes;
        let connection = take_uvarint(&mut rest)?;
        let kind = take_uvarint(&mut rest)?;
        let kind = FrameKind::parse(kind).ok_or(FrameError::Kind(kind))?;
        if rest.len() > DATA_LEN_MAX {
            return Err(FrameError::TooLong { len: rest.len() });
        }
        Ok(Self { connection, kind, data: rest.to_vec() })
    }
}

fn push_uvarint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_uvarint(bytes: &mut &[u8]) -> Result<u64, FrameError> {
    let mut number = 0u64;
    for shift in (0..).step_by(7) {
        let (&byte, rest) = bytes.split_first().ok_or(FrameError::Short)?;
        *bytes = rest;
        // The tenth byte holds the last bit of 64.
        if shift == 63 && byte > 1 {
            return Err(FrameError::Overflow);
        }
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    Ok(number)
}

/// Data of a frame that opens a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// Number of the stream, the same as in the frame.
    #[serde(rename = "MessID")]
    pub connection: u64,
    /// The request to make on the node.
    pub url: Url,
    /// Headers of the request, by name.
    #[serde(default)]
    pub header: BTreeMap<String, Vec<String>>,
    /// Method of the request, for exec and attach only.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub method: String,
}

/// A URL in the form of Go's `net/url.URL`, as JSON. Every key is written, in Go's order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Url {
    /// `http`.
    pub scheme: String,
    /// Empty.
    pub opaque: String,
    /// Null.
    pub user: Option<BTreeMap<String, String>>,
    /// Kubelet address on the node.
    pub host: String,
    /// Decoded path.
    pub path: String,
    /// Encoded path where it differs from the default encoding.
    pub raw_path: String,
    /// False.
    pub omit_host: bool,
    /// False.
    pub force_query: bool,
    /// Query without the question mark.
    pub raw_query: String,
    /// Empty.
    pub fragment: String,
    /// Empty.
    pub raw_fragment: String,
}

impl Default for Url {
    fn default() -> Self {
        Self {
            scheme: "http".into(),
            opaque: String::new(),
            user: None,
            host: "127.0.0.1:10350".into(),
            path: String::new(),
            raw_path: String::new(),
            omit_host: false,
            force_query: false,
            raw_query: String::new(),
            fragment: String::new(),
            raw_fragment: String::new(),
        }
    }
}

impl Connect {
    /// A request for `path_and_query` on the node's kubelet API, such as `/containerLogs/ns/pod/c?follow=true`.
    pub fn get(connection: u64, path_and_query: &str) -> Self {
        let (path, query) = path_and_query.split_once('?').unwrap_or((path_and_query, ""));
        let url = Url { path: path.into(), raw_query: query.into(), ..Url::default() };
        Self { connection, url, header: BTreeMap::new(), method: String::new() }
    }

    /// The path and query asked for.
    pub fn path_and_query(&self) -> String {
        match self.url.raw_query.as_str() {
            "" => self.url.path.clone(),
            query => format!("{}?{query}", self.url.path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_have_the_bytes_that_kubeedge_writes() {
        let check = |frame: Frame, bytes: &[u8]| {
            assert_eq!(frame.encode(), bytes);
            assert_eq!(Frame::decode(bytes), Ok(frame));
        };
        check(Frame::new(300, FrameKind::RemoveConnect, []), b"\xac\x02\x04");
        check(Frame::new(0, FrameKind::CloseConnect, *b"E"), b"\x00\x05E");
        check(Frame::new(1, FrameKind::Data, *b"\xff\x00"), b"\x01\x03\xff\x00");
        let largest = [&[0xff; 9][..], &[0x01, 0x04]].concat();
        check(Frame::new(u64::MAX, FrameKind::RemoveConnect, []), &largest);
    }

    #[test]
    fn broken_frames_are_refused_with_the_reason() {
        let check = |bytes: &[u8], expected| assert_eq!(Frame::decode(bytes), Err(expected));
        check(b"", FrameError::Short);
        check(b"\x80", FrameError::Short);
        check(b"\x01", FrameError::Short);
        check(b"\x01\x07", FrameError::Kind(7));
        check(&[0xff; 11], FrameError::Overflow);
        let long = [b"\x01\x03".as_slice(), &vec![0; DATA_LEN_MAX + 1]].concat();
        check(&long, FrameError::TooLong { len: DATA_LEN_MAX + 1 });
    }

    #[test]
    fn connect_reads_the_recorded_form_and_writes_it_again() {
        let recorded = r#"{"MessID":1,"url":{"Scheme":"http","Opaque":"","User":null,"Host":"127.0.0.1:10350","Path":"/containerLogs/default/web-0/c","RawPath":"","OmitHost":false,"ForceQuery":false,"RawQuery":"tailLines=5","Fragment":"","RawFragment":""},"header":{"Accept":["*/*"]}}"#;
        let connect: Connect = serde_json::from_str(recorded).expect("recorded");
        assert_eq!(connect.path_and_query(), "/containerLogs/default/web-0/c?tailLines=5");
        assert_eq!(serde_json::to_string(&connect).expect("json"), recorded);
        let ours = Connect::get(1, "/containerLogs/default/web-0/c?tailLines=5");
        assert_eq!(Connect { header: connect.header.clone(), ..ours }, connect);
    }

    proptest! {
        #[test]
        fn any_frame_survives_the_wire(connection in any::<u64>(), kind in 0..7u64, data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let frame = Frame::new(connection, FrameKind::parse(kind).expect("in range"), data);
            prop_assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
        }

        #[test]
        fn any_bytes_are_read_or_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(frame) = Frame::decode(&bytes) {
                prop_assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
            }
            let _ = serde_json::from_slice::<Connect>(&bytes);
        }
    }
}
