//! What a container may use and what it may do, as the runtime is told.
//!
//! Source: kubernetes/kubernetes pkg/kubelet/kuberuntime/{kuberuntime_container_linux,
//! security_context}.go, pkg/kubelet/qos/policy.go, pkg/kubelet/cm/helpers_linux.go.

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, PodSecurityContext, PodSpec, SELinuxOptions, SeccompProfile,
    SecurityContext,
};

use super::quantity::{self, limit_milli, request_milli};
use super::{init_containers, is_sidecar};

const SHARES_MIN: u64 = 2;
const SHARES_MAX: u64 = 262_144;
const CPU_PERIOD_US: i64 = 100_000;
const CPU_QUOTA_MIN_US: i64 = 1000;
/// Score of pods that should go last.
const OOM_SCORE_GUARANTEED: i64 = -997;
/// Score of pods that should go first.
const OOM_SCORE_BEST_EFFORT: i64 = 1000;
/// Priority from which on a pod belongs to the node itself.
const PRIORITY_NODE_CRITICAL: i32 = 2_000_001_000;

/// Limits of one container, in the runtime's units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    pub cpu_period: i64,
    /// Microseconds per period; 0 for no bound.
    pub cpu_quota: i64,
    pub cpu_shares: i64,
    /// Bytes; 0 for no bound.
    pub memory_limit: i64,
    pub oom_score_adj: i64,
}

/// A confinement profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Profile {
    RuntimeDefault,
    Unconfined,
    /// A file of the node, relative to the agent's profile directory, or a loaded profile's name.
    Localhost(String),
}

/// What a container may do.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Security {
    pub privileged: bool,
    pub add_capabilities: Vec<String>,
    pub drop_capabilities: Vec<String>,
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    pub run_as_non_root: bool,
    pub supplemental_groups: Vec<i64>,
    pub readonly_rootfs: bool,
    pub no_new_privs: bool,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    pub seccomp: Option<Profile>,
    pub apparmor: Option<Profile>,
    pub selinux: Option<SELinuxOptions>,
}

/// Who the image wants to run as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageUser {
    pub uid: Option<i64>,
    pub name: String,
}

/// Returns the pod's class: `Guaranteed`, `Burstable` or `BestEffort`.
pub fn qos_class(spec: &PodSpec) -> &'static str {
    let all = || init_containers(spec).iter().chain(&spec.containers);
    let set = |container: &Container, resource| {
        let limit = limit_milli(container, resource).filter(|amount| *amount > 0);
        let request = request_milli(container, resource).filter(|amount| *amount > 0);
        (limit, request)
    };
    let mut any = false;
    let mut guaranteed = true;
    for container in all() {
        for resource in ["cpu", "memory"] {
            let (limit, request) = set(container, resource);
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && limit == request;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// Returns the limits of a container on a node with `memory_bytes` of memory.
pub fn resources(spec: &PodSpec, container: &Container, memory_bytes: u64) -> Resources {
    let cpu_request = request_milli(container, "cpu").unwrap_or(0);
    let cpu_limit = limit_milli(container, "cpu").unwrap_or(0);
    let memory_limit = limit_milli(container, "memory").unwrap_or(0) / 1000;
    Resources {
        cpu_period: CPU_PERIOD_US,
        cpu_quota: if cpu_limit > 0 { cpu_quota(cpu_limit) } else { 0 },
        cpu_shares: cpu_shares(cpu_request),
        memory_limit: i64::try_from(memory_limit).unwrap_or(i64::MAX),
        oom_score_adj: oom_score_adj(spec, container, memory_bytes),
    }
}

fn cpu_shares(milli: i128) -> i64 {
    let shares = u64::try_from(milli * 1024 / 1000).unwrap_or(0);
    i64::try_from(shares.clamp(SHARES_MIN, SHARES_MAX)).expect("at most 262144")
}

fn cpu_quota(milli: i128) -> i64 {
    let quota = milli * i128::from(CPU_PERIOD_US) / 1000;
    i64::try_from(quota).unwrap_or(i64::MAX).max(CPU_QUOTA_MIN_US)
}

fn oom_score_adj(spec: &PodSpec, container: &Container, memory_bytes: u64) -> i64 {
    if spec.priority.is_some_and(|priority| priority >= PRIORITY_NODE_CRITICAL) {
        return OOM_SCORE_GUARANTEED;
    }
    match qos_class(spec) {
        "Guaranteed" => return OOM_SCORE_GUARANTEED,
        "BestEffort" => return OOM_SCORE_BEST_EFFORT,
        _ => {}
    }
    let burstable = |container: &Container| {
        let request = request_milli(container, "memory").unwrap_or(0) / 1000;
        let share = match memory_bytes {
            0 => 0,
            bytes => i64::try_from(1000 * request / i128::from(bytes)).unwrap_or(1000),
        };
        // A burstable container may neither reach the score of a guaranteed one nor that of a
        // best effort one.
        (1000 - share).clamp(1000 + OOM_SCORE_GUARANTEED, 999)
    };
    let own = burstable(container);
    let sidecar =
        init_containers(spec).iter().any(|one| one.name == container.name && is_sidecar(one));
    if sidecar {
        spec.containers.iter().map(burstable).min().map_or(own, |regular| own.min(regular))
    } else {
        own
    }
}

/// Returns what a container may do: its own security context over the pod's.
pub fn security(spec: &PodSpec, container: &Container) -> Security {
    let none = (PodSecurityContext::default(), SecurityContext::default());
    let pod = spec.security_context.as_ref().unwrap_or(&none.0);
    let own = container.security_context.as_ref().unwrap_or(&none.1);
    let privileged = own.privileged.unwrap_or(false);
    let capabilities = own.capabilities.clone().unwrap_or_default();
    let unmasked = privileged || own.proc_mount.as_deref() == Some("Unmasked");
    let paths = |list: &[&str]| -> Vec<String> {
        if unmasked { Vec::new() } else { list.iter().map(|path| (*path).to_owned()).collect() }
    };
    let groups = pod.fs_group.iter().chain(pod.supplemental_groups.iter().flatten());
    Security {
        privileged,
        add_capabilities: capabilities.add.unwrap_or_default(),
        drop_capabilities: capabilities.drop.unwrap_or_default(),
        run_as_user: own.run_as_user.or(pod.run_as_user),
        run_as_group: own.run_as_group.or(pod.run_as_group),
        run_as_non_root: own.run_as_non_root.or(pod.run_as_non_root).unwrap_or(false),
        supplemental_groups: groups.copied().collect(),
        readonly_rootfs: own.read_only_root_filesystem.unwrap_or(false),
        no_new_privs: own.allow_privilege_escalation == Some(false),
        masked_paths: paths(&MASKED_PATHS),
        readonly_paths: paths(&READONLY_PATHS),
        seccomp: if privileged {
            Some(Profile::Unconfined)
        } else {
            seccomp(own.seccomp_profile.as_ref().or(pod.seccomp_profile.as_ref()))
        },
        apparmor: apparmor(own.app_armor_profile.as_ref().or(pod.app_armor_profile.as_ref())),
        selinux: own.se_linux_options.clone().or_else(|| pod.se_linux_options.clone()),
    }
}

/// Why a container must not start as the image's user; the message is the one users see.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NonRootError {
    #[error(
        "container's runAsUser breaks non-root policy (pod: \"{pod}\", container: {container})"
    )]
    RunAsUser { pod: String, container: String },
    #[error(
        "container has runAsNonRoot and image will run as root (pod: \"{pod}\", \
         container: {container})"
    )]
    Image { pod: String, container: String },
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user \
         is non-root (pod: \"{pod}\", container: {container})"
    )]
    Name { user: String, pod: String, container: String },
}

/// Checks `runAsNonRoot` against who the container will be. `pod` is the pod's full name.
pub fn check_non_root(
    security: &Security,
    image: &ImageUser,
    pod: &str,
    container: &str,
) -> Result<(), NonRootError> {
    let names = || (pod.to_owned(), container.to_owned());
    if !security.run_as_non_root {
        return Ok(());
    }
    match (security.run_as_user, image.uid, image.name.as_str()) {
        (Some(0), ..) => {
            let (pod, container) = names();
            Err(NonRootError::RunAsUser { pod, container })
        }
        (Some(_), ..) => Ok(()),
        (None, Some(0), _) | (None, None, "" | "root") => {
            let (pod, container) = names();
            Err(NonRootError::Image { pod, container })
        }
        (None, None, user) => {
            let (pod, container) = names();
            Err(NonRootError::Name { user: user.to_owned(), pod, container })
        }
        (None, Some(_), _) => Ok(()),
    }
}

/// Returns the cgroup of the pod below `root`; see [`cgroup_path`].
pub fn cgroup_parent(root: &str, spec: &PodSpec, uid: &str) -> String {
    let pod = format!("pod{uid}");
    match qos_class(spec) {
        "Guaranteed" => cgroup_path(root, &[&pod]),
        "BestEffort" => cgroup_path(root, &["besteffort", &pod]),
        _ => cgroup_path(root, &["burstable", &pod]),
    }
}

/// Returns the cgroup `parts` below `root`, named as kubelet names it. A root that ends in `.slice` is systemd's, where
/// each slice repeats the name of the one above; any other is a path of the cgroupfs driver.
///
/// Source: kubernetes/kubernetes pkg/kubelet/cm/cgroup_manager_linux.go (`ToSystemd`).
pub fn cgroup_path(root: &str, parts: &[&str]) -> String {
    let Some(slice) = root.strip_suffix(".slice") else {
        return parts.iter().fold(root.to_owned(), |path, part| format!("{path}/{part}"));
    };
    let mut name = slice.rsplit('/').next().unwrap_or_default().to_owned();
    let mut path = root.to_owned();
    for part in parts {
        name = format!("{name}-{}", part.replace('-', "_"));
        path = format!("{path}/{name}.slice");
    }
    path
}

/// Whether any container of the pod is privileged.
pub fn any_privileged(spec: &PodSpec) -> bool {
    let mut all = init_containers(spec).iter().chain(&spec.containers);
    all.any(|one| one.security_context.as_ref().and_then(|own| own.privileged) == Some(true))
}

/// Returns a seccomp profile as the runtime is told; a pod that names none is unconfined.
pub fn seccomp(profile: Option<&SeccompProfile>) -> Option<Profile> {
    let profile = profile?;
    Some(match profile.type_.as_str() {
        "RuntimeDefault" => Profile::RuntimeDefault,
        "Localhost" => Profile::Localhost(profile.localhost_profile.clone().unwrap_or_default()),
        _ => Profile::Unconfined,
    })
}

fn apparmor(profile: Option<&AppArmorProfile>) -> Option<Profile> {
    let profile = profile?;
    Some(match profile.type_.as_str() {
        "RuntimeDefault" => Profile::RuntimeDefault,
        "Localhost" => Profile::Localhost(profile.localhost_profile.clone().unwrap_or_default()),
        _ => Profile::Unconfined,
    })
}

/// Whether the pod says nothing about resources at all.
pub fn has_no_resources(spec: &PodSpec) -> bool {
    init_containers(spec)
        .iter()
        .chain(&spec.containers)
        .all(|container| quantity::is_empty(container.resources.as_ref()))
}

const MASKED_PATHS: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

const READONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(value: Value) -> PodSpec {
        serde_json::from_value(value).expect("spec parses")
    }

    fn with(resources: Value) -> PodSpec {
        spec(json!({"containers": [{"name": "a", "resources": resources}]}))
    }

    #[test]
    fn cgroups_are_named_as_kubelet_names_them_for_either_driver() {
        let best_effort = with(json!({}));
        assert_eq!(cgroup_parent("/kubepods", &best_effort, "a-b"), "/kubepods/besteffort/poda-b");
        assert_eq!(
            cgroup_parent("/kubepods.slice", &best_effort, "a-b"),
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-poda_b.slice"
        );
        let guaranteed = with(json!({"limits": {"cpu": "1", "memory": "1Gi"}}));
        assert_eq!(
            cgroup_parent("/a.slice/a-kubepods.slice", &guaranteed, "c"),
            "/a.slice/a-kubepods.slice/a-kubepods-podc.slice"
        );
    }

    #[test]
    fn class_follows_requests_and_limits() {
        for (resources, expected) in [
            (json!({}), "BestEffort"),
            (json!({"limits": {"cpu": "1", "memory": "1Gi"}}), "Guaranteed"),
            (
                json!({"requests": {"cpu": "1000m"}, "limits": {"cpu": "1", "memory": "1Gi"}}),
                "Guaranteed",
            ),
            (json!({"limits": {"cpu": "1"}}), "Burstable"),
            (json!({"requests": {"cpu": "1"}}), "Burstable"),
        ] {
            assert_eq!(qos_class(&with(resources.clone())), expected, "{resources}");
        }
    }

    #[test]
    fn limits_are_told_in_the_runtimes_units() {
        let limits = |resources: Value| {
            let spec = with(resources);
            let made = super::resources(&spec, &spec.containers[0], 4 << 30);
            (made.cpu_shares, made.cpu_quota, made.memory_limit, made.oom_score_adj)
        };
        assert_eq!(limits(json!({})), (2, 0, 0, 1000));
        assert_eq!(
            limits(json!({"limits": {"cpu": "500m", "memory": "64Mi"}})),
            (512, 50_000, 64 << 20, -997)
        );
        assert_eq!(limits(json!({"limits": {"cpu": "1m"}})), (2, 1000, 0, 999));
        assert_eq!(limits(json!({"requests": {"memory": "1Gi"}})), (2, 0, 0, 750));
        assert_eq!(limits(json!({"requests": {"cpu": "1000"}})).0, 262_144);
    }

    #[test]
    fn security_of_the_container_overrides_the_pods() {
        let spec = spec(json!({
            "securityContext": {"runAsUser": 10, "fsGroup": 7, "supplementalGroups": [8]},
            "containers": [{"name": "a", "securityContext": {
                "runAsUser": 20, "readOnlyRootFilesystem": true,
                "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}],
        }));
        let made = security(&spec, &spec.containers[0]);
        assert_eq!(made.run_as_user, Some(20));
        assert_eq!(made.supplemental_groups, [7, 8]);
        assert_eq!(made.drop_capabilities, ["ALL"]);
        assert!(made.readonly_rootfs && made.no_new_privs);
        assert_eq!(made.masked_paths.len(), MASKED_PATHS.len());
    }

    #[test]
    fn privileged_container_sees_all_paths() {
        let spec = spec(json!({
            "containers": [{"name": "a", "securityContext": {"privileged": true}}],
        }));
        let made = security(&spec, &spec.containers[0]);
        assert!(made.privileged && made.masked_paths.is_empty());
        assert!(any_privileged(&spec));
    }

    #[test]
    fn non_root_is_checked_against_the_images_user() {
        let image = |uid, name: &str| ImageUser { uid, name: name.to_owned() };
        for (user, image, ok) in [
            (None, image(None, ""), false),
            (None, image(Some(0), ""), false),
            (None, image(Some(5), ""), true),
            (None, image(None, "app"), false),
            (Some(5), image(None, "app"), true),
            (Some(0), image(Some(5), ""), false),
        ] {
            let security =
                Security { run_as_non_root: true, run_as_user: user, ..Default::default() };
            assert_eq!(check_non_root(&security, &image, "p", "c").is_ok(), ok, "{image:?}");
        }
    }
}
