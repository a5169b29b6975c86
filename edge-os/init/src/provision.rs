//! What the owner of the box has told it: where `site.toml` is looked for, which one holds, and the end of its token.
//!
//! Sources, first hit wins as a whole: QEMU's `fw_cfg`, SMBIOS, a stick with the label `SKERRYCFG`, the partition
//! `config` of the boot disk, a volume `cidata`, the copy that the node keeps. A found one replaces the copy only if
//! its revision is higher, or if the copy has not led to a certificate yet, so that a file with a mistake can be put
//! right without counting. Without any, the machine boots fully, keeps looking, and says how it is told.
//!
//! [`find`] looks, [`decide`] decides, [`keep`] and [`destroy_token`] write. Called by the second stage.
//!
//! Source of the places: systemd's credentials for SMBIOS (type 11 strings), cloud-init's NoCloud for `cidata`,
//! Microsoft's FAT specification and ECMA-119 for labels.

use crate::console::Problem;
use crate::kernel::{Kernel, line};
use crate::modules::Modules;
use crate::mounts;
use crate::site::{self, Machine, Site, SiteError};
use crate::verity::hex;
use sha2::{Digest, Sha256};
use std::fmt;

/// The copy that the node keeps.
pub const STORED: &str = "/state/site/site.toml";
/// Whether the copy has led to a certificate.
pub const ENROLLED: &str = "/state/site/enrolled";
/// What the services read.
pub const RUN_SITE: &str = "/run/skerry/site.toml";
/// The token, for EdgeCore only.
pub const RUN_TOKEN: &str = "/run/skerry/token";
/// Where volumes are mounted while they are read.
const MOUNT_POINT: &str = "/run/skerry/config";
const FW_CFG: &str = "/sys/firmware/qemu_fw_cfg/by_name/opt/skerry/site.toml/raw";
const FW_CFG_DEVICE: &str = "/sys/bus/acpi/devices/QEMU0002:00";
const SMBIOS: &str = "/sys/firmware/dmi/entries";
const SMBIOS_PREFIX: &str = "io.systemd.credential.binary:skerry.site=";
/// Type 11 tables have 5 bytes before their texts.
const SMBIOS_HEADER_LEN: usize = 5;
const LABEL: &str = "SKERRYCFG";
const CIDATA: &str = "cidata";
const FILE: &str = "site.toml";
/// First line of a `user-data` that is meant for us.
const USER_DATA_MARK: &str = "#skerry";
/// Mistakes of a file that are told at once; a console has short lines.
const MISTAKES_SHOWN: usize = 3;
/// Block devices that are looked at.
const VOLUMES_MAX: usize = 128;
/// Bytes that a label is found in: boot sector of FAT, descriptor of ISO 9660.
const FAT_LEN: usize = 512;
const ISO_AT: u64 = 32 * 1024;
const ISO_LEN: usize = 2048;

/// Where a file came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// QEMU hands it to the machine.
    FwCfg,
    /// The hypervisor or the firmware hands it over.
    Smbios,
    /// A stick; the node of its volume.
    Stick(String),
    /// The partition of the boot disk; its node.
    Config(String),
    /// A volume for cloud-init; its node.
    Cidata(String),
    /// What the node has kept.
    Stored,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FwCfg => "fw_cfg",
            Self::Smbios => "smbios",
            Self::Stick(_) => "usb stick",
            Self::Config(_) => "config partition",
            Self::Cidata(_) => "cidata",
            Self::Stored => "stored copy",
        })
    }
}

/// A file that was found, good or not.
#[derive(Debug, Clone)]
pub struct Found {
    /// Where.
    pub source: Source,
    /// As it is there.
    pub text: String,
    /// What it says.
    pub site: Result<Site, SiteError>,
}

impl Found {
    fn new(source: Source, bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
        let site = Site::parse(&text);
        Self { source, text, site }
    }

    /// The beginning of its SHA-256, to tell files apart in logs.
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(self.text.as_bytes())[..6])
    }
}

/// What holds.
#[derive(Debug, Clone)]
pub enum Decision {
    /// This one, which is to be kept.
    New(Found),
    /// The one that was kept.
    Kept(Found),
    /// None.
    None,
}

/// Looks at every source but the kept copy, in their order. `config` is the partition's node, `boot_disk` the name of
/// the disk that no stick can be on.
pub fn find(
    kernel: &dyn Kernel,
    modules: Option<&Modules<'_>>,
    config: Option<&str>,
    boot_disk: &str,
) -> Option<Found> {
    if let (Some(modules), true) = (modules, kernel.exists(FW_CFG_DEVICE)) {
        let _ = modules.load("qemu_fw_cfg");
    }
    if let Ok(bytes) = kernel.read(FW_CFG, site::BYTES_MAX) {
        return Some(Found::new(Source::FwCfg, &bytes));
    }
    if let Some(bytes) = smbios(kernel) {
        return Some(Found::new(Source::Smbios, &bytes));
    }
    let volumes = volumes(kernel, boot_disk);
    let read = |volume: &Volume, file: &str| read_volume(kernel, modules, volume, file);
    for volume in volumes.iter().filter(|volume| volume.label == LABEL) {
        if let Some(bytes) = read(volume, FILE) {
            return Some(Found::new(Source::Stick(volume.device.clone()), &bytes));
        }
    }
    if let Some(device) = config {
        let volume = Volume { device: device.into(), fstype: "vfat", label: LABEL.into() };
        // A partition that was wiped, or never had a filesystem, is not mounted to find out.
        let known = label(kernel, device).is_some_and(|(fstype, _)| fstype == "vfat");
        if let Some(bytes) = known.then(|| read(&volume, FILE)).flatten() {
            return Some(Found::new(Source::Config(device.into()), &bytes));
        }
    }
    for volume in volumes.iter().filter(|volume| volume.label.eq_ignore_ascii_case(CIDATA)) {
        let bytes = read(volume, "user-data");
        if let Some(bytes) = bytes.filter(|bytes| bytes.starts_with(USER_DATA_MARK.as_bytes())) {
            return Some(Found::new(Source::Cidata(volume.device.clone()), &bytes));
        }
    }
    None
}

/// The copy that the node keeps.
pub fn stored(kernel: &dyn Kernel) -> Option<Found> {
    let bytes = kernel.read(STORED, site::BYTES_MAX).ok()?;
    Some(Found::new(Source::Stored, &bytes))
}

/// Which one holds, and what a person should know about it. `enrolled` is whether the kept copy has led to a
/// certificate.
pub fn decide(
    found: Option<Found>,
    stored: Option<Found>,
    enrolled: bool,
) -> (Decision, Option<Problem>) {
    let stored = stored.filter(|stored| stored.site.is_ok());
    let Some(found) = found else {
        return match stored {
            Some(stored) => (Decision::Kept(stored), None),
            None => (Decision::None, None),
        };
    };
    let revision = |one: &Found| one.site.as_ref().map_or(0, |site| site.revision);
    match (&found.site, stored) {
        (Err(error), stored) => {
            let problem = Some(broken(&found.source, error));
            (stored.map_or(Decision::None, Decision::Kept), problem)
        }
        (Ok(_), None) => (Decision::New(found), None),
        (Ok(_), Some(stored)) if revision(&found) > revision(&stored) => {
            (Decision::New(found), None)
        }
        (Ok(_), Some(stored)) if !enrolled && found.text != stored.text => {
            (Decision::New(found), None)
        }
        (Ok(_), Some(stored)) => {
            let bare = |text: &str| Site::without_token(text).unwrap_or_else(|| text.to_owned());
            let same = found.text == stored.text || bare(&found.text) == stored.text;
            // The token may be the only difference: it was used, and its length may differ in a newer file.
            let same = same || same_without_token(&found, &stored);
            let problem = (!same).then(|| {
                Problem::new(
                    format!(
                        "the site.toml from {} is not used: its revision {} is not higher than {}",
                        found.source,
                        revision(&found),
                        revision(&stored)
                    ),
                    "raise `revision` in the file",
                )
            });
            (Decision::Kept(stored), problem)
        }
    }
}

fn same_without_token(one: &Found, other: &Found) -> bool {
    let (Ok(one), Ok(other)) = (&one.site, &other.site) else { return false };
    differ_by_token(one, other)
}

/// Whether two sites are the same but for the token, which is gone once it was used.
pub fn differ_by_token(one: &Site, other: &Site) -> bool {
    let bare =
        |site: &Site| Site { hub: site::Hub { token: None, ..site.hub.clone() }, ..site.clone() };
    bare(one) == bare(other)
}

fn broken(source: &Source, error: &SiteError) -> Problem {
    let shown = &error.mistakes[..error.mistakes.len().min(MISTAKES_SHOWN)];
    let mut what: Vec<_> = shown.iter().map(ToString::to_string).collect();
    if error.mistakes.len() > shown.len() {
        what.push(format!("and {} more", error.mistakes.len() - shown.len()));
    }
    if what.is_empty() {
        what.push("it cannot be used".into());
    }
    let hints = shown.iter().map(|one| one.hint.as_str()).filter(|hint| !hint.is_empty());
    let hints: Vec<_> = hints.collect();
    Problem::new(format!("site.toml from {source}, {}", what.join("; ")), hints.join("; "))
}

/// What is said when there is no file at all.
pub fn nothing(machine: &Machine) -> Problem {
    let serial = machine.serial.as_deref().unwrap_or("unknown");
    let mac = machine.mac.as_deref().unwrap_or("unknown");
    Problem::new(
        format!("this box was not told what it is for (serial {serial}, mac {mac})"),
        format!(
            "put site.toml on a FAT stick with the label {LABEL} and plug it in; `skerry site new` writes one"
        ),
    )
}

/// What the machine knows of itself, for the rules of names.
pub fn machine(kernel: &dyn Kernel, machine_id: &str) -> Machine {
    let wired = |name: &String| {
        let path = format!("/sys/class/net/{name}");
        line(kernel, &format!("{path}/type")) == "1"
            && kernel.exists(&format!("{path}/device"))
            && !kernel.exists(&format!("{path}/wireless"))
    };
    let names = kernel.list("/sys/class/net").unwrap_or_default();
    let mac = names.into_iter().find(wired);
    let mac = mac.map(|name| line(kernel, &format!("/sys/class/net/{name}/address")));
    let serial = line(kernel, "/sys/class/dmi/id/product_serial");
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    Machine { serial: some(serial), mac: mac.and_then(some), machine_id: some(machine_id.into()) }
}

/// Keeps a new file in the state, token and all, until it has been used.
///
/// # Errors
///
/// What the system says; the site is used all the same.
pub fn keep(kernel: &dyn Kernel, found: &Found) -> std::io::Result<()> {
    let _ = kernel.remove(ENROLLED);
    kernel.write(STORED, found.text.as_bytes(), 0o600)
}

/// Overwrites the token where it came from and in the kept copy, and notes that the node has joined. What the machine
/// was handed by its host cannot be overwritten here.
///
/// # Errors
///
/// Why it could not be overwritten at its source; the kept copy is free of it then all the same.
pub fn destroy_token(
    kernel: &dyn Kernel,
    modules: Option<&Modules<'_>>,
    source: &Source,
) -> std::io::Result<()> {
    overwrite(kernel, STORED)?;
    if kernel.exists(RUN_TOKEN) {
        kernel.remove(RUN_TOKEN)?;
    }
    // The file for the network service has it as well.
    overwrite(kernel, RUN_SITE)?;
    if !kernel.exists(ENROLLED) {
        kernel.write(ENROLLED, b"", 0o600)?;
    }
    let device = match source {
        Source::Stick(device) | Source::Config(device) => device,
        _ => return Ok(()),
    };
    if !kernel.exists(device) {
        return Ok(()); // the stick was taken away
    }
    if let Some(modules) = modules {
        load_vfat(modules);
    }
    kernel.mount(&mounts::config(device, MOUNT_POINT, "vfat", true))?;
    let done = overwrite(kernel, &format!("{MOUNT_POINT}/{FILE}"));
    kernel.sync();
    let unmounted = kernel.unmount(MOUNT_POINT, false);
    done.and(unmounted)
}

/// Writes over the token in place, so that the same blocks of the medium are written.
fn overwrite(kernel: &dyn Kernel, path: &str) -> std::io::Result<()> {
    let Ok(bytes) = kernel.read(path, site::BYTES_MAX) else { return Ok(()) };
    match Site::without_token(&String::from_utf8_lossy(&bytes)) {
        Some(text) => kernel.write_at(path, 0, text.as_bytes()),
        None => Ok(()),
    }
}

fn smbios(kernel: &dyn Kernel) -> Option<Vec<u8>> {
    const TABLE_LEN_MAX: usize = 256 * 1024;
    let names = kernel.list(SMBIOS).unwrap_or_default();
    names.iter().filter(|name| name.starts_with("11-")).find_map(|name| {
        let table = kernel.read(&format!("{SMBIOS}/{name}/raw"), TABLE_LEN_MAX).ok()?;
        let texts = table.get(SMBIOS_HEADER_LEN..)?.split(|byte| *byte == 0);
        let text = texts.filter_map(|text| text.strip_prefix(SMBIOS_PREFIX.as_bytes())).next()?;
        base64(text)
    })
}

struct Volume {
    device: String,
    fstype: &'static str,
    label: String,
}

/// Every volume with a label that is not on the boot disk.
fn volumes(kernel: &dyn Kernel, boot_disk: &str) -> Vec<Volume> {
    const SKIPPED: [&str; 6] = ["loop", "ram", "zram", "dm-", "md", "nbd"];
    let names = kernel.list("/sys/class/block").unwrap_or_default();
    let candidates = names.into_iter().filter(|name| {
        let own = !boot_disk.is_empty() && name.starts_with(boot_disk);
        !own && !SKIPPED.iter().any(|prefix| name.starts_with(prefix))
    });
    candidates
        .take(VOLUMES_MAX)
        .filter_map(|name| {
            let device = format!("/dev/{name}");
            let (fstype, label) = label(kernel, &device)?;
            Some(Volume { device, fstype, label })
        })
        .collect()
}

/// Nodes of the sticks that are for this appliance.
pub fn sticks(kernel: &dyn Kernel, boot_disk: &str) -> Vec<String> {
    let ours = |one: &Volume| one.label == LABEL && one.fstype == "vfat";
    volumes(kernel, boot_disk).into_iter().filter(ours).map(|one| one.device).collect()
}

/// Loads what a stick is mounted with.
pub fn load_for_sticks(modules: Option<&Modules<'_>>) {
    if let Some(modules) = modules {
        load_vfat(modules);
    }
}

/// Filesystem and label of a volume.
fn label(kernel: &dyn Kernel, device: &str) -> Option<(&'static str, String)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if let Ok(sector) = kernel.read_at(device, 0, FAT_LEN)
        && sector[510..] == [0x55, 0xaa]
    {
        if sector[82..87] == *b"FAT32" {
            return Some(("vfat", text(&sector[71..82])));
        }
        if sector[54..57] == *b"FAT" {
            return Some(("vfat", text(&sector[43..54])));
        }
    }
    let descriptor = kernel.read_at(device, ISO_AT, ISO_LEN).ok()?;
    (descriptor[1..6] == *b"CD001").then(|| ("iso9660", text(&descriptor[40..72])))
}

fn read_volume(
    kernel: &dyn Kernel,
    modules: Option<&Modules<'_>>,
    volume: &Volume,
    file: &str,
) -> Option<Vec<u8>> {
    if let Some(modules) = modules {
        match volume.fstype {
            "vfat" => load_vfat(modules),
            _ => drop(modules.load("isofs")),
        }
    }
    kernel.mount(&mounts::config(&volume.device, MOUNT_POINT, volume.fstype, false)).ok()?;
    let bytes = kernel.read(&format!("{MOUNT_POINT}/{file}"), site::BYTES_MAX).ok();
    let _ = kernel.unmount(MOUNT_POINT, false);
    bytes
}

fn load_vfat(modules: &Modules<'_>) {
    for name in ["nls_cp437", "nls_ascii", "vfat"] {
        let _ = modules.load(name); // the mount fails with a better word
    }
}

/// Standard base64, with or without its padding.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for byte in text.iter().filter(|byte| **byte != b'=') {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder;

    const SITE: &str = "revision = 1\n[node]\nname = \"edge-1\"\n[hub]\naddress = [\"wss://hub.example:10000\"]\n\
        enrol = \"https://hub.example:10002\"\ntoken = \"TOKEN\"\n";

    fn site(revision: u64, name: &str) -> String {
        let token = format!("{}.eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln", "ab".repeat(32));
        let text = SITE.replace("revision = 1", &format!("revision = {revision}"));
        text.replace("edge-1", name).replace("TOKEN", &token)
    }

    fn found(source: Source, text: &str) -> Found {
        let found = Found::new(source, text.as_bytes());
        assert!(found.site.is_ok() || text.contains("broken"), "{:?}", found.site);
        found
    }

    fn fat(kernel: &recorder::Machine, device: &str, label: &str, text: &str) {
        let mut sector = vec![0; 512];
        sector[54..59].copy_from_slice(b"FAT16");
        sector[43..54].copy_from_slice(format!("{label:11}").as_bytes());
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        kernel.device(device, 1 << 20);
        kernel.write_at(device, 0, &sector).expect("fits");
        let name = device.trim_start_matches("/dev/");
        kernel.file(&format!("/sys/class/block/{name}/dev"), b"8:1");
        kernel.volume(device, FILE, text.as_bytes());
    }

    fn machine_with_all() -> recorder::Machine {
        let machine = recorder::Machine::new();
        machine.file(FW_CFG, site(1, "fw").as_bytes());
        fat(&machine, "/dev/vda2", LABEL, &site(1, "config"));
        fat(&machine, "/dev/sdb1", LABEL, &site(1, "stick"));
        let mut table = vec![11, 5, 0, 0, 1];
        table.extend(b"io.systemd.credential.binary:skerry.site=");
        table.extend(encode(site(1, "smbios").as_bytes()).bytes());
        table.extend([0, 0]);
        machine.file(&format!("{SMBIOS}/11-0/raw"), &table);
        let mut descriptor = vec![0; ISO_LEN];
        descriptor[1..6].copy_from_slice(b"CD001");
        descriptor[40..72].copy_from_slice(format!("{:32}", "cidata").as_bytes());
        machine.device("/dev/sr0", 1 << 20);
        machine.write_at("/dev/sr0", ISO_AT, &descriptor).expect("fits");
        machine.file("/sys/class/block/sr0/dev", b"11:0");
        let text = format!("#skerry\n{}", site(1, "cidata"));
        machine.volume("/dev/sr0", "user-data", text.as_bytes());
        machine
    }

    fn encode(bytes: &[u8]) -> String {
        const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for chunk in bytes.chunks(3) {
            let word = chunk.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte));
            let word = word << (8 * (3 - chunk.len()));
            for at in 0..=chunk.len() {
                text.push(DIGITS[(word >> (18 - 6 * at) & 63) as usize] as char);
            }
        }
        text
    }

    #[test]
    fn first_source_that_has_a_file_wins_in_the_order_of_the_specification() {
        let machine = machine_with_all();
        let look = || {
            find(&machine, None, Some("/dev/vda2"), "vda").map(|found| {
                let site = found.site.as_ref().expect("good");
                let site::NameRule::Fixed(name) = &site.node.name else { panic!("a name") };
                (found.source.to_string(), name.clone())
            })
        };
        let pair = |source: &str, name: &str| Some((source.to_owned(), name.to_owned()));
        assert_eq!(look(), pair("fw_cfg", "fw"));
        machine.remove_file(FW_CFG);
        assert_eq!(look(), pair("smbios", "smbios"));
        machine.remove_file(&format!("{SMBIOS}/11-0/raw"));
        assert_eq!(look(), pair("usb stick", "stick"));
        machine.remove_file("/sys/class/block/sdb1/dev");
        assert_eq!(look(), pair("config partition", "config"));
        machine.device("/dev/vda2", 1 << 20);
        assert_eq!(look(), pair("cidata", "cidata"));
        machine.remove_file("/sys/class/block/sr0/dev");
        assert_eq!(look(), None);
        assert!(machine.mounts().is_empty(), "nothing stays mounted");
        assert!(machine.log_of("mount").iter().all(|line| format!("{line} ").contains(" ro ")));
    }

    #[test]
    fn found_file_replaces_the_kept_one_only_with_a_higher_revision_or_before_the_node_has_joined()
    {
        let name = |decision: &Decision| match decision {
            Decision::New(found) => format!("new {}", found.text.contains("\"b\"")),
            Decision::Kept(found) => format!("kept {}", found.text.contains("\"b\"")),
            Decision::None => "none".into(),
        };
        let stored = || Some(found(Source::Stored, &site(2, "a")));
        let fresh = |revision, name: &str| Some(found(Source::FwCfg, &site(revision, name)));
        let (decision, problem) = decide(fresh(3, "b"), stored(), true);
        assert_eq!((name(&decision).as_str(), problem), ("new true", None));
        let (decision, problem) = decide(fresh(2, "b"), stored(), true);
        assert_eq!(name(&decision), "kept false");
        assert!(problem.expect("told").what.contains("revision 2 is not higher than 2"));
        let (decision, problem) = decide(fresh(1, "b"), stored(), false);
        assert_eq!((name(&decision).as_str(), problem), ("new true", None));
        let (decision, problem) = decide(fresh(1, "b"), None, false);
        assert_eq!((name(&decision).as_str(), problem), ("new true", None));
        let (decision, problem) = decide(None, stored(), true);
        assert_eq!((name(&decision).as_str(), problem), ("kept false", None));
        let (decision, problem) = decide(None, None, false);
        assert_eq!((name(&decision).as_str(), problem), ("none", None));
        // The copy has lost its token, the source cannot be overwritten: nothing to tell.
        let text = Site::without_token(&site(2, "a")).expect("has one");
        let (decision, problem) = decide(fresh(2, "a"), Some(found(Source::Stored, &text)), true);
        assert_eq!((name(&decision).as_str(), problem), ("kept false", None));
    }

    #[test]
    fn broken_file_is_told_with_its_line_and_the_kept_one_holds() {
        let text = "revision = 1\n[node]\nnam = \"broken\"\n";
        let broken = || Some(found(Source::Config("/dev/vda2".into()), text));
        let (decision, problem) = decide(broken(), None, false);
        assert!(matches!(decision, Decision::None));
        let problem = problem.expect("told");
        assert!(problem.what.contains("config partition, line "), "{problem:?}");
        assert!(!problem.hint.is_empty());
        let (decision, problem) =
            decide(broken(), Some(found(Source::Stored, &site(1, "a"))), true);
        assert!(matches!(decision, Decision::Kept(_)) && problem.is_some());
    }

    #[test]
    fn used_token_is_overwritten_in_place_in_every_copy() {
        let machine = recorder::Machine::new();
        let text = site(1, "a");
        let token = text.lines().last().expect("a line")[9..].trim_end_matches('"').to_owned();
        fat(&machine, "/dev/vda2", LABEL, &text);
        let source = Source::Config("/dev/vda2".into());
        keep(&machine, &found(source.clone(), &text)).expect("kept");
        machine.file(RUN_SITE, text.as_bytes());
        machine.file(RUN_TOKEN, token.as_bytes());
        destroy_token(&machine, None, &source).expect("destroyed");
        let medium = machine.in_volume("/dev/vda2", FILE).expect("there");
        assert_eq!(medium.len(), text.len(), "the same blocks");
        let copies = [
            medium,
            machine.text(STORED).expect("kept").into_bytes(),
            machine.text(RUN_SITE).expect("there").into_bytes(),
        ];
        for copy in copies {
            let copy = String::from_utf8(copy).expect("text");
            assert!(!copy.contains(&token));
            assert_eq!(Site::parse(&copy).expect("still a site").token(), None);
        }
        assert!(machine.text(RUN_TOKEN).is_none() && machine.text(ENROLLED).is_some());
        assert!(machine.mounts().is_empty());
        let again = destroy_token(&machine, None, &source);
        assert!(again.is_ok(), "once more changes nothing");
    }

    #[test]
    fn read_only_stick_is_an_error_and_the_kept_copy_is_free_of_the_token_all_the_same() {
        let machine = recorder::Machine::new();
        fat(&machine, "/dev/sdb1", LABEL, &site(1, "a"));
        let source = Source::Stick("/dev/sdb1".into());
        keep(&machine, &found(source.clone(), &site(1, "a"))).expect("kept");
        machine.fail("mount /dev/sdb1", 30);
        destroy_token(&machine, None, &source).expect_err("read-only");
        let kept = machine.text(STORED).expect("kept");
        assert_eq!(Site::parse(&kept).expect("a site").token(), None);
    }

    #[test]
    fn base64_of_any_length_is_read_and_garbage_refused() {
        for text in ["", "a", "ab", "abc", "abcd"] {
            assert_eq!(
                base64(encode(text.as_bytes()).as_bytes()).as_deref(),
                Some(text.as_bytes())
            );
        }
        assert_eq!(base64(b"YWI="), Some(b"ab".to_vec()));
        assert_eq!(base64(b"Y W"), None);
    }
}
