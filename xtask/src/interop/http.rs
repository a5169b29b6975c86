//! Small HTTP servers of a room: a registry that has one image, and a service of an application on the node.
//!
//! One request per connection, one thread per server, as much HTTP as containerd and KubeEdge's service bus speak. They
//! end with the room.

use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

/// The largest body that is read, in bytes; tests send a few.
const BODY_LEN_MAX: u64 = 64 * 1024;

/// What a client asked for.
struct Request {
    method: String,
    path: String,
    body: String,
}

/// What it gets.
struct Answer {
    status: &'static str,
    kind: String,
    digest: String,
    body: Vec<u8>,
}

/// Serves the image in an OCI layout (a tar file) under any name with tag `1`.
pub(super) fn registry(image: &Path) -> Result<SocketAddr> {
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let file = std::fs::File::open(image)
        .with_context(|| format!("could not read `{}`", image.display()))?;
    for entry in tar::Archive::new(file).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_string_lossy().into_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        files.insert(path, bytes);
    }
    let index = files.get("index.json").context("the image has no index")?;
    let index: Value = serde_json::from_slice(index)?;
    let manifest = index["manifests"][0]["digest"].as_str().context("the index names no image")?;
    let manifest = manifest.to_owned();
    serve(move |request| {
        let parts: Vec<&str> = request.path.split('/').collect();
        let digest = match parts[..] {
            ["", "v2", ""] => return answer("200 OK", "application/json", "", b"{}"),
            ["", "v2", _, "manifests", "1"] => manifest.clone(),
            ["", "v2", _, "manifests" | "blobs", digest] => digest.to_owned(),
            _ => String::new(),
        };
        let name = digest.strip_prefix("sha256:").unwrap_or_default();
        match files.get(&format!("blobs/sha256/{name}")) {
            Some(bytes) => {
                let kind = match digest == manifest {
                    true => "application/vnd.oci.image.manifest.v1+json",
                    false => "application/octet-stream",
                };
                answer("200 OK", kind, &digest, bytes)
            }
            None => answer("404 Not Found", "application/json", "", b"{}"),
        }
    })
}

/// Says back what it was asked.
pub(super) fn echo() -> Result<SocketAddr> {
    serve(|request| {
        let said = format!("{} {} {}", request.method, request.path, request.body);
        answer("200 OK", "text/plain", "", said.as_bytes())
    })
}

/// One request; status and body.
pub(super) fn post(server: SocketAddr, path: &str, body: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(server)?;
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("the answer has no end of its head")?;
    let status = head.split(' ').nth(1).context("the answer has no status")?.parse()?;
    Ok((status, body.to_owned()))
}

fn answer(status: &'static str, kind: &str, digest: &str, body: &[u8]) -> Answer {
    Answer { status, kind: kind.into(), digest: digest.into(), body: body.into() }
}

fn serve(handle: impl Fn(&Request) -> Answer + Send + 'static) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that breaks off is its own business.
            let _ = exchange(&stream, &handle);
        }
    });
    Ok(address)
}

fn exchange(mut stream: &TcpStream, handle: &impl Fn(&Request) -> Answer) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let mut word = || words.next().unwrap_or_default().to_owned();
    let (method, path) = (word(), word());
    let mut len = 0;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
            break;
        }
        let (name, value) = header.split_once(':').unwrap_or_default();
        if name.eq_ignore_ascii_case("content-length") {
            len = value.trim().parse()?;
        }
    }
    let mut body = String::new();
    reader.take(BODY_LEN_MAX.min(len)).read_to_string(&mut body)?;
    let request = Request { method, path, body };
    let Answer { status, kind, digest, body } = handle(&request);
    let digest = match digest.as_str() {
        "" => String::new(),
        digest => format!("docker-content-digest: {digest}\r\n"),
    };
    let len = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{digest}content-length: {len}\r\nconnection: close\r\n\r\n"
    )?;
    if request.method != "HEAD" {
        stream.write_all(&body)?;
    }
    Ok(())
}
