//! Rules at the node: what [`Rules`] decide becomes things to do for the twin task, and what happened is written down.
//!
//! The log is a file of JSON lines, `rules.log` in the agent's folder, for whoever stands at the machine: two files of
//! [`LOG_LEN_MAX`] at most. It is written as it happens, without waiting for the disk; rules begin a few times a minute
//! at most. What the log cannot take is in the agent's own log.
//!
//! The twin task is the only caller.

use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_edge_core::event::EventReport;
use skerry_edge_core::rules::{Output, RuleLimits, Rules, Told};
use skerry_edge_core::twin::Id;
use skerry_protocol::ResourcePath;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Bytes of the log after which the next file begins; there are two.
const LOG_LEN_MAX: u64 = 512 * 1024;

/// What the twin task has to do for a rule.
#[derive(Debug)]
pub(crate) enum Doing {
    Tell(Box<EventReport>),
    Set { rule: Id, device: String, property: String, value: String },
    Publish { rule: Id, topic: String, payload: String },
    Restart { rule: Id, workload: String },
    Limit(RuleLimits),
}

/// The rules, and the log of what they did.
pub(crate) struct Ruler {
    pub(crate) rules: Rules,
    log: Log,
    node: String,
}

impl Ruler {
    pub(crate) fn new(node: &str, dir: &Path) -> Self {
        let log = Log { path: dir.join("rules.log"), failed: false };
        Self { rules: Rules::default(), log, node: node.into() }
    }

    /// The node has this object now, or has it no more.
    pub(crate) fn take_object(&mut self, path: &ResourcePath, object: Option<&Value>) {
        match object {
            _ if path.kind() != "devicerule" => {}
            Some(object) => self.rules.handle_object(path, object),
            None => self.rules.handle_gone(path),
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.rules.poll_timeout()
    }

    /// The next thing to do.
    pub(crate) fn poll(&mut self) -> Option<Doing> {
        loop {
            let (rule, action) = match self.rules.poll_output()? {
                Output::Act { rule, action } => (rule, action),
                Output::Limit(limits) => return Some(Doing::Limit(limits)),
                Output::Told(told) => return Some(self.told(&told)),
            };
            let namespace = rule.split('/').next().unwrap_or_default();
            if let Some(set) = action.set {
                let device = format!("{namespace}/{}", set.device);
                return Some(Doing::Set { rule, device, property: set.property, value: set.value });
            }
            if let Some(publish) = action.publish {
                return Some(Doing::Publish {
                    rule,
                    topic: publish.topic,
                    payload: publish.payload,
                });
            }
            if let Some(restart) = action.restart {
                return Some(Doing::Restart { rule, workload: restart.workload });
            }
        }
    }

    fn told(&mut self, told: &Told) -> Doing {
        let Told { rule, warning, reason, message, .. } = told;
        match warning {
            true => tracing::warn!(rule = &**rule, reason, message, "a rule of this node"),
            false => tracing::info!(rule = &**rule, reason, message, "a rule of this node"),
        }
        self.log.write(&json!({
            "at": Timestamp::now().to_string(), "rule": &**rule, "reason": reason, "message": message,
        }));
        // A hub takes events about the node and its pods, and about nothing else.
        Doing::Tell(Box::new(EventReport {
            kind: "Node",
            namespace: String::new(),
            name: self.node.clone(),
            uid: self.node.clone(),
            field_path: String::new(),
            warning: *warning,
            reason: (*reason).into(),
            message: format!("rule {rule}: {message}"),
        }))
    }
}

struct Log {
    path: PathBuf,
    /// Said once.
    failed: bool,
}

impl Log {
    fn write(&mut self, line: &Value) {
        let written = self.append(line);
        if let Err(error) = &written
            && !self.failed
        {
            tracing::warn!(file = %self.path.display(), %error, "what rules do is not written down");
        }
        self.failed = written.is_err();
    }

    fn append(&self, line: &Value) -> io::Result<()> {
        let is_full = fs::metadata(&self.path).is_ok_and(|file| file.len() >= LOG_LEN_MAX);
        if is_full {
            fs::rename(&self.path, self.path.with_extension("log.1"))?;
        }
        let mut file = File::options().create(true).append(true).open(&self.path)?;
        file.write_all(format!("{line}\n").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_rule_does_is_told_and_written_down_within_a_bound() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut ruler = Ruler::new("edge1", dir.path());
        let path = ResourcePath::new("a", "devicerule", "alarm").expect("a path");
        let rule = json!({"metadata": {"name": "alarm", "uid": "u"}, "spec": {
            "when": {"device": "fridge", "property": "t", "above": 8},
            "then": [{"set": {"device": "lamp", "property": "light", "value": "on"}},
                {"restart": {"workload": "web"}}]}});
        ruler.take_object(&path, Some(&rule));
        ruler.rules.report(Instant::now(), &"a/fridge".into(), "t", "9");
        let Some(Doing::Tell(report)) = ruler.poll() else { panic!("it is told") };
        assert_eq!(
            (report.reason.as_str(), report.message.as_str()),
            ("RuleBegan", "rule a/alarm: fridge t is 9")
        );
        let Some(Doing::Set { device, value, .. }) = ruler.poll() else { panic!("it is set") };
        assert_eq!((device.as_str(), value.as_str()), ("a/lamp", "on"));
        assert!(matches!(ruler.poll(), Some(Doing::Restart { workload, .. }) if workload == "web"));
        assert!(ruler.poll().is_none());
        let text = fs::read_to_string(dir.path().join("rules.log")).expect("a log");
        let line: Value = serde_json::from_str(text.trim()).expect("one line");
        assert_eq!((&line["rule"], &line["reason"]), (&json!("a/alarm"), &json!("RuleBegan")));
        for _ in 0..40 {
            ruler.log.write(&json!({"message": "x".repeat(64 * 1024)}));
        }
        let len = |name: &str| fs::metadata(dir.path().join(name)).expect("a file").len();
        assert!(len("rules.log") + len("rules.log.1") < 2 * (LOG_LEN_MAX + 70_000));
        ruler.take_object(&path, None);
        assert!(ruler.rules.is_empty());
    }
}
