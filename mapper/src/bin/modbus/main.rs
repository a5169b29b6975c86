//! `skerry-mapper-modbus`: devices on Modbus TCP and Modbus RTU.
//!
//! Settings of a device (`spec.protocol.configData`): `ip` and `port` (502), or `serialPort`,
//! `baudRate` (9600), `dataBits` (8), `parity` (none, even, odd) and `stopBits` (1); then `slaveID` (1)
//! and `timeoutMs` (1000). Settings of a property: see [`register`]. Names are those of KubeEdge's
//! Modbus mapper, so that its devices work.
//!
//! Devices behind one address or on one line share one connection and take turns; registers that lie
//! beside each other are read with one request.

mod bus;
mod plan;
mod register;

use std::collections::{BTreeMap, HashMap};
use std::process::ExitCode;
use std::sync::{Arc, Mutex as SyncMutex, Weak};

use skerry_mapper::{Device, Driver, DriverError, Property, Protocol, Updates, Value};
use tokio::sync::Mutex;

use bus::{Bus, Fault, Line, Station};
use plan::{Request, plan};
use register::Register;

fn main() -> ExitCode {
    skerry_mapper::main(
        "skerry-mapper-modbus",
        "Connects Modbus devices to EdgeCore",
        Modbus::default(),
    )
}

/// All lines that are open.
#[derive(Default)]
struct Modbus {
    lines: SyncMutex<HashMap<Line, Weak<Mutex<Bus>>>>,
}

struct Slave {
    bus: Arc<Mutex<Bus>>,
    station: Station,
    registers: BTreeMap<String, Result<Register, String>>,
    /// Whether requests for several properties are refused by this device, which then gets one each.
    one_by_one: bool,
}

impl Modbus {
    fn bus(&self, line: &Line) -> Arc<Mutex<Bus>> {
        let mut lines = self.lines.lock().unwrap_or_else(|broken| broken.into_inner());
        if let Some(bus) = lines.get(line).and_then(Weak::upgrade) {
            return bus;
        }
        lines.retain(|_, bus| bus.strong_count() > 0);
        let bus = Arc::new(Mutex::new(Bus::new(line.clone())));
        lines.insert(line.clone(), Arc::downgrade(&bus));
        bus
    }
}

impl Protocol for Modbus {
    type Driver = Slave;

    async fn open(&self, device: Arc<Device>, _: Updates) -> Result<Slave, DriverError> {
        let (line, station) = bus::parse(&device.settings)?;
        let register = |property: &Property| {
            let register = Register::parse(property).map_err(|error| error.to_string());
            (property.name.clone(), register)
        };
        let registers = device.properties.iter().map(register).collect();
        let bus = self.bus(&line);
        bus.lock().await.connect(station.timeout).await.map_err(lost)?;
        Ok(Slave { bus, station, registers, one_by_one: false })
    }
}

fn lost(fault: Fault) -> DriverError {
    DriverError::Lost(fault.to_string())
}

impl Slave {
    /// Runs requests until one finds the line dead; returns each property's words or fault.
    async fn ask(
        &mut self,
        requests: Vec<Request>,
    ) -> BTreeMap<usize, Result<Vec<u16>, DriverError>> {
        let mut answers = BTreeMap::new();
        let mut bus = self.bus.lock().await;
        let mut dead = None;
        for request in requests {
            let answer = match &dead {
                Some(error) => Err(DriverError::clone(error)),
                None => bus.read(self.station, &request).await.map_err(|fault| match fault {
                    Fault::Refused(_) => DriverError::Refused(fault.to_string()),
                    other => lost(other),
                }),
            };
            if let Err(error @ DriverError::Lost(_)) = &answer {
                dead = Some(error.clone());
            }
            for part in &request.parts {
                let words = answer.as_ref().map_err(Clone::clone).map(|words| {
                    let end = (part.at + part.len).min(words.len());
                    words[part.at.min(end)..end].to_vec()
                });
                answers.insert(part.index, words);
            }
        }
        answers
    }
}

impl Driver for Slave {
    async fn read(&mut self, properties: &[&Property]) -> Vec<Result<Value, DriverError>> {
        let registers: Vec<Result<Register, DriverError>> = properties
            .iter()
            .map(|property| match self.registers.get(&property.name) {
                Some(Ok(register)) => Ok(register.clone()),
                Some(Err(why)) => Err(DriverError::Refused(why.clone())),
                None => Err(DriverError::Refused("the property has no register".to_owned())),
            })
            .collect();
        let wanted: Vec<_> = registers
            .iter()
            .enumerate()
            .filter_map(|(index, register)| Some((index, register.as_ref().ok()?.range())))
            .collect();
        let requests = plan(&wanted, !self.one_by_one);
        let joined = requests.iter().any(|request| request.parts.len() > 1);
        let mut answers = self.ask(requests).await;
        let refused = |answers: &BTreeMap<_, _>| {
            answers.values().any(|a| matches!(a, Err(DriverError::Refused(_))))
        };
        if joined && refused(&answers) {
            // One register that is not there refuses the whole request, or the gap between two does.
            answers = self.ask(plan(&wanted, false)).await;
            self.one_by_one = !refused(&answers);
        }
        let value = |(index, register): (usize, Result<Register, DriverError>)| {
            let words = answers.remove(&index);
            let words = words.unwrap_or_else(|| Err(DriverError::Refused("no answer".to_owned())));
            register?.decode(&words?).map_err(DriverError::Refused)
        };
        registers.into_iter().enumerate().map(value).collect()
    }

    async fn write(&mut self, property: &Property, value: &Value) -> Result<(), DriverError> {
        let register = match self.registers.get(&property.name) {
            Some(Ok(register)) => register.clone(),
            Some(Err(why)) => return Err(DriverError::Refused(why.clone())),
            None => return Err(DriverError::Refused("the property has no register".to_owned())),
        };
        let words = register.encode(value).map_err(DriverError::Refused)?;
        let mut bus = self.bus.lock().await;
        bus.write(self.station, register.range(), &words).await.map_err(|fault| match fault {
            Fault::Refused(_) => DriverError::Refused(fault.to_string()),
            other => lost(other),
        })
    }
}
