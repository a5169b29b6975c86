//! A whole image from made-up packages: everything but apt and `mkfs.erofs` is the real thing.

use std::io::Write;

use sha2::{Digest, Sha256};
use skerry_init::modindex::Index;

use super::*;
use crate::deb::testing::{Made, Packing, package};
use crate::elf::testing::{program as elf_program, with_section};
use crate::progress::Silent;

const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
const LIB: &str = "usr/lib/x86_64-linux-gnu";

const CATALOGUE: &str = r#"
suite = "trixie"
components = ["main"]
tools = ["tools"]
libraries = ["libc6", "libz1"]
[libraries-with]
[kernel]
amd64 = "linux-image-amd64"
arm64 = "linux-image-arm64"
[tests]
amd64 = []
arm64 = []
[features]
broker = "a broker"
[boot.amd64]
package = "boot"
stub = "boot/stub"
loader = "boot/loader"
removable = "BOOTX64.EFI"
[boot.arm64]
package = "boot"
stub = "boot/stub"
loader = "boot/loader"
removable = "BOOTAA64.EFI"
[[microcode]]
package = "microcode"
files = ["usr/lib/firmware/ucode/*"]
target = "kernel/x86/microcode/AuthenticAMD.bin"
[[part]]
package = "engine"
files = ["usr/bin/engine"]
links = { "usr/bin/motor" = "engine" }
[[part]]
package = "engine"
files = ["usr/bin/debugger"]
when = { variant = "debug" }
[[part]]
package = "firmware"
files = ["usr/lib/firmware/*"]
[[part]]
package = "ca-certificates"
files = []
[[modules]]
set = "boot"
place = "initramfs"
modules = ["disk"]
[[modules]]
set = "more"
place = "root"
packed = true
modules = ["net"]
"#;

/// A world of packages in a cache, our two programs, and what an image is made of.
struct World {
    folder: tempfile::TempDir,
    catalogue: String,
    lock: Lock,
    request: Request,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let binaries = folder.path().join("binaries");
        fs::create_dir(&binaries).unwrap();
        fs::write(binaries.join("skerry-init"), elf_program(62, &[], None)).unwrap();
        fs::write(binaries.join("edgecore"), elf_program(62, &["libc.so.6"], Some(LOADER)))
            .unwrap();
        let mut world = Self {
            catalogue: CATALOGUE.to_owned(),
            lock: Lock {
                suite: "trixie".to_owned(),
                components: Vec::new(),
                releases: Vec::new(),
                packages: Vec::new(),
            },
            request: Request {
                arch: Arch::Amd64,
                variant: Variant::Production,
                version: "1.2.3".to_owned(),
                epoch: 1_700_000_000,
                release_counter: 5,
                trust: None,
                binaries,
                images: Vec::new(),
                with: Vec::new(),
            },
            folder,
        };
        let engine = elf_program(62, &["libz.so.1", "libc.so.6"], Some(LOADER));
        let libz = elf_program(62, &["libc.so.6"], None);
        let libc = elf_program(62, &["ld-linux-x86-64.so.2"], None);
        let loader = elf_program(62, &[], None);
        let at = |name: &str| format!("{LIB}/{name}");
        world.add(
            "engine",
            &[
                // A setuid bit of a package does not get into an image.
                ("usr/bin/engine", 0o4755, &engine),
                ("usr/bin/debugger", 0o755, b"#!"),
                ("usr/bin/other", 0o755, b"#!"),
            ],
        );
        world.add(
            "libc6",
            &[
                (&at("libc.so.6"), 0o755, &libc),
                (&at("ld-linux-x86-64.so.2"), 0o755, &loader),
                (
                    "usr/lib64/ld-linux-x86-64.so.2",
                    0o777,
                    b"-> ../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
                ),
                (&at("libunused.so.1"), 0o644, &libz),
            ],
        );
        world.add(
            "libz1",
            &[(&at("libz.so.1.3"), 0o644, &libz), (&at("libz.so.1"), 0o777, b"-> libz.so.1.3")],
        );
        world.add(
            "ca-certificates",
            &[
                ("usr/share/ca-certificates/mozilla/b.crt", 0o644, b"second\n"),
                ("usr/share/ca-certificates/mozilla/a.crt", 0o644, b"first\n"),
            ],
        );
        world.add("boot", &[("boot/stub", 0o644, b"stub"), ("boot/loader", 0o644, b"loader")]);
        world.add(
            "microcode",
            &[
                ("usr/lib/firmware/ucode/2", 0o644, b"two"),
                ("usr/lib/firmware/ucode/1", 0o644, b"one"),
            ],
        );
        world.add(
            "firmware",
            &[
                ("usr/lib/firmware/asked.fw", 0o644, b"a"),
                ("usr/lib/firmware/other.fw", 0o644, b"b"),
            ],
        );
        let mkfs = elf_program(62, &["libc.so.6"], Some(LOADER));
        world.add(
            "tools",
            &[
                ("usr/bin/mkfs.erofs", 0o755, &mkfs),
                ("usr/bin/fsck.erofs", 0o755, &mkfs),
                (&at("libc.so.6"), 0o755, &libc),
                (&at("ld-linux-x86-64.so.2"), 0o755, &loader),
            ],
        );
        world.kernel(&[
            ("drivers/disk", "depends=bus|alias=pci:v1d1"),
            ("drivers/bus", ""),
            ("net/net", "firmware=asked.fw|alias=usb:v1p1"),
            ("net/unused", ""),
        ]);
        world
    }

    fn add(&mut self, name: &str, entries: &[Made<'_>]) {
        let bytes = package(entries, Packing::Gzip);
        let sha256 = hex(&Sha256::digest(&bytes));
        fs::write(self.cache().sub("packages").unwrap().join(format!("{sha256}.deb")), &bytes)
            .unwrap();
        self.lock.packages.retain(|locked| locked.name != name);
        self.lock.packages.push(Locked {
            for_arch: Arch::Amd64,
            name: name.to_owned(),
            version: "1.0".to_owned(),
            arch: "amd64".to_owned(),
            size: bytes.len() as u64,
            sha256,
            kernel: name.starts_with("linux-image-"),
        });
    }

    fn kernel(&mut self, modules: &[(&str, &str)]) {
        let below = "usr/lib/modules/6.1-x";
        let mut files = vec![
            ("boot/vmlinuz-6.1-x".to_owned(), b"kernel".to_vec()),
            ("boot/config-6.1-x".to_owned(), b"CONFIG_X=y\n".to_vec()),
            (format!("{below}/modules.builtin"), b"kernel/a/inside.ko\n".to_vec()),
        ];
        for (path, facts) in modules {
            let module = with_section(62, ".modinfo", facts.replace('|', "\0").as_bytes());
            let mut out = liblzma::write::XzEncoder::new(Vec::new(), 1);
            out.write_all(&module).unwrap();
            files.push((format!("{below}/kernel/{path}.ko.xz"), out.finish().unwrap()));
        }
        let entries: Vec<Made<'_>> =
            files.iter().map(|(path, bytes)| (path.as_str(), 0o644, bytes.as_slice())).collect();
        self.add("linux-image-6.1-x", &entries);
    }

    fn cache(&self) -> Cache {
        Cache::open(self.folder.path().join("cache")).unwrap()
    }

    fn gather(&self) -> Result<Inputs, GatherError> {
        let catalogue = Catalogue::parse(&self.catalogue).unwrap();
        // A mirror that cannot be: everything has to come from the cache.
        let source = Source { mirror: Some("nowhere".into()), keyring: Some("/nowhere".into()) };
        gather(&self.request, &catalogue, &self.lock, &self.cache(), &source, &Silent)
    }

    fn try_plan(&self) -> Result<Plan, PlanError> {
        let catalogue = Catalogue::parse(&self.catalogue).unwrap();
        plan(&self.request, &catalogue, &self.gather().unwrap())
    }

    fn plan(&self) -> Plan {
        self.try_plan().unwrap()
    }

    fn refused(&self) -> GatherError {
        self.gather().expect_err("the inputs are refused")
    }
}

fn text(tree: &Tree, path: &str) -> String {
    match &tree.get(path).unwrap_or_else(|| panic!("no {path}")).node {
        Node::File(content) => String::from_utf8(content.read().unwrap()).unwrap(),
        Node::Link(target) => format!("-> {target}"),
        other => panic!("{path}: {other:?}"),
    }
}

fn bytes(tree: &Tree, path: &str) -> Vec<u8> {
    match &tree.get(path).unwrap_or_else(|| panic!("no {path}")).node {
        Node::File(content) => content.read().unwrap(),
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn a_plan_has_programs_with_their_libraries_and_nothing_else_of_the_packages() {
    let world = World::new();
    let plan = world.plan();
    let root = &plan.root;
    assert_eq!(plan.executables(), ["usr/bin/edgecore", "usr/bin/engine", "usr/bin/skerry-init"]);
    assert_eq!(root.get("usr/bin/engine").unwrap().mode, 0o755);
    assert_eq!(text(root, "usr/bin/motor"), "-> engine");
    for library in ["libc.so.6", "libz.so.1", "ld-linux-x86-64.so.2"] {
        assert!(!bytes(root, &format!("{LIB}/{library}")).is_empty());
    }
    assert_eq!(
        text(root, "usr/lib64/ld-linux-x86-64.so.2"),
        format!("-> ../../{LIB}/ld-linux-x86-64.so.2")
    );
    for path in ["usr/bin/other", "usr/bin/debugger", "usr/lib/firmware/other.fw"] {
        assert!(root.get(path).is_none(), "{path}");
    }
    assert!(root.get(&format!("{LIB}/libunused.so.1")).is_none());
    assert!(root.get("usr/lib/firmware/asked.fw").is_some());
    assert_eq!(text(root, "etc/ssl/certs/ca-certificates.crt"), "first\nsecond\n");
    assert_eq!(text(root, "usr/lib/cni/bridge"), "-> ../../bin/skerry-init");
    assert_eq!(text(root, "etc/resolv.conf"), "-> /run/resolv.conf");
    assert_eq!(root.get("tmp").unwrap().mode, 0o1777);
    assert_eq!(bytes(root, "usr/lib/kernel/config-6.1-x"), b"CONFIG_X=y\n");
    let facts: serde_json::Value =
        serde_json::from_str(&text(root, "usr/share/skerry/image.json")).unwrap();
    let expected = json!({"version": "1.2.3", "epoch": 1_700_000_000, "release_counter": 5,
        "arch": "amd64", "variant": "production", "uname": "6.1-x"});
    assert_eq!(facts, expected);
}

#[test]
fn root_has_the_keys_that_it_trusts_and_none_by_itself() {
    let mut world = World::new();
    let path = "usr/share/skerry/release-keys.json";
    assert!(world.plan().root.get(path).is_none());
    let set = crate::trust::KeySet { counter: 7, keys: vec![[3; 32], [4; 32]] };
    world.request.trust = Some(set.clone());
    let read = crate::trust::KeySet::parse(&bytes(&world.plan().root, path)).unwrap();
    assert_eq!(read, set);
}

#[test]
fn the_initramfs_has_its_modules_unpacked_and_the_root_has_them_too() {
    let world = World::new();
    let plan = world.plan();
    let paths: Vec<&str> = plan
        .initramfs
        .iter()
        .filter(|(_, entry)| entry.node != Node::Folder)
        .map(|(path, _)| path)
        .collect();
    let expected = [
        "dev/console",
        "init",
        "lib/modules/6.1-x/kernel/drivers/bus.ko",
        "lib/modules/6.1-x/kernel/drivers/disk.ko",
        "lib/modules/6.1-x/skerry.index",
    ];
    assert_eq!(paths, expected);
    let index = bytes(&plan.initramfs, "lib/modules/6.1-x/skerry.index");
    let index = Index::decode(index).unwrap();
    assert!(index.resolve("pci:v1d1").len() == 1 && index.resolve("usb:v1p1").is_empty());
    let root = Index::decode(bytes(&plan.root, "usr/lib/modules/6.1-x/skerry.index")).unwrap();
    for id in root.modules() {
        let path = format!("usr/lib/modules/6.1-x/{}", root.path(id));
        assert!(plan.root.get(&path).is_some(), "{path} is there");
    }
    assert!(root.path(root.resolve("usb:v1p1")[0]).ends_with("net.ko.xz"));
    assert!(root.by_name("unused").is_none());
}

#[test]
fn the_boot_gets_kernel_loader_and_microcode_in_the_order_of_names() {
    let world = World::new();
    let plan = world.plan();
    assert_eq!(plan.boot.kernel.read().unwrap(), b"kernel");
    assert_eq!(plan.boot.stub.read().unwrap(), b"stub");
    assert_eq!(plan.boot.microcode[0].0, "kernel/x86/microcode/AuthenticAMD.bin");
    assert_eq!(plan.boot.microcode[0].1.read().unwrap(), b"onetwo");
    let names: Vec<&str> = plan.packages.iter().map(|locked| locked.name.as_str()).collect();
    let expected = [
        "boot",
        "ca-certificates",
        "engine",
        "firmware",
        "libc6",
        "libz1",
        "linux-image-6.1-x",
        "microcode",
    ];
    assert_eq!(names, expected, "what is used, and not the tools");
}

#[test]
fn a_debug_image_says_so_and_a_production_image_has_no_word_of_it() {
    let mut world = World::new();
    let production = world.plan();
    assert!(!production.os_release.contains("VARIANT"));
    world.request.variant = Variant::Debug;
    let debug = world.plan();
    assert!(debug.os_release.contains("\nVARIANT_ID=debug\n"));
    assert!(debug.root.get("usr/bin/debugger").is_some());
    assert_eq!(text(&debug.root, "usr/lib/os-release"), debug.os_release);
}

#[test]
fn two_gatherings_give_one_plan_also_when_the_cache_is_new() {
    let world = World::new();
    let (first, second) = (world.plan(), world.plan());
    for kept in ["unpacked", "kernels", "modules", "tools"] {
        fs::remove_dir_all(world.cache().folder().join(kept)).unwrap();
    }
    let third = world.plan();
    for other in [&second, &third] {
        assert_eq!(first.root, other.root);
        assert_eq!(first.initramfs, other.initramfs);
        assert_eq!(first.packages, other.packages);
    }
    let sbom = |plan: &Plan| crate::sbom::document(plan, &world.request).unwrap();
    assert_eq!(sbom(&first), sbom(&third));
    let document: serde_json::Value = serde_json::from_str(&sbom(&first)).unwrap();
    let files = document["files"].as_array().unwrap();
    assert_eq!(files.len(), first.files().count());
    let related = document["relationships"].as_array().unwrap();
    assert!(related.iter().any(|r| r["spdxElementId"] == "SPDXRef-package-engine"));
}

#[test]
fn a_damaged_cache_is_noticed_when_it_is_read() {
    let world = World::new();
    let plan = world.plan();
    let package = world.lock.find("engine", Arch::Amd64).unwrap();
    let file =
        world.cache().folder().join(format!("unpacked/{}/files/usr/bin/engine", package.sha256));
    let mut content = fs::read(&file).unwrap();
    content[40] ^= 1;
    fs::write(&file, content).unwrap();
    let error = plan.root.write_tar(io::sink(), 0).unwrap_err();
    assert!(error.to_string().contains("changed since"), "{error}");
}

#[test]
fn what_is_missing_is_named_before_anything_is_written() {
    let check = |change: &dyn Fn(&mut World), expected: &str| {
        let mut world = World::new();
        change(&mut world);
        let error = world.refused();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(inner) = source {
            text = format!("{text}: {inner}");
            source = inner.source();
        }
        assert!(text.contains(expected), "{text}");
    };
    check(
        &|w| w.catalogue = w.catalogue.replace("usr/bin/engine", "usr/bin/engines"),
        "package `engine` has no file that matches `usr/bin/engines`",
    );
    check(
        &|w| w.catalogue = w.catalogue.replace("\"net\"", "\"nett\""),
        "set `more` asks for module `nett`, which kernel 6.1-x does not have",
    );
    check(&|w| w.lock.packages.retain(|p| !p.kernel), "no kernel for amd64");
    check(
        &|w| w.lock.packages.retain(|p| p.name != "engine"),
        "package `engine` for amd64 is not in the lock file",
    );
    check(&|w| w.request.with = vec!["brocker".into()], "no feature `brocker`; there are `broker`");
    check(
        &|w| fs::remove_file(w.request.binaries.join("edgecore")).unwrap(),
        "edgecore` for amd64",
    );
    let write = |name: &'static str, bytes: Vec<u8>| {
        move |w: &mut World| fs::write(w.request.binaries.join(name), &bytes).unwrap()
    };
    check(&write("edgecore", elf_program(183, &[], None)), "it is built for Aarch64");
    check(&write("edgecore", b"text".to_vec()), "not a 64-bit little-endian ELF file");
    check(&write("skerry-init", elf_program(62, &["libc.so.6"], Some(LOADER))), "it is not static");
}

#[test]
fn an_image_for_the_other_architecture_says_what_it_lacks() {
    let mut world = World::new();
    world.request.arch = Arch::Arm64;
    let error = world.refused();
    assert!(error.to_string().contains("no program for arm64"), "{error}");
    assert!(error.hint().unwrap().contains("aarch64-unknown-linux-gnu"));
}

#[test]
fn a_library_that_no_package_has_is_named_with_its_program() {
    let mut world = World::new();
    let needs_more = elf_program(62, &["libgone.so.2"], Some(LOADER));
    fs::write(world.request.binaries.join("edgecore"), needs_more).unwrap();
    let error = world.try_plan().unwrap_err();
    let expected = format!(
        "`usr/bin/edgecore` needs library `{LIB}/libgone.so.2`, which no package of the catalogue has"
    );
    assert_eq!(error.to_string(), expected);
    world.request.version = "1 2".to_owned();
    assert!(matches!(world.try_plan(), Err(PlanError::Version(_))));
}

#[test]
fn container_images_go_along_under_names_that_files_can_have() {
    let mut world = World::new();
    let path = world.folder.path().join("till.tar");
    fs::write(&path, oci::pause(Arch::Amd64).content.read().unwrap()).unwrap();
    let plan = world.plan();
    let place = "usr/share/skerry/images/skerry.local_pause_1.tar";
    assert_eq!(bytes(&plan.root, place), fs::read(&path).unwrap());
    assert!(text(&plan.root, "etc/containerd/config.toml").contains(oci::PAUSE_NAME));
    world.request.images = vec![path.clone()];
    assert!(matches!(world.try_plan(), Err(PlanError::ImageTwice(_))));
    fs::write(&path, "no archive").unwrap();
    assert!(matches!(world.refused(), GatherError::Image { .. }));
}
