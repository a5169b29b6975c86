//! One device's connection to the broker.
//!
//! [`Link::open`] returns once the broker has taken the subscriptions; a task then turns messages into
//! updates until the connection breaks, and says so. The core opens the device again.

use std::sync::Arc;
use std::time::Duration;

use rumqttc::{
    AsyncClient, Event, EventLoop, MqttOptions, Packet, QoS, SubscribeFilter, SubscribeReasonCode,
};
use skerry_mapper::{Device, DriverError, Settings, Updates};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::topic::{Heard, PAYLOAD_MAX, Topics};

/// Requests that may wait for the connection.
const REQUESTS_MAX: usize = 64;
/// Time until the broker has to have acknowledged something.
const ACK_TIMEOUT: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Subscriptions in one packet.
const FILTERS_MAX: usize = 100;

/// A live connection; ends when it is dropped.
pub(crate) struct Link {
    client: AsyncClient,
    /// Publishes that the broker has acknowledged.
    acknowledged: watch::Receiver<u64>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Connects and subscribes.
    ///
    /// # Errors
    ///
    /// [`DriverError::Lost`] if the broker cannot be reached or refuses; [`DriverError::Refused`] for
    /// wrong settings.
    pub(crate) async fn open(
        device: &Device,
        topics: Arc<Topics>,
        updates: Updates,
    ) -> Result<Self, DriverError> {
        let (client, mut events) = AsyncClient::new(options(device)?, REQUESTS_MAX);
        let filters: Vec<_> = topics
            .heard()
            .map(|topic| SubscribeFilter::new(topic.to_owned(), QoS::AtLeastOnce))
            .collect();
        let ready = ready(&client, &mut events, filters, &topics, &updates);
        match tokio::time::timeout(ACK_TIMEOUT, ready).await {
            Ok(result) => result.map_err(DriverError::Lost)?,
            Err(_) => return Err(DriverError::Lost("the broker does not answer".to_owned())),
        }
        let (acks, acknowledged) = watch::channel(0);
        let task = tokio::spawn(async move {
            loop {
                match events.poll().await {
                    Ok(event) => {
                        if let Event::Incoming(Packet::PubAck(_)) = event {
                            acks.send_modify(|count| *count += 1);
                        }
                        hear(&event, &topics, &updates);
                    }
                    Err(error) => {
                        updates.lost(&format!("the connection to the broker broke: {error}"));
                        return;
                    }
                }
            }
        });
        Ok(Self { client, acknowledged, task })
    }

    /// Publishes, and returns once the broker has acknowledged it.
    ///
    /// # Errors
    ///
    /// [`DriverError::Lost`] if it does not.
    pub(crate) async fn publish(
        &mut self,
        topic: String,
        payload: Vec<u8>,
        retain: bool,
    ) -> Result<(), DriverError> {
        let lost = |why: &str| DriverError::Lost(why.to_owned());
        self.acknowledged.mark_unchanged();
        // One publish is under way at a time, so the next acknowledgement is for it.
        let before = *self.acknowledged.borrow();
        self.client
            .try_publish(topic, QoS::AtLeastOnce, retain, payload)
            .map_err(|error| lost(&format!("could not publish: {error}")))?;
        let acknowledged = self.acknowledged.wait_for(|count| *count > before);
        match tokio::time::timeout(ACK_TIMEOUT, acknowledged).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(lost("the connection to the broker broke")),
            Err(_) => Err(lost("the broker does not acknowledge")),
        }
    }
}

/// Waits until the broker has taken the connection and all subscriptions.
async fn ready(
    client: &AsyncClient,
    events: &mut EventLoop,
    filters: Vec<SubscribeFilter>,
    topics: &Topics,
    updates: &Updates,
) -> Result<(), String> {
    let mut missing = filters.chunks(FILTERS_MAX).len();
    let mut connected = false;
    let mut chunks = filters.chunks(FILTERS_MAX).map(<[_]>::to_vec);
    while missing > 0 || !connected {
        let event = events.poll().await.map_err(|error| error.to_string())?;
        let next = match &event {
            Event::Incoming(Packet::ConnAck(_)) => {
                connected = true;
                true
            }
            Event::Incoming(Packet::SubAck(ack)) => {
                if ack.return_codes.contains(&SubscribeReasonCode::Failure) {
                    return Err("the broker refuses a subscription".to_owned());
                }
                missing -= 1;
                true
            }
            _ => false,
        };
        if next && let Some(chunk) = chunks.next() {
            client.try_subscribe_many(chunk).map_err(|error| error.to_string())?;
        }
        hear(&event, topics, updates);
    }
    Ok(())
}

fn hear(event: &Event, topics: &Topics, updates: &Updates) {
    let Event::Incoming(Packet::Publish(message)) = event else { return };
    match topics.handle(&message.topic, &message.payload) {
        Heard::Values(values) => {
            values.into_iter().for_each(|(property, value)| updates.push(&property, value));
        }
        Heard::Present(present) => updates.present(present),
    }
}

fn options(device: &Device) -> Result<MqttOptions, DriverError> {
    let settings: &Settings = &device.settings;
    let host = settings.text("host").unwrap_or_else(|| "127.0.0.1".to_owned());
    let port = settings.parsed::<u16>("port", "port")?.unwrap_or(1883);
    let id = settings.text("clientID").unwrap_or_else(|| format!("skerry-{}", device.id));
    let mut options = MqttOptions::new(id, host, port);
    options.set_keep_alive(KEEP_ALIVE);
    // The packet's head and topic beside the payload.
    options.set_max_packet_size(PAYLOAD_MAX + 2048, PAYLOAD_MAX + 2048);
    if let Some(user) = settings.text("username") {
        let password = match settings.text("passwordEnv") {
            None => String::new(),
            Some(variable) => std::env::var(&variable).map_err(|_| {
                DriverError::Refused(format!(
                    "setting `passwordEnv`: `{variable}` is not set in the environment"
                ))
            })?,
        };
        options.set_credentials(user, password);
    }
    Ok(options)
}
