//! Which pod network a site gets, and whether its nodes can carry the one that it asks for.
//!
//! Verdicts come from the nodes' own reports, the order of preference from the ladder of `skerry qualify`; both are handed
//! in, so that this is a function over values. The driver is the caller, for each site whenever a report changes.
//!
//! What a node has not reported is unknown, and [`UnknownNodes`] says what that means: a site has to be deployable before its
//! machines join, so by default it stops nothing. What a node has reported as unsupported always stops.

use skerry_api::fleet::v1alpha1::UnknownNodes;
use std::collections::BTreeMap;

/// `spec.cni` of a site that takes what its nodes carry best.
pub const AUTO: &str = "auto";
/// Nodes that a message names; the others are counted.
pub(crate) const NODES_NAMED_MAX: usize = 3;

/// Whether a node carries a network. From good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Everything is there.
    Qualified,
    /// It runs, but something is lost.
    Degraded,
    /// Nobody can say.
    Unknown,
    /// It does not run.
    Unsupported,
}

impl Verdict {
    /// The verdict with this name; what is no verdict is unknown.
    pub fn parse(word: &str) -> Self {
        match word {
            "qualified" => Self::Qualified,
            "degraded" => Self::Degraded,
            "unsupported" => Self::Unsupported,
            _ => Self::Unknown,
        }
    }

    fn runs(self) -> bool {
        matches!(self, Self::Qualified | Self::Degraded)
    }
}

/// A node's verdict over one profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The verdict.
    pub verdict: Verdict,
    /// Why it is not qualified; may be empty.
    pub missing: String,
    /// What helps; may be empty.
    pub hint: String,
}

/// A node of the site and what it reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// By profile; nothing: it has not reported on its present kernel.
    pub profiles: Option<BTreeMap<String, Row>>,
}

/// One step of the order of preference, best first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rung {
    /// Profile of the network.
    pub cni: String,
    /// Features that it must have.
    pub with: Vec<String>,
    /// Profile that carries services.
    pub proxy: Option<String>,
    /// What is lost against the best.
    pub lost: Option<String>,
}

/// What a site gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The network; nothing when none can be chosen yet, or none runs.
    pub cni: Option<String>,
    /// Who carries services with it.
    pub proxy: Option<String>,
    /// A sentence about it.
    pub message: String,
    /// Why nothing new may be applied to the site.
    pub stop: Option<Stop>,
}

/// Why a site is stopped at the gate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// Which node, which profile, what is missing.
    pub message: String,
    /// What a person can do.
    pub hint: String,
}

/// What a site with this `cni` gets on these nodes; nothing when it asks for none.
///
/// `known` says whether a profile of this name exists.
pub fn choose(
    cni: Option<&str>,
    nodes: &[Node],
    ladder: &[Rung],
    known: impl Fn(&str) -> bool,
    unknown: UnknownNodes,
) -> Option<Choice> {
    let wanted = cni?;
    let mut choice = match wanted {
        AUTO => best(nodes, ladder),
        fixed => demanded(fixed, nodes, known(fixed)),
    };
    let silent: Vec<&str> = nodes
        .iter()
        .filter(|node| match (&node.profiles, wanted) {
            (None, _) => true,
            (Some(_), AUTO) => false,
            (Some(rows), fixed) => {
                row(rows, fixed).is_none_or(|row| row.verdict == Verdict::Unknown)
            }
        })
        .map(|node| node.name.as_str())
        .collect();
    if !silent.is_empty() {
        let text =
            format!("{} not reported on {} kernel", named(&silent, "has", "have"), whose(&silent));
        if choice.stop.is_none() && unknown == UnknownNodes::Stop {
            choice.stop = Some(Stop {
                message: format!("network `{wanted}`: {text}"),
                hint: "wait for the node, or set `spec.qualification.unknownNodes: allow` in fleet.yaml"
                    .into(),
            });
        }
        choice.message = format!("{}; {text}", choice.message);
    }
    Some(choice)
}

fn row<'a>(rows: &'a BTreeMap<String, Row>, profile: &str) -> Option<&'a Row> {
    rows.get(profile)
}

/// The first rung that every node with a report carries.
fn best(nodes: &[Node], ladder: &[Rung]) -> Choice {
    let reports: Vec<(&str, &BTreeMap<String, Row>)> = nodes
        .iter()
        .filter_map(|node| Some((node.name.as_str(), node.profiles.as_ref()?)))
        .collect();
    if reports.is_empty() {
        let message = "the network is chosen when a node has reported".to_owned();
        return Choice { cni: None, proxy: None, message, stop: None };
    }
    let everywhere = |profile: &String| {
        reports.iter().all(|(_, rows)| row(rows, profile).is_some_and(|row| row.verdict.runs()))
    };
    let rung = ladder.iter().find(|rung| {
        everywhere(&rung.cni)
            && rung.with.iter().all(everywhere)
            && rung.proxy.as_ref().is_none_or(everywhere)
    });
    let Some(rung) = rung else {
        let message = "no network runs on every node of the site".to_owned();
        // The node that lacks the last rung lacks them all.
        let last = ladder.last().map(|rung| rung.cni.as_str()).unwrap_or_default();
        let stop = demanded(last, nodes, true)
            .stop
            .map(|stop| Stop { message: format!("{message}: {}", stop.message), hint: stop.hint });
        return Choice { cni: None, proxy: None, message, stop };
    };
    let mut message = format!("{} is the best network that every node carries", rung.cni);
    if let Some(proxy) = &rung.proxy {
        message = format!("{message}, services by {proxy}");
    }
    if let Some(lost) = &rung.lost {
        message = format!("{message}; without {lost}");
    }
    // Who keeps the site from the first rung, so that a person knows which box to replace.
    if let Some(first) = ladder.first().filter(|first| *first != rung)
        && let Some((node, row)) = reports.iter().find_map(|(node, rows)| {
            let mut needed = [&first.cni].into_iter().chain(&first.with).chain(&first.proxy);
            needed
                .find_map(|id| row(rows, id).filter(|row| !row.verdict.runs()))
                .map(|row| (node, row))
        })
        && !row.missing.is_empty()
    {
        message = format!("{message} (not {}: node `{node}`: {})", first.cni, row.missing);
    }
    Choice { cni: Some(rung.cni.clone()), proxy: rung.proxy.clone(), message, stop: None }
}

/// The network that the site's file names.
fn demanded(wanted: &str, nodes: &[Node], known: bool) -> Choice {
    if !known {
        let message = format!("there is no network `{wanted}`");
        let hint = "`skerry qualify --list` shows all profiles; `auto` takes the best".to_owned();
        let stop = Some(Stop { message: message.clone(), hint });
        return Choice { cni: None, proxy: None, message, stop };
    }
    let rows = |verdict: Verdict| {
        nodes.iter().filter_map(move |node| {
            let row = row(node.profiles.as_ref()?, wanted)?;
            (row.verdict == verdict).then_some((node.name.as_str(), row))
        })
    };
    let refused: Vec<_> = rows(Verdict::Unsupported).collect();
    if let Some((_, first)) = refused.first() {
        let names: Vec<&str> = refused.iter().map(|(name, _)| *name).collect();
        let why = match first.missing.as_str() {
            "" => String::new(),
            missing => format!(": {missing}"),
        };
        let verb = named(&names, "does", "do");
        let message = format!("network `{wanted}`: {verb} not carry it{why}");
        let node = names.first().copied().unwrap_or_default();
        let hint = match first.hint.as_str() {
            "" => format!("`skerry qualify --node {node}` says more; `cni: auto` takes what runs"),
            hint => format!("{hint}; or `cni: auto`, which takes what runs"),
        };
        let stop = Some(Stop { message: message.clone(), hint });
        return Choice { cni: Some(wanted.into()), proxy: None, message, stop };
    }
    let degraded: Vec<_> = rows(Verdict::Degraded).collect();
    let message = match degraded.first() {
        Some((node, row)) => format!("{wanted}, degraded on node `{node}`: {}", row.missing),
        None => wanted.to_owned(),
    };
    Choice { cni: Some(wanted.into()), proxy: None, message, stop: None }
}

/// ``node `a` has``, ``nodes `a`, `b` and 3 more have``.
fn named(names: &[&str], one: &str, many: &str) -> String {
    let shown: Vec<String> =
        names.iter().take(NODES_NAMED_MAX).map(|name| format!("`{name}`")).collect();
    let list = shown.join(", ");
    match names.len() {
        1 => format!("node {list} {one}"),
        count if count > NODES_NAMED_MAX => {
            format!("nodes {list} and {} more {many}", count - NODES_NAMED_MAX)
        }
        _ => format!("nodes {list} {many}"),
    }
}

fn whose(names: &[&str]) -> &'static str {
    if names.len() == 1 { "its" } else { "their" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ladder() -> Vec<Rung> {
        let rung = |cni: &str, with: &[&str], proxy: Option<&str>, lost: Option<&str>| Rung {
            cni: cni.into(),
            with: with.iter().map(|one| (*one).to_owned()).collect(),
            proxy: proxy.map(Into::into),
            lost: lost.map(Into::into),
        };
        vec![
            rung("cilium", &["cilium-kpr"], Some("cilium-kpr"), None),
            rung("flannel", &[], Some("nft"), Some("network policies")),
            rung("cni-bridge", &[], None, Some("services")),
        ]
    }

    fn node(name: &str, rows: &[(&str, &str)]) -> Node {
        let row = |(profile, word): &(&str, &str)| {
            let bad = *word != "qualified";
            let row = Row {
                verdict: Verdict::parse(word),
                missing: if bad { format!("{profile}.x missing") } else { String::new() },
                hint: if bad { "another kernel".into() } else { String::new() },
            };
            ((*profile).to_owned(), row)
        };
        Node { name: name.into(), profiles: Some(rows.iter().map(row).collect()) }
    }

    fn silent(name: &str) -> Node {
        Node { name: name.into(), profiles: None }
    }

    const GOOD: &[(&str, &str)] = &[
        ("cilium", "qualified"),
        ("cilium-kpr", "degraded"),
        ("flannel", "qualified"),
        ("nft", "qualified"),
        ("cni-bridge", "qualified"),
    ];
    const OLD: &[(&str, &str)] = &[
        ("cilium", "unsupported"),
        ("cilium-kpr", "unsupported"),
        ("flannel", "qualified"),
        ("nft", "qualified"),
        ("cni-bridge", "qualified"),
    ];

    fn check(cni: Option<&str>, nodes: &[Node], unknown: UnknownNodes) -> Option<Choice> {
        choose(cni, nodes, &ladder(), |id| ladder().iter().any(|rung| rung.cni == id), unknown)
    }

    #[test]
    fn auto_takes_the_best_that_every_node_carries_and_says_who_holds_it_back() {
        let take = |nodes: &[Node]| check(Some("auto"), nodes, UnknownNodes::Allow).expect("asked");
        let both = take(&[node("a", GOOD), node("b", GOOD)]);
        assert_eq!(
            (both.cni.as_deref(), both.proxy.as_deref()),
            (Some("cilium"), Some("cilium-kpr"))
        );
        let mixed = take(&[node("a", GOOD), node("b", OLD)]);
        assert_eq!((mixed.cni.as_deref(), &mixed.stop), (Some("flannel"), &None));
        assert!(mixed.message.contains("node `b`: cilium.x missing"), "{}", mixed.message);
        assert!(mixed.message.contains("without network policies"), "{}", mixed.message);
        let early = take(&[silent("a")]);
        assert_eq!((&early.cni, &early.stop), (&None, &None));
        assert!(early.message.contains("node `a` has not reported"), "{}", early.message);
        let none = take(&[node("a", &[("cni-bridge", "unsupported")])]);
        let stop = none.stop.expect("stopped");
        assert!(
            stop.message.contains("no network runs") && stop.message.contains("`a`"),
            "{stop:?}"
        );
        assert_eq!(check(None, &[node("a", OLD)], UnknownNodes::Stop), None);
    }

    #[test]
    fn a_fixed_network_that_a_node_does_not_carry_stops_the_site_with_the_reason() {
        let nodes = [node("a", GOOD), node("b", OLD)];
        let choice = check(Some("cilium"), &nodes, UnknownNodes::Allow).expect("asked");
        let stop = choice.stop.expect("stopped");
        assert_eq!(stop.message, "network `cilium`: node `b` does not carry it: cilium.x missing");
        assert!(stop.hint.starts_with("another kernel"), "{}", stop.hint);
        let fine = check(Some("flannel"), &nodes, UnknownNodes::Allow).expect("asked");
        assert_eq!((fine.message.as_str(), fine.stop), ("flannel", None));
        let typo = check(Some("cillium"), &nodes, UnknownNodes::Allow).expect("asked");
        assert!(typo.stop.expect("stopped").message.contains("no network `cillium`"));
        let many: Vec<Node> = ["a", "b", "c", "d", "e"].map(|name| node(name, OLD)).into();
        let choice = check(Some("cilium"), &many, UnknownNodes::Allow).expect("asked");
        assert!(
            choice.message.contains("nodes `a`, `b`, `c` and 2 more do not"),
            "{}",
            choice.message
        );
    }

    #[test]
    fn nodes_without_a_report_stop_a_site_only_where_the_fleet_says_so() {
        let nodes = [node("a", GOOD), silent("b"), node("c", &[("cilium", "unknown")])];
        let allowed = check(Some("cilium"), &nodes, UnknownNodes::Allow).expect("asked");
        assert_eq!(allowed.stop, None);
        assert!(
            allowed.message.contains("nodes `b`, `c` have not reported"),
            "{}",
            allowed.message
        );
        let stopped = check(Some("cilium"), &nodes, UnknownNodes::Stop).expect("asked");
        assert!(stopped.stop.expect("stopped").hint.contains("unknownNodes"));
        let auto = check(Some("auto"), &nodes, UnknownNodes::Stop).expect("asked");
        assert!(auto.stop.expect("stopped").message.contains("`b`"));
    }
}
