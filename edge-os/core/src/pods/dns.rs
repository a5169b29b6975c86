//! How a pod resolves names: its resolver settings, host name and `hosts` file.
//!
//! Source: kubernetes/kubernetes pkg/kubelet/network/dns/dns.go, pkg/kubelet/kubelet_pods.go
//! (`ensureHostsFile`, `GeneratePodHostNameAndDomain`).

use k8s_openapi::api::core::v1::{HostAlias, Pod, PodSpec};

use super::host_network;

const SERVERS_MAX: usize = 3;
const SEARCHES_MAX: usize = 32;
const SEARCH_CHARS_MAX: usize = 2048;
const HOST_NAME_MAX: usize = 63;

/// Resolver settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// What the node knows about names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeDns {
    pub host: Resolver,
    pub cluster_servers: Vec<String>,
    pub cluster_domain: String,
}

/// A pod's resolver settings, and what users should be told about them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodDns {
    pub resolver: Resolver,
    /// The pod wants the cluster's DNS and the node knows none.
    pub missing_cluster_dns: bool,
    /// More was asked for than a resolver takes.
    pub cut: bool,
}

/// Reads a resolver file.
pub fn parse_resolv_conf(text: &str) -> Resolver {
    let mut resolver = Resolver::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default();
        let rest: Vec<String> = words.map(str::to_owned).collect();
        match key {
            "nameserver" => resolver.servers.extend(rest.into_iter().take(1)),
            "search" => resolver.searches = rest,
            "options" => resolver.options.extend(rest),
            _ => {}
        }
    }
    resolver
}

/// Returns the pod's resolver settings.
pub fn pod_dns(pod: &Pod, node: &NodeDns) -> PodDns {
    let Some(spec) = &pod.spec else { return PodDns::default() };
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let wants_cluster = match spec.dns_policy.as_deref() {
        Some("Default" | "None") => false,
        Some("ClusterFirstWithHostNet") => true,
        _ => !host_network(spec),
    };
    let none = spec.dns_policy.as_deref() == Some("None");
    let missing_cluster_dns = wants_cluster && node.cluster_servers.is_empty();
    let mut resolver = if none {
        Resolver::default()
    } else if wants_cluster && !missing_cluster_dns {
        let domain = &node.cluster_domain;
        let mut searches =
            vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
        searches.extend(node.host.searches.iter().cloned());
        Resolver {
            servers: node.cluster_servers.clone(),
            searches,
            options: vec!["ndots:5".to_owned()],
        }
    } else {
        node.host.clone()
    };
    if let Some(own) = &spec.dns_config {
        resolver.servers.extend(own.nameservers.iter().flatten().cloned());
        resolver.searches.extend(own.searches.iter().flatten().cloned());
        for option in own.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            let text = match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name.clone(),
            };
            resolver.options.retain(|old| old.split(':').next() != Some(name.as_str()));
            resolver.options.push(text);
        }
    }
    dedupe(&mut resolver.servers);
    dedupe(&mut resolver.searches);
    let cut = cut(&mut resolver);
    PodDns { resolver, missing_cluster_dns, cut }
}

/// Returns the pod's host name.
pub fn host_name(pod: &Pod) -> String {
    let spec = pod.spec.as_ref();
    let wanted = spec
        .and_then(|spec| spec.hostname_override.clone().or_else(|| spec.hostname.clone()))
        .filter(|name| !name.is_empty())
        .or_else(|| pod.metadata.name.clone())
        .unwrap_or_default();
    let short: String = wanted.chars().take(HOST_NAME_MAX).collect();
    short.trim_end_matches(['-', '.']).to_owned()
}

/// Returns the content of the pod's `hosts` file. `node_hosts` is the node's own.
pub fn hosts_file(pod: &Pod, ips: &[String], node_hosts: &str, cluster_domain: &str) -> String {
    let Some(spec) = &pod.spec else { return String::new() };
    let mut text = if host_network(spec) {
        format!("# Kubernetes-managed hosts file (host network).\n{node_hosts}")
    } else {
        let mut text = String::from(
            "# Kubernetes-managed hosts file.\n\
             127.0.0.1\tlocalhost\n\
             ::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::0\tip6-localnet\n\
             fe00::0\tip6-mcastprefix\n\
             fe00::1\tip6-allnodes\n\
             fe00::2\tip6-allrouters\n",
        );
        let host_name = host_name(pod);
        for ip in ips {
            match full_name(pod, spec, &host_name, cluster_domain) {
                Some(full) => text.push_str(&format!("{ip}\t{full}\t{host_name}\n")),
                None => text.push_str(&format!("{ip}\t{host_name}\n")),
            }
        }
        text
    };
    let aliases = spec.host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for HostAlias { ip, hostnames } in aliases {
            let names = hostnames.as_deref().unwrap_or_default().join("\t");
            text.push_str(&format!("{ip}\t{names}\n"));
        }
    }
    text
}

fn full_name(pod: &Pod, spec: &PodSpec, host_name: &str, cluster_domain: &str) -> Option<String> {
    let subdomain = spec.subdomain.as_deref().filter(|name| !name.is_empty())?;
    let namespace = pod.metadata.namespace.as_deref()?;
    Some(format!("{host_name}.{subdomain}.{namespace}.svc.{cluster_domain}"))
}

fn dedupe(list: &mut Vec<String>) {
    let mut seen = std::collections::BTreeSet::new();
    list.retain(|item| seen.insert(item.clone()));
}

fn cut(resolver: &mut Resolver) -> bool {
    let before = resolver.servers.len() + resolver.searches.len();
    resolver.servers.truncate(SERVERS_MAX);
    resolver.searches.truncate(SEARCHES_MAX);
    while resolver.searches.join(" ").len() > SEARCH_CHARS_MAX {
        resolver.searches.pop();
    }
    resolver.servers.len() + resolver.searches.len() < before
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web-0", "namespace": "n"}, "spec": spec,
        }))
        .expect("pod parses")
    }

    fn node(cluster: &[&str]) -> NodeDns {
        NodeDns {
            host: parse_resolv_conf("nameserver 9.9.9.9\nsearch lan\noptions rotate # x\n"),
            cluster_servers: cluster.iter().map(|ip| (*ip).to_owned()).collect(),
            cluster_domain: "cluster.local".to_owned(),
        }
    }

    #[test]
    fn policy_chooses_between_cluster_and_node() {
        let cluster =
            (vec!["10.96.0.10"], "n.svc.cluster.local svc.cluster.local cluster.local lan");
        let host = (vec!["9.9.9.9"], "lan");
        let base = json!({"containers": []});
        for (policy, host_net, expected) in [
            (Value::Null, false, &cluster),
            (json!("ClusterFirst"), true, &host),
            (json!("ClusterFirstWithHostNet"), true, &cluster),
            (json!("Default"), false, &host),
        ] {
            let mut spec = base.clone();
            spec["dnsPolicy"] = policy.clone();
            spec["hostNetwork"] = json!(host_net);
            let made = pod_dns(&pod(spec), &node(&["10.96.0.10"])).resolver;
            assert_eq!(made.servers, expected.0, "{policy}");
            assert_eq!(made.searches.join(" "), expected.1, "{policy}");
        }
    }

    #[test]
    fn without_cluster_dns_the_node_is_used_and_users_are_told() {
        let made = pod_dns(&pod(json!({"containers": []})), &node(&[]));
        assert!(made.missing_cluster_dns);
        assert_eq!(made.resolver.servers, ["9.9.9.9"]);
    }

    #[test]
    fn own_settings_are_merged_and_bounded() {
        let spec = json!({"containers": [], "dnsPolicy": "ClusterFirst", "dnsConfig": {
            "nameservers": ["10.96.0.10", "1.1.1.1", "1.1.1.2", "1.1.1.3"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}});
        let made = pod_dns(&pod(spec), &node(&["10.96.0.10"]));
        assert_eq!(made.resolver.servers, ["10.96.0.10", "1.1.1.1", "1.1.1.2"]);
        assert_eq!(made.resolver.options, ["ndots:2", "edns0"]);
        assert!(made.cut);
    }

    #[test]
    fn hosts_file_names_the_pod_and_its_aliases() {
        let spec = json!({"containers": [], "subdomain": "web",
            "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]});
        let text = hosts_file(&pod(spec), &["10.0.0.2".to_owned()], "", "cluster.local");
        assert!(text.contains("10.0.0.2\tweb-0.web.n.svc.cluster.local\tweb-0\n"));
        assert!(text.ends_with("# Entries added by HostAliases.\n1.2.3.4\ta\tb\n"));
    }

    #[test]
    fn host_name_is_cut_without_a_dangling_dash() {
        let mut long = pod(json!({"containers": []}));
        long.metadata.name = Some(format!("{}-x", "a".repeat(62)));
        assert_eq!(host_name(&long), "a".repeat(62));
    }
}
