//! `site.toml`: what an appliance has to be told before it can be told the rest over the link.
//!
//! Types, the parser, the JSON Schema, and what follows from the file: the node's name and EdgeCore's own
//! configuration. PID 1 and the network service read the file with [`Site::parse`]; the builder of the image and
//! `skerry site new` check and write it with the same code, so that a file which was written is a file that boots.
//!
//! All mistakes are told together, each with its line, what is wrong and what to do ([`Mistake`]). Nothing here touches
//! a file, a clock or a network.
//!
//! Source: this format is ours; names follow RFC 1123 and Kubernetes' rules for labels.

use crate::verity::{hex, unhex};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Largest file that is read.
pub const BYTES_MAX: usize = 64 * 1024;
/// Longest node name; it is the value of a label and the host name too.
pub const NAME_MAX: usize = 63;
/// Most entries of any list or table in the file.
pub const ENTRIES_MAX: usize = 64;
/// The JSON Schema of the file.
pub const SCHEMA: &str = include_str!("site.schema.json");
/// Update channel when the file names none.
pub const CHANNEL: &str = "stable";

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// A file with a higher revision replaces the copy on the node.
    pub revision: u64,
    /// Who the node is.
    pub node: Node,
    /// Where it belongs.
    pub hub: Hub,
    /// How it reaches the hub.
    pub network: Network,
    /// Names or addresses of time servers; those of DHCP or the hub's clock when empty.
    pub ntp: Vec<String>,
    /// Whether the console shows what happens.
    pub console: bool,
    /// Channel of updates.
    pub channel: String,
}

/// Who the node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name, or how to find one.
    pub name: NameRule,
    /// Labels of the Node.
    pub labels: BTreeMap<String, String>,
}

/// The name, or a rule for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NameRule {
    /// This one.
    Fixed(String),
    /// `prefix` and something of the machine's.
    From {
        /// Which thing.
        source: NameSource,
        /// What comes before; may be empty.
        prefix: String,
    },
}

/// What a name is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameSource {
    /// The serial number that the firmware tells (SMBIOS).
    Serial,
    /// Hardware address of the first wired interface.
    Mac,
    /// The machine id, made at the first boot.
    MachineId,
}

/// What a machine knows of itself, for [`NameRule::resolve`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// SMBIOS serial number.
    pub serial: Option<String>,
    /// `52:54:00:12:34:56`.
    pub mac: Option<String>,
    /// 32 hexadecimal digits.
    pub machine_id: Option<String>,
}

/// Why a rule gives no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// The machine has no such thing.
    #[error("the machine has no {0} to be named after")]
    Absent(&'static str),
    /// The maker left the serial number as it came from the tool.
    #[error("the machine's serial number is `{0}`, which is no serial number")]
    Meaningless(String),
    /// It is not a name.
    #[error(
        "the rule gives the name `{0}`, which is not a lower-case DNS name of at most {NAME_MAX} characters"
    )]
    NotAName(String),
}

impl NameError {
    /// What a person can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Absent(_) | Self::Meaningless(_) => {
                "use `name-from = \"mac\"` or `\"machine-id\"`, or give the node its `name`"
            }
            Self::NotAName(_) => "choose a shorter or simpler `prefix`",
        }
    }
}

/// Where the node belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hub {
    /// `wss://host:port`, tried in turn; at least one.
    pub addresses: Vec<String>,
    /// `https://host:port`.
    pub enrol: String,
    /// Where QUIC is tried.
    pub quic: Quic,
    /// `wss://host:port`, for logs.
    pub tunnel: Option<String>,
    /// SHA-256 of the hub's CA.
    pub ca_hash: Option<[u8; 32]>,
    /// `<ca hash>.<jwt>`; none after it was used.
    pub token: Option<Token>,
}

/// Where QUIC is tried.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Quic {
    /// At the host of each address.
    #[default]
    Default,
    /// Nowhere.
    Off,
    /// There.
    At(String),
}

/// A join token; its debug form does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The secret itself, `<ca hash>.<jwt>`.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// How the node reaches the hub.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Network {
    /// `http://host:port` for programs that know what a proxy is.
    pub proxy: Option<String>,
    /// Rules, first hit wins; an interface that none matches gets an address by DHCP if it is wired.
    pub interfaces: Vec<Interface>,
}

/// A rule for interfaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Which ones.
    pub matches: Match,
    /// IPv4, and IPv6 where it is static.
    pub method: Method,
    /// Name servers; those of DHCP when empty.
    pub dns: Vec<IpAddr>,
    /// VLAN id, 1 to 4094: addresses go to the VLAN, not to the interface.
    pub vlan: Option<u16>,
    /// IPv6.
    pub ipv6: Ipv6,
    /// Size of packets, if not the interface's own.
    pub mtu: Option<u32>,
}

/// Which interfaces a rule is for: those that match everything that is given. `*` and `?` stand for other characters.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    /// Kernel's name.
    pub name: Option<String>,
    /// Hardware address, lower case.
    pub mac: Option<String>,
    /// Driver's name.
    pub driver: Option<String>,
}

impl Match {
    /// Whether an interface is meant.
    pub fn matches(&self, name: &str, mac: &str, driver: &str) -> bool {
        let fits = |pattern: &Option<String>, text: &str| {
            pattern.as_ref().is_none_or(|pattern| glob(pattern.as_bytes(), text.as_bytes()))
        };
        fits(&self.name, name)
            && fits(&self.mac, &mac.to_ascii_lowercase())
            && fits(&self.driver, driver)
    }
}

/// How an interface gets its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Method {
    /// By DHCP.
    Dhcp,
    /// From the file.
    Static {
        /// At least one.
        addresses: Vec<Cidr>,
        /// At most one of a family.
        gateways: Vec<IpAddr>,
    },
    /// Not at all; the interface stays down.
    Off,
}

/// IPv6 on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ipv6 {
    /// By router advertisements.
    #[default]
    Auto,
    /// None.
    Off,
    /// From the static addresses.
    Static,
}

/// An address and the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    /// The address.
    pub address: IpAddr,
    /// Bits of the network.
    pub prefix: u8,
}

impl Cidr {
    /// Reads `10.0.2.15/24` or `2001:db8::5/64`.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let prefix = prefix.parse().ok().filter(|prefix| digits && *prefix <= most)?;
        Some(Self { address, prefix })
    }

    /// Whether `other` is in the same network.
    pub fn contains(&self, other: IpAddr) -> bool {
        let bits = |address: IpAddr| match address {
            IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
            IpAddr::V6(address) => address.to_bits(),
        };
        let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
        self.address.is_ipv4() == other.is_ipv4() && (bits(self.address) ^ bits(other)) & mask == 0
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// One thing that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub hint: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

/// Why a file cannot be used: everything that is wrong with it, by line; at least one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteError {
    /// What is wrong.
    pub mistakes: Vec<Mistake>,
}

impl fmt::Display for SiteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told: Vec<_> = self.mistakes.iter().map(Mistake::to_string).collect();
        write!(f, "site.toml has {} mistake(s): {}", told.len(), told.join("; "))
    }
}

impl std::error::Error for SiteError {}

/// Places on the appliance that EdgeCore's configuration names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places<'a> {
    /// File with the join token.
    pub token_file: &'a str,
    /// Database and certificates.
    pub dir: &'a str,
    /// Pod data.
    pub pod_dir: &'a str,
    /// Container logs.
    pub pod_log_dir: &'a str,
    /// containerd's socket.
    pub runtime_socket: &'a str,
    /// Resolver file for pods.
    pub resolv_conf: &'a str,
}

impl Places<'static> {
    /// Where they are on the appliance.
    pub const APPLIANCE: Self = Self {
        token_file: "/run/skerry/token",
        dir: "/state/edge",
        pod_dir: "/var/lib/kubelet",
        pod_log_dir: "/var/log/pods",
        runtime_socket: "/run/containerd/containerd.sock",
        resolv_conf: "/run/resolv.conf",
    };
}

impl Site {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`SiteError`] with every mistake.
    pub fn parse(text: &str) -> Result<Self, SiteError> {
        if text.len() > BYTES_MAX {
            let what = format!("the file has {} bytes", text.len());
            let hint = format!("a site.toml has at most {BYTES_MAX} bytes");
            return Err(SiteError { mistakes: vec![Mistake { line: 1, what, hint }] });
        }
        let (table, errors) = DeTable::parse_recoverable(text);
        let mut reader = Reader { text, mistakes: Vec::new() };
        for error in errors.into_iter().take(ENTRIES_MAX) {
            let at = error.span().unwrap_or(0..0);
            let hint = "the file is TOML: texts stand in quotes, tables in square brackets";
            reader.tell(&at, format!("not TOML: {}", error.message().trim()), hint);
        }
        // After a broken line the rest would be told to be missing.
        let broken = !reader.mistakes.is_empty();
        let mut top = reader.fields("the file", table.span(), table.as_ref());
        let site = reader.site(&mut top);
        reader.end(top);
        let mut mistakes = reader.mistakes;
        if broken {
            mistakes.retain(|mistake| !mistake.what.ends_with("is missing"));
        }
        mistakes.sort_by_key(|mistake| mistake.line);
        mistakes.dedup();
        if mistakes.is_empty() { Ok(site) } else { Err(SiteError { mistakes }) }
    }

    /// The file without its token, with the same number of bytes, so that it can be written over the old one in place.
    /// `None` when there is no token in it, or when it is no site file.
    pub fn without_token(text: &str) -> Option<String> {
        let (table, errors) = DeTable::parse_recoverable(text);
        let hub = table.as_ref().get("hub").filter(|_| errors.is_empty())?;
        let token = hub.as_ref().as_table()?.get("token")?;
        let span = token.span();
        let blank = token.as_ref().as_str()?.trim().is_empty();
        if blank || span.len() < 2 {
            return None;
        }
        let spaces = " ".repeat(span.len() - 2);
        Some(format!("{}\"{spaces}\"{}", text.get(..span.start)?, text.get(span.end..)?))
    }

    /// The file that gives this site, with a comment on each part.
    pub fn to_toml(&self) -> String {
        let mut out = Text(String::new());
        out.line("# What this appliance has to know before it can ask its hub for the rest.");
        out.line("# A file with a higher revision replaces the one that the appliance has.");
        out.line(format_args!("revision = {}", self.revision));
        out.line("\n[node]");
        match &self.node.name {
            NameRule::Fixed(name) => out.text("name", name),
            NameRule::From { source, prefix } => {
                out.text("name-from", source.word());
                out.text("prefix", prefix);
            }
        }
        if !self.node.labels.is_empty() {
            let pairs = self.node.labels.iter();
            let pairs: Vec<_> =
                pairs.map(|(key, value)| format!("{} = {}", quote(key), quote(value))).collect();
            out.line(format_args!("labels = {{ {} }}", pairs.join(", ")));
        }
        out.line("\n[hub]");
        out.list("address", &self.hub.addresses);
        out.text("enrol", &self.hub.enrol);
        match &self.hub.quic {
            Quic::Default => {}
            Quic::Off => out.text("quic", "off"),
            Quic::At(address) => out.text("quic", address),
        }
        if let Some(tunnel) = &self.hub.tunnel {
            out.text("tunnel", tunnel);
        }
        if let Some(hash) = &self.hub.ca_hash {
            out.text("ca-hash", &format!("sha256:{}", hex(hash)));
        }
        if let Some(token) = &self.hub.token {
            out.line("# A secret; the appliance overwrites it once it has joined.");
            out.text("token", token.reveal());
        }
        if self.network != Network::default() {
            out.line("\n[network]");
            if let Some(proxy) = &self.network.proxy {
                out.text("proxy", proxy);
            }
        }
        for one in &self.network.interfaces {
            out.interface(one);
        }
        if !self.ntp.is_empty() {
            out.line("\n[clock]");
            out.list("ntp", &self.ntp);
        }
        if !self.console {
            out.line("\n[console]\nenabled = false");
        }
        if self.channel != CHANNEL {
            out.line("\n[update]");
            out.text("channel", &self.channel);
        }
        out.0
    }

    /// EdgeCore's configuration for the node called `name`.
    pub fn edgecore_yaml(&self, name: &str, places: &Places<'_>) -> String {
        let mut out = String::from("# Written by PID 1 from site.toml at every start.\n");
        let mut key = |key: &str, value: String| {
            out += key;
            out += ": ";
            out += &value;
            out.push('\n');
        };
        let list = |texts: &[String]| {
            let texts: Vec<_> = texts.iter().map(|text| quote(text)).collect();
            format!("[{}]", texts.join(", "))
        };
        key("nodeName", quote(name));
        key("hub", list(&self.hub.addresses));
        key("enrol", quote(&self.hub.enrol));
        match &self.hub.quic {
            Quic::Default => {}
            Quic::Off => key("quic", quote("off")),
            Quic::At(address) => key("quic", quote(address)),
        }
        if let Some(tunnel) = &self.hub.tunnel {
            key("tunnel", quote(tunnel));
        }
        if let Some(proxy) = &self.network.proxy {
            key("proxy", quote(proxy));
        }
        key("tokenFile", quote(places.token_file));
        key("dir", quote(places.dir));
        key("podDir", quote(places.pod_dir));
        key("podLogDir", quote(places.pod_log_dir));
        key("runtimeSocket", quote(places.runtime_socket));
        key("resolvConf", quote(places.resolv_conf));
        if !self.node.labels.is_empty() {
            let pairs = self.node.labels.iter();
            let pairs: Vec<_> =
                pairs.map(|(key, value)| format!("{}: {}", quote(key), quote(value))).collect();
            key("labels", format!("{{{}}}", pairs.join(", ")));
        }
        out
    }

    /// The join token for EdgeCore; none when it was used.
    pub fn token(&self) -> Option<&str> {
        self.hub.token.as_ref().map(Token::reveal)
    }
}

impl NameRule {
    /// The node's name on this machine.
    ///
    /// # Errors
    ///
    /// [`NameError`] when the machine lacks what the rule asks for.
    pub fn resolve(&self, machine: &Machine) -> Result<String, NameError> {
        let (source, prefix) = match self {
            Self::Fixed(name) => return Ok(name.clone()),
            Self::From { source, prefix } => (*source, prefix),
        };
        let part = match source {
            NameSource::Serial => {
                let serial = machine.serial.as_deref().unwrap_or("").trim();
                if serial.is_empty() {
                    return Err(NameError::Absent("serial number"));
                }
                let lower = serial.to_ascii_lowercase();
                let zeros = lower.bytes().all(|byte| b"0-. ".contains(&byte));
                if zeros || MEANINGLESS.iter().any(|text| lower.contains(text)) {
                    return Err(NameError::Meaningless(serial.chars().take(NAME_MAX).collect()));
                }
                dashed(&lower)
            }
            NameSource::Mac => {
                let mac = machine.mac.as_deref().unwrap_or("").to_ascii_lowercase();
                let digits: String = mac.chars().filter(char::is_ascii_hexdigit).collect();
                if digits.len() != 12 {
                    return Err(NameError::Absent("wired interface"));
                }
                digits
            }
            NameSource::MachineId => {
                let id = machine.machine_id.as_deref().unwrap_or("").to_ascii_lowercase();
                let usable = id.len() >= 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
                if !usable {
                    return Err(NameError::Absent("machine id"));
                }
                id[..12].to_owned()
            }
        };
        let name = format!("{prefix}{part}");
        if is_name(&name) { Ok(name) } else { Err(NameError::NotAName(name)) }
    }
}

impl NameSource {
    fn word(self) -> &'static str {
        match self {
            Self::Serial => "serial",
            Self::Mac => "mac",
            Self::MachineId => "machine-id",
        }
    }
}

/// Parts of serial numbers that are none.
const MEANINGLESS: [&str; 8] = [
    "to be filled",
    "default string",
    "not specified",
    "not available",
    "system serial number",
    "o.e.m.",
    "none",
    "0123456789",
];

/// Lower-case letters and digits as they are, one dash for everything between them.
fn dashed(text: &str) -> String {
    let words = text.split(|letter: char| !letter.is_ascii_lowercase() && !letter.is_ascii_digit());
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-")
}

/// Whether a text is a lower-case DNS name: labels of letters, digits and dashes, joined by dots.
pub fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !label.is_empty()
            && label.bytes().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= NAME_MAX && text.split('.').all(label)
}

/// Whether a text can be the key of a label.
fn is_label_key(key: &str) -> bool {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let lower = |prefix: &str| {
        prefix.len() <= 253 && prefix.split('.').all(|part| part.len() <= 63 && is_name(part))
    };
    prefix.is_none_or(lower) && !name.is_empty() && is_label_value(name)
}

/// Whether a text can be the value of a label.
fn is_label_value(value: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let outer = |byte: Option<&u8>| byte.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = value.as_bytes();
    bytes.len() <= 63
        && bytes.iter().all(|byte| inner(*byte))
        && outer(bytes.first())
        && outer(bytes.last())
}

/// Checks `<scheme>://<host>[:<port>]`, as EdgeCore will.
fn is_address(text: &str, scheme: &str) -> bool {
    let rest = text.strip_prefix(scheme).and_then(|rest| rest.strip_prefix("://"));
    let Some(rest) = rest.map(|rest| rest.trim_end_matches('/')) else { return false };
    let (host, port) = match rest.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((host, port))) => {
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            ("v6", if port.is_empty() { None } else { Some(port.strip_prefix(':').unwrap_or("x")) })
        }
        Some(None) => return false,
        None => match rest.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (rest, None),
        },
    };
    let port_ok = port.is_none_or(|port| {
        port.bytes().all(|byte| byte.is_ascii_digit())
            && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    is_host(host) && port_ok
}

/// Whether a text is the name or the address of a machine.
fn is_host(text: &str) -> bool {
    let label = |label: &str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        !label.is_empty() && label.len() <= 63 && label.bytes().all(allowed)
    };
    text.len() <= 253 && text.trim_end_matches('.').split('.').all(label)
}

/// `*` is any number of characters, `?` one.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    // The usual walk with one step back: linear but for the stars.
    let (mut p, mut t, mut back) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                back = Some((p, t));
                p += 1;
            }
            Some(letter) if *letter == b'?' || *letter == text[t] => (p, t) = (p + 1, t + 1),
            _ => match back {
                Some((star, at)) => {
                    (p, t) = (star + 1, at + 1);
                    back = Some((star, at + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|letter| *letter == b'*')
}

/// A text in double quotes that TOML, YAML and JSON read alike.
fn quote(text: &str) -> String {
    let mut out = String::from('"');
    for letter in text.chars() {
        match letter {
            '"' => out += "\\\"",
            '\\' => out += "\\\\",
            letter if letter.is_control() => out += &format!("\\u{:04x}", u32::from(letter)),
            letter => out.push(letter),
        }
    }
    out.push('"');
    out
}

struct Text(String);

impl Text {
    fn line(&mut self, line: impl fmt::Display) {
        self.0 += &line.to_string();
        self.0.push('\n');
    }

    fn text(&mut self, key: &str, value: &str) {
        self.line(format_args!("{key} = {}", quote(value)));
    }

    fn list<T: fmt::Display>(&mut self, key: &str, values: &[T]) {
        let values: Vec<_> = values.iter().map(|value| quote(&value.to_string())).collect();
        self.line(format_args!("{key} = [{}]", values.join(", ")));
    }

    fn interface(&mut self, one: &Interface) {
        self.line("\n[[network.interface]]");
        let matches = [
            ("name", &one.matches.name),
            ("mac", &one.matches.mac),
            ("driver", &one.matches.driver),
        ];
        let pairs = matches.iter().filter_map(|(key, value)| {
            value.as_ref().map(|value| format!("{key} = {}", quote(value)))
        });
        self.line(format_args!("match = {{ {} }}", pairs.collect::<Vec<_>>().join(", ")));
        match &one.method {
            Method::Dhcp => self.text("method", "dhcp"),
            Method::Off => self.text("method", "off"),
            Method::Static { addresses, gateways } => {
                self.text("method", "static");
                self.list("address", addresses);
                if !gateways.is_empty() {
                    self.list("gateway", gateways);
                }
            }
        }
        if !one.dns.is_empty() {
            self.list("dns", &one.dns);
        }
        if let Some(vlan) = one.vlan {
            self.line(format_args!("vlan = {vlan}"));
        }
        match one.ipv6 {
            Ipv6::Auto => {}
            Ipv6::Off => self.text("ipv6", "off"),
            Ipv6::Static => self.text("ipv6", "static"),
        }
        if let Some(mtu) = one.mtu {
            self.line(format_args!("mtu = {mtu}"));
        }
    }
}

/// Keys of a table that nobody has asked for yet.
struct Fields<'t, 'i> {
    place: &'static str,
    span: Range<usize>,
    left: Vec<(&'t str, Range<usize>, &'t Spanned<DeValue<'i>>)>,
    known: Vec<&'static str>,
}

impl<'t, 'i> Fields<'t, 'i> {
    fn take(&mut self, key: &'static str) -> Option<&'t Spanned<DeValue<'i>>> {
        self.known.push(key);
        let at = self.left.iter().position(|(name, ..)| *name == key)?;
        Some(self.left.remove(at).2)
    }

    fn empty(place: &'static str, span: Range<usize>) -> Self {
        Self { place, span, left: Vec::new(), known: Vec::new() }
    }
}

struct Reader<'i> {
    text: &'i str,
    mistakes: Vec<Mistake>,
}

impl<'i> Reader<'i> {
    fn tell(&mut self, at: &Range<usize>, what: impl Into<String>, hint: impl Into<String>) {
        let before = self.text.as_bytes().get(..at.start).unwrap_or_default();
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        // Bounded, because the console shows all of them.
        if self.mistakes.len() < 2 * ENTRIES_MAX {
            self.mistakes.push(Mistake { line, what: what.into(), hint: hint.into() });
        }
    }

    fn fields<'t>(
        &mut self,
        place: &'static str,
        span: Range<usize>,
        table: &'t DeTable<'i>,
    ) -> Fields<'t, 'i> {
        let left = table.iter().map(|(key, value)| (key.as_ref().as_ref(), key.span(), value));
        Fields { place, span, left: left.collect(), known: Vec::new() }
    }

    /// Tells the keys that nobody asked for.
    fn end(&mut self, fields: Fields<'_, 'i>) {
        for (key, at, _) in &fields.left {
            let near = fields.known.iter().find(|known| near(known, key));
            let hint = match near {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("{} may have: {}", fields.place, fields.known.join(", ")),
            };
            let key: String = key.chars().take(NAME_MAX).collect();
            self.tell(at, format!("key `{key}` is not known in {}", fields.place), hint);
        }
    }

    fn table<'t>(
        &mut self,
        fields: &mut Fields<'t, 'i>,
        key: &'static str,
        place: &'static str,
    ) -> Option<Fields<'t, 'i>> {
        let value = fields.take(key)?;
        match value.as_ref().as_table() {
            Some(table) => Some(self.fields(place, value.span(), table)),
            None => {
                self.tell(
                    &value.span(),
                    format!("`{key}` is not a table"),
                    format!("write {place} above its keys"),
                );
                None
            }
        }
    }

    fn missing(&mut self, fields: &Fields<'_, 'i>, key: &str, hint: &str) {
        self.tell(&fields.span.clone(), format!("`{key}` of {} is missing", fields.place), hint);
    }

    /// A text and where it is.
    fn text<'t>(
        &mut self,
        fields: &mut Fields<'t, 'i>,
        key: &'static str,
    ) -> Option<(&'t str, Range<usize>)> {
        let value = fields.take(key)?;
        let text = value.as_ref().as_str();
        if text.is_none() {
            self.tell(
                &value.span(),
                format!("`{key}` is not a text"),
                format!("write {key} = \"…\""),
            );
        }
        Some((text?, value.span()))
    }

    fn number(
        &mut self,
        fields: &mut Fields<'_, 'i>,
        key: &'static str,
        range: Range<u64>,
    ) -> Option<u64> {
        let value = fields.take(key)?;
        let number = value.as_ref().as_integer().and_then(|number| {
            u64::from_str_radix(&number.as_str().replace('_', ""), number.radix()).ok()
        });
        let number = number.filter(|number| range.contains(number));
        if number.is_none() {
            let what = format!("`{key}` is not a number from {} to {}", range.start, range.end - 1);
            self.tell(&value.span(), what, format!("write {key} = {}", range.start));
        }
        number
    }

    /// A text, or a list of texts.
    fn texts<'t>(
        &mut self,
        fields: &mut Fields<'t, 'i>,
        key: &'static str,
    ) -> Vec<(&'t str, Range<usize>)> {
        let Some(value) = fields.take(key) else { return Vec::new() };
        if let Some(text) = value.as_ref().as_str() {
            return vec![(text, value.span())];
        }
        let hint = format!("write {key} = [\"…\", \"…\"]");
        let Some(list) = value.as_ref().as_array() else {
            self.tell(&value.span(), format!("`{key}` is not a list of texts"), hint);
            return Vec::new();
        };
        if list.len() > ENTRIES_MAX {
            self.tell(
                &value.span(),
                format!("`{key}` has {} entries", list.len()),
                format!("at most {ENTRIES_MAX} are read"),
            );
        }
        let mut texts = Vec::new();
        for one in list.iter().take(ENTRIES_MAX) {
            match one.as_ref().as_str() {
                Some(text) => texts.push((text, one.span())),
                None => self.tell(
                    &one.span(),
                    format!("an entry of `{key}` is not a text"),
                    hint.clone(),
                ),
            }
        }
        texts
    }

    fn addresses(&mut self, fields: &mut Fields<'_, 'i>, key: &'static str) -> Vec<IpAddr> {
        let mut addresses = Vec::new();
        for (text, at) in self.texts(fields, key) {
            match text.parse() {
                Ok(address) => addresses.push(address),
                Err(_) => {
                    let hint = "write an address such as 10.0.2.3 or 2001:db8::3, without a port or a prefix";
                    self.tell(&at, format!("{key}: `{text}` is not an IP address"), hint);
                }
            }
        }
        addresses
    }

    fn url(
        &mut self,
        key: &str,
        text: &str,
        at: &Range<usize>,
        scheme: &str,
        port: u16,
    ) -> Option<String> {
        let good = is_address(text, scheme);
        if !good {
            let hint = format!("write {scheme}://host:{port}");
            self.tell(at, format!("{key}: `{text}` is not such an address"), hint);
        }
        good.then(|| text.to_owned())
    }

    fn site(&mut self, top: &mut Fields<'_, 'i>) -> Site {
        let revision = self.number(top, "revision", 1..u64::from(u32::MAX)).unwrap_or_else(|| {
            if !self.mistakes.iter().any(|mistake| mistake.what.contains("`revision`")) {
                self.missing(
                    top,
                    "revision",
                    "write revision = 1 at the top, and raise it with each change",
                );
            }
            0
        });
        let mut node = self.table(top, "node", "[node]").unwrap_or_else(|| {
            self.missing(top, "node", "add [node] with a name");
            Fields::empty("", 0..0)
        });
        let mut hub = self.table(top, "hub", "[hub]").unwrap_or_else(|| {
            self.missing(top, "hub", "add [hub] with address, enrol and token");
            Fields::empty("", 0..0)
        });
        let node = self.node(&mut node).tap(|_| self.end(node));
        let hub = self.hub(&mut hub).tap(|_| self.end(hub));
        let network = match self.table(top, "network", "[network]") {
            Some(mut fields) => self.network(&mut fields).tap(|_| self.end(fields)),
            None => Network::default(),
        };
        let mut ntp = Vec::new();
        if let Some(mut clock) = self.table(top, "clock", "[clock]") {
            for (text, at) in self.texts(&mut clock, "ntp") {
                if text.parse::<IpAddr>().is_ok() || is_host(text) {
                    ntp.push(text.to_owned());
                } else {
                    let hint = "write names or addresses, without a port";
                    self.tell(&at, format!("ntp: `{text}` is not the name of a server"), hint);
                }
            }
            self.end(clock);
        }
        let mut console = true;
        if let Some(mut fields) = self.table(top, "console", "[console]") {
            console = self.bool(&mut fields, "enabled").unwrap_or(true);
            self.end(fields);
        }
        let mut channel = CHANNEL.to_owned();
        if let Some(mut fields) = self.table(top, "update", "[update]") {
            if let Some((text, at)) = self.text(&mut fields, "channel") {
                if !is_name(text) {
                    let hint = "a channel is a lower-case name, such as \"stable\"";
                    self.tell(&at, format!("channel: `{text}` is not a name"), hint);
                }
                channel = text.to_owned();
            }
            self.end(fields);
        }
        Site { revision, node, hub, network, ntp, console, channel }
    }

    fn bool(&mut self, fields: &mut Fields<'_, 'i>, key: &'static str) -> Option<bool> {
        let value = fields.take(key)?;
        let bool = value.as_ref().as_bool();
        if bool.is_none() {
            self.tell(
                &value.span(),
                format!("`{key}` is neither true nor false"),
                format!("write {key} = true"),
            );
        }
        bool
    }

    fn node(&mut self, fields: &mut Fields<'_, 'i>) -> Node {
        let name = self.text(fields, "name");
        let source = self.text(fields, "name-from");
        let prefix = self.text(fields, "prefix");
        let name_hint = "a name has at most 63 of a-z, 0-9, - and ., and begins and ends with a letter or digit";
        let name = match (name, source) {
            (Some((name, at)), None) => {
                if !is_name(name) {
                    self.tell(&at, format!("name: `{name}` is not a node name"), name_hint);
                }
                if let Some((_, at)) = prefix {
                    self.tell(
                        &at,
                        "`prefix` without `name-from`",
                        "write the whole name into `name`",
                    );
                }
                NameRule::Fixed(name.to_owned())
            }
            (Some(_), Some((_, at))) => {
                self.tell(&at, "both `name` and `name-from` are given", "leave one of them out");
                NameRule::Fixed(String::new())
            }
            (None, Some((word, at))) => {
                let source = match word {
                    "serial" => NameSource::Serial,
                    "mac" => NameSource::Mac,
                    "machine-id" => NameSource::MachineId,
                    _ => {
                        let hint = "name-from is \"serial\", \"mac\" or \"machine-id\"";
                        self.tell(&at, format!("name-from: `{word}` is not known"), hint);
                        NameSource::MachineId
                    }
                };
                let prefix = match prefix {
                    // With a digit behind it, it has to be a name.
                    Some((prefix, at)) if !is_name(&format!("{prefix}0")) => {
                        self.tell(
                            &at,
                            format!("prefix: `{prefix}` cannot begin a node name"),
                            name_hint,
                        );
                        String::new()
                    }
                    Some((prefix, _)) => prefix.to_owned(),
                    None => String::new(),
                };
                NameRule::From { source, prefix }
            }
            (None, None) => {
                if !self.mistakes.iter().any(|mistake| mistake.what.contains("`name"))
                    && !fields.place.is_empty()
                {
                    self.missing(
                        fields,
                        "name",
                        "write name = \"…\", or name-from = \"serial\", \"mac\" or \"machine-id\"",
                    );
                }
                NameRule::Fixed(String::new())
            }
        };
        let mut labels = BTreeMap::new();
        if let Some(table) = self.table(fields, "labels", "[node.labels]") {
            if table.left.len() > ENTRIES_MAX {
                self.tell(
                    &table.span,
                    format!("`labels` has {} entries", table.left.len()),
                    format!("at most {ENTRIES_MAX} are read"),
                );
            }
            for (key, at, value) in table.left.iter().take(ENTRIES_MAX) {
                let text = value.as_ref().as_str().filter(|text| is_label_value(text));
                let Some(text) = text.filter(|_| is_label_key(key)) else {
                    let hint = "labels are pairs such as \"example.com/kind\" = \"shop\": letters, digits, - _ . and one /";
                    self.tell(at, format!("label `{key}` is not one that Kubernetes takes"), hint);
                    continue;
                };
                labels.insert((*key).to_owned(), text.to_owned());
            }
        }
        Node { name, labels }
    }

    fn hub(&mut self, fields: &mut Fields<'_, 'i>) -> Hub {
        let there = !fields.place.is_empty();
        let listed = fields.left.iter().any(|(key, ..)| *key == "address");
        let mut addresses = Vec::new();
        for (text, at) in self.texts(fields, "address") {
            addresses.extend(self.url("address", text, &at, "wss", 10000));
        }
        if there && !listed {
            self.missing(fields, "address", "write address = [\"wss://host:10000\"]");
        } else if there && addresses.is_empty() && self.mistakes.is_empty() {
            self.tell(
                &fields.span.clone(),
                "`address` of [hub] is empty",
                "write address = [\"wss://host:10000\"]",
            );
        }
        let enrol = self
            .text(fields, "enrol")
            .and_then(|(text, at)| self.url("enrol", text, &at, "https", 10002));
        if there
            && enrol.is_none()
            && !self.mistakes.iter().any(|mistake| mistake.what.contains("enrol"))
        {
            self.missing(fields, "enrol", "write enrol = \"https://host:10002\"");
        }
        let quic = match self.text(fields, "quic") {
            None => Quic::Default,
            Some(("off", _)) => Quic::Off,
            Some((text, at)) => {
                self.url("quic", text, &at, "quic", 10001).map_or(Quic::Off, Quic::At)
            }
        };
        let tunnel = self
            .text(fields, "tunnel")
            .and_then(|(text, at)| self.url("tunnel", text, &at, "wss", 10004));
        let ca_hash = self.text(fields, "ca-hash").and_then(|(text, at)| {
            let digits = text.strip_prefix("sha256:").unwrap_or(text);
            let hash = unhex(digits).and_then(|bytes| bytes.try_into().ok());
            if hash.is_none() {
                let hint = "write ca-hash = \"sha256:\" and 64 hexadecimal digits, the first part of a join token";
                self.tell(&at, format!("ca-hash: `{text}` is not a SHA-256"), hint);
            }
            hash
        });
        let token =
            self.text(fields, "token").and_then(|(text, at)| self.token(text.trim(), &at, ca_hash));
        Hub { addresses, enrol: enrol.unwrap_or_default(), quic, tunnel, ca_hash, token }
    }

    /// Never repeats the token: the console shows what is told here.
    fn token(&mut self, text: &str, at: &Range<usize>, ca_hash: Option<[u8; 32]>) -> Option<Token> {
        if text.is_empty() {
            return None;
        }
        let parts: Vec<&str> = text.split('.').collect();
        let base64 = |part: &&str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
            !part.is_empty() && part.bytes().all(allowed)
        };
        let hint =
            "copy the whole text that `skerry token create` printed: four parts joined by dots";
        if !parts.iter().all(base64) || !matches!(parts.len(), 3 | 4) {
            self.tell(at, "token: this is not a join token", hint);
            return None;
        }
        match (parts.len(), ca_hash) {
            (3, None) => {
                self.tell(at, "token: its first part, the hash of the CA, is not there", hint);
                None
            }
            (3, Some(hash)) => Some(Token(format!("{}.{text}", hex(&hash)))),
            (_, hash) => {
                let own = unhex(parts[0]).filter(|bytes| bytes.len() == 32);
                let Some(own) = own else {
                    self.tell(at, "token: its first part is not the hash of a CA", hint);
                    return None;
                };
                if hash.is_some_and(|hash| hash[..] != own[..]) {
                    let hint = "leave `ca-hash` out, or take a token of the right hub";
                    self.tell(at, "token: it is for another CA than `ca-hash`", hint);
                    return None;
                }
                Some(Token(text.to_owned()))
            }
        }
    }

    fn network(&mut self, fields: &mut Fields<'_, 'i>) -> Network {
        let proxy = self
            .text(fields, "proxy")
            .and_then(|(text, at)| self.url("proxy", text, &at, "http", 3128));
        let mut interfaces: Vec<Interface> = Vec::new();
        if let Some(value) = fields.take("interface") {
            let hint = "write [[network.interface]] above each rule";
            match value.as_ref().as_array() {
                None => self.tell(&value.span(), "`interface` is not a list of tables", hint),
                Some(list) => {
                    if list.len() > ENTRIES_MAX {
                        let what = format!("there are {} rules for interfaces", list.len());
                        self.tell(&value.span(), what, format!("at most {ENTRIES_MAX} are read"));
                    }
                    for one in list.iter().take(ENTRIES_MAX) {
                        let Some(table) = one.as_ref().as_table() else {
                            self.tell(&one.span(), "an entry of `interface` is not a table", hint);
                            continue;
                        };
                        let mut inner = self.fields("[[network.interface]]", one.span(), table);
                        let rule = self.interface(&mut inner);
                        if interfaces
                            .iter()
                            .any(|other| other.matches == rule.matches && other.vlan == rule.vlan)
                        {
                            let what = "two rules are for the same interfaces";
                            self.tell(
                                &one.span(),
                                what,
                                "the first one counts; remove one of them",
                            );
                        }
                        self.end(inner);
                        interfaces.push(rule);
                    }
                }
            }
        }
        Network { proxy, interfaces }
    }

    fn interface(&mut self, fields: &mut Fields<'_, 'i>) -> Interface {
        let before = self.mistakes.len();
        let mut matches = Match::default();
        match self.table(fields, "match", "match") {
            Some(mut inner) => {
                let pattern = |reader: &mut Self, inner: &mut Fields<'_, 'i>, key| {
                    let (text, at) = reader.text(inner, key)?;
                    if text.is_empty()
                        || text.len() > NAME_MAX
                        || text.chars().any(char::is_whitespace)
                    {
                        let hint = "write a name; * and ? stand for other characters";
                        reader.tell(&at, format!("{key}: `{text}` matches nothing"), hint);
                    }
                    Some(text.to_owned())
                };
                matches.name = pattern(self, &mut inner, "name");
                matches.mac = pattern(self, &mut inner, "mac")
                    .map(|mac| mac.to_ascii_lowercase().replace('-', ":"));
                matches.driver = pattern(self, &mut inner, "driver");
                if matches == Match::default() && self.mistakes.len() == before {
                    self.tell(
                        &inner.span.clone(),
                        "`match` is empty",
                        "write match = { name = \"eth0\" }",
                    );
                }
                self.end(inner);
            }
            None if self.mistakes.len() == before => {
                self.missing(
                    fields,
                    "match",
                    "write match = { name = \"eth0\" }, or mac, or driver",
                );
            }
            None => {}
        }
        let ipv6 = match self.text(fields, "ipv6") {
            None | Some(("auto", _)) => Ipv6::Auto,
            Some(("off", _)) => Ipv6::Off,
            Some(("static", _)) => Ipv6::Static,
            Some((word, at)) => {
                self.tell(
                    &at,
                    format!("ipv6: `{word}` is not known"),
                    "ipv6 is \"auto\", \"off\" or \"static\"",
                );
                Ipv6::Auto
            }
        };
        let word = self.text(fields, "method");
        let addresses = self.cidrs(fields);
        let gateway_at =
            fields.left.iter().find(|(key, ..)| *key == "gateway").map(|(_, at, _)| at.clone());
        let gateways = self.addresses(fields, "gateway");
        let span = fields.span.clone();
        let method = match word {
            Some(("static", at)) => {
                if addresses.is_empty() && self.mistakes.len() == before {
                    self.tell(
                        &at,
                        "method `static` without `address`",
                        "write address = [\"10.0.2.15/24\"]",
                    );
                }
                self.check_static(&addresses, &gateways, ipv6, &gateway_at.unwrap_or(at));
                Method::Static { addresses, gateways }
            }
            other => {
                if !addresses.is_empty() || !gateways.is_empty() {
                    let at = other.as_ref().map_or(span, |(_, at)| at.clone());
                    let what = "`address` and `gateway` are for method `static` only";
                    self.tell(&at, what, "write method = \"static\", or leave them out");
                }
                match other {
                    None | Some(("dhcp", _)) => Method::Dhcp,
                    Some(("off", _)) => Method::Off,
                    Some((word, at)) => {
                        let hint = "method is \"dhcp\", \"static\" or \"off\"";
                        self.tell(&at, format!("method: `{word}` is not known"), hint);
                        Method::Off
                    }
                }
            }
        };
        let dns = self.addresses(fields, "dns");
        let vlan = self.number(fields, "vlan", 1..4095).map(|vlan| vlan as u16);
        let mtu = self.number(fields, "mtu", 576..65536).map(|mtu| mtu as u32);
        Interface { matches, method, dns, vlan, ipv6, mtu }
    }

    fn cidrs(&mut self, fields: &mut Fields<'_, 'i>) -> Vec<Cidr> {
        let mut cidrs = Vec::new();
        for (text, at) in self.texts(fields, "address") {
            match Cidr::parse(text) {
                Some(cidr) if !cidr.address.is_unspecified() && !cidr.address.is_multicast() => {
                    cidrs.push(cidr)
                }
                _ => {
                    let hint = "write address and prefix, such as 10.0.2.15/24";
                    self.tell(
                        &at,
                        format!("address: `{text}` is not an address of an interface"),
                        hint,
                    );
                }
            }
        }
        cidrs
    }

    fn check_static(
        &mut self,
        addresses: &[Cidr],
        gateways: &[IpAddr],
        ipv6: Ipv6,
        at: &Range<usize>,
    ) {
        for (number, gateway) in gateways.iter().enumerate() {
            if gateways[..number].iter().any(|other| other.is_ipv4() == gateway.is_ipv4()) {
                self.tell(
                    at,
                    "two gateways of one family",
                    "write at most one IPv4 and one IPv6 gateway",
                );
            }
            let link_local = matches!(gateway, IpAddr::V6(v6) if v6.is_unicast_link_local());
            let mut family =
                addresses.iter().filter(|one| one.address.is_ipv4() == gateway.is_ipv4());
            // With a prefix of all bits the gateway is reached over the link, as some hosters want it.
            let reached = |one: &Cidr| {
                one.contains(*gateway) || one.prefix == 32 && gateway.is_ipv4() || one.prefix == 128
            };
            if !addresses.is_empty() && !link_local && !family.any(reached) {
                let what = format!("gateway: {gateway} is in none of the networks of `address`");
                self.tell(at, what, "is the prefix right?");
            }
            if addresses.iter().any(|one| one.address == *gateway) {
                self.tell(
                    at,
                    format!("gateway: {gateway} is the interface's own address"),
                    "write the router's address",
                );
            }
        }
        if ipv6 == Ipv6::Static
            && !addresses.is_empty()
            && !addresses.iter().any(|one| one.address.is_ipv6())
        {
            self.tell(
                at,
                "ipv6 is `static`, and `address` has no IPv6 address",
                "add one, or write ipv6 = \"auto\"",
            );
        }
    }
}

/// Whether `key` is `known` with one letter too many, too few, or another one.
fn near(known: &str, key: &str) -> bool {
    let (known, key) = (known.as_bytes(), key.as_bytes());
    let same = known.iter().zip(key).take_while(|(a, b)| a == b).count();
    let (a, b) = (&known[same..], &key[same..]);
    let skip = |text: &[u8]| text.get(1..).map(<[u8]>::to_vec).unwrap_or_default();
    known.len() > 2 && (skip(a) == b || a == skip(b) || skip(a) == skip(b))
        || known.iter().map(|byte| if *byte == b'-' { b'_' } else { *byte }).eq(key.iter().copied())
}

/// A value on its way through a statement.
trait Tap: Sized {
    fn tap(self, then: impl FnOnce(&Self)) -> Self {
        then(&self);
        self
    }
}

impl<T> Tap for T {}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    fn whole() -> String {
        format!(
            r#"
revision = 3
[node]
name = "lisbon-01-a"
labels = {{ "example.com/kind" = "shop", size = "large" }}
[hub]
address = ["wss://hub.example:10000", "wss://[2001:db8::1]"]
enrol = "https://hub.example:10002"
quic = "quic://hub.example:10001"
tunnel = "wss://hub.example:10004"
ca-hash = "sha256:{HASH}"
token = "{HASH}.aaa.bbb.c-_c"
[network]
proxy = "http://proxy.example:3128"
[[network.interface]]
match = {{ name = "eth0" }}
method = "static"
address = ["10.0.2.15/24", "2001:db8::5/64"]
gateway = ["10.0.2.2", "fe80::1"]
dns = "10.0.2.3"
vlan = 12
ipv6 = "static"
mtu = 1_400
[[network.interface]]
match = {{ mac = "52-54-00-AB-*", driver = "virtio_net" }}
[clock]
ntp = ["pool.example", "10.0.0.1"]
[console]
enabled = false
[update]
channel = "slow"
"#
        )
    }

    fn least() -> String {
        "revision = 1\n[node]\nname = \"a\"\n[hub]\naddress = \"wss://h\"\nenrol = \"https://h:10002\"\n".into()
    }

    #[test]
    fn every_key_is_read() {
        let site = Site::parse(&whole()).expect("all known");
        assert_eq!((site.revision, site.console, site.channel.as_str()), (3, false, "slow"));
        assert_eq!(site.node.name, NameRule::Fixed("lisbon-01-a".into()));
        assert_eq!(site.node.labels["example.com/kind"], "shop");
        assert_eq!(site.hub.addresses.len(), 2);
        assert_eq!(site.hub.quic, Quic::At("quic://hub.example:10001".into()));
        assert_eq!(site.token(), Some(format!("{HASH}.aaa.bbb.c-_c").as_str()));
        assert_eq!(site.ntp, ["pool.example", "10.0.0.1"]);
        let [eth0, other] = site.network.interfaces.as_slice() else { panic!("two rules") };
        let Method::Static { addresses, gateways } = &eth0.method else { panic!("static") };
        assert_eq!((addresses.len(), gateways.len()), (2, 2));
        assert_eq!((eth0.vlan, eth0.mtu, eth0.ipv6), (Some(12), Some(1400), Ipv6::Static));
        assert_eq!(eth0.dns, ["10.0.2.3".parse::<IpAddr>().expect("an address")]);
        assert_eq!((&other.method, other.ipv6), (&Method::Dhcp, Ipv6::Auto));
        assert!(other.matches.matches("enp0s3", "52:54:00:AB:cd:ef", "virtio_net"));
        assert!(!other.matches.matches("enp0s3", "52:54:00:AC:cd:ef", "virtio_net"));
        assert!(!other.matches.matches("enp0s3", "52:54:00:AB:cd:ef", "e1000e"));
        assert!(!format!("{site:?}").contains("c-_c"), "a token is not shown");
    }

    #[test]
    fn written_file_is_read_as_the_same_site() {
        let rule = "name-from = \"mac\"\nprefix = \"lisbon-01-\"";
        let by_rule = whole().replace("name = \"lisbon-01-a\"", rule);
        for text in [whole(), least(), by_rule, least() + "quic = \"off\"\n"] {
            let site = Site::parse(&text).expect("good");
            let written = site.to_toml();
            assert_eq!(Site::parse(&written).expect(&written), site, "{written}");
        }
    }

    #[test]
    fn least_file_gets_its_defaults() {
        let site = Site::parse(&least()).expect("enough");
        assert_eq!(site.network, Network::default());
        assert_eq!((site.console, site.channel.as_str()), (true, "stable"));
        assert_eq!(site.token(), None);
        // As editors of Windows write it.
        let windows = format!("\u{feff}{}", least().replace('\n', "\r\n"));
        assert_eq!(Site::parse(&windows), Ok(site));
    }

    #[test]
    fn all_mistakes_are_told_with_line_and_hint() {
        let text = r#"revision = "one"
[node]
nmae = "a"
name = "Lisbon_01"
labels = { "a b" = "x" }
[hub]
address = ["https://hub.example"]
quic = "maybe"
ca-hash = "sha256:12"
[network]
[[network.interface]]
match = { }
method = "static"
address = ["10.0.2.300/24"]
gateway = "10.0.2"
[[network.interface]]
match = { name = "eth1" }
method = "static"
address = ["10.0.2.15/24"]
gateway = "10.0.3.1"
vlan = 5000
ipv6 = "static"
[clok]
"#;
        let error = Site::parse(text).expect_err("bad");
        let told: Vec<_> = error.mistakes.iter().map(|one| (one.line, one.what.as_str())).collect();
        let wanted = [
            (1, "`revision` is not a number"),
            (3, "key `nmae` is not known in [node]"),
            (4, "name: `Lisbon_01` is not a node name"),
            (5, "label `a b`"),
            (6, "`enrol` of [hub] is missing"),
            (7, "address: `https://hub.example` is not such an address"),
            (8, "quic: `maybe`"),
            (9, "ca-hash: `sha256:12`"),
            (12, "`match` is empty"),
            (14, "address: `10.0.2.300/24`"),
            (15, "gateway: `10.0.2` is not an IP address"),
            (20, "gateway: 10.0.3.1 is in none of the networks"),
            (20, "ipv6 is `static`"),
            (21, "`vlan` is not a number from 1 to 4094"),
            (23, "key `clok` is not known"),
        ];
        for (line, what) in wanted {
            assert!(
                told.iter().any(|(at, text)| *at == line && text.starts_with(what)),
                "{line}: {what} is not in {told:#?}"
            );
        }
        assert_eq!(told.len(), wanted.len(), "{told:#?}");
        assert!(error.mistakes.iter().all(|one| !one.hint.is_empty()));
        let hint = |what: &str| {
            error.mistakes.iter().find(|one| one.what.contains(what)).map(|one| one.hint.as_str())
        };
        assert_eq!(hint("clok"), Some("did you mean `clock`?"));
        assert!(error.to_string().starts_with("site.toml has 15 mistake(s): line 1: "), "{error}");
    }

    #[test]
    fn syntax_errors_are_told_with_their_line_and_without_followers() {
        let error = Site::parse("revision = 1\n[node]\nname = lisbon\n[hub\naddress = 1\n")
            .expect_err("bad");
        assert!(
            error.mistakes.iter().any(|one| one.line == 3 && one.what.starts_with("not TOML")),
            "{error}"
        );
        assert!(error.mistakes.iter().any(|one| one.line == 4), "{error}");
        assert!(!error.to_string().contains("missing"), "{error}");
        let error = Site::parse("").expect_err("empty");
        assert_eq!(error.mistakes.len(), 3, "{error}");
        assert!(Site::parse(&"#".repeat(BYTES_MAX + 1)).is_err());
    }

    #[test]
    fn token_is_checked_and_never_shown() {
        let with = |lines: &str| Site::parse(&format!("{}{lines}\n", least()));
        let bare =
            with(&format!("ca-hash = \"{HASH}\"\ntoken = \"h.p.s\"")).expect("hash beside it");
        assert_eq!(bare.token(), Some(format!("{HASH}.h.p.s").as_str()));
        let other = HASH.replace("00", "01");
        for bad in [
            "token = \"secret words\"".to_owned(),
            "token = \"h.p.secret\"".into(),
            "token = \"x.h.p.secret\"".into(),
            format!("token = \"{HASH}.h..secret\""),
            format!("ca-hash = \"{other}\"\ntoken = \"{HASH}.h.p.secret\""),
        ] {
            let error = with(&bad).expect_err(&bad);
            assert_eq!(error.mistakes.len(), 1, "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn used_token_is_overwritten_in_place() {
        let before = whole();
        let after = Site::without_token(&before).expect("has one");
        assert_eq!(after.len(), before.len());
        assert!(!after.contains("c-_c"));
        let mut site = Site::parse(&before).expect("good");
        site.hub.token = None;
        assert_eq!(Site::parse(&after).expect("still good"), site);
        assert_eq!(Site::without_token(&after), None, "once is enough");
        assert_eq!(Site::without_token(&least()), None);
        let long = format!("{}token = \"\"\"\n{HASH}.a.b.c\n\"\"\"\n", least());
        let after = Site::without_token(&long).expect("has one");
        assert!(!after.contains(HASH) && after.len() == long.len());
        assert_eq!(Site::parse(&after).expect("still good").token(), None);
    }

    #[test]
    fn names_follow_from_the_machine() {
        let rule = |source| NameRule::From { source, prefix: "lisbon-01-".into() };
        let machine = Machine {
            serial: Some(" ABC 12/7 ".into()),
            mac: Some("52:54:00:12:AB:56".into()),
            machine_id: Some("0123456789abcdef0123456789abcdef".into()),
        };
        let name = |source| rule(source).resolve(&machine).expect("has it");
        assert_eq!(name(NameSource::Serial), "lisbon-01-abc-12-7");
        assert_eq!(name(NameSource::Mac), "lisbon-01-52540012ab56");
        assert_eq!(name(NameSource::MachineId), "lisbon-01-0123456789ab");
        for serial in ["", "To be filled by O.E.M.", "Default string", "0000", "None"] {
            let machine = Machine { serial: Some(serial.into()), ..Machine::default() };
            let error = rule(NameSource::Serial).resolve(&machine).expect_err(serial);
            assert!(error.hint().contains("mac"), "{serial}");
        }
        for source in [NameSource::Mac, NameSource::MachineId] {
            assert!(rule(source).resolve(&Machine::default()).is_err());
        }
        let machine = Machine { serial: Some("x".repeat(80)), ..Machine::default() };
        assert!(matches!(rule(NameSource::Serial).resolve(&machine), Err(NameError::NotAName(_))));
        for (text, good) in [
            ("a", true),
            ("a-1.b", true),
            ("", false),
            ("-a", false),
            ("a-", false),
            ("A", false),
            ("a..b", false),
            ("a_b", false),
        ] {
            assert_eq!(is_name(text), good, "{text}");
        }
    }

    #[test]
    fn networks_contain_their_addresses() {
        let contains = |cidr, address: &str| {
            Cidr::parse(cidr).expect(cidr).contains(address.parse().expect("an address"))
        };
        assert!(contains("10.0.2.15/24", "10.0.2.1"));
        assert!(!contains("10.0.2.15/24", "10.0.3.1"));
        assert!(contains("10.0.2.15/0", "192.0.2.1"));
        assert!(!contains("10.0.2.15/32", "10.0.2.14"));
        assert!(contains("2001:db8::5/64", "2001:db8::1"));
        assert!(!contains("2001:db8::5/64", "10.0.2.1"));
        for bad in [
            "10.0.2.15",
            "10.0.2.15/",
            "10.0.2.15/33",
            "10.0.2.15/+4",
            "x/24",
            "::1/129",
            "10.0.2.15/2 4",
        ] {
            assert_eq!(Cidr::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn patterns_match_as_in_a_shell() {
        let matches = |pattern: &str, text: &str| glob(pattern.as_bytes(), text.as_bytes());
        for (pattern, text, good) in [
            ("eth0", "eth0", true),
            ("eth*", "eth", true),
            ("*0", "eth10", true),
            ("e*h*", "eth0", true),
            ("eth?", "eth", false),
            ("eth?", "eth1", true),
            ("", "", true),
            ("", "a", false),
            ("*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
        ] {
            assert_eq!(matches(pattern, text), good, "{pattern} {text}");
        }
    }

    #[test]
    fn edgecore_gets_what_the_file_says() {
        let site = Site::parse(&whole()).expect("good");
        let yaml = site.edgecore_yaml("lisbon-01-a", &Places::APPLIANCE);
        for line in [
            "nodeName: \"lisbon-01-a\"",
            "hub: [\"wss://hub.example:10000\", \"wss://[2001:db8::1]\"]",
            "enrol: \"https://hub.example:10002\"",
            "quic: \"quic://hub.example:10001\"",
            "tunnel: \"wss://hub.example:10004\"",
            "proxy: \"http://proxy.example:3128\"",
            "tokenFile: \"/run/skerry/token\"",
            "dir: \"/state/edge\"",
            "labels: {\"example.com/kind\": \"shop\", \"size\": \"large\"}",
        ] {
            assert!(yaml.lines().any(|other| other == line), "{line} is not in:\n{yaml}");
        }
        assert!(!yaml.contains(HASH), "the token is in a file of its own");
        let off = Site::parse(&(least() + "quic = \"off\"\n")).expect("good");
        assert!(off.edgecore_yaml("a", &Places::APPLIANCE).contains("quic: \"off\"\n"));
    }

    #[test]
    fn changed_bytes_never_panic_and_lines_stay_in_the_file() {
        let text = whole();
        let lines = text.lines().count() + 1;
        let mut word = 0x2545_f491_u32;
        let letters = b"\"'[]{}=.,#\n \\a0-\x00\xff";
        for _ in 0..3000 {
            let mut bytes = text.clone().into_bytes();
            for _ in 0..3 {
                word = word.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
                let at = (word >> 8) as usize % bytes.len();
                let letter = letters[(word >> 3) as usize % letters.len()];
                match word & 3 {
                    0 => drop(bytes.remove(at)),
                    1 => bytes.insert(at, letter),
                    2 => bytes.truncate(at.max(1)),
                    _ => bytes[at] = letter,
                }
            }
            let Ok(changed) = String::from_utf8(bytes) else { continue };
            if let Err(error) = Site::parse(&changed) {
                assert!(!error.mistakes.is_empty());
                assert!(
                    error.mistakes.iter().all(|one| (1..=lines + 3).contains(&one.line)),
                    "{error}"
                );
            }
            let _ = Site::without_token(&changed);
        }
    }
}
