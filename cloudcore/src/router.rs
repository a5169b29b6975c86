//! The router: HTTP in the cloud joined to the buses of the nodes, as Rule objects say.
//!
//! `skerry_cloudcore_core::router` decides who takes what; this follows the objects, serves HTTP for rules that begin
//! there, calls HTTP for rules that end there, and counts in the status of the rules. Nodes are told what to follow
//! when rules change and when they connect, which KubeEdge does only when it starts.
//!
//! Clients speak TLS with the hub's certificate and are known to the cluster ([`access`]), unless the operator wants it open
//! as KubeEdge's is, with neither. Calls that end here go to `http://`; others are refused.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/router.

mod access;

use crate::api;
use crate::definitions::{self, Kinds};
use crate::hub::Hub;
use crate::upstream::answer::now_ms;
use crate::upstream::rest::{self, Merge, Rest};
use crate::watch::is_over;
use access::Access;
use bytes::Bytes;
use futures::StreamExt;
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use serde_json::{Value, json};
use skerry_cloudcore_core::router::{Follow, Id, Routed, Rules, Target};
use skerry_protocol::bus::{self, Call, CallResult};
use skerry_protocol::{Message, MessageId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const ROOT: &str = "/apis/rules.kubeedge.io/v1";
/// The largest body of a request, in bytes, as KubeEdge's.
const BODY_LEN_MAX: usize = 12 * 1024 * 1024;
/// The largest body of an answer that goes to a node, in bytes, as KubeEdge's.
const ANSWER_LEN_MAX: usize = 1024 * 1024;
/// HTTP connections at the same time, in each direction.
const CONNECTIONS_MAX: usize = 256;
/// How long a node may take for a call, and an HTTP server for an answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client may take for its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client may take for the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two writes of one rule's counters.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);
/// Pause after something that the API did not answer.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Headers that belong to one connection.
const OF_CONNECTION: [&str; 6] =
    ["connection", "content-length", "keep-alive", "transfer-encoding", "upgrade", "te"];

/// The way to the router.
#[derive(Clone)]
pub(crate) struct Router(Arc<Inner>);

struct Inner {
    client: kube::Client,
    hub: Hub,
    rules: Mutex<Rules>,
    /// What nodes were told to follow.
    followed: Mutex<BTreeSet<Follow>>,
    /// Calls that wait for a node, by the id of their message.
    calls: Mutex<HashMap<MessageId, (String, oneshot::Sender<CallResult>)>>,
    counts: Mutex<BTreeMap<Id, Count>>,
    counted: Notify,
    outgoing: Semaphore,
    /// Who may send; everybody without it.
    access: Option<Access>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// What has happened to a rule since its status was written.
#[derive(Debug, Default)]
struct Count {
    taken: u64,
    failed: u64,
    error: Option<String>,
}

impl Router {
    /// Starts following the rules and serving HTTP.
    pub(crate) fn spawn(
        client: kube::Client,
        hub: Hub,
        listener: TcpListener,
        tls: Option<Arc<rustls::ServerConfig>>,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Self {
        let router = Self(Arc::new(Inner {
            // TLS and authentication come together: a token is not to be read on the way.
            access: tls.is_some().then(|| Access::new(client.clone())),
            client,
            hub,
            rules: Mutex::default(),
            followed: Mutex::default(),
            calls: Mutex::default(),
            counts: Mutex::default(),
            counted: Notify::new(),
            outgoing: Semaphore::new(CONNECTIONS_MAX),
            tasks: tasks.clone(),
            stop: stop.clone(),
        }));
        let running = |task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            let stop = stop.clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = task => {}
                }
            });
        };
        let kinds = router.clone();
        running(Box::pin(async move { definitions::follow(&kinds).await }));
        running(Box::pin(router.clone().write_counts()));
        running(Box::pin(router.clone().serve(listener, tls)));
        router
    }

    /// A new connection of `node` is up: its buses may have forgotten what to follow.
    pub(crate) async fn connected(&self, node: &str) {
        let follows: Vec<Follow> =
            lock(&self.0.followed).iter().filter(|follow| follow.node == node).cloned().collect();
        for follow in follows {
            self.tell(&follow, true).await;
        }
    }

    /// Takes an upload of a node. Returns the answer, if it has one already; a call of a node's application is answered
    /// later.
    pub(crate) fn upload(&self, node: &str, request: &Message) -> Option<Message> {
        let parent = &request.header.parent_msg_id;
        if !parent.is_empty() {
            let mut calls = lock(&self.0.calls);
            // Another node's call is none of this one's business.
            if calls.get(parent).is_some_and(|(of, _)| of == node)
                && let Some((_, waiter)) = calls.remove(parent)
            {
                let result = request.content_as().unwrap_or_else(|error| CallResult {
                    status_code: 502,
                    body: format!("the node's answer is not readable: {error}").into_bytes(),
                    ..CallResult::default()
                });
                let _ = waiter.send(result);
            }
            return None;
        }
        let route = &request.route;
        let is_topic = route.source != bus::SERVICE_BUS;
        let routed = lock(&self.0.rules).route_upload(node, &route.resource, is_topic);
        let Some(Routed { rule, target: Target::Rest(url), .. }) = routed else {
            let reason = format!("no rule takes `{}` of node `{node}`", route.resource);
            return Some(request.error(now_ms(), "router", bus::GROUP, &reason));
        };
        let (router, request, node) = (self.clone(), request.clone(), node.to_owned());
        let stop = self.0.stop.clone();
        self.0.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = router.post(&node, &rule, &url, &request, !is_topic) => {}
            }
        });
        None
    }

    async fn post(&self, node: &str, rule: &Id, url: &str, request: &Message, answers: bool) {
        // Go gives bytes as base64 from one bus and as text from the other.
        let body = match serde_json::from_str::<Value>(request.content.get()) {
            Ok(Value::String(text)) if !answers => text.into_bytes(),
            Ok(Value::String(text)) => base64_or_text(text),
            _ => request.content.get().as_bytes().to_vec(),
        };
        let sent = match self.0.outgoing.try_acquire() {
            Ok(_place) => tokio::time::timeout(CALL_TIMEOUT, send(node, url, body))
                .await
                .unwrap_or_else(|_| Err(format!("`{url}` did not answer in time"))),
            Err(_) => Err(format!("{CONNECTIONS_MAX} requests are on their way already")),
        };
        let answer = match &sent {
            Ok(body) => {
                let mut answer = request.response(now_ms(), &*String::from_utf8_lossy(body));
                answer.route.source = bus::SERVICE_BUS.into();
                answer
            }
            Err(error) => request.error(now_ms(), bus::SERVICE_BUS, bus::GROUP, error),
        };
        self.count(rule, sent.err());
        if answers {
            self.0.hub.send(node, answer).await;
        }
    }

    fn count(&self, rule: &Id, error: Option<String>) {
        let mut counts = lock(&self.0.counts);
        let count = counts.entry(rule.clone()).or_default();
        match error {
            None => count.taken += 1,
            Some(error) => {
                tracing::debug!(rule = rule.1, namespace = rule.0, error, "a rule failed");
                count.failed += 1;
                count.error = Some(error);
            }
        }
        self.0.counted.notify_one();
    }

    async fn write_counts(self) {
        loop {
            self.0.counted.notified().await;
            let counts = std::mem::take(&mut *lock(&self.0.counts));
            for (rule, count) in counts {
                if let Err(refused) = self.write_count(&rule, &count).await {
                    tracing::debug!(rule = rule.1, namespace = rule.0, error = %refused, "the counters of a rule were not written");
                }
            }
            tokio::time::sleep(COUNT_INTERVAL).await;
        }
    }

    async fn write_count(
        &self,
        (namespace, name): &Id,
        count: &Count,
    ) -> Result<(), crate::upstream::answer::Refused> {
        let place = rest::path(ROOT, namespace, "rules", name)?;
        let api = Rest::new(&self.0.client);
        let known = api.get(&place).await?;
        let before = |field: &str| known["status"][field].as_u64().unwrap_or(0);
        let mut status = json!({
            "successMessages": before("successMessages") + count.taken,
            "failMessages": before("failMessages") + count.failed,
            "errors": known["status"]["errors"].as_array().cloned().unwrap_or_default(),
        });
        if let Some(error) = &count.error {
            status["errors"] = json!([error]);
        }
        api.patch(&place, Merge::Json, &json!({"status": status})).await.map(drop)
    }

    /// Tells nodes what rules want of them now, and want no more.
    async fn refresh(&self) {
        let wanted = lock(&self.0.rules).follows();
        let before = std::mem::replace(&mut *lock(&self.0.followed), wanted.clone());
        for gone in before.difference(&wanted) {
            self.tell(gone, false).await;
        }
        for new in wanted.difference(&before) {
            self.tell(new, true).await;
        }
    }

    async fn tell(&self, follow: &Follow, wanted: bool) {
        let message = match follow.is_topic {
            true => bus::follow(now_ms(), &follow.what, wanted),
            false => bus::serve(now_ms(), &follow.what, wanted),
        };
        self.0.hub.send(&follow.node, message).await;
    }
}

impl Kinds for Router {
    fn what(&self) -> String {
        "rules".into()
    }

    fn client(&self) -> &kube::Client {
        &self.0.client
    }

    fn definitions(&self) -> Vec<Value> {
        skerry_api::kubeedge::rules()
    }

    async fn look(&self) -> kube::Result<bool> {
        for is_rule in [true, false] {
            if !definitions::is_there(&self.objects(is_rule)).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn watch(&self) {
        tokio::select! {
            () = self.watch_kind(true) => {}
            () = self.watch_kind(false) => {}
        }
    }
}

/// Following the objects.
impl Router {
    fn objects(&self, is_rule: bool) -> Api<DynamicObject> {
        let (kind, plural) = match is_rule {
            true => ("Rule", "rules"),
            false => ("RuleEndpoint", "ruleendpoints"),
        };
        let resource = ApiResource {
            group: "rules.kubeedge.io".into(),
            version: "v1".into(),
            api_version: "rules.kubeedge.io/v1".into(),
            kind: kind.into(),
            plural: plural.into(),
        };
        Api::all_with(self.0.client.clone(), &resource)
    }

    /// Returns when the cluster no longer has the kind.
    async fn watch_kind(&self, is_rule: bool) {
        let events = watcher::watcher(self.objects(is_rule), watcher::Config::default());
        let mut events = std::pin::pin!(events.default_backoff());
        let mut ids = BTreeSet::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => ids.clear(),
                Ok(Event::InitApply(object)) => {
                    ids.extend(id(&object));
                    self.set(is_rule, object);
                }
                Ok(Event::InitDone) => {
                    lock(&self.0.rules).listed(is_rule, &std::mem::take(&mut ids));
                    self.refresh().await;
                }
                Ok(Event::Apply(object)) => {
                    self.set(is_rule, object);
                    self.refresh().await;
                }
                Ok(Event::Delete(object)) => {
                    if let Some(id) = id(&object) {
                        let mut rules = lock(&self.0.rules);
                        match is_rule {
                            true => rules.remove_rule(&id),
                            false => rules.remove_endpoint(&id),
                        }
                    }
                    self.refresh().await;
                }
                Err(error) if is_over(&error) => return,
                Err(error) => tracing::warn!(%error, "watch of rules failed, trying again"),
            }
        }
    }

    fn set(&self, is_rule: bool, object: DynamicObject) {
        let object = api::to_json(object);
        let mut rules = lock(&self.0.rules);
        let problem = match is_rule {
            true => rules.set_rule(&object),
            false => rules.set_endpoint(&object),
        };
        if let Some(problem) = problem {
            let metadata = &object["metadata"];
            tracing::warn!(name = %metadata["name"], namespace = %metadata["namespace"], problem, "a rule or its endpoint is of no use");
        }
    }
}

/// Serving HTTP.
impl Router {
    async fn serve(self, listener: TcpListener, tls: Option<Arc<rustls::ServerConfig>>) {
        let tls = tls.map(TlsAcceptor::from);
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection of the router");
                    tokio::time::sleep(RETRY_INTERVAL).await;
                    continue;
                }
            };
            let (router, tls, stop) = (self.clone(), tls.clone(), self.0.stop.clone());
            self.0.tasks.spawn(async move {
                let _place = place;
                let connection = async {
                    let Some(tls) = tls else { return router.serve_one(stream).await };
                    match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
                        Ok(Ok(stream)) => router.serve_one(stream).await,
                        Ok(Err(error)) => {
                            tracing::debug!(%error, "TLS handshake with the router failed");
                        }
                        Err(_) => tracing::debug!("TLS handshake with the router took too long"),
                    }
                };
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = connection => {}
                }
            });
        }
    }

    async fn serve_one(&self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let service = hyper::service::service_fn(|request| {
            let router = self.clone();
            async move { Ok::<_, Infallible>(router.take(request).await) }
        });
        let mut server = hyper::server::conn::http1::Builder::new();
        server.timer(hyper_util::rt::TokioTimer::new());
        server.header_read_timeout(REQUEST_TIMEOUT);
        // Whatever ends a connection ends only that.
        let _ = server.serve_connection(TokioIo::new(stream), service).await;
    }

    async fn take(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let uri = request.uri().path_and_query().map(|uri| uri.as_str().to_owned());
        let Some(routed) = lock(&self.0.rules).route_request(uri.as_deref().unwrap_or_default())
        else {
            return said(StatusCode::NOT_FOUND, "no rule takes this path");
        };
        let (mut parts, body) = request.into_parts();
        if let Some(access) = &self.0.access {
            if let Err(denied) = access.check(&parts.headers, &routed.rule).await {
                let mut answer = said(denied.status(), &denied.to_string());
                if denied.status() == StatusCode::UNAUTHORIZED {
                    let bearer = http::HeaderValue::from_static("Bearer");
                    answer.headers_mut().insert(http::header::WWW_AUTHENTICATE, bearer);
                }
                return answer;
            }
            // It was for us; no application at a node gets a token of the cluster.
            parts.headers.remove(http::header::AUTHORIZATION);
        }
        let reading = Limited::new(body, BODY_LEN_MAX).collect();
        let body = match tokio::time::timeout(REQUEST_TIMEOUT, reading).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) => return said(StatusCode::BAD_REQUEST, &error.to_string()),
            Err(_) => return said(StatusCode::REQUEST_TIMEOUT, "the request did not come in time"),
        };
        if self.0.hub.backlog(&routed.node).await.is_none() {
            let error = format!("node `{}` is not connected", routed.node);
            self.count(&routed.rule, Some(error.clone()));
            return said(StatusCode::INTERNAL_SERVER_ERROR, &error);
        }
        let (answer, error) = match routed.target {
            Target::Topic(topic) => self.publish(&routed.node, &topic, &body).await,
            Target::Service { port, path } => {
                let header = parts.headers.keys().map(|name| {
                    let values = parts.headers.get_all(name).iter();
                    let values = values.filter_map(|value| value.to_str().ok().map(str::to_owned));
                    (name.as_str().to_owned(), values.collect())
                });
                let call = Call {
                    header: header.collect(),
                    body: body.to_vec(),
                    method: parts.method.as_str().to_owned(),
                    url: String::new(),
                };
                self.call(&routed.node, &port, &path, &call).await
            }
            // `route_request` gives none.
            Target::Rest(_) => return said(StatusCode::NOT_FOUND, "no rule takes this path"),
        };
        self.count(&routed.rule, error);
        answer
    }

    async fn publish(
        &self,
        node: &str,
        topic: &str,
        body: &[u8],
    ) -> (Response<Full<Bytes>>, Option<String>) {
        let Ok(text) = std::str::from_utf8(body) else {
            let error = "the body is no text".to_owned();
            return (said(StatusCode::BAD_REQUEST, &error), Some(error));
        };
        self.0.hub.send(node, bus::publish(now_ms(), topic, text)).await;
        (said(StatusCode::OK, "message delivered"), None)
    }

    async fn call(
        &self,
        node: &str,
        port: &str,
        path: &str,
        call: &Call,
    ) -> (Response<Full<Bytes>>, Option<String>) {
        let Some(message) = bus::call(now_ms(), port, path, call) else {
            let error = format!("method `{}` cannot be carried to a node", call.method);
            return (said(StatusCode::METHOD_NOT_ALLOWED, &error), Some(error));
        };
        let id = message.header.msg_id.clone();
        let (waiter, result) = oneshot::channel();
        lock(&self.0.calls).insert(id.clone(), (node.to_owned(), waiter));
        let _forget = Forget(self, &id);
        self.0.hub.send(node, message).await;
        match tokio::time::timeout(CALL_TIMEOUT, result).await {
            Ok(Ok(result)) => {
                let failed = result.status_code >= 400;
                let error = failed
                    .then(|| String::from_utf8_lossy(&result.body).chars().take(500).collect());
                (answered(result), error)
            }
            _ => {
                let error = format!("node `{node}` did not answer in time");
                (said(StatusCode::REQUEST_TIMEOUT, &error), Some(error))
            }
        }
    }
}

/// Forgets a call whose client has gone, or that has ended.
struct Forget<'a>(&'a Router, &'a str);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(&self.0.0.calls).remove(self.1);
    }
}

fn answered(result: CallResult) -> Response<Full<Bytes>> {
    let status = StatusCode::from_u16(result.status_code).unwrap_or(StatusCode::BAD_GATEWAY);
    let mut response = Response::builder().status(status);
    for (name, values) in &result.header {
        if OF_CONNECTION.contains(&name.to_ascii_lowercase().as_str()) {
            continue;
        }
        for value in values {
            response = response.header(name, value);
        }
    }
    response.body(Full::from(result.body)).unwrap_or_else(|_| {
        said(StatusCode::BAD_GATEWAY, "the node's answer has headers that are none")
    })
}

fn said(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text.to_owned()));
    *response.status_mut() = status;
    response
}

/// Sends `body` to `url`; the body of the answer.
async fn send(node: &str, url: &str, body: Vec<u8>) -> Result<Bytes, String> {
    let bad = || format!("`{url}` is no address of the form `http://host[:port]/path`");
    let uri: Uri = url.parse().map_err(|_| bad())?;
    let (Some("http"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(bad());
    };
    let failed = |error: &dyn std::fmt::Display| format!("`{url}` could not be reached: {error}");
    let stream = TcpStream::connect((
        authority.host().trim_matches(['[', ']']),
        authority.port_u16().unwrap_or(80),
    ));
    let stream = stream.await.map_err(|error| failed(&error))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(&error))?;
    let request = Request::post(uri.path_and_query().map_or("/", |path| path.as_str()))
        .header("host", authority.as_str())
        .header("NodeName", node)
        .body(Full::<Bytes>::from(body))
        .map_err(|_| bad())?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_LEN_MAX).collect().await;
        let body = body.map_err(|error| failed(&error))?.to_bytes();
        match status.is_success() {
            true => Ok(body),
            false => Err(format!("`{url}` answered {status}")),
        }
    };
    tokio::pin!(exchange);
    tokio::select! {
        // The connection may end before the last of the answer is read.
        _ = connection => exchange.await,
        done = &mut exchange => done,
    }
}

fn base64_or_text(text: String) -> Vec<u8> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(&text).unwrap_or_else(|_| text.into_bytes())
}

fn id(object: &DynamicObject) -> Option<Id> {
    Some((object.metadata.namespace.clone()?, object.metadata.name.clone()?))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("never held over a panic")
}
