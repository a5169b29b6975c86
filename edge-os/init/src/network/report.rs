//! What the service says about itself: problems with hints, and `network.json`. Pure.

use crate::site::Method;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::time::Duration;

/// Silence of DHCP that is a problem for a person.
pub const DHCP_PROBLEM_AFTER: Duration = Duration::from_secs(30);
/// Time without any usable interface, or without a carrier, that is a problem.
pub const LINK_PROBLEM_AFTER: Duration = Duration::from_secs(15);
/// Time online without an answer of a time server that is a problem.
pub const TIME_PROBLEM_AFTER: Duration = Duration::from_secs(120);

/// Something that a person should know, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong, one sentence.
    pub what: String,
    /// What to do.
    pub hint: String,
}

impl Problem {
    fn new(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { what: what.into(), hint: hint.into() }
    }
}

/// An interface as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Its name.
    pub name: String,
    /// Hardware address as text.
    pub mac: String,
    /// Whether there is a carrier, and for how long there has been none.
    pub carrier: bool,
    /// How long it has had no carrier.
    pub dark_for: Option<Duration>,
    /// A rule of the site names it.
    pub by_rule: bool,
    /// How it gets addresses.
    pub method: Method,
    /// Addresses with their networks, without those of the link.
    pub addresses: Vec<String>,
    /// Next hops for everything else.
    pub gateways: Vec<IpAddr>,
    /// Name servers.
    pub dns: Vec<String>,
    /// How long DHCP has been silent, while there is no lease.
    pub waiting_for: Option<Duration>,
    /// Why it could not be configured.
    pub failure: Option<String>,
}

impl View {
    /// Whether it can be used.
    pub fn is_online(&self) -> bool {
        self.carrier && !self.addresses.is_empty()
    }

    /// What is wrong with it. A dark interface that nobody has asked for is a problem only while
    /// no other works (`online`): boxes have more sockets than cables.
    pub fn problem(&self, online: bool) -> Option<Problem> {
        let name = &self.name;
        if let Some(failure) = &self.failure {
            return Some(Problem::new(
                format!("{name}: {failure}"),
                "look at its rule in site.toml",
            ));
        }
        let is_dark = self.dark_for.is_some_and(|dark| dark >= LINK_PROBLEM_AFTER);
        if is_dark && (self.by_rule || !online) {
            let hint = "plug the cable in, or look at the switch";
            return Some(Problem::new(format!("no carrier on {name}"), hint));
        }
        // An IPv6 network without DHCP is one that works.
        let waited = self.waiting_for.filter(|_| !self.is_online())?;
        (waited >= DHCP_PROBLEM_AFTER).then(|| {
            Problem::new(
                format!("no DHCP answer on {name} after {} s", DHCP_PROBLEM_AFTER.as_secs()),
                format!(
                    "is there a DHCP server on this network? If not, give {name} \
                     `method = \"static\"` in site.toml"
                ),
            )
        })
    }

    fn to_json(&self, online: bool) -> Value {
        let state = match (self.carrier, self.addresses.is_empty(), &self.method) {
            (false, ..) => "no-carrier",
            (true, true, Method::Off) => "up",
            (true, true, _) => "waiting",
            (true, false, _) => "configured",
        };
        let method = match self.method {
            Method::Dhcp => "dhcp",
            Method::Static { .. } => "static",
            Method::Off => "off",
        };
        json!({
            "name": self.name, "mac": self.mac, "state": state, "addresses": self.addresses,
            "gateway": self.gateways.first(), "dns": self.dns, "method": method,
            "problem": self.problem(online).map(|problem| problem.what),
        })
    }
}

/// What the service knows of the time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Time {
    /// It was set from the network.
    pub synced: bool,
    /// Whose time it is, and by how many seconds the clock was behind.
    pub last: Option<(IpAddr, f64)>,
}

/// Everything that is wrong. `uptime` is that of the service, `online_for` how long an interface
/// has been usable.
pub fn problems(
    views: &[View],
    uptime: Duration,
    online_for: Option<Duration>,
    time: Time,
) -> Vec<Problem> {
    let mut found: Vec<Problem> =
        views.iter().filter_map(|view| view.problem(online_for.is_some())).collect();
    if views.is_empty() && uptime >= LINK_PROBLEM_AFTER {
        found.push(Problem::new(
            "no network interface to use",
            "the box needs a wired interface, or a rule in site.toml that matches one",
        ));
    }
    if !time.synced && online_for.is_some_and(|online| online >= TIME_PROBLEM_AFTER) {
        found.push(Problem::new(
            "the clock was not set from the network: no time server has answered",
            "name one in site.toml, `[clock] ntp`; certificates need a clock that is right",
        ));
    }
    found
}

/// Returns the content of `network.json`.
pub fn to_json(
    views: &[View],
    online: bool,
    time: Time,
    proxy: Option<&str>,
    problems: &[Problem],
) -> Value {
    let problems: Vec<Value> =
        problems.iter().map(|one| json!({"what": one.what, "hint": one.hint})).collect();
    json!({
        "interfaces": views.iter().map(|view| view.to_json(online)).collect::<Vec<_>>(),
        "online": online,
        "ntp": {
            "synced": time.synced,
            "offset_ms": time.last.map(|(_, offset)| (offset * 1000.0).round() as i64),
            "server": time.last.map(|(server, _)| server),
        },
        "proxy": proxy,
        "problems": problems,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> View {
        View {
            name: "eth0".to_owned(),
            mac: "02:00:00:00:00:01".to_owned(),
            carrier: true,
            dark_for: None,
            by_rule: false,
            method: Method::Dhcp,
            addresses: Vec::new(),
            gateways: Vec::new(),
            dns: Vec::new(),
            waiting_for: None,
            failure: None,
        }
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn silence_of_dhcp_is_a_problem_after_thirty_seconds_unless_ipv6_works() {
        let mut eth0 = View { waiting_for: Some(secs(29)), ..view() };
        assert_eq!(eth0.problem(false), None);
        eth0.waiting_for = Some(secs(30));
        let problem = eth0.problem(false).expect("it is one");
        assert_eq!(problem.what, "no DHCP answer on eth0 after 30 s");
        assert!(problem.hint.contains("static"));
        eth0.addresses.push("2001:db8::5/64".to_owned());
        assert_eq!(eth0.problem(true), None);
    }

    #[test]
    fn a_dark_interface_is_a_problem_if_it_was_asked_for_or_nothing_else_works() {
        let mut eth1 = View { carrier: false, dark_for: Some(secs(15)), ..view() };
        assert_eq!(eth1.problem(true), None);
        assert_eq!(eth1.problem(false).expect("it is one").what, "no carrier on eth0");
        eth1.by_rule = true;
        assert!(eth1.problem(true).is_some());
        eth1.dark_for = Some(secs(14));
        assert_eq!(eth1.problem(true), None);
    }

    #[test]
    fn no_interface_and_no_time_are_problems_after_a_while() {
        let time = Time::default();
        assert!(problems(&[], secs(14), None, time).is_empty());
        assert_eq!(problems(&[], secs(15), None, time).len(), 1);
        let eth0 = View { addresses: vec!["10.0.0.2/24".to_owned()], ..view() };
        assert!(problems(std::slice::from_ref(&eth0), secs(200), Some(secs(119)), time).is_empty());
        assert_eq!(problems(&[eth0], secs(200), Some(secs(120)), time).len(), 1);
    }

    #[test]
    fn the_report_has_the_keys_that_others_read() {
        let eth0 = View { addresses: vec!["10.0.0.2/24".to_owned()], ..view() };
        let time = Time { synced: true, last: Some(([10, 0, 0, 1].into(), -0.0123)) };
        let report = to_json(&[eth0], true, time, None, &[]);
        assert_eq!(report["interfaces"][0]["state"], "configured");
        assert_eq!(report["interfaces"][0]["problem"], Value::Null);
        assert_eq!(report["ntp"], json!({"synced": true, "offset_ms": -12, "server": "10.0.0.1"}));
        assert_eq!(report["online"], true);
    }
}
