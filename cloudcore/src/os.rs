//! Serves the versions of the appliance's OS to nodes: files of a store that `skerry image publish` fills.
//!
//! ```text
//! GET /os/<digest>/manifest.json          and manifest.json.sig, uki.efi.blocks, root.img.blocks: the file
//! GET /os/<digest>/root.img?blocks=0-15,40-40   and uki.efi: these blocks, one after the other, nothing between them
//! ```
//!
//! `<digest>` is the hexadecimal SHA-256 of the manifest. A block has [`BLOCK_LEN`] bytes, the last one of a part may be shorter. A
//! node asks for the blocks that it has nowhere; it checks each against the index, whose digest stands in the signed manifest, so
//! this end is trusted with nothing. Only nodes with a certificate that counts are answered.

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// First segment of the paths.
pub(crate) const PREFIX: &str = "os";
/// Length of a block, bytes; that of the root's dm-verity and of the index in a manifest.
const BLOCK_LEN: u64 = 4096;
/// Blocks in one answer: 1 MiB, so that a connection costs no more memory than that.
const BLOCKS_MAX: u64 = 256;
/// Ranges in one question.
const RANGES_MAX: usize = 256;
/// Longest file that is given as a whole: the index of a part of 1 GiB.
const WHOLE_LEN_MAX: u64 = 8 * 1024 * 1024;
/// Files that are given as a whole.
const WHOLE: [&str; 4] =
    ["manifest.json", "manifest.json.sig", "uki.efi.blocks", "root.img.blocks"];
/// Files that are given by blocks.
const PARTS: [&str; 2] = ["uki.efi", "root.img"];

type Answer = Response<Full<Bytes>>;

/// The store: a folder for each version, named by its manifest's digest.
#[derive(Debug, Clone)]
pub(crate) struct Store(PathBuf);

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
struct Ask {
    digest: String,
    file: &'static str,
    /// None: the whole file.
    blocks: Option<Vec<(u64, u64)>>,
}

impl Ask {
    fn parse(path: &str, query: Option<&str>) -> Result<Self, String> {
        let segments: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let [PREFIX, digest, name] = segments[..] else {
            return Err("expected /os/<digest>/<file>".into());
        };
        let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if digest.len() != 64 || !digest.bytes().all(is_hex) {
            return Err("the digest is not 64 hexadecimal digits".into());
        }
        let known = |names: &[&'static str]| names.iter().find(|known| **known == name).copied();
        let (file, blocks) = match (known(&WHOLE), known(&PARTS)) {
            (Some(file), _) => (file, None),
            (None, Some(file)) => {
                let list = query.and_then(|query| query.strip_prefix("blocks="));
                let list = list.ok_or("ask for blocks, as in ?blocks=0-15,40-40")?;
                (file, Some(ranges(list)?))
            }
            (None, None) => return Err("a version has no such file".into()),
        };
        Ok(Self { digest: digest.to_owned(), file, blocks })
    }
}

/// `0-15,40-40`: first and last block of each range.
fn ranges(list: &str) -> Result<Vec<(u64, u64)>, String> {
    let mut found = Vec::new();
    let mut count = 0_u64;
    for range in list.split(',') {
        let number = |text: &str| text.parse::<u32>().ok().map(u64::from);
        let ends = range.split_once('-').and_then(|(a, b)| Some((number(a)?, number(b)?)));
        let (first, last) = ends
            .filter(|(first, last)| first <= last)
            .ok_or("a range is two block numbers, as in 0-15")?;
        count += last - first + 1;
        if count > BLOCKS_MAX || found.len() >= RANGES_MAX {
            return Err(format!("at most {BLOCKS_MAX} blocks at once"));
        }
        found.push((first, last));
    }
    Ok(found)
}

impl Store {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self(dir)
    }

    /// Answers a node.
    pub(crate) async fn answer(&self, request: &Request<Incoming>) -> Answer {
        let ask = match Ask::parse(request.uri().path(), request.uri().query()) {
            Ok(ask) => ask,
            Err(reason) => return refuse(StatusCode::BAD_REQUEST, &reason),
        };
        let path = self.0.join(&ask.digest).join(ask.file);
        let read = tokio::task::spawn_blocking(move || read(&path, ask.blocks.as_deref())).await;
        match read.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(bytes) => {
                let mut answer = Response::new(Full::new(Bytes::from(bytes)));
                let kind = http::HeaderValue::from_static("application/octet-stream");
                answer.headers_mut().insert(http::header::CONTENT_TYPE, kind);
                answer
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                refuse(StatusCode::NOT_FOUND, "the hub does not have this version")
            }
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                refuse(StatusCode::BAD_REQUEST, &error.to_string())
            }
            Err(error) => {
                tracing::warn!(%error, "a version of the OS could not be read");
                refuse(StatusCode::INTERNAL_SERVER_ERROR, "the version could not be read")
            }
        }
    }
}

fn read(path: &std::path::Path, blocks: Option<&[(u64, u64)]>) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let whole = [(0, len.div_ceil(BLOCK_LEN).saturating_sub(1))];
    if blocks.is_none() && len > WHOLE_LEN_MAX {
        return Err(io::Error::other("longer than such a file can be"));
    }
    let mut bytes = Vec::new();
    for (first, last) in blocks.unwrap_or(&whole) {
        let (from, to) = (first * BLOCK_LEN, ((last + 1) * BLOCK_LEN).min(len));
        if from >= len && len > 0 {
            let what = format!("the file has no block {first}");
            return Err(io::Error::new(ErrorKind::InvalidInput, what));
        }
        let start = bytes.len();
        let wanted = usize::try_from(to.saturating_sub(from)).map_err(io::Error::other)?;
        bytes.resize(start + wanted, 0);
        file.read_exact_at(&mut bytes[start..], from)?;
    }
    Ok(bytes)
}

fn refuse(status: StatusCode, reason: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(reason.to_owned())));
    *answer.status_mut() = status;
    answer
}

/// What a peer without a certificate that counts gets.
pub(crate) fn unknown_peer() -> Answer {
    refuse(StatusCode::UNAUTHORIZED, "only nodes with a certificate are given versions of the OS")
}

/// What a node gets from a hub without a store.
pub(crate) fn no_store() -> Answer {
    refuse(StatusCode::NOT_FOUND, "this hub has no store of OS versions")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_names_a_version_a_known_file_and_blocks_within_the_bound() {
        let hex = "0a".repeat(32);
        let ask = |path: &str, query| Ask::parse(&path.replace("HEX", &hex), query);
        let found = ask("/os/HEX/root.img", Some("blocks=0-15,40-40")).expect("a question");
        assert_eq!((found.file, found.blocks), ("root.img", Some(vec![(0, 15), (40, 40)])));
        assert_eq!(ask("/os/HEX/manifest.json", None).expect("a question").blocks, None);
        for (path, query) in [
            ("/os/HEX/../x", None),
            ("/os/HEX/passwd", None),
            ("/os/../root.img", Some("blocks=0-0")),
            ("/os/HEX/root.img", None),
            ("/os/HEX/root.img", Some("blocks=")),
            ("/os/HEX/root.img", Some("blocks=0-256")),
            ("/os/HEX/root.img", Some("blocks=5-4")),
            ("/os/HEX/root.img", Some("blocks=0-99999999999")),
            ("/os/HEX/a/root.img", Some("blocks=0-0")),
        ] {
            assert!(ask(path, query).is_err(), "{path} {query:?}");
        }
    }

    #[test]
    fn blocks_come_one_after_the_other_and_the_last_one_is_short() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("root.img");
        let content: Vec<u8> = (0..10_000_u32).map(|number| (number / 100) as u8).collect();
        std::fs::write(&path, &content).expect("written");
        let got = read(&path, Some(&[(2, 2), (0, 0)])).expect("blocks");
        assert_eq!(got, [&content[8192..], &content[..4096]].concat());
        assert_eq!(read(&path, None).expect("all"), content);
        let error = read(&path, Some(&[(3, 3)])).expect_err("no such block");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(read(&path, Some(&[(1, 90)])).expect("what there is").len() == 10_000 - 4096);
    }
}
