//! The history of devices on the disk: a database of its own beside the node's, so that neither can fill or break the
//! other.
//!
//! Blocks are rows in the order in which they were sealed, so the oldest are at the front and go first when there is no
//! room. What is still open is one row per property that is replaced; at the next start it becomes a block as it is.
//! The file is made when there is something to write. A write that was taken can be lost in a power cut (WAL,
//! `synchronous=NORMAL`), which the next start counts; the file stays sound. A file that is no database is moved aside.
//!
//! Every function here waits for the disk; callers are on a thread for that. What the rows mean is told in
//! [`skerry_edge_core::history`]. The twin task of the agent is the only caller.

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, params};
use skerry_edge_core::history::block::{self, Sample};
use skerry_edge_core::history::query::{Page, Pager, Question};
use skerry_edge_core::history::{Changes, Lost, Run};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

const TABLES: &str = "
    CREATE TABLE series (id INTEGER PRIMARY KEY, device TEXT NOT NULL, property TEXT NOT NULL, keep_ms INTEGER NOT NULL,
        UNIQUE (device, property));
    CREATE TABLE blocks (id INTEGER PRIMARY KEY, series INTEGER NOT NULL, first INTEGER NOT NULL,
        last INTEGER NOT NULL, count INTEGER NOT NULL, data BLOB NOT NULL);
    CREATE INDEX blocks_of_series ON blocks (series, first, last);
    CREATE TABLE tails (series INTEGER PRIMARY KEY, first INTEGER NOT NULL, last INTEGER NOT NULL,
        count INTEGER NOT NULL, data BLOB NOT NULL);
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    PRAGMA user_version = 1;
";
const VERSION: i64 = 1;
const LOST: &str = "lost";
const RUNNING: &str = "running";
/// Memory that SQLite may use for pages, per connection.
const CACHE_KIB: u32 = 512;
/// Blocks that go at once when there is no room.
const DROP_AT_ONCE: u32 = 64;
/// Time between two looks for blocks that are too old.
const SWEEP_MS: i64 = 3_600_000;
/// Longest wait for another connection.
const BUSY: std::time::Duration = std::time::Duration::from_secs(5);

/// Why the history was not written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HistoryError {
    /// Made by a later version.
    #[error("`{path}` is of version {found}, this agent knows {VERSION}")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// A broken file that cannot be moved aside.
    #[error("could not move the broken `{path}` aside")]
    Aside {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// SQLite refused.
    #[error("the database of the history refused")]
    Database(#[from] rusqlite::Error),
}

/// The history on the disk.
#[derive(Debug)]
pub struct HistoryStore {
    path: PathBuf,
    limit: u64,
    writer: Mutex<Writer>,
}

#[derive(Debug, Default)]
struct Writer {
    connection: Option<Connection>,
    swept_ms: Option<i64>,
}

impl HistoryStore {
    /// In the file at `path`, of at most `limit` bytes; beyond it the oldest blocks go. Nothing is made or opened yet.
    pub fn new(path: PathBuf, limit: u64) -> Self {
        Self { path, limit, writer: Mutex::default() }
    }

    /// Writes in one transaction, and then makes room. `now_ms` is Unix milliseconds.
    ///
    /// # Errors
    ///
    /// [`HistoryError`]; nothing of it is written then.
    pub fn write(&self, changes: &Changes, now_ms: i64) -> Result<(), HistoryError> {
        let mut writer = self.writer();
        let Writer { connection, swept_ms } = &mut *writer;
        let connection = match connection {
            Some(connection) => connection,
            None => connection.insert(open(&self.path)?),
        };
        let transaction = connection.transaction()?;
        for run in &changes.runs {
            write_run(&transaction, run)?;
        }
        add_lost(&transaction, &changes.lost)?;
        transaction.commit()?;
        if swept_ms.is_none_or(|at| now_ms < at || now_ms - at >= SWEEP_MS) {
            sweep(connection, now_ms)?;
            *swept_ms = Some(now_ms);
        }
        make_room(connection, self.limit)
    }

    /// Answers from what is on the disk, and from `recent`, which is not there yet.
    ///
    /// # Errors
    ///
    /// [`HistoryError`].
    pub fn query(
        &self,
        question: &Question,
        recent: Vec<Vec<Sample>>,
    ) -> Result<Page, HistoryError> {
        if !self.path.exists() {
            let oldest = recent.iter().flatten().map(|sample| sample.at_ms).min();
            return Ok(
                merge(question, Vec::new(), recent, |_| Ok(None))?.finish(oldest, Lost::default())
            );
        }
        {
            // What was open at the last end becomes blocks.
            let mut writer = self.writer();
            if writer.connection.is_none() {
                writer.connection = Some(open(&self.path)?);
            }
        }
        let connection = Connection::open_with_flags(
            &self.path,
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )?;
        connection.busy_timeout(BUSY)?;
        let mut ids =
            connection.prepare("SELECT id FROM series WHERE device = ?1 AND property = ?2")?;
        let series: Option<i64> =
            ids.query_row([&question.device, &question.property], |row| row.get(0)).optional()?;
        let mut blocks = connection.prepare(
            "SELECT first, id FROM blocks WHERE series = ?1 AND first < ?2 AND last >= ?3 ORDER BY first, id",
        )?;
        let found = blocks.query_map(params![series, question.to_ms, question.from_ms], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
        let found: Vec<(i64, i64)> = found.collect::<rusqlite::Result<_>>()?;
        let mut data = connection.prepare("SELECT data, count FROM blocks WHERE id = ?1")?;
        let mut broken: Vec<(i64, u64)> = Vec::new();
        let pager = merge(question, found, recent.clone(), |id| {
            let row =
                data.query_row([id], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, i64>(1)?)));
            // One that has gone for want of room meanwhile is counted by whoever made room.
            let Some((bytes, count)) = row.optional()? else { return Ok(None) };
            let samples = block::decode(&bytes);
            if samples.is_err() {
                broken.push((id, count.unsigned_abs()));
            }
            Ok(samples.ok())
        })?;
        let oldest: Option<i64> = connection.query_row(
            "SELECT min(first) FROM blocks WHERE series = ?1",
            [series],
            |row| row.get(0),
        )?;
        let of_recent = recent.iter().flatten().map(|sample| sample.at_ms).min();
        let oldest = [oldest, of_recent].into_iter().flatten().min();
        let mut lost = read_lost(&connection)?;
        if !broken.is_empty() {
            let count =
                Lost { unreadable: broken.iter().map(|(_, count)| count).sum(), ..Lost::default() };
            lost.add(&count);
            self.forget(&broken, &count)?;
        }
        Ok(pager.finish(oldest, lost))
    }

    /// An orderly end: what was written last stays.
    ///
    /// # Errors
    ///
    /// [`HistoryError`]; the next start then counts a cut.
    pub fn close(&self) -> Result<(), HistoryError> {
        let mut writer = self.writer();
        let Some(connection) = writer.connection.take() else { return Ok(()) };
        connection.execute("DELETE FROM facts WHERE name = ?1", [RUNNING])?;
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
        Ok(())
    }

    /// Blocks that cannot be read go, so that each is counted once.
    fn forget(&self, broken: &[(i64, u64)], count: &Lost) -> Result<(), HistoryError> {
        let mut writer = self.writer();
        let connection = match &mut writer.connection {
            Some(connection) => connection,
            None => return Ok(()), // about to end
        };
        let transaction = connection.transaction()?;
        let mut gone = 0;
        for (id, _) in broken {
            gone += transaction.execute("DELETE FROM blocks WHERE id = ?1", [id])?;
        }
        if gone > 0 {
            add_lost(&transaction, count)?;
        }
        transaction.commit()?;
        Ok(())
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Feeds blocks and runs to the pager in order of time. They overlap only after a clock was set back.
fn merge(
    question: &Question,
    blocks: Vec<(i64, i64)>,
    recent: Vec<Vec<Sample>>,
    mut read: impl FnMut(i64) -> rusqlite::Result<Option<Vec<Sample>>>,
) -> rusqlite::Result<Pager> {
    enum Source {
        Block(i64),
        Run(Vec<Sample>),
    }
    let begins: Vec<i64> =
        recent.iter().filter_map(|run| run.first().map(|sample| sample.at_ms)).collect();
    // A run that was written between the look at it and the look at the disk is here twice.
    let blocks = blocks.into_iter().filter(|(first, _)| !begins.contains(first));
    let mut sources: Vec<(i64, Source)> =
        blocks.map(|(first, id)| (first, Source::Block(id))).collect();
    let runs = recent.into_iter().filter(|run| !run.is_empty());
    sources.extend(runs.map(|run| (run[0].at_ms, Source::Run(run))));
    sources.sort_by_key(|(first, _)| *first);
    let mut pager = Pager::new(question.clone());
    let mut waiting: Vec<Sample> = Vec::new();
    for (first, source) in sources {
        let due = waiting.partition_point(|sample| sample.at_ms < first);
        if !waiting.drain(..due).all(|sample| pager.take(&sample)) {
            return Ok(pager);
        }
        let samples = match source {
            Source::Run(samples) => samples,
            Source::Block(id) => read(id)?.unwrap_or_default(),
        };
        let is_sorted = waiting.is_empty();
        waiting.extend(samples);
        if !is_sorted {
            waiting.sort_by_key(|sample| sample.at_ms);
        }
    }
    let _ = waiting.iter().all(|sample| pager.take(sample));
    Ok(pager)
}

fn write_run(connection: &Connection, run: &Run) -> rusqlite::Result<()> {
    let [first, .., last] = &*run.samples else {
        let [only] = &*run.samples else { return Ok(()) };
        return write_row(connection, run, only.at_ms, only.at_ms);
    };
    write_row(connection, run, first.at_ms, last.at_ms)
}

fn write_row(connection: &Connection, run: &Run, first: i64, last: i64) -> rusqlite::Result<()> {
    let series: i64 = connection
        .prepare_cached(
            "INSERT INTO series (device, property, keep_ms) VALUES (?1, ?2, ?3)
             ON CONFLICT (device, property) DO UPDATE SET keep_ms = ?3 RETURNING id",
        )?
        .query_row(params![&*run.device, &*run.property, run.keep_ms], |row| row.get(0))?;
    let data = block::encode(&run.samples);
    let count = i64::try_from(run.samples.len()).unwrap_or(i64::MAX);
    if run.is_tail {
        connection
            .prepare_cached("INSERT OR REPLACE INTO tails VALUES (?1, ?2, ?3, ?4, ?5)")?
            .execute(params![series, first, last, count, data])?;
        return Ok(());
    }
    connection
        .prepare_cached(
            "INSERT INTO blocks (series, first, last, count, data) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute(params![series, first, last, count, data])?;
    connection.prepare_cached("DELETE FROM tails WHERE series = ?1")?.execute([series])?;
    Ok(())
}

fn read_lost(connection: &Connection) -> rusqlite::Result<Lost> {
    let text: Option<String> = connection
        .query_row("SELECT value FROM facts WHERE name = ?1", [LOST], |row| row.get(0))
        .optional()?;
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default())
}

fn add_lost(connection: &Connection, more: &Lost) -> rusqlite::Result<()> {
    if *more == Lost::default() {
        return Ok(());
    }
    let mut lost = read_lost(connection)?;
    lost.add(more);
    let text = serde_json::to_string(&lost).unwrap_or_default();
    connection.execute("INSERT OR REPLACE INTO facts VALUES (?1, ?2)", params![LOST, text])?;
    Ok(())
}

/// Removes what is older than it may become.
fn sweep(connection: &mut Connection, now_ms: i64) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    let mut query = transaction.prepare("SELECT id, keep_ms FROM series")?;
    let all = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let all: Vec<(i64, i64)> = all.collect::<rusqlite::Result<_>>()?;
    drop(query);
    for (series, keep_ms) in all {
        let before = now_ms.saturating_sub(keep_ms);
        transaction
            .prepare_cached("DELETE FROM blocks WHERE series = ?1 AND first < ?2 AND last < ?2")?
            .execute([series, before])?;
    }
    transaction.execute(
        "DELETE FROM series WHERE NOT EXISTS (SELECT 1 FROM blocks WHERE series = series.id)
         AND NOT EXISTS (SELECT 1 FROM tails WHERE series = series.id)",
        [],
    )?;
    transaction.commit()
}

/// Removes the oldest blocks until the rest fits, and counts what was in them.
fn make_room(connection: &mut Connection, limit: u64) -> Result<(), HistoryError> {
    while used(connection)? > limit {
        let transaction = connection.transaction()?;
        let (samples, last): (Option<i64>, Option<i64>) = transaction.query_row(
            "SELECT sum(count), max(id) FROM (SELECT id, count FROM blocks ORDER BY id LIMIT ?1)",
            [DROP_AT_ONCE],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
        let Some(last) = last else { return Ok(()) }; // only tails are left
        transaction.execute("DELETE FROM blocks WHERE id <= ?1", [last])?;
        let room = samples.unwrap_or(0).unsigned_abs();
        add_lost(&transaction, &Lost { room, ..Lost::default() })?;
        transaction.commit()?;
    }
    Ok(())
}

/// Bytes of pages that hold something.
fn used(connection: &Connection) -> rusqlite::Result<u64> {
    let number = |pragma: &str| -> rusqlite::Result<i64> {
        connection.query_row(&format!("PRAGMA {pragma}"), [], |row| row.get(0))
    };
    let pages = number("page_count")? - number("freelist_count")?;
    Ok((pages * number("page_size")?).unsigned_abs())
}

fn open(path: &Path) -> Result<Connection, HistoryError> {
    match prepare(path) {
        Err(HistoryError::Database(error)) if is_broken(&error) => {
            let mut aside = path.as_os_str().to_owned();
            aside.push(".corrupt");
            let moved = std::fs::rename(path, &aside);
            moved.map_err(|source| HistoryError::Aside { path: path.into(), source })?;
            for suffix in ["-wal", "-shm"] {
                let mut of_it = path.as_os_str().to_owned();
                of_it.push(suffix);
                let _ = std::fs::remove_file(of_it); // of no use without it
            }
            tracing::error!(
                history = %path.display(), kept_as = %PathBuf::from(aside).display(), %error,
                "the history of devices was broken and begins anew"
            );
            let connection = prepare(path)?;
            add_lost(&connection, &Lost { cuts: 1, ..Lost::default() })?;
            Ok(connection)
        }
        opened => opened,
    }
}

fn is_broken(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

fn prepare(path: &Path) -> Result<Connection, HistoryError> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    connection.execute_batch(&format!(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA cache_size = -{CACHE_KIB};
         PRAGMA journal_size_limit = 4194304;"
    ))?;
    let transaction = connection.transaction()?;
    let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    match found {
        0 => transaction.execute_batch(TABLES)?,
        VERSION => {}
        found => return Err(HistoryError::Newer { path: path.into(), found }),
    }
    let running: Option<String> = transaction
        .query_row("SELECT value FROM facts WHERE name = ?1", [RUNNING], |row| row.get(0))
        .optional()?;
    if running.is_some() {
        add_lost(&transaction, &Lost { cuts: 1, ..Lost::default() })?;
    }
    transaction.execute("INSERT OR REPLACE INTO facts VALUES (?1, '1')", [RUNNING])?;
    transaction.execute_batch(
        "INSERT INTO blocks (series, first, last, count, data) SELECT series, first, last, count, data FROM tails
             ORDER BY first;
         DELETE FROM tails;",
    )?;
    transaction.commit()?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_edge_core::history::block::Value;
    use std::sync::Arc;

    const ROOM: u64 = 64 * 1024 * 1024;
    const DAY_MS: i64 = 86_400_000;

    fn samples(times: impl IntoIterator<Item = i64>) -> Arc<[Sample]> {
        let number =
            |at_ms: i64| Value::of(&format!("{}", 20.0 + (at_ms / 1000 % 7) as f64 / 10.0));
        times.into_iter().map(|at_ms| Sample { at_ms, value: number(at_ms) }).collect()
    }

    fn run(property: &str, samples: Arc<[Sample]>, is_tail: bool) -> Run {
        Run { device: "a/b".into(), property: property.into(), samples, keep_ms: DAY_MS, is_tail }
    }

    fn changes(runs: Vec<Run>) -> Changes {
        Changes { runs, ..Changes::default() }
    }

    fn question(query: &str) -> Question {
        Question::parse("/deviceHistory/a/b", query).expect(query)
    }

    fn times(page: &Page) -> Vec<i64> {
        page.rows.iter().map(|row| row.at).collect()
    }

    fn store(limit: u64) -> (tempfile::TempDir, HistoryStore) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = HistoryStore::new(dir.path().join("history.db"), limit);
        (dir, store)
    }

    #[test]
    fn blocks_tails_and_memory_are_one_answer_and_outlive_the_process() {
        let (dir, store) = store(ROOM);
        let asked = question("property=t");
        assert_eq!(store.query(&asked, Vec::new()).expect("an answer"), Page::default());
        assert!(!dir.path().join("history.db").exists(), "nothing to write, no file");
        store.write(&changes(vec![run("t", samples([1000, 2000]), false)]), 0).expect("written");
        let tail = samples([3000, 4000]);
        store
            .write(&changes(vec![run("t", tail.clone(), true), run("u", samples([9]), true)]), 0)
            .expect("written");
        let page = store.query(&asked, vec![tail.to_vec()]).expect("an answer");
        assert_eq!((times(&page), page.oldest), (vec![1000, 2000, 3000, 4000], Some(1000)));
        store.close().expect("closed");
        let again = HistoryStore::new(dir.path().join("history.db"), ROOM);
        let page = again.query(&asked, Vec::new()).expect("an answer");
        assert_eq!(times(&page), [1000, 2000, 3000, 4000], "before anything is written");
        again.write(&changes(vec![run("t", samples([5000]), false)]), 0).expect("written");
        let page = again.query(&asked, Vec::new()).expect("an answer");
        assert_eq!(times(&page), [1000, 2000, 3000, 4000, 5000], "the tail became a block");
        assert_eq!(page.lost, Lost::default(), "an orderly end is no cut");
        let part = again.query(&question("property=t&from=2000&to=5000&limit=2"), Vec::new());
        let part = part.expect("an answer");
        assert_eq!((times(&part), part.next), (vec![2000, 3000], Some(4000)));
    }

    #[test]
    fn an_end_without_a_last_write_is_counted() {
        let (dir, store) = store(ROOM);
        store.write(&changes(vec![run("t", samples([1000]), true)]), 0).expect("written");
        drop(store);
        let again = HistoryStore::new(dir.path().join("history.db"), ROOM);
        again.write(&changes(vec![run("t", samples([2000]), false)]), 0).expect("written");
        let page = again.query(&question("property=t"), Vec::new()).expect("an answer");
        assert_eq!((times(&page), page.lost.cuts), (vec![1000, 2000], 1));
    }

    #[test]
    fn a_run_that_was_written_while_it_was_asked_for_is_there_once() {
        let (_dir, store) = store(ROOM);
        let sealed = samples([1000, 2000]);
        store.write(&changes(vec![run("t", sealed.clone(), false)]), 0).expect("written");
        let page = store.query(&question("property=t"), vec![sealed.to_vec()]).expect("an answer");
        assert_eq!(times(&page), [1000, 2000]);
    }

    #[test]
    fn blocks_from_before_and_after_a_clock_was_set_back_are_put_into_order() {
        let (_dir, store) = store(ROOM);
        let runs = vec![
            run("t", samples([1000, 5000, 9000]), false),
            run("t", samples([2000, 6000]), false),
            run("t", samples([7000, 8000]), false),
        ];
        store.write(&changes(runs), 0).expect("written");
        let page = store.query(&question("property=t&from=2000"), Vec::new()).expect("an answer");
        assert_eq!(times(&page), [2000, 5000, 6000, 7000, 8000, 9000]);
    }

    #[test]
    fn the_oldest_blocks_go_when_there_is_no_room_and_are_counted() {
        let (dir, store) = store(256 * 1024);
        let mut written = 0;
        for round in 0..200_i64 {
            let runs = (0..8).map(|n| {
                // Values that do not compress.
                let sample = |i: i64| Sample {
                    at_ms: (round * 64 + i) * 1000,
                    value: Value::Number(((round * 997 + i * 131 + n) as f64).sin()),
                };
                run(&format!("p{n}"), (0..64).map(sample).collect(), false)
            });
            store.write(&changes(runs.collect()), 0).expect("written");
            written += 8 * 64;
        }
        let size = std::fs::metadata(dir.path().join("history.db")).expect("a file").len();
        assert!(size < 512 * 1024, "{size} bytes");
        let mut held = 0;
        let mut lost = Lost::default();
        for n in 0..8 {
            let mut from = 0;
            loop {
                let asked = question(&format!("property=p{n}&from={from}"));
                let page = store.query(&asked, Vec::new()).expect("an answer");
                held += page.rows.len() as u64;
                lost = page.lost;
                match page.next {
                    Some(next) => from = next,
                    None => break,
                }
            }
        }
        assert!(held > 0 && lost.room > 0);
        assert_eq!(held + lost.room, written, "every sample is there or counted");
    }

    #[test]
    fn what_is_too_old_goes() {
        let (_dir, store) = store(ROOM);
        let old = changes(vec![
            run("t", samples([1000, 2000]), false),
            run("t", samples([DAY_MS]), false),
        ]);
        store.write(&old, 3000).expect("written");
        let later = changes(vec![run("u", samples([DAY_MS * 2]), false)]);
        store.write(&later, DAY_MS + 3000).expect("written");
        let page = store.query(&question("property=t"), Vec::new()).expect("an answer");
        assert_eq!((times(&page), page.oldest), (vec![DAY_MS], Some(DAY_MS)));
        assert_eq!(page.lost, Lost::default(), "that is what was asked for");
    }

    #[test]
    fn a_block_that_cannot_be_read_is_counted_once_and_the_others_are_there() {
        let (dir, store) = store(ROOM);
        let runs = vec![run("t", samples([1000, 2000]), false), run("t", samples([3000]), false)];
        store.write(&changes(runs), 0).expect("written");
        let other = Connection::open(dir.path().join("history.db")).expect("the file");
        other.execute("UPDATE blocks SET data = x'11ff' WHERE first = 1000", []).expect("broken");
        for _ in 0..2 {
            let page = store.query(&question("property=t"), Vec::new()).expect("an answer");
            assert_eq!((times(&page), page.lost.unreadable), (vec![3000], 2));
        }
    }

    /// The figure of 150 MB for 1,000 properties at 1 Hz, with values of a real sensor's kind: two decimals that wander,
    /// and times that are late by up to 8 ms. How long the question takes is printed (`--nocapture`), as a debug build says
    /// little about it.
    #[test]
    fn a_day_of_a_thousand_properties_fits_into_150_megabytes() {
        const PROPERTIES: usize = 8;
        let (dir, store) = store(ROOM);
        let mut random = skerry_edge_core::backoff::Random::new(7);
        let mut hundredths = [2_000_i64; PROPERTIES];
        let mut histories = vec![Vec::new(); PROPERTIES];
        for second in 0..86_400_i64 {
            let late = random.below(8).cast_signed();
            for (value, samples) in hundredths.iter_mut().zip(&mut histories) {
                *value += random.below(7).cast_signed() - 3;
                let value = Value::Number(*value as f64 / 100.0);
                samples.push(Sample { at_ms: second * 1000 + late, value });
            }
        }
        for at in (0..86_400).step_by(512) {
            let runs = histories.iter().enumerate().map(|(n, samples)| {
                let end = (at + 512).min(samples.len());
                run(&format!("p{n}"), samples[at..end].into(), false)
            });
            store.write(&changes(runs.collect()), 0).expect("written");
        }
        let began = std::time::Instant::now();
        let page =
            store.query(&question("property=p3&every=60000"), Vec::new()).expect("an answer");
        let took = began.elapsed();
        assert_eq!(page.rows.len(), 1440);
        assert_eq!(page.rows.iter().filter_map(|row| row.count).sum::<u64>(), 86_400);
        store.close().expect("closed");
        let len = std::fs::metadata(dir.path().join("history.db")).expect("a file").len();
        let day_mb = len as f64 / PROPERTIES as f64 * 1000.0 / 1e6;
        println!("a day of 1,000 properties: {day_mb:.0} MB; a day of one: {took:?}");
        assert!(day_mb < 150.0, "{day_mb:.0} MB");
    }

    #[test]
    fn a_file_that_is_no_database_is_moved_aside() {
        let (dir, store) = store(ROOM);
        let path = dir.path().join("history.db");
        std::fs::write(&path, vec![b'x'; 8192]).expect("written");
        store.write(&changes(vec![run("t", samples([1000]), false)]), 0).expect("written");
        assert!(dir.path().join("history.db.corrupt").exists());
        let page = store.query(&question("property=t"), Vec::new()).expect("an answer");
        assert_eq!((times(&page), page.lost.cuts), (vec![1000], 1));
    }
}
