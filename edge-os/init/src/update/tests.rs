use super::core::{GATE_MAX, Seen};
use super::*;
use crate::disk;
use crate::manifest::{PRODUCT, Part as ManifestPart, STATE_SCHEMA};
use crate::recorder::{self, flashed};
use crate::trust::tests::{pair, public};
use crate::verity::hex;

const ESP: &str = "/dev/vda1";
const SLOT: &str = "/dev/vda4";
const VARIABLES: &str = "/sys/firmware/efi/efivars";
const LOADER: &str = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

/// A machine with version 1.0, blessed, in slot a, which trusts key 1.
fn machine() -> &'static recorder::Machine {
    let machine = flashed();
    let (_, mut disks) = disk::look(&machine);
    disk::prepare(&machine, &mut disks[0]).unwrap();
    let esp = disks[0].table.by_label("esp").unwrap().id.to_string();
    let text: Vec<u8> = esp.encode_utf16().flat_map(u16::to_le_bytes).collect();
    machine.file(disk::LOADER_VARIABLE, &[&[6, 0, 0, 0][..], &text].concat());
    machine.file(&format!("{VARIABLES}/Boot0000-8be4df61-93ca-11d2-aa0d-00e098032b8c"), &[0; 8]);
    machine.volume(ESP, "EFI/Linux/skerry_1.0.efi", &[1; 1000]);
    machine.volume(ESP, "EFI/Linux/skerry_0.9.efi", &[1; 1000]);
    let keys = trust::KeySet { counter: 1, keys: vec![public(1)] };
    machine.file(trust::ROOT_KEYS, keys.to_json().as_bytes());
    machine.set_room(crate::kernel::Room { total: 1 << 30, free: 1 << 29 });
    machine.clear_log();
    Box::leak(Box::new(machine))
}

fn updates(machine: &'static recorder::Machine, version: &str, boot_id: &str) -> Updates {
    let slot = if version == "1.0" { "a" } else { "b" };
    Updates::new(Machine {
        kernel: machine,
        console: Box::leak(Box::new(Console::new(machine))),
        modules: None,
        disk: "vda".into(),
        slot: slot.into(),
        version: version.into(),
        arch: "amd64".into(),
        variant: "production".into(),
        counter: 3,
        boot_id: boot_id.into(),
    })
}

struct Made {
    manifest: Manifest,
    uki: Vec<u8>,
    root: Vec<u8>,
}

/// Version 2.0 with real digests and a real hash tree.
fn made(change: impl FnOnce(&mut Manifest)) -> Made {
    let data: Vec<u8> = (0..300 * 4096_u32).map(|at| (at / 4096) as u8).collect();
    let tree = crate::verity::build(data.as_slice(), 300, &[7], [0; 16]).unwrap();
    let root = [data, tree.bytes].concat();
    let uki: Vec<u8> = (0..1_500_000_u32).map(|at| (at % 251) as u8 + 1).collect();
    let part = |name: &str, bytes: &[u8]| ManifestPart {
        name: name.into(),
        bytes: bytes.len() as u64,
        sha256: hex(&Sha256::digest(bytes)),
        blocks_sha256: "00".repeat(32),
    };
    let mut manifest = Manifest {
        product: PRODUCT.into(),
        format: manifest::FORMAT,
        version: "2.0".into(),
        arch: "amd64".into(),
        variant: "production".into(),
        epoch: 1_700_000_000,
        release_counter: 4,
        state_schema_min: STATE_SCHEMA,
        state_schema: STATE_SCHEMA,
        kernel: "6.12".into(),
        root_hash: hex(&tree.verity.root),
        verity: tree.verity.to_string(),
        cmdline: "quiet".into(),
        packages_lock: "22".repeat(32),
        parts: vec![part(manifest::UKI, &uki), part(manifest::ROOT, &root)],
    };
    change(&mut manifest);
    Made { manifest, uki, root }
}

impl Made {
    /// Puts it where the agent puts it; returns the order.
    fn place(&self, machine: &recorder::Machine, signer: u8) -> Ordered {
        let text = self.manifest.to_bytes();
        let dir = format!("/state/update/{}", hex(&Sha256::digest(&text)));
        machine.file(&format!("{dir}/manifest.json"), &text);
        machine.file(&format!("{dir}/manifest.json.sig"), pair(signer).sign(&text).as_ref());
        machine.file(&format!("{dir}/uki.efi"), &self.uki);
        machine.file(&format!("{dir}/root.img"), &self.root);
        Ordered { dir, pods: vec!["a/b".into()], connected: true }
    }

    fn bundle(&self, signer: u8) -> Vec<u8> {
        let signature = pair(signer).sign(&self.manifest.to_bytes());
        let mut bytes = Vec::new();
        let parts: &mut [&mut dyn std::io::Read] = &mut [&mut &self.uki[..], &mut &self.root[..]];
        bundle::write(&self.manifest, Some(signature.as_ref()), parts, &mut bytes).unwrap();
        bytes
    }
}

fn seen(connected: bool, missing: Option<Vec<String>>) -> Seen {
    let beat = Some(Duration::ZERO);
    Seen { state: true, containerd: true, agent: true, beat, connected, pods: 1, missing }
}

/// Waits until the thread has ended.
fn settle(machine: &recorder::Machine, updates: &mut Updates) -> Status {
    for _ in 0..20_000 {
        machine.advance_ms(1000);
        updates.poll(machine.uptime(), &seen(true, None));
        if !updates.writing {
            return updates.status().unwrap_or_default();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("the thread does not end: {:?}", updates.status());
}

fn on_esp(machine: &recorder::Machine, name: &str) -> Option<Vec<u8>> {
    machine.in_volume(ESP, &format!("EFI/Linux/{name}"))
}

#[test]
fn good_update_is_written_in_the_order_of_the_protocol_and_blessed_after_its_gate() {
    let (machine, made) = (machine(), made(|_| {}));
    let mut first = updates(machine, "1.0", "boot 1");
    first.begin(machine.uptime(), true);
    assert_eq!(first.status(), None);
    let order = made.place(machine, 1);
    machine.clear_log();
    first.handle_update(&order).unwrap();
    assert!(matches!(first.handle_update(&order), Err(Refusal::Busy(_))));
    let status = settle(machine, &mut first);
    assert_eq!(
        (status.step, status.version.as_str(), status.from.as_str()),
        ("committed", "2.0", "1.0")
    );

    let log = machine.log();
    let mut rest = log.iter();
    for step in [
        "remove /efi/EFI/Linux/skerry_0.9.efi",
        "flush /dev/vda1",
        "write_at /dev/vda4 0 1048576",
        "flush /dev/vda4",
        "dm create update",
        "dm remove update",
        "write /state/boot/trial.json",
        "append /efi/EFI/Linux/skerry_2.0+3.efi 1048576",
        "flush /efi/EFI/Linux/skerry_2.0+3.efi",
        "flush /dev/vda1",
        "read_at /efi/EFI/Linux/skerry_2.0+3.efi 1048576",
        "write_at /efi/EFI/Linux/skerry_2.0+3.efi 0 512",
        "flush /dev/vda1",
        "write_variable",
    ] {
        assert!(rest.any(|line| line.starts_with(step)), "no `{step}` in its place: {log:#?}");
    }
    assert!(on_esp(machine, "skerry_2.0+3.efi").is_some_and(|bytes| bytes == made.uki));
    assert!(machine.read_at(SLOT, 0, made.root.len()).is_ok_and(|bytes| bytes == made.root));
    assert!(!machine.exists(&order.dir), "its room is free again");

    // The loader has taken a try and started it.
    let bytes = on_esp(machine, "skerry_2.0+3.efi").unwrap();
    machine.forget_volume(ESP, "EFI/Linux/skerry_2.0+3.efi");
    machine.volume(ESP, "EFI/Linux/skerry_2.0+2-1.efi", &bytes);
    let mut second = updates(machine, "2.0", "boot 2");
    second.begin(machine.uptime(), true);
    assert!(second.is_on_trial());
    let facts = second.trial_facts().unwrap();
    assert_eq!((facts.pods, facts.connected), (vec!["a/b".to_owned()], true));
    let look = |updates: &mut Updates, seen: &Seen| {
        machine.advance_ms(2000);
        updates.handle_missing(seen.missing.clone());
        updates.poll(machine.uptime(), seen)
    };
    assert!(look(&mut second, &seen(true, None)).is_empty(), "the agent has not said");
    assert!(look(&mut second, &seen(true, Some(vec!["a/b: no image".into()]))).is_empty());
    assert!(look(&mut second, &seen(false, Some(Vec::new()))).is_empty());
    assert_eq!(look(&mut second, &seen(true, Some(Vec::new()))), [Effect::Blessed]);
    assert!(on_esp(machine, "skerry_2.0.efi").is_some());
    let releases = second.releases();
    assert_eq!((releases.counter, releases.other.as_deref()), (4, Some("1.0")));
    assert!(records::trial(machine).is_none());
    assert_eq!(records::history(machine).last().unwrap().event, "blessed");
    // A lower release counter is refused from now on.
    let older = super::tests::made(|it| (it.version, it.release_counter) = ("3.0".into(), 3));
    let refused = second.handle_update(&older.place(machine, 1));
    assert!(matches!(refused, Err(Refusal::Counter { found: 3, known: 4 })));
}

#[test]
fn version_whose_gate_stays_shut_spends_its_tries_and_the_one_before_remembers_it() {
    let (machine, made) = (machine(), made(|_| {}));
    let mut first = updates(machine, "1.0", "boot 1");
    let order = made.place(machine, 1);
    first.handle_update(&order).unwrap();
    settle(machine, &mut first);
    let mut second = updates(machine, "2.0", "boot 2");
    second.begin(machine.uptime(), true);
    let shut = seen(true, Some(vec!["a/b: it crashes".into()]));
    second.handle_missing(shut.missing.clone());
    assert!(second.poll(machine.uptime() + Duration::from_secs(2), &shut).is_empty());
    let end = machine.uptime().max(GATE_MAX) + Duration::from_secs(2);
    let effects = second.poll(end, &shut);
    assert!(
        matches!(&effects[..], [Effect::Restart(why)] if why.contains("it crashes")),
        "{effects:?}"
    );
    assert!(on_esp(machine, "skerry_2.0+0-0.efi").is_some(), "the loader passes it over now");
    let mut third = updates(machine, "1.0", "boot 3");
    third.begin(machine.uptime(), true);
    let status = third.status().unwrap();
    assert_eq!(status.step, "rolled-back");
    assert!(status.reason.contains("it crashes"), "{status:?}");
    assert!(on_esp(machine, "skerry_2.0+0-0.efi").is_none());
    assert_eq!(third.releases().bad[0].version, "2.0");
    assert!(machine.has_said("problem", "version 2.0 was taken back"));
    let refused = third.handle_update(&made.place(machine, 1)).unwrap_err();
    assert!(refused.to_string().contains("failed here before"), "{refused}");
}

#[test]
fn orders_that_cannot_be_carried_out_are_refused_before_anything_is_written() {
    let machine = machine();
    let mut updates = updates(machine, "1.0", "boot 1");
    let good = made(|_| {});
    let order = good.place(machine, 1);
    machine.clear_log();
    let foreign = Ordered { dir: "/state/update/../etc".into(), ..order.clone() };
    assert!(matches!(updates.handle_update(&foreign), Err(Refusal::Folder(_))));
    let gone = Ordered { dir: format!("/state/update/{}", "ab".repeat(32)), ..order.clone() };
    assert!(matches!(updates.handle_update(&gone), Err(Refusal::NoManifest(_))));
    let wrongly = good.place(machine, 2);
    assert!(matches!(updates.handle_update(&wrongly), Err(Refusal::Signature)));
    machine.remove_file(&format!("{}/manifest.json.sig", order.dir));
    assert!(matches!(updates.handle_update(&order), Err(Refusal::Signature)));
    let large = made(|it| it.parts[0].bytes = 70 << 20).place(machine, 1);
    assert!(matches!(updates.handle_update(&large), Err(Refusal::Large { part: "uki.efi", .. })));
    let moved = made(|it| it.kernel = "other".into()).place(machine, 1);
    let text = machine.read(&format!("{}/manifest.json", moved.dir), 1 << 20).unwrap();
    let sig = machine.read(&format!("{}/manifest.json.sig", moved.dir), 64).unwrap();
    machine.file(&format!("{}/manifest.json", order.dir), &text);
    machine.file(&format!("{}/manifest.json.sig", order.dir), &sig);
    assert!(matches!(updates.handle_update(&order), Err(Refusal::Digest)));
    let order = good.place(machine, 1);
    machine.remove_file(trust::ROOT_KEYS);
    let error = updates.handle_update(&order).unwrap_err();
    assert!(
        error.to_string().contains("trusts no release key")
            && error.hint().contains("--release-key")
    );
    for line in machine.log() {
        let writes = ["write", "append", "rename", "remove "];
        assert!(!writes.iter().any(|word| line.starts_with(word)), "{line}");
    }
    assert!(on_esp(machine, "skerry_0.9.efi").is_some());

    // A version that the loader counts still has proved nothing, and without a loader nothing is ever tried.
    machine.forget_volume(ESP, "EFI/Linux/skerry_1.0.efi");
    machine.volume(ESP, "EFI/Linux/skerry_1.0+2-1.efi", &[1; 1000]);
    assert!(matches!(updates.handle_update(&order), Err(Refusal::Unproved(_))));
    machine.remove_file(disk::LOADER_VARIABLE);
    assert!(matches!(updates.handle_update(&order), Err(Refusal::NoLoader)));
}

#[test]
fn failures_on_the_way_leave_the_running_version_alone_and_nothing_of_the_new_one() {
    let spoiled = |part: &str| {
        let (machine, part) = (machine(), part.to_owned());
        let order = made(|_| {}).place(machine, 1);
        let path = format!("{}/{part}", order.dir);
        let last = machine.file_len(&path).unwrap() - 1;
        machine.write_at(&path, last, &[0xee]).unwrap();
        (machine, order, "is not what the manifest says")
    };
    let failing = |line: &str, said: &'static str| {
        let machine = machine();
        let order = made(|_| {}).place(machine, 1);
        machine.fail(line, 28);
        (machine, order, said)
    };
    for (machine, order, said) in [
        spoiled("uki.efi"),
        spoiled("root.img"),
        failing("write_at /dev/vda4", "write the new root"),
        failing("write /state/boot/trial.json", "note the update"),
        failing("append /efi/EFI/Linux/skerry_2.0+3.efi", "boot file"),
        failing("write_at /efi/EFI/Linux/skerry_2.0+3.efi 0", "commit the update"),
        failing("mount /dev/vda1 /efi vfat rw", "open the boot partition"),
        failing("dm load update", "read back the new root"),
    ] {
        let mut updates = updates(machine, "1.0", "boot 1");
        updates.handle_update(&order).unwrap();
        let status = settle(machine, &mut updates);
        assert_eq!(status.step, "failed");
        assert!(status.reason.contains(said), "{status:?}");
        machine.heal();
        let mut next = super::tests::updates(machine, "1.0", "boot 2");
        next.begin(machine.uptime(), true);
        let names: Vec<_> =
            next.engine.entries().unwrap().into_iter().map(|one| one.version).collect();
        assert!(!names.contains(&"2.0".into()) && names.contains(&"1.0".into()), "{names:?}");
        assert!(records::trial(machine).is_none() && records::bad(machine).is_empty(), "{said}");
        // The next try is taken as if nothing had been.
        assert!(next.handle_update(&made(|_| {}).place(machine, 1)).is_ok(), "{said}");
        assert_eq!(settle(machine, &mut next).step, "committed", "{said}");
    }
}

fn stick(machine: &recorder::Machine, files: &[(&str, &[u8])]) {
    machine.device("/dev/sda1", 64 << 20);
    machine.file("/sys/class/block/sda1/partition", b"1");
    let mut sector = [0; 512];
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector[54..59].copy_from_slice(b"FAT16");
    sector[43..54].copy_from_slice(b"SKERRYCFG  ");
    machine.write_at("/dev/sda1", 0, &sector).unwrap();
    for (name, bytes) in files {
        machine.volume("/dev/sda1", name, bytes);
    }
}

#[test]
fn stick_is_taken_like_the_link_and_its_own_version_is_nothing_new() {
    let machine = machine();
    let mut updates = updates(machine, "1.0", "boot 1");
    stick(machine, &[("update.bundle", &made(|_| {}).bundle(1))]);
    updates.look_for_stick(true, 2);
    let status = settle(machine, &mut updates);
    assert_eq!((status.step, status.reason.as_str()), ("committed", ""));
    let trial = records::trial(machine).unwrap();
    assert_eq!((trial.pods_count, trial.connected), (2, true));
    // Without a link the machine restarts by itself after a while.
    let offline = seen(false, None);
    let now = machine.uptime() + Duration::from_secs(5);
    assert!(updates.poll(now, &offline).is_empty());
    let effects = updates.poll(now + RESTART_AFTER, &offline);
    assert_eq!(effects, [Effect::Restart("update to 2.0".into())]);

    let mut second = super::tests::updates(machine, "2.0", "boot 2");
    second.begin(machine.uptime(), true);
    let few = Seen { pods: 1, ..seen(true, None) };
    machine.advance_ms(2000);
    assert!(second.poll(machine.uptime(), &few).is_empty(), "two pods ran before");
    machine.advance_ms(2000);
    assert_eq!(second.poll(machine.uptime(), &Seen { pods: 2, ..few }), [Effect::Blessed]);
    second.look_for_stick(true, 2);
    settle(machine, &mut second);
    assert_eq!(second.status().unwrap().step, "blessed", "the same stick says nothing new");
    assert!(!machine.has_said("problem", "runs already"));
}

#[test]
fn bad_sticks_are_told_by_sentence_and_leave_nothing() {
    let good = made(|_| {}).bundle(1);
    let cut = good[..good.len() - 9000].to_vec();
    let mut changed = good.clone();
    let at = changed.len() - 1024 - 5000;
    changed[at] ^= 1;
    for (bundle, said) in [
        (cut, "the bundle cannot be read"),
        (changed, "`root.img` is not what the manifest says"),
        (made(|_| {}).bundle(2), "not signed by a key that is trusted"),
        (made(|it| it.arch = "arm64".into()).bundle(1), "is for arm64"),
        (made(|it| it.release_counter = 1).bundle(1), "release counter 1"),
        (vec![0; 4096], "the bundle has"),
    ] {
        let machine = machine();
        let mut updates = updates(machine, "1.0", "boot 1");
        stick(machine, &[("update.bundle", &bundle)]);
        updates.look_for_stick(true, 0);
        settle(machine, &mut updates);
        assert!(machine.has_said("problem", said), "{said}: {:#?}", machine.said());
        assert!(machine.list(records::FOLDER).unwrap_or_default().is_empty(), "{said}");
        assert!(on_esp(machine, "skerry_0.9.efi").is_some(), "{said}");
    }
    let machine = machine();
    machine.set_room(crate::kernel::Room { total: 1 << 30, free: 1 << 20 });
    let mut updates = updates(machine, "1.0", "boot 1");
    stick(machine, &[("update.bundle", &good)]);
    updates.look_for_stick(true, 0);
    settle(machine, &mut updates);
    assert!(machine.has_said("problem", "MB are free"), "{:#?}", machine.said());
}

#[test]
fn stick_may_bring_the_keys_that_its_bundle_is_signed_with() {
    let machine = machine();
    let mut updates = updates(machine, "1.0", "boot 1");
    let statement = trust::Statement::new(2, &[public(5)]).to_json();
    let signature = pair(1).sign(statement.as_bytes());
    stick(
        machine,
        &[
            ("update.bundle", &made(|_| {}).bundle(5)),
            ("release-keys.json", statement.as_bytes()),
            ("release-keys.json.sig", signature.as_ref()),
        ],
    );
    updates.look_for_stick(true, 0);
    assert_eq!(settle(machine, &mut updates).step, "committed");
    assert_eq!(trust::current(machine).unwrap().keys, [public(5)]);
}

#[test]
fn order_to_go_back_leads_to_the_other_blessed_version_and_to_none_when_there_is_none() {
    let machine = machine();
    let mut first = updates(machine, "1.0", "boot 1");
    first.begin(machine.uptime(), true);
    first.handle_rollback("it is slow").unwrap();
    assert!(on_esp(machine, "skerry_1.0+0-0.efi").is_some());
    let effects = first.poll(machine.uptime(), &Seen::default());
    assert!(matches!(&effects[..], [Effect::Restart(why)] if why.contains("it is slow")));
    let mut second = updates(machine, "0.9", "boot 2");
    second.begin(machine.uptime(), true);
    let status = second.status().unwrap();
    assert_eq!((status.step, status.reason.contains("it is slow")), ("rolled-back", true));
    let bad = &second.releases().bad[0];
    assert_eq!((bad.version.as_str(), bad.ordered), ("1.0", true), "no stick brings it back");
    assert!(matches!(second.handle_rollback(""), Err(Refusal::NoOther)));
}

#[test]
fn blessed_version_that_stays_unhealthy_gives_way_to_the_other_one_once() {
    let machine = machine();
    for start in 1..=UNHEALTHY_MAX + 1 {
        let mut updates = updates(machine, "1.0", "boot");
        updates.begin(machine.uptime(), true);
        let effects = updates.poll(machine.uptime(), &Seen::default());
        assert_eq!(effects.len(), usize::from(start > UNHEALTHY_MAX), "start {start}");
    }
    let variable = format!("{VARIABLES}/LoaderEntryOneShot-{LOADER}");
    let bytes = machine.read(&variable, 1000).unwrap();
    let name: Vec<u8> = "skerry_0.9.efi\0".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(bytes[4..], name);
    // Health ends the count.
    let mut updates = updates(machine, "1.0", "boot");
    for _ in 0..3 * UNHEALTHY_MAX {
        updates.begin(machine.uptime(), true);
        updates.handle_healthy();
        assert!(updates.poll(machine.uptime(), &Seen::default()).is_empty());
    }
}

#[test]
fn gate_without_a_hub_before_opens_after_three_looks_and_one_with_a_hub_never_does() {
    let trial = |connected| Trial { connected, ..Trial::default() };
    let offline = seen(false, Some(Vec::new()));
    let at = Duration::from_secs;
    let mut gate = Gate::new(at(30));
    let mut opened = Vec::new();
    for second in 30..120 {
        match gate.look(at(second), &trial(false), &offline) {
            Verdict::Wait => {}
            other => {
                opened.push((second, other));
                break;
            }
        }
    }
    assert_eq!(opened, [(70, Verdict::BlessOffline)]);
    let mut gate = Gate::new(at(30));
    assert_eq!(gate.look(at(599), &trial(true), &offline), Verdict::Wait);
    let verdict = gate.look(at(600), &trial(true), &offline);
    assert!(matches!(verdict, Verdict::Fail(why) if why.contains("no link to the hub")));
    // A box without a site has no agent to ask.
    let alone = Seen { agent: false, beat: None, ..offline };
    assert_eq!(Gate::new(at(1)).look(at(2), &trial(false), &alone), Verdict::Bless);
    let dead = Seen { containerd: false, ..alone };
    assert_eq!(Gate::new(at(1)).look(at(2), &trial(false), &dead), Verdict::Wait);
}

#[test]
fn versions_are_ordered_as_the_loader_orders_them() {
    use super::core::compare;
    use std::cmp::Ordering::{Equal, Greater, Less};
    for (a, b, order) in [
        ("1.2", "1.10", Less),
        ("2", "10", Less),
        ("1.0", "1.0", Equal),
        ("1.0~rc1", "1.0", Less),
        ("1.0-1", "1.0", Greater),
        ("1.0", "1.0.1", Less),
        ("1.0a", "1.0", Greater),
        ("01", "1", Equal),
        ("1.0^post", "1.0", Greater),
        ("a", "1", Less),
        ("0.1.0", "2", Less),
    ] {
        assert_eq!(compare(a, b), order, "{a} {b}");
        assert_eq!(compare(b, a), order.reverse(), "{b} {a}");
    }
}

proptest::proptest! {
    #[test]
    fn any_names_are_entries_or_not_and_any_versions_have_an_order(
        a in "[ -~]{0,12}", b in "[ -~]{0,12}", c in "[0-9a-c.~^-]{0,6}",
    ) {
        use super::core::{Entry, compare};
        for name in [&a, &format!("skerry_{a}+{b}.efi"), &format!("skerry_{c}+{a}-{b}.efi")] {
            if let Some(entry) = Entry::parse(name, true) {
                proptest::prop_assert_eq!(&entry.name, name);
                proptest::prop_assert!(crate::manifest::version_is_sound(&entry.version));
            }
        }
        proptest::prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
        if compare(&a, &b).is_le() && compare(&b, &c).is_le() {
            proptest::prop_assert!(compare(&a, &c).is_le());
        }
    }
}
