//! Checks of running containers: `exec`, `httpGet`, `tcpSocket`.
//!
//! One task per container and probe. It runs from the node's network, so it goes on offline. What
//! results mean is decided in `skerry_edge_core::pods::probe`; changes go to the pod's worker.
//! A redirect is a success and is not followed; kubelet follows it on the same host.
//!
//! Source: kubernetes/kubernetes pkg/kubelet/prober, pkg/probe.

use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe};
use skerry_edge_core::pods::probe::{self, Kind, Prober};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::cri::Runtime;

/// Bytes of an answer that are kept for an event.
const OUTPUT_MAX: usize = 10 << 10;

/// A probe's verdict changed, or a check failed.
#[derive(Debug)]
pub(super) enum Report {
    Verdict { container_id: String, kind: Kind, success: bool },
    Failed { container: String, kind: Kind, message: String },
}

/// Everything one probe needs.
pub(super) struct Target {
    pub(super) runtime: Runtime,
    pub(super) container_id: String,
    pub(super) container: Container,
    pub(super) kind: Kind,
    pub(super) probe: Probe,
    /// Address of the pod.
    pub(super) host: Option<String>,
    /// How long ago the container was started.
    pub(super) age: Duration,
}

/// What one check found.
enum Found {
    Success,
    /// The container's fault.
    Failure(String),
    /// Not known: the check could not be made.
    Error(String),
}

/// Runs one probe until its task is aborted, or until a startup probe has succeeded.
pub(super) async fn run(target: Target, reports: mpsc::Sender<Report>) {
    let mut prober = Prober::new(target.kind, &target.probe);
    let period = probe::period(&target.probe);
    tokio::time::sleep(probe::initial_delay(&target.probe).saturating_sub(target.age)).await;
    loop {
        let started = tokio::time::Instant::now();
        let found = check(&target).await;
        let success = match &found {
            Found::Success => Some(true),
            Found::Failure(_) => Some(false),
            Found::Error(_) => None,
        };
        let message = match found {
            Found::Success => None,
            Found::Failure(text) => Some(format!("{} probe failed: {text}", target.kind.word())),
            Found::Error(text) => Some(format!("{} probe errored: {text}", target.kind.word())),
        };
        if let Some(message) = message {
            let container = target.container.name.clone();
            let report = Report::Failed { container, kind: target.kind, message };
            if reports.send(report).await.is_err() {
                return;
            }
        }
        if let Some(success) = success.and_then(|success| prober.handle_result(success)) {
            let container_id = target.container_id.clone();
            let report = Report::Verdict { container_id, kind: target.kind, success };
            if reports.send(report).await.is_err() {
                return;
            }
            // Its purpose is fulfilled, or the container is about to be killed.
            if target.kind == Kind::Startup || (target.kind == Kind::Liveness && !success) {
                return;
            }
        }
        tokio::time::sleep_until(started + period).await;
    }
}

async fn check(target: &Target) -> Found {
    let timeout = probe::timeout(&target.probe);
    let host = |own: &Option<String>| {
        own.clone().filter(|host| !host.is_empty()).or_else(|| target.host.clone())
    };
    if let Some(exec) = &target.probe.exec {
        let command = exec.command.clone().unwrap_or_default();
        return check_exec(target, &command, timeout).await;
    }
    if let Some(get) = &target.probe.http_get {
        let (Some(host), Some(port)) = (host(&get.host), probe::port(&get.port, &target.container))
        else {
            return Found::Error("no address or port to ask".to_owned());
        };
        return check_http(get, &host, port, timeout).await;
    }
    if let Some(tcp) = &target.probe.tcp_socket {
        let (Some(host), Some(port)) = (host(&tcp.host), probe::port(&tcp.port, &target.container))
        else {
            return Found::Error("no address or port to ask".to_owned());
        };
        return match connect(&host, port, timeout).await {
            Ok(_) => Found::Success,
            Err(error) => Found::Failure(error),
        };
    }
    Found::Error("this kind of probe is not supported on this node".to_owned())
}

async fn check_exec(target: &Target, command: &[String], timeout: Duration) -> Found {
    let call = target.runtime.exec_sync(&target.container_id, command, timeout);
    match tokio::time::timeout(timeout + Duration::from_secs(1), call).await {
        Ok(Ok(output)) if output.exit_code == 0 => Found::Success,
        Ok(Ok(output)) => {
            let mut bytes = output.stdout;
            bytes.extend(output.stderr);
            bytes.truncate(OUTPUT_MAX);
            Found::Failure(String::from_utf8_lossy(&bytes).into_owned())
        }
        Err(_) => Found::Failure(timed_out(command, timeout)),
        Ok(Err(error)) if error.reason().contains("timeout") => {
            Found::Failure(timed_out(command, timeout))
        }
        Ok(Err(error)) => Found::Error(error.to_string()),
    }
}

fn timed_out(command: &[String], timeout: Duration) -> String {
    format!("command \"{}\" timed out after {timeout:?}", command.join(" "))
}

async fn check_http(get: &HTTPGetAction, host: &str, port: u16, timeout: Duration) -> Found {
    match tokio::time::timeout(timeout, http_get(get, host, port, timeout)).await {
        Err(_) => {
            Found::Failure(format!("Get \"{}\": context deadline exceeded", url(get, host, port)))
        }
        Ok(Err(error)) => Found::Failure(format!("Get \"{}\": {error}", url(get, host, port))),
        Ok(Ok(status)) if (200..400).contains(&status) => Found::Success,
        Ok(Ok(status)) => Found::Failure(format!("HTTP probe failed with statuscode: {status}")),
    }
}

/// Sends one request and reads the answer's status. Also the `httpGet` of hooks.
pub(super) async fn http_get(
    get: &HTTPGetAction,
    host: &str,
    port: u16,
    timeout: Duration,
) -> Result<u16, String> {
    let stream = connect(host, port, timeout).await?;
    let path = get.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/");
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let mut request = Request::get(path).header("user-agent", USER_AGENT);
    let mut has_host = false;
    let mut has_accept = false;
    for header in get.http_headers.iter().flatten() {
        has_host |= header.name.eq_ignore_ascii_case("host");
        has_accept |= header.name.eq_ignore_ascii_case("accept");
        if !header.value.is_empty() {
            request = request.header(&header.name, &header.value);
        }
    }
    if !has_host {
        request = request.header("host", format!("{}:{port}", bracketed(host)));
    }
    if !has_accept {
        request = request.header("accept", "*/*");
    }
    let request = request
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    if get.scheme.as_deref() == Some("HTTPS") {
        let stream = tls::connect(stream, host).await?;
        exchange(TokioIo::new(stream), request).await
    } else {
        exchange(TokioIo::new(stream), request).await
    }
}

async fn exchange<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<u16, String>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(stream).await.map_err(|error| error.to_string())?;
    let connection = async {
        let _ = connection.await;
        std::future::pending::<()>().await
    };
    let answer = async {
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = answer.status().as_u16();
        // Read as much as an event would show, so that the server can finish its answer.
        let _ = Limited::new(answer.into_body(), OUTPUT_MAX).collect().await;
        Ok(status)
    };
    tokio::select! {
        answer = answer => answer,
        () = connection => Err("connection closed".to_owned()),
    }
}

async fn connect(host: &str, port: u16, timeout: Duration) -> Result<TcpStream, String> {
    let address = format!("{}:{port}", bracketed(host));
    match tokio::time::timeout(timeout, TcpStream::connect((host, port))).await {
        Err(_) => Err(format!("dial tcp {address}: i/o timeout")),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            Err(format!("dial tcp {address}: connect: connection refused"))
        }
        Ok(Err(error)) => Err(format!("dial tcp {address}: {error}")),
        Ok(Ok(stream)) => Ok(stream),
    }
}

fn url(get: &HTTPGetAction, host: &str, port: u16) -> String {
    let scheme = get.scheme.as_deref().unwrap_or("HTTP").to_lowercase();
    let path = get.path.as_deref().unwrap_or("/");
    format!("{scheme}://{}:{port}{path}", bracketed(host))
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// Servers tell probes from visitors by this.
const USER_AGENT: &str = "kube-probe/1.36";

/// Encryption without verification: a probe asks whether a server answers, not who it is.
mod tls {
    use std::sync::Arc;

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
    use tokio::net::TcpStream;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client::TlsStream;

    pub(super) async fn connect(
        stream: TcpStream,
        host: &str,
    ) -> Result<TlsStream<TcpStream>, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer))
            .with_no_client_auth();
        let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
        let connector = TlsConnector::from(Arc::new(config));
        connector.connect(name, stream).await.map_err(|error| error.to_string())
    }

    #[derive(Debug)]
    struct AnyServer;

    impl ServerCertVerifier for AnyServer {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            rustls::crypto::ring::default_provider()
                .signature_verification_algorithms
                .supported_schemes()
        }
    }
}
