//! The crates that our own programs in an image are made of, for the list of everything in it.
//!
//! Read from the lock file that this program was built with: `skerry-init` and `edgecore` of the same source tree have the same
//! one. What their tests and builds need is among them, because a lock file does not tell it apart.

use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// The lock file of this source tree.
const LOCK: &str = include_str!("../../Cargo.lock");
/// The crates of the programs in an image.
const PROGRAMS: [&str; 2] = ["skerry-edge", "skerry-init"];

/// A crate from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Crate {
    /// Its name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// SHA-256 of its archive, hexadecimal.
    pub(crate) sha256: String,
}

#[derive(Deserialize)]
struct Lock {
    package: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    checksum: Option<String>,
    #[serde(default)]
    dependencies: Vec<String>,
}

/// Every crate that the programs reach, in order of name and version.
pub(crate) fn of_programs() -> Vec<Crate> {
    reached(LOCK, &PROGRAMS)
}

fn reached(lock: &str, programs: &[&str]) -> Vec<Crate> {
    let lock: Lock = toml::from_str(lock).expect("Cargo has written it");
    let mut by_name: BTreeMap<&str, Vec<&Package>> = BTreeMap::new();
    for package in &lock.package {
        by_name.entry(&package.name).or_default().push(package);
    }
    // `name`, or `name version` where there are several.
    let find = |wanted: &str| {
        let (name, version) = match wanted.split_once(' ') {
            Some((name, rest)) => (name, rest.split(' ').next()),
            None => (wanted, None),
        };
        let known = by_name.get(name).into_iter().flatten();
        known.copied().find(|package| version.is_none_or(|version| package.version == version))
    };
    let mut seen = BTreeSet::new();
    let mut open: Vec<&Package> = programs.iter().filter_map(|name| find(name)).collect();
    let mut crates = BTreeSet::new();
    while let Some(package) = open.pop() {
        if !seen.insert((&package.name, &package.version)) {
            continue;
        }
        open.extend(package.dependencies.iter().filter_map(|name| find(name)));
        if let Some(sha256) = &package.checksum {
            crates.insert(Crate {
                name: package.name.clone(),
                version: package.version.clone(),
                sha256: sha256.clone(),
            });
        }
    }
    crates.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_are_those_that_the_programs_reach_in_the_version_that_they_name() {
        let lock = r#"
            [[package]]
            name = "edge"
            version = "0.1.0"
            dependencies = ["b 2.0.0", "inner"]
            [[package]]
            name = "inner"
            version = "0.1.0"
            dependencies = ["c", "edge"]
            [[package]]
            name = "b"
            version = "1.0.0"
            checksum = "11"
            [[package]]
            name = "b"
            version = "2.0.0"
            checksum = "22"
            [[package]]
            name = "c"
            version = "3.0.0"
            checksum = "33"
            [[package]]
            name = "d"
            version = "4.0.0"
            checksum = "44"
        "#;
        let found = reached(lock, &["edge"]);
        let names: Vec<_> = found.iter().map(|of| format!("{} {}", of.name, of.version)).collect();
        assert_eq!(names, ["b 2.0.0", "c 3.0.0"]);
    }

    #[test]
    fn programs_of_this_tree_are_known_to_the_lock_file() {
        let crates = of_programs();
        let has = |name: &str| crates.iter().any(|of| of.name == name && of.sha256.len() == 64);
        assert!(has("tokio") && has("rustls") && has("nix"), "{} crates", crates.len());
        // Only the cloud side has it.
        assert!(!has("gix"));
    }
}
