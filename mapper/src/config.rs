//! A mapper's configuration file, with the keys of KubeEdge's mapper framework.
//!
//! Called once at the start. Keys of ours are optional, so that a file written for a KubeEdge mapper
//! works; unknown keys are refused, as a misspelt one would be silently without effect.
//!
//! Source: kubeedge/kubeedge, staging/src/github.com/kubeedge/mapper-framework/pkg/config/config.go
//! and _template/mapper/config.yaml.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where EdgeCore listens if the file does not say.
pub const EDGECORE_SOCKET: &str = "/etc/kubeedge/dmi.sock";
/// Calls per second on average if the file does not say; what KubeEdge's EdgeCore takes.
pub const REPORTS_PER_SECOND: f64 = 1.0;

/// One mapper's configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The mapper's own socket.
    pub grpc_server: GrpcServer,
    /// Who the mapper is.
    pub common: Common,
}

/// The mapper's own socket.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrpcServer {
    /// Path that EdgeCore is told; it has to mean the same for EdgeCore.
    pub socket_path: PathBuf,
}

/// Who the mapper is and whom it talks to.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Common {
    /// Name, for people.
    pub name: String,
    /// Version, for people.
    #[serde(default)]
    pub version: String,
    /// Version of the interface, `v1.0.0` in KubeEdge's files.
    #[serde(default)]
    pub api_version: String,
    /// Protocol: EdgeCore hands over the devices whose `spec.protocol.protocolName` is this word.
    pub protocol: String,
    /// Not used; KubeEdge's files have it.
    #[serde(default)]
    pub address: String,
    /// EdgeCore's socket.
    #[serde(default = "edgecore_socket")]
    pub edgecore_sock: PathBuf,
    /// Not used; KubeEdge's files have it. Numbers and health are on [`Common::metrics`].
    #[serde(default)]
    pub http_port: Option<serde_json::Value>,
    /// Calls per second to EdgeCore, on average. More than one only with a Skerry EdgeCore.
    #[serde(default = "reports_per_second")]
    pub reports_per_second: f64,
    /// Whether values that KubeEdge's EdgeCore would drop (spaces, JSON, more than 512 bytes) are reported as base64url.
    /// A Skerry EdgeCore takes them as they are.
    #[serde(default)]
    pub encode_values: bool,
    /// Address for `GET /healthz` and `GET /metrics`; off if absent. Without authentication, so loopback only.
    #[serde(default)]
    pub metrics: Option<SocketAddr>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("could not read `{}`", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file says something else.
    #[error("`{}`: {message}", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// What is wrong with it, with line and column.
        message: String,
    },
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if there is none or a key is missing, unknown, or wrong.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        Self::parse(&text)
            .map_err(|message| ConfigError::Parse { path: path.to_path_buf(), message })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Self = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        if config.common.protocol.is_empty() {
            return Err("`common.protocol` is empty".to_owned());
        }
        if !config.common.reports_per_second.is_finite() || config.common.reports_per_second <= 0.0
        {
            return Err("`common.reports_per_second` has to be more than 0".to_owned());
        }
        match config.common.metrics {
            Some(address) if !address.ip().is_loopback() => Err(format!(
                "`common.metrics`: {address} can be reached from outside; use 127.0.0.1 or [::1]"
            )),
            _ => Ok(config),
        }
    }
}

fn edgecore_socket() -> PathBuf {
    EDGECORE_SOCKET.into()
}

fn reports_per_second() -> f64 {
    REPORTS_PER_SECOND
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUBEEDGE: &str = "\
grpc_server:
  socket_path: /etc/kubeedge/modbus.sock
common:
  name: Modbus-mapper
  version: v1.13.0
  api_version: v1.0.0
  protocol: modbus-tcp
  address: 127.0.0.1
  edgecore_sock: /etc/kubeedge/dmi.sock
  http_port: \"7777\"
";

    #[test]
    fn a_file_for_a_kubeedge_mapper_works() {
        let config = Config::parse(KUBEEDGE).unwrap();
        assert_eq!(config.common.protocol, "modbus-tcp");
        assert_eq!(config.grpc_server.socket_path, Path::new("/etc/kubeedge/modbus.sock"));
        assert_eq!(config.common.reports_per_second, 1.0);
        assert_eq!(config.common.metrics, None);
    }

    #[test]
    fn unknown_keys_public_addresses_and_empty_protocols_are_refused() {
        assert!(Config::parse(&KUBEEDGE.replace("version:", "versoin:")).is_err());
        assert!(Config::parse(&KUBEEDGE.replace("modbus-tcp", "\"\"")).is_err());
        assert!(Config::parse(&format!("{KUBEEDGE}  metrics: 0.0.0.0:9000\n")).is_err());
        assert!(Config::parse(&format!("{KUBEEDGE}  metrics: 127.0.0.1:9000\n")).is_ok());
        assert!(Config::parse(&format!("{KUBEEDGE}  reports_per_second: 0\n")).is_err());
    }
}
