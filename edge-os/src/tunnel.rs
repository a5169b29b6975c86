//! Container logs for the cloud, and what devices were: the node's end of the stream tunnel.
//!
//! One WebSocket to CloudCore; each log request is a stream of frames on it, answered by one task that reads the log
//! file. Exec and attach are refused with an HTTP answer, which the cloud relays to whoever asked; metrics with a
//! comment. The tunnel is a convenience: nothing else depends on it.
//!
//! A KubeEdge cloud wants it open all the time. Our hub asks for it over the link when somebody wants a stream, and it is
//! closed some time after the last one: kept alive, it would cost more than the link itself. [`Demand`] says which.
//!
//! Frames go out as Text messages although they hold any bytes: a Go cloud takes nothing else. Differs from KubeEdge:
//! the server's certificate is checked, a dead connection is noticed, and no stream can hold up the reader.
//!
//! Source: kubeedge/kubeedge, edge/pkg/edgestream and pkg/stream.

use crate::config::{Config, Endpoint};
use crate::enrol::Credentials;
use crate::history::Ask;
use crate::link::chain;
use crate::link::websocket::{self, Out, until};
use crate::node;
use crate::pods::{Engine, LogFile};
use crate::tls;
use bytes::BytesMut;
use http::Request;
use jiff::Timestamp;
use skerry_edge_core::backoff::Backoff;
use skerry_edge_core::history::query::{Page, Question};
use skerry_edge_core::logs::{LogOptions, LogReader, LogTarget, Tail};
use skerry_protocol::capability::BEAT_GRACE;
use skerry_protocol::tunnel::{
    ADDRESS_HEADER, CHUNK_LEN, Connect, DATA_LEN_MAX, Frame, FrameKind, HISTORY_PATH, NODE_HEADER,
    PATH,
};
use skerry_protocol::websocket::{Decoder, Message, Opcode, Role};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

/// Streams open at once; the cloud gets a refusal for more.
pub const STREAMS_MAX: usize = 32;
/// Frames that wait for the socket; then the readers of files wait.
const OUTGOING_MAX: usize = 16;
/// Bytes that wait for the socket; then nothing more is read, nor taken from the readers of files.
const OUT_LEN_MAX: usize = 256 * 1024;
/// The longest message: a frame with as much data as one may have, and its two numbers.
const MESSAGE_LEN_MAX: usize = DATA_LEN_MAX + 20;
/// Longest time between two pings: our hub gives a silent tunnel up after 30 s.
const PING_INTERVAL_MAX: Duration = Duration::from_secs(25);
/// A tunnel that lasted as long was a good one.
const GOOD_TUNNEL: Duration = Duration::from_secs(25);
/// Time between two looks at a followed file.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(250);

/// Time without a stream after which a tunnel that was asked for is closed.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Dials for one demand; whoever wanted the stream has gone by then.
const DIALS_MAX: u32 = 3;

/// When there has to be a tunnel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Demand {
    /// There was no link yet.
    #[default]
    Unknown,
    /// The hub cannot ask for it.
    Always,
    /// The hub has asked as many times as this.
    Asked(u64),
}

impl Demand {
    /// The link is up; `asks` when this hub asks for the tunnel when it wants it.
    pub fn handle_connected(&mut self, asks: bool) {
        *self = match (asks, *self) {
            (false, _) => Self::Always,
            (true, asked @ Self::Asked(_)) => asked,
            (true, _) => Self::Asked(0),
        };
    }

    /// The hub wants it now.
    pub fn handle_asked(&mut self) {
        if let Self::Asked(count) = self {
            *count += 1;
        }
    }

    /// Whether there has to be one, when so many demands have been met.
    fn is_open(self, met: u64) -> bool {
        match self {
            Self::Unknown => false,
            Self::Always => true,
            Self::Asked(count) => count > met,
        }
    }

    fn count(self) -> u64 {
        if let Self::Asked(count) = self { count } else { 0 }
    }
}

/// The tunnel of one node.
pub struct Tunnel {
    config: Arc<Config>,
    endpoint: Endpoint,
    engine: Arc<Engine>,
    asks: mpsc::Sender<Ask>,
}

impl Tunnel {
    /// To `endpoint`, with logs of the pods of `engine`, and whoever answers `asks` about devices.
    pub(crate) fn new(
        config: Arc<Config>,
        endpoint: Endpoint,
        engine: Arc<Engine>,
        asks: mpsc::Sender<Ask>,
    ) -> Self {
        Self { config, endpoint, engine, asks }
    }

    /// Runs until `stop`; begins when there are credentials and a demand.
    pub async fn run(
        self,
        mut credentials: watch::Receiver<Option<Arc<Credentials>>>,
        mut demand: watch::Receiver<Demand>,
        seed: u64,
        stop: CancellationToken,
    ) {
        let mut backoff = Backoff::new(seed.rotate_left(17));
        let mut told = false;
        // Demands that have their tunnel, or will not get one any more.
        let mut met = 0;
        let mut failures = 0;
        let dialling = async {
            if credentials.wait_for(Option::is_some).await.is_err() {
                return;
            }
            loop {
                let Ok(now) = demand.wait_for(|demand| demand.is_open(met)).await.map(|now| *now)
                else {
                    return;
                };
                let current = credentials.borrow().clone().expect("waited for");
                let started = Instant::now();
                let ended = self.serve(&current, now, demand.clone()).await;
                let is_asked = now != Demand::Always;
                if is_asked && ended.is_ok() {
                    (met, failures) = (now.count(), 0);
                    tracing::debug!(?ended, "the log tunnel is closed");
                    continue;
                }
                let reason = ended.unwrap_or_else(|error| chain(&*error));
                if started.elapsed() > GOOD_TUNNEL {
                    backoff.reset();
                    told = false;
                }
                // Once per outage: the link says what is wrong anyway.
                if !std::mem::replace(&mut told, true) || is_asked {
                    tracing::info!(reason, "no log tunnel; trying again");
                }
                failures += 1;
                if is_asked && failures >= DIALS_MAX {
                    (met, failures) = (now.count(), 0);
                }
                tokio::time::sleep(backoff.next_wait()).await;
            }
        };
        stop.run_until_cancelled(dialling).await;
    }

    /// One connection; returns why it ended. One that was asked for, as in `demand`, ends when nobody uses it.
    async fn serve(
        &self,
        credentials: &Credentials,
        demand: Demand,
        demands: watch::Receiver<Demand>,
    ) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
        let stream = tls::connect(&self.endpoint, credentials.client_config()?).await?;
        let address = self.config.node_ip.or_else(node::default_address);
        let request = Request::get(PATH)
            .header("Host", self.endpoint.to_string())
            .header(NODE_HEADER, &self.config.node_name)
            .header(ADDRESS_HEADER, address.map(|ip| ip.to_string()).unwrap_or_default());
        let opened = websocket::upgrade(stream, request).await?;
        tracing::debug!("log tunnel is up");

        let (mut reader, mut writer) = tokio::io::split(opened.stream);
        let mut incoming = opened.incoming;
        let mut decoder = Decoder::new(Role::Client, MESSAGE_LEN_MAX);
        let mut out = Out::default();
        let (outgoing, mut frames) = mpsc::channel::<Frame>(OUTGOING_MAX);
        let mut streams = Streams::default();
        let beat = self.config.beat.min(PING_INTERVAL_MAX);
        let mut ping = tokio::time::interval(beat);
        let mut heard = Instant::now();
        let mut used = Instant::now();
        let mut again = demands;
        loop {
            if !streams.0.is_empty() {
                used = Instant::now();
            }
            let idle_at = (demand != Demand::Always && streams.0.is_empty())
                .then(|| (used + IDLE_MAX).into());
            while out.bytes.len() < OUT_LEN_MAX {
                let frame = match decoder.decode(&mut incoming)? {
                    None => break,
                    Some(Message::Close(_)) => return Ok("closed by the cloud".into()),
                    Some(Message::Ping(bytes)) => {
                        out.push(Opcode::Pong, &bytes);
                        continue;
                    }
                    Some(Message::Pong(_)) => continue,
                    Some(Message::Text(bytes) | Message::Binary(bytes)) => Frame::decode(&bytes),
                };
                match frame {
                    Ok(frame) if frame.kind == FrameKind::CloseConnect => {
                        return Ok(String::from_utf8_lossy(&frame.data).into_owned());
                    }
                    Ok(frame) => self.handle(frame, &outgoing, &mut streams, &mut out),
                    Err(error) => tracing::warn!(%error, "the cloud sent a bad tunnel frame"),
                }
            }
            if incoming.is_empty() && incoming.capacity() > CHUNK_LEN {
                incoming = BytesMut::new();
            }
            let room = out.bytes.len() < OUT_LEN_MAX;
            let stuck_at = out.stuck_at();
            tokio::select! {
                read = reader.read_buf(&mut incoming), if room => {
                    if read? == 0 {
                        return Ok("closed by the cloud".into());
                    }
                    heard = Instant::now();
                }
                written = out.write(&mut writer) => drop(written?),
                () = until(stuck_at) => return Ok("the cloud does not read".into()),
                () = until(idle_at) => return Ok("nobody asks for streams".into()),
                // The hub has lost it.
                Ok(_) = again.wait_for(|now| now.is_open(demand.count()) && *now != Demand::Always),
                    if demand != Demand::Always => return Ok("the hub asks for another one".into()),
                frame = frames.recv(), if room => {
                    let frame = frame.expect("a sender is held here");
                    // The last frame of a stream that was ended meanwhile has been sent already.
                    let open = match frame.kind {
                        FrameKind::RemoveConnect => streams.0.remove(&frame.connection).is_some(),
                        _ => streams.0.contains_key(&frame.connection),
                    };
                    if open {
                        out.push(Opcode::Text, &frame.encode());
                    }
                }
                _ = ping.tick() => {
                    if heard.elapsed() >= beat * 2 + BEAT_GRACE {
                        return Ok("nothing came from the cloud".into());
                    }
                    out.push(Opcode::Ping, b"ping you");
                }
            }
        }
    }

    /// Never waits: what has to be said goes into `out`, and a stream has a task of its own.
    fn handle(
        &self,
        frame: Frame,
        outgoing: &mpsc::Sender<Frame>,
        streams: &mut Streams,
        out: &mut Out,
    ) {
        let connection = frame.connection;
        let mut say = |kind, data: &[u8]| {
            out.push(Opcode::Text, &Frame::new(connection, kind, data).encode());
        };
        match frame.kind {
            // A number that is in use cannot be the cloud's next one.
            FrameKind::LogsConnect if streams.0.contains_key(&connection) => {}
            FrameKind::LogsConnect if streams.0.len() >= STREAMS_MAX => {
                say(FrameKind::Data, b"too many log streams are open on this node\n");
                say(FrameKind::RemoveConnect, &[]);
            }
            FrameKind::LogsConnect => {
                let (engine, outgoing) = (self.engine.clone(), outgoing.clone());
                let asks = self.asks.clone();
                let task = tokio::spawn(async move {
                    let text = match answer(&engine, &asks, &frame, &outgoing).await {
                        Ok(()) => String::new(),
                        Err(text) => text + "\n",
                    };
                    finish(&outgoing, connection, text).await;
                });
                streams.0.insert(connection, task.abort_handle());
            }
            FrameKind::ExecConnect | FrameKind::AttachConnect => {
                let verb = if frame.kind == FrameKind::ExecConnect { "exec" } else { "attach" };
                say(FrameKind::Data, not_implemented(verb).as_bytes());
                say(FrameKind::RemoveConnect, &[]);
            }
            FrameKind::MetricConnect => {
                // The cloud has answered 200 already, to somebody who reads lines in Prometheus' format.
                say(FrameKind::Data, b"# metrics are not supported on this node yet\n");
                say(FrameKind::RemoveConnect, &[]);
            }
            FrameKind::RemoveConnect => {
                // KubeEdge's cloud repeats this frame in a tight loop until it is answered, once.
                if let Some(task) = streams.0.remove(&connection) {
                    task.abort();
                    say(FrameKind::RemoveConnect, &[]);
                }
            }
            FrameKind::Data | FrameKind::CloseConnect => {}
        }
    }
}

/// The answer to a request that wants to upgrade: the cloud relays these bytes to whoever asked, as they are.
fn not_implemented(verb: &str) -> String {
    let text = format!("{verb} is not supported on this node yet\n");
    format!(
        "HTTP/1.1 501 Not Implemented\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{text}",
        text.len()
    )
}

/// Tasks of open streams; they end with the connection.
#[derive(Default)]
struct Streams(HashMap<u64, AbortHandle>);

impl Drop for Streams {
    fn drop(&mut self) {
        self.0.values().for_each(AbortHandle::abort);
    }
}

/// Ends a stream, with some last words.
async fn finish(outgoing: &mpsc::Sender<Frame>, connection: u64, text: String) {
    if !text.is_empty() {
        let _ = outgoing.send(Frame::new(connection, FrameKind::Data, text)).await;
    }
    let _ = outgoing.send(Frame::new(connection, FrameKind::RemoveConnect, [])).await;
}

/// Sends what was asked for; an error is a text for the person who asked.
async fn answer(
    engine: &Engine,
    asks: &mpsc::Sender<Ask>,
    frame: &Frame,
    outgoing: &mpsc::Sender<Frame>,
) -> Result<(), String> {
    let connect: Connect = serde_json::from_slice(&frame.data)
        .map_err(|error| format!("the request for a log is not valid: {error}"))?;
    let sender = Sender { connection: frame.connection, outgoing };
    match connect.url.path.starts_with(HISTORY_PATH) {
        true => tell_history(asks, &connect, &sender).await,
        false => stream_log(engine, &connect, &sender).await,
    }
}

/// Sends a page of a device's history as JSON; that there is none, too.
async fn tell_history(
    asks: &mpsc::Sender<Ask>,
    connect: &Connect,
    sender: &Sender<'_>,
) -> Result<(), String> {
    let refused = |error: String| Page { error: Some(error), ..Page::default() };
    let page = match Question::parse(&connect.url.path, &connect.url.raw_query) {
        Err(error) => refused(error.to_string()),
        Ok(question) => {
            let (answer, page) = oneshot::channel();
            let asked = asks.send(Ask { question, answer }).await.is_ok();
            let page = if asked { page.await.ok() } else { None };
            page.unwrap_or_else(|| refused("the agent is ending".into()))
        }
    };
    let json = serde_json::to_vec(&page).map_err(|error| error.to_string())?;
    for part in json.chunks(CHUNK_LEN) {
        let frame = Frame::new(sender.connection, FrameKind::Data, part);
        if sender.outgoing.send(frame).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

async fn stream_log(engine: &Engine, connect: &Connect, sender: &Sender<'_>) -> Result<(), String> {
    let target = LogTarget::parse(&connect.url.path).map_err(|error| error.to_string())?;
    let options = LogOptions::parse(&connect.url.raw_query, Timestamp::now())
        .map_err(|error| error.to_string())?;
    let previous = options.previous;
    let locate = || {
        engine
            .log_path(&target.namespace, &target.pod, &target.container, previous)
            .map_err(|error| error.to_string())
    };
    let log = locate()?;
    let unreadable = |error: std::io::Error| {
        let (container, pod) = (&target.container, &target.pod);
        match error.kind() {
            std::io::ErrorKind::NotFound => {
                format!("container \"{container}\" in pod \"{pod}\" is not available")
            }
            _ => format!(
                "could not read the log of container \"{container}\" in pod \"{pod}\": {error}"
            ),
        }
    };
    copy_log(&log, options, sender, || {
        locate().is_ok_and(|now| now.running && now.path == log.path)
    })
    .await
    .map_err(unreadable)
}

struct Sender<'a> {
    connection: u64,
    outgoing: &'a mpsc::Sender<Frame>,
}

/// Reads the file from where the options say; follows it while `runs`, also over a rotation.
async fn copy_log(
    log: &LogFile,
    options: LogOptions,
    sender: &Sender<'_>,
    runs: impl Fn() -> bool,
) -> std::io::Result<()> {
    let mut file = File::open(&log.path)?;
    let start = match options.tail_lines {
        Some(lines) => tail_start(&mut file, lines)?,
        None => 0,
    };
    file.seek(SeekFrom::Start(start))?;
    let follow = options.follow;
    let mut reader = LogReader::new(options);
    let mut chunk = vec![0; CHUNK_LEN];
    let mut was_running = true;
    loop {
        let read = file.read(&mut chunk)?;
        if read > 0 {
            let mut answer = Vec::new();
            reader.read(&chunk[..read], &mut answer);
            for part in answer.chunks(CHUNK_LEN) {
                let frame = Frame::new(sender.connection, FrameKind::Data, part);
                if sender.outgoing.send(frame).await.is_err() {
                    return Ok(());
                }
            }
            if reader.is_done() {
                return Ok(());
            }
            continue;
        }
        // At the end. The last bytes may have come between our read and the container's end: read once more.
        if !follow || !was_running {
            return Ok(());
        }
        let rotated = std::fs::metadata(&log.path)
            .is_ok_and(|on_disk| file.metadata().is_ok_and(|mine| mine.ino() != on_disk.ino()));
        if rotated {
            file = File::open(&log.path)?;
            continue;
        }
        was_running = runs();
        if was_running {
            tokio::time::sleep(FOLLOW_INTERVAL).await;
        }
    }
}

fn tail_start(file: &mut File, lines: u64) -> std::io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut tail = Tail::new(lines);
    if lines == 0 {
        return Ok(end);
    }
    let mut block = vec![0; CHUNK_LEN];
    while end > 0 {
        let begin = end.saturating_sub(CHUNK_LEN as u64);
        let block = &mut block[..(end - begin) as usize];
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(block)?;
        if let Some(start) = tail.handle_block(block, begin) {
            return Ok(start);
        }
        end = begin;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::io::Write;

    fn line(n: usize) -> String {
        format!("2026-11-22T16:00:00Z stdout F line {n}\n")
    }

    fn options(query: &str) -> LogOptions {
        LogOptions::parse(query, Timestamp::now()).expect(query)
    }

    async fn text(mut frames: mpsc::Receiver<Frame>) -> String {
        let mut bytes = Vec::new();
        while let Some(frame) = frames.recv().await {
            assert_eq!((frame.connection, frame.kind), (7, FrameKind::Data));
            bytes.extend(frame.data);
        }
        String::from_utf8(bytes).expect("our own text")
    }

    #[test]
    fn tunnel_is_there_when_the_hub_asks_or_cannot_ask() {
        let mut demand = Demand::default();
        assert!(!demand.is_open(0));
        demand.handle_connected(true);
        assert!(!demand.is_open(0), "nobody has asked");
        demand.handle_asked();
        assert!(demand.is_open(0));
        assert!(!demand.is_open(demand.count()), "it has its tunnel");
        demand.handle_connected(true);
        assert!(!demand.is_open(1), "a new connection is no demand");
        demand.handle_asked();
        assert!(demand.is_open(1));
        demand.handle_connected(false);
        assert!(demand.is_open(7));
    }

    #[tokio::test]
    async fn last_lines_of_a_large_file_are_found_from_its_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("0.log");
        let all: String = (0..20_000).map(line).collect();
        std::fs::write(&path, all).expect("written");
        let log = LogFile { path, running: false };
        let (outgoing, frames) = mpsc::channel(4096);
        let sender = Sender { connection: 7, outgoing: &outgoing };
        copy_log(&log, options("tailLines=3000"), &sender, || false).await.expect("readable");
        drop(outgoing);
        let expected: String = (17_000..20_000).map(|n| format!("line {n}\n")).collect();
        assert_eq!(text(frames).await, expected);
    }

    #[tokio::test]
    async fn followed_log_goes_on_over_a_rotation_and_ends_with_the_container() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("0.log");
        std::fs::write(&path, line(0)).expect("written");
        let log = LogFile { path: path.clone(), running: true };
        let (outgoing, frames) = mpsc::channel(64);
        let looks = Cell::new(0);
        let runs = || {
            looks.set(looks.get() + 1);
            match looks.get() {
                1 => {
                    let mut file = File::options().append(true).open(&path).expect("the log");
                    file.write_all(line(1).as_bytes()).expect("written");
                }
                2 => {
                    std::fs::rename(&path, dir.path().join("0.log.1")).expect("rotated");
                    std::fs::write(&path, line(2)).expect("written");
                }
                _ => return false,
            }
            true
        };
        let sender = Sender { connection: 7, outgoing: &outgoing };
        copy_log(&log, options("follow=true"), &sender, runs).await.expect("readable");
        drop(outgoing);
        assert_eq!(text(frames).await, "line 0\nline 1\nline 2\n");
    }
}
