//! `packages.lock`: the exact packages of an image. Written by `skerry image lock`, read by every build.
//!
//! TOML, one package a line, so that a change shows as a change of lines. No mirror is named in it.

use std::path::Path;

use serde::Deserialize;

use super::Arch;
use crate::tree::unhex;

/// What a build is pinned to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// Debian's suite, for example `trixie`; its updates and security suites belong to it.
    pub suite: String,
    pub components: Vec<String>,
    /// When the lists were signed from which the versions were taken.
    #[serde(rename = "release")]
    pub releases: Vec<Release>,
    /// Sorted.
    #[serde(rename = "package")]
    pub packages: Vec<Locked>,
}

/// One `InRelease` file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// For example `trixie-security`.
    pub suite: String,
    /// Its `Date` as it stands there, for example `Sat, 21 Nov 2026 00:53:03 UTC`.
    pub date: String,
}

/// One package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Locked {
    /// The architecture of the image, or of the building machine, that this entry is for.
    #[serde(rename = "for")]
    pub for_arch: Arch,
    pub name: String,
    pub version: String,
    /// Architecture of the package: that of the image, or `all`.
    pub arch: String,
    /// Bytes of the package file.
    pub size: u64,
    /// SHA-256 of the package file, 64 lower-case digits.
    pub sha256: String,
    /// Whether this is the kernel that the catalogue's meta package stood for.
    #[serde(default)]
    pub kernel: bool,
}

impl<'de> Deserialize<'de> for Arch {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Why text is no lock file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockFileError {
    #[error("could not read the lock file `{path}`")]
    Read { path: String, source: std::io::Error },
    #[error("the lock file is broken")]
    Syntax(#[source] toml::de::Error),
    #[error("the lock file is broken: package `{name}` for {arch} {what}")]
    Package { name: String, arch: Arch, what: &'static str },
    #[error("the lock file is broken: the date `{0}` is none")]
    Date(String),
}

impl LockFileError {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(
            "take the lock file from version control, or write one with `skerry image lock`".into(),
        )
    }
}

impl Lock {
    /// The lock file that this program was built with.
    pub fn embedded() -> Self {
        Self::parse(include_str!("../../packages.lock"))
            .expect("a test reads the embedded lock file")
    }

    /// Reads a lock file.
    ///
    /// # Errors
    ///
    /// See [`LockFileError`].
    pub fn read(path: &Path) -> Result<Self, LockFileError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| LockFileError::Read { path: path.display().to_string(), source })?;
        Self::parse(&text)
    }

    /// Reads the text of a lock file.
    ///
    /// # Errors
    ///
    /// See [`LockFileError`].
    pub fn parse(text: &str) -> Result<Self, LockFileError> {
        let lock: Self = toml::from_str(text).map_err(LockFileError::Syntax)?;
        for (at, package) in lock.packages.iter().enumerate() {
            let broken = |what| LockFileError::Package {
                name: package.name.clone(),
                arch: package.for_arch,
                what,
            };
            if unhex(&package.sha256).is_none() {
                return Err(broken("has no SHA-256 of 64 digits"));
            }
            if !is_name(&package.name) {
                return Err(broken("has a name that no package can have"));
            }
            let same = |p: &Locked| p.name == package.name && p.for_arch == package.for_arch;
            if lock.packages[..at].iter().any(same) {
                return Err(broken("is there twice"));
            }
        }
        if let Some(bad) = lock.releases.iter().find(|release| release.seconds().is_none()) {
            return Err(LockFileError::Date(bad.date.clone()));
        }
        Ok(lock)
    }

    /// The text of the file; [`Lock::parse`] gives back the same.
    pub fn text(&self) -> String {
        use std::fmt::Write;
        let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let mut out = String::from(
            "# Written by `skerry image lock`: the packages of an image, which a build takes as they stand here.\n",
        );
        let components: Vec<String> = self.components.iter().map(|c| quoted(c)).collect();
        let mut line = |text: String| writeln!(out, "{text}").expect("writing to a string");
        line(format!("suite = {}", quoted(&self.suite)));
        line(format!("components = [{}]", components.join(", ")));
        line("release = [".to_owned());
        for release in &self.releases {
            let (suite, date) = (quoted(&release.suite), quoted(&release.date));
            line(format!("  {{ suite = {suite}, date = {date} }},"));
        }
        line("]\npackage = [".to_owned());
        for p in &self.packages {
            let [for_arch, name, version, arch, sha256] =
                [p.for_arch.name(), &p.name, &p.version, &p.arch, &p.sha256].map(quoted);
            let kernel = if p.kernel { ", kernel = true" } else { "" };
            line(format!(
                "  {{ for = {for_arch}, name = {name}, version = {version}, arch = {arch}, \
                 size = {}, sha256 = {sha256}{kernel} }},",
                p.size
            ));
        }
        line("]".to_owned());
        out
    }

    /// The package of this name for an architecture.
    pub fn find(&self, name: &str, arch: Arch) -> Option<&Locked> {
        self.packages.iter().find(|p| p.name == name && p.for_arch == arch)
    }

    /// The kernel for an architecture.
    pub fn kernel(&self, arch: Arch) -> Option<&Locked> {
        self.packages.iter().find(|p| p.kernel && p.for_arch == arch)
    }
}

impl Release {
    /// The date in seconds since 1970; `None` when it is none.
    pub fn seconds(&self) -> Option<u64> {
        seconds(&self.date)
    }
}

/// Seconds since 1970 of a date as `InRelease` files have it (RFC 5322, always UTC).
pub fn seconds(date: &str) -> Option<u64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let date = date.trim();
    let date = date.split_once(", ").map_or(date, |(_, rest)| rest);
    let mut words = date.split_ascii_whitespace();
    let day: i64 = words.next()?.parse().ok()?;
    let month = words.next()?;
    let month = MONTHS.iter().position(|name| *name == month)? as i64 + 1;
    let year: i64 = words.next()?.parse().ok()?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<i64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    if !matches!(words.next()?, "UTC" | "GMT" | "+0000") {
        return None;
    }
    let sound = (1..=31).contains(&day)
        && (1970..=9999).contains(&year)
        && (0..24).contains(&hour)
        && (0..60).contains(&minute)
        && (0..=60).contains(&second);
    if !sound {
        return None;
    }
    // Days since 1970 of the civil calendar, with years that begin in March.
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted / 400;
    let of_era = shifted - era * 400;
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    u64::try_from(days * 86_400 + hour * 3600 + minute * 60 + second).ok()
}

/// Whether this can be a package's name: it goes to apt's command line.
///
/// Source: Debian policy, section 5.6.1.
pub(super) fn is_name(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c);
    text.len() >= 2
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text.chars().all(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Lock {
        Lock {
            suite: "trixie".to_owned(),
            components: vec!["main".to_owned(), "non-free-firmware".to_owned()],
            releases: vec![Release {
                suite: "trixie".to_owned(),
                date: "Sat, 12 Sep 2026 07:55:41 UTC".to_owned(),
            }],
            packages: vec![Locked {
                for_arch: Arch::Amd64,
                name: "linux-image-6.12.1+deb13-amd64".to_owned(),
                version: "6.12.1-1".to_owned(),
                arch: "amd64".to_owned(),
                size: 7,
                sha256: "0f".repeat(32),
                kernel: true,
            }],
        }
    }

    #[test]
    fn a_lock_file_reads_back_as_it_was_written() {
        let lock = sample();
        let text = lock.text();
        assert_eq!(Lock::parse(&text).unwrap(), lock);
        assert!(text.lines().any(|line| line.contains("linux-image") && line.contains("sha256")));
        assert_eq!(lock.kernel(Arch::Amd64), Some(&lock.packages[0]));
        assert_eq!(lock.kernel(Arch::Arm64), None);
    }

    #[test]
    fn the_embedded_lock_file_has_all_packages_of_the_catalogue() {
        let (lock, catalogue) = (Lock::embedded(), super::super::Catalogue::embedded());
        for arch in Arch::ALL {
            for name in catalogue.packages(arch) {
                assert!(lock.find(&name, arch).is_some(), "{name} for {arch}");
            }
            assert!(lock.kernel(arch).is_some(), "a kernel for {arch}");
        }
        assert!(!lock.text().contains("://"), "no mirror stands in it");
        assert_eq!(lock.text(), include_str!("../../packages.lock"), "it is as we write it");
    }

    #[test]
    fn broken_lock_files_are_refused_with_the_package() {
        let text = sample().text();
        let check = |text: String, part: &str| {
            let error = format!("{:?}", Lock::parse(&text).unwrap_err());
            assert!(error.contains(part), "{error}");
        };
        check(text.replace("0f0f", "0f"), "64 digits");
        check(text.replace("linux-image", "--option"), "name");
        check(text.replace("size =", "length ="), "length");
        check(text.replace("for = \"amd64\"", "for = \"mips\""), "mips");
        check(text.replace("12 Sep", "12 Sip"), "Date");
        let line = text.lines().find(|line| line.contains("linux-image")).unwrap();
        check(text.replace(line, &format!("{line}\n{line}")), "twice");
    }

    #[test]
    fn dates_of_releases_are_read() {
        for (date, expected) in [
            ("Thu, 01 Jan 1970 00:00:00 UTC", Some(0)),
            ("Sat, 21 Nov 2026 00:53:03 UTC", Some(1_795_222_383)),
            ("Tue, 29 Feb 2028 23:59:59 +0000", Some(1_835_481_599)),
            ("Sat, 21 Nov 2026 00:53:03 CET", None),
            ("Sat, 21 Nov 2026 25:53:03 UTC", None),
            ("tomorrow", None),
        ] {
            assert_eq!(seconds(date), expected, "{date}");
        }
    }
}
