//! A virtual machine joins with a site file that its hypervisor puts into the firmware's tables (SMBIOS type 11).
//!
//! The file is base64, since QEMU splits at commas.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::{PATIENCE, READY};
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "smbios");
    let site = lab.site(name)?.text();
    let mut plan = lab.kernel_machine(name).disk(lab.new_disk()?);
    let value = base64(site.as_bytes());
    plan.oem_strings.push(format!("io.systemd.credential.binary:skerry.site={value}"));
    let machine = stage.boot(&plan)?;
    stage.expect(&machine, "the console says `ready`", Want::Word("ready"), READY)?;
    stage.ask("the hub calls the node Ready", || {
        lab.hub.wait("Ready node", PATIENCE, |hub| Ok(hub.is_ready(name)?.then_some(())))
    })
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| (word << 8) | u32::from(*byte));
        let word = word << (8 * (3 - chunk.len()));
        for index in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * index)) as usize & 63];
            text.push(if index <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_pads() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v")] {
            assert_eq!(super::base64(plain.as_bytes()), coded);
        }
    }
}
