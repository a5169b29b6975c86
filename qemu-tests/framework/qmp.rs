//! A client of QEMU's monitor protocol (QMP) over a Unix socket.
//!
//! One command at a time, each with an id; events that arrive between are kept, the newest [`EVENTS_MAX`] of them.
//! The machine is the caller.
//!
//! Source of the facts: QEMU's manual, "QEMU Monitor Protocol specification" and the QMP reference.

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest wait for the answer to one command.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Events that are kept until somebody asks.
pub const EVENTS_MAX: usize = 256;
/// Pause between two tries to reach a socket that is not there yet.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket did not open, or broke.
    #[error("the monitor does not answer")]
    Io(#[from] std::io::Error),
    /// QEMU closed the socket.
    #[error("QEMU closed its monitor")]
    Closed,
    /// What came is not QMP.
    #[error("the monitor wrote `{line}`, which is no QMP message")]
    Foreign {
        /// The line.
        line: String,
    },
    /// QEMU refused the command.
    #[error("`{command}` was refused: {reason}")]
    Refused {
        /// Which one.
        command: String,
        /// QEMU's words.
        reason: String,
    },
}

/// Something that QEMU told without being asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// As `SHUTDOWN`.
    pub name: String,
    /// Further facts.
    pub data: Value,
}

/// One line of QEMU, understood.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// The first line.
    Greeting,
    /// The answer to the command with this id.
    Return(u64, Value),
    /// The refusal of the command with this id, if it could be read that far.
    Error(Option<u64>, String),
    /// An event.
    Event(Event),
}

impl Reply {
    /// Reads a line.
    pub fn decode(line: &str) -> Result<Self, QmpError> {
        let foreign = || QmpError::Foreign { line: line.trim().into() };
        let mut value: Value = serde_json::from_str(line).map_err(|_| foreign())?;
        let id = value["id"].as_u64();
        if value.get("QMP").is_some() {
            return Ok(Self::Greeting);
        }
        if let Some(name) = value["event"].as_str() {
            let name = name.to_owned();
            return Ok(Self::Event(Event { name, data: value["data"].take() }));
        }
        if let Some(error) = value.get("error") {
            return Ok(Self::Error(id, error["desc"].as_str().unwrap_or("no reason").into()));
        }
        match (id, value.get_mut("return")) {
            (Some(id), Some(answer)) => Ok(Self::Return(id, answer.take())),
            _ => Err(foreign()),
        }
    }
}

/// The line that asks for a command.
pub fn encode(id: u64, command: &str, arguments: &Value) -> String {
    let mut message = json!({"execute": command, "id": id});
    if !arguments.is_null() {
        message["arguments"] = arguments.clone();
    }
    format!("{message}\n")
}

/// An open monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    next_id: u64,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects to the socket, which QEMU may still have to make, and negotiates.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self, QmpError> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > limit => return Err(error.into()),
                Err(_) => std::thread::sleep(RETRY_PAUSE),
            }
        };
        Self::over(stream)
    }

    /// Negotiates over a connected stream.
    pub fn over(stream: UnixStream) -> Result<Self, QmpError> {
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let mut qmp = Self { reader: BufReader::new(stream), next_id: 1, events: VecDeque::new() };
        match qmp.read()? {
            Reply::Greeting => {}
            other => return Err(QmpError::Foreign { line: format!("{other:?}") }),
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Runs a command and returns its answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        self.reader.get_mut().write_all(encode(id, command, &arguments).as_bytes())?;
        loop {
            match self.read()? {
                Reply::Return(of, answer) if of == id => return Ok(answer),
                Reply::Error(of, reason) if of.is_none_or(|of| of == id) => {
                    return Err(QmpError::Refused { command: command.into(), reason });
                }
                // An answer to a command that an earlier call gave up on.
                Reply::Return(..) | Reply::Error(..) | Reply::Greeting => {}
                Reply::Event(event) => self.keep(event),
            }
        }
    }

    /// Takes the events that were seen while commands were answered.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn read(&mut self) -> Result<Reply, QmpError> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(QmpError::Closed);
        }
        Reply::decode(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays QEMU: greets, then answers each line that comes with the given lines.
    fn peer(answers: Vec<Vec<&'static str>>) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(theirs);
            reader.get_mut().write_all(b"{\"QMP\": {\"capabilities\": []}}\r\n").unwrap();
            for lines in answers {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                for answer in lines {
                    writeln!(reader.get_mut(), "{answer}").unwrap();
                }
            }
        });
        ours
    }

    #[test]
    fn command_is_answered_with_events_between() {
        let mut qmp = Qmp::over(peer(vec![
            vec![r#"{"return": {}, "id": 1}"#],
            vec![
                r#"{"event": "STOP", "data": {"a": 1}}"#,
                r#"{"return": {"running": true}, "id": 2}"#,
            ],
        ]))
        .unwrap();
        let answer = qmp.execute("query-status", Value::Null).unwrap();
        assert_eq!(answer["running"], true);
        let events = qmp.take_events();
        assert_eq!(events, [Event { name: "STOP".into(), data: json!({"a": 1}) }]);
        assert!(qmp.take_events().is_empty());
    }

    #[test]
    fn refusal_carries_qemus_words_and_a_closed_monitor_is_told() {
        let mut qmp = Qmp::over(peer(vec![
            vec![r#"{"return": {}, "id": 1}"#],
            vec![r#"{"error": {"class": "GenericError", "desc": "no such device"}, "id": 2}"#],
        ]))
        .unwrap();
        let error = qmp.execute("set_link", json!({"name": "x", "up": false})).unwrap_err();
        assert_eq!(error.to_string(), "`set_link` was refused: no such device");
        assert!(matches!(
            qmp.execute("quit", Value::Null),
            Err(QmpError::Closed | QmpError::Io(_))
        ));
    }

    #[test]
    fn lines_that_are_no_qmp_are_told_and_requests_have_arguments_only_if_given() {
        assert!(matches!(Reply::decode("hello"), Err(QmpError::Foreign { .. })));
        assert!(matches!(Reply::decode("{\"return\": {}}"), Err(QmpError::Foreign { .. })));
        assert_eq!(encode(7, "quit", &Value::Null), "{\"execute\":\"quit\",\"id\":7}\n");
        assert!(encode(1, "a", &json!({"b": 2})).contains("\"arguments\":{\"b\":2}"));
    }
}
