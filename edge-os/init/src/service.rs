//! What PID 1 runs, as data: programs, what they wait for, where they live, and what is done for them first.
//!
//! [`crate::supervise`] decides when; [`crate::stage1`] carries it out.

use crate::kernel::Launch;
use crate::linux::environment;

/// A program that is kept running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name, in logs and on the console.
    pub name: &'static str,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Names of services that have to be ready first; after [`crate::supervise::AFTER_MAX`] it is started anyway.
    pub after: &'static [&'static str],
    /// The socket that it has when it is ready; ready at once without one.
    pub socket: Option<&'static str>,
    /// Its cgroup below /sys/fs/cgroup.
    pub cgroup: &'static str,
    /// `memory.low` of the cgroup, in MiB; 0 for none.
    pub memory_low_mib: u32,
    /// `oom_score_adj`.
    pub oom_score: i32,
    /// Capabilities that it can never have.
    pub without_capabilities: &'static [u8],
    /// Its terminal, in place of a log.
    pub console: Option<&'static str>,
    /// Whether the node is dead without it, so that the machine is started again after a while.
    pub vital: bool,
    /// Time between SIGTERM and SIGKILL at the end.
    pub stop_s: u64,
}

/// Name of the network service.
pub const NETWORK: &str = "network";
/// Name of the runtime.
pub const CONTAINERD: &str = "containerd";
/// Name of the agent.
pub const AGENT: &str = "edgecore";
/// Name of the MQTT broker, and of the user that it runs as; only in images that have the program.
pub const BROKER: &str = "mosquitto";
/// User and group of the broker.
pub const BROKER_ID: u32 = 100;
/// Its program.
pub const BROKER_PROGRAM: &str = "/usr/sbin/mosquitto";
/// Its configuration, in the root.
pub const BROKER_CONFIG: &str = "/etc/mosquitto/mosquitto.conf";
/// Where it keeps what is retained, as the configuration says.
pub const BROKER_FOLDER: &str = "/var/lib/mosquitto";
/// Name of the shell of the debug variant.
pub const SHELL: &str = "shell";
/// The runtime's socket.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
/// The agent's configuration, which PID 1 writes.
pub const AGENT_CONFIG: &str = "/run/skerry/edgecore.yaml";

/// `CAP_SYS_MODULE`, `CAP_SYS_RAWIO`, `CAP_SYS_BOOT`: what the agent asks PID 1 for instead.
const NOT_FOR_THE_AGENT: [u8; 3] = [16, 17, 22];

/// All services of this image.
pub fn services(debug: bool) -> Vec<Service> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let service = |name, argv: &[&str], cgroup| Service {
        name,
        argv: words(argv),
        after: &[],
        socket: None,
        cgroup,
        memory_low_mib: 0,
        oom_score: 0,
        without_capabilities: &[],
        console: None,
        vital: false,
        stop_s: 3,
    };
    let mut all = vec![
        Service {
            oom_score: -900,
            ..service(NETWORK, &["/usr/bin/skerry-init", "network"], "system/mgmt")
        },
        Service {
            socket: Some(CONTAINERD_SOCKET),
            memory_low_mib: 64,
            oom_score: -999,
            vital: true,
            stop_s: 5,
            ..service(
                CONTAINERD,
                &["/usr/bin/containerd", "--config", "/etc/containerd/config.toml"],
                "system/containerd",
            )
        },
        Service {
            after: &[CONTAINERD],
            memory_low_mib: 32,
            oom_score: -900,
            without_capabilities: &NOT_FOR_THE_AGENT,
            vital: true,
            stop_s: 5,
            ..service(AGENT, &["/usr/bin/edgecore", "run", "--config", AGENT_CONFIG], "system/edge")
        },
        Service {
            oom_score: -500,
            without_capabilities: &NOT_FOR_THE_AGENT,
            ..service(BROKER, &[BROKER_PROGRAM, "-c", BROKER_CONFIG], "system/mgmt")
        },
    ];
    if debug {
        all.push(Service {
            console: Some("/dev/console"),
            stop_s: 1,
            ..service(SHELL, &["/usr/bin/busybox", "sh", "-l"], "system/mgmt")
        });
    }
    all
}

/// The cgroups, those that hold others first; each enables all controllers for what is below it.
pub const CGROUPS: [&str; 5] =
    ["system", "system/containerd", "system/edge", "system/mgmt", "kubepods"];
/// The controllers that are handed down.
pub const CONTROLLERS: [&str; 6] = ["cpuset", "cpu", "io", "memory", "hugetlb", "pids"];

impl Service {
    /// How it is started. `proxy` is for what has to reach the outside.
    pub fn launch(&self, proxy: Option<&str>) -> Launch {
        let pair = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let mut env: Vec<_> = environment().into_iter().map(pair).collect();
        if let Some(proxy) = proxy.filter(|_| matches!(self.name, CONTAINERD | AGENT)) {
            for key in ["HTTP_PROXY", "HTTPS_PROXY"] {
                env.push((key.into(), proxy.into()));
            }
            let own = "localhost,127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16";
            env.push(("NO_PROXY".into(), own.into()));
        }
        Launch {
            argv: self.argv.clone(),
            env,
            cgroup: self.cgroup.into(),
            oom_score: self.oom_score,
            without_capabilities: self.without_capabilities.to_vec(),
            console: self.console.map(str::to_owned),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn production_has_no_shell_and_every_cgroup_of_a_service_is_made() {
        let names: Vec<_> = services(false).iter().map(|one| one.name).collect();
        assert_eq!(names, [NETWORK, CONTAINERD, AGENT, BROKER]);
        assert_eq!(services(true).last().map(|one| one.name), Some(SHELL));
        for service in services(true) {
            assert!(CGROUPS.contains(&service.cgroup), "{}", service.cgroup);
            assert!(service.after.iter().all(|after| names.contains(after)));
        }
    }

    #[test]
    fn only_what_talks_to_the_outside_has_the_proxy() {
        for service in services(false) {
            let launch = service.launch(Some("http://proxy:3128"));
            let has = launch.env.iter().any(|(key, _)| key == "HTTPS_PROXY");
            assert_eq!(has, [CONTAINERD, AGENT].contains(&service.name));
            assert!(launch.env.iter().any(|(key, value)| key == "PATH" && value.contains("sbin")));
        }
    }
}
