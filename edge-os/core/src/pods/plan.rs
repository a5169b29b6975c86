//! What to do next for one pod.
//!
//! [`plan`] compares what the pod asks for with what the runtime has. The caller does the steps in
//! order, stops at the first that fails, reads the runtime's state again, and plans again until a
//! plan is empty; then it waits for a change or for [`Plan::retry_at`]. A plan never leads to two
//! live instances of one container: an instance that may live is killed before, in the same plan.
//!
//! Source: kubernetes/kubernetes pkg/kubelet/kuberuntime/kuberuntime_manager.go
//! (`computePodActions`), pkg/kubelet/container/helpers.go (`ShouldContainerBeRestarted`).

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::backoff::Backoff;
use super::image;
use super::kubelet;
use super::runtime::{Instance, PodRuntime, State};
use super::{PodName, RestartPolicy, definition_hash, init_containers, is_sidecar, restart_policy};

/// What the engine remembers of a pod beside the runtime's state.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Highest restart count seen of each container, also by an agent before this one.
    pub restart_counts: BTreeMap<String, u32>,
    /// Why the last try to start a container failed; removed when a start succeeds.
    pub start_errors: BTreeMap<String, Waiting>,
    /// Delays of restarts, by [`backoff_key`].
    pub restarts: Backoff,
    /// What probes found, by container id.
    pub probes: BTreeMap<String, Probed>,
    /// [`definition_hash`] of instances that ran when the node was taken over from another agent, by container id.
    pub taken_over: BTreeMap<String, String>,
}

/// What probes found about one instance of a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Probed {
    pub started: Option<bool>,
    pub ready: Option<bool>,
    /// The instance has to be killed.
    pub failed: Option<FailedProbe>,
}

/// Which probe failed so often that the container has to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailedProbe {
    Liveness,
    Startup,
}

/// Why a container waits, as its status says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub reason: String,
    pub message: String,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Stop every container and every sandbox of the pod.
    KillPod {
        /// A new sandbox follows, and users are told so.
        sandbox_changed: bool,
    },
    /// Stop one instance.
    Kill { id: String, container: String, message: String, probe: Option<FailedProbe> },
    /// Remove an instance that never ran; its name is needed again.
    Remove { id: String },
    /// Make a sandbox.
    CreateSandbox { attempt: u32 },
    /// Make and start an instance.
    Start {
        container: String,
        init: bool,
        restart_count: u32,
        /// When the instance before it ended, if it did: the next restart's delay grows.
        after_exit: Option<Timestamp>,
    },
}

/// What to do now and when to look again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
    /// Containers whose restart has to wait.
    pub backing_off: BTreeMap<String, Waiting>,
    /// When the first of those waits ends.
    pub retry_at: Option<Timestamp>,
}

/// Returns the key of a container's restart delay. A changed image starts without a delay.
pub fn backoff_key(container: &str, hash: &str) -> String {
    format!("{container}/{hash}")
}

/// Returns what to do for a pod that is to run.
pub fn plan(pod: &Pod, runtime: &PodRuntime, facts: &Facts, now: Timestamp) -> Plan {
    let (Some(spec), Some(name)) = (&pod.spec, PodName::of(pod)) else {
        return Plan::default();
    };
    Planner { spec, name, runtime, facts, now, plan: Plan::default() }.plan()
}

/// Returns what to do for a pod that is to stop: nothing, or kill it.
pub fn plan_stop(runtime: &PodRuntime) -> Plan {
    let mut plan = Plan::default();
    if runtime.may_live() {
        plan.steps.push(Step::KillPod { sandbox_changed: false });
    }
    plan
}

/// Reason of a container that waits because a rule of the node holds its pod.
pub const HELD_REASON: &str = "HeldByRule";

/// Whether a rule of the node may hold a pod: only one that is always started again, for the end of another one would be
/// its last.
pub fn may_be_held(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| restart_policy(spec) == RestartPolicy::Always)
}

/// Returns what to do for a pod that a rule of the node holds: nothing runs, and every container waits.
pub fn plan_held(pod: &Pod, runtime: &PodRuntime) -> Plan {
    let mut plan = plan_stop(runtime);
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    for container in containers {
        let waiting = Waiting {
            reason: HELD_REASON.to_owned(),
            message: "a rule of the node lets fewer pods of this workload run".to_owned(),
        };
        plan.backing_off.insert(container.name.clone(), waiting);
    }
    plan
}

struct Planner<'a> {
    spec: &'a PodSpec,
    name: PodName,
    runtime: &'a PodRuntime,
    facts: &'a Facts,
    now: Timestamp,
    plan: Plan,
}

/// What becomes of one container.
enum Verdict {
    /// It runs, or waits for its next start: the pod has to stay.
    Keep,
    /// It was started by this plan.
    Started,
    /// It is done for good.
    Done,
}

impl Planner<'_> {
    fn plan(mut self) -> Plan {
        if self.sandbox_is_outdated() {
            self.plan_new_sandbox();
        } else {
            self.plan_in_sandbox();
        }
        self.plan
    }

    fn sandbox_is_outdated(&self) -> bool {
        let Some(newest) = self.runtime.sandbox() else { return true };
        let host_network = super::host_network(self.spec);
        let ready = self.runtime.sandboxes.iter().filter(|sandbox| sandbox.ready).count();
        ready > 1
            || !newest.ready
            || newest.host_network != host_network
            || (!host_network && newest.ips.is_empty())
    }

    fn plan_new_sandbox(&mut self) {
        let policy = restart_policy(self.spec);
        let has_run = |container: &&Container| {
            let newest = self.runtime.newest(&container.name);
            newest.is_some_and(|one| one.state != State::Created)
        };
        let any_ran =
            self.spec.containers.iter().chain(init_containers(self.spec)).any(|c| has_run(&c));
        let wanted: Vec<&Container> = self
            .spec
            .containers
            .iter()
            .filter(|container| match self.runtime.newest(&container.name) {
                Some(one) => policy.restarts(&one.state),
                None => true,
            })
            .collect();
        let over = policy == RestartPolicy::Never && any_ran;
        let worth_it = !wanted.is_empty() && !over;
        let leftovers = !self.runtime.sandboxes.is_empty();
        if !worth_it {
            if self.runtime.may_live() {
                self.plan.steps.push(Step::KillPod { sandbox_changed: false });
            }
            return;
        }
        // With every container in its delay there is no use for a sandbox yet.
        let first_init = init_containers(self.spec).first();
        let starts: Vec<(&Container, bool)> = match first_init {
            Some(init) => vec![(init, true)],
            None => wanted.iter().map(|container| (*container, false)).collect(),
        };
        let before = self.plan.steps.len();
        if leftovers {
            self.plan.steps.push(Step::KillPod { sandbox_changed: true });
        }
        let attempt = self.runtime.sandbox().map_or(0, |newest| newest.attempt + 1);
        self.plan.steps.push(Step::CreateSandbox { attempt });
        let mut started = false;
        for (container, init) in starts {
            // Instances of the old sandbox are dead once it was killed.
            started |= self.start_again(container, init);
        }
        if !started && !self.runtime.may_live() {
            self.plan.steps.truncate(before);
        }
    }

    fn plan_in_sandbox(&mut self) {
        let sandbox = self.runtime.sandbox().expect("a current sandbox exists here").id.clone();
        let in_sandbox = |one: &Instance| one.sandbox == sandbox;
        let is_regular = |one: &Instance| self.spec.containers.iter().any(|c| c.name == one.name);
        let initialized = self
            .runtime
            .containers
            .iter()
            .any(|one| in_sandbox(one) && is_regular(one) && one.state != State::Created);

        let mut alive = false;
        if !init_containers(self.spec).is_empty() {
            match self.plan_init(&sandbox, initialized) {
                InitProgress::Done { alive: sidecars } => alive |= sidecars,
                InitProgress::Running => return,
                InitProgress::Failed => {
                    self.plan.steps.clear();
                    self.plan.steps.push(Step::KillPod { sandbox_changed: false });
                    return;
                }
            }
        }
        let mut working = false;
        for container in &self.spec.containers {
            match self.plan_regular(container, &sandbox) {
                Verdict::Keep | Verdict::Started => working = true,
                Verdict::Done => {}
            }
        }
        // Sidecars alone do not keep a pod: they end with the last regular container.
        let _ = alive;
        if !working {
            self.plan.steps.clear();
            self.plan.steps.push(Step::KillPod { sandbox_changed: false });
        }
    }

    fn plan_init(&mut self, sandbox: &str, initialized: bool) -> InitProgress {
        let mut alive = false;
        for container in init_containers(self.spec) {
            let sidecar = is_sidecar(container);
            if initialized && !sidecar {
                continue;
            }
            let newest = self.runtime.newest(&container.name).filter(|one| one.sandbox == sandbox);
            let Some(newest) = newest else {
                self.start_again(container, true);
                return if initialized {
                    InitProgress::Done { alive: true }
                } else {
                    InitProgress::Running
                };
            };
            match &newest.state {
                State::Running if sidecar => {
                    if !self.is_started(container, newest) && !initialized {
                        return InitProgress::Running;
                    }
                    self.kill_if_probe_failed(container, newest, true);
                    alive = true;
                }
                State::Running => return InitProgress::Running,
                State::Exited(exit) if !sidecar && exit.code == 0 => {}
                State::Exited(_) => {
                    if !sidecar && restart_policy(self.spec) == RestartPolicy::Never {
                        return InitProgress::Failed;
                    }
                    self.start_again(container, true);
                    if !initialized {
                        return InitProgress::Running;
                    }
                    alive = true;
                }
                State::Created | State::Unknown => {
                    self.start_again(container, true);
                    if !initialized {
                        return InitProgress::Running;
                    }
                    alive = true;
                }
            }
        }
        InitProgress::Done { alive }
    }

    fn plan_regular(&mut self, container: &Container, sandbox: &str) -> Verdict {
        let policy = restart_policy(self.spec);
        let Some(newest) = self.runtime.newest(&container.name) else {
            self.start_again(container, false);
            return Verdict::Started;
        };
        if newest.is_running() && newest.sandbox == sandbox {
            if is_outdated(container, newest, self.facts) {
                let message =
                    format!("Container {} definition changed, will be restarted", container.name);
                self.kill(newest, message, None);
                self.start(container, false, newest.restart_count + 1, None);
                return Verdict::Started;
            }
            let restarts = policy != RestartPolicy::Never;
            return if self.kill_if_probe_failed(container, newest, restarts) && !restarts {
                Verdict::Done
            } else {
                Verdict::Keep
            };
        }
        if newest.is_running() {
            // Alive in an older sandbox that is not ready any more.
            let message = format!("Container {} is in an old sandbox", container.name);
            self.kill(newest, message, None);
        }
        if !policy.restarts(&newest.state) {
            return Verdict::Done;
        }
        if self.start_again(container, false) { Verdict::Started } else { Verdict::Keep }
    }

    /// Kills `one` when a probe said so; returns whether it did. A started replacement comes with
    /// the next plan, when the exit is known, so that its delay counts from there.
    fn kill_if_probe_failed(
        &mut self,
        container: &Container,
        one: &Instance,
        restarts: bool,
    ) -> bool {
        let Some(probe) = self.facts.probes.get(&one.id).and_then(|probed| probed.failed) else {
            return false;
        };
        let which = match probe {
            FailedProbe::Liveness => "liveness",
            FailedProbe::Startup => "startup",
        };
        let ending = if restarts { ", will be restarted" } else { "" };
        let message = format!("Container {} failed {which} probe{ending}", container.name);
        self.kill(one, message, Some(probe));
        true
    }

    fn is_started(&self, container: &Container, one: &Instance) -> bool {
        container.startup_probe.is_none()
            || self.facts.probes.get(&one.id).is_some_and(|probed| probed.started == Some(true))
    }

    fn kill(&mut self, one: &Instance, message: String, probe: Option<FailedProbe>) {
        let (id, container) = (one.id.clone(), one.name.clone());
        self.plan.steps.push(Step::Kill { id, container, message, probe });
    }

    /// Starts a container that has no live instance, or notes that it has to wait. Returns whether
    /// it is started.
    fn start_again(&mut self, container: &Container, init: bool) -> bool {
        let stored = self.facts.restart_counts.get(&container.name).copied();
        let Some(newest) = self.runtime.newest(&container.name) else {
            self.start(container, init, stored.map_or(0, |count| count + 1), None);
            return true;
        };
        let next = (newest.restart_count + 1).max(stored.unwrap_or(0));
        match &newest.state {
            State::Created => {
                self.plan.steps.push(Step::Remove { id: newest.id.clone() });
                self.start(container, init, newest.restart_count, None);
                true
            }
            State::Unknown => {
                let message = format!(
                    "Container {} is in \"unknown\" state, try killing it before restart",
                    container.name
                );
                self.kill(newest, message, None);
                self.start(container, init, next, None);
                true
            }
            State::Running => {
                // Only reached for an instance of a sandbox that this plan kills.
                self.start(container, init, next, None);
                true
            }
            State::Exited(exit) => {
                let succeeded = exit.code == 0 && init && !is_sidecar(container);
                let key = backoff_key(&container.name, &definition_hash(container));
                let wait = self.facts.restarts.blocked_until(&key, exit.finished_at, self.now);
                if let Some(until) = wait.filter(|_| !succeeded) {
                    let delay = self.facts.restarts.delay(&key).unwrap_or_default();
                    self.wait(container, delay.as_secs(), until);
                    return false;
                }
                self.start(container, init, next, (!succeeded).then_some(exit.finished_at));
                true
            }
        }
    }

    fn start(
        &mut self,
        container: &Container,
        init: bool,
        restart_count: u32,
        after_exit: Option<Timestamp>,
    ) {
        let container = container.name.clone();
        self.plan.steps.push(Step::Start { container, init, restart_count, after_exit });
    }

    fn wait(&mut self, container: &Container, delay_secs: u64, until: Timestamp) {
        let message = format!(
            "back-off {} restarting failed container={} pod={}",
            go_duration(delay_secs),
            container.name,
            self.name.full()
        );
        let waiting = Waiting { reason: "CrashLoopBackOff".to_owned(), message };
        self.plan.backing_off.insert(container.name.clone(), waiting);
        self.plan.retry_at = Some(self.plan.retry_at.map_or(until, |at| at.min(until)));
    }
}

enum InitProgress {
    /// Regular containers may run.
    Done {
        /// Whether a sidecar is there.
        alive: bool,
    },
    /// One has to end, or to be started, first.
    Running,
    /// One failed for good.
    Failed,
}

impl RestartPolicy {
    /// Whether a container in `state` is started again.
    fn restarts(self, state: &State) -> bool {
        match state {
            State::Created | State::Unknown => true,
            State::Running => self != Self::Never,
            State::Exited(exit) => match self {
                Self::Always => true,
                Self::OnFailure => exit.code != 0,
                Self::Never => false,
            },
        }
    }
}

/// Whether the instance was made from another definition than the pod has now.
///
/// Containers that this agent did not make carry no hash of ours. They are kept if kubelet's hash fits, or if the
/// definition is the one under which the node was taken over; else if their image is the one in the pod, as far as the
/// runtime tells.
fn is_outdated(container: &Container, one: &Instance, facts: &Facts) -> bool {
    let wanted = definition_hash(container);
    if let Some(hash) = one.hash.as_ref().or_else(|| facts.taken_over.get(&one.id)) {
        return *hash != wanted;
    }
    if one.kubelet_hash.as_deref() == Some(&kubelet::definition_hash(container)) {
        return false;
    }
    one.user_image.as_ref().is_some_and(|used| {
        let wanted = container.image.as_deref().unwrap_or_default();
        image::normalize(used).ok() != image::normalize(wanted).ok()
    })
}

/// Prints seconds as Go prints a duration: `10s`, `1m20s`, `5m0s`.
pub fn go_duration(seconds: u64) -> String {
    match (seconds / 60, seconds % 60) {
        (0, seconds) => format!("{seconds}s"),
        (minutes, seconds) if minutes < 60 => format!("{minutes}m{seconds}s"),
        (minutes, seconds) => format!("{}h{}m{seconds}s", minutes / 60, minutes % 60),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::runtime::{Exit, Sandbox};
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("valid time")
    }

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec,
        }))
        .expect("pod parses")
    }

    fn sandbox(attempt: u32, ready: bool) -> Sandbox {
        Sandbox {
            id: format!("s{attempt}"),
            attempt,
            ready,
            ips: vec!["10.0.0.2".to_owned()],
            ..Default::default()
        }
    }

    fn instance(name: &str, count: u32, state: State) -> Instance {
        Instance {
            id: format!("{name}-{count}"),
            name: name.to_owned(),
            sandbox: "s0".to_owned(),
            restart_count: count,
            state,
            created_at: at(i64::from(count)),
            started_at: None,
            image: "i".to_owned(),
            image_id: "i".to_owned(),
            hash: Some(definition_hash(&Container {
                name: name.to_owned(),
                image: Some("i".to_owned()),
                ..Default::default()
            })),
            kubelet_hash: None,
            user_image: None,
        }
    }

    fn exited(code: i32) -> State {
        State::Exited(Exit {
            code,
            reason: String::new(),
            message: String::new(),
            finished_at: at(100),
        })
    }

    fn runtime(containers: Vec<Instance>) -> PodRuntime {
        PodRuntime { sandboxes: vec![sandbox(0, true)], containers }
    }

    fn spec(policy: &str) -> serde_json::Value {
        json!({"restartPolicy": policy, "containers": [{"name": "a", "image": "i"}]})
    }

    /// One line per step, so that a table of cases reads well.
    fn text(plan: &Plan) -> String {
        let steps = plan.steps.iter().map(|step| match step {
            Step::KillPod { sandbox_changed: true } => "kill-pod*".to_owned(),
            Step::KillPod { .. } => "kill-pod".to_owned(),
            Step::Kill { id, .. } => format!("kill {id}"),
            Step::Remove { id } => format!("remove {id}"),
            Step::CreateSandbox { attempt } => format!("sandbox {attempt}"),
            Step::Start { container, restart_count, .. } => {
                format!("start {container}-{restart_count}")
            }
        });
        let waits = plan.backing_off.keys().map(|name| format!("wait {name}"));
        steps.chain(waits).collect::<Vec<_>>().join(", ")
    }

    #[track_caller]
    fn check(spec: serde_json::Value, runtime: &PodRuntime, facts: &Facts, expected: &str) {
        assert_eq!(text(&plan(&pod(spec), runtime, facts, at(105))), expected);
    }

    #[test]
    fn a_held_pod_is_stopped_and_its_containers_wait_and_one_that_ends_for_good_is_not_held() {
        let web = pod(json!({"containers": [{"name": "a", "image": "i"}]}));
        let mut runtime = PodRuntime::default();
        assert_eq!(plan_held(&web, &runtime).steps, []);
        runtime.sandboxes.push(sandbox(0, true));
        runtime.containers.push(instance("a", 0, State::Running));
        let plan = plan_held(&web, &runtime);
        assert_eq!(plan.steps, [Step::KillPod { sandbox_changed: false }]);
        assert_eq!(plan.backing_off["a"].reason, HELD_REASON);
        assert!(may_be_held(&web));
        assert!(!may_be_held(&pod(json!({"restartPolicy": "Never", "containers": []}))));
        assert!(!may_be_held(&pod(json!({"restartPolicy": "OnFailure", "containers": []}))));
    }

    #[test]
    fn new_pod_gets_a_sandbox_and_all_containers() {
        check(spec("Always"), &PodRuntime::default(), &Facts::default(), "sandbox 0, start a-0");
    }

    #[test]
    fn running_container_is_left_alone() {
        check(
            spec("Always"),
            &runtime(vec![instance("a", 0, State::Running)]),
            &Facts::default(),
            "",
        );
    }

    #[test]
    fn container_of_kubelet_is_left_alone_while_its_definition_is_the_same() {
        let kubelets = |image: &str, hash: &str| {
            let mut one = instance("a", 3, State::Running);
            one.hash = None;
            one.kubelet_hash = Some(hash.to_owned());
            one.user_image = Some(image.to_owned());
            runtime(vec![one])
        };
        let wanted = Container { name: "a".into(), image: Some("i".into()), ..Default::default() };
        let hash = kubelet::definition_hash(&wanted);
        let facts = Facts::default();
        // The runtime may know the image by another name.
        check(spec("Always"), &kubelets("docker.io/other/name:1", &hash), &facts, "");
        // Made by an older kubelet, whose hash says nothing.
        check(spec("Always"), &kubelets("docker.io/library/i:latest", "beef"), &facts, "");
        check(spec("Always"), &kubelets("other:1", "beef"), &facts, "kill a-3, start a-4");
        // The same when it was there as the node was taken over, until the definition changes.
        let mut facts = Facts::default();
        facts.taken_over.insert("a-3".into(), definition_hash(&wanted));
        check(spec("Always"), &kubelets("other:1", "beef"), &facts, "");
        let changed = json!({"containers": [{"name": "a", "image": "j"}]});
        check(changed, &kubelets("i", "beef"), &facts, "kill a-3, start a-4");
    }

    #[test]
    fn exit_leads_to_what_the_restart_policy_says() {
        for (policy, code, expected) in [
            ("Always", 0, "start a-1"),
            ("Always", 1, "start a-1"),
            ("OnFailure", 1, "start a-1"),
            ("OnFailure", 0, "kill-pod"),
            ("Never", 1, "kill-pod"),
            ("Never", 0, "kill-pod"),
        ] {
            let runtime = runtime(vec![instance("a", 0, exited(code))]);
            check(spec(policy), &runtime, &Facts::default(), expected);
        }
    }

    #[test]
    fn restart_waits_for_its_delay_and_the_pod_stays() {
        let mut facts = Facts::default();
        let hash = instance("a", 0, State::Running).hash.expect("has a hash");
        facts.restarts.raise(&backoff_key("a", &hash), at(90), at(90));
        let runtime = runtime(vec![instance("a", 1, exited(1))]);
        check(spec("Always"), &runtime, &facts, "wait a");
        let plan = plan(&pod(spec("Always")), &runtime, &facts, at(105));
        assert_eq!(plan.retry_at, Some(at(110)));
        assert_eq!(
            plan.backing_off["a"].message,
            "back-off 10s restarting failed container=a pod=p_n(u)"
        );
    }

    #[test]
    fn changed_image_restarts_the_container_whatever_the_policy() {
        for policy in ["Always", "Never"] {
            let mut outdated = instance("a", 0, State::Running);
            outdated.hash = Some("other".to_owned());
            check(spec(policy), &runtime(vec![outdated]), &Facts::default(), "kill a-0, start a-1");
        }
    }

    #[test]
    fn container_made_by_kubelet_is_adopted_when_its_image_is_the_same() {
        let mut foreign = instance("a", 3, State::Running);
        foreign.hash = None;
        foreign.user_image = Some("docker.io/library/i:latest".to_owned());
        check(spec("Always"), &runtime(vec![foreign]), &Facts::default(), "");
    }

    #[test]
    fn dead_sandbox_is_replaced_unless_the_pod_is_done() {
        for (policy, code, expected) in [
            ("Always", 255, "kill-pod*, sandbox 1, start a-1"),
            ("OnFailure", 255, "kill-pod*, sandbox 1, start a-1"),
            ("OnFailure", 0, ""),
            ("Never", 255, ""),
        ] {
            let runtime = PodRuntime {
                sandboxes: vec![sandbox(0, false)],
                containers: vec![instance("a", 0, exited(code))],
            };
            check(spec(policy), &runtime, &Facts::default(), expected);
        }
    }

    #[test]
    fn restart_count_goes_on_when_the_runtime_has_forgotten_everything() {
        let facts = Facts { restart_counts: [("a".to_owned(), 4)].into(), ..Default::default() };
        check(spec("Always"), &PodRuntime::default(), &facts, "sandbox 0, start a-5");
    }

    #[test]
    fn container_that_was_created_and_never_started_is_made_again_with_the_same_count() {
        let runtime = runtime(vec![instance("a", 2, State::Created)]);
        check(spec("Always"), &runtime, &Facts::default(), "remove a-2, start a-2");
    }

    #[test]
    fn init_containers_run_one_after_the_other() {
        let spec = json!({
            "initContainers": [{"name": "x", "image": "i"}, {"name": "y", "image": "i"}],
            "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}],
        });
        let facts = Facts::default();
        let done = |name| instance(name, 0, exited(0));
        let running = |name| instance(name, 0, State::Running);
        check(spec.clone(), &PodRuntime::default(), &facts, "sandbox 0, start x-0");
        check(spec.clone(), &runtime(vec![running("x")]), &facts, "");
        check(spec.clone(), &runtime(vec![done("x")]), &facts, "start y-0");
        check(
            spec.clone(),
            &runtime(vec![done("x"), instance("y", 0, exited(1))]),
            &facts,
            "start y-1",
        );
        check(spec.clone(), &runtime(vec![done("x"), done("y")]), &facts, "start a-0, start b-0");
        check(spec.clone(), &runtime(vec![running("a"), running("b")]), &facts, "");
    }

    #[test]
    fn failed_init_container_ends_a_pod_that_never_restarts() {
        let spec = json!({
            "restartPolicy": "Never",
            "initContainers": [{"name": "x", "image": "i"}],
            "containers": [{"name": "a", "image": "i"}],
        });
        check(spec, &runtime(vec![instance("x", 0, exited(1))]), &Facts::default(), "kill-pod");
    }

    #[test]
    fn sidecar_lets_the_next_container_start_once_it_runs_and_ends_with_the_last() {
        let spec = json!({
            "restartPolicy": "OnFailure",
            "initContainers": [{"name": "x", "image": "i", "restartPolicy": "Always"}],
            "containers": [{"name": "a", "image": "i"}],
        });
        let facts = Facts::default();
        let sidecar = instance("x", 0, State::Running);
        check(spec.clone(), &runtime(vec![sidecar.clone()]), &facts, "start a-0");
        let both = |x: State, a: State| runtime(vec![instance("x", 0, x), instance("a", 0, a)]);
        check(spec.clone(), &both(exited(0), State::Running), &facts, "start x-1");
        check(spec, &both(State::Running, exited(0)), &facts, "kill-pod");
    }

    #[test]
    fn failed_liveness_kills_and_the_restart_follows_the_exit() {
        let mut facts = Facts::default();
        let probed = Probed { failed: Some(FailedProbe::Liveness), ..Default::default() };
        facts.probes.insert("a-0".to_owned(), probed);
        let runtime = runtime(vec![instance("a", 0, State::Running)]);
        check(spec("Always"), &runtime, &facts, "kill a-0");
        check(spec("Never"), &runtime, &facts, "kill-pod");
    }

    #[test]
    fn durations_read_as_in_go() {
        for (seconds, expected) in [(10, "10s"), (80, "1m20s"), (300, "5m0s"), (3600, "1h0m0s")] {
            assert_eq!(go_duration(seconds), expected);
        }
    }
}
