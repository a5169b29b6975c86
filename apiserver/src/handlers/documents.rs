//! What the API says about itself: health, version, discovery, OpenAPI.

use crate::api::Api;
use crate::http::{Answer, Call, Shape};
use crate::route::Route;
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
            ["version"] => Ok(Answer::ok(version())),
            ["openapi", "v3"] => Ok(Answer::ok(openapi::index(&self.catalog()))),
            ["openapi", "v3", rest @ ..] => openapi::document(&self.catalog(), &rest.join("/"))
                .map(Answer::ok)
                .ok_or_else(ApiError::unknown_path),
            [] => Ok(Answer::ok(json!({"paths": [
                "/api", "/api/v1", "/apis", "/healthz", "/livez", "/openapi/v3", "/readyz", "/version",
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
