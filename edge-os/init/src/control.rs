//! What is said on `/run/skerry/init.sock`: one JSON object a line, from root only.
//!
//! `{"beat":{…}}` every ten seconds from the agent, `{"reboot":{"reason":"…"}}`, `{"poweroff":{"reason":"…"}}`,
//! `{"token-used":true}` after the node has joined, and `{"facts":{}}`, which is answered by one line. Orders are answered
//! as well: `{"update":{"dir":"…","pods":[…],"connected":true}}`, `{"rollback":{"reason":"…"}}`,
//! `{"site":{"text":"…"}}`, `{"trust":{"statement":"…","signature":"hex"}}`, `{"boot-file":{"dir":"…"}}` (which puts the running
//! version's boot file there, as `running.efi`, so that the agent need not fetch what it has), each with `{"update":{"accepted":true}}`
//! (or its own word) or `{"error":"…","hint":"…"}`. During a trial a beat says `"trial":{"missing":["ns/name: why",…]}`. A
//! line that is none of these is answered by `{"error":"…"}`. Pure: sockets are [`crate::stage1`]'s.

use crate::confirm;
use crate::console::{Problem, plain};
use crate::supervise::Beat;
use crate::update::{Releases, Status, TrialFacts};
use serde::{Deserialize, Serialize};

/// Where PID 1 listens.
pub const SOCKET: &str = "/run/skerry/init.sock";
/// Clients at a time; one more is closed at once.
pub const CLIENTS_MAX: usize = 16;
/// Longest line, which a whole site.toml fits into however it is escaped; a client that sends a longer one is closed.
pub const LINE_LEN_MAX: usize = 256 * 1024;

/// A line from a client.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// The agent lives.
    Beat(BeatLine),
    /// Start the machine again.
    Reboot(Reason),
    /// Power it off.
    Poweroff(Reason),
    /// The token was used.
    TokenUsed(bool),
    /// How is the machine?
    Facts(Nothing),
    /// Take another version.
    Update(UpdateLine),
    /// Go back to the version before.
    Rollback(Reason),
    /// Try another site.
    Site(SiteLine),
    /// Trust other release keys.
    Trust(TrustLine),
    /// Put the boot file of the running version where it can be read.
    BootFile(FolderLine),
}

/// A folder of `/state/update`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct FolderLine {
    /// Named after the digest of a manifest.
    pub dir: String,
}

/// An update that lies ready.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct UpdateLine {
    /// Folder of `/state/update`, named after the digest of its manifest.
    pub dir: String,
    /// Pods that run now, `namespace/name`.
    #[serde(default)]
    pub pods: Vec<String>,
    /// There is a link to the hub now.
    #[serde(default)]
    pub connected: bool,
}

/// A site that is to be tried.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct SiteLine {
    /// All of its site.toml.
    pub text: String,
}

/// A key statement; see [`crate::trust`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct TrustLine {
    /// The text that was signed.
    pub statement: String,
    /// Ed25519, hexadecimal.
    pub signature: String,
}

/// What the agent says about the trial of a new version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct TrialLine {
    /// Pods that ran before and neither run nor wait for a known reason, `namespace/name: why`.
    pub missing: Vec<String>,
}

/// No fields yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Nothing {}

/// Why the machine is to end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Reason {
    /// For the console and for the log.
    pub reason: String,
}

/// The agent's sign of life.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct BeatLine {
    /// There is a link.
    pub connected: bool,
    /// The cluster has taken the Node.
    pub registered: bool,
    /// Pods that run.
    pub pods: u32,
    /// What keeps it from the above, one sentence.
    pub problem: String,
    /// What a person can do about it.
    pub hint: String,
    /// How the trial of a new version is.
    pub trial: Option<TrialLine>,
}

impl From<BeatLine> for Beat {
    fn from(line: BeatLine) -> Self {
        let problem = (!line.problem.is_empty())
            .then(|| Problem::new(plain(&line.problem), plain(&line.hint)));
        Self { connected: line.connected, registered: line.registered, pods: line.pods, problem }
    }
}

/// The answer to `facts`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// Version of the image.
    pub version: String,
    /// `production` or `debug`.
    pub variant: String,
    /// Id of this boot.
    pub boot_id: String,
    /// Where the site came from.
    pub source: String,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Seconds since the machine started.
    pub uptime_s: u64,
    /// Where the time came from.
    pub clock: String,
    /// Which root runs.
    pub slot: String,
    /// How the state is: `kept`, `new`, `degraded` or `memory`.
    pub state: String,
    /// How far an update is.
    pub update: Option<Status>,
    /// The versions of this machine.
    pub releases: Releases,
    /// What the trial of a new version waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trial: Option<TrialFacts>,
    /// How the last change of the site went.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site: Option<confirm::Status>,
}

/// Reads a line.
///
/// # Errors
///
/// What is wrong with it, for the answer.
pub fn parse(line: &[u8]) -> Result<Request, String> {
    serde_json::from_slice(line).map_err(|error| error.to_string())
}

/// The answer to a line that could not be read.
pub fn refusal(what: &str) -> String {
    serde_json::json!({ "error": what }).to_string()
}

/// The answer to an order: that it was accepted, or why not.
pub fn answer(word: &str, refused: Result<(), (String, String)>) -> String {
    match refused {
        Ok(()) => serde_json::json!({ word: { "accepted": true } }).to_string(),
        Err((error, hint)) => serde_json::json!({ "error": error, "hint": hint }).to_string(),
    }
}

/// What a client has sent and is not a whole line yet.
#[derive(Debug, Default)]
pub struct Lines(Vec<u8>);

impl Lines {
    /// Adds bytes and returns the lines that are whole.
    ///
    /// # Errors
    ///
    /// A line is longer than [`LINE_LEN_MAX`].
    pub fn take(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, &'static str> {
        self.0.extend_from_slice(bytes);
        let mut lines = Vec::new();
        while let Some(end) = self.0.iter().position(|byte| *byte == b'\n') {
            let mut line: Vec<u8> = self.0.drain(..=end).collect();
            line.pop();
            if line.len() > LINE_LEN_MAX {
                return Err("line too long");
            }
            if !line.is_empty() {
                lines.push(line);
            }
        }
        if self.0.len() > LINE_LEN_MAX { Err("line too long") } else { Ok(lines) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_of_the_contract_is_read() {
        let beat = parse(br#"{"beat":{"connected":true,"pods":3}}"#).expect("a beat");
        let Request::Beat(line) = beat else { panic!("{beat:?}") };
        let beat = Beat::from(line);
        assert!(beat.connected && !beat.registered && beat.pods == 3 && beat.problem.is_none());
        let reason = || Reason { reason: "kernel".into() };
        assert_eq!(parse(br#"{"reboot":{"reason":"kernel"}}"#), Ok(Request::Reboot(reason())));
        assert_eq!(parse(br#"{"poweroff":{"reason":"kernel"}}"#), Ok(Request::Poweroff(reason())));
        assert_eq!(parse(br#"{"token-used":true}"#), Ok(Request::TokenUsed(true)));
        assert_eq!(parse(br#"{"facts":{}}"#), Ok(Request::Facts(Nothing {})));
        let update =
            parse(br#"{"update":{"dir":"/state/update/x","pods":["a/b"],"connected":true}}"#);
        let wanted =
            UpdateLine { dir: "/state/update/x".into(), pods: vec!["a/b".into()], connected: true };
        assert_eq!(update, Ok(Request::Update(wanted)));
        assert_eq!(parse(br#"{"rollback":{"reason":"kernel"}}"#), Ok(Request::Rollback(reason())));
        let text = || SiteLine { text: "x".into() };
        assert_eq!(parse(br#"{"site":{"text":"x"}}"#), Ok(Request::Site(text())));
        let trust = TrustLine { statement: "s".into(), signature: "00".into() };
        let parsed = parse(br#"{"trust":{"statement":"s","signature":"00"}}"#);
        assert_eq!(parsed, Ok(Request::Trust(trust)));
        let beat = parse(br#"{"beat":{"connected":true,"trial":{"missing":["a/b: x"]}}}"#);
        let Ok(Request::Beat(line)) = beat else { panic!("{beat:?}") };
        assert_eq!(line.trial, Some(TrialLine { missing: vec!["a/b: x".into()] }));
        assert_eq!(answer("update", Ok(())), r#"{"update":{"accepted":true}}"#);
        for bad in [r#"{"update":{}}"#, "", "{}", "[]", r#"{"rm":{}}"#, r#"{"beat":{}} x"#, "\u{0}"]
        {
            let error = parse(bad.as_bytes()).expect_err("no request");
            assert!(refusal(&error).starts_with(r#"{"error":"#));
        }
    }

    #[test]
    fn lines_are_put_together_and_long_ones_refused() {
        let mut lines = Lines::default();
        assert_eq!(lines.take(b"ab"), Ok(vec![]));
        assert_eq!(lines.take(b"c\n\nd\ne"), Ok(vec![b"abc".to_vec(), b"d".to_vec()]));
        assert!(lines.take(&vec![b'x'; LINE_LEN_MAX + 1]).is_err());
    }
}
