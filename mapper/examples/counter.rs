//! The smallest mapper: copy this file, then put your protocol where the counter is.
//!
//! A device counts up from its setting `start`; the property `count` reads it, and writing sets it.
//! Try it without a node: run `dmi-listen /tmp/dmi.sock`, then this with a configuration as in
//! `docs/mappers.md`.

use std::process::ExitCode;
use std::sync::Arc;

use skerry_mapper::{Device, Driver, DriverError, Property, Protocol, Updates, Value};

/// The protocol: makes a driver per device. What devices share (a bus, a session) lives here.
struct Counters;

/// One open device.
struct Counter {
    next: i64,
}

impl Protocol for Counters {
    type Driver = Counter;

    async fn open(&self, device: Arc<Device>, _: Updates) -> Result<Counter, DriverError> {
        // Settings are those of `spec.protocol.configData`; a wrong one is an error that names it.
        let start = device.settings.parsed::<i64>("start", "whole number")?.unwrap_or(0);
        // Here a real driver connects, and says `DriverError::Lost` when it cannot.
        Ok(Counter { next: start })
    }
}

impl Driver for Counter {
    async fn read(&mut self, properties: &[&Property]) -> Vec<Result<Value, DriverError>> {
        let mut value = |property: &&Property| match property.name.as_str() {
            "count" => {
                self.next += 1;
                Ok(Value::Integer(self.next))
            }
            // Spoils this property and no other.
            other => Err(DriverError::Refused(format!("a counter has no `{other}`"))),
        };
        properties.iter().map(&mut value).collect()
    }

    async fn write(&mut self, _: &Property, value: &Value) -> Result<(), DriverError> {
        match value {
            Value::Integer(count) => self.next = *count,
            other => return Err(DriverError::Refused(format!("cannot count from `{other}`"))),
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    skerry_mapper::main("counter", "Counts", Counters)
}
