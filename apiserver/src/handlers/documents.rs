//! What the API says about itself: health, version, discovery, OpenAPI.

use crate::api::Api;
use crate::http::{Answer, Call, Shape, full};
use crate::route::Route;
use crate::service_tokens::ISSUER;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use http::{Method, StatusCode};
use serde_json::{Value, json};
use skerry_apiserver_core::status::ApiError;
use skerry_apiserver_core::{discovery, openapi};

/// The Kubernetes version whose types and behaviour are served.
const MINOR: &str = "36";

impl Api {
    pub(crate) async fn document(&self, call: &Call, route: &Route) -> Result<Answer, ApiError> {
        if !matches!(call.method, Method::GET | Method::HEAD) {
            return Err(match route {
                Route::Other(_) => ApiError::unknown_path(),
                _ => ApiError::method_not_allowed(call.method.as_str()),
            });
        }
        if call.path.trim_end_matches('/') == "/openapi/v2" {
            return Ok(openapi_v2(call));
        }
        let catalog = self.catalog();
        let format = call.format()?;
        let aggregated = match format.shape {
            Shape::Discovery(version) => Some(version),
            _ => None,
        };
        match route {
            Route::CoreVersions => Ok(match aggregated {
                Some(version) => {
                    discovered(discovery::aggregated_core(&catalog, version == "v2beta1"), version)
                }
                None => Answer::ok(discovery::core_versions()),
            }),
            Route::Groups => Ok(match aggregated {
                Some(version) => discovered(
                    discovery::aggregated_groups(&catalog, version == "v2beta1"),
                    version,
                ),
                None => Answer::ok(discovery::groups(&catalog)),
            }),
            Route::Group(name) => {
                discovery::group(&catalog, name).map(Answer::ok).ok_or_else(ApiError::unknown_path)
            }
            Route::Resources { group, version } => discovery::resources(&catalog, group, version)
                .map(Answer::ok)
                .ok_or_else(ApiError::unknown_path),
            Route::Other(path) => self.other(path),
            Route::Resource(_) => Err(ApiError::unknown_path()),
        }
    }

    fn other(&self, path: &str) -> Result<Answer, ApiError> {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        match parts.as_slice() {
            ["healthz" | "livez" | "readyz", ..] => Ok(Answer::plain("ok")),
            [".well-known", "openid-configuration"] => Ok(Answer::ok(json!({
                "issuer": ISSUER, "jwks_uri": format!("{ISSUER}/openid/v1/jwks"),
                "response_types_supported": ["id_token"], "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
            }))),
            ["openid", "v1", "jwks"] => Ok(Answer::ok(self.service_tokens.key_set())),
            ["version"] => Ok(Answer::ok(version())),
            ["openapi", "v3"] => Ok(Answer::ok(openapi::index(&self.catalog()))),
            ["openapi", "v3", rest @ ..] => openapi::document(&self.catalog(), &rest.join("/"))
                .map(Answer::ok)
                .ok_or_else(ApiError::unknown_path),
            [] => Ok(Answer::ok(json!({"paths": [
                "/api", "/api/v1", "/apis", "/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz", "/version",
            ]}))),
            _ => Err(ApiError::unknown_path()),
        }
    }
}

fn discovered(value: Value, version: &str) -> Answer {
    Answer::Value {
        code: StatusCode::OK,
        value,
        content_type: Some(format!(
            "application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
        )),
    }
}

/// The document of OpenAPI 2, which describes no kind: they are in `/openapi/v3`. kubectl asks for it before it sends a
/// `List`, in protobuf, and leaves the checks to the server when a kind is not in it.
///
/// Source: google/gnostic, openapiv2/OpenAPIv2.proto (`Document`: swagger 1, info 2, paths 8; `Info`: title 1,
/// version 2).
fn openapi_v2(call: &Call) -> Answer {
    const ASKED: &str = "application/com.github.proto-openapi.spec.v2";
    // Clients ask with `@v1.0`, which no reader of media types accepts in an answer.
    const PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
    let (title, version) = ("Kubernetes", format!("v1.{MINOR}.0"));
    let accept = call.header(ACCEPT);
    if !accept.split(',').any(|one| one.trim().starts_with(ASKED)) {
        return Answer::ok(json!({
            "swagger": "2.0", "info": {"title": title, "version": version}, "paths": {},
        }));
    }
    // Every text here is shorter than 128 bytes, so that its length is one byte.
    let field = |number: u8, bytes: &[u8]| {
        let len = u8::try_from(bytes.len()).expect("a short text of this file");
        [&[(number << 3) | 2, len], bytes].concat()
    };
    let info = [field(1, title.as_bytes()), field(2, version.as_bytes())].concat();
    let bytes = [field(1, b"2.0"), field(2, &info), field(8, b"")].concat();
    let mut response = http::Response::new(full(bytes.into()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(PROTOBUF));
    Answer::Written(response)
}

/// Says plainly that this is not Kubernetes' own server.
fn version() -> Value {
    json!({
        "major": "1", "minor": MINOR,
        "gitVersion": format!("v1.{MINOR}.0+skerry"),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "rust", "compiler": "rustc", "platform": "linux/amd64",
        "emulationMajor": "1", "emulationMinor": MINOR,
        "minCompatibilityMajor": "1", "minCompatibilityMinor": MINOR,
    })
}
