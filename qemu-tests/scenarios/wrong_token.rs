//! A box with a join token that the hub never made does not get in, and its console says why and what to do.

use super::parts;
use anyhow::Result;
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let name = "wrong-token";
    let mut site = stage.lab.site(name)?;
    // The signature's last letters, turned into others.
    let swapped: String =
        site.token.chars().rev().take(8).map(|c| if c == 'A' { 'B' } else { 'A' }).collect();
    site.token.truncate(site.token.len() - swapped.len());
    site.token.push_str(&swapped);
    parts::refused(stage, &site, &["token"])
}
