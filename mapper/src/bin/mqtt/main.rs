//! `skerry-mapper-mqtt`: devices that publish JSON or text on MQTT topics.
//!
//! Settings of a device (`spec.protocol.configData`): `host` (127.0.0.1), `port` (1883), `username`
//! (the password is read from the environment variable that `passwordEnv` names), `clientID`,
//! `availabilityTopic` with `online` (`online`): any other payload there means that the device is
//! away. Settings of a property: see [`topic`].
//!
//! Each device has a connection of its own with a clean session; retained messages give the first
//! values. TLS is not supported: use a broker on loopback with a bridge.

mod link;
mod topic;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;

use skerry_mapper::{Device, Driver, DriverError, Property, Protocol, Updates, Value};

use link::Link;
use topic::Topics;

fn main() -> ExitCode {
    skerry_mapper::main("skerry-mapper-mqtt", "Connects devices on MQTT to EdgeCore", Mqtt)
}

struct Mqtt;

struct Publisher {
    link: Link,
    topics: Arc<Topics>,
    pushed: BTreeSet<String>,
}

impl Protocol for Mqtt {
    type Driver = Publisher;

    async fn open(&self, device: Arc<Device>, updates: Updates) -> Result<Publisher, DriverError> {
        let topics = Arc::new(Topics::parse(&device)?);
        let link = Link::open(&device, topics.clone(), updates.clone()).await?;
        for (property, why) in topics.faults() {
            updates.push(property, Err(DriverError::Refused(why.clone())));
        }
        let pushed = device.properties.iter().map(|property| property.name.clone()).collect();
        Ok(Publisher { link, topics, pushed })
    }
}

impl Driver for Publisher {
    async fn read(&mut self, properties: &[&Property]) -> Vec<Result<Value, DriverError>> {
        let refused = || Err(DriverError::Refused("a topic cannot be read".to_owned()));
        properties.iter().map(|_| refused()).collect()
    }

    async fn write(&mut self, property: &Property, value: &Value) -> Result<(), DriverError> {
        let (topic, payload, retain) = self.topics.command(property, value)?;
        self.link.publish(topic, payload, retain).await
    }

    fn pushed(&self) -> BTreeSet<String> {
        self.pushed.clone()
    }
}
