//! How a Deployment moves from one ReplicaSet to the next, and its status.
//!
//! One call of [`plan`] gives the steps that are right for what was observed; the ReplicaSets' events bring the next
//! call. The available count stays at or above `replicas - maxUnavailable` and the total at or below
//! `replicas + maxSurge`, whatever the order of events.
//!
//! Source: the documented behaviour of Deployments; annotations, reasons and messages are those that
//! `kubectl rollout status|history|undo` and `kubectl wait` read.

use super::object::{
    annotation, condition, created, earliest, generation, is_deleting, label, labels, later, list,
    name, namespace, normal_template, number, owner_reference, scaled, short_hash, stamp, text,
    time, uid,
};
use super::replica_set::replicas;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

/// Label that tells the pods of one ReplicaSet from those of another.
pub const HASH_LABEL: &str = "pod-template-hash";
/// Annotation with the number of a revision.
pub const REVISION: &str = "deployment.kubernetes.io/revision";
/// Annotation with earlier numbers of a revision that came back.
pub const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
/// Annotation with the Deployment's replica count when the ReplicaSet was last scaled.
pub const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
/// Annotation with that count plus `maxSurge`.
pub const MAX: &str = "deployment.kubernetes.io/max-replicas";
/// Annotations that stay on the Deployment.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED,
    MAX,
    "deprecated.deployment.rollback.to",
];
/// Longest `revision-history` annotation kept, in bytes.
const HISTORY_LEN_MAX: usize = 2000;

/// One write.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Create this ReplicaSet.
    Create(Value),
    /// Set `spec.replicas` and annotations of the named ReplicaSet.
    Scale {
        /// ReplicaSet.
        name: String,
        /// Replicas before.
        from: i64,
        /// Replicas after.
        to: i64,
        /// Annotations to set.
        annotations: Map<String, Value>,
    },
    /// Set annotations (and `minReadySeconds`) of the named ReplicaSet.
    Annotate {
        /// ReplicaSet.
        name: String,
        /// Annotations to set.
        annotations: Map<String, Value>,
        /// New `spec.minReadySeconds`.
        min_ready_seconds: Option<i64>,
    },
    /// Delete the named ReplicaSet, past the history limit.
    Delete {
        /// ReplicaSet.
        name: String,
    },
    /// Set the revision annotation of the Deployment.
    Revision(String),
}

/// What to do, what to report, and when to look again without an event.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Writes, in order.
    pub steps: Vec<Step>,
    /// The Deployment's status.
    pub status: Value,
    /// When the progress deadline may pass.
    pub again_at: Option<Timestamp>,
}

/// What was read of one Deployment.
#[derive(Debug, Clone, Copy)]
pub struct Observed<'a> {
    /// The Deployment.
    pub deployment: &'a Value,
    /// The ReplicaSets that it controls.
    pub replica_sets: &'a [Value],
    /// Whether a pod of a ReplicaSet that is not current still runs; matters to `Recreate` only.
    pub old_pods_run: bool,
}

/// Returns what the Deployment needs next.
pub fn plan(observed: Observed<'_>, now: Timestamp) -> Plan {
    let rollout = Rollout::new(observed);
    let deployment = observed.deployment;
    let mut steps = Vec::new();
    if !is_deleting(deployment) {
        let paused = super::object::flag(deployment, "/spec/paused");
        let resize = paused || rollout.is_being_scaled();
        if resize {
            rollout.scale(&mut steps);
        }
        if text(deployment, "/spec/strategy/type") == "Recreate" {
            // Two active ReplicaSets are not resized: the old one goes in any case.
            if !paused && steps.is_empty() {
                rollout.recreate(&mut steps);
            }
        } else if !resize {
            rollout.roll(&mut steps);
        }
        if steps.is_empty() {
            rollout.clean_up(&mut steps);
        }
    }
    let (status, again_at) = rollout.status(&steps, now);
    Plan { steps, status, again_at }
}

/// The hash of the Deployment's current template.
pub fn template_hash(deployment: &Value) -> String {
    let template = deployment.pointer("/spec/template").cloned().unwrap_or_default();
    let collisions = number(deployment, "/status/collisionCount").unwrap_or(0);
    short_hash(&normal_template(&template, HASH_LABEL), collisions)
}

/// The ReplicaSet of the Deployment's current template, if there is one; the oldest of several.
pub fn current<'a>(deployment: &Value, replica_sets: &'a [Value]) -> Option<&'a Value> {
    let template = |object: &Value| {
        normal_template(object.pointer("/spec/template").unwrap_or(&Value::Null), HASH_LABEL)
    };
    let (wanted, hash) = (template(deployment), template_hash(deployment));
    let oldest = |fits: &dyn Fn(&Value) -> bool| {
        let fitting = replica_sets.iter().filter(|set| fits(set));
        fitting.min_by_key(|set| (created(set), name(set)))
    };
    // The hash is the second way: defaults added to a stored template must not make a new revision.
    oldest(&|set| template(set) == wanted)
        .or_else(|| oldest(&|set| label(set, HASH_LABEL) == Some(hash.as_str())))
}

/// The revision number of a ReplicaSet or Deployment, 0 without one.
pub fn revision(object: &Value) -> i64 {
    annotation(object, REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

struct Rollout<'a> {
    deployment: &'a Value,
    old_pods_run: bool,
    hash: String,
    wanted: i64,
    surge: i64,
    unavailable: i64,
    /// The ReplicaSet of the current template.
    new: Option<&'a Value>,
    /// The others, oldest first.
    old: Vec<&'a Value>,
}

impl<'a> Rollout<'a> {
    fn new(observed: Observed<'a>) -> Self {
        let deployment = observed.deployment;
        let wanted = replicas(deployment);
        let (surge, unavailable) = limits(deployment, wanted);
        let hash = template_hash(deployment);
        let mut sets: Vec<&Value> = observed.replica_sets.iter().collect();
        sets.sort_by_cached_key(|set| (created(set), name(set).to_owned()));
        let new = current(deployment, observed.replica_sets);
        let old =
            sets.into_iter().filter(|set| new.is_none_or(|new| !std::ptr::eq(*set, new))).collect();
        Self {
            deployment,
            old_pods_run: observed.old_pods_run,
            hash,
            wanted,
            surge,
            unavailable,
            new,
            old,
        }
    }

    fn all(&self) -> impl Iterator<Item = &'a Value> {
        self.old.iter().copied().chain(self.new)
    }

    fn sum(&self, pointer: &str) -> i64 {
        self.all().filter_map(|set| number(set, pointer)).sum()
    }

    fn total(&self) -> i64 {
        self.all().map(replicas).sum()
    }

    fn scale_to(&self, steps: &mut Vec<Step>, set: &Value, to: i64) -> bool {
        if replicas(set) == to {
            return false;
        }
        steps.push(Step::Scale {
            name: name(set).to_owned(),
            from: replicas(set),
            to,
            annotations: self.size_annotations(),
        });
        true
    }

    fn size_annotations(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert(DESIRED.to_owned(), json!(self.wanted.to_string()));
        map.insert(MAX.to_owned(), json!((self.wanted + self.surge).to_string()));
        map
    }

    /// Size that the new ReplicaSet may have now.
    fn new_size(&self, current: i64) -> i64 {
        if text(self.deployment, "/spec/strategy/type") == "Recreate" {
            return self.wanted;
        }
        let room = self.wanted + self.surge - self.total();
        if room <= 0 { current } else { current + room.min((self.wanted - current).max(0)) }
    }

    /// Makes the current revision exist and carry the newest number; returns whether it exists already.
    fn ensure_new(&self, steps: &mut Vec<Step>) -> bool {
        let number = self.old.iter().map(|set| revision(set)).max().unwrap_or(0) + 1;
        let Some(new) = self.new else {
            steps.push(Step::Create(self.new_replica_set(number)));
            if revision(self.deployment) != number {
                steps.push(Step::Revision(number.to_string()));
            }
            return false;
        };
        let own = revision(new);
        let mut annotations = self.copied_annotations(new);
        let number = if own < number {
            annotations.insert(REVISION.to_owned(), json!(number.to_string()));
            if own > 0 {
                annotations.insert(REVISION_HISTORY.to_owned(), json!(history(new, own)));
            }
            number
        } else {
            own
        };
        let minimum = super::object::number(self.deployment, "/spec/minReadySeconds").unwrap_or(0);
        let min_ready_seconds = (super::object::number(new, "/spec/minReadySeconds").unwrap_or(0)
            != minimum)
            .then_some(minimum);
        if !annotations.is_empty() || min_ready_seconds.is_some() {
            steps.push(Step::Annotate {
                name: name(new).to_owned(),
                annotations,
                min_ready_seconds,
            });
        }
        if revision(self.deployment) != number {
            steps.push(Step::Revision(number.to_string()));
        }
        true
    }

    /// Annotations of the Deployment that the ReplicaSet lacks or has with another value.
    fn copied_annotations(&self, set: &Value) -> Map<String, Value> {
        let all = self.deployment.pointer("/metadata/annotations").and_then(Value::as_object);
        all.into_iter()
            .flatten()
            .filter(|(key, value)| {
                !NOT_COPIED.contains(&key.as_str()) && annotation(set, key) != value.as_str()
            })
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    fn new_replica_set(&self, number: i64) -> Value {
        let deployment = self.deployment;
        let mut template = deployment.pointer("/spec/template").cloned().unwrap_or_default();
        template["metadata"]["labels"][HASH_LABEL] = json!(self.hash);
        let mut selector = deployment.pointer("/spec/selector").cloned().unwrap_or_default();
        selector["matchLabels"][HASH_LABEL] = json!(self.hash);
        let mut annotations = self.copied_annotations(&Value::Null);
        annotations.extend(self.size_annotations());
        annotations.insert(REVISION.to_owned(), json!(number.to_string()));
        let mut spec = json!({
            "replicas": self.new_size(0), "selector": selector, "template": template,
        });
        if let Some(minimum) = deployment.pointer("/spec/minReadySeconds") {
            spec["minReadySeconds"] = minimum.clone();
        }
        json!({
            "apiVersion": "apps/v1", "kind": "ReplicaSet",
            "metadata": {
                "name": format!("{}-{}", name(deployment), self.hash),
                "namespace": namespace(deployment),
                "labels": labels(&template).cloned().unwrap_or_default(),
                "annotations": annotations,
                "ownerReferences": [owner_reference(deployment, "apps/v1", "Deployment")],
            },
            "spec": spec,
        })
    }

    /// Whether someone changed `spec.replicas` since the ReplicaSets were last sized.
    fn is_being_scaled(&self) -> bool {
        self.all().filter(|set| replicas(set) > 0).any(|set| {
            annotation(set, DESIRED)
                .and_then(|desired| desired.parse::<i64>().ok())
                .is_some_and(|desired| desired != self.wanted)
        })
    }

    /// Fits the ReplicaSets to a new replica count in their present proportions.
    fn scale(&self, steps: &mut Vec<Step>) {
        let active: Vec<&Value> = self.all().filter(|set| replicas(set) > 0).collect();
        let latest = || self.new.or_else(|| self.old.last().copied());
        if active.len() <= 1 {
            if let Some(set) = active.first().copied().or_else(latest)
                && !self.scale_to(steps, set, self.wanted)
                && self.is_being_scaled()
            {
                steps.push(Step::Annotate {
                    name: name(set).to_owned(),
                    annotations: self.size_annotations(),
                    min_ready_seconds: None,
                });
            }
            return;
        }
        if self.new.is_some_and(|new| self.is_saturated(new)) {
            for set in self.old.iter().filter(|set| replicas(set) > 0) {
                self.scale_to(steps, set, 0);
            }
            return;
        }
        if text(self.deployment, "/spec/strategy/type") == "Recreate" {
            return;
        }
        let allowed = if self.wanted > 0 { self.wanted + self.surge } else { 0 };
        let to_add = allowed - active.iter().map(|set| replicas(set)).sum::<i64>();
        let mut sets = active;
        // The largest first; among equals the newer one grows and the older one shrinks.
        sets.sort_by_cached_key(|set| {
            let age = created(set).as_second();
            (-replicas(set), if to_add > 0 { -age } else { age }, name(set).to_owned())
        });
        let mut added = 0;
        let mut sizes: Vec<i64> = Vec::with_capacity(sets.len());
        for set in &sets {
            let share = if to_add == 0 { 0 } else { self.share(set, to_add - added) };
            added += share;
            sizes.push(replicas(set) + share);
        }
        if let Some(first) = sizes.first_mut() {
            *first = (*first + to_add - added).max(0);
        }
        for (set, size) in sets.iter().zip(sizes) {
            if !self.scale_to(steps, set, size) {
                steps.push(Step::Annotate {
                    name: name(set).to_owned(),
                    annotations: self.size_annotations(),
                    min_ready_seconds: None,
                });
            }
        }
    }

    /// Part of `left` (negative when shrinking) that falls to this ReplicaSet.
    fn share(&self, set: &Value, left: i64) -> i64 {
        let current = replicas(set);
        if left == 0 || current == 0 {
            return 0;
        }
        let grown = if self.wanted == 0 {
            -current
        } else {
            let before = annotation(set, MAX)
                .and_then(|max| max.parse::<i64>().ok())
                .or_else(|| number(self.deployment, "/status/replicas"))
                .filter(|before| *before > 0)
                .unwrap_or(current);
            // Rounded to the nearest.
            (2 * current * (self.wanted + self.surge) + before) / (2 * before) - current
        };
        if left > 0 { grown.clamp(0, left) } else { grown.clamp(left, 0) }
    }

    fn is_saturated(&self, set: &Value) -> bool {
        let desired = annotation(set, DESIRED).and_then(|desired| desired.parse::<i64>().ok());
        replicas(set) == self.wanted
            && desired == Some(self.wanted)
            && number(set, "/status/availableReplicas").unwrap_or(0) == self.wanted
    }

    fn roll(&self, steps: &mut Vec<Step>) {
        if !self.ensure_new(steps) {
            return;
        }
        let Some(new) = self.new else { return };
        let size = replicas(new);
        let target = if size > self.wanted { self.wanted } else { self.new_size(size) };
        if self.scale_to(steps, new, target) {
            return;
        }
        let shrinkable: Vec<&Value> =
            self.old.iter().copied().filter(|set| replicas(set) > 0).collect();
        if shrinkable.is_empty() {
            return;
        }
        let minimum = self.wanted - self.unavailable;
        // A ReplicaSet shrunk a moment ago may still report the pods that it is about to lose.
        let available =
            |set: &Value| number(set, "/status/availableReplicas").unwrap_or(0).min(replicas(set));
        let new_unavailable = replicas(new) - available(new);
        let mut clean = self.total() - minimum - new_unavailable;
        if clean <= 0 {
            return;
        }
        // Pods of old ReplicaSets that do not work go first: nothing is lost with them.
        let mut sizes: Vec<i64> = shrinkable.iter().map(|set| replicas(set)).collect();
        for (set, size) in shrinkable.iter().zip(&mut sizes) {
            let broken = (*size - available(set)).max(0).min(clean.max(0));
            *size -= broken;
            clean -= broken;
        }
        let mut spare = self.all().map(available).sum::<i64>() - minimum;
        for size in &mut sizes {
            let gone = (*size).min(spare.max(0)).min(clean.max(0));
            *size -= gone;
            spare -= gone;
            clean -= gone;
        }
        for (set, size) in shrinkable.iter().zip(sizes) {
            self.scale_to(steps, set, size);
        }
    }

    fn recreate(&self, steps: &mut Vec<Step>) {
        let active: Vec<&&Value> = self.old.iter().filter(|set| replicas(set) > 0).collect();
        if !active.is_empty() {
            for set in active {
                self.scale_to(steps, set, 0);
            }
            return;
        }
        if self.old_pods_run {
            return;
        }
        if self.ensure_new(steps)
            && let Some(new) = self.new
        {
            self.scale_to(steps, new, self.wanted);
        }
    }

    /// Deletes ReplicaSets past the history limit.
    ///
    /// Kubernetes waits with this until the rollout is done. A site may be offline for weeks while its app changes with
    /// every push, and no rollout is done there; so we do not wait. What goes has no pods and is past the limit either
    /// way.
    fn clean_up(&self, steps: &mut Vec<Step>) {
        let Some(limit) = number(self.deployment, "/spec/revisionHistoryLimit") else { return };
        let mut idle: Vec<&&Value> = self
            .old
            .iter()
            .filter(|set| {
                replicas(set) == 0
                    && number(set, "/status/replicas").unwrap_or(0) == 0
                    && number(set, "/status/observedGeneration").unwrap_or(0) >= generation(set)
                    && !is_deleting(set)
            })
            .collect();
        idle.sort_by_key(|set| revision(set));
        let surplus = idle.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        steps.extend(idle[..surplus].iter().map(|set| Step::Delete { name: name(set).to_owned() }));
    }

    fn counts(&self) -> Counts {
        let available = self.sum("/status/availableReplicas");
        Counts {
            replicas: self.sum("/status/replicas"),
            updated: self.new.and_then(|new| number(new, "/status/replicas")).unwrap_or(0),
            ready: self.sum("/status/readyReplicas"),
            available,
            unavailable: (self.total() - available).max(0),
        }
    }

    fn is_complete(&self, counts: &Counts) -> bool {
        self.new.is_some()
            && counts.updated == self.wanted
            && counts.replicas == self.wanted
            && counts.available == self.wanted
    }

    fn status(&self, steps: &[Step], now: Timestamp) -> (Value, Option<Timestamp>) {
        let deployment = self.deployment;
        let counts = self.counts();
        let mut conditions: Vec<Value> = list(deployment, "/status/conditions").to_vec();
        let enough = counts.available >= self.wanted - self.unavailable;
        let (status, reason, message) = if enough {
            ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
        } else {
            (
                "False",
                "MinimumReplicasUnavailable",
                "Deployment does not have minimum availability.",
            )
        };
        set(&mut conditions, "Available", status, reason, message, now);
        let again_at = self.progress(&mut conditions, &counts, steps, now);
        self.failure(&mut conditions);
        let mut status =
            json!({"observedGeneration": generation(deployment), "conditions": conditions});
        for (field, count) in [
            ("replicas", counts.replicas),
            ("updatedReplicas", counts.updated),
            ("readyReplicas", counts.ready),
            ("availableReplicas", counts.available),
            ("unavailableReplicas", counts.unavailable),
        ] {
            if count > 0 {
                status[field] = json!(count);
            }
        }
        if let Some(collisions) = deployment.pointer("/status/collisionCount") {
            status["collisionCount"] = collisions.clone();
        }
        (status, again_at)
    }

    /// The Progressing condition; returns when its deadline passes.
    fn progress(
        &self,
        conditions: &mut Vec<Value>,
        counts: &Counts,
        steps: &[Step],
        now: Timestamp,
    ) -> Option<Timestamp> {
        let deployment = self.deployment;
        // The largest int32 means that there is no deadline.
        let deadline = number(deployment, "/spec/progressDeadlineSeconds")
            .filter(|seconds| *seconds != i64::from(i32::MAX))?;
        let before = condition(deployment, "Progressing");
        let reason_before = before.map_or("", |condition| text(condition, "/reason"));
        if super::object::flag(deployment, "/spec/paused") {
            if reason_before != "DeploymentPaused" {
                set(
                    conditions,
                    "Progressing",
                    "Unknown",
                    "DeploymentPaused",
                    "Deployment is paused",
                    now,
                );
            }
            return None;
        }
        if reason_before == "DeploymentPaused" {
            set(
                conditions,
                "Progressing",
                "Unknown",
                "DeploymentResumed",
                "Deployment is resumed",
                now,
            );
        }
        let set_name = self.new.map_or_else(
            || format!("{}-{}", name(deployment), self.hash),
            |new| name(new).to_owned(),
        );
        let created = steps.iter().any(|step| matches!(step, Step::Create(_)));
        if created {
            let message = format!("Created new replica set \"{set_name}\"");
            set(conditions, "Progressing", "True", "NewReplicaSetCreated", &message, now);
        } else if self.is_complete(counts) {
            let message = format!("ReplicaSet \"{set_name}\" has successfully progressed.");
            set(conditions, "Progressing", "True", "NewReplicaSetAvailable", &message, now);
            return None;
        } else if before.is_none() && self.new.is_some() {
            let message = format!("Found new replica set \"{set_name}\"");
            set(conditions, "Progressing", "True", "FoundNewReplicaSet", &message, now);
        } else if counts.moved_from(&Counts::of_status(deployment)) {
            let message = format!("ReplicaSet \"{set_name}\" is progressing.");
            // Each step forward restarts the deadline, so the update time moves with it.
            conditions.retain(|condition| {
                text(condition, "/type") != "Progressing" || text(condition, "/status") == "True"
            });
            set(conditions, "Progressing", "True", "ReplicaSetUpdated", &message, now);
            touch(conditions, "Progressing", now);
        } else if reason_before == "NewReplicaSetAvailable" {
            // A finished rollout that lost a pod is not a rollout: no deadline.
            return None;
        }
        let progressing = conditions.iter().find(|c| text(c, "/type") == "Progressing")?;
        if text(progressing, "/reason") == "ProgressDeadlineExceeded" {
            return None;
        }
        let since = time(progressing, "/lastUpdateTime")
            .or_else(|| time(progressing, "/lastTransitionTime"));
        // Written times are whole seconds, so a deadline lies up to a second late rather than early.
        let at = later(since.unwrap_or(now), deadline.saturating_add(1));
        if at > now {
            return earliest(None, Some(at));
        }
        let message = format!("ReplicaSet \"{set_name}\" has timed out progressing.");
        set(conditions, "Progressing", "False", "ProgressDeadlineExceeded", &message, now);
        None
    }

    /// Carries a ReplicaFailure up from the ReplicaSets.
    fn failure(&self, conditions: &mut Vec<Value>) {
        conditions.retain(|condition| text(condition, "/type") != "ReplicaFailure");
        let of = |set: &&'a Value| condition(set, "ReplicaFailure");
        let failed = self.new.as_ref().and_then(of).or_else(|| self.old.iter().find_map(of));
        if let Some(failed) = failed {
            let mut failed = failed.clone();
            failed["lastUpdateTime"] = failed["lastTransitionTime"].clone();
            conditions.push(failed);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counts {
    replicas: i64,
    updated: i64,
    ready: i64,
    available: i64,
    unavailable: i64,
}

impl Counts {
    fn of_status(deployment: &Value) -> Self {
        let count = |field: &str| number(deployment, &format!("/status/{field}")).unwrap_or(0);
        Self {
            replicas: count("replicas"),
            updated: count("updatedReplicas"),
            ready: count("readyReplicas"),
            available: count("availableReplicas"),
            unavailable: count("unavailableReplicas"),
        }
    }

    /// Whether the rollout came closer to its end.
    fn moved_from(&self, before: &Self) -> bool {
        self.updated > before.updated
            || self.replicas - self.updated < before.replicas - before.updated
            || self.ready > before.ready
            || self.available > before.available
    }
}

/// `maxSurge` (rounded up) and `maxUnavailable` (rounded down); both zero would never move, so one pod may be missing.
pub fn limits(deployment: &Value, wanted: i64) -> (i64, i64) {
    if text(deployment, "/spec/strategy/type") == "Recreate" {
        return (0, 0);
    }
    let of = |field: &str, up| {
        scaled(deployment.pointer(&format!("/spec/strategy/rollingUpdate/{field}")), wanted, up)
    };
    let default = json!("25%");
    let surge = of("maxSurge", true).or_else(|| scaled(Some(&default), wanted, true)).unwrap_or(0);
    let unavailable =
        of("maxUnavailable", false).or_else(|| scaled(Some(&default), wanted, false)).unwrap_or(0);
    if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable.min(wanted)) }
}

/// The history annotation with one more number.
fn history(set: &Value, number: i64) -> String {
    let before = annotation(set, REVISION_HISTORY).unwrap_or("");
    let number = number.to_string();
    if before.is_empty() {
        return number;
    }
    let mut all: Vec<&str> = before.split(',').filter(|old| *old != number).collect();
    all.push(&number);
    let mut start = 0;
    while all[start..].join(",").len() > HISTORY_LEN_MAX {
        start += 1;
    }
    all[start..].join(",")
}

/// Sets a condition with `lastUpdateTime`; the same status and reason is no change, except for a new message.
fn set(
    conditions: &mut Vec<Value>,
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    if super::object::set_condition(conditions, kind, status, reason, message, now) {
        touch(conditions, kind, now);
    }
}

fn touch(conditions: &mut [Value], kind: &str, now: Timestamp) {
    if let Some(condition) = conditions.iter_mut().find(|c| text(c, "/type") == kind) {
        condition["lastUpdateTime"] = json!(stamp(now));
    }
}

/// Whether a ReplicaSet found under the new name belongs to the Deployment; if not, the hash has to change.
pub fn is_own(deployment: &Value, replica_set: &Value) -> bool {
    super::object::controller_of(replica_set)
        .is_some_and(|owner| text(owner, "/uid") == uid(deployment))
}

#[cfg(test)]
mod tests;
