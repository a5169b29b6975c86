//! A box that reaches a hub with another authority than it was told does not trust it, and its console says so.
//!
//! The digest of the authority in the site file, and in the token, is not that of the hub that answers: a misdirected or
//! impersonated hub looks like this.

use super::parts;
use anyhow::Result;
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let mut site = stage.lab.site("wrong-ca")?;
    let other = "5".repeat(64);
    site.ca_hash = Some(format!("sha256:{other}"));
    if let Some((_, jwt)) = site.token.split_once('.') {
        site.token = format!("{other}.{jwt}");
    }
    parts::refused(stage, &site, &["authority", "certificate", "ca"])
}
