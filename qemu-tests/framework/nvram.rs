//! Variable stores of OVMF with Secure Boot keys of our own in them.
//!
//! The template that comes with the firmware is in setup mode. Keys are appended to it as the firmware itself would
//! store them, so that the first start finds Secure Boot on.
//!
//! Source of the facts: UEFI Platform Initialization specification, volume 3 (firmware volumes); EDK II's header
//! `VariableFormat.h` (names and layout of the authenticated variable store); UEFI specification, chapter 32.

use anyhow::{Context, Result, ensure};
use std::path::Path;

/// A GUID as it lies in memory.
type Guid = [u8; 16];

const GLOBAL: Guid =
    guid(0x8be4_df61, 0x93ca, 0x11d2, [0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c]);
const SECURITY: Guid =
    guid(0xd719_b2cb, 0x3d3a, 0x4596, [0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f]);
const SECURE_BOOT_ENABLE: Guid =
    guid(0xf0a3_0bc7, 0xaf08, 0x4556, [0x99, 0xc4, 0x00, 0x10, 0x09, 0xc9, 0x3a, 0x44]);
const CUSTOM_MODE: Guid =
    guid(0xc076_ec0c, 0x7028, 0x4399, [0xa0, 0x72, 0x71, 0xee, 0x5c, 0x44, 0x8b, 0x9f]);
const AUTHENTICATED_STORE: Guid =
    guid(0xaaf3_2c78, 0x947b, 0x439a, [0xa1, 0x80, 0x2e, 0x14, 0x4e, 0xc3, 0x77, 0x92]);

/// Kept over power off, seen by boot services.
const BOOT: u32 = 0x3;
/// The same, seen by the system too, and only changed by who can sign.
const AUTHENTICATED: u32 = 0x27;

const HEADER: usize = 60;

const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> Guid {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// Keys of Secure Boot, each as a signature list of the UEFI specification (`.esl`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// Who owns the machine.
    pub pk: Vec<u8>,
    /// Who may change what is allowed.
    pub kek: Vec<u8>,
    /// What is allowed to start.
    pub db: Vec<u8>,
}

impl Keys {
    /// Those of a folder that `skerry image keys` made.
    pub fn read(folder: &Path) -> Result<Self> {
        let list = |name: &str| {
            let file = folder.join(format!("{name}.esl"));
            std::fs::read(&file).with_context(|| format!("could not read {}", file.display()))
        };
        Ok(Self { pk: list("PK")?, kek: list("KEK")?, db: list("db")? })
    }
}

/// The store with keys in it and Secure Boot on.
pub fn with_secure_boot(template: &[u8], keys: &Keys) -> Result<Vec<u8>> {
    let mut store = template.to_vec();
    let (mut at, end) = free_space(&store)?;
    for (name, vendor, attributes, data) in [
        ("PK", GLOBAL, AUTHENTICATED, &keys.pk[..]),
        ("KEK", GLOBAL, AUTHENTICATED, &keys.kek),
        ("db", SECURITY, AUTHENTICATED, &keys.db),
        ("SecureBootEnable", SECURE_BOOT_ENABLE, BOOT, &[1]),
        ("CustomMode", CUSTOM_MODE, BOOT, &[0]),
    ] {
        let bytes = variable(name, vendor, attributes, data);
        ensure!(at + bytes.len() <= end, "the variable store is full");
        ensure!(store[at..at + bytes.len()].iter().all(|b| *b == 0xff), "the store is in use");
        store[at..at + bytes.len()].copy_from_slice(&bytes);
        at += bytes.len().next_multiple_of(4);
    }
    Ok(store)
}

/// First free byte and end of the variables in a store.
fn free_space(store: &[u8]) -> Result<(usize, usize)> {
    let u16_at = |at: usize| store.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let u32_at =
        |at: usize| store.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    ensure!(store.get(40..44) == Some(b"_FVH"), "no firmware volume");
    let variables = usize::from(u16_at(48).unwrap_or_default());
    let kind = store.get(variables..variables + 16);
    ensure!(kind == Some(&AUTHENTICATED_STORE[..]), "no authenticated variable store");
    let end = variables + u32_at(variables + 16).unwrap_or_default() as usize;
    ensure!(end <= store.len(), "the variable store is cut");
    let mut at = variables + 28;
    // Each variable starts with this mark; free space is all ones.
    while u16_at(at) == Some(0x55aa) && at + HEADER <= end {
        let (Some(name), Some(data)) = (u32_at(at + 36), u32_at(at + 40)) else { break };
        at = (at + HEADER + name as usize + data as usize).next_multiple_of(4);
    }
    ensure!(at < end, "the variable store is full");
    Ok((at, end))
}

fn variable(name: &str, vendor: Guid, attributes: u32, data: &[u8]) -> Vec<u8> {
    let name: Vec<u8> =
        name.encode_utf16().chain([0]).flat_map(|unit| unit.to_le_bytes()).collect();
    let mut bytes = vec![0xaa, 0x55, 0x3f, 0];
    bytes.extend(attributes.to_le_bytes());
    bytes.extend([0; 8]); // monotonic count, unused
    let mut time = [0; 16];
    if attributes == AUTHENTICATED {
        // 2020-01-01: an update must be newer, and none comes.
        time[..4].copy_from_slice(&[0xe4, 0x07, 1, 1]);
    }
    bytes.extend(time);
    bytes.extend([0; 4]); // public key index, unused
    bytes.extend((name.len() as u32).to_le_bytes());
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes.extend(vendor);
    bytes.extend(name);
    bytes.extend(data);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template() -> Vec<u8> {
        let mut store = vec![0xff; 16 << 10];
        store[..72].fill(0);
        store[40..44].copy_from_slice(b"_FVH");
        store[48] = 72;
        store[72..88].copy_from_slice(&AUTHENTICATED_STORE);
        store[88..92].copy_from_slice(&(8u32 << 10).to_le_bytes());
        store[92..100].copy_from_slice(&[0x5a, 0xfe, 0, 0, 0, 0, 0, 0]);
        store
    }

    fn keys(byte: u8, length: usize) -> Keys {
        let list = vec![byte; length];
        Keys { pk: list.clone(), kek: list.clone(), db: list }
    }

    #[test]
    fn keys_are_appended_after_each_other_and_found_again() {
        let store = with_secure_boot(&template(), &keys(7, 801)).unwrap();
        let (at, end) = free_space(&store).unwrap();
        assert!(at > 100 + 3 * 801 && at < end);
        // A second set goes behind the first.
        let twice = with_secure_boot(&store, &keys(8, 801)).unwrap();
        assert_eq!(&twice[..at], &store[..at]);
        let db: Vec<u8> = "db\0".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(store.windows(db.len()).filter(|window| *window == db).count(), 1);
    }

    #[test]
    fn foreign_and_full_stores_are_told() {
        assert!(with_secure_boot(&[0; 100], &keys(0, 1)).is_err());
        let error = with_secure_boot(&template(), &keys(0, 4000)).unwrap_err().to_string();
        assert_eq!(error, "the variable store is full");
    }
}
