//! Questions to CloudCore's monitor, which is plain HTTP on the machine where it runs.

use crate::fault::hinted;
use anyhow::Result;
use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

/// Asks for `address`, which lies below `monitor`; an answer of more than `len_max` bytes is refused.
pub(crate) async fn ask(
    monitor: &str,
    address: &str,
    len_max: usize,
) -> Result<(StatusCode, Bytes)> {
    let uri = address.parse::<http::Uri>().ok().filter(|uri| uri.scheme_str() == Some("http"));
    let uri = uri.ok_or_else(|| {
        hinted(
            format!("`{monitor}` is no monitor address"),
            "it looks like http://127.0.0.1:9091; `skerry up` writes its own to up.json",
        )
    })?;
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let answer = client.get(uri).await.map_err(|error| {
        hinted(
            format!("could not ask cloudcore's monitor at {monitor}: {error}"),
            "run this where cloudcore runs, and name its monitor with --monitor (up.json has it)",
        )
    })?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), len_max).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("the answer did not arrive: {error}"))?;
    Ok((status, body.to_bytes()))
}
