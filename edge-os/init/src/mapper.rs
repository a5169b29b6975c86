//! Requests to the device mapper: create, load a table, resume, remove, with the layout of `struct dm_ioctl`.
//!
//! Used by the first stage to set up the verified root. Bytes only; the ioctl itself is [`Kernel::device_mapper`].
//!
//! Source: Linux, include/uapi/linux/dm-ioctl.h.

use crate::kernel::Kernel;
use std::io;

/// Length of the request's header.
pub const HEADER_LEN: usize = 312;
/// Length of the whole request; the kernel answers into the same bytes.
pub const REQUEST_LEN: usize = 16 * 1024;
/// Length of a target's header behind that of the request.
const TARGET_LEN: usize = 40;
/// `DM_READONLY_FLAG`.
const READ_ONLY: u32 = 1;
/// `DM_SUSPEND_FLAG`.
const SUSPEND: u32 = 2;
/// Longest name with its end.
const NAME_LEN: usize = 128;

/// `DM_DEV_CREATE`.
pub const CREATE: u8 = 3;
/// `DM_DEV_REMOVE`.
pub const REMOVE: u8 = 4;
/// `DM_DEV_SUSPEND`, which also resumes.
pub const RESUME: u8 = 6;
/// `DM_TABLE_LOAD`.
pub const LOAD: u8 = 9;

/// Makes a read-only device `name` of `sectors` sectors with one target and returns its node.
///
/// # Errors
///
/// What the kernel says; nothing is left of the device then.
pub fn create(
    kernel: &dyn Kernel,
    name: &str,
    sectors: u64,
    target: &str,
    parameters: &str,
) -> io::Result<String> {
    let mut answer = request(name, 0, None);
    kernel.device_mapper(CREATE, &mut answer)?;
    let node = format!("/dev/dm-{}", minor(&answer));
    let made = load(kernel, name, sectors, target, parameters);
    if made.is_err() {
        let _ = remove(kernel, name);
    }
    made.map(|()| node)
}

/// Gives a device another table; what it holds open goes on with it.
///
/// # Errors
///
/// What the kernel says; the old table stays then.
pub fn load(
    kernel: &dyn Kernel,
    name: &str,
    sectors: u64,
    target: &str,
    parameters: &str,
) -> io::Result<()> {
    kernel
        .device_mapper(LOAD, &mut request(name, READ_ONLY, Some((sectors, target, parameters))))?;
    // A device with a table that waits is suspended and resumed by this one request.
    kernel.device_mapper(RESUME, &mut request(name, 0, None))
}

/// Takes a device away.
///
/// # Errors
///
/// What the kernel says; a device in use stays.
pub fn remove(kernel: &dyn Kernel, name: &str) -> io::Result<()> {
    kernel.device_mapper(REMOVE, &mut request(name, 0, None))
}

fn request(name: &str, flags: u32, table: Option<(u64, &str, &str)>) -> Vec<u8> {
    debug_assert!(name.len() < NAME_LEN && flags & SUSPEND == 0);
    let mut bytes = vec![0_u8; REQUEST_LEN];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &4_u32.to_ne_bytes()); // version 4.0.0
    put(12, &(REQUEST_LEN as u32).to_ne_bytes());
    put(16, &(HEADER_LEN as u32).to_ne_bytes());
    put(28, &flags.to_ne_bytes());
    put(48, name.as_bytes());
    if let Some((sectors, target, parameters)) = table {
        put(20, &1_u32.to_ne_bytes());
        let at = HEADER_LEN;
        put(at + 8, &sectors.to_ne_bytes());
        // From the start of this target to the next, with the text's end and padded to 8.
        let next = (TARGET_LEN + parameters.len() + 1).next_multiple_of(8);
        put(at + 20, &(next as u32).to_ne_bytes());
        put(at + 24, target.as_bytes());
        put(at + TARGET_LEN, parameters.as_bytes());
    }
    bytes
}

/// The minor number in an answer, in the kernel's 64-bit form of a device number.
fn minor(answer: &[u8]) -> u64 {
    let field = answer[40..48].try_into().expect("eight bytes");
    let device = u64::from_ne_bytes(field);
    (device & 0xff) | ((device >> 12) & 0xffff_ff00)
}

/// What a request asks for: name, sectors, target and parameters; for the double.
#[cfg(test)]
pub(crate) fn explain(request: &[u8]) -> (String, String) {
    let text = |at: usize| {
        let end = request[at..].iter().position(|byte| *byte == 0).expect("ends");
        String::from_utf8_lossy(&request[at..at + end]).into_owned()
    };
    let table = match request[20] {
        0 => String::new(),
        _ => format!("{} {}", text(HEADER_LEN + 24), text(HEADER_LEN + TARGET_LEN)),
    };
    (text(48), table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_request_has_the_layout_of_the_kernel() {
        let bytes = request("root", READ_ONLY, Some((80, "verity", "1 2 3")));
        assert_eq!(bytes.len(), REQUEST_LEN);
        assert_eq!(bytes[..4], 4_u32.to_ne_bytes());
        assert_eq!(bytes[12..20], [0, 64, 0, 0, 56, 1, 0, 0]);
        assert_eq!((bytes[20], bytes[28]), (1, 1));
        assert_eq!(bytes[320..328], 80_u64.to_ne_bytes());
        assert_eq!(bytes[332..336], 48_u32.to_ne_bytes()); // 40 + 6, padded
        assert_eq!(explain(&bytes), ("root".into(), "verity 1 2 3".into()));
    }

    #[test]
    fn minor_numbers_above_255_are_put_together() {
        let mut answer = vec![0; HEADER_LEN];
        let device = |minor: u64| (minor & 0xff) | (254 << 8) | ((minor & !0xff) << 12);
        for wanted in [0, 3, 255, 256, 70_000] {
            answer[40..48].copy_from_slice(&device(wanted).to_ne_bytes());
            assert_eq!(minor(&answer), wanted);
        }
    }
}
