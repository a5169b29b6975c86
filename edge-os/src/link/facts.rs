//! How the link is, for people: a small file beside the database that `edgecore status` prints.
//!
//! Written when the link comes, goes or moves, and at most every [`WRITE_INTERVAL`]; a link that idles writes nothing.
//! The file may be lost with the power, so nothing is synced.

use super::LinkFacts;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;

/// Time between two writes.
const WRITE_INTERVAL: Duration = Duration::from_secs(30);
/// Time after a change until it is written: then the round trip is known as well.
const SETTLE: Duration = Duration::from_secs(2);

/// The file in the agent's directory.
pub fn path(dir: &Path) -> PathBuf {
    dir.join("link.json")
}

/// Keeps the file in `dir` up to date, until nobody holds the other end of `facts`.
pub async fn keep_written(dir: PathBuf, mut facts: watch::Receiver<LinkFacts>) {
    let path = path(&dir);
    let mut written = None;
    while facts.changed().await.is_ok() {
        let now = facts.borrow_and_update().clone();
        let state = (now.transport, now.since_s);
        if written == Some(state) {
            continue;
        }
        tokio::time::sleep(SETTLE).await;
        let now = facts.borrow_and_update().clone();
        written = Some((now.transport, now.since_s));
        if let Err(error) = write(&path, &now) {
            tracing::debug!(%error, path = %path.display(), "the state of the link was not written");
        }
        tokio::time::sleep(WRITE_INTERVAL).await;
    }
}

fn write(path: &Path, facts: &LinkFacts) -> std::io::Result<()> {
    let next = path.with_extension("next");
    std::fs::write(&next, serde_json::to_string(facts).expect("texts and numbers"))?;
    std::fs::rename(&next, path)
}

/// Reads what was written last; `None` when nothing was.
///
/// # Errors
///
/// Whatever the system says, and [`std::io::ErrorKind::InvalidData`] when the file is something else.
pub fn read(dir: &Path) -> std::io::Result<Option<LinkFacts>> {
    match std::fs::read(path(dir)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Transport;

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(read(dir.path()).expect("no file is no error"), None);
        let facts = LinkFacts {
            transport: Some(Transport::Quic),
            hub: "hub:10000".into(),
            since_s: 5,
            rtt_ms: Some(7),
            ..LinkFacts::default()
        };
        write(&path(dir.path()), &facts).expect("written");
        assert_eq!(read(dir.path()).expect("readable"), Some(facts));
        std::fs::write(path(dir.path()), "x").expect("written");
        assert!(read(dir.path()).is_err());
    }
}
