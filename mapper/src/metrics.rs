//! `GET /healthz` and `GET /metrics` on loopback, in the text format that Prometheus reads.
//!
//! Started by the runtime if the configuration names an address. Every request asks the loop that
//! owns the core, so a mapper that hangs is not healthy. Never writes anything, and says nothing of a
//! device but numbers.

use std::convert::Infallible;
use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::core::Counts;
use crate::service::Question;

/// Most scrapers at a time.
const CONNECTIONS_MAX: usize = 8;
/// Longest time for a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time until the loop has to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until it is dropped.
pub(crate) async fn serve(listener: TcpListener, questions: mpsc::Sender<Question>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(200)).await;
            continue;
        };
        let questions = questions.clone();
        connections.spawn(async move {
            let answer = service_fn(move |request: Request<hyper::body::Incoming>| {
                let questions = questions.clone();
                async move {
                    let counts = tokio::time::timeout(ANSWER_TIMEOUT, counts(&questions)).await;
                    let counts = counts.ok().flatten();
                    Ok::<_, Infallible>(answer(request.method(), request.uri().path(), counts))
                }
            });
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
    }
}

async fn counts(questions: &mpsc::Sender<Question>) -> Option<Counts> {
    let (answer, answered) = oneshot::channel();
    questions.send(Question::Counts(answer)).await.ok()?;
    answered.await.ok()
}

fn answer(method: &Method, path: &str, counts: Option<Counts>) -> Response<Full<Bytes>> {
    let (status, text) = match (method, path, counts) {
        (&Method::GET, "/healthz" | "/metrics", None) => {
            (StatusCode::SERVICE_UNAVAILABLE, "the mapper does not answer\n".to_owned())
        }
        (&Method::GET, "/healthz", Some(_)) => (StatusCode::OK, "ok\n".to_owned()),
        (&Method::GET, "/metrics", Some(counts)) => (StatusCode::OK, page(counts)),
        _ => (StatusCode::NOT_FOUND, "there is /healthz and /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response
}

fn page(counts: Counts) -> String {
    let rows: [(&str, &str, &str, u64); 10] = [
        ("devices", "gauge", "Devices served.", counts.devices as u64),
        ("devices_online", "gauge", "Devices whose state is online.", counts.online as u64),
        ("reads_total", "counter", "Values read or pushed.", counts.reads),
        ("read_errors_total", "counter", "Reads that gave no value.", counts.read_errors),
        ("writes_total", "counter", "Desired values written.", counts.writes),
        ("write_errors_total", "counter", "Writes that failed.", counts.write_errors),
        ("reported_total", "counter", "Values that EdgeCore took.", counts.reported),
        (
            "report_errors_total",
            "counter",
            "Reports that EdgeCore did not take.",
            counts.report_errors,
        ),
        (
            "replaced_total",
            "counter",
            "Values replaced before they were reported.",
            counts.replaced,
        ),
        ("refused_total", "counter", "Devices refused for want of room.", counts.refused),
    ];
    let mut text = String::new();
    for (name, kind, help, value) in rows {
        let _ = writeln!(
            text,
            "# HELP skerry_mapper_{name} {help}\n# TYPE skerry_mapper_{name} {kind}\nskerry_mapper_{name} {value}"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_number_and_unknown_paths_are_not_found() {
        let counts = Counts { devices: 3, reported: 17, ..Counts::default() };
        let text = page(counts);
        assert!(text.contains("\nskerry_mapper_devices 3\n"), "{text}");
        assert!(text.contains("\nskerry_mapper_reported_total 17\n"), "{text}");
        let status = |method, path, counts| answer(&method, path, counts).status();
        assert_eq!(status(Method::POST, "/metrics", Some(counts)), StatusCode::NOT_FOUND);
        assert_eq!(status(Method::GET, "/healthz", Some(counts)), StatusCode::OK);
        assert_eq!(status(Method::GET, "/healthz", None), StatusCode::SERVICE_UNAVAILABLE);
    }
}
