use super::*;
use skerry_edge_core::meta::Row;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn now() -> Now {
    Now { mono: Instant::now(), wall: jiff::Timestamp::now() }
}

fn pod(name: &str, app: &str, rv: &str) -> Value {
    json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": name, "namespace": "shop",
        "labels": {"app": app}, "resourceVersion": rv, "uid": name}})
}

fn put(object: &Value) -> Write {
    let kind = object["kind"].as_str().expect("a kind").to_lowercase();
    let name = object["metadata"]["name"].as_str().expect("a name");
    Write::Put(Row {
        path: format!("shop/{kind}/{name}"),
        kind,
        uid: name.into(),
        rv: "1".into(),
        json: object.to_string(),
    })
}

/// A cloud: takes an application and gives it back filled in, or is not there.
type Cloud = fn(&Value) -> Value;

struct World {
    address: SocketAddr,
    store: Arc<Store>,
    writes: mpsc::Sender<Write>,
    watches: Arc<Mutex<usize>>,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl World {
    /// The node's API with a loop as the agent's, linked to `cloud` if there is one.
    async fn new(cloud: Option<Cloud>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (store, _) = Store::open(&dir.path().join("state.db")).expect("opens");
        let store = Arc::new(store);
        for object in [pod("a", "web", "7"), pod("b", "api", "8")] {
            store.write(put(&object)).await.expect("written");
        }
        let mut secret = pod("s", "web", "9");
        secret["kind"] = json!("Secret");
        store.write(put(&secret)).await.expect("written");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let address = listener.local_addr().expect("an address");
        let (requests, mut inbox) = mpsc::channel(REQUESTS_MAX);
        let (writes, mut written) = mpsc::channel::<Write>(8);
        let stop = CancellationToken::new();
        let watches = Arc::new(Mutex::new(0));
        let mut desk = Desk::default();
        tokio::spawn(serve(
            listener,
            "edge1".into(),
            store.clone(),
            requests,
            desk.changes(),
            stop.clone(),
        ));
        let (loop_store, synced) = (store.clone(), watches.clone());
        tokio::spawn(async move {
            if cloud.is_some() {
                desk.handle_connected();
            }
            loop {
                tokio::select! {
                    Some(request) = inbox.recv() => desk.handle_request(now(), request),
                    Some(write) = written.recv() => {
                        let change = desk.change(&loop_store, &write);
                        loop_store.write(write).await.expect("written");
                        change.into_iter().for_each(|change| desk.publish(change));
                    }
                    else => return,
                }
                while let Some(message) = desk.poll_transmit(now()) {
                    let content: Value = message.content_as().expect("JSON");
                    if message.route.resource == "watchapp/sync" {
                        *synced.lock().expect("lock") = content.as_object().expect("a map").len();
                        continue;
                    }
                    let answer = cloud.expect("only with a link")(&content);
                    let mut reply = message.response(0, &answer);
                    reply.route.operation = "applicationResponse".into();
                    assert!(desk.handle_reply(now(), &reply));
                }
            }
        });
        Self { address, store, writes, watches, stop, _dir: dir }
    }

    async fn open(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.expect("connects");
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.expect("sent");
        stream
    }

    /// Returns status and body.
    async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut stream = self.open(method, path, body).await;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("an answer");
        let (head, body) = text.split_once("\r\n\r\n").expect("an answer");
        let status = head.split(' ').nth(1).expect("a status").parse().expect("a number");
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }
}

#[test]
fn bodies_are_json_or_yaml_and_another_form_is_refused_so_that_clients_try_again() {
    let object = json!({"a": {"b": 1}});
    let read = |kind, body: &str| parse_body(kind, body.as_bytes());
    assert_eq!(read("application/json; charset=utf-8", &object.to_string()).expect("JSON"), object);
    assert_eq!(read("application/yaml", "a: {b: 1}").expect("YAML"), object);
    let Refusal(status, reason, _) =
        read("application/vnd.kubernetes.protobuf", "k8s").expect_err("refused");
    assert_eq!((status.as_u16(), reason), (415, "UnsupportedMediaType"));
    assert_eq!(read("application/json", "{").expect_err("broken").0, StatusCode::BAD_REQUEST);
}

fn names(list: &Value) -> Vec<&str> {
    let items = list["items"].as_array().expect("a list");
    items.iter().map(|item| item["metadata"]["name"].as_str().expect("a name")).collect()
}

/// Reads until the text has come; the stream stays open.
async fn wait_for(stream: &mut TcpStream, seen: &mut String, text: &str) {
    let mut buffer = [0; 4096];
    while !seen.contains(text) {
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut buffer)).await;
        let count = read.unwrap_or_else(|_| panic!("{text} did not come: {seen}")).expect("reads");
        assert_ne!(count, 0, "ended without {text}: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

#[tokio::test]
async fn without_a_link_reads_come_from_rows_and_writes_say_why_not() {
    let world = World::new(None).await;
    let (status, list) = world.ask("GET", "/api/v1/namespaces/shop/pods", "").await;
    assert_eq!((status, names(&list)), (200, vec!["a", "b"]));
    assert_eq!(
        (&list["kind"], &list["metadata"]["resourceVersion"]),
        (&json!("PodList"), &json!("8"))
    );
    let (_, list) = world.ask("GET", "/api/v1/pods?labelSelector=app%3Dapi", "").await;
    assert_eq!(names(&list), ["b"]);
    let (_, list) = world.ask("GET", "/api/v1/namespaces/other/pods", "").await;
    assert_eq!(names(&list), [] as [&str; 0]);
    let (status, pod) = world.ask("GET", "/api/v1/namespaces/shop/pods/a", "").await;
    assert_eq!((status, &pod["metadata"]["name"]), (200, &json!("a")));
    let (status, answer) = world.ask("GET", "/api/v1/namespaces/shop/pods/z", "").await;
    assert_eq!((status, &answer["reason"]), (404, &json!("NotFound")));
    let (status, answer) = world.ask("POST", "/api/v1/namespaces/shop/pods", "{}").await;
    assert_eq!((status, &answer["message"]), (503, &json!(NOT_CONNECTED)));
    assert_eq!(world.ask("GET", "/version", "").await.0, 503);
    assert_eq!(world.ask("GET", "/api/v1/pods?fieldSelector=spec.nodeName%3Dx", "").await.0, 400);
}

#[tokio::test]
async fn what_is_not_for_anybody_on_the_machine_is_refused() {
    let world = World::new(Some(|_| panic!("nothing of this is asked of the cloud"))).await;
    for (method, path, expected) in [
        ("GET", "/api/v1/secrets", 403),
        ("GET", "/api/v1/namespaces/shop/secrets/s", 403),
        ("GET", "/api/v1/namespaces/shop/pods/a/log", 501),
        ("DELETE", "/api/v1/namespaces/shop/pods", 405),
        ("POST", "/version", 405),
        ("GET", "/metrics", 404),
        ("GET", "/api/v1/namespaces/../pods", 404),
        ("POST", "/api/v1/namespaces/shop/pods", 400),
    ] {
        let (status, answer) = world.ask(method, path, "not JSON").await;
        assert_eq!(status, expected, "{method} {path}: {answer}");
        assert_eq!(answer["kind"], "Status");
    }
}

#[tokio::test]
async fn with_a_link_the_cloud_answers_first_and_its_refusals_are_passed_on() {
    let cloud: Cloud = |application| {
        let mut answer = application.clone();
        let key = application["Key"].as_str().expect("a key");
        let verb = application["Verb"].as_str().expect("a verb");
        let body = match (verb, key) {
            ("list", "/core/v1/pods/null/null") => {
                json!({"kind": "PodList", "items": [pod("c", "x", "1")]})
            }
            ("get", "/version") => json!({"gitVersion": "v1.36.0"}),
            ("create", _) => {
                let body = STANDARD.decode(application["ReqBody"].as_str().expect("a body"));
                serde_json::from_slice(&body.expect("base64")).expect("JSON")
            }
            ("patch", "/core/v1/pods/shop/a") => {
                let option = STANDARD.decode(application["Option"].as_str().expect("options"));
                serde_json::from_slice(&option.expect("base64")).expect("JSON")
            }
            ("delete", _) => {
                answer["Status"] = json!("Approved");
                return answer;
            }
            ("list", _) => {
                answer["Status"] = json!("Rejected");
                answer["Error"] =
                    json!({"ErrStatus": {"message": "no", "reason": "Forbidden", "code": 403}});
                return answer;
            }
            _ => {
                answer["Status"] = json!("Rejected");
                answer["Error"] =
                    json!({"ErrStatus": {"message": "gone", "reason": "NotFound", "code": 404}});
                return answer;
            }
        };
        answer["Status"] = json!("Approved");
        answer["RespBody"] = json!(STANDARD.encode(body.to_string()));
        answer
    };
    let world = World::new(Some(cloud)).await;
    let (_, list) = world.ask("GET", "/api/v1/pods", "").await;
    assert_eq!(names(&list), ["c"]);
    assert_eq!(world.ask("GET", "/version", "").await.1["gitVersion"], "v1.36.0");
    // The cloud knows better than a row that has not been taken away yet.
    let (status, answer) = world.ask("GET", "/api/v1/namespaces/shop/pods/a", "").await;
    assert_eq!((status, &answer["message"]), (404, &json!("gone")));
    // Any other failure is no reason to show nothing.
    let (status, list) = world.ask("GET", "/api/v1/namespaces/shop/pods", "").await;
    assert_eq!((status, names(&list)), (200, vec!["a", "b"]));
    let made = pod("d", "x", "1");
    let path = "/api/v1/namespaces/shop/pods";
    assert_eq!(world.ask("POST", path, &made.to_string()).await, (201, made));
    let (status, patch) =
        world.ask("PATCH", "/api/v1/namespaces/shop/pods/a?fieldManager=me", "{}").await;
    assert_eq!((status, &patch["Options"]["fieldManager"]), (200, &json!("me")));
    let (status, done) = world.ask("DELETE", "/api/v1/namespaces/shop/pods/a", "").await;
    assert_eq!((status, &done["status"]), (200, &json!("Success")));
}

#[tokio::test]
async fn watch_shows_rows_then_changes_and_tells_the_cloud_when_it_ends() {
    let cloud: Cloud = |application| {
        let mut answer = application.clone();
        answer["Status"] = json!("Approved");
        answer
    };
    let world = World::new(Some(cloud)).await;
    let path = "/api/v1/namespaces/shop/pods?watch=true&labelSelector=app%3Dweb";
    let mut stream = world.open("GET", path, "").await;
    let mut seen = String::new();
    wait_for(&mut stream, &mut seen, "\"ADDED\"").await;
    assert!(seen.contains("\"name\":\"a\"") && !seen.contains("\"name\":\"b\""), "{seen}");
    world.writes.send(put(&pod("b", "api", "20"))).await.expect("taken");
    world.writes.send(put(&pod("n", "web", "21"))).await.expect("taken");
    wait_for(&mut stream, &mut seen, "\"resourceVersion\":\"21\"").await;
    world.writes.send(put(&pod("a", "web", "22"))).await.expect("taken");
    wait_for(&mut stream, &mut seen, "\"MODIFIED\"").await;
    // It leaves what is watched without being gone.
    world.writes.send(put(&pod("n", "other", "23"))).await.expect("taken");
    wait_for(&mut stream, &mut seen, "\"DELETED\"").await;
    let gone = Write::Remove { path: "shop/pod/a".into(), tombstone: None };
    world.writes.send(gone).await.expect("taken");
    while seen.matches("\"DELETED\"").count() < 2 {
        let have = seen.len();
        let mut more = String::new();
        wait_for(&mut stream, &mut more, "\n").await;
        seen.push_str(&more);
        assert!(seen.len() > have);
    }
    assert!(!seen.contains("\"name\":\"b\""), "{seen}");
    assert!(world.store.read("shop/pod/a").is_none());

    // A second watch, so that the end of the first leaves one to tell the cloud of.
    let mut other = world.open("GET", "/api/v1/services?watch=1", "").await;
    wait_for(&mut other, &mut String::new(), "200 OK").await;
    drop(stream);
    // The end of a client shows when something is to be sent to it.
    for _ in 0..200 {
        if *world.watches.lock().expect("lock") == 1 {
            return;
        }
        world.writes.send(put(&pod("z", "web", "30"))).await.expect("taken");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("the cloud was not told");
}
