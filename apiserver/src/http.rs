//! Requests and answers as the handlers see them: bodies, content negotiation, Status errors, compression.

use crate::auth::User;
use crate::route::Query;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, VARY,
};
use http::{HeaderMap, Method, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use serde_json::Value;
use skerry_apiserver_core::status::ApiError;
use std::io::Write;

/// Largest body of a request; etcd's limit is half of it, so no object of a real cluster is refused.
pub(crate) const BODY_MAX: usize = 3 << 20;
/// Answers below this are sent as they are.
const GZIP_MIN: usize = 128 << 10;

/// Body of an answer; watches and logs stream.
pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;
pub(crate) type Response = http::Response<Body>;

/// A request whose body has been read.
pub(crate) struct Call {
    pub(crate) user: User,
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) query: Query,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Call {
    pub(crate) fn header(&self, name: http::header::HeaderName) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Media type of the body, without parameters.
    pub(crate) fn content_type(&self) -> &str {
        self.header(CONTENT_TYPE).split(';').next().unwrap_or_default().trim()
    }

    pub(crate) fn format(&self) -> Result<Format, ApiError> {
        Format::accepted(self.header(ACCEPT), self.query.get("includeObject"))
    }
}

/// Text form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Text {
    Json,
    Yaml,
}

/// What an answer shows of objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Shape {
    /// The objects.
    Whole,
    /// Rows for people; `include` is `Metadata`, `Object` or `None`.
    Table { include: String, version: &'static str },
    /// Only their metadata.
    Metadata,
    /// Aggregated discovery in this version.
    Discovery(&'static str),
}

/// What the client wants to get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) text: Text,
    pub(crate) shape: Shape,
}

const PRODUCED: &str = "application/json, application/yaml";

impl Format {
    /// The first entry of an `Accept` header that can be produced; everything is JSON without one.
    ///
    /// Weights are ignored: clients list their wishes in order.
    fn accepted(accept: &str, include: Option<&str>) -> Result<Self, ApiError> {
        if accept.trim().is_empty() {
            return Ok(Self { text: Text::Json, shape: Shape::Whole });
        }
        accept
            .split(',')
            .find_map(|entry| Self::entry(entry, include))
            .ok_or_else(|| ApiError::not_acceptable(PRODUCED))
    }

    fn entry(entry: &str, include: Option<&str>) -> Option<Self> {
        let mut parts = entry.split(';').map(str::trim);
        let text = match parts.next()? {
            "application/json" | "*/*" | "application/*" => Text::Json,
            "application/yaml" | "text/yaml" | "application/x-yaml" => Text::Yaml,
            _ => return None,
        };
        let (mut kind, mut group, mut version) = ("", "", "");
        for (key, value) in parts.filter_map(|part| part.split_once('=')) {
            match key.trim() {
                "as" => kind = value.trim(),
                "g" => group = value.trim(),
                "v" => version = value.trim(),
                _ => {}
            }
        }
        let shape = match (kind, group, version) {
            ("", ..) => Shape::Whole,
            ("Table", "meta.k8s.io", "v1" | "v1beta1") => Shape::Table {
                include: include.unwrap_or("Metadata").into(),
                version: if version == "v1" { "v1" } else { "v1beta1" },
            },
            ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", "v1") => {
                Shape::Metadata
            }
            ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2") => Shape::Discovery("v2"),
            ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2beta1") => {
                Shape::Discovery("v2beta1")
            }
            _ => return None,
        };
        Some(Self { text, shape })
    }
}

/// The answer to one request, before it is written.
pub(crate) enum Answer {
    /// An object of any kind with its code.
    Value { code: StatusCode, value: Value, content_type: Option<String> },
    /// Written already: streams and plain text.
    Written(Response),
}

impl Answer {
    pub(crate) fn ok(value: Value) -> Self {
        Self::Value { code: StatusCode::OK, value, content_type: None }
    }

    pub(crate) fn created(value: Value) -> Self {
        Self::Value { code: StatusCode::CREATED, value, content_type: None }
    }

    pub(crate) fn plain(text: impl Into<Bytes>) -> Self {
        let mut response = http::Response::new(full(text.into()));
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        Self::Written(response)
    }

    /// Writes the answer as `headers` of the request ask for it.
    pub(crate) fn into_response(self, headers: &HeaderMap, warnings: &[String]) -> Response {
        let mut response = match self {
            Self::Written(response) => response,
            Self::Value { code, value, content_type } => {
                let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
                let text = Format::accepted(accept.unwrap_or_default(), None)
                    .map_or(Text::Json, |format| format.text);
                let (bytes, default_type) = match text {
                    Text::Json => (value.to_string().into_bytes(), "application/json"),
                    Text::Yaml => match serde_saphyr::to_string(&value) {
                        Ok(text) => (text.into_bytes(), "application/yaml"),
                        Err(_) => (value.to_string().into_bytes(), "application/json"),
                    },
                };
                let mut response = compressed(bytes, headers);
                *response.status_mut() = code;
                let content_type = content_type.as_deref().unwrap_or(default_type);
                response.headers_mut().insert(
                    CONTENT_TYPE,
                    HeaderValue::from_str(content_type)
                        .unwrap_or(HeaderValue::from_static("application/json")),
                );
                response
            }
        };
        let headers = response.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
        headers.insert(VARY, HeaderValue::from_static("Accept"));
        if let Ok(id) = HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()) {
            headers.insert("audit-id", id);
        }
        for warning in warnings {
            let quoted = warning.replace('\\', "\\\\").replace('"', "\\\"");
            if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
                headers.append("warning", value);
            }
        }
        response
    }
}

/// The Status answer of an error.
pub(crate) fn refused(error: &ApiError) -> Answer {
    Answer::Value {
        code: StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        value: error.to_status(),
        content_type: None,
    }
}

pub(crate) fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

fn compressed(bytes: Vec<u8>, headers: &HeaderMap) -> Response {
    let offered = headers
        .get(ACCEPT_ENCODING)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.split(',').any(|one| one.trim().starts_with("gzip")));
    if bytes.len() >= GZIP_MIN && offered {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        if encoder.write_all(&bytes).is_ok()
            && let Ok(packed) = encoder.finish()
        {
            let mut response = http::Response::new(full(packed.into()));
            response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            return response;
        }
    }
    http::Response::new(full(bytes.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(accept: &str, expected: Option<(Text, Shape)>) {
        let found = Format::accepted(accept, None).ok();
        assert_eq!(found, expected.map(|(text, shape)| Format { text, shape }), "{accept}");
    }

    #[test]
    fn first_type_that_can_be_produced_wins() {
        let table = Shape::Table { include: "Metadata".into(), version: "v1" };
        check("", Some((Text::Json, Shape::Whole)));
        check("application/json, */*", Some((Text::Json, Shape::Whole)));
        check(
            "application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
            Some((Text::Json, table)),
        );
        check(
            "application/vnd.kubernetes.protobuf,application/json",
            Some((Text::Json, Shape::Whole)),
        );
        check("application/yaml", Some((Text::Yaml, Shape::Whole)));
        check(
            "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
            Some((Text::Json, Shape::Metadata)),
        );
        check("application/vnd.kubernetes.protobuf", None);
    }
}
