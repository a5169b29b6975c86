//! Container images that an appliance brings along: our own pause image, and archives given with `--image`.
//!
//! An archive is a tar file with an OCI image layout, as `docker save`, `skopeo` and `buildah` write it. [`check`]
//! reads one completely before it is put into the root: every blob is hashed and an image for this architecture must
//! have a name, because on the device there is nobody to read an error. [`pause`] makes the image whose one process
//! does nothing: 240 bytes of machine code instead of a package. Called by [`crate::root`].
//!
//! Source: opencontainers/image-spec, image-layout.md, manifest.md, annotations.md; opencontainers/runtime-spec for
//! what a first process has to do; containerd, pkg/cri/sbserver/sandbox_stop.go (it ends a sandbox with SIGKILL).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::packages::Arch;
use crate::tree::{Content, hex};

/// Name of the pause image: containerd's `sandbox_image` has the same.
pub const PAUSE_NAME: &str = "skerry.local/pause:1";
/// Bytes of one archive at most; a root partition is not larger.
pub const ARCHIVE_MAX: u64 = 1 << 30;
/// Files of one archive at most.
pub const BLOBS_MAX: usize = 4096;
/// Bytes of an index, manifest or configuration at most (the limit of common registries).
pub const DOCUMENT_MAX: usize = 4 << 20;

/// A checked archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Full name with tag, for example `registry.example/shop/till:3`.
    pub name: String,
    /// Digest of the manifest, `sha256:…`.
    pub digest: String,
    pub content: Content,
}

/// Why an archive is not put into an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OciError {
    #[error("could not read the archive")]
    Read(#[source] io::Error),
    #[error("not an archive with an OCI image layout: {0}")]
    Layout(String),
    #[error("blob `{digest}` is damaged: its bytes have SHA-256 {found}")]
    Blob { digest: String, found: String },
    #[error("blob `{0}` is missing")]
    Missing(String),
    #[error("the archive has no name for its image")]
    NoName,
    #[error("the archive has no image for {arch}, only for {}", .found.join(", "))]
    Arch { arch: Arch, found: Vec<String> },
    #[error("the archive is too large: {0}")]
    TooLarge(&'static str),
}

impl OciError {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Layout(_) => {
                "write it with `skopeo copy … oci-archive:FILE:NAME` or a `docker save` of version 25 or later"
            }
            Self::NoName => {
                "give it a full name: `skopeo copy … oci-archive:FILE:registry.example/name:tag`"
            }
            Self::Arch { .. } => "pull the image for the architecture of the appliance",
            Self::Blob { .. } | Self::Missing(_) => "write the archive again",
            Self::Read(_) | Self::TooLarge(_) => return None,
        };
        Some(text.to_owned())
    }
}

#[derive(Debug, Deserialize)]
struct Descriptor {
    digest: String,
    #[serde(rename = "mediaType", default)]
    media_type: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// Reads an archive completely and returns the image for `arch`.
///
/// # Errors
///
/// See [`OciError`].
pub fn check(path: &Path, arch: Arch) -> Result<Image, OciError> {
    let file = File::open(path).map_err(OciError::Read)?;
    if file.metadata().map_err(OciError::Read)?.len() > ARCHIVE_MAX {
        return Err(OciError::TooLarge("bytes"));
    }
    let content = Content::file(path).map_err(OciError::Read)?;
    let (name, digest) = inspect(BufReader::new(file), arch)?;
    Ok(Image { name, digest, content })
}

fn inspect(archive: impl Read, arch: Arch) -> Result<(String, String), OciError> {
    let files = read(archive)?;
    let layout = |what: &str| OciError::Layout(what.to_owned());
    let index =
        files.documents.get("index.json").ok_or_else(|| layout("it has no `index.json`"))?;
    let index: Index = parse(index, "index.json")?;
    let Some(first) = index.manifests.first() else { return Err(layout("its index is empty")) };
    let name = name_of(first).ok_or(OciError::NoName)?;
    let mut seen = Vec::new();
    let mut open: Vec<(&Descriptor, u8)> = index.manifests.iter().map(|m| (m, 0)).collect();
    let mut nested = Vec::new();
    // An index may name an index, as archives of several architectures do; deeper than that is nothing real.
    for (descriptor, _) in open.clone() {
        if descriptor.media_type.contains("index")
            || descriptor.media_type.contains("manifest.list")
        {
            let bytes = files.document(&descriptor.digest)?;
            nested.push(parse::<Index>(bytes, &descriptor.digest)?);
        }
    }
    open.extend(nested.iter().flat_map(|index| index.manifests.iter().map(|m| (m, 1))));
    for (descriptor, _) in open {
        let kind = &descriptor.media_type;
        if kind.contains("index") || kind.contains("manifest.list") {
            continue;
        }
        if let Some(platform) = &descriptor.platform
            && (platform.os != "linux" || platform.architecture != arch.name())
        {
            seen.push(format!("{}/{}", platform.os, platform.architecture));
            continue;
        }
        let manifest: Manifest = parse(files.document(&descriptor.digest)?, &descriptor.digest)?;
        let config: Value =
            parse(files.document(&manifest.config.digest)?, &manifest.config.digest)?;
        let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
        if (text("os").as_str(), text("architecture").as_str()) != ("linux", arch.name()) {
            seen.push(format!("{}/{}", text("os"), text("architecture")));
            continue;
        }
        if let Some(layer) = manifest.layers.iter().find(|layer| !files.has(&layer.digest)) {
            return Err(OciError::Missing(layer.digest.clone()));
        }
        return Ok((name, descriptor.digest.clone()));
    }
    Err(OciError::Arch { arch, found: seen })
}

/// The full name that containerd gives an image when it imports the archive; a bare tag is no name.
fn name_of(descriptor: &Descriptor) -> Option<String> {
    let named = |key: &str| descriptor.annotations.get(key).filter(|name| name.contains('/'));
    let name =
        named("io.containerd.image.name").or_else(|| named("org.opencontainers.image.ref.name"))?;
    let has_tag = name.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
    Some(if has_tag { name.clone() } else { format!("{name}:latest") })
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T, OciError> {
    serde_json::from_slice(bytes).map_err(|e| OciError::Layout(format!("`{what}`: {e}")))
}

/// What an archive holds: small files with their bytes, all blobs with their digest checked.
struct Files {
    documents: BTreeMap<String, Vec<u8>>,
    blobs: Vec<String>,
}

impl Files {
    fn has(&self, digest: &str) -> bool {
        blob_path(digest).is_some_and(|path| self.blobs.contains(&path))
    }

    fn document(&self, digest: &str) -> Result<&[u8], OciError> {
        let path = blob_path(digest);
        let found = path.and_then(|path| self.documents.get(&path));
        found.map(Vec::as_slice).ok_or_else(|| OciError::Missing(digest.to_owned()))
    }
}

fn blob_path(digest: &str) -> Option<String> {
    let (kind, digits) = digest.split_once(':')?;
    Some(format!("blobs/{kind}/{digits}"))
}

fn read(archive: impl Read) -> Result<Files, OciError> {
    let mut files = Files { documents: BTreeMap::new(), blobs: Vec::new() };
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries().map_err(OciError::Read)? {
        let mut entry = entry.map_err(|e| OciError::Layout(e.to_string()))?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        if files.blobs.len() + files.documents.len() >= BLOBS_MAX {
            return Err(OciError::TooLarge("files"));
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = path.strip_prefix("./").unwrap_or(&path).to_owned();
        let mut hash = Sha256::new();
        let mut document = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = entry.read(&mut buffer).map_err(OciError::Read)?;
            if read == 0 {
                break;
            }
            hash.update(&buffer[..read]);
            if document.len() <= DOCUMENT_MAX {
                document.extend_from_slice(&buffer[..read]);
            }
        }
        if let Some(digits) = path.strip_prefix("blobs/sha256/") {
            let found = hex(&hash.finalize());
            if digits != found {
                return Err(OciError::Blob { digest: format!("sha256:{digits}"), found });
            }
            files.blobs.push(path.clone());
        }
        if document.len() <= DOCUMENT_MAX {
            files.documents.insert(path, document);
        }
    }
    Ok(files)
}

/// The archive of the pause image; the same bytes each time.
pub fn pause(arch: Arch) -> Image {
    let program = pause_program(arch);
    let mut layer = tar::Builder::new(Vec::new());
    append(&mut layer, "pause", &program, 0o755);
    let layer = layer.into_inner().expect("writing to memory");
    let config = json!({
        "architecture": arch.name(),
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
    });
    archive(PAUSE_NAME, &config, &layer, "application/vnd.oci.image.layer.v1.tar")
}

/// An archive of one image with one layer.
fn archive(name: &str, config: &Value, layer: &[u8], layer_type: &str) -> Image {
    let config = config.to_string().into_bytes();
    let descriptor = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": digest(bytes), "size": bytes.len()});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor(layer_type, layer)],
    });
    let manifest = manifest.to_string().into_bytes();
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] = json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rsplit(':').next(),
    });
    let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
    let mut out = tar::Builder::new(Vec::new());
    let mut blobs: Vec<(String, &[u8])> =
        [layer, &config, &manifest].map(|blob| (digest(blob), blob)).into();
    blobs.sort();
    for (digest, blob) in &blobs {
        append(&mut out, &format!("blobs/sha256/{}", &digest["sha256:".len()..]), blob, 0o644);
    }
    append(&mut out, "index.json", index.as_bytes(), 0o644);
    append(&mut out, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644);
    let bytes = out.into_inner().expect("writing to memory");
    Image { name: name.to_owned(), digest: digest(&manifest), content: Content::bytes(bytes) }
}

fn append(out: &mut tar::Builder<Vec<u8>>, path: &str, bytes: &[u8], mode: u32) {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(bytes.len() as u64);
    out.append_data(&mut header, path, bytes).expect("writing to memory");
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// Where the program is loaded; a multiple of the largest page size.
const BASE: u64 = 0x40_0000;
/// Bytes before the code: the ELF header and one program header.
const CODE_AT: u64 = 64 + 56;
const SA_RESTORER: u64 = 0x0400_0000;

/// A program that waits, ends at SIGTERM and SIGINT, and leaves no zombie when it is the first process of a pod that
/// shares its processes: SIGCHLD is ignored, so that the kernel reaps.
fn pause_program(arch: Arch) -> Vec<u8> {
    // The code is followed by two `struct sigaction` of the kernel: handler, flags, restorer, mask.
    let (machine, code, quit): (u16, Vec<u8>, u64) = match arch {
        Arch::Amd64 => (62, PAUSE_AMD64.to_vec(), 0x3a),
        Arch::Arm64 => {
            (183, PAUSE_ARM64.iter().flat_map(|word| word.to_le_bytes()).collect(), 0x4c)
        }
    };
    let len = CODE_AT + code.len() as u64 + 64;
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    for half in [2, machine] {
        out.extend_from_slice(&u16::to_le_bytes(half));
    }
    out.extend_from_slice(&1_u32.to_le_bytes());
    for long in [BASE + CODE_AT, 64, 0] {
        out.extend_from_slice(&u64::to_le_bytes(long));
    }
    out.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64, 56, 1, 0, 0, 0] {
        out.extend_from_slice(&u16::to_le_bytes(half));
    }
    // One segment with everything, to be read and executed.
    for word in [1, 5] {
        out.extend_from_slice(&u32::to_le_bytes(word));
    }
    for long in [0, BASE, BASE, len, len, 0x1_0000] {
        out.extend_from_slice(&u64::to_le_bytes(long));
    }
    out.extend_from_slice(&code);
    let restorer = if arch == Arch::Amd64 { SA_RESTORER } else { 0 };
    for long in [BASE + CODE_AT + quit, restorer, 0, 0, 1, 0, 0, 0] {
        out.extend_from_slice(&u64::to_le_bytes(long));
    }
    out
}

/// rt_sigaction is call 13, pause 34, exit_group 231.
#[rustfmt::skip]
const PAUSE_AMD64: [u8; 0x48] = [
    0x31, 0xd2,                               // xor edx, edx
    0x6a, 0x08, 0x41, 0x5a,                   // push 8; pop r10
    0x48, 0x8d, 0x35, 0x3b, 0, 0, 0,          // lea rsi, on_term
    0x6a, 0x0f, 0x5f, 0x6a, 0x0d, 0x58,       // push 15; pop rdi; push 13; pop rax
    0x0f, 0x05,                               // syscall
    0x48, 0x8d, 0x35, 0x2c, 0, 0, 0,          // lea rsi, on_term
    0x6a, 0x02, 0x5f, 0x6a, 0x0d, 0x58,       // push 2; pop rdi; push 13; pop rax
    0x0f, 0x05,                               // syscall
    0x48, 0x8d, 0x35, 0x3d, 0, 0, 0,          // lea rsi, on_child
    0x6a, 0x11, 0x5f, 0x6a, 0x0d, 0x58,       // push 17; pop rdi; push 13; pop rax
    0x0f, 0x05,                               // syscall
    0x6a, 0x22, 0x58, 0x0f, 0x05,             // wait: push 34; pop rax; syscall
    0xeb, 0xf9,                               // jmp wait
    0x31, 0xff,                               // quit (0x3a): xor edi, edi
    0xb8, 0xe7, 0, 0, 0, 0x0f, 0x05,          // mov eax, 231; syscall
    0x0f, 0x1f, 0x44, 0x00, 0x00,             // nop
];

/// rt_sigaction is call 134, ppoll 73, exit_group 94.
#[rustfmt::skip]
const PAUSE_ARM64: [u32; 22] = [
    0xd280_0002, // movz x2, 0
    0xd280_0103, // movz x3, 8
    0xd280_10c8, // movz x8, 134
    0x1000_0261, // adr x1, on_term
    0xd280_01e0, // movz x0, 15
    0xd400_0001, // svc 0
    0xd280_0040, // movz x0, 2
    0xd400_0001, // svc 0
    0x1000_02c1, // adr x1, on_child
    0xd280_0220, // movz x0, 17
    0xd400_0001, // svc 0
    0xd280_0000, // wait: movz x0, 0
    0xd280_0001, // movz x1, 0
    0xd280_0002, // movz x2, 0
    0xd280_0003, // movz x3, 0
    0xd280_0004, // movz x4, 0
    0xd280_0928, // movz x8, 73
    0xd400_0001, // svc 0
    0x17ff_fff9, // b wait
    0xd280_0000, // quit (0x4c): movz x0, 0
    0xd280_0bc8, // movz x8, 94
    0xd400_0001, // svc 0
];

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(image: &Image) -> Vec<u8> {
        image.content.read().unwrap()
    }

    #[test]
    fn the_pause_image_is_a_sound_archive_under_its_name() {
        for arch in Arch::ALL {
            let image = pause(arch);
            let found = inspect(bytes(&image).as_slice(), arch).unwrap();
            assert_eq!(found, (PAUSE_NAME.to_owned(), image.digest.clone()));
            assert_eq!(pause(arch), image, "the same bytes each time");
            assert!(image.content.size() < 12_000);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_pause_program_waits_ignores_children_and_ends_when_asked() {
        use std::os::unix::fs::PermissionsExt;
        use std::os::unix::process::ExitStatusExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pause");
        std::fs::write(&path, pause_program(Arch::Amd64)).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        // Another thread of this test may have forked while the file was open for writing.
        let mut child = loop {
            match std::process::Command::new(&path).spawn() {
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                other => break other.unwrap(),
            }
        };
        let status = format!("/proc/{}/status", child.id());
        let field = |name: &str| -> Option<u64> {
            let text = std::fs::read_to_string(&status).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix(name))?.trim().to_owned();
            u64::from_str_radix(&line, 16).ok()
        };
        // SIGCHLD, the last signal that it sets, is 17: bit 16.
        while field("SigIgn:").is_none_or(|ignored| ignored & 1 << 16 == 0) {
            assert_eq!(child.try_wait().unwrap(), None, "it goes on waiting");
            std::thread::yield_now();
        }
        assert_eq!(field("SigCgt:").unwrap() & (1 << 14 | 1 << 1), 1 << 14 | 1 << 1);
        let kill = std::process::Command::new("kill").arg(child.id().to_string()).status();
        assert!(kill.unwrap().success());
        let status = child.wait().unwrap();
        assert_eq!((status.code(), status.signal()), (Some(0), None));
    }

    #[test]
    fn archives_for_another_machine_or_without_a_name_are_refused() {
        let image = bytes(&pause(Arch::Arm64));
        let error = inspect(image.as_slice(), Arch::Amd64).unwrap_err();
        assert_eq!(error.to_string(), "the archive has no image for amd64, only for linux/arm64");
        let config = json!({"architecture": "amd64", "os": "linux"});
        let unnamed = bytes(&archive("tag-only", &config, b"", "x"));
        assert!(matches!(inspect(unnamed.as_slice(), Arch::Amd64), Err(OciError::NoName)));
        let named = bytes(&archive("registry.example/till", &config, b"", "x"));
        let (name, _) = inspect(named.as_slice(), Arch::Amd64).unwrap();
        assert_eq!(name, "registry.example/till:latest");
    }

    #[test]
    fn a_damaged_blob_a_missing_one_and_other_files_are_named() {
        let whole = bytes(&pause(Arch::Amd64));
        let at = whole.windows(4).position(|w| w == b"\x7fELF").unwrap();
        let mut damaged = whole.clone();
        damaged[at + 200] ^= 1;
        let error = inspect(damaged.as_slice(), Arch::Amd64).unwrap_err();
        assert!(matches!(error, OciError::Blob { .. }), "{error}");
        for len in [0, 100, 512, whole.len() / 2] {
            assert!(inspect(&whole[..len], Arch::Amd64).is_err(), "cut at {len}");
        }
        assert!(inspect(&b"no tar at all"[..], Arch::Amd64).is_err());

        let mut kept = tar::Builder::new(Vec::new());
        for entry in tar::Archive::new(whole.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            if !content.windows(4).any(|w| w == b"\x7fELF") {
                append(&mut kept, &path, &content, 0o644);
            }
        }
        let error = inspect(kept.into_inner().unwrap().as_slice(), Arch::Amd64).unwrap_err();
        assert!(matches!(error, OciError::Missing(_)), "{error}");
    }
}
