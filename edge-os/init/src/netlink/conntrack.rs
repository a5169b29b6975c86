//! Tracked connections: forgetting those that a new port mapping would not see.
//!
//! A UDP sender that speaks without a pause keeps its entry alive, and with it the old way of its
//! packets, long after a port mapping has changed. Called by the `portmap` plugin.
//!
//! Source: Linux, include/uapi/linux/netfilter/nfnetlink_conntrack.h.

use super::{Family, NetlinkError, Request, Socket, attribute};

const SUBSYSTEM: u16 = 1;
const MSG_GET: u16 = 1;
const MSG_DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
/// Entries that one call forgets at most; the others end by themselves.
const FORGET_MAX: usize = 4096;

/// Forgets the connections of IP protocol `protocol` that were opened to one of `ports`, in the
/// address family `family` (2 or 10). Returns how many.
pub fn forget(family: u8, protocol: u8, ports: &[u16]) -> Result<usize, NetlinkError> {
    let mut socket = Socket::open(Family::Netfilter)?;
    let mut found: Vec<Vec<u8>> = Vec::new();
    let header = [family, 0, 0, 0];
    let request = Request::new(SUBSYSTEM << 8 | MSG_GET, 0, &header);
    socket.dump("list connections", request, |message| {
        let body = message.payload.get(4..).unwrap_or_default();
        if is_for(body, protocol, ports) && found.len() < FORGET_MAX {
            found.push(body.to_vec());
        }
    })?;
    let mut forgotten = 0;
    for body in &found {
        let mut request = Request::new(SUBSYSTEM << 8 | MSG_DELETE, 0, &header);
        for kind in [CTA_TUPLE_ORIG, CTA_ZONE, CTA_ID] {
            if let Some(value) = attribute(body, kind) {
                let nested = if kind == CTA_TUPLE_ORIG { super::NLA_F_NESTED } else { 0 };
                request.attribute(kind | nested, value);
            }
        }
        match socket.execute("forget a connection", request) {
            Ok(()) => forgotten += 1,
            Err(error) if error.is_absent() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}

fn is_for(body: &[u8], protocol: u8, ports: &[u16]) -> bool {
    let read = || {
        let tuple = attribute(body, CTA_TUPLE_ORIG)?;
        let proto = attribute(tuple, CTA_TUPLE_PROTO)?;
        let number = *attribute(proto, CTA_PROTO_NUM)?.first()?;
        let port = attribute(proto, CTA_PROTO_DST_PORT)?.first_chunk::<2>()?;
        Some((number, u16::from_be_bytes(*port)))
    };
    read().is_some_and(|(number, port)| number == protocol && ports.contains(&port))
}
