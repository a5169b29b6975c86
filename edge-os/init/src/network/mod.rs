//! The network service of the appliance: addresses, names, time.
//!
//! [`run`] is the program that PID 1 supervises; [`service::Service`] is one loop over the kernel's
//! notices, packet sockets and timers. What it decides is in parts without I/O: [`dhcp`], [`ntp`],
//! [`dns`], [`plan`] and [`report`]. It has no port open: DHCP uses packet sockets with a filter, time and
//! names sockets that hear one peer.
//!
//! - It reads `/run/skerry/site.toml` once (PID 1 starts it anew when that changes). Without the
//!   file, or for interfaces that no rule matches, every wired interface uses DHCP.
//! - It writes, by rename, `/run/resolv.conf`, `/run/hosts`, `/run/skerry/network.json`, and below
//!   `/state/network` the last address of each interface, so that after a restart the box asks for
//!   the same one.
//! - Interfaces may come and go; a carrier that comes back makes DHCP ask at once.
//! - It says on the console what happens (`network`), and `problem` with `hint` when there is no
//!   answer.
//!
//! Time servers, first hit: `[clock] ntp` of the site, those of DHCP (option 42), the default
//! gateways, which often answer and are trusted with as much already. No public pool is asked
//! unless the site says so: a product may not do that in its makers' name. Without any answer the
//! clock stays where PID 1 has put it (never before the image was built), which is enough for
//! certificates that were issued before; the `Date` of the hub is no source for this service,
//! because it would have to be believed before the certificate of the hub can be checked. After
//! two minutes that is a problem on the console.
//!
//! A restart of the service disturbs nothing: addresses and routes are compared with what the
//! kernel has, and an interface keeps its address until DHCP has said what it is now.

pub mod clock;
pub mod dhcp;
pub mod dns;
pub mod names;
pub mod ntp;
pub mod packet;
pub mod plan;
pub mod report;
pub mod service;

use crate::console::{Console, Word};
use crate::linux::Linux;
use crate::site::Site;
use service::{Places, Service};
use std::process::ExitCode;

/// Is the network service; returns only when it cannot go on.
pub fn run() -> ExitCode {
    static KERNEL: Linux = Linux;
    let console = Console::new(&KERNEL);
    let places = Places::default();
    let site = match std::fs::read_to_string(&places.site) {
        Ok(text) => match Site::parse(&text) {
            Ok(site) => Some(site),
            Err(error) => {
                // PID 1 checks it before it writes it, and says what is wrong.
                console.say(Word::Network, format!("site.toml is not used: {error}"));
                None
            }
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            console.say(Word::Network, format!("site.toml is not used: {error}"));
            None
        }
    };
    let (network, ntp) = site.map(|site| (site.network, site.ntp)).unwrap_or_default();
    let say = |word: Word, text: &str| console.say(word, text);
    let started = Service::start(network, ntp, places, Box::new(clock::SystemClock), Box::new(say));
    match started.and_then(|mut service| service.run()) {
        Ok(never) => match never {},
        Err(error) => {
            console.say(Word::Problem, crate::console::chain(&error));
            console.say(Word::Hint, "the service is started again; the kernel log may say more");
            ExitCode::FAILURE
        }
    }
}
