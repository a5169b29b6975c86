//! What the author of a mapper writes: how to open, read, write, and be told by a device.
//!
//! [`Protocol`] makes a [`Driver`] per device. Drivers never see cycles, retries, EdgeCore or other
//! devices. Each has a task of its own, one order at a time, and every order has a deadline: a driver
//! that hangs costs nothing but its own device.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};

use crate::core::{DriverError, Input};
use crate::device::{Device, Property};
use crate::value::Value;

/// Longest time that one order (opening, reading, writing) may take.
pub const ORDER_TIMEOUT: Duration = Duration::from_secs(30);

/// A protocol: how devices are opened.
pub trait Protocol: Send + Sync + 'static {
    /// What speaks to one device.
    type Driver: Driver;

    /// Connects to a device. `updates` is for drivers whose device speaks by itself; others drop it.
    ///
    /// # Errors
    ///
    /// Any [`DriverError`]; opening is tried again, after 1 s, later after up to 60 s.
    fn open(
        &self,
        device: Arc<Device>,
        updates: Updates,
    ) -> impl Future<Output = Result<Self::Driver, DriverError>> + Send;
}

/// One open device.
pub trait Driver: Send + 'static {
    /// Reads the values of `properties`, in one go where the protocol can.
    ///
    /// The answer has one entry per property, in the same order. [`DriverError::Lost`] anywhere in it
    /// means that the device is gone: it is opened again.
    fn read(
        &mut self,
        properties: &[&Property],
    ) -> impl Future<Output = Vec<Result<Value, DriverError>>> + Send;

    /// Writes a property; the value has the property's type and is in its range.
    ///
    /// # Errors
    ///
    /// [`DriverError::Refused`] is tried again, [`DriverError::Lost`] opens the device again.
    fn write(
        &mut self,
        property: &Property,
        value: &Value,
    ) -> impl Future<Output = Result<(), DriverError>> + Send;

    /// Names of properties that come through [`Updates`] and are never read. None, unless overridden.
    fn pushed(&self) -> BTreeSet<String> {
        BTreeSet::new()
    }

    /// Takes a device whose desired values or cycles changed; settings and properties are the same.
    fn change(&mut self, device: Arc<Device>) {
        let _ = device;
    }
}

/// The way by which a device that speaks by itself is heard. Keeps the newest value of each
/// property, so that a device that speaks too fast costs no memory and never waits.
#[derive(Debug, Clone)]
pub struct Updates {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    names: BTreeSet<String>,
    newest: Mutex<Newest>,
    news: Notify,
}

/// What was said since the last look.
#[derive(Debug, Default, PartialEq)]
struct Newest {
    values: BTreeMap<String, Result<Value, DriverError>>,
    present: Option<bool>,
}

impl Updates {
    fn new(device: &Device) -> Self {
        let names = device.properties.iter().map(|property| property.name.clone()).collect();
        let shared = Shared { names, newest: Mutex::default(), news: Notify::new() };
        Self { shared: Arc::new(shared) }
    }

    /// Tells a property's new value, or why there is none; [`DriverError::Lost`] opens the device again.
    /// A property that the device does not have is left out.
    pub fn push(&self, property: &str, value: Result<Value, DriverError>) {
        if !self.shared.names.contains(property) {
            return;
        }
        self.say(|newest| drop(newest.values.insert(property.to_owned(), value)));
    }

    /// Tells that the device has left, or is back, as it says itself. The driver stays open.
    pub fn present(&self, present: bool) {
        self.say(|newest| newest.present = Some(present));
    }

    /// Tells that the device is gone.
    pub fn lost(&self, why: &str) {
        if let Some(first) = self.shared.names.first() {
            self.push(first, Err(DriverError::Lost(why.to_owned())));
        }
    }

    fn say(&self, change: impl FnOnce(&mut Newest)) {
        let mut newest = self.shared.newest.lock().unwrap_or_else(|broken| broken.into_inner());
        change(&mut newest);
        drop(newest);
        self.shared.news.notify_one();
    }

    fn take(&self) -> Newest {
        let mut newest = self.shared.newest.lock().unwrap_or_else(|broken| broken.into_inner());
        std::mem::take(&mut newest)
    }

    async fn next(&self) -> Newest {
        loop {
            let news = self.shared.news.notified();
            let newest = self.take();
            if newest != Newest::default() {
                return newest;
            }
            news.await;
        }
    }
}

/// An order for an open driver.
#[derive(Debug)]
pub(crate) enum Order {
    Read { properties: Vec<String> },
    Write { property: String, value: Value, desired: String },
    Change { device: Arc<Device> },
}

/// Opens a device, then follows orders until the sender is dropped. Answers go to `answers`.
pub(crate) async fn drive<P: Protocol>(
    protocol: Arc<P>,
    mut device: Arc<Device>,
    generation: u64,
    mut orders: mpsc::Receiver<Order>,
    answers: mpsc::Sender<Input>,
) {
    let id = device.id.clone();
    let updates = Updates::new(&device);
    let open = protocol.open(device.clone(), updates.clone());
    let opened = tokio::select! {
        // Nobody wants the device any more.
        () = orders_closed(&mut orders, &mut device) => return,
        opened = tokio::time::timeout(ORDER_TIMEOUT, open) => opened.unwrap_or_else(|_| Err(hung())),
    };
    let (mut driver, result) = match opened {
        Ok(driver) => {
            let pushed = driver.pushed();
            (Some(driver), Ok(pushed))
        }
        Err(error) => (None, Err(error)),
    };
    if answers.send(Input::Opened { device: id.clone(), generation, result }).await.is_err() {
        return;
    }
    let Some(driver) = driver.as_mut() else { return };
    driver.change(device.clone());
    loop {
        let answer = tokio::select! {
            biased;
            order = orders.recv() => match order {
                None => return,
                Some(Order::Change { device: changed }) => {
                    device = changed;
                    driver.change(device.clone());
                    continue;
                }
                Some(Order::Read { properties }) => {
                    let values = read(driver, &device, properties).await;
                    Input::Read { device: id.clone(), generation, values }
                }
                Some(Order::Write { property, value, desired }) => {
                    let result = write(driver, &device, &property, &value).await;
                    Input::Wrote { device: id.clone(), generation, property, desired, result }
                }
            },
            Newest { values, present } = updates.next() => {
                Input::Pushed { device: id.clone(), generation, values, present }
            }
        };
        if answers.send(answer).await.is_err() {
            return;
        }
    }
}

/// Waits until nobody can give orders; changes that come meanwhile are kept.
async fn orders_closed(orders: &mut mpsc::Receiver<Order>, device: &mut Arc<Device>) {
    while let Some(order) = orders.recv().await {
        if let Order::Change { device: changed } = order {
            *device = changed;
        }
    }
}

async fn read(
    driver: &mut impl Driver,
    device: &Device,
    names: Vec<String>,
) -> Vec<(String, Result<Value, DriverError>)> {
    let properties: Vec<&Property> =
        names.iter().filter_map(|name| device.property(name)).collect();
    let values = match tokio::time::timeout(ORDER_TIMEOUT, driver.read(&properties)).await {
        Ok(values) => values,
        Err(_) => return names.into_iter().map(|name| (name, Err(hung()))).collect(),
    };
    let missing = || Err(DriverError::Refused("the driver gave no answer".to_owned()));
    let mut values = values.into_iter();
    properties
        .iter()
        .map(|property| (property.name.clone(), values.next().unwrap_or_else(missing)))
        .collect()
}

async fn write(
    driver: &mut impl Driver,
    device: &Device,
    name: &str,
    value: &Value,
) -> Result<(), DriverError> {
    let Some(property) = device.property(name) else {
        return Err(DriverError::Refused("the property is gone".to_owned()));
    };
    let write = driver.write(property, value);
    tokio::time::timeout(ORDER_TIMEOUT, write).await.unwrap_or_else(|_| Err(hung()))
}

fn hung() -> DriverError {
    DriverError::Lost(format!("no answer within {} s", ORDER_TIMEOUT.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_dmi::v1beta1 as dmi;

    #[tokio::test]
    async fn a_device_that_speaks_too_fast_leaves_only_the_newest_value() {
        let property =
            |name: &str| dmi::DeviceProperty { name: name.to_owned(), ..Default::default() };
        let spec = dmi::DeviceSpec {
            properties: vec![property("a"), property("b")],
            ..Default::default()
        };
        let device = Device::parse(
            &dmi::Device { spec: Some(spec), ..Default::default() },
            &dmi::DeviceModel::default(),
        );
        let updates = Updates::new(&device);
        for count in 0..100_000 {
            updates.push("a", Ok(Value::Integer(count)));
            updates.push(&format!("unknown-{count}"), Ok(Value::Integer(count)));
        }
        updates.push("b", Ok(Value::Boolean(true)));
        let values = updates.next().await.values;
        let expected = [("a", Value::Integer(99_999)), ("b", Value::Boolean(true))];
        let expected: BTreeMap<_, _> =
            expected.into_iter().map(|(name, value)| (name.to_owned(), Ok(value))).collect();
        assert_eq!(values, expected);
    }
}
