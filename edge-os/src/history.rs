//! The keeper of the history: what the twin task hands on becomes rows on the disk, and questions get their answers.
//!
//! [`History`] decides, [`HistoryStore`] writes and reads, on threads of their own: the twin task waits for neither. One
//! write at a time, [`ANSWERS_MAX`] answers; questions beyond wait in a channel with a bound, and then in the tunnel.
//!
//! Callers: the twin task, and the tunnel through [`Ask`].

use crate::config::HistoryConfig;
use crate::history_store::{HistoryError, HistoryStore};
use crate::link::chain;
use jiff::Timestamp;
use serde_json::Value;
use skerry_edge_core::Now;
use skerry_edge_core::history::History;
use skerry_edge_core::history::query::{Page, Question};
use skerry_edge_core::twin::Id;
use skerry_protocol::ResourcePath;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle, JoinSet};

/// Questions that wait for the twin task.
pub(crate) const ASKS_MAX: usize = 16;
/// Answers that are made at the same time.
const ANSWERS_MAX: usize = 4;
/// Longest wait for the last rows when the agent ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A question of the hub.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) question: Question,
    pub(crate) answer: oneshot::Sender<Page>,
}

/// The history of this node's devices.
pub(crate) struct Keeper {
    history: History,
    store: Arc<HistoryStore>,
    writing: Option<JoinHandle<Result<(), HistoryError>>>,
    answers: JoinSet<()>,
    /// Rows are refused just now; said once.
    refused: bool,
}

impl Keeper {
    pub(crate) fn new(config: &HistoryConfig, dir: &Path) -> Self {
        Self {
            history: History::new(config.all, config.keeping),
            store: Arc::new(HistoryStore::new(dir.join("history.db"), config.limit)),
            writing: None,
            answers: JoinSet::new(),
            refused: false,
        }
    }

    /// The node has this object now, or has it no more.
    pub(crate) fn take_object(&mut self, path: &ResourcePath, object: Option<&Value>) {
        let Some(object) = object else { return self.history.handle_gone(path) };
        if let Err(error) = self.history.handle_object(path, object) {
            tracing::warn!(object = %path, %error, "the history goes on without this annotation");
        }
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.history.is_wanted()
    }

    pub(crate) fn report(&mut self, now: Now, id: &Id, property: &str, value: &str, at_ms: i64) {
        self.history.report(now.mono, now.unix_ms(), id, property, value, at_ms);
    }

    /// Begins the next write, if one is due.
    pub(crate) fn drain(&mut self, now: Now) {
        if self.writing.is_some() {
            return;
        }
        let changes = self.history.take_changes(now.mono, now.unix_ms(), false);
        if !changes.is_empty() {
            let (store, now_ms) = (self.store.clone(), now.unix_ms());
            self.writing = Some(tokio::task::spawn_blocking(move || store.write(&changes, now_ms)));
        }
    }

    pub(crate) fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        self.history.poll_timeout(now).filter(|_| self.writing.is_none())
    }

    /// Waits until a write or an answer has ended, or for ever. Cancel safe.
    pub(crate) async fn progress(&mut self) {
        let written = async {
            match &mut self.writing {
                Some(writing) => writing.await,
                None => std::future::pending().await,
            }
        };
        let answers = &mut self.answers;
        let answered = async {
            if answers.join_next().await.is_none() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            written = written => self.end_write(written),
            () = answered => {}
        }
    }

    fn end_write(&mut self, written: Result<Result<(), HistoryError>, JoinError>) {
        self.writing = None;
        let refused = match &written {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(chain(error)),
            Err(_) => Some("the writer ended".to_owned()),
        };
        if let Some(reason) = &refused
            && !self.refused
        {
            tracing::error!(
                reason,
                "the history of devices is not written; tried again, the oldest is lost first"
            );
        }
        self.refused = refused.is_some();
        self.history.handle_stored(Instant::now(), refused.is_none());
    }

    /// Whether another question may come.
    pub(crate) fn has_room(&self) -> bool {
        self.answers.len() < ANSWERS_MAX
    }

    pub(crate) fn ask(&mut self, ask: Ask) {
        let Ask { question, answer } = ask;
        let recent = self.history.recent(&question.device, &question.property);
        let store = self.store.clone();
        self.answers.spawn_blocking(move || {
            let page = store
                .query(&question, recent)
                .unwrap_or_else(|error| Page { error: Some(chain(&error)), ..Page::default() });
            let _ = answer.send(page); // whoever asked may have gone
        });
    }

    /// Writes what is not written yet.
    pub(crate) async fn close(&mut self) {
        let end = async {
            if let Some(writing) = &mut self.writing {
                let written = writing.await;
                self.end_write(written);
            }
            let now = Now { mono: Instant::now(), wall: Timestamp::now() };
            let changes = self.history.take_changes(now.mono, now.unix_ms(), true);
            let store = self.store.clone();
            let last = tokio::task::spawn_blocking(move || {
                if !changes.is_empty() {
                    store.write(&changes, now.unix_ms())?;
                }
                store.close()
            });
            last.await
        };
        match tokio::time::timeout(CLOSE_TIMEOUT, end).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => {
                tracing::warn!(error = chain(&error), "the end of the history was not written");
            }
            Ok(Err(_)) | Err(_) => {
                tracing::warn!("the end of the history was not written: the disk is too slow");
            }
        }
    }
}
