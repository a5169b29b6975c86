//! The host's apt, with a state of its own: it reads lists and downloads packages, and never touches the host.
//!
//! Used by [`super::fetch`] and [`super::lock`]. The mirror comes from the host's own stanzas for Debian, with the
//! suite replaced by ours, or from [`Source::mirror`]. Proxy settings and credentials of the host apply. Everything
//! that decides about trust is given on the command line, because apt reads `apt.conf.d` after the file that
//! `APT_CONFIG` names and a host may have switched date checks off there. Dates are compared here once more.
//!
//! Source: apt.conf(5), sources.list(5), apt-secure(8).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use super::lockfile::{is_name, seconds};
use super::{Arch, Cache, Locked, Release};
use crate::tree::unhex;

/// Where packages come from.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// A mirror instead of the host's, for example `https://mirror.example/debian`; its security archive is taken
    /// from the same place with `-security` after the path.
    pub mirror: Option<String>,
    /// A keyring instead of Debian's as the host has it.
    pub keyring: Option<PathBuf>,
}

/// Why apt could not do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AptError {
    #[error("could not start `{0}`")]
    Start(&'static str, #[source] io::Error),
    #[error("`{program}` failed: {text}")]
    Failed { program: &'static str, text: String },
    #[error("could not use apt's private state")]
    State(#[source] io::Error),
    /// The host's configuration names no Debian mirror.
    #[error("apt's configuration on this machine has no Debian mirror")]
    NoMirror,
    #[error("`{0}` is no address of a mirror")]
    Mirror(String),
    #[error("there is no keyring `{0}`")]
    NoKeyring(String),
    #[error("the mirror has no signed release file for `{0}`")]
    NoRelease(String),
    #[error("the release file of `{suite}` was valid until {until}")]
    Expired { suite: String, until: String },
    #[error("the release file of `{suite}` is of {date}, which is in the future")]
    Future { suite: String, date: String },
    #[error("the release file of `{0}` has no date that can be read")]
    NoDate(String),
}

impl AptError {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Start(..) => {
                "images are built with the host's apt: build on Debian or a derivative of it"
            }
            Self::NoMirror | Self::Mirror(_) => {
                "give one with `--mirror https://mirror.example/debian`"
            }
            Self::NoKeyring(_) => "install the package `debian-archive-keyring`",
            Self::Expired { .. } | Self::Future { .. } => {
                "check the clock of this machine, then the mirror, which may be stale"
            }
            Self::Failed { .. } => {
                "check the network, the proxy in apt's configuration, and the mirror"
            }
            Self::NoRelease(_) | Self::NoDate(_) => "take another mirror with `--mirror`",
            Self::State(_) => return None,
        };
        Some(text.to_owned())
    }
}

/// apt for one architecture; two at a time wait for each other.
#[derive(Debug)]
pub struct Apt {
    folder: PathBuf,
    arch: Arch,
    suite: String,
    /// Held as long as this lives.
    _turn: File,
}

/// Debian's keyring on a Debian host and on its derivatives.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// How far a release file's date may lie ahead of our clock.
const AHEAD_MAX: Duration = Duration::from_secs(24 * 3600);
/// Time between two looks at a running download.
const LOOK: Duration = Duration::from_millis(100);

impl Apt {
    /// Prepares the private state below the cache.
    ///
    /// # Errors
    ///
    /// See [`AptError`].
    pub fn open(
        cache: &Cache,
        arch: Arch,
        suite: &str,
        components: &[String],
        source: &Source,
    ) -> Result<Self, AptError> {
        let keyring = source.keyring.clone().unwrap_or_else(|| KEYRING.into());
        if !keyring.is_file() {
            return Err(AptError::NoKeyring(keyring.display().to_string()));
        }
        let mirror = match &source.mirror {
            Some(mirror) => Mirror::given(mirror)?,
            None => Mirror::of_host()?,
        };
        let folder = cache.sub("apt").map_err(AptError::State)?.join(format!("{suite}-{arch}"));
        let make = || {
            for name in ["state/lists/partial", "cache/archives/partial", "sources", "empty"] {
                fs::create_dir_all(folder.join(name))?;
            }
            let turn = File::create(folder.join("turn"))?;
            turn.lock()?;
            fs::write(folder.join("status"), "")?;
            let text = mirror.sources(arch, suite, components, &keyring);
            fs::write(folder.join("sources/skerry.sources"), text)?;
            Ok(turn)
        };
        let turn = make().map_err(AptError::State)?;
        Ok(Self { folder, arch, suite: suite.to_owned(), _turn: turn })
    }

    /// Reads the lists anew and returns when they were signed.
    ///
    /// # Errors
    ///
    /// See [`AptError`]; one list that cannot be had is an error too.
    pub fn update(&self) -> Result<Vec<Release>, AptError> {
        self.run("apt-get", &["update", "-o", "APT::Update::Error-Mode=any"])?;
        let mut found = Vec::new();
        for entry in fs::read_dir(self.folder.join("state/lists")).map_err(AptError::State)? {
            let path = entry.map_err(AptError::State)?.path();
            if path.to_string_lossy().ends_with("_InRelease") {
                found.push(fs::read_to_string(path).map_err(AptError::State)?);
            }
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        suites(&self.suite).iter().map(|suite| release(suite, &found, now)).collect()
    }

    /// Which of the locked versions the lists know, with the digests that stand there.
    ///
    /// # Errors
    ///
    /// See [`AptError`].
    pub fn known(&self, wanted: &[&Locked]) -> Result<Vec<Locked>, AptError> {
        let names: Vec<String> = wanted.iter().map(|locked| locked.name.clone()).collect();
        let wants = |p: &Locked| wanted.iter().any(|w| w.name == p.name && w.version == p.version);
        let mut found = self.show("--all-versions", &names)?;
        found.retain(wants);
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// The newest version of each package that the lists know.
    ///
    /// # Errors
    ///
    /// See [`AptError`]; a name that nothing is known of is left out.
    pub fn newest(&self, names: &[String]) -> Result<Vec<Locked>, AptError> {
        self.show("--no-all-versions", names)
    }

    /// Names of the packages that one depends on, without versions and alternatives.
    ///
    /// # Errors
    ///
    /// See [`AptError`].
    pub fn depends(&self, name: &str) -> Result<Vec<String>, AptError> {
        let output = self.query("--no-all-versions", &[name.to_owned()])?;
        let depends = output.lines().find_map(|line| line.strip_prefix("Depends: "));
        let bare = |item: &str| {
            let name = item.split(['(', '|']).next().unwrap_or_default().trim();
            name.split(':').next().unwrap_or_default().to_owned()
        };
        Ok(depends.unwrap_or_default().split(',').map(bare).filter(|n| is_name(n)).collect())
    }

    /// Downloads packages into `folder`; `done` hears the bytes so far.
    ///
    /// # Errors
    ///
    /// See [`AptError`].
    pub fn download(
        &self,
        packages: &[&Locked],
        folder: &Path,
        done: &dyn Fn(u64),
    ) -> Result<(), AptError> {
        let program = "apt-get";
        let errors = folder.join("errors");
        let open = File::create(&errors).map_err(AptError::State)?;
        let mut child = self
            .command(program, &["download"])
            .args(packages.iter().map(|p| format!("{}={}", p.name, p.version)))
            .current_dir(folder)
            .stdout(Stdio::null())
            .stderr(open)
            .spawn()
            .map_err(|source| AptError::Start(program, source))?;
        let status = loop {
            if let Some(status) = child.try_wait().map_err(AptError::State)? {
                break status;
            }
            std::thread::sleep(LOOK);
            done(bytes_below(folder));
        };
        if status.success() {
            return Ok(());
        }
        let text = fs::read_to_string(errors).unwrap_or_default();
        Err(AptError::Failed { program, text: said(&text) })
    }

    fn show(&self, which: &str, names: &[String]) -> Result<Vec<Locked>, AptError> {
        let text = self.query(which, names)?;
        Ok(text.split("\n\n").filter_map(|stanza| locked(stanza, self.arch)).collect())
    }

    fn query(&self, which: &str, names: &[String]) -> Result<String, AptError> {
        let program = "apt-cache";
        let output = self
            .command(program, &["show", which])
            .args(names.iter().filter(|name| is_name(name)))
            .stdin(Stdio::null())
            .output()
            .map_err(|source| AptError::Start(program, source))?;
        // It fails when one name is unknown, and shows the others all the same.
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn run(&self, program: &'static str, arguments: &[&str]) -> Result<Output, AptError> {
        let output = self
            .command(program, arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(|source| AptError::Start(program, source))?;
        if output.status.success() {
            return Ok(output);
        }
        let text = said(&String::from_utf8_lossy(&output.stderr));
        Err(AptError::Failed { program, text })
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let at = |name: &str| self.folder.join(name).display().to_string();
        let options = [
            ("Dir::State", at("state")),
            ("Dir::State::status", at("status")),
            ("Dir::Cache", at("cache")),
            ("Dir::Etc::sourcelist", "/dev/null".to_owned()),
            ("Dir::Etc::sourceparts", at("sources")),
            ("Dir::Etc::preferences", "/dev/null".to_owned()),
            ("Dir::Etc::preferencesparts", at("empty")),
            ("Dir::Etc::trusted", "/dev/null".to_owned()),
            ("Dir::Etc::trustedparts", at("empty")),
            ("APT::Architecture", self.arch.name().to_owned()),
            ("APT::Architectures", self.arch.name().to_owned()),
            ("APT::Sandbox::User", "root".to_owned()),
            ("APT::Get::AllowUnauthenticated", "false".to_owned()),
            ("Acquire::AllowInsecureRepositories", "false".to_owned()),
            ("Acquire::AllowWeakRepositories", "false".to_owned()),
            ("Acquire::AllowDowngradeToInsecureRepositories", "false".to_owned()),
            ("Acquire::Check-Valid-Until", "true".to_owned()),
            ("Acquire::Check-Date", "true".to_owned()),
            ("Acquire::GzipIndexes", "false".to_owned()),
            ("Acquire::Languages", "none".to_owned()),
            ("Acquire::Retries", "3".to_owned()),
            ("Debug::NoLocking", "true".to_owned()),
        ];
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").args(arguments);
        for (name, value) in options {
            command.arg("-o").arg(format!("{name}={value}"));
        }
        command
    }
}

fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|meta| meta.len()).sum()
}

/// apt's own errors, shortened to what fits into a sentence.
fn said(text: &str) -> String {
    const LINES_MAX: usize = 4;
    let marked = |line: &&str| line.starts_with("E:") || line.starts_with("W:");
    let lines: Vec<&str> = text.lines().filter(marked).take(LINES_MAX).collect();
    if lines.is_empty() {
        return text.lines().last().unwrap_or("it gave no reason").to_owned();
    }
    lines.join("; ")
}

/// The suites of one release of Debian.
fn suites(suite: &str) -> [String; 3] {
    [suite.to_owned(), format!("{suite}-updates"), format!("{suite}-security")]
}

/// The date of the release file of `suite` among `files`.
fn release(suite: &str, files: &[String], now: Duration) -> Result<Release, AptError> {
    let field = |text: &str, name: &str| {
        // The clear-signed head has fields of its own, none of which has one of our names.
        text.lines().find_map(|line| line.strip_prefix(name).map(|value| value.trim().to_owned()))
    };
    let text = files
        .iter()
        .find(|text| field(text, "Codename:").as_deref() == Some(suite))
        .ok_or_else(|| AptError::NoRelease(suite.to_owned()))?;
    let suite = suite.to_owned();
    let date = field(text, "Date:").ok_or_else(|| AptError::NoDate(suite.clone()))?;
    let signed = seconds(&date).ok_or_else(|| AptError::NoDate(suite.clone()))?;
    if Duration::from_secs(signed) > now + AHEAD_MAX {
        return Err(AptError::Future { suite, date });
    }
    if let Some(until) = field(text, "Valid-Until:") {
        let end = seconds(&until).ok_or_else(|| AptError::NoDate(suite.clone()))?;
        if Duration::from_secs(end) < now {
            return Err(AptError::Expired { suite, until });
        }
    }
    Ok(Release { suite, date })
}

/// A stanza of a package list; `None` when something is missing or cannot be.
fn locked(stanza: &str, for_arch: Arch) -> Option<Locked> {
    let field = |name: &str| {
        stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::trim)
    };
    let sha256 = field("SHA256")?.to_owned();
    unhex(&sha256)?;
    let name = field("Package")?;
    let arch = field("Architecture")?;
    if !is_name(name) || (arch != "all" && arch != for_arch.name()) {
        return None;
    }
    Some(Locked {
        for_arch,
        name: name.to_owned(),
        version: field("Version")?.to_owned(),
        arch: arch.to_owned(),
        size: field("Size")?.parse().ok()?,
        sha256,
        kernel: false,
    })
}

/// Addresses of the two archives.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    main: String,
    security: String,
}

impl Mirror {
    fn given(text: &str) -> Result<Self, AptError> {
        let main = text.trim_end_matches('/');
        let bad = main.contains(char::is_whitespace) || !main.contains(":/") || main.contains('#');
        if bad {
            return Err(AptError::Mirror(text.to_owned()));
        }
        Ok(Self { main: main.to_owned(), security: format!("{main}-security") })
    }

    fn of_host() -> Result<Self, AptError> {
        let program = "apt-config";
        let output = Command::new(program)
            .args(["shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"])
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .map_err(|source| AptError::Start(program, source))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("='"));
            line.and_then(|rest| rest.strip_suffix('\'')).map(PathBuf::from)
        };
        let mut files: BTreeSet<PathBuf> = value("LIST").into_iter().collect();
        if let Some(parts) = value("PARTS")
            && let Ok(entries) = fs::read_dir(parts)
        {
            files.extend(entries.flatten().map(|entry| entry.path()));
        }
        let mut found = Vec::new();
        for file in files {
            let Ok(text) = fs::read_to_string(&file) else { continue };
            match file.extension().and_then(|ext| ext.to_str()) {
                Some("sources") => found.extend(stanzas(&text)),
                Some("list") => found.extend(text.lines().filter_map(one_line)),
                _ => {}
            }
        }
        Self::choose(&found).ok_or(AptError::NoMirror)
    }

    /// The first archive of Debian proper, and the first of its security updates; one stands for the other when its
    /// path follows the custom.
    fn choose(found: &[Stanza]) -> Option<Self> {
        let pick = |last: &str, security: bool| {
            let fits = |stanza: &&Stanza| {
                let path = stanza.uri.trim_end_matches('/');
                let of_debian = stanza.suites.iter().any(|suite| {
                    let base = suite.split(['-', '/']).next().unwrap_or_default();
                    SUITES.contains(&base)
                });
                let is_security = stanza
                    .suites
                    .iter()
                    .any(|suite| suite.ends_with("-security") || suite.ends_with("/updates"));
                path.ends_with(last) && of_debian && (is_security || !security)
            };
            let uri = &found.iter().find(fits)?.uri;
            Some(uri.trim_end_matches('/').to_owned())
        };
        match (pick("/debian", false), pick("/debian-security", true)) {
            (Some(main), Some(security)) => Some(Self { main, security }),
            (Some(main), None) => Some(Self { security: format!("{main}-security"), main }),
            (None, Some(security)) => {
                let main = security.strip_suffix("-security")?.to_owned();
                Some(Self { main, security })
            }
            (None, None) => None,
        }
    }

    /// Our own sources file.
    fn sources(&self, arch: Arch, suite: &str, components: &[String], keyring: &Path) -> String {
        let [base, updates, security] = suites(suite);
        let stanza = |uri: &str, suites: &str| {
            format!(
                "Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: {}\nArchitectures: {arch}\n\
                 Targets: Packages\nSigned-By: {}\n",
                components.join(" "),
                keyring.display()
            )
        };
        let main = stanza(&self.main, &format!("{base} {updates}"));
        let security = stanza(&self.security, &security);
        format!("{main}\n{security}")
    }
}

/// Debian's own names for suites and releases that a host may follow.
const SUITES: [&str; 10] = [
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "sid",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
];

/// What matters of one entry of the host's configuration.
#[derive(Debug, PartialEq, Eq)]
struct Stanza {
    uri: String,
    suites: Vec<String>,
}

/// Entries of a `.sources` file.
fn stanzas(text: &str) -> Vec<Stanza> {
    let mut found = Vec::new();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let words = |name: &str| -> Vec<String> {
            let mut out = Vec::new();
            let mut inside = false;
            for line in stanza {
                let rest = if line.starts_with([' ', '\t']) {
                    inside.then_some(*line)
                } else {
                    let (key, value) = line.split_once(':').unwrap_or((line, ""));
                    inside = key.eq_ignore_ascii_case(name);
                    inside.then_some(value)
                };
                out.extend(rest.unwrap_or_default().split_whitespace().map(str::to_owned));
            }
            out
        };
        let off = words("Enabled").iter().any(|word| word == "no");
        if off || !words("Types").iter().any(|kind| kind == "deb") {
            continue;
        }
        let suites = words("Suites");
        found.extend(words("URIs").into_iter().map(|uri| Stanza { uri, suites: suites.clone() }));
    }
    found
}

/// An entry of a `.list` file.
fn one_line(line: &str) -> Option<Stanza> {
    let rest = line.trim().strip_prefix("deb")?;
    let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
    let rest = match rest.strip_prefix('[') {
        Some(options) => options.split_once(']')?.1,
        None => rest,
    };
    let mut words = rest.split_whitespace();
    Some(Stanza { uri: words.next()?.to_owned(), suites: vec![words.next()?.to_owned()] })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "\
Types: deb deb-src
# a remark
URIs: http://mirror.example/debian
Suites: bookworm
 bookworm-updates
Components: main

Types: deb
URIs: http://mirror.example/debian-security/
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: sid
";

    #[test]
    fn the_mirror_comes_from_the_hosts_own_stanzas_with_our_suite() {
        let mirror = Mirror::choose(&stanzas(HOST)).unwrap();
        assert_eq!(mirror.main, "http://mirror.example/debian");
        assert_eq!(mirror.security, "http://mirror.example/debian-security");
        let components = ["main".to_owned(), "non-free-firmware".to_owned()];
        let text = mirror.sources(Arch::Arm64, "trixie", &components, Path::new("/k.gpg"));
        let ours = stanzas(&text);
        assert_eq!(ours[0].suites, ["trixie", "trixie-updates"]);
        assert_eq!(ours[1].suites, ["trixie-security"]);
        assert_eq!(text.matches("Signed-By: /k.gpg").count(), 2);
        assert_eq!(text.matches("Architectures: arm64").count(), 2);
    }

    #[test]
    fn the_old_form_is_read_and_other_vendors_are_passed_over() {
        let list = "deb [arch=amd64 signed-by=/k] https://other.example/linux/debian bookworm stable\n\
                    deb https://vendor.example/repo bookworm main\n\
                    # deb http://no.example/debian sid main\n\
                    deb-src http://no.example/debian sid main\n\
                    deb\thttp://mirror.example/debian/ trixie main\n";
        let found: Vec<Stanza> = list.lines().filter_map(one_line).collect();
        assert_eq!(found.len(), 3);
        let mirror = Mirror::choose(&found[1..]).unwrap();
        assert_eq!(mirror.main, "http://mirror.example/debian");
        assert_eq!(mirror.security, "http://mirror.example/debian-security");
        assert_eq!(Mirror::choose(&found[1..2]), None);
    }

    #[test]
    fn a_given_mirror_must_be_one_address() {
        assert_eq!(
            Mirror::given("https://m.example/debian/").unwrap().main,
            "https://m.example/debian"
        );
        for bad in ["", "m.example", "https://m.example/a b", "https://m/\nSigned-By: x"] {
            assert!(matches!(Mirror::given(bad), Err(AptError::Mirror(_))), "{bad}");
        }
    }

    #[test]
    fn release_files_that_are_stale_or_from_the_future_are_refused() {
        let file = |date: &str, until: &str| {
            vec![format!(
                "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nSuite: stable\nCodename: trixie\n\
                 Date: {date}\nValid-Until: {until}\n"
            )]
        };
        let now = Duration::from_secs(1_795_222_383);
        let ok = file("Sat, 21 Nov 2026 00:53:03 UTC", "Sat, 28 Nov 2026 00:53:03 UTC");
        assert_eq!(release("trixie", &ok, now).unwrap().date, "Sat, 21 Nov 2026 00:53:03 UTC");
        let stale = file("Sat, 14 Nov 2026 00:53:03 UTC", "Sat, 21 Nov 2026 00:53:02 UTC");
        assert!(matches!(release("trixie", &stale, now), Err(AptError::Expired { .. })));
        let ahead = file("Sun, 22 Nov 2026 00:53:04 UTC", "Sat, 28 Nov 2026 00:53:03 UTC");
        assert!(matches!(release("trixie", &ahead, now), Err(AptError::Future { .. })));
        assert!(matches!(release("trixie-security", &ok, now), Err(AptError::NoRelease(_))));
        let none = file("soon", "later");
        assert!(matches!(release("trixie", &none, now), Err(AptError::NoDate(_))));
    }

    #[test]
    fn a_stanza_without_a_sound_digest_is_no_package() {
        let stanza = format!(
            "Package: crun\nVersion: 1.21-1\nArchitecture: amd64\nDepends: libc6\nSize: 368640\n\
             Filename: pool/c.deb\nSHA256: {}",
            "ab".repeat(32)
        );
        let package = locked(&stanza, Arch::Amd64).unwrap();
        assert_eq!((package.name.as_str(), package.size), ("crun", 368_640));
        assert_eq!(locked(&stanza.replace("abab", "ab"), Arch::Amd64), None);
        assert_eq!(locked(&stanza, Arch::Arm64), None);
        assert_eq!(locked(&stanza.replace("Package: crun", "Package: -o"), Arch::Amd64), None);
    }
}
