//! Standard output: data, written so that a reader who leaves early (`skerry status | head -1`) ends the program
//! quietly instead of with a panic.

use std::io::{ErrorKind, Write};

/// Writes `text` and a line end.
pub(crate) fn line(text: impl std::fmt::Display) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    Ok(writeln!(out, "{text}").and_then(|()| out.flush())?)
}

/// Writes `text` as it is.
pub(crate) fn text(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    Ok(out.write_all(text.as_bytes()).and_then(|()| out.flush())?)
}

/// Whether `error` only says that nobody reads any more.
pub(crate) fn reader_left(error: &anyhow::Error) -> bool {
    let broken = error.downcast_ref::<std::io::Error>();
    broken.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}
