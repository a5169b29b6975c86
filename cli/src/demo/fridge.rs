//! The simulated fridge of `skerry up`: a thermometer, a thermostat and a lamp on Modbus TCP, and a door that tells a
//! broker when it opens.
//!
//! ```text
//! input register 0     air inside, tenths of a degree; comes near the setpoint in seconds, open door or not
//! holding register 0   setpoint, tenths of a degree
//! coil 0               lamp
//! fridge/door          {"open": true} for 5 s of every 30, retained
//! ```
//!
//! A Modbus server of the few functions that a mapper uses, on loopback, for people who want to see something move. The
//! mapper's tests use a server that is not ours.
//!
//! Source: MODBUS Application Protocol V1.1b3, sections 4 to 7; MODBUS Messaging on TCP/IP V1.0b, section 3.1.

use anyhow::{Context, Result};
use rumqttc::{AsyncClient, Event, LastWill, MqttOptions, Packet, QoS};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Where the door speaks.
const DOOR_TOPIC: &str = "fridge/door";
/// One round of the door, and how long it is open in it.
const DOOR_ROUND: Duration = Duration::from_secs(30);
const DOOR_OPEN: Duration = Duration::from_secs(5);
/// Pause before the broker is dialled again.
const BROKER_PAUSE: Duration = Duration::from_millis(500);
/// Time between two steps of the air.
const STEP: Duration = Duration::from_millis(100);
/// Share of its way to the setpoint that the air makes in a step: nine tenths of it in 3 s.
const STEP_SHARE: f64 = 0.075;
/// How much warmer it gets while the door is open, in degrees.
const DOOR_WARMS: f64 = 1.5;
/// Connections that are served at once.
const CONNECTIONS_MAX: usize = 16;
/// Longest request of Modbus TCP, after its header.
const PDU_LEN_MAX: usize = 253;

/// A fridge that runs until it is dropped.
pub(crate) struct Fridge {
    address: SocketAddr,
    tasks: JoinSet<()>,
}

impl Fridge {
    pub(crate) async fn start(listen: SocketAddr, broker: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("the simulated fridge could not listen on {listen}"))?;
        let address = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State::default()));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, Arc::clone(&state)));
        tasks.spawn(live(Arc::clone(&state)));
        tasks.spawn(door(state, broker));
        Ok(Self { address, tasks })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn stop(mut self) {
        self.tasks.abort_all();
    }
}

#[derive(Debug)]
struct State {
    /// Degrees.
    air: f64,
    /// Tenths of a degree.
    setpoint: i16,
    lamp: bool,
    door_open: bool,
}

impl Default for State {
    fn default() -> Self {
        Self { air: 4.0, setpoint: 40, lamp: false, door_open: false }
    }
}

async fn live(state: Arc<Mutex<State>>) {
    let mut tick = tokio::time::interval(STEP);
    loop {
        tick.tick().await;
        let mut state = state.lock().expect("no holder panics");
        let warmer = if state.door_open { DOOR_WARMS } else { 0.0 };
        let aim = f64::from(state.setpoint) / 10.0 + warmer;
        state.air += (aim - state.air) * STEP_SHARE;
    }
}

async fn door(state: Arc<Mutex<State>>, broker: SocketAddr) {
    let mut options = MqttOptions::new("fridge-door", broker.ip().to_string(), broker.port());
    options.set_keep_alive(Duration::from_secs(30));
    options.set_last_will(LastWill::new(DOOR_TOPIC, "{\"open\": false}", QoS::AtLeastOnce, true));
    let (client, mut events) = AsyncClient::new(options, 4);
    let mut round = tokio::time::interval(DOOR_ROUND);
    let mut closes = std::pin::pin!(tokio::time::sleep(DOOR_ROUND * 1000));
    loop {
        tokio::select! {
            event = events.poll() => match event {
                // It says how it is to whoever is there now.
                Ok(Event::Incoming(Packet::ConnAck(_))) => {}
                Ok(_) => continue,
                Err(_) => {
                    tokio::time::sleep(BROKER_PAUSE).await;
                    continue;
                }
            },
            _ = round.tick() => {
                state.lock().expect("no holder panics").door_open = true;
                closes.as_mut().reset(tokio::time::Instant::now() + DOOR_OPEN);
            }
            () = &mut closes => {
                state.lock().expect("no holder panics").door_open = false;
                closes.as_mut().reset(tokio::time::Instant::now() + DOOR_ROUND * 1000);
            }
        }
        let open = state.lock().expect("no holder panics").door_open;
        let text = format!("{{\"open\": {open}}}");
        // A full queue: the broker is away, and hears how it is when it is back.
        let _ = client.try_publish(DOOR_TOPIC, QoS::AtLeastOnce, true, text);
    }
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let state = Arc::clone(&state);
                connections.spawn(async move {
                    // Whoever breaks off has what it wanted.
                    let _ = answer_all(stream, &state).await;
                    drop(permit);
                });
            }
            // Too many open files, for example; others may end theirs.
            Err(_) => tokio::time::sleep(STEP).await,
        }
    }
}

async fn answer_all(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let mut header = [0; 7];
        stream.read_exact(&mut header).await?;
        let [_, _, protocol_high, protocol_low, len_high, len_low, _] = header;
        let len = usize::from(u16::from_be_bytes([len_high, len_low]));
        if (protocol_high, protocol_low) != (0, 0) || !(2..=PDU_LEN_MAX + 1).contains(&len) {
            return Ok(()); // no Modbus
        }
        let mut request = vec![0; len - 1];
        stream.read_exact(&mut request).await?;
        let pdu = answer(&mut state.lock().expect("no holder panics"), &request);
        let len = u16::try_from(pdu.len() + 1).expect("an answer is short").to_be_bytes();
        header[4..6].copy_from_slice(&len);
        stream.write_all(&[&header[..], &pdu].concat()).await?;
    }
}

/// Answers one request, function code first.
fn answer(state: &mut State, request: &[u8]) -> Vec<u8> {
    let function = request.first().copied().unwrap_or_default();
    carry_out(state, request).unwrap_or_else(|code| vec![function | 0x80, code])
}

const ILLEGAL_FUNCTION: u8 = 1;
const ILLEGAL_ADDRESS: u8 = 2;
const ILLEGAL_VALUE: u8 = 3;

fn carry_out(state: &mut State, request: &[u8]) -> Result<Vec<u8>, u8> {
    let word = |at: usize| -> Result<u16, u8> {
        let bytes = request.get(at..at + 2).ok_or(ILLEGAL_VALUE)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    };
    let function = *request.first().ok_or(ILLEGAL_VALUE)?;
    if !matches!(function, 1 | 3 | 4 | 5 | 6 | 15 | 16) {
        return Err(ILLEGAL_FUNCTION);
    }
    let (address, second) = (word(1)?, word(3)?);
    // There is one of each; single writes carry their value where others have a count.
    let is_single = matches!(function, 5 | 6);
    if address != 0 || (!is_single && second != 1) {
        return Err(ILLEGAL_ADDRESS);
    }
    match function {
        1 => return Ok(vec![1, 1, u8::from(state.lamp)]),
        3 => return Ok([&[3, 2], &state.setpoint.to_be_bytes()[..]].concat()),
        4 => {
            let air = (state.air * 10.0).round() as i16;
            return Ok([&[4, 2], &air.to_be_bytes()[..]].concat());
        }
        5 => state.lamp = second == 0xff00,
        6 => state.setpoint = second.cast_signed(),
        15 => state.lamp = request.get(6).ok_or(ILLEGAL_VALUE)? & 1 == 1,
        16 => state.setpoint = word(6)?.cast_signed(),
        _ => return Err(ILLEGAL_FUNCTION),
    }
    // A write is answered with its own beginning.
    Ok(request[..5].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_read_and_written_and_what_is_not_there_is_refused() {
        let mut state = State { air: -1.26, ..State::default() };
        let mut ask = |request: &[u8]| answer(&mut state, request);
        assert_eq!(ask(&[4, 0, 0, 0, 1]), [4, 2, 0xff, 0xf3]);
        assert_eq!(ask(&[3, 0, 0, 0, 1]), [3, 2, 0, 40]);
        assert_eq!(ask(&[6, 0, 0, 0xff, 0xce]), [6, 0, 0, 0xff, 0xce]);
        assert_eq!(ask(&[3, 0, 0, 0, 1]), [3, 2, 0xff, 0xce]);
        assert_eq!(ask(&[16, 0, 0, 0, 1, 2, 0, 7]), [16, 0, 0, 0, 1]);
        assert_eq!(ask(&[3, 0, 0, 0, 1]), [3, 2, 0, 7]);
        assert_eq!(ask(&[5, 0, 0, 0xff, 0]), [5, 0, 0, 0xff, 0]);
        assert_eq!(ask(&[1, 0, 0, 0, 1]), [1, 1, 1]);
        assert_eq!(ask(&[4, 0, 1, 0, 1]), [0x84, ILLEGAL_ADDRESS]);
        assert_eq!(ask(&[4, 0, 0, 0, 2]), [0x84, ILLEGAL_ADDRESS]);
        assert_eq!(ask(&[43, 14, 1, 0]), [0xab, ILLEGAL_FUNCTION]);
        for short in [&[][..], &[4], &[4, 0, 0, 0], &[16, 0, 0, 0, 1, 2, 0]] {
            assert_eq!(ask(short)[1], ILLEGAL_VALUE, "{short:?}");
        }
    }

    #[tokio::test]
    async fn the_air_follows_the_setpoint() {
        let broker = SocketAddr::from(([127, 0, 0, 1], 1)); // nobody: the door speaks to no one
        let fridge = Fridge::start(SocketAddr::from(([127, 0, 0, 1], 0)), broker).await.unwrap();
        let mut stream = TcpStream::connect(fridge.address()).await.unwrap();
        let write = [0, 1, 0, 0, 0, 6, 1, 6, 0, 0, 0, 80];
        let read = [0, 2, 0, 0, 0, 6, 1, 4, 0, 0, 0, 1];
        let mut answer = [0; 12];
        stream.write_all(&write).await.unwrap();
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, write);
        let end = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            stream.write_all(&read).await.unwrap();
            let mut answer = [0; 11];
            stream.read_exact(&mut answer).await.unwrap();
            if i16::from_be_bytes([answer[9], answer[10]]) > 75 {
                break;
            }
            assert!(tokio::time::Instant::now() < end, "{answer:?}");
            tokio::time::sleep(STEP).await;
        }
        fridge.stop();
    }
}
