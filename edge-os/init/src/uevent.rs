//! Device events of the kernel, and the walk over the devices that were there before anybody listened.
//!
//! The socket is opened first, then /sys is walked, then events are taken all life long: a disk behind a USB hub shows
//! up long after the walk. Called by both stages. Parsing is pure.

use crate::kernel::{Kernel, line};
use std::collections::BTreeMap;

/// Devices of one bus that are looked at; a large server has some thousand.
const DEVICES_MAX: usize = 20_000;

/// An event of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Uevent {
    /// `add`, `remove`, `change`, ...
    pub action: String,
    /// Path below /sys.
    pub path: String,
    /// `block`, `net`, `input`, ...
    pub subsystem: String,
    /// What asks for a module, if anything.
    pub modalias: Option<String>,
    /// Name below /dev, if it has one.
    pub device: Option<String>,
    /// `disk` or `partition` for block devices.
    pub kind: Option<String>,
}

impl Uevent {
    /// Reads what came from the socket: `add@/devices/…`, then `KEY=value`, each with a zero at its end. `None` for
    /// anything else.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut parts = text.split('\0').filter(|part| !part.is_empty());
        let (action, path) = parts.next()?.split_once('@')?;
        let mut fields: BTreeMap<&str, &str> =
            parts.filter_map(|part| part.split_once('=')).collect();
        let mut take = |key| fields.remove(key).map(str::to_owned);
        Some(Self {
            action: action.into(),
            path: path.into(),
            subsystem: take("SUBSYSTEM").unwrap_or_default(),
            modalias: take("MODALIAS"),
            device: take("DEVNAME"),
            kind: take("DEVTYPE"),
        })
    }

    /// Whether a disk or partition has come or changed.
    pub fn brings_block(&self) -> bool {
        self.subsystem == "block" && matches!(self.action.as_str(), "add" | "change")
    }
}

/// The aliases of all devices that are there, each once, sorted.
///
/// By the lists of the buses: each device that can ask for a module is on one, and the tree of /sys/devices has a
/// hundred times as many folders. Processors have one alias for all, outside of the list of their bus.
pub fn aliases(kernel: &dyn Kernel) -> Vec<String> {
    const BUSES: &str = "/sys/bus";
    let mut found = std::collections::BTreeSet::new();
    let mut take = |path: String| {
        let alias = line(kernel, &path);
        if !alias.is_empty() {
            found.insert(alias);
        }
    };
    take("/sys/devices/system/cpu/modalias".into());
    take("/sys/devices/virtual/dmi/id/modalias".into());
    for bus in kernel.list(BUSES).unwrap_or_default() {
        let devices = format!("{BUSES}/{bus}/devices");
        for device in kernel.list(&devices).unwrap_or_default().into_iter().take(DEVICES_MAX) {
            take(format!("{devices}/{device}/modalias"));
        }
    }
    found.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_of_a_partition_is_read() {
        let bytes = b"add@/devices/pci/vda/vda3\0ACTION=add\0SUBSYSTEM=block\0DEVNAME=vda3\0DEVTYPE=partition\0";
        let event = Uevent::parse(bytes).expect("an event");
        assert!(event.brings_block());
        assert_eq!(event.device.as_deref(), Some("vda3"));
        assert_eq!(event.kind.as_deref(), Some("partition"));
        assert_eq!(event.modalias, None);
    }

    #[test]
    fn devices_of_every_bus_and_the_processor_ask_for_their_modules() {
        let machine = crate::recorder::Machine::new();
        machine.file("/sys/devices/system/cpu/modalias", b"cpu:type:x86,ven0000\n");
        machine.file("/sys/bus/pci/devices/0000:00:02.0/modalias", b"pci:v00001AF4d00001000\n");
        machine.file("/sys/bus/virtio/devices/virtio0/modalias", b"virtio:d00000001v00001AF4\n");
        machine.file("/sys/bus/virtio/devices/virtio1/modalias", b"virtio:d00000001v00001AF4\n");
        machine.file("/sys/bus/workqueue/devices/x/name", b"");
        let aliases = aliases(&machine);
        assert_eq!(
            aliases,
            ["cpu:type:x86,ven0000", "pci:v00001AF4d00001000", "virtio:d00000001v00001AF4"]
        );
    }

    #[test]
    fn what_is_no_event_is_nothing() {
        for bytes in [&b""[..], b"libudev\0\xfe\xed\xca\xfe", b"\0\0", b"noaction\0A=b", b"\xff@x"]
        {
            assert_eq!(Uevent::parse(bytes), None);
        }
    }
}
