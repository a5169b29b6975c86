//! One connection to a broker in either version of MQTT: the same few words to it and from it.
//!
//! The library has a client of its own for each version; nobody but [`super`] needs to know which one it is.

use super::{
    BusConfig, CONNECT_TIMEOUT_S, INFLIGHT_MAX, KEEP_ALIVE, PACKET_LEN_MAX, REQUESTS_MAX, Received,
    Version,
};
use rumqttc::v5::mqttbytes::v5 as packets5;
use rumqttc::{NetworkOptions, Packet, SubscribeFilter, Transport, v5};
use std::fmt::Display;

/// How long a broker keeps the session of MQTT 5 for a node that is away, in seconds: 30 days. With 3.1.1 the broker
/// decides.
const SESSION_EXPIRY_S: u32 = 30 * 86_400;

/// Says things to a broker.
pub(super) enum Speaker {
    V3(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

/// Hears what a broker says, and keeps the connection.
pub(super) enum Listener {
    V3(rumqttc::EventLoop),
    V5(v5::EventLoop),
}

/// What a broker said.
#[derive(Debug)]
pub(super) enum Heard {
    Connected {
        session_present: bool,
    },
    /// It has the oldest message that it had not acknowledged; a broker of MQTT 5 may say that it does not want it.
    Acknowledged {
        refused: Option<String>,
    },
    Message(Received),
    /// Topics that it does not let us follow.
    NotFollowed(String),
    Other,
}

/// Makes both ends; nothing is dialled before the first [`Listener::next`].
pub(super) fn connection(config: &BusConfig, name: &str) -> (Speaker, Listener) {
    let mut network = NetworkOptions::new();
    network.set_connection_timeout(CONNECT_TIMEOUT_S);
    network.set_tcp_nodelay(true);
    // With TLS the library talks to our own end of it.
    let (host, port, transport) = match &config.tls {
        Some(tls) => (tls.socket.to_string_lossy().into_owned(), 0, Transport::unix()),
        None => (config.host.clone(), config.port, Transport::tcp()),
    };
    match config.version {
        Version::V3 => {
            let mut options = rumqttc::MqttOptions::new(name, host, port);
            options.set_keep_alive(KEEP_ALIVE);
            options.set_clean_session(config.clean_session);
            options.set_max_packet_size(PACKET_LEN_MAX, PACKET_LEN_MAX);
            options.set_inflight(INFLIGHT_MAX);
            options.set_transport(transport);
            if let Some((user, password)) = &config.login {
                options.set_credentials(user, password);
            }
            let (client, mut events) = rumqttc::AsyncClient::new(options, REQUESTS_MAX);
            events.set_network_options(network);
            (Speaker::V3(client), Listener::V3(events))
        }
        Version::V5 => {
            let mut options = v5::MqttOptions::new(name, host, port);
            options.set_keep_alive(KEEP_ALIVE);
            options.set_clean_start(config.clean_session);
            let expiry = (!config.clean_session).then_some(SESSION_EXPIRY_S);
            options.set_session_expiry_interval(expiry);
            options.set_max_packet_size(u32::try_from(PACKET_LEN_MAX).ok());
            options.set_receive_maximum(Some(INFLIGHT_MAX));
            options.set_outgoing_inflight_upper_limit(INFLIGHT_MAX);
            options.set_connection_timeout(CONNECT_TIMEOUT_S);
            options.set_network_options(network);
            options.set_transport(transport);
            if let Some((user, password)) = &config.login {
                options.set_credentials(user, password);
            }
            let (client, events) = v5::AsyncClient::new(options, REQUESTS_MAX);
            (Speaker::V5(client), Listener::V5(events))
        }
    }
}

impl Speaker {
    /// Gives a message to the library, to be acknowledged.
    pub(super) async fn publish(&self, topic: &str, payload: Vec<u8>) -> Result<(), String> {
        match self {
            Self::V3(client) => {
                client.publish(topic, rumqttc::QoS::AtLeastOnce, false, payload).await.map_err(text)
            }
            Self::V5(client) => {
                let qos = v5::mqttbytes::QoS::AtLeastOnce;
                client.publish(topic, qos, false, payload).await.map_err(text)
            }
        }
    }

    /// Asks for topics.
    pub(super) async fn follow(&self, topics: &[String]) -> Result<(), String> {
        match self {
            Self::V3(client) => {
                let qos = rumqttc::QoS::AtLeastOnce;
                let filters = topics.iter().map(|topic| SubscribeFilter::new(topic.clone(), qos));
                client.subscribe_many(filters).await.map_err(text)
            }
            Self::V5(client) => {
                let qos = v5::mqttbytes::QoS::AtLeastOnce;
                let filters = topics.iter().map(|topic| packets5::Filter::new(topic.clone(), qos));
                client.subscribe_many(filters).await.map_err(text)
            }
        }
    }

    /// Asks for a topic no more.
    pub(super) async fn leave(&self, topic: &str) -> Result<(), String> {
        match self {
            Self::V3(client) => client.unsubscribe(topic).await.map_err(text),
            Self::V5(client) => client.unsubscribe(topic).await.map_err(text),
        }
    }
}

impl Listener {
    /// Waits for the next word; dials when there is no connection. After an error the next call dials again.
    pub(super) async fn next(&mut self) -> Result<Heard, String> {
        match self {
            Self::V3(events) => Ok(match events.poll().await.map_err(text)? {
                rumqttc::Event::Incoming(Packet::ConnAck(ack)) => {
                    Heard::Connected { session_present: ack.session_present }
                }
                rumqttc::Event::Incoming(Packet::PubAck(_)) => {
                    Heard::Acknowledged { refused: None }
                }
                rumqttc::Event::Incoming(Packet::Publish(message)) => Heard::Message(Received {
                    topic: message.topic,
                    payload: message.payload.to_vec(),
                }),
                rumqttc::Event::Incoming(Packet::SubAck(ack)) => {
                    let refused = rumqttc::SubscribeReasonCode::Failure;
                    followed(ack.return_codes.iter().filter(|code| **code == refused).count())
                }
                _ => Heard::Other,
            }),
            Self::V5(events) => Ok(match events.poll().await.map_err(text)? {
                v5::Event::Incoming(packets5::Packet::ConnAck(ack)) => {
                    Heard::Connected { session_present: ack.session_present }
                }
                v5::Event::Incoming(packets5::Packet::PubAck(ack)) => {
                    use packets5::PubAckReason::{NoMatchingSubscribers, Success};
                    let taken = matches!(ack.reason, Success | NoMatchingSubscribers);
                    let refused = (!taken).then(|| format!("{:?}", ack.reason));
                    Heard::Acknowledged { refused }
                }
                v5::Event::Incoming(packets5::Packet::Publish(message)) => {
                    Heard::Message(Received {
                        topic: String::from_utf8_lossy(&message.topic).into_owned(),
                        payload: message.payload.to_vec(),
                    })
                }
                v5::Event::Incoming(packets5::Packet::SubAck(ack)) => {
                    let taken =
                        |code: &_| matches!(code, packets5::SubscribeReasonCode::Success(_));
                    followed(ack.return_codes.iter().filter(|code| !taken(code)).count())
                }
                _ => Heard::Other,
            }),
        }
    }
}

fn followed(refused: usize) -> Heard {
    match refused {
        0 => Heard::Other,
        count => Heard::NotFollowed(format!("{count} topics")),
    }
}

fn text(error: impl Display) -> String {
    error.to_string()
}
