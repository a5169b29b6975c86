//! A box with a join token that has expired does not get in, and its console says that it has expired.

use super::parts;
use anyhow::Result;
use skerry_qemu_tests::scenario::Stage;
use std::time::Duration;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "expired-token");
    let mut site = lab.site(name)?;
    site.token = lab.hub.token(name, "1s")?;
    std::thread::sleep(Duration::from_secs(2));
    parts::refused(stage, &site, &["expired", "token"])
}
