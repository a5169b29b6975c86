//! The configuration of EdgeCore: one YAML file, read once, all mistakes told together.
//!
//! KubeEdge's own `edgecore.yaml` is read as it is; see [`kubeedge`].

use crate::bus::{BusConfig, BusTls, Version};
use crate::kubeedge;
use serde_json::{Map, Value};
use skerry_edge_core::history::Keeping;
use skerry_edge_core::twin::REPORT_INTERVAL;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// KubeEdge's default project id; part of the path that the hub ignores.
pub const PROJECT_ID: &str = "e632aba927ea4ac2b575ec1603d56f10";

/// Every key, with what it is; the reference for people.
pub const KEYS: [(&str, &str); 24] = [
    ("nodeName", "name of the Node, unique in the cluster (required)"),
    ("hub", "address of the hub, `wss://host:10000`, or a list that is tried in turn (required)"),
    (
        "quic",
        "address of the first hub's QUIC listener, `quic://host:10001`, or `off`; the host of `hub` with port 10001 by \
         default",
    ),
    ("beat", "seconds between two signs of life on an idle link, 5 to 300, 25 by default"),
    ("enrol", "address of the enrolment listener, `https://host:10002` (required)"),
    (
        "tunnel",
        "address of the log tunnel, `wss://host:10004`; no logs from the cluster without it",
    ),
    (
        "proxy",
        "HTTP proxy through which hub, enrolment and tunnel are reached (`CONNECT`), `http://host:3128`; QUIC is then off \
         unless `quic` has an address",
    ),
    ("token", "join token; needed once"),
    ("tokenFile", "file with the join token, instead of `token`"),
    ("dir", "directory for the database and certificates (required)"),
    ("podDir", "directory for pod data, `<dir>/kubelet` by default"),
    ("podLogDir", "directory for container logs, `/var/log/pods` by default"),
    ("runtimeSocket", "containerd's socket, `/run/containerd/containerd.sock` by default"),
    ("nodeIP", "address of the node, that of the default route by default"),
    ("labels", "labels for the Node, a map of texts"),
    ("clusterDNS", "list of DNS server addresses for pods"),
    ("clusterDomain", "`cluster.local` by default"),
    (
        "cgroupRoot",
        "parent cgroup of all pods, `/kubepods` by default; empty leaves it to the runtime",
    ),
    ("resolvConf", "resolver file of the node, `/etc/resolv.conf` by default"),
    (
        "metaServer",
        "loopback address of the node's own Kubernetes API, `127.0.0.1:10550` in KubeEdge; none without it",
    ),
    (
        "mqtt",
        "broker of the node for devices and rules: `server` (`tcp://127.0.0.1:1883`, or `tls://host:8883` with `caFile` and, \
         where the broker wants it, `certFile` and `keyFile`), and where needed `username`, `password`, `version` (3.1.1 or \
         5), `subscriber`, `publisher` (names of the two connections) and `cleanSession`; none without it",
    ),
    ("dmiSocket", "Unix socket for mappers, `/etc/kubeedge/dmi.sock` in KubeEdge; none without it"),
    (
        "reportInterval",
        "seconds between two reports about a device to the hub, 1 to 3600, 10 by default",
    ),
    (
        "history",
        "what devices were, kept on the node: `all` (of every property; `false`: of those that Device or DeviceModel name), \
         `megabytes` (1 to 1048576, 256 by default), `days` (30), `interval` (least seconds between two values, 1), `deadband` \
         (0); or `off`",
    ),
];

/// What the file may say, in seconds.
const REPORT_RANGE_S: RangeInclusive<u64> = 1..=3600;
/// Room for the history on the disk when the file says nothing, in MB.
const HISTORY_MB: u64 = 256;
/// What the file may say, in MB.
const HISTORY_RANGE_MB: RangeInclusive<u64> = 1..=1_048_576;
/// Usual port of MQTT brokers.
const MQTT_PORT: u16 = 1883;
const MQTTS_PORT: u16 = 8883;
/// Where the MQTT library meets our TLS, in the agent's folder.
const BUS_SOCKET: &str = "mqtt-tls.sock";

/// Usual port of HTTP proxies.
const PROXY_PORT: u16 = 3128;
/// Port of the hub's QUIC listener.
pub const QUIC_PORT: u16 = 10001;
/// Time between two signs of life when the file says nothing: under the 30 s after which many NATs forget a UDP flow.
pub const BEAT: Duration = Duration::from_secs(25);
/// What the file may say, in seconds.
const BEAT_RANGE_S: RangeInclusive<u64> = 5..=300;

/// How EdgeCore is to run.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The file that it was read from.
    pub file: PathBuf,
    /// Name of the Node.
    pub node_name: String,
    /// Hub addresses, tried in turn.
    pub hubs: Vec<Endpoint>,
    /// QUIC listeners of the hubs.
    pub quic: Quic,
    /// Time between two signs of life on an idle link.
    pub beat: Duration,
    /// Enrolment listener.
    pub enrol: Endpoint,
    /// Tunnel listener.
    pub tunnel: Option<Endpoint>,
    /// Where the join token is.
    pub token: Option<TokenSource>,
    /// Database and certificates.
    pub dir: PathBuf,
    /// Pod data.
    pub pod_dir: PathBuf,
    /// Container logs.
    pub pod_log_dir: PathBuf,
    /// Unix socket of the runtime.
    pub runtime_socket: PathBuf,
    /// Address of the node.
    pub node_ip: Option<IpAddr>,
    /// Labels of the Node.
    pub labels: BTreeMap<String, String>,
    /// DNS servers of pods.
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster.
    pub cluster_domain: String,
    /// Parent cgroup, when it is not the default.
    pub cgroup_root: Option<String>,
    /// Resolver file, when it is not the default.
    pub resolv_conf: Option<PathBuf>,
    /// Where the node's own API listens, if it does.
    pub meta_server: Option<SocketAddr>,
    /// The broker, if there is one.
    pub bus: Option<BusConfig>,
    /// Where mappers connect, if they may.
    pub dmi_socket: Option<PathBuf>,
    /// Time between two reports about a device.
    pub report_interval: Duration,
    /// What is kept of what devices were, if anything.
    pub history: Option<HistoryConfig>,
}

/// What is kept of what devices were.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HistoryConfig {
    /// Of every property; else of those that a Device or DeviceModel names.
    pub all: bool,
    /// Bytes on the disk.
    pub limit: u64,
    /// Of properties of which nothing else is said.
    pub keeping: Keeping,
}

/// A join token, or the file that holds it and is read each time it is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// In the configuration itself.
    Text(String),
    /// In a file.
    File(PathBuf),
}

/// Where QUIC is tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Quic {
    /// Nowhere.
    Off,
    /// At the host of each hub, on [`QUIC_PORT`].
    Default,
    /// There, for the first hub; as by default for the others.
    At(Endpoint),
}

/// Host and port of a TLS listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Name or address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// The HTTP proxy on the way to it.
    pub via: Option<Box<Endpoint>>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("could not read configuration `{path}`")]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not YAML.
    #[error("configuration `{path}` is not valid YAML: {message}")]
    Yaml {
        /// Which one.
        path: PathBuf,
        /// What the parser said, with line and column.
        message: String,
    },
    /// YAML, but not a configuration.
    #[error("configuration `{path}` has {} mistake(s): {}", mistakes.len(), mistakes.join("; "))]
    Mistakes {
        /// Which one.
        path: PathBuf,
        /// All of them.
        mistakes: Vec<String>,
    },
}

impl ConfigError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Mistakes { .. } => {
                let known: Vec<_> = KEYS.iter().map(|(key, _)| *key).collect();
                Some(format!("known keys: {}", known.join(", ")))
            }
            _ => None,
        }
    }
}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], with every mistake in the file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// Checks `text`, which was read from `path`.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let value: Value = serde_saphyr::from_str(text).map_err(|error| ConfigError::Yaml {
            path: path.to_owned(),
            message: error.to_string(),
        })?;
        let mistakes = |mistakes| ConfigError::Mistakes { path: path.to_owned(), mistakes };
        let value = match kubeedge::is_kubeedge(&value) {
            true => Value::Object(kubeedge::parse(&value).map_err(mistakes)?.keys),
            false => value,
        };
        let Value::Object(fields) = value else {
            return Err(mistakes(vec!["the file is not a map of keys".into()]));
        };
        let mut fields = Fields { fields, mistakes: Vec::new() };
        let config = fields.config(path);
        if !fields.mistakes.is_empty() {
            return Err(mistakes(fields.mistakes));
        }
        Ok(config)
    }

    /// The database file.
    pub fn database(&self) -> PathBuf {
        self.dir.join("state.db")
    }

    /// Where the hub with this place in [`Self::hubs`] listens for QUIC, if it is to be tried.
    pub fn quic_of(&self, hub: usize) -> Option<Endpoint> {
        match (&self.quic, self.hubs.get(hub)?) {
            (Quic::Off, _) => None,
            (Quic::At(endpoint), _) if hub == 0 => Some(endpoint.clone()),
            (_, hub) => Some(Endpoint { port: QUIC_PORT, via: None, ..hub.clone() }),
        }
    }

    /// The directory of certificates.
    pub fn pki(&self) -> PathBuf {
        self.dir.join("pki")
    }
}

impl Endpoint {
    /// Reads `<scheme>://<host>[:<port>][/]`.
    ///
    /// # Errors
    ///
    /// A text that says what is wrong.
    pub fn parse(text: &str, scheme: &str, default_port: u16) -> Result<Self, String> {
        let bad = || format!("`{text}` is not an address like `{scheme}://host:{default_port}`");
        let rest = text.strip_prefix(scheme).and_then(|rest| rest.strip_prefix("://"));
        let rest = rest.ok_or_else(bad)?.trim_end_matches('/');
        let (host, port) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, port)) => (host, port.strip_prefix(':').or(port.is_empty().then_some(""))),
            None => match rest.rsplit_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (rest, Some("")),
            },
        };
        let port = match port.ok_or_else(bad)? {
            "" => default_port,
            port => port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?,
        };
        if host.is_empty() || host.contains(['/', '@', '?', ' ']) {
            return Err(bad());
        }
        Ok(Self { host: host.into(), port, via: None })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

struct Fields {
    fields: Map<String, Value>,
    mistakes: Vec<String>,
}

impl Fields {
    fn config(&mut self, file: &Path) -> Config {
        let node_name = self.text("nodeName").unwrap_or_else(|| self.missing("nodeName"));
        let allowed =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
        if !node_name.bytes().all(allowed)
            || node_name.len() > 253
            || node_name.starts_with(['-', '.'])
        {
            self.mistakes.push(format!("nodeName `{node_name}` is not a lower-case DNS name"));
        }
        let hubs = match self.fields.remove("hub") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(list)) if !list.is_empty() && list.iter().all(Value::is_string) => {
                list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
            }
            None => {
                self.missing("hub");
                Vec::new()
            }
            Some(_) => {
                self.mistakes.push("hub is not an address or a list of addresses".into());
                Vec::new()
            }
        };
        if hubs.iter().any(|hub| hub.starts_with("quic://")) {
            self.mistakes.push(
                "hub: QUIC of KubeEdge is Google's QUIC of 2018 and does not check who the node is, so it is not offered; \
                 give the WebSocket address, `wss://host:10000` (QUIC of our own hub is the key `quic`)"
                    .into(),
            );
        }
        let hubs = hubs.iter().filter(|hub| !hub.starts_with("quic://")).collect::<Vec<_>>();
        let proxy = self.text("proxy");
        let proxy = proxy.and_then(|url| self.endpoint("proxy", &url, "http", PROXY_PORT));
        let through =
            |endpoint: Endpoint| Endpoint { via: proxy.clone().map(Box::new), ..endpoint };
        let hubs = hubs.iter().filter_map(|hub| self.endpoint("hub", hub, "wss", 10000));
        let hubs = hubs.map(through).collect();
        // In YAML a bare `off` is `false`.
        let off = self.fields.get("quic") == Some(&Value::Bool(false));
        let quic = match (off && self.fields.remove("quic").is_some(), self.text("quic").as_deref())
        {
            (true, _) | (_, Some("off")) => Quic::Off,
            // A proxy takes no UDP, and where there is one there is seldom another way out.
            (_, None) if proxy.is_some() => Quic::Off,
            (_, None) => Quic::Default,
            (_, Some(url)) => {
                self.endpoint("quic", url, "quic", QUIC_PORT).map_or(Quic::Off, Quic::At)
            }
        };
        let beat = match self.fields.remove("beat") {
            None | Some(Value::Null) => BEAT,
            Some(value) => match value.as_u64().filter(|s| BEAT_RANGE_S.contains(s)) {
                Some(seconds) => Duration::from_secs(seconds),
                None => {
                    let (least, most) = (BEAT_RANGE_S.start(), BEAT_RANGE_S.end());
                    self.mistakes
                        .push(format!("beat is not a number of seconds, {least} to {most}"));
                    BEAT
                }
            },
        };
        let enrol = self.text("enrol").unwrap_or_else(|| self.missing("enrol"));
        let enrol = match enrol.as_str() {
            "" => None,
            enrol => self.endpoint("enrol", enrol, "https", 10002).map(through),
        };
        let tunnel =
            self.text("tunnel").and_then(|url| self.endpoint("tunnel", &url, "wss", 10004));
        let tunnel = tunnel.map(through);
        let token = match (self.text("token"), self.text("tokenFile")) {
            (Some(_), Some(_)) => {
                self.mistakes.push("token and tokenFile are both given".into());
                None
            }
            (Some(text), None) => Some(TokenSource::Text(text)),
            (None, Some(file)) => Some(TokenSource::File(file.into())),
            (None, None) => None,
        };
        let dir = PathBuf::from(self.text("dir").unwrap_or_else(|| self.missing("dir")));
        let pod_dir = self.text("podDir").map_or_else(|| dir.join("kubelet"), PathBuf::from);
        let pod_log_dir =
            self.text("podLogDir").map_or_else(|| "/var/log/pods".into(), PathBuf::from);
        let socket = self.text("runtimeSocket");
        let socket = socket.unwrap_or_else(|| "/run/containerd/containerd.sock".into());
        let runtime_socket = socket.strip_prefix("unix://").unwrap_or(&socket).into();
        let node_ip = self.text("nodeIP").and_then(|text| self.address("nodeIP", &text));
        let labels = match self.fields.remove("labels") {
            None | Some(Value::Null) => BTreeMap::new(),
            Some(Value::Object(map)) if map.values().all(Value::is_string) => map
                .into_iter()
                .map(|(key, value)| (key, value.as_str().unwrap_or_default().to_owned()))
                .collect(),
            Some(_) => {
                self.mistakes.push("labels is not a map of texts".into());
                BTreeMap::new()
            }
        };
        let cluster_dns = match self.fields.remove("clusterDNS") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => list
                .iter()
                .filter_map(|one| self.address("clusterDNS", one.as_str().unwrap_or_default()))
                .collect(),
            Some(_) => {
                self.mistakes.push("clusterDNS is not a list of addresses".into());
                Vec::new()
            }
        };
        let cluster_domain = self.text("clusterDomain").unwrap_or_else(|| "cluster.local".into());
        let cgroup_root = self.text("cgroupRoot");
        let resolv_conf = self.text("resolvConf").map(PathBuf::from);
        let meta_server = self.text("metaServer").and_then(|text| {
            let address = text.parse::<SocketAddr>().ok().filter(|it| it.ip().is_loopback());
            if address.is_none() {
                self.mistakes
                    .push(format!("metaServer: `{text}` is not a loopback address with a port"));
            }
            address
        });
        let bus = self.bus(&node_name, &dir);
        let dmi_socket = self.text("dmiSocket").map(PathBuf::from);
        if dmi_socket.as_ref().is_some_and(|path| !path.is_absolute()) {
            self.mistakes.push("dmiSocket is not an absolute path".into());
        }
        let report_interval = match self.fields.remove("reportInterval") {
            None | Some(Value::Null) => REPORT_INTERVAL,
            Some(value) => match value.as_u64().filter(|s| REPORT_RANGE_S.contains(s)) {
                Some(seconds) => Duration::from_secs(seconds),
                None => {
                    let (least, most) = (REPORT_RANGE_S.start(), REPORT_RANGE_S.end());
                    self.mistakes.push(format!(
                        "reportInterval is not a number of seconds, {least} to {most}"
                    ));
                    REPORT_INTERVAL
                }
            },
        };
        let history = self.history();
        for key in self.fields.keys() {
            self.mistakes.push(format!("key `{key}` is not known"));
        }
        Config {
            file: file.to_owned(),
            node_name,
            hubs,
            quic,
            beat,
            enrol: enrol.unwrap_or(Endpoint { host: String::new(), port: 0, via: None }),
            tunnel,
            token,
            dir,
            pod_dir,
            pod_log_dir,
            runtime_socket,
            node_ip,
            labels,
            cluster_dns,
            cluster_domain,
            cgroup_root,
            resolv_conf,
            meta_server,
            bus,
            dmi_socket,
            report_interval,
            history,
        }
    }

    fn history(&mut self) -> Option<HistoryConfig> {
        let keys = match self.fields.remove("history") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(keys)) => keys,
            // In YAML a bare `off` is `false`.
            Some(Value::Bool(false)) => return None,
            Some(Value::String(word)) if word == "off" => return None,
            Some(_) => {
                self.mistakes.push("history is neither a map of keys nor `off`".into());
                return None;
            }
        };
        let mut fields = Fields { fields: keys, mistakes: Vec::new() };
        let all = match fields.fields.remove("all") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(all)) => all,
            Some(_) => {
                fields.mistakes.push("all is not true or false".into());
                false
            }
        };
        let mut number = |key: &str, least: f64, most: f64| {
            let value = fields.fields.remove(key).filter(|value| !value.is_null())?;
            let number = value.as_f64().filter(|number| (least..=most).contains(number));
            if number.is_none() {
                fields.mistakes.push(format!("{key} is not a number, {least} to {most}"));
            }
            number
        };
        let (least, most) = HISTORY_RANGE_MB.into_inner();
        let megabytes = number("megabytes", least as f64, most as f64);
        let usual = Keeping::default();
        let milliseconds = |number: Option<f64>, unit: f64, usual: i64| {
            number.map_or(usual, |number| (number * unit) as i64)
        };
        let keeping = Keeping {
            interval_ms: milliseconds(number("interval", 0.0, 86_400.0), 1000.0, usual.interval_ms),
            deadband: number("deadband", 0.0, f64::MAX).unwrap_or(usual.deadband),
            keep_ms: milliseconds(number("days", 0.01, 3650.0), 86_400_000.0, usual.keep_ms),
        };
        for key in fields.fields.keys() {
            fields.mistakes.push(format!("key `{key}` is not known"));
        }
        let mistakes = fields.mistakes.into_iter().map(|mistake| format!("history: {mistake}"));
        self.mistakes.extend(mistakes);
        let limit = megabytes.map_or(HISTORY_MB, |megabytes| megabytes as u64) * 1_000_000;
        Some(HistoryConfig { all, limit, keeping })
    }

    fn bus(&mut self, node: &str, dir: &Path) -> Option<BusConfig> {
        let keys = match self.fields.remove("mqtt") {
            None | Some(Value::Null) => return None,
            Some(Value::Object(keys)) => keys,
            Some(_) => {
                self.mistakes.push("mqtt is not a map of keys".into());
                return None;
            }
        };
        let mut fields = Fields { fields: keys, mistakes: Vec::new() };
        let server = fields.text("server");
        let server = server.unwrap_or_else(|| format!("tcp://127.0.0.1:{MQTT_PORT}"));
        let (scheme, rest) = server.split_once("://").unwrap_or(("tcp", &server));
        let is_tls = ["ssl", "tls", "mqtts"].contains(&scheme);
        let server = match (is_tls, scheme) {
            (true, _) => fields.endpoint("server", &format!("tls://{rest}"), "tls", MQTTS_PORT),
            (_, "mqtt") => fields.endpoint("server", &format!("tcp://{rest}"), "tcp", MQTT_PORT),
            _ => fields.endpoint("server", &server, "tcp", MQTT_PORT),
        };
        let login = fields.text("username").filter(|user| !user.is_empty());
        let password = fields.text("password").unwrap_or_default();
        let tls = fields.bus_tls(is_tls, dir);
        let version = match fields.fields.remove("version") {
            None | Some(Value::Null) => Version::V3,
            Some(version) if version == 3 || version == "3.1.1" => Version::V3,
            Some(version) if version == 5 || version == "5" => Version::V5,
            Some(_) => {
                fields.mistakes.push("version is neither 3.1.1 nor 5".into());
                Version::V3
            }
        };
        let name = |text: Option<String>, role: &str| {
            text.filter(|name| !name.is_empty())
                .unwrap_or_else(|| format!("hub-client-{role}-{node}"))
        };
        let subscriber = name(fields.text("subscriber"), "sub");
        let publisher = name(fields.text("publisher"), "pub");
        if subscriber == publisher {
            fields
                .mistakes
                .push("subscriber and publisher are the same: a broker lets in one".into());
        }
        let clean_session = match fields.fields.remove("cleanSession") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(clean)) => clean,
            Some(_) => {
                fields.mistakes.push("cleanSession is not true or false".into());
                false
            }
        };
        for key in fields.fields.keys() {
            fields.mistakes.push(format!("key `{key}` is not known"));
        }
        self.mistakes.extend(fields.mistakes.into_iter().map(|mistake| format!("mqtt: {mistake}")));
        let Endpoint { host, port, .. } = server?;
        let login = login.map(|user| (user, password));
        Some(BusConfig { host, port, version, tls, subscriber, publisher, login, clean_session })
    }

    /// Files for TLS to the broker; of no use without it.
    fn bus_tls(&mut self, is_tls: bool, dir: &Path) -> Option<BusTls> {
        let [ca, certificate, key] =
            ["caFile", "certFile", "keyFile"].map(|key| self.text(key).map(PathBuf::from));
        let identity = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => {
                self.mistakes.push("certFile and keyFile need each other".into());
                None
            }
        };
        if !is_tls {
            if ca.is_some() || identity.is_some() {
                self.mistakes.push("caFile, certFile and keyFile are for `server: tls://…`".into());
            }
            return None;
        }
        let Some(ca) = ca else {
            self.mistakes
                .push("caFile is missing: which CA has signed the broker's certificate?".into());
            return None;
        };
        Some(BusTls { ca, identity, socket: dir.join(BUS_SOCKET) })
    }

    fn text(&mut self, key: &str) -> Option<String> {
        match self.fields.remove(key)? {
            Value::String(text) => Some(text),
            Value::Null => None,
            _ => {
                self.mistakes.push(format!("{key} is not a text"));
                None
            }
        }
    }

    fn missing(&mut self, key: &str) -> String {
        self.mistakes.push(format!("{key} is missing"));
        String::new()
    }

    fn endpoint(&mut self, key: &str, text: &str, scheme: &str, port: u16) -> Option<Endpoint> {
        let parsed = Endpoint::parse(text, scheme, port);
        parsed.map_err(|error| self.mistakes.push(format!("{key}: {error}"))).ok()
    }

    fn address(&mut self, key: &str, text: &str) -> Option<IpAddr> {
        let parsed = text.parse();
        parsed.map_err(|_| self.mistakes.push(format!("{key}: `{text}` is not an IP address"))).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "nodeName: edge1\nhub: wss://10.0.0.1\nenrol: https://hub.example:10002/\ndir: /var/lib/skerry\n";

    fn check(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("edge.yaml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn least_configuration_gets_its_defaults() {
        let config = check(LEAST).expect("enough");
        assert_eq!(config.hubs, [Endpoint { host: "10.0.0.1".into(), port: 10000, via: None }]);
        assert_eq!(config.enrol.to_string(), "hub.example:10002");
        assert_eq!(config.pod_dir, Path::new("/var/lib/skerry/kubelet"));
        assert_eq!(config.tunnel, None);
    }

    #[test]
    fn proxy_is_on_the_way_to_everything_by_tcp_and_switches_quic_off() {
        let config = check(&format!("{LEAST}tunnel: wss://t\nproxy: http://proxy.example\n"));
        let config = config.expect("fine");
        let via = |endpoint: &Endpoint| endpoint.via.as_ref().map(ToString::to_string);
        let all = [&config.hubs[0], &config.enrol, config.tunnel.as_ref().expect("given")];
        assert!(all.iter().all(|one| via(one).as_deref() == Some("proxy.example:3128")));
        assert_eq!(config.quic_of(0), None);
        let config = check(&format!("{LEAST}proxy: http://p:1\nquic: quic://c:7\n")).expect("fine");
        assert_eq!(
            config.quic_of(0).map(|at| (at.to_string(), at.via)),
            Some(("c:7".into(), None))
        );
        let error = check(&format!("{LEAST}proxy: socks://p:1\n")).expect_err("no such scheme");
        assert!(error.contains("proxy: `socks://p:1`"), "{error}");
    }

    #[test]
    fn quic_is_tried_beside_each_hub_unless_it_is_off() {
        let config = check(LEAST).expect("enough");
        assert_eq!(config.quic_of(0).map(|at| at.to_string()), Some("10.0.0.1:10001".into()));
        let two = LEAST.replace("wss://10.0.0.1", "[wss://a, wss://b:1]");
        let config = check(&format!("{two}quic: quic://c:7\n")).expect("two hubs");
        let at = |hub| config.quic_of(hub).map(|at| at.to_string());
        assert_eq!([at(0), at(1), at(2)], [Some("c:7".into()), Some("b:10001".into()), None]);
        assert_eq!(check(&format!("{LEAST}quic: off\n")).expect("off").quic_of(0), None);
        for beat in ["4", "301", "-1", "25s", "1.5"] {
            let error = check(&format!("{LEAST}beat: {beat}\n")).expect_err(beat);
            assert!(error.contains("beat is not a number of seconds, 5 to 300"), "{error}");
        }
        let error = check(&LEAST.replace("wss://", "quic://")).expect_err("Google's QUIC");
        assert!(error.contains("does not check who the node is"), "{error}");
    }

    #[test]
    fn all_mistakes_are_told_together() {
        let error = check("nodeName: Edge_1\nhub: http://x\nport: 5\nlabels: [a]\nnodeIP: here\n")
            .expect_err("bad");
        for part in [
            "7 mistake(s)",
            "nodeName `Edge_1` is not a lower-case DNS name",
            "hub: `http://x` is not an address like `wss://host:10000`",
            "enrol is missing",
            "dir is missing",
            "labels is not a map of texts",
            "nodeIP: `here` is not an IP address",
            "key `port` is not known",
        ] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }

    #[test]
    fn file_of_kubeedge_that_cannot_be_used_is_refused_with_the_reasons() {
        let error = check("apiVersion: edgecore.config.kubeedge.io/v1alpha2\nkind: EdgeCore\n")
            .expect_err("has no hub");
        assert!(error.contains("modules.edgeHub.websocket.server is missing"), "{error}");
    }

    #[test]
    fn every_known_key_is_taken() {
        let mut text = LEAST.to_owned();
        text += "quic: quic://hub.example\nbeat: 60\ntunnel: wss://[::1]:10004\ntokenFile: /t\npodDir: /p\npodLogDir: /l\nruntimeSocket: unix:///r.sock\n\
            nodeIP: 10.0.0.2\nlabels: {site: lisbon}\nclusterDNS: [10.0.0.53]\nclusterDomain: x\ncgroupRoot: \"\"\nresolvConf: /r\nmetaServer: 127.0.0.1:10550\nproxy: http://proxy.example\n\
            mqtt: {server: \"mqtt://h\", username: u, password: p, cleanSession: true}\ndmiSocket: /d.sock\nreportInterval: 5\n\
            history: {all: true, megabytes: 20, days: 7, interval: 0.5, deadband: 0.1}\n";
        let config = check(&text).expect("all known");
        let quic = Endpoint { host: "hub.example".into(), port: 10001, via: None };
        assert_eq!((config.quic_of(0), config.beat), (Some(quic), Duration::from_secs(60)));
        assert_eq!(config.tunnel.map(|tunnel| tunnel.to_string()), Some("[::1]:10004".into()));
        assert_eq!(config.runtime_socket, Path::new("/r.sock"));
        assert_eq!(config.token, Some(TokenSource::File("/t".into())));
        let bus = config.bus.expect("given");
        assert_eq!(
            (bus.host.as_str(), bus.port, bus.subscriber.as_str()),
            ("h", 1883, "hub-client-sub-edge1")
        );
        assert_eq!((bus.login, bus.clean_session), (Some(("u".into(), "p".into())), true));
        assert_eq!((bus.version, bus.tls), (Version::V3, None));
        let lines =
            "mqtt: {server: \"mqtts://h\", version: 5, caFile: /ca, certFile: /c, keyFile: /k}\n";
        let bus = check(&format!("{LEAST}{lines}")).expect("known").bus.expect("given");
        let identity = Some(("/c".into(), "/k".into()));
        let tls = bus.tls.expect("with TLS");
        assert_eq!((bus.port, bus.version, tls.identity), (8883, Version::V5, identity));
        for (keys, part) in [
            ("server: \"tls://h\"", "caFile is missing"),
            (
                "server: \"tls://h\", caFile: /ca, certFile: /c",
                "certFile and keyFile need each other",
            ),
            ("server: \"tcp://h\", caFile: /ca", "are for `server: tls://…`"),
            ("version: 4", "version is neither 3.1.1 nor 5"),
        ] {
            let error = check(&format!("{LEAST}mqtt: {{{keys}}}\n")).expect_err(keys);
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(config.report_interval, Duration::from_secs(5));
        let history = config.history.expect("given");
        assert_eq!((history.all, history.limit), (true, 20_000_000));
        let keeping = Keeping { interval_ms: 500, deadband: 0.1, keep_ms: 7 * 86_400_000 };
        assert_eq!(history.keeping, keeping);
        assert_eq!(check(&format!("{LEAST}history: off\n")).expect("off").history, None);
        let error = check(&format!("{LEAST}history: {{days: 0, megabytes: many, x: 1}}\n"));
        let error = error.expect_err("three mistakes");
        assert!(
            error.contains("3 mistake(s): history: megabytes is not a number, 1 to"),
            "{error}"
        );
        let error = check(&format!(
            "{LEAST}mqtt: {{server: \"http://h\", x: 1}}\ndmiSocket: d\nreportInterval: 0\n"
        ));
        let error = error.expect_err("four mistakes");
        assert!(
            error.contains("4 mistake(s)") && error.contains("mqtt: server: `http://h`"),
            "{error}"
        );
        for (key, _) in KEYS.iter().filter(|(key, _)| *key != "token") {
            assert!(text.contains(&format!("{key}:")), "{key} is not in this test");
        }
    }
}
