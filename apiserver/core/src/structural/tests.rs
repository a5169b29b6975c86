use super::*;
use proptest::prelude::*;
use serde_json::json;
use std::sync::Arc;

fn compiled(schema: Value) -> Node {
    match compile(&schema) {
        Ok(schema) => Node::Inline(Arc::new(schema)),
        Err(errors) => panic!("should compile: {errors:?}"),
    }
}

/// A schema whose `spec` has these properties.
fn spec(properties: Value) -> Value {
    json!({"type": "object", "properties": {"spec": {"type": "object", "properties": properties}}})
}

/// Validates `{"spec": {"x": value}}` where `x` has `schema`; returns `field: message` of each error.
fn errors_of(schema: Value, value: Value) -> Vec<String> {
    let node = compiled(spec(json!({"x": schema})));
    validate(&json!({"spec": {"x": value}}), &node, &Schemas::default())
        .into_iter()
        .map(|error| format!("{}: {}", error.field, error.message))
        .collect()
}

#[track_caller]
fn check(schema: Value, value: Value, expected: &[&str]) {
    assert_eq!(errors_of(schema.clone(), value.clone()), expected, "{schema} {value}");
}

#[test]
fn types_are_checked() {
    for (ty, good, bad, found) in [
        ("string", json!("a"), json!(1), "integer"),
        ("integer", json!(1), json!("a"), "string"),
        ("integer", json!(2.0), json!(1.5), "number"),
        ("number", json!(1.5), json!(true), "boolean"),
        ("boolean", json!(true), json!([]), "array"),
        ("object", json!({}), json!(null), "null"),
    ] {
        check(json!({"type": ty}), good, &[]);
        let text = format!(
            "spec.x: Invalid value: \"{found}\": spec.x in body must be of type {ty}: \"{found}\""
        );
        check(json!({"type": ty}), bad, &[&text]);
    }
    check(
        json!({"type": "array", "items": {"type": "string"}}),
        json!(["a", 1]),
        &[
            "spec.x[1]: Invalid value: \"integer\": spec.x[1] in body must be of type string: \"integer\"",
        ],
    );
    check(json!({"x-kubernetes-int-or-string": true}), json!("50%"), &[]);
    check(json!({"x-kubernetes-int-or-string": true}), json!(1), &[]);
    check(
        json!({"x-kubernetes-int-or-string": true}),
        json!(true),
        &[
            "spec.x: Invalid value: \"boolean\": spec.x in body must be of type integer,string: \"boolean\"",
        ],
    );
    check(json!({"type": "string", "nullable": true}), json!(null), &[]);
}

#[test]
fn required_fields_are_missed_by_path() {
    let node = compiled(json!({
        "type": "object", "required": ["spec"],
        "properties": {"spec": {"type": "object", "properties": {"list": {"type": "array", "items": {
            "type": "object", "required": ["name"], "properties": {"name": {"type": "string"}},
        }}}}},
    }));
    let texts = |object: Value| -> Vec<String> {
        let errors = validate(&object, &node, &Schemas::default());
        errors.into_iter().map(|error| format!("{}: {}", error.field, error.message)).collect()
    };
    assert_eq!(texts(json!({})), ["spec: Required value"]);
    assert_eq!(
        texts(json!({"spec": {"list": [{"name": "a"}, {}]}})),
        ["spec.list[1].name: Required value"]
    );
}

#[test]
fn bounds_and_patterns_read_as_upstream_writes_them() {
    let number = |extra: Value| {
        let mut schema = json!({"type": "number"});
        json_patch::merge(&mut schema, &extra);
        schema
    };
    let x = "spec.x: Invalid value";
    for (schema, value, expected) in [
        (
            number(json!({"minimum": 1})),
            json!(0),
            format!("{x}: 0: spec.x in body should be greater than or equal to 1"),
        ),
        (
            number(json!({"minimum": 1, "exclusiveMinimum": true})),
            json!(1),
            format!("{x}: 1: spec.x in body should be greater than 1"),
        ),
        (
            number(json!({"maximum": 1})),
            json!(2),
            format!("{x}: 2: spec.x in body should be less than or equal to 1"),
        ),
        (
            number(json!({"maximum": 1, "exclusiveMaximum": true})),
            json!(1),
            format!("{x}: 1: spec.x in body should be less than 1"),
        ),
        (
            number(json!({"multipleOf": 0.1})),
            json!(0.35),
            format!("{x}: 0.35: spec.x in body should be a multiple of 0.1"),
        ),
        (
            json!({"type": "string", "pattern": "^a+$"}),
            json!("b"),
            format!("{x}: \"b\": spec.x in body should match '^a+$'"),
        ),
        (
            json!({"type": "string", "minLength": 2}),
            json!("é"),
            format!("{x}: \"é\": spec.x in body should be at least 2 chars long"),
        ),
        (
            json!({"type": "string", "maxLength": 1}),
            json!("ab"),
            "spec.x: Too long: may not be more than 1 bytes".into(),
        ),
        (
            json!({"type": "array", "items": {"type": "string"}, "minItems": 1}),
            json!([]),
            format!("{x}: 0: spec.x in body should have at least 1 items"),
        ),
        (
            json!({"type": "array", "items": {"type": "string"}, "maxItems": 1}),
            json!(["a", "b"]),
            "spec.x: Too many: 2: must have at most 1 items".into(),
        ),
        (
            json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true, "minProperties": 1}),
            json!({}),
            format!("{x}: {{}}: spec.x in body should have at least 1 properties"),
        ),
        (
            json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true, "maxProperties": 1}),
            json!({"a": 1, "b": 2}),
            "spec.x: Too many: 2: must have at most 1 items".into(),
        ),
        (
            json!({"type": "string", "enum": ["a", "b"]}),
            json!("c"),
            "spec.x: Unsupported value: \"c\": supported values: \"a\", \"b\"".into(),
        ),
        (
            json!({"type": "integer", "enum": [1, 2]}),
            json!(3),
            "spec.x: Unsupported value: 3: supported values: \"1\", \"2\"".into(),
        ),
        (
            json!({"type": "integer", "format": "int32"}),
            json!(3_000_000_000_u64),
            format!("{x}: 3000000000: spec.x in body must be of type int32: 3000000000"),
        ),
        (
            json!({"type": "string", "format": "date-time"}),
            json!("yesterday"),
            format!("{x}: \"yesterday\": spec.x in body must be of type date-time: \"yesterday\""),
        ),
    ] {
        check(schema, value, &[&expected]);
    }
    check(number(json!({"minimum": 1, "maximum": 3, "multipleOf": 0.1})), json!(1.3), &[]);
    check(
        json!({"type": "string", "minLength": 1, "maxLength": 1, "pattern": "é"}),
        json!("é"),
        &[],
    );
}

#[test]
fn formats_accept_and_refuse() {
    for (format, good, bad) in [
        (
            "date-time",
            vec!["2026-01-02T03:04:05Z", "2026-01-02T03:04:05.123+02:00"],
            vec!["2026-01-02", "2026-01-02 03:04:05Z", "2026-13-02T03:04:05Z", "x"],
        ),
        ("date", vec!["2024-02-29"], vec!["2023-02-29", "20240229", "2024-2-9"]),
        (
            "duration",
            vec!["1h30m", "1.5s", "-2ms", "0", "3 days", "1 hour"],
            vec!["", "5", "abc", "1x", "h"],
        ),
        ("byte", vec!["", "aGk="], vec!["a", "$$$$"]),
        ("ipv4", vec!["10.0.0.1"], vec!["10.0.0", "::1"]),
        ("ipv6", vec!["::1"], vec!["10.0.0.1"]),
        ("cidr", vec!["10.0.0.0/8", "fd00::/64"], vec!["10.0.0.0", "10.0.0.0/33", "10.0.0.0/+8"]),
        (
            "mac",
            vec!["00:11:22:aa:bb:cc", "00-11-22-aa-bb-cc"],
            vec!["00:11:22:aa:bb", "00:11:22:aa:bb:gg"],
        ),
        (
            "uuid",
            vec!["7ddad8a4-1c7e-4b0a-9df5-cb5d9be1f6e7"],
            vec!["7ddad8a41c7e4b0a9df5cb5d9be1f6e7"],
        ),
        (
            "uuid3",
            vec!["7ddad8a4-1c7e-3b0a-9df5-cb5d9be1f6e7"],
            vec!["7ddad8a4-1c7e-4b0a-9df5-cb5d9be1f6e7"],
        ),
        ("hostname", vec!["Example.com", "a"], vec!["-a", "a..b", ""]),
        ("email", vec!["a@example.com"], vec!["a", "@b", "a b@c"]),
        ("uri", vec!["http://x/y", "/path"], vec!["x", "http://a b"]),
        ("hexcolor", vec!["#fff", "#A0b1C2"], vec!["fff", "#ff"]),
        ("k8s-short-name", vec!["a-1"], vec!["A", "a.b"]),
        ("k8s-long-name", vec!["a.b-c"], vec!["a..b", "A"]),
        ("no-such-format", vec!["anything"], vec![]),
    ] {
        for text in good {
            assert!(format::fits(format, &json!(text)), "{format} should accept `{text}`");
        }
        for text in bad {
            assert!(!format::fits(format, &json!(text)), "{format} should refuse `{text}`");
        }
    }
    assert!(format::fits("int64", &json!(i64::MAX)) && !format::fits("int64", &json!(u64::MAX)));
    assert!(!format::fits("float", &json!(1e300)) && format::fits("double", &json!(1e300)));
}

#[test]
fn combinators_are_checked() {
    let properties =
        json!({"a": {"type": "string"}, "b": {"type": "string"}, "n": {"type": "integer"}});
    let of = |rules: Value| {
        let mut schema = json!({"type": "object", "properties": properties});
        json_patch::merge(&mut schema, &rules);
        schema
    };
    let either = of(json!({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}));
    check(either.clone(), json!({"a": "1"}), &[]);
    check(
        either.clone(),
        json!({"a": "1", "b": "2"}),
        &[
            "spec.x: Invalid value: \"\": \"spec.x\" must validate one and only one schema (oneOf). Found 2 valid alternatives",
        ],
    );
    check(
        either,
        json!({}),
        &[
            "spec.x: Invalid value: \"\": \"spec.x\" must validate one and only one schema (oneOf). Found none valid",
            "spec.x.a: Required value",
        ],
    );
    let any = of(json!({"anyOf": [{"properties": {"n": {"minimum": 5}}}, {"required": ["b"]}]}));
    check(any.clone(), json!({"n": 6}), &[]);
    check(any.clone(), json!({"n": 1, "b": "x"}), &[]);
    check(
        any,
        json!({"n": 1}),
        &[
            "spec.x: Invalid value: \"\": \"spec.x\" must validate at least one schema (anyOf)",
            "spec.x.n: Invalid value: 1: spec.x.n in body should be greater than or equal to 5",
        ],
    );
    check(
        of(json!({"allOf": [{"required": ["a"]}, {"required": ["b"]}]})),
        json!({"a": "1"}),
        &[
            "spec.x: Invalid value: \"\": \"spec.x\" must validate all the schemas (allOf)",
            "spec.x.b: Required value",
        ],
    );
    let not = of(json!({"not": {"properties": {"a": {"enum": ["bad"]}}, "required": ["a"]}}));
    check(not.clone(), json!({"a": "good"}), &[]);
    check(
        not,
        json!({"a": "bad"}),
        &["spec.x: Invalid value: \"\": \"spec.x\" must not validate the schema (not)"],
    );
    let int_or_string = json!({"x-kubernetes-int-or-string": true,
        "anyOf": [{"type": "integer"}, {"type": "string"}], "pattern": "^[0-9]+%$"});
    check(int_or_string.clone(), json!(3), &[]);
    check(
        int_or_string,
        json!("x"),
        &["spec.x: Invalid value: \"x\": spec.x in body should match '^[0-9]+%$'"],
    );
}

#[test]
fn list_items_are_unique_by_key_or_value() {
    let map = json!({
        "type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["port", "protocol"],
        "items": {"type": "object", "required": ["port"], "properties": {
            "port": {"type": "integer"}, "protocol": {"type": "string", "default": "TCP"},
        }},
    });
    check(map.clone(), json!([{"port": 1}, {"port": 1, "protocol": "UDP"}]), &[]);
    check(
        map,
        json!([{"port": 1}, {"port": 1, "protocol": "TCP"}]),
        &["spec.x[1]: Duplicate value: {\"port\":1,\"protocol\":\"TCP\"}"],
    );
    let set =
        json!({"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}});
    check(set, json!(["a", "b", "a"]), &["spec.x[2]: Duplicate value: \"a\""]);
}

#[test]
fn unknown_fields_are_found_and_pruned() {
    let node = compiled(spec(json!({
        "known": {"type": "string"},
        "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
        "map": {"type": "object", "additionalProperties": {"type": "object", "properties": {"a": {"type": "string"}}}},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true,
                 "properties": {"tight": {"type": "object", "properties": {"a": {"type": "string"}}}}},
        "any": {"x-kubernetes-preserve-unknown-fields": true},
        "pod": {"type": "object", "x-kubernetes-embedded-resource": true,
                "properties": {"spec": {"type": "object", "properties": {}}}},
    })));
    let mut object = json!({
        "apiVersion": "v1", "kind": "X", "metadata": {"name": "x"}, "top": 1,
        "spec": {
            "known": "a", "extra": 1,
            "list": [{"a": "1"}, {"b": 1}],
            "map": {"k": {"a": "1", "b": 1}},
            "free": {"x": {"y": 1}, "tight": {"a": "1", "z": 1}},
            "any": [{"x": 1}],
            "pod": {"apiVersion": "v1", "kind": "P", "metadata": {"name": "p"}, "spec": {"q": 1}, "r": 1},
        },
    });
    let schemas = Schemas::default();
    assert_eq!(
        unknown_fields(&object, &node, &schemas),
        [
            "spec.extra",
            "spec.free.tight.z",
            "spec.list[1].b",
            "spec.map.k.b",
            "spec.pod.r",
            "spec.pod.spec.q",
            "top",
        ]
    );
    prune(&mut object, &node, &schemas);
    assert_eq!(unknown_fields(&object, &node, &schemas), Vec::<String>::new());
    assert_eq!(object["spec"]["free"], json!({"x": {"y": 1}, "tight": {"a": "1"}}));
    assert_eq!(object["spec"]["any"], json!([{"x": 1}]));
    assert_eq!(object["spec"]["pod"]["metadata"], json!({"name": "p"}));
}

#[test]
fn embedded_resources_need_their_type() {
    let schema = json!({"type": "object", "x-kubernetes-embedded-resource": true, "x-kubernetes-preserve-unknown-fields": true});
    check(schema.clone(), json!({"apiVersion": "v1", "kind": "Pod"}), &[]);
    check(
        schema,
        json!({"kind": ""}),
        &[
            "spec.x.apiVersion: Required value: must not be empty",
            "spec.x.kind: Required value: must not be empty",
        ],
    );
}

#[test]
fn defaults_fill_what_is_absent_and_replace_null_where_null_is_nothing() {
    let node = compiled(spec(json!({
        "n": {"type": "integer", "default": 3},
        "nullable": {"type": "integer", "default": 3, "nullable": true},
        "plain": {"type": "string"},
        "nested": {"type": "object", "default": {}, "properties": {"a": {"type": "string", "default": "x"}}},
        "list": {"type": "array", "items": {"type": "object", "properties": {"p": {"type": "string", "default": "TCP"}}}},
        "map": {"type": "object", "additionalProperties": {"type": "object", "properties": {"q": {"type": "boolean", "default": false}}}},
    })));
    let schemas = Schemas::default();
    let mut object = json!({"spec": {
        "n": null, "nullable": null, "plain": null, "list": [{}, {"p": "UDP"}], "map": {"k": {}},
    }});
    default(&mut object, &node, &schemas);
    let expected = json!({"spec": {
        "n": 3, "nullable": null, "nested": {"a": "x"},
        "list": [{"p": "TCP"}, {"p": "UDP"}], "map": {"k": {"q": false}},
    }});
    assert_eq!(object, expected);
    default(&mut object, &node, &schemas);
    assert_eq!(object, expected);
    let mut absent = json!({});
    default(&mut absent, &node, &schemas);
    assert_eq!(absent, json!({}), "an absent parent stays absent");
}

#[test]
fn every_extension_is_compiled() {
    let node = compiled(spec(json!({
        "m": {"type": "object", "x-kubernetes-map-type": "atomic", "additionalProperties": {"type": "string"}},
        "l": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
              "items": {"type": "object", "required": ["k"], "properties": {"k": {"type": "string"}}}},
        "c": {"type": "string", "x-kubernetes-validations": [{"rule": "self != ''"}]},
    })));
    let schemas = Schemas::default();
    let root = schemas.resolve(&node);
    assert!(
        matches!(&root.properties["metadata"], Node::Ref(name) if &**name == crate::facts::OBJECT_META)
    );
    let spec = schemas.resolve(&root.properties["spec"]);
    assert!(schemas.resolve(&spec.properties["m"]).atomic_map);
    let list = schemas.resolve(&spec.properties["l"]);
    assert_eq!((list.list, &*list.list_map_keys[0]), (ListType::Map, "k"));
    assert!(schemas.resolve(&spec.properties["c"]).checks.is_some());
}

#[test]
fn root_metadata_may_restrict_the_name_only() {
    let schema = |metadata: Value| json!({"type": "object", "properties": {"metadata": metadata}});
    let node = compiled(schema(json!({"type": "object",
        "properties": {"name": {"type": "string", "maxLength": 3}}})));
    let errors = validate(&json!({"metadata": {"name": "long"}}), &node, &Schemas::default());
    assert!(errors.iter().any(|error| error.field == "metadata.name"), "{errors:?}");
    assert!(validate(&json!({"metadata": {"name": "ok"}}), &node, &Schemas::default()).is_empty());
    compiled(schema(json!({"type": "object"})));
    let refused = compile(&schema(json!({"type": "object",
        "properties": {"labels": {"type": "object"}}})));
    assert_eq!(refused.unwrap_err()[0].field, "properties[metadata]");
}

#[test]
fn schemas_that_are_not_structural_are_refused() {
    let list = |extra: Value| {
        let mut schema = json!({"type": "array", "items": {"type": "object",
            "properties": {"k": {"type": "string"}}}});
        json_patch::merge(&mut schema, &extra);
        schema
    };
    let at = |rest: &str| format!("properties[spec].properties[x]{rest}");
    for (schema, field, part) in [
        (json!({}), at(".type"), "Required value: must not be empty for specified object fields"),
        (json!({"type": "text"}), at(".type"), "Unsupported value: \"text\""),
        (json!({"type": 1}), at(".type"), "must be a string"),
        (json!({"type": "array"}), at(".items"), "Required value: must be specified"),
        (json!({"type": "array", "items": [{"type": "string"}]}), at(".items"), "not an array"),
        (
            json!({"type": "array", "items": {}}),
            at(".items.type"),
            "must not be empty for specified array items",
        ),
        (json!({"type": "object", "$ref": "#/x"}), at(".$ref"), "is not supported"),
        (
            json!({"type": "object", "additionalProperties": false}),
            at(".additionalProperties"),
            "cannot be set to false",
        ),
        (
            json!({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "string"}}),
            at(".additionalProperties"),
            "mutual exclusive",
        ),
        (
            json!({"type": "array", "items": {"type": "string"}, "uniqueItems": true}),
            at(".uniqueItems"),
            "quadratic",
        ),
        (
            json!({"type": "string", "x-kubernetes-int-or-string": true}),
            at(".type"),
            "must be empty if x-kubernetes-int-or-string is true",
        ),
        (
            json!({"type": "object", "x-kubernetes-preserve-unknown-fields": false}),
            at(".x-kubernetes-preserve-unknown-fields"),
            "must be true or undefined",
        ),
        (
            json!({"type": "object", "x-kubernetes-embedded-resource": true}),
            at(".properties"),
            "must not be empty if x-kubernetes-embedded-resource",
        ),
        (
            json!({"type": "string", "x-kubernetes-map-type": "atomic"}),
            at(".type"),
            "must be object if x-kubernetes-map-type",
        ),
        (
            json!({"type": "object", "x-kubernetes-map-type": "odd"}),
            at(".x-kubernetes-map-type"),
            "Unsupported value: \"odd\"",
        ),
        (
            list(json!({"x-kubernetes-list-type": "bag"})),
            at(".x-kubernetes-list-type"),
            "Unsupported value: \"bag\"",
        ),
        (
            list(json!({"x-kubernetes-list-type": "map"})),
            at(".x-kubernetes-list-map-keys"),
            "must not be empty",
        ),
        (
            list(json!({"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["z"]})),
            at(".x-kubernetes-list-map-keys[0]"),
            "must be the name of an item property",
        ),
        (
            list(json!({"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"]})),
            at(".items.properties[k].default"),
            "must have a default or be a required property",
        ),
        (
            list(json!({"x-kubernetes-list-map-keys": ["k"]})),
            at(".x-kubernetes-list-type"),
            "must be map",
        ),
        (list(json!({"x-kubernetes-list-type": "set"})), at(".items"), "items of a set"),
        (
            json!({"type": "string", "pattern": "("}),
            at(".pattern"),
            "must be a valid regular expression",
        ),
        (json!({"type": "string", "minLength": -1}), at(".minLength"), "non-negative"),
        (json!({"type": "string", "enum": []}), at(".enum"), "at least one"),
        (json!({"type": "integer", "default": "x"}), at(".default"), "must be of type integer"),
        (
            json!({"type": "object", "properties": {}, "default": {"a": 1}}),
            at(".default"),
            "unknown field a",
        ),
        (
            json!({"type": "object", "properties": {"a": {"type": "string"}}, "anyOf": [{"properties": {"b": {"minLength": 1}}}]}),
            at(".properties[b]"),
            "because it is defined in",
        ),
        (
            json!({"type": "string", "anyOf": [{"type": "string"}]}),
            at(".anyOf[0].type"),
            "must be empty to be structural",
        ),
        (
            json!({"type": "string", "not": {"default": "x"}}),
            at(".not.default"),
            "must be undefined to be structural",
        ),
        (json!({"type": "string", "oneOf": {}}), at(".oneOf"), "must be a list of schemas"),
        (json!("string"), at(""), "must be a schema object"),
    ] {
        let errors = compile(&spec(json!({"x": schema.clone()}))).expect_err("should be refused");
        assert!(
            errors.iter().any(|error| error.field == field && error.message.contains(part)),
            "{schema}: {errors:?}"
        );
    }
    for (schema, field) in [
        (json!(1), ""),
        (json!({}), "type"),
        (json!({"type": "string"}), "type"),
        (
            json!({"type": "object", "additionalProperties": {"type": "string"}}),
            "additionalProperties",
        ),
        (json!({"type": "object", "default": {}}), "default"),
    ] {
        let errors = compile(&schema).expect_err("should be refused");
        assert!(errors.iter().any(|error| error.field == field), "{schema}: {errors:?}");
    }
}

#[test]
fn schema_nested_past_the_bound_is_refused() {
    let mut schema = json!({"type": "string"});
    for _ in 0..=DEPTH_MAX {
        schema = json!({"type": "object", "properties": {"a": schema}});
    }
    let errors = compile(&schema).expect_err("should be refused");
    assert!(errors[0].message.contains("nested deeper"), "{errors:?}");
}

#[test]
fn shape_of_built_in_kinds_is_respected_by_the_same_functions() {
    let catalog = crate::catalog::Catalog::builtin();
    let pods = catalog.find("", "v1", "pods").expect("pods exist");
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "creationTimestamp": null, "labels": {"a": "1"}},
        "spec": {"containers": [{"name": "c", "image": "i", "typo": 1, "resources": {"limits": {"cpu": 1}}}], "nope": {}},
    });
    let schemas = catalog.schemas();
    assert_eq!(
        unknown_fields(&pod, &pods.schema, schemas),
        ["spec.containers[0].typo", "spec.nope"]
    );
    prune(&mut pod, &pods.schema, schemas);
    default(&mut pod, &pods.schema, schemas);
    assert_eq!(validate(&pod, &pods.schema, schemas), []);
    pod["spec"]["containers"][0]["name"] = 1.into();
    assert_eq!(validate(&pod, &pods.schema, schemas)[0].field, "spec.containers[0].name");
}

fn any_json() -> impl Strategy<Value = Value> {
    let names = vec![
        "type",
        "properties",
        "items",
        "additionalProperties",
        "x",
        "enum",
        "default",
        "required",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "pattern",
        "format",
        "minimum",
        "nullable",
        "metadata",
        "x-kubernetes-list-type",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-int-or-string",
        "x-kubernetes-preserve-unknown-fields",
        "x-kubernetes-embedded-resource",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-1..3).prop_map(Value::from),
        prop::sample::select(vec![
            "object",
            "array",
            "string",
            "integer",
            "map",
            "set",
            "x",
            "date-time",
            "(",
            "duration",
            "ü"
        ])
        .prop_map(Value::from),
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

proptest! {
    #[test]
    fn junk_schemas_and_objects_never_panic(schema in any_json(), object in any_json()) {
        let mut rooted = json!({"type": "object", "properties": {"x": schema}});
        for one in [schema, rooted.take()] {
            if let Ok(schema) = compile(&one) {
                let (node, schemas) = (Node::Inline(Arc::new(schema)), Schemas::default());
                let mut object = object.clone();
                let _ = validate(&object, &node, &schemas);
                prune(&mut object, &node, &schemas);
                prop_assert!(unknown_fields(&object, &node, &schemas).is_empty());
                default(&mut object, &node, &schemas);
                let once = object.clone();
                default(&mut object, &node, &schemas);
                prop_assert_eq!(object, once);
            }
        }
    }

    #[test]
    fn formats_never_panic(text in ".{0,20}") {
        for name in ["date-time", "date", "duration", "byte", "cidr", "mac", "uuid4", "hostname", "email", "uri", "hexcolor", "k8s-long-name"] {
            let _ = format::fits(name, &json!(text));
        }
    }
}
