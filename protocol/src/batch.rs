//! Several messages in one compressed frame, between peers that both announced [`crate::capability::BATCH`].
//!
//! A batch is raw DEFLATE over messages as [`Message::encode`] writes them: JSON, each ended by a line feed. Objects of
//! one kind repeat most of their text, so a batch is about a tenth of its messages. The transports are the callers: a
//! Binary WebSocket frame or a stream frame of kind [`crate::frame::Kind::Batch`] holds one batch. Order inside a batch
//! is the order of the messages.
//!
//! What a peer sends can be a bomb; [`decode`] holds one message and what it has decoded, and stops at its bounds.

use crate::message::{MESSAGE_LEN_MAX, Message, MessageError};
use bytes::BytesMut;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::borrow::Borrow;

/// Messages in one batch. A window has fewer; more would only be there to keep the other end busy.
pub const MESSAGES_MAX: usize = 1024;
/// Where a writer should end a batch, in bytes of its messages: a larger one compresses no better and delays its first
/// message. A single message may be larger.
pub const BATCH_LEN: usize = 256 * 1024;

const CHUNK_LEN: usize = 16 * 1024;

/// Why bytes are not a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// Not DEFLATE.
    #[error("batch is not compressed as it must be")]
    Corrupt(#[source] flate2::DecompressError),
    /// The compressed bytes end too early, or go on behind their end.
    #[error("batch is cut off or has bytes behind its end")]
    Length,
    /// The messages are over the bound.
    #[error("batch holds more than {max} bytes")]
    TooLong {
        /// The bound, in bytes.
        max: usize,
    },
    /// More than [`MESSAGES_MAX`].
    #[error("batch holds more than {MESSAGES_MAX} messages")]
    TooMany,
    /// One of the messages is none.
    #[error("message {index} of a batch is refused")]
    Message {
        /// Counted from 0.
        index: usize,
        /// What is wrong with it.
        source: MessageError,
    },
}

/// The bytes of a batch of `messages`; the reader takes at most [`MESSAGES_MAX`] of them.
pub fn encode<M: Borrow<Message>>(messages: &[M]) -> Vec<u8> {
    let mut deflate = Deflate::new();
    let mut text = BytesMut::new();
    for message in messages {
        text.clear();
        message.borrow().encode_to(&mut text);
        deflate.write(&text, FlushCompress::None);
    }
    deflate.write(&[], FlushCompress::Finish);
    deflate.out
}

/// Reads a batch whose messages together have at most `len_max` bytes, and at most [`MESSAGE_LEN_MAX`].
///
/// # Errors
///
/// [`BatchError`]; none of the messages is returned then, as a peer that writes half a batch well is broken too.
pub fn decode(bytes: &[u8], len_max: usize) -> Result<Vec<Message>, BatchError> {
    let max = len_max.min(MESSAGE_LEN_MAX);
    let mut inflate = Decompress::new(false);
    let mut rest = bytes;
    let mut messages = Vec::new();
    let mut line = Vec::new();
    let mut chunk = vec![0; CHUNK_LEN.min(max + 1)];
    loop {
        let (read_before, written_before) = (inflate.total_in(), inflate.total_out());
        let status = inflate
            .decompress(rest, &mut chunk, FlushDecompress::None)
            .map_err(BatchError::Corrupt)?;
        let read = (inflate.total_in() - read_before) as usize;
        let written = (inflate.total_out() - written_before) as usize;
        rest = &rest[read..];
        if inflate.total_out() > max as u64 {
            return Err(BatchError::TooLong { max });
        }
        let mut lines = chunk[..written].split_inclusive(|byte| *byte == b'\n');
        lines.try_for_each(|part| {
            // Doubles like any other growth, but never past the bound.
            if line.capacity() - line.len() < part.len() {
                let room = (line.len() + part.len()).max(line.capacity() * 2).min(max);
                line.reserve_exact(room - line.len());
            }
            line.extend_from_slice(part);
            if part.ends_with(b"\n") { take(&mut line, &mut messages) } else { Ok(()) }
        })?;
        match status {
            Status::StreamEnd if rest.is_empty() => break,
            Status::StreamEnd => return Err(BatchError::Length),
            _ if read == 0 && written == 0 => return Err(BatchError::Length),
            _ => {}
        }
    }
    // The last line feed may be missing.
    take(&mut line, &mut messages)?;
    Ok(messages)
}

/// Decodes what stands in `line`, unless it is blank, and empties it.
fn take(line: &mut Vec<u8>, messages: &mut Vec<Message>) -> Result<(), BatchError> {
    if !line.trim_ascii().is_empty() {
        let index = messages.len();
        if index == MESSAGES_MAX {
            return Err(BatchError::TooMany);
        }
        let message = Message::decode(line);
        messages.push(message.map_err(|source| BatchError::Message { index, source })?);
    }
    line.clear();
    Ok(())
}

/// A DEFLATE stream that is written to memory.
struct Deflate {
    state: Compress,
    out: Vec<u8>,
}

impl Deflate {
    fn new() -> Self {
        // The fastest level takes a third of the time of the default one for a tenth more bytes, and a hub does this
        // for all of its nodes.
        Self { state: Compress::new(Compression::fast(), false), out: Vec::new() }
    }

    fn write(&mut self, mut bytes: &[u8], flush: FlushCompress) {
        loop {
            self.out.reserve(1024.max(bytes.len() / 4));
            let before = self.state.total_in();
            let status = self
                .state
                .compress_vec(bytes, &mut self.out, flush)
                .expect("the stream is used in order");
            bytes = &bytes[(self.state.total_in() - before) as usize..];
            let done = match flush {
                FlushCompress::Finish => status == Status::StreamEnd,
                _ => bytes.is_empty(),
            };
            if done {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Operation;
    use proptest::prelude::*;
    use serde_json::json;

    fn object(number: usize) -> Message {
        let resource = format!("default/configmap/config-{number}");
        let body = json!({"metadata": {"name": format!("config-{number}"), "uid": number}, "data": {"key": "value"}});
        Message::new(0, "edgecontroller", "resource", Operation::Update, resource, &body)
    }

    fn texts(messages: &[Message]) -> Vec<String> {
        messages.iter().map(Message::encode).collect()
    }

    /// DEFLATE of any text.
    fn deflated(parts: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Vec<u8> {
        let mut deflate = Deflate::new();
        for part in parts {
            deflate.write(part.as_ref(), FlushCompress::None);
        }
        deflate.write(&[], FlushCompress::Finish);
        deflate.out
    }

    #[test]
    fn messages_come_out_in_order_and_smaller_than_they_are() {
        let messages: Vec<_> = (0..200).map(object).collect();
        let batch = encode(&messages);
        let plain: usize = texts(&messages).iter().map(String::len).sum();
        assert!(batch.len() * 4 < plain, "{} of {plain}", batch.len());
        let decoded = decode(&batch, MESSAGE_LEN_MAX).expect("ours");
        assert_eq!(texts(&decoded), texts(&messages));
        let none: [Message; 0] = [];
        assert!(decode(&encode(&none), 0).expect("an empty batch").is_empty());
    }

    /// Written by zlib 1.3 at its highest level.
    #[test]
    fn batch_of_another_compressor_is_read() {
        const BATCH: &str = "9d8d310ec3201004fb3c636b4b565cf299e86c2e318ae1101c15f2df73945652a5dd9ddde9d8993c17b88e585f8fe0e1409\
             8a02172558a19ee7e4e28d2940724990b6990645ccb9e2cb596abb4b21900cf4f6a87ce59fc4cb0e5264939e9d8bec7d779ebbf9cebd5b9fceb5cbf9d8b393f";
        let digits: Vec<_> = BATCH.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| {
            let text = std::str::from_utf8(pair).expect("digits");
            u8::from_str_radix(text, 16).expect("digits")
        };
        let bytes: Vec<_> = digits.chunks(2).map(byte).collect();
        let messages = decode(&bytes, 4096).expect("raw DEFLATE");
        let resources: Vec<_> =
            messages.iter().map(|message| message.route.resource.as_str()).collect();
        assert_eq!(resources, ["default/pod/a", "default/pod/b"]);
    }

    #[test]
    fn bound_on_the_inflated_bytes_is_exact() {
        let messages = [object(1), object(2)];
        let len = texts(&messages).concat().len();
        assert_eq!(decode(&encode(&messages), len).expect("fits").len(), 2);
        let error = decode(&encode(&messages), len - 1).expect_err("one byte over");
        assert!(matches!(error, BatchError::TooLong { max } if max == len - 1));
    }

    #[test]
    fn bomb_is_an_error_whatever_it_holds() {
        let megabytes = |byte: u8| deflated((0..8).map(|_| vec![byte; 1024 * 1024]));
        let spaces = megabytes(b' ');
        assert!(spaces.len() < 80_000, "{}", spaces.len());
        assert!(matches!(decode(&spaces, 4 << 20), Err(BatchError::TooLong { max: 0x40_0000 })));
        let lines = megabytes(b'\n');
        assert!(matches!(decode(&lines, 4096), Err(BatchError::TooLong { max: 4096 })));
        let many = deflated((0..=MESSAGES_MAX).map(|_| "{\"header\":{},\"route\":{}}\n"));
        assert!(matches!(decode(&many, MESSAGE_LEN_MAX), Err(BatchError::TooMany)));
    }

    #[test]
    fn broken_batches_are_refused_with_the_reason() {
        let check = |bytes: &[u8], expected: &str| {
            let error = decode(bytes, MESSAGE_LEN_MAX).expect_err("broken").to_string();
            assert_eq!(error, expected);
        };
        let good = encode(&[object(1), object(2)]);
        check(&good[..good.len() - 1], "batch is cut off or has bytes behind its end");
        check(b"", "batch is cut off or has bytes behind its end");
        check(&[&good[..], b"x"].concat(), "batch is cut off or has bytes behind its end");
        check(&[0xff; 32], "batch is not compressed as it must be");
        let text = texts(&[object(1)]).concat();
        check(&deflated([&text, "{\"header\":3}\n"]), "message 1 of a batch is refused");
    }

    #[test]
    fn last_line_feed_may_be_missing() {
        let text = texts(&[object(1), object(2)]).concat();
        assert_eq!(
            decode(&deflated([text.trim_end()]), MESSAGE_LEN_MAX).expect("lenient").len(),
            2
        );
    }

    proptest! {
        #[test]
        fn mangled_batches_never_panic(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<proptest::sample::Index>(),
        ) {
            let mut bytes = encode(&(0..5).map(object).collect::<Vec<_>>());
            for (position, byte) in changes {
                let position = position.index(bytes.len());
                bytes[position] = byte;
            }
            bytes.truncate(cut.index(bytes.len()) + 1);
            let _ = decode(&bytes, 64 * 1024);
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(messages) = decode(&bytes, 4096) {
                prop_assert!(messages.len() <= MESSAGES_MAX);
            }
        }
    }
}
