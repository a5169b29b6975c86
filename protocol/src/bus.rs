//! Data of applications, between a rule of the cloud and the buses of an edge: group `user`.
//!
//! Down, the event bus is told topics to follow and data to publish, and the service bus calls to make on the node
//! (operation: the HTTP method). Up, both give `upload`: data for a rule without a parent, the result of a call with
//! one. Nothing of this is acknowledged.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/router/provider, edge/pkg/{eventbus,servicebus}, common/types/http.go.

use crate::message::{Message, Operation};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;

/// `route.group` of all of it.
pub const GROUP: &str = "user";
/// `route.source` of what goes to the event bus.
pub const EVENT_ROUTER: &str = "router_eventbus";
/// `route.source` of what goes to the service bus.
pub const SERVICE_ROUTER: &str = "router_servicebus";
/// `route.source` of what the event bus uploads.
pub const EVENT_BUS: &str = "bus";
/// `route.source` of what the service bus uploads.
pub const SERVICE_BUS: &str = "servicebus";

/// Headers as Go writes them: each name with all of its values.
pub type Headers = BTreeMap<String, Vec<String>>;

/// The content of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Of the request.
    #[serde(default, deserialize_with = "or_default")]
    pub header: Headers,
    /// Of the request.
    #[serde(default, serialize_with = "to_base64", deserialize_with = "from_base64")]
    pub body: Vec<u8>,
    /// Such as `POST`; the same as the operation.
    #[serde(default)]
    pub method: String,
    /// Not used: port and path are in the resource.
    #[serde(default)]
    pub url: String,
}

/// The content of a call's result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallResult {
    /// Of the answer.
    #[serde(default, deserialize_with = "or_default")]
    pub header: Headers,
    /// Of the answer.
    #[serde(default)]
    pub status_code: u16,
    /// Of the answer.
    #[serde(default, serialize_with = "to_base64", deserialize_with = "from_base64")]
    pub body: Vec<u8>,
}

/// Asks the event bus to publish `text`.
pub fn publish(now_ms: i64, topic: &str, text: &str) -> Message {
    Message::new(now_ms, EVENT_ROUTER, GROUP, Operation::Publish, topic, text)
}

/// Tells the event bus that a rule wants a topic, or wants it no more.
pub fn follow(now_ms: i64, topic: &str, wanted: bool) -> Message {
    let operation = if wanted { Operation::Subscribe } else { Operation::Unsubscribe };
    Message::new(now_ms, EVENT_ROUTER, GROUP, operation, topic, &())
}

/// Tells the service bus that a rule takes calls to this URL, or takes them no more.
pub fn serve(now_ms: i64, url: &str, wanted: bool) -> Message {
    let operation = if wanted { Operation::Start } else { Operation::Stop };
    Message::new(now_ms, SERVICE_ROUTER, GROUP, operation, url, &())
}

/// Asks the service bus for a call of `http://127.0.0.1:<port><path>` on the node. `None` for a method that no message
/// can carry.
pub fn call(now_ms: i64, port: &str, path: &str, call: &Call) -> Option<Message> {
    let operation = Operation::parse(&call.method).filter(|operation| is_method(*operation))?;
    Some(Message::new(now_ms, SERVICE_ROUTER, GROUP, operation, format!("{port}:{path}"), call))
}

/// Whether an operation is an HTTP method.
pub fn is_method(operation: Operation) -> bool {
    use Operation::{HttpDelete, HttpGet, HttpHead, HttpOptions, HttpPatch, HttpPost, HttpPut};
    matches!(
        operation,
        HttpGet | HttpHead | HttpPost | HttpPut | HttpPatch | HttpDelete | HttpOptions
    )
}

/// The result of a call, as an edge gives it.
pub fn result(now_ms: i64, request: &Message, result: &CallResult) -> Message {
    let mut message = Message::new(now_ms, SERVICE_BUS, GROUP, Operation::Upload, "", result);
    message.header.parent_msg_id.clone_from(&request.header.msg_id);
    message
}

fn to_base64<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(bytes))
}

fn from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text: Option<String> = Deserialize::deserialize(deserializer)?;
    STANDARD.decode(text.unwrap_or_default()).map_err(serde::de::Error::custom)
}

/// Go writes `null` for a map that it does not have.
fn or_default<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Headers, D::Error> {
    let headers: Option<BTreeMap<String, Option<Vec<String>>>> =
        Deserialize::deserialize(deserializer)?;
    let headers = headers.unwrap_or_default();
    Ok(headers.into_iter().map(|(name, values)| (name, values.unwrap_or_default())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(mut message: Message) -> String {
        message.header.msg_id = "id".into();
        message.encode().trim_end().to_owned()
    }

    #[test]
    fn data_goes_down_as_kubeedges_router_writes_it() {
        let head = r#"{"header":{"msg_id":"id","timestamp":5},"route":"#;
        assert_eq!(
            wire(publish(5, "/lamp", "on")),
            format!(
                r#"{head}{{"source":"router_eventbus","group":"user","operation":"publish","resource":"/lamp"}},"content":"on"}}"#
            )
        );
        assert_eq!(
            wire(follow(5, "default/lamp", true)),
            format!(
                r#"{head}{{"source":"router_eventbus","group":"user","operation":"subscribe","resource":"default/lamp"}},"content":null}}"#
            )
        );
        assert_eq!(
            wire(serve(5, "http://a/b", false)),
            format!(
                r#"{head}{{"source":"router_servicebus","group":"user","operation":"stop","resource":"http://a/b"}},"content":null}}"#
            )
        );
        let header = Headers::from([("Accept".to_owned(), vec!["*/*".to_owned()])]);
        let request =
            Call { header, body: b"{}".to_vec(), method: "POST".into(), url: String::new() };
        assert_eq!(
            wire(call(5, "8080", "/a?b=c", &request).expect("a method")),
            format!(
                r#"{head}{{"source":"router_servicebus","group":"user","operation":"POST","resource":"8080:/a?b=c"}},"content":{{"header":{{"Accept":["*/*"]}},"body":"e30=","method":"POST","url":""}}}}"#
            )
        );
        assert_eq!(call(5, "1", "/", &Call { method: "upload".into(), ..Call::default() }), None);
    }

    #[test]
    fn results_are_read_as_go_writes_them() {
        let read: CallResult = serde_json::from_str(
            r#"{"header":{"A":["b"],"C":null},"status_code":204,"body":null}"#,
        )
        .expect("read");
        assert_eq!(
            (read.status_code, read.header["A"].as_slice(), read.body.len()),
            (204, &["b".to_owned()][..], 0)
        );
        let read: CallResult =
            serde_json::from_str(r#"{"header":null,"status_code":200,"body":"aGk="}"#)
                .expect("read");
        assert_eq!(read.body, b"hi");
        assert!(serde_json::from_str::<CallResult>(r#"{"body":"!"}"#).is_err());
        let mut request = publish(5, "t", "x");
        request.header.msg_id = "parent".into();
        assert_eq!(
            wire(result(6, &request, &read)),
            r#"{"header":{"msg_id":"id","parent_msg_id":"parent","timestamp":6},"route":{"source":"servicebus","group":"user","operation":"upload"},"content":{"header":{},"status_code":200,"body":"aGk="}}"#
        );
    }
}
