//! The node's database: what the hub wants of it, and the restarts of its containers.
//!
//! One thread writes; a write is on the disk when [`Store::write`] returns (WAL, `synchronous=FULL`), and writes that
//! wait together share one transaction. Reads go through a second connection on the caller's thread. Nothing is
//! written when nothing changes.
//!
//! A file that is not a sound database is never used and never thrown away: it is renamed to
//! `<file>.corrupt-<seconds>`, and the new one stays [`Trust::Rebuilding`] until the hub has told everything again.
//!
//! The agent is the only caller.

use crate::{outbox_store, twin_store};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, params};
use skerry_edge_core::meta::{Row, TOMBSTONES_MAX, Tombstone, Write};
use skerry_edge_core::outbox;
use skerry_edge_core::pods::backoff::RestartRecord;
use skerry_edge_core::rules::RuleLimits;
use skerry_edge_core::twin;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;

/// Version of the tables; [`MIGRATIONS`] leads to it.
const SCHEMA_VERSION: usize = MIGRATIONS.len();
/// Step `n` leads from version `n` to `n + 1`.
const MIGRATIONS: [&str; 4] = [
    "
    CREATE TABLE objects (key TEXT PRIMARY KEY, type TEXT NOT NULL, uid TEXT NOT NULL, rv TEXT NOT NULL,
        json TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE tombstones (seq INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, version_min INTEGER NOT NULL);
    CREATE TABLE restart_state (pod_uid TEXT NOT NULL, container TEXT NOT NULL, json TEXT NOT NULL,
        PRIMARY KEY (pod_uid, container)) WITHOUT ROWID;
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    ",
    "
    CREATE TABLE taken_over (container TEXT PRIMARY KEY, hash TEXT NOT NULL) WITHOUT ROWID;
    ",
    outbox_store::TABLE,
    twin_store::TABLES,
];
/// Memory that SQLite may use for pages, per connection.
const CACHE_KIB: u32 = 256;
/// Pages after which the WAL is written back (256 KiB).
const CHECKPOINT_PAGES: u32 = 64;
/// Writes that may wait for the thread; the agent waits for each of its own, so only restart records pile up.
const JOBS_MAX: usize = 256;
/// Writes of one transaction.
const BATCH_MAX: usize = 64;

/// Whether the rows are all that the hub wanted of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// A new file: what runs on the node may be known to the hub.
    Fresh,
    /// A new file in place of a broken one.
    Rebuilding,
    /// The hub has told everything at least once.
    Complete,
}

impl Trust {
    fn as_str(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Rebuilding => "rebuilding",
            Self::Complete => "complete",
        }
    }

    fn parse(text: &str) -> Self {
        [Self::Fresh, Self::Complete]
            .into_iter()
            .find(|trust| trust.as_str() == text)
            .unwrap_or(Self::Rebuilding)
    }
}

/// What was found in the file.
#[derive(Debug)]
pub struct Opened {
    /// Every object.
    pub rows: Vec<Row>,
    /// Deletes to remember, oldest first.
    pub tombstones: Vec<Tombstone>,
    /// What is owed to the cluster, oldest first.
    pub outbox: Vec<outbox::Row>,
    /// Whether the rows may be believed to be all.
    pub trust: Trust,
    /// Where a broken file was moved to, if there was one just now, and what was wrong with it.
    pub broken: Option<(PathBuf, String)>,
}

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The directory or the file cannot be made or renamed.
    #[error("could not prepare `{path}`")]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// SQLite cannot use the file, and not because it is broken.
    #[error("could not open database `{path}`")]
    Database {
        /// Which one.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// Written by a newer agent.
    #[error("database `{path}` has version {version}, this agent knows up to {SCHEMA_VERSION}")]
    Newer {
        /// Which one.
        path: PathBuf,
        /// Its version.
        version: usize,
    },
}

impl OpenError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Newer { .. } => {
                Some("run the agent version that wrote it, or a newer one".into())
            }
            Self::File { path, .. } | Self::Database { path, .. } => {
                Some(format!("check owner, mode and free space of `{}`", path.display()))
            }
        }
    }
}

/// Why something is not on the disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// No room.
    #[error("the disk of the database is full")]
    Full,
    /// The file is no sound database any more.
    #[error("the database is broken")]
    Broken(#[source] rusqlite::Error),
    /// Anything else.
    #[error("could not write to the database")]
    Database(#[source] rusqlite::Error),
    /// The writing thread is gone.
    #[error("the database is closed")]
    Closed,
}

/// The database of one node.
pub struct Store {
    jobs: Option<mpsc::SyncSender<Job>>,
    /// Present until drop.
    reader: Mutex<Option<Connection>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

enum Change {
    Object(Write),
    Trust(Trust),
    Restart(RestartRecord),
    ForgetRestarts(String),
    Outbox(Vec<outbox::Change>),
    Twins(Vec<twin::Write>),
    Follow { topic: String, wanted: bool },
    Limits(RuleLimits),
}

struct Job {
    change: Change,
    done: Option<oneshot::Sender<Result<(), WriteError>>>,
}

impl Store {
    /// Opens or makes the database at `path`; see the head of this file for what happens to a broken one.
    ///
    /// # Errors
    ///
    /// [`OpenError`] when there is no usable file and none can be made.
    pub fn open(path: &Path) -> Result<(Self, Opened), OpenError> {
        let in_file = |source| OpenError::File { path: path.to_owned(), source };
        let directory = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(directory).map_err(in_file)?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).map_err(in_file)?;
        let database = |source| OpenError::Database { path: path.to_owned(), source };

        let mut broken = None;
        let writer = match sound_connection(path)? {
            Ok(connection) => connection,
            Err(reason) => {
                let seconds =
                    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
                let aside = suffixed(path, &format!(".corrupt-{seconds}"));
                fs::rename(path, &aside).map_err(in_file)?;
                for suffix in ["-wal", "-shm"] {
                    // Kept beside the file, they may hold the newest rows for whoever looks into it.
                    let _ = fs::rename(suffixed(path, suffix), suffixed(&aside, suffix));
                }
                broken = Some((aside, reason));
                sound_connection(path)?.map_err(|_| {
                    database(rusqlite::Error::SqliteFailure(
                        rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT),
                        Some("a new file is broken too".into()),
                    ))
                })?
            }
        };
        if broken.is_some() {
            set_trust(&writer, Trust::Rebuilding).map_err(database)?;
        }
        let trust: Option<String> = writer
            .query_row("SELECT value FROM facts WHERE name = 'trust'", [], |row| row.get(0))
            .optional()
            .map_err(database)?;
        let trust = match trust {
            Some(text) => Trust::parse(&text),
            None => {
                set_trust(&writer, Trust::Fresh).map_err(database)?;
                Trust::Fresh
            }
        };
        let (rows, tombstones) = read_all(&writer).map_err(database)?;
        let outbox = outbox_store::read_all(&writer).map_err(database)?;
        let reader = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)
            .map_err(database)?;
        reader.pragma_update(None, "cache_size", -64).map_err(database)?;

        let (jobs, inbox) = mpsc::sync_channel(JOBS_MAX);
        let thread = std::thread::Builder::new()
            .name("store".into())
            .stack_size(256 * 1024)
            .spawn(move || run(writer, &inbox))
            .map_err(in_file)?;
        let store =
            Self { jobs: Some(jobs), reader: Mutex::new(Some(reader)), thread: Some(thread) };
        Ok((store, Opened { rows, tombstones, outbox, trust, broken }))
    }

    /// Makes a change of the desired state durable.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; nothing is changed then.
    pub async fn write(&self, write: Write) -> Result<(), WriteError> {
        self.change(Change::Object(write)).await
    }

    /// Records how far the rows may be believed.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; nothing is changed then.
    pub async fn set_trust(&self, trust: Trust) -> Result<(), WriteError> {
        self.change(Change::Trust(trust)).await
    }

    /// Makes changes of the outbox durable, all or none.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; nothing is changed then.
    pub async fn write_outbox(&self, changes: Vec<outbox::Change>) -> Result<(), WriteError> {
        self.change(Change::Outbox(changes)).await
    }

    /// Makes changes of devices and mappers durable, all or none.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; nothing is changed then.
    pub async fn write_twins(&self, changes: Vec<twin::Write>) -> Result<(), WriteError> {
        self.change(Change::Twins(changes)).await
    }

    /// Remembers whether a rule of the cloud wants a topic of the broker.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; nothing is changed then.
    pub async fn write_followed(&self, topic: String, wanted: bool) -> Result<(), WriteError> {
        self.change(Change::Follow { topic, wanted }).await
    }

    /// Keeps what a rule lets run, instead of what it let run before.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; nothing is changed then.
    pub async fn write_limits(&self, limits: RuleLimits) -> Result<(), WriteError> {
        self.change(Change::Limits(limits)).await
    }

    /// Returns what rules let run. Nothing, when it cannot be read.
    pub fn read_limits(&self) -> Vec<RuleLimits> {
        let reader = self.reader.lock().expect("a read does not panic");
        let reader = reader.as_ref().expect("present until drop");
        twin_store::limits(reader).unwrap_or_else(|error| {
            tracing::error!(%error, "could not read from the database what rules let run");
            Vec::new()
        })
    }

    /// Returns what is kept of devices and mappers. Nothing, when it cannot be read.
    pub fn read_twins(&self) -> twin::Kept {
        let reader = self.reader.lock().expect("a read does not panic");
        let reader = reader.as_ref().expect("present until drop");
        twin_store::read_all(reader).unwrap_or_else(|error| {
            tracing::error!(%error, "could not read devices from the database");
            twin::Kept::default()
        })
    }

    /// Returns the topics that rules of the cloud want.
    pub fn read_followed(&self) -> Vec<String> {
        let reader = self.reader.lock().expect("a read does not panic");
        let reader = reader.as_ref().expect("present until drop");
        twin_store::followed(reader).unwrap_or_else(|error| {
            tracing::error!(%error, "could not read followed topics from the database");
            Vec::new()
        })
    }

    /// Returns the content of one row of the outbox. An unreadable row counts as none.
    pub fn read_outbox(&self, seq: u64) -> Option<Arc<str>> {
        let reader = self.reader.lock().expect("a read does not panic");
        let reader = reader.as_ref().expect("present until drop");
        outbox_store::read_content(reader, seq).unwrap_or_else(|error| {
            tracing::error!(seq, %error, "could not read a row of the outbox");
            None
        })
    }

    /// Returns the stored JSON of every object of one type, by key. Unreadable rows count as none.
    pub fn read_kind(&self, kind: &str) -> Vec<String> {
        let reader = self.reader.lock().expect("a read does not panic");
        let reader = reader.as_ref().expect("present until drop");
        let read = || -> rusqlite::Result<Vec<String>> {
            let mut query =
                reader.prepare_cached("SELECT json FROM objects WHERE type = ?1 ORDER BY key")?;
            query.query_map([kind], |row| row.get(0))?.collect()
        };
        read().unwrap_or_else(|error| {
            tracing::error!(kind, %error, "could not read from the database");
            Vec::new()
        })
    }

    /// Returns the stored JSON of one object. An unreadable row counts as none; the next open finds out why.
    pub fn read(&self, path: &str) -> Option<String> {
        let reader = self.reader.lock().expect("a read does not panic");
        let reader = reader.as_ref().expect("present until drop");
        let read = reader
            .prepare_cached("SELECT json FROM objects WHERE key = ?1")
            .and_then(|mut query| query.query_row([path], |row| row.get(0)).optional());
        read.unwrap_or_else(|error| {
            tracing::error!(resource = path, %error, "could not read from the database");
            None
        })
    }

    async fn change(&self, change: Change) -> Result<(), WriteError> {
        let (done, answer) = oneshot::channel();
        self.submit(Job { change, done: Some(done) })?;
        answer.await.unwrap_or(Err(WriteError::Closed))
    }

    fn submit(&self, job: Job) -> Result<(), WriteError> {
        let jobs = self.jobs.as_ref().expect("present until drop");
        jobs.send(job).map_err(|_| WriteError::Closed)
    }
}

impl crate::pods::RestartState for Store {
    fn load(&self) -> Vec<RestartRecord> {
        let reader = self.reader.lock().expect("a read does not panic");
        let reader = reader.as_ref().expect("present until drop");
        let read = || -> rusqlite::Result<Vec<String>> {
            let mut query = reader.prepare("SELECT json FROM restart_state")?;
            query.query_map([], |row| row.get(0))?.collect()
        };
        let texts = read().unwrap_or_else(|error| {
            tracing::error!(%error, "could not read restart counts from the database");
            Vec::new()
        });
        texts.iter().filter_map(|text| serde_json::from_str(text).ok()).collect()
    }

    fn save(&self, record: &RestartRecord) {
        let change = Change::Restart(record.clone());
        if let Err(error) = self.submit(Job { change, done: None }) {
            tracing::error!(%error, "a restart count was not stored");
        }
    }

    fn forget(&self, pod_uid: &str) {
        let change = Change::ForgetRestarts(pod_uid.into());
        if let Err(error) = self.submit(Job { change, done: None }) {
            tracing::error!(%error, "restart counts of a pod were not removed");
        }
    }

    fn taken_over(&self) -> HashMap<String, String> {
        let reader = self.reader.lock().expect("a read does not panic");
        let reader = reader.as_ref().expect("present until drop");
        let read = || -> rusqlite::Result<_> {
            let mut query = reader.prepare("SELECT container, hash FROM taken_over")?;
            query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        };
        read().unwrap_or_else(|error| {
            tracing::error!(%error, "could not read what was taken over from the database");
            HashMap::new()
        })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // The writer has to close last: it is the one that can empty the WAL into the file.
        *self.reader.get_mut().expect("a read does not panic") = None;
        self.jobs = None; // ends the thread after what is queued
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Makes a database at `path`, where there is none, with everything in one transaction: for a node that is taken over
/// from another agent. `taken_over` is [`crate::pods::RestartState::taken_over`].
///
/// # Errors
///
/// [`OpenError`]; what was begun may be left at `path` then.
pub fn create(
    path: &Path,
    rows: &[Row],
    taken_over: &HashMap<String, String>,
) -> Result<(), OpenError> {
    let database = |source| OpenError::Database { path: path.to_owned(), source };
    let broken = |reason| {
        database(rusqlite::Error::SqliteFailure(
            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT),
            Some(reason),
        ))
    };
    let mut connection = sound_connection(path)?.map_err(broken)?;
    let fill = |connection: &mut Connection| -> rusqlite::Result<()> {
        let transaction = connection.transaction()?;
        for row in rows {
            let values = params![row.path, row.kind, row.uid, row.rv, row.json];
            transaction
                .prepare_cached("INSERT INTO objects VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(values)?;
        }
        for (container, hash) in taken_over {
            transaction
                .prepare_cached("INSERT INTO taken_over VALUES (?1, ?2)")?
                .execute([container, hash])?;
        }
        set_trust(&transaction, Trust::Fresh)?;
        transaction.commit()?;
        // One file, whole: whoever renames it must not leave a part behind.
        connection.pragma_update(None, "journal_mode", "DELETE")
    };
    fill(&mut connection).map_err(database)?;
    connection.close().map_err(|(_, source)| database(source))
}

/// Reads every row of the database at `path`, which no agent uses now, and the number of events in its outbox.
///
/// # Errors
///
/// [`OpenError`] when it cannot be used, or is broken.
pub fn read(path: &Path) -> Result<(Vec<Row>, usize), OpenError> {
    let database = |source| OpenError::Database { path: path.to_owned(), source };
    let connection = sound_connection(path)?.map_err(|reason| {
        database(rusqlite::Error::SqliteFailure(
            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT),
            Some(reason),
        ))
    })?;
    let (rows, _) = read_all(&connection).map_err(database)?;
    let owed = outbox_store::read_all(&connection).map_err(database)?;
    Ok((rows, owed.iter().filter(|row| row.kind == outbox::Kind::Event).count()))
}

/// Removes the database at `path` and every broken one that was kept beside it: secrets are in them.
///
/// # Errors
///
/// [`OpenError::File`] when one of them stays.
pub fn remove(path: &Path) -> Result<(), OpenError> {
    let in_file = |source| OpenError::File { path: path.to_owned(), source };
    let prefix = path.file_name().unwrap_or_default().as_encoded_bytes();
    for entry in fs::read_dir(path.parent().unwrap_or(Path::new("."))).map_err(in_file)? {
        let entry = entry.map_err(in_file)?;
        if entry.file_name().as_encoded_bytes().starts_with(prefix) {
            fs::remove_file(entry.path()).map_err(in_file)?;
        }
    }
    Ok(())
}

fn run(mut connection: Connection, inbox: &mpsc::Receiver<Job>) {
    let mut failing = false;
    while let Ok(first) = inbox.recv() {
        let mut batch = vec![first];
        batch.extend(inbox.try_iter().take(BATCH_MAX - 1));
        let result = apply(&mut connection, batch.iter().map(|job| &job.change));
        match &result {
            Ok(()) if failing => tracing::info!("the database takes writes again"),
            Err(error) if !failing => {
                // Once, not for each message that the hub repeats meanwhile.
                tracing::error!(%error, "could not write to the database; nothing is acknowledged until it works");
            }
            _ => {}
        }
        failing = result.is_err();
        for done in batch.into_iter().filter_map(|job| job.done) {
            let answer = match &result {
                Ok(()) => Ok(()),
                Err(error) if error.sqlite_error_code() == Some(ErrorCode::DiskFull) => {
                    Err(WriteError::Full)
                }
                Err(error) if is_broken(error) => Err(WriteError::Broken(copy_of(error))),
                Err(error) => Err(WriteError::Database(copy_of(error))),
            };
            let _ = done.send(answer); // the agent may have stopped waiting
        }
    }
}

fn is_broken(error: &rusqlite::Error) -> bool {
    let code = error.sqlite_error_code();
    matches!(code, Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// The error again, for each of those who wait; the type cannot be cloned.
fn copy_of(error: &rusqlite::Error) -> rusqlite::Error {
    let code =
        error.sqlite_error().map_or(rusqlite::ffi::SQLITE_ERROR, |inner| inner.extended_code);
    rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), Some(error.to_string()))
}

fn apply<'a>(
    connection: &mut Connection,
    changes: impl Iterator<Item = &'a Change>,
) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    for change in changes {
        match change {
            Change::Object(Write::Put(row)) => {
                transaction
                    .prepare_cached("INSERT OR REPLACE INTO objects VALUES (?1, ?2, ?3, ?4, ?5)")?
                    .execute(params![row.path, row.kind, row.uid, row.rv, row.json])?;
                transaction
                    .prepare_cached("DELETE FROM tombstones WHERE uid = ?1")?
                    .execute([&row.uid])?;
            }
            Change::Object(Write::Remove { path, tombstone }) => {
                transaction.execute("DELETE FROM objects WHERE key = ?1", [path])?;
                if let Some(tombstone) = tombstone {
                    let version_min = i64::try_from(tombstone.version_min).unwrap_or(i64::MAX);
                    transaction.execute(
                        "INSERT OR REPLACE INTO tombstones (uid, version_min) VALUES (?1, ?2)",
                        params![tombstone.uid, version_min],
                    )?;
                    transaction.execute(
                        "DELETE FROM tombstones WHERE seq <= (SELECT max(seq) FROM tombstones) - ?1",
                        [i64::try_from(TOMBSTONES_MAX).unwrap_or(i64::MAX)],
                    )?;
                }
            }
            Change::Trust(trust) => set_trust(&transaction, *trust)?,
            Change::Restart(record) => {
                let json = serde_json::to_string(record).unwrap_or_default();
                transaction
                    .prepare_cached("INSERT OR REPLACE INTO restart_state VALUES (?1, ?2, ?3)")?
                    .execute(params![record.pod_uid, record.container, json])?;
            }
            Change::ForgetRestarts(uid) => {
                transaction.execute("DELETE FROM restart_state WHERE pod_uid = ?1", [uid])?;
            }
            Change::Outbox(changes) => {
                changes.iter().try_for_each(|change| outbox_store::apply(&transaction, change))?;
            }
            Change::Twins(changes) => {
                changes.iter().try_for_each(|change| twin_store::apply(&transaction, change))?;
            }
            Change::Follow { topic, wanted } => twin_store::follow(&transaction, topic, *wanted)?,
            Change::Limits(limits) => twin_store::limit(&transaction, limits)?,
        }
    }
    transaction.commit()
}

fn set_trust(connection: &Connection, trust: Trust) -> rusqlite::Result<()> {
    let sql = "INSERT OR REPLACE INTO facts VALUES ('trust', ?1)";
    connection.execute(sql, [trust.as_str()]).map(drop)
}

fn read_all(connection: &Connection) -> rusqlite::Result<(Vec<Row>, Vec<Tombstone>)> {
    let mut query =
        connection.prepare("SELECT key, type, uid, rv, json FROM objects ORDER BY key")?;
    let rows = query.query_map([], |row| {
        Ok(Row {
            path: row.get(0)?,
            kind: row.get(1)?,
            uid: row.get(2)?,
            rv: row.get(3)?,
            json: row.get(4)?,
        })
    })?;
    let rows = rows.collect::<rusqlite::Result<_>>()?;
    let mut query = connection.prepare("SELECT uid, version_min FROM tombstones ORDER BY seq")?;
    let tombstones = query.query_map([], |row| {
        let version_min: i64 = row.get(1)?;
        Ok(Tombstone { uid: row.get(0)?, version_min: u64::try_from(version_min).unwrap_or(0) })
    })?;
    Ok((rows, tombstones.collect::<rusqlite::Result<_>>()?))
}

/// Opens the file and looks at all of it. The inner error says why it is no sound database.
fn sound_connection(path: &Path) -> Result<Result<Connection, String>, OpenError> {
    // SQLite would make the file readable for everybody, and secrets are in it.
    fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| OpenError::File { path: path.to_owned(), source })?;
    match prepare(path) {
        Ok(Prepared::Sound(connection)) => Ok(Ok(connection)),
        Ok(Prepared::Broken(reason)) => Ok(Err(reason)),
        Ok(Prepared::Newer(version)) => Err(OpenError::Newer { path: path.to_owned(), version }),
        Err(error) if is_broken(&error) => Ok(Err(error.to_string())),
        Err(error) => Err(OpenError::Database { path: path.to_owned(), source: error }),
    }
}

enum Prepared {
    Sound(Connection),
    Broken(String),
    Newer(usize),
}

fn prepare(path: &Path) -> rusqlite::Result<Prepared> {
    let mut connection = Connection::open(path)?;
    connection.pragma_update(None, "cache_size", -i64::from(CACHE_KIB))?;
    connection.busy_timeout(std::time::Duration::from_secs(5))?;
    let verdict: String =
        connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if verdict != "ok" {
        return Ok(Prepared::Broken(verdict));
    }
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    connection.pragma_update(None, "journal_size_limit", 1 << 20)?;
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let version = usize::try_from(version).unwrap_or(usize::MAX);
    let Some(missing) = MIGRATIONS.get(version..) else { return Ok(Prepared::Newer(version)) };
    if !missing.is_empty() {
        let transaction = connection.transaction()?;
        missing.iter().try_for_each(|sql| transaction.execute_batch(sql))?;
        transaction.pragma_update(
            None,
            "user_version",
            i64::try_from(SCHEMA_VERSION).unwrap_or(i64::MAX),
        )?;
        transaction.commit()?;
    }
    Ok(Prepared::Sound(connection))
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::RestartState;

    fn row(name: &str, rv: &str) -> Row {
        Row {
            path: format!("default/configmap/{name}"),
            kind: "configmap".into(),
            uid: format!("uid-{name}"),
            rv: rv.into(),
            json: format!(r#"{{"metadata":{{"name":"{name}"}}}}"#),
        }
    }

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().expect("a directory")
    }

    #[tokio::test]
    async fn rows_tombstones_and_restarts_outlive_the_process() {
        let dir = directory();
        let path = dir.path().join("state.db");
        let (store, opened) = Store::open(&path).expect("a new file");
        assert_eq!((opened.rows.len(), opened.trust), (0, Trust::Fresh));
        store.write(Write::Put(row("a", "1"))).await.expect("written");
        store.write(Write::Put(row("a", "2"))).await.expect("written");
        store.write(Write::Put(row("b", "3"))).await.expect("written");
        let tombstone = Tombstone { uid: "uid-b".into(), version_min: 4 };
        let remove = Write::Remove {
            path: "default/configmap/b".into(),
            tombstone: Some(tombstone.clone()),
        };
        store.write(remove).await.expect("written");
        store.set_trust(Trust::Complete).await.expect("written");
        let record = RestartRecord {
            pod_uid: "u".into(),
            container: "c".into(),
            restart_count: 3,
            hash: "h".into(),
            delay_secs: 20,
            raised_at: None,
        };
        store.save(&record);
        assert!(store.read("default/configmap/a").is_some_and(|json| json.contains("\"a\"")));
        assert_eq!(store.read("default/configmap/b"), None);
        drop(store);

        let (store, opened) = Store::open(&path).expect("the same file");
        assert_eq!(opened.rows, [row("a", "2")]);
        assert_eq!(opened.tombstones, [tombstone]);
        assert_eq!(opened.trust, Trust::Complete);
        assert_eq!(store.load(), [record]);
        let mode = fs::metadata(&path).expect("the file").permissions().mode();
        assert_eq!(mode & 0o077, 0, "secrets are for the owner only");
    }

    #[tokio::test]
    async fn object_that_came_back_is_not_remembered_as_deleted() {
        let dir = directory();
        let path = dir.path().join("state.db");
        let (store, _) = Store::open(&path).expect("a new file");
        for name in ["a", "b"] {
            let tombstone = Tombstone { uid: row(name, "3").uid, version_min: 4 };
            let path = format!("default/configmap/{name}");
            let remove = Write::Remove { path, tombstone: Some(tombstone) };
            store.write(remove).await.expect("written");
        }
        store.write(Write::Put(row("b", "2"))).await.expect("written");
        drop(store);

        let (_, opened) = Store::open(&path).expect("the same file");
        assert_eq!(opened.rows, [row("b", "2")]);
        assert_eq!(opened.tombstones, [Tombstone { uid: row("a", "3").uid, version_min: 4 }]);
    }

    #[tokio::test]
    async fn what_was_acknowledged_is_in_a_copy_taken_at_any_moment() {
        let dir = directory();
        let path = dir.path().join("state.db");
        let (store, _) = Store::open(&path).expect("a new file");
        for n in 0..40 {
            store.write(Write::Put(row(&format!("o{n:02}"), "1"))).await.expect("written");
            // What a power cut leaves behind: the files as they are now, without any orderly end.
            let after = dir.path().join(format!("cut-{n}")).join("state.db");
            fs::create_dir_all(after.parent().expect("a parent")).expect("a directory");
            for suffix in ["", "-wal"] {
                fs::copy(suffixed(&path, suffix), suffixed(&after, suffix)).expect("a copy");
            }
            let (_store, opened) = Store::open(&after).expect("a copy opens");
            assert_eq!(opened.rows.len(), n + 1, "after write {n}");
            assert!(opened.broken.is_none());
        }
    }

    #[tokio::test]
    async fn torn_end_of_the_wal_loses_nothing_that_came_before() {
        let dir = directory();
        let path = dir.path().join("state.db");
        let (store, _) = Store::open(&path).expect("a new file");
        store.write(Write::Put(row("a", "1"))).await.expect("written");
        let before = fs::metadata(suffixed(&path, "-wal")).expect("a WAL").len();
        store.write(Write::Put(row("b", "1"))).await.expect("written");
        let after = dir.path().join("torn.db");
        fs::copy(&path, &after).expect("a copy");
        let wal = fs::read(suffixed(&path, "-wal")).expect("a WAL");
        for cut in (before as usize..wal.len()).step_by(512) {
            fs::copy(&path, &after).expect("a copy");
            fs::write(suffixed(&after, "-wal"), &wal[..cut]).expect("a torn WAL");
            let _ = fs::remove_file(suffixed(&after, "-shm"));
            let (_store, opened) = Store::open(&after).expect("a copy opens");
            assert_eq!(opened.rows.first(), Some(&row("a", "1")), "cut at {cut}");
        }
    }

    #[tokio::test]
    async fn broken_file_is_kept_aside_and_the_new_one_is_not_trusted_until_told() {
        let dir = directory();
        let path = dir.path().join("state.db");
        let (store, _) = Store::open(&path).expect("a new file");
        for n in 0..200 {
            store.write(Write::Put(row(&format!("o{n}"), "1"))).await.expect("written");
        }
        store.set_trust(Trust::Complete).await.expect("written");
        drop(store);
        let mut bytes = fs::read(&path).expect("the file");
        let middle = bytes.len() / 2;
        bytes[middle..middle + 4096].fill(0xa5);
        fs::write(&path, &bytes).expect("broken");

        let (store, opened) = Store::open(&path).expect("a new file in its place");
        let (aside, reason) = opened.broken.expect("said");
        assert!(!reason.is_empty());
        assert_eq!(fs::read(&aside).expect("kept"), bytes);
        assert_eq!((opened.rows.len(), opened.trust), (0, Trust::Rebuilding));
        drop(store);
        let (store, opened) = Store::open(&path).expect("opens again");
        assert_eq!(opened.trust, Trust::Rebuilding, "a restart does not make it complete");
        store.set_trust(Trust::Complete).await.expect("written");
        drop(store);
        assert_eq!(Store::open(&path).expect("opens again").1.trust, Trust::Complete);

        fs::write(dir.path().join("other"), "").expect("written");
        remove(&path).expect("removed");
        let left: Vec<_> = fs::read_dir(dir.path()).expect("a directory").flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(Store::open(&path).expect("a new file").1.trust, Trust::Fresh);
    }

    #[test]
    fn database_of_a_taken_over_node_is_one_whole_file() {
        let dir = directory();
        let path = dir.path().join("state.db");
        let taken_over = HashMap::from([("c1".to_owned(), "hash".to_owned())]);
        create(&path, &[row("a", "1"), row("b", "2")], &taken_over).expect("made");
        let files: Vec<_> = fs::read_dir(dir.path()).expect("a directory").flatten().collect();
        assert_eq!(files.len(), 1, "{files:?}");
        let (rows, events) = read(&path).expect("readable");
        assert_eq!((rows.len(), events), (2, 0));
        let (store, opened) = Store::open(&path).expect("opens");
        assert_eq!((opened.rows.len(), opened.trust), (2, Trust::Fresh));
        assert_eq!(store.taken_over(), taken_over);
    }

    #[test]
    fn file_that_is_no_database_at_all_is_kept_aside_too() {
        let dir = directory();
        let path = dir.path().join("state.db");
        fs::write(&path, "x".repeat(10_000)).expect("some text");
        let (_, opened) = Store::open(&path).expect("a new file in its place");
        assert!(opened.broken.is_some_and(|(aside, _)| aside.exists()));
    }

    #[test]
    fn file_of_a_newer_agent_is_left_alone() {
        let dir = directory();
        let path = dir.path().join("state.db");
        drop(Store::open(&path).expect("a new file"));
        let connection = Connection::open(&path).expect("opens");
        connection.pragma_update(None, "user_version", 99).expect("set");
        drop(connection);
        let error = Store::open(&path).err().expect("refused");
        assert!(matches!(error, OpenError::Newer { version: 99, .. }));
        assert!(path.exists());
    }

    #[tokio::test]
    async fn file_that_breaks_while_in_use_is_told_apart_from_a_failing_write() {
        let dir = directory();
        let path = dir.path().join("state.db");
        fs::write(&path, "x".repeat(10_000)).expect("some text");
        // SQLite looks at the file with the first statement only.
        let connection = Connection::open(&path).expect("opens");
        let (jobs, inbox) = mpsc::sync_channel(1);
        let thread = std::thread::spawn(move || run(connection, &inbox));
        let (done, answer) = oneshot::channel();
        let change = Change::Object(Write::Put(row("a", "1")));
        jobs.send(Job { change, done: Some(done) }).expect("the thread runs");
        assert!(matches!(answer.await, Ok(Err(WriteError::Broken(_)))));
        drop(jobs);
        thread.join().expect("ends");
    }

    #[tokio::test]
    async fn full_disk_is_told_and_leaves_what_was_there() {
        let dir = directory();
        let path = dir.path().join("state.db");
        let (store, _) = Store::open(&path).expect("a new file");
        store.write(Write::Put(row("a", "1"))).await.expect("written");
        drop(store);
        let connection = match prepare(&path).expect("opens") {
            Prepared::Sound(connection) => connection,
            _ => panic!("a sound file"),
        };
        let pages: i64 =
            connection.query_row("PRAGMA page_count", [], |row| row.get(0)).expect("a number");
        connection.pragma_update(None, "max_page_count", pages).expect("set");
        let (jobs, inbox) = mpsc::sync_channel(1);
        let thread = std::thread::spawn(move || run(connection, &inbox));
        let mut large = row("b", "1");
        large.json = "x".repeat(100_000);
        let (done, answer) = oneshot::channel();
        let change = Change::Object(Write::Put(large));
        jobs.send(Job { change, done: Some(done) }).expect("the thread runs");
        assert!(matches!(answer.await, Ok(Err(WriteError::Full))));
        drop(jobs);
        thread.join().expect("ends");
        assert_eq!(Store::open(&path).expect("opens").1.rows, [row("a", "1")]);
    }
}
