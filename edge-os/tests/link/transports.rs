//! The link by itself, over real sockets: race, fallback, move, a NAT that forgets, a peer that is gone without a word,
//! a hub that asks for patience, and one that sends rubbish.

use crate::cloud::{Cloud, Session, Way};
use serde_json::{Value, json};
use skerry_edge::config::{Config, Endpoint, Quic};
use skerry_edge::link::{self, LinkEvent, LinkFacts, LinkParts, Outgoing, Timing, Transport};
use skerry_edge::objects::LookupRequest;
use skerry_protocol::frame::{HelloReply, Kind};
use skerry_protocol::{Capabilities, Class, Message, Operation, batch};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(30);
const OURS: &str = "digest,window,batch,lease,receipts,renew,qualify,history,beat=25";

/// A link without an agent.
struct Bare {
    events: mpsc::Receiver<LinkEvent>,
    facts: watch::Receiver<LinkFacts>,
    outgoing: Option<mpsc::Sender<Outgoing>>,
    stop: CancellationToken,
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn local(port: u16) -> Endpoint {
    Endpoint { host: "127.0.0.1".into(), port, via: None }
}

impl Bare {
    /// `hub` and `quic` are ports; the beats come every second.
    fn start(dir: &Path, cloud: &Cloud, hub: u16, quic: Option<u16>, timing: Timing) -> Self {
        let text = format!(
            "nodeName: edge1\nhub: wss://127.0.0.1:{hub}\nenrol: https://127.0.0.1:{}\ntoken: {}\ndir: {}\n",
            cloud.enrol_port,
            cloud.token(),
            dir.display(),
        );
        let mut config = Config::parse(Path::new("edge.yaml"), &text).expect("a configuration");
        config.quic = quic.map_or(Quic::Off, |port| Quic::At(local(port)));
        config.beat = Duration::from_secs(1);
        let (events, heard) = mpsc::channel(link::INCOMING_MAX);
        let (lookups, requests) = mpsc::channel(8);
        let (facts, facts_seen) = watch::channel(LinkFacts::default());
        let (credentials, _) = watch::channel(None);
        let stop = CancellationToken::new();
        let parts = LinkParts { events, credentials, lookups, facts, seed: 1, timing };
        tokio::spawn(refuse_lookups(requests));
        tokio::spawn(link::run(Arc::new(config), parts, stop.clone()));
        Self { events: heard, facts: facts_seen, outgoing: None, stop }
    }

    async fn next(&mut self) -> LinkEvent {
        let next = tokio::time::timeout(PATIENCE, self.events.recv()).await;
        next.expect("the link says something").expect("the link runs")
    }

    /// Waits for a connection, and takes its way up.
    async fn connected(&mut self) -> (Transport, Capabilities) {
        loop {
            match self.next().await {
                LinkEvent::Connected { transport, capabilities, outgoing } => {
                    self.outgoing = Some(outgoing);
                    return (transport, capabilities);
                }
                LinkEvent::Disconnected { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// The next thing is a message about this.
    async fn message(&mut self) -> Message {
        match self.next().await {
            LinkEvent::Message(message) => *message,
            other => panic!("{other:?}"),
        }
    }

    async fn disconnected(&mut self) -> String {
        match self.next().await {
            LinkEvent::Disconnected { reason } => reason,
            other => panic!("{other:?}"),
        }
    }

    async fn send(&self, message: Message, report: bool) {
        let outgoing = self.outgoing.as_ref().expect("connected");
        outgoing.send(Outgoing { message, report }).await.expect("the link is up");
    }
}

/// There is no agent that could ask the hub.
async fn refuse_lookups(mut requests: mpsc::Receiver<LookupRequest>) {
    while let Some(request) = requests.recv().await {
        let _ = request.answer.send(Err("not in this test".into()));
    }
}

fn up(resource: &str, content: &Value) -> Message {
    Message::new(1, "edged", "meta", Operation::Update, resource, content)
}

fn down(resource: &str, content: &Value) -> Message {
    Message::new(1, "edgecontroller", "resource", Operation::Update, resource, content)
}

fn accepted() -> HelloReply {
    HelloReply::Accepted { capabilities: OURS.into() }
}

#[tokio::test]
async fn quic_wins_the_race_and_each_class_has_its_stream() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let quic = cloud.quic_address().port();
    let mut link = Bare::start(dir.path(), &cloud, cloud.hub_port(), Some(quic), Timing::default());
    let (hello, mut hub) = cloud.accept_quic(&accepted()).await;
    assert_eq!(hello.node, "edge1");
    assert_eq!(hello.capabilities, OURS.replace("beat=25", "beat=1"));
    let (transport, capabilities) = link.connected().await;
    assert_eq!((transport, capabilities.beat), (Transport::Quic, Some(Duration::from_secs(1))));

    link.send(up("default/podpatch/web", &json!("x")), false).await;
    link.send(up("default/event/web.1", &json!({})), true).await;
    let large = json!({"data": "z".repeat(300_000)});
    link.send(up("default/event/web.2", &large), false).await;
    for _ in 0..3 {
        hub.next().await;
    }
    hub.classes.sort_unstable();
    assert_eq!(hub.classes, [Class::Pod, Class::Event, Class::Event]);
    assert!(matches!(link.next().await, LinkEvent::Written(_)), "as it was asked for");

    hub.send(&down("default/pod/web", &large)).await;
    assert_eq!(link.message().await.content.get(), large.to_string());
    let both = [down("default/pod/a", &json!(1)), down("default/pod/b", &json!(2))];
    hub.send_batch(&both).await;
    assert_eq!(link.message().await.route.resource, "default/pod/a");
    assert_eq!(link.message().await.route.resource, "default/pod/b");
    let known = |facts: &LinkFacts| facts.rtt_ms.is_some() && facts.bytes_in > 100_000;
    let facts = tokio::time::timeout(PATIENCE, link.facts.wait_for(known)).await;
    let facts = facts.expect("after a beat").expect("the link runs").clone();
    assert_eq!(facts.transport, Some(Transport::Quic));

    drop(link.outgoing.take());
    hub.ended().await;
    assert!(link.disconnected().await.contains("closed by this agent"));
}

#[tokio::test]
async fn idle_quic_link_costs_two_small_packets_a_beat() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let quic = cloud.quic_address().port();
    let mut link = Bare::start(dir.path(), &cloud, cloud.hub_port(), Some(quic), Timing::default());
    let (_, _hub) = cloud.accept_quic(&accepted()).await;
    link.connected().await;
    // Each beat is told once, when its echo was seen; the first ones come with what a new connection has to find out.
    let mut told = Vec::new();
    while told.len() < 5 {
        let changed = tokio::time::timeout(PATIENCE, link.facts.changed()).await;
        changed.expect("beats go on").expect("the link runs");
        let facts = link.facts.borrow_and_update();
        told.push(facts.bytes_in + facts.bytes_out);
    }
    let costs: Vec<_> = told.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // With IP and UDP around it, 6 MB a month at a beat a minute are 138 bytes for each.
    // On a busy machine an acknowledgement that is late costs a packet more; the cheapest beat has none of that.
    let cheapest = costs.iter().min().expect("four beats");
    assert!(*cheapest <= 138 - 2 * 28, "bytes of UDP payload a beat: {costs:?}");
}

#[tokio::test]
async fn websocket_carries_the_link_until_quic_gets_through_and_the_move_loses_no_link() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let way = Way::datagrams(cloud.quic_address()).await;
    way.set_open(false);
    let timing = Timing { quic_retry: Duration::from_millis(300), ..Timing::default() };
    let mut link = Bare::start(dir.path(), &cloud, cloud.hub_port(), Some(way.port), timing);
    let mut hub = cloud.accept(Some(OURS)).await;
    assert_eq!(link.connected().await.0, Transport::WebSocket);
    hub.send(&down("default/pod/web", &json!(1))).await;
    link.message().await;

    way.set_open(true);
    let (_, mut better) = cloud.accept_quic(&accepted()).await;
    let old = link.outgoing.take();
    let LinkEvent::Connected { transport: Transport::Quic, outgoing, .. } = link.next().await
    else {
        panic!("the link is never down meanwhile");
    };
    link.outgoing = Some(outgoing);
    hub.ended().await;
    assert!(old.expect("connected before").is_closed());
    link.send(up("default/podpatch/web", &json!("x")), false).await;
    assert_eq!(better.next().await.route.resource, "default/podpatch/web");
}

#[tokio::test]
async fn hub_that_ends_the_old_connection_first_does_not_break_the_move() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let way = Way::datagrams(cloud.quic_address()).await;
    way.set_open(false);
    let timing = Timing { quic_retry: Duration::from_millis(300), ..Timing::default() };
    let mut link = Bare::start(dir.path(), &cloud, cloud.hub_port(), Some(way.port), timing);
    let hub = cloud.accept(Some(OURS)).await;
    assert_eq!(link.connected().await.0, Transport::WebSocket);
    way.set_open(true);
    let moving = async {
        let mut hub = Some(hub);
        let reply = accepted();
        // The hello has been read when the old connection ends, and is answered after that.
        cloud.accept_quic_after(&reply, || drop(hub.take())).await
    };
    let (_, _better) = moving.await;
    assert!(matches!(link.next().await, LinkEvent::Connected { transport: Transport::Quic, .. }));
}

#[tokio::test]
async fn nat_that_forgets_the_flow_is_survived_on_the_same_connection() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let way = Way::datagrams(cloud.quic_address()).await;
    let mut link =
        Bare::start(dir.path(), &cloud, cloud.hub_port(), Some(way.port), Timing::default());
    let (_, mut hub) = cloud.accept_quic(&accepted()).await;
    assert_eq!(link.connected().await.0, Transport::Quic);
    hub.send(&down("default/pod/a", &json!(1))).await;
    link.message().await;
    let before = hub.remote();

    way.rebind();
    link.send(up("default/podpatch/a", &json!("x")), false).await;
    assert_eq!(hub.next().await.route.resource, "default/podpatch/a");
    hub.send(&down("default/pod/b", &json!(2))).await;
    assert_eq!(link.message().await.route.resource, "default/pod/b");
    assert_ne!(hub.remote(), before, "the hub has followed the node");
}

/// One after the other these would take too long.
#[tokio::test]
async fn hub_that_is_gone_without_a_word_is_left_after_two_beats_on_any_transport() {
    tokio::join!(
        silent_quic_is_left(),
        half_open_websocket_is_left(Some(OURS)),
        half_open_websocket_is_left(None),
    );
}

async fn silent_quic_is_left() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let way = Way::datagrams(cloud.quic_address()).await;
    let mut link =
        Bare::start(dir.path(), &cloud, cloud.hub_port(), Some(way.port), Timing::default());
    let (_, _hub) = cloud.accept_quic(&accepted()).await;
    assert_eq!(link.connected().await.0, Transport::Quic);
    way.set_open(false);
    let cut = Instant::now();
    let reason = link.disconnected().await;
    assert!(reason.starts_with("nothing came for"), "{reason}");
    let found = cut.elapsed();
    // Two beats of a second and five more; the beat before the cut counts from its answer.
    assert!((5..11).contains(&found.as_secs()), "{found:?}");
    let _hub = cloud.accept(Some(OURS)).await;
    assert_eq!(link.connected().await.0, Transport::WebSocket);
}

async fn half_open_websocket_is_left(capabilities: Option<&'static str>) {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let hub_address = ([127, 0, 0, 1], cloud.hub_port()).into();
    let way = Way::connections(hub_address).await;
    let timing = Timing { stock_ping: Duration::from_millis(500), ..Timing::default() };
    let mut link = Bare::start(dir.path(), &cloud, way.port, None, timing);
    let mut hub = cloud.accept(capabilities).await;
    let (transport, agreed) = link.connected().await;
    assert_eq!((transport, agreed.beat.is_some()), (Transport::WebSocket, capabilities.is_some()));
    // A hub that only reads keeps the link: the library under it answers the pings.
    let idle = tokio::time::timeout(Duration::from_secs(2), hub.next_frame()).await;
    assert!(idle.is_err(), "a beat is no message");
    let known = |facts: &LinkFacts| facts.rtt_ms.is_some();
    link.facts.wait_for(known).await.expect("a ping was answered");
    way.set_open(false);
    let reason = link.disconnected().await;
    assert!(reason.starts_with("nothing came for"), "{reason}");
}

#[tokio::test]
async fn hub_that_asks_for_patience_gets_it_on_both_transports() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let mut link = Bare::start(dir.path(), &cloud, cloud.hub_port(), None, Timing::default());
    let refused = cloud.refuse("HTTP/1.1 503 Service Unavailable\r\nSkerry-Retry-After-Ms: 900\r\nContent-Length: 4\r\n\r\nfull").await;
    assert!(refused.contains("\r\nConnectionuse: msg\r\n"), "{refused}");
    let reason = link.disconnected().await;
    assert!(reason.contains("503 Service Unavailable full; dialling again in 900"), "{reason}");
    let refused = Instant::now();
    let _hub = cloud.accept(None).await;
    let waited = refused.elapsed();
    assert!(waited > Duration::from_millis(700), "{waited:?}");
    link.connected().await;
    drop(link);

    let quic = cloud.quic_address().port();
    let mut link = Bare::start(dir.path(), &cloud, 9, Some(quic), Timing::default());
    let reply = HelloReply::Refused { refused: "busy".into(), retry_after_ms: Some(900) };
    let _refused = cloud.accept_quic(&reply).await;
    let reason = link.disconnected().await;
    assert!(reason.contains("busy; dialling again in 900"), "{reason}");
    let refused = Instant::now();
    let _hub = cloud.accept_quic(&accepted()).await;
    assert!(refused.elapsed() > Duration::from_millis(700));
}

#[tokio::test]
async fn rubbish_of_the_hub_costs_nothing_but_a_word() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let mut link = Bare::start(dir.path(), &cloud, cloud.hub_port(), None, Timing::default());
    let mut hub = cloud.accept(Some(OURS)).await;
    link.connected().await;
    let mut broken = batch::encode(&[down("default/pod/a", &json!("0".repeat(1000)))]);
    broken.truncate(broken.len() - 3);
    let rubbish = [
        Frame::text("nonsense\n"),
        Frame::text("{}{}"),
        Frame::text("[1,2"),
        Frame::text(r#"{"header":5,"route":[],"content":{}}"#),
        Frame::text(""),
        Frame::binary(vec![0xff; 5000]),
        Frame::binary(vec![]),
        Frame::binary(broken),
    ];
    for frame in rubbish {
        let shown = format!("{:.60}", format!("{frame:?}"));
        hub.send_raw(frame).await;
        match link.next().await {
            LinkEvent::Garbled(_) => {}
            // An empty batch is a batch.
            LinkEvent::Message(_) => panic!("{shown} is no message"),
            other => panic!("{shown}: {other:?}"),
        }
    }
    hub.send(&down("default/pod/a", &json!(1))).await;
    assert_eq!(link.message().await.route.resource, "default/pod/a");
}

#[tokio::test]
async fn hub_that_breaks_the_framing_is_dialled_again() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let mut link = Bare::start(dir.path(), &cloud, cloud.hub_port(), None, Timing::default());
    let over = (skerry_protocol::message::MESSAGE_LEN_MAX as u64 + 1).to_be_bytes();
    let too_long = [&[0x81, 127][..], &over].concat();
    let broken: [(&[u8], &str); 4] = [
        (&too_long, "over the bound of 33554432 bytes"),
        (&[0x81, 0x81, 0, 0, 0, 0, b'x'], "masked"),
        (&[0xf1, 1, b'x'], "reserved bits"),
        (&[0x80, 1, b'x'], "continues no message"),
    ];
    for (bytes, words) in broken {
        let mut hub = cloud.accept(Some(OURS)).await;
        link.connected().await;
        hub.send_bytes(bytes).await;
        let reason = link.disconnected().await;
        assert!(reason.contains(words), "{reason}");
    }
}

#[tokio::test]
async fn quic_hub_that_breaks_the_framing_is_dialled_again() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let quic = cloud.quic_address().port();
    // No WebSocket behind this port: what is dialled again is QUIC.
    let mut link = Bare::start(dir.path(), &cloud, 9, Some(quic), Timing::default());
    let over = (skerry_protocol::message::MESSAGE_LEN_MAX as u32 + 2000).to_be_bytes();
    let broken: [(Vec<u8>, &str); 3] = [
        ([&over[..], &[0]].concat(), "over the bound"),
        (vec![0, 0, 0, 1, 9, 0], "unknown kind 9"),
        (vec![0, 0, 0, 2, 2, b'{', b'}'], "a second hello"),
    ];
    for (bytes, words) in broken {
        let (_, mut hub) = cloud.accept_quic(&accepted()).await;
        link.connected().await;
        hub.send_frame(Class::Pod, Kind::Message, b"nonsense").await;
        assert!(matches!(link.next().await, LinkEvent::Garbled(_)));
        hub.send_stream_bytes(Class::Pod, &bytes).await;
        let reason = link.disconnected().await;
        assert!(reason.contains(words), "{reason}");
    }
}

/// Reads one request and answers it with `answer`; returns the request.
impl Cloud {
    async fn refuse(&self, answer: &str) -> String {
        let (tcp, _) = self.hub.accept().await.expect("a connection");
        let mut tls = self.hub_tls.accept(tcp).await.expect("TLS");
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(tls.read_u8().await.expect("the request goes on"));
        }
        tls.write_all(answer.as_bytes()).await.expect("the link is up");
        tls.shutdown().await.expect("the link is up");
        String::from_utf8(request).expect("a text")
    }
}

#[tokio::test]
async fn large_fragmented_message_is_put_together() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let mut link = Bare::start(dir.path(), &cloud, cloud.hub_port(), None, Timing::default());
    let mut hub = cloud.accept(None).await;
    link.connected().await;
    let large = down("default/configmap/a", &json!({"data": "y".repeat(200_000)}));
    send_fragments(&mut hub, large.encode().as_bytes()).await;
    assert_eq!(link.message().await.content.get().len(), large.content.get().len());
    // As Go's peers send it: Binary is taken for Text.
    let small = down("default/configmap/b", &json!(1));
    hub.send_raw(Frame::binary(small.encode().into_bytes())).await;
    assert_eq!(link.message().await.route.resource, "default/configmap/b");
}

/// As gorilla/websocket writes what is over its buffer: fragments of 4 KiB, and an empty last one.
async fn send_fragments(hub: &mut Session, bytes: &[u8]) {
    let mut wire = Vec::new();
    for (index, part) in bytes.chunks(4096).enumerate() {
        wire.extend([if index == 0 { 0x01 } else { 0x00 }, 126]);
        wire.extend(u16::try_from(part.len()).expect("short").max(126).to_be_bytes());
        wire.extend(part);
        if part.len() < 126 {
            // The shortest form is the only one; pad with what JSON ignores.
            wire.extend(vec![b' '; 126 - part.len()]);
        }
    }
    wire.extend([0x80, 0]);
    hub.send_bytes(&wire).await;
}
