//! `packages.toml`: what an image is made of. Data for [`crate::root`]; nothing here looks at a package.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::Arch;
use super::lockfile::is_name;

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Catalogue {
    /// Debian's suite; its updates and security suites are read too.
    pub suite: String,
    pub components: Vec<String>,
    /// Architecture to meta package of the kernel, whose dependency names the kernel itself.
    kernel: BTreeMap<String, String>,
    /// Packages of the machine that builds: mkfs.erofs and its libraries.
    pub tools: Vec<String>,
    /// Packages in which needed libraries are looked for; from those only what is needed is taken.
    libraries: Vec<String>,
    /// More of them, by the feature that needs them.
    libraries_with: BTreeMap<String, Vec<String>>,
    /// Packages for tests of the image, never part of one; by architecture.
    tests: BTreeMap<String, Vec<String>>,
    /// Names of the options of `--with`, and what each brings.
    pub features: BTreeMap<String, String>,
    /// Architecture to files of the boot loader.
    boot: BTreeMap<String, Boot>,
    #[serde(rename = "microcode")]
    microcode: Vec<Microcode>,
    #[serde(rename = "part")]
    parts: Vec<Part>,
    #[serde(rename = "modules")]
    modules: Vec<ModuleSet>,
}

/// When an entry applies; all that is given must hold.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct When {
    /// An option that was chosen with `--with`.
    pub with: Option<String>,
    /// `debug` for the debug variant only.
    pub variant: Option<String>,
    pub arch: Option<String>,
}

/// Files of the boot loader in its package.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Boot {
    pub package: String,
    /// The stub that a UKI begins with.
    pub stub: String,
    /// systemd-boot.
    pub loader: String,
    /// Name of the loader on the ESP that firmware looks for, for example `BOOTX64.EFI`.
    pub removable: String,
}

/// Microcode that goes in front of the initramfs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Microcode {
    pub package: String,
    /// Patterns of files, which are joined in the order of their names.
    pub files: Vec<String>,
    /// Path in the early cpio, for example `kernel/x86/microcode/AuthenticAMD.bin`.
    pub target: String,
    #[serde(default)]
    pub when: When,
}

/// Files of one package that go to the root as they are.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Part {
    pub package: String,
    /// Patterns; `*` stands for slashes too. Each must match something.
    pub files: Vec<String>,
    /// Patterns of what is left out.
    #[serde(default)]
    pub except: Vec<String>,
    /// Symbolic links to add: path to target.
    #[serde(default)]
    pub links: BTreeMap<String, String>,
    #[serde(default)]
    pub when: When,
}

/// Where modules go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// The initramfs, and the root as well: what is plugged in later needs them there.
    Initramfs,
    Root,
}

/// A curated set of kernel modules; dependencies are added by [`crate::modules`].
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ModuleSet {
    /// Its name in messages.
    pub set: String,
    pub place: Place,
    /// Names, or patterns that must match something.
    pub modules: Vec<String>,
    /// More of them, by architecture.
    #[serde(default)]
    pub amd64: Vec<String>,
    #[serde(default)]
    pub arm64: Vec<String>,
    /// Whether the files stay packed, for drivers that few machines load: smaller, slower to load.
    #[serde(default)]
    pub packed: bool,
    #[serde(default)]
    pub when: When,
}

/// Why the catalogue cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogueError {
    #[error("the catalogue of packages is broken")]
    Syntax(#[source] toml::de::Error),
    #[error("the catalogue of packages is broken: {0}")]
    Content(String),
    #[error("there is no feature `{name}`; there are {}", .known.join(", "))]
    NoFeature { name: String, known: Vec<String> },
}

impl When {
    /// Whether the entry applies.
    pub fn holds(&self, arch: Arch, debug: bool, with: &BTreeSet<String>) -> bool {
        self.arch.as_ref().is_none_or(|name| name == arch.name())
            && self.variant.as_ref().is_none_or(|name| (name == "debug") == debug)
            && self.with.as_ref().is_none_or(|name| with.contains(name))
    }
}

impl ModuleSet {
    /// All names for an architecture.
    pub fn names(&self, arch: Arch) -> impl Iterator<Item = &String> {
        let more = match arch {
            Arch::Amd64 => &self.amd64,
            Arch::Arm64 => &self.arm64,
        };
        self.modules.iter().chain(more)
    }
}

impl Catalogue {
    /// The catalogue that this program was built with.
    pub fn embedded() -> Self {
        Self::parse(include_str!("../../packages.toml"))
            .expect("a test reads the embedded catalogue")
    }

    /// Reads the text of a catalogue.
    ///
    /// # Errors
    ///
    /// See [`CatalogueError`].
    pub fn parse(text: &str) -> Result<Self, CatalogueError> {
        let catalogue: Self = toml::from_str(text).map_err(CatalogueError::Syntax)?;
        catalogue.check().map_err(CatalogueError::Content)?;
        Ok(catalogue)
    }

    fn check(&self) -> Result<(), String> {
        for arch in Arch::ALL {
            let name = arch.name();
            for (what, there) in [
                ("kernel", self.kernel.contains_key(name)),
                ("boot", self.boot.contains_key(name)),
                ("tests", self.tests.contains_key(name)),
            ] {
                if !there {
                    return Err(format!("`{what}` says nothing about {name}"));
                }
            }
            if let Some(name) = self.packages(arch).iter().find(|name| !is_name(name)) {
                return Err(format!("`{name}` is no package's name"));
            }
        }
        let whens = (self.parts.iter().map(|part| &part.when))
            .chain(self.microcode.iter().map(|microcode| &microcode.when))
            .chain(self.modules.iter().map(|set| &set.when));
        if let Some(name) =
            self.libraries_with.keys().find(|name| !self.features.contains_key(*name))
        {
            return Err(format!("`{name}` is not among the features"));
        }
        for when in whens {
            if let Some(name) = when.with.as_ref().filter(|name| !self.features.contains_key(*name))
            {
                return Err(format!("`{name}` is not among the features"));
            }
            if let Some(name) = when.variant.as_ref().filter(|name| *name != "debug") {
                return Err(format!("`{name}` is no variant that can be asked for"));
            }
            if let Some(name) = when.arch.as_ref().filter(|name| name.parse::<Arch>().is_err()) {
                return Err(format!("`{name}` is no architecture"));
            }
        }
        Ok(())
    }

    /// All packages that some image for this architecture, or a build on it, can need; the kernel is not among them.
    pub fn packages(&self, arch: Arch) -> BTreeSet<String> {
        let here = |when: &When| when.arch.as_ref().is_none_or(|name| name == arch.name());
        let parts = self.parts.iter().filter(|part| here(&part.when)).map(|part| &part.package);
        let microcode = self.microcode.iter().filter(|microcode| here(&microcode.when));
        let mut names: BTreeSet<String> =
            parts.chain(microcode.map(|microcode| &microcode.package)).cloned().collect();
        names.extend(self.tools.iter().cloned());
        names.extend(self.libraries.iter().cloned());
        names.extend(self.libraries_with.values().flatten().cloned());
        names.extend(self.test_packages(arch).iter().cloned());
        names.extend(self.boot.get(arch.name()).map(|boot| boot.package.clone()));
        names
    }

    /// The meta package of the kernel.
    pub fn kernel(&self, arch: Arch) -> &str {
        self.kernel.get(arch.name()).expect("check looked for every architecture")
    }

    /// Where the boot loader is.
    pub fn boot(&self, arch: Arch) -> &Boot {
        self.boot.get(arch.name()).expect("check looked for every architecture")
    }

    /// Packages that tests of an image need, such as firmware for a virtual machine.
    pub fn test_packages(&self, arch: Arch) -> &[String] {
        self.tests.get(arch.name()).map_or(&[], Vec::as_slice)
    }

    /// Packages in which needed libraries are looked for.
    pub fn libraries(&self, with: &BTreeSet<String>) -> BTreeSet<&String> {
        let more = self.libraries_with.iter().filter(|(name, _)| with.contains(*name));
        self.libraries.iter().chain(more.flat_map(|(_, names)| names)).collect()
    }

    /// Microcode that applies.
    pub fn microcode(&self, arch: Arch, debug: bool, with: &BTreeSet<String>) -> Vec<&Microcode> {
        self.microcode.iter().filter(|entry| entry.when.holds(arch, debug, with)).collect()
    }

    /// Parts that apply.
    pub fn parts(&self, arch: Arch, debug: bool, with: &BTreeSet<String>) -> Vec<&Part> {
        self.parts.iter().filter(|entry| entry.when.holds(arch, debug, with)).collect()
    }

    /// Sets of modules that apply.
    pub fn modules(&self, arch: Arch, debug: bool, with: &BTreeSet<String>) -> Vec<&ModuleSet> {
        self.modules.iter().filter(|entry| entry.when.holds(arch, debug, with)).collect()
    }

    /// The names given to `--with` as a set.
    ///
    /// # Errors
    ///
    /// A name that is no feature.
    pub fn features(&self, with: &[String]) -> Result<BTreeSet<String>, CatalogueError> {
        match with.iter().find(|name| !self.features.contains_key(*name)) {
            None => Ok(with.iter().cloned().collect()),
            Some(name) => Err(CatalogueError::NoFeature {
                name: name.clone(),
                known: self.features.keys().map(|name| format!("`{name}`")).collect(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_catalogue_is_sound_and_small_by_default() {
        let catalogue = Catalogue::embedded();
        let none = BTreeSet::new();
        let names = |debug, with: &BTreeSet<String>| -> Vec<String> {
            let parts = catalogue.parts(Arch::Amd64, debug, with);
            parts.into_iter().map(|part| part.package.clone()).collect()
        };
        assert!(!names(false, &none).iter().any(|name| name == "busybox-static"));
        assert!(names(true, &none).iter().any(|name| name == "busybox-static"));
        assert!(!names(true, &none).iter().any(|name| name == "mosquitto"));
        let with = catalogue.features(&["mosquitto".to_owned()]).unwrap();
        assert!(names(false, &with).iter().any(|name| name == "mosquitto"));
    }

    #[test]
    fn a_feature_that_does_not_exist_is_answered_with_those_that_do() {
        let error = Catalogue::embedded().features(&["mosqito".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("`mosquitto`"), "{error}");
    }

    #[test]
    fn mistakes_in_the_catalogue_are_refused() {
        let text = include_str!("../../packages.toml");
        for (from, to) in [
            ("with = \"mosquitto\"", "with = \"mosqito\""),
            ("variant = \"debug\"", "variant = \"slow\""),
            ("arch = \"amd64\"", "arch = \"i386\""),
            ("place = \"root\"", "place = \"attic\""),
            ("package = \"crun\"", "package = \"--crun\""),
            ("suite =", "sweet ="),
        ] {
            assert!(text.contains(from), "{from}");
            assert!(Catalogue::parse(&text.replace(from, to)).is_err(), "{to}");
        }
    }
}
