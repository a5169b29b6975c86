//! Rules: where data of applications goes between HTTP in the cloud and the buses of the nodes.
//!
//! [`Rules`] holds the Rule and RuleEndpoint objects of the cluster and answers three questions: which rule takes this
//! HTTP request, which takes this upload of a node, and what a node's buses have to follow. The shell
//! (`cloudcore/src/router.rs`) serves, calls and counts.
//!
//! A rule joins a source endpoint to a target endpoint: `rest` to `eventbus` or `servicebus`, `eventbus` or
//! `servicebus` to `rest`. KubeEdge takes other pairs and fails at the first message; here they do nothing and say so.
//! As there, an HTTP request is `/<node>/<namespace of the rule>/<path of the source>[/<more>]`.
//!
//! No I/O.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/router/{rule,provider,listener,utils},
//! staging/src/github.com/kubeedge/api/apis/rules/v1.

use serde_json::Value;
use std::collections::BTreeMap;

/// Rules and endpoints held at most, of each; thousands would be a misuse of this API.
pub const RULES_MAX: usize = 4_096;

/// Namespace and name.
pub type Id = (String, String);

/// The rules of the cluster.
#[derive(Debug, Default)]
pub struct Rules {
    endpoints: BTreeMap<Id, Endpoint>,
    rules: BTreeMap<Id, Value>,
}

#[derive(Debug, PartialEq, Eq)]
enum Endpoint {
    Rest,
    EventBus,
    ServiceBus { port: String },
}

/// Where data comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// HTTP requests to this path below the namespace, without slashes at its ends.
    Rest(String),
    /// A topic of a node's broker.
    Topic {
        /// The node.
        node: String,
        /// As the node gives it: below the rule's namespace.
        topic: String,
    },
    /// Calls of a node's applications to this URL.
    Calls {
        /// The node.
        node: String,
        /// As the rule has it.
        url: String,
    },
}

/// Where data goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// To this URL, as a POST.
    Rest(String),
    /// To a topic of the node's broker.
    Topic(String),
    /// To an HTTP server on the node.
    Service {
        /// Its port there.
        port: String,
        /// Path of the request.
        path: String,
    },
}

/// What came for a rule, and where it goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Routed {
    /// The rule, for its counters.
    pub rule: Id,
    /// The node that it comes from or goes to.
    pub node: String,
    /// Where it goes, with what the request adds to the path or topic.
    pub target: Target,
}

/// Something that a node's buses follow for the cloud.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Follow {
    /// The node.
    pub node: String,
    /// The topic, or the URL of the service bus.
    pub what: String,
    /// Whether it is a topic.
    pub is_topic: bool,
}

impl Rules {
    /// Takes a RuleEndpoint. Returns why it is of no use, if so.
    pub fn set_endpoint(&mut self, object: &Value) -> Option<String> {
        let id = id(object)?;
        let endpoint = match object["spec"]["ruleEndpointType"].as_str().unwrap_or_default() {
            "rest" => Endpoint::Rest,
            "eventbus" => Endpoint::EventBus,
            "servicebus" => match object["spec"]["properties"]["service_port"].as_str() {
                Some(port) if port.parse::<u16>().is_ok() => {
                    Endpoint::ServiceBus { port: port.into() }
                }
                // As the source of a rule it needs none.
                _ => Endpoint::ServiceBus { port: String::new() },
            },
            other => {
                self.endpoints.remove(&id);
                return Some(format!("`{other}` is no type of an endpoint"));
            }
        };
        if self.endpoints.len() >= RULES_MAX && !self.endpoints.contains_key(&id) {
            return Some(format!("there are {RULES_MAX} endpoints already"));
        }
        self.endpoints.insert(id, endpoint);
        None
    }

    /// The RuleEndpoint is gone.
    pub fn remove_endpoint(&mut self, id: &Id) {
        self.endpoints.remove(id);
    }

    /// Takes a Rule. Returns why it is of no use now, if so; an endpoint that comes later mends it.
    pub fn set_rule(&mut self, object: &Value) -> Option<String> {
        let id = id(object)?;
        if self.rules.len() >= RULES_MAX && !self.rules.contains_key(&id) {
            return Some(format!("there are {RULES_MAX} rules already"));
        }
        self.rules.insert(id.clone(), object["spec"].clone());
        self.resolve(&id).err()
    }

    /// The Rule is gone.
    pub fn remove_rule(&mut self, id: &Id) {
        self.rules.remove(id);
    }

    /// Keeps only these; a list of one of the kinds is complete.
    pub fn listed(&mut self, is_rule: bool, ids: &std::collections::BTreeSet<Id>) {
        match is_rule {
            true => self.rules.retain(|id, _| ids.contains(id)),
            false => self.endpoints.retain(|id, _| ids.contains(id)),
        }
    }

    /// What nodes follow for the rules that are of use.
    pub fn follows(&self) -> std::collections::BTreeSet<Follow> {
        let sources = self.rules.keys().filter_map(|id| Some(self.resolve(id).ok()?.0));
        sources
            .filter_map(|source| match source {
                Source::Rest(_) => None,
                Source::Topic { node, topic } => Some(Follow { node, what: topic, is_topic: true }),
                Source::Calls { node, url } => Some(Follow { node, what: url, is_topic: false }),
            })
            .collect()
    }

    /// The rule for an HTTP request. `uri` is path and query as they came.
    pub fn route_request(&self, uri: &str) -> Option<Routed> {
        let mut parts = uri.strip_prefix('/')?.splitn(3, '/');
        let (node, namespace, rest) = (parts.next()?, parts.next()?, parts.next()?);
        let path = rest.split('?').next().unwrap_or_default();
        let of_namespace = self.rules.keys().filter(|id| id.0 == namespace);
        let fitting = of_namespace.filter_map(|id| {
            let (source, target) = self.resolve(id).ok()?;
            let Source::Rest(own) = source else { return None };
            fits(&own, path).then_some((own, id, target))
        });
        // The longest path is the most exact one.
        let (own, rule, target) = fitting
            .max_by_key(|(own, _, _)| (own.split('/').count(), !own.contains('{'), own.len()))?;
        let more = rest.strip_prefix(&own).unwrap_or(rest);
        let target = match target {
            Target::Topic(topic) => Target::Topic(joined(&topic, more)),
            Target::Service { port, path } => Target::Service { port, path: joined(&path, more) },
            Target::Rest(_) => return None,
        };
        Some(Routed { rule: rule.clone(), node: node.into(), target })
    }

    /// The rule for an upload of `node`: a topic, or a URL of its service bus.
    pub fn route_upload(&self, node: &str, what: &str, is_topic: bool) -> Option<Routed> {
        self.rules.keys().find_map(|id| {
            let (source, target) = self.resolve(id).ok()?;
            let fits = match source {
                Source::Topic { node: of, topic } => is_topic && of == node && topic == what,
                Source::Calls { node: of, url } => !is_topic && of == node && url == what,
                Source::Rest(_) => false,
            };
            fits.then(|| Routed { rule: id.clone(), node: node.into(), target })
        })
    }

    fn resolve(&self, id: &Id) -> Result<(Source, Target), String> {
        let spec = self.rules.get(id).ok_or("there is no such rule")?;
        let endpoint = |field: &str| {
            let name = spec[field].as_str().unwrap_or_default();
            let id = (id.0.clone(), name.to_owned());
            self.endpoints.get(&id).ok_or_else(|| format!("there is no endpoint `{}/{name}`", id.0))
        };
        let text = |part: &str, field: &str| {
            let value = spec[part][field].as_str().filter(|text| !text.is_empty());
            value.map(str::to_owned).ok_or_else(|| format!("{part} has no `{field}`"))
        };
        let (from, to) = (endpoint("source")?, endpoint("target")?);
        let source = match from {
            Endpoint::Rest => {
                Source::Rest(text("sourceResource", "path")?.trim_matches('/').to_owned())
            }
            Endpoint::EventBus => Source::Topic {
                node: text("sourceResource", "node_name")?,
                topic: below(&id.0, &text("sourceResource", "topic")?),
            },
            Endpoint::ServiceBus { .. } => Source::Calls {
                node: text("sourceResource", "node_name")?,
                url: text("sourceResource", "target_url")?,
            },
        };
        let target = match to {
            Endpoint::Rest => Target::Rest(text("targetResource", "resource")?),
            Endpoint::EventBus => Target::Topic(text("targetResource", "topic")?),
            Endpoint::ServiceBus { port } if port.is_empty() => {
                return Err("the target endpoint has no `service_port`".into());
            }
            Endpoint::ServiceBus { port } => {
                Target::Service { port: port.clone(), path: text("targetResource", "path")? }
            }
        };
        match (&source, &target) {
            (Source::Rest(_), Target::Rest(_)) => {
                Err("a rule from HTTP to HTTP is not supported".into())
            }
            (Source::Rest(_), _) | (_, Target::Rest(_)) => Ok((source, target)),
            _ => Err("a rule from a node to a node is not supported".into()),
        }
    }
}

fn id(object: &Value) -> Option<Id> {
    let text = |field: &str| object["metadata"][field].as_str().map(str::to_owned);
    Some((text("namespace")?, text("name")?))
}

/// A topic below a namespace, with no empty segment and none that points up.
fn below(namespace: &str, topic: &str) -> String {
    let segments = topic.split('/').filter(|segment| !matches!(*segment, "" | "." | ".."));
    std::iter::once(namespace).chain(segments).collect::<Vec<_>>().join("/")
}

/// Whether a path is the pattern, or below it. `{…}` stands for any one segment.
fn fits(pattern: &str, path: &str) -> bool {
    let mut found = path.trim_end_matches('/').split('/');
    pattern.split('/').all(|wanted| {
        let is_any = wanted.starts_with('{') && wanted.ends_with('}');
        found.next().is_some_and(|found| (is_any && !found.is_empty()) || wanted == found)
    })
}

fn joined(base: &str, more: &str) -> String {
    if more.is_empty() {
        return base.to_owned();
    }
    if more.starts_with('?') {
        return format!("{base}{more}");
    }
    format!("{}/{}", base.trim_end_matches('/'), more.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn endpoint(name: &str, kind: &str, port: &str) -> Value {
        let mut spec = json!({"ruleEndpointType": kind});
        if !port.is_empty() {
            spec["properties"] = json!({"service_port": port});
        }
        json!({"metadata": {"namespace": "ns", "name": name}, "spec": spec})
    }

    fn rule(name: &str, source: &str, from: Value, target: &str, to: Value) -> Value {
        json!({"metadata": {"namespace": "ns", "name": name}, "spec": {
            "source": source, "sourceResource": from, "target": target, "targetResource": to}})
    }

    fn rules() -> Rules {
        let mut rules = Rules::default();
        for (name, kind, port) in [
            ("http", "rest", ""),
            ("mqtt", "eventbus", ""),
            ("svc", "servicebus", "8080"),
            ("calls", "servicebus", ""),
        ] {
            assert_eq!(rules.set_endpoint(&endpoint(name, kind, port)), None);
        }
        for rule in [
            rule("lamp", "http", json!({"path": "/lamp"}), "mqtt", json!({"topic": "/lamp/set"})),
            rule("any", "http", json!({"path": "/{room}/door"}), "svc", json!({"path": "/open"})),
            rule("exact", "http", json!({"path": "/hall/door/"}), "svc", json!({"path": "/hall"})),
            rule(
                "up",
                "mqtt",
                json!({"topic": "/lamp", "node_name": "edge1"}),
                "http",
                json!({"resource": "http://a/b"}),
            ),
            rule(
                "url",
                "calls",
                json!({"target_url": "http://c/d", "node_name": "edge1"}),
                "http",
                json!({"resource": "http://e/f"}),
            ),
        ] {
            assert_eq!(rules.set_rule(&rule), None);
        }
        rules
    }

    #[test]
    fn requests_find_the_most_exact_rule_and_take_the_rest_of_their_path_along() {
        let rules = rules();
        let service = |path: &str| Target::Service { port: "8080".into(), path: path.into() };
        for (uri, expected) in [
            ("/edge1/ns/lamp", Some(("lamp", Target::Topic("/lamp/set".into())))),
            ("/edge1/ns/lamp/", Some(("lamp", Target::Topic("/lamp/set/".into())))),
            ("/edge1/ns/lamp/red", Some(("lamp", Target::Topic("/lamp/set/red".into())))),
            ("/edge1/ns/hall/door?x=1", Some(("exact", service("/hall?x=1")))),
            ("/edge1/ns/attic/door", Some(("any", service("/open/attic/door")))),
            ("/edge1/ns/lamps", None),
            ("/edge1/other/lamp", None),
            ("/edge1/ns", None),
            ("/", None),
        ] {
            let routed = rules.route_request(uri).map(|routed| (routed.rule.1, routed.target));
            let expected = expected.map(|(rule, target)| (rule.to_owned(), target));
            assert_eq!(routed, expected, "{uri}");
        }
    }

    #[test]
    fn uploads_find_their_rule_and_nodes_follow_what_rules_want() {
        let mut rules = rules();
        let routed = rules.route_upload("edge1", "ns/lamp", true).expect("a rule");
        assert_eq!(routed.target, Target::Rest("http://a/b".into()));
        let routed = rules.route_upload("edge1", "http://c/d", false).expect("a rule");
        assert_eq!(routed.target, Target::Rest("http://e/f".into()));
        assert_eq!(rules.route_upload("edge2", "ns/lamp", true), None);
        assert_eq!(rules.route_upload("edge1", "ns/lamp", false), None);
        let follows: Vec<Follow> = rules.follows().into_iter().collect();
        let follow =
            |what: &str, is_topic| Follow { node: "edge1".into(), what: what.into(), is_topic };
        assert_eq!(follows, [follow("http://c/d", false), follow("ns/lamp", true)]);
        rules.remove_rule(&("ns".into(), "up".into()));
        rules.remove_endpoint(&("ns".into(), "calls".into()));
        assert!(rules.follows().is_empty());
        rules.set_endpoint(&endpoint("calls", "servicebus", ""));
        assert_eq!(rules.follows().len(), 1, "an endpoint that comes back mends its rules");
    }

    #[test]
    fn rules_of_no_use_say_why() {
        let mut rules = rules();
        let mut why = |source: &str, from: Value, target: &str, to: Value| {
            rules.set_rule(&rule("x", source, from, target, to)).unwrap_or_default()
        };
        assert!(why("none", json!({}), "mqtt", json!({})).contains("no endpoint"));
        assert!(why("http", json!({}), "mqtt", json!({"topic": "t"})).contains("`path`"));
        assert!(
            why("http", json!({"path": "p"}), "calls", json!({"path": "/"}))
                .contains("service_port")
        );
        assert!(
            why("http", json!({"path": "p"}), "http", json!({"resource": "u"}))
                .contains("HTTP to HTTP")
        );
        assert!(
            why("mqtt", json!({"topic": "t", "node_name": "n"}), "svc", json!({"path": "/"}))
                .contains("node to a node")
        );
        assert!(
            rules
                .set_endpoint(&endpoint("z", "kafka", ""))
                .is_some_and(|why| why.contains("kafka"))
        );
    }

    #[test]
    fn no_more_rules_are_held_than_the_bound() {
        let mut rules = Rules::default();
        for number in 0..RULES_MAX {
            rules.set_rule(&rule(&number.to_string(), "a", json!({}), "b", json!({})));
        }
        let more = rules.set_rule(&rule("more", "a", json!({}), "b", json!({})));
        assert!(more.is_some_and(|why| why.contains("already")));
    }
}
