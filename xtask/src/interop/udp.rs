//! A loopback relay for QUIC that can be cut and healed together with the relay for TCP.
//!
//! One socket per peer, as a NAT has; a cut drops datagrams and keeps the sockets, as a dead link does.

use anyhow::Result;
use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Peers at once; a node dials again from another port now and then.
const PEERS_MAX: usize = 64;
/// Longest datagram.
const DATAGRAM_MAX: usize = 64 * 1024;

/// A relay; it ends with the program.
pub(super) struct UdpRelay {
    pub(super) address: SocketAddr,
    is_cut: Arc<AtomicBool>,
}

impl UdpRelay {
    /// Starts to relay to `target`.
    pub(super) fn start(target: SocketAddr) -> Result<Self> {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0")?);
        let address = front.local_addr()?;
        let is_cut = Arc::new(AtomicBool::new(false));
        let cut = Arc::clone(&is_cut);
        std::thread::spawn(move || {
            let mut peers: HashMap<SocketAddr, UdpSocket> = HashMap::new();
            let mut buffer = vec![0; DATAGRAM_MAX];
            while let Ok((count, peer)) = front.recv_from(&mut buffer) {
                if cut.load(Ordering::Relaxed) {
                    continue;
                }
                if !peers.contains_key(&peer) && peers.len() < PEERS_MAX {
                    let Ok(back) = open(target, &front, peer, &cut) else { continue };
                    peers.insert(peer, back);
                }
                if let Some(back) = peers.get(&peer) {
                    // Lost datagrams are the nature of the thing.
                    let _ = back.send(&buffer[..count]);
                }
            }
        });
        Ok(Self { address, is_cut })
    }

    pub(super) fn cut(&self) {
        self.is_cut.store(true, Ordering::Relaxed);
    }

    pub(super) fn heal(&self) {
        self.is_cut.store(false, Ordering::Relaxed);
    }
}

/// The socket of a peer, and a thread for the way back.
fn open(
    target: SocketAddr,
    front: &Arc<UdpSocket>,
    peer: SocketAddr,
    cut: &Arc<AtomicBool>,
) -> Result<UdpSocket> {
    let back = UdpSocket::bind("127.0.0.1:0")?;
    back.connect(target)?;
    let (reader, front, cut) = (back.try_clone()?, Arc::clone(front), Arc::clone(cut));
    std::thread::spawn(move || {
        let mut buffer = vec![0; DATAGRAM_MAX];
        loop {
            // A refused datagram of before the target listened is reported here once.
            let Ok(count) = reader.recv(&mut buffer) else { continue };
            if !cut.load(Ordering::Relaxed) {
                let _ = front.send_to(&buffer[..count], peer);
            }
        }
    });
    Ok(back)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn datagrams_pass_both_ways_except_during_a_cut() {
        let target = UdpSocket::bind("127.0.0.1:0").unwrap();
        let relay = UdpRelay::start(target.local_addr().unwrap()).unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        peer.connect(relay.address).unwrap();
        for socket in [&target, &peer] {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        }
        let mut buffer = [0; 16];
        peer.send(b"one").unwrap();
        let (count, from) = target.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"one");
        relay.cut();
        peer.send(b"lost").unwrap();
        target.send_to(b"lost too", from).unwrap();
        relay.heal();
        // The relay reads in order, so what comes first now was sent after the cut, or was read after the healing.
        peer.send(b"two").unwrap();
        target.send_to(b"back", from).unwrap();
        let words = |socket: &UdpSocket, last: &str| {
            let mut buffer = [0; 16];
            loop {
                let (count, _) = socket.recv_from(&mut buffer).unwrap();
                if &buffer[..count] == last.as_bytes() {
                    return;
                }
            }
        };
        words(&target, "two");
        words(&peer, "back");
    }
}
