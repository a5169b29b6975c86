//! Protobuf request bodies of typed clients, decoded into the JSON that they mean.
//!
//! kubectl's creators, `DeleteOptions` of typed clients and Helm send them, and none of them falls back to JSON when
//! refused; the HTTP server calls [`decode`] for `application/vnd.kubernetes.protobuf`. Nothing is encoded here:
//! every such client accepts a JSON answer. Custom resources have no protobuf form.
//!
//! Go writes plain scalars even when they are zero and pointers only when they are set, so that a zero means
//! "absent" except in the fields of [`POINTERS`] and in required ones. Empty messages are kept: `emptyDir: {}` is one.
//!
//! Source: Kubernetes, `staging/src/k8s.io/apimachinery/pkg/runtime/serializer/protobuf` for the envelope and the
//! `generated.proto` files for the fields; see [`crate::facts`].

mod wire;

use crate::facts::{Definition, Facts, Field, Shape, facts};
use crate::status::ApiError;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use wire::{Payload, Reader, WireError};

/// Content type of these bodies.
pub const CONTENT_TYPE: &str = "application/vnd.kubernetes.protobuf";

/// First bytes of every body.
const MAGIC: &[u8] = b"k8s\0";

/// Messages within messages; the deepest real ones are schemas of custom resources.
const DEPTH_MAX: usize = 100;

/// Values in one body. Two bytes can make an empty object, which takes much more memory than two bytes.
const VALUES_MAX: usize = 200_000;

/// Decodes a body with its envelope into an object with `apiVersion` and `kind`.
///
/// # Errors
///
/// 400 when the bytes are not such a message, 415 when the kind has no protobuf form.
pub fn decode(body: &[u8]) -> Result<Value, ApiError> {
    let bad = |error: DecodeError| {
        ApiError::bad_request(format!("the body could not be decoded as protobuf: {error}"))
    };
    let envelope = Envelope::parse(body).map_err(bad)?;
    let (group, version) = match envelope.api_version.split_once('/') {
        Some((group, version)) => (group, version),
        None => ("", envelope.api_version),
    };
    let facts = facts();
    let Some(definition) = facts.kind(group, version, envelope.kind) else {
        let message = format!(
            "the kind `{}` of `{}` has no protobuf form here; send it as application/json",
            envelope.kind, envelope.api_version,
        );
        return Err(ApiError::new(415, "UnsupportedMediaType", message));
    };
    let mut decoder = Decoder { facts, values: 0 };
    let mut object = decoder.message(definition, envelope.raw, 0).map_err(bad)?;
    object.insert("apiVersion".into(), envelope.api_version.into());
    object.insert("kind".into(), envelope.kind.into());
    Ok(Value::Object(object))
}

/// Why a body could not be decoded.
#[derive(Debug, thiserror::Error)]
enum DecodeError {
    #[error("the first bytes are not those of a Kubernetes protobuf body")]
    Magic,
    #[error("content encoding `{0}` is not supported")]
    Encoding(String),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("field `{0}` has the wrong wire type")]
    WireType(String),
    #[error("field `{0}` is not UTF-8")]
    Utf8(String),
    #[error("field `{0}` does not hold JSON")]
    Json(String),
    #[error("field `{0}` holds a time out of range")]
    Time(String),
    #[error("messages are nested more than {DEPTH_MAX} deep")]
    Depth,
    #[error("more than {VALUES_MAX} values")]
    Values,
}

/// `runtime.Unknown`: what kind the body is, and its bytes.
struct Envelope<'a> {
    api_version: &'a str,
    kind: &'a str,
    raw: &'a [u8],
}

impl<'a> Envelope<'a> {
    fn parse(body: &'a [u8]) -> Result<Self, DecodeError> {
        let body = body.strip_prefix(MAGIC).ok_or(DecodeError::Magic)?;
        let mut envelope = Self { api_version: "", kind: "", raw: &[] };
        for field in Reader::new(body) {
            match field? {
                (1, Payload::Bytes(type_meta)) => {
                    for field in Reader::new(type_meta) {
                        match field? {
                            (1, Payload::Bytes(text)) => {
                                envelope.api_version = utf8(text, "apiVersion")?;
                            }
                            (2, Payload::Bytes(text)) => envelope.kind = utf8(text, "kind")?,
                            _ => {}
                        }
                    }
                }
                (2, Payload::Bytes(raw)) => envelope.raw = raw,
                (3, Payload::Bytes(encoding)) if !encoding.is_empty() => {
                    return Err(DecodeError::Encoding(utf8(encoding, "contentEncoding")?.into()));
                }
                _ => {}
            }
        }
        Ok(envelope)
    }
}

struct Decoder<'a> {
    facts: &'a Facts,
    /// Values made so far.
    values: usize,
}

impl Decoder<'_> {
    fn message(
        &mut self,
        definition: &Definition,
        bytes: &[u8],
        depth: usize,
    ) -> Result<Map<String, Value>, DecodeError> {
        let mut object = Map::new();
        self.fields(definition, 0, bytes, depth, &mut object)?;
        // A Go client that writes JSON writes these even when they are zero, and validation asks for them.
        for field in definition.fields.iter().filter(|field| field.required) {
            let zero: Value = match field.shape {
                Shape::String => "".into(),
                Shape::Int32 | Shape::Int64 => 0.into(),
                Shape::Bool => false.into(),
                _ => continue,
            };
            object.entry(&*field.name).or_insert(zero);
        }
        Ok(object)
    }

    /// Adds the fields in `bytes` to `object`; `outer` is the number of the unnamed message that `bytes` are.
    fn fields(
        &mut self,
        definition: &Definition,
        outer: u16,
        bytes: &[u8],
        depth: usize,
        object: &mut Map<String, Value>,
    ) -> Result<(), DecodeError> {
        if depth > DEPTH_MAX {
            return Err(DecodeError::Depth);
        }
        for item in Reader::new(bytes) {
            let (number, payload) = item?;
            let mut fields = definition.fields.iter();
            let known =
                fields.find(|field| u32::from(field.number) == number && field.outer == outer);
            if let Some(field) = known {
                self.field(definition, field, payload, depth, object)?;
            } else if outer == 0
                && let Payload::Bytes(inner) = payload
                && let Some(field) = definition.fields.iter().find(|f| u32::from(f.outer) == number)
            {
                self.fields(definition, field.outer, inner, depth + 1, object)?;
            } // else a field that is newer than the table; Kubernetes skips those too
        }
        Ok(())
    }

    fn field(
        &mut self,
        owner: &Definition,
        field: &Field,
        payload: Payload<'_>,
        depth: usize,
        object: &mut Map<String, Value>,
    ) -> Result<(), DecodeError> {
        let name = &*field.name;
        match &field.shape {
            Shape::List(items) => {
                let mut found = Vec::new();
                match (&**items, payload) {
                    (Shape::Int32 | Shape::Int64, Payload::Bytes(packed)) => {
                        for number in wire::packed_varints(packed) {
                            self.count()?;
                            found.push(json!(number? as i64));
                        }
                    }
                    (items, payload) => found.push(self.value(items, name, payload, depth)?),
                }
                if let Value::Array(list) = object.entry(name).or_insert_with(|| json!([])) {
                    list.extend(found);
                }
            }
            Shape::Map(values) => {
                let Payload::Bytes(entry) = payload else {
                    return Err(DecodeError::WireType(name.into()));
                };
                let (key, value) = self.map_entry(values, name, entry, depth)?;
                if let Value::Object(map) = object.entry(name).or_insert_with(|| json!({})) {
                    map.insert(key, value);
                }
            }
            shape => {
                let value = self.value(shape, name, payload, depth)?;
                let zero = match &value {
                    Value::Null => true,
                    Value::Bool(value) => !value,
                    Value::Number(number) => number.as_f64() == Some(0.0),
                    Value::String(text) => text.is_empty(),
                    _ => false,
                };
                let absent = zero && !field.required && !is_pointer(&owner.name, name);
                // A null is an unset time; even a required field is better left out than null.
                if !absent && !value.is_null() {
                    object.insert(name.into(), value);
                }
            }
        }
        Ok(())
    }

    fn map_entry(
        &mut self,
        values: &Shape,
        name: &str,
        entry: &[u8],
        depth: usize,
    ) -> Result<(String, Value), DecodeError> {
        let (mut key, mut value) = (String::new(), None);
        for field in Reader::new(entry) {
            match field? {
                (1, Payload::Bytes(text)) => key = utf8(text, name)?.to_owned(),
                (2, payload) => value = Some(payload),
                _ => {}
            }
        }
        let value = match (values, value) {
            // A list as a map's value is a message that holds the list.
            (Shape::List(items), Some(Payload::Bytes(message))) => {
                let mut list = Vec::new();
                for field in Reader::new(message) {
                    if let (1, payload) = field? {
                        list.push(self.value(items, name, payload, depth + 1)?);
                    }
                }
                list.into()
            }
            (_, Some(payload)) => self.value(values, name, payload, depth)?,
            (Shape::List(_), None) => json!([]),
            (Shape::Ref(_), None) => self.value(values, name, Payload::Bytes(&[]), depth)?,
            (_, None) => json!(""),
        };
        Ok((key, value))
    }

    /// One value; null is a time that is not set.
    fn value(
        &mut self,
        shape: &Shape,
        name: &str,
        payload: Payload<'_>,
        depth: usize,
    ) -> Result<Value, DecodeError> {
        self.count()?;
        Ok(match (shape, payload) {
            (Shape::String, Payload::Bytes(text)) => utf8(text, name)?.into(),
            (Shape::Bytes, Payload::Bytes(bytes)) => STANDARD.encode(bytes).into(),
            (Shape::Int32 | Shape::Int64, Payload::Varint(number)) => json!(number as i64),
            (Shape::Bool, Payload::Varint(number)) => (number != 0).into(),
            (Shape::Double, Payload::Fixed64(bits)) => json!(f64::from_bits(bits)),
            (Shape::Time, Payload::Bytes(message)) => time(message, name, false)?,
            (Shape::MicroTime, Payload::Bytes(message)) => time(message, name, true)?,
            (Shape::Quantity, Payload::Bytes(message)) => {
                let text = last(message, 1)?;
                match text {
                    Some(Payload::Bytes(text)) => utf8(text, name)?.into(),
                    _ => "0".into(),
                }
            }
            (Shape::IntOrString, Payload::Bytes(message)) => int_or_string(message, name)?,
            (Shape::Ref(reference), Payload::Bytes(message)) => {
                self.named(reference, name, message, depth)?
            }
            (Shape::Object | Shape::Any, Payload::Bytes(_)) => json!({}),
            _ => return Err(DecodeError::WireType(name.into())),
        })
    }

    fn named(
        &mut self,
        reference: &str,
        name: &str,
        message: &[u8],
        depth: usize,
    ) -> Result<Value, DecodeError> {
        let short = reference.rsplit('.').next().unwrap_or("");
        match short {
            "JSON" | "FieldsV1" | "RawExtension" => return raw_json(message, name),
            "JSONSchemaPropsOrArray" | "JSONSchemaPropsOrBool" | "JSONSchemaPropsOrStringArray" => {
                return self.schema_or_else(short, name, message, depth);
            }
            _ => {}
        }
        let Some(definition) = self.facts.definition(reference) else { return Ok(json!({})) };
        match &definition.shape {
            Some(shape) => self.value(shape, name, Payload::Bytes(message), depth),
            None => Ok(Value::Object(self.message(definition, message, depth + 1)?)),
        }
    }

    /// The three types that are a schema or something else.
    fn schema_or_else(
        &mut self,
        short: &str,
        name: &str,
        message: &[u8],
        depth: usize,
    ) -> Result<Value, DecodeError> {
        const PROPS: &str =
            "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";
        let schema_number = if short == "JSONSchemaPropsOrBool" { 2 } else { 1 };
        let (mut schema, mut list, mut allows) = (None, Vec::new(), false);
        for field in Reader::new(message) {
            match (field?, short) {
                ((number, Payload::Bytes(inner)), _) if number == schema_number => {
                    schema = Some(self.named(PROPS, name, inner, depth + 1)?);
                }
                ((1, Payload::Varint(number)), "JSONSchemaPropsOrBool") => allows = number != 0,
                ((2, Payload::Bytes(inner)), "JSONSchemaPropsOrArray") => {
                    list.push(self.named(PROPS, name, inner, depth + 1)?);
                }
                ((2, Payload::Bytes(text)), _) => {
                    self.count()?;
                    list.push(utf8(text, name)?.into());
                }
                _ => {}
            }
        }
        Ok(match (schema, short) {
            (Some(schema), _) => schema,
            (None, "JSONSchemaPropsOrBool") => allows.into(),
            (None, _) => list.into(),
        })
    }

    fn count(&mut self) -> Result<(), DecodeError> {
        self.values += 1;
        if self.values > VALUES_MAX { Err(DecodeError::Values) } else { Ok(()) }
    }
}

fn utf8<'a>(bytes: &'a [u8], field: &str) -> Result<&'a str, DecodeError> {
    std::str::from_utf8(bytes).map_err(|_| DecodeError::Utf8(field.into()))
}

/// The last occurrence of a field, as protobuf wants it for fields that are not repeated.
fn last(message: &[u8], wanted: u32) -> Result<Option<Payload<'_>>, DecodeError> {
    let mut found = None;
    for field in Reader::new(message) {
        let (number, payload) = field?;
        if number == wanted {
            found = Some(payload);
        }
    }
    Ok(found)
}

fn time(message: &[u8], field: &str, micro: bool) -> Result<Value, DecodeError> {
    if message.is_empty() {
        return Ok(Value::Null);
    }
    let number = |wanted| match last(message, wanted) {
        Ok(Some(Payload::Varint(number))) => Ok(number as i64),
        Ok(_) => Ok(0),
        Err(error) => Err(error),
    };
    let (seconds, nanos) = (number(1)?, number(2)?);
    let nanos = if micro { i32::try_from(nanos).unwrap_or(-1) } else { 0 };
    let out_of_range = || DecodeError::Time(field.into());
    if !(0..1_000_000_000).contains(&nanos) {
        return Err(out_of_range());
    }
    let time = Timestamp::new(seconds, nanos).map_err(|_| out_of_range())?;
    let format = if micro { "%Y-%m-%dT%H:%M:%S%.6fZ" } else { "%Y-%m-%dT%H:%M:%SZ" };
    Ok(time.strftime(format).to_string().into())
}

fn int_or_string(message: &[u8], field: &str) -> Result<Value, DecodeError> {
    let is_string = matches!(last(message, 1)?, Some(Payload::Varint(1)));
    Ok(match (is_string, last(message, if is_string { 3 } else { 2 })?) {
        (true, Some(Payload::Bytes(text))) => utf8(text, field)?.into(),
        (true, _) => "".into(),
        (false, Some(Payload::Varint(number))) => json!(number as i64),
        (false, _) => json!(0),
    })
}

fn raw_json(message: &[u8], field: &str) -> Result<Value, DecodeError> {
    match last(message, 1)? {
        Some(Payload::Bytes(raw)) if !raw.is_empty() => {
            serde_json::from_slice(raw).map_err(|_| DecodeError::Json(field.into()))
        }
        _ => Ok(json!({})),
    }
}

/// Whether a zero in this field was written on purpose.
fn is_pointer(owner: &str, field: &str) -> bool {
    let owner = owner.rsplit('.').next().unwrap_or("");
    match field {
        // Plain in some types, pointers in others.
        "storageClassName" => owner == "PersistentVolumeClaimSpec",
        "port" => owner == "EndpointPort",
        "timeoutSeconds" => owner == "ClientIPConfig",
        "ready" => matches!(owner, "EndpointConditions" | "JobStatus"),
        "terminating" => matches!(owner, "EndpointConditions" | "JobStatus"),
        _ => POINTERS.contains(&field),
    }
}

/// Fields that Go declares as pointers, so that their zero is a value. Sorted.
const POINTERS: &[&str] = &[
    "activeDeadlineSeconds",
    "allocateLoadBalancerNodePorts",
    "allowPrivilegeEscalation",
    "allowVolumeExpansion",
    "attachRequired",
    "automountServiceAccountToken",
    "averageUtilization",
    "backoffLimit",
    "backoffLimitPerIndex",
    "blockOwnerDeletion",
    "completions",
    "controller",
    "defaultMode",
    "enableServiceLinks",
    "expirationSeconds",
    "failedJobsHistoryLimit",
    "fsGroup",
    "gracePeriodSeconds",
    "hostUsers",
    "immutable",
    "leaseDurationSeconds",
    "leaseTransitions",
    "manualSelector",
    "maxFailedIndexes",
    "maxReplicas",
    "minDomains",
    "minReplicas",
    "mode",
    "optional",
    "orphanDependents",
    "parallelism",
    "partition",
    "podInfoOnMount",
    "preserveUnknownFields",
    "priority",
    "privileged",
    "progressDeadlineSeconds",
    "readOnlyRootFilesystem",
    "replicas",
    "requiresRepublish",
    "revisionHistoryLimit",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "serving",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "stabilizationWindowSeconds",
    "started",
    "startingDeadlineSeconds",
    "storageCapacity",
    "successfulJobsHistoryLimit",
    "suspend",
    "terminationGracePeriodSeconds",
    "tolerationSeconds",
    "ttlSecondsAfterFinished",
];

#[cfg(test)]
mod tests;
