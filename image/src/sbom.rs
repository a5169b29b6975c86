//! The list of everything in an image as SPDX 2.3 JSON: packages with versions and digests, the crates of our own programs, files
//! with their origin.
//!
//! Called after [`crate::root::plan`]. The document says what was put in, not under which licences: those are
//! `NOASSERTION`, because nobody has read them for us. The same plan gives the same document.
//!
//! Source: spdx/spdx-spec, v2.3, chapters 6 to 11; package-url/purl-spec, types `deb` and `cargo`.

use std::io;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::crates::{self, Crate};
use crate::packages::Locked;
use crate::root::{Plan, Request};
use crate::tree::{Node, hex};

/// The document, indented, with a line feed at its end. Reads every file of the root once.
///
/// # Errors
///
/// A content changed since it was gathered.
pub fn document(plan: &Plan, request: &Request) -> io::Result<String> {
    let name = format!("skerry-{}-{}", request.version, request.arch);
    let mut packages = vec![json!({
        "SPDXID": "SPDXRef-image",
        "name": "skerry",
        "versionInfo": request.version,
        "supplier": "Organization: Skerry",
        "primaryPackagePurpose": "OPERATING-SYSTEM",
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "copyrightText": "NOASSERTION",
    })];
    let mut relationships = vec![relation("SPDXRef-DOCUMENT", "DESCRIBES", "SPDXRef-image")];
    for locked in &plan.packages {
        relationships.push(relation("SPDXRef-image", "CONTAINS", &package_id(&locked.name)));
        packages.push(package(locked));
    }
    for image in &plan.images {
        let id = format!("SPDXRef-container-{}", word(&image.name));
        relationships.push(relation("SPDXRef-image", "CONTAINS", &id));
        let digits = image.digest.strip_prefix("sha256:").unwrap_or_default();
        packages.push(json!({
            "SPDXID": id,
            "name": image.name,
            "primaryPackagePurpose": "CONTAINER",
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": false,
            "checksums": [{"algorithm": "SHA256", "checksumValue": digits}],
            "licenseConcluded": "NOASSERTION",
            "licenseDeclared": "NOASSERTION",
            "copyrightText": "NOASSERTION",
        }));
    }
    for found in crates::of_programs() {
        let id = format!("SPDXRef-crate-{}-{}", word(&found.name), word(&found.version));
        relationships.push(relation("SPDXRef-image", "DEPENDS_ON", &id));
        packages.push(crate_package(&id, &found));
    }
    let mut files = Vec::new();
    for (path, entry) in plan.root.iter() {
        let Node::File(content) = &entry.node else { continue };
        let id = format!("SPDXRef-file-{}", files.len());
        // The specification wants a SHA-1 of each file.
        let mut sha1 = Hasher(Sha1::new());
        content.copy(&mut sha1)?;
        files.push(json!({
            "SPDXID": id,
            "fileName": format!("./{path}"),
            "checksums": [
                {"algorithm": "SHA1", "checksumValue": hex(&sha1.0.finalize())},
                {"algorithm": "SHA256", "checksumValue": hex(&content.sha256())},
            ],
            "licenseConcluded": "NOASSERTION",
            "copyrightText": "NOASSERTION",
        }));
        let from_package = plan.packages.iter().any(|locked| locked.name == entry.part);
        let owner = if from_package { package_id(&entry.part) } else { "SPDXRef-image".to_owned() };
        relationships.push(relation(&owner, "CONTAINS", &id));
    }
    // Two documents never share a namespace unless they say the same.
    let mut hash = Sha256::new();
    hash.update(plan.root.digest());
    hash.update(plan.initramfs.digest());
    hash.update(json!(packages).to_string());
    let digest = hex(&hash.finalize()[..16]);
    let document = json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "documentNamespace": format!("https://skerry.dev/spdx/{name}-{digest}"),
        "creationInfo": {
            "created": time(request.epoch),
            "creators": [format!("Tool: skerry-{}", env!("CARGO_PKG_VERSION"))],
        },
        "packages": packages,
        "files": files,
        "relationships": relationships,
    });
    Ok(format!("{document:#}\n"))
}

fn package(locked: &Locked) -> Value {
    let purl = format!(
        "pkg:deb/debian/{}@{}?arch={}",
        encoded(&locked.name),
        encoded(&locked.version),
        locked.arch
    );
    let mut value =
        referenced(&package_id(&locked.name), &locked.name, &locked.version, &locked.sha256, &purl);
    value["supplier"] = "Organization: Debian".into();
    value
}

fn crate_package(id: &str, found: &Crate) -> Value {
    let purl = format!("pkg:cargo/{}@{}", encoded(&found.name), encoded(&found.version));
    let mut value = referenced(id, &found.name, &found.version, &found.sha256, &purl);
    value["primaryPackagePurpose"] = "LIBRARY".into();
    value
}

/// Something from elsewhere that a package URL names.
fn referenced(id: &str, name: &str, version: &str, sha256: &str, purl: &str) -> Value {
    json!({
        "SPDXID": id,
        "name": name,
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "checksums": [{"algorithm": "SHA256", "checksumValue": sha256}],
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "copyrightText": "NOASSERTION",
        "externalRefs": [{
            "referenceCategory": "PACKAGE-MANAGER",
            "referenceType": "purl",
            "referenceLocator": purl,
        }],
    })
}

fn relation(from: &str, kind: &str, to: &str) -> Value {
    json!({"spdxElementId": from, "relationshipType": kind, "relatedSpdxElement": to})
}

fn package_id(name: &str) -> String {
    format!("SPDXRef-package-{}", word(name))
}

/// Letters, digits, dots and dashes, as identifiers have them.
fn word(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect()
}

/// Percent-encoding as package URLs have it.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_~".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// A time as SPDX has it, `2026-11-21T00:53:03Z`.
fn time(epoch: u64) -> String {
    let (days, seconds) = (epoch / 86_400, epoch % 86_400);
    // The civil calendar with years that begin in March, counted from the year 0.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

struct Hasher(Sha1);

impl io::Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_package_urls_are_written_as_their_specifications_say() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(1_795_222_383), "2026-11-21T00:53:03Z");
        assert_eq!(time(1_835_481_599), "2028-02-29T23:59:59Z");
        assert_eq!(encoded("1.7.24~ds1-6+deb13u1"), "1.7.24~ds1-6%2Bdeb13u1");
        assert_eq!(encoded("1:2.75"), "1%3A2.75");
        assert_eq!(word("registry.example/a_b:1"), "registry.example-a-b-1");
    }
}
