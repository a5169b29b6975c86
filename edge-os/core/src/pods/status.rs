//! A pod's status: phase, conditions and what its containers are at.
//!
//! Source: kubernetes/kubernetes pkg/kubelet/kubelet_pods.go (`getPhase`,
//! `convertToAPIContainerStatuses`), pkg/kubelet/status/generate.go.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus,
    VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::plan::{Facts, Plan, Waiting};
use super::runtime::{Instance, PodRuntime, State};
use super::{PodName, RestartPolicy, init_containers, is_sidecar, linux, restart_policy};

/// Everything a status is made from.
#[derive(Debug, Clone, Copy)]
pub struct StatusInput<'a> {
    pub pod: &'a Pod,
    pub runtime: &'a PodRuntime,
    pub facts: &'a Facts,
    /// The newest plan, for the containers that wait.
    pub plan: &'a Plan,
    /// The status before this one, by whomever made it.
    pub previous: &'a PodStatus,
    pub node_ip: Option<&'a str>,
    /// When the engine first saw the pod.
    pub start_time: Timestamp,
    /// Whether the pod is being stopped.
    pub stopping: bool,
    /// Why the engine ended the pod, if it did.
    pub verdict: Option<&'a Waiting>,
    pub now: Timestamp,
}

/// Returns the pod's status.
pub fn status(input: &StatusInput<'_>) -> PodStatus {
    let default_spec = PodSpec::default();
    let spec = input.pod.spec.as_ref().unwrap_or(&default_spec);
    let name = PodName::of(input.pod);
    let previous = input.previous;

    let old_init = previous.init_container_statuses.as_deref().unwrap_or_default();
    let old_regular = previous.container_statuses.as_deref().unwrap_or_default();
    let init: Vec<ContainerStatus> = init_containers(spec)
        .iter()
        .map(|container| container_status(input, spec, container, true, old_init))
        .collect();
    let mut regular: Vec<ContainerStatus> = spec
        .containers
        .iter()
        .map(|container| container_status(input, spec, container, false, old_regular))
        .collect();
    regular.sort_by(|a, b| a.name.cmp(&b.name));

    let mut phase = match input.verdict {
        Some(_) => "Failed",
        None => phase(spec, &init, &regular, input.stopping),
    };
    if let Some(last @ ("Succeeded" | "Failed")) = previous.phase.as_deref() {
        phase = if last == "Failed" { "Failed" } else { "Succeeded" };
    }

    let (reason, message) = match input.verdict {
        Some(verdict) => (Some(verdict.reason.clone()), Some(verdict.message.clone())),
        None => (previous.reason.clone(), previous.message.clone()),
    };
    let ips = pod_ips(input, spec);
    let conditions = conditions(input, spec, &init, &regular, phase);
    debug_assert!(name.is_some(), "a pod in the engine has names");

    PodStatus {
        phase: Some(phase.to_owned()),
        reason,
        message,
        conditions: Some(conditions),
        host_ip: input.node_ip.map(str::to_owned),
        host_ips: input.node_ip.map(|ip| vec![HostIP { ip: ip.to_owned() }]),
        pod_ip: ips.first().cloned(),
        pod_ips: (!ips.is_empty()).then(|| ips.into_iter().map(|ip| PodIP { ip }).collect()),
        start_time: previous.start_time.clone().or(Some(Time(seconds(input.start_time)))),
        qos_class: Some(linux::qos_class(spec).to_owned()),
        init_container_statuses: (!init.is_empty()).then_some(init),
        container_statuses: (!regular.is_empty()).then_some(regular),
        ephemeral_container_statuses: previous.ephemeral_container_statuses.clone(),
        nominated_node_name: previous.nominated_node_name.clone(),
        resource_claim_statuses: previous.resource_claim_statuses.clone(),
        observed_generation: input.pod.metadata.generation,
        ..Default::default()
    }
}

/// Whether `status` says that the pod has ended and will not run again.
pub fn is_terminal(status: &PodStatus) -> bool {
    matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
}

fn container_status(
    input: &StatusInput<'_>,
    spec: &PodSpec,
    container: &Container,
    init: bool,
    old: &[ContainerStatus],
) -> ContainerStatus {
    let old = old.iter().find(|old| old.name == container.name);
    let instances = input.runtime.instances(&container.name);
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        restart_count: old.map_or(0, |old| old.restart_count),
        last_state: old.and_then(|old| old.last_state.clone()),
        allocated_resources: container.resources.as_ref().and_then(|all| all.requests.clone()),
        resources: container.resources.clone(),
        volume_mounts: volume_mounts(container),
        ..Default::default()
    };

    match instances.first() {
        None => {
            if let Some(old) = old {
                inherit_vanished(&mut status, old);
            }
            status.state = Some(waiting(default_waiting(spec, init)));
        }
        Some(newest) => {
            fill_from_instance(&mut status, newest, input, spec, init);
            if let Some(before) = instances.get(1).and_then(|one| terminated(one)) {
                status.last_state = Some(before);
            } else if old
                .is_none_or(|old| i64::from(old.restart_count) > i64::from(newest.restart_count))
            {
                status.last_state = None;
            } else if newest.exit().is_none()
                && let Some(old) = old
                && i64::from(old.restart_count) < i64::from(newest.restart_count)
            {
                // The instance before was removed; what was said of it last is its end.
                let ended = old.state.clone().filter(|state| state.terminated.is_some());
                status.last_state = ended.or_else(|| old.last_state.clone());
            }
        }
    }

    let error = input.facts.start_errors.get(&container.name);
    let waits = error.or_else(|| input.plan.backing_off.get(&container.name));
    let runs = status.state.as_ref().is_some_and(|state| state.running.is_some());
    if let Some(reason) = waits.filter(|_| !runs && !input.stopping) {
        if let Some(ended) = status.state.take().filter(|state| state.terminated.is_some()) {
            status.last_state = Some(ended);
        }
        status.state = Some(waiting(reason.clone()));
        status.ready = false;
        status.started = Some(false);
    }
    status
}

fn fill_from_instance(
    status: &mut ContainerStatus,
    one: &Instance,
    input: &StatusInput<'_>,
    spec: &PodSpec,
    init: bool,
) {
    let container = super::find_container(spec, &status.name).map(|(container, _)| container);
    let probed = input.facts.probes.get(&one.id).copied().unwrap_or_default();
    status.restart_count = i32::try_from(one.restart_count).unwrap_or(i32::MAX);
    status.container_id = Some(container_id(one));
    status.image.clone_from(&one.image);
    status.image_id.clone_from(&one.image_id);
    let regular_init = init && !container.is_some_and(is_sidecar);
    let has = |probe: fn(&Container) -> bool| container.is_some_and(probe);
    match &one.state {
        State::Created => status.state = Some(waiting(default_waiting(spec, init))),
        State::Running => {
            let running = ContainerStateRunning { started_at: one.started_at.map(time) };
            status.state = Some(ContainerState { running: Some(running), ..Default::default() });
            let started = !has(|c| c.startup_probe.is_some()) || probed.started == Some(true);
            let ready = !has(|c| c.readiness_probe.is_some()) || probed.ready == Some(true);
            status.started = Some(started);
            status.ready = started && ready && !regular_init;
        }
        State::Exited(exit) => {
            status.state = terminated(one);
            status.started = Some(false);
            status.ready = regular_init && exit.code == 0;
        }
        State::Unknown => {
            status.state = terminated(one);
            status.started = Some(false);
        }
    }
}

/// A container that was said to run and that the runtime has no trace of.
fn inherit_vanished(status: &mut ContainerStatus, old: &ContainerStatus) {
    let Some(state) = &old.state else { return };
    if state.terminated.is_some() {
        status.last_state = Some(state.clone());
    }
    if let Some(running) = &state.running {
        let gone = ContainerStateTerminated {
            exit_code: 137,
            reason: Some("ContainerStatusUnknown".to_owned()),
            message: Some(
                "The container could not be located when the pod was deleted.  \
                 The container used to be Running"
                    .to_owned(),
            ),
            container_id: old.container_id.clone(),
            started_at: running.started_at.clone(),
            ..Default::default()
        };
        status.last_state = Some(ContainerState { terminated: Some(gone), ..Default::default() });
        status.restart_count = old.restart_count.saturating_add(1);
    }
}

fn terminated(one: &Instance) -> Option<ContainerState> {
    let terminated = match &one.state {
        State::Exited(exit) => ContainerStateTerminated {
            exit_code: exit.code,
            signal: None,
            reason: Some(match exit.reason.as_str() {
                "" if exit.code == 0 => "Completed".to_owned(),
                "" => "Error".to_owned(),
                reason => reason.to_owned(),
            }),
            message: (!exit.message.is_empty()).then(|| exit.message.clone()),
            started_at: one.started_at.map(time),
            finished_at: Some(time(exit.finished_at)),
            container_id: Some(container_id(one)),
        },
        State::Unknown => ContainerStateTerminated {
            exit_code: 137,
            reason: Some("ContainerStatusUnknown".to_owned()),
            message: Some(
                "The container could not be located when the pod was terminated".to_owned(),
            ),
            container_id: Some(container_id(one)),
            started_at: one.started_at.map(time),
            ..Default::default()
        },
        State::Created | State::Running => return None,
    };
    Some(ContainerState { terminated: Some(terminated), ..Default::default() })
}

fn default_waiting(spec: &PodSpec, init: bool) -> Waiting {
    let _ = init;
    let reason =
        if init_containers(spec).is_empty() { "ContainerCreating" } else { "PodInitializing" };
    Waiting { reason: reason.to_owned(), message: String::new() }
}

fn waiting(waiting: Waiting) -> ContainerState {
    let Waiting { reason, message } = waiting;
    let waiting = ContainerStateWaiting {
        reason: Some(reason),
        message: (!message.is_empty()).then_some(message),
    };
    ContainerState { waiting: Some(waiting), ..Default::default() }
}

fn volume_mounts(container: &Container) -> Option<Vec<VolumeMountStatus>> {
    let mounts = container.volume_mounts.as_ref().filter(|mounts| !mounts.is_empty())?;
    let status = mounts.iter().map(|mount| VolumeMountStatus {
        name: mount.name.clone(),
        mount_path: mount.mount_path.clone(),
        read_only: mount.read_only,
        recursive_read_only: mount.read_only.unwrap_or(false).then(|| "Disabled".to_owned()),
        ..Default::default()
    });
    Some(status.collect())
}

fn container_id(one: &Instance) -> String {
    format!("containerd://{}", one.id)
}

/// How far one container is, for the phase.
enum Progress {
    Running,
    /// Ended, with this exit code; also one that waits for its restart.
    Stopped(i32),
    Waiting,
    Unknown,
}

fn progress(status: &ContainerStatus) -> Progress {
    let Some(state) = &status.state else { return Progress::Unknown };
    let last = || status.last_state.as_ref().and_then(|last| last.terminated.as_ref());
    if state.running.is_some() {
        Progress::Running
    } else if let Some(ended) = &state.terminated {
        Progress::Stopped(ended.exit_code)
    } else if state.waiting.is_some() {
        last().map_or(Progress::Waiting, |ended| Progress::Stopped(ended.exit_code))
    } else {
        Progress::Unknown
    }
}

fn phase(
    spec: &PodSpec,
    init: &[ContainerStatus],
    regular: &[ContainerStatus],
    stopping: bool,
) -> &'static str {
    let policy = restart_policy(spec);
    let regular_started = regular
        .iter()
        .any(|status| !matches!(progress(status), Progress::Waiting | Progress::Unknown));
    let mut pending_init = false;
    let mut failed_init = false;
    for (container, status) in init_containers(spec).iter().zip(init) {
        let state = progress(status);
        if is_sidecar(container) {
            if !regular_started && status.started != Some(true) {
                pending_init = true;
            }
            continue;
        }
        let ended = status.state.as_ref().and_then(|state| state.terminated.as_ref());
        match (ended, state) {
            (Some(ended), _) if ended.exit_code == 0 => {}
            (Some(_), _) => {
                if policy == RestartPolicy::Never {
                    failed_init = true;
                } else {
                    pending_init = true;
                }
            }
            (None, Progress::Stopped(code)) if code != 0 && policy == RestartPolicy::Never => {
                failed_init = true;
            }
            _ => pending_init = true,
        }
    }
    let (mut running, mut stopped, mut succeeded, mut waiting, mut unknown) = (0, 0, 0, 0, 0);
    for status in regular {
        match progress(status) {
            Progress::Running => running += 1,
            Progress::Stopped(code) => {
                stopped += 1;
                succeeded += usize::from(code == 0);
            }
            Progress::Waiting => waiting += 1,
            Progress::Unknown => unknown += 1,
        }
    }
    if failed_init && policy == RestartPolicy::Never {
        return "Failed";
    }
    if waiting > 0 || (pending_init && !regular_started) {
        return "Pending";
    }
    if running > 0 && unknown == 0 {
        return "Running";
    }
    if running == 0 && stopped > 0 && unknown == 0 {
        if stopping {
            return if stopped == succeeded { "Succeeded" } else { "Failed" };
        }
        if policy == RestartPolicy::Always {
            return "Running";
        }
        if stopped == succeeded {
            return "Succeeded";
        }
        return if policy == RestartPolicy::Never { "Failed" } else { "Running" };
    }
    "Pending"
}

/// A condition's value, before its times.
struct Verdict {
    status: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    const TRUE: Self = Self { status: true, reason: None, message: None };

    fn fails(reason: &'static str, message: Option<String>) -> Self {
        Self { status: false, reason: Some(reason), message }
    }
}

fn conditions(
    input: &StatusInput<'_>,
    spec: &PodSpec,
    init: &[ContainerStatus],
    regular: &[ContainerStatus],
    phase: &str,
) -> Vec<PodCondition> {
    let sandbox_ready = input.runtime.sandbox().is_some_and(|sandbox| {
        sandbox.ready && (super::host_network(spec) || !sandbox.ips.is_empty())
    });
    let has_network = Verdict { status: sandbox_ready, reason: None, message: None };
    let initialized = initialized(spec, init, regular, phase);
    let containers_ready = containers_ready(spec, init, regular, phase);
    let ready = pod_ready(spec, input.previous, &containers_ready);
    let made = [
        ("PodReadyToStartContainers", has_network),
        ("Initialized", initialized),
        ("Ready", ready),
        ("ContainersReady", containers_ready),
        ("PodScheduled", Verdict::TRUE),
    ];
    let old = input.previous.conditions.as_deref().unwrap_or_default();
    let mut conditions: Vec<PodCondition> = made
        .into_iter()
        .map(|(type_, verdict)| {
            let status = if verdict.status { "True" } else { "False" };
            let before = old.iter().find(|before| before.type_ == type_ && before.status == status);
            let since = before.and_then(|before| before.last_transition_time.clone());
            PodCondition {
                type_: type_.to_owned(),
                status: status.to_owned(),
                reason: verdict.reason.map(str::to_owned),
                message: verdict.message,
                last_transition_time: since.or_else(|| Some(time(input.now))),
                observed_generation: input.pod.metadata.generation,
                ..Default::default()
            }
        })
        .collect();
    let foreign =
        old.iter().filter(|before| !OWN_CONDITIONS.contains(&before.type_.as_str())).cloned();
    conditions.extend(foreign);
    conditions
}

/// Conditions that this module writes; all others belong to somebody else.
pub const OWN_CONDITIONS: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

fn initialized(
    spec: &PodSpec,
    init: &[ContainerStatus],
    regular: &[ContainerStatus],
    phase: &str,
) -> Verdict {
    let incomplete: Vec<&str> =
        init_containers(spec)
            .iter()
            .zip(init)
            .filter(|(container, status)| {
                if is_sidecar(container) { status.started != Some(true) } else { !status.ready }
            })
            .map(|(container, _)| container.name.as_str())
            .collect();
    let regular_started = regular
        .iter()
        .any(|status| !matches!(progress(status), Progress::Waiting | Progress::Unknown));
    if phase == "Succeeded" {
        return Verdict { status: true, reason: Some("PodCompleted"), message: None };
    }
    if incomplete.is_empty() || regular_started {
        return Verdict::TRUE;
    }
    let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
    Verdict::fails("ContainersNotInitialized", Some(message))
}

fn containers_ready(
    spec: &PodSpec,
    init: &[ContainerStatus],
    regular: &[ContainerStatus],
    phase: &str,
) -> Verdict {
    match phase {
        "Succeeded" => return Verdict::fails("PodCompleted", None),
        "Failed" => return Verdict::fails("PodFailed", None),
        _ => {}
    }
    let sidecars = init_containers(spec)
        .iter()
        .zip(init)
        .filter(|(container, _)| is_sidecar(container))
        .map(|(_, status)| status);
    let in_order = spec
        .containers
        .iter()
        .filter_map(|container| regular.iter().find(|status| status.name == container.name));
    let unready: Vec<&str> = sidecars
        .chain(in_order)
        .filter(|status| !status.ready)
        .map(|status| status.name.as_str())
        .collect();
    if unready.is_empty() {
        return Verdict::TRUE;
    }
    let message = format!("containers with unready status: [{}]", unready.join(" "));
    Verdict::fails("ContainersNotReady", Some(message))
}

fn pod_ready(spec: &PodSpec, previous: &PodStatus, containers_ready: &Verdict) -> Verdict {
    if !containers_ready.status {
        let Verdict { reason, message, .. } = containers_ready;
        return Verdict { status: false, reason: *reason, message: message.clone() };
    }
    let conditions = previous.conditions.as_deref().unwrap_or_default();
    let gates = spec.readiness_gates.as_deref().unwrap_or_default();
    let messages: Vec<String> = gates
        .iter()
        .filter_map(|gate| {
            let gate = &gate.condition_type;
            match conditions.iter().find(|condition| condition.type_ == *gate) {
                None => Some(format!(
                    "corresponding condition of pod readiness gate \"{gate}\" does not exist."
                )),
                Some(condition) if condition.status != "True" => Some(format!(
                    "the status of pod readiness gate \"{gate}\" is not \"True\", but {}",
                    condition.status
                )),
                Some(_) => None,
            }
        })
        .collect();
    if messages.is_empty() {
        return Verdict::TRUE;
    }
    Verdict::fails("ReadinessGatesNotReady", Some(messages.join(", ")))
}

fn pod_ips(input: &StatusInput<'_>, spec: &PodSpec) -> Vec<String> {
    let sandbox = input.runtime.sandbox().filter(|sandbox| sandbox.ready);
    if super::host_network(spec) {
        return match (sandbox, input.node_ip) {
            (Some(_), Some(ip)) => vec![ip.to_owned()],
            _ => last_ips(input.previous),
        };
    }
    match sandbox {
        Some(sandbox) if !sandbox.ips.is_empty() => sandbox.ips.clone(),
        _ => last_ips(input.previous),
    }
}

fn last_ips(previous: &PodStatus) -> Vec<String> {
    let ips = previous.pod_ips.as_deref().unwrap_or_default();
    ips.iter().map(|one| one.ip.clone()).collect()
}

/// Kubernetes' times have whole seconds.
fn time(at: Timestamp) -> Time {
    Time(seconds(at))
}

fn seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::runtime::{Exit, Sandbox};
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("valid time")
    }

    struct Case {
        spec: Value,
        runtime: PodRuntime,
        facts: Facts,
        plan: Plan,
        previous: Value,
        stopping: bool,
    }

    fn case(spec: Value, states: &[(&str, State)]) -> Case {
        let containers = states.iter().map(|(name, state)| one(name, 0, state.clone())).collect();
        let sandbox = Sandbox {
            id: "s".to_owned(),
            ready: true,
            ips: vec!["10.0.0.2".to_owned()],
            ..Default::default()
        };
        Case {
            spec,
            runtime: PodRuntime { sandboxes: vec![sandbox], containers },
            facts: Facts::default(),
            plan: Plan::default(),
            previous: json!({}),
            stopping: false,
        }
    }

    fn one(name: &str, count: u32, state: State) -> Instance {
        Instance {
            id: format!("{name}{count}"),
            name: name.to_owned(),
            sandbox: "s".to_owned(),
            restart_count: count,
            state,
            created_at: at(i64::from(count)),
            started_at: Some(at(50)),
            image: "docker.io/library/i:1".to_owned(),
            image_id: "sha256:1".to_owned(),
            hash: None,
            kubelet_hash: None,
            user_image: None,
        }
    }

    fn exited(code: i32) -> State {
        State::Exited(Exit {
            code,
            reason: String::new(),
            message: String::new(),
            finished_at: at(60),
        })
    }

    impl Case {
        fn status(&self) -> PodStatus {
            let pod: Pod = serde_json::from_value(json!({
                "metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": self.spec,
            }))
            .expect("pod parses");
            let previous: PodStatus =
                serde_json::from_value(self.previous.clone()).expect("status parses");
            status(&StatusInput {
                pod: &pod,
                runtime: &self.runtime,
                facts: &self.facts,
                plan: &self.plan,
                previous: &previous,
                node_ip: Some("192.168.1.5"),
                start_time: at(40),
                stopping: self.stopping,
                verdict: None,
                now: at(100),
            })
        }

        fn json(&self) -> Value {
            serde_json::to_value(self.status()).expect("status serialises")
        }

        fn phase(&self) -> String {
            self.status().phase.expect("has a phase")
        }
    }

    fn two(policy: &str) -> Value {
        json!({"restartPolicy": policy, "containers": [
            {"name": "b", "image": "i"}, {"name": "a", "image": "i"},
        ]})
    }

    #[test]
    fn phase_follows_policy_and_exits() {
        let run = || State::Running;
        for (policy, a, b, expected) in [
            ("Always", Some(run()), Some(run()), "Running"),
            ("Always", Some(run()), None, "Pending"),
            ("Always", Some(run()), Some(exited(1)), "Running"),
            ("Always", Some(exited(0)), Some(exited(1)), "Running"),
            ("OnFailure", Some(exited(0)), Some(exited(0)), "Succeeded"),
            ("OnFailure", Some(exited(0)), Some(exited(1)), "Running"),
            ("Never", Some(exited(0)), Some(exited(1)), "Failed"),
            ("Never", Some(exited(0)), Some(run()), "Running"),
            ("Never", Some(exited(0)), Some(exited(0)), "Succeeded"),
            ("Never", None, None, "Pending"),
        ] {
            let states: Vec<(&str, State)> =
                [("a", a), ("b", b)].into_iter().filter_map(|(n, s)| Some((n, s?))).collect();
            assert_eq!(case(two(policy), &states).phase(), expected, "{policy} {states:?}");
        }
    }

    #[test]
    fn stopping_pod_ends_by_its_exit_codes_also_with_policy_always() {
        let mut stopped = case(two("Always"), &[("a", exited(0)), ("b", exited(0))]);
        stopped.stopping = true;
        assert_eq!(stopped.phase(), "Succeeded");
        let mut failed = case(two("Always"), &[("a", exited(0)), ("b", exited(137))]);
        failed.stopping = true;
        assert_eq!(failed.phase(), "Failed");
    }

    #[test]
    fn ended_phase_never_changes_back() {
        let mut ended = case(two("Always"), &[("a", State::Running), ("b", State::Running)]);
        ended.previous = json!({"phase": "Failed"});
        assert_eq!(ended.phase(), "Failed");
    }

    #[test]
    fn running_pod_reads_as_kubelet_writes_it() {
        let case = case(two("Always"), &[("a", State::Running), ("b", State::Running)]);
        let mut status = case.json();
        let types: Vec<&str> = status["conditions"]
            .as_array()
            .expect("conditions")
            .iter()
            .map(|condition| condition["type"].as_str().expect("type"))
            .collect();
        assert_eq!(types, OWN_CONDITIONS);
        assert_eq!(status["conditions"][2]["status"], "True");
        assert_eq!(status["containerStatuses"][0]["name"], "a");
        status.as_object_mut().expect("object").remove("conditions");
        status["containerStatuses"] = status["containerStatuses"][0].take();
        assert_eq!(
            status,
            json!({
                "phase": "Running",
                "hostIP": "192.168.1.5", "hostIPs": [{"ip": "192.168.1.5"}],
                "podIP": "10.0.0.2", "podIPs": [{"ip": "10.0.0.2"}],
                "qosClass": "BestEffort",
                "startTime": "1970-01-01T00:00:40Z",
                "containerStatuses": {
                    "name": "a", "ready": true, "started": true, "restartCount": 0,
                    "containerID": "containerd://a0",
                    "image": "docker.io/library/i:1", "imageID": "sha256:1",
                    "state": {"running": {"startedAt": "1970-01-01T00:00:50Z"}},
                },
            })
        );
    }

    #[test]
    fn crash_loop_waits_with_the_exit_as_last_state() {
        let mut case =
            case(json!({"containers": [{"name": "a", "image": "i"}]}), &[("a", exited(3))]);
        let waiting = Waiting { reason: "CrashLoopBackOff".to_owned(), message: "m".to_owned() };
        case.plan.backing_off.insert("a".to_owned(), waiting);
        let status = &case.json()["containerStatuses"][0];
        assert_eq!(status["state"]["waiting"]["reason"], "CrashLoopBackOff");
        assert_eq!(status["lastState"]["terminated"]["exitCode"], 3);
        assert_eq!(status["lastState"]["terminated"]["reason"], "Error");
        assert_eq!(case.phase(), "Running");
    }

    #[test]
    fn containers_not_made_yet_wait_with_the_right_reason() {
        let plain = case(two("Always"), &[]).json();
        assert_eq!(
            plain["containerStatuses"][0]["state"]["waiting"]["reason"],
            "ContainerCreating"
        );
        assert_eq!(plain["conditions"][2]["message"], "containers with unready status: [b a]");
        let with_init = json!({
            "initContainers": [{"name": "x", "image": "i"}],
            "containers": [{"name": "a", "image": "i"}],
        });
        let status = case(with_init, &[("x", State::Running)]).json();
        assert_eq!(status["containerStatuses"][0]["state"]["waiting"]["reason"], "PodInitializing");
        assert_eq!(status["phase"], "Pending");
        assert_eq!(status["conditions"][1]["reason"], "ContainersNotInitialized");
        assert_eq!(status["conditions"][1]["message"], "containers with incomplete status: [x]");
    }

    #[test]
    fn container_that_vanished_counts_as_restarted() {
        let mut case = case(json!({"containers": [{"name": "a", "image": "i"}]}), &[]);
        case.previous = json!({"containerStatuses": [{
            "name": "a", "image": "i", "imageID": "", "ready": true, "restartCount": 2,
            "state": {"running": {"startedAt": "1970-01-01T00:00:01Z"}},
        }]});
        let status = &case.json()["containerStatuses"][0];
        assert_eq!(status["restartCount"], 3);
        assert_eq!(status["lastState"]["terminated"]["reason"], "ContainerStatusUnknown");
        assert_eq!(status["lastState"]["terminated"]["exitCode"], 137);
    }

    #[test]
    fn transition_time_stays_until_the_status_of_a_condition_changes() {
        let mut case = case(two("Always"), &[("a", State::Running), ("b", State::Running)]);
        case.previous = json!({"conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "1970-01-01T00:00:07Z"},
            {"type": "Initialized", "status": "False",
             "lastTransitionTime": "1970-01-01T00:00:07Z"},
            {"type": "example.com/gate", "status": "True"},
        ]});
        let status = case.json();
        let conditions = &status["conditions"];
        assert_eq!(conditions[1]["lastTransitionTime"], "1970-01-01T00:01:40Z");
        assert_eq!(conditions[2]["lastTransitionTime"], "1970-01-01T00:00:07Z");
        assert_eq!(conditions[5]["type"], "example.com/gate");
    }

    #[test]
    fn readiness_gate_holds_ready_back_and_not_containers_ready() {
        let mut spec = two("Always");
        spec["readinessGates"] = json!([{"conditionType": "g"}]);
        let status = case(spec, &[("a", State::Running), ("b", State::Running)]).json();
        assert_eq!(status["conditions"][2]["reason"], "ReadinessGatesNotReady");
        assert_eq!(status["conditions"][3]["status"], "True");
    }
}
