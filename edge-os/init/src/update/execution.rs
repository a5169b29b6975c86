//! Carries out the steps of [`super::core`] on the machine. Each step is durable when it returns; each may be done again.
//!
//! Runs in a thread of PID 1 while an update is written, and in its loop for the few small steps at a start. Decides
//! nothing: what is to be done, and in which order, comes from the core.

use super::check::{Known, Refusal};
use super::core::{Entry, Step, Trial};
use super::records::{self, Bad, Event};
use super::{HEAD_LEN, Progress};
use crate::boot;
use crate::gpt::Part;
use crate::kernel::{Kernel, line};
use crate::manifest::{self, Manifest};
use crate::modules::Modules;
use crate::verity::{BLOCK, Corruption, Verity, hex};
use crate::{disk, mapper};
use ring::digest::{Context, SHA256};
use std::io;
use std::sync::Arc;

/// Bytes that are copied at once.
pub(super) const PIECE: usize = 1 << 20;
/// Room on the ESP for everything but UKIs: loader, tables, keys.
const ESP_OTHER_BYTES: u64 = 6 << 20;
/// Name of the device that the new root is read back through.
const VERIFIED: &str = "update";

/// The machine, as far as updates need it.
#[derive(Clone)]
pub(super) struct Engine {
    pub(super) kernel: &'static dyn Kernel,
    pub(super) modules: Option<Arc<Modules<'static>>>,
    /// The boot disk, `vda`.
    pub(super) disk: String,
    /// Which root runs: `a` or `b`.
    pub(super) slot: String,
    pub(super) version: String,
    pub(super) arch: String,
    pub(super) variant: String,
    /// Release counter of the running image.
    pub(super) counter: u64,
    pub(super) boot_id: String,
}

/// An update that was checked and is to be carried out.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) manifest: Manifest,
    /// Folder with its parts.
    pub(super) dir: String,
    /// Whether the parts were compared with the manifest while they came.
    pub(super) compared: bool,
    pub(super) trial: Trial,
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> Refusal {
    move |source| Refusal::System { what, source }
}

fn bless_error(error: boot::BlessError) -> Refusal {
    Refusal::System { what: "change the boot entries", source: io::Error::other(error) }
}

impl Engine {
    /// What a manifest is judged by.
    pub(super) fn known(&self) -> Known {
        let partition = |label: &str| {
            let (_, disks) = disk::look(self.kernel);
            let disk = disks.into_iter().find(|one| one.name == self.disk);
            disk.and_then(|disk| Some(disk.table.by_label(label)?.bytes())).unwrap_or(0)
        };
        Known {
            arch: self.arch.clone(),
            variant: self.variant.clone(),
            version: self.version.clone(),
            counter: records::counter(self.kernel).max(self.counter),
            bad: records::bad(self.kernel),
            slot_bytes: partition(self.other_root()),
            uki_bytes: partition(Part::ESP.label).saturating_sub(ESP_OTHER_BYTES) / 2,
        }
    }

    /// Label of the root's partition that does not run.
    fn other_root(&self) -> &'static str {
        match self.slot.as_str() {
            "a" => Part::ROOT_B.label,
            _ => Part::ROOT_A.label,
        }
    }

    /// Mounts the ESP, has something done in the folder of versions, and unmounts it.
    fn with_esp<T>(
        &self,
        writable: bool,
        work: impl FnOnce(&str) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let missing = || system("find the boot partition")(io::ErrorKind::NotFound.into());
        let (_, device) = boot::esp(self.kernel, &self.disk).ok_or_else(missing)?;
        boot::mount(self.kernel, self.modules.as_deref(), &device, writable)
            .map_err(system("open the boot partition"))?;
        let done = work(&format!("{}/{}", boot::MOUNT_POINT, boot::FOLDER));
        let closed = match writable {
            true => boot::close(self.kernel, &device),
            false => self.kernel.unmount(boot::MOUNT_POINT, false),
        };
        let done = done?;
        closed.map(|()| done).map_err(system("close the boot partition"))
    }

    fn entries_in(&self, folder: &str) -> Vec<Entry> {
        let whole = |name: &str| {
            let head = self.kernel.read_at(&format!("{folder}/{name}"), 0, HEAD_LEN);
            head.is_ok_and(|head| head.iter().any(|byte| *byte != 0))
        };
        let names = self.kernel.list(folder).unwrap_or_default();
        names.iter().filter_map(|name| Entry::parse(name, whole(name))).collect()
    }

    /// The versions on the ESP.
    pub(super) fn entries(&self) -> Result<Vec<Entry>, Refusal> {
        self.with_esp(false, |folder| Ok(self.entries_in(folder)))
    }

    /// Copies the boot file of the running version. Nothing has to last: who reads it checks each block.
    pub(super) fn copy_running(&self, to: &str) -> Result<(), Refusal> {
        const WHAT: &str = "copy the running boot file";
        self.with_esp(false, |folder| {
            let entries = self.entries_in(folder);
            let own = entries.iter().find(|entry| entry.version == self.version);
            let missing = || system(WHAT)(io::ErrorKind::NotFound.into());
            let from = format!("{folder}/{}", own.ok_or_else(missing)?.name);
            let bytes = self.kernel.file_len(&from).map_err(system(WHAT))?;
            if self.kernel.exists(to) {
                self.kernel.remove(to).map_err(system(WHAT))?;
            }
            self.pieces(&from, bytes, |_, piece| {
                self.kernel.append(to, piece).map_err(system(WHAT))
            })
        })
    }

    /// Compares the parts with the manifest.
    pub(super) fn compare(&self, order: &Order, progress: &Progress) -> Result<(), Refusal> {
        for part in &order.manifest.parts {
            let name = if part.name == manifest::UKI { manifest::UKI } else { manifest::ROOT };
            let path = format!("{}/{name}", order.dir);
            if self.kernel.file_len(&path).map_err(system("read the update"))? != part.bytes {
                return Err(Refusal::Part(name));
            }
            let mut hash = Context::new(&SHA256);
            self.pieces(&path, part.bytes, |at, piece| {
                hash.update(piece);
                progress.at("checking", at, part.bytes);
                Ok(())
            })?;
            if hex(hash.finish().as_ref()) != part.sha256 {
                return Err(Refusal::Part(name));
            }
        }
        Ok(())
    }

    /// Reads a file piece by piece; `work` gets the place of each.
    fn pieces(
        &self,
        path: &str,
        bytes: u64,
        mut work: impl FnMut(u64, &[u8]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut at = 0;
        while at < bytes {
            let len = usize::try_from(bytes - at).map_or(PIECE, |rest| rest.min(PIECE));
            let piece = self.kernel.read_at(path, at, len).map_err(system("read the update"))?;
            work(at, &piece)?;
            at += len as u64;
        }
        Ok(())
    }

    /// A step of [`super::core::UPDATE`].
    pub(super) fn write(
        &self,
        step: Step,
        order: &Order,
        progress: &Progress,
    ) -> Result<(), Refusal> {
        let uki = format!("{}/{}", order.dir, manifest::UKI);
        let part =
            |name: &str| order.manifest.part(name).expect("checked by the manifest's reader");
        let name = boot::file_name(&order.manifest.version, Some(boot::TRIES));
        match step {
            Step::FreeSlot => self.with_esp(true, |folder| {
                for entry in self.entries_in(folder) {
                    if entry.version != self.version {
                        self.kernel
                            .remove(&format!("{folder}/{}", entry.name))
                            .map_err(system("remove the version before"))?;
                    }
                }
                Ok(())
            }),
            Step::WriteRoot => {
                let device = self.other_device()?;
                let root = part(manifest::ROOT);
                let path = format!("{}/{}", order.dir, manifest::ROOT);
                self.pieces(&path, root.bytes, |at, piece| {
                    progress.at("writing", at, root.bytes);
                    self.kernel
                        .write_direct(&device, at, piece)
                        .map_err(system("write the new root"))
                })?;
                self.kernel.flush(&device).map_err(system("write the new root"))
            }
            Step::VerifyRoot => self.verify_root(&order.manifest, progress),
            Step::NoteTrial => {
                records::note_trial(self.kernel, &order.trial).map_err(system("note the update"))
            }
            Step::WriteUki => self.with_esp(true, |folder| {
                let path = format!("{folder}/{name}");
                if self.kernel.exists(&path) {
                    self.kernel
                        .remove(&path)
                        .map_err(system("write the new version's boot file"))?;
                }
                self.pieces(&uki, part(manifest::UKI).bytes, |at, piece| {
                    let mut piece = piece.to_vec();
                    if at == 0 {
                        piece[..HEAD_LEN].fill(0);
                    }
                    self.kernel
                        .append(&path, &piece)
                        .map_err(system("write the new version's boot file"))
                })?;
                self.kernel.flush(&path).map_err(system("write the new version's boot file"))
            }),
            Step::VerifyUki => self.with_esp(false, |folder| {
                let path = format!("{folder}/{name}");
                let head =
                    self.kernel.read_at(&uki, 0, HEAD_LEN).map_err(system("read the update"))?;
                let mut hash = Context::new(&SHA256);
                hash.update(&head);
                let bytes = part(manifest::UKI).bytes;
                let mut at = 0;
                while at < bytes {
                    let piece = self.kernel.read_direct(&path, at, PIECE);
                    let piece = piece.map_err(system("read back the new version's boot file"))?;
                    if piece.is_empty() {
                        break;
                    }
                    hash.update(if at == 0 {
                        piece.get(HEAD_LEN..).unwrap_or_default()
                    } else {
                        &piece
                    });
                    at += piece.len() as u64;
                }
                match hex(hash.finish().as_ref()) == part(manifest::UKI).sha256 {
                    true => Ok(()),
                    false => Err(Refusal::ReadBack("the boot partition".into())),
                }
            }),
            Step::Commit => self.with_esp(true, |folder| {
                let path = format!("{folder}/{name}");
                let head =
                    self.kernel.read_at(&uki, 0, HEAD_LEN).map_err(system("read the update"))?;
                self.kernel.write_at(&path, 0, &head).map_err(system("commit the update"))?;
                let back = self.kernel.read_direct(&path, 0, HEAD_LEN);
                match back.map_err(system("read back the commit"))? == head {
                    true => Ok(()),
                    false => Err(Refusal::ReadBack("the boot partition".into())),
                }
            }),
            other => self.settle(other, &order.trial, "", ""),
        }
    }

    fn other_device(&self) -> Result<String, Refusal> {
        let (_, disks) = disk::look(self.kernel);
        let disk = disks.into_iter().find(|one| one.name == self.disk);
        let device = disk.and_then(|disk| disk.partition(self.other_root()));
        let missing = || system("find the other root")(io::ErrorKind::NotFound.into());
        Ok(format!("/dev/{}", device.ok_or_else(missing)?))
    }

    /// Reads all of the other root through verity.
    fn verify_root(&self, manifest: &Manifest, progress: &Progress) -> Result<(), Refusal> {
        const WHAT: &str = "read back the new root";
        let verity: Verity = manifest.verity.parse().expect("checked by the manifest's reader");
        let device = self.other_device()?;
        let name = device.trim_start_matches("/dev/");
        let number = line(self.kernel, &format!("/sys/class/block/{name}/dev"));
        // Left over from a thread that a failure of PID 1 has ended.
        let _ = mapper::remove(self.kernel, VERIFIED);
        let table = verity.table(&number, Corruption::Error);
        let node = mapper::create(self.kernel, VERIFIED, verity.sectors(), "verity", &table);
        let node = node.map_err(system(WHAT))?;
        let bytes = verity.data_blocks * BLOCK as u64;
        let read = self.pieces(&node, bytes, |at, _| {
            progress.at("verifying", at, bytes);
            Ok(())
        });
        let removed = mapper::remove(self.kernel, VERIFIED);
        match read {
            Err(Refusal::System { source, .. }) if source.raw_os_error() == Some(5) => {
                Err(Refusal::ReadBack(format!("{} (verity)", self.other_root())))
            }
            Err(other) => Err(other),
            Ok(()) => removed.map_err(system(WHAT)),
        }
    }

    /// A step at the end of a trial.
    pub(super) fn settle(
        &self,
        step: Step,
        trial: &Trial,
        event: &str,
        reason: &str,
    ) -> Result<(), Refusal> {
        const ENTRIES: &str = "change the boot partition";
        let kernel = self.kernel;
        match step {
            Step::LastGood => {
                // A board that does not keep variables is no reason to give up an update.
                let _ = boot::name_last_good(kernel, &self.disk, &self.version);
                Ok(())
            }
            Step::Bless => {
                boot::take_counter(kernel, self.modules.as_deref(), &self.disk, &self.version)
                    .map_err(bless_error)?;
                let _ = boot::name_last_good(kernel, &self.disk, &self.version); // as above
                Ok(())
            }
            Step::KeepCounter => records::keep_counter(kernel, trial.counter)
                .map_err(system("keep the release counter")),
            Step::MarkBad => {
                let bad = Bad {
                    version: trial.version.clone(),
                    digest: trial.digest.clone(),
                    reason: reason.into(),
                    time: kernel.wall(),
                    ordered: trial.ordered,
                };
                records::mark_bad(kernel, bad).map_err(system("remember the version"))
            }
            Step::NoteReason => {
                let trial = Trial { reason: Some(reason.into()), ..trial.clone() };
                records::note_trial(kernel, &trial).map_err(system("note the reason"))
            }
            Step::SpendTries => self.with_esp(true, |folder| {
                let entries = self.entries_in(folder);
                let own = entries.iter().find(|entry| {
                    entry.version == self.version && entry.left.is_none_or(|left| left > 0)
                });
                let Some(own) = own else { return Ok(()) };
                let spent = format!("skerry_{}+0-{}.efi", self.version, own.done);
                kernel
                    .rename(&format!("{folder}/{}", own.name), &format!("{folder}/{spent}"))
                    .map_err(system(ENTRIES))
            }),
            Step::RemoveUki => {
                if trial.version == self.version {
                    return Ok(());
                }
                self.with_esp(true, |folder| {
                    for entry in self.entries_in(folder) {
                        if entry.version == trial.version {
                            kernel
                                .remove(&format!("{folder}/{}", entry.name))
                                .map_err(system(ENTRIES))?;
                        }
                    }
                    Ok(())
                })
            }
            Step::Record => {
                let event = Event {
                    time: kernel.wall(),
                    event: event.into(),
                    version: trial.version.clone(),
                    from: trial.from.clone(),
                    reason: reason.into(),
                };
                records::record(kernel, &event).map_err(system("write the history"))
            }
            Step::ForgetTrial => records::forget_trial(kernel).map_err(system("forget the trial")),
            // The owner of the loop does it.
            Step::Restart => Ok(()),
            Step::FreeSlot
            | Step::WriteRoot
            | Step::VerifyRoot
            | Step::NoteTrial
            | Step::WriteUki
            | Step::VerifyUki
            | Step::Commit => unreachable!("steps of an update go through `write`"),
        }
    }
}
