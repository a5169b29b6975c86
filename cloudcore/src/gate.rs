//! Which certificates still count: the records of node identities in the cluster, and the decision on each connection.
//!
//! A record is a ConfigMap `identity.<node>` in KubeEdge's namespace, labelled [`LABEL`]. CloudCore writes the last
//! certificate that it issued there; the owner's verbs (`skerry node revoke`, `deny`, `allow`) write the rest. The
//! policy of amnesty is the ConfigMap [`POLICY`]. Both survive a restart, and every CloudCore of the cluster follows
//! them. The rules themselves are in `cloudcore/core/src/identity.rs`.
//!
//! Every listener asks [`Gate::check`] after the handshake; sessions ask again when [`Gate::revoked`] tells a change.
//!
//! A CloudCore that cannot read the records does not start ([`GateError`]); one that loses the cluster later goes on
//! with what it read last. It never admits more because it knows less.

use crate::api;
use crate::authority::{Authority, NAMESPACE};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use skerry_cloudcore_core::enrol::{self, EnrolError};
use skerry_cloudcore_core::identity::{
    self, Fingerprint, Peer, REVOKED_SERIALS_MAX, Refusal, Standing, hex,
};
pub use skerry_cloudcore_core::identity::{Amnesty, Record};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, RwLock};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Label of the records and of the policy.
const LABEL: &str = "skerry.dev/identity";
/// Name of the policy's ConfigMap.
const POLICY: &str = "identity-policy";
const AMNESTY: &str = "amnesty";

const NODE: &str = "node";
const KEY: &str = "key";
const SERIAL: &str = "serial";
const NOT_AFTER: &str = "not-after";
const ISSUER: &str = "issuer";
const BUNDLE: &str = "bundle";
const REVOKED_BEFORE: &str = "revoked-before";
const REVOKED_SERIALS: &str = "revoked-serials";
const DENIED: &str = "denied";

/// Attempts to write a record that somebody else makes at the same time.
const WRITE_ATTEMPTS: usize = 4;

/// Why the records of identities are not known.
#[derive(Debug, thiserror::Error)]
#[error("could not read the records of node identities in namespace `{NAMESPACE}`")]
pub struct GateError(#[source] Box<kube::Error>);

/// Why an owner's decision was not recorded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecisionError {
    /// The name is none that a node can have.
    #[error("`{0}` is no node name: lower-case letters, digits, `-` and `.`")]
    NodeName(String),
    /// Not a serial number.
    #[error("`{0}` is no serial number in hex")]
    Serial(String),
    /// The cluster refused.
    #[error("could not write the record of node `{node}`")]
    Write {
        /// Whose.
        node: String,
        /// What the API said.
        source: Box<kube::Error>,
    },
    /// The cluster refused the policy.
    #[error("could not read or write the policy of amnesty")]
    Policy(#[source] Box<kube::Error>),
}

/// One node's identity, as its record has it.
#[derive(Debug, Clone)]
pub struct NodeIdentity {
    /// Its name.
    pub node: String,
    /// What is known.
    pub record: Record,
}

/// Decides on connections. Clones share one state.
#[derive(Clone)]
pub(crate) struct Gate(Arc<Inner>);

struct Inner {
    client: kube::Client,
    authority: Arc<Authority>,
    state: RwLock<State>,
    changes: watch::Sender<u64>,
}

/// About 200 bytes per node: a record's texts stay in the cluster.
#[derive(Default)]
struct State {
    known: HashMap<Box<str>, Known>,
    /// Records of the few nodes about which their owner has decided something.
    decided: HashMap<Box<str>, Record>,
    /// Which node last had a certificate for a key.
    keys: HashMap<Fingerprint, Box<str>>,
    amnesty: Amnesty,
}

#[derive(Clone, Copy)]
struct Known {
    key: Option<Fingerprint>,
    bundle: Option<Fingerprint>,
}

impl Gate {
    /// Reads all records.
    ///
    /// # Errors
    ///
    /// [`GateError`]; without them a revoked node could not be told from another.
    pub(crate) async fn open(
        client: &kube::Client,
        authority: Arc<Authority>,
    ) -> Result<Self, GateError> {
        let failed = |source| GateError(Box::new(source));
        let list = maps(client).list(&ListParams::default().labels(LABEL)).await.map_err(failed)?;
        let mut state = State::default();
        for map in list {
            state.apply(&map);
        }
        let changes = watch::Sender::new(0);
        let (client, state) = (client.clone(), RwLock::new(state));
        Ok(Self(Arc::new(Inner { client, authority, state, changes })))
    }

    /// Follows the records until `stop`.
    pub(crate) async fn follow(self, stop: CancellationToken) {
        let config = watcher::Config::default().labels(LABEL);
        let watch = watcher::watcher(maps(&self.0.client), config).default_backoff();
        let mut events = std::pin::pin!(watch);
        let mut trust = self.0.authority.trust_changes();
        let retired = async {
            while trust.changed().await.is_ok() {
                self.tell();
            }
            std::future::pending::<()>().await;
        };
        let run = async {
            let mut listed = State::default();
            while let Some(event) = events.next().await {
                match event {
                    Ok(Event::Init) => listed = State::default(),
                    Ok(Event::InitApply(map)) => {
                        listed.apply(&map);
                    }
                    Ok(Event::InitDone) => self.replace(std::mem::take(&mut listed)),
                    Ok(Event::Apply(map)) => self.change(|state| state.apply(&map)),
                    Ok(Event::Delete(map)) => self.change(|state| state.remove(&map)),
                    Err(error) => {
                        tracing::warn!(%error, "the watch of node identities failed, trying again");
                    }
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = run => {}
            () = retired => {}
        }
    }

    /// What `peer` may do now.
    ///
    /// # Errors
    ///
    /// [`Refusal`], whose text is for the peer.
    pub(crate) fn check(&self, peer: &Peer) -> Result<Standing, Refusal> {
        if !self.0.authority.state().trusts(&peer.issuer) {
            return Err(Refusal::RetiredAuthority { node: peer.node.clone() });
        }
        let state = self.0.state.read().expect("never held over a panic");
        let record = state.decided.get(peer.node.as_str());
        identity::check(peer, record, state.amnesty, Timestamp::now().as_second())
    }

    /// Whether `node` may join with a token made at `token_created_ms`; see [`identity::may_join`].
    pub(crate) fn may_join(
        &self,
        node: &str,
        token_created_ms: Option<i64>,
    ) -> Result<(), Refusal> {
        let state = self.0.state.read().expect("never held over a panic");
        identity::may_join(node, state.decided.get(node), token_created_ms)
    }

    /// Refuses a key that is another node's.
    pub(crate) fn check_key(&self, node: &str, key: &Fingerprint) -> Result<(), EnrolError> {
        let state = self.0.state.read().expect("never held over a panic");
        match state.keys.get(key).filter(|owner| ***owner != *node) {
            None => Ok(()),
            Some(owner) => {
                Err(EnrolError::KeyOfAnother { node: node.into(), owner: owner.to_string() })
            }
        }
    }

    /// Wakes whenever [`Self::check`] may say something else than before; every session then asks it again.
    pub(crate) fn revoked(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// The bundle that `node` has confirmed.
    pub(crate) fn confirmed_bundle(&self, node: &str) -> Option<Fingerprint> {
        let state = self.0.state.read().expect("never held over a panic");
        state.known.get(node)?.bundle
    }

    /// Records that a certificate was issued, before it is handed out. `joined` when a token was the reason: a
    /// revocation then no longer reaches this certificate, also when its clock was ahead of ours.
    pub(crate) async fn record_issue(
        &self,
        issued: &Peer,
        joined: bool,
    ) -> Result<(), kube::Error> {
        let mut data = BTreeMap::from([
            (NODE, Some(issued.node.clone())),
            (KEY, Some(hex(&issued.key_fingerprint))),
            (SERIAL, Some(issued.serial.clone())),
            (NOT_AFTER, Some(time_text(issued.not_after_s))),
            (ISSUER, Some(hex(&issued.issuer))),
        ]);
        let revoked_before_ms = {
            let state = self.0.state.read().expect("never held over a panic");
            state.decided.get(issued.node.as_str()).and_then(|record| record.revoked_before_ms)
        };
        let begin_ms = issued.not_before_s.saturating_mul(1000);
        if joined && revoked_before_ms.is_some_and(|before_ms| before_ms > begin_ms) {
            data.insert(REVOKED_BEFORE, Some(time_text(issued.not_before_s)));
        }
        let map = write(&self.0.client, &record_name(&issued.node), data).await?;
        self.change(|state| state.apply(&map));
        Ok(())
    }

    /// Records which bundle `node` has stored.
    pub(crate) async fn record_bundle(
        &self,
        node: &str,
        bundle: &Fingerprint,
    ) -> Result<(), kube::Error> {
        let data = [(NODE, Some(node.to_owned())), (BUNDLE, Some(hex(bundle)))].into();
        let map = write(&self.0.client, &record_name(node), data).await?;
        self.change(|state| state.apply(&map));
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut State) -> bool) {
        let mut state = self.0.state.write().expect("never held over a panic");
        let matters = change(&mut state);
        drop(state);
        if matters {
            self.tell();
        }
    }

    fn replace(&self, next: State) {
        *self.0.state.write().expect("never held over a panic") = next;
        self.tell();
    }

    fn tell(&self) {
        self.0.changes.send_modify(|generation| *generation += 1);
    }
}

impl State {
    /// Takes a record or the policy; returns whether a decision may be another one now.
    fn apply(&mut self, map: &ConfigMap) -> bool {
        if map.metadata.name.as_deref() == Some(POLICY) {
            let amnesty = amnesty_of(map);
            return std::mem::replace(&mut self.amnesty, amnesty) != amnesty;
        }
        let Some(NodeIdentity { node, record }) = identity_of(map) else { return false };
        let known = Known {
            key: record.key.as_deref().and_then(unhex),
            bundle: record.bundle.as_deref().and_then(unhex),
        };
        let before = self.known.insert(node.as_str().into(), known);
        let old_key = before.and_then(|before| before.key);
        if old_key != known.key {
            self.forget_key(&node, old_key);
            if let Some(key) = known.key {
                self.keys.insert(key, node.as_str().into());
            }
        }
        let decision = Record {
            revoked_before_ms: record.revoked_before_ms,
            revoked_serials: record.revoked_serials,
            denied: record.denied,
            ..Record::default()
        };
        if decision == Record::default() {
            return self.decided.remove(node.as_str()).is_some();
        }
        self.decided.insert(node.into(), decision.clone()) != Some(decision)
    }

    fn remove(&mut self, map: &ConfigMap) -> bool {
        if map.metadata.name.as_deref() == Some(POLICY) {
            self.amnesty = Amnesty::default();
            return true;
        }
        let Some(NodeIdentity { node, .. }) = identity_of(map) else { return false };
        let known = self.known.remove(node.as_str());
        self.forget_key(&node, known.and_then(|known| known.key));
        self.decided.remove(node.as_str()).is_some()
    }

    fn forget_key(&mut self, node: &str, key: Option<Fingerprint>) {
        if let Some(key) = key
            && self.keys.get(&key).is_some_and(|owner| **owner == *node)
        {
            self.keys.remove(&key);
        }
    }
}

fn unhex(text: &str) -> Option<Fingerprint> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(bytes)
}

/// All nodes with a record, by name.
///
/// # Errors
///
/// What the API said.
pub async fn identities(client: &kube::Client) -> Result<Vec<NodeIdentity>, kube::Error> {
    let list = maps(client).list(&ListParams::default().labels(LABEL)).await?;
    let mut found: Vec<NodeIdentity> = list.iter().filter_map(identity_of).collect();
    found.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(found)
}

/// Ends every certificate that `node` has been given until now, and cuts its connections. It may join again with a
/// token that is made afterwards.
///
/// # Errors
///
/// [`DecisionError`].
pub async fn revoke_node(client: &kube::Client, node: &str) -> Result<(), DecisionError> {
    let record = record_of(client, node).await?;
    let mut data = BTreeMap::new();
    data.insert(REVOKED_BEFORE, Some(Timestamp::now().to_string()));
    // Also by number: it may have been issued in this very second, or by a machine whose clock is ahead of ours.
    let serials = with_serial(&record.revoked_serials, record.serial.as_deref());
    data.insert(REVOKED_SERIALS, Some(serials));
    decide(client, node, data).await
}

/// Ends one certificate of `node`, by its serial number in hex.
///
/// # Errors
///
/// [`DecisionError`].
pub async fn revoke_serial(
    client: &kube::Client,
    node: &str,
    serial: &str,
) -> Result<(), DecisionError> {
    let serial = serial.replace(':', "").to_ascii_lowercase();
    if serial.is_empty() || serial.len() > 42 || !serial.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(DecisionError::Serial(serial));
    }
    let record = record_of(client, node).await?;
    let serials = with_serial(&record.revoked_serials, Some(&serial));
    decide(client, node, [(REVOKED_SERIALS, Some(serials))].into()).await
}

/// Denies `node` amnesty: once its certificate has expired, it needs a new token.
///
/// # Errors
///
/// [`DecisionError`].
pub async fn deny_node(client: &kube::Client, node: &str) -> Result<(), DecisionError> {
    decide(client, node, [(DENIED, Some("true".to_owned()))].into()).await
}

/// Takes back every [`revoke_node`], [`revoke_serial`] and [`deny_node`] for `node`.
///
/// # Errors
///
/// [`DecisionError`].
pub async fn allow_node(client: &kube::Client, node: &str) -> Result<(), DecisionError> {
    let data = [(REVOKED_BEFORE, None), (REVOKED_SERIALS, None), (DENIED, None)].into();
    decide(client, node, data).await
}

/// The policy of amnesty in force.
///
/// # Errors
///
/// [`DecisionError::Policy`].
pub async fn amnesty(client: &kube::Client) -> Result<Amnesty, DecisionError> {
    let map = maps(client).get_opt(POLICY).await;
    let map = map.map_err(|source| DecisionError::Policy(Box::new(source)))?;
    Ok(map.as_ref().map_or(Amnesty::default(), amnesty_of))
}

/// Sets the policy of amnesty.
///
/// # Errors
///
/// [`DecisionError::Policy`].
pub async fn set_amnesty(client: &kube::Client, amnesty: Amnesty) -> Result<(), DecisionError> {
    let written = write(client, POLICY, [(AMNESTY, Some(amnesty.to_string()))].into()).await;
    written.map(|_| ()).map_err(|source| DecisionError::Policy(Box::new(source)))
}

async fn record_of(client: &kube::Client, node: &str) -> Result<Record, DecisionError> {
    let name = checked(node)?;
    let map = maps(client)
        .get_opt(&record_name(name))
        .await
        .map_err(|source| DecisionError::Write { node: node.into(), source: Box::new(source) })?;
    Ok(map.as_ref().and_then(identity_of).map(|identity| identity.record).unwrap_or_default())
}

async fn decide(
    client: &kube::Client,
    node: &str,
    mut data: BTreeMap<&str, Option<String>>,
) -> Result<(), DecisionError> {
    let name = checked(node)?;
    data.insert(NODE, Some(node.to_owned()));
    let written = write(client, &record_name(name), data).await;
    written
        .map(|_| ())
        .map_err(|source| DecisionError::Write { node: node.into(), source: Box::new(source) })
}

fn checked(node: &str) -> Result<&str, DecisionError> {
    enrol::node_name(Some(node))
        .map_err(|_| DecisionError::NodeName(node.chars().take(300).collect()))
}

fn with_serial(serials: &[String], more: Option<&str>) -> String {
    let mut serials: Vec<&str> = serials.iter().map(String::as_str).collect();
    if let Some(more) = more.filter(|more| !serials.contains(more)) {
        serials.push(more);
    }
    serials[serials.len().saturating_sub(REVOKED_SERIALS_MAX)..].join(",")
}

fn maps(client: &kube::Client) -> Api<ConfigMap> {
    Api::namespaced(client.clone(), NAMESPACE)
}

/// Name of the ConfigMap of a node; the name of a node itself may be as long as that of a ConfigMap.
fn record_name(node: &str) -> String {
    let name = format!("identity.{node}");
    if name.len() <= 253 { name } else { format!("identity-{}", hex(&Sha256::digest(node))) }
}

/// Changes these keys of a ConfigMap and leaves all others; makes it when there is none.
async fn write(
    client: &kube::Client,
    name: &str,
    data: BTreeMap<&str, Option<String>>,
) -> Result<ConfigMap, kube::Error> {
    let maps = maps(client);
    let patch = json!({"metadata": {"labels": {LABEL: ""}}, "data": data});
    for _ in 0..WRITE_ATTEMPTS {
        match maps.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Err(error) if api::is_not_found(&error) => {}
            patched => return patched,
        }
        let known =
            data.iter().filter_map(|(key, value)| Some(((*key).to_owned(), value.clone()?)));
        let map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(name.into()),
                namespace: Some(NAMESPACE.into()),
                labels: Some(BTreeMap::from([(LABEL.into(), String::new())])),
                ..ObjectMeta::default()
            },
            data: Some(known.collect()),
            ..ConfigMap::default()
        };
        match maps.create(&PostParams::default(), &map).await {
            Err(error) if api::is_already_exists(&error) => {}
            created => return created,
        }
    }
    maps.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await
}

fn identity_of(map: &ConfigMap) -> Option<NodeIdentity> {
    let data = map.data.as_ref()?;
    let node = data.get(NODE)?.clone();
    // A ConfigMap with another name is no record: nobody would find it to change it.
    if map.metadata.name.as_deref() != Some(&record_name(&node)) {
        return None;
    }
    let text = |key: &str| data.get(key).filter(|value| !value.is_empty()).cloned();
    let time = |key: &str| Some(data.get(key)?.parse::<Timestamp>().ok()?.as_second());
    // Unreadable means that somebody wanted to revoke: everything until now, then.
    let revoked_before_ms = data
        .get(REVOKED_BEFORE)
        .map(|text| text.parse::<Timestamp>().map_or(i64::MAX, Timestamp::as_millisecond));
    let serials = data.get(REVOKED_SERIALS).map(String::as_str).unwrap_or_default();
    let record = Record {
        key: text(KEY),
        serial: text(SERIAL),
        not_after_s: time(NOT_AFTER),
        issuer: text(ISSUER),
        bundle: text(BUNDLE),
        revoked_before_ms,
        revoked_serials: serials
            .split(',')
            .filter(|serial| !serial.is_empty())
            .map(|serial| serial.trim().to_owned())
            .collect(),
        denied: data.get(DENIED).is_some_and(|value| value != "false"),
    };
    Some(NodeIdentity { node, record })
}

fn amnesty_of(map: &ConfigMap) -> Amnesty {
    let text = map.data.as_ref().and_then(|data| data.get(AMNESTY));
    match text.map(|text| text.parse()) {
        None => Amnesty::default(),
        Some(Ok(amnesty)) => amnesty,
        Some(Err(error)) => {
            tracing::error!(%error, configmap = POLICY, "the policy of amnesty is not readable; nobody gets any");
            Amnesty::Never
        }
    }
}

fn time_text(second: i64) -> String {
    Timestamp::from_second(second).unwrap_or(Timestamp::MAX).to_string()
}

/// A record as the command line prints it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityRow {
    /// Node.
    pub node: String,
    /// Serial number of its last certificate, hex.
    pub serial: Option<String>,
    /// Its end, RFC 3339.
    pub not_after: Option<String>,
    /// `valid`, `expired`, `revoked` (its last certificate no longer counts) or `none`.
    pub certificate: &'static str,
    /// Whether it is denied amnesty.
    pub denied: bool,
}

impl From<NodeIdentity> for IdentityRow {
    fn from(NodeIdentity { node, record }: NodeIdentity) -> Self {
        let now_s = Timestamp::now().as_second();
        let is_revoked = |serial: &String| record.revoked_serials.contains(serial);
        let certificate = match (&record.serial, record.not_after_s) {
            (None, _) if record.revoked_before_ms.is_some() => "revoked",
            (None, _) => "none",
            (Some(serial), _) if is_revoked(serial) => "revoked",
            (Some(_), Some(not_after_s)) if not_after_s < now_s => "expired",
            (Some(_), _) => "valid",
        };
        Self {
            node,
            serial: record.serial,
            not_after: record.not_after_s.map(time_text),
            certificate,
            denied: record.denied,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(data: &[(&str, &str)]) -> ConfigMap {
        let data = data.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let metadata = ObjectMeta { name: Some("identity.edge1".into()), ..ObjectMeta::default() };
        ConfigMap { metadata, data: Some(data), ..ConfigMap::default() }
    }

    #[test]
    fn record_that_cannot_be_read_revokes_rather_than_admits() {
        let read = |data: &[(&str, &str)]| identity_of(&map(data)).map(|found| found.record);
        let record = read(&[("node", "edge1"), ("revoked-before", "yesterday")]).expect("a record");
        assert_eq!(record.revoked_before_ms, Some(i64::MAX));
        let record = read(&[("node", "edge1"), ("denied", "yes")]).expect("a record");
        assert!(record.denied);
        assert_eq!(read(&[("node", "edge2")]), None, "the name of the map counts");
        let mut policy = map(&[("amnesty", "sometimes")]);
        policy.metadata.name = Some(POLICY.into());
        assert_eq!(amnesty_of(&policy), Amnesty::Never);
    }

    #[test]
    fn only_decisions_wake_the_sessions() {
        let mut state = State::default();
        assert!(!state.apply(&map(&[("node", "edge1"), ("serial", "01")])));
        assert!(!state.apply(&map(&[("node", "edge1"), ("serial", "02")])));
        let revoked = map(&[("node", "edge1"), ("revoked-serials", "02")]);
        assert!(state.apply(&revoked));
        assert!(!state.apply(&revoked));
        assert!(state.remove(&revoked));
        assert!(state.known.is_empty() && state.decided.is_empty());
    }

    #[test]
    fn key_belongs_to_the_node_that_had_it_last() {
        let (one, two) = ("01".repeat(32), "02".repeat(32));
        let owner =
            |state: &State, key: u8| state.keys.get(&[key; 32]).map(|node| node.to_string());
        let mut state = State::default();
        state.apply(&map(&[("node", "edge1"), ("key", &one)]));
        assert_eq!(owner(&state, 1).as_deref(), Some("edge1"));
        state.apply(&map(&[("node", "edge1"), ("key", &two)]));
        assert_eq!((owner(&state, 1), owner(&state, 2).as_deref()), (None, Some("edge1")));
        state.remove(&map(&[("node", "edge1"), ("key", &two)]));
        assert!(state.keys.is_empty());
        for bad in ["", "0", &"é".repeat(32), &"0g".repeat(32)] {
            assert_eq!(unhex(bad), None, "{bad}");
        }
    }

    #[test]
    fn serials_are_bounded_and_not_repeated() {
        let many: Vec<String> = (0..40).map(|n| format!("{n:02x}")).collect();
        let text = with_serial(&many, Some("ff"));
        assert_eq!(text.split(',').count(), REVOKED_SERIALS_MAX);
        assert!(text.ends_with("27,ff"));
        assert_eq!(with_serial(&["0a".into()], Some("0a")), "0a");
    }

    #[test]
    fn longest_node_name_has_a_record() {
        assert_eq!(record_name("edge1"), "identity.edge1");
        assert!(record_name(&"a".repeat(253)).len() <= 253);
    }
}
