//! The plugin `host-local`: addresses from ranges, remembered as files on this host.
//!
//! Below `dataDir/<network>/` there is a file for each address in use, named after it, with the
//! container's id and its interface on two lines; `last_reserved_ip.<n>` has the address that the
//! search in range set `n` goes on after; `lock` is locked while one of us looks. The format is
//! that of the plugin of the same name, so either may follow the other. Called by `bridge` in the
//! same process, and by runtimes under its own name.
//!
//! Source: containernetworking/plugins, plugins/ipam/host-local/README.md, and the files it makes.

use super::result::{CniResult, Ip, Route, network_of};
use super::{CniError, Request};
use crate::site::Cidr;
use nix::fcntl::{Flock, FlockArg};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Where the files are unless the configuration says so.
const DATA_DIR: &str = "/var/lib/cni/networks";
/// Addresses of one range that are tried; a range with that many in use is full for us.
const TRIES_MAX: u128 = 1 << 17;
/// Range sets, and ranges in one.
const RANGES_MAX: usize = 64;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    data_dir: Option<PathBuf>,
    ranges: Vec<Vec<RangeConfig>>,
    subnet: Option<String>,
    range_start: Option<IpAddr>,
    range_end: Option<IpAddr>,
    gateway: Option<IpAddr>,
    routes: Vec<RouteConfig>,
    resolv_conf: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RangeConfig {
    subnet: String,
    range_start: Option<IpAddr>,
    range_end: Option<IpAddr>,
    gateway: Option<IpAddr>,
}

#[derive(Debug, Deserialize)]
struct RouteConfig {
    dst: String,
    gw: Option<IpAddr>,
}

/// A range of addresses of one network, both ends in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The network.
    pub subnet: Cidr,
    /// First address to give out.
    pub start: IpAddr,
    /// Last address to give out.
    pub end: IpAddr,
    /// Never given out.
    pub gateway: IpAddr,
}

impl Range {
    fn new(config: &RangeConfig) -> Result<Self, CniError> {
        let wrong = |text: String| CniError::Config(text);
        let given = Cidr::parse(&config.subnet)
            .ok_or_else(|| wrong(format!("`subnet` `{}` is no network", config.subnet)))?;
        let subnet = network_of(given);
        if subnet != given {
            return Err(wrong(format!("`subnet` `{given}` has bits of a host, not `{subnet}`")));
        }
        let bits = if subnet.address.is_ipv4() { 32 } else { 128 };
        if subnet.prefix > bits - 2 {
            return Err(wrong(format!("`subnet` `{subnet}` is too small")));
        }
        let first = number(subnet.address);
        let size = 1_u128.checked_shl((bits - subnet.prefix).into()).unwrap_or(0);
        let last = first.wrapping_add(size).wrapping_sub(1);
        // The last one of an IPv4 network is for everybody.
        let last = if subnet.address.is_ipv4() { last - 1 } else { last };
        let inside = |name: &str, ip: Option<IpAddr>, default: u128| match ip {
            None => Ok(address(default, subnet.address)),
            Some(ip) if subnet.contains(ip) => Ok(ip),
            Some(ip) => Err(wrong(format!("`{name}` {ip} is not in `{subnet}`"))),
        };
        let range = Self {
            subnet,
            start: inside("rangeStart", config.range_start, first + 1)?,
            end: inside("rangeEnd", config.range_end, last)?,
            // A gateway outside is allowed: it is only kept free.
            gateway: config.gateway.unwrap_or_else(|| address(first + 1, subnet.address)),
        };
        if number(range.start) > number(range.end) {
            return Err(wrong(format!("`rangeStart` of `{subnet}` is after `rangeEnd`")));
        }
        Ok(range)
    }

    fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.start.is_ipv4()
            && (number(self.start)..=number(self.end)).contains(&number(ip))
    }
}

/// Gives the container one address of each range set.
pub(crate) fn add(request: &Request, config: &Value) -> Result<CniResult, CniError> {
    let ipam = read_config(config)?;
    let sets = range_sets(&ipam, config)?;
    let mut wanted = wanted(request, config)?;
    let dns = ipam.resolv_conf.as_deref().map(read_resolv_conf).transpose()?;
    let store = Store::open(&ipam, config)?;
    let owner = owner(request);

    let mut result = CniResult { dns, ..CniResult::default() };
    let mut reserve = || {
        for (at, set) in sets.iter().enumerate() {
            let asked = wanted.iter().position(|ip| set.iter().any(|range| range.contains(*ip)));
            let asked = asked.map(|at| wanted.swap_remove(at));
            let (range, ip) = store.reserve(at, set, asked, &owner)?;
            result.ips.push(Ip {
                interface: None,
                address: Cidr { address: ip, prefix: range.subnet.prefix },
                gateway: Some(range.gateway),
            });
        }
        match wanted.first() {
            Some(ip) => Err(CniError::Config(format!("requested address {ip} is in no range"))),
            None => Ok(()),
        }
    };
    if let Err(error) = reserve() {
        for ip in &result.ips {
            store.release(ip.address.address);
        }
        return Err(error);
    }
    for route in &ipam.routes {
        let destination = Cidr::parse(&route.dst).ok_or_else(|| {
            CniError::Config(format!("route's `dst` `{}` is no network", route.dst))
        })?;
        result.routes.push(Route { destination, gateway: route.gw });
    }
    Ok(result)
}

/// Gives back what the container has; nothing is fine.
pub(crate) fn delete(request: &Request, config: &Value) -> Result<(), CniError> {
    let ipam = read_config(config)?;
    let store = Store::open(&ipam, config)?;
    for ip in store.of(&owner(request)) {
        store.release(ip);
    }
    Ok(())
}

/// Looks whether the container has an address.
pub(crate) fn check(request: &Request, config: &Value) -> Result<(), CniError> {
    let ipam = read_config(config)?;
    let store = Store::open(&ipam, config)?;
    if store.of(&owner(request)).is_empty() {
        return Err(CniError::Changed("container has no address".to_owned()));
    }
    Ok(())
}

fn owner(request: &Request) -> String {
    format!("{}\r\n{}", request.container_id, request.ifname)
}

fn read_config(config: &Value) -> Result<Config, CniError> {
    let ipam = config.get("ipam").filter(|ipam| ipam.is_object());
    let ipam = ipam.ok_or_else(|| CniError::Config("`ipam` is missing".to_owned()))?;
    Config::deserialize(ipam).map_err(CniError::Decode)
}

fn range_sets(ipam: &Config, config: &Value) -> Result<Vec<Vec<Range>>, CniError> {
    let mut sets: Vec<Vec<Range>> = Vec::new();
    if let Some(subnet) = &ipam.subnet {
        let single = RangeConfig {
            subnet: subnet.clone(),
            range_start: ipam.range_start,
            range_end: ipam.range_end,
            gateway: ipam.gateway,
        };
        sets.push(vec![Range::new(&single)?]);
    }
    let at_run_time = config.pointer("/runtimeConfig/ipRanges").filter(|value| !value.is_null());
    let at_run_time: Vec<Vec<RangeConfig>> = match at_run_time {
        Some(value) => Deserialize::deserialize(value).map_err(CniError::Decode)?,
        None => Vec::new(),
    };
    for set in at_run_time.iter().chain(&ipam.ranges) {
        sets.push(set.iter().map(Range::new).collect::<Result<_, _>>()?);
    }
    if sets.is_empty() || sets.iter().any(Vec::is_empty) {
        return Err(CniError::Config("`ipam` has no ranges".to_owned()));
    }
    if sets.len() > RANGES_MAX || sets.iter().any(|set| set.len() > RANGES_MAX) {
        return Err(CniError::Config(format!("`ipam` has more than {RANGES_MAX} ranges")));
    }
    for set in &sets {
        if set.iter().any(|range| range.start.is_ipv4() != set[0].start.is_ipv4()) {
            return Err(CniError::Config("a range set mixes IPv4 and IPv6".to_owned()));
        }
    }
    let all: Vec<&Range> = sets.iter().flatten().collect();
    for (at, range) in all.iter().enumerate() {
        if let Some(other) = all[..at].iter().find(|other| {
            other.start.is_ipv4() == range.start.is_ipv4()
                && number(other.start) <= number(range.end)
                && number(range.start) <= number(other.end)
        }) {
            let text = format!("ranges of `{}` and `{}` overlap", other.subnet, range.subnet);
            return Err(CniError::Config(text));
        }
    }
    Ok(sets)
}

/// Addresses that somebody asks for: capability `ips`, `args.cni.ips`, `IP=` in `CNI_ARGS`.
fn wanted(request: &Request, config: &Value) -> Result<Vec<IpAddr>, CniError> {
    let listed = [config.pointer("/runtimeConfig/ips"), config.pointer("/args/cni/ips")];
    let listed = listed.into_iter().flatten().filter_map(Value::as_array).flatten();
    let listed = listed.filter_map(Value::as_str);
    let argument = request.args.split(';').find_map(|pair| pair.strip_prefix("IP="));
    let mut found = Vec::new();
    for text in listed.chain(argument).filter(|text| !text.is_empty()) {
        let ip = text.split('/').next().unwrap_or_default().parse();
        found.push(ip.map_err(|_| CniError::Config(format!("`{text}` is no address")))?);
    }
    Ok(found)
}

fn read_resolv_conf(path: &Path) -> Result<Value, CniError> {
    let text = fs::read_to_string(path).map_err(|source| CniError::File {
        what: "read",
        path: path.to_path_buf(),
        source,
    })?;
    let (mut servers, mut search, mut options) = (Vec::new(), Vec::new(), Vec::new());
    let mut domain = None;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => servers.extend(words.next()),
            Some("search") => search.extend(words),
            Some("options") => options.extend(words),
            Some("domain") => domain = words.next(),
            _ => {}
        }
    }
    let mut dns = json!({});
    for (name, list) in [("nameservers", servers), ("search", search), ("options", options)] {
        if !list.is_empty() {
            dns[name] = json!(list);
        }
    }
    if let Some(domain) = domain {
        dns["domain"] = json!(domain);
    }
    Ok(dns)
}

/// The files of one network, locked.
struct Store {
    dir: PathBuf,
    _lock: Flock<File>,
}

impl Store {
    fn open(ipam: &Config, config: &Value) -> Result<Self, CniError> {
        let network = config["name"].as_str().unwrap_or_default();
        let dir = ipam.data_dir.as_deref().unwrap_or(Path::new(DATA_DIR)).join(network);
        let failed = |what: &'static str, path: &Path| {
            let path = path.to_path_buf();
            move |source| CniError::File { what, path, source }
        };
        fs::create_dir_all(&dir).map_err(failed("create", &dir))?;
        let path = dir.join("lock");
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true);
        let file = options.open(&path).map_err(failed("open", &path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| failed("lock", &path)(error.into()))?;
        Ok(Self { dir, _lock: lock })
    }

    /// Returns the addresses of `owner`.
    fn of(&self, owner: &str) -> Vec<IpAddr> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let named = entries.filter_map(|entry| {
            let ip: IpAddr = entry.file_name().to_str()?.parse().ok()?;
            let text = fs::read_to_string(entry.path()).ok()?;
            (text.trim() == owner).then_some(ip)
        });
        named.collect()
    }

    fn release(&self, ip: IpAddr) {
        let _ = fs::remove_file(self.dir.join(ip.to_string()));
    }

    /// Takes an address of `set`: `asked`, or the first free one after the last that was given.
    fn reserve(
        &self,
        at: usize,
        set: &[Range],
        asked: Option<IpAddr>,
        owner: &str,
    ) -> Result<(Range, IpAddr), CniError> {
        if let Some(ip) = asked {
            let range = set.iter().find(|range| range.contains(ip)).expect("it was looked for");
            if ip == range.gateway {
                return Err(CniError::Config(format!("requested address {ip} is the gateway's")));
            }
            if !self.claim(ip, owner)? {
                return Err(CniError::Conflict(format!("requested address {ip} is taken")));
            }
            return Ok((*range, ip));
        }
        let has_one = |ip: &IpAddr| set.iter().any(|range| range.contains(*ip));
        if let Some(ip) = self.of(owner).iter().find(|ip| has_one(ip)) {
            let text = format!("container has address {ip} already; it was not deleted");
            return Err(CniError::Conflict(text));
        }
        let last_path = self.dir.join(format!("last_reserved_ip.{at}"));
        let last = fs::read_to_string(&last_path).ok();
        let last = last.and_then(|text| text.trim().parse().ok()).filter(has_one);
        for (range, ip) in candidates(set, last) {
            if ip != range.gateway && self.claim(ip, owner)? {
                fs::write(&last_path, ip.to_string()).map_err(|source| CniError::File {
                    what: "write",
                    path: last_path,
                    source,
                })?;
                return Ok((range, ip));
            }
        }
        let names: Vec<String> = set.iter().map(|range| range.subnet.to_string()).collect();
        Err(CniError::Exhausted(names.join(", ")))
    }

    fn claim(&self, ip: IpAddr, owner: &str) -> Result<bool, CniError> {
        let path = self.dir.join(ip.to_string());
        match OpenOptions::new().create_new(true).write(true).open(&path) {
            Ok(mut file) => match file.write_all(owner.as_bytes()) {
                Ok(()) => Ok(true),
                Err(source) => {
                    let _ = fs::remove_file(&path);
                    Err(CniError::File { what: "write", path, source })
                }
            },
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
            Err(source) => Err(CniError::File { what: "create", path, source }),
        }
    }
}

/// All addresses of a set once, beginning after `last`.
fn candidates(set: &[Range], last: Option<IpAddr>) -> impl Iterator<Item = (Range, IpAddr)> {
    let first = last.and_then(|last| set.iter().position(|range| range.contains(last)));
    let first = first.unwrap_or(0);
    let after = last.map_or(number(set[first].start), |last| number(last).wrapping_add(1));
    let spans = std::iter::once((set[first], after, number(set[first].end)))
        .chain(
            (1..set.len())
                .map(move |step| (first + step) % set.len())
                .map(|at| (set[at], number(set[at].start), number(set[at].end))),
        )
        .chain(std::iter::once((set[first], number(set[first].start), after.saturating_sub(1))))
        .collect::<Vec<_>>();
    spans.into_iter().flat_map(|(range, from, to)| {
        let to = to.min(from.saturating_add(TRIES_MAX));
        let count = if from <= to { to - from + 1 } else { 0 };
        (0..count).map(move |step| (range, address(from + step, range.start)))
    })
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

fn address(number: u128, like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4((number as u32).into()),
        IpAddr::V6(_) => IpAddr::V6(number.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(id: &str) -> Request {
        Request { container_id: id.to_owned(), ifname: "eth0".to_owned(), ..Request::default() }
    }

    fn config(dir: &Path, ipam: Value) -> Value {
        let mut ipam = ipam;
        ipam["dataDir"] = json!(dir);
        json!({"cniVersion": "1.0.0", "name": "net", "ipam": ipam})
    }

    fn given(request: &Request, config: &Value) -> String {
        add(request, config).expect("an address is free").ips[0].address.to_string()
    }

    #[test]
    fn addresses_go_round_and_the_gateway_is_kept() {
        let dir = tempfile::tempdir().expect("a folder");
        let config = config(dir.path(), json!({"ranges": [[{"subnet": "10.1.0.0/29"}]]}));
        for (id, ip) in [("a", 2), ("b", 3), ("c", 4), ("d", 5), ("e", 6)] {
            assert_eq!(given(&request(id), &config), format!("10.1.0.{ip}/29"));
        }
        let error = add(&request("f"), &config).expect_err("it is full");
        assert_eq!(error.code(), 11);
        delete(&request("b"), &config).expect("it is given back");
        delete(&request("b"), &config).expect("twice is fine");
        assert_eq!(given(&request("f"), &config), "10.1.0.3/29");
        let file = fs::read_to_string(dir.path().join("net/10.1.0.3")).expect("the file is there");
        assert_eq!(file, "f\r\neth0");
        let last = fs::read_to_string(dir.path().join("net/last_reserved_ip.0"));
        assert_eq!(last.expect("the file is there"), "10.1.0.3");
        check(&request("f"), &config).expect("it has one");
        assert_eq!(check(&request("b"), &config).expect_err("it has none").code(), 102);
        assert_eq!(add(&request("f"), &config).expect_err("it has one already").code(), 101);
    }

    #[test]
    fn two_sets_give_two_addresses_and_a_failure_gives_both_back() {
        let dir = tempfile::tempdir().expect("a folder");
        let ipam = json!({"ranges": [[{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9"}],
            [{"subnet": "fd00:1::/120", "gateway": "fd00:1::7"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]});
        let config = config(dir.path(), ipam);
        let result = add(&request("a"), &config).expect("both are free");
        assert_eq!(result.ips[0].address.to_string(), "10.1.0.9/24");
        assert_eq!(result.ips[1].address.to_string(), "fd00:1::1/120");
        assert_eq!(result.ips[1].gateway, Some("fd00:1::7".parse().expect("an address")));
        assert_eq!(result.routes.len(), 2);

        let asking = Request { args: "K=v;IP=10.9.9.9".to_owned(), ..request("b") };
        assert_eq!(add(&asking, &config).expect_err("in no range").code(), 7);
        let files = fs::read_dir(dir.path().join("net")).expect("the folder is there");
        let names: Vec<_> = files.flatten().map(|entry| entry.file_name()).collect();
        let addresses =
            names.iter().filter(|name| name.to_string_lossy().parse::<IpAddr>().is_ok());
        assert_eq!(addresses.count(), 2);
    }

    #[test]
    fn asked_addresses_are_given_once() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut config = config(dir.path(), json!({"subnet": "10.1.0.0/24"}));
        config["runtimeConfig"] = json!({"ips": ["10.1.0.77"]});
        assert_eq!(given(&request("a"), &config), "10.1.0.77/24");
        assert_eq!(add(&request("b"), &config).expect_err("taken").code(), 101);
        config["runtimeConfig"] = json!({"ips": ["10.1.0.1"]});
        assert_eq!(add(&request("b"), &config).expect_err("the gateway").code(), 7);
    }

    #[test]
    fn wrong_ranges_are_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        for ipam in [
            json!({}),
            json!({"subnet": "10.1.0.0/31"}),
            json!({"subnet": "10.1.0.3/24"}),
            json!({"subnet": "10.1.0.0/24", "rangeStart": "10.2.0.1"}),
            json!({"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.3"}),
            json!({"ranges": [[{"subnet": "10.1.0.0/24"}, {"subnet": "10.1.0.0/25"}]]}),
            json!({"ranges": [[{"subnet": "10.1.0.0/24"}, {"subnet": "fd00::/64"}]]}),
            json!({"ranges": [[]]}),
        ] {
            let config = config(dir.path(), ipam);
            assert_eq!(add(&request("a"), &config).expect_err("it is wrong").code(), 7, "{config}");
        }
        let whole = config(dir.path(), json!({"subnet": "::/0"}));
        assert_eq!(given(&request("a"), &whole), "::2/0");
    }

    #[test]
    fn many_at_once_get_different_addresses() {
        let dir = tempfile::tempdir().expect("a folder");
        let config = config(dir.path(), json!({"subnet": "10.1.0.0/24"}));
        let mut found: Vec<String> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..16)
                .map(|at| {
                    let config = &config;
                    scope.spawn(move || given(&request(&format!("c{at}")), config))
                })
                .collect();
            all.into_iter().map(|one| one.join().expect("no panic")).collect()
        });
        found.sort();
        found.dedup();
        assert_eq!(found.len(), 16);
    }
}
