//! Packets that are made by hand: DHCP before there is an address, and questions of ARP.
//!
//! The kernel gives UDP to a program only for an address of its own, so the client of an interface
//! without one reads and writes whole IPv4 packets on a packet socket. A filter in the kernel lets
//! in nothing but UDP to port 68 (or ARP); no port is ever open.
//!
//! The checksum of UDP is not looked at: packets from the same machine (containers, virtual
//! machines) come before anything has filled it in. Source: RFC 791, RFC 768, RFC 826, RFC 5227.

use crate::netlink::sys;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};

/// Port that clients of DHCP hear on.
pub const CLIENT_PORT: u16 = 68;
/// Port that servers of DHCP hear on.
pub const SERVER_PORT: u16 = 67;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const EVERYBODY: [u8; 6] = [0xff; 6];
/// Longest packet that is read.
const PACKET_LEN_MAX: usize = 2048;

/// What a packet socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Answers of DHCP servers.
    Dhcp,
    /// ARP.
    Arp,
}

/// A socket for packets of one kind on one interface.
#[derive(Debug)]
pub struct PacketSocket {
    socket: Socket,
    index: u32,
    protocol: u16,
}

impl PacketSocket {
    /// Opens one on interface `index`; it never waits.
    pub fn open(kind: Kind, index: u32) -> io::Result<Self> {
        let protocol = match kind {
            Kind::Dhcp => ETHERTYPE_IPV4,
            Kind::Arp => ETHERTYPE_ARP,
        };
        // With protocol 0 nothing is heard before the filter is there and the interface is chosen.
        let socket =
            Socket::new(Domain::PACKET, Type::DGRAM.nonblocking(), Some(Protocol::from(0)))?;
        if kind == Kind::Dhcp {
            socket.attach_filter(&dhcp_filter())?;
        }
        socket.bind(&sys::packet_address(index, protocol, EVERYBODY))?;
        Ok(Self { socket, index, protocol })
    }

    /// Sends a packet to everybody on the link.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        let address = sys::packet_address(self.index, self.protocol, EVERYBODY);
        self.socket.send_to(packet, &address).map(|_| ())
    }

    /// Returns the next packet, if there is one.
    pub fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; PACKET_LEN_MAX];
        match (&self.socket).read(&mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                Ok(Some(buffer))
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Lets whole UDP packets to port 68 pass; offsets are from the IPv4 header.
fn dhcp_filter() -> [SockFilter; 9] {
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_HALF_INDIRECT: u16 = 0x48;
    const HEADER_LEN_TO_X: u16 = 0xb1;
    const JUMP_EQUAL: u16 = 0x15;
    const JUMP_BITS: u16 = 0x45;
    const RETURN: u16 = 0x06;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, 9),
        SockFilter::new(JUMP_EQUAL, 0, 6, 17),
        SockFilter::new(LOAD_HALF, 0, 0, 6),
        SockFilter::new(JUMP_BITS, 4, 0, 0x1fff), // a later part of a packet
        SockFilter::new(HEADER_LEN_TO_X, 0, 0, 0),
        SockFilter::new(LOAD_HALF_INDIRECT, 0, 0, 2),
        SockFilter::new(JUMP_EQUAL, 0, 1, CLIENT_PORT as u32),
        SockFilter::new(RETURN, 0, 0, 0xffff),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}

/// Writes an IPv4 packet with a UDP payload from port 68 to port 67.
pub fn write_dhcp(from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let udp_len = u16::try_from(payload.len() + 8).expect("messages are short");
    let mut udp = Vec::with_capacity(usize::from(udp_len));
    udp.extend(CLIENT_PORT.to_be_bytes());
    udp.extend(SERVER_PORT.to_be_bytes());
    udp.extend(udp_len.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(payload);
    let mut pseudo = [from.octets(), to.octets()].concat();
    pseudo.extend([0, 17]);
    pseudo.extend(udp_len.to_be_bytes());
    pseudo.extend(&udp);
    let sum = match checksum(&pseudo) {
        0 => 0xffff, // 0 means that there is none
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());

    let mut packet = vec![0x45, 0x10];
    packet.extend((udp_len + 20).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(udp);
    packet
}

/// Returns the UDP payload of an IPv4 packet from port 67 to port 68.
pub fn read_dhcp(packet: &[u8]) -> Option<&[u8]> {
    let header = packet.first_chunk::<20>()?;
    let header_len = usize::from(header[0] & 15) * 4;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
    if header[0] >> 4 != 4 || header_len < 20 || header[9] != 17 || fragment != 0 {
        return None;
    }
    let packet = packet.get(..total)?;
    if checksum(packet.get(..header_len)?) != 0 {
        return None;
    }
    let udp = &packet[header_len..];
    let ports = udp.first_chunk::<8>()?;
    let udp_len = usize::from(u16::from_be_bytes([ports[4], ports[5]]));
    let is_ours = u16::from_be_bytes([ports[2], ports[3]]) == CLIENT_PORT
        && u16::from_be_bytes([ports[0], ports[1]]) == SERVER_PORT;
    udp.get(8..udp_len).filter(|_| is_ours)
}

/// Writes the question who has `target`, from somebody who has no address yet, or (with `from` as
/// the target) the statement that it is ours.
pub fn write_arp(mac: [u8; 6], from: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend(mac);
    packet.extend(from.octets());
    packet.extend([0; 6]);
    packet.extend(target.octets());
    packet
}

/// Reads who speaks in an ARP packet: hardware address and address. A question for an address by
/// somebody without one counts as that address: two who probe the same one are in each other's way.
pub fn read_arp(packet: &[u8]) -> Option<([u8; 6], Ipv4Addr)> {
    let packet = packet.first_chunk::<28>()?;
    if packet[..6] != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    let mac = *packet[8..].first_chunk()?;
    let address = |at: usize| packet[at..].first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets));
    let sender = address(14)?;
    if sender.is_unspecified() { Some((mac, address(24)?)) } else { Some((mac, sender)) }
}

/// The sum of the internet: 0 over something that carries its own.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Vec<u8> {
        let mut packet = write_dhcp(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::BROADCAST, b"payload");
        packet[20..24].copy_from_slice(&[0, 67, 0, 68]);
        packet
    }

    #[test]
    fn packets_read_back_and_broken_ones_do_not() {
        let packet = answer();
        assert_eq!(read_dhcp(&packet), Some(&b"payload"[..]));
        let mut padded = packet.clone();
        padded.extend([0; 30]); // short frames are filled up
        assert_eq!(read_dhcp(&padded), Some(&b"payload"[..]));
        for cut in 0..packet.len() {
            assert_eq!(read_dhcp(&packet[..cut]), None);
        }
        for at in 0..28 {
            for bit in 0..8 {
                let mut broken = packet.clone();
                broken[at] ^= 1 << bit;
                let _ = read_dhcp(&broken);
                assert!(at >= 20 || read_dhcp(&broken).is_none(), "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn arp_tells_who_speaks_for_an_address() {
        let mac = [2, 0, 0, 0, 0, 1];
        let ip = Ipv4Addr::new(10, 0, 0, 9);
        assert_eq!(read_arp(&write_arp(mac, Ipv4Addr::UNSPECIFIED, ip)), Some((mac, ip)));
        let other = Ipv4Addr::new(10, 0, 0, 8);
        assert_eq!(read_arp(&write_arp(mac, other, ip)), Some((mac, other)));
        assert_eq!(read_arp(&[0; 27]), None);
    }

    #[test]
    fn an_odd_last_byte_counts_in_the_sum() {
        assert_eq!(checksum(&[0x12, 0x34, 0x56]), !(0x1234_u16.wrapping_add(0x5600)));
    }
}
