//! A box that was given a new version which cannot start goes back to the version before by itself, and says so.
//!
//! The box joins and calls its version good: the counter in the file's name goes away. Then a newer file is put beside it
//! whose root is not on the disk, with one try: it is started once, and the next start is the old version. Last, a newer
//! file whose second half is missing, at which the boot loader gives up: the firmware starts the last good version.

use anyhow::{Context, Result, ensure};
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::disk::Disk;
use skerry_qemu_tests::image::UKI_FOLDER;
use skerry_qemu_tests::lab::{READY, SHUTDOWN};
use skerry_qemu_tests::scenario::Stage;
use skerry_qemu_tests::uki;

/// Bytes that are left of a kernel that was cut: its header says that there are more.
const CUT: usize = 6 << 20;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "bad-version");
    let disk = lab.new_copy()?;
    let version = lab.image.version()?;
    let good = format!("skerry_{version}.efi");
    let (first, kernel) = lab.image.uki()?;
    stage.check("a new image has tries in the name of its file", first.contains("+3"))?;
    let plan = lab.firmware_machine(name)?.disk(disk.clone());
    let mut machine = stage.boot(&lab.provisioned(plan.clone(), &lab.site(name)?)?)?;
    stage.expect(&machine, "the box joins", Want::Word("ready"), READY)?;
    let said = Want::Saying("boot", &["is good"]);
    stage.expect(&machine, "the running version is called good", said, READY)?;
    stage.ask("the power button switches it off", || machine.power_off(SHUTDOWN))?;
    stage.ask("its file is not counted any more", || {
        let names = names(&disk)?;
        ensure!(names == [good.as_str()], "there are {}", names.join(", "));
        Ok(())
    })?;

    let newer = with_version(&kernel, &version, '9', true)?;
    disk.volume("esp")?.write(&format!("{UKI_FOLDER}/skerry_9+1.efi"), &newer)?;
    stage.mark("a newer version, whose root is not there, with one try");
    let mut machine = stage.boot(&plan)?;
    stage.expect(&machine, "it is started, and cannot go on", Want::Word("emergency"), READY)?;
    stage.ask("it restarts by itself", || Ok(machine.console().wait_off(READY)?))?;
    machine.wait()?;
    stage.ask("the start was counted", || {
        let names = names(&disk)?;
        ensure!(names.iter().any(|name| name == "skerry_9+0-1.efi"), "{}", names.join(", "));
        Ok(())
    })?;
    let mut machine = stage.boot(&plan)?;
    let line = stage.expect(&machine, "the old version is back", Want::Word("ready"), READY)?;
    stage.figure("back_cpu_s", line.cpu_s, "CPU s");
    let said = Want::Saying("problem", &["did not start"]);
    stage.expect(&machine, "and says what was not started", said, READY)?;
    stage.ask("the power button switches it off", || machine.power_off(SHUTDOWN))?;

    let mut cut = with_version(&kernel, &version, '8', false)?;
    cut.truncate(CUT);
    disk.volume("esp")?.write(&format!("{UKI_FOLDER}/skerry_8+3.efi"), &cut)?;
    stage.mark("a newer version whose file is cut");
    let machine = stage.boot(&plan)?;
    stage.expect(&machine, "the firmware starts the last good version", Want::Word("ready"), READY)?;
    stage.ask("the loader had tried the new one first", || {
        let names = names(&disk)?;
        ensure!(names.iter().any(|name| name == "skerry_8+2-1.efi"), "{}", names.join(", "));
        Ok(())
    })
}

fn names(disk: &Disk) -> Result<Vec<String>> {
    disk.volume("esp")?.list(UKI_FOLDER)
}

/// The kernel as one of a newer version: its first character is another one. `lost` also names another root.
fn with_version(kernel: &[u8], version: &str, first: char, lost: bool) -> Result<Vec<u8>> {
    let mut kernel = kernel.to_vec();
    let newer = format!("{first}{}", version.get(1..).context("a version is plain text")?);
    for key in ["IMAGE_VERSION", "VERSION_ID"] {
        let (from, to) = (format!("{key}={version}"), format!("{key}={newer}"));
        ensure!(uki::replace(&mut kernel, ".osrel", &from, &to)? > 0, "no `{from}`");
    }
    let (from, to) = (format!("skerry.version={version}"), format!("skerry.version={newer}"));
    uki::replace(&mut kernel, ".cmdline", &from, &to)?;
    if lost {
        let cmdline = uki::parts(&kernel)?.cmdline;
        let verity = cmdline.split_whitespace().find(|word| word.starts_with("skerry.verity="));
        let hash = verity.and_then(|word| word.split(',').nth(2)).context("no root hash")?;
        let other: String = hash.chars().rev().collect();
        ensure!(other != hash, "the root hash is the same backwards");
        uki::replace(&mut kernel, ".cmdline", hash, &other)?;
    }
    Ok(kernel)
}
