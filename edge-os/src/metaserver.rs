//! The node's own Kubernetes API (KubeEdge's MetaServer), for programs on this machine. Off unless the configuration
//! names an address.
//!
//! Reads ask the cloud first and fall back to the rows of this node; watches are served from rows and their changes,
//! while the cloud is asked to push what they want; writes go to the cloud alone. Without a link writes fail with a
//! clear status, reads and watches go on.
//!
//! It listens on the loopback address only, without TLS or authentication, as KubeEdge's does by default: whoever is on
//! the machine may ask. So Secrets are not served at all, which KubeEdge does.
//!
//! [`Desk`] is the part inside the agent's loop: it owns what is asked of the cloud. [`run`] is the listener.
//!
//! Source: kubeedge/kubeedge, edge/pkg/metamanager/metaserver.

mod local;
mod request;

use crate::meta_store::Store;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use local::Selection;
use request::{Asked, Query, Target, Verb};
use serde_json::{Value, json};
use skerry_edge_core::Now;
use skerry_edge_core::applications::{Answer, Applications, NOT_CONNECTED, Ticket};
use skerry_edge_core::meta::Write;
use skerry_protocol::Message;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Requests that may wait for the agent's loop; then clients wait.
pub const REQUESTS_MAX: usize = 64;
/// Connections at a time; more are not accepted until one ends.
const CONNECTIONS_MAX: usize = 64;
/// Changes that a slow watcher may be behind; then its watch ends, and it lists again.
const CHANGES_MAX: usize = 256;
/// The largest body, as KubeEdge has it.
const BODY_LEN_MAX: usize = 3 << 20;
/// Documents of discovery that are kept for times without a link, and the largest of them.
const DOCUMENTS_MAX: usize = 64;
const DOCUMENT_LEN_MAX: usize = 1 << 20;
/// How long a watch lasts when the client does not say; KubeEdge's least.
const WATCH_TIME: Duration = Duration::from_secs(1800);
/// Time for a client to send the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// What the listener asks of the agent's loop.
#[derive(Debug)]
pub enum ApiRequest {
    /// Ask the cloud once.
    Ask {
        /// Digest of the request.
        id: String,
        /// The application.
        content: Value,
        /// Where to.
        answer: oneshot::Sender<Answer>,
    },
    /// A watch has begun: the cloud is to push what it wants.
    Watch {
        /// Digest of the request.
        id: String,
        /// The application.
        content: Value,
    },
    /// It has ended.
    Unwatch {
        /// Digest of the request.
        id: String,
    },
}

/// A row that is new, another or gone.
#[derive(Debug, Clone)]
pub struct Change {
    path: String,
    object: Arc<Value>,
    gone: bool,
}

/// The part of the node's API inside the agent's loop.
pub struct Desk {
    applications: Applications,
    waiting: HashMap<Ticket, oneshot::Sender<Answer>>,
    changes: broadcast::Sender<Change>,
}

impl Default for Desk {
    fn default() -> Self {
        let (changes, _) = broadcast::channel(CHANGES_MAX);
        Self { applications: Applications::default(), waiting: HashMap::new(), changes }
    }
}

impl Desk {
    /// Where the listener hears of changes.
    pub fn changes(&self) -> broadcast::Sender<Change> {
        self.changes.clone()
    }

    /// Takes what the listener asks.
    pub fn handle_request(&mut self, now: Now, request: ApiRequest) {
        match request {
            ApiRequest::Ask { id, content, answer } => {
                let ticket = self.applications.request(now, &id, content);
                self.waiting.insert(ticket, answer);
            }
            ApiRequest::Watch { id, content } => {
                // The answer says only whether it was taken; the rows are served either way.
                if self.applications.watch(&id, content.clone()) {
                    self.applications.request(now, &id, content);
                }
            }
            ApiRequest::Unwatch { id } => self.applications.unwatch(&id),
        }
        self.deliver(now);
    }

    /// The link is up.
    pub fn handle_connected(&mut self) {
        self.applications.handle_connected();
    }

    /// The link is down.
    pub fn handle_disconnected(&mut self, now: Now) {
        self.applications.handle_disconnected();
        self.deliver(now);
    }

    /// Takes a reply of the hub; returns whether it was for a client of this API.
    pub fn handle_reply(&mut self, now: Now, message: &Message) -> bool {
        let mine = self.applications.handle_reply(message);
        self.deliver(now);
        mine
    }

    /// The next message for the hub.
    pub fn poll_transmit(&mut self, now: Now) -> Option<Message> {
        self.applications.poll_transmit(now)
    }

    /// When to call [`Self::deliver`] again, if nothing else happens.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.applications.poll_timeout()
    }

    /// Gives answers to those who wait, late ones included.
    pub fn deliver(&mut self, now: Now) {
        while let Some((ticket, answer)) = self.applications.poll_answer(now) {
            if let Some(waiter) = self.waiting.remove(&ticket) {
                let _ = waiter.send(answer); // the client may have left
            }
        }
    }

    /// What watchers will have to know of a write; to be called before it, because a row that goes is read here.
    pub fn change(&self, store: &Store, write: &Write) -> Option<Change> {
        if self.changes.receiver_count() == 0 {
            return None;
        }
        let (path, json, gone) = match write {
            Write::Put(row) => (&row.path, row.json.clone(), false),
            Write::Remove { path, .. } => (path, store.read(path)?, true),
        };
        let object = Arc::new(serde_json::from_str(&json).ok()?);
        Some(Change { path: path.clone(), object, gone })
    }

    /// Tells watchers of a write that is durable.
    pub fn publish(&self, change: Change) {
        let _ = self.changes.send(change); // nobody may be left
    }
}

struct Api {
    node: String,
    store: Arc<Store>,
    requests: mpsc::Sender<ApiRequest>,
    changes: broadcast::Sender<Change>,
    /// Documents of discovery by path, as the cloud gave them last.
    documents: Mutex<BTreeMap<String, Bytes>>,
    stop: CancellationToken,
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Why there is no object to give: an HTTP status, Kubernetes' reason, and a text.
#[derive(Debug)]
struct Refusal(StatusCode, &'static str, String);

/// Listens on `address` until `stop`; an address that is taken is tried again, because the node matters more.
pub async fn run(
    address: SocketAddr,
    node: String,
    store: Arc<Store>,
    requests: mpsc::Sender<ApiRequest>,
    changes: broadcast::Sender<Change>,
    stop: CancellationToken,
) {
    let mut told = false;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(%address, %error, "the node's API cannot listen; it tries again");
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(HEAD_TIMEOUT) => {}
                }
            }
        }
    };
    tracing::info!(%address, "the node's API listens");
    serve(listener, node, store, requests, changes, stop).await;
}

/// Serves `listener` until `stop`.
pub async fn serve(
    listener: TcpListener,
    node: String,
    store: Arc<Store>,
    requests: mpsc::Sender<ApiRequest>,
    changes: broadcast::Sender<Change>,
    stop: CancellationToken,
) {
    let documents = Mutex::default();
    let api = Arc::new(Api { node, store, requests, changes, documents, stop: stop.clone() });
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = room.clone().acquire_owned().await.expect("never closed");
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => continue, // the client has left already
            },
        };
        let (api, stop) = (api.clone(), stop.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let api = api.clone();
                async move { Ok::<_, Infallible>(api.answer(request).await) }
            });
            let mut builder = http1::Builder::new();
            builder
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(64 * 1024);
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {} // a client that leaves is no event
                () = stop.cancelled() => {}
            }
            drop(permit);
        });
    }
}

impl Api {
    async fn answer(self: &Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let answer = self.dispatch(request).await;
        answer.unwrap_or_else(|Refusal(status, reason, message)| {
            let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": message, "reason": reason, "code": status.as_u16()});
            respond(status, body.to_string())
        })
    }

    async fn dispatch(
        self: &Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Refusal> {
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        let query = request::query(head.uri.query().unwrap_or_default());
        let not_found =
            || Refusal(StatusCode::NOT_FOUND, "NotFound", format!("there is no `{path}` here"));
        let target = match Asked::parse(path).ok_or_else(not_found)? {
            Asked::Discovery(path) if head.method == Method::GET => {
                return self.document(&path).await;
            }
            Asked::Discovery(_) => return Err(not_allowed(&head.method)),
            Asked::Resource(target) => target,
        };
        if target.group.is_empty() && target.resource == "secrets" {
            let text = "secrets are not served on the node: nobody is asked who they are here";
            return Err(Refusal(StatusCode::FORBIDDEN, "Forbidden", text.into()));
        }
        let verb = target.verb(&head.method, &query).ok_or_else(|| not_allowed(&head.method))?;
        if !matches!(target.subresource.as_str(), "" | "status" | "scale" | "finalize") {
            let text = format!("subresource `{}` is not served on the node", target.subresource);
            return Err(Refusal(StatusCode::NOT_IMPLEMENTED, "NotImplemented", text));
        }
        match verb {
            Verb::Get | Verb::List => self.read(&target, verb, &query).await,
            Verb::Watch => self.watch(target, &query).await,
            _ => {
                let kind = head.headers.get(header::CONTENT_TYPE);
                let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or("application/json");
                let body = Limited::new(body, BODY_LEN_MAX).collect().await;
                let body = body.map_err(|_| {
                    let text =
                        format!("the body did not come, or has more than {BODY_LEN_MAX} bytes");
                    Refusal(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", text)
                })?;
                self.write(&target, verb, &query, kind, &body.to_bytes()).await
            }
        }
    }

    /// Asks the cloud. `Ok` is what it approved; an error says whether it is the cloud's own.
    async fn ask(&self, id: String, content: Value) -> Result<Option<Vec<u8>>, Asking> {
        let (answer, answered) = oneshot::channel();
        let request = ApiRequest::Ask { id, content, answer };
        let stopping = || Asking::Unanswered("the agent is stopping".into());
        self.requests.send(request).await.map_err(|_| stopping())?;
        let answer = answered.await.map_err(|_| stopping())?.map_err(Asking::Unanswered)?;
        if answer["Status"] != "Approved" {
            let status = &answer["Error"]["ErrStatus"];
            let reason = answer["Reason"].as_str().unwrap_or_default();
            let message = status["message"].as_str().unwrap_or(reason).to_owned();
            let code = status["code"].as_u64().and_then(|code| u16::try_from(code).ok());
            let code = code.and_then(|code| StatusCode::from_u16(code).ok());
            return Err(Asking::Rejected {
                code: code.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
                status: status.clone(),
                message,
            });
        }
        let body = answer["RespBody"].as_str().map(|body| STANDARD.decode(body));
        body.transpose().map_err(|error| Asking::Unanswered(error.to_string()))
    }

    async fn document(&self, path: &str) -> Result<Response<Body>, Refusal> {
        let (id, content) = request::application(&self.node, path, Verb::Get, &json!({}), None, "");
        let kept = |document: &Bytes| respond(StatusCode::OK, document.clone());
        match self.ask(id, content).await {
            Ok(Some(document)) => {
                let document = Bytes::from(document);
                let mut documents = self.documents.lock().expect("never held over a panic");
                let known = documents.contains_key(path) || documents.len() < DOCUMENTS_MAX;
                if known && document.len() <= DOCUMENT_LEN_MAX {
                    documents.insert(path.to_owned(), document.clone());
                }
                Ok(respond(StatusCode::OK, document))
            }
            Ok(None) => Ok(respond(StatusCode::OK, Bytes::new())),
            Err(asking) => {
                let documents = self.documents.lock().expect("never held over a panic");
                documents.get(path).map(kept).ok_or_else(|| asking.refusal())
            }
        }
    }

    /// Reads from the cloud, else from rows. That the cloud has no such object is an answer.
    async fn read(
        &self,
        target: &Target,
        verb: Verb,
        query: &Query,
    ) -> Result<Response<Body>, Refusal> {
        let option = match verb {
            Verb::List => request::list_options(query),
            _ => json!({}),
        };
        let (id, content) = request::application(
            &self.node,
            &target.key(),
            verb,
            &option,
            None,
            &target.subresource,
        );
        let asking = match self.ask(id, content).await {
            Ok(Some(body)) => return Ok(respond(StatusCode::OK, body)),
            Ok(None) => Asking::Unanswered("the cloud's answer is empty".into()),
            Err(asking) => asking,
        };
        if asking.is_not_found() {
            return Err(asking.refusal());
        }
        let selection = Selection::new(target, query).map_err(bad_request)?;
        let mut found = self.rows(target, &selection);
        match verb {
            Verb::List => Ok(respond(StatusCode::OK, local::list(target, found).to_string())),
            _ => match found.pop() {
                Some(object) => Ok(respond(StatusCode::OK, object.to_string())),
                None => {
                    let text = format!("{} \"{}\" not found", target.resource, target.name);
                    Err(Refusal(StatusCode::NOT_FOUND, "NotFound", text))
                }
            },
        }
    }

    fn rows(&self, target: &Target, selection: &Selection) -> Vec<Value> {
        let rows = self.store.read_kind(&target.token());
        let objects = rows.iter().filter_map(|json| serde_json::from_str::<Value>(json).ok());
        objects.filter(|object| selection.takes(object) && target.is_of(object)).collect()
    }

    async fn write(
        &self,
        target: &Target,
        verb: Verb,
        query: &Query,
        kind: &str,
        body: &[u8],
    ) -> Result<Response<Body>, Refusal> {
        let (option, body) = match verb {
            Verb::Patch => (request::patch_options(target, query, kind, body), None),
            Verb::Delete if body.is_empty() => (json!({}), None),
            _ => {
                let value = parse_body(kind, body)?;
                match verb {
                    Verb::Delete => (value, None),
                    _ => (request::write_options(query), Some(value.to_string().into_bytes())),
                }
            }
        };
        let (id, content) = request::application(
            &self.node,
            &target.key(),
            verb,
            &option,
            body.as_deref(),
            if verb == Verb::Patch { "" } else { &target.subresource },
        );
        let status = if verb == Verb::Create { StatusCode::CREATED } else { StatusCode::OK };
        match self.ask(id, content).await {
            Ok(Some(body)) => Ok(respond(status, body)),
            Ok(None) => {
                let done = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"});
                Ok(respond(status, done.to_string()))
            }
            Err(asking) => Err(asking.refusal()),
        }
    }

    async fn watch(
        self: &Arc<Self>,
        target: Target,
        query: &Query,
    ) -> Result<Response<Body>, Refusal> {
        let selection = Selection::new(&target, query).map_err(bad_request)?;
        let option = request::list_options(query);
        let (id, content) =
            request::application(&self.node, &target.key(), Verb::Watch, &option, None, "");
        // Before the rows are read, so that no change falls between.
        let changes = self.changes.subscribe();
        let begin = ApiRequest::Watch { id: id.clone(), content };
        let stopping = |_| {
            let text = "the agent is stopping".to_owned();
            Refusal(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", text)
        };
        self.requests.send(begin).await.map_err(stopping)?;
        let watcher = Watcher { id, requests: self.requests.clone() };
        let seconds = query.get("timeoutSeconds").and_then(|text| text.parse().ok());
        let end = tokio::time::Instant::now() + seconds.map_or(WATCH_TIME, Duration::from_secs);

        let mut known = HashSet::new();
        let mut first = Vec::new();
        for object in self.rows(&target, &selection) {
            known.insert(path_of(&target, &object));
            first.push(event("ADDED", &object));
        }
        let prefix = target.token();
        let stop = self.stop.clone();
        let state = (changes, known, watcher, target, selection);
        let later = futures::stream::unfold(state, move |mut state| {
            let (prefix, stop) = (prefix.clone(), stop.clone());
            async move {
                loop {
                    let (changes, known, _, target, selection) = &mut state;
                    let change = tokio::select! {
                        () = stop.cancelled() => return None,
                        () = tokio::time::sleep_until(end) => return None,
                        change = changes.recv() => change.ok()?, // too slow: the client lists again
                    };
                    if change.path.split('/').nth(1) != Some(prefix.as_str())
                        || !target.is_of(&change.object)
                    {
                        continue;
                    }
                    let path = path_of(target, &change.object);
                    let wanted = !change.gone && selection.takes(&change.object);
                    let word = match (wanted, known.contains(&path)) {
                        (true, true) => "MODIFIED",
                        (true, false) => "ADDED",
                        (false, true) => "DELETED",
                        (false, false) => continue,
                    };
                    if wanted {
                        known.insert(path);
                    } else {
                        known.remove(&path);
                    }
                    let frame = Frame::data(event(word, &change.object));
                    return Some((Ok::<_, Infallible>(frame), state));
                }
            }
        });
        let first =
            futures::stream::iter(first).map(|bytes| Ok::<_, Infallible>(Frame::data(bytes)));
        let body = StreamBody::new(first.chain(later)).boxed_unsync();
        let mut response = Response::new(body);
        let json = header::HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        Ok(response)
    }
}

impl Target {
    /// Whether `object` is of this group and version; an object that does not say is.
    fn is_of(&self, object: &Value) -> bool {
        object["apiVersion"].as_str().is_none_or(|version| version == self.api_version())
    }
}

fn path_of(target: &Target, object: &Value) -> String {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    format!("{}/{}/{}", text("namespace"), target.resource, text("name"))
}

fn event(word: &str, object: &Value) -> Bytes {
    let mut line = json!({"type": word, "object": object}).to_string();
    line.push('\n');
    line.into()
}

/// Ends the watch in the cloud when the client has left.
struct Watcher {
    id: String,
    requests: mpsc::Sender<ApiRequest>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let request = ApiRequest::Unwatch { id: std::mem::take(&mut self.id) };
        if let Err(mpsc::error::TrySendError::Full(request)) = self.requests.try_send(request) {
            let requests = self.requests.clone();
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move { requests.send(request).await });
            }
        }
    }
}

/// Why the cloud gave nothing.
#[derive(Debug)]
enum Asking {
    /// It said no.
    Rejected { code: StatusCode, status: Value, message: String },
    /// It said nothing.
    Unanswered(String),
}

impl Asking {
    fn is_not_found(&self) -> bool {
        matches!(self, Self::Rejected { code, .. } if *code == StatusCode::NOT_FOUND)
    }

    fn refusal(self) -> Refusal {
        match self {
            Self::Rejected { code, status, message } => {
                let reason = match status["reason"].as_str() {
                    Some("NotFound") => "NotFound",
                    Some("AlreadyExists") => "AlreadyExists",
                    Some("Conflict") => "Conflict",
                    Some("Forbidden") => "Forbidden",
                    Some("Invalid") => "Invalid",
                    Some("BadRequest") => "BadRequest",
                    Some("Expired") => "Expired",
                    _ => "InternalError",
                };
                Refusal(code, reason, message)
            }
            Self::Unanswered(text) if text == NOT_CONNECTED => {
                Refusal(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", text)
            }
            Self::Unanswered(text) => Refusal(StatusCode::GATEWAY_TIMEOUT, "Timeout", text),
        }
    }
}

/// Reads an object: JSON or YAML, as in KubeEdge. Clients that prefer another form try again on the status.
fn parse_body(kind: &str, body: &[u8]) -> Result<Value, Refusal> {
    let bad = |error: String| bad_request(format!("the body is not `{kind}`: {error}"));
    match kind.split(';').next().unwrap_or_default().trim() {
        "application/json" | "" => {
            serde_json::from_slice(body).map_err(|error| bad(error.to_string()))
        }
        "application/yaml" => {
            let text = std::str::from_utf8(body).map_err(|error| bad(error.to_string()))?;
            serde_saphyr::from_str(text).map_err(|error| bad(error.to_string()))
        }
        other => {
            let text = format!("`{other}` is not understood on the node, JSON and YAML are");
            Err(Refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", text))
        }
    }
}

fn bad_request(text: String) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, "BadRequest", text)
}

fn not_allowed(method: &Method) -> Refusal {
    let text = format!("`{method}` is not possible here");
    Refusal(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", text)
}

fn respond(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed_unsync());
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

#[cfg(test)]
mod tests;
