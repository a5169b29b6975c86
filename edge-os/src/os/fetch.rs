//! Fetches a version of the OS: only the blocks that this machine has nowhere, each checked as it comes.
//!
//! ```text
//! <store>/<digest>/manifest.json, manifest.json.sig      the manifest is the one whose SHA-256 the order names
//! <store>/<digest>/root.img.part, uki.efi.part           what is here so far, in its place; the rest is a hole
//! <store>/<digest>/root.img, uki.efi                     whole, and their SHA-256 is right
//! ```
//!
//! Nothing is noted about how far a fetch is: what lies in the `.part` file and is right by the block index of the manifest
//! is here, so a cut of the link, of the agent or of the power costs what had not reached the disk. Blocks that the running
//! root, or what was fetched before, has anywhere are copied. Connections that break are made again for as long as the
//! caller waits; only what time does not mend is an error.
//!
//! The index and every block are checked against the manifest, the manifest against the order. Whether it is signed by
//! somebody who may is for PID 1.

use crate::config::Endpoint;
use crate::enrol::Credentials;
use crate::tls;
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use skerry_api::fleet::os::OsOrder;
use skerry_edge_core::backoff::Backoff;
use skerry_edge_core::os::Failure;
use skerry_init::blocks::{self, BLOCK, DIGEST, Index};
use skerry_init::manifest::{self, Manifest, Part};
use skerry_init::verity::hex;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Names of the manifest and its signature.
const MANIFEST: &str = "manifest.json";
const SIGNATURE: &str = "manifest.json.sig";
/// Bytes of a signature.
const SIGNATURE_LEN: usize = 64;
/// Parts that a version has.
const PARTS: [&str; 2] = ["uki.efi", "root.img"];
/// Blocks in one question: 256 KiB. The next question goes out when the last block has come.
const BLOCKS_ASKED: usize = 64;
/// A hub that says nothing for so long in the middle of an answer is not there.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// What has been written is made to last at least this often, in bytes.
const SYNC_EVERY: u64 = 1 << 20;
/// Bounds of the wait after a connection that broke.
const RETRY_BASE: Duration = Duration::from_secs(1);
const RETRY_CAP: Duration = Duration::from_secs(60);
/// Room that a fetch leaves to everything else, in bytes.
const ROOM_LEFT: u64 = 64 << 20;

/// What a fetch needs.
#[derive(Clone)]
pub(crate) struct Parts {
    /// Where the hub serves versions: the enrolment's address.
    pub(crate) endpoint: Endpoint,
    /// With which certificate.
    pub(crate) credentials: watch::Receiver<Option<Arc<Credentials>>>,
    /// Folder of all versions.
    pub(crate) store: PathBuf,
    /// Files and devices that may have blocks of it.
    pub(crate) sources: Vec<PathBuf>,
}

/// How much came from where, in bytes of blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Over the link, the index included.
    pub(crate) fetched: u64,
    /// Out of the sources.
    pub(crate) copied: u64,
    /// All of the version.
    pub(crate) total: u64,
}

/// Why a version cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum FetchError {
    /// The hub said so.
    #[error("the hub has no version {version} to give: {reason}")]
    NotThere { version: String, reason: String },
    /// What the hub gives is not what the order names.
    #[error("what the hub gives as version {version} is not what was ordered: {reason}")]
    Other { version: String, reason: String },
    /// No room.
    #[error(
        "{needed} MB are needed for version {version}, and {free} MB are free on the state partition"
    )]
    Room { version: String, needed: u64, free: u64 },
    /// The disk.
    #[error("version {version} could not be kept: {source}")]
    Disk { version: String, source: io::Error },
}

impl FetchError {
    /// For the order's progress.
    pub(crate) fn failure(&self) -> Failure {
        let hint = match self {
            Self::NotThere { .. } => "`skerry image publish` puts it into the hub's store",
            Self::Other { .. } => {
                "publish it again, and check version, counter and digest in `os/`"
            }
            Self::Room { .. } => "remove pods or images that are not needed",
            Self::Disk { .. } => "the disk may be worn out or full",
        };
        Failure { reason: self.to_string(), hint: hint.into() }
    }
}

/// Why one exchange with the hub gave nothing.
enum Broken {
    /// The connection; another one may do.
    Line(String),
    /// The hub's word.
    Word(FetchError),
}

/// Fetches what is ordered into its folder, until it is all there. `progress` hears of percent. It may be dropped at any
/// time; the next call goes on.
pub(crate) async fn fetch(
    parts: &Parts,
    order: &OsOrder,
    progress: impl Fn(u8),
) -> Result<Tally, FetchError> {
    let version = order.version.clone();
    let disk = |source| FetchError::Disk { version: version.clone(), source };
    let folder = parts.store.join(order.digest.hex());
    fs::create_dir_all(&folder).map_err(disk)?;
    forget_others(&parts.store, order.digest.hex()).map_err(disk)?;
    let mut line = Line::new(parts, order);

    let text = match fs::read(folder.join(MANIFEST)) {
        Ok(text) if is_ordered(&text, order) => text,
        _ => {
            let text = line.small(MANIFEST, manifest::BYTES_MAX).await?;
            if !is_ordered(&text, order) {
                return Err(line.other("its manifest has another digest"));
            }
            write_whole(&folder.join(MANIFEST), &text).map_err(disk)?;
            text
        }
    };
    let manifest = Manifest::parse(&text).map_err(|error| line.other(&error.to_string()))?;
    if (&manifest.version, manifest.release_counter) != (&order.version, order.counter) {
        let said = format!(
            "its manifest says version {}, counter {}; the order says {}, {}",
            manifest.version, manifest.release_counter, order.version, order.counter
        );
        return Err(line.other(&said));
    }
    if manifest.parts.iter().any(|part| !PARTS.contains(&&*part.name)) {
        return Err(line.other("it has parts that are not known here"));
    }
    let signature = folder.join(SIGNATURE);
    if fs::metadata(&signature).map(|file| file.len()).ok() != Some(SIGNATURE_LEN as u64) {
        let bytes = line.small(SIGNATURE, SIGNATURE_LEN).await?;
        write_whole(&signature, &bytes).map_err(disk)?;
    }
    let total: u64 = manifest.parts.iter().map(|part| part.bytes).sum();
    check_room(&folder, total, &version)?;
    let mut tally = Tally { total, ..Tally::default() };
    let mut before = 0;
    for part in &manifest.parts {
        let told = |done: u64| progress(percent(before + done, total));
        line.part(&folder, part, &parts.sources, &mut tally, &told).await?;
        before += part.bytes;
    }
    progress(100);
    Ok(tally)
}

fn percent(done: u64, total: u64) -> u8 {
    u8::try_from(done.saturating_mul(100) / total.max(1)).unwrap_or(100).min(100)
}

fn is_ordered(manifest: &[u8], order: &OsOrder) -> bool {
    hex(&Sha256::digest(manifest)) == order.digest.hex()
}

/// Versions that are not wanted any more make room for this one.
fn forget_others(store: &Path, keep: &str) -> io::Result<()> {
    for entry in fs::read_dir(store)? {
        let entry = entry?;
        if entry.file_name() != keep && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Takes away everything that was fetched.
pub(crate) fn discard(store: &Path) -> io::Result<()> {
    match forget_others(store, "") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The device under the root of this machine, when it can be read: the blocks of the running version.
pub(crate) fn running_root() -> Option<PathBuf> {
    let device = fs::metadata("/").ok()?.dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let facts = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).ok()?;
    let name = facts.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name)).filter(|path| File::open(path).is_ok())
}

fn check_room(folder: &Path, total: u64, version: &str) -> Result<(), FetchError> {
    let disk = |source| FetchError::Disk { version: version.to_owned(), source };
    let stat = nix::sys::statvfs::statvfs(folder).map_err(|errno| disk(errno.into()))?;
    let free = stat.blocks_available() as u64 * stat.fragment_size() as u64;
    let mut here = 0;
    for entry in fs::read_dir(folder).map_err(disk)? {
        here += entry.and_then(|entry| entry.metadata()).map_err(disk)?.blocks() * 512;
    }
    let needed = total.saturating_sub(here) + ROOM_LEFT;
    match free >= needed {
        true => Ok(()),
        false => Err(FetchError::Room {
            version: version.to_owned(),
            needed: needed / 1_000_000,
            free: free / 1_000_000,
        }),
    }
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, bytes)?;
    File::open(&new)?.sync_all()?;
    fs::rename(&new, path)?;
    sync_folder(path)
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path.parent().expect("a file in a folder"))?.sync_all()
}

/// The connection to the hub, made again as often as it breaks.
struct Line<'a> {
    parts: &'a Parts,
    order: &'a OsOrder,
    open: Option<(SendRequest<Empty<Bytes>>, JoinHandle<()>)>,
    backoff: Backoff,
    /// When the first byte was asked for, and how many came since; for the bound of the rate.
    began: Instant,
    came: u64,
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        self.close();
    }
}

impl<'a> Line<'a> {
    fn new(parts: &'a Parts, order: &'a OsOrder) -> Self {
        let backoff = Backoff::between(RETRY_BASE, RETRY_CAP, rand::random());
        Self { parts, order, open: None, backoff, began: Instant::now(), came: 0 }
    }

    fn other(&self, reason: &str) -> FetchError {
        FetchError::Other { version: self.order.version.clone(), reason: reason.to_owned() }
    }

    fn disk(&self, source: io::Error) -> FetchError {
        FetchError::Disk { version: self.order.version.clone(), source }
    }

    fn close(&mut self) {
        if let Some((_, driver)) = self.open.take() {
            driver.abort();
        }
    }

    /// A small file, as a whole.
    async fn small(&mut self, file: &str, len_max: usize) -> Result<Vec<u8>, FetchError> {
        loop {
            let mut bytes = Vec::new();
            let take = |chunk: &[u8]| {
                bytes.extend_from_slice(chunk);
                match bytes.len() > len_max {
                    true => Err(format!("`{file}` is longer than {len_max} bytes")),
                    false => Ok(()),
                }
            };
            match self.get(file, take).await {
                Ok(()) => return Ok(bytes),
                Err(Broken::Word(error)) => return Err(error),
                Err(Broken::Line(reason)) => self.pause(&reason).await,
            }
        }
    }

    async fn pause(&mut self, reason: &str) {
        self.close();
        let wait = self.backoff.next_wait();
        tracing::debug!(
            reason,
            wait_ms = wait.as_millis() as u64,
            "the hub gave nothing, trying again"
        );
        tokio::time::sleep(wait).await;
    }

    /// One question; `take` gets the answer as it comes, and may refuse it.
    async fn get(
        &mut self,
        file: &str,
        mut take: impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), Broken> {
        let line = |error: hyper::Error| Broken::Line(error.to_string());
        let path = format!("/os/{}/{file}", self.order.digest.hex());
        let request = Request::get(path)
            .header(http::header::HOST, self.parts.endpoint.to_string())
            .body(Empty::new())
            .expect("method, path and header are checked texts");
        let silent = |_| Broken::Line(format!("no byte for {} s", SILENCE_MAX.as_secs()));
        let (sender, _) = self.sender().await?;
        let answer = tokio::time::timeout(SILENCE_MAX, sender.send_request(request)).await;
        let answer: http::Response<Incoming> = answer.map_err(silent)?.map_err(line)?;
        let status = answer.status();
        let mut body = answer.into_body();
        let mut refusal = Vec::new();
        while let Some(frame) =
            tokio::time::timeout(SILENCE_MAX, body.frame()).await.map_err(silent)?
        {
            let Ok(chunk) = frame.map_err(line)?.into_data() else { continue };
            self.came += chunk.len() as u64;
            if status.is_success() {
                take(&chunk).map_err(|reason| Broken::Word(self.other(&reason)))?;
            } else if refusal.len() < 1000 {
                refusal.extend_from_slice(&chunk);
            }
            self.keep_rate().await;
        }
        if status.is_success() {
            self.backoff.reset();
            return Ok(());
        }
        let reason = String::from_utf8_lossy(&refusal).trim().to_owned();
        // A certificate that has just been renewed, a hub that starts: these pass.
        let passes = status.is_server_error() || status == StatusCode::UNAUTHORIZED;
        let version = self.order.version.clone();
        Err(match passes {
            true => Broken::Line(format!("{status}: {reason}")),
            false => Broken::Word(FetchError::NotThere { version, reason }),
        })
    }

    async fn keep_rate(&self) {
        if let Some(rate) = self.order.policy.bytes_per_second {
            let due = Duration::from_secs_f64(self.came as f64 / rate.max(1) as f64);
            tokio::time::sleep_until(self.began + due).await;
        }
    }

    async fn sender(&mut self) -> Result<&mut (SendRequest<Empty<Bytes>>, JoinHandle<()>), Broken> {
        if self.open.as_ref().is_none_or(|(sender, _)| sender.is_closed()) {
            self.close();
            let mut credentials = self.parts.credentials.clone();
            let have = credentials.wait_for(Option::is_some).await;
            let have = have.map_err(|_| Broken::Line("the agent is stopping".into()))?.clone();
            let text = |error: tls::TlsError| Broken::Line(error.to_string());
            let config = have.expect("waited for").client_config().map_err(text)?;
            let stream = tls::connect(&self.parts.endpoint, config).await.map_err(text)?;
            let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
            let (sender, connection) =
                handshake.map_err(|error| Broken::Line(error.to_string()))?;
            let driver = tokio::spawn(async move {
                let _ = connection.await; // whoever asked hears of it
            });
            self.open = Some((sender, driver));
        }
        Ok(self.open.as_mut().expect("opened just now"))
    }

    /// Brings one part here.
    async fn part(
        &mut self,
        folder: &Path,
        part: &Part,
        sources: &[PathBuf],
        tally: &mut Tally,
        told: &impl Fn(u64),
    ) -> Result<(), FetchError> {
        let whole = folder.join(&part.name);
        if whole.exists() {
            return Ok(()); // it was checked before it got this name
        }
        let path = folder.join(format!("{}.part", part.name));
        let index_len = usize::try_from(Index::bytes_of(part.bytes)).unwrap_or(usize::MAX);
        let came = self.came;
        let bytes = self.small(&format!("{}.blocks", part.name), index_len).await?;
        let index = Index::parse(bytes, part.bytes, &part.blocks_sha256)
            .map_err(|error| self.other(&format!("`{}`: {error}", part.name)))?;
        let index = Arc::new(index);

        let (file, missing) = {
            let (path, index, len) = (path.clone(), Arc::clone(&index), part.bytes);
            blocking(move || look(&path, &index, len)).await.map_err(|error| self.disk(error))?
        };
        let file = Arc::new(file);
        let (missing, copied) = {
            let (file, index, sources) = (Arc::clone(&file), Arc::clone(&index), sources.to_vec());
            blocking(move || copy(&file, &index, &sources, missing))
                .await
                .map_err(|error| self.disk(error))?
        };
        tally.copied += copied;
        let mut left = missing;
        let mut unsynced = 0;
        while !left.is_empty() {
            told(part.bytes.saturating_sub(left.len() as u64 * BLOCK as u64));
            let asked: Vec<usize> = left.iter().copied().take(BLOCKS_ASKED).collect();
            let mut into = Filling::new(&file, &index, &asked);
            let file_name = format!("{}?blocks={}", part.name, ranges(&asked));
            let outcome = self.get(&file_name, |chunk| into.take(chunk)).await;
            let (done, failed) = (into.done, into.failed.take());
            left.drain(..done);
            if let Some(error) = failed {
                return Err(self.disk(error));
            }
            unsynced += (done * BLOCK) as u64;
            if unsynced >= SYNC_EVERY || left.is_empty() || outcome.is_err() {
                let file = Arc::clone(&file);
                blocking(move || file.sync_data()).await.map_err(|error| self.disk(error))?;
                unsynced = 0;
            }
            match outcome {
                Ok(()) if done == asked.len() => {}
                Ok(()) => return Err(self.other(&format!("`{}` ends too early", part.name))),
                Err(Broken::Word(error)) => return Err(error),
                Err(Broken::Line(reason)) => {
                    if done > 0 {
                        self.backoff.reset();
                    }
                    self.pause(&reason).await;
                }
            }
        }
        tally.fetched += self.came - came;
        let sum = {
            let file = Arc::clone(&file);
            blocking(move || {
                file.sync_all()?;
                digest_of(&file)
            })
            .await
            .map_err(|error| self.disk(error))?
        };
        if sum != part.sha256 {
            return Err(self.other(&format!("`{}` has another digest", part.name)));
        }
        fs::rename(&path, &whole).map_err(|error| self.disk(error))?;
        sync_folder(&whole).map_err(|error| self.disk(error))?;
        told(part.bytes);
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// `0-15,40-40`, of numbers that rise.
fn ranges(blocks: &[usize]) -> String {
    let mut text = String::new();
    let mut at = 0;
    while let Some(first) = blocks.get(at) {
        let run = blocks[at..].iter().enumerate().take_while(|(n, block)| **block == first + n);
        let count = run.count();
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&format!("{first}-{}", first + count - 1));
        at += count;
    }
    text
}

/// Opens the file, at its full length, and finds the blocks that are not right in it.
fn look(path: &Path, index: &Index, len: u64) -> io::Result<(File, Vec<usize>)> {
    let known = fs::metadata(path).is_ok_and(|file| file.len() == len);
    let file = File::options().read(true).write(true).create(true).truncate(!known).open(path)?;
    if !known {
        file.set_len(len)?;
        sync_folder(path)?;
        return Ok((file, (0..index.blocks()).collect()));
    }
    let mut block = [0; BLOCK];
    let mut missing = Vec::new();
    for number in 0..index.blocks() {
        let block = &mut block[..index.block_len(number)];
        file.read_exact_at(block, number as u64 * BLOCK as u64)?;
        if !index.is_block(number, block) {
            missing.push(number);
        }
    }
    Ok((file, missing))
}

/// Copies from the sources what they have; returns what is still missing, and the bytes that were copied. A source that
/// cannot be read has nothing.
fn copy(
    file: &File,
    index: &Index,
    sources: &[PathBuf],
    missing: Vec<usize>,
) -> io::Result<(Vec<usize>, u64)> {
    let digest = |number: &usize| *index.digest(*number).expect("a block of the part");
    let mut wanted: HashSet<[u8; DIGEST]> = missing.iter().map(digest).collect();
    let mut found: HashMap<[u8; DIGEST], (usize, u64)> = HashMap::new();
    let mut files = Vec::new();
    for path in sources {
        let Ok(source) = File::open(path) else { continue };
        let mut block = [0; BLOCK];
        let mut at = 0;
        while !wanted.is_empty() && source.read_exact_at(&mut block, at).is_ok() {
            let digest = blocks::digest(&block);
            if wanted.remove(&digest) {
                found.insert(digest, (files.len(), at));
            }
            at += BLOCK as u64;
        }
        files.push(source);
    }
    let mut copied = 0;
    let mut left = Vec::new();
    for number in missing {
        let len = index.block_len(number);
        let mut block = [0; BLOCK];
        let there = found.get(&digest(&number)).is_some_and(|(source, at)| {
            files[*source].read_exact_at(&mut block, *at).is_ok()
                && index.is_block(number, &block[..len])
        });
        if there {
            file.write_all_at(&block[..len], number as u64 * BLOCK as u64)?;
            copied += len as u64;
        } else {
            left.push(number);
        }
    }
    file.sync_data()?;
    Ok((left, copied))
}

fn digest_of(file: &File) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut at = 0;
    loop {
        match file.read_at(&mut buffer, at)? {
            0 => return Ok(hex(&hasher.finalize())),
            count => {
                hasher.update(&buffer[..count]);
                at += count as u64;
            }
        }
    }
}

/// Puts the blocks of an answer into their places, each once it is whole and right.
struct Filling<'a> {
    file: &'a File,
    index: &'a Index,
    asked: &'a [usize],
    done: usize,
    block: Vec<u8>,
    failed: Option<io::Error>,
}

impl<'a> Filling<'a> {
    fn new(file: &'a File, index: &'a Index, asked: &'a [usize]) -> Self {
        Self { file, index, asked, done: 0, block: Vec::with_capacity(BLOCK), failed: None }
    }

    fn take(&mut self, mut chunk: &[u8]) -> Result<(), String> {
        while !chunk.is_empty() {
            let Some(number) = self.asked.get(self.done).copied() else {
                return Err("more came than was asked for".into());
            };
            let missing = self.index.block_len(number) - self.block.len();
            let (now, rest) = chunk.split_at(missing.min(chunk.len()));
            self.block.extend_from_slice(now);
            chunk = rest;
            if self.block.len() < self.index.block_len(number) {
                return Ok(());
            }
            if !self.index.is_block(number, &self.block) {
                return Err(format!("block {number} is not the one of the index"));
            }
            if let Err(error) = self.file.write_all_at(&self.block, number as u64 * BLOCK as u64) {
                self.failed = Some(error);
                return Err("it could not be written".into());
            }
            self.block.clear();
            self.done += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn indexed(part: &[u8]) -> Index {
        let bytes = blocks::index(part).expect("memory");
        let digest = hex(&Sha256::digest(&bytes));
        Index::parse(bytes, part.len() as u64, &digest).expect("its own index")
    }

    /// Blocks with content of their own, and a short one at the end.
    fn part(blocks: usize) -> Vec<u8> {
        let numbers = 0..blocks * BLOCK + 100;
        numbers.map(|at| (at / BLOCK * 31 + at % 251) as u8).collect()
    }

    #[test]
    fn numbers_that_follow_each_other_are_one_range() {
        assert_eq!(ranges(&[0, 1, 2, 7, 9, 10]), "0-2,7-7,9-10");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn what_lies_right_in_the_file_or_anywhere_in_a_source_is_not_fetched() {
        let dir = tempfile::tempdir().expect("a directory");
        let new = part(6);
        let index = indexed(&new);
        let path = dir.path().join("root.img.part");
        let (file, missing) = look(&path, &index, new.len() as u64).expect("a new file");
        assert_eq!(missing.len(), 7);
        file.write_all_at(&new[BLOCK..2 * BLOCK], BLOCK as u64).expect("written");
        file.write_all_at(b"torn", 3 * BLOCK as u64).expect("written");
        let (file, missing) = look(&path, &index, new.len() as u64).expect("a known file");
        assert_eq!(missing, [0, 2, 3, 4, 5, 6]);
        // A source has two of them, elsewhere and in another order.
        let source = dir.path().join("device");
        let old = [&new[4 * BLOCK..5 * BLOCK], &[7; BLOCK][..], &new[..BLOCK]].concat();
        fs::write(&source, old).expect("written");
        let sources = [dir.path().join("not there"), source];
        let (left, copied) = copy(&file, &index, &sources, missing).expect("copied");
        assert_eq!((left, copied), (vec![2, 3, 5, 6], 2 * BLOCK as u64));
        let (_, missing) = look(&path, &index, new.len() as u64).expect("a known file");
        assert_eq!(missing, [2, 3, 5, 6]);
    }

    #[test]
    fn an_answer_is_taken_block_by_block_in_any_pieces_and_a_wrong_one_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let new = part(3);
        let index = indexed(&new);
        let (file, _) = look(&dir.path().join("p"), &index, new.len() as u64).expect("a file");
        let mut filling = Filling::new(&file, &index, &[1, 3]);
        let answer = [&new[BLOCK..2 * BLOCK], &new[3 * BLOCK..]].concat();
        for chunk in answer.chunks(1000) {
            filling.take(chunk).expect("right blocks");
        }
        assert_eq!(filling.done, 2);
        assert!(filling.take(b"x").is_err());
        let mut filling = Filling::new(&file, &index, &[0]);
        assert!(filling.take(&[9; BLOCK]).expect_err("wrong").contains("block 0"));
        let (_, missing) = look(&dir.path().join("p"), &index, new.len() as u64).expect("a file");
        assert_eq!(missing, [0, 2]);
    }
}
