//! Rules at the node: when a property is beyond a threshold for a time, something is done, with or without a hub.
//!
//! ```text
//!           beyond                held for `forSeconds`, cooled down
//!   Idle ────────────► Waiting ──────────────────────────────────────► Active   ── then
//!    ▲ ◄─────────────────┘ back by `hysteresis`                          │
//!    └───────────────────────────────────────────────────────────────────┘      ── otherwise
//! ```
//!
//! Between two reports a property is what it was last. After a restart of the agent each rule is idle: one that still
//! holds begins anew with the next report. Only a rule that limits what runs goes on where it was ([`Rules::resume`]): its
//! limits outlive the restart, and somebody has to lift them.
//!
//! Loops: a rule that sets what it watches is refused. Rules that set each other off are stopped: one that began
//! [`BEGINNINGS_MAX`] times in [`WINDOW`] does nothing for [`PAUSE`], and that is told. Everything that a rule does is
//! told as [`Output::Told`], for the cluster and for the log of the node.
//!
//! No I/O, no clock. The twin task of the agent is the only caller. An evaluation looks only at rules of the device that
//! reported.

use crate::twin::Id;
use serde_json::Value;
use skerry_api::fleet::rules::{DeviceRule, DeviceRuleSpec, RuleAction, RuleCondition, RuleFault};
use skerry_protocol::ResourcePath;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// Rules of one node.
pub const RULES_MAX: usize = 1_000;
/// Beginnings in [`WINDOW`] after which a rule pauses.
pub const BEGINNINGS_MAX: usize = 6;
/// See [`BEGINNINGS_MAX`].
pub const WINDOW: Duration = Duration::from_secs(60);
/// How long a rule that began too often does nothing.
pub const PAUSE: Duration = Duration::from_secs(600);
/// Time between two beginnings when the rule says nothing.
const COOLDOWN: Duration = Duration::from_secs(1);
/// Longest part of a value that is told.
const TOLD_LEN_MAX: usize = 100;

/// What the owner has to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Carry this out, and say with [`Rules::done`] what came of it.
    Act {
        /// `namespace/name` of the rule.
        rule: Id,
        /// What to do; `{value}` is in its place already.
        action: RuleAction,
    },
    /// Let so many pods run, instead of what this rule let run before; say with [`Rules::done`] what came of it.
    Limit(RuleLimits),
    /// For the cluster, as an event of the rule, and for the log of the node.
    Told(Told),
}

/// How many pods of workloads a rule lets run on the node. It lasts until the rule begins or ends the next time, is
/// changed, or is gone; a restart of the agent changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleLimits {
    /// `namespace/name` of the rule.
    pub rule: Id,
    /// The rule held when it said so.
    pub active: bool,
    /// Workload, and how many of its pods; none lifts all limits of the rule.
    pub limits: Vec<(String, u32)>,
}

/// What happened to a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// `namespace/name` of the rule.
    pub rule: Id,
    /// `metadata.uid` of the rule.
    pub uid: String,
    /// Something is wrong.
    pub warning: bool,
    /// One word.
    pub reason: &'static str,
    /// A sentence.
    pub message: String,
}

/// Why a rule is not kept.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// Not a rule as the cluster defines it.
    #[error("the rule cannot be read: {0}")]
    Unreadable(String),
    /// A rule that nobody could keep.
    #[error(transparent)]
    Fault(#[from] RuleFault),
    /// There are [`RULES_MAX`] others.
    #[error("this node has {RULES_MAX} rules already")]
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    /// Begins at this time, unless the property comes back before.
    Waiting(Instant),
    Active,
}

#[derive(Debug)]
struct Rule {
    uid: String,
    spec: DeviceRuleSpec,
    state: State,
    value: String,
    begun: VecDeque<Instant>,
    paused_until: Option<Instant>,
}

/// The rules of one node.
#[derive(Debug, Default)]
pub struct Rules {
    rules: BTreeMap<Id, Rule>,
    of_device: BTreeMap<Id, BTreeSet<Id>>,
    timers: BTreeSet<(Instant, Id)>,
    outputs: VecDeque<Output>,
}

impl Rules {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The node has this rule, in this form. The same again changes nothing; another form begins idle.
    pub fn handle_object(&mut self, path: &ResourcePath, object: &Value) {
        let Some(id) = id_of(path) else { return };
        let uid = object["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        let known = self.rules.contains_key(&id);
        let spec = match read(object) {
            Ok(_) if !known && self.rules.len() >= RULES_MAX => Err(RuleError::Full),
            other => other,
        };
        match spec {
            Ok(spec) if self.rules.get(&id).is_some_and(|rule| rule.spec == spec) => {}
            Ok(spec) => {
                self.forget(&id);
                let device = device_of(path.namespace(), &spec.when.device);
                self.of_device.entry(device).or_default().insert(id.clone());
                let (value, begun) = (String::new(), VecDeque::new());
                let rule = Rule { uid, spec, state: State::Idle, value, begun, paused_until: None };
                self.rules.insert(id, rule);
            }
            Err(error) => {
                self.forget(&id);
                let (reason, message) = ("RuleRefused", error.to_string());
                let told = Told { rule: id, uid, warning: true, reason, message };
                self.outputs.push_back(Output::Told(told));
            }
        }
    }

    /// The node has it no more.
    pub fn handle_gone(&mut self, path: &ResourcePath) {
        if let Some(id) = id_of(path) {
            self.forget(&id);
        }
    }

    /// A property of a device is this now.
    pub fn report(&mut self, now: Instant, device: &Id, property: &str, value: &str) {
        let Some(rules) = self.of_device.get(device) else { return };
        for id in rules.clone() {
            let Some(rule) = self.rules.get_mut(&id) else { continue };
            if rule.spec.when.property != property {
                continue;
            }
            let Some(place) = place(&rule.spec.when, value) else { continue };
            value.clone_into(&mut rule.value);
            match (rule.state, place) {
                (State::Idle, Place::Beyond) => {
                    let held = seconds(rule.spec.when.for_seconds.unwrap_or(0.0));
                    let cooldown = rule.spec.cooldown_seconds.map_or(COOLDOWN, seconds);
                    let cool = rule.begun.back().map(|last| *last + cooldown);
                    let at = cool.map_or(now + held, |cool| cool.max(now + held));
                    rule.state = State::Waiting(at);
                    self.timers.insert((at, id));
                }
                (State::Waiting(at), Place::Back) => {
                    rule.state = State::Idle;
                    self.timers.remove(&(at, id));
                }
                (State::Active, Place::Back) => {
                    rule.state = State::Idle;
                    self.end(now, &id);
                }
                _ => {}
            }
        }
        self.handle_time(now);
    }

    /// Nothing but time.
    pub fn handle_time(&mut self, now: Instant) {
        while let Some((at, _)) = self.timers.first()
            && *at <= now
            && let Some((_, id)) = self.timers.pop_first()
        {
            self.begin(now, &id);
        }
    }

    /// What a rule let run before a restart; to be given before anything is reported, after the rules. Limits of a rule that
    /// is no more are lifted.
    pub fn resume(&mut self, limits: &RuleLimits) {
        match self.rules.get_mut(&limits.rule) {
            Some(rule) if limits.active && scales(&rule.spec) => rule.state = State::Active,
            Some(rule) if scales(&rule.spec) => {}
            _ => self.lift(&limits.rule),
        }
    }

    /// What came of an action: `Err` has a reason for people.
    pub fn done(&mut self, rule: &Id, what: &str, done: Result<(), String>) {
        let Some(known) = self.rules.get(rule) else { return };
        let uid = known.uid.clone();
        let (warning, reason, message) = match done {
            Ok(()) => (false, "RuleActed", what.to_owned()),
            Err(error) => (true, "RuleFailed", format!("{what}: {error}")),
        };
        let told = Told { rule: rule.clone(), uid, warning, reason, message };
        self.outputs.push_back(Output::Told(told));
    }

    /// Returns the next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`Self::handle_time`], if nothing else happens.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    fn begin(&mut self, now: Instant, id: &Id) {
        let Some(rule) = self.rules.get_mut(id) else { return };
        rule.state = State::Active;
        if rule.paused_until.is_some_and(|until| now < until) {
            return;
        }
        rule.paused_until = None;
        while rule.begun.front().is_some_and(|at| now.duration_since(*at) >= WINDOW) {
            rule.begun.pop_front();
        }
        if rule.begun.len() >= BEGINNINGS_MAX {
            rule.paused_until = Some(now + PAUSE);
            let message = format!(
                "began {BEGINNINGS_MAX} times in {} s and does nothing for {} s; do two rules set each other off?",
                WINDOW.as_secs(),
                PAUSE.as_secs()
            );
            return self.tell(id, true, "RulePaused", message);
        }
        rule.begun.push_back(now);
        let when = &rule.spec.when;
        let message = format!("{} {} is {}", when.device, when.property, short(&rule.value));
        let (value, actions) = (rule.value.clone(), rule.spec.then.clone());
        self.tell(id, false, "RuleBegan", message);
        self.act(id, &value, actions);
    }

    fn end(&mut self, now: Instant, id: &Id) {
        let Some(rule) = self.rules.get(id) else { return };
        // The end of what did not begin, as the rule pauses, is none.
        if rule.paused_until.is_some_and(|until| now < until) {
            return;
        }
        let when = &rule.spec.when;
        let message = format!("{} {} is {} again", when.device, when.property, short(&rule.value));
        let (value, actions) = (rule.value.clone(), rule.spec.otherwise.clone());
        self.tell(id, false, "RuleEnded", message);
        self.act(id, &value, actions);
    }

    fn act(&mut self, id: &Id, value: &str, actions: Vec<RuleAction>) {
        let rule = self.rules.get(id);
        if let Some(rule) = rule.filter(|rule| scales(&rule.spec)) {
            let scale = actions.iter().filter_map(|action| action.scale.as_ref());
            let limits = scale.filter_map(|scale| Some((scale.workload.clone(), scale.replicas?)));
            let active = rule.state == State::Active;
            // The last word about a workload counts.
            let limits: BTreeMap<String, u32> = limits.collect();
            let limits = limits.into_iter().collect();
            self.outputs.push_back(Output::Limit(RuleLimits { rule: id.clone(), active, limits }));
        }
        for mut action in actions {
            if action.scale.is_some() {
                continue;
            }
            if let Some(publish) = &mut action.publish {
                publish.payload = publish.payload.replace("{value}", value);
            }
            self.outputs.push_back(Output::Act { rule: id.clone(), action });
        }
    }

    fn tell(&mut self, id: &Id, warning: bool, reason: &'static str, message: String) {
        let uid = self.rules.get(id).map(|rule| rule.uid.clone()).unwrap_or_default();
        self.outputs.push_back(Output::Told(Told {
            rule: id.clone(),
            uid,
            warning,
            reason,
            message,
        }));
    }

    fn lift(&mut self, id: &Id) {
        let nothing = RuleLimits { rule: id.clone(), active: false, limits: Vec::new() };
        self.outputs.push_back(Output::Limit(nothing));
    }

    fn forget(&mut self, id: &Id) {
        let Some(rule) = self.rules.remove(id) else { return };
        if scales(&rule.spec) {
            self.lift(id);
        }
        if let State::Waiting(at) = rule.state {
            self.timers.remove(&(at, id.clone()));
        }
        let namespace = id.split('/').next().unwrap_or_default();
        let device = device_of(namespace, &rule.spec.when.device);
        if let Some(rules) = self.of_device.get_mut(&device) {
            rules.remove(id);
            if rules.is_empty() {
                self.of_device.remove(&device);
            }
        }
    }
}

/// Where a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Beyond,
    /// Not beyond, and not far enough back.
    Between,
    Back,
}

/// `None` when the value says nothing: no number where one is compared.
fn place(when: &RuleCondition, value: &str) -> Option<Place> {
    if let Some(wanted) = &when.equals {
        return Some(if value == wanted { Place::Beyond } else { Place::Back });
    }
    let number: f64 = value.parse().ok().filter(|number: &f64| number.is_finite())?;
    let back = when.hysteresis.unwrap_or(0.0);
    let (beyond, between) = match (when.above, when.below) {
        (Some(limit), _) => (number > limit, number > limit - back),
        (None, Some(limit)) => (number < limit, number < limit + back),
        (None, None) => return None,
    };
    Some(match (beyond, between) {
        (true, _) => Place::Beyond,
        (false, true) => Place::Between,
        (false, false) => Place::Back,
    })
}

/// Reads a rule and checks what its definition cannot.
///
/// # Errors
///
/// [`RuleError`].
pub fn read(object: &Value) -> Result<DeviceRuleSpec, RuleError> {
    let rule: DeviceRule = serde_json::from_value(object.clone())
        .map_err(|error| RuleError::Unreadable(error.to_string()))?;
    rule.spec.check()?;
    Ok(rule.spec)
}

/// Whether a rule limits what runs.
fn scales(spec: &DeviceRuleSpec) -> bool {
    spec.then.iter().chain(&spec.otherwise).any(|action| action.scale.is_some())
}

fn id_of(path: &ResourcePath) -> Option<Id> {
    Some(device_of(path.namespace(), path.name()?))
}

fn device_of(namespace: &str, name: &str) -> Id {
    format!("{namespace}/{name}").into()
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default() // the range was checked
}

fn short(value: &str) -> String {
    value.chars().take(TOLD_LEN_MAX).collect()
}

#[cfg(test)]
mod tests;
