//! A change of the site that could cut the line: applied, and taken back unless the link proves it.
//!
//! The text before lies in [`BEFORE`] from before the change until the change is proved; whoever finds it there at a
//! start of the machine puts it back, so that neither a power cut nor a restart keeps a site that nobody can reach.
//! [`check`] says what is wrong with a text, [`Confirm`] when it is over; the owner of the loop applies it.

use crate::kernel::Kernel;
use crate::provision;
use crate::site::{self, Site};
use serde::Serialize;
use std::io;
use std::time::Duration;

/// The text before a change that is not proved yet.
pub const BEFORE: &str = "/state/site/before.toml";
/// Time for the link to come back.
pub const CONFIRM_MAX: Duration = Duration::from_secs(120);

/// Why a text is not applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// Another change is not proved yet.
    #[error("a change of the site is being tried")]
    Busy,
    /// There is nothing to change.
    #[error("this node was not told yet what it is for")]
    NoSite,
    /// Mistakes, with their lines.
    #[error("{0}")]
    Mistakes(String, String),
    /// The revision is not higher.
    #[error("revision {found} is not higher than {known}, which holds")]
    Revision {
        /// Of the text.
        found: u64,
        /// That holds.
        known: u64,
    },
    /// A node with another name is another node.
    #[error("the name of a node that has joined cannot be changed")]
    Name,
    /// It could not be kept.
    #[error("the site could not be written")]
    Write(#[source] io::Error),
}

impl ChangeError {
    /// What a person can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Busy => "wait two minutes".into(),
            Self::NoSite => "give it a site.toml on a stick first".into(),
            Self::Mistakes(_, hint) => hint.clone(),
            Self::Revision { .. } => "raise `revision`".into(),
            Self::Name => "leave `name` as it is; a new node is flashed anew".into(),
            Self::Write(_) => "the state partition is full or cannot be written".into(),
        }
    }
}

/// Reads a text that is to take the place of `known`.
///
/// # Errors
///
/// [`ChangeError`].
pub fn check(text: &str, known: Option<&Site>) -> Result<Site, ChangeError> {
    const SHOWN: usize = 4;
    let known = known.ok_or(ChangeError::NoSite)?;
    if text.len() > site::BYTES_MAX {
        let what = format!("a site.toml has at most {} bytes", site::BYTES_MAX);
        return Err(ChangeError::Mistakes(what, "make it shorter".into()));
    }
    let new = Site::parse(text).map_err(|error| {
        let shown = || error.mistakes.iter().take(SHOWN);
        let what: Vec<_> = shown().map(ToString::to_string).collect();
        let hints: Vec<_> = shown().map(|one| one.hint.clone()).collect();
        ChangeError::Mistakes(what.join("; "), hints.join("; "))
    })?;
    if new.node.name != known.node.name {
        return Err(ChangeError::Name);
    }
    if new.revision <= known.revision {
        return Err(ChangeError::Revision { found: new.revision, known: known.revision });
    }
    Ok(new)
}

/// Writes the new text where the node keeps it, with the one before beside it.
///
/// # Errors
///
/// [`ChangeError::Write`]; the old text holds then.
pub fn write(kernel: &dyn Kernel, text: &str) -> Result<(), ChangeError> {
    let old = kernel.read(provision::STORED, site::BYTES_MAX).map_err(ChangeError::Write)?;
    kernel.write(BEFORE, &old, 0o600).map_err(ChangeError::Write)?;
    let written = kernel.write(provision::STORED, text.as_bytes(), 0o600);
    written.inspect_err(|_| drop(revert(kernel))).map_err(ChangeError::Write)
}

/// Puts the text before back; `false` when there is none.
///
/// # Errors
///
/// What the system says; it is tried again at the next start.
pub fn revert(kernel: &dyn Kernel) -> io::Result<bool> {
    let Ok(before) = kernel.read(BEFORE, site::BYTES_MAX) else { return Ok(false) };
    kernel.write(provision::STORED, &before, 0o600)?;
    keep(kernel)?;
    Ok(true)
}

/// The new text holds.
///
/// # Errors
///
/// What the system says.
pub fn keep(kernel: &dyn Kernel) -> io::Result<()> {
    kernel.remove(BEFORE)?;
    kernel.flush("/state/site")
}

/// How a change ended, or that it has not; for the answer to `facts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// `trial`, `kept`, `reverted`.
    pub step: &'static str,
    /// Why, or empty.
    pub reason: String,
}

/// A change that is being tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirm {
    until: Duration,
    was_connected: bool,
}

impl Confirm {
    /// A change that was applied at `now`; `connected` is whether there was a link before.
    pub fn new(now: Duration, connected: bool) -> Self {
        Self { until: now + CONFIRM_MAX, was_connected: connected }
    }

    /// When it is over.
    pub fn until(&self) -> Duration {
        self.until
    }

    /// Whether it is proved (`Ok`) or to be taken back; `None` while it is open. `connected` is the word of an agent that
    /// was started with the new site.
    pub fn look(&self, now: Duration, connected: bool) -> Option<Result<&'static str, String>> {
        match (connected, now >= self.until) {
            (true, _) => Some(Ok("the link came back")),
            (false, false) => None,
            (false, true) if !self.was_connected => Some(Ok("there was no link before either")),
            (false, true) => {
                let seconds = CONFIRM_MAX.as_secs();
                Some(Err(format!("there was no link to the hub for {seconds} s after the change")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Machine;

    const SITE: &str = "revision = 1\n[node]\nname = \"edge-1\"\n[hub]\naddress = [\"wss://hub.example:10000\"]\n\
        enrol = \"https://hub.example:10002\"\n";

    #[test]
    fn change_is_refused_with_line_and_hint() {
        let known = Site::parse(SITE).unwrap();
        let refused = |text: &str| {
            let error = check(text, Some(&known)).unwrap_err();
            assert!(!error.hint().is_empty());
            error.to_string()
        };
        assert!(refused(&SITE.replace("address", "adress")).contains("line"));
        assert!(refused(SITE).contains("revision 1 is not higher than 1"));
        let newer = SITE.replace("revision = 1", "revision = 2");
        assert!(refused(&newer.replace("edge-1", "edge-2")).contains("name"));
        assert!(refused(&"#".repeat(site::BYTES_MAX + 1)).contains("at most"));
        assert_eq!(check(&newer, Some(&known)).unwrap().revision, 2);
        assert!(matches!(check(&newer, None), Err(ChangeError::NoSite)));
    }

    #[test]
    fn text_before_comes_back_wherever_the_power_was_cut() {
        for failing in ["write /state/site/before.toml", "write /state/site/site.toml", "none"] {
            let machine = Machine::new();
            machine.file(provision::STORED, b"old");
            machine.fail(failing, 5);
            let written = write(&machine, "new");
            assert_eq!(written.is_ok(), failing == "none");
            machine.heal();
            revert(&machine).unwrap();
            assert_eq!(machine.text(provision::STORED).as_deref(), Some("old"), "{failing}");
            assert!(!machine.exists(BEFORE) && !revert(&machine).unwrap());
        }
        let machine = Machine::new();
        machine.file(provision::STORED, b"old");
        write(&machine, "new").unwrap();
        keep(&machine).unwrap();
        assert!(!revert(&machine).unwrap());
        assert_eq!(machine.text(provision::STORED).as_deref(), Some("new"));
    }

    #[test]
    fn link_that_was_there_has_two_minutes_to_come_back() {
        let at = Duration::from_secs;
        let confirm = Confirm::new(at(10), true);
        assert_eq!(confirm.look(at(20), false), None);
        assert!(matches!(confirm.look(at(20), true), Some(Ok(_))));
        assert!(matches!(confirm.look(at(130), false), Some(Err(_))));
        assert!(matches!(Confirm::new(at(10), false).look(at(130), false), Some(Ok(_))));
    }
}
