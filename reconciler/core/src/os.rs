//! Which version of the appliance's OS each site should run, and what keeps a version from one.
//!
//! [`Channels`] are the `os/*.yaml` of a commit. [`target`] says what a site wants; [`judge`] whether it gets that, and how its
//! nodes fare. The driver puts the order on the Nodes and the judgement into the Site's status.

use crate::network::{NODES_NAMED_MAX, Verdict};
use crate::repository::{place, problem};
use crate::suggest::nearest;
use crate::yaml::Position;
use skerry_api::fleet::os::{
    OsOrder, OsPolicy, OsProgress, OsReleaseSpec, OsStep, WINDOWS_MAX, is_version,
};
use skerry_api::fleet::v1alpha1::{Problem, SiteOs};
use std::collections::BTreeMap;

/// Longest name of a time zone that is asked for.
const ZONE_LEN_MAX: usize = 64;

/// The channels of one commit, by name.
#[derive(Debug, Default)]
pub(crate) struct Channels(BTreeMap<String, Channel>);

#[derive(Debug)]
struct Channel {
    spec: OsReleaseSpec,
    place: String,
}

impl Channels {
    /// Adds a channel; returns what is wrong with it.
    pub(crate) fn add(
        &mut self,
        file: &str,
        at: Position,
        name: &str,
        spec: OsReleaseSpec,
    ) -> Option<Problem> {
        let wrong =
            |message: String, hint: &str| Some(problem(file, at, &message, Some(hint.to_owned())));
        if !is_version(&spec.version) {
            let message = format!("`{}` cannot be a version", spec.version);
            return wrong(message, "take what `skerry image publish` prints");
        }
        let verdict = |(_, word): &(&String, &String)| Verdict::parse(word) == Verdict::Unknown;
        if let Some((profile, word)) = spec.kernel.iter().find(verdict) {
            let message = format!("`{word}` is no verdict over `{profile}`");
            return wrong(message, "qualified, degraded or unsupported");
        }
        if let Some(known) = self.0.get(name) {
            let message = format!("channel `{name}` is already defined at {}", known.place);
            return wrong(message, "rename or remove one of the two");
        }
        self.0.insert(name.to_owned(), Channel { spec, place: place(file, at) });
        None
    }

    /// What a site that follows `channel` wants; what is wrong with that, without a place.
    pub(crate) fn target(
        &self,
        channel: Option<&str>,
        policy: Option<&OsPolicy>,
    ) -> (Option<Target>, Option<Problem>) {
        let policy = policy.cloned().unwrap_or_default();
        if let Some((message, hint)) = wrong_policy(&policy) {
            return (None, Some(Problem { message, hint: Some(hint), ..Problem::default() }));
        }
        let Some(channel) = channel else { return (None, None) };
        let Some(known) = self.0.get(channel) else {
            let near = nearest(channel, self.0.keys().map(String::as_str));
            let hint = near.map_or_else(
                || {
                    format!(
                        "add `os/{channel}.yaml` (`skerry image publish` prints one), or remove `osChannel`"
                    )
                },
                |near| format!("did you mean `{near}`?"),
            );
            let message = format!("there is no OsRelease `{channel}` in `os/`");
            return (None, Some(Problem { message, hint: Some(hint), ..Problem::default() }));
        };
        let OsReleaseSpec { version, counter, digest, kernel, trust, .. } = known.spec.clone();
        let channel = channel.to_owned();
        let order = OsOrder { channel, version, counter, digest, trust, policy };
        (Some(Target { order, kernel }), None)
    }
}

fn wrong_policy(policy: &OsPolicy) -> Option<(String, String)> {
    if policy.windows.len() > WINDOWS_MAX {
        let message = format!("`os.windows` has {} entries", policy.windows.len());
        return Some((message, format!("at most {WINDOWS_MAX}")));
    }
    if let Some(zone) = &policy.zone {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"/_+-".contains(&byte);
        let bad = zone.is_empty() || zone.len() > ZONE_LEN_MAX || !zone.bytes().all(allowed);
        if bad {
            let message = format!("`{zone}` is no time zone");
            return Some((message, "as in `Europe/Lisbon`; without it the times are UTC".into()));
        }
    }
    if policy.bytes_per_second == Some(0) {
        let message = "`os.bytesPerSecond: 0` would fetch nothing".to_owned();
        return Some((message, "`hold: true` keeps a site as it is".into()));
    }
    None
}

/// What a site's nodes should run.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// What each of them is told.
    pub order: OsOrder,
    /// Verdicts over the version's kernel; empty when nothing is known of it.
    pub kernel: BTreeMap<String, String>,
}

/// What a node says of its OS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeOs {
    /// Its name.
    pub name: String,
    /// The version that it runs; none: it is no appliance, or has not joined.
    pub version: Option<String>,
    /// How far it is.
    pub progress: OsProgress,
}

/// How a site is with its target, given the networks that it uses (its CNI's profile and the one of its proxy).
///
/// A version whose kernel is known not to carry one of them is kept from the site: [`SiteOs::stopped`].
pub fn judge(target: &Target, networks: &[&str], nodes: &[NodeOs]) -> SiteOs {
    let OsOrder { channel, version, policy, .. } = &target.order;
    let appliances = || nodes.iter().filter(|node| node.version.is_some());
    let current = appliances().filter(|node| node.version.as_ref() == Some(version)).count();
    let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    let mut said = SiteOs {
        channel: channel.clone(),
        version: version.clone(),
        nodes_current: count(current),
        nodes_total: count(appliances().count()),
        ..SiteOs::default()
    };
    let lost = networks
        .iter()
        .find(|network| target.kernel.get(**network).is_some_and(|word| word == "unsupported"));
    let behind: Vec<&NodeOs> =
        appliances().filter(|node| node.version.as_ref() != Some(version)).collect();
    if let Some(network) = lost {
        said.stopped = true;
        said.message = format!(
            "version {version}: its kernel does not carry `{network}`, which the site uses"
        );
        said.hint = Some("keep the site on another channel, or change its `cni`".into());
    } else if let Some(node) = behind.iter().find(|node| node.progress.step == OsStep::Failed) {
        said.message = format!("node `{}`: {}", node.name, node.progress.reason);
        said.hint = Some(node.progress.hint.clone()).filter(|hint| !hint.is_empty());
    } else if policy.hold == Some(true) && !behind.is_empty() {
        said.message = format!("held back: version {version}");
    } else if behind.is_empty() {
        said.message = match current {
            0 => "no node of the site is an appliance".into(),
            _ => format!("version {version}"),
        };
    } else {
        let named: Vec<String> = behind
            .iter()
            .take(NODES_NAMED_MAX)
            .map(|node| {
                let OsProgress { step, percent, .. } = &node.progress;
                let running = node.version.as_deref().unwrap_or_default();
                // A node that has not seen the order yet says nothing of it.
                match (node.progress.version == *version, percent) {
                    (true, Some(percent)) => format!("`{}` {} {percent} %", node.name, step.word()),
                    (true, None) => format!("`{}` {}", node.name, step.word()),
                    (false, _) => format!("`{}` runs {running}", node.name),
                }
            })
            .collect();
        let more = behind.len() - named.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        said.message = format!("to version {version}: {}{more}", named.join(", "));
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn target(kernel: &[(&str, &str)]) -> Target {
        let kernel: BTreeMap<_, _> =
            kernel.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let spec: OsReleaseSpec = serde_json::from_value(json!({"version": "2", "counter": 2,
            "digest": format!("sha256:{}", "a".repeat(64)), "kernel": kernel}))
        .expect("a spec");
        let mut channels = Channels::default();
        assert_eq!(channels.add("os/stable.yaml", Position::default(), "stable", spec), None);
        channels.target(Some("stable"), None).0.expect("a target")
    }

    fn node(name: &str, version: &str, step: OsStep) -> NodeOs {
        let progress = OsProgress { version: "2".into(), step, ..OsProgress::default() };
        NodeOs { name: name.into(), version: Some(version.into()), progress }
    }

    #[test]
    fn a_site_says_which_nodes_are_behind_and_how_far() {
        let nodes = [
            node("a", "2", OsStep::Current),
            node("b", "1", OsStep::Waiting),
            NodeOs { name: "c".into(), ..NodeOs::default() },
        ];
        let said = judge(&target(&[]), &[], &nodes);
        assert_eq!((said.nodes_current, said.nodes_total, said.stopped), (1, 2, false));
        assert_eq!(said.message, "to version 2: `b` waiting");
        assert_eq!(judge(&target(&[]), &[], &nodes[..1]).message, "version 2");
        let mut failed = node("b", "1", OsStep::Failed);
        failed.progress.reason = "containerd did not start".into();
        let said = judge(&target(&[]), &[], &[failed]);
        assert_eq!(said.message, "node `b`: containerd did not start");
    }

    #[test]
    fn a_version_whose_kernel_lost_the_sites_network_is_kept_from_it() {
        let target = target(&[("cilium", "unsupported"), ("flannel-vxlan", "degraded")]);
        let said = judge(&target, &["cilium"], &[node("a", "1", OsStep::Current)]);
        assert!(said.stopped && said.message.contains("`cilium`"), "{said:?}");
        assert!(!judge(&target, &["flannel-vxlan"], &[]).stopped);
        assert!(!judge(&target, &["calico-ebpf"], &[]).stopped);
    }

    #[test]
    fn what_a_site_cannot_mean_is_told_with_a_hint() {
        let mut channels = Channels::default();
        let spec = |version: &str| -> OsReleaseSpec {
            serde_json::from_value(json!({"version": version, "counter": 1, "digest": format!("sha256:{}", "a".repeat(64))}))
                .expect("a spec")
        };
        assert_eq!(channels.add("os/a.yaml", Position::default(), "stable", spec("1")), None);
        let twice =
            channels.add("os/b.yaml", Position::default(), "stable", spec("1")).expect("told");
        assert!(twice.message.contains("already defined"), "{twice}");
        assert!(channels.add("os/b.yaml", Position::default(), "beta", spec("a/b")).is_some());
        let (_, wrong) = channels.target(Some("stabel"), None);
        assert_eq!(wrong.expect("told").hint.as_deref(), Some("did you mean `stable`?"));
        let policy = OsPolicy { zone: Some("Lis bon".into()), ..OsPolicy::default() };
        assert!(channels.target(Some("stable"), Some(&policy)).1.is_some());
        let policy = OsPolicy { bytes_per_second: Some(0), ..OsPolicy::default() };
        assert!(channels.target(None, Some(&policy)).1.is_some());
        assert_eq!(channels.target(None, None), (None, None));
    }
}
