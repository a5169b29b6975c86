//! An update from a stick: `update.bundle` in the root of a FAT volume with the label SKERRYCFG, and perhaps a key
//! statement `release-keys.json` with its signature beside it. The bundle is checked while it is read; what is unpacked
//! takes the same way as what came over the link.

use super::check::{ROOM_LEFT, Refusal, fits};
use super::core::Trial;
use super::execution::{Engine, Order};
use super::{Progress, records};
use crate::bundle::{self, BundleError, Trust};
use crate::kernel::Kernel;
use crate::trust::{self, TrustError};
use crate::{mounts, provision};
use std::cell::RefCell;
use std::io::{self, Read};

const MOUNT_POINT: &str = "/run/skerry/stick";
const BUNDLE: &str = "/run/skerry/stick/update.bundle";
const STATEMENT: &str = "/run/skerry/stick/release-keys.json";
const STATEMENT_SIGNATURE: &str = "/run/skerry/stick/release-keys.json.sig";

impl From<BundleError> for Refusal {
    fn from(error: BundleError) -> Self {
        match error {
            BundleError::Signature => Self::Signature,
            other => Self::Bundle(other),
        }
    }
}

/// Whether a stick with this node has something for us; leaves it unmounted.
pub(super) fn has_update(engine: &Engine, device: &str) -> bool {
    mounted(engine, device, || engine.kernel.exists(BUNDLE) || engine.kernel.exists(STATEMENT))
        .unwrap_or(false)
}

/// Nodes of sticks.
pub(super) fn sticks(engine: &Engine) -> Vec<String> {
    provision::sticks(engine.kernel, &engine.disk)
}

fn mounted<T>(engine: &Engine, device: &str, work: impl FnOnce() -> T) -> io::Result<T> {
    provision::load_for_sticks(engine.modules.as_deref());
    engine.kernel.mount(&mounts::config(device, MOUNT_POINT, "vfat", false))?;
    let done = work();
    let _ = engine.kernel.unmount(MOUNT_POINT, false);
    Ok(done)
}

/// Unpacks the bundle of a stick; `None` when it has none. `trial` is what is known of the machine before.
pub(super) fn unpack(
    engine: &Engine,
    device: &str,
    trial: &Trial,
    progress: &Progress,
) -> Result<Option<Order>, Refusal> {
    let work = || {
        take_statement(engine.kernel)?;
        match engine.kernel.exists(BUNDLE) {
            true => match unpack_bundle(engine, trial, progress) {
                // The stick is still there after its update.
                Err(Refusal::Same(_)) => Ok(None),
                other => other.map(Some),
            },
            false => Ok(None),
        }
    };
    let done = mounted(engine, device, work);
    done.map_err(|source| Refusal::System { what: "open the stick", source })?
}

/// A statement that is known already is no error: the stick may be used again.
fn take_statement(kernel: &dyn Kernel) -> Result<(), Refusal> {
    let read = |path| kernel.read(path, trust::BYTES_MAX);
    let (Ok(statement), Ok(signature)) = (read(STATEMENT), read(STATEMENT_SIGNATURE)) else {
        return Ok(());
    };
    match trust::take(kernel, &statement, &signature) {
        Ok(_) | Err(TrustError::Counter { .. }) => Ok(()),
        // Signed by a key that it took away itself, the last time.
        Err(TrustError::Signature) if is_known(kernel, &statement) => Ok(()),
        Err(error) => Err(Refusal::Trust(error)),
    }
}

fn is_known(kernel: &dyn Kernel, statement: &[u8]) -> bool {
    let (known, found) = (trust::current(kernel), trust::Statement::parse(statement));
    matches!((known, found), (Ok(known), Ok(found)) if found.counter <= known.counter)
}

fn unpack_bundle(engine: &Engine, trial: &Trial, progress: &Progress) -> Result<Order, Refusal> {
    let kernel = engine.kernel;
    let keys = trust::current(kernel).map_err(Refusal::Trust)?;
    let system = |what| move |source| Refusal::System { what, source };
    let bytes = kernel.file_len(BUNDLE).map_err(system("read the stick"))?;
    let known = engine.known();
    let dir = RefCell::new(String::new());
    let read = File { kernel, at: 0, bytes };
    let signed = bundle::read::<Refusal>(
        read,
        Trust::Keys(&keys.keys),
        |signed| {
            let digest = signed.digest();
            fits(&signed.manifest, &digest, &known)?;
            progress.begin(&signed.manifest.version, &engine.version);
            let needs =
                signed.manifest.parts.iter().map(|part| part.bytes).sum::<u64>() + ROOM_LEFT;
            let folder = format!("{}/{digest}", records::FOLDER);
            let _ = kernel.remove_folder(&folder); // what an earlier try has left
            let free = || {
                kernel.room(records::FOLDER).map(|room| room.free).map_err(system("look for room"))
            };
            if free()? < needs {
                clear(kernel);
            }
            match free()? {
                free if free < needs => {
                    return Err(Refusal::Room { needs: needs >> 20, free: free >> 20 });
                }
                _ => kernel.make_dir(&folder, 0o700).map_err(system("unpack the update"))?,
            }
            *dir.borrow_mut() = folder;
            Ok(())
        },
        |name, piece| {
            progress.add("checking", piece.len() as u64, bytes);
            let path = format!("{}/{name}", dir.borrow());
            kernel.append(&path, piece).map_err(system("unpack the update"))
        },
    );
    let dir = dir.into_inner();
    let signed = match signed {
        Ok(signed) => signed,
        Err(error) => {
            // Half of an update is of no use, and its room is wanted.
            if !dir.is_empty() {
                let _ = kernel.remove_folder(&dir);
            }
            return Err(error);
        }
    };
    let from = engine.version.clone();
    let manifest = signed.manifest.clone();
    let trial = Trial {
        version: manifest.version.clone(),
        from,
        counter: manifest.release_counter,
        digest: signed.digest(),
        boot_id: engine.boot_id.clone(),
        ..trial.clone()
    };
    Ok(Order { manifest, dir, compared: true, trial })
}

/// Removes what earlier updates have left.
pub(super) fn clear(kernel: &dyn Kernel) {
    for name in kernel.list(records::FOLDER).unwrap_or_default() {
        let _ = kernel.remove_folder(&format!("{}/{name}", records::FOLDER)); // room is checked after it
    }
}

/// A file, read through [`Kernel`].
struct File<'a> {
    kernel: &'a dyn Kernel,
    at: u64,
    bytes: u64,
}

impl Read for File<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(self.bytes - self.at)
            .map_or(buffer.len(), |left| left.min(buffer.len()));
        let piece = self.kernel.read_at(BUNDLE, self.at, len)?;
        buffer[..len].copy_from_slice(&piece);
        self.at += len as u64;
        Ok(len)
    }
}
