//! Which OS version an appliance should run: what Git says, what its Node is told, and what it answers.
//!
//! A channel is an [`OsReleaseFile`] of the repository; a site names one (`spec.osChannel`) and may say when its machines are
//! allowed to restart ([`OsPolicy`]). The reconciler puts an [`OsOrder`] on each Node of the site ([`ORDER_ANNOTATION`]), so
//! that it goes to the node like everything else, is kept there, and is carried out also when the link is away. The
//! node answers with an [`OsProgress`] ([`PROGRESS_ANNOTATION`]).

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Annotation of a Node: an [`OsOrder`], JSON. Written by the reconciler.
pub const ORDER_ANNOTATION: &str = "fleet.skerry.dev/os";
/// Annotation of a Node: an [`OsProgress`], JSON. Written by the node.
pub const PROGRESS_ANNOTATION: &str = "skerry.dev/os-update";
/// Annotation of a Node: the version of the image that runs, written by the node.
pub const VERSION_ANNOTATION: &str = "skerry.dev/image-version";

/// Windows that a site may have.
pub const WINDOWS_MAX: usize = 64;
/// Longest name of a version.
pub const VERSION_LEN_MAX: usize = 64;

/// The version that a channel stands for; `skerry image publish` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OsReleaseSpec {
    /// The version's name, at most [`VERSION_LEN_MAX`] of letters, digits, `.`, `-`, `_` and `~`.
    pub version: String,
    /// Its release counter. An appliance takes no version with a lower one than it has had.
    pub counter: u64,
    /// `sha256:…` of its manifest.
    pub digest: Digest,
    /// What its kernel carries: the verdict (`qualified`, `degraded`, `unsupported`) of each profile of `skerry qualify`. A site
    /// does not get a version whose kernel does not carry its network. Empty: nothing is known, and nothing is stopped.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kernel: BTreeMap<String, String>,
    /// Which keys may sign versions from now on, when that changes; `skerry image trust` makes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<KeyStatement>,
    /// Not yet: waves and gates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<serde_json::Value>,
}

/// Which keys may sign versions, signed by one that may now. Nodes check it; nobody on the way can.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeyStatement {
    /// The text that is signed, byte for byte.
    pub statement: String,
    /// Ed25519, hexadecimal.
    pub signature: String,
}

/// When the machines of a site may change their version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OsPolicy {
    /// Nothing changes as long as this is true. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<bool>,
    /// Times at which a machine may restart for a new version; it is fetched before. Default: always.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub windows: Vec<Window>,
    /// Time zone of the windows, as in `Europe/Lisbon`. Default: UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Most bytes a second that one node fetches at. Default: no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
}

/// A time of the week.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Window {
    /// Days on which it begins; empty is every day.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub days: Vec<Day>,
    /// When it begins.
    pub from: ClockTime,
    /// When it ends; a time that is not after `from` is on the next day.
    pub to: ClockTime,
}

/// A day of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // seven words
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

impl Day {
    /// By number, from 0 for Monday; counted round the week.
    pub fn of_number(number: u8) -> Self {
        [Self::Mon, Self::Tue, Self::Wed, Self::Thu, Self::Fri, Self::Sat, Self::Sun]
            [usize::from(number % 7)]
    }
}

/// Minutes of a day in a week, as a clock on the wall shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// From 0 for Monday to 6.
    pub day: u8,
    /// From 0 to 1439.
    pub minute: u16,
}

impl Window {
    /// Whether it is open at this moment.
    pub fn is_open(&self, at: Moment) -> bool {
        let begins = |day: u8| self.days.is_empty() || self.days.contains(&Day::of_number(day));
        let (from, to) = (self.from.0, self.to.0);
        if from < to {
            return begins(at.day) && (from..to).contains(&at.minute);
        }
        (begins(at.day) && at.minute >= from) || (begins((at.day + 6) % 7) && at.minute < to)
    }
}

/// `HH:MM`, from 00:00 to 23:59; minutes since midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClockTime(u16);

impl TryFrom<String> for ClockTime {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let read = || {
            let (hours, minutes) = text.split_once(':')?;
            let digits =
                |part: &str| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_digit());
            let (hours, minutes) = match digits(hours) && digits(minutes) {
                true => (hours.parse::<u16>().ok()?, minutes.parse::<u16>().ok()?),
                false => return None,
            };
            (hours < 24 && minutes < 60).then_some(Self(hours * 60 + minutes))
        };
        read().ok_or_else(|| format!("`{}` is no time of the day, as in \"02:30\"", short(&text)))
    }
}

impl From<ClockTime> for String {
    fn from(time: ClockTime) -> Self {
        time.to_string()
    }
}

impl fmt::Display for ClockTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

/// `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// The hexadecimal digits.
    pub fn hex(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let hex = text.strip_prefix("sha256:").unwrap_or_default();
        match hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            true => Ok(Self(hex.to_owned())),
            false => Err(format!("`{}` is not `sha256:` and 64 hexadecimal digits", short(&text))),
        }
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Whether a text can be a version.
pub fn is_version(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_~".contains(&byte);
    (1..=VERSION_LEN_MAX).contains(&text.len()) && text.bytes().all(allowed)
}

/// What a node should run, and when it may change to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OsOrder {
    /// The channel, for people.
    pub channel: String,
    /// See [`OsReleaseSpec::version`].
    pub version: String,
    /// See [`OsReleaseSpec::counter`].
    pub counter: u64,
    /// See [`OsReleaseSpec::digest`].
    pub digest: Digest,
    /// See [`OsReleaseSpec::trust`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<KeyStatement>,
    /// When.
    #[serde(default)]
    pub policy: OsPolicy,
}

/// How far a node is with its order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OsProgress {
    /// The version that the node is on the way to, or has refused; empty: none is ordered.
    pub version: String,
    /// Where it is.
    pub step: OsStep,
    /// Of the present step; only of those that last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// Why it does not go on, a sentence; may be empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// What a person can do; may be empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hint: String,
}

/// Where a node is with its order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OsStep {
    /// It runs what is ordered, or nothing is.
    #[default]
    Current,
    /// The site holds everything back.
    Held,
    /// It fetches.
    Fetching,
    /// Everything is there; it waits for a window.
    Waiting,
    /// The other slot is written.
    Installing,
    /// It restarts, or has restarted and proves itself.
    Trial,
    /// It was given up, see the reason; the version from before runs.
    Failed,
}

impl OsStep {
    /// As people and JSON have it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Held => "held",
            Self::Fetching => "fetching",
            Self::Waiting => "waiting",
            Self::Installing => "installing",
            Self::Trial => "trial",
            Self::Failed => "failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn window(text: serde_json::Value) -> Window {
        serde_json::from_value(text).expect("a window")
    }

    #[test]
    fn windows_are_open_from_their_first_minute_to_before_their_last_also_over_midnight() {
        let check = |window: &Window, day: u8, time: &str, expected: bool| {
            let minute = ClockTime::try_from(time.to_owned()).expect("a time").0;
            assert_eq!(window.is_open(Moment { day, minute }), expected, "day {day} {time}");
        };
        let night = window(json!({"days": ["sat"], "from": "22:00", "to": "04:30"}));
        check(&night, 5, "21:59", false);
        check(&night, 5, "22:00", true);
        check(&night, 6, "04:29", true);
        check(&night, 6, "04:30", false);
        check(&night, 6, "22:00", false);
        check(&night, 5, "03:00", false);
        let noon = window(json!({"from": "12:00", "to": "13:00"}));
        check(&noon, 0, "12:59", true);
        check(&noon, 0, "13:00", false);
        let sunday = window(json!({"days": ["sun"], "from": "23:00", "to": "01:00"}));
        check(&sunday, 0, "00:59", true);
        let always = window(json!({"from": "00:00", "to": "00:00"}));
        check(&always, 3, "15:00", true);
    }

    #[test]
    fn times_and_digests_that_are_none_are_refused_in_words() {
        for bad in ["2:30", "24:00", "12:60", "12", "", "ab:cd", "12:3é", "+1:00"] {
            assert!(ClockTime::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        let hex = "ab".repeat(32);
        assert_eq!(Digest::try_from(format!("sha256:{hex}")).expect("a digest").hex(), hex);
        for bad in
            [hex.clone(), format!("sha256:{}", &hex[1..]), format!("sha256:{}", hex.to_uppercase())]
        {
            assert!(Digest::try_from(bad).is_err());
        }
        assert!(
            is_version("1.2.3-rc~1_a")
                && !is_version("")
                && !is_version("a/b")
                && !is_version("a b")
        );
    }

    #[test]
    fn what_goes_to_a_node_and_back_reads_as_it_was_written() {
        let order: OsOrder = serde_json::from_value(json!({"channel": "stable", "version": "2", "counter": 2,
            "digest": format!("sha256:{}", "0".repeat(64)), "policy": {"windows": [{"from": "01:00", "to": "02:00"}]}}))
        .expect("an order");
        let text = serde_json::to_string(&order).expect("text");
        assert_eq!(serde_json::from_str::<OsOrder>(&text).expect("again"), order);
        assert!(text.contains(r#""windows":[{"from":"01:00","to":"02:00"}]"#), "{text}");
        let progress =
            OsProgress { step: OsStep::Failed, reason: "why".into(), ..OsProgress::default() };
        let text = serde_json::to_string(&progress).expect("text");
        assert_eq!(text, r#"{"version":"","step":"failed","reason":"why"}"#);
    }
}
