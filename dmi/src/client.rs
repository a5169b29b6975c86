//! Calling the other side over its Unix socket.
//!
//! EdgeCore calls a mapper, a mapper calls EdgeCore. The channel connects on the first call and again
//! after the other side was restarted, so it never has to be replaced.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// Time that a connect may take; a socket whose owner hangs with a full backlog never answers.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns a channel to the socket at `path`: scheme `http`, authority `localhost`, which servers on
/// the C core insist on.
///
/// Nothing is connected yet. Calls fail with `UNAVAILABLE` while nobody listens; deadlines are the
/// caller's.
pub fn connect(path: impl AsRef<Path>) -> Channel {
    let path: PathBuf = path.as_ref().to_path_buf();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector_lazy(connector)
}
