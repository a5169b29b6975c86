//! Disks of machines: overlays and copies of the built image, blank ones, USB sticks; and a look inside them.
//!
//! The built image is opened for reading only. A scenario that only boots takes an overlay; one that spoils bytes takes a
//! copy, which is sparse and thus as cheap as the image's content.

use crate::gpt::{self, Partition};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Label of volumes that hold a site file.
pub const SITE_LABEL: [u8; 11] = *b"SKERRYCFG  ";
/// Bytes of a USB stick.
const STICK_LENGTH: u64 = 16 << 20;
/// Largest file that is read out of a volume.
const FILE_MAX: u64 = 256 << 20;

/// How a disk lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's, for overlays.
    Qcow2,
}

impl Format {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A disk of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The machine cannot write it.
    pub read_only: bool,
    /// Every write and flush of the machine is noted in this file, which is there; raw disks only.
    pub log: Option<PathBuf>,
}

impl Disk {
    /// A new disk that shows `base` until it is written; it may be larger.
    pub fn overlay(base: &Disk, at: &Path, length: Option<u64>) -> Result<Self> {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-F", base.format.name(), "-b"]);
        command.arg(std::path::absolute(&base.path)?).arg(at);
        command.args(length.map(|length| length.to_string()));
        run(&mut command)?;
        Ok(Self { path: at.into(), format: Format::Qcow2, read_only: false, log: None })
    }

    /// A sparse copy, byte for byte, of at least `length`.
    pub fn copy(base: &Disk, at: &Path, length: u64) -> Result<Self> {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-q", "-f", base.format.name(), "-O", "raw"]);
        run(command.arg(&base.path).arg(at))?;
        let file = OpenOptions::new().write(true).open(at)?;
        if file.metadata()?.len() < length {
            file.set_len(length)?;
        }
        Ok(Self { path: at.into(), format: Format::Raw, read_only: false, log: None })
    }

    /// A disk full of zeros.
    pub fn blank(at: &Path, length: u64) -> Result<Self> {
        File::create(at)?.set_len(length)?;
        Ok(Self { path: at.into(), format: Format::Raw, read_only: false, log: None })
    }

    /// The built image itself, which no machine may write.
    pub fn original(path: &Path) -> Self {
        Self { path: path.into(), format: Format::Raw, read_only: true, log: None }
    }

    /// The same disk, whose writes are logged; see [`crate::writelog`].
    pub fn logged(mut self, log: &Path) -> Self {
        self.log = Some(log.into());
        self
    }

    /// The same disk, not writable.
    pub fn write_protected(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// A partition by its label; raw disks only.
    pub fn partition(&self, label: &str) -> Result<Partition> {
        ensure!(self.format == Format::Raw, "{} is not raw", self.path.display());
        gpt::partition(&self.path, label)
    }

    /// Reads bytes of a raw disk.
    pub fn read_at(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        ensure!(self.format == Format::Raw, "{} is not raw", self.path.display());
        let mut bytes = vec![0; length];
        File::open(&self.path)?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Writes bytes of a raw disk.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        ensure!(self.format == Format::Raw, "{} is not raw", self.path.display());
        Ok(OpenOptions::new().write(true).open(&self.path)?.write_all_at(bytes, offset)?)
    }

    /// Inverts bytes of a raw disk.
    pub fn spoil(&self, offset: u64, length: usize) -> Result<()> {
        let bytes: Vec<u8> = self.read_at(offset, length)?.iter().map(|byte| !byte).collect();
        self.write_at(offset, &bytes)
    }

    /// A raw look at this disk for reading, through a copy when it is an overlay.
    pub fn flattened(&self, at: &Path) -> Result<Self> {
        match self.format {
            Format::Raw => Ok(self.clone()),
            Format::Qcow2 => Self::copy(self, at, 0),
        }
    }

    /// The FAT volume in a partition of a raw disk.
    pub fn volume(&self, label: &str) -> Result<Volume> {
        let partition = self.partition(label)?;
        let file = OpenOptions::new().read(true).write(!self.read_only).open(&self.path)?;
        Volume::open(Window::new(file, partition.start, partition.length))
            .with_context(|| format!("partition `{label}` of {}", self.path.display()))
    }
}

/// Makes a USB stick: one FAT volume with our label and one file. It is as large as it has to be.
pub fn stick(at: &Path, name: &str, content: &[u8]) -> Result<Disk> {
    let length = STICK_LENGTH.max((content.len() as u64 * 9 / 8).next_multiple_of(STICK_LENGTH));
    let disk = Disk::blank(at, length)?;
    let file = OpenOptions::new().read(true).write(true).open(at)?;
    let mut window = Window::new(file, 0, length);
    let options = fatfs::FormatVolumeOptions::new().volume_label(SITE_LABEL);
    fatfs::format_volume(&mut window, options.fat_type(fatfs::FatType::Fat16))?;
    Volume::open(window)?.write(name, content)?;
    Ok(disk)
}

/// The time of everything that is written: without one there is none, and UEFI firmware refuses to rename a file whose
/// times are no times.
#[derive(Debug)]
struct Clock;

impl fatfs::TimeProvider for Clock {
    fn get_current_date(&self) -> fatfs::Date {
        fatfs::Date { year: 2026, month: 1, day: 1 }
    }

    fn get_current_date_time(&self) -> fatfs::DateTime {
        let time = fatfs::Time { hour: 12, min: 0, sec: 0, millis: 0 };
        fatfs::DateTime { date: self.get_current_date(), time }
    }
}

/// A FAT volume.
pub struct Volume {
    files: fatfs::FileSystem<Window>,
}

impl Volume {
    fn open(window: Window) -> Result<Self> {
        let options = fatfs::FsOptions::new().time_provider(&Clock);
        let files = fatfs::FileSystem::new(window, options);
        Ok(Self { files: files.context("no FAT file system")? })
    }

    /// Names in a folder, sorted, without `.` and `..`; a folder that is not there has none.
    pub fn list(&self, folder: &str) -> Result<Vec<String>> {
        let root = self.files.root_dir();
        let folder = match folder {
            "" => root,
            path => match root.open_dir(path) {
                Ok(folder) => folder,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            },
        };
        let names = folder.iter().map(|entry| entry.map(|entry| entry.file_name()));
        let mut names = names.collect::<io::Result<Vec<String>>>()?;
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }

    /// The content of a file.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        let root = self.files.root_dir();
        let file = root.open_file(path).with_context(|| format!("no file `{path}`"))?;
        let mut bytes = Vec::new();
        file.take(FILE_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Writes a file; an old one of that name is replaced.
    pub fn write(&self, path: &str, content: &[u8]) -> Result<()> {
        let root = self.files.root_dir();
        let mut file = root.create_file(path)?;
        file.truncate()?;
        file.write_all(content)?;
        Ok(file.flush()?)
    }
}

/// Some bytes of a file as if they were all of it.
pub struct Window {
    file: File,
    start: u64,
    length: u64,
    at: u64,
}

impl Window {
    fn new(file: File, start: u64, length: u64) -> Self {
        Self { file, start, length, at: 0 }
    }

    fn rest(&self, wanted: usize) -> usize {
        let rest = self.length.saturating_sub(self.at);
        wanted.min(usize::try_from(rest).unwrap_or(usize::MAX))
    }
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = self.rest(buffer.len());
        let count = self.file.read_at(&mut buffer[..wanted], self.start + self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Write for Window {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let wanted = self.rest(bytes.len());
        let count = self.file.write_at(&bytes[..wanted], self.start + self.at)?;
        self.at += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Window {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => i128::from(at),
            SeekFrom::End(by) => i128::from(self.length) + i128::from(by),
            SeekFrom::Current(by) => i128::from(self.at) + i128::from(by),
        };
        self.at = u64::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// Runs a tool; a failure carries its words.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.stdin(Stdio::null()).output();
    let done = done.with_context(|| format!("could not start `{program}`"))?;
    if !done.status.success() {
        bail!(
            "`{program}` failed ({}): {}",
            done.status,
            String::from_utf8_lossy(&done.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stick_has_our_label_and_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let disk = stick(&folder.path().join("stick"), "site.toml", b"revision = 1\n").unwrap();
        // The label of a FAT16 boot sector.
        assert_eq!(disk.read_at(43, 11).unwrap(), SITE_LABEL);
        let file = OpenOptions::new().read(true).write(true).open(&disk.path).unwrap();
        let volume = Volume::open(Window::new(file, 0, STICK_LENGTH)).unwrap();
        assert_eq!(volume.list("").unwrap(), ["site.toml"]);
        assert_eq!(volume.read("site.toml").unwrap(), b"revision = 1\n");
        volume.write("site.toml", b"x").unwrap();
        assert_eq!(volume.read("site.toml").unwrap(), b"x");
        assert!(volume.list("EFI/Linux").unwrap().is_empty());
    }

    #[test]
    fn spoiled_bytes_differ_and_their_neighbours_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::blank(&folder.path().join("disk"), 4096).unwrap();
        disk.spoil(1000, 2).unwrap();
        assert_eq!(disk.read_at(999, 4).unwrap(), [0, 255, 255, 0]);
    }
}
