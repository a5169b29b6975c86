//! Which objects the applications on each node watch, and what each connected node is to be told.
//!
//! A watch of an application is a [`Listener`]: a resource and selectors. There is one watch of the API per resource,
//! however many nodes listen; what it says comes in as [`Watches::changed`], [`Watches::deleted`] and
//! [`Watches::listed`]. What a node is to be told waits as keys and is written from the state of the moment by
//! [`Watches::take`], so a slow node costs keys.
//!
//! Differences to KubeEdge: an object that leaves a selector is deleted on the node (there it stays for ever), an
//! object that went away while a node was gone is deleted when it is back, and nothing is told twice to one node for
//! two watches. As there, watches live in memory and outlive a connection; after a restart of CloudCore the edge says
//! again what it watches.
//!
//! The shell's task in `cloudcore/src/applications` is the caller, and gives what it takes to
//! [`crate::downstream::Input::Pushed`]. No I/O, no clock.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/dynamiccontroller/application/{eventhandler,listener,listener_manager}.go.

use super::Resource;
use super::filter;
use super::selector::Selector;
use super::topology::Topology;
use crate::downstream::{Key, Watched};
use serde_json::Value;
use skerry_protocol::resource::CLUSTER_SCOPE;
use skerry_protocol::{Operation, ResourcePath};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// Watches of one node. KubeEdge's edge shares equal ones, and a node has no more kinds of applications than this.
pub const LISTENERS_MAX: usize = 256;
/// Resources that are watched at the same time, for all nodes. Each costs a watch of the API and a copy of its objects.
pub const RESOURCES_MAX: usize = 256;
/// Connections of a node through which a delete is said again: it may have been lost with the first one.
const FAREWELLS: u8 = 3;

/// One watch of an application.
#[derive(Debug, Clone)]
pub struct Listener {
    /// Id of the application.
    pub id: String,
    /// What is watched.
    pub resource: Resource,
    /// Which of it.
    pub selector: Selector,
}

/// Why a watch is not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooMany {
    /// This node has enough.
    #[error("node `{0}` has {LISTENERS_MAX} watches already")]
    Listeners(String),
    /// This hub has enough.
    #[error("{RESOURCES_MAX} resources are watched already")]
    Resources,
}

/// What the owner has to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Watch this resource.
    Start(Resource),
    /// Nobody watches it any more.
    Stop(Resource),
    /// Whether what [`Topology::sources`] names has to be followed, and given as [`Watches::topology_changed`].
    Follow(bool),
}

/// One object for one node.
#[derive(Debug)]
pub struct Push {
    /// Where it goes on the wire.
    pub key: Key,
    /// The object; its last state for a delete.
    pub object: Arc<Watched>,
    /// `insert`, `update` or `delete`.
    pub operation: Operation,
}

/// All watches of all nodes.
#[derive(Debug, Default)]
pub struct Watches {
    nodes: BTreeMap<Arc<str>, Node>,
    resources: BTreeMap<Resource, Watch>,
    /// Connected nodes that are to be told something.
    waiting: BTreeSet<Arc<str>>,
    outputs: VecDeque<Output>,
    topology: Topology,
    /// Whether the topology is followed; then, which of its sources are complete.
    followed: Option<BTreeSet<String>>,
}

#[derive(Debug, Default)]
struct Node {
    connected: bool,
    listeners: BTreeMap<String, Listener>,
    /// What the node has been told.
    given: BTreeMap<Key, Given>,
    /// What it is to be told.
    dirty: BTreeMap<Key, Resource>,
}

#[derive(Debug)]
enum Given {
    /// In this version.
    Held(Arc<Watched>),
    /// That it is gone, this often still.
    Gone(Arc<Watched>, u8),
}

#[derive(Debug, Default)]
struct Watch {
    /// Nodes that listen, with the number of their watches.
    listeners: BTreeMap<Arc<str>, usize>,
    objects: BTreeMap<Key, Object>,
}

#[derive(Debug)]
struct Object {
    watched: Arc<Watched>,
    /// Nodes with a watch that it matches.
    nodes: BTreeSet<Arc<str>>,
}

impl Watches {
    /// Adds a watch of `node`; all that matches is then to be told. A watch with the id of another one replaces it.
    ///
    /// # Errors
    ///
    /// [`TooMany`], with nothing changed.
    pub fn add(&mut self, node: &str, listener: Listener) -> Result<(), TooMany> {
        let known = self.nodes.get(node);
        let has = |node: &Node| node.listeners.contains_key(&listener.id);
        if known.is_some_and(|node| !has(node) && node.listeners.len() >= LISTENERS_MAX) {
            return Err(TooMany::Listeners(node.into()));
        }
        if !self.resources.contains_key(&listener.resource) && self.resources.len() >= RESOURCES_MAX
        {
            return Err(TooMany::Resources);
        }
        self.remove(node, &listener.id);
        let name = self.name(node);
        let watch = self.resources.entry(listener.resource.clone()).or_insert_with(|| {
            self.outputs.push_back(Output::Start(listener.resource.clone()));
            Watch::default()
        });
        *watch.listeners.entry(Arc::clone(&name)).or_default() += 1;
        let entry = self.nodes.entry(Arc::clone(&name)).or_default();
        for (key, object) in &mut watch.objects {
            let value: Value =
                serde_json::from_str(object.watched.text().get()).unwrap_or_default();
            if listener.selector.matches(&value) {
                object.nodes.insert(Arc::clone(&name));
                entry.dirty.insert(key.clone(), listener.resource.clone());
            }
        }
        entry.listeners.insert(listener.id.clone(), listener);
        self.look(&name);
        self.look_at_topology();
        Ok(())
    }

    /// Ends a watch. What the node holds because of it stays there, as with KubeEdge.
    pub fn remove(&mut self, node: &str, id: &str) {
        let Some(entry) = self.nodes.get_mut(node) else { return };
        let Some(listener) = entry.listeners.remove(id) else { return };
        let resource = listener.resource;
        let still = entry.listeners.values().any(|other| other.resource == resource);
        if !still {
            // Without a watch there is no word any more that it is gone; the node's next watch says what there is.
            let token = resource.token();
            entry.given.retain(|key, _| token_of(key) != token);
            entry.dirty.retain(|_, dirty| *dirty != resource);
        }
        let is_empty = entry.listeners.is_empty() && !entry.connected;
        if let Some(watch) = self.resources.get_mut(&resource) {
            if still {
                watch.listeners.entry(node.into()).and_modify(|listeners| *listeners -= 1);
            } else {
                watch.listeners.remove(node);
                watch.objects.values_mut().for_each(|object| {
                    object.nodes.remove(node);
                });
            }
            if watch.listeners.is_empty() {
                self.resources.remove(&resource);
                self.outputs.push_back(Output::Stop(resource));
            }
        }
        self.look(node);
        if is_empty {
            self.nodes.remove(node);
        }
        self.look_at_topology();
    }

    /// Follows the topology of Services while somebody watches what it changes.
    fn look_at_topology(&mut self) {
        let needed = self.resources.keys().any(Topology::concerns);
        if needed != self.followed.is_some() {
            self.followed = needed.then(BTreeSet::new);
            self.topology = Topology::default();
            self.outputs.push_back(Output::Follow(needed));
        }
    }

    /// A node or Service changed, or is gone. Endpoints that were told before are told again with their next change.
    pub fn topology_changed(&mut self, plural: &str, object: &Value, is_gone: bool) {
        match is_gone {
            true => self.topology.deleted(plural, object),
            false => self.topology.changed(plural, object),
        }
    }

    /// All nodes, or all Services, were given; endpoints wait for that.
    pub fn topology_listed(&mut self, plural: &str) {
        if let Some(listed) = &mut self.followed {
            listed.insert(plural.into());
        }
    }

    /// Ids of the watches of `node`.
    pub fn ids(&self, node: &str) -> impl Iterator<Item = &str> {
        self.nodes.get(node).into_iter().flat_map(|node| node.listeners.keys().map(String::as_str))
    }

    /// A new connection of `node` is up: everything that it watches is to be told again.
    pub fn connected(&mut self, node: &str) {
        let name = self.name(node);
        let entry = self.nodes.entry(name).or_default();
        entry.connected = true;
        let resources: BTreeSet<&Resource> =
            entry.listeners.values().map(|listener| &listener.resource).collect();
        let mut dirty = BTreeMap::new();
        for resource in resources {
            let Some(watch) = self.resources.get(resource) else { continue };
            let matching = watch.objects.iter().filter(|(_, object)| object.nodes.contains(node));
            dirty.extend(matching.map(|(key, _)| (key.clone(), resource.clone())));
            let token = resource.token();
            let given = entry.given.keys().filter(|key| token_of(key) == token);
            dirty.extend(given.map(|key| (key.clone(), resource.clone())));
        }
        entry.dirty = dirty;
        self.look(node);
    }

    /// The last connection of `node` has ended.
    pub fn disconnected(&mut self, node: &str) {
        let Some(entry) = self.nodes.get_mut(node) else { return };
        entry.connected = false;
        entry.dirty.clear();
        let is_empty = entry.listeners.is_empty();
        self.look(node);
        if is_empty {
            self.nodes.remove(node);
        }
    }

    /// The API has this object in this version; `apiVersion` and `kind` have to be there.
    pub fn changed(&mut self, resource: &Resource, mut object: Value) {
        let Some(key) = key_of(resource, &object) else { return };
        let Some(watch) = self.resources.get_mut(resource) else { return };
        filter::apply(&mut object);
        let (nodes, waiting) = (&mut self.nodes, &mut self.waiting);
        let wants = |name: &&Arc<str>| {
            nodes.get(*name).is_some_and(|node: &Node| node.wants(resource, &object))
        };
        let matching: BTreeSet<Arc<str>> =
            watch.listeners.keys().filter(wants).map(Arc::clone).collect();
        let Some(watched) = Watched::read(object) else { return };
        let new = Object { watched: Arc::clone(&watched), nodes: matching.clone() };
        let before =
            watch.objects.insert(key.clone(), new).map(|old| old.nodes).unwrap_or_default();
        for name in before.union(&matching) {
            if nodes.get_mut(name).is_some_and(|node| node.mark(&key, resource, &watched)) {
                waiting.insert(Arc::clone(name));
            }
        }
    }

    /// The API has this object no longer; `object` is its last state.
    pub fn deleted(&mut self, resource: &Resource, object: Value) {
        let Some(key) = key_of(resource, &object) else { return };
        let last = Watched::read(object);
        self.forget(resource, &key, last);
    }

    /// A list of `resource` is complete and held these objects, each already given as [`Watches::changed`].
    pub fn listed(&mut self, resource: &Resource, keys: &BTreeSet<Key>) {
        let Some(watch) = self.resources.get(resource) else { return };
        let gone: Vec<Key> =
            watch.objects.keys().filter(|key| !keys.contains(key)).cloned().collect();
        gone.iter().for_each(|key| self.forget(resource, key, None));
    }

    fn forget(&mut self, resource: &Resource, key: &Key, last: Option<Arc<Watched>>) {
        let Some(watch) = self.resources.get_mut(resource) else { return };
        let Some(object) = watch.objects.remove(key) else { return };
        let last = last.unwrap_or(object.watched);
        for name in &object.nodes {
            if self.nodes.get_mut(name).is_some_and(|node| node.mark(key, resource, &last)) {
                self.waiting.insert(Arc::clone(name));
            }
        }
    }

    /// Returns the next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Connected nodes that are to be told something.
    pub fn waiting(&self) -> Vec<Arc<str>> {
        self.waiting.iter().map(Arc::clone).collect()
    }

    /// Takes at most `max` of what `node` is to be told, and no more after bodies of `len_max` bytes.
    pub fn take(&mut self, node: &str, max: usize, len_max: usize) -> Vec<Push> {
        let Some(entry) = self.nodes.get_mut(node).filter(|entry| entry.connected) else {
            return Vec::new();
        };
        let mut pushes = Vec::new();
        let mut len = 0;
        let is_complete =
            self.followed.as_ref().is_none_or(|listed| listed.len() == Topology::sources().len());
        let mut later = Vec::new();
        while pushes.len() < max && len < len_max {
            let Some((key, resource)) = entry.dirty.pop_first() else { break };
            if !is_complete && Topology::concerns(&resource) {
                later.push((key, resource));
                continue;
            }
            let current = self
                .resources
                .get(&resource)
                .and_then(|watch| watch.objects.get(&key))
                .filter(|object| object.nodes.contains(node));
            let (object, operation) = match (current, entry.given.remove(&key)) {
                (Some(current), before) => {
                    let known = matches!(before, Some(Given::Held(_)));
                    let object = near(&self.topology, node, &resource, &current.watched);
                    entry.given.insert(key.clone(), Given::Held(Arc::clone(&object)));
                    (object, if known { Operation::Update } else { Operation::Insert })
                }
                (None, Some(Given::Held(last))) => {
                    entry.given.insert(key.clone(), Given::Gone(Arc::clone(&last), FAREWELLS));
                    (last, Operation::Delete)
                }
                (None, Some(Given::Gone(last, left))) => {
                    if left > 1 {
                        entry.given.insert(key.clone(), Given::Gone(Arc::clone(&last), left - 1));
                    }
                    (last, Operation::Delete)
                }
                (None, None) => continue,
            };
            len += object.text().get().len();
            pushes.push(Push { key, object, operation });
        }
        entry.dirty.extend(later);
        self.look(node);
        pushes
    }

    /// The name of a node; every set of nodes shares its text.
    fn name(&self, node: &str) -> Arc<str> {
        self.nodes.get_key_value(node).map_or_else(|| node.into(), |(name, _)| Arc::clone(name))
    }

    /// Keeps `waiting` true after a change of this node.
    fn look(&mut self, node: &str) {
        match self.nodes.get_key_value(node) {
            Some((name, node)) if node.connected && !node.dirty.is_empty() => {
                self.waiting.insert(Arc::clone(name));
            }
            _ => {
                self.waiting.remove(node);
            }
        }
    }
}

impl Node {
    fn wants(&self, resource: &Resource, object: &Value) -> bool {
        self.listeners
            .values()
            .any(|listener| listener.resource == *resource && listener.selector.matches(object))
    }

    /// Remembers `last`, the state in which a delete would show the object. Returns whether the node is to be told.
    fn mark(&mut self, key: &Key, resource: &Resource, last: &Arc<Watched>) -> bool {
        if let Some(Given::Held(held)) = self.given.get_mut(key) {
            *held = Arc::clone(last);
        }
        if self.connected {
            self.dirty.insert(key.clone(), resource.clone());
        }
        self.connected
    }
}

/// The object as this node is to see it.
fn near(
    topology: &Topology,
    node: &str,
    resource: &Resource,
    watched: &Arc<Watched>,
) -> Arc<Watched> {
    if !Topology::concerns(resource) || !topology.has_ranges() {
        return Arc::clone(watched);
    }
    let mut object: Value = serde_json::from_str(watched.text().get()).unwrap_or_default();
    match topology.narrow(node, &mut object) {
        true => Watched::read(object).unwrap_or_else(|| Arc::clone(watched)),
        false => Arc::clone(watched),
    }
}

/// The type segment of a path.
fn token_of(key: &Key) -> &str {
    key.path().split('/').nth(1).unwrap_or_default()
}

/// Where an object goes on the wire: `namespace/type/name`.
pub fn key_of(resource: &Resource, object: &Value) -> Option<Key> {
    let metadata = &object["metadata"];
    let namespace =
        metadata["namespace"].as_str().filter(|text| !text.is_empty()).unwrap_or(CLUSTER_SCOPE);
    let path = ResourcePath::new(namespace, &resource.token(), metadata["name"].as_str()?).ok()?;
    Key::watched(&path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn services() -> Resource {
        Resource { group: String::new(), version: "v1".into(), plural: "services".into() }
    }

    fn listener(id: &str, labels: &str) -> Listener {
        let selector = Selector::parse(labels, "").expect("a selector");
        Listener { id: id.into(), resource: services(), selector }
    }

    fn service(name: &str, version: u32, app: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default",
            "uid": format!("uid-{name}"), "resourceVersion": version.to_string(), "labels": {"app": app}}})
    }

    fn told(watches: &mut Watches, node: &str) -> Vec<String> {
        let pushes = watches.take(node, 100, usize::MAX);
        pushes.iter().map(|push| format!("{} {}", push.operation.as_str(), push.key)).collect()
    }

    fn watching(labels: &str) -> Watches {
        let mut watches = Watches::default();
        watches.connected("edge1");
        watches.add("edge1", listener("a", labels)).expect("room");
        assert_eq!(watches.poll_output(), Some(Output::Start(services())));
        watches
    }

    #[test]
    fn existing_objects_come_as_insert_and_later_ones_as_what_happened() {
        let mut watches = watching("");
        watches.changed(&services(), service("web", 1, "x"));
        assert_eq!(watches.waiting(), ["edge1".into()]);
        assert_eq!(told(&mut watches, "edge1"), ["insert default/service/web"]);
        watches.changed(&services(), service("web", 2, "x"));
        watches.changed(&services(), service("web", 3, "x"));
        assert_eq!(told(&mut watches, "edge1"), ["update default/service/web"]);
        watches.deleted(&services(), service("web", 4, "x"));
        assert_eq!(told(&mut watches, "edge1"), ["delete default/service/web"]);
        assert!(watches.waiting().is_empty());
        watches.changed(&services(), service("web", 5, "x"));
        assert_eq!(told(&mut watches, "edge1"), ["insert default/service/web"]);
    }

    #[test]
    fn one_watch_of_the_api_serves_all_and_ends_with_the_last_listener() {
        let mut watches = watching("");
        watches.changed(&services(), service("web", 1, "x"));
        watches.add("edge2", listener("b", "app=x")).expect("room");
        watches.add("edge2", listener("c", "")).expect("room");
        assert_eq!(watches.poll_output(), None);
        assert!(told(&mut watches, "edge2").is_empty(), "not connected");
        watches.connected("edge2");
        assert_eq!(told(&mut watches, "edge2"), ["insert default/service/web"]);
        assert_eq!(watches.ids("edge2").collect::<Vec<_>>(), ["b", "c"]);
        watches.remove("edge1", "a");
        watches.remove("edge2", "b");
        assert_eq!(watches.poll_output(), None);
        watches.remove("edge2", "c");
        assert_eq!(watches.poll_output(), Some(Output::Stop(services())));
        watches.remove("edge2", "c");
        watches.changed(&services(), service("web", 2, "x"));
        assert!(watches.waiting().is_empty());
    }

    #[test]
    fn an_object_that_leaves_the_selector_leaves_the_node() {
        let mut watches = watching("app=x");
        watches.changed(&services(), service("web", 1, "x"));
        watches.changed(&services(), service("other", 1, "y"));
        assert_eq!(told(&mut watches, "edge1"), ["insert default/service/web"]);
        watches.changed(&services(), service("web", 2, "y"));
        let pushes = watches.take("edge1", 10, usize::MAX);
        assert_eq!(pushes.len(), 1);
        assert_eq!(pushes[0].operation, Operation::Delete);
        watches.changed(&services(), service("other", 2, "x"));
        assert_eq!(told(&mut watches, "edge1"), ["insert default/service/other"]);
    }

    #[test]
    fn what_went_away_while_the_node_was_gone_is_deleted_when_it_is_back() {
        let mut watches = watching("");
        watches.changed(&services(), service("web", 1, "x"));
        watches.changed(&services(), service("db", 1, "x"));
        assert_eq!(told(&mut watches, "edge1").len(), 2);
        watches.disconnected("edge1");
        watches.listed(
            &services(),
            &BTreeSet::from([key_of(&services(), &service("db", 1, "x")).expect("a key")]),
        );
        assert!(watches.waiting().is_empty());
        // The delete may be lost with the connection, so it is said again, but not for ever.
        for _ in 0..=FAREWELLS {
            watches.connected("edge1");
            assert_eq!(
                told(&mut watches, "edge1"),
                ["update default/service/db", "delete default/service/web"]
            );
        }
        watches.connected("edge1");
        assert_eq!(told(&mut watches, "edge1"), ["update default/service/db"]);
    }

    #[test]
    fn what_is_taken_is_bounded_and_the_rest_waits() {
        let mut watches = watching("");
        (0..10).for_each(|n| watches.changed(&services(), service(&format!("s{n}"), 1, "x")));
        assert_eq!(watches.take("edge1", 4, usize::MAX).len(), 4);
        assert_eq!(watches.waiting(), ["edge1".into()]);
        assert_eq!(watches.take("edge1", 100, 1).len(), 1);
        assert_eq!(watches.take("edge1", 100, usize::MAX).len(), 5);
    }

    #[test]
    fn watches_are_bounded() {
        let mut watches = Watches::default();
        for n in 0..LISTENERS_MAX {
            watches.add("edge1", listener(&n.to_string(), "")).expect("room");
        }
        watches.add("edge1", listener("0", "app=x")).expect("replaced");
        assert_eq!(
            watches.add("edge1", listener("more", "")),
            Err(TooMany::Listeners("edge1".into()))
        );
        for n in 1..RESOURCES_MAX {
            let resource = Resource { plural: format!("r{n}"), ..services() };
            let listener =
                Listener { id: format!("r{n}"), resource, selector: Selector::default() };
            watches.add(&format!("edge{}", n + 1), listener).expect("room");
        }
        let resource = Resource { plural: "last".into(), ..services() };
        let listener = Listener { id: "l".into(), resource, selector: Selector::default() };
        assert_eq!(watches.add("edge9", listener), Err(TooMany::Resources));
    }

    #[test]
    fn endpoints_wait_for_the_topology_and_are_narrowed_to_it() {
        let slices = Resource {
            group: "discovery.k8s.io".into(),
            version: "v1".into(),
            plural: "endpointslices".into(),
        };
        let mut watches = Watches::default();
        for node in ["edge1", "edge2"] {
            watches.connected(node);
            let listener = Listener {
                id: "a".into(),
                resource: slices.clone(),
                selector: Selector::default(),
            };
            watches.add(node, listener).expect("room");
        }
        assert_eq!(watches.poll_output(), Some(Output::Start(slices.clone())));
        assert_eq!(watches.poll_output(), Some(Output::Follow(true)));
        assert_eq!(watches.poll_output(), None);
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "web-1", "namespace": "default", "uid": "u", "resourceVersion": "1",
                "labels": {"kubernetes.io/service-name": "web"}},
            "endpoints": [{"addresses": ["1"], "nodeName": "edge1"}, {"addresses": ["2"], "nodeName": "edge2"}]});
        watches.changed(&slices, slice);
        assert!(told(&mut watches, "edge1").is_empty());
        assert_eq!(watches.waiting().len(), 2, "it is still to be told");
        let service = json!({"metadata": {"name": "web", "namespace": "default",
            "annotations": {"apps.kubeedge.io/service-topology": "range-nodegroup"}}});
        watches.topology_changed("services", &service, false);
        watches.topology_listed("services");
        for (name, group) in [("edge1", "a"), ("edge2", "b")] {
            let node = json!({"metadata": {"name": name, "labels": {"apps.kubeedge.io/belonging-to": group}}});
            watches.topology_changed("nodes", &node, false);
        }
        watches.topology_listed("nodes");
        for (node, address) in [("edge1", "1"), ("edge2", "2")] {
            let pushes = watches.take(node, 9, usize::MAX);
            let object: Value = serde_json::from_str(pushes[0].object.text().get()).expect("json");
            assert_eq!(object["endpoints"], json!([{"addresses": [address], "nodeName": node}]));
        }
        for node in ["edge1", "edge2"] {
            watches.remove(node, "a");
        }
        assert_eq!(watches.poll_output(), Some(Output::Stop(slices)));
        assert_eq!(watches.poll_output(), Some(Output::Follow(false)));
    }
}
