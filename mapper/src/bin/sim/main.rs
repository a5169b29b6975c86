//! `skerry-mapper-sim`: devices that are not there, with the faults that real ones have.
//!
//! Every property is a signal given by its visitors; [`signal`] says which settings there are. The
//! same seed gives the same values at the same times since the device was opened.

mod signal;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skerry_mapper::{Device, Driver, DriverError, Property, Protocol, Updates, Value};

use signal::{Outage, Signal};

fn main() -> ExitCode {
    skerry_mapper::main(
        "skerry-mapper-sim",
        "Simulates devices with drift, noise, stuck values, lost reads and outages",
        Simulator,
    )
}

struct Simulator;

struct Simulated {
    opened: Instant,
    outage: Outage,
    signals: BTreeMap<String, Result<Signal, String>>,
}

impl Protocol for Simulator {
    type Driver = Simulated;

    async fn open(&self, device: Arc<Device>, _: Updates) -> Result<Simulated, DriverError> {
        let seed = device.settings.parsed::<u64>("seed", "whole number")?.unwrap_or_default();
        let outage = Outage::parse(&device.settings)?;
        let signal = |property: &Property| {
            let seed = seed ^ signal::hash(&format!("{}/{}", device.id, property.name));
            let signal = Signal::parse(property.kind, &property.settings, seed);
            (property.name.clone(), signal.map_err(|error| error.to_string()))
        };
        let signals = device.properties.iter().map(signal).collect();
        Ok(Simulated { opened: Instant::now(), outage, signals })
    }
}

impl Simulated {
    fn reachable(&self) -> Result<Duration, DriverError> {
        let age = self.opened.elapsed();
        if self.outage.is_at(age) {
            return Err(DriverError::Lost("simulated outage".to_owned()));
        }
        Ok(age)
    }
}

impl Driver for Simulated {
    async fn read(&mut self, properties: &[&Property]) -> Vec<Result<Value, DriverError>> {
        let age = match self.reachable() {
            Ok(age) => age,
            Err(error) => return properties.iter().map(|_| Err(error.clone())).collect(),
        };
        let value = |property: &&Property| match self.signals.get_mut(&property.name) {
            Some(Ok(signal)) => signal
                .read(age)
                .ok_or_else(|| DriverError::Refused("simulated loss of a read".to_owned())),
            Some(Err(why)) => Err(DriverError::Refused(why.clone())),
            None => Err(DriverError::Refused("the property is not simulated".to_owned())),
        };
        properties.iter().map(value).collect()
    }

    async fn write(&mut self, property: &Property, value: &Value) -> Result<(), DriverError> {
        self.reachable()?;
        match self.signals.get_mut(&property.name) {
            Some(Ok(signal)) => signal.write(value).map_err(DriverError::Refused),
            Some(Err(why)) => Err(DriverError::Refused(why.clone())),
            None => Err(DriverError::Refused("the property is not simulated".to_owned())),
        }
    }
}
