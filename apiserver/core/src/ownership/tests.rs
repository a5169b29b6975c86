//! A world of one object, written to by several managers, step by step.

use super::*;
use crate::schema::{ListType, Schema, Type};
use proptest::prelude::*;
use std::sync::Arc;

fn inline(schema: Schema) -> Node {
    Node::Inline(Arc::new(schema))
}

fn of(ty: Type) -> Schema {
    Schema { ty, ..Schema::default() }
}

fn object(fields: &[(&str, Schema)]) -> Schema {
    let properties =
        fields.iter().map(|(name, schema)| ((*name).into(), inline(schema.clone()))).collect();
    Schema { properties, ..of(Type::Object) }
}

fn list(kind: ListType, keys: &[&str], items: Schema) -> Schema {
    Schema {
        list: kind,
        list_map_keys: keys.iter().map(|key| Arc::from(*key)).collect(),
        items: Some(inline(items)),
        ..of(Type::Array)
    }
}

fn strings() -> Schema {
    Schema { additional: Some(inline(of(Type::String))), ..of(Type::Object) }
}

/// A deployment in small: one field of every topology.
fn deployment() -> Node {
    let protocol = Schema { default: Some("TCP".into()), ..of(Type::String) };
    let port = object(&[
        ("name", of(Type::String)),
        ("containerPort", of(Type::Integer)),
        ("protocol", protocol),
    ]);
    let env = object(&[("name", of(Type::String)), ("value", of(Type::String))]);
    let container = object(&[
        ("name", of(Type::String)),
        ("image", of(Type::String)),
        ("args", list(ListType::Atomic, &[], of(Type::String))),
        ("env", list(ListType::Map, &["name"], env)),
        ("ports", list(ListType::Map, &["containerPort", "protocol"], port)),
        ("probe", object(&[("path", of(Type::String)), ("period", of(Type::Integer))])),
    ]);
    let metadata = object(&[
        ("name", of(Type::String)),
        ("namespace", of(Type::String)),
        ("labels", strings()),
        ("annotations", strings()),
        ("finalizers", list(ListType::Set, &[], of(Type::String))),
    ]);
    let selector = Schema { atomic_map: true, ..strings() };
    let spec = object(&[
        ("replicas", of(Type::Integer)),
        ("paused", of(Type::Boolean)),
        ("selector", selector),
        ("containers", list(ListType::Map, &["name"], container)),
        ("note", Schema { nullable: true, ..of(Type::String) }),
        ("free", Schema { preserve_unknown: true, ..of(Type::Object) }),
    ]);
    inline(object(&[
        ("apiVersion", of(Type::String)),
        ("kind", of(Type::String)),
        ("metadata", Schema { preserve_unknown: true, ..metadata }),
        ("spec", spec),
        ("status", object(&[("ready", of(Type::Integer))])),
    ]))
}

fn named(rest: Value) -> Value {
    let mut object = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "d"},
    });
    json_patch::merge(&mut object, &rest);
    object
}

/// The stored object and a clock that ticks once a write.
#[derive(Default)]
struct World {
    live: Option<Value>,
    ticks: u32,
}

impl World {
    fn actor_at<'a>(manager: &'a str, subresource: &'a str, now: &'a str) -> Actor<'a> {
        Actor { manager, api_version: "apps/v1", subresource, has_status: true, now }
    }

    fn now(&mut self) -> String {
        self.ticks += 1;
        format!("2026-01-01T00:{:02}:{:02}Z", self.ticks / 60, self.ticks % 60)
    }

    fn try_apply(&mut self, manager: &str, config: Value, force: bool) -> Result<(), ApplyError> {
        let now = self.now();
        let actor = Self::actor_at(manager, "", &now);
        let config = named(config);
        let schemas = Schemas::default();
        self.live =
            Some(apply(self.live.as_ref(), &config, &deployment(), &schemas, &actor, force)?);
        Ok(())
    }

    #[track_caller]
    fn apply(&mut self, manager: &str, config: Value) -> &mut Self {
        self.try_apply(manager, config, false).expect("no conflict");
        self
    }

    #[track_caller]
    fn force(&mut self, manager: &str, config: Value) -> &mut Self {
        self.try_apply(manager, config, true).expect("forced");
        self
    }

    #[track_caller]
    fn conflicts(&mut self, manager: &str, config: Value) -> Vec<String> {
        match self.try_apply(manager, config, false) {
            Err(ApplyError::Conflicts(found)) => {
                found.iter().map(|c| format!("{}: {}", c.message, c.field)).collect()
            }
            other => panic!("expected conflicts, got {other:?}"),
        }
    }

    fn update(&mut self, manager: &str, change: impl FnOnce(&mut Value)) -> &mut Self {
        self.update_at(manager, "", change)
    }

    fn update_at(
        &mut self,
        manager: &str,
        subresource: &str,
        change: impl FnOnce(&mut Value),
    ) -> &mut Self {
        let now = self.now();
        let actor = Self::actor_at(manager, subresource, &now);
        let mut new = self.live.clone().unwrap_or_else(|| named(json!({})));
        change(&mut new);
        let schemas = Schemas::default();
        record_update(self.live.as_ref(), &mut new, &deployment(), &schemas, &actor);
        self.live = Some(new);
        self
    }

    fn live(&self) -> &Value {
        self.live.as_ref().expect("object exists")
    }

    #[track_caller]
    fn spec(&mut self, expected: Value) -> &mut Self {
        assert_eq!(self.live().get("spec").cloned().unwrap_or(json!(null)), expected);
        self
    }

    /// `manager operation: fieldsV1` of every entry, in order.
    fn entries(&self) -> Vec<(String, Value)> {
        let entries = self.live()["metadata"]["managedFields"].as_array();
        entries
            .into_iter()
            .flatten()
            .map(|e| {
                let who = format!(
                    "{} {}",
                    e["manager"].as_str().expect("manager"),
                    e["operation"].as_str().expect("operation")
                );
                (who, e["fieldsV1"].clone())
            })
            .collect()
    }

    #[track_caller]
    fn owns(&mut self, who: &str, expected: Value) -> &mut Self {
        let found = self.entries().into_iter().find(|(name, _)| name == who).map(|(_, set)| set);
        assert_eq!(found, Some(expected), "{who}");
        self
    }

    #[track_caller]
    fn owners(&mut self, expected: &[&str]) -> &mut Self {
        let names: Vec<String> = self.entries().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, expected);
        self
    }
}

fn container(name: &str, image: &str) -> Value {
    json!({"name": name, "image": image})
}

#[test]
fn create_by_apply_owns_exactly_what_the_config_says() {
    let mut world = World::default();
    world.apply(
        "kubectl",
        json!({
            "metadata": {"labels": {"app": "web"}, "creationTimestamp": null},
            "spec": {
                "replicas": 1,
                "selector": {"app": "web"},
                "containers": [{"name": "web", "image": "a", "args": ["x"], "ports": [{"containerPort": 80}]}],
            },
            "status": {"ready": 3},
        }),
    );
    world.owns(
        "kubectl Apply",
        json!({
            "f:metadata": {"f:labels": {"f:app": {}}},
            "f:spec": {
                "f:replicas": {},
                "f:selector": {},
                "f:containers": {
                    r#"k:{"name":"web"}"#: {
                        ".": {},
                        "f:name": {},
                        "f:image": {},
                        "f:args": {},
                        "f:ports": {
                            r#"k:{"containerPort":80,"protocol":"TCP"}"#: {".": {}, "f:containerPort": {}},
                        },
                    },
                },
            },
        }),
    );
    let entry = &world.live()["metadata"]["managedFields"][0];
    assert_eq!(entry["apiVersion"], "apps/v1");
    assert_eq!(entry["fieldsType"], "FieldsV1");
    assert_eq!(entry["time"], "2026-01-01T00:00:01Z");
    assert!(entry.get("subresource").is_none());
    assert!(world.live().get("status").is_none(), "status is not written here");
    assert!(world.live()["metadata"].get("creationTimestamp").is_none());
}

#[test]
fn change_by_apply_changes_the_value_and_keeps_the_rest() {
    let mut world = World::default();
    world
        .apply("a", json!({"spec": {"replicas": 1, "paused": true}}))
        .apply("a", json!({"spec": {"replicas": 2, "paused": true}}))
        .spec(json!({"replicas": 2, "paused": true}))
        .owners(&["a Apply"]);
}

#[test]
fn field_that_left_the_config_goes_unless_another_manager_owns_it() {
    let mut world = World::default();
    world
        .apply("a", json!({"spec": {"replicas": 1, "paused": true}}))
        .apply("b", json!({"spec": {"paused": true}}))
        .apply("a", json!({}))
        .spec(json!({"paused": true}))
        .owners(&["b Apply"])
        .owns("b Apply", json!({"f:spec": {"f:paused": {}}}));
}

#[test]
fn dropping_a_struct_drops_what_defaults_added_to_it() {
    let mut world = World::default();
    let with = |probe: Value| json!({"spec": {"containers": [{"name": "web", "probe": probe}]}});
    world.apply("a", with(json!({"path": "/"})));
    // Defaulting runs after apply and is owned by nobody.
    world.live.as_mut().expect("exists")["spec"]["containers"][0]["probe"]["period"] = 10.into();
    world
        .apply("a", json!({"spec": {"containers": [{"name": "web"}]}}))
        .spec(json!({"containers": [{"name": "web"}]}));
}

#[test]
fn list_item_that_left_the_config_goes_and_others_stay() {
    let mut world = World::default();
    world
        .apply("a", json!({"spec": {"containers": [container("x", "1"), container("y", "1")]}}))
        .apply("b", json!({"spec": {"containers": [container("z", "1")]}}))
        .apply("a", json!({"spec": {"containers": [container("y", "1")]}}))
        .spec(json!({"containers": [container("y", "1"), container("z", "1")]}));
}

#[test]
fn list_item_shared_by_two_appliers_goes_with_the_last() {
    let mut world = World::default();
    world
        .apply("a", json!({"spec": {"containers": [container("x", "1")]}}))
        .apply("b", json!({"spec": {"containers": [{"name": "x", "args": ["v"]}]}}))
        .apply("a", json!({"spec": {}}))
        .spec(json!({"containers": [{"name": "x", "args": ["v"]}]}))
        .apply("b", json!({"spec": {}}));
    assert_eq!(world.live()["spec"].get("containers"), None);
}

#[test]
fn changing_what_another_applier_owns_is_a_conflict() {
    let mut world = World::default();
    world.apply("a", json!({"spec": {"replicas": 1, "containers": [container("x", "1")]}}));
    let before = world.live.clone();
    assert_eq!(
        world.conflicts("b", json!({"spec": {"replicas": 2, "containers": [container("x", "2")]}})),
        [
            r#"conflict with "a": .spec.containers[name="x"].image"#,
            r#"conflict with "a": .spec.replicas"#,
        ],
    );
    assert_eq!(world.live, before);
}

#[test]
fn conflict_with_an_updater_names_its_version_and_subresource() {
    let mut world = World::default();
    world.apply("a", json!({"spec": {"paused": true}}));
    world.update("editor", |new| new["spec"]["replicas"] = 5.into());
    assert_eq!(
        world.conflicts("a", json!({"spec": {"paused": true, "replicas": 1}})),
        [r#"conflict with "editor" using apps/v1: .spec.replicas"#],
    );
    world.update_at("hpa", "scale", |new| new["spec"]["replicas"] = 7.into());
    assert_eq!(
        world.conflicts("a", json!({"spec": {"paused": true, "replicas": 1}})),
        [r#"conflict with "hpa" with subresource "scale" using apps/v1: .spec.replicas"#],
    );
    // The same value is no conflict: both own it then.
    world
        .apply("a", json!({"spec": {"paused": true, "replicas": 7}}))
        .owners(&["a Apply", "hpa Update"]);
}

#[test]
fn conflicts_read_as_clients_know_them() {
    let conflict = |manager: &str, field: &str| Conflict {
        manager: manager.into(),
        field: field.into(),
        message: format!("conflict with \"{manager}\" using v1"),
    };
    let one = ApplyError::Conflicts(vec![conflict("m", ".spec.x")]).to_api_error("", "pods", "p");
    assert_eq!(one.message, "Apply failed with 1 conflict: conflict with \"m\" using v1: .spec.x");
    assert_eq!((one.code, one.reason), (409, "Conflict"));
    assert_eq!(
        one.to_status()["details"]["causes"],
        json!([{
            "reason": "FieldManagerConflict",
            "message": "conflict with \"m\" using v1",
            "field": ".spec.x",
        }]),
    );
    let many = ApplyError::Conflicts(vec![
        conflict("n", ".spec.y"),
        conflict("m", ".spec.x"),
        conflict("m", ".spec.z"),
    ]);
    assert_eq!(
        many.to_string(),
        "Apply failed with 3 conflicts: conflicts with \"m\" using v1:\n- .spec.x\n- .spec.z\n\
         conflicts with \"n\" using v1:\n- .spec.y",
    );
}

#[test]
fn force_takes_ownership_from_the_others() {
    let mut world = World::default();
    world
        .apply("a", json!({"spec": {"replicas": 1, "paused": true}}))
        .force("b", json!({"spec": {"replicas": 2}}))
        .spec(json!({"replicas": 2, "paused": true}))
        .owns("a Apply", json!({"f:spec": {"f:paused": {}}}))
        .owns("b Apply", json!({"f:spec": {"f:replicas": {}}}));
    // `a` says 1 still, and is in conflict now; dropping the field leaves it to `b`.
    assert_eq!(world.conflicts("a", json!({"spec": {"replicas": 1, "paused": true}})).len(), 1);
    world
        .apply("a", json!({"spec": {"paused": true}}))
        .spec(json!({"replicas": 2, "paused": true}));
}

#[test]
fn equal_values_are_shared_and_stay_until_the_last_owner_drops_them() {
    let mut world = World::default();
    world
        .apply("a", json!({"spec": {"replicas": 1}}))
        .apply("b", json!({"spec": {"replicas": 1}}))
        .owners(&["a Apply", "b Apply"])
        .apply("a", json!({}))
        .spec(json!({"replicas": 1}))
        .apply("b", json!({}));
    assert_eq!(world.live().get("spec"), None);
}

#[test]
fn shared_value_can_be_changed_by_neither_alone() {
    let mut world = World::default();
    world.apply("a", json!({"spec": {"replicas": 1}})).apply("b", json!({"spec": {"replicas": 1}}));
    assert_eq!(
        world.conflicts("a", json!({"spec": {"replicas": 2}})),
        [r#"conflict with "b": .spec.replicas"#],
    );
}

#[test]
fn client_side_apply_migrates_to_server_side_apply_without_force() {
    let mut world = World::default();
    let config = json!({"spec": {"replicas": 1, "containers": [container("web", "1")]}});
    let last_applied = named(config.clone()).to_string();
    world.update("kubectl-client-side-apply", |new| {
        json_patch::merge(new, &config);
        new["metadata"]["annotations"] = json!({LAST_APPLIED: last_applied});
    });
    world.update("hpa", |new| new["spec"]["replicas"] = 5.into());

    // What client-side apply wrote, and nobody changed since, may change.
    let newer = json!({"spec": {"replicas": 5, "containers": [container("web", "2")]}});
    world.apply("kubectl", newer.clone());
    world.spec(json!({"replicas": 5, "containers": [container("web", "2")]}));
    // What the autoscaler changed may not.
    assert_eq!(
        world.conflicts(
            "kubectl",
            json!({"spec": {"replicas": 1, "containers": [container("web", "2")]}})
        ),
        [r#"conflict with "hpa" using apps/v1: .spec.replicas"#],
    );
}

#[test]
fn other_managers_are_in_conflict_with_client_side_apply() {
    let mut world = World::default();
    let config = json!({"spec": {"replicas": 1}});
    let last_applied = named(config.clone()).to_string();
    world.update("kubectl-client-side-apply", |new| {
        json_patch::merge(new, &config);
        new["metadata"]["annotations"] = json!({LAST_APPLIED: last_applied});
    });
    assert_eq!(
        world.conflicts("reconciler", json!({"spec": {"replicas": 2}})),
        [r#"conflict with "kubectl-client-side-apply" using apps/v1: .spec.replicas"#],
    );
}

#[test]
fn managed_fields_written_by_the_client_replace_those_of_the_object() {
    // This is how kubectl turns its client-side entry into an apply entry.
    let mut world = World::default();
    world.update("kubectl-client-side-apply", |new| {
        new["spec"] = json!({"replicas": 1, "paused": true})
    });
    world.update("kubectl", |new| {
        let entry = &mut new["metadata"]["managedFields"][0];
        entry["manager"] = "kubectl".into();
        entry["operation"] = "Apply".into();
    });
    world.owners(&["kubectl Apply"]).apply("kubectl", json!({"spec": {"paused": true}}));
    world.spec(json!({"paused": true}));
}

#[test]
fn atomic_lists_and_maps_are_owned_as_a_whole() {
    let mut world = World::default();
    let with = |args: Value, selector: Value| json!({"spec": {"selector": selector, "containers": [{"name": "x", "args": args}]}});
    world.apply("a", with(json!(["1", "2"]), json!({"app": "web"})));
    assert_eq!(
        world.conflicts("b", with(json!(["1", "2", "3"]), json!({"app": "web", "tier": "x"}))),
        [
            r#"conflict with "a": .spec.containers[name="x"].args"#,
            r#"conflict with "a": .spec.selector"#,
        ],
    );
    world.apply("a", with(json!(["2"]), json!({"tier": "x"})));
    world.spec(json!({"selector": {"tier": "x"}, "containers": [{"name": "x", "args": ["2"]}]}));
}

#[test]
fn set_items_have_owners_of_their_own() {
    let mut world = World::default();
    let with = |items: Value| json!({"metadata": {"finalizers": items}});
    world
        .apply("a", with(json!(["x", "y"])))
        .apply("b", with(json!(["z", "y"])))
        .owns("b Apply", json!({"f:metadata": {"f:finalizers": {"v:\"y\"": {}, "v:\"z\"": {}}}}));
    assert_eq!(world.live()["metadata"]["finalizers"], json!(["x", "z", "y"]));
    world.apply("a", with(json!(["x"])));
    assert_eq!(world.live()["metadata"]["finalizers"], json!(["x", "z", "y"]), "b owns y");
    world.apply("b", with(json!(["z"])));
    assert_eq!(world.live()["metadata"]["finalizers"], json!(["x", "z"]));
}

#[test]
fn ports_are_told_apart_by_number_and_protocol() {
    let mut world = World::default();
    let with = |ports: Value| json!({"spec": {"containers": [{"name": "x", "ports": ports}]}});
    world
        .apply("a", with(json!([{"containerPort": 53}, {"containerPort": 53, "protocol": "UDP"}])));
    world.apply("a", with(json!([{"containerPort": 53, "protocol": "TCP", "name": "dns"}])));
    world.spec(json!({"containers": [{"name": "x", "ports": [
        {"containerPort": 53, "protocol": "TCP", "name": "dns"},
    ]}]}));
}

#[test]
fn merged_lists_keep_live_order_and_take_the_order_of_the_config_among_its_items() {
    let names = |names: &[&str]| -> Value {
        let items: Vec<Value> = names.iter().map(|name| json!({"name": name})).collect();
        json!({"spec": {"containers": items}})
    };
    for (live, config, expected) in [
        (vec!["a", "b"], vec!["b", "c"], vec!["a", "b", "c"]),
        (vec!["a", "x"], vec!["a", "b"], vec!["a", "x", "b"]),
        (vec!["a", "b"], vec!["b", "a"], vec!["b", "a"]),
        (vec!["a", "b"], vec!["b", "c", "a"], vec!["b", "c", "a"]),
        (vec!["a", "b", "c"], vec!["b", "a", "c"], vec!["b", "a", "c"]),
        (vec!["x", "a", "y", "b", "z"], vec!["a", "n", "b"], vec!["x", "a", "y", "n", "b", "z"]),
        (vec!["a"], vec!["n", "a"], vec!["n", "a"]),
        (vec![], vec!["b", "a"], vec!["b", "a"]),
        (vec!["b", "a"], vec!["c"], vec!["b", "a", "c"]),
    ] {
        let mut world = World::default();
        world.apply("live", names(&live)).apply("config", names(&config));
        assert_eq!(world.live()["spec"], names(&expected)["spec"], "{live:?} {config:?}");
    }
}

#[test]
fn untyped_fields_are_granular_maps_and_atomic_lists() {
    let mut world = World::default();
    world
        .apply("a", json!({"spec": {"free": {"m": {"x": 1}, "l": [1, {"k": 2}]}}}))
        .apply("b", json!({"spec": {"free": {"m": {"y": 2}}}}))
        .owns("a Apply", json!({"f:spec": {"f:free": {"f:l": {}, "f:m": {".": {}, "f:x": {}}}}}));
    assert_eq!(
        world.conflicts("b", json!({"spec": {"free": {"l": [1]}}})),
        [r#"conflict with "a": .spec.free.l"#],
    );
    world.apply("a", json!({})).spec(json!({"free": {"m": {"y": 2}}}));
}

#[test]
fn create_by_update_owns_containers_and_leaves() {
    let mut world = World::default();
    world.update("curl", |new| {
        *new = named(json!({
            "metadata": {"labels": {"a": "1"}, "uid": "u", "generation": 1, "resourceVersion": "5"},
            "spec": {"containers": [container("x", "1")]},
            "status": {"ready": 1},
        }));
    });
    world.owns(
        "curl Update",
        json!({
            "f:metadata": {"f:labels": {".": {}, "f:a": {}}},
            "f:spec": {".": {}, "f:containers": {
                ".": {},
                r#"k:{"name":"x"}"#: {".": {}, "f:image": {}, "f:name": {}},
            }},
        }),
    );
}

#[test]
fn update_moves_ownership_of_what_it_changed_and_drops_what_it_removed() {
    let mut world = World::default();
    world.apply("a", json!({"spec": {"replicas": 1, "paused": true, "note": "n"}}));
    world.update("b", |new| new["spec"] = json!({"replicas": 2, "paused": true}));
    world
        .owns("a Apply", json!({"f:spec": {"f:paused": {}}}))
        .owns("b Update", json!({"f:spec": {"f:replicas": {}}}))
        .owners(&["a Apply", "b Update"]);
}

#[test]
fn status_endpoint_is_an_owner_of_its_own() {
    let mut world = World::default();
    world.apply("a", json!({"spec": {"replicas": 1}}));
    world.update_at("controller", "status", |new| new["status"] = json!({"ready": 1}));
    world.owns("controller Update", json!({"f:status": {".": {}, "f:ready": {}}}));
    assert_eq!(world.live()["metadata"]["managedFields"][1]["subresource"], "status");
    // The main endpoint says nothing about status, and so takes nothing away.
    world.apply("a", json!({"spec": {"replicas": 2}}));
    assert_eq!(world.live()["status"], json!({"ready": 1}));

    let (schemas, node) = (Schemas::default(), deployment());
    let actor = World::actor_at("applier", "status", "2026-01-01T01:00:00Z");
    let config = named(json!({
        "metadata": {"labels": {"ignored": "here"}}, "spec": {"replicas": 9}, "status": {"ready": 2},
    }));
    let error = apply(world.live.as_ref(), &config, &node, &schemas, &actor, false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Apply failed with 1 conflict: conflict with \"controller\" with subresource \"status\" \
         using apps/v1: .status.ready",
    );
    let forced =
        apply(world.live.as_ref(), &config, &node, &schemas, &actor, true).expect("forced");
    assert_eq!(forced["spec"], json!({"replicas": 2}));
    assert_eq!(forced["status"], json!({"ready": 2}));
    assert_eq!(forced["metadata"].get("labels"), None);
}

#[test]
fn kind_without_status_endpoint_owns_status_like_any_field() {
    let actor = Actor {
        manager: "a",
        api_version: "v1",
        subresource: "",
        has_status: false,
        now: "2026-01-01T00:00:00Z",
    };
    let config = named(json!({"status": {"ready": 1}}));
    let made =
        apply(None, &config, &deployment(), &Schemas::default(), &actor, false).expect("made");
    assert_eq!(made["status"], json!({"ready": 1}));
    assert_eq!(
        made["metadata"]["managedFields"][0]["fieldsV1"],
        json!({"f:status": {"f:ready": {}}})
    );
}

#[test]
fn nothing_changed_leaves_times_untouched() {
    let mut world = World::default();
    let config = json!({"spec": {"replicas": 1, "containers": [container("x", "1")]}});
    world.apply("a", config.clone());
    let before = world.live.clone();
    world.apply("a", config.clone());
    assert_eq!(world.live, before);
    world.update("b", |_| {});
    assert_eq!(world.live, before);
    // A client that sends no managedFields changes nothing either.
    world.update("b", |new| {
        new["metadata"].as_object_mut().expect("object").remove("managedFields");
    });
    assert_eq!(world.live, before);
}

#[test]
fn only_the_entry_that_changed_gets_a_new_time() {
    let mut world = World::default();
    world.apply("a", json!({"spec": {"replicas": 1}}));
    world.update("b", |new| new["spec"]["paused"] = true.into());
    world.update("b", |new| new["spec"]["note"] = "n".into());
    let entries = &world.live()["metadata"]["managedFields"];
    assert_eq!(entries[0]["time"], "2026-01-01T00:00:01Z");
    assert_eq!(entries[1]["time"], "2026-01-01T00:00:03Z");
}

#[test]
fn one_empty_entry_resets_and_an_empty_list_does_not() {
    let mut world = World::default();
    world.apply("a", json!({"spec": {"replicas": 1}}));
    world.update("b", |new| new["metadata"]["managedFields"] = json!([]));
    world.owners(&["a Apply"]);
    world.update("b", |new| new["metadata"]["managedFields"] = json!([{}]));
    assert_eq!(world.live()["metadata"].get("managedFields"), None);

    // Untracked objects stay so, and their fields are not free to take.
    world.update("b", |new| new["spec"]["paused"] = true.into());
    assert_eq!(world.live()["metadata"].get("managedFields"), None);
    assert_eq!(
        world.conflicts("c", json!({"spec": {"replicas": 2}})),
        [r#"conflict with "before-first-apply" using apps/v1: .spec.replicas"#],
    );
    world
        .apply("c", json!({"spec": {"replicas": 1}}))
        .owners(&["c Apply", "before-first-apply Update"]);
}

#[test]
fn more_than_ten_updaters_fold_into_ancient_changes() {
    let mut world = World::default();
    world.apply("applier", json!({"spec": {"replicas": 1}}));
    for at in 0..14 {
        world.update(&format!("m{at:02}"), |new| {
            new["metadata"]["labels"][format!("l{at:02}")] = "x".into();
        });
    }
    let names: Vec<String> = world.entries().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 1 + UPDATE_ENTRIES_MAX);
    assert_eq!(&names[..3], ["applier Apply", "ancient-changes Update", "m05 Update"]);
    world.owns(
        "ancient-changes Update",
        json!({"f:metadata": {"f:labels": {
            ".": {}, "f:l00": {}, "f:l01": {}, "f:l02": {}, "f:l03": {}, "f:l04": {},
        }}}),
    );
    assert_eq!(
        world.conflicts("x", json!({"metadata": {"labels": {"l01": "y"}}})),
        [r#"conflict with "ancient-changes" using apps/v1: .metadata.labels.l01"#],
    );
}

#[test]
fn null_in_a_config_takes_the_field_out_unless_null_is_a_value() {
    let mut world = World::default();
    world
        .apply("a", json!({"spec": {"replicas": 1, "note": "n"}}))
        .apply("a", json!({"spec": {"paused": null, "note": "n"}}))
        .spec(json!({"note": "n"}));
    let live = world.live.clone();
    world.apply("a", json!({"spec": {"paused": null, "note": "n"}}));
    assert_eq!(world.live, live);
}

#[test]
fn emptied_map_goes_unless_the_config_holds_it() {
    let mut world = World::default();
    world.apply("a", json!({"metadata": {"labels": {"x": "1"}}, "spec": {"free": {"x": 1}}}));
    world.apply("a", json!({"spec": {"free": {}}}));
    assert_eq!(world.live()["metadata"].get("labels"), None);
    world.spec(json!({"free": {}}));
}

#[test]
fn resource_version_of_a_config_is_handed_on_and_never_owned() {
    let mut world = World::default();
    world.apply("a", json!({"spec": {"replicas": 1}}));
    world.live.as_mut().expect("exists")["metadata"]["resourceVersion"] = "7".into();
    world.apply("a", json!({"spec": {"replicas": 1}}));
    assert_eq!(world.live()["metadata"]["resourceVersion"], "7");
    world.apply("a", json!({"metadata": {"resourceVersion": "5"}, "spec": {"replicas": 1}}));
    assert_eq!(world.live()["metadata"]["resourceVersion"], "5");
    world.owns("a Apply", json!({"f:spec": {"f:replicas": {}}}));
}

#[test]
fn built_in_kinds_merge_as_their_definitions_say() {
    let catalog = crate::catalog::Catalog::builtin();
    let kind = catalog.find("apps", "v1", "deployments").expect("deployments exist");
    let (node, schemas) = (&kind.schema, catalog.schemas());
    let at = |manager: &'static str, now: &'static str| Actor {
        manager,
        api_version: "apps/v1",
        subresource: "",
        has_status: true,
        now,
    };
    let config = |port: Value, env: Value| {
        named(json!({
            "metadata": {"labels": {"app": "web"}, "finalizers": ["a.b/c"]},
            "spec": {
                "selector": {"matchLabels": {"app": "web"}},
                "template": {"spec": {
                    "nodeSelector": {"a": "b"},
                    "tolerations": [{"key": "x", "operator": "Exists"}],
                    "containers": [{"name": "web", "image": "i", "ports": [port], "env": env,
                                    "resources": {"limits": {"cpu": "1"}}}],
                    "volumes": [{"name": "v", "emptyDir": {}}],
                }},
            },
        }))
    };
    let first = config(json!({"containerPort": 80}), json!([{"name": "A", "value": "1"}]));
    let live = apply(None, &first, node, schemas, &at("ssa", "2026-01-01T00:00:00Z"), false)
        .expect("created");
    assert_eq!(
        live["metadata"]["managedFields"][0]["fieldsV1"],
        json!({
            "f:metadata": {"f:labels": {"f:app": {}}, "f:finalizers": {"v:\"a.b/c\"": {}}},
            "f:spec": {
                "f:selector": {},
                "f:template": {"f:spec": {
                    "f:nodeSelector": {},
                    "f:tolerations": {},
                    "f:containers": {r#"k:{"name":"web"}"#: {
                        ".": {}, "f:name": {}, "f:image": {},
                        "f:env": {r#"k:{"name":"A"}"#: {".": {}, "f:name": {}, "f:value": {}}},
                        "f:ports": {r#"k:{"containerPort":80,"protocol":"TCP"}"#: {
                            ".": {}, "f:containerPort": {},
                        }},
                        "f:resources": {"f:limits": {"f:cpu": {}}},
                    }},
                    "f:volumes": {r#"k:{"name":"v"}"#: {".": {}, "f:name": {}, "f:emptyDir": {}}},
                }},
            },
        }),
    );

    // What defaulting adds, then a status, then the same config: nothing to do.
    let mut stored = live.clone();
    crate::defaults::apply(&kind, &mut stored);
    stored["status"] = json!({"replicas": 1});
    let again =
        apply(Some(&stored), &first, node, schemas, &at("ssa", "2026-01-01T00:01:00Z"), false);
    assert_eq!(again, Ok(stored.clone()));

    let second = config(json!({"containerPort": 81}), json!([{"name": "B", "value": "2"}]));
    let changed =
        apply(Some(&stored), &second, node, schemas, &at("ssa", "2026-01-01T00:02:00Z"), false)
            .expect("changed");
    let container = &changed["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["env"], json!([{"name": "B", "value": "2"}]));
    assert_eq!(container["ports"], json!([{"containerPort": 81}]));
    assert_eq!(changed["status"], json!({"replicas": 1}));
}

#[test]
fn configs_that_cannot_be_merged_are_refused() {
    let mut world = World::default();
    for (config, text) in [
        (
            json!({"metadata": {"managedFields": [{}]}}),
            "metadata.managedFields must be nil".to_owned(),
        ),
        (
            json!({"spec": {"containers": [{"image": "x"}]}}),
            "failed to create typed patch object (web): .spec.containers: element 0: associative \
             list with keys has an element that omits key field \"name\" (and doesn't have default \
             value)"
                .to_owned(),
        ),
        (
            json!({"spec": {"containers": [{"name": "x"}, {"name": "x"}]}}),
            "failed to create typed patch object (web): .spec.containers: duplicate entries for \
             key [name=\"x\"]"
                .to_owned(),
        ),
        (
            json!({"spec": {"containers": ["x"]}}),
            "failed to create typed patch object (web): .spec.containers: element 0: an item of \
             this list has to be of the list's element type"
                .to_owned(),
        ),
    ] {
        let error = world.try_apply("a", config, true).expect_err("refused");
        let error = error.to_api_error("apps", "deployments", "web");
        assert_eq!((error.code, error.message), (400, text));
    }
    let actor = World::actor_at("a", "", "2026-01-01T00:00:00Z");
    let error = apply(None, &json!([]), &deployment(), &Schemas::default(), &actor, false);
    assert_eq!(error, Err(ApplyError::NotAnObject));
}

#[test]
fn junk_in_stored_managed_fields_counts_as_untracked() {
    for junk in [
        json!("x"),
        json!([1]),
        json!([{"manager": "a", "operation": "Eat"}]),
        json!([{"manager": "a", "operation": "Apply", "fieldsType": "FieldsV1", "fieldsV1": {"spec": {}}}]),
        json!([{"manager": "a", "operation": "Apply", "fieldsType": "FieldsV2", "fieldsV1": {}}]),
    ] {
        let mut world = World {
            live: Some(named(
                json!({"metadata": {"managedFields": junk}, "spec": {"replicas": 1}}),
            )),
            ticks: 0,
        };
        world.apply("a", json!({"spec": {"replicas": 1}}));
        world.owners(&["a Apply", "before-first-apply Update"]);
    }
}

#[test]
fn field_sets_have_set_algebra() {
    let set = |fields: Value| FieldSet::from_json(&fields).expect("valid");
    let a = set(json!({"f:x": {".": {}, "f:y": {}}, "f:z": {}}));
    let b = set(json!({"f:x": {"f:y": {}}}));
    assert_eq!(a.difference(&b).to_json(), json!({"f:x": {}, "f:z": {}}));
    assert_eq!(a.intersection(&b), b);
    assert_eq!(b.clone().union(&a), a);
    assert_eq!(a.paths(), [".x", ".x.y", ".z"]);
    assert!(b.difference(&a).is_empty());
}

#[test]
fn fields_v1_that_is_malformed_is_refused() {
    for fields in [
        json!(1),
        json!({"x": {}}),
        json!({"q:x": {}}),
        json!({"k:x": {}}),
        json!({"k:[1]": {}}),
        json!({"v:{": {}}),
        json!({"i:x": {}}),
        json!({"f:x": 1}),
    ] {
        assert!(FieldSet::from_json(&fields).is_err(), "{fields}");
    }
    let spaced = FieldSet::from_json(&json!({r#"k:{"b": 1.0, "a": "x"}"#: {}})).expect("valid");
    assert_eq!(spaced.to_json(), json!({r#"k:{"a":"x","b":1}"#: {}}));
}

/// Configs of the small deployment.
fn any_config() -> impl Strategy<Value = Value> {
    let word = || prop::sample::select(vec!["a", "b", "c"]);
    let words = move || prop::collection::btree_set(word(), 0..3).prop_map(|set| json!(set));
    let labels = prop::collection::btree_map(word(), word(), 0..3).prop_map(|map| json!(map));
    let ports = prop::collection::btree_map((1..3, any::<bool>()), word(), 0..3).prop_map(|map| {
        map.into_iter()
            .map(|((port, udp), name)| {
                let mut item = json!({"containerPort": port, "name": name});
                if udp {
                    item["protocol"] = "UDP".into();
                }
                item
            })
            .collect::<Value>()
    });
    let container = (prop::option::of(word()), prop::option::of(words()), prop::option::of(ports));
    let containers = prop::collection::btree_map(word(), container, 0..3).prop_map(|map| {
        map.into_iter()
            .map(|(name, (image, args, ports))| {
                let mut item = json!({"name": name});
                for (field, value) in
                    [("image", image.map(Value::from)), ("args", args), ("ports", ports)]
                {
                    if let Some(value) = value {
                        item[field] = value;
                    }
                }
                item
            })
            .collect::<Vec<_>>()
    });
    let containers = containers.prop_shuffle().prop_map(Value::from);
    let note = prop_oneof![Just(json!(null)), word().prop_map(Value::from)];
    let spec = (
        prop::option::of(0..3),
        prop::option::of(containers),
        prop::option::of(note),
        prop::option::of(labels.clone()),
        prop::option::of(prop_oneof![labels.clone(), words(), Just(json!(null))]),
    );
    (prop::option::of(labels), prop::option::of(words()), prop::option::of(spec)).prop_map(
        |(labels, finalizers, spec)| {
            let mut config = named(json!({}));
            let mut set = |at: [&str; 2], value: Option<Value>| {
                if let Some(value) = value {
                    config[at[0]][at[1]] = value;
                }
            };
            set(["metadata", "labels"], labels);
            set(["metadata", "finalizers"], finalizers);
            if let Some((replicas, containers, note, selector, free)) = spec {
                set(["spec", "replicas"], replicas.map(Value::from));
                set(["spec", "containers"], containers);
                set(["spec", "note"], note);
                set(["spec", "selector"], selector);
                set(["spec", "free"], free.map(|free| json!({"f": free})));
            }
            config
        },
    )
}

fn any_json() -> impl Strategy<Value = Value> {
    let names = vec![
        "metadata",
        "managedFields",
        "spec",
        "containers",
        "name",
        "ports",
        "finalizers",
        "free",
        "labels",
        "manager",
        "operation",
        "fieldsV1",
        "f:spec",
        ".",
        "k:{}",
        "status",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0..3).prop_map(Value::from),
        (0..3).prop_map(|n| json!(f64::from(n) / 2.0)),
        prop::sample::select(vec!["a", "Apply", "Update", "FieldsV1"]).prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 6, move |inner| {
        let name = prop::sample::select(names.clone()).prop_map(str::to_owned);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(name, inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn any_fields(depth: u32) -> BoxedStrategy<Value> {
    let step = prop_oneof![
        Just(".".to_owned()),
        "f:[a-c./:]{1,3}",
        (0..3).prop_map(|n| format!("k:{{\"a\":{n},\"b\":\"x\"}}")),
        (0..3).prop_map(|n| format!("v:\"{n}\"")),
        (0..3).prop_map(|n| format!("i:{n}")),
    ];
    if depth == 0 {
        return Just(json!({})).boxed();
    }
    prop::collection::btree_map(step, any_fields(depth - 1), 0..4)
        .prop_map(|map| {
            let below = |key: &String, value: Value| if key == "." { json!({}) } else { value };
            Value::Object(
                map.into_iter()
                    .map(|(k, v)| {
                        let v = below(&k, v);
                        (k, v)
                    })
                    .collect(),
            )
        })
        .boxed()
}

proptest! {
    #[test]
    fn applying_the_same_config_again_changes_nothing(
        first in any_config(), second in any_config(), third in any_config(),
    ) {
        let mut world = World::default();
        world.force("a", first).force("b", second.clone());
        let before = world.live.clone();
        world.apply("b", second);
        prop_assert_eq!(&world.live, &before);
        world.force("a", third.clone());
        let before = world.live.clone();
        world.apply("a", third);
        prop_assert_eq!(&world.live, &before);
    }

    #[test]
    fn what_one_manager_applied_is_gone_when_it_applies_nothing(config in any_config()) {
        let mut world = World::default();
        world.force("a", config).force("a", json!({}));
        prop_assert_eq!(world.live(), &named(json!({})));
    }

    #[test]
    fn order_of_disjoint_appliers_decides_nothing_but_order(
        labels in prop::collection::btree_map("[a-d]", "[x-z]", 1..4),
        replicas in 0..9,
    ) {
        let (one, two) = (json!({"metadata": {"labels": labels}}), json!({"spec": {"replicas": replicas}}));
        let (mut forth, mut back) = (World::default(), World::default());
        forth.apply("a", one.clone()).apply("b", two.clone());
        back.apply("b", two).apply("a", one);
        prop_assert_eq!(&forth.live()["metadata"]["labels"], &back.live()["metadata"]["labels"]);
        prop_assert_eq!(&forth.live()["spec"], &back.live()["spec"]);
        let sorted = |world: &World| {
            let mut entries = world.entries();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            entries
        };
        prop_assert_eq!(sorted(&forth), sorted(&back));
    }

    #[test]
    fn field_sets_survive_json(fields in any_fields(4)) {
        let set = FieldSet::from_json(&fields).expect("valid");
        let again = FieldSet::from_json(&set.to_json()).expect("valid");
        prop_assert_eq!(&again, &set);
        prop_assert_eq!(set.clone().union(&set), set.clone());
        prop_assert!(set.difference(&set).is_empty());
        prop_assert_eq!(set.intersection(&set), set);
    }

    #[test]
    fn junk_never_panics(live in any_json(), new in any_json(), config in any_json()) {
        let (node, schemas) = (deployment(), Schemas::default());
        let actor = World::actor_at("m", "", "2026-01-01T00:00:00Z");
        let mut updated = new.clone();
        record_update(Some(&live), &mut updated, &node, &schemas, &actor);
        record_update(None, &mut new.clone(), &node, &schemas, &actor);
        let _ = apply(Some(&live), &config, &node, &schemas, &actor, false);
        let _ = apply(Some(&updated), &config, &node, &schemas, &actor, true);
        let _ = FieldSet::from_json(&live);
    }
}
