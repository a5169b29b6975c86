use super::*;
use crate::schema::{Node, Schema, Schemas, Type};
use proptest::prelude::*;
use std::sync::Arc;

fn inline(schema: Schema) -> Node {
    Node::Inline(Arc::new(schema))
}

fn object(fields: &[(&str, Schema)]) -> Schema {
    let properties =
        fields.iter().map(|(name, schema)| ((*name).into(), inline(schema.clone()))).collect();
    Schema { ty: Type::Object, properties, ..Schema::default() }
}

fn scalar() -> Schema {
    Schema { ty: Type::String, ..Schema::default() }
}

fn list(items: Schema, merge: bool, key: Option<&str>) -> Schema {
    Schema {
        ty: Type::Array,
        items: Some(inline(items)),
        patch_merge: merge,
        patch_merge_key: key.map(Arc::from),
        ..Schema::default()
    }
}

/// A small pod: containers and env merge by name, finalizers as a set, args are replaced.
fn pod() -> Node {
    let env = list(object(&[("name", scalar()), ("value", scalar())]), true, Some("name"));
    let container = object(&[
        ("name", scalar()),
        ("image", scalar()),
        ("args", list(scalar(), false, None)),
        ("env", env),
    ]);
    inline(object(&[
        ("finalizers", list(scalar(), true, None)),
        ("containers", list(container, true, Some("name"))),
        (
            "labels",
            Schema { additional: Some(inline(scalar())), ty: Type::Object, ..Schema::default() },
        ),
        (
            "strategy",
            object(&[("type", scalar()), ("rollingUpdate", object(&[("maxSurge", scalar())]))]),
        ),
    ]))
}

#[track_caller]
fn check(live: Value, patch: Value, expected: Value) {
    let merged = strategic_merge(&live, &patch, &pod(), &Schemas::default());
    assert_eq!(merged.map_err(|error| error.message), Ok(expected), "{patch}");
}

#[track_caller]
fn refused(live: Value, patch: Value, part: &str) {
    let error = strategic_merge(&live, &patch, &pod(), &Schemas::default()).expect_err("refused");
    assert_eq!(error.code, 400);
    assert!(error.message.contains(part), "{}", error.message);
}

fn two_containers() -> Value {
    json!({"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]})
}

#[test]
fn maps_merge_and_null_deletes() {
    check(
        json!({"labels": {"a": "1", "b": "2"}}),
        json!({"labels": {"b": null, "c": "3"}, "strategy": {"type": "x", "gone": null}}),
        json!({"labels": {"a": "1", "c": "3"}, "strategy": {"type": "x"}}),
    );
    check(json!({"labels": {"a": "1"}}), json!({"labels": null}), json!({}));
}

#[test]
fn keyed_lists_merge_item_by_item() {
    check(
        two_containers(),
        json!({"containers": [{"name": "b", "image": "3"}]}),
        json!({"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "3"}]}),
    );
}

#[test]
fn new_items_come_before_those_that_the_patch_does_not_name() {
    check(
        two_containers(),
        json!({"containers": [{"name": "c", "image": "3"}]}),
        json!({"containers": [
            {"name": "c", "image": "3"}, {"name": "a", "image": "1"}, {"name": "b", "image": "2"},
        ]}),
    );
}

#[test]
fn nested_keyed_lists_merge_too_and_plain_lists_are_replaced() {
    check(
        json!({"containers": [{"name": "a", "args": ["x", "y"],
            "env": [{"name": "E", "value": "1"}, {"name": "F", "value": "2"}]}]}),
        json!({"containers": [{"name": "a", "args": ["z"], "env": [{"name": "F", "value": "3"}]}]}),
        json!({"containers": [{"name": "a", "args": ["z"],
            "env": [{"name": "E", "value": "1"}, {"name": "F", "value": "3"}]}]}),
    );
}

#[test]
fn patch_delete_takes_an_item_out() {
    check(
        two_containers(),
        json!({"containers": [{"name": "a", "$patch": "delete"}]}),
        json!({"containers": [{"name": "b", "image": "2"}]}),
    );
    check(
        two_containers(),
        json!({"containers": [{"name": "missing", "$patch": "delete"}]}),
        two_containers(),
    );
}

#[test]
fn patch_replace_replaces_maps_and_lists() {
    check(
        json!({"labels": {"a": "1"}}),
        json!({"labels": {"b": "2", "$patch": "replace"}}),
        json!({"labels": {"b": "2"}}),
    );
    check(
        two_containers(),
        json!({"containers": [{"name": "c", "image": "3"}, {"$patch": "replace"}]}),
        json!({"containers": [{"name": "c", "image": "3"}]}),
    );
    check(
        two_containers(),
        json!({"containers": [{"name": "a", "$patch": "replace"}]}),
        json!({"containers": [{"name": "a"}, {"name": "b", "image": "2"}]}),
    );
    check(
        json!({"labels": {"a": "1"}}),
        json!({"labels": {"$patch": "delete"}}),
        json!({"labels": {}}),
    );
    check(
        json!({"labels": {"a": "1"}}),
        json!({"labels": {"$patch": "merge", "b": "2"}}),
        json!({"labels": {"a": "1", "b": "2"}}),
    );
}

#[test]
fn retain_keys_drops_the_other_fields() {
    check(
        json!({"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "1"}}}),
        json!({"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}),
        json!({"strategy": {"type": "Recreate"}}),
    );
    refused(
        json!({}),
        json!({"strategy": {"$retainKeys": ["type"], "rollingUpdate": {}}}),
        "$retainKeys",
    );
    refused(json!({}), json!({"strategy": {"$retainKeys": "type"}}), "$retainKeys");
}

#[test]
fn lists_of_scalars_merge_as_sets_and_lose_what_is_named() {
    check(
        json!({"finalizers": ["a", "b"]}),
        json!({"finalizers": ["b", "c"], "$setElementOrder/finalizers": ["a", "b", "c"]}),
        json!({"finalizers": ["a", "b", "c"]}),
    );
    check(
        json!({"finalizers": ["a", "b"]}),
        json!({"$deleteFromPrimitiveList/finalizers": ["a"]}),
        json!({"finalizers": ["b"]}),
    );
    check(json!({}), json!({"$deleteFromPrimitiveList/finalizers": ["a"]}), json!({}));
    refused(json!({}), json!({"$deleteFromPrimitiveList/finalizers": [{}]}), "primitive list");
}

#[test]
fn set_element_order_orders_with_and_without_other_changes() {
    check(
        two_containers(),
        json!({"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}),
        json!({"containers": [{"name": "b", "image": "2"}, {"name": "a", "image": "1"}]}),
    );
    check(
        json!({"containers": [{"name": "sidecar"}, {"name": "a"}, {"name": "late"}]}),
        json!({
            "$setElementOrder/containers": [{"name": "a"}, {"name": "b"}],
            "containers": [{"name": "b", "image": "2"}],
        }),
        json!({"containers": [
            {"name": "sidecar"}, {"name": "a"}, {"name": "b", "image": "2"}, {"name": "late"},
        ]}),
    );
    refused(
        two_containers(),
        json!({"$setElementOrder/containers": [{"name": "a"}], "containers": [{"name": "b"}]}),
        "$setElementOrder",
    );
}

#[test]
fn malformed_strategic_patches_are_refused() {
    refused(
        two_containers(),
        json!({"containers": [{"image": "x"}]}),
        "does not contain declared merge key: name",
    );
    refused(two_containers(), json!({"containers": ["a"]}), "scalar");
    refused(json!({}), json!({"containers": [[1]]}), "no merge key");
    refused(json!({}), json!({"labels": {"$patch": "remove"}}), "unknown patch type");
    refused(json!({}), json!([]), "must be an object");
}

#[test]
fn json_patch_applies_in_order() {
    let patched = json_patch(
        &json!({"spec": {"replicas": 1, "list": [1, 3]}}),
        &json!([
            {"op": "test", "path": "/spec/replicas", "value": 1},
            {"op": "replace", "path": "/spec/replicas", "value": 2},
            {"op": "add", "path": "/spec/list/1", "value": 2},
            {"op": "add", "path": "/spec/list/-", "value": 4},
            {"op": "copy", "from": "/spec/list", "path": "/spec/copy"},
            {"op": "remove", "path": "/spec/copy/0"},
        ]),
    )
    .expect("valid");
    assert_eq!(patched, json!({"spec": {"replicas": 2, "list": [1, 2, 3, 4], "copy": [2, 3, 4]}}));
}

#[test]
fn failed_test_is_unprocessable_and_says_where() {
    let error = json_patch(
        &json!({"spec": {"replicas": 1}}),
        &json!([{"op": "test", "path": "/spec/replicas", "value": 2}]),
    )
    .expect_err("refused");
    assert_eq!((error.code, error.reason), (422, "Invalid"));
    assert_eq!(error.message, "the server rejected our request due to an error in our request");
    let cause = &error.to_status()["details"]["causes"][0];
    assert_eq!(cause["message"], "operation 0 (`test` `/spec/replicas`): value did not match");
}

#[test]
fn malformed_json_patches_are_refused() {
    for (patch, code) in [
        (json!({}), 400),
        (json!([{}]), 400),
        (json!([{"op": "eat", "path": "/a"}]), 400),
        (json!([{"op": "remove", "path": "a"}]), 400),
        (json!([{"op": "remove", "path": "/missing"}]), 422),
        (json!([{"op": "add", "path": "/a/9", "value": 1}]), 422),
        (json!([{"op": "copy", "from": "/x", "path": "/y"}]), 422),
        (json!(vec![json!({"op": "test", "path": "", "value": 1}); OPERATIONS_MAX + 1]), 413),
    ] {
        let result = json_patch(&json!({"a": [1]}), &patch);
        assert_eq!(result.map_err(|error| error.code), Err(code));
    }
}

#[test]
fn copies_that_double_an_object_again_and_again_are_stopped() {
    let double = json!({"op": "copy", "from": "/a", "path": "/a/-"});
    let error = json_patch(&json!({"a": ["x".repeat(1000)]}), &json!(vec![double; 64]));
    assert_eq!(error.map_err(|error| error.code), Err(413));
}

#[test]
fn merge_patch_follows_rfc_7386() {
    for (live, patch, expected) in [
        (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
        (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
        (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
        (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
        (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
        (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
        (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
    ] {
        assert_eq!(merge_patch(&live, &patch), expected);
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let name = prop::sample::select(vec![
        "name",
        "containers",
        "env",
        "finalizers",
        "labels",
        "image",
        "$patch",
        "$retainKeys",
        "$setElementOrder/containers",
        "$deleteFromPrimitiveList/finalizers",
        "op",
        "path",
        "x",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0..3).prop_map(Value::from),
        prop::sample::select(vec!["a", "b", "delete", "replace", "merge", "name", "/x", "test"])
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 48, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(name.clone().prop_map(str::to_owned), inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn junk_patches_never_panic(live in any_json(), patch in any_json()) {
        let _ = json_patch(&live, &patch);
        let _ = merge_patch(&live, &patch);
        let _ = strategic_merge(&live, &patch, &pod(), &Schemas::default());
    }

    #[test]
    fn no_directive_is_left_in_a_result(live in any_json(), patch in any_json()) {
        fn has_directive(value: &Value) -> bool {
            match value {
                Value::Object(map) => map.iter().any(|(k, v)| k.starts_with('$') || has_directive(v)),
                Value::Array(items) => items.iter().any(has_directive),
                _ => false,
            }
        }
        fn without_directives(value: Value) -> Value {
            match value {
                Value::Object(map) => Value::Object(
                    map.into_iter()
                        .filter(|(name, _)| !name.starts_with('$'))
                        .map(|(name, value)| (name, without_directives(value)))
                        .collect(),
                ),
                Value::Array(items) => items.into_iter().map(without_directives).collect(),
                other => other,
            }
        }
        let live = without_directives(live);
        if let Ok(merged) = strategic_merge(&live, &patch, &pod(), &Schemas::default()) {
            prop_assert!(!has_directive(&merged), "{}", merged);
        }
    }
}

#[test]
fn built_in_kinds_merge_as_their_definitions_say() {
    let catalog = crate::catalog::Catalog::builtin();
    let kind = catalog.find("apps", "v1", "deployments").expect("deployments exist");
    let live = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {}}, "template": {"spec": {
        "containers": [{"name": "a", "image": "1", "ports": [{"containerPort": 80}]}],
        "tolerations": [{"key": "x"}],
        "volumes": [{"name": "v", "emptyDir": {}}],
    }}}});
    let patch = json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}, "template": {"spec": {
        "$setElementOrder/containers": [{"name": "a"}, {"name": "b"}],
        "containers": [
            {"name": "b", "image": "2"},
            {"name": "a", "ports": [{"containerPort": 81}, {"containerPort": 80, "$patch": "delete"}]},
        ],
        "tolerations": [{"key": "y"}],
        "volumes": [{"name": "v", "$retainKeys": ["name", "configMap"], "configMap": {"name": "c"}}],
    }}}});
    let merged = strategic_merge(&live, &patch, &kind.schema, catalog.schemas()).expect("valid");
    assert_eq!(
        merged,
        json!({"spec": {"strategy": {"type": "Recreate"}, "template": {"spec": {
            "containers": [
                {"name": "a", "image": "1", "ports": [{"containerPort": 81}]},
                {"name": "b", "image": "2"},
            ],
            "tolerations": [{"key": "y"}],
            "volumes": [{"name": "v", "configMap": {"name": "c"}}],
        }}}})
    );
}
