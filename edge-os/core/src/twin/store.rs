//! What is kept of devices and mappers through a restart, as rows. The store of the agent writes and reads them.

use super::Id;
use super::mapper::{self, Info, Object};
use super::value::Properties;
use serde::{Deserialize, Serialize};

/// One device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceRow {
    /// `metadata.uid` of its object; empty while the hub has only spoken of it.
    #[serde(default)]
    pub uid: String,
    /// Made anew whenever the row is, so that numbers that begin again are not taken for older ones.
    #[serde(default)]
    pub run: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// As reported last; empty before.
    #[serde(default)]
    pub state: String,
    /// RFC 3339, empty unless it is there.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub last_online: String,
    /// Number of the last change of the state.
    #[serde(default)]
    pub state_edge: u64,
    /// Number of the last one that the hub has confirmed.
    #[serde(default)]
    pub state_told: u64,
    /// Its properties.
    #[serde(default)]
    pub twins: Properties,
}

impl DeviceRow {
    /// A row for a device that was not known.
    pub(super) fn new() -> Self {
        let run = uuid::Uuid::new_v4().simple().to_string();
        Self { run: run[..8].to_owned(), ..Self::default() }
    }

    /// What tells this device and these numbers from others; empty while the hub has only spoken of it.
    pub(super) fn epoch(&self) -> String {
        if self.uid.is_empty() { String::new() } else { format!("{}/{}", self.uid, self.run) }
    }

    /// Whether the hub does not know something.
    pub fn is_dirty(&self) -> bool {
        self.state_told < self.state_edge
            || self.twins.0.values().any(super::value::Property::is_dirty)
    }
}

/// Everything that was kept.
#[derive(Debug, Default)]
pub struct Kept {
    /// By `namespace/name`.
    pub devices: Vec<(String, DeviceRow)>,
    /// Each with another protocol.
    pub mappers: Vec<Info>,
    /// Protocol of the mapper, what it knows, digest of what it was told.
    pub knows: Vec<(String, Object, String)>,
}

/// A change of what is kept. All changes of one [`super::Twin::take_changes`] belong into one transaction, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Insert or replace.
    Device(Id, DeviceRow),
    /// Remove.
    Forget(Id),
    /// About mappers.
    Mapper(mapper::Change),
}
