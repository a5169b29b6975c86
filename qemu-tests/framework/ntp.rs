//! A time server for machines whose clock is wrong: answers SNTP requests with this host's time.
//!
//! Source of the facts: RFC 5905, section 7.3.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Seconds from 1900 to 1970.
const ERA: u64 = 2_208_988_800;
/// How often the server looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);

/// A running server; dropped, it ends.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    asked: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on the port of NTP, which most clients cannot be told to change.
    pub fn start() -> io::Result<Self> {
        Self::at("127.0.0.1:123".parse().expect("an address"))
    }

    /// Listens there.
    pub fn at(address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        socket.set_read_timeout(Some(LOOK))?;
        let address = socket.local_addr()?;
        let (asked, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, end) = (Arc::clone(&asked), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut request = [0; 512];
            while !end.load(Ordering::Relaxed) {
                let Ok((length, peer)) = socket.recv_from(&mut request) else { continue };
                if let Some(answer) = answer(&request[..length], SystemTime::now()) {
                    count.fetch_add(1, Ordering::Relaxed);
                    // A client that is gone asks again when it is back.
                    let _ = socket.send_to(&answer, peer);
                }
            }
        });
        Ok(Self { address, asked, stop, thread: Some(thread) })
    }

    /// How many requests were answered.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

/// The answer to a client's request; `None` for anything else.
fn answer(request: &[u8], now: SystemTime) -> Option<[u8; 48]> {
    let (version, mode) = ((request.first()? >> 3) & 7, request[0] & 7);
    if request.len() < 48 || mode != 3 || version == 0 {
        return None;
    }
    let now = stamp(now);
    let mut answer = [0; 48];
    answer[0] = (version << 3) | 4;
    answer[1] = 1; // stratum: a reference clock
    answer[2] = request[2];
    answer[3] = 0xec; // precision: a microsecond
    answer[12..16].copy_from_slice(b"HOST");
    answer[16..24].copy_from_slice(&now);
    answer[24..32].copy_from_slice(&request[40..48]);
    answer[32..40].copy_from_slice(&now);
    answer[40..48].copy_from_slice(&now);
    Some(answer)
}

fn stamp(time: SystemTime) -> [u8; 8] {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let fraction = (u64::from(since.subsec_nanos()) << 32) / 1_000_000_000;
    // The era wraps in 2036; the cast keeps the low half, as the format wants.
    (((since.as_secs() + ERA) << 32) | fraction).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_answered_with_the_time_and_its_own_stamp() {
        let server = Server::at("127.0.0.1:0".parse().unwrap()).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut request = [0; 48];
        request[0] = 0x23;
        request[40..48].copy_from_slice(b"originat");
        client.send_to(&[0; 3], server.address).unwrap();
        client.send_to(&request, server.address).unwrap();
        let mut answer = [0; 48];
        assert_eq!(client.recv(&mut answer).unwrap(), 48);
        assert_eq!(answer[0], 0x24);
        assert_eq!(&answer[24..32], b"originat");
        let seconds = u32::from_be_bytes(answer[40..44].try_into().unwrap());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + ERA;
        assert!((now as u32).wrapping_sub(seconds) < 60);
        assert_eq!(server.asked(), 1);
    }
}
