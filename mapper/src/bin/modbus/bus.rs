//! One connection: a Modbus TCP address or a serial line, shared by the devices on it.
//!
//! The driver holds the lock for as long as its requests take, so that devices take turns. After an
//! answer that did not come in time the connection is closed: a late one would be taken for the
//! answer to the next request.

use std::fmt;
use std::io;
use std::time::Duration;

use serial2_tokio::{CharSize, FlowControl, Parity, SerialPort, StopBits};
use skerry_mapper::{SettingError, Settings};
use tokio::net::TcpStream;
use tokio_modbus::ExceptionCode;
use tokio_modbus::client::{Context, Reader, Writer, rtu, tcp};
use tokio_modbus::slave::{Slave, SlaveContext};

use crate::plan::Request;
use crate::register::{Range, Table};

/// Where devices are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Line {
    /// Modbus TCP.
    Tcp { host: String, port: u16 },
    /// Modbus RTU.
    Serial { path: String, baud: u32, data_bits: u8, parity: &'static str, stop_bits: u8 },
}

/// One device on a line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Station {
    pub(crate) slave: u8,
    pub(crate) timeout: Duration,
}

/// Why a request gave nothing.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The device said no.
    Refused(ExceptionCode),
    /// A gateway says that the device behind it does not answer.
    Unreachable(ExceptionCode),
    /// No answer in time.
    Silent(Duration),
    /// The connection broke, or what came was no answer to the request.
    Broken(io::Error),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(code) => write!(f, "the device refuses: {code}"),
            Self::Unreachable(code) => write!(f, "the gateway does not reach it: {code}"),
            Self::Silent(after) => write!(f, "no answer in {} ms", after.as_millis()),
            Self::Broken(error) => write!(f, "the connection broke: {error}"),
        }
    }
}

/// Reads a device's settings.
///
/// # Errors
///
/// [`SettingError`] naming the setting.
pub(crate) fn parse(settings: &Settings) -> Result<(Line, Station), SettingError> {
    let station = Station {
        slave: settings.parsed("slaveID", "number from 0 to 255")?.unwrap_or(1),
        timeout: Duration::from_millis(
            settings
                .parsed::<u32>("timeoutMs", "time in ms")?
                .unwrap_or(1000)
                .clamp(10, 20_000)
                .into(),
        ),
    };
    let line = match settings.text("serialPort").filter(|path| !path.is_empty()) {
        Some(path) => Line::Serial {
            path,
            baud: settings.parsed("baudRate", "number")?.unwrap_or(9600),
            data_bits: settings.word("dataBits", &["8", "7"])?.parse().unwrap_or(8),
            parity: settings.word("parity", &["none", "even", "odd"])?,
            stop_bits: settings.word("stopBits", &["1", "2"])?.parse().unwrap_or(1),
        },
        None => Line::Tcp {
            host: settings.required("ip")?,
            port: settings.parsed("port", "port")?.unwrap_or(502),
        },
    };
    Ok((line, station))
}

/// One connection.
pub(crate) struct Bus {
    line: Line,
    context: Option<Context>,
}

impl Bus {
    pub(crate) fn new(line: Line) -> Self {
        Self { line, context: None }
    }

    /// Connects, if that is not done already.
    pub(crate) async fn connect(&mut self, timeout: Duration) -> Result<&mut Context, Fault> {
        if self.context.is_none() {
            let open = open(&self.line);
            let context = tokio::time::timeout(timeout.max(Duration::from_secs(3)), open).await;
            self.context =
                Some(context.map_err(|_| Fault::Silent(timeout))?.map_err(Fault::Broken)?);
        }
        Ok(self.context.as_mut().expect("just set"))
    }

    /// Reads one range; bits come as words 0 and 1.
    pub(crate) async fn read(
        &mut self,
        station: Station,
        request: &Request,
    ) -> Result<Vec<u16>, Fault> {
        let Range { table, offset, len } = request.range;
        let context = self.connect(station.timeout).await?;
        context.set_slave(Slave(station.slave));
        let bits = |answer: Result<Result<Vec<bool>, ExceptionCode>, tokio_modbus::Error>| {
            answer.map(|answer| answer.map(|bits| bits.into_iter().map(u16::from).collect()))
        };
        let call = async {
            match table {
                Table::Coils => bits(context.read_coils(offset, len).await),
                Table::Discrete => bits(context.read_discrete_inputs(offset, len).await),
                Table::Input => context.read_input_registers(offset, len).await,
                Table::Holding => context.read_holding_registers(offset, len).await,
            }
        };
        let answer = tokio::time::timeout(station.timeout, call).await;
        self.settle(answer, station)
    }

    /// Writes one range; bits are words 0 and 1.
    pub(crate) async fn write(
        &mut self,
        station: Station,
        range: Range,
        words: &[u16],
    ) -> Result<(), Fault> {
        let context = self.connect(station.timeout).await?;
        context.set_slave(Slave(station.slave));
        let call = async {
            match (range.table, words) {
                (Table::Coils, [word, ..]) => {
                    context.write_single_coil(range.offset, *word != 0).await
                }
                // The older request, which every device knows.
                (_, [word]) => context.write_single_register(range.offset, *word).await,
                (_, words) => context.write_multiple_registers(range.offset, words).await,
            }
        };
        let answer = tokio::time::timeout(station.timeout, call).await;
        self.settle(answer, station)
    }

    fn settle<T>(
        &mut self,
        answer: Result<
            Result<Result<T, ExceptionCode>, tokio_modbus::Error>,
            tokio::time::error::Elapsed,
        >,
        station: Station,
    ) -> Result<T, Fault> {
        let fault = match answer {
            Ok(Ok(Ok(value))) => return Ok(value),
            Ok(Ok(Err(
                code @ (ExceptionCode::GatewayPathUnavailable | ExceptionCode::GatewayTargetDevice),
            ))) => return Err(Fault::Unreachable(code)),
            Ok(Ok(Err(code))) => return Err(Fault::Refused(code)),
            Ok(Err(tokio_modbus::Error::Transport(error))) => Fault::Broken(error),
            Ok(Err(tokio_modbus::Error::Protocol(error))) => {
                Fault::Broken(io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
            }
            Err(_) => Fault::Silent(station.timeout),
        };
        self.context = None;
        Err(fault)
    }
}

async fn open(line: &Line) -> io::Result<Context> {
    match line {
        Line::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await?;
            stream.set_nodelay(true)?;
            Ok(tcp::attach(stream))
        }
        Line::Serial { path, baud, data_bits, parity, stop_bits } => {
            let port = SerialPort::open(path, |mut settings: serial2_tokio::Settings| {
                settings.set_raw();
                settings.set_baud_rate(*baud)?;
                settings.set_char_size(if *data_bits == 7 {
                    CharSize::Bits7
                } else {
                    CharSize::Bits8
                });
                settings.set_parity(match *parity {
                    "even" => Parity::Even,
                    "odd" => Parity::Odd,
                    _ => Parity::None,
                });
                settings.set_stop_bits(if *stop_bits == 2 { StopBits::Two } else { StopBits::One });
                settings.set_flow_control(FlowControl::None);
                Ok(settings)
            })?;
            port.discard_buffers()?;
            Ok(rtu::attach(port))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_on_one_line_have_the_same_line_and_their_own_number() {
        let parse =
            |json: serde_json::Value| parse(&Settings::new(json.as_object().cloned().unwrap()));
        let (one, first) =
            parse(serde_json::json!({"ip": "10.4.0.21", "port": "502", "slaveID": 3})).unwrap();
        let (two, second) = parse(serde_json::json!({"ip": "10.4.0.21", "slaveID": "4"})).unwrap();
        assert_eq!(one, two);
        assert_eq!((first.slave, second.slave), (3, 4));
        let (serial, _) = parse(
            serde_json::json!({"serialPort": "/dev/ttyS0", "baudRate": "19200", "parity": "Even"}),
        )
        .unwrap();
        assert_eq!(
            serial,
            Line::Serial {
                path: "/dev/ttyS0".to_owned(),
                baud: 19_200,
                data_bits: 8,
                parity: "even",
                stop_bits: 1
            }
        );
        assert!(parse(serde_json::json!({})).is_err());
        assert!(parse(serde_json::json!({"ip": "x", "port": 70_000})).is_err());
    }
}
