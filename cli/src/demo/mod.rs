//! Devices for `skerry up`: a broker, the mappers for Modbus and MQTT, and a fridge that is simulated, beside one node.
//!
//! Broker and mappers are programs of their own, as on a real node; the fridge is a Modbus server in this process (see
//! [`fridge`]). The template's Devices are those of this fridge: their ports stand in the site's file, and where the
//! usual ones are taken, the repository is made with others.

mod fridge;

use crate::site::DeviceSide;
use crate::supervise::{Program, Supervised};
use crate::up::write_whole;
use anyhow::{Context, Result};
use fridge::Fridge;
use serde_json::json;
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

/// What to do about devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Mode {
    /// Run them where the programs for it are there.
    Auto,
    /// Run none.
    Off,
}

/// Where broker and fridge listen, on loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Ports {
    broker: u16,
    fridge: u16,
}

/// What the template says.
const USUAL: Ports = Ports { broker: 1883, fridge: 5020 };
/// Holds the ports with which the repository was made.
const PORTS_FILE: &str = "devices.json";
const BROKER_CONFIG: &str = "devices/mosquitto.conf";
const MAPPERS: [Mapper; 2] = [
    Mapper {
        program: "skerry-mapper-modbus",
        protocol: "modbus-tcp",
        config: "devices/modbus.yaml",
        socket: "devices/modbus.sock",
    },
    Mapper {
        program: "skerry-mapper-mqtt",
        protocol: "mqtt",
        config: "devices/mqtt.yaml",
        socket: "devices/mqtt.sock",
    },
];

struct Mapper {
    program: &'static str,
    protocol: &'static str,
    config: &'static str,
    socket: &'static str,
}

impl Ports {
    /// The ports of a fleet in `dir`, or nothing when there are to be no devices, of which people are told.
    pub(crate) fn choose(dir: &Path, mode: Mode, has_remote: bool) -> Result<Option<Self>> {
        if mode == Mode::Off {
            return Ok(None);
        }
        if let Err(what) = programs() {
            eprintln!("skerry: no devices run here: {what}");
            return Ok(None);
        }
        let file = dir.join(PORTS_FILE);
        let known = match std::fs::read(&file) {
            Ok(bytes) => Some(serde_json::from_slice(&bytes).with_context(|| {
                format!("could not read the ports of devices in `{}`", file.display())
            })?),
            Err(_) => has_remote.then_some(USUAL),
        };
        let ports = match known {
            Some(ports) => ports,
            None => {
                let ports = Self { broker: free(USUAL.broker)?, fridge: free(USUAL.fridge)? };
                write_whole(&file, &serde_json::to_vec(&ports)?)?;
                ports
            }
        };
        if let Some(busy) = [ports.broker, ports.fridge].into_iter().find(|port| !is_free(*port)) {
            eprintln!(
                "skerry: no devices run here: the fleet's repository has them on port {busy}, which is in use"
            );
            return Ok(None);
        }
        Ok(Some(ports))
    }

    /// Numbers of the site's file that are others than in the template.
    pub(crate) fn vars(self) -> Vec<(&'static str, u16)> {
        let all =
            [("brokerPort", self.broker, USUAL.broker), ("fridgePort", self.fridge, USUAL.fridge)];
        let other = all.into_iter().filter(|(_, port, usual)| port != usual);
        other.map(|(name, port, _)| (name, port)).collect()
    }
}

/// Configuration files of what runs for a node, by which leftovers of an earlier run are found.
pub(crate) fn configs(node: &Path) -> impl Iterator<Item = PathBuf> {
    let mappers = MAPPERS.iter().map(|mapper| mapper.config);
    std::iter::once(BROKER_CONFIG).chain(mappers).map(|file| node.join(file))
}

/// What runs for devices.
pub(crate) struct Demo {
    node: PathBuf,
    side: DeviceSide,
    fridge: Fridge,
    programs: Vec<Supervised>,
}

impl Demo {
    /// Starts it all for the node in this folder. Nothing waits: everybody here tries until the others are there.
    pub(crate) async fn start(node: &Path, ports: Ports) -> Result<Self> {
        let found = programs().map_err(anyhow::Error::msg)?;
        let folder = node.join("devices");
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("could not make the folder `{}`", folder.display()))?;
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let (broker, dmi_socket) = (local(ports.broker), node.join("dmi.sock"));
        let fridge = Fridge::start(local(ports.fridge), broker).await?;

        let config = node.join(BROKER_CONFIG);
        let text = format!("listener {} 127.0.0.1\nallow_anonymous true\n", broker.port());
        write_whole(&config, text.as_bytes())?;
        let start = |name, program, flag: &str, config: PathBuf| {
            let args: Vec<OsString> = vec![flag.into(), config.clone().into()];
            let log = config.with_extension("log");
            Supervised::start(Program { name, program, args, log, pid_file: None })
        };
        let mut programs = vec![start("mosquitto", found.broker, "-c", config)];
        for (mapper, program) in MAPPERS.iter().zip(found.mappers) {
            let config = json!({
                "grpc_server": {"socket_path": node.join(mapper.socket)},
                "common": {
                    "name": mapper.program,
                    "version": env!("CARGO_PKG_VERSION"),
                    "api_version": "v1.0.0",
                    "protocol": mapper.protocol,
                    "edgecore_sock": dmi_socket,
                    "reports_per_second": 50,
                },
            });
            let file = node.join(mapper.config);
            // JSON is YAML.
            write_whole(&file, &serde_json::to_vec_pretty(&config)?)?;
            programs.push(start(mapper.program, program, "--config-file", file));
        }
        Ok(Self {
            node: node.to_owned(),
            side: DeviceSide { broker, dmi_socket },
            fridge,
            programs,
        })
    }

    /// Whether it runs for the node in this folder.
    pub(crate) fn is_of(&self, node: &Path) -> bool {
        self.node == node
    }

    /// What the agent needs.
    pub(crate) fn side(&self) -> &DeviceSide {
        &self.side
    }

    /// Its part of `up.json`.
    pub(crate) fn describe(&self) -> serde_json::Value {
        json!({
            "broker": self.side.broker.to_string(),
            "fridge": self.fridge.address().to_string(),
            "dmi_socket": self.side.dmi_socket,
            "logs": self.node.join("devices"),
        })
    }

    pub(crate) async fn stop(self) {
        for program in self.programs.into_iter().rev() {
            program.stop().await;
        }
        self.fridge.stop();
    }
}

struct Found {
    broker: PathBuf,
    mappers: Vec<PathBuf>,
}

/// The programs, or what is missing.
fn programs() -> Result<Found, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let broker = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into()])
        .map(|folder| folder.join("mosquitto"))
        .find(|file| file.is_file())
        .ok_or("mosquitto is not installed; `cargo xtask setup` does that")?;
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let mappers = MAPPERS.iter().map(|mapper| own.with_file_name(mapper.program));
    let mappers: Vec<_> = mappers.collect();
    match mappers.iter().find(|file| !file.is_file()) {
        Some(file) => Err(format!("there is no program `{}`", file.display())),
        None => Ok(Found { broker, mappers }),
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// The port itself, or another one that is free.
fn free(usual: u16) -> Result<u16> {
    if is_free(usual) {
        return Ok(usual);
    }
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port is free")?;
    Ok(other.local_addr()?.port())
}
