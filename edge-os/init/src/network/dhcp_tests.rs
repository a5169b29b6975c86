//! The client in virtual time: servers are values, the link loses what a test says.

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// A server with one pool.
struct Server {
    ip: Ipv4Addr,
    pool: Ipv4Addr,
    lease: u32,
    refuses: bool,
    silent: bool,
    heard: Vec<(u8, Option<Ipv4Addr>)>,
}

impl Server {
    fn new(last: u8) -> Self {
        Self {
            ip: Ipv4Addr::new(10, 0, 0, last),
            pool: Ipv4Addr::new(10, 0, 0, last + 100),
            lease: 600,
            refuses: false,
            silent: false,
            heard: Vec::new(),
        }
    }

    fn answer(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let mut options = BTreeMap::new();
        read_options(message.get(240..)?, &mut options);
        let kind = options.get(&OPTION_TYPE)?[0];
        let address = |code| {
            let octets: &Vec<u8> = options.get(&code)?;
            octets.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets))
        };
        let asked = address(OPTION_ADDRESS)
            .or_else(|| Some(Ipv4Addr::from(*message[12..].first_chunk::<4>()?)))
            .filter(|ip| !ip.is_unspecified());
        self.heard.push((kind, asked));
        if self.silent || address(OPTION_SERVER).is_some_and(|server| server != self.ip) {
            return None;
        }
        let kind = match kind {
            DISCOVER => OFFER,
            REQUEST if self.refuses || asked != Some(self.pool) => NAK,
            REQUEST => ACK,
            _ => return None,
        };
        Some(self.reply(message, kind))
    }

    fn reply(&self, message: &[u8], kind: u8) -> Vec<u8> {
        let mut bytes = message[..HEADER_LEN].to_vec();
        bytes[0] = 2;
        if kind != NAK {
            bytes[16..20].copy_from_slice(&self.pool.octets());
        }
        bytes.extend(MAGIC);
        bytes.extend([OPTION_TYPE, 1, kind]);
        put_address(&mut bytes, OPTION_SERVER, self.ip);
        if kind != NAK {
            put_address(&mut bytes, OPTION_MASK, Ipv4Addr::new(255, 255, 255, 0));
            put_address(&mut bytes, OPTION_ROUTERS, Ipv4Addr::new(10, 0, 0, 1));
            put_address(&mut bytes, OPTION_DNS, Ipv4Addr::new(10, 0, 0, 2));
            put_address(&mut bytes, OPTION_NTP, Ipv4Addr::new(10, 0, 0, 3));
            bytes.extend([OPTION_LEASE_TIME, 4]);
            bytes.extend(self.lease.to_be_bytes());
            bytes.extend([OPTION_MTU, 2, 5, 120]);
            bytes.extend([OPTION_DOMAIN, 4]);
            bytes.extend(b"site");
        }
        finish(bytes)
    }
}

/// One client, any number of servers, and a clock.
struct World {
    client: Client,
    servers: Vec<Server>,
    now: Duration,
    /// Messages of the client that get lost, counted from the first.
    lost: u32,
    sent: Vec<(Duration, Transmit)>,
    events: Vec<Event>,
    taken: Option<Ipv4Addr>,
}

impl World {
    fn new(servers: Vec<Server>, remembered: Option<Ipv4Addr>) -> Self {
        let identity = Identity { mac: MAC, hostname: Some("box".to_owned()), remembered };
        let mut client = Client::new(identity, 99);
        client.handle_link_up(Duration::ZERO);
        Self {
            client,
            servers,
            now: Duration::ZERO,
            lost: 0,
            sent: Vec::new(),
            events: Vec::new(),
            taken: None,
        }
    }

    fn run_until(&mut self, end: Duration) {
        loop {
            while let Some(transmit) = self.client.poll_transmit(self.now) {
                self.sent.push((self.now, transmit.clone()));
                assert!(self.sent.len() < 10_000, "the client floods the link");
                self.deliver(&transmit);
            }
            while let Some(event) = self.client.poll_event() {
                self.events.push(event);
            }
            match self.client.poll_timeout() {
                Some(next) if next <= end => {
                    assert!(next > self.now, "time stands still at {:?}", self.now);
                    self.now = next;
                }
                _ => break,
            }
        }
        self.now = end;
    }

    fn deliver(&mut self, transmit: &Transmit) {
        let (message, to) = match transmit {
            Transmit::Broadcast(message) => (message, None),
            Transmit::Unicast { to, message, .. } => (message, Some(*to)),
            Transmit::Probe(address) => {
                if self.taken == Some(*address) {
                    self.client.handle_conflict(self.now, *address);
                }
                return;
            }
            Transmit::Announce(_) => return,
        };
        if self.lost > 0 {
            self.lost -= 1;
            return;
        }
        let meant = self.servers.iter_mut().filter(|server| to.is_none_or(|ip| ip == server.ip));
        let answers: Vec<_> = meant.filter_map(|server| server.answer(message)).collect();
        for answer in answers {
            self.client.handle_message(self.now, &answer);
        }
    }

    fn bound(&self) -> Option<Ipv4Addr> {
        self.client.lease().map(|lease| lease.address)
    }

    fn kinds_heard(&self, server: usize) -> Vec<u8> {
        self.servers[server].heard.iter().map(|(kind, _)| *kind).collect()
    }
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn an_address_is_asked_for_probed_and_announced() {
    let mut world = World::new(vec![Server::new(1)], None);
    world.run_until(secs(1));
    let Some(Event::Bound(lease)) = world.events.first() else { panic!("{:?}", world.events) };
    assert_eq!((lease.address, lease.prefix_len), (Ipv4Addr::new(10, 0, 0, 101), 24));
    assert_eq!(lease.routers, [Ipv4Addr::new(10, 0, 0, 1)]);
    assert_eq!(lease.dns, [Ipv4Addr::new(10, 0, 0, 2)]);
    assert_eq!(lease.ntp, [Ipv4Addr::new(10, 0, 0, 3)]);
    assert_eq!((lease.mtu, lease.domain.as_deref()), (Some(1400), Some("site")));
    assert_eq!((lease.renew_after, lease.rebind_after), (secs(300), secs(525)));
    let probes = world.sent.iter().filter(|(_, one)| matches!(one, Transmit::Probe(_)));
    assert_eq!(probes.count(), PROBES as usize);
    assert_eq!(world.sent.last().map(|(_, one)| one), Some(&Transmit::Announce(lease.address)));
}

#[test]
fn lost_messages_are_sent_again_with_growing_pauses_and_for_ever() {
    let mut world = World::new(Vec::new(), None);
    world.run_until(secs(3600));
    let times: Vec<Duration> = world.sent.iter().map(|(at, _)| *at).collect();
    let pauses: Vec<u64> = times.windows(2).map(|two| (two[1] - two[0]).as_secs()).collect();
    for (pause, expected) in pauses.iter().zip([4, 8, 16, 32, 64, 64, 64]) {
        assert!(pause.abs_diff(expected) <= 1, "{pauses:?}");
    }
    assert!(pauses.len() > 50, "it went on for the whole hour");
    assert_eq!(world.client.waiting_for(world.now), Some(secs(3600)));
    world.servers.push(Server::new(1));
    world.run_until(secs(3600 + 70));
    assert!(world.bound().is_some());
    assert_eq!(world.client.waiting_for(world.now), None);
}

#[test]
fn lost_requests_end_in_an_address_whatever_the_number() {
    for lost in 0..12 {
        let mut world = World::new(vec![Server::new(1)], None);
        world.lost = lost;
        world.run_until(secs(1200));
        assert!(world.bound().is_some(), "{lost} lost");
    }
}

#[test]
fn of_two_servers_one_is_taken_and_the_other_told() {
    let mut world = World::new(vec![Server::new(1), Server::new(2)], None);
    world.run_until(secs(1));
    assert_eq!(world.bound(), Some(Ipv4Addr::new(10, 0, 0, 101)));
    // The second one hears the request with the name of the first.
    assert_eq!(world.kinds_heard(1), [DISCOVER, REQUEST]);
    assert_eq!(world.events.len(), 1);
}

#[test]
fn after_a_restart_the_same_address_is_asked_for_and_used_without_probing() {
    let mut world = World::new(vec![Server::new(1)], Some(Ipv4Addr::new(10, 0, 0, 101)));
    world.run_until(secs(1));
    assert_eq!(world.kinds_heard(0), [REQUEST]);
    assert_eq!(world.bound(), Some(Ipv4Addr::new(10, 0, 0, 101)));
    assert!(!world.sent.iter().any(|(_, one)| matches!(one, Transmit::Probe(_))));
}

#[test]
fn a_remembered_address_of_another_network_is_given_up() {
    let mut world = World::new(vec![Server::new(1)], Some(Ipv4Addr::new(192, 168, 7, 7)));
    world.run_until(secs(3));
    assert_eq!(world.kinds_heard(0), [REQUEST, DISCOVER, REQUEST]);
    assert_eq!(world.bound(), Some(Ipv4Addr::new(10, 0, 0, 101)));

    // The same when the server of that network says nothing at all.
    let mut world = World::new(vec![Server::new(1)], Some(Ipv4Addr::new(192, 168, 7, 7)));
    world.servers[0].silent = true;
    world.run_until(secs(10));
    world.servers[0].silent = false;
    world.run_until(secs(40));
    assert_eq!(world.bound(), Some(Ipv4Addr::new(10, 0, 0, 101)));
}

#[test]
fn a_server_that_always_refuses_is_asked_less_and_less() {
    let mut world = World::new(vec![Server::new(1)], None);
    world.servers[0].refuses = true;
    world.run_until(secs(600));
    assert_eq!(world.bound(), None);
    let requests = world.servers[0].heard.iter().filter(|(kind, _)| *kind == REQUEST).count();
    assert!((8..20).contains(&requests), "{requests}");
    world.servers[0].refuses = false;
    world.run_until(secs(600 + 70));
    assert!(world.bound().is_some());
}

#[test]
fn a_lease_is_extended_at_half_its_time_by_a_direct_question() {
    let mut world = World::new(vec![Server::new(1)], None);
    world.run_until(secs(310));
    let last = world.sent.last().expect("something was sent");
    assert!(matches!(last.1, Transmit::Unicast { .. }), "{last:?}");
    assert_eq!(last.0.as_secs(), 300);
    assert_eq!(world.events.len(), 2);
    world.run_until(secs(3000));
    assert!(world.events.iter().all(|event| matches!(event, Event::Bound(_))));
}

#[test]
fn a_lease_whose_server_is_gone_is_extended_by_another_or_lost_at_its_end() {
    let mut world = World::new(vec![Server::new(1)], None);
    world.run_until(secs(10));
    world.servers[0].silent = true;
    let mut second = Server::new(2);
    second.pool = Ipv4Addr::new(10, 0, 0, 101);
    world.servers.push(second);
    world.run_until(secs(700));
    assert_eq!(world.client.lease().map(|lease| lease.server), Some(Ipv4Addr::new(10, 0, 0, 2)));

    let mut world = World::new(vec![Server::new(1)], None);
    world.run_until(secs(10));
    world.servers[0].silent = true;
    world.run_until(secs(599));
    assert!(world.bound().is_some());
    world.run_until(secs(602));
    assert_eq!(world.bound(), None);
    assert_eq!(world.events.last(), Some(&Event::Lost(Loss::Expired)));
    world.servers[0].silent = false;
    world.run_until(secs(700));
    assert!(world.bound().is_some());
}

#[test]
fn a_refusal_while_extending_takes_the_address_at_once() {
    let mut world = World::new(vec![Server::new(1)], None);
    world.run_until(secs(10));
    world.servers[0].pool = Ipv4Addr::new(10, 0, 0, 200);
    world.run_until(secs(310));
    assert!(world.events.contains(&Event::Lost(Loss::Refused)));
    assert_eq!(world.bound(), Some(Ipv4Addr::new(10, 0, 0, 200)));
}

#[test]
fn an_address_that_somebody_has_is_declined() {
    let mut world = World::new(vec![Server::new(1)], None);
    world.taken = Some(Ipv4Addr::new(10, 0, 0, 101));
    world.run_until(secs(5));
    assert_eq!(world.kinds_heard(0), [DISCOVER, REQUEST, DECLINE]);
    assert_eq!(world.bound(), None);
    world.servers[0].pool = Ipv4Addr::new(10, 0, 0, 150);
    world.run_until(secs(20));
    assert_eq!(world.bound(), Some(Ipv4Addr::new(10, 0, 0, 150)));
}

#[test]
fn a_link_that_comes_back_asks_again_for_the_same_address_at_once() {
    let mut world = World::new(vec![Server::new(1)], None);
    world.run_until(secs(10));
    world.client.handle_link_down();
    world.run_until(secs(60));
    assert!(world.bound().is_some(), "the lease runs on");
    let before = world.sent.len();
    world.client.handle_link_up(world.now);
    world.run_until(secs(61));
    assert_eq!(world.sent.len(), before + 1);
    assert_eq!(world.events.len(), 2);
    // Down for longer than the lease: it is lost while it is down, and asked for afterwards.
    world.client.handle_link_down();
    world.run_until(secs(2000));
    while world.client.poll_transmit(world.now).is_some() {}
    assert_eq!(world.bound(), None);
    world.client.handle_link_up(world.now);
    world.run_until(secs(2001));
    assert_eq!(world.bound(), Some(Ipv4Addr::new(10, 0, 0, 101)));
}

#[test]
fn a_lease_for_ever_is_never_extended() {
    let mut world = World::new(vec![Server::new(1)], None);
    world.servers[0].lease = u32::MAX;
    world.run_until(secs(10));
    assert_eq!(world.client.lease().and_then(|lease| lease.duration), None);
    assert_eq!(world.client.poll_timeout(), None);
}

#[test]
fn leases_of_no_time_do_not_make_the_client_spin() {
    let mut world = World::new(vec![Server::new(1)], None);
    world.servers[0].lease = 0;
    world.run_until(secs(600));
    assert!(world.sent.len() < 200, "{}", world.sent.len());
    assert!(world.bound().is_some());
}

#[test]
fn answers_to_others_and_garbage_change_nothing() {
    let mut world = World::new(Vec::new(), None);
    world.run_until(secs(1));
    let Some((_, Transmit::Broadcast(discover))) = world.sent.first().cloned() else {
        panic!("it asks")
    };
    let server = Server::new(1);
    let offer = server.reply(&discover, OFFER);
    for (at, value) in [(0, 1), (4, offer[4] ^ 1), (28, 9), (1, 6), (236, 0)] {
        let mut other = offer.clone();
        other[at] = value;
        world.client.handle_message(world.now, &other);
    }
    for cut in 0..offer.len() {
        world.client.handle_message(world.now, &offer[..cut.min(242)]);
    }
    assert!(matches!(world.client.state, State::Selecting(_)));
    // Any single bit may be wrong, in any state.
    let ack = server.reply(&discover, ACK);
    for message in [&offer, &ack] {
        for at in 0..message.len() {
            for bit in 0..8 {
                let mut broken = message.clone();
                broken[at] ^= 1 << bit;
                if let Some(answer) = Answer::read(&broken) {
                    let _ = answer.lease(Ipv4Addr::new(10, 0, 0, 1));
                }
                world.client.handle_message(world.now, &broken);
                while world.client.poll_transmit(world.now).is_some() {}
                let _ = world.client.poll_timeout();
            }
        }
    }
    let mut random = 7_u64;
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..64)
            .map(|_| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (random >> 56) as u8
            })
            .collect();
        read_options(&bytes, &mut BTreeMap::new());
        let _ = read_routes(&bytes);
    }
}

#[test]
fn offers_of_impossible_addresses_are_not_taken() {
    for pool in [[0; 4], [255; 4], [224, 0, 0, 1], [127, 0, 0, 1]] {
        let mut world = World::new(vec![Server::new(1)], None);
        world.servers[0].pool = Ipv4Addr::from(pool);
        world.run_until(secs(100));
        assert_eq!(world.bound(), None, "{pool:?}");
    }
}

#[test]
fn options_are_put_together_and_read_from_the_header_when_they_overflow() {
    let mut world = World::new(Vec::new(), None);
    world.run_until(secs(1));
    let (_, Transmit::Broadcast(discover)) = &world.sent[0] else { panic!("it asks") };
    let mut ack = Server::new(1).reply(discover, ACK);
    ack.truncate(ack.iter().rposition(|byte| *byte == OPTION_END).expect("an end"));
    // Two halves of one list (RFC 3396), and routes in the field of the file name.
    ack.extend([OPTION_OVERLOAD, 1, 1, OPTION_ROUTES, 3, 0, 10, 0, OPTION_ROUTES, 2, 0, 9]);
    ack.extend([OPTION_ROUTES, 8, 12, 172, 16, 10, 0, 0, 8, OPTION_END]);
    ack[108..114].copy_from_slice(&[OPTION_ROUTES, 0, OPTION_END, 0, 0, 0]);
    let answer = Answer::read(&ack).expect("it is whole");
    let lease = answer.lease(Ipv4Addr::new(10, 0, 0, 1)).expect("it is of use");
    let any = Ipv4Addr::UNSPECIFIED;
    assert_eq!(
        lease.routes,
        [
            (any, 0, Ipv4Addr::new(10, 0, 0, 9)),
            (Ipv4Addr::new(172, 16, 0, 0), 12, Ipv4Addr::new(10, 0, 0, 8))
        ]
    );
    assert!(lease.routers.is_empty(), "classless routes stand alone");
}
