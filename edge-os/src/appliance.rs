//! EdgeCore on the appliance: it tells PID 1 that it lives and how it is, and asks how the machine is.
//!
//! PID 1 listens on [`SOCKET`], one JSON object a line: `{"beat":{…}}` every [`BEAT_INTERVAL`] and when something
//! changes, `{"token-used":true}` once the node has a certificate, `{"facts":{}}`, which is answered by one line. On
//! every other machine there is no such socket and nothing here runs.
//!
//! The agent hands over its [`Signs`] and publishes the [`Facts`] on the Node: annotations, and the condition
//! `ApplianceHealthy`. The agent is without the rights to restart the machine or to load modules: PID 1 does both.

use crate::enrol::Credentials;
use crate::link::LinkFacts;
use crate::os::OsFacts;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use skerry_edge_core::os::Failure;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Where PID 1 listens.
pub const SOCKET: &str = "/run/skerry/init.sock";
/// Time between two signs of life. PID 1 holds an agent for dead after six of them.
pub const BEAT_INTERVAL: Duration = Duration::from_secs(10);
/// Beats between two questions for the facts.
const FACTS_EVERY: u32 = 6;
/// Time between two tries to reach PID 1.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Time for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest answer.
const ANSWER_LEN_MAX: u64 = 64 * 1024;
/// A link that is not there for this long is a problem for the console.
const NO_LINK_TOLD: Duration = Duration::from_secs(5);

/// The link's reason when the agent itself has ended it, which says nothing to a person.
const CLOSED_HERE: &str = "closed by this agent";

/// What the agent says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Signs {
    /// There is a link to the hub.
    pub connected: bool,
    /// The cluster has taken the Node in this run.
    pub registered: bool,
    /// Pods that are bound to this node.
    pub pods: usize,
    /// While a version of the OS proves itself: what of before is not back, `namespace/name: why`.
    pub missing: Option<Vec<String>>,
}

/// How the machine is, as PID 1 says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Version of the image.
    pub version: String,
    /// `production` or `debug`.
    pub variant: String,
    /// Id of this boot.
    pub boot_id: String,
    /// Where its site came from.
    pub source: String,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Which root runs.
    pub slot: String,
    /// How the state is kept.
    pub state: String,
    /// Versions, and what becomes of them.
    #[serde(flatten)]
    pub os: OsFacts,
}

/// Something that a person should know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Problem {
    /// What is wrong, one sentence.
    pub what: String,
    /// What to do; may be empty.
    pub hint: String,
}

impl Facts {
    /// Annotations of the Node.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        let version = match self.variant.as_str() {
            "production" | "" => self.version.clone(),
            variant => format!("{} ({variant})", self.version),
        };
        let boot = format!(
            "{} root-{} state={} site={}",
            self.boot_id, self.slot, self.state, self.source
        );
        [("skerry.dev/image-version", version), ("skerry.dev/boot", boot)]
            .map(|(key, value)| (key.to_owned(), value))
            .into()
    }

    /// What is wrong, for the Node's condition; empty when nothing is.
    pub fn wrong(&self) -> Vec<String> {
        let sentence = |problem: &Problem| match problem.hint.as_str() {
            "" => problem.what.clone(),
            hint => format!("{} (hint: {hint})", problem.what),
        };
        self.problems.iter().map(sentence).collect()
    }
}

/// What the conversation needs of the agent.
pub struct Parts {
    /// How the agent is.
    pub signs: watch::Receiver<Signs>,
    /// How its link is.
    pub link: watch::Receiver<LinkFacts>,
    /// Its certificate, once it has one.
    pub credentials: watch::Receiver<Option<Arc<Credentials>>>,
    /// How the machine is, for the agent; none before the first answer.
    pub facts: watch::Sender<Option<Facts>>,
    /// Questions of the agent.
    pub asks: mpsc::Receiver<Ask>,
}

/// A question to PID 1 about versions of the OS.
#[derive(Debug)]
pub struct Ask {
    /// The request, one JSON object.
    pub line: Value,
    /// Gets PID 1's word: whether it will do it.
    pub answer: oneshot::Sender<Result<(), Failure>>,
}

/// What PID 1 says to a question.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Answer {
    error: Option<String>,
    hint: String,
}

/// The socket of PID 1, if this is the appliance.
pub fn socket() -> Option<PathBuf> {
    Some(PathBuf::from(SOCKET)).filter(|path| path.exists())
}

/// Talks with PID 1 until `stop`; a conversation that breaks is begun again.
pub async fn run(socket: PathBuf, mut parts: Parts, stop: CancellationToken) {
    let talk = async {
        loop {
            if let Err(error) = converse(&socket, &mut parts).await {
                tracing::debug!(%error, "no word with init");
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    };
    stop.run_until_cancelled(talk).await;
}

async fn converse(socket: &Path, parts: &mut Parts) -> std::io::Result<()> {
    let stream = UnixStream::connect(socket).await?;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let mut token_told = false;
    let mut beats: u32 = 0;
    let mut beat = tokio::time::interval(BEAT_INTERVAL);
    let started = tokio::time::Instant::now();
    loop {
        let signs = parts.signs.borrow_and_update().clone();
        let waited = started.elapsed() >= NO_LINK_TOLD;
        let problem = match signs.connected {
            // Not what ended the connection, only who.
            false if waited => {
                let reason = parts.link.borrow_and_update().reason.clone();
                if reason == CLOSED_HERE { String::new() } else { reason }
            }
            _ => String::new(),
        };
        let hint = if problem.is_empty() { "" } else { hint(&problem) };
        let mut line = json!({"beat": {
            "connected": signs.connected,
            "registered": signs.registered,
            "pods": signs.pods,
            "problem": problem,
            "hint": hint,
        }});
        if let Some(missing) = &signs.missing {
            line["beat"]["trial"] = json!({"missing": missing});
        }
        write(&mut writer, &line).await?;
        if !token_told && parts.credentials.borrow_and_update().is_some() {
            write(&mut writer, &json!({"token-used": true})).await?;
            token_told = true;
        }
        let busy = parts.facts.borrow().as_ref().is_some_and(|facts| facts.os.is_moving());
        if busy || beats.is_multiple_of(FACTS_EVERY) {
            write(&mut writer, &json!({"facts": {}})).await?;
            let facts: Facts = read(&mut reader).await?;
            parts.facts.send_if_modified(|known| {
                let new = known.as_ref() != Some(&facts);
                if new {
                    *known = Some(facts);
                }
                new
            });
        }
        tokio::select! {
            _ = beat.tick() => beats = beats.wrapping_add(1),
            Some(Ask { line, answer }) = parts.asks.recv() => {
                write(&mut writer, &line).await?;
                // A restart is not answered; what becomes of it is seen.
                let said = match line.get("reboot") {
                    Some(_) => Answer::default(),
                    None => read(&mut reader).await?,
                };
                let refusal = said.error.map(|reason| Failure { reason, hint: said.hint });
                let _ = answer.send(refusal.map_or(Ok(()), Err)); // who asked may be gone
                beats = 0;
            }
            changed = parts.signs.changed() => {
                if changed.is_err() {
                    return Ok(()); // the agent ends
                }
                beats = 0; // what is wrong may have changed with it
            }
            Ok(()) = parts.credentials.changed(), if !token_told => {}
        }
    }
}

async fn write(
    writer: &mut (impl AsyncWriteExt + Unpin),
    line: &serde_json::Value,
) -> std::io::Result<()> {
    writer.write_all(format!("{line}\n").as_bytes()).await
}

async fn read<T: DeserializeOwned>(
    reader: &mut (impl AsyncBufReadExt + Unpin),
) -> std::io::Result<T> {
    let mut line = String::new();
    let read = async { reader.take(ANSWER_LEN_MAX).read_line(&mut line).await };
    let read = tokio::time::timeout(ANSWER_TIMEOUT, read).await;
    if read.map_err(std::io::Error::from)?? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}

/// What a person at the box can do about a link that is not there.
fn hint(problem: &str) -> &'static str {
    let lower = problem.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    if has(&["opened a new connection"]) {
        "another machine may have joined under the same name; give each machine a name of its own"
    } else if has(&["expired", "refused a certificate", "token"]) {
        "make a new token with `skerry token create`, put it into site.toml and raise its revision"
    } else if has(&["fingerprint", "unknownissuer", "certificate"]) {
        "the hub shows another certificate than expected; check `hub.address`, `hub.enrol` and the token"
    } else if has(&["dns", "lookup", "resolve", "name or service"]) {
        "the hub's name is not known here; check the DNS server and `hub.address`"
    } else {
        "check the network and `hub.address` in site.toml"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    struct Init {
        signs: watch::Sender<Signs>,
        link: watch::Sender<LinkFacts>,
        facts: watch::Receiver<Option<Facts>>,
        asks: mpsc::Sender<Ask>,
        reader: BufReader<tokio::net::unix::OwnedReadHalf>,
        writer: tokio::net::unix::OwnedWriteHalf,
        stop: CancellationToken,
        _credentials: watch::Sender<Option<Arc<Credentials>>>,
        _dir: tempfile::TempDir,
    }

    /// An agent that talks, and the end of PID 1.
    async fn init() -> Init {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("init.sock");
        let listener = UnixListener::bind(&path).expect("listens");
        let (signs, signs_seen) = watch::channel(Signs::default());
        let (link, link_seen) = watch::channel(LinkFacts::default());
        let (credentials, credentials_seen) = watch::channel(None);
        let (facts_in, facts) = watch::channel(None);
        let (asks, asked) = mpsc::channel(1);
        let stop = CancellationToken::new();
        let parts = Parts {
            signs: signs_seen,
            link: link_seen,
            credentials: credentials_seen,
            facts: facts_in,
            asks: asked,
        };
        tokio::spawn(run(path, parts, stop.clone()));
        let (stream, _) = listener.accept().await.expect("the agent comes");
        let (reader, writer) = stream.into_split();
        let reader = BufReader::new(reader);
        Init {
            signs,
            link,
            facts,
            asks,
            reader,
            writer,
            stop,
            _credentials: credentials,
            _dir: dir,
        }
    }

    impl Init {
        async fn line(&mut self) -> serde_json::Value {
            let mut line = String::new();
            self.reader.read_line(&mut line).await.expect("a line");
            serde_json::from_str(&line).expect("JSON")
        }
    }

    #[tokio::test]
    async fn agent_beats_at_once_asks_for_facts_and_beats_again_when_it_is_connected() {
        let mut init = init().await;
        let beat = init.line().await;
        assert_eq!(beat["beat"]["connected"], false);
        assert_eq!(init.line().await, json!({"facts": {}}));
        let answer = json!({"version": "1.2", "variant": "debug", "boot_id": "b", "slot": "a", "state": "kept",
            "source": "fw_cfg", "problems": [{"what": "the disk is full", "hint": "remove pods"}], "uptime_s": 3});
        init.writer.write_all(format!("{answer}\n").as_bytes()).await.expect("written");
        init.facts.changed().await.expect("facts");
        let facts = init.facts.borrow_and_update().clone().expect("facts");
        assert_eq!(facts.wrong(), ["the disk is full (hint: remove pods)"]);
        let annotations = facts.annotations();
        assert_eq!(annotations["skerry.dev/image-version"], "1.2 (debug)");
        assert_eq!(annotations["skerry.dev/boot"], "b root-a state=kept site=fw_cfg");
        init.link.send_replace(LinkFacts { reason: "none".into(), ..LinkFacts::default() });
        let missing = Some(vec!["ns/a: waiting".to_owned()]);
        init.signs.send_replace(Signs { connected: true, registered: true, pods: 2, missing });
        loop {
            let line = init.line().await;
            if line["beat"]["connected"] == true {
                assert_eq!(
                    (&line["beat"]["pods"], &line["beat"]["problem"]),
                    (&json!(2), &json!(""))
                );
                assert_eq!(line["beat"]["trial"], json!({"missing": ["ns/a: waiting"]}));
                break;
            }
        }
        init.stop.cancel();
    }

    #[tokio::test]
    async fn questions_about_versions_reach_init_and_its_word_comes_back() {
        let mut init = init().await;
        init.line().await;
        init.line().await;
        let facts = json!({"version": "1", "releases": {"running": "1", "counter": 3, "other": "0"},
            "update": {"version": "2", "step": "writing", "percent": 40}});
        init.writer.write_all(format!("{facts}\n").as_bytes()).await.expect("written");
        init.facts.changed().await.expect("facts");
        let facts = init.facts.borrow_and_update().clone().expect("facts");
        let update = facts.os.update.clone().expect("an update");
        assert_eq!((update.step.as_str(), update.percent), ("writing", Some(40)));
        assert_eq!(facts.os.releases.other.as_deref(), Some("0"));

        let (answer, answered) = oneshot::channel();
        let line = json!({"update": {"dir": "/x"}});
        init.asks.send(Ask { line: line.clone(), answer }).await.expect("room");
        let mut answered = std::pin::pin!(answered);
        loop {
            tokio::select! {
                got = init.line() => {
                    if got == line {
                        let no = json!({"error": "another update runs", "hint": "wait"});
                        init.writer.write_all(format!("{no}\n").as_bytes()).await.expect("written");
                    } else if got.get("facts").is_some() {
                        init.writer.write_all(b"{}\n").await.expect("written");
                    }
                }
                said = &mut answered => {
                    let failure = said.expect("a word").expect_err("it said no");
                    assert_eq!((failure.reason.as_str(), failure.hint.as_str()), ("another update runs", "wait"));
                    break;
                }
            }
        }
        init.stop.cancel();
    }

    #[test]
    fn hints_fit_what_keeps_the_link_away() {
        assert!(
            hint("hub refused a certificate for node `a`: token expired").contains("new token")
        );
        assert!(hint("invalid peer certificate: UnknownIssuer").contains("another certificate"));
        assert!(hint("failed to lookup address information").contains("DNS"));
        assert!(hint("connection refused").contains("network"));
        let taken = "the hub closed the connection: the node opened a new connection";
        assert!(hint(taken).contains("same name"));
    }
}
