//! A box without a site file joins when somebody plugs in a USB stick that has one.
//!
//! The stick is one FAT volume with the label SKERRYCFG and the file `site.toml`; it is there when the box starts.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::disk;
use skerry_qemu_tests::lab::{PATIENCE, READY};
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "usb-stick");
    let site = lab.site(name)?.text();
    let stick = disk::stick(&lab.file("stick.raw"), "site.toml", site.as_bytes())?;
    let plan = lab.kernel_machine(name).disk(lab.new_disk()?).stick(stick.clone());
    let machine = stage.boot(&plan)?;
    stage.expect(
        &machine,
        "the site file of the stick is found",
        Want::Saying("site", &["usb"]),
        READY,
    )?;
    stage.expect(&machine, "the console says `ready`", Want::Word("ready"), READY)?;
    stage.ask("the hub calls the node Ready", || {
        lab.hub.wait("Ready node", PATIENCE, |hub| Ok(hub.is_ready(name)?.then_some(())))
    })?;
    drop(machine);
    let token = site.lines().find(|line| line.starts_with("token")).unwrap_or_default().to_owned();
    let content = std::fs::read(&stick.path)?;
    let secret = token.trim_start_matches("token = ").trim_matches('"').as_bytes();
    let left = content.windows(secret.len()).any(|window| window == secret);
    stage.check("the used token is gone from the stick", !left)
}
