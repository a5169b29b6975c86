//! Objects and their history in one SQLite file.
//!
//! One writer thread owns the only writing connection and commits waiting writes in groups; readers use a few
//! connections of their own and see committed snapshots (WAL). Called by the handlers and the upkeep tasks; it knows
//! nothing of Kubernetes beyond the metadata that it indexes (uid, owners, deletion).
//!
//! - `cur` has the newest state of every object, `log` every change since the last compaction, `owner` who depends on
//!   whom, `meta` and `floor` the counters. An object is stored without `metadata.resourceVersion`: that is its `rev`.
//! - One revision counter serves all resources, starts at 1 and never goes back.
//! - A change to an object whose last change was compacted puts that older state back in the log, so that every
//!   revision from the floor on can be read in full and every logged change finds the state before it.
//! - A write is acknowledged after the commit that holds it (`Durability::Full`: after the fsync of it).
//! - Nothing here ever empties or recreates a file that exists; a damaged one is an error.
//!
//! Source: the measured layout in the Rust stack notes, section "Store"; SQLite's documentation of WAL and `PRAGMA`.

use crate::hub::{Event, Hub, Op};
use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Row, Transaction, TransactionBehavior,
    params,
};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Writes that may wait for the writer; more callers wait outside.
const QUEUE_MAX: usize = 256;
/// Writes in one transaction; bounds the time that the first of a group waits for its answer.
const GROUP_MAX: usize = 64;
/// Read connections, each with its own small cache.
const READERS_MAX: usize = 4;
/// Page cache of the writer and of one reader, in KiB: the operating system caches the file anyway.
const WRITER_CACHE_KIB: i64 = 2048;
const READER_CACHE_KIB: i64 = 512;
/// History kept for watchers that come back: a client that was away longer lists again.
const HISTORY_KEPT: Duration = Duration::from_secs(15 * 60);
/// Upper bound of the history, whatever its age.
const HISTORY_MAX: i64 = 200_000;
/// History of resources that are rewritten all the time; their watchers are always connected or do not care.
const CHURN_KEPT: Duration = Duration::from_secs(2 * 60);
const CHURNING: [(&str, &str); 3] =
    [("coordination.k8s.io", "leases"), ("", "events"), ("events.k8s.io", "events")];
/// How often it is said again that writes are refused.
const REFUSED_AGAIN: Duration = Duration::from_secs(60);
/// Log rows read at once by a watcher that catches up.
const REPLAY_PAGE: usize = 256;
/// `PRAGMA user_version` of the layout below.
const LAYOUT: i64 = 1;
/// `PRAGMA application_id`: "Skry".
const APPLICATION: i64 = 0x536b_7279;

const TABLES: &str = "
CREATE TABLE meta(key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE floor(grp TEXT NOT NULL, res TEXT NOT NULL, rev INTEGER NOT NULL, PRIMARY KEY(grp, res)) WITHOUT ROWID;
CREATE TABLE log(
  rev INTEGER PRIMARY KEY, grp TEXT NOT NULL, res TEXT NOT NULL, ns TEXT NOT NULL, name TEXT NOT NULL,
  op INTEGER NOT NULL, prev_rev INTEGER NOT NULL, obj BLOB NOT NULL);
CREATE INDEX log_resource ON log(grp, res, rev);
CREATE INDEX log_prev ON log(prev_rev) WHERE prev_rev > 0;
CREATE TABLE cur(
  grp TEXT NOT NULL, res TEXT NOT NULL, ns TEXT NOT NULL, name TEXT NOT NULL,
  rev INTEGER NOT NULL, create_rev INTEGER NOT NULL, uid TEXT NOT NULL, deleting INTEGER NOT NULL, expires INTEGER,
  obj BLOB NOT NULL, PRIMARY KEY(grp, res, ns, name)) WITHOUT ROWID;
CREATE INDEX cur_uid ON cur(uid);
CREATE INDEX cur_deleting ON cur(deleting) WHERE deleting > 0;
CREATE INDEX cur_expires ON cur(expires) WHERE expires IS NOT NULL;
CREATE TABLE owner(
  uid TEXT NOT NULL, grp TEXT NOT NULL, res TEXT NOT NULL, ns TEXT NOT NULL, name TEXT NOT NULL,
  PRIMARY KEY(uid, grp, res, ns, name)) WITHOUT ROWID;
INSERT INTO meta VALUES('rev', 1);
";

/// When a write is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// After an fsync: survives a power cut.
    Full,
    /// After the write to the file: survives a crash of the process, not of the machine. For tests.
    Relaxed,
}

/// Where an object lives; `namespace` is empty for cluster-scoped resources.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) group: Arc<str>,
    pub(crate) resource: Arc<str>,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

/// What a write is about to do.
#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) key: Key,
    /// State that the caller has seen, with its revision; `None`: the object must not exist.
    pub(crate) seen: Option<Arc<Value>>,
    /// The new state; `None` removes the object.
    pub(crate) object: Option<Value>,
    /// Unix time, in seconds, after which [`Store::expired`] names the object.
    pub(crate) expires: Option<i64>,
}

/// Why a read or write did not happen; nothing of it was applied.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("the object has changed since it was read")]
    Conflict { exists: bool },
    #[error("revision {after} is older than the oldest kept revision {floor}")]
    Compacted { after: i64, floor: i64 },
    #[error("revision {wanted} is newer than the newest revision {current}")]
    Future { wanted: i64, current: i64 },
    #[error("no space left for the database `{}`; nothing was written", .path.display())]
    Full { path: PathBuf },
    #[error("database `{}` is damaged: {detail}", .path.display())]
    Damaged { path: PathBuf, detail: String },
    #[error("database `{}`: {detail}", .path.display())]
    Sqlite { path: PathBuf, detail: String },
    #[error("the store is closed")]
    Closed,
}

/// Why the database could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file is not a sound database; it is left as it is.
    #[error(
        "database `{}` is damaged and was left as it is: {detail}",
        .path.display()
    )]
    Damaged { path: PathBuf, detail: String },
    /// The file has a layout that this version does not know.
    #[error("database `{}` has layout {found}, this version reads layout {LAYOUT}", .path.display())]
    Layout { path: PathBuf, found: i64 },
    /// Another process uses the folder.
    #[error("folder `{}` is in use by another API server", .path.display())]
    InUse { path: PathBuf },
    /// No space left while the database was opened.
    #[error("no space left for the database `{}`", .path.display())]
    Full { path: PathBuf },
    /// Anything else that SQLite says.
    #[error("database `{}` could not be opened", .path.display())]
    Sqlite { path: PathBuf, source: rusqlite::Error },
    /// The folder or its lock file cannot be used.
    #[error("`{}` could not be opened", .path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

impl OpenError {
    /// What to do about it, shown after the error as `hint: …`.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Damaged { .. } => Some(
                "put a backup in its place; or move it and its `-wal` file away to start empty: the reconciler and the nodes fill it again",
            ),
            Self::Layout { .. } => Some("use the version that wrote it, or a newer one"),
            Self::InUse { .. } => Some("stop that one first"),
            Self::Full { .. } => Some("free some space on its disk and start again"),
            Self::Sqlite { .. } | Self::Io { .. } => {
                Some("check the disk, and that the folder belongs to this user")
            }
        }
    }
}

/// A page of a list.
#[derive(Debug)]
pub(crate) struct Listing {
    /// Revision at which all pages of the list are read.
    pub(crate) revision: i64,
    pub(crate) items: Vec<Value>,
    /// Key (namespace, name) of the last object read, when more follow.
    pub(crate) next: Option<(String, String)>,
    /// Objects that follow, counted without the filter.
    pub(crate) remaining: i64,
}

/// What to list.
#[derive(Debug, Clone)]
pub(crate) struct Range {
    pub(crate) group: Arc<str>,
    pub(crate) resource: Arc<str>,
    pub(crate) namespace: Option<String>,
    /// Only the object of this name.
    pub(crate) name: Option<String>,
    /// Start after this (namespace, name).
    pub(crate) after: Option<(String, String)>,
    pub(crate) limit: Option<usize>,
    /// Read the state at this revision instead of the newest.
    pub(crate) at: Option<i64>,
}

impl Range {
    /// All objects of a resource, in `namespace` if given.
    pub(crate) fn all(group: Arc<str>, resource: Arc<str>, namespace: Option<String>) -> Self {
        Self { group, resource, namespace, name: None, after: None, limit: None, at: None }
    }
}

/// Changes read from the log.
#[derive(Debug)]
pub(crate) struct Replay {
    pub(crate) events: Vec<Event>,
    /// Every change of the resource up to this revision is in `events` or was in an earlier page.
    pub(crate) upto: i64,
    pub(crate) more: bool,
}

/// The database. Cheap to clone; the writer stops when [`Store::close`] is called.
#[derive(Clone)]
pub(crate) struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    hub: Arc<Hub>,
    queue: mpsc::Sender<Request>,
    readers: Mutex<Vec<Connection>>,
    permits: Semaphore,
    floors: Arc<RwLock<HashMap<(String, String), i64>>>,
    current: Arc<AtomicI64>,
    writer: Mutex<Option<JoinHandle<()>>>,
    /// Keeps a second server away from the folder until the store is closed.
    lock: Mutex<Option<std::fs::File>>,
}

enum Request {
    Write(Box<Pending>),
    Compact {
        now: Instant,
        reply: oneshot::Sender<Result<i64, StoreError>>,
    },
    CompactTo {
        rev: i64,
        reply: oneshot::Sender<Result<i64, StoreError>>,
    },
    #[cfg(test)]
    Limit {
        pages: i64,
        reply: oneshot::Sender<Result<(), StoreError>>,
    },
    Close(oneshot::Sender<()>),
}

struct Pending {
    write: Write,
    bytes: Vec<u8>,
    reply: oneshot::Sender<Result<Arc<Value>, StoreError>>,
}

impl Store {
    /// Opens or creates `dir/objects.db` and starts the writer thread.
    ///
    /// # Errors
    ///
    /// A file that fails SQLite's check is [`OpenError::Damaged`] and is not changed.
    pub(crate) fn open(
        dir: &Path,
        durability: Durability,
        hub: Arc<Hub>,
    ) -> Result<Self, OpenError> {
        std::fs::create_dir_all(dir)
            .map_err(|source| OpenError::Io { path: dir.into(), source })?;
        let lock = lock(dir)?;
        let path = dir.join("objects.db");
        let connection = open_writer(&path, durability)?;
        let current = revision(&connection).map_err(|source| open_error(&path, source))?;
        let floors = floors(&connection).map_err(|source| open_error(&path, source))?;
        let (floors, current) = (Arc::new(RwLock::new(floors)), Arc::new(AtomicI64::new(current)));
        hub.advance(current.load(Ordering::Acquire));

        let (queue, requests) = mpsc::channel(QUEUE_MAX);
        let writer = Writer {
            connection,
            path: path.clone(),
            hub: hub.clone(),
            floors: floors.clone(),
            current: current.clone(),
            refused: None,
            marks: VecDeque::new(),
        };
        let thread = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(requests))
            .map_err(|source| OpenError::Io { path: path.clone(), source })?;
        Ok(Self {
            shared: Arc::new(Shared {
                path,
                hub,
                queue,
                readers: Mutex::default(),
                permits: Semaphore::new(READERS_MAX),
                floors,
                current,
                writer: Mutex::new(Some(thread)),
                lock: Mutex::new(Some(lock)),
            }),
        })
    }

    /// Newest committed revision.
    pub(crate) fn current(&self) -> i64 {
        self.shared.current.load(Ordering::Acquire)
    }

    pub(crate) fn hub(&self) -> &Arc<Hub> {
        &self.shared.hub
    }

    /// Commits `write` and returns the object with its new `resourceVersion` (for a removal: its last state with the
    /// revision of the removal).
    ///
    /// # Errors
    ///
    /// [`StoreError::Conflict`] if the object is no longer at the revision of `write.seen`.
    pub(crate) async fn write(&self, write: Write) -> Result<Arc<Value>, StoreError> {
        let bytes = match &write.object {
            Some(object) => encode(object),
            None => Vec::new(),
        };
        let (reply, answer) = oneshot::channel();
        let request = Request::Write(Box::new(Pending { write, bytes, reply }));
        self.shared.queue.send(request).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    /// The newest state of one object.
    pub(crate) async fn get(&self, key: &Key) -> Result<Option<Value>, StoreError> {
        let key = key.clone();
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT rev, obj FROM cur WHERE grp=?1 AND res=?2 AND ns=?3 AND name=?4",
                )?
                .query_row(
                    params![&*key.group, &*key.resource, key.namespace, key.name],
                    stored_object,
                )
                .optional()
                .map_err(Into::into)
        })
        .await
    }

    /// Objects of `range` that pass `keep`, in the order of (namespace, name).
    pub(crate) async fn list(
        &self,
        range: Range,
        keep: impl Fn(&Value) -> bool + Send + 'static,
    ) -> Result<Listing, StoreError> {
        let floor = self.floor(&range.group, &range.resource);
        self.read(move |connection| {
            let snapshot = connection.unchecked_transaction()?;
            let current = revision(&snapshot)?;
            match range.at {
                Some(at) if at > current => Err(StoreError::Future { wanted: at, current }.into()),
                Some(at) if at < floor => Err(StoreError::Compacted { after: at, floor }.into()),
                Some(at) if at < current => list_past(&snapshot, &range, at, &keep),
                _ => list_newest(&snapshot, &range, current, &keep),
            }
        })
        .await
    }

    /// Changes of a resource after revision `after`, oldest first, a page at a time.
    pub(crate) async fn replay(
        &self,
        group: Arc<str>,
        resource: Arc<str>,
        namespace: Option<String>,
        after: i64,
    ) -> Result<Replay, StoreError> {
        let floor = self.floor(&group, &resource);
        let current = self.current();
        if after < floor {
            return Err(StoreError::Compacted { after, floor });
        }
        if after > current {
            return Err(StoreError::Future { wanted: after, current });
        }
        if after == current {
            return Ok(Replay { events: Vec::new(), upto: current, more: false });
        }
        self.read(move |connection| {
            let snapshot = connection.unchecked_transaction()?;
            let newest = revision(&snapshot)?;
            let mut statement = snapshot.prepare_cached(
                "SELECT rev, op, ns, name, prev_rev, obj FROM log WHERE grp=?1 AND res=?2 AND rev>?3 ORDER BY rev LIMIT ?4",
            )?;
            let mut rows = statement.query(params![&*group, &*resource, after, REPLAY_PAGE as i64])?;
            let (mut events, mut read, mut upto) = (Vec::new(), 0, newest);
            while let Some(row) = rows.next()? {
                read += 1;
                let rev: i64 = row.get(0)?;
                if read == REPLAY_PAGE {
                    upto = rev;
                }
                if namespace.as_deref().is_some_and(|ns| row.get_ref(2).ok().and_then(|v| v.as_str().ok()) != Some(ns)) {
                    continue;
                }
                let (op, prev_rev): (i64, i64) = (row.get(1)?, row.get(4)?);
                let object = decode(row.get_ref(5)?.as_blob()?, rev)?;
                let before = match prev_rev {
                    0 => None,
                    prev => logged(&snapshot, prev)?,
                };
                events.push(Event {
                    key: Key {
                        group: group.clone(),
                        resource: resource.clone(),
                        namespace: row.get(2)?,
                        name: row.get(3)?,
                    },
                    revision: rev,
                    op: if op == OP_DELETE { Op::Delete } else { Op::Put },
                    object: Arc::new(object),
                    before: before.map(Arc::new),
                });
            }
            Ok(Replay { events, upto, more: read == REPLAY_PAGE })
        })
        .await
    }

    /// Objects that name `uid` as an owner.
    pub(crate) async fn dependents(&self, uid: &str) -> Result<Vec<Key>, StoreError> {
        let uid = uid.to_owned();
        self.read(move |connection| {
            let mut statement =
                connection.prepare_cached("SELECT grp, res, ns, name FROM owner WHERE uid=?1")?;
            let keys = statement.query_map([uid], key_of)?.collect::<Result<_, _>>()?;
            Ok(keys)
        })
        .await
    }

    /// The key of the object with this uid.
    pub(crate) async fn find_uid(&self, uid: &str) -> Result<Option<Key>, StoreError> {
        let uid = uid.to_owned();
        self.read(move |connection| {
            connection
                .prepare_cached("SELECT grp, res, ns, name FROM cur WHERE uid=?1")?
                .query_row([uid], key_of)
                .optional()
                .map_err(Into::into)
        })
        .await
    }

    /// Objects with a deletionTimestamp and objects of which an owner is gone: what the collector has to look at after
    /// a start or when it lost events.
    pub(crate) async fn unfinished(&self) -> Result<Vec<Key>, StoreError> {
        self.read(move |connection| {
            let mut statement = connection.prepare_cached(
                "SELECT grp, res, ns, name FROM cur WHERE deleting > 0
                 UNION SELECT grp, res, ns, name FROM owner WHERE uid NOT IN (SELECT uid FROM cur)",
            )?;
            let keys = statement.query_map([], key_of)?.collect::<Result<_, _>>()?;
            Ok(keys)
        })
        .await
    }

    /// At most `max` objects whose time is over at `now` (Unix seconds).
    pub(crate) async fn expired(&self, now: i64, max: usize) -> Result<Vec<Key>, StoreError> {
        self.read(move |connection| {
            let mut statement = connection.prepare_cached(
                "SELECT grp, res, ns, name FROM cur WHERE expires IS NOT NULL AND expires<=?1 LIMIT ?2",
            )?;
            let keys = statement.query_map(params![now, max as i64], key_of)?.collect::<Result<_, _>>()?;
            Ok(keys)
        })
        .await
    }

    /// Forgets history that is too old or too much, as of `now`; returns the oldest revision kept.
    pub(crate) async fn compact(&self, now: Instant) -> Result<i64, StoreError> {
        self.request(|reply| Request::Compact { now, reply }).await
    }

    /// Forgets all history up to `rev`.
    pub(crate) async fn compact_to(&self, rev: i64) -> Result<i64, StoreError> {
        self.request(|reply| Request::CompactTo { rev, reply }).await
    }

    /// Commits what waits, folds the WAL into the file and ends the writer; later writes are refused.
    pub(crate) async fn close(&self) {
        let (reply, answer) = oneshot::channel();
        if self.shared.queue.send(Request::Close(reply)).await.is_ok() {
            answer.await.ok();
        }
        let thread = self.shared.writer.lock().expect("no panic while held").take();
        if let Some(thread) = thread {
            tokio::task::spawn_blocking(move || thread.join().ok()).await.ok();
        }
        // Readers may go on until their clones are dropped; nothing writes any more.
        self.shared.readers.lock().expect("no panic while held").clear();
        self.shared.lock.lock().expect("no panic while held").take();
    }

    /// Makes the file full at `pages`.
    #[cfg(test)]
    async fn limit_pages(&self, pages: i64) {
        self.request(|reply| Request::Limit { pages, reply }).await.expect("the writer runs");
    }

    async fn request<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Request,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.shared.queue.send(request(reply)).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    fn floor(&self, group: &str, resource: &str) -> i64 {
        floor_of(&self.shared.floors.read().expect("no panic while held"), group, resource)
    }

    async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let _permit = self.shared.permits.acquire().await.map_err(|_| StoreError::Closed)?;
        let shared = self.shared.clone();
        let work = tokio::task::spawn_blocking(move || {
            let idle = shared.readers.lock().expect("no panic while held").pop();
            let connection = match idle {
                Some(connection) => connection,
                None => open_reader(&shared.path).map_err(|error| failed(&shared.path, &error))?,
            };
            let result = query(&connection);
            shared.readers.lock().expect("no panic while held").push(connection);
            result.map_err(|error| match error {
                ReadError::Store(error) => error,
                ReadError::Sqlite(error) => failed(&shared.path, &error),
                ReadError::Json(error) => StoreError::Damaged {
                    path: shared.path.clone(),
                    detail: format!("an object is not JSON: {error}"),
                },
            })
        });
        work.await.map_err(|_| StoreError::Closed)?
    }
}

const OP_PUT: i64 = 1;
const OP_DELETE: i64 = 2;

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

impl From<rusqlite::types::FromSqlError> for ReadError {
    fn from(error: rusqlite::types::FromSqlError) -> Self {
        Self::Sqlite(error.into())
    }
}

/// The thread that owns the writing connection.
struct Writer {
    connection: Connection,
    path: PathBuf,
    hub: Arc<Hub>,
    floors: Arc<RwLock<HashMap<(String, String), i64>>>,
    current: Arc<AtomicI64>,
    /// When it was last said that writes are refused: a full disk refuses hundreds in a second.
    refused: Option<Instant>,
    /// Newest revision at the time of each compaction, oldest first: tells the age of a revision without a column.
    marks: VecDeque<(Instant, i64)>,
}

impl Writer {
    fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut group = Vec::with_capacity(GROUP_MAX);
        while let Some(mut request) = requests.blocking_recv() {
            loop {
                match request {
                    Request::Write(pending) => group.push(*pending),
                    Request::Compact { now, reply } => {
                        self.commit(&mut group);
                        reply.send(self.compact(now)).ok();
                    }
                    Request::CompactTo { rev, reply } => {
                        self.commit(&mut group);
                        reply.send(self.compact_all(rev)).ok();
                    }
                    #[cfg(test)]
                    Request::Limit { pages, reply } => {
                        self.commit(&mut group);
                        let limit = format!("PRAGMA max_page_count={pages}");
                        self.connection.query_row(&limit, [], |_| Ok(())).expect("a test's limit");
                        reply.send(Ok(())).ok();
                    }
                    Request::Close(reply) => {
                        self.commit(&mut group);
                        requests.close();
                        if let Err(error) = self.checkpoint() {
                            tracing::warn!(%error, "database was not checkpointed");
                        }
                        reply.send(()).ok();
                        return;
                    }
                }
                if group.len() == GROUP_MAX {
                    break;
                }
                match requests.try_recv() {
                    Ok(next) => request = next,
                    Err(_) => break,
                }
            }
            self.commit(&mut group);
        }
    }

    /// Commits the group as one transaction: all of it, or nothing and the same error for each.
    fn commit(&mut self, group: &mut Vec<Pending>) {
        if group.is_empty() {
            return;
        }
        let mut revision = self.current.load(Ordering::Acquire);
        let before = revision;
        let outcomes = self.transact(group, &mut revision);
        match outcomes {
            Err(error) => {
                let error = failed(&self.path, &error);
                if self.refused.is_none_or(|at| at.elapsed() > REFUSED_AGAIN) {
                    self.refused = Some(Instant::now());
                    tracing::error!(%error, "writes are refused");
                }
                for pending in group.drain(..) {
                    pending.reply.send(Err(error.clone())).ok();
                }
            }
            Ok(outcomes) => {
                if self.refused.take().is_some() {
                    tracing::warn!("writes work again");
                }
                if revision != before {
                    self.current.store(revision, Ordering::Release);
                }
                let mut answers = Vec::with_capacity(group.len());
                for (pending, outcome) in group.drain(..).zip(outcomes) {
                    let Pending { write, reply, .. } = pending;
                    let answer = outcome.map(|rev| self.publish(write, rev));
                    answers.push((reply, answer));
                }
                self.hub.advance(revision);
                for (reply, answer) in answers {
                    reply.send(answer).ok();
                }
            }
        }
    }

    fn publish(&self, write: Write, revision: i64) -> Arc<Value> {
        let op = if write.object.is_some() { Op::Put } else { Op::Delete };
        let mut object = match (write.object, &write.seen) {
            (Some(object), _) => object,
            (None, Some(seen)) => (**seen).clone(),
            (None, None) => Value::Null,
        };
        set_revision(&mut object, revision);
        let object = Arc::new(object);
        self.hub.publish(Event {
            key: write.key,
            revision,
            op,
            object: object.clone(),
            before: write.seen,
        });
        object
    }

    fn transact(
        &mut self,
        group: &[Pending],
        revision: &mut i64,
    ) -> Result<Vec<Result<i64, StoreError>>, rusqlite::Error> {
        let floors = self.floors.read().expect("no panic while held").clone();
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let before = *revision;
        let mut outcomes = Vec::with_capacity(group.len());
        for pending in group {
            let floor = floor_of(&floors, &pending.write.key.group, &pending.write.key.resource);
            let outcome = store_one(&transaction, pending, *revision + 1, floor)?;
            if outcome.is_ok() {
                *revision += 1;
            }
            outcomes.push(outcome);
        }
        if *revision != before {
            transaction
                .prepare_cached("UPDATE meta SET value=?1 WHERE key='rev'")?
                .execute([*revision])?;
        }
        transaction.commit()?;
        Ok(outcomes)
    }

    fn compact(&mut self, now: Instant) -> Result<i64, StoreError> {
        let current = self.current.load(Ordering::Acquire);
        if self.marks.back().is_none_or(|(_, rev)| *rev != current) {
            self.marks.push_back((now, current));
        }
        let older = |age: Duration| {
            let old = |(at, _): &&(Instant, i64)| now.duration_since(*at) >= age;
            self.marks.iter().rev().find(old).map_or(0, |(_, rev)| *rev)
        };
        let (mut rev, churn) = (older(HISTORY_KEPT), older(CHURN_KEPT));
        rev = rev.max(current.saturating_sub(HISTORY_MAX));
        while self.marks.front().is_some_and(|(_, mark)| *mark < rev) {
            self.marks.pop_front();
        }
        let mut targets = vec![("", "", rev)];
        targets.extend(CHURNING.map(|(group, resource)| (group, resource, churn)));
        self.forget(&targets)
    }

    fn compact_all(&mut self, rev: i64) -> Result<i64, StoreError> {
        let rev = rev.min(self.current.load(Ordering::Acquire));
        self.forget(&[("", "", rev)])
    }

    /// Deletes log rows up to each target's revision, but not a state that a kept change still refers to.
    fn forget(&mut self, targets: &[(&str, &str, i64)]) -> Result<i64, StoreError> {
        let mut floors = self.floors.read().expect("no panic while held").clone();
        let result = (|| {
            let transaction =
                self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            for (group, resource, rev) in targets {
                if *rev <= floor_of(&floors, group, resource) {
                    continue;
                }
                let kept = "NOT EXISTS (SELECT 1 FROM log AS next WHERE next.prev_rev = log.rev AND next.rev > ?1)";
                if resource.is_empty() {
                    transaction
                        .execute(&format!("DELETE FROM log WHERE rev <= ?1 AND {kept}"), [rev])?;
                } else {
                    transaction.execute(
                        &format!(
                            "DELETE FROM log WHERE grp = ?2 AND res = ?3 AND rev <= ?1 AND {kept}"
                        ),
                        params![rev, group, resource],
                    )?;
                }
                transaction.execute(
                    "INSERT INTO floor VALUES(?1, ?2, ?3) ON CONFLICT(grp, res) DO UPDATE SET rev = excluded.rev",
                    params![group, resource, rev],
                )?;
                floors.insert(((*group).to_owned(), (*resource).to_owned()), *rev);
            }
            transaction.commit()?;
            self.connection.execute_batch("PRAGMA incremental_vacuum(256);")
        })();
        result.map_err(|error| failed(&self.path, &error))?;
        let floor = floor_of(&floors, "", "");
        *self.floors.write().expect("no panic while held") = floors;
        Ok(floor)
    }

    fn checkpoint(&self) -> Result<(), rusqlite::Error> {
        self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
    }
}

/// Applies one write at revision `rev`; a conflict leaves the transaction as it was.
fn store_one(
    transaction: &Transaction<'_>,
    pending: &Pending,
    rev: i64,
    floor: i64,
) -> Result<Result<i64, StoreError>, rusqlite::Error> {
    let Write { key, seen, object, expires } = &pending.write;
    let place = (&*key.group, &*key.resource, key.namespace.as_str(), key.name.as_str());
    let found: Option<(i64, i64)> = transaction
        .prepare_cached(
            "SELECT rev, create_rev FROM cur WHERE grp=?1 AND res=?2 AND ns=?3 AND name=?4",
        )?
        .query_row(place, |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let seen_rev = seen.as_deref().and_then(revision_of);
    if found.map(|(rev, _)| rev) != seen_rev {
        return Ok(Err(StoreError::Conflict { exists: found.is_some() }));
    }
    let Some((found_rev, create_rev)) = found.or_else(|| object.as_ref().map(|_| (0, rev))) else {
        return Ok(Err(StoreError::Conflict { exists: false }));
    };
    if found_rev != 0 && found_rev <= floor {
        transaction
            .prepare_cached(
                "INSERT OR IGNORE INTO log SELECT rev, grp, res, ns, name, 1, 0, obj FROM cur
                 WHERE grp=?1 AND res=?2 AND ns=?3 AND name=?4",
            )?
            .execute(place)?;
    }
    for uid in owners(seen.as_deref()) {
        transaction
            .prepare_cached(
                "DELETE FROM owner WHERE uid=?1 AND grp=?2 AND res=?3 AND ns=?4 AND name=?5",
            )?
            .execute((uid, place.0, place.1, place.2, place.3))?;
    }
    match object {
        Some(object) => {
            let metadata = &object["metadata"];
            transaction
                .prepare_cached(
                    "INSERT INTO cur VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10) ON CONFLICT(grp,res,ns,name) DO UPDATE
                     SET rev=excluded.rev, create_rev=excluded.create_rev, uid=excluded.uid,
                         deleting=excluded.deleting, expires=excluded.expires, obj=excluded.obj",
                )?
                .execute(params![
                    place.0,
                    place.1,
                    place.2,
                    place.3,
                    rev,
                    create_rev,
                    metadata["uid"].as_str().unwrap_or_default(),
                    metadata["deletionTimestamp"].is_string(),
                    expires,
                    pending.bytes,
                ])?;
            for uid in owners(Some(object)) {
                transaction
                    .prepare_cached("INSERT OR IGNORE INTO owner VALUES(?1,?2,?3,?4,?5)")?
                    .execute((uid, place.0, place.1, place.2, place.3))?;
            }
            transaction
                .prepare_cached("INSERT INTO log VALUES(?1,?2,?3,?4,?5,?6,?7,?8)")?
                .execute(params![
                    rev,
                    place.0,
                    place.1,
                    place.2,
                    place.3,
                    OP_PUT,
                    found_rev,
                    pending.bytes
                ])?;
        }
        None => {
            transaction
                .prepare_cached(
                    "INSERT INTO log SELECT ?5, grp, res, ns, name, ?6, rev, obj FROM cur
                     WHERE grp=?1 AND res=?2 AND ns=?3 AND name=?4",
                )?
                .execute(params![place.0, place.1, place.2, place.3, rev, OP_DELETE])?;
            transaction
                .prepare_cached("DELETE FROM cur WHERE grp=?1 AND res=?2 AND ns=?3 AND name=?4")?
                .execute(place)?;
        }
    }
    Ok(Ok(rev))
}

fn list_newest(
    snapshot: &Connection,
    range: &Range,
    current: i64,
    keep: &dyn Fn(&Value) -> bool,
) -> Result<Listing, ReadError> {
    let mut listing = Listing { revision: current, items: Vec::new(), next: None, remaining: 0 };
    let (after_ns, after_name) = match &range.after {
        Some((ns, name)) => (ns.as_str(), name.as_str()),
        None => ("", ""),
    };
    let (clause, ns) = match (&range.namespace, &range.name) {
        (Some(ns), Some(_)) => ("ns=?3 AND name=?6", ns.as_str()),
        (Some(ns), None) => ("ns=?3 AND ?6 IS NULL", ns.as_str()),
        (None, Some(_)) => ("?3='' AND name=?6", ""),
        (None, None) => ("?3='' AND ?6 IS NULL", ""),
    };
    let from = format!("FROM cur WHERE grp=?1 AND res=?2 AND {clause} AND (ns, name) > (?4, ?5)");
    let place = params![&*range.group, &*range.resource, ns, after_ns, after_name, range.name];
    let mut statement =
        snapshot.prepare_cached(&format!("SELECT rev, obj, ns, name {from} ORDER BY ns, name"))?;
    let mut rows = statement.query(place)?;
    let mut last: Option<(String, String)> = None;
    while let Some(row) = rows.next()? {
        if range.limit.is_some_and(|limit| listing.items.len() == limit) {
            listing.next = last;
            break;
        }
        let object = decode(row.get_ref(1)?.as_blob()?, row.get(0)?)?;
        if keep(&object) {
            listing.items.push(object);
        }
        if range.limit.is_some() {
            last = Some((row.get(2)?, row.get(3)?));
        }
    }
    if let Some((ns_after, name_after)) = &listing.next {
        let place = params![&*range.group, &*range.resource, ns, ns_after, name_after, range.name];
        listing.remaining = snapshot
            .prepare_cached(&format!("SELECT count(*) {from}"))?
            .query_row(place, |row| row.get(0))?;
    }
    Ok(listing)
}

/// The state at an older revision: today's objects, with those that changed since put back to the state before their
/// first later change.
fn list_past(
    snapshot: &Connection,
    range: &Range,
    at: i64,
    keep: &dyn Fn(&Value) -> bool,
) -> Result<Listing, ReadError> {
    let wanted = |ns: &str, name: &str| {
        range.namespace.as_deref().is_none_or(|wanted| wanted == ns)
            && range.name.as_deref().is_none_or(|wanted| wanted == name)
            && range.after.as_ref().is_none_or(|after| (&*after.0, &*after.1) < (ns, name))
    };
    // Revision of each object at `at`, and whether it is still the newest; 0 if it did not exist.
    let mut states: BTreeMap<(String, String), (i64, bool)> = BTreeMap::new();
    let mut statement =
        snapshot.prepare_cached("SELECT ns, name, rev FROM cur WHERE grp=?1 AND res=?2")?;
    let mut rows = statement.query((&*range.group, &*range.resource))?;
    while let Some(row) = rows.next()? {
        let (ns, name): (String, String) = (row.get(0)?, row.get(1)?);
        if wanted(&ns, &name) {
            states.insert((ns, name), (row.get(2)?, true));
        }
    }
    let mut statement = snapshot.prepare_cached(
        "SELECT ns, name, prev_rev FROM log WHERE grp=?1 AND res=?2 AND rev>?3 ORDER BY rev DESC",
    )?;
    let mut rows = statement.query(params![&*range.group, &*range.resource, at])?;
    while let Some(row) = rows.next()? {
        let (ns, name): (String, String) = (row.get(0)?, row.get(1)?);
        if wanted(&ns, &name) {
            states.insert((ns, name), (row.get(2)?, false)); // the earliest later change comes last
        }
    }
    states.retain(|_, (rev, _)| *rev != 0);

    let mut listing = Listing { revision: at, items: Vec::new(), next: None, remaining: 0 };
    let total = states.len() as i64;
    let mut last = None;
    for (read, ((ns, name), (rev, newest))) in states.into_iter().enumerate() {
        if range.limit.is_some_and(|limit| listing.items.len() == limit) {
            listing.next = last;
            listing.remaining = total - read as i64;
            break;
        }
        let object = if newest {
            snapshot
                .prepare_cached(
                    "SELECT rev, obj FROM cur WHERE grp=?1 AND res=?2 AND ns=?3 AND name=?4",
                )?
                .query_row(params![&*range.group, &*range.resource, ns, name], stored_object)
                .optional()?
        } else {
            logged(snapshot, rev)?
        };
        if let Some(object) = object.filter(|object| keep(object)) {
            listing.items.push(object);
        }
        last = Some((ns, name));
    }
    Ok(listing)
}

fn logged(connection: &Connection, rev: i64) -> Result<Option<Value>, ReadError> {
    let object = connection
        .prepare_cached("SELECT rev, obj FROM log WHERE rev=?1")?
        .query_row([rev], stored_object)
        .optional()?;
    Ok(object)
}

fn stored_object(row: &Row<'_>) -> rusqlite::Result<Value> {
    let bytes = row.get_ref(1)?.as_blob()?;
    decode(bytes, row.get(0)?).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Blob, Box::new(error))
    })
}

fn key_of(row: &Row<'_>) -> rusqlite::Result<Key> {
    let (group, resource): (String, String) = (row.get(0)?, row.get(1)?);
    Ok(Key {
        group: group.into(),
        resource: resource.into(),
        namespace: row.get(2)?,
        name: row.get(3)?,
    })
}

fn encode(object: &Value) -> Vec<u8> {
    if object.pointer("/metadata/resourceVersion").is_some() {
        let mut bare = object.clone();
        if let Some(metadata) = bare["metadata"].as_object_mut() {
            metadata.remove("resourceVersion");
        }
        return bare.to_string().into_bytes();
    }
    object.to_string().into_bytes()
}

fn decode(bytes: &[u8], rev: i64) -> Result<Value, serde_json::Error> {
    let mut object = serde_json::from_slice(bytes)?;
    set_revision(&mut object, rev);
    Ok(object)
}

/// Sets `metadata.resourceVersion`.
pub(crate) fn set_revision(object: &mut Value, revision: i64) {
    if object.is_object() {
        object["metadata"]["resourceVersion"] = revision.to_string().into();
    }
}

/// The object's `metadata.resourceVersion`.
pub(crate) fn revision_of(object: &Value) -> Option<i64> {
    object.pointer("/metadata/resourceVersion")?.as_str()?.parse().ok()
}

fn owners(object: Option<&Value>) -> impl Iterator<Item = &str> {
    object
        .and_then(|object| object.pointer("/metadata/ownerReferences")?.as_array())
        .into_iter()
        .flatten()
        .filter_map(|owner| owner["uid"].as_str())
}

fn floor_of(floors: &HashMap<(String, String), i64>, group: &str, resource: &str) -> i64 {
    let of = |group: &str, resource: &str| {
        floors.get(&(group.to_owned(), resource.to_owned())).copied().unwrap_or(0)
    };
    of("", "").max(of(group, resource))
}

fn revision(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT value FROM meta WHERE key='rev'")?
        .query_row([], |row| row.get(0))
}

fn floors(connection: &Connection) -> rusqlite::Result<HashMap<(String, String), i64>> {
    let mut statement = connection.prepare("SELECT grp, res, rev FROM floor")?;
    statement.query_map([], |row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?)))?.collect()
}

fn lock(dir: &Path) -> Result<std::fs::File, OpenError> {
    let path = dir.join("objects.lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .open(&path)
        .map_err(|source| OpenError::Io { path: path.clone(), source })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(OpenError::InUse { path: dir.into() }),
        Err(std::fs::TryLockError::Error(source)) => Err(OpenError::Io { path, source }),
    }
}

fn open_writer(path: &Path, durability: Durability) -> Result<Connection, OpenError> {
    let fail = |source| open_error(path, source);
    refuse_emptied(path)?;
    refuse_foreign_log(path)?;
    if !path.exists() {
        create(path)?;
    }
    let connection = Connection::open(path).map_err(fail)?;
    connection.busy_timeout(Duration::from_secs(5)).map_err(fail)?;
    let layout: i64 =
        connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(fail)?;
    match layout {
        LAYOUT => check(&connection, path)?,
        found => return Err(OpenError::Layout { path: path.into(), found }),
    }
    let synchronous = match durability {
        Durability::Full => "FULL",
        Durability::Relaxed => "NORMAL",
    };
    connection
        .execute_batch(&format!(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous={synchronous}; PRAGMA cache_size=-{WRITER_CACHE_KIB};
             PRAGMA temp_store=FILE; PRAGMA journal_size_limit=16777216;"
        ))
        .map_err(fail)?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

/// Makes the database beside its place and moves it there when it is complete: a file that is there was whole once.
fn create(path: &Path) -> Result<(), OpenError> {
    let half = path.with_extension("half");
    let io = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::StorageFull => OpenError::Full { path: path.into() },
        _ => OpenError::Io { path: path.into(), source },
    };
    for leftover in ["half", "half-journal", "half-wal", "half-shm"] {
        match std::fs::remove_file(path.with_extension(leftover)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
    }
    let script = format!(
        "PRAGMA auto_vacuum=INCREMENTAL; BEGIN IMMEDIATE; {TABLES}
         PRAGMA application_id={APPLICATION}; PRAGMA user_version={LAYOUT}; COMMIT;"
    );
    Connection::open(&half)
        .and_then(|connection| {
            connection.execute_batch(&script)?;
            connection.close().map_err(|(_, error)| error)
        })
        .map_err(|source| open_error(path, source))?;
    std::fs::rename(&half, path).map_err(io)
}

/// A file without a byte is a new database to SQLite; to us it is one that lost everything.
fn refuse_emptied(path: &Path) -> Result<(), OpenError> {
    let emptied = std::fs::metadata(path).is_ok_and(|facts| facts.len() == 0);
    let detail = "the file is empty".to_owned();
    if emptied { Err(OpenError::Damaged { path: path.into(), detail }) } else { Ok(()) }
}

/// SQLite ignores a log whose header it does not know, and with it every commit in there.
///
/// A header of zeros is what a power cut leaves before the first commit, so it holds nothing.
///
/// Source: SQLite's file format, "WAL File Format": magic number 0x377f0682 or 0x377f0683.
fn refuse_foreign_log(path: &Path) -> Result<(), OpenError> {
    use std::io::Read;
    let wal = path.with_extension("db-wal");
    let Ok(mut file) = std::fs::File::open(&wal) else { return Ok(()) };
    let mut magic = [0; 4];
    if file.read_exact(&mut magic).is_err() {
        return Ok(()); // shorter than a header: nothing was committed to it
    }
    match u32::from_be_bytes(magic) {
        0 | 0x377f_0682 | 0x377f_0683 => Ok(()),
        _ => {
            let detail = format!("`{}` is no write-ahead log", wal.display());
            Err(OpenError::Damaged { path: path.into(), detail })
        }
    }
}

/// Reads every page once. A torn or foreign file is found here, not by the first unlucky request.
fn check(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let verdict: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(|source| open_error(path, source))?;
    if verdict == "ok" {
        return Ok(());
    }
    Err(OpenError::Damaged { path: path.into(), detail: verdict })
}

fn open_reader(path: &Path) -> Result<Connection, rusqlite::Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection
        .execute_batch(&format!("PRAGMA query_only=ON; PRAGMA cache_size=-{READER_CACHE_KIB};"))?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

/// Whether the shared memory of the log could not grow, which SQLite reports as an input/output error of its own.
fn is_full(error: &rusqlite::Error) -> bool {
    error
        .sqlite_error()
        .is_some_and(|error| error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE)
}

fn open_error(path: &Path, source: rusqlite::Error) -> OpenError {
    let path = path.to_path_buf();
    match source.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            OpenError::Damaged { path, detail: source.to_string() }
        }
        Some(ErrorCode::DiskFull) => OpenError::Full { path },
        _ if is_full(&source) => OpenError::Full { path },
        _ => OpenError::Sqlite { path, source },
    }
}

fn failed(path: &Path, error: &rusqlite::Error) -> StoreError {
    let path = path.to_path_buf();
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full { path },
        _ if is_full(error) => StoreError::Full { path },
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            StoreError::Damaged { path, detail: error.to_string() }
        }
        _ => StoreError::Sqlite { path, detail: error.to_string() },
    }
}

#[cfg(test)]
mod tests;
