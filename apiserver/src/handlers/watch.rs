//! `watch`: the changes of a resource as a stream of JSON documents.
//!
//! A watch subscribes first, then reads the store (the current objects, or the log after a revision), then follows the
//! subscription from the revision that it has read. It ends without an error when its time is over, when the server
//! stops, or when it is too slow; clients come back with the last revision they saw.

use super::read::{Selection, Wanted, invalid_options};
use super::shape;
use crate::api::{Api, place, store_failed};
use crate::http::{Answer, Call, Format};
use crate::hub::{Event, Op, Receiver};
use crate::route::Target;
use crate::store::{Range, StoreError, set_revision};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http_body_util::{BodyExt, StreamBody};
use serde_json::{Value, json};
use skerry_apiserver_core::catalog::Resource;
use skerry_apiserver_core::status::ApiError;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Documents that wait for the client's socket, besides the ring of the hub.
const OUTGOING_MAX: usize = 32;
/// Time between two bookmarks.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
/// A watch without `timeoutSeconds` lasts between this and twice as long.
const TIMEOUT_MIN_S: u64 = 1800;

/// Where a watch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// With the current objects as ADDED; with a marking bookmark after them if asked.
    Objects { marked: bool },
    /// With what happens from now on.
    Now,
    /// After a revision.
    After(i64),
}

struct Watch {
    api: Arc<Api>,
    resource: Arc<Resource>,
    format: Format,
    selection: Selection,
    range: Range,
    bookmarks: bool,
    /// Everything up to this revision has been sent.
    sent: i64,
    out: mpsc::Sender<Bytes>,
}

/// The watch is over; why does not matter to the client.
struct Over;

impl Api {
    pub(super) async fn watch(
        self: &Arc<Self>,
        call: &Call,
        resource: Arc<Resource>,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let format = call.format()?;
        let selection = Selection::of(&call.query, &resource)?;
        let start = start(call)?;
        let seconds = match call.query.get("timeoutSeconds") {
            Some(text) => text
                .parse()
                .map_err(|_| ApiError::bad_request(format!("invalid timeoutSeconds `{text}`")))?,
            None => TIMEOUT_MIN_S + rand::random_range(0..TIMEOUT_MIN_S),
        };
        let end = Instant::now() + Duration::from_secs(seconds);

        let (group, plural) = place(&resource);
        let changes = self.store.hub().subscribe(&group, &plural);
        let range = selection.range(&resource, target);
        let (out, outgoing) = mpsc::channel(OUTGOING_MAX);
        let watch = Watch {
            api: self.clone(),
            resource,
            format,
            selection,
            range,
            bookmarks: call.query.flag("allowWatchBookmarks"),
            sent: 0,
            out,
        };
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = stop.cancelled() => {}
                _ = watch.run(start, changes, end) => {}
            }
        });

        let documents = futures::stream::unfold(outgoing, |mut outgoing| async {
            let document = outgoing.recv().await?;
            Some((Ok(http_body::Frame::data(document)), outgoing))
        });
        let mut response = http::Response::new(StreamBody::new(documents).boxed_unsync());
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(Answer::Written(response))
    }
}

fn start(call: &Call) -> Result<Start, ApiError> {
    let matching = call.query.get("resourceVersionMatch");
    let initial = call.query.get("sendInitialEvents").map(|_| call.query.flag("sendInitialEvents"));
    match (initial, matching) {
        (Some(_), Some("NotOlderThan")) | (None, None) => {}
        (Some(_), _) => {
            return Err(invalid_options(
                "resourceVersionMatch",
                "Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        (None, Some(_)) => {
            return Err(invalid_options(
                "resourceVersionMatch",
                "Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
    }
    Ok(match (initial, Wanted::of(&call.query)?) {
        (Some(true), _) => Start::Objects { marked: true },
        (Some(false), Wanted::Newest | Wanted::Any) => Start::Now,
        (None, Wanted::Newest | Wanted::Any) => Start::Objects { marked: false },
        (_, Wanted::Revision(revision)) => Start::After(revision),
    })
}

impl Watch {
    async fn run(mut self, start: Start, changes: Receiver, end: Instant) {
        // A client that does not read must not hold the watch beyond its time.
        if let Ok(Err(Over)) = tokio::time::timeout_at(end, self.begin(start)).await {
            return;
        }
        self.follow(changes, end).await.ok();
    }

    async fn begin(&mut self, start: Start) -> Result<(), Over> {
        match start {
            Start::Now => {
                self.sent = self.api.store.current();
                Ok(())
            }
            Start::Objects { marked } => {
                let listing = self.api.store.list(self.range.clone(), |_| true).await;
                let listing = match listing {
                    Ok(listing) => listing,
                    Err(error) => return self.fail(error).await,
                };
                self.sent = listing.revision;
                for object in listing.items {
                    let object = shape::served(&self.resource, object);
                    if self.selection.matches(&object) {
                        self.send("ADDED", object).await?;
                    }
                }
                if marked {
                    self.bookmark(true).await?;
                }
                Ok(())
            }
            Start::After(revision) => {
                self.sent = revision;
                loop {
                    let replay = self.api.store.replay(
                        self.range.group.clone(),
                        self.range.resource.clone(),
                        self.range.namespace.clone(),
                        self.sent,
                    );
                    let page = match replay.await {
                        Ok(page) => page,
                        Err(error) => return self.fail(error).await,
                    };
                    for event in &page.events {
                        self.event(event).await?;
                    }
                    self.sent = page.upto;
                    if !page.more {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn follow(&mut self, mut changes: Receiver, end: Instant) -> Result<(), Over> {
        let mut next_bookmark = Instant::now() + BOOKMARK_INTERVAL;
        loop {
            let out = self.out.clone();
            tokio::select! {
                event = changes.recv() => match event {
                    Ok(event) => self.change(&event).await?,
                    Err(RecvError::Lagged(_) | RecvError::Closed) => return Err(Over),
                },
                () = tokio::time::sleep_until(next_bookmark.min(end)) => {
                    if self.bookmarks {
                        self.catch_up(&mut changes).await?;
                        self.bookmark(false).await?;
                    }
                    if Instant::now() >= end {
                        return Ok(());
                    }
                    next_bookmark = Instant::now() + BOOKMARK_INTERVAL;
                }
                () = out.closed() => return Err(Over),
            }
        }
    }

    /// Sends what is published already, so that a bookmark may name the newest published revision.
    async fn catch_up(&mut self, changes: &mut Receiver) -> Result<(), Over> {
        let published = self.api.store.hub().published();
        loop {
            match changes.try_recv() {
                Ok(event) => self.change(&event).await?,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Lagged(_) | TryRecvError::Closed) => return Err(Over),
            }
        }
        self.sent = self.sent.max(published);
        Ok(())
    }

    async fn change(&mut self, event: &Event) -> Result<(), Over> {
        if event.revision <= self.sent {
            return Ok(()); // was read from the store
        }
        self.event(event).await?;
        self.sent = event.revision;
        Ok(())
    }

    async fn event(&self, event: &Event) -> Result<(), Over> {
        let wanted = |wanted: &Option<String>, found: &str| {
            wanted.as_deref().is_none_or(|wanted| wanted == found)
        };
        if !wanted(&self.range.namespace, &event.key.namespace)
            || !wanted(&self.range.name, &event.key.name)
        {
            return Ok(());
        }
        let served = |object: &Arc<Value>| shape::served(&self.resource, (**object).clone());
        if self.selection.is_empty() {
            let word = match (event.op, &event.before) {
                (Op::Delete, _) => "DELETED",
                (Op::Put, None) => "ADDED",
                (Op::Put, Some(_)) => "MODIFIED",
            };
            return self.send(word, served(&event.object)).await;
        }
        let object = served(&event.object);
        let is_in = self.selection.matches(&object);
        let before = event.before.as_ref().map(served);
        let was_in = before.as_ref().is_some_and(|before| self.selection.matches(before));
        match (event.op, was_in, is_in) {
            (Op::Put, false, true) => self.send("ADDED", object).await,
            (Op::Put, true, true) => self.send("MODIFIED", object).await,
            (Op::Put, true, false) => {
                let mut before = before.unwrap_or_default();
                set_revision(&mut before, event.revision);
                self.send("DELETED", before).await
            }
            (Op::Delete, _, true) => self.send("DELETED", object).await,
            (Op::Put, false, false) | (Op::Delete, _, false) => Ok(()),
        }
    }

    async fn bookmark(&self, marks_end: bool) -> Result<(), Over> {
        let mut metadata =
            json!({"resourceVersion": self.sent.to_string(), "creationTimestamp": null});
        if marks_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = json!({
            "kind": &*self.resource.kind, "apiVersion": self.resource.api_version(),
            "metadata": metadata,
        });
        self.send("BOOKMARK", object).await
    }

    async fn fail(&self, error: StoreError) -> Result<(), Over> {
        let status = store_failed(error).to_status();
        self.write(&json!({"type": "ERROR", "object": status})).await?;
        Err(Over)
    }

    async fn send(&self, word: &str, object: Value) -> Result<(), Over> {
        let object = shape::one(&self.format, &self.resource, object);
        self.write(&json!({"type": word, "object": object})).await
    }

    async fn write(&self, document: &Value) -> Result<(), Over> {
        let mut line = document.to_string();
        line.push('\n');
        self.out.send(line.into()).await.map_err(|_| Over)
    }
}
