//! The image from real packages. Both tests need a mirror the first time and minutes of compression, so that they run
//! only when asked for:
//!
//! ```text
//! SKERRY_BINARIES=DIR cargo test -p skerry-image --test real -- --ignored --nocapture --test-threads 1
//! ```

use std::path::PathBuf;
use std::time::Instant;

use skerry_image::erofs::{self, Level};
use skerry_image::packages::{self, Arch, Cache, Catalogue, Lock, Source};
use skerry_image::progress::Progress;
use skerry_image::root::{self, Request, Variant};
use skerry_image::sbom;
use skerry_image::tree::Node;
use skerry_init::modindex::{self, Index};

struct Steps(Instant);

impl Progress for Steps {
    fn step(&self, text: &str) {
        println!("{:7.2} {text}", self.0.elapsed().as_secs_f64());
    }
}

fn cache() -> Cache {
    let folder = std::env::var_os("SKERRY_CACHE").map(PathBuf::from);
    let folder = folder.or_else(Cache::default_folder).expect("HOME is set");
    Cache::open(folder).expect("the cache folder can be made")
}

fn request() -> Request {
    let variable = |name: &str| std::env::var(name).ok();
    Request {
        arch: variable("SKERRY_ARCH").map_or(Arch::Amd64, |arch| arch.parse().unwrap()),
        variant: match variable("SKERRY_VARIANT").as_deref() {
            Some("debug") => Variant::Debug,
            _ => Variant::Production,
        },
        version: "0.1.0".to_owned(),
        epoch: 1_795_222_383,
        release_counter: 1,
        trust: None,
        binaries: variable("SKERRY_BINARIES").expect("SKERRY_BINARIES is set").into(),
        images: Vec::new(),
        with: variable("SKERRY_WITH")
            .map_or(Vec::new(), |with| with.split(',').map(str::to_owned).collect()),
    }
}

/// What a machine, the kernel or a CNI plugin asks for has to be found in the index of the root.
fn check_modules(plan: &root::Plan) {
    let path = format!("usr/lib/modules/{}/{}", plan.uname, modindex::FILE_NAME);
    let Some(Node::File(content)) = plan.root.get(&path).map(|entry| &entry.node) else {
        panic!("no {path}");
    };
    let started = Instant::now();
    let index = Index::decode(content.read().unwrap()).unwrap();
    println!("index: {} modules, {} bytes, {:?}", index.len(), content.size(), started.elapsed());
    for (alias, expected) in [
        ("virtio:d00000001v00001AF4", "virtio_net"),
        ("virtio:d00000002v00001AF4", "virtio_blk"),
        ("pci:v00008086d000015B8sv00001028sd000006B9bc02sc00i00", "e1000e"),
        ("pci:v00008086d0000100Esv00001AF4sd00001100bc02sc00i00", "e1000"),
        ("pci:v000010ECd00008168sv00001043sd00008554bc02sc00i00", "r8169"),
        ("pci:v0000144Dd0000A808sv0000144Dsd0000A801bc01sc08i02", "nvme"),
        ("pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01", "ahci"),
        ("usb:v0BDAp8153d3000dc00dsc00dp00icFFiscFFip00in00", "r8152"),
        ("usb:v0781p5567d0100dc00dsc00dp00ic08isc06ip50in00", "usb_storage"),
        ("acpi:QEMU0002:", "qemu_fw_cfg"),
        ("fs-ext4", "ext4"),
        ("fs-vfat", "vfat"),
        ("crypto-crc32c", "crc32c_generic"),
        ("net-pf-16-proto-12", "nfnetlink"),
        ("nfnetlink-subsys-10", "nf_tables"),
        ("nft-chain-2-nat", "nft_chain_nat"),
        ("ipt_MASQUERADE", "xt_MASQUERADE"),
        ("ipt_tcp", "xt_tcpudp"),
        ("ipt_DNAT", "xt_nat"),
        ("rtnl-link-veth", "veth"),
        ("dm-crypt", "dm_crypt"),
    ] {
        let found: Vec<&str> = index.resolve(alias).iter().map(|id| index.name(*id)).collect();
        assert!(found.contains(&expected), "{alias}: {found:?}");
    }
    let ext4 = index.by_name("ext4").unwrap();
    let order: Vec<&str> = index.load_order(ext4).map(|step| index.name(step.module)).collect();
    assert!(order.contains(&"crc32c_generic") && order.last() == Some(&"ext4"), "{order:?}");
}

/// With `SKERRY_LOCK=write` the lock file of the sources is moved forward.
#[test]
#[ignore = "asks a mirror"]
fn the_lock_file_can_be_moved_forward_for_both_architectures() {
    let (catalogue, old) = (Catalogue::embedded(), Lock::embedded());
    let steps = Steps(Instant::now());
    let source = Source::default();
    let new =
        packages::lock(&catalogue, Some(&old), &Arch::ALL, &cache(), &source, &steps).unwrap();
    assert_eq!(Lock::parse(&new.text()).unwrap(), new);
    for arch in Arch::ALL {
        assert!(new.kernel(arch).is_some());
    }
    if std::env::var("SKERRY_LOCK").as_deref() == Ok("write") {
        std::fs::write("packages.lock", new.text()).unwrap();
    }
}

#[test]
#[ignore = "asks a mirror"]
fn a_mirror_signed_by_another_key_and_a_version_that_is_gone_are_refused() {
    let (catalogue, mut lock, steps) =
        (Catalogue::embedded(), Lock::embedded(), Steps(Instant::now()));
    let folder = tempfile::tempdir().unwrap();
    let fresh = Cache::open(folder.path()).unwrap();
    let keyring = "/usr/share/keyrings/debian-archive-removed-keys.gpg";
    let other = Source { keyring: Some(keyring.into()), ..Source::default() };
    let error =
        packages::lock(&catalogue, None, &[Arch::Amd64], &fresh, &other, &steps).unwrap_err();
    let text = format!("{error:?}");
    assert!(text.contains("NO_PUBKEY") || text.contains("not signed"), "{text}");

    let netbase = lock.packages.iter_mut().find(|p| p.name == "netbase").unwrap();
    netbase.version = "1.0-0".to_owned();
    netbase.sha256 = "0".repeat(64);
    let names = ["netbase".to_owned()];
    let source = Source::default();
    let error = packages::fetch(&lock, Arch::Amd64, &names, &fresh, &source, &steps).unwrap_err();
    assert_eq!(error.to_string(), "no longer on the mirror: `netbase` 1.0-0");
    assert!(error.hint().unwrap().contains("skerry image lock"));
}

#[test]
#[ignore = "fetches packages and compresses them twice"]
fn two_builds_of_the_real_root_are_equal_and_keep_the_promises() {
    let (catalogue, lock, cache, request) =
        (Catalogue::embedded(), Lock::embedded(), cache(), request());
    let steps = Steps(Instant::now());
    let source = Source::default();
    let gather = || root::gather(&request, &catalogue, &lock, &cache, &source, &steps);
    let inputs = gather().unwrap_or_else(|e| panic!("{e:?}, hint: {:?}", e.hint()));
    steps.step("gathered");
    let plan = root::plan(&request, &catalogue, &inputs).unwrap();
    steps.step("planned");
    println!(
        "root: {} entries, {} bytes; initramfs: {} entries, {} bytes; executables: {:?}",
        plan.root.len(),
        plan.root.bytes(),
        plan.initramfs.len(),
        plan.initramfs.bytes(),
        plan.executables()
    );
    if request.variant == Variant::Production {
        assert!(plan.executables().len() <= 30);
        assert!(plan.root.get("usr/bin/sh").is_none(), "no shell");
        assert!(!plan.executables().iter().any(|path| path.contains("apt")), "no package manager");
    }
    for (path, entry) in plan.root.iter() {
        assert!(!matches!(entry.node, Node::File(_)) || entry.mode & 0o6000 == 0, "{path}");
    }
    if request.arch == Arch::Amd64 {
        check_modules(&plan);
    }
    let document = sbom::document(&plan, &request).unwrap();
    assert_eq!(document.matches("://").count(), 1, "no address but its own namespace");
    steps.step(&format!("wrote an SBOM of {} bytes", document.len()));

    let folder = tempfile::tempdir().unwrap();
    let level = match std::env::var("SKERRY_LEVEL").as_deref() {
        Ok("full") => Level::Full,
        _ => Level::Quick,
    };
    let out = folder.path().join("root.erofs");
    let write = |cache: &Cache| {
        erofs::write(&plan.root, &out, level, request.epoch, &inputs.tools, cache, &steps).unwrap()
    };
    let first = write(&cache);
    steps.step(&format!("wrote the root: {} bytes, cached: {}", first.size, first.cached));
    if std::env::var_os("SKERRY_SIZES").is_some() {
        for row in plan.sizes().unwrap() {
            println!("{:>9} {:>10} {:>4} {}", row.packed, row.bytes, row.files, row.part);
        }
    }
    let again = root::plan(&request, &catalogue, &gather().unwrap()).unwrap();
    assert_eq!(
        (again.root.digest(), again.initramfs.digest()),
        (plan.root.digest(), plan.initramfs.digest())
    );
    assert_eq!(sbom::document(&again, &request).unwrap(), document);
    if first.cached {
        return;
    }
    let elsewhere = Cache::open(folder.path().join("cache")).unwrap();
    let second = write(&elsewhere);
    assert_eq!(second.sha256, first.sha256, "two builds give the same bytes");
}
