//! The double of the machine: writes down what is asked of it, and answers from files in memory.
//!
//! Devices are sparse; a mounted filesystem is a set of files that appears below its mount point and is kept when it is
//! unmounted; time stands still unless somebody sleeps. A failure is ordered by the beginning of a line of the log.

use crate::gpt::{Part, Table};
use crate::kernel::{Ending, Exit, Kernel, Launch, MOVE, Mount, REMOUNT, Room, Started};
use crate::modindex::{self, Module};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

const UNAME: &str = "6.12-test";
const PAGE: u64 = 4096;

/// A machine in memory.
pub(crate) struct Machine(Mutex<World>);

struct World {
    log: Vec<String>,
    said: Vec<String>,
    failures: Vec<Failure>,
    now: Duration,
    wall: i64,
    rtc: Option<i64>,
    nodes: BTreeMap<String, Node>,
    /// What a filesystem holds, by device.
    volumes: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Device by mount point.
    mounted: BTreeMap<String, String>,
    loaded: Vec<String>,
    /// Data devices with a root that is as it should be.
    good_roots: BTreeSet<String>,
    tables: BTreeMap<String, String>,
    uevents: Vec<(Duration, Vec<u8>)>,
    /// What a program answers, by the beginning of its command line.
    answers: Vec<(String, Exit)>,
    children: Vec<(i32, Exit)>,
    next_pid: i32,
    room: Room,
    random: u8,
}

struct Failure {
    line: String,
    after: usize,
    /// When it is over; `None` is never.
    until: Option<Duration>,
    code: i32,
}

enum Node {
    Folder,
    File(Vec<u8>),
    Link(String),
    Device { len: u64, pages: BTreeMap<u64, Vec<u8>> },
}

impl Machine {
    /// Nothing but a clock.
    pub(crate) fn new() -> Self {
        Self(Mutex::new(World {
            log: Vec::new(),
            said: Vec::new(),
            failures: Vec::new(),
            now: Duration::ZERO,
            wall: 0,
            rtc: None,
            nodes: BTreeMap::new(),
            volumes: BTreeMap::new(),
            mounted: BTreeMap::new(),
            loaded: Vec::new(),
            good_roots: BTreeSet::new(),
            tables: BTreeMap::new(),
            uevents: Vec::new(),
            answers: Vec::new(),
            children: Vec::new(),
            next_pid: 100,
            room: Room { total: 1 << 30, free: 1 << 29 },
            random: 0,
        }))
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().expect("no test panics while it asks")
    }

    pub(crate) fn file(&self, path: &str, bytes: &[u8]) {
        self.world().nodes.insert(path.into(), Node::File(bytes.to_vec()));
    }

    pub(crate) fn text(&self, path: &str) -> Option<String> {
        match self.world().nodes.get(path)? {
            Node::File(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            _ => None,
        }
    }

    pub(crate) fn remove_file(&self, path: &str) {
        self.world().nodes.remove(path);
    }

    pub(crate) fn device(&self, path: &str, len: u64) {
        self.world().nodes.insert(path.into(), Node::Device { len, pages: BTreeMap::new() });
    }

    /// Puts a file into the filesystem of a device.
    pub(crate) fn volume(&self, device: &str, path: &str, bytes: &[u8]) {
        self.world().volumes.entry(device.into()).or_default().insert(path.into(), bytes.to_vec());
    }

    /// Takes a file out of the filesystem of a device.
    pub(crate) fn forget_volume(&self, device: &str, path: &str) {
        if let Some(files) = self.world().volumes.get_mut(device) {
            files.remove(path);
        }
    }

    /// A file of the filesystem of a device, mounted or not.
    pub(crate) fn in_volume(&self, device: &str, path: &str) -> Option<Vec<u8>> {
        self.world().volumes.get(device)?.get(path).cloned()
    }

    /// A disk with the image on it, and its partitions as devices.
    pub(crate) fn flash(&self, name: &str, len: u64) {
        let table = Table::of_image("test");
        self.device(&format!("/dev/{name}"), len);
        self.file(&format!("/sys/class/block/{name}/dev"), b"8:0");
        let writes = table.writes().expect("a table");
        for (offset, bytes) in writes.primary.iter().chain(&writes.backup) {
            self.write_at(&format!("/dev/{name}"), *offset, bytes).expect("fits");
        }
        self.world().log.clear();
        self.show_partitions(name, &table);
    }

    fn show_partitions(&self, name: &str, table: &Table) {
        let between = if name.ends_with(|c: char| c.is_ascii_digit()) { "p" } else { "" };
        for one in &table.partitions {
            let partition = format!("{name}{between}{}", one.number);
            self.file(&format!("/sys/class/block/{partition}/partition"), b"1");
            self.file(
                &format!("/sys/class/block/{partition}/dev"),
                format!("8:{}", one.number).as_bytes(),
            );
            let path = format!("/dev/{partition}");
            if !self.exists(&path) {
                self.device(&path, one.bytes());
            }
        }
    }

    /// Marks the root in this partition (`8:3`) as one that can be verified.
    pub(crate) fn good_root(&self, number: &str) {
        self.world().good_roots.insert(number.into());
    }

    pub(crate) fn modules(&self, modules: &[(&str, &[&str], &[&str])]) {
        let texts = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let module = |(name, depends, aliases): &(&str, &[&str], &[&str])| Module {
            name: (*name).into(),
            path: format!("{name}.ko"),
            depends: texts(depends),
            aliases: texts(aliases),
            ..Module::default()
        };
        let modules: Vec<_> = modules.iter().map(module).collect();
        let index = modindex::encode(&modules, &[]).expect("an index");
        self.file(&format!("/lib/modules/{UNAME}/{}", modindex::FILE_NAME), &index);
    }

    pub(crate) fn uevent_at(&self, at: Duration, bytes: &[u8]) {
        self.world().uevents.push((at, bytes.to_vec()));
    }

    /// From now on, whatever is logged with this beginning fails with this errno.
    pub(crate) fn fail(&self, line: &str, code: i32) {
        self.fail_after(line, 0, code);
    }

    pub(crate) fn fail_after(&self, line: &str, after: usize, code: i32) {
        self.world().failures.push(Failure { line: line.into(), after, until: None, code });
    }

    /// As [`Self::fail`], until the machine has been up for so long.
    pub(crate) fn fail_until(&self, line: &str, until: Duration, code: i32) {
        let failure = Failure { line: line.into(), after: 0, until: Some(until), code };
        self.world().failures.push(failure);
    }

    pub(crate) fn heal(&self) {
        self.world().failures.clear();
    }

    /// What a program that is run to its end answers; of several answers each is given once, the last one for ever.
    pub(crate) fn answer(&self, program: &str, exit: Exit) {
        self.world().answers.push((program.into(), exit));
    }

    pub(crate) fn advance_ms(&self, millis: u64) {
        self.world().now += Duration::from_millis(millis);
    }

    pub(crate) fn set_time(&self, wall: i64, rtc: Option<i64>) {
        let mut world = self.world();
        (world.wall, world.rtc) = (wall, rtc);
    }

    pub(crate) fn set_room(&self, room: Room) {
        self.world().room = room;
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.world().log.clone()
    }

    pub(crate) fn log_of(&self, line: &str) -> Vec<String> {
        self.world().log.iter().filter(|one| one.starts_with(line)).cloned().collect()
    }

    pub(crate) fn clear_log(&self) {
        self.world().log.clear();
    }

    pub(crate) fn said(&self) -> Vec<String> {
        self.world().said.clone()
    }

    /// Whether a line was said with this word and this text in it.
    pub(crate) fn has_said(&self, word: &str, text: &str) -> bool {
        let word = format!(": {word}: ");
        self.world().said.iter().any(|line| line.contains(&word) && line.contains(text))
    }

    pub(crate) fn loaded(&self) -> Vec<String> {
        self.world().loaded.clone()
    }

    pub(crate) fn table_of(&self, name: &str) -> Option<String> {
        self.world().tables.get(name).cloned()
    }

    pub(crate) fn mounts(&self) -> BTreeMap<String, String> {
        self.world().mounted.clone()
    }
}

impl World {
    fn note(&mut self, line: String) -> io::Result<()> {
        let now = self.now;
        let failed = self.failures.iter_mut().find(|failure| {
            line.starts_with(&failure.line) && failure.until.is_none_or(|until| now < until)
        });
        let failed = failed.and_then(|failure| match failure.after {
            0 => Some(failure.code),
            _ => {
                failure.after -= 1;
                None
            }
        });
        let line = if failed.is_some() { format!("{line} FAILS") } else { line };
        self.log.push(line);
        failed.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
    }

    fn follow(&self, path: &str) -> String {
        match self.nodes.get(path) {
            Some(Node::Link(target)) => target.clone(),
            _ => path.to_owned(),
        }
    }

    fn below(&self, path: &str) -> Vec<String> {
        let prefix = format!("{}/", path.trim_end_matches('/'));
        self.nodes.keys().filter(|one| one.starts_with(&prefix)).cloned().collect()
    }

    /// Writes what was changed below a mount point back to its device.
    fn keep(&mut self, target: &str) {
        let Some(device) = self.mounted.get(target).cloned() else { return };
        let prefix = format!("{target}/");
        let files = self.nodes.iter().filter_map(|(path, node)| match node {
            Node::File(bytes) => Some((path.strip_prefix(&prefix)?.to_owned(), bytes.clone())),
            _ => None,
        });
        let files: BTreeMap<_, _> = files.collect();
        self.volumes.insert(device, files);
    }
}

impl World {
    /// Reads through verity as the kernel does: the data of the table's device, if its tree is right.
    fn verified(&self, table: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let words: Vec<_> = table.split_whitespace().collect();
        let broken = || io::Error::from_raw_os_error(5);
        let [_, _, number, _, _, _, blocks, _, _, root, salt, ..] = words[..] else {
            return Err(broken());
        };
        let minor = number.rsplit(':').next().unwrap_or_default();
        let device = self.nodes.iter().find(|(path, _)| path.ends_with(&format!("vda{minor}")));
        let Some((_, Node::Device { pages, .. })) = device else { return Err(broken()) };
        let blocks: u64 = blocks.parse().map_err(|_| broken())?;
        let empty = vec![0; PAGE as usize];
        let data = (0..blocks).flat_map(|at| pages.get(&at).unwrap_or(&empty).clone());
        let data: Vec<u8> = data.collect();
        let salt = crate::verity::unhex(salt).unwrap_or_default();
        let tree = crate::verity::build(data.as_slice(), blocks, &salt, [0; 16])?;
        if crate::verity::hex(&tree.verity.root) != root {
            return Err(broken());
        }
        let start = usize::try_from(offset).expect("small");
        data.get(start..start + len).map(<[u8]>::to_vec).ok_or_else(broken)
    }
}

fn not_found() -> io::Error {
    io::Error::from(io::ErrorKind::NotFound)
}

impl Kernel for Machine {
    fn uptime(&self) -> Duration {
        self.world().now
    }

    fn wall(&self) -> i64 {
        self.world().wall
    }

    fn set_wall(&self, unix_s: i64) -> io::Result<()> {
        let mut world = self.world();
        world.note(format!("set_wall {unix_s}"))?;
        world.wall = unix_s;
        Ok(())
    }

    fn rtc(&self) -> io::Result<i64> {
        self.world().rtc.ok_or_else(not_found)
    }

    fn sleep(&self, time: Duration) {
        let mut world = self.world();
        world.log.push(format!("sleep {}", time.as_millis()));
        world.now += time;
    }

    fn mount(&self, mount: &Mount) -> io::Result<()> {
        let mut world = self.world();
        let Mount { source, target, fstype, flags, data } = mount;
        let how = match *flags {
            MOVE => "move",
            flags if flags & REMOUNT != 0 => "remount",
            _ => "mount",
        };
        let rights = if flags & crate::kernel::RDONLY != 0 { "ro" } else { "rw" };
        world.note(
            format!("{how} {source} {target} {fstype} {rights} {data}").trim_end().to_owned(),
        )?;
        if how == "mount" && !source.is_empty() {
            if let Some(files) = world.volumes.get(source).cloned() {
                for (path, bytes) in files {
                    world.nodes.insert(format!("{target}/{path}"), Node::File(bytes));
                }
            }
            world.nodes.entry(target.clone()).or_insert(Node::Folder);
            world.mounted.insert(target.clone(), source.clone());
        }
        Ok(())
    }

    fn unmount(&self, target: &str, lazy: bool) -> io::Result<()> {
        let mut world = self.world();
        let how = if lazy { " lazily" } else { "" };
        world.note(format!("unmount {target}{how}"))?;
        world.keep(target);
        world.mounted.remove(target);
        for path in world.below(target) {
            world.nodes.remove(&path);
        }
        Ok(())
    }

    fn switch_root(&self, new_root: &str) -> io::Result<()> {
        self.world().note(format!("switch_root {new_root}"))
    }

    fn sync(&self) {
        self.world().log.push("sync".into());
    }

    fn room(&self, path: &str) -> io::Result<Room> {
        let mut world = self.world();
        world.note(format!("room {path}"))?;
        Ok(world.room)
    }

    fn make_dir(&self, path: &str, _mode: u32) -> io::Result<()> {
        let mut world = self.world();
        world.note(format!("make_dir {path}"))?;
        world.nodes.entry(path.into()).or_insert(Node::Folder);
        Ok(())
    }

    fn own(&self, path: &str, id: u32) -> io::Result<()> {
        self.world().note(format!("own {path} {id}"))
    }

    fn link(&self, path: &str, target: &str) -> io::Result<()> {
        let mut world = self.world();
        world.note(format!("link {path} {target}"))?;
        world.nodes.insert(path.into(), Node::Link(target.into()));
        Ok(())
    }

    fn read_link(&self, path: &str) -> io::Result<String> {
        match self.world().nodes.get(path) {
            Some(Node::Link(target)) => Ok(target.clone()),
            _ => Err(not_found()),
        }
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let world = self.world();
        let prefix = format!("{}/", path.trim_end_matches('/'));
        let names: BTreeSet<String> = world
            .below(path)
            .iter()
            .filter_map(|one| Some(one.strip_prefix(&prefix)?.split('/').next()?.to_owned()))
            .collect();
        match names.is_empty() && !world.nodes.contains_key(path) {
            true => Err(not_found()),
            false => Ok(names.into_iter().collect()),
        }
    }

    fn is_folder(&self, path: &str) -> bool {
        let world = self.world();
        matches!(world.nodes.get(path), Some(Node::Folder))
            || (!world.nodes.contains_key(path) && !world.below(path).is_empty())
    }

    fn exists(&self, path: &str) -> bool {
        let world = self.world();
        world.nodes.contains_key(path) || !world.below(path).is_empty()
    }

    fn read(&self, path: &str, len_max: usize) -> io::Result<Vec<u8>> {
        let mut world = self.world();
        let path = world.follow(path);
        if world.failures.iter().any(|failure| format!("read {path}").starts_with(&failure.line)) {
            world.note(format!("read {path}"))?;
        }
        match world.nodes.get(&path) {
            Some(Node::File(bytes)) if bytes.len() <= len_max => Ok(bytes.clone()),
            Some(Node::File(_)) => Err(io::Error::from(io::ErrorKind::FileTooLarge)),
            _ => Err(not_found()),
        }
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut world = self.world();
        world.note(format!("read_at {path} {offset} {len}"))?;
        if path.starts_with("/dev/dm-") {
            if path != "/dev/dm-0" {
                let table = world.tables.get("update").cloned().unwrap_or_default();
                return world.verified(&table, offset, len);
            }
            let table = world.tables.get("root").cloned().unwrap_or_default();
            let device = table.split_whitespace().nth(2).unwrap_or_default();
            return match world.good_roots.contains(device) {
                true => Ok(crate::stage0::sample_superblock(len)),
                false => Err(io::Error::from_raw_os_error(5)),
            };
        }
        match world.nodes.get(path) {
            Some(Node::File(bytes)) => {
                let start = usize::try_from(offset).expect("small");
                let found = bytes.get(start..start + len);
                found.map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            }
            Some(Node::Device { len: all, .. }) if offset + len as u64 > *all => {
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Some(Node::Device { pages, .. }) => {
                let mut bytes = vec![0; len];
                let end = offset + len as u64;
                for (number, page) in pages.range(offset / PAGE..=end / PAGE) {
                    let (from, to) = (offset.max(number * PAGE), end.min((number + 1) * PAGE));
                    if from < to {
                        let at =
                            |place: u64, base: u64| usize::try_from(place - base).expect("small");
                        bytes[at(from, offset)..at(to, offset)]
                            .copy_from_slice(&page[at(from, number * PAGE)..at(to, number * PAGE)]);
                    }
                }
                Ok(bytes)
            }
            _ => Err(not_found()),
        }
    }

    fn set(&self, path: &str, text: &str) -> io::Result<()> {
        self.world().note(format!("set {path} {text}"))
    }

    fn write(&self, path: &str, bytes: &[u8], mode: u32) -> io::Result<()> {
        let mut world = self.world();
        world.note(format!("write {path} {mode:o}"))?;
        world.nodes.insert(path.into(), Node::File(bytes.to_vec()));
        Ok(())
    }

    fn write_at(&self, path: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut world = self.world();
        world.note(format!("write_at {path} {offset} {}", bytes.len()))?;
        match world.nodes.get_mut(path) {
            Some(Node::File(all)) => {
                let start = usize::try_from(offset).expect("small");
                let place = all.get_mut(start..start + bytes.len()).expect("inside of the file");
                place.copy_from_slice(bytes);
                Ok(())
            }
            Some(Node::Device { len, pages }) => {
                assert!(offset + bytes.len() as u64 <= *len, "beyond the end of {path}");
                for (at, byte) in (offset..).zip(bytes) {
                    let page = pages.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize]);
                    page[(at % PAGE) as usize] = *byte;
                }
                Ok(())
            }
            _ => Err(not_found()),
        }
    }

    fn read_direct(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let all = match self.world().nodes.get(path) {
            Some(Node::File(bytes)) => bytes.len() as u64,
            Some(Node::Device { len, .. }) => *len,
            _ => return Err(not_found()),
        };
        let len = len.min(usize::try_from(all.saturating_sub(offset)).expect("small"));
        self.read_at(path, offset, len)
    }

    fn write_direct(&self, path: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(
            offset.is_multiple_of(PAGE) && (bytes.len() as u64).is_multiple_of(PAGE),
            "aligned"
        );
        self.write_at(path, offset, bytes)
    }

    fn flush(&self, path: &str) -> io::Result<()> {
        self.world().note(format!("flush {path}"))
    }

    fn file_len(&self, path: &str) -> io::Result<u64> {
        match self.world().nodes.get(path) {
            Some(Node::File(bytes)) => Ok(bytes.len() as u64),
            _ => Err(not_found()),
        }
    }

    fn remove_folder(&self, path: &str) -> io::Result<()> {
        let mut world = self.world();
        world.note(format!("remove_folder {path}"))?;
        for below in world.below(path) {
            world.nodes.remove(&below);
        }
        world.nodes.remove(path);
        Ok(())
    }

    fn write_variable(&self, path: &str, bytes: &[u8]) -> io::Result<()> {
        let mut world = self.world();
        world.note(format!("write_variable {path} {}", bytes.len()))?;
        world.nodes.insert(path.into(), Node::File(bytes.to_vec()));
        Ok(())
    }

    fn append(&self, path: &str, bytes: &[u8]) -> io::Result<()> {
        let mut world = self.world();
        world.note(format!("append {path} {}", bytes.len()))?;
        match world.nodes.entry(path.into()).or_insert_with(|| Node::File(Vec::new())) {
            Node::File(all) => {
                all.extend_from_slice(bytes);
                Ok(())
            }
            _ => Err(io::ErrorKind::IsADirectory.into()),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut world = self.world();
        world.note(format!("rename {from} {to}"))?;
        let node = world.nodes.remove(from).ok_or_else(not_found)?;
        world.nodes.insert(to.into(), node);
        Ok(())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let mut world = self.world();
        world.note(format!("remove {path}"))?;
        world.nodes.remove(path).map(drop).ok_or_else(not_found)
    }

    fn step_back(&self) {
        self.world().log.push("step_back".into());
    }

    fn warm(&self, path: &str) {
        self.world().log.push(format!("warm {path}"));
    }

    fn device_len(&self, path: &str) -> io::Result<u64> {
        let mut world = self.world();
        world.note(format!("device_len {path}"))?;
        match world.nodes.get(path) {
            Some(Node::Device { len, .. }) => Ok(*len),
            _ => Err(not_found()),
        }
    }

    fn reread_partitions(&self, path: &str) -> io::Result<()> {
        self.world().note(format!("reread {path}"))?;
        let name = path.trim_start_matches("/dev/");
        let head = self.read_at(path, 0, crate::gpt::HEAD_BYTES)?;
        let len = self.device_len(path)?;
        let tail = vec![0; crate::gpt::TAIL_BYTES];
        let table = Table::decode(&head, &tail, len / crate::gpt::SECTOR).expect("a table");
        self.show_partitions(name, &table.0);
        Ok(())
    }

    fn add_partition(&self, disk: &str, number: u32, start: u64, len: u64) -> io::Result<()> {
        self.world().note(format!("add_partition {disk} {number} {start} {len}"))
    }

    fn device_mapper(&self, command: u8, request: &mut Vec<u8>) -> io::Result<()> {
        let (name, table) = crate::mapper::explain(request);
        let minor = u64::from(name != "root");
        let mut world = self.world();
        match command {
            crate::mapper::CREATE => world.note(format!("dm create {name}"))?,
            crate::mapper::LOAD => {
                world.note(format!("dm load {name} {table}"))?;
                world.tables.insert(name, table);
            }
            crate::mapper::RESUME => world.note(format!("dm resume {name}"))?,
            _ => {
                world.note(format!("dm remove {name}"))?;
                world.tables.remove(&name);
            }
        }
        request[40..48].copy_from_slice(&(254_u64 << 8 | minor).to_ne_bytes());
        Ok(())
    }

    fn load_module(&self, path: &str) -> io::Result<()> {
        let name = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".ko").to_owned();
        let mut world = self.world();
        world.note(format!("load {name}"))?;
        world.loaded.push(name);
        Ok(())
    }

    fn uname(&self) -> (String, String) {
        (UNAME.into(), "x86_64".into())
    }

    fn random(&self, len: usize) -> Vec<u8> {
        let mut world = self.world();
        world.random = world.random.wrapping_add(1);
        vec![world.random; len]
    }

    fn set_hostname(&self, name: &str) -> io::Result<()> {
        self.world().note(format!("hostname {name}"))
    }

    fn open_watchdog(&self, path: &str, timeout: Duration) -> io::Result<i32> {
        let mut world = self.world();
        world.note(format!("watchdog {path} {}", timeout.as_secs()))?;
        world.nodes.contains_key(path).then_some(9).ok_or_else(not_found)
    }

    fn set_watchdog(&self, watchdog: i32, timeout: Duration) -> io::Result<()> {
        self.world().note(format!("set_watchdog {watchdog} {}", timeout.as_secs()))
    }

    fn pet(&self, _watchdog: i32) -> io::Result<()> {
        self.world().note("pet".into())
    }

    fn run(
        &self,
        argv: &[&str],
        limit: Duration,
        _watchdog: Option<i32>,
    ) -> io::Result<(Exit, String)> {
        let mut world = self.world();
        let line = argv.join(" ");
        world.note(format!("run {line}"))?;
        let answers = world.answers.iter().enumerate();
        let fit: Vec<usize> = answers
            .filter(|(_, (program, _))| line.starts_with(program))
            .map(|(at, _)| at)
            .collect();
        let exit = match fit[..] {
            [] => Exit::Code(0),
            [last] => world.answers[last].1,
            [first, ..] => world.answers.remove(first).1,
        };
        assert!(limit > Duration::ZERO);
        if exit == Exit::Code(0) && line.contains("mke2fs") {
            let device = argv.iter().find(|word| word.starts_with("/dev/")).expect("a device");
            if let Some(Node::Device { pages, .. }) = world.nodes.get_mut(*device) {
                let page = pages.entry(0).or_insert_with(|| vec![0; PAGE as usize]);
                page[1080..1082].copy_from_slice(&[0x53, 0xef]);
            }
        }
        Ok((exit, String::new()))
    }

    fn start(&self, launch: &Launch) -> io::Result<Started> {
        let mut world = self.world();
        world.note(format!("start {}", launch.argv.join(" ")))?;
        world.next_pid += 1;
        Ok(Started { pid: world.next_pid, output: None })
    }

    fn reap(&self) -> Option<(i32, Exit)> {
        self.world().children.pop()
    }

    fn kill(&self, pid: i32, signal: i32) -> io::Result<()> {
        self.world().note(format!("kill {pid} {signal}"))
    }

    fn accepts(&self, path: &str) -> bool {
        self.exists(path)
    }

    fn exec(&self, argv: &[&str]) -> io::Error {
        self.world().log.push(format!("exec {}", argv.join(" ")));
        io::Error::from(io::ErrorKind::Interrupted)
    }

    fn end(&self, ending: Ending) -> io::Error {
        self.world().log.push(format!("end {ending:?}"));
        io::Error::from(io::ErrorKind::Interrupted)
    }

    fn take_ctrl_alt_del(&self) -> io::Result<()> {
        self.world().note("take_ctrl_alt_del".into())
    }

    fn say(&self, line: &str) {
        self.world().said.push(line.into());
    }

    fn note(&self, line: &str) {
        self.world().log.push(format!("note {line}"));
    }

    fn show(&self, line: &str) {
        self.world().log.push(format!("show {line}"));
    }

    fn open_uevents(&self) -> io::Result<i32> {
        self.world().note("open_uevents".into())?;
        Ok(8)
    }

    fn next_uevent(&self, _socket: i32) -> io::Result<Option<Vec<u8>>> {
        let mut world = self.world();
        let now = world.now;
        let at = world.uevents.iter().position(|(at, _)| *at <= now);
        Ok(at.map(|at| world.uevents.remove(at).1))
    }

    fn wait(&self, _fd: i32, time: Duration) -> bool {
        let mut world = self.world();
        let next = world.uevents.iter().map(|(at, _)| *at).min();
        let end = world.now + time;
        match next.filter(|at| *at <= end) {
            Some(at) => {
                world.now = world.now.max(at);
                true
            }
            None => {
                world.now = end;
                false
            }
        }
    }
}

/// The machine of most tests: an image on `vda` with a good root in `root-a`, modules, a command line.
pub(crate) fn flashed() -> Machine {
    let machine = Machine::new();
    machine.flash("vda", 4 << 30);
    let number = Part::ROOT_A.number;
    machine.good_root(&format!("8:{number}"));
    machine.modules(&[
        ("dm_mod", &[], &[]),
        ("dm_verity", &["dm_mod"], &["dm-verity"]),
        ("erofs", &[], &["fs-erofs"]),
        ("ext4", &[], &["fs-ext4"]),
        ("vfat", &[], &["fs-vfat"]),
        ("virtio_blk", &[], &["virtio:d00000002v*"]),
        ("softdog", &[], &[]),
    ]);
    let verity = format!("100,101,{},aa", "01".repeat(32));
    let line = format!("console=ttyS0 quiet skerry.version=1.0 skerry.verity={verity}\n");
    machine.file("/proc/cmdline", line.as_bytes());
    machine
}
