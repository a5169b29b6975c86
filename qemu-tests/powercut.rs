//! `--powercut`: every disk that a power cut may leave, and what would start from it.
//!
//! A machine with a log of its writes boots for the first time, joins, takes an update from a stick, and in a second run
//! proves the new version. Each image is the disk at a point of that log: everything before the last flush, and a random
//! part of what came after it, the last one torn at sectors. Each is checked by programs that are not the product's
//! (`fsck.vfat`, `e2fsck`, `debugfs`) and by comparison with the files of both versions; a share is booted.
//!
//! An image is *unbootable* when the loader would find no version that can start, *mixed* when it would choose one whose
//! boot file or root is not byte for byte that of one version, and has *lost its identity* when the node's certificate
//! was on the disk for certain and is not there, or its state cannot be repaired without a person.

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::disk::{self, Disk};
use skerry_qemu_tests::image::UKI_FOLDER;
use skerry_qemu_tests::lab::{Lab, READY, SHUTDOWN};
use skerry_qemu_tests::release;
use skerry_qemu_tests::writelog::{Crash, Entry, WriteLog, crash};
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The answer.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Verdict {
    /// Disks that were checked.
    pub(crate) images: usize,
    /// Of these, disks that were booted as well.
    pub(crate) booted: usize,
    /// No version could start.
    pub(crate) unbootable: usize,
    /// What would start is a mixture.
    pub(crate) mixed: usize,
    /// The node's identity is gone.
    pub(crate) lost_identity: usize,
}

impl Verdict {
    /// Whether every claim held.
    pub(crate) fn holds(&self) -> bool {
        self.unbootable + self.mixed + self.lost_identity == 0
    }
}

/// One version, byte for byte.
struct Version {
    name: String,
    uki: Vec<u8>,
    root: Vec<u8>,
}

/// Records, and checks `images` disks, of which `boots` are booted.
pub(crate) fn run(lab: &Lab, images: usize, boots: usize, seed: u64) -> Result<Verdict> {
    let newer = release::newer(lab, '9', |_| Ok(()))?;
    let versions = [
        Version {
            name: lab.image.version()?,
            uki: std::fs::read(lab.inputs.image.join("uki.efi"))?,
            root: std::fs::read(lab.inputs.image.join("root.img"))?,
        },
        Version {
            name: newer.version.clone(),
            uki: newer.uki.clone(),
            root: std::fs::read(&newer.root)?,
        },
    ];
    let (disk, logs) = record(lab, &newer, &versions)?;
    let start = lab.new_copy()?;
    let mut bench = Bench::new(lab, start.path.clone(), &versions)?;
    let mut word = seed | 1;
    let mut next = move || {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word >> 33
    };
    let mut verdict = Verdict::default();
    for (run, log) in logs.iter().enumerate() {
        let share = images / logs.len() + usize::from(run < images % logs.len());
        let points = points(&log.entries, share, &mut next);
        eprintln!("powercut: run {}: {} entries, {share} images", run + 1, log.entries.len());
        for (number, (end, lossy)) in points.iter().enumerate() {
            let random: Option<&mut dyn FnMut() -> u64> =
                if *lossy { Some(&mut next) } else { None };
            let crash = crash(&log.entries, *end, random);
            let due = verdict.booted < boots
                && (verdict.images + 1) * boots > verdict.booted * images + images / 2;
            let found = bench.check(log, &crash, !lossy, due)?;
            verdict.images += 1;
            verdict.booted += usize::from(found.booted);
            let tell = |count: &mut usize, what: &Option<String>, word: &str| {
                if let Some(what) = what {
                    *count += 1;
                    eprintln!(
                        "powercut: run {}, image {number}, after entry {end}: {word}: {what}",
                        run + 1
                    );
                }
            };
            tell(&mut verdict.unbootable, &found.unbootable, "unbootable");
            tell(&mut verdict.mixed, &found.mixed, "mixed");
            tell(&mut verdict.lost_identity, &found.lost, "lost identity");
            if verdict.images % 50 == 0 {
                eprintln!(
                    "powercut: {verdict:?}; {} with findings of fsck.vfat",
                    bench.fat_findings
                );
            }
        }
        bench.apply_all(log)?;
    }
    // The method itself: all writes of the log make the disk that the machine has left.
    ensure!(same(&bench.path, &disk.path)?, "the log does not make the disk that the machine left");
    eprintln!("powercut: {} images with findings of fsck.vfat, all readable", bench.fat_findings);
    Ok(verdict)
}

/// Plays first boot, update, trial; returns the disk at the end and the log of each run.
fn record(
    lab: &Lab,
    newer: &release::Release,
    versions: &[Version; 2],
) -> Result<(Disk, Vec<WriteLog>)> {
    let name = "powercut";
    let stick =
        disk::stick(&lab.file("stick.raw"), "update.bundle", &std::fs::read(&newer.bundle)?)?;
    let disk = lab.new_copy()?;
    let plan = lab.firmware_machine(name)?.stick(stick);
    let plan = lab.provisioned(plan, &lab.site(name)?)?;
    let mut logs = Vec::new();
    let written = format!("version {} is written", newer.version);
    for (version, word, said) in
        [(&versions[0], "update", &written[..]), (&versions[1], "update", "has proved itself")]
    {
        let log = lab.file("writes.log");
        File::create(&log)?;
        let mut machine = plan.clone().disk(disk.clone().logged(&log)).start()?;
        eprintln!("powercut: recording version {}", version.name);
        if lab.inputs.show_consoles {
            machine.console().follow(name);
        }
        machine.expect(Want::Saying("stage1", &[&format!("version {} ", version.name)]), READY)?;
        machine.expect(Want::Saying(word, &[said]), crate::scenarios::WRITTEN)?;
        machine.expect(Want::Word("ready"), READY)?;
        machine.power_off(SHUTDOWN)?;
        logs.push(WriteLog::open(&log)?);
    }
    Ok((disk, logs))
}

/// Points of a log, in order, and whether what was not flushed is lost there in part. Each flush is as likely as any
/// other, however much was written before it.
fn points(entries: &[Entry], count: usize, next: &mut dyn FnMut() -> u64) -> Vec<(usize, bool)> {
    let mut ends: Vec<usize> = Vec::new();
    for (at, entry) in entries.iter().enumerate() {
        if *entry == Entry::Flush && ends.last().is_none_or(|last| at + 1 > last + 1) {
            ends.push(at + 1);
        }
    }
    ends.push(entries.len());
    let mut points = Vec::new();
    for number in 0..count {
        let window = (next() as usize) % ends.len();
        let from = window.checked_sub(1).map_or(0, |before| ends[before]);
        // A fifth at the flushes themselves.
        let lossy = number % 5 != 0;
        let end = match lossy {
            true => from + 1 + (next() as usize) % (ends[window] - from).max(1),
            false => ends[window],
        };
        points.push((end.min(entries.len()), lossy));
    }
    points.sort_unstable();
    points
}

/// What an image shows.
#[derive(Debug, Default)]
struct Found {
    unbootable: Option<String>,
    mixed: Option<String>,
    lost: Option<String>,
    booted: bool,
}

/// The disk at some point, and what was seen of it so far.
struct Bench<'a> {
    lab: &'a Lab,
    path: PathBuf,
    file: File,
    versions: &'a [Version; 2],
    loader: Vec<u8>,
    /// Entries of the current log that are on the disk.
    applied: usize,
    /// Files of the node's identity that are there for certain.
    identity: BTreeSet<String>,
    fat_findings: usize,
}

impl<'a> Bench<'a> {
    fn new(lab: &'a Lab, path: PathBuf, versions: &'a [Version; 2]) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let loader = lab.image.base().volume("esp")?.read(LOADER)?;
        let (applied, fat_findings) = (0, 0);
        let identity = BTreeSet::new();
        Ok(Self { lab, path, file, versions, loader, applied, identity, fat_findings })
    }

    /// Writes entries of the log up to `end` onto the disk.
    fn advance(&mut self, log: &WriteLog, end: usize) -> Result<()> {
        for entry in &log.entries[self.applied..end] {
            if let Entry::Write { at, len, data, .. } = *entry {
                self.file.write_all_at(&log.bytes(data, len)?, at)?;
            }
        }
        self.applied = end;
        Ok(())
    }

    /// The end of a log.
    fn apply_all(&mut self, log: &WriteLog) -> Result<()> {
        self.advance(log, log.entries.len())?;
        self.applied = 0;
        let names = self.identity(&Disk::original(&self.path))?;
        self.identity = names.map_err(|what| anyhow!("after an orderly end: {what}"))?;
        ensure!(!self.identity.is_empty(), "the node has no identity after an orderly end");
        Ok(())
    }

    fn check(&mut self, log: &WriteLog, crash: &Crash, certain: bool, boot: bool) -> Result<Found> {
        self.advance(log, crash.durable)?;
        // What may be there is there for the time of the check.
        let mut before = Vec::new();
        for (number, len) in &crash.also {
            let Entry::Write { at, data, .. } = log.entries[*number] else { continue };
            let mut old = vec![0; usize::try_from(*len)?];
            self.file.read_exact_at(&mut old, at)?;
            self.file.write_all_at(&log.bytes(data, *len)?, at)?;
            before.push((at, old));
        }
        let found = self.look(certain && crash.also.is_empty(), boot);
        for (at, old) in before.iter().rev() {
            self.file.write_all_at(old, *at)?;
        }
        found
    }

    fn look(&mut self, certain: bool, boot: bool) -> Result<Found> {
        let mut found = Found::default();
        let disk = Disk::original(&self.path);
        let esp = self.part(&disk, "esp", "esp.raw")?;
        let checked = quiet(Command::new("fsck.vfat").arg("-n").arg(&esp))?;
        self.fat_findings += usize::from(checked != 0);
        match self.chosen(&disk) {
            Ok(version) => {
                let slot = if version.name == self.versions[0].name { "root-a" } else { "root-b" };
                if !holds(&disk, slot, &version.root)? {
                    found.mixed = Some(format!("{slot} is not the root of {}", version.name));
                }
            }
            Err(Choice::None(what)) => found.unbootable = Some(what),
            Err(Choice::Mixed(what)) => found.mixed = Some(what),
        }
        std::fs::remove_file(esp)?;
        match self.identity(&disk)? {
            Ok(names) => {
                let gone: Vec<_> = self.identity.difference(&names).cloned().collect();
                if !gone.is_empty() {
                    found.lost = Some(format!("{} is not there", gone.join(", ")));
                } else if certain {
                    self.identity = names;
                }
            }
            Err(what) if self.identity.is_empty() => drop(what), // nothing was promised yet
            Err(what) => found.lost = Some(what),
        }
        if boot && !self.identity.is_empty() {
            found.booted = true;
            if let Err(error) = self.boot(&disk) {
                found.unbootable.get_or_insert(format!("booted: {error:#}"));
            }
        }
        Ok(found)
    }

    /// The version that the loader would start, byte for byte one that was built.
    fn chosen(&self, disk: &Disk) -> Result<&'a Version, Choice> {
        let none = |what: anyhow::Error| Choice::None(format!("{what:#}"));
        let volume = disk.volume("esp").map_err(none)?;
        if volume.read(LOADER).map_err(none)? != self.loader {
            return Err(Choice::None("the loader is damaged".into()));
        }
        let mut entries = Vec::new();
        for name in volume.list(UKI_FOLDER).map_err(none)? {
            let Some(rest) =
                name.strip_prefix("skerry_").and_then(|rest| rest.strip_suffix(".efi"))
            else {
                continue;
            };
            let bytes = volume.read(&format!("{UKI_FOLDER}/{name}")).map_err(none)?;
            let (version, counter) = rest.split_once('+').unwrap_or((rest, ""));
            let spent = counter.split('-').next() == Some("0");
            if bytes.get(..512).is_some_and(|head| head.iter().any(|byte| *byte != 0)) {
                entries.push((!spent, version.to_owned(), name.clone(), bytes));
            }
        }
        // Both versions begin with a digit of their own.
        entries.sort();
        let (_, _, name, bytes) =
            entries.pop().ok_or_else(|| Choice::None("there is no version".into()))?;
        let whole = self.versions.iter().find(|version| version.uki == bytes);
        whole.ok_or_else(|| Choice::Mixed(format!("`{name}` is not what was built")))
    }

    /// Files of the node's identity, after the repair that each boot does; or why there can be none.
    fn identity(&self, disk: &Disk) -> Result<Result<BTreeSet<String>, String>> {
        if disk.partition("state").is_err() {
            return Ok(Err("there is no state".into()));
        }
        let state = self.part(disk, "state", "state.raw")?;
        let outcome = || -> Result<Result<BTreeSet<String>, String>> {
            let code = quiet(Command::new("e2fsck").arg("-p").arg(&state))?;
            if code > 3 {
                return Ok(Err(format!("e2fsck ends with {code}")));
            }
            let listed = Command::new("debugfs")
                .args(["-R", "ls -p /edge/pki"])
                .arg(&state)
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .output()?;
            let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
            // /inode/mode/user/group/name/length/
            let names = listed.lines().filter_map(|line| {
                let fields: Vec<_> = line.split('/').collect();
                let [_, _, mode, _, _, name, length, ..] = fields[..] else { return None };
                let file = mode.starts_with("10") && length.parse::<u64>().is_ok_and(|len| len > 0);
                (file && !name.contains(".next")).then(|| name.to_owned())
            });
            Ok(Ok(names.collect()))
        };
        let outcome = outcome();
        std::fs::remove_file(state)?;
        outcome
    }

    /// A sparse copy of a partition.
    fn part(&self, disk: &Disk, label: &str, name: &str) -> Result<PathBuf> {
        let part = disk.partition(label)?;
        let to = self.lab.file(name);
        copy_sparse(&self.file, part.start, part.length, &to)?;
        Ok(to)
    }

    /// Boots a copy with an empty variable store: the harder case, as nothing in it names a last good version.
    fn boot(&self, disk: &Disk) -> Result<()> {
        let copy = self.lab.file("crash.raw");
        let length = std::fs::metadata(&disk.path)?.len();
        copy_sparse(&self.file, 0, length, &copy)?;
        let plan = self.lab.firmware_machine("powercut")?;
        let disk = Disk { read_only: false, ..Disk::original(&copy) };
        let mut machine = plan.disk(disk).start()?;
        let ready = machine.expect(Want::Word("ready"), READY);
        machine.kill()?;
        std::fs::remove_file(copy)?;
        ready.map(drop).context("it is not at its hub again")
    }
}

/// Where the firmware finds the loader.
const LOADER: &str = "EFI/BOOT/BOOTX64.EFI";

enum Choice {
    None(String),
    Mixed(String),
}

/// Whether a partition begins with these bytes.
fn holds(disk: &Disk, label: &str, wanted: &[u8]) -> Result<bool> {
    let Ok(part) = disk.partition(label) else { return Ok(false) };
    Ok(part.length >= wanted.len() as u64 && disk.read_at(part.start, wanted.len())? == wanted)
}

/// Runs a checker; what it says is its exit code.
fn quiet(command: &mut Command) -> Result<i32> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let status = status.with_context(|| format!("could not start `{name}`"))?;
    status.code().with_context(|| format!("`{name}` was ended by a signal"))
}

/// Copies a range into a new file; zeros stay holes.
fn copy_sparse(from: &File, start: u64, length: u64, to: &Path) -> Result<()> {
    const PIECE: usize = 1 << 20;
    let out = File::create(to)?;
    out.set_len(length)?;
    let mut at = 0;
    let mut buffer = vec![0; PIECE];
    while at < length {
        // Holes are passed over without a look at each.
        let data =
            nix::unistd::lseek(from, i64::try_from(start + at)?, nix::unistd::Whence::SeekData);
        match data.ok().and_then(|data| u64::try_from(data).ok()) {
            Some(data) if data > start + at => at = (data - start) / 4096 * 4096,
            Some(_) => {}
            None => break,
        }
        if at >= length {
            break;
        }
        let len = PIECE.min(usize::try_from(length - at)?);
        from.read_exact_at(&mut buffer[..len], start + at)?;
        if buffer[..len].iter().any(|byte| *byte != 0) {
            out.write_all_at(&buffer[..len], at)?;
        }
        at += len as u64;
    }
    Ok(())
}

/// Whether two files have the same bytes.
fn same(one: &Path, other: &Path) -> Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let count = one.read(&mut a)?;
        if count == 0 {
            return Ok(other.read(&mut b)? == 0);
        }
        other.read_exact(&mut b[..count])?;
        if a[..count] != b[..count] {
            return Ok(false);
        }
    }
}
