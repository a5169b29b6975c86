//! With Secure Boot on, a box starts the signed image and refuses one whose kernel is not signed.
//!
//! The firmware's variable store has keys of ours; the image was signed with one of them. On a second disk the kernel is
//! replaced by the unsigned one: it must not start.

use anyhow::{Context, Result, ensure};
use skerry_qemu_tests::console::{Bound, WaitError, Want};
use skerry_qemu_tests::disk::Disk;
use skerry_qemu_tests::image::{Image, UKI_FOLDER};
use skerry_qemu_tests::lab::{DISK_LENGTH, READY};
use skerry_qemu_tests::machine::{Boot, Plan};
use skerry_qemu_tests::nvram::{self, Keys};
use skerry_qemu_tests::scenario::Stage;

/// Time in which a machine that refuses must not have started the kernel; a willing one needs half of it.
const REFUSAL: Bound =
    Bound { cpu: std::time::Duration::from_secs(30), wall: std::time::Duration::from_secs(90) };

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let Some((signed, keys)) = &lab.inputs.signed else {
        return Err(stage.skip("no signed image was given (--signed, --keys)"));
    };
    let firmware = lab.firmware()?.clone();
    let code = firmware.secure_code.context("the firmware has no Secure Boot build")?;
    let template = std::fs::read(&firmware.vars)?;
    let store = nvram::with_secure_boot(&template, &Keys::read(keys)?)?;
    let image = Image::open(signed)?;
    let plan = |name: &str, disk: Disk| -> Result<Plan> {
        let vars = lab.file("vars.fd");
        std::fs::write(&vars, &store)?;
        let mut plan = lab.kernel_machine(name).disk(disk);
        plan.boot = Boot::Firmware { code: code.clone(), vars, secure: true };
        Ok(plan)
    };

    let name = "secure-boot";
    let disk = Disk::copy(&image.base(), &lab.file("disk.raw"), DISK_LENGTH)?;
    let machine = stage.boot(&lab.provisioned(plan(name, disk)?, &lab.site(name)?)?)?;
    stage.expect(&machine, "the signed image starts", Want::Word("verity"), READY)?;
    stage.expect(&machine, "and joins", Want::Word("ready"), READY)?;
    drop(machine);

    let disk = Disk::copy(&image.base(), &lab.file("disk.raw"), DISK_LENGTH)?;
    let (unsigned_name, unsigned) = lab.image.uki()?;
    let (signed_name, signed) = image.uki()?;
    ensure!(unsigned != signed, "the image that was given as signed is not signed");
    disk.volume("esp")?.write(&format!("{UKI_FOLDER}/{signed_name}"), &unsigned)?;
    stage.mark(format!("kernel replaced by the unsigned {unsigned_name}"));
    let machine = stage.boot(&plan("unsigned", disk)?)?;
    stage.ask("the unsigned kernel is refused", || {
        match machine.console().wait_any(0, &[Want::Word("boot"), Want::Word("stage0")], REFUSAL) {
            Err(WaitError::Late { .. } | WaitError::Off { .. }) => Ok(()),
            Err(error) => Err(error.into()),
            Ok((_, line)) => Err(anyhow::anyhow!("it started: {}", line.text)),
        }
    })?;
    stage
        .ask("the firmware says so", || {
            let wants = [
                Want::Text("Access Denied"),
                Want::Text("Access denied"),
                Want::Text("Security Violation"),
                Want::Text("Security violation"),
            ];
            Ok(machine.console().wait_any(0, &wants, REFUSAL)?)
        })
        .map(drop)
}
