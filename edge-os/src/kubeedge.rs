//! KubeEdge's own configuration of an edge node, in our words.
//!
//! `edgecore.yaml` of both layouts (`v1alpha1`: edged of before 1.12; `v1alpha2`: edged as a kubelet) becomes the keys of
//! our file, so that [`crate::config`] checks it like any other. What a user set and we cannot honour is a warning that
//! names the key; what would make the node do something else than asked is a mistake. Nothing is written.
//!
//! Callers: `config` for a file that names KubeEdge's API group, `adopt` for the paths of what the node has.
//!
//! Source: kubeedge/kubeedge, staging/src/github.com/kubeedge/api/apis/componentconfig/edgecore/{v1alpha1,v1alpha2}
//! (`types.go`, `default.go`), edge/cmd/edgecore/app/server.go.

use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// API group of KubeEdge's edge configuration.
pub const API_GROUP: &str = "edgecore.config.kubeedge.io";
/// Where `keadm join` leaves the join token.
pub const BOOTSTRAP_FILE: &str = "/etc/kubeedge/bootstrap-edgecore.conf";

const DATABASE: &str = "/var/lib/kubeedge/edgecore.db";
const CA_FILE: &str = "/etc/kubeedge/ca/rootCA.crt";
const CERTIFICATE_FILE: &str = "/etc/kubeedge/certs/server.crt";
const KEY_FILE: &str = "/etc/kubeedge/certs/server.key";
const STATIC_PODS: &str = "/etc/kubeedge/manifests";
const RUNTIME_SOCKET: &str = "unix:///run/containerd/containerd.sock";
const META_SERVER: &str = "127.0.0.1:10550";
const LOCAL_PORT: u64 = 10350;
/// Name of our directory beside KubeEdge's database.
const OWN_DIRECTORY: &str = "skerry";

/// A configuration of KubeEdge, as far as we use it.
#[derive(Debug, Clone, PartialEq)]
pub struct KubeEdge {
    /// The keys of our own configuration file.
    pub keys: Map<String, Value>,
    /// What is set and not honoured, one sentence each.
    pub warnings: Vec<String>,
    /// KubeEdge's database.
    pub database: PathBuf,
    /// CA certificate, PEM.
    pub ca_file: PathBuf,
    /// The node's certificate, PEM.
    pub certificate_file: PathBuf,
    /// Its key, PEM.
    pub key_file: PathBuf,
    /// Directory of static pods, which we do not run.
    pub static_pods: PathBuf,
    /// Loopback port on which KubeEdge's kubelet answers while it runs.
    pub local_port: u16,
}

/// Whether `value` is a configuration of KubeEdge's edge; any version counts.
pub fn is_kubeedge(value: &Value) -> bool {
    value["apiVersion"].as_str().is_some_and(|version| version.starts_with(API_GROUP))
}

/// Reads a configuration of KubeEdge.
///
/// # Errors
///
/// All mistakes, one text each, with the key in it.
pub fn parse(value: &Value) -> Result<KubeEdge, Vec<String>> {
    let version = value["apiVersion"].as_str().unwrap_or_default();
    let layout = match version.strip_prefix(API_GROUP) {
        Some("/v1alpha1") => Layout::V1,
        Some("/v1alpha2") => Layout::V2,
        _ => {
            return Err(vec![format!(
                "apiVersion `{version}` is not known; v1alpha1 and v1alpha2 are"
            )]);
        }
    };
    let mut reader = Reader { value, mistakes: Vec::new(), warnings: Vec::new() };
    let read = reader.read(layout);
    if reader.mistakes.is_empty() {
        Ok(KubeEdge { warnings: reader.warnings, ..read })
    } else {
        Err(reader.mistakes)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    V1,
    V2,
}

struct Reader<'a> {
    value: &'a Value,
    mistakes: Vec<String>,
    warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    fn read(&mut self, layout: Layout) -> KubeEdge {
        const EDGED: &str = "/modules/edged";
        const HUB: &str = "/modules/edgeHub";
        // Where edged's own keys and kubelet's keys lie.
        let kubelet = match layout {
            Layout::V1 => EDGED.to_owned(),
            Layout::V2 => format!("{EDGED}/tailoredKubeletConfig"),
        };
        let kubelet = |key: &str| format!("{kubelet}/{key}");
        let mut keys = Map::new();
        let mut put = |key: &str, value: Option<Value>| {
            value.map(|value| keys.insert(key.to_owned(), value));
        };

        let host_name = || {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            name.trim().to_lowercase()
        };
        let name = self.text(&format!("{EDGED}/hostnameOverride")).unwrap_or_else(host_name);
        put("nodeName", Some(name.into()));
        for module in ["edged", "edgeHub", "metaManager"] {
            if self.bool(&format!("/modules/{module}/enable")) == Some(false) {
                self.mistakes.push(format!(
                    "modules.{module}.enable is false: this agent cannot do without"
                ));
            }
        }

        put("hub", self.hub(HUB).map(Value::from));
        let enrol = self.text(&format!("{HUB}/httpServer"));
        if enrol.is_none() {
            self.mistakes.push("modules.edgeHub.httpServer is missing".into());
        }
        put("enrol", enrol.map(Value::from));
        if self.bool("/modules/edgeStream/enable") == Some(true) {
            match self.text("/modules/edgeStream/server") {
                Some(server) => put("tunnel", Some(format!("wss://{server}").into())),
                None => self.mistakes.push("modules.edgeStream.server is missing".into()),
            }
        }
        // As KubeEdge has it: the file that keadm wrote wins over the key.
        if Path::new(BOOTSTRAP_FILE).exists() {
            put("tokenFile", Some(BOOTSTRAP_FILE.into()));
        } else {
            put("token", self.text(&format!("{HUB}/token")).map(Value::from));
        }
        if self.text(&format!("{HUB}/projectID")).is_some_and(|id| id != crate::config::PROJECT_ID)
        {
            self.warn("modules.edgeHub.projectID", "the hub does not look at it");
        }

        let path = |text: Option<String>, default: &str| {
            PathBuf::from(text.unwrap_or_else(|| default.to_owned()))
        };
        let database = path(self.text("/database/dataSource"), DATABASE);
        if self.text("/database/driverName").is_some_and(|driver| driver != "sqlite3") {
            self.mistakes.push("database.driverName is not `sqlite3`".into());
        }
        let own = database.parent().unwrap_or(Path::new("/")).join(OWN_DIRECTORY);
        put("dir", Some(own.to_string_lossy().into()));
        let root = match layout {
            Layout::V1 => "/var/lib/edged",
            Layout::V2 => "/var/lib/kubelet",
        };
        let root = path(self.text(&format!("{EDGED}/rootDirectory")), root);
        put("podDir", Some(root.to_string_lossy().into()));
        put("podLogDir", self.text(&kubelet("podLogsDir")).map(Value::from));
        put("runtimeSocket", self.runtime_socket(layout, EDGED).map(Value::from));
        put("nodeIP", self.text(&format!("{EDGED}/nodeIP")).map(Value::from));
        if self.text(&format!("{EDGED}/customInterfaceName")).is_some() {
            self.warn("modules.edged.customInterfaceName", "set modules.edged.nodeIP");
        }
        let labels = match layout {
            Layout::V1 => format!("{EDGED}/labels"),
            Layout::V2 => format!("{EDGED}/nodeLabels"),
        };
        put("labels", self.value.pointer(&labels).filter(|labels| labels.is_object()).cloned());
        let servers = match self.value.pointer(&kubelet("clusterDNS")) {
            Some(Value::String(one)) if !one.is_empty() => Some(json!([one])),
            Some(Value::Array(list)) if !list.is_empty() => Some(json!(list)),
            _ => None,
        };
        put("clusterDNS", servers);
        put("clusterDomain", self.text(&kubelet("clusterDomain")).map(Value::from));
        put("resolvConf", self.text(&kubelet("resolvConf")).map(Value::from));
        if self.bool("/modules/metaManager/metaServer/enable") == Some(true) {
            if self.bool("/featureGates/requireAuthorization") == Some(true) {
                let why = "it would have to know who asks, and cannot yet";
                self.warn("modules.metaManager.metaServer", why);
            } else {
                let server = self.text("/modules/metaManager/metaServer/server");
                put("metaServer", Some(server.unwrap_or_else(|| META_SERVER.into()).into()));
            }
        }
        put("mqtt", self.broker());
        // On unless switched off, in KubeEdge.
        if self.bool("/modules/deviceTwin/enable") != Some(false) {
            let directory = self.text("/modules/deviceTwin/dmiSockPath");
            let socket = directory.map(|path| match path.ends_with(".sock") {
                true => path,
                false => format!("{}/dmi.sock", path.trim_end_matches('/')),
            });
            put("dmiSocket", Some(socket.unwrap_or_else(|| crate::dmi::SOCKET.into()).into()));
        }
        let cgroup_root = self.cgroup_root(&kubelet);
        put("cgroupRoot", Some(cgroup_root.into()));

        self.warn_about_modules();
        self.warn_about_settings(layout, EDGED);
        KubeEdge {
            keys,
            warnings: Vec::new(),
            ca_file: path(self.text(&format!("{HUB}/tlsCaFile")), CA_FILE),
            certificate_file: path(self.text(&format!("{HUB}/tlsCertFile")), CERTIFICATE_FILE),
            key_file: path(self.text(&format!("{HUB}/tlsPrivateKeyFile")), KEY_FILE),
            static_pods: path(self.text(&kubelet("staticPodPath")), STATIC_PODS),
            local_port: self
                .value
                .pointer(&kubelet("readOnlyPort"))
                .and_then(Value::as_u64)
                .and_then(|port| u16::try_from(port).ok())
                .unwrap_or(LOCAL_PORT as u16),
            database,
        }
    }

    fn hub(&mut self, hub: &str) -> Option<String> {
        if self.bool(&format!("{hub}/quic/enable")) == Some(true) {
            self.mistakes.push(
                "modules.edgeHub.quic.enable is true: KubeEdge's QUIC is Google's old one and does not show the \
                 node's certificate, so it is not offered; enable modules.edgeHub.websocket instead (with a Skerry \
                 hub, standard QUIC is used by itself)"
                    .into(),
            );
            return None;
        }
        if self.bool(&format!("{hub}/websocket/enable")) == Some(false) {
            self.mistakes.push("modules.edgeHub.websocket.enable is false".into());
        }
        let server = self.text(&format!("{hub}/websocket/server"));
        if server.is_none() {
            self.mistakes.push("modules.edgeHub.websocket.server is missing".into());
        }
        server.map(|server| format!("wss://{server}"))
    }

    fn runtime_socket(&mut self, layout: Layout, edged: &str) -> Option<String> {
        let kind = match layout {
            Layout::V1 => self.text(&format!("{edged}/runtimeType")),
            Layout::V2 => self.text(&format!("{edged}/containerRuntime")),
        };
        let kind = kind.unwrap_or_else(|| match layout {
            Layout::V1 => "docker".to_owned(),
            Layout::V2 => "remote".to_owned(),
        });
        let endpoint = self
            .text(&format!("{edged}/tailoredKubeletConfig/containerRuntimeEndpoint"))
            .or_else(|| self.text(&format!("{edged}/remoteRuntimeEndpoint")));
        let endpoint = endpoint.unwrap_or_else(|| RUNTIME_SOCKET.to_owned());
        if kind == "docker" || endpoint.ends_with("/dockershim.sock") {
            let text = "the container runtime is Docker: only runtimes with the Kubernetes runtime interface are used";
            self.mistakes.push(text.into());
            return None;
        }
        if !endpoint.starts_with("unix://") && !endpoint.starts_with('/') {
            self.mistakes.push(format!("the runtime's endpoint `{endpoint}` is not a Unix socket"));
            return None;
        }
        Some(endpoint)
    }

    /// The parent of all pods' cgroups, as KubeEdge's kubelet makes it.
    fn cgroup_root(&mut self, kubelet: &dyn Fn(&str) -> String) -> String {
        let root = self.text(&kubelet("cgroupRoot")).unwrap_or_default();
        let root = root.trim_end_matches('/');
        if self.bool(&kubelet("cgroupsPerQOS")) == Some(false) {
            return root.to_owned();
        }
        let driver = self.text(&kubelet("cgroupDriver")).unwrap_or_else(|| "cgroupfs".to_owned());
        match driver.as_str() {
            "cgroupfs" => format!("{root}/kubepods"),
            "systemd" => {
                let mut parts = root.split('/').filter(|part| !part.is_empty()).chain(["kubepods"]);
                let first = parts.next().unwrap_or_default().replace('-', "_");
                let rest: Vec<&str> = parts.collect();
                skerry_edge_core::pods::linux::cgroup_path(&format!("/{first}.slice"), &rest)
            }
            other => {
                let text = format!("cgroupDriver `{other}` is not `cgroupfs` or `systemd`");
                self.mistakes.push(text);
                String::new()
            }
        }
    }

    /// Our key `mqtt`; nothing where there is to be no broker.
    fn broker(&mut self) -> Option<Value> {
        const BUS: &str = "/modules/eventBus";
        // On unless switched off, in KubeEdge.
        if self.bool(&format!("{BUS}/enable")) == Some(false) {
            return None;
        }
        let mode = self.value.pointer(&format!("{BUS}/mqttMode")).and_then(Value::as_u64);
        match mode.unwrap_or(2) {
            0 => {
                let why = "this agent has no broker in it; run one at `mqttServerExternal` and set mode 2";
                self.warn("modules.eventBus.mqttMode", why);
                return None;
            }
            1 => self.warn("modules.eventBus.mqttMode", "only the external broker is used"),
            2 => {}
            mode => {
                self.mistakes.push(format!("modules.eventBus.mqttMode {mode} is not 0, 1 or 2"));
                return None;
            }
        }
        let mut keys = Map::new();
        let is_tls = self.bool(&format!("{BUS}/eventBusTLS/enable")) == Some(true);
        if is_tls {
            for (from, to) in [
                ("tlsMqttCAFile", "caFile"),
                ("tlsMqttCertFile", "certFile"),
                ("tlsMqttPrivateKeyFile", "keyFile"),
            ] {
                if let Some(text) = self.text(&format!("{BUS}/eventBusTLS/{from}")) {
                    keys.insert(to.into(), text.into());
                }
            }
        }
        for (from, to) in [
            ("mqttServerExternal", "server"),
            ("mqttUsername", "username"),
            ("mqttPassword", "password"),
            ("mqttSubClientID", "subscriber"),
            ("mqttPubClientID", "publisher"),
        ] {
            if let Some(text) = self.text(&format!("{BUS}/{from}")) {
                keys.insert(to.into(), text.into());
            }
        }
        if is_tls {
            // The scheme does not count in KubeEdge.
            let server =
                keys.get("server").and_then(Value::as_str).unwrap_or("tcp://127.0.0.1:8883");
            let address = server.split_once("://").map_or(server, |(_, address)| address);
            keys.insert("server".into(), format!("tls://{address}").into());
        }
        Some(keys.into())
    }

    fn warn_about_modules(&mut self) {
        // On unless switched off, in KubeEdge.
        for (module, what) in [
            ("serviceBus", "no HTTP calls of cloud rules"),
            ("taskManager", "node jobs are refused with that reason"),
            ("dbTest", "a test module"),
        ] {
            if self.bool(&format!("/modules/{module}/enable")) == Some(true) {
                self.warn(&format!("modules.{module}"), what);
            }
        }
        let gates = self.value.pointer("/featureGates").and_then(Value::as_object);
        let on = gates.into_iter().flatten().filter(|(_, on)| **on == Value::Bool(true));
        let on: Vec<String> = on.map(|(gate, _)| gate.clone()).collect();
        for gate in on {
            self.warn(&format!("featureGates.{gate}"), "it has no meaning here");
        }
    }

    /// Warns of settings that differ from KubeEdge's default and have no counterpart.
    fn warn_about_settings(&mut self, layout: Layout, edged: &str) {
        let (taken, defaults): (&[&str], Value) = match layout {
            Layout::V1 => (&V1_TAKEN, v1_defaults()),
            Layout::V2 => (&V2_TAKEN, v2_edged_defaults()),
        };
        self.warn_about_keys(edged, taken, &defaults);
        if layout == Layout::V2 {
            let kubelet = format!("{edged}/tailoredKubeletConfig");
            self.warn_about_keys(&kubelet, &KUBELET_TAKEN, &kubelet_defaults());
        }
        let defaults = json!({"heartbeat": 15, "messageQPS": 30, "messageBurst": 60,
            "rotateCertificates": true, "enable": true});
        let taken = [
            "projectID",
            "tlsCaFile",
            "tlsCertFile",
            "tlsPrivateKeyFile",
            "websocket",
            "quic",
            "token",
            "httpServer",
        ];
        self.warn_about_keys("/modules/edgeHub", &taken, &defaults);
    }

    fn warn_about_keys(&mut self, at: &str, taken: &[&str], defaults: &Value) {
        let fields = self.value.pointer(at).and_then(Value::as_object);
        for (key, value) in fields.into_iter().flatten() {
            let default = &defaults[key];
            let same = match (default, value) {
                (Value::Object(default), Value::Object(value)) => {
                    value.iter().all(|(key, value)| default.get(key) == Some(value))
                }
                (default, value) => default == value || is_empty(value) && is_empty(default),
            };
            if !same && !taken.contains(&key.as_str()) {
                let dotted = format!("{at}/{key}").trim_start_matches('/').replace('/', ".");
                let text = value.to_string();
                let shown = if text.len() > 80 { "this value" } else { text.as_str() };
                self.warn(&dotted, &format!("{shown} is not KubeEdge's default"));
            }
        }
    }

    fn warn(&mut self, key: &str, why: &str) {
        self.warnings.push(format!("`{key}` is not honoured: {why}"));
    }

    /// A text; an empty one counts as absent, as it does in KubeEdge.
    fn text(&mut self, pointer: &str) -> Option<String> {
        match self.value.pointer(pointer) {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text.clone()).filter(|text| !text.is_empty()),
            Some(_) => {
                let dotted = pointer.trim_start_matches('/').replace('/', ".");
                self.mistakes.push(format!("{dotted} is not a text"));
                None
            }
        }
    }

    fn bool(&self, pointer: &str) -> Option<bool> {
        self.value.pointer(pointer).and_then(Value::as_bool)
    }
}

/// Whether a value is what an absent key means.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty() || text == "0s",
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
        Value::Bool(true) => false,
    }
}

const V1_TAKEN: [&str; 14] = [
    "enable",
    "hostnameOverride",
    "labels",
    "runtimeType",
    "remoteRuntimeEndpoint",
    "remoteImageEndpoint",
    "nodeIP",
    "clusterDNS",
    "clusterDomain",
    "cgroupDriver",
    "cgroupRoot",
    "cgroupsPerQOS",
    "customInterfaceName",
    "podSandboxImage",
];

const V2_TAKEN: [&str; 13] = [
    "enable",
    "hostnameOverride",
    "nodeLabels",
    "nodeIP",
    "rootDirectory",
    "containerRuntime",
    "remoteRuntimeEndpoint",
    "remoteImageEndpoint",
    "customInterfaceName",
    "tailoredKubeletConfig",
    // Containerd has its own; events are always reported.
    "podSandboxImage",
    "reportEvent",
    "registerNodeNamespace",
];

const KUBELET_TAKEN: [&str; 13] = [
    "podLogsDir",
    "readOnlyPort",
    "clusterDomain",
    "clusterDNS",
    "cgroupRoot",
    "cgroupsPerQOS",
    "cgroupDriver",
    "resolvConf",
    "containerRuntimeEndpoint",
    "imageServiceEndpoint",
    "staticPodPath",
    // Of KubeEdge's own process.
    "contentType",
    "logging",
];

fn v1_defaults() -> Value {
    json!({
        "nodeStatusUpdateFrequency": 10, "dockerAddress": "unix:///var/run/docker.sock",
        "edgedMemoryCapacity": 7_852_396_000_u64, "imagePullProgressDeadline": 60, "runtimeRequestTimeout": 2,
        "registerNode": true, "registerNodeNamespace": "default", "concurrentConsumers": 5,
        "imageGCHighThreshold": 80, "imageGCLowThreshold": 40, "maximumDeadContainersPerPod": 1,
        "cniConfDir": "/etc/cni/net.d", "cniBinDir": "/opt/cni/bin", "cniCacheDirs": "/var/lib/cni/cache",
        "networkPluginMTU": 1500, "volumeStatsAggPeriod": 60_000_000_000_u64, "enableMetrics": true,
    })
}

fn v2_edged_defaults() -> Value {
    json!({
        "registerSchedulable": true, "maxContainerCount": -1, "maxPerPodContainerCount": 1, "minimumGCAge": "0s",
    })
}

const KUBELET_DEFAULTS: &str = r#"{
    "address": "127.0.0.1", "syncFrequency": "1m0s", "fileCheckFrequency": "20s", "registryPullQPS": 5,
    "registryBurst": 10, "eventRecordQPS": 50, "eventBurst": 100, "enableDebuggingHandlers": true,
    "oomScoreAdj": -999, "streamingConnectionIdleTimeout": "4h0m0s", "nodeStatusUpdateFrequency": "10s",
    "nodeStatusReportFrequency": "5m0s", "nodeLeaseDurationSeconds": 40, "imageMinimumGCAge": "2m0s",
    "imageGCHighThresholdPercent": 85, "imageGCLowThresholdPercent": 80, "volumeStatsAggPeriod": "1m0s",
    "cpuManagerPolicy": "none", "cpuManagerReconcilePeriod": "10s", "memoryManagerPolicy": "None",
    "topologyManagerPolicy": "none", "topologyManagerScope": "container", "runtimeRequestTimeout": "2m0s",
    "hairpinMode": "promiscuous-bridge", "maxPods": 110, "podPidsLimit": -1, "cpuCFSQuota": true,
    "cpuCFSQuotaPeriod": "100ms", "maxOpenFiles": 1000000, "serializeImagePulls": true,
    "evictionHard": {"memory.available": "100Mi", "nodefs.available": "10%", "nodefs.inodesFree": "5%",
    "imagefs.available": "15%", "imagefs.inodesFree": "5%"},
    "evictionPressureTransitionPeriod": "5m0s", "enableControllerAttachDetach": true,
    "makeIPTablesUtilChains": true, "iptablesMasqueradeBit": 14, "iptablesDropBit": 15,
    "containerLogMaxSize": "10Mi", "containerLogMaxFiles": 5, "containerLogMaxWorkers": 1,
    "containerLogMonitorInterval": "10s", "configMapAndSecretChangeDetectionStrategy": "Get",
    "enforceNodeAllocatable": ["pods"],
    "volumePluginDir": "/usr/libexec/kubernetes/kubelet-plugins/volume/exec/",
    "enableSystemLogHandler": true, "enableProfilingHandler": true, "enableDebugFlagsHandler": true,
    "memoryThrottlingFactor": 0.9, "registerNode": true, "localStorageCapacityIsolation": true,
    "crashLoopBackOff": {}
}"#;

fn kubelet_defaults() -> Value {
    // As text: too many keys for the macro.
    serde_json::from_str(KUBELET_DEFAULTS).expect("a constant")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Endpoint};

    const LEAST: &str = "
apiVersion: edgecore.config.kubeedge.io/v1alpha2
kind: EdgeCore
database: {dataSource: /data/edgecore.db}
modules:
  eventBus: {enable: false}
  deviceTwin: {enable: false}
  edgeHub:
    httpServer: https://10.1.2.3:10002
    tlsCertFile: /k/server.crt
    websocket: {enable: true, server: '10.1.2.3:10000'}
    quic: {enable: false, server: '10.1.2.3:10001'}
  edgeStream: {enable: true, server: '10.1.2.3:10004'}
  edged:
    hostnameOverride: edge1
    nodeLabels: {site: lisbon}
    tailoredKubeletConfig:
      cgroupDriver: systemd
      clusterDNS: [169.254.96.16]
      containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
      readOnlyPort: 10351
";

    fn read(text: &str) -> Result<KubeEdge, Vec<String>> {
        parse(&serde_saphyr::from_str(text).expect("YAML"))
    }

    #[test]
    fn least_file_becomes_a_configuration_of_ours() {
        let read = read(LEAST).expect("a configuration");
        assert_eq!(read.warnings, [] as [&str; 0]);
        assert_eq!(read.database, Path::new("/data/edgecore.db"));
        assert_eq!(read.certificate_file, Path::new("/k/server.crt"));
        assert_eq!(read.ca_file, Path::new("/etc/kubeedge/ca/rootCA.crt"));
        assert_eq!(read.local_port, 10351);
        let config = Config::parse(Path::new("edgecore.yaml"), LEAST).expect("a configuration");
        assert_eq!(config.node_name, "edge1");
        assert_eq!(config.hubs, [Endpoint { host: "10.1.2.3".into(), port: 10000, via: None }]);
        assert_eq!(config.enrol.to_string(), "10.1.2.3:10002");
        assert_eq!(config.tunnel.map(|tunnel| tunnel.to_string()), Some("10.1.2.3:10004".into()));
        assert_eq!(config.dir, Path::new("/data/skerry"));
        assert_eq!(config.pod_dir, Path::new("/var/lib/kubelet"));
        assert_eq!(config.labels["site"], "lisbon");
        assert_eq!(config.cgroup_root.as_deref(), Some("/kubepods.slice"));
        assert_eq!(config.cluster_dns.len(), 1);
    }

    #[test]
    fn old_layout_is_read_too() {
        let text = "
apiVersion: edgecore.config.kubeedge.io/v1alpha1
modules:
  edgeHub:
    httpServer: https://10.1.2.3:10002
    websocket: {enable: true, server: '10.1.2.3:10000'}
  edged:
    hostnameOverride: edge1
    labels: {site: porto}
    runtimeType: remote
    remoteRuntimeEndpoint: unix:///run/containerd/containerd.sock
    clusterDNS: 10.96.0.10
    cgroupRoot: /edge
    edgedMemoryCapacity: 7852396000
    devicePluginEnabled: true
";
        let read = read(text).expect("a configuration");
        assert_eq!(read.keys["podDir"], "/var/lib/edged");
        assert_eq!(read.keys["labels"]["site"], "porto");
        assert_eq!(read.keys["clusterDNS"], json!(["10.96.0.10"]));
        assert_eq!(read.keys["cgroupRoot"], "/edge/kubepods");
        assert_eq!(read.keys["dir"], "/var/lib/kubeedge/skerry");
        let warnings = read.warnings.join("\n");
        assert!(warnings.contains("`modules.edged.devicePluginEnabled`"), "{warnings}");
        assert!(!warnings.contains("edgedMemoryCapacity"), "{warnings}");
    }

    #[test]
    fn quic_and_docker_are_refused_with_the_reason() {
        let text = LEAST
            .replace("quic: {enable: false", "quic: {enable: true")
            .replace("unix:///run/containerd/containerd.sock", "unix:///var/run/dockershim.sock");
        let mistakes = read(&text).expect_err("cannot work");
        assert_eq!(mistakes.len(), 2, "{mistakes:?}");
        assert!(mistakes[0].contains("does not show the node's certificate"), "{mistakes:?}");
        assert!(mistakes[1].contains("Docker"), "{mistakes:?}");
        let error = Config::parse(Path::new("edgecore.yaml"), &text).expect_err("refused");
        assert!(error.to_string().contains("modules.edgeHub.quic.enable is true"), "{error}");
    }

    #[test]
    fn settings_that_cannot_be_honoured_are_named() {
        let text = LEAST
            .replace(
                "readOnlyPort: 10351",
                "maxPods: 30\n      podPidsLimit: -1\n      evictionHard: {memory.available: 50Mi}",
            )
            .replace(
                "  eventBus: {enable: false}\n",
                "  metaManager: {metaServer: {enable: true}}\n  eventBus: {mqttMode: 1, mqttServerExternal: 'tcp://b:7'}\n",
            );
        let config = Config::parse(Path::new("edgecore.yaml"), &text).expect("a configuration");
        let local_api = config.meta_server.map(|address| address.to_string());
        assert_eq!(local_api.as_deref(), Some("127.0.0.1:10550"));
        assert_eq!(config.bus.map(|bus| (bus.host, bus.port)), Some(("b".into(), 7)));
        assert_eq!(config.dmi_socket, None);
        let warnings = read(&text).expect("a configuration").warnings.join("\n");
        for part in [
            "`modules.edged.tailoredKubeletConfig.maxPods` is not honoured: 30",
            "`modules.edged.tailoredKubeletConfig.evictionHard`",
            "`modules.eventBus.mqttMode` is not honoured: only the external broker",
        ] {
            assert!(warnings.contains(part), "{part} is not in:\n{warnings}");
        }
        assert!(!warnings.contains("podPidsLimit"), "{warnings}");
    }

    #[test]
    fn cgroups_are_those_of_kubeedges_kubelet() {
        let check = |keys: &str, expected: &str| {
            let text = LEAST.replace("cgroupDriver: systemd", keys);
            assert_eq!(
                read(&text).expect("a configuration").keys["cgroupRoot"],
                expected,
                "{keys}"
            );
        };
        check("cgroupDriver: cgroupfs", "/kubepods");
        check("cgroupRoot: /edge-a", "/edge-a/kubepods");
        check(
            "cgroupRoot: /edge-a\n      cgroupDriver: systemd",
            "/edge_a.slice/edge_a-kubepods.slice",
        );
        check("cgroupsPerQOS: false", "");
    }
}
