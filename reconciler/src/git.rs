//! Reads commits of one branch of one remote, with gix.
//!
//! A local path and `file://` are read by opening the repository itself: no transport, no copy, no git binary.
//! `http(s)://` is fetched at depth 1 into a bare repository of our own. Trees are read straight from the object
//! database into a [`Source`]; nothing is ever checked out.
//!
//! Everything here blocks; the driver calls it on a blocking thread and bounds it in time.

use skerry_reconciler_core::{Digest, FILE_MAX, Source, SourceError};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Packs after which the copy of an http remote is thrown away and fetched anew; each fetch leaves one more.
const PACKS_MAX: usize = 50;
/// Folders below each other in the fleet's folders.
const DEPTH_MAX: usize = 16;

/// Why the remote could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GitError {
    #[error(
        "remote `{0}` cannot be used: only local paths, file://, http:// and https:// are supported yet"
    )]
    Unsupported(String),
    #[error("there is no Git repository at `{path}`")]
    Gone { path: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the remote has no branch `{branch}`")]
    NoBranch { branch: String },
    #[error("the remote asks for credentials, or refuses those in its URL")]
    Credentials { source: Box<dyn std::error::Error + Send + Sync> },
    #[error("could not fetch")]
    Fetch { source: Box<dyn std::error::Error + Send + Sync> },
    #[error("could not read {what}")]
    Read { what: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the commit cannot be used")]
    Source { source: SourceError },
}

impl GitError {
    /// One word for a condition.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Unsupported(_) => "RemoteUnsupported",
            Self::Gone { .. } => "RemoteGone",
            Self::NoBranch { .. } => "BranchMissing",
            Self::Credentials { .. } => "CredentialsRefused",
            Self::Fetch { .. } => "FetchFailed",
            Self::Read { .. } => "ReadFailed",
            Self::Source { .. } => "CommitTooLarge",
        }
    }

    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Unsupported(_) => Some("use an https:// URL or a local path".to_owned()),
            Self::Gone { .. } => Some("check the path; what was applied keeps running".to_owned()),
            Self::NoBranch { branch } => {
                Some(format!("push a commit to `{branch}`, or name another branch"))
            }
            Self::Credentials { .. } => {
                Some("put user and token into the URL: https://USER:TOKEN@HOST/PATH".to_owned())
            }
            Self::Fetch { .. } => {
                Some("check the network and the URL; what was applied keeps running".to_owned())
            }
            Self::Read { .. } => Some("check the repository with `git fsck`".to_owned()),
            Self::Source { .. } => Some("keep large files out of the fleet's folders".to_owned()),
        }
    }
}

/// A commit that was not seen before.
#[derive(Debug)]
pub(crate) struct Commit {
    /// Its id, hexadecimal.
    pub(crate) revision: String,
    /// Its files.
    pub(crate) source: Source,
    /// Whether the commit that was seen before is no ancestor of this one.
    pub(crate) rewritten: bool,
}

/// One branch of one remote, and what was last seen of it.
pub(crate) struct Remote {
    location: Location,
    branch: String,
    repository: Option<gix::Repository>,
    /// Commit that was given out last.
    seen: Option<gix::ObjectId>,
    /// Commit that the next one is expected to descend from.
    before: Option<gix::ObjectId>,
    blobs: HashMap<gix::ObjectId, Arc<[u8]>>,
}

enum Location {
    Local(PathBuf),
    Http { url: String, copy: PathBuf },
}

impl Remote {
    /// `dir` is where copies of http remotes are kept.
    pub(crate) fn new(remote: &str, branch: &str, dir: &Path) -> Result<Self, GitError> {
        let location = match remote.split_once("://") {
            None if remote.contains(':')
                && !Path::new(remote).exists()
                && !remote.starts_with(['/', '.']) =>
            {
                return Err(GitError::Unsupported(remote.to_owned()));
            }
            None => Location::Local(PathBuf::from(remote)),
            Some(("file", path)) => Location::Local(PathBuf::from(path)),
            Some(("http" | "https", _)) => {
                let name = Digest::of_parts([remote.as_bytes()]);
                let copy = dir.join(format!("{}.git", &name.as_str()[..16]));
                Location::Http { url: remote.to_owned(), copy }
            }
            Some(_) => return Err(GitError::Unsupported(without_credentials(remote))),
        };
        let branch = branch.to_owned();
        Ok(Self {
            location,
            branch,
            repository: None,
            seen: None,
            before: None,
            blobs: HashMap::new(),
        })
    }

    /// Whether looking costs a network round trip.
    pub(crate) fn is_distant(&self) -> bool {
        matches!(self.location, Location::Http { .. })
    }

    /// The branch's commit if it is another one than the last time, read whole.
    pub(crate) fn poll(&mut self, interrupt: &AtomicBool) -> Result<Option<Commit>, GitError> {
        let head = match self.head(interrupt) {
            Ok(head) => head,
            Err(error) => {
                // Opened anew the next time: the folder may be another repository by then.
                self.repository = None;
                return Err(error);
            }
        };
        if self.seen == Some(head) {
            return Ok(None);
        }
        let source = self.read(head)?;
        let rewritten = self.before.is_some_and(|before| self.is_rewritten(before, head));
        self.seen = Some(head);
        self.before = Some(head);
        Ok(Some(Commit { revision: head.to_string(), source, rewritten }))
    }

    /// Names the commit that an earlier run saw last, so that a history rewritten in between is noticed.
    pub(crate) fn remember(&mut self, revision: &str) {
        self.before = gix::ObjectId::from_hex(revision.as_bytes()).ok();
    }

    fn head(&mut self, interrupt: &AtomicBool) -> Result<gix::ObjectId, GitError> {
        let (reference, gone) = match &self.location {
            Location::Local(path) => {
                let gone = |source: gix::Error| GitError::Gone {
                    path: path.display().to_string(),
                    source: source.into(),
                };
                // A repository that was deleted keeps answering from our open handle for a while.
                if !path.exists() {
                    self.repository = None;
                }
                if self.repository.is_none() {
                    let open = gix::open_opts(path, gix::open::Options::isolated());
                    self.repository = Some(open.map_err(gone)?);
                }
                (format!("refs/heads/{}", self.branch), path.display().to_string())
            }
            Location::Http { url, copy } => {
                let repository = match self.repository.take() {
                    Some(repository) => repository,
                    None => open_copy(copy)?,
                };
                fetch(&repository, url, &self.branch, interrupt)?;
                self.repository = Some(repository);
                (tracking(&self.branch), copy.display().to_string())
            }
        };
        let repository = self.repository.as_ref().expect("opened above");
        let reference = repository.try_find_reference(reference.as_str()).map_err(|source| {
            GitError::Read { what: format!("the branch in `{gone}`"), source: source.into() }
        })?;
        let Some(mut reference) = reference else {
            return Err(GitError::NoBranch { branch: self.branch.clone() });
        };
        let id = reference.peel_to_id().map_err(|source| GitError::Read {
            what: format!("branch `{}`", self.branch),
            source: source.into(),
        })?;
        Ok(id.detach())
    }

    fn is_rewritten(&self, before: gix::ObjectId, head: gix::ObjectId) -> bool {
        let Some(repository) = &self.repository else { return false };
        // A copy of depth 1 knows no ancestors beyond the parents' names.
        if self.is_distant() {
            return false;
        }
        match repository.merge_base(before, head) {
            Ok(base) => base.map(gix::Id::detach) != Some(before),
            Err(_) => true,
        }
    }

    fn read(&mut self, head: gix::ObjectId) -> Result<Source, GitError> {
        let repository = self.repository.as_ref().expect("the head came from it");
        let mut reader = Reader {
            repository,
            old: std::mem::take(&mut self.blobs),
            blobs: HashMap::new(),
            source: Source::default(),
        };
        let result = reader.commit(head);
        let Reader { blobs, source, .. } = reader;
        self.blobs = blobs;
        result.map(|()| source)
    }
}

struct Reader<'a> {
    repository: &'a gix::Repository,
    /// Blobs of the commit before: what did not change is not read again.
    old: HashMap<gix::ObjectId, Arc<[u8]>>,
    blobs: HashMap<gix::ObjectId, Arc<[u8]>>,
    source: Source,
}

impl Reader<'_> {
    fn commit(&mut self, head: gix::ObjectId) -> Result<(), GitError> {
        let read = |source: gix::Error| GitError::Read {
            what: format!("commit {head}"),
            source: source.into(),
        };
        let commit = self.repository.find_commit(head).map_err(&read)?;
        let tree = commit.tree().map_err(read)?;
        self.tree(&tree, "", 0)
    }

    fn tree(&mut self, tree: &gix::Tree<'_>, folder: &str, depth: usize) -> Result<(), GitError> {
        use gix::objs::tree::EntryKind;
        let read = |source: gix::Error| GitError::Read {
            what: format!("folder `{folder}`"),
            source: source.into(),
        };
        for entry in tree.iter() {
            let entry = entry.map_err(&read)?;
            let Ok(name) = std::str::from_utf8(entry.filename()) else { continue };
            if depth == 0 && name != "fleet.yaml" && !Source::wants_folder(name) {
                continue;
            }
            let path = format!("{folder}{name}");
            match entry.kind() {
                EntryKind::Tree if depth == DEPTH_MAX => {
                    self.source.insert_unread(
                        format!("{path}/"),
                        format!("folders are nested deeper than {DEPTH_MAX}"),
                    );
                }
                EntryKind::Tree => {
                    let object = entry.object().map_err(&read)?;
                    self.tree(&object.into_tree(), &format!("{path}/"), depth + 1)?;
                }
                EntryKind::Blob | EntryKind::BlobExecutable if Source::wants(&path) => {
                    self.blob(path, entry.object_id())?
                }
                EntryKind::Blob | EntryKind::BlobExecutable => {}
                EntryKind::Link => {
                    self.unread(path, "symbolic links are not followed; put the file itself here")
                }
                EntryKind::Commit => {
                    self.unread(path, "submodules are not read; put the files themselves here")
                }
            }
        }
        Ok(())
    }

    fn unread(&mut self, path: String, reason: &str) {
        let path = if Source::wants(&path) { path } else { format!("{path}/") };
        self.source.insert_unread(path, reason);
    }

    fn blob(&mut self, path: String, id: gix::ObjectId) -> Result<(), GitError> {
        let read = |path: &str, source: gix::Error| GitError::Read {
            what: format!("`{path}`"),
            source: source.into(),
        };
        let content = match self.old.get(&id).or_else(|| self.blobs.get(&id)) {
            Some(content) => content.clone(),
            None => {
                let header = self.repository.find_header(id).map_err(|error| read(&path, error))?;
                if header.size() > FILE_MAX as u64 {
                    self.source.insert_too_large(path, header.size());
                    return Ok(());
                }
                let object = self.repository.find_object(id).map_err(|error| read(&path, error))?;
                object.detach().data.into()
            }
        };
        self.blobs.insert(id, content.clone());
        self.source.insert(path, content).map_err(|source| GitError::Source { source })
    }
}

fn tracking(branch: &str) -> String {
    format!("refs/remotes/origin/{branch}")
}

fn open_copy(copy: &Path) -> Result<gix::Repository, GitError> {
    let packs = std::fs::read_dir(copy.join("objects/pack"))
        .map(|entries| {
            entries
                .flatten()
                .filter(|entry| entry.path().extension().is_some_and(|end| end == "pack"))
                .count()
        })
        .unwrap_or_default();
    if packs > PACKS_MAX {
        // Only a copy: the next fetch brings back what is needed.
        let _ = std::fs::remove_dir_all(copy);
    }
    if let Ok(repository) = gix::open_opts(copy, gix::open::Options::isolated()) {
        return Ok(repository);
    }
    let what = || format!("the remote's copy in `{}`", copy.display());
    let _ = std::fs::remove_dir_all(copy);
    std::fs::create_dir_all(copy)
        .map_err(|source| GitError::Read { what: what(), source: source.into() })?;
    gix::init_bare(copy).map_err(|source| GitError::Read { what: what(), source: source.into() })
}

fn fetch(
    repository: &gix::Repository,
    url: &str,
    branch: &str,
    interrupt: &AtomicBool,
) -> Result<(), GitError> {
    use gix::remote::{Direction, fetch::Shallow};
    let specification = format!("+refs/heads/{branch}:{}", tracking(branch));
    let attempt = || -> Result<(), gix::Error> {
        let remote = repository
            .remote_at(url)?
            .with_fetch_tags(gix::remote::fetch::Tags::None)
            .with_refspecs([specification.as_str()], Direction::Fetch)?;
        // Credentials come from the URL or not at all: the default would ask helpers and then the terminal.
        let connection = remote.connect(Direction::Fetch)?.with_credentials(|_| Ok(None));
        let depth = std::num::NonZeroU32::MIN;
        connection
            .prepare_fetch(gix::progress::Discard, gix::remote::ref_map::Options::default())?
            .with_shallow(Shallow::DepthAtRemote(depth))
            .receive(gix::progress::Discard, interrupt)?;
        Ok(())
    };
    attempt().map_err(|error| {
        let text = chain(&error).to_lowercase();
        if is_refusal(&text) {
            GitError::Credentials { source: error.into() }
        } else if text.contains("didn't match")
            || text.contains("did not match")
            || text.contains("none of the refspec")
        {
            GitError::NoBranch { branch: branch.to_owned() }
        } else {
            GitError::Fetch { source: error.into() }
        }
    })
}

/// Whether a transport's words mean that who asked may not. The status codes count only as whole words: a port may
/// have the same digits.
fn is_refusal(text: &str) -> bool {
    let said = ["credential", "unauthorized", "permission denied"];
    let mut words = text.split(|c: char| !c.is_ascii_alphanumeric());
    said.iter().any(|word| text.contains(word)) || words.any(|word| matches!(word, "401" | "403"))
}

/// An error with all its sources on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    text
}

/// A URL as it may be shown: without user and password.
pub(crate) fn without_credentials(url: &str) -> String {
    match url
        .split_once("://")
        .map(|(scheme, rest)| (scheme, rest, rest.find('/').unwrap_or(rest.len())))
    {
        Some((scheme, rest, end)) => match rest[..end].rfind('@') {
            Some(at) => format!("{scheme}://{}", &rest[at + 1..]),
            None => url.to_owned(),
        },
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests;
