//! Loading of kernel modules through the image's own index.
//!
//! Called by both stages and by the `modprobe` applet. A module is tried once; the kernel takes a second try as well,
//! but each costs a system call and there are thousands of aliases.

use crate::kernel::Kernel;
use crate::modindex::{DecodeError, FILE_NAME, INDEX_MAX, Index, ModuleId};
use std::collections::HashSet;
use std::io;
use std::sync::Mutex;

/// Why a module was not loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleError {
    /// The index cannot be read.
    #[error("could not read the module index `{path}`")]
    Read {
        /// Where it should be.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The index is something else.
    #[error("the module index `{path}` cannot be used")]
    Decode {
        /// Where it is.
        path: String,
        /// What is wrong.
        source: DecodeError,
    },
    /// No module has this name or alias.
    #[error("there is no module `{0}`")]
    Unknown(String),
    /// The kernel refused it.
    #[error("could not load module `{module}`")]
    Load {
        /// Which one; perhaps one that the wanted one needs.
        module: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The modules of the running kernel.
pub struct Modules<'a> {
    kernel: &'a dyn Kernel,
    folder: String,
    index: Index,
    tried: Mutex<HashSet<ModuleId>>,
}

impl<'a> Modules<'a> {
    /// Reads the index of the running kernel below `/lib/modules`.
    ///
    /// # Errors
    ///
    /// [`ModuleError::Read`] or [`ModuleError::Decode`].
    pub fn open(kernel: &'a dyn Kernel) -> Result<Self, ModuleError> {
        let folder = format!("/lib/modules/{}", kernel.uname().0);
        let path = format!("{folder}/{FILE_NAME}");
        let bytes = kernel
            .read(&path, INDEX_MAX)
            .map_err(|source| ModuleError::Read { path: path.clone(), source })?;
        let index = Index::decode(bytes).map_err(|source| ModuleError::Decode { path, source })?;
        Ok(Self { kernel, folder, index, tried: Mutex::default() })
    }

    /// Loads what `word` means, a name or an alias; what is there already is fine.
    ///
    /// # Errors
    ///
    /// [`ModuleError::Unknown`] when nothing has this name; [`ModuleError::Load`] when none of them could be loaded.
    pub fn load(&self, word: &str) -> Result<(), ModuleError> {
        if self.index.is_built_in(word) {
            return Ok(());
        }
        let found = self.index.resolve(word);
        let mut result = Err(ModuleError::Unknown(word.to_owned()));
        for id in found {
            let loaded = self.load_one(id);
            if result.is_err() {
                result = loaded;
            }
        }
        result
    }

    /// Loads for every alias what there is for it. Returns how many modules were tried; a device without a driver, or
    /// with one that does not load, is no error of the machine.
    pub fn load_for(&self, aliases: &[String]) -> usize {
        let before = self.tried.lock().expect("no panic while it is held").len();
        for alias in aliases {
            for id in self.index.by_alias(alias) {
                let _ = self.load_one(id);
            }
        }
        self.tried.lock().expect("no panic while it is held").len() - before
    }

    fn load_one(&self, id: ModuleId) -> Result<(), ModuleError> {
        for step in self.index.load_order(id) {
            let known =
                self.tried.lock().expect("no panic while it is held").contains(&step.module);
            if known {
                continue;
            }
            let path = format!("{}/{}", self.folder, self.index.path(step.module));
            match self.kernel.load_module(&path) {
                Ok(()) => {
                    self.tried.lock().expect("no panic while it is held").insert(step.module);
                }
                Err(_) if step.optional => {}
                Err(source) => {
                    let module = self.index.name(step.module).to_owned();
                    return Err(ModuleError::Load { module, source });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Machine;

    #[test]
    fn dependencies_are_loaded_first_and_nothing_twice() {
        let machine = Machine::new();
        machine.modules(&[
            ("jbd2", &[], &[]),
            ("ext4", &["jbd2"], &["fs-ext4"]),
            ("ext3", &["jbd2"], &[]),
        ]);
        let modules = Modules::open(&machine).expect("an index");
        modules.load("fs-ext4").expect("loads");
        modules.load("ext3").expect("loads");
        modules.load("ext4").expect("is there");
        assert_eq!(machine.loaded(), ["jbd2", "ext4", "ext3"]);
        assert!(matches!(modules.load("zfs"), Err(ModuleError::Unknown(_))));
    }

    #[test]
    fn module_whose_dependency_fails_says_which() {
        let machine = Machine::new();
        machine.modules(&[("jbd2", &[], &[]), ("ext4", &["jbd2"], &[])]);
        machine.fail("load jbd2", 2);
        let modules = Modules::open(&machine).expect("an index");
        let error = modules.load("ext4").expect_err("cannot load");
        assert_eq!(error.to_string(), "could not load module `jbd2`");
        assert!(machine.loaded().is_empty());
    }
}
