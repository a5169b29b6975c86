//! A wide-area link between two network namespaces, in user space.
//!
//! Each namespace gets a TUN device; packets are carried from one to the other with a delay, lost at random (from a
//! seed), and counted with their IP headers. The kernels of both ends see a real network card, so TCP and QUIC meet real
//! loss, and a device that goes down is seen as a pulled cable. `sch_netem` would do the same where the kernel has it;
//! this needs only `/dev/net/tun`.

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tun_rs::{DeviceBuilder, SyncDevice};

/// Name of the device in either namespace.
const DEVICE: &str = "wan0";
/// Bytes of one packet at most.
const MTU: u16 = 1500;
/// Packets on the way in one direction; more are lost, as in a full router.
const PACKETS_MAX: usize = 20_000;

/// Address of the hub's end.
pub(crate) const HUB: &str = "10.89.0.1";
/// Address of the node's end.
pub(crate) const NODE: &str = "10.89.0.2";

/// What the link does to packets, both ways.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Weather {
    /// Time from one end to the other.
    pub(crate) delay: Duration,
    /// Share of packets that are lost, 0 to 1.
    pub(crate) loss: f64,
}

/// The link; its threads end with the program.
pub(crate) struct Emulator {
    node_namespace: String,
    ways: [Arc<Way>; 2],
}

#[derive(Default)]
struct Way {
    weather: Mutex<Weather>,
    blocked: AtomicBool,
    packets: AtomicU64,
    bytes: AtomicU64,
    queue: Mutex<VecDeque<(Instant, Vec<u8>)>>,
    filled: Condvar,
}

impl Emulator {
    /// Joins two named namespaces; the caller runs in the hub's.
    ///
    /// `packets` is a file that gets a line for each packet, see [`Diary`].
    pub(crate) fn start(
        hub_namespace: &str,
        node_namespace: &str,
        seed: u64,
        packets: Option<&Path>,
    ) -> Result<Self> {
        let diary = packets.map(Diary::create).transpose()?;
        let hub = Arc::new(device(hub_namespace)?);
        let node = Arc::new(device(node_namespace)?);
        address(hub_namespace, HUB, NODE)?;
        address(node_namespace, NODE, HUB)?;
        let ways = [Arc::new(Way::default()), Arc::new(Way::default())];
        let down = diary.as_ref().map(|diary| (Arc::clone(diary), "down"));
        let up = diary.map(|diary| (diary, "up"));
        carry(Arc::clone(&hub), Arc::clone(&node), &ways[0], seed, down);
        carry(node, hub, &ways[1], seed.wrapping_add(1), up);
        Ok(Self { node_namespace: node_namespace.into(), ways })
    }

    /// Sets delay and loss of both directions.
    pub(crate) fn set(&self, weather: Weather) {
        for way in &self.ways {
            *way.weather.lock().expect("no holder panics") = weather;
        }
    }

    /// Packets and bytes so far, both directions, IP headers included.
    pub(crate) fn carried(&self) -> (u64, u64) {
        let sum = |count: fn(&Way) -> &AtomicU64| {
            self.ways.iter().map(|way| count(way).load(Ordering::Relaxed)).sum()
        };
        (sum(|way| &way.packets), sum(|way| &way.bytes))
    }

    /// Lets nothing pass any more, of which neither end is told: somewhere in between a cable is out.
    pub(crate) fn block(&self) {
        for way in &self.ways {
            way.blocked.store(true, Ordering::Relaxed);
            way.queue.lock().expect("no holder panics").clear();
        }
    }

    /// Lets packets pass again.
    pub(crate) fn unblock(&self) {
        for way in &self.ways {
            way.blocked.store(false, Ordering::Relaxed);
        }
    }

    /// Pulls the cable at the node's end: its device is down and nothing passes.
    pub(crate) fn unplug(&self) -> Result<()> {
        self.block();
        ip(&["-n", &self.node_namespace, "link", "set", DEVICE, "down"])
    }

    /// Puts the cable back.
    pub(crate) fn plug(&self) -> Result<()> {
        self.unblock();
        ip(&["-n", &self.node_namespace, "link", "set", DEVICE, "up"])?;
        // The routes go with a device that is down.
        ip(&["-n", &self.node_namespace, "route", "replace", "default", "dev", DEVICE])
    }
}

/// One line for each packet: seconds since the link began, `down` (to the node) or `up`, bytes with the IP header, and
/// `udp`, or `tcp` with its flags and the bytes that it carries.
struct Diary {
    begin: Instant,
    file: Mutex<File>,
}

impl Diary {
    fn create(path: &Path) -> Result<Arc<Self>> {
        let file = File::create(path)
            .with_context(|| format!("could not write packets to `{}`", path.display()))?;
        Ok(Arc::new(Self { begin: Instant::now(), file: Mutex::new(file) }))
    }

    fn write(&self, way: &str, packet: &[u8]) {
        let header = packet.first().map_or(0, |first| usize::from(first & 15) * 4);
        let what = match (packet.get(9), packet.get(header + 12..header + 14)) {
            (Some(17), _) => "udp".into(),
            (Some(6), Some([offset, flags])) => {
                let carried = packet.len().saturating_sub(header + usize::from(offset >> 4) * 4);
                format!("tcp flags {flags:#04x} carries {carried}")
            }
            _ => "other".into(),
        };
        let seconds = self.begin.elapsed().as_secs_f64();
        let mut file = self.file.lock().expect("no holder panics");
        // A diary that cannot be written is seen by who asked for it; the measurement goes on.
        let _ = writeln!(file, "{seconds:.6} {way} {} {what}", packet.len());
    }
}

/// Runs `ip` with these arguments.
pub(crate) fn ip(arguments: &[&str]) -> Result<()> {
    let done = Command::new("ip").args(arguments).output().context("could not start `ip`")?;
    ensure!(
        done.status.success(),
        "`ip {}` failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(())
}

/// Makes the device inside the namespace, on a thread that enters it.
fn device(namespace: &str) -> Result<SyncDevice> {
    let path = format!("/run/netns/{namespace}");
    let made = std::thread::spawn(move || -> Result<SyncDevice> {
        let handle = File::open(&path).with_context(|| format!("no namespace `{path}`"))?;
        setns(handle, CloneFlags::CLONE_NEWNET).context("could not enter the namespace")?;
        let device = DeviceBuilder::new().name(DEVICE).mtu(MTU).build_sync()?;
        // The link has IPv4 addresses only. Left alone, the kernel looks for IPv6 routers in it for minutes, at growing
        // intervals, and an idle link would be charged for that. No file: a kernel without IPv6, which is as good.
        let quiet = format!("/proc/sys/net/ipv6/conf/{DEVICE}/disable_ipv6");
        if std::fs::exists(&quiet).unwrap_or(false) {
            std::fs::write(&quiet, "1").with_context(|| format!("could not write `{quiet}`"))?;
        }
        Ok(device)
    });
    made.join().expect("the thread does not panic").context("could not make a TUN device")
}

fn address(namespace: &str, own: &str, peer: &str) -> Result<()> {
    ip(&["-n", namespace, "addr", "add", own, "peer", peer, "dev", DEVICE])?;
    ip(&["-n", namespace, "link", "set", DEVICE, "up"])?;
    ip(&["-n", namespace, "link", "set", "lo", "up"])?;
    ip(&["-n", namespace, "route", "replace", "default", "dev", DEVICE])
}

fn carry(
    from: Arc<SyncDevice>,
    to: Arc<SyncDevice>,
    way: &Arc<Way>,
    seed: u64,
    diary: Option<(Arc<Diary>, &'static str)>,
) {
    use rand::{Rng, SeedableRng, rngs::StdRng};
    let reader = Arc::clone(way);
    std::thread::spawn(move || {
        let mut random = StdRng::seed_from_u64(seed);
        let mut buffer = vec![0; usize::from(MTU) + 64];
        loop {
            let Ok(len) = from.recv(&mut buffer) else {
                // A device that is down gives errors until it is up again.
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            reader.packets.fetch_add(1, Ordering::Relaxed);
            reader.bytes.fetch_add(len as u64, Ordering::Relaxed);
            if let Some((diary, way)) = &diary {
                diary.write(way, &buffer[..len]);
            }
            let weather = *reader.weather.lock().expect("no holder panics");
            if reader.blocked.load(Ordering::Relaxed) || random.random_bool(weather.loss) {
                continue;
            }
            let mut queue = reader.queue.lock().expect("no holder panics");
            if queue.len() < PACKETS_MAX {
                queue.push_back((Instant::now() + weather.delay, buffer[..len].to_vec()));
                reader.filled.notify_one();
            }
        }
    });
    let writer = Arc::clone(way);
    std::thread::spawn(move || {
        loop {
            let (due, packet) = {
                let mut queue = writer.queue.lock().expect("no holder panics");
                loop {
                    if let Some(next) = queue.pop_front() {
                        break next;
                    }
                    queue = writer.filled.wait(queue).expect("no holder panics");
                }
            };
            let wait = due.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                std::thread::sleep(wait);
            }
            // Lost when the device is down, as on a pulled cable.
            let _ = to.send(&packet);
        }
    });
}
