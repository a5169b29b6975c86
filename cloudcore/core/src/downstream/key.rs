//! The kinds of objects that go down to nodes, and the identity of one object.
//!
//! [`super::Downstream`] and the shell's watches use both. Nothing here knows an object's content.
//!
//! Source of tokens, sources and groups: kubeedge/kubeedge, cloud/pkg/edgecontroller/controller/downstream.go,
//! cloud/pkg/devicecontroller/controller/downstream.go, cloud/pkg/policycontroller/manager/reconcile.go.

use serde_json::Value;
use skerry_protocol::ResourcePath;
use skerry_protocol::resource::CLUSTER_SCOPE;
use std::fmt;
use std::sync::Arc;

/// The kinds that go down, in the order in which a node should get them: a pod comes after what it refers to, a device
/// after its model, and what only applications on the node read comes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The node's own Node.
    Node,
    /// ConfigMaps that live pods refer to.
    ConfigMap,
    /// Secrets that live pods refer to.
    Secret,
    /// Pods bound to the node.
    Pod,
    /// Models of the node's devices.
    DeviceModel,
    /// Devices placed on the node.
    Device,
    /// Rules that the node's devices name.
    DeviceRule,
    /// What the service accounts of the node's pods may do, for reads through the node.
    ServiceAccountAccess,
    /// Objects of any kind that an application on the node watches; see [`super::Input::Pushed`].
    Watched,
}

impl Kind {
    /// All that are read from the API by a watch of their own: every one but [`Kind::Watched`].
    pub const ALL: [Self; 8] = [
        Self::Node,
        Self::ConfigMap,
        Self::Secret,
        Self::Pod,
        Self::DeviceModel,
        Self::Device,
        Self::DeviceRule,
        Self::ServiceAccountAccess,
    ];

    /// Type segment on the wire; empty for [`Kind::Watched`], whose paths carry their own.
    pub fn token(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::ConfigMap => "configmap",
            Self::Secret => "secret",
            Self::Pod => "pod",
            Self::DeviceModel => "devicemodel",
            Self::Device => "device",
            Self::DeviceRule => "devicerule",
            Self::ServiceAccountAccess => "serviceaccountaccess",
            Self::Watched => "",
        }
    }

    /// Kind in the Kubernetes API; empty for [`Kind::Watched`].
    pub fn api_kind(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
            Self::Pod => "Pod",
            Self::DeviceModel => "DeviceModel",
            Self::Device => "Device",
            Self::DeviceRule => "DeviceRule",
            Self::ServiceAccountAccess => "ServiceAccountAccess",
            Self::Watched => "",
        }
    }

    /// `apiVersion` in the Kubernetes API; empty for [`Kind::Watched`].
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Node | Self::ConfigMap | Self::Secret | Self::Pod => "v1",
            Self::DeviceModel | Self::Device => "devices.kubeedge.io/v1beta1",
            Self::DeviceRule => "fleet.skerry.dev/v1alpha1",
            Self::ServiceAccountAccess => "policy.kubeedge.io/v1alpha1",
            Self::Watched => "",
        }
    }

    /// The kind of this name and version in the Kubernetes API, if it has a watch of its own.
    pub fn of_api(api_version: &str, kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|of| of.api_version() == api_version && of.api_kind() == kind)
    }

    /// Whether a cluster may lack it: its definition is not built in.
    pub fn is_custom(self) -> bool {
        self.api_version() != "v1"
    }

    /// Module that a KubeEdge edge believes it comes from; it decides who there is told.
    pub(super) fn source(self) -> &'static str {
        match self {
            Self::Node | Self::ConfigMap | Self::Secret | Self::Pod => "edgecontroller",
            Self::DeviceModel | Self::Device | Self::DeviceRule => "devicecontroller",
            Self::ServiceAccountAccess => "policycontroller",
            Self::Watched => "dynamiccontroller",
        }
    }
}

/// One object. Displays as its wire path. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    kind: Kind,
    /// `namespace/type/name`; never another shape.
    path: Arc<str>,
}

impl Key {
    /// `None` when a name cannot be part of a path, and for [`Kind::Watched`]. The namespace of a Node is ignored.
    pub fn new(kind: Kind, namespace: &str, name: &str) -> Option<Self> {
        let namespace = if kind == Kind::Node { CLUSTER_SCOPE } else { namespace };
        let is_segment = |text: &str| !text.is_empty() && !text.contains('/');
        if kind == Kind::Watched || !is_segment(namespace) || !is_segment(name) {
            return None;
        }
        Some(Self { kind, path: format!("{namespace}/{}/{name}", kind.token()).into() })
    }

    /// The object named by a wire path, if it is of a kind that has a watch of its own.
    pub fn of_path(path: &ResourcePath) -> Option<Self> {
        let kind = Kind::ALL.into_iter().find(|kind| kind.token() == path.kind())?;
        Self::new(kind, path.namespace(), path.name()?)
    }

    /// The same path as something that an application watches. `None` for the path of a collection.
    pub fn watched(path: &ResourcePath) -> Option<Self> {
        path.name()?;
        Some(Self { kind: Kind::Watched, path: path.to_string().into() })
    }

    /// The object's own identity, read from its metadata.
    pub fn of_object(kind: Kind, object: &Value) -> Option<Self> {
        let metadata = &object["metadata"];
        let namespace = metadata["namespace"].as_str().unwrap_or_default();
        Self::new(kind, namespace, metadata["name"].as_str()?)
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Namespace; `null` for a Node.
    pub fn namespace(&self) -> &str {
        self.path.split('/').next().unwrap_or_default()
    }

    /// Name.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// `namespace/type/name`, as in a message.
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}
