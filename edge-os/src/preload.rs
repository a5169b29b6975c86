//! Images that come with the machine: archives in a folder, given to containerd when it lacks them.
//!
//! The agent calls [`import_missing`] on the appliance before it starts pods, so that a node without a link has its
//! pause image and whatever was built in. An archive is a tar file with an OCI image layout. It is read twice at most:
//! for its index, and, if an image of that name and digest is not known yet, for its blobs. On later starts nothing is
//! written. Blobs are kept by a lease until the image's record names them, and by labels of the records after that.
//!
//! Nothing is unpacked here: the runtime interface does that when the first container of an image is made.
//!
//! Source: containerd/containerd, api/services/{content,images,leases}/v1; docs/garbage-collection.md (labels);
//! opencontainers/image-spec, image-layout.md.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::cri;

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod content_v1 {
    tonic::include_proto!("containerd.services.content.v1");
}

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod images_v1 {
    tonic::include_proto!("containerd.services.images.v1");
}

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod leases_v1 {
    tonic::include_proto!("containerd.services.leases.v1");
}

use content_v1::content_client::ContentClient;
use content_v1::{InfoRequest, WriteAction, WriteContentRequest};
use images_v1::images_client::ImagesClient;
use images_v1::{CreateImageRequest, GetImageRequest, Image, UpdateImageRequest};
use leases_v1::leases_client::LeasesClient;

/// Where the appliance's image has them.
pub const FOLDER: &str = "/usr/share/skerry/images";
/// containerd's namespace for pods.
const NAMESPACE: &str = "k8s.io";
/// Archives that are looked at.
const ARCHIVES_MAX: usize = 256;
/// Files in one archive.
const ENTRIES_MAX: usize = 10_000;
/// Longest document (index, manifest) that is read whole.
const DOCUMENT_LEN_MAX: u64 = 4 << 20;
/// Bytes of a blob in one message.
const CHUNK_LEN: usize = 256 * 1024;
/// Messages of a blob that wait for containerd.
const CHUNKS_MAX: usize = 4;
/// An import that failed leaves nothing behind after this time.
const LEASE_TIME: Duration = Duration::from_secs(3600);
/// How deep indexes may name indexes.
const DEPTH_MAX: usize = 3;
const TAR_BLOCK: u64 = 512;

/// Why an archive was not imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PreloadError {
    /// The folder or an archive cannot be read.
    #[error("could not read `{path}`")]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The archive is something else.
    #[error("`{path}` is not an archive with an OCI image layout: {what}")]
    Layout {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// containerd does not answer, or not yet.
    #[error("containerd does not answer")]
    Down,
    /// containerd refused a call.
    #[error("containerd refused `{call}` for `{path}`: {message}")]
    Refused {
        /// Which archive.
        path: PathBuf,
        /// Which call.
        call: &'static str,
        /// Its words.
        message: String,
    },
}

/// Time between two tries while containerd does not answer.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// As [`import_missing`], as soon as containerd answers.
///
/// # Errors
///
/// As [`import_missing`].
pub async fn import_when_up(
    socket: &Path,
    folder: &Path,
) -> Result<(Vec<Imported>, Vec<PreloadError>), PreloadError> {
    loop {
        let (images, failed) = import_missing(socket, folder).await?;
        if !failed.iter().any(|error| matches!(error, PreloadError::Down)) {
            return Ok((images, failed));
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// What became of one archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// Name of the image.
    pub name: String,
    /// Whether it was written now; else containerd had it.
    pub new: bool,
}

/// Gives containerd at `socket` every image of the archives in `folder` that it lacks, in the order of their names.
/// A folder that is not there has no archives. One bad archive does not keep the others back: it is an error of the
/// second list.
///
/// # Errors
///
/// [`PreloadError::Read`] when the folder cannot be read.
pub async fn import_missing(
    socket: &Path,
    folder: &Path,
) -> Result<(Vec<Imported>, Vec<PreloadError>), PreloadError> {
    let read = |source| PreloadError::Read { path: folder.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Default::default()),
        Err(error) => return Err(read(error)),
    };
    let mut paths = Vec::new();
    for entry in entries.take(ARCHIVES_MAX) {
        let path = entry.map_err(read)?.path();
        if path.extension().is_some_and(|extension| extension == "tar") {
            paths.push(path);
        }
    }
    paths.sort();
    let channel = cri::channel(socket.to_owned());
    let (mut imported, mut failed) = (Vec::new(), Vec::new());
    for path in paths {
        let mut import = Import { channel: channel.clone(), path, lease: None };
        let result = import.run().await;
        import.end().await;
        match result {
            Ok(images) => imported.extend(images),
            Err(error) => failed.push(error),
        }
    }
    Ok((imported, failed))
}

/// A blob's place in the archive.
#[derive(Debug, Clone, Copy)]
struct Extent {
    offset: u64,
    len: u64,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: HashMap<String, String>,
}

/// A manifest or an index, as far as it names others.
#[derive(Debug, Deserialize)]
struct Document {
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

struct Import {
    channel: Channel,
    path: PathBuf,
    lease: Option<MetadataValue<Ascii>>,
}

impl Import {
    async fn run(&mut self) -> Result<Vec<Imported>, PreloadError> {
        let read = |source| PreloadError::Read { path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(read)?;
        let files = list(&mut file).map_err(|what| self.layout(what))?;
        let index = files.get("index.json").ok_or_else(|| self.layout("it has no `index.json`"))?;
        let index: Document = self.document(&mut file, *index)?;
        let mut images = Vec::new();
        for target in index.manifests {
            let Some(name) = name_of(&target) else {
                return Err(self.layout("an image in its index has no full name"));
            };
            let new = self.known_digest(&name).await? != Some(target.digest.clone());
            if new {
                self.take_lease().await?;
                self.write_tree(&mut file, &files, &target).await?;
                self.name_image(&name, &target).await?;
            }
            images.push(Imported { name, new });
        }
        Ok(images)
    }

    fn layout(&self, what: impl Into<String>) -> PreloadError {
        PreloadError::Layout { path: self.path.clone(), what: what.into() }
    }

    fn refused(&self, call: &'static str, status: &Status) -> PreloadError {
        if status.code() == Code::Unavailable {
            return PreloadError::Down;
        }
        PreloadError::Refused { path: self.path.clone(), call, message: status.message().into() }
    }

    fn document<T: for<'a> Deserialize<'a>>(
        &self,
        file: &mut File,
        extent: Extent,
    ) -> Result<T, PreloadError> {
        if extent.len > DOCUMENT_LEN_MAX {
            return Err(self.layout("a document is too long"));
        }
        let bytes = read_at(file, extent.offset, extent.len as usize)
            .map_err(|source| PreloadError::Read { path: self.path.clone(), source })?;
        serde_json::from_slice(&bytes).map_err(|error| self.layout(error.to_string()))
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request
            .metadata_mut()
            .insert("containerd-namespace", MetadataValue::from_static(NAMESPACE));
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        request
    }

    async fn known_digest(&self, name: &str) -> Result<Option<String>, PreloadError> {
        let mut client = ImagesClient::new(self.channel.clone());
        match client.get(self.request(GetImageRequest { name: name.into() })).await {
            Ok(answer) => {
                let image = answer.into_inner().image;
                Ok(image.and_then(|image| image.target).map(|target| target.digest))
            }
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.refused("images.Get", &status)),
        }
    }

    async fn take_lease(&mut self) -> Result<(), PreloadError> {
        if self.lease.is_some() {
            return Ok(());
        }
        let id = format!("skerry-preload-{}", uuid::Uuid::new_v4());
        let until = jiff::Timestamp::now()
            .checked_add(jiff::SignedDuration::try_from(LEASE_TIME).unwrap_or_default())
            .unwrap_or(jiff::Timestamp::MAX);
        let labels =
            BTreeMap::from([("containerd.io/gc.expire".to_owned(), format!("{until:.0}"))]);
        let mut client = LeasesClient::new(self.channel.clone());
        let request = self.request(leases_v1::CreateRequest { id: id.clone(), labels });
        client.create(request).await.map_err(|status| self.refused("leases.Create", &status))?;
        self.lease = id.parse().ok();
        Ok(())
    }

    /// Gives the lease back; one that stays runs out by itself.
    async fn end(&mut self) {
        if let Some(lease) = self.lease.take() {
            let id = lease.to_str().unwrap_or_default().to_owned();
            let mut client = LeasesClient::new(self.channel.clone());
            let _ = client.delete(self.request(leases_v1::DeleteRequest { id })).await;
        }
    }

    /// Stores what `top` names before it, so that a record never names what is not there.
    async fn write_tree(
        &self,
        file: &mut File,
        files: &HashMap<String, Extent>,
        top: &Descriptor,
    ) -> Result<(), PreloadError> {
        // Each with the labels that keep what it names.
        let mut open = vec![(top.clone(), 0)];
        let mut order = Vec::new();
        while let Some((descriptor, depth)) = open.pop() {
            if depth > DEPTH_MAX || order.len() > ENTRIES_MAX {
                return Err(self.layout("its index is nested too deep"));
            }
            let Some(extent) = files.get(&blob_path(&descriptor.digest)) else {
                // The other architectures of an index need not be in the archive.
                if depth > 0 && is_document(&descriptor.media_type) {
                    continue;
                }
                return Err(self.layout(format!("blob `{}` is missing", descriptor.digest)));
            };
            let mut labels = BTreeMap::new();
            if is_document(&descriptor.media_type) {
                let document: Document = self.document(file, *extent)?;
                let mut keep = |kind: String, one: &Descriptor| {
                    if files.contains_key(&blob_path(&one.digest)) {
                        labels.insert(
                            format!("containerd.io/gc.ref.content.{kind}"),
                            one.digest.clone(),
                        );
                    }
                };
                document.config.iter().for_each(|one| keep("config".into(), one));
                document.layers.iter().enumerate().for_each(|(n, one)| keep(format!("l.{n}"), one));
                document
                    .manifests
                    .iter()
                    .enumerate()
                    .for_each(|(n, one)| keep(format!("m.{n}"), one));
                let below =
                    document.config.into_iter().chain(document.layers).chain(document.manifests);
                open.extend(below.map(|one| (one, depth + 1)));
            }
            order.push((descriptor, *extent, labels));
        }
        for (descriptor, extent, labels) in order.into_iter().rev() {
            self.write_blob(&descriptor, extent, labels).await?;
        }
        Ok(())
    }

    async fn write_blob(
        &self,
        descriptor: &Descriptor,
        extent: Extent,
        labels: BTreeMap<String, String>,
    ) -> Result<(), PreloadError> {
        if extent.len != descriptor.size {
            return Err(self.layout(format!("blob `{}` has another length", descriptor.digest)));
        }
        let mut client = ContentClient::new(self.channel.clone());
        let info = self.request(InfoRequest { digest: descriptor.digest.clone() });
        let has = client.info(info).await;
        if has.is_ok() && labels.is_empty() {
            return Ok(());
        }
        let (chunks, receiver) = tokio::sync::mpsc::channel(CHUNKS_MAX);
        let path = self.path.clone();
        let digest = descriptor.digest.clone();
        let reader = tokio::task::spawn_blocking(move || {
            send_blob(&path, extent, &digest, labels, |message| {
                chunks.blocking_send(message).is_ok()
            })
        });
        let stream = futures::stream::unfold(receiver, |mut receiver| async move {
            Some((receiver.recv().await?, receiver))
        });
        let answered = async {
            let mut answers = client.write(self.request(stream)).await?.into_inner();
            while answers.message().await?.is_some() {}
            Ok::<(), Status>(())
        };
        let answered = answered.await;
        match reader.await {
            Ok(Ok(())) => {}
            Ok(Err(source)) => return Err(PreloadError::Read { path: self.path.clone(), source }),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
        match answered {
            Ok(()) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(self.refused("content.Write", &status)),
        }
    }

    async fn name_image(&self, name: &str, target: &Descriptor) -> Result<(), PreloadError> {
        let target = images_v1::Descriptor {
            media_type: target.media_type.clone(),
            digest: target.digest.clone(),
            size: i64::try_from(target.size).unwrap_or(i64::MAX),
        };
        let image = Image { name: name.into(), labels: BTreeMap::new(), target: Some(target) };
        let mut client = ImagesClient::new(self.channel.clone());
        let create = self.request(CreateImageRequest { image: Some(image.clone()) });
        match client.create(create).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {
                let update = self.request(UpdateImageRequest { image: Some(image) });
                let updated = client.update(update).await;
                updated.map(drop).map_err(|status| self.refused("images.Update", &status))
            }
            Err(status) => Err(self.refused("images.Create", &status)),
        }
    }
}

/// Reads a blob and sends it in pieces, the last one with its commit. Stops when nobody listens.
fn send_blob(
    path: &Path,
    extent: Extent,
    digest: &str,
    labels: BTreeMap<String, String>,
    mut send: impl FnMut(WriteContentRequest) -> bool,
) -> io::Result<()> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(extent.offset))?;
    let mut offset = 0;
    let mut hash = Sha256::new();
    loop {
        let len = (extent.len - offset).min(CHUNK_LEN as u64);
        let mut data = vec![0; len as usize];
        file.read_exact(&mut data)?;
        hash.update(&data);
        let last = offset + len == extent.len;
        let found = last.then(|| {
            let hash = std::mem::take(&mut hash).finalize();
            hash.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
        });
        if found.is_some_and(|found| found != digest) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("blob `{digest}` has another digest"),
            ));
        }
        let message = WriteContentRequest {
            action: if last { WriteAction::Commit } else { WriteAction::Write }.into(),
            r#ref: format!("skerry-preload-{digest}"),
            total: i64::try_from(extent.len).unwrap_or(i64::MAX),
            expected: digest.to_owned(),
            offset: i64::try_from(offset).unwrap_or(i64::MAX),
            data,
            labels: if last { labels.clone() } else { BTreeMap::new() },
        };
        if !send(message) || last {
            return Ok(());
        }
        offset += len;
    }
}

/// Where the files of a tar archive lie, by their path.
fn list(file: &mut File) -> Result<HashMap<String, Extent>, String> {
    let mut files = HashMap::new();
    let mut at = 0;
    for _ in 0..ENTRIES_MAX {
        let Ok(header) = read_at(file, at, TAR_BLOCK as usize) else { break };
        if header.iter().all(|byte| *byte == 0) {
            break;
        }
        if header[257..262] != *b"ustar" {
            return Err("it is no tar archive".into());
        }
        let text = |range: std::ops::Range<usize>| {
            let bytes = &header[range];
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            String::from_utf8_lossy(&bytes[..end]).into_owned()
        };
        let len = u64::from_str_radix(text(124..136).trim(), 8)
            .map_err(|_| "a length in it is no number".to_owned())?;
        let offset = at + TAR_BLOCK;
        let prefix = if header[345] == 0 { String::new() } else { format!("{}/", text(345..500)) };
        let path = format!("{prefix}{}", text(0..100));
        if matches!(header[156], b'0' | 0) {
            let path = path.trim_start_matches("./").to_owned();
            files.insert(path, Extent { offset, len });
        }
        at = len
            .checked_next_multiple_of(TAR_BLOCK)
            .and_then(|len| offset.checked_add(len))
            .ok_or("a length in it is too large")?;
    }
    Ok(files)
}

fn read_at(file: &mut File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn is_document(media_type: &str) -> bool {
    ["manifest", "image.index"].iter().any(|word| media_type.contains(word))
}

/// The full name of an image; a bare tag is no name.
fn name_of(descriptor: &Descriptor) -> Option<String> {
    let named = |key: &str| descriptor.annotations.get(key).filter(|name| name.contains('/'));
    let name =
        named("io.containerd.image.name").or_else(|| named("org.opencontainers.image.ref.name"))?;
    let has_tag = name.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
    Some(if has_tag { name.clone() } else { format!("{name}:latest") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(files: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut builder = tar::Builder::new(file.reopen().expect("again"));
        for (path, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, *bytes).expect("added");
        }
        builder.finish().expect("finished");
        file
    }

    #[test]
    fn files_of_an_archive_are_found_with_their_place() {
        let file = archive(&[("./index.json", b"{}"), ("blobs/sha256/aa", &[7; 1000])]);
        let mut file = file.reopen().expect("again");
        let files = list(&mut file).expect("a tar archive");
        let blob = files["blobs/sha256/aa"];
        assert_eq!(blob.len, 1000);
        assert_eq!(read_at(&mut file, blob.offset, 1000).expect("there"), [7; 1000]);
        assert_eq!(files["index.json"].len, 2);
        let mut garbage = tempfile::tempfile().expect("a file");
        io::Write::write_all(&mut garbage, &[b'x'; 1024]).expect("written");
        assert!(list(&mut garbage).is_err());
    }

    #[test]
    fn blob_is_sent_in_pieces_and_a_wrong_digest_is_refused_before_its_commit() {
        let bytes = vec![3_u8; CHUNK_LEN + 5];
        let file = archive(&[("b", &bytes)]);
        let extent = list(&mut file.reopen().expect("again")).expect("a tar archive")["b"];
        let digest = Sha256::digest(&bytes)
            .iter()
            .fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"));
        let mut sent = Vec::new();
        send_blob(file.path(), extent, &digest, BTreeMap::new(), |message| {
            sent.push((message.action, message.offset, message.data.len()));
            true
        })
        .expect("sent");
        let [write, commit] = [WriteAction::Write, WriteAction::Commit].map(i32::from);
        assert_eq!(sent, [(write, 0, CHUNK_LEN), (commit, CHUNK_LEN as i64, 5)]);
        let mut commits = 0;
        let wrong = send_blob(file.path(), extent, "sha256:00", BTreeMap::new(), |message| {
            commits += usize::from(message.action == commit);
            true
        });
        assert!(wrong.is_err() && commits == 0);
    }

    #[test]
    fn image_without_a_full_name_has_none() {
        let descriptor = |annotations: &[(&str, &str)]| Descriptor {
            media_type: String::new(),
            digest: String::new(),
            size: 0,
            annotations: annotations.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        };
        let name = "org.opencontainers.image.ref.name";
        assert_eq!(name_of(&descriptor(&[(name, "latest")])), None);
        assert_eq!(name_of(&descriptor(&[(name, "r.io/a")])).as_deref(), Some("r.io/a:latest"));
        let both = [(name, "x/y"), ("io.containerd.image.name", "skerry.local/pause:1")];
        assert_eq!(name_of(&descriptor(&both)).as_deref(), Some("skerry.local/pause:1"));
    }

    #[tokio::test]
    async fn folder_that_is_not_there_has_no_images() {
        let done = import_missing(Path::new("/none"), Path::new("/nonexistent")).await;
        assert!(done.expect("nothing to do").0.is_empty());
    }
}
