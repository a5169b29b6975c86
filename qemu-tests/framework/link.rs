//! The cable between a machine's network card and the world.
//!
//! QEMU has two datagram sockets: behind one is the card, behind the other its user-mode network (DHCP, DNS, a gateway
//! to this host at 10.0.2.2). Each Ethernet frame is one datagram, and all of them pass here, in both directions. A
//! [`Link`] delays, loses, throttles, cuts and counts them; [`Pipe`] is one direction as a value, without sockets and
//! without a clock, which is what the tests drive.
//!
//! Frames stay in order, as on a real cable: jitter makes the ones behind wait. The same seed loses the same frames of
//! the same traffic.

use serde::Serialize;
use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Frames that wait in one direction; more are lost, as in a router.
pub const QUEUE_MAX: usize = 2048;
/// Largest frame that is carried, in bytes.
const FRAME_MAX: usize = 65_536;
/// Time between two samples of the counters.
pub const SAMPLE: Duration = Duration::from_millis(500);
/// Samples that are kept: three hours.
pub const SAMPLES_MAX: usize = 21_600;
/// Longest sleep of a direction in which nothing waits.
const IDLE: Duration = Duration::from_millis(100);
/// Longest wait for a machine that takes no frames, for example because it is stopped.
const WRITE_LIMIT: Duration = Duration::from_millis(50);

/// What the link does to frames; a direction of its own has no profile, only the link has.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Time on the way, one direction.
    pub delay: Duration,
    /// Up to so much more, evenly spread.
    pub jitter: Duration,
    /// Frames lost, 0 to 1.
    pub loss: f64,
    /// Bytes a second, each direction; `None` is no limit.
    pub rate: Option<u64>,
    /// Nothing passes.
    pub cut: bool,
    /// Ports (TCP, UDP) that a cut leaves alone, and ARP with them: of the machine, so that a test can look at what still
    /// runs, or of services that a site has of its own, as DHCP.
    pub spared_ports: Vec<u16>,
    /// DHCP does not pass.
    pub no_dhcp: bool,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            rate: None,
            cut: false,
            spared_ports: Vec::new(),
            no_dhcp: false,
        }
    }
}

/// What passed in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Frames handed on.
    pub frames: u64,
    /// Their bytes, Ethernet headers included.
    pub bytes: u64,
    /// Frames that were lost, cut or too many.
    pub dropped: u64,
}

/// Both counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds since the link was made.
    pub at_s: f64,
    /// From the machine to the world, since the start.
    pub up: Counts,
    /// From the world to the machine.
    pub down: Counts,
}

/// One direction.
#[derive(Debug)]
pub struct Pipe {
    waiting: VecDeque<(Instant, Vec<u8>)>,
    /// When the last queued frame has left the transmitter; the rate counts from there.
    busy_until: Option<Instant>,
    last_due: Option<Instant>,
    random: u64,
    counts: Counts,
}

impl Pipe {
    /// An empty direction; the seed decides what is lost.
    pub fn new(seed: u64) -> Self {
        Self {
            waiting: VecDeque::new(),
            busy_until: None,
            last_due: None,
            random: seed,
            counts: Counts::default(),
        }
    }

    /// Takes a frame at `now`.
    pub fn handle_frame(&mut self, now: Instant, frame: &[u8], profile: &Profile) {
        let stopped = profile.cut && !spared(frame, &profile.spared_ports);
        let lost = profile.loss > 0.0 && self.draw() < profile.loss;
        let dhcp = profile.no_dhcp && is_dhcp(frame);
        if stopped || lost || dhcp || self.waiting.len() >= QUEUE_MAX {
            self.counts.dropped += 1;
            return;
        }
        let mut sent = now;
        if let Some(rate) = profile.rate {
            let begin = self.busy_until.map_or(now, |busy| busy.max(now));
            sent = begin + Duration::from_secs_f64(frame.len() as f64 / rate.max(1) as f64);
            self.busy_until = Some(sent);
        }
        let jitter =
            profile.jitter.mul_f64(if profile.jitter.is_zero() { 0.0 } else { self.draw() });
        let due = sent + profile.delay + jitter;
        let due = self.last_due.map_or(due, |last| last.max(due));
        self.last_due = Some(due);
        self.waiting.push_back((due, frame.to_vec()));
    }

    /// The next frame that has arrived at `now`.
    pub fn poll_frame(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.waiting.front()?.0 > now {
            return None;
        }
        let (_, frame) = self.waiting.pop_front()?;
        self.counts.frames += 1;
        self.counts.bytes += frame.len() as u64;
        Some(frame)
    }

    /// When the next frame arrives.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.waiting.front().map(|(due, _)| *due)
    }

    /// Loses everything that is on the way.
    pub fn clear(&mut self) {
        self.counts.dropped += self.waiting.len() as u64;
        self.waiting.clear();
    }

    /// What passed so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// 0 to 1; splitmix64.
    fn draw(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Payload of IPv4 in a frame: protocol, source and destination port.
fn ports(frame: &[u8]) -> Option<(u8, u16, u16)> {
    if frame.get(12..14)? != [0x08, 0x00] {
        return None;
    }
    let packet = &frame[14..];
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let protocol = *packet.get(9)?;
    let port = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    Some((protocol, port(header)?, port(header + 2)?))
}

const TCP: u8 = 6;
const UDP: u8 = 17;

fn is_dhcp(frame: &[u8]) -> bool {
    matches!(ports(frame), Some((UDP, 67 | 68, _) | (UDP, _, 67 | 68)))
}

/// Whether a cut lets the frame through.
fn spared(frame: &[u8], spared: &[u16]) -> bool {
    if spared.is_empty() {
        return false;
    }
    let arp = frame.get(12..14) == Some(&[0x08, 0x06]);
    let port = |port| spared.contains(&port);
    arp || matches!(ports(frame), Some((TCP | UDP, from, to)) if port(from) || port(to))
}

struct Shared {
    profile: Profile,
    up: Pipe,
    down: Pipe,
    samples: Vec<Sample>,
}

/// Which way a thread carries.
#[derive(Clone, Copy)]
enum Way {
    Up,
    Down,
}

impl Shared {
    fn pipe(&mut self, way: Way) -> (&mut Pipe, &Profile) {
        match way {
            Way::Up => (&mut self.up, &self.profile),
            Way::Down => (&mut self.down, &self.profile),
        }
    }
}

/// A running link. Dropped, its threads end.
pub struct Link {
    shared: Arc<Mutex<Shared>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    start: Instant,
    ends: Ends,
}

/// The four sockets of a link, as files of one folder.
#[derive(Debug, Clone)]
pub struct Ends {
    /// QEMU's end behind the network card.
    pub card: PathBuf,
    /// Ours on that side.
    pub card_link: PathBuf,
    /// QEMU's end behind its user-mode network.
    pub net: PathBuf,
    /// Ours on that side.
    pub net_link: PathBuf,
}

impl Ends {
    /// The sockets below a folder, whose path has to be short (107 bytes with the name).
    pub fn below(folder: &Path) -> Self {
        let file = |name: &str| folder.join(name);
        Self {
            card: file("card"),
            card_link: file("card-link"),
            net: file("net"),
            net_link: file("net-link"),
        }
    }
}

impl Link {
    /// Opens our ends in `folder` and starts to carry frames.
    pub fn start(folder: &Path, seed: u64, profile: Profile) -> io::Result<Self> {
        let ends = Ends::below(folder);
        let open = |path: &Path| {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let socket = UnixDatagram::bind(path)?;
            socket.set_write_timeout(Some(WRITE_LIMIT))?;
            Ok(socket)
        };
        let (card, net) = (open(&ends.card_link)?, open(&ends.net_link)?);
        let shared = Arc::new(Mutex::new(Shared {
            profile,
            up: Pipe::new(seed),
            down: Pipe::new(!seed),
            samples: Vec::new(),
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let start = Instant::now();
        let ways = [
            (Way::Up, card.try_clone()?, net.try_clone()?, ends.net.clone()),
            (Way::Down, net, card, ends.card.clone()),
        ];
        let threads = ways.map(|(way, from, to, peer)| {
            let (shared, stop) = (Arc::clone(&shared), Arc::clone(&stop));
            std::thread::spawn(move || carry(way, &from, &to, &peer, &shared, &stop, start))
        });
        Ok(Self { shared, stop, threads: threads.into(), start, ends })
    }

    /// The sockets.
    pub fn ends(&self) -> &Ends {
        &self.ends
    }

    /// The counters, also after the link's end.
    pub fn recorder(&self) -> Recorder {
        Recorder { shared: Arc::clone(&self.shared), start: self.start }
    }

    /// Changes the profile; frames on the way keep their time.
    pub fn change(&self, change: impl FnOnce(&mut Profile)) {
        change(&mut self.lock().profile);
    }

    /// Lets nothing pass any more, in either direction, and loses what is on the way. The card still has a carrier.
    pub fn cut(&self) {
        self.cut_sparing(&[]);
    }

    /// The same, but these ports are spared.
    pub fn cut_sparing(&self, ports: &[u16]) {
        let mut shared = self.lock();
        shared.profile.cut = true;
        shared.profile.spared_ports = ports.into();
        shared.up.clear();
        shared.down.clear();
    }

    /// Lets frames pass again.
    pub fn heal(&self) {
        self.lock().profile.cut = false;
    }

    /// What passed: up, down.
    pub fn counts(&self) -> (Counts, Counts) {
        let shared = self.lock();
        (shared.up.counts(), shared.down.counts())
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("no holder panics")
    }
}

/// The counters of a link over time; it outlives the link.
#[derive(Clone)]
pub struct Recorder {
    shared: Arc<Mutex<Shared>>,
    start: Instant,
}

impl Recorder {
    /// When the link was made; samples count from here.
    pub fn start_time(&self) -> Instant {
        self.start
    }

    /// Everything sampled so far.
    pub fn samples(&self) -> Vec<Sample> {
        self.shared.lock().expect("no holder panics").samples.clone()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

fn carry(
    way: Way,
    from: &UnixDatagram,
    to: &UnixDatagram,
    peer: &Path,
    shared: &Mutex<Shared>,
    stop: &AtomicBool,
    start: Instant,
) {
    let lock = || shared.lock().expect("no holder panics");
    let mut buffer = vec![0; FRAME_MAX];
    while !stop.load(Ordering::Relaxed) {
        let due = lock().pipe(way).0.poll_timeout();
        let now = Instant::now();
        let pause = due.map_or(IDLE, |due| due.saturating_duration_since(now)).min(IDLE);
        // Zero would mean no limit.
        let pause = pause.max(Duration::from_micros(200));
        let got = from.set_read_timeout(Some(pause)).and_then(|()| from.recv(&mut buffer));
        let now = Instant::now();
        match got {
            Ok(count) => {
                let mut shared = lock();
                let (pipe, profile) = shared.pipe(way);
                pipe.handle_frame(now, &buffer[..count], profile);
            }
            Err(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
        loop {
            let frame = lock().pipe(way).0.poll_frame(now);
            let Some(frame) = frame else { break };
            // A machine that is not there yet, is off or is stopped takes no frames; a cable loses them.
            let _ = to.send_to(&frame, peer);
        }
        if matches!(way, Way::Up) {
            sample(&mut lock(), start);
        }
    }
}

fn sample(shared: &mut Shared, start: Instant) {
    let at_s = start.elapsed().as_secs_f64();
    let last = shared.samples.last().map_or(f64::NEG_INFINITY, |sample| sample.at_s);
    if at_s - last >= SAMPLE.as_secs_f64() && shared.samples.len() < SAMPLES_MAX {
        let (up, down) = (shared.up.counts(), shared.down.counts());
        shared.samples.push(Sample { at_s, up, down });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(protocol: u8, from: u16, to: u16) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45]);
        frame.extend([0; 8]);
        frame.push(protocol);
        frame.extend([0; 10]);
        frame.extend(from.to_be_bytes());
        frame.extend(to.to_be_bytes());
        frame
    }

    fn drain(pipe: &mut Pipe, now: Instant) -> usize {
        std::iter::from_fn(|| pipe.poll_frame(now)).count()
    }

    #[test]
    fn delayed_frames_come_in_order_and_not_early() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let profile = Profile { delay: ms(50), jitter: ms(40), ..Profile::default() };
        let mut pipe = Pipe::new(7);
        for index in 0..100 {
            pipe.handle_frame(start + ms(index), &[index as u8; 60], &profile);
        }
        assert_eq!(drain(&mut pipe, start + ms(49)), 0);
        assert!(pipe.poll_timeout().unwrap() >= start + ms(50));
        let mut seen = Vec::new();
        while let Some(frame) = pipe.poll_frame(start + ms(99 + 90)) {
            seen.push(frame[0]);
        }
        assert_eq!(seen, (0..100).collect::<Vec<u8>>());
        assert_eq!(pipe.counts(), Counts { frames: 100, bytes: 6000, dropped: 0 });
    }

    #[test]
    fn rate_spreads_a_burst_over_its_time() {
        let start = Instant::now();
        let profile = Profile { rate: Some(1000), ..Profile::default() };
        let mut pipe = Pipe::new(1);
        for _ in 0..10 {
            pipe.handle_frame(start, &[0; 100], &profile);
        }
        // 100 bytes at 1000 bytes a second: one frame each 100 ms.
        assert_eq!(drain(&mut pipe, start + Duration::from_millis(350)), 3);
        assert_eq!(drain(&mut pipe, start + Duration::from_millis(1001)), 7);
    }

    #[test]
    fn loss_is_near_its_share_and_the_same_for_the_same_seed() {
        let profile = Profile { loss: 0.2, ..Profile::default() };
        let run = |seed| {
            let (mut pipe, now) = (Pipe::new(seed), Instant::now());
            for _ in 0..1000 {
                pipe.handle_frame(now, &[0; 60], &profile);
            }
            drain(&mut pipe, now)
        };
        assert_eq!(run(3), run(3));
        assert!((740..860).contains(&run(3)), "{}", run(3));
    }

    #[test]
    fn cut_stops_all_but_spared_ports_and_arp() {
        let now = Instant::now();
        let mut profile = Profile { cut: true, ..Profile::default() };
        let mut pipe = Pipe::new(0);
        let arp = [vec![0; 12], vec![0x08, 0x06], vec![0; 28]].concat();
        for frame in [&arp, &frame(TCP, 40000, 8080), &frame(TCP, 8080, 40000)] {
            pipe.handle_frame(now, frame, &profile);
        }
        assert_eq!(drain(&mut pipe, now), 0);
        profile.spared_ports = vec![8080];
        for frame in [
            &arp,
            &frame(TCP, 40000, 8080),
            &frame(TCP, 8080, 40000),
            &frame(TCP, 40000, 10000),
            &frame(UDP, 4000, 53),
            &vec![0; 3],
        ] {
            pipe.handle_frame(now, frame, &profile);
        }
        assert_eq!(drain(&mut pipe, now), 3);
    }

    #[test]
    fn dhcp_is_lost_where_asked_and_other_datagrams_are_not() {
        let now = Instant::now();
        let profile = Profile { no_dhcp: true, ..Profile::default() };
        let mut pipe = Pipe::new(0);
        for frame in [frame(UDP, 68, 67), frame(UDP, 67, 68), frame(UDP, 4000, 53)] {
            pipe.handle_frame(now, &frame, &profile);
        }
        assert_eq!(drain(&mut pipe, now), 1);
        assert_eq!(pipe.counts().dropped, 2);
    }

    #[test]
    fn queue_is_bounded() {
        let now = Instant::now();
        let profile = Profile { delay: Duration::from_secs(9), ..Profile::default() };
        let mut pipe = Pipe::new(0);
        for _ in 0..QUEUE_MAX + 5 {
            pipe.handle_frame(now, &[0; 60], &profile);
        }
        assert_eq!(pipe.counts().dropped, 5);
        pipe.clear();
        assert_eq!(pipe.counts().dropped, QUEUE_MAX as u64 + 5);
        assert_eq!(pipe.poll_timeout(), None);
    }

    #[test]
    fn frames_pass_between_sockets_until_the_cut_and_after_the_healing() {
        let folder = tempfile::tempdir().unwrap();
        let link = Link::start(folder.path(), 1, Profile::default()).unwrap();
        let ends = link.ends().clone();
        let (card, net) =
            (UnixDatagram::bind(&ends.card).unwrap(), UnixDatagram::bind(&ends.net).unwrap());
        for socket in [&card, &net] {
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        let mut buffer = [0; 100];
        card.send_to(b"up", &ends.card_link).unwrap();
        assert_eq!(net.recv(&mut buffer).unwrap(), 2);
        net.send_to(b"down", &ends.net_link).unwrap();
        assert_eq!(card.recv(&mut buffer).unwrap(), 4);
        link.cut();
        card.send_to(b"lost", &ends.card_link).unwrap();
        while link.counts().0.dropped == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        link.heal();
        card.send_to(b"again", &ends.card_link).unwrap();
        assert_eq!(net.recv(&mut buffer).unwrap(), 5);
        assert_eq!(link.counts().0, Counts { frames: 2, bytes: 7, dropped: 1 });
    }
}
