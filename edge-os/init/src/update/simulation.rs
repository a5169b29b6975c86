//! A disk, a loader and a power supply in memory: updates are cut after every write, each legal part of what was not
//! flushed is lost, and whatever happens a version must start, and the right one must stay.
//!
//! The model: a write is durable after the flush at the end of its step; before that any subset of the step's writes may
//! be on the disk, in any order. A rename on FAT is two writes, a new name and the end of the old one. The loader takes a
//! try by such a rename, starts the newest version that has tries left, and one without tries only when there is no
//! other; a boot file with a head and without its body makes it give up, and the firmware starts the last good one.

use super::core::{
    BLESS, Duty, Entry, GIVE_UP, NOT_STARTED, ROLLED_BACK, Step, Trial, UPDATE, assess, compare,
    steps,
};
use crate::boot;
use std::collections::{BTreeMap, BTreeSet};

/// A write to the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Write {
    /// A name on the ESP, for the file of this version.
    Name(String, u32),
    NoName(String),
    /// Body of a version's file, then its first sector.
    Body(u32),
    Head(u32),
    /// Content of the root that does not run at the time: garbage or a version.
    Slot(usize, Option<&'static str>),
    Trial(Option<Trial>),
    Bad(String),
    LastGood(String),
}

/// A file: its version, whether its body is all there, whether its first sector is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct File {
    version: &'static str,
    body: bool,
    head: bool,
}

#[derive(Debug, Clone, Default)]
struct Disk {
    names: BTreeMap<String, u32>,
    files: BTreeMap<u32, File>,
    slots: [Option<&'static str>; 2],
    trial: Option<Trial>,
    bad: BTreeSet<String>,
    last_good: String,
}

impl Disk {
    fn apply(&mut self, write: &Write) {
        match write {
            Write::Name(name, file) => drop(self.names.insert(name.clone(), *file)),
            Write::NoName(name) => drop(self.names.remove(name)),
            Write::Body(file) => self.files.entry(*file).or_default().body = true,
            Write::Head(file) => self.files.entry(*file).or_default().head = true,
            Write::Slot(slot, content) => self.slots[*slot] = *content,
            Write::Trial(trial) => self.trial.clone_from(trial),
            Write::Bad(version) => drop(self.bad.insert(version.clone())),
            Write::LastGood(name) => self.last_good.clone_from(name),
        }
    }

    fn entries(&self) -> Vec<Entry> {
        let entry = |(name, file): (&String, &u32)| Entry::parse(name, self.files[file].head);
        self.names.iter().filter_map(entry).collect()
    }

    fn can_start(&self, name: &str) -> Option<&'static str> {
        let file = self.files[self.names.get(name)?];
        (file.head && file.body && self.slots.contains(&Some(file.version))).then_some(file.version)
    }
}

/// How the new version is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Good,
    /// Its kernel panics, or hangs until the watchdog fires.
    Hangs,
    /// It comes up, and a pod does not.
    Fails,
    /// It is good, and somebody orders it back.
    Ordered,
}

/// The power is gone.
#[derive(Debug)]
struct Cut;

struct World {
    disk: Disk,
    kind: Kind,
    /// Writes until each cut, and how what is not flushed is lost.
    cuts: Vec<(usize, u64)>,
    writes: usize,
    boots: u32,
    next_file: u32,
    slot: usize,
    history: Vec<String>,
}

const OLD: &str = "1.9";
const NEW: &str = "1.10";

impl World {
    fn new(kind: Kind, cuts: Vec<(usize, u64)>) -> Self {
        let mut disk = Disk { slots: [Some(OLD), None], ..Disk::default() };
        disk.names.insert(boot::file_name(OLD, None), 1);
        disk.files.insert(1, File { version: OLD, body: true, head: true });
        disk.last_good = boot::file_name(OLD, None);
        Self { disk, kind, cuts, writes: 0, boots: 0, next_file: 2, slot: 0, history: Vec::new() }
    }

    /// Writes, then flushes; or loses the power in between.
    fn write(&mut self, writes: &[Write]) -> Result<(), Cut> {
        for (issued, _) in writes.iter().enumerate() {
            self.writes += 1;
            let due = self.cuts.first().filter(|(at, _)| *at <= self.writes).copied();
            if let Some((_, lost)) = due {
                self.cuts.remove(0);
                self.writes = 0;
                let mut kept: Vec<_> = (0..=issued).filter(|at| lost >> at & 1 == 0).collect();
                // In any order, too.
                if lost >> 60 & 1 == 1 {
                    kept.reverse();
                }
                kept.iter().for_each(|at| self.disk.apply(&writes[*at]));
                self.history.push(format!("cut with {kept:?} of {writes:?}"));
                return Err(Cut);
            }
        }
        writes.iter().for_each(|write| self.disk.apply(write));
        Ok(())
    }

    /// The loader and the firmware: returns what runs.
    fn start(&mut self) -> Result<&'static str, Cut> {
        self.boots += 1;
        assert!(self.boots < 60, "it never settles: {:#?}", self.history);
        let mut entries = self.disk.entries();
        entries.retain(|entry| entry.whole);
        entries.sort_by(|a, b| {
            let spent = |entry: &Entry| entry.left == Some(0);
            spent(a).cmp(&spent(b)).then(compare(&b.version, &a.version))
        });
        let chosen =
            entries.first().unwrap_or_else(|| panic!("nothing to start: {:#?}", self.history));
        let mut name = chosen.name.clone();
        if let Some(left) = chosen.left.filter(|left| *left > 0) {
            let file = self.disk.names[&name];
            let next = format!("skerry_{}+{}-{}.efi", chosen.version, left - 1, chosen.done + 1);
            self.write(&[Write::Name(next.clone(), file), Write::NoName(name)])?;
            name = next;
        }
        let started = self.disk.can_start(&name).or_else(|| {
            self.history.push(format!("the firmware gives `{name}` up"));
            self.disk.can_start(&self.disk.last_good)
        });
        let running =
            started.unwrap_or_else(|| panic!("`{name}` does not start: {:#?}", self.history));
        self.history.push(format!("start {} runs {running}", self.boots));
        self.slot = self.disk.slots.iter().position(|slot| *slot == Some(running)).expect("starts");
        Ok(running)
    }

    /// One life of the machine, from its start to its end. Returns whether there is nothing left to do.
    fn live(&mut self) -> Result<bool, Cut> {
        let running = self.start()?;
        if running == NEW && self.kind == Kind::Hangs {
            return Ok(false);
        }
        let boot_id = format!("boot {}", self.boots);
        let duty = assess(running, &boot_id, &self.disk.entries(), self.disk.trial.as_ref());
        self.history.push(format!("{running}: {duty:?}"));
        let trial = self.disk.trial.clone().unwrap_or_default();
        let plan: &[Step] = match duty {
            Duty::Gate if self.kind == Kind::Fails => &GIVE_UP,
            Duty::Gate => &BLESS,
            ref other => steps(other),
        };
        self.carry_out(plan, running, &trial)?;
        if plan == GIVE_UP {
            return Ok(false);
        }
        if self.disk.trial.is_some() {
            return Ok(false);
        }
        if running == NEW && self.kind == Kind::Ordered {
            let trial = Trial { version: NEW.into(), from: OLD.into(), ..Trial::default() };
            self.carry_out(&GIVE_UP, running, &trial)?;
            return Ok(false);
        }
        if running == NEW || self.disk.bad.contains(NEW) {
            return Ok(true);
        }
        let trial = Trial { version: NEW.into(), from: OLD.into(), boot_id, ..Trial::default() };
        self.carry_out(&UPDATE, running, &trial)?;
        Ok(false)
    }

    fn carry_out(
        &mut self,
        plan: &[Step],
        running: &'static str,
        trial: &Trial,
    ) -> Result<(), Cut> {
        for step in plan {
            let writes = self.writes_of(*step, running, trial);
            self.write(&writes)?;
        }
        Ok(())
    }

    fn writes_of(&mut self, step: Step, running: &'static str, trial: &Trial) -> Vec<Write> {
        let of = |version: &str| -> Vec<Entry> {
            self.disk.entries().into_iter().filter(|entry| entry.version == version).collect()
        };
        let tried = boot::file_name(NEW, Some(boot::TRIES));
        match step {
            Step::FreeSlot => {
                let others = self.disk.entries().into_iter().filter(|one| one.version != running);
                others.map(|one| Write::NoName(one.name)).collect()
            }
            Step::WriteRoot => {
                let other = 1 - self.slot;
                vec![Write::Slot(other, None), Write::Slot(other, Some(NEW))]
            }
            Step::VerifyRoot => {
                assert_eq!(self.disk.slots[1 - self.slot], Some(NEW));
                Vec::new()
            }
            Step::NoteTrial => vec![Write::Trial(Some(trial.clone()))],
            Step::WriteUki => {
                let file = self.next_file;
                self.next_file += 1;
                self.disk.files.insert(file, File { version: NEW, body: false, head: false });
                vec![Write::Name(tried, file), Write::Body(file)]
            }
            Step::VerifyUki => {
                assert!(self.disk.files[&self.disk.names[&tried]].body);
                Vec::new()
            }
            Step::Commit => vec![Write::Head(self.disk.names[&tried])],
            Step::LastGood => vec![Write::LastGood(boot::file_name(running, None))],
            Step::Bless => {
                let good = boot::file_name(running, None);
                let mut writes = Vec::new();
                if !self.disk.names.contains_key(&good)
                    && let Some(entry) = of(running).first()
                {
                    writes.push(Write::Name(good.clone(), self.disk.names[&entry.name]));
                    writes.push(Write::NoName(entry.name.clone()));
                }
                writes.push(Write::LastGood(good));
                writes
            }
            Step::MarkBad => vec![Write::Bad(trial.version.clone())],
            Step::NoteReason => {
                vec![Write::Trial(Some(Trial { reason: Some("why".into()), ..trial.clone() }))]
            }
            Step::SpendTries => match of(running).iter().find(|one| one.left != Some(0)) {
                None => Vec::new(),
                Some(entry) => {
                    let spent = format!("skerry_{running}+0-{}.efi", entry.done);
                    let file = self.disk.names[&entry.name];
                    vec![Write::Name(spent, file), Write::NoName(entry.name.clone())]
                }
            },
            Step::RemoveUki if trial.version != running => {
                of(&trial.version).into_iter().map(|one| Write::NoName(one.name)).collect()
            }
            Step::ForgetTrial => vec![Write::Trial(None)],
            Step::RemoveUki | Step::KeepCounter | Step::Record | Step::Restart => Vec::new(),
        }
    }
}

/// Plays until nothing is left to do; returns how many writes there were without a cut.
fn play(kind: Kind, cuts: Vec<(usize, u64)>) -> usize {
    let mut world = World::new(kind, cuts);
    let mut writes = 0;
    loop {
        let before = world.writes;
        let done = world.live();
        writes += world.writes.saturating_sub(before);
        if matches!(done, Ok(true)) {
            break;
        }
    }
    let good = kind == Kind::Good;
    world.cuts.clear();
    let running = world.start().expect("no cut is left");
    let wanted = if good { NEW } else { OLD };
    assert_eq!(running, wanted, "{kind:?}: {:#?}", world.history);
    assert!(world.disk.trial.is_none());
    let own = |entry: &Entry| entry.version == running && entry.is_blessed();
    assert!(world.disk.entries().iter().any(own), "{:#?}", world.disk);
    assert_eq!(world.disk.bad.contains(NEW), !good, "{:#?}", world.history);
    writes
}

const KINDS: [Kind; 4] = [Kind::Good, Kind::Hangs, Kind::Fails, Kind::Ordered];

#[test]
fn every_update_ends_at_the_right_version_without_a_cut() {
    for kind in KINDS {
        assert!(play(kind, Vec::new()) > 8, "{kind:?}");
    }
    // No plan is out of the simulation's sight.
    for plan in [&UPDATE[..], &BLESS, &GIVE_UP, &ROLLED_BACK, &NOT_STARTED] {
        assert!(!plan.is_empty());
    }
}

#[test]
fn one_cut_at_every_write_with_every_loss_leaves_a_machine_that_starts_and_gets_there() {
    let mut played = 0;
    for kind in KINDS {
        let writes = play(kind, Vec::new());
        for at in 1..=writes + 2 {
            for lost in (0..8).flat_map(|lost| [lost, lost | 1 << 60]) {
                play(kind, vec![(at, lost)]);
                played += 1;
            }
        }
    }
    assert!(played > 1000, "{played}");
}

#[test]
fn several_cuts_in_a_row_do_not_matter_either() {
    let mut word = 0x5ee_d0f0_cafe_u64;
    let mut next = || {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word >> 24
    };
    for seed in 0..4000 {
        let kind = KINDS[seed % KINDS.len()];
        let count = 1 + next() % 5;
        let cuts =
            (0..count).map(|_| (1 + (next() % 14) as usize, next() | (next() & 1) << 60)).collect();
        play(kind, cuts);
    }
}
