//! Container images packed from local files, so that no registry is needed.
//!
//! Each is an OCI image layout in a tar file with one layer: Debian's static busybox, a link per applet, and the few
//! files that a small system expects. The same busybox gives the same bytes: entries are sorted and have no times.

use anyhow::{Context, Result, bail};
use flate2::{Compression, GzBuilder};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Images that the template and the tests use: name, entrypoint, version written into the image.
const IMAGES: &[(&str, &[&str], &str)] = &[
    ("skerry.local/pause:1", &["/bin/sleep", "2147483647"], "pause-1"),
    ("skerry.local/busybox:1", &[], "1"),
    ("skerry.local/busybox:2", &[], "2"),
];

/// Packs every image into `folder`; returns the files. Files that are already there are kept.
pub(crate) fn pack(folder: &Path) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder)?;
    let busybox = std::fs::read(busybox()?)?;
    let applets = applets()?;
    let mut files = Vec::new();
    for (name, entrypoint, version) in IMAGES {
        let bytes = image(name, entrypoint, version, &busybox, &applets)?;
        let file = folder.join(format!("{}.tar", name.replace(['/', ':'], "_")));
        if std::fs::read(&file).ok().as_deref() != Some(&bytes[..]) {
            let half = file.with_extension("tmp");
            std::fs::write(&half, bytes)?;
            std::fs::rename(&half, &file)?;
        }
        files.push(file);
    }
    Ok(files)
}

/// The static busybox of this machine.
pub(crate) fn busybox() -> Result<PathBuf> {
    let found = ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(PathBuf::from);
    for file in found.filter(|file| file.exists()) {
        let bytes = std::fs::read(&file)?;
        // A dynamic program names its interpreter; a static one has no such text in its head.
        if !bytes[..bytes.len().min(4096)].windows(8).any(|text| text == b"ld-linux") {
            return Ok(file);
        }
    }
    bail!("no static busybox on this machine\nhint: install the Debian package busybox-static")
}

fn applets() -> Result<Vec<String>> {
    let list = crate::sh::output(Command::new(busybox()?).arg("--list"))?;
    let mut applets: Vec<String> = list.lines().map(str::to_owned).collect();
    applets.retain(|applet| applet != "busybox");
    applets.sort();
    Ok(applets)
}

fn image(
    name: &str,
    entrypoint: &[&str],
    version: &str,
    busybox: &[u8],
    applets: &[String],
) -> Result<Vec<u8>> {
    let layer = layer(version, busybox, applets)?;
    let mut packed = GzBuilder::new().mtime(0).write(Vec::new(), Compression::new(6));
    packed.write_all(&layer)?;
    let packed = packed.finish()?;

    let config = json!({
        "architecture": arch()?,
        "os": "linux",
        "config": {
            "Env": ["PATH=/bin:/sbin:/usr/bin:/usr/sbin"],
            "Entrypoint": entrypoint,
            "Cmd": if entrypoint.is_empty() { vec!["/bin/sh"] } else { vec![] },
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        "history": [{"created_by": "cargo xtask"}],
    });
    let config = serde_json::to_vec(&config)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &packed)],
    });
    let manifest = serde_json::to_vec(&manifest)?;
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] = json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rsplit(':').next(),
    });
    let index = json!({"schemaVersion": 2, "manifests": [entry]});

    let mut archive = tar::Builder::new(Vec::new());
    for blob in [&config, &manifest, &packed] {
        file(&mut archive, &format!("blobs/sha256/{}", &digest(blob)[7..]), blob, 0o644)?;
    }
    file(&mut archive, "index.json", &serde_json::to_vec(&index)?, 0o644)?;
    file(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
    archive.into_inner().context("could not pack the image")
}

fn layer(version: &str, busybox: &[u8], applets: &[String]) -> Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    for (folder, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("proc", 0o755),
        ("root", 0o700),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("var", 0o755),
        ("www", 0o755),
    ] {
        let mut header = header(tar::EntryType::Directory, 0, mode);
        layer.append_data(&mut header, format!("{folder}/"), std::io::empty())?;
    }
    file(&mut layer, "bin/busybox", busybox, 0o755)?;
    for applet in applets {
        let mut header = header(tar::EntryType::Symlink, 0, 0o777);
        layer.append_link(&mut header, format!("bin/{applet}"), "/bin/busybox")?;
    }
    file(&mut layer, "etc/group", b"root:x:0:\nnobody:x:65534:\n", 0o644)?;
    file(
        &mut layer,
        "etc/passwd",
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        0o644,
    )?;
    file(&mut layer, "etc/skerry-image-version", format!("{version}\n").as_bytes(), 0o644)?;
    layer.into_inner().context("could not pack the layer")
}

fn file(archive: &mut tar::Builder<Vec<u8>>, path: &str, bytes: &[u8], mode: u32) -> Result<()> {
    let mut header = header(tar::EntryType::Regular, bytes.len() as u64, mode);
    Ok(archive.append_data(&mut header, path, bytes)?)
}

fn header(kind: tar::EntryType, size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn descriptor(media_type: &str, bytes: &[u8]) -> serde_json::Value {
    json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()})
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// This machine's architecture in Go's words, which image configurations use.
fn arch() -> Result<&'static str> {
    Ok(match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "arm" => "arm",
        other => bail!("no image name is known for architecture `{other}`"),
    })
}
