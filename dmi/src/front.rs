//! The HTTP/2 front: reads what a client sends and replaces the authority of every request.
//!
//! Frames other than HEADERS and CONTINUATION pass unchanged, in order, without being held back. A
//! header block is collected, decoded, and written again as literals with `:authority: localhost`
//! (only where the block had an authority; a trailer has none). The stack behind the front sees an
//! ordinary connection and judges everything else.
//!
//! No I/O: [`Front::advance`] takes bytes and appends bytes; `Incoming` is the caller in production.
//! Memory of one connection is bounded: one frame header, one header block of [`BLOCK_MAX`] bytes,
//! a dynamic table of 4 KiB, and one rewritten block.
//!
//! Source: RFC 9113 sections 3.4 (preface), 4 (frames), 6.2 and 6.10 (HEADERS, CONTINUATION).

pub use crate::hpack::HpackError;
use crate::hpack::{self, Decoder};

/// What every request's authority becomes; what clients other than grpc-go send on such a socket.
pub const AUTHORITY: &[u8] = b"localhost";
/// Largest header block taken, in bytes as sent; four full frames.
pub const BLOCK_MAX: usize = 64 << 10;
/// Largest list of fields a block may stand for.
pub const LIST_MAX: usize = 64 << 10;
/// Most CONTINUATION frames of one block; empty ones cost a client nothing and us a turn each.
pub const CONTINUATIONS_MAX: u32 = 32;
/// Largest payload of a frame that goes into the server: the default of SETTINGS_MAX_FRAME_SIZE.
const FRAME_MAX: usize = 16_384;

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER: usize = 9;
const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// Why a connection cannot be followed any more; it has to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrontError {
    /// The first bytes are not those of HTTP/2 without TLS.
    #[error("client does not speak http/2")]
    NoPreface,
    /// A header frame is longer than the server ever allowed.
    #[error("header frame of {len} bytes is longer than {FRAME_MAX} bytes")]
    FrameTooLong {
        /// As announced.
        len: usize,
    },
    /// The padding does not leave room for what has to be in the frame.
    #[error("header frame is shorter than its padding")]
    Padding,
    /// A header block is too long or in too many pieces.
    #[error("header block is longer than {BLOCK_MAX} bytes or {CONTINUATIONS_MAX} pieces")]
    BlockTooLong,
    /// Another frame stands inside a header block, or a block continues that never began.
    #[error("header block of stream {stream} is interrupted")]
    Interrupted {
        /// Stream of the frame that should not be there.
        stream: u32,
    },
    /// The block does not decode.
    #[error("header block cannot be read")]
    Block(#[source] HpackError),
}

/// The front of one connection.
#[derive(Debug)]
pub struct Front {
    state: State,
    decoder: Decoder,
}

#[derive(Debug)]
enum State {
    /// Bytes of the preface that have come.
    Preface(usize),
    /// Collecting a frame's header.
    Header { bytes: [u8; FRAME_HEADER], have: usize, block: Option<Block> },
    /// Passing a payload on, so many bytes to go.
    Pass(usize),
    /// Collecting the payload of a HEADERS or CONTINUATION frame.
    Collect { frame: Frame, payload: Vec<u8>, block: Option<Block> },
    /// An error was returned; nothing follows.
    Failed(FrontError),
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    len: usize,
    flags: u8,
    stream: u32,
}

/// A header block of which the end has not come yet.
#[derive(Debug)]
struct Block {
    stream: u32,
    end_stream: bool,
    bytes: Vec<u8>,
    continuations: u32,
}

impl Default for Front {
    fn default() -> Self {
        Self { state: State::Preface(0), decoder: Decoder::new() }
    }
}

impl Front {
    /// Takes bytes of `input`, appends to `out` what the server should read, and returns how many
    /// bytes were taken.
    ///
    /// Stops early after a rewritten header block, which may be longer than its compressed form: `out`
    /// never grows by more than `input.len()` plus one block. Call again with the rest; at least one
    /// byte of a non-empty input is taken.
    ///
    /// # Errors
    ///
    /// [`FrontError`] if the connection cannot be followed; every later call fails alike.
    pub fn advance(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<usize, FrontError> {
        let mut taken = 0;
        while taken < input.len() {
            let state = std::mem::replace(&mut self.state, State::Failed(FrontError::NoPreface));
            match self.step(state, &input[taken..], out) {
                Ok((state, len, rewrote)) => {
                    self.state = state;
                    taken += len;
                    if rewrote {
                        break;
                    }
                }
                Err(error) => {
                    self.state = State::Failed(error);
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    /// One step: the next state, the bytes taken, and whether a block was written.
    fn step(
        &mut self,
        state: State,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(State, usize, bool), FrontError> {
        match state {
            State::Preface(have) => {
                let len = input.len().min(PREFACE.len() - have);
                if input[..len] != PREFACE[have..have + len] {
                    return Err(FrontError::NoPreface);
                }
                out.extend_from_slice(&input[..len]);
                let have = have + len;
                let next = if have == PREFACE.len() { between(None) } else { State::Preface(have) };
                Ok((next, len, false))
            }
            State::Header { mut bytes, have, block } => {
                let len = input.len().min(FRAME_HEADER - have);
                bytes[have..have + len].copy_from_slice(&input[..len]);
                let have = have + len;
                if have < FRAME_HEADER {
                    return Ok((State::Header { bytes, have, block }, len, false));
                }
                let (next, rewrote) = self.begin(bytes, block, out)?;
                Ok((next, len, rewrote))
            }
            State::Pass(left) => {
                let len = input.len().min(left);
                out.extend_from_slice(&input[..len]);
                Ok((pass(left - len), len, false))
            }
            State::Collect { frame, mut payload, block } => {
                let len = input.len().min(frame.len - payload.len());
                payload.extend_from_slice(&input[..len]);
                if payload.len() < frame.len {
                    return Ok((State::Collect { frame, payload, block }, len, false));
                }
                let (next, rewrote) = self.fragment(frame, &payload, block, out)?;
                Ok((next, len, rewrote))
            }
            State::Failed(error) => Err(error),
        }
    }

    /// Decides what becomes of a frame whose header is complete.
    fn begin(
        &mut self,
        bytes: [u8; FRAME_HEADER],
        block: Option<Block>,
        out: &mut Vec<u8>,
    ) -> Result<(State, bool), FrontError> {
        let [l2, l1, l0, kind, flags, s3, s2, s1, s0] = bytes;
        let len = usize::from(l2) << 16 | usize::from(l1) << 8 | usize::from(l0);
        let stream = u32::from_be_bytes([s3, s2, s1, s0]) & 0x7fff_ffff;
        let frame = Frame { len, flags, stream };
        match (&block, kind) {
            (None, HEADERS) => {}
            (Some(block), CONTINUATION) if block.stream == stream => {}
            (None, CONTINUATION) | (Some(_), _) => return Err(FrontError::Interrupted { stream }),
            (None, _) => {
                out.extend_from_slice(&bytes);
                return Ok((pass(len), false));
            }
        }
        if len > FRAME_MAX {
            return Err(FrontError::FrameTooLong { len });
        }
        if len == 0 {
            return self.fragment(frame, &[], block, out);
        }
        Ok((State::Collect { frame, payload: Vec::with_capacity(len), block }, false))
    }

    /// Takes one complete HEADERS or CONTINUATION frame.
    fn fragment(
        &mut self,
        frame: Frame,
        payload: &[u8],
        block: Option<Block>,
        out: &mut Vec<u8>,
    ) -> Result<(State, bool), FrontError> {
        let block = match block {
            None => Block {
                stream: frame.stream,
                end_stream: frame.flags & END_STREAM != 0,
                bytes: unpadded(frame.flags, payload)?.to_vec(),
                continuations: 0,
            },
            Some(mut block) => {
                block.continuations += 1;
                if block.continuations > CONTINUATIONS_MAX
                    || block.bytes.len() + payload.len() > BLOCK_MAX
                {
                    return Err(FrontError::BlockTooLong);
                }
                block.bytes.extend_from_slice(payload);
                block
            }
        };
        if frame.flags & END_HEADERS == 0 {
            return Ok((between(Some(block)), false));
        }
        self.rewrite(&block, out)?;
        Ok((between(None), true))
    }

    fn rewrite(&mut self, block: &Block, out: &mut Vec<u8>) -> Result<(), FrontError> {
        let fields = self.decoder.decode(&block.bytes, LIST_MAX).map_err(FrontError::Block)?;
        let mut plain = Vec::with_capacity(block.bytes.len());
        for mut field in fields {
            if field.name == ":authority" {
                field.value = AUTHORITY.into();
            }
            hpack::encode(&field, &mut plain);
        }
        let mut pieces = plain.chunks(FRAME_MAX).peekable();
        let mut kind = HEADERS;
        loop {
            let piece = pieces.next().unwrap_or_default();
            let mut flags = if kind == HEADERS && block.end_stream { END_STREAM } else { 0 };
            if pieces.peek().is_none() {
                flags |= END_HEADERS;
            }
            let len = (piece.len() as u32).to_be_bytes();
            out.extend_from_slice(&[len[1], len[2], len[3], kind, flags]);
            out.extend_from_slice(&block.stream.to_be_bytes());
            out.extend_from_slice(piece);
            if flags & END_HEADERS != 0 {
                return Ok(());
            }
            kind = CONTINUATION;
        }
    }
}

/// The state between two frames.
fn between(block: Option<Block>) -> State {
    State::Header { bytes: [0; FRAME_HEADER], have: 0, block }
}

/// The state in which `left` bytes of a payload pass.
fn pass(left: usize) -> State {
    if left == 0 { between(None) } else { State::Pass(left) }
}

/// Returns the fragment inside a HEADERS payload, without padding and priority.
fn unpadded(flags: u8, payload: &[u8]) -> Result<&[u8], FrontError> {
    let mut rest = payload;
    let mut padding = 0;
    if flags & PADDED != 0 {
        let (first, after) = rest.split_first().ok_or(FrontError::Padding)?;
        (padding, rest) = (usize::from(*first), after);
    }
    if flags & PRIORITY != 0 {
        rest = rest.get(5..).ok_or(FrontError::Padding)?;
    }
    let len = rest.len().checked_sub(padding).ok_or(FrontError::Padding)?;
    Ok(&rest[..len])
}

#[cfg(test)]
mod tests;
