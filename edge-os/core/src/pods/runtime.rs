//! What the runtime has of one pod, reduced to what decisions need.

use jiff::Timestamp;

/// The sandboxes and containers of one pod, dead ones included.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodRuntime {
    pub sandboxes: Vec<Sandbox>,
    pub containers: Vec<Instance>,
}

/// A sandbox: the namespaces that the containers of a pod share.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sandbox {
    pub id: String,
    pub attempt: u32,
    pub ready: bool,
    pub host_network: bool,
    pub ips: Vec<String>,
    pub created_at: Timestamp,
}

/// State of one instance of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Made, never started.
    Created,
    Running,
    Exited(Exit),
    /// The runtime lost track of it.
    Unknown,
}

/// How an instance ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub code: i32,
    pub reason: String,
    /// What the container left as its last words, or the runtime's own message.
    pub message: String,
    pub finished_at: Timestamp,
}

/// One instance of a container. A restart makes a new one.
#[derive(Debug, Clone, PartialEq)]
pub struct Instance {
    pub id: String,
    pub name: String,
    pub sandbox: String,
    pub restart_count: u32,
    pub state: State,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    /// Image as the runtime resolved it.
    pub image: String,
    pub image_id: String,
    /// [`super::definition_hash`] at creation; absent if something else made the container.
    pub hash: Option<String>,
    /// [`super::kubelet::ANNOTATION_HASH`] at creation, whoever made the container.
    pub kubelet_hash: Option<String>,
    /// Image as the pod had it, where the runtime tells.
    pub user_image: Option<String>,
}

impl Instance {
    /// Whether it runs.
    pub fn is_running(&self) -> bool {
        self.state == State::Running
    }

    /// Whether its processes may be alive.
    pub fn may_live(&self) -> bool {
        matches!(self.state, State::Running | State::Unknown)
    }

    /// Returns how it ended, if it did.
    pub fn exit(&self) -> Option<&Exit> {
        match &self.state {
            State::Exited(exit) => Some(exit),
            _ => None,
        }
    }
}

impl PodRuntime {
    /// Returns the newest sandbox.
    pub fn sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.iter().max_by_key(|sandbox| (sandbox.attempt, sandbox.created_at))
    }

    /// Returns the instances of a container, newest first.
    pub fn instances(&self, name: &str) -> Vec<&Instance> {
        let mut found: Vec<_> = self.containers.iter().filter(|one| one.name == name).collect();
        found.sort_by_key(|one| std::cmp::Reverse((one.restart_count, one.created_at)));
        found
    }

    /// Returns the newest instance of a container.
    pub fn newest(&self, name: &str) -> Option<&Instance> {
        let instances = self.containers.iter().filter(|one| one.name == name);
        instances.max_by_key(|one| (one.restart_count, one.created_at))
    }

    /// Whether a process of the pod may be alive.
    pub fn may_live(&self) -> bool {
        self.sandboxes.iter().any(|sandbox| sandbox.ready)
            || self.containers.iter().any(Instance::may_live)
    }
}
