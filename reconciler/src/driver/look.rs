//! The task that looks at the remote, again and again.

use super::Look;
use crate::git::Remote;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Time that one look at the remote may take.
const POLL_TIMEOUT: Duration = Duration::from_secs(120);
/// Shortest pause between two looks at a remote over the network.
const DISTANT_POLL_MIN: Duration = Duration::from_secs(2);
/// Pause after a look that failed: what failed may be costly, such as reading a commit that is too large.
const POLL_AFTER_ERROR: Duration = Duration::from_secs(1);

/// Looks at the remote again and again; the driver gets what is new.
pub(super) async fn look(
    remote: Remote,
    poll: Duration,
    looks: mpsc::Sender<Look>,
    stop: CancellationToken,
) {
    let poll = if remote.is_distant() { poll.max(DISTANT_POLL_MIN) } else { poll };
    let mut remote = remote;
    loop {
        let mut pause = poll;
        let interrupt = Arc::new(AtomicBool::new(false));
        let flag = interrupt.clone();
        let mut task = tokio::task::spawn_blocking(move || {
            let result = remote.poll(&flag);
            (remote, result)
        });
        let finished = match timeout(POLL_TIMEOUT, &mut task).await {
            Ok(finished) => finished,
            Err(_) => {
                interrupt.store(true, Ordering::Relaxed);
                tracing::warn!(
                    timeout_s = POLL_TIMEOUT.as_secs(),
                    "the remote is slow; breaking off"
                );
                task.await
            }
        };
        let Ok((back, result)) = finished else {
            tracing::error!("reading the remote broke off for good");
            return;
        };
        remote = back;
        let look = match result {
            Ok(Some(commit)) => Look::Commit(Box::new(commit)),
            Ok(None) => Look::Unchanged,
            Err(error) => {
                pause = pause.max(POLL_AFTER_ERROR);
                Look::Failed(error)
            }
        };
        if looks.send(look).await.is_err() {
            return;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}
