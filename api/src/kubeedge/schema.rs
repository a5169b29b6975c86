//! Schemas and printer columns of KubeEdge's device and rule kinds.
//!
//! Types and enumerations are KubeEdge's; what its documentation calls required and its schema does not check stays
//! unchecked, so that every object that KubeEdge takes is taken here. Fields that we do not know pass, for those of a
//! newer KubeEdge.
//!
//! Caller: [`super`].
//!
//! Source: kubeedge/kubeedge, build/crds/{devices,router}.

use serde_json::{Map, Value, json};

/// An object of any content.
pub(super) fn anything() -> Value {
    json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

fn text() -> Value {
    json!({"type": "string"})
}

fn number() -> Value {
    json!({"type": "integer", "format": "int64"})
}

fn flag() -> Value {
    json!({"type": "boolean"})
}

fn texts() -> Value {
    json!({"type": "object", "additionalProperties": {"type": "string"}})
}

fn list(items: Value) -> Value {
    json!({"type": "array", "items": items})
}

/// An object with these fields, and others.
fn object<const N: usize>(fields: [(&str, Value); N]) -> Value {
    let fields: Map<String, Value> =
        fields.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect();
    json!({"type": "object", "properties": fields, "x-kubernetes-preserve-unknown-fields": true})
}

fn described(mut schema: Value, description: &str) -> Value {
    schema["description"] = description.into();
    schema
}

fn required(mut schema: Value, names: &[&str]) -> Value {
    schema["required"] = json!(names);
    schema
}

fn one_of(names: &[&str]) -> Value {
    json!({"type": "string", "enum": names})
}

/// A whole object of a kind.
fn kind(spec: Value, status: Value) -> Value {
    let mut schema = object([("spec", spec), ("status", status)]);
    for name in ["apiVersion", "kind"] {
        schema["properties"][name] = text();
    }
    schema["properties"]["metadata"] = json!({"type": "object"});
    schema
}

fn twin_value() -> Value {
    required(object([("value", text()), ("metadata", texts())]), &["value"])
}

fn visitors() -> Value {
    object([("protocolName", text()), ("configData", anything())])
}

pub(super) fn device() -> Value {
    let client = |name: &str, fields: Value| object([(name, fields)]);
    let database = object([
        (
            "influxdb2",
            object([
                (
                    "influxdb2ClientConfig",
                    object([("url", text()), ("org", text()), ("bucket", text())]),
                ),
                (
                    "influxdb2DataConfig",
                    object([("measurement", text()), ("tag", texts()), ("fieldKey", text())]),
                ),
            ]),
        ),
        (
            "redis",
            client(
                "redisClientConfig",
                object([
                    ("addr", text()),
                    ("db", number()),
                    ("poolsize", number()),
                    ("minIdleConns", number()),
                ]),
            ),
        ),
        (
            "TDEngine",
            client("TDEngineClientConfig", object([("addr", text()), ("dbName", text())])),
        ),
        (
            "mysql",
            client(
                "mysqlClientConfig",
                object([("addr", text()), ("database", text()), ("userName", text())]),
            ),
        ),
    ]);
    // KubeEdge's objects have null for what is not set in a database's configuration.
    let database = nullable(database);
    let push = object([
        (
            "http",
            object([
                ("hostName", text()),
                ("port", number()),
                ("requestPath", text()),
                ("timeout", number()),
            ]),
        ),
        (
            "mqtt",
            object([
                ("address", text()),
                ("topic", text()),
                ("qos", json!({"type": "integer", "format": "int32"})),
                ("retained", flag()),
            ]),
        ),
        ("otel", object([("endpointURL", text())])),
        ("dbMethod", database),
        ("anomalyDetection", anything()),
    ]);
    let property = object([
        ("name", text()),
        ("desired", described(twin_value(), "What the property should be.")),
        ("visitors", described(visitors(), "How the mapper reads and writes it.")),
        ("reportCycle", described(number(), "Milliseconds between two pushes; 0 is a second.")),
        ("collectCycle", described(number(), "Milliseconds between two reports; 0 is a second.")),
        ("reportToCloud", flag()),
        ("pushMethod", push),
    ]);
    let method =
        object([("name", text()), ("description", text()), ("propertyNames", list(text()))]);
    let report = object([("reportToCloud", flag()), ("reportCycle", number())]);
    let spec = object([
        (
            "deviceModelRef",
            described(object([("name", text())]), "The DeviceModel, in the same namespace."),
        ),
        ("nodeName", described(text(), "The edge node to which the device is connected.")),
        ("properties", list(property)),
        (
            "protocol",
            object([
                ("protocolName", described(text(), "Selects the mapper.")),
                ("configData", anything()),
            ]),
        ),
        ("methods", list(method)),
        ("stateReport", report),
    ]);
    kind(spec, anything())
}

pub(super) fn device_model() -> Value {
    let property = object([
        ("name", text()),
        ("description", text()),
        ("type", one_of(&["INT", "FLOAT", "DOUBLE", "STRING", "BOOLEAN", "BYTES", "STREAM"])),
        ("accessMode", one_of(&["ReadWrite", "ReadOnly"])),
        ("minimum", text()),
        ("maximum", text()),
        ("unit", text()),
        ("visitors", visitors()),
    ]);
    let spec = object([
        ("protocol", text()),
        ("protocolConfigData", anything()),
        ("properties", list(property)),
    ]);
    kind(spec, anything())
}

pub(super) fn device_status() -> Value {
    let twin = object([
        ("propertyName", text()),
        ("reported", twin_value()),
        ("observedDesired", twin_value()),
    ]);
    let status = object([
        ("twins", list(twin)),
        ("state", text()),
        ("lastOnlineTime", text()),
        ("extensions", anything()),
    ]);
    kind(anything(), status)
}

pub(super) fn rule() -> Value {
    let spec = object([
        ("source", text()),
        ("sourceResource", texts()),
        ("target", text()),
        ("targetResource", texts()),
    ]);
    let spec = required(spec, &["source", "sourceResource", "target", "targetResource"]);
    let status = object([
        ("successMessages", number()),
        ("failMessages", number()),
        ("errors", list(text())),
    ]);
    kind(spec, status)
}

pub(super) fn rule_endpoint() -> Value {
    let spec = object([
        ("ruleEndpointType", one_of(&["rest", "eventbus", "servicebus"])),
        ("properties", texts()),
    ]);
    kind(required(spec, &["ruleEndpointType"]), anything())
}

/// Makes every object inside take null as well.
fn nullable(mut schema: Value) -> Value {
    if schema["type"] == "object" {
        schema["nullable"] = true.into();
    }
    if let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        for field in fields.values_mut() {
            *field = nullable(field.take());
        }
    }
    schema
}

/// A column of `kubectl get`.
pub(super) fn column(name: &str, path: &str, kind: &str) -> Value {
    json!({"name": name, "jsonPath": path, "type": kind})
}
