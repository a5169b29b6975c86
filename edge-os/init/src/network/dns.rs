//! Addresses of a name, for time servers: questions and answers of DNS, nothing more.
//!
//! The static binary has no resolver of the C library, and one name every few minutes needs no
//! cache and no recursion: the servers of `resolv.conf` do that. No socket here.
//!
//! Source: RFC 1035 sections 3 and 4, RFC 3596.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Addresses of one answer that are used.
pub const ADDRESSES_MAX: usize = 8;
/// Longest answer over UDP.
pub const MESSAGE_LEN_MAX: usize = 1232;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;

/// Which addresses are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// IPv4.
    A,
    /// IPv6.
    Aaaa,
}

/// Writes the question for `name`; `None` when it cannot be a name.
pub fn write_question(id: u16, name: &str, kind: Kind) -> Option<Vec<u8>> {
    let name = name.trim_end_matches('.');
    if name.is_empty() || name.len() > 253 {
        return None;
    }
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]); // recursion desired, one question
    for label in name.split('.') {
        let len = u8::try_from(label.len()).ok().filter(|len| (1..=63).contains(len))?;
        bytes.push(len);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    let kind = match kind {
        Kind::A => TYPE_A,
        Kind::Aaaa => TYPE_AAAA,
    };
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1]);
    Some(bytes)
}

/// Reads the addresses of the answer to `question`; `None` when it is no answer to it. An answer
/// without addresses, or a refusal, is an empty list.
pub fn read_answer(question: &[u8], answer: &[u8]) -> Option<Vec<IpAddr>> {
    let header = answer.first_chunk::<12>()?;
    let asked = question.get(12..)?;
    let is_answer = header[..2] == *question.get(..2)? && header[2] & 0xf8 == 0x80;
    let repeated = answer.get(12..12 + asked.len())?;
    if !is_answer || header[4..6] != [0, 1] || !repeated.eq_ignore_ascii_case(asked) {
        return None;
    }
    if header[3] & 15 != 0 {
        return Some(Vec::new());
    }
    let count = u16::from_be_bytes([header[6], header[7]]);
    let mut rest = &answer[12 + asked.len()..];
    let mut found = Vec::new();
    for _ in 0..count {
        let Some((kind, data, after)) = read_record(rest) else { break };
        rest = after;
        let ip = match kind {
            TYPE_A => data.try_into().ok().map(|octets: [u8; 4]| IpAddr::from(octets)),
            TYPE_AAAA => data.try_into().ok().map(|octets: [u8; 16]| IpAddr::from(octets)),
            _ => None, // an alias; its addresses follow
        };
        found.extend(ip.filter(is_usable));
        if found.len() == ADDRESSES_MAX {
            break;
        }
    }
    Some(found)
}

fn is_usable(ip: &IpAddr) -> bool {
    !ip.is_unspecified()
        && !ip.is_multicast()
        && *ip != IpAddr::V4(Ipv4Addr::BROADCAST)
        && *ip != IpAddr::V6(Ipv6Addr::LOCALHOST)
        && !matches!(ip, IpAddr::V4(ip) if ip.is_loopback())
}

/// Returns type, data and what comes after. The owner's name is skipped: the server follows aliases.
fn read_record(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let mut rest = bytes;
    loop {
        let (len, after) = rest.split_first()?;
        match len {
            0 => {
                rest = after;
                break;
            }
            // A pointer to an earlier name ends this one; it is not followed.
            192.. => {
                rest = after.get(1..)?;
                break;
            }
            1..=63 => rest = after.get(usize::from(*len)..)?,
            _ => return None,
        }
    }
    let fixed = rest.first_chunk::<10>()?;
    let kind = u16::from_be_bytes([fixed[0], fixed[1]]);
    let len = usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
    let (data, after) = rest[10..].split_at_checked(len)?;
    (fixed[2..4] == [0, 1]).then_some((kind, data, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(question: &[u8]) -> Vec<u8> {
        let mut bytes = question.to_vec();
        bytes[2..4].copy_from_slice(&[0x81, 0x80]);
        bytes[6..8].copy_from_slice(&[0, 3]);
        // pool.example is an alias of a.pool.example, which has two addresses
        bytes.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 4, 1, b'a', 0xc0, 12]);
        bytes.extend([0xc0, 42, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 1]);
        bytes.extend([1, b'a', 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 2]);
        bytes
    }

    #[test]
    fn addresses_behind_an_alias_are_read() {
        let question = write_question(7, "pool.example", Kind::A).expect("a name");
        let found = read_answer(&question, &answer(&question)).expect("an answer");
        assert_eq!(found, [IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2])]);
        let mut refused = answer(&question);
        refused[3] |= 3;
        assert_eq!(read_answer(&question, &refused), Some(Vec::new()));
    }

    #[test]
    fn answers_to_other_questions_and_broken_ones_are_not_taken() {
        let question = write_question(7, "pool.example", Kind::A).expect("a name");
        let other = write_question(7, "tool.example", Kind::A).expect("a name");
        assert_eq!(read_answer(&other, &answer(&question)), None);
        let other = write_question(8, "pool.example", Kind::A).expect("a name");
        assert_eq!(read_answer(&other, &answer(&question)), None);
        assert_eq!(read_answer(&question, &question), None);
        let whole = answer(&question);
        for cut in 0..whole.len() {
            let _ = read_answer(&question, &whole[..cut]);
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut broken = whole.clone();
                broken[at] ^= 1 << bit;
                let _ = read_answer(&question, &broken);
            }
        }
    }

    #[test]
    fn impossible_names_are_not_asked_for() {
        for name in ["", ".", "a..b", &"x".repeat(64), &"x.".repeat(130)] {
            assert_eq!(write_question(1, name, Kind::Aaaa), None, "{name}");
        }
    }
}
