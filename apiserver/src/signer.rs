//! Signs approved CertificateSigningRequests with the server's authority.
//!
//! One task that follows the stored requests. It signs for the signers of [`Signer`], which are Kubernetes' own; requests
//! to any other signer are for somebody else. A request that its signer may not sign gets the condition `Failed`.
//! Nothing here approves: that is a right of its own (`approve` on `signers`).
//!
//! Source: kubernetes.io, "Certificates and Certificate Signing Requests".

use crate::api::{Api, key};
use crate::handlers::write::{Options, Writer, now};
use crate::hub::Op;
use crate::pki::Pki;
use crate::store::{Key, Range};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use skerry_apiserver_core::status::ApiError;
use std::sync::Arc;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

/// Name under which these writes own fields.
const MANAGER: &str = "skerry-signer";
/// Signer of the certificates with which kubelets serve.
pub(crate) const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
const GROUP: &str = "certificates.k8s.io";
const RESOURCE: &str = "certificatesigningrequests";
const NODES: &str = "system:nodes";
const NODE_PREFIX: &str = "system:node:";
/// The group that may do everything is given with a kubeconfig, never by signing a request.
const MASTERS: &str = crate::auth::MASTERS;

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signer {
    /// A client of the API under any name.
    Client,
    /// A kubelet as a client.
    KubeletClient,
    /// A kubelet as a server.
    KubeletServing,
}

impl Signer {
    fn of(name: &str) -> Option<Self> {
        match name {
            "kubernetes.io/kube-apiserver-client" => Some(Self::Client),
            "kubernetes.io/kube-apiserver-client-kubelet" => Some(Self::KubeletClient),
            KUBELET_SERVING => Some(Self::KubeletServing),
            _ => None,
        }
    }
}

/// Signs until `stop`.
pub(crate) async fn run(api: Arc<Api>, pki: Arc<Pki>, stop: CancellationToken) {
    let mut changes = api.store.hub().subscribe(&GROUP.into(), &RESOURCE.into());
    let mut behind = true;
    loop {
        if behind {
            behind = false;
            let range = Range::all(GROUP.into(), RESOURCE.into(), None);
            match api.store.list(range, |_| true).await {
                Ok(listing) => {
                    for request in listing.items {
                        look_at(&api, &pki, &request).await;
                    }
                }
                Err(error) => tracing::error!(%error, "signing requests were not read"),
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            event = changes.recv() => match event {
                Ok(event) if event.op == Op::Put => look_at(&api, &pki, &event.object).await,
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => behind = true,
                Err(RecvError::Closed) => return,
            },
        }
    }
}

/// Signs or fails `request` if that is due.
async fn look_at(api: &Api, pki: &Pki, request: &Value) {
    let Some(signer) = Signer::of(request["spec"]["signerName"].as_str().unwrap_or_default())
    else {
        return;
    };
    let is_due = has(request, "Approved")
        && !has(request, "Denied")
        && !has(request, "Failed")
        && request["status"]["certificate"].as_str().is_none_or(str::is_empty)
        && request["metadata"]["deletionTimestamp"].is_null();
    if !is_due {
        return;
    }
    let name = request["metadata"]["name"].as_str().unwrap_or_default();
    let outcome = sign(pki, signer, &request["spec"]);
    if let Err(reason) = &outcome {
        tracing::info!(request = name, reason, "signing request is refused");
    }
    if let Err(error) = store(api, name, &outcome).await {
        // Gone meanwhile, or the store is in trouble; a later change or start looks again.
        tracing::warn!(request = name, error = error.message, "outcome of signing was not stored");
    }
}

async fn store(api: &Api, name: &str, outcome: &Result<String, String>) -> Result<(), ApiError> {
    let catalog = api.catalog();
    let resource = catalog.find(GROUP, "v1", RESOURCE).ok_or_else(ApiError::unknown_path)?;
    let options = Options::internal(MANAGER);
    let writer = Writer { api, catalog: &catalog, resource: &resource, options: &options };
    let key: Key = key(&resource, None, name);
    let written = writer.modify(&key, "status", true, |live| {
        let mut new = live.clone();
        match outcome {
            Ok(pem) => new["status"]["certificate"] = STANDARD.encode(pem).into(),
            Err(reason) => {
                let condition = json!({
                    "type": "Failed", "status": "True", "reason": "SignerValidationFailure",
                    "message": reason, "lastUpdateTime": now(), "lastTransitionTime": now(),
                });
                match new["status"]["conditions"].as_array_mut() {
                    Some(list) => list.push(condition),
                    None => new["status"]["conditions"] = json!([condition]),
                }
            }
        }
        Ok(new)
    });
    written.await.map(drop)
}

/// The certificate as PEM, or why there is none.
fn sign(pki: &Pki, signer: Signer, spec: &Value) -> Result<String, String> {
    let pem = STANDARD
        .decode(spec["request"].as_str().unwrap_or_default())
        .map_err(|error| format!("`spec.request` is not base64: {error}"))?;
    let der = CertificateSigningRequestDer::from_pem_slice(&pem)
        .map_err(|_| "`spec.request` holds no PEM block of a certificate request")?;
    let usages: Vec<&str> =
        spec["usages"].as_array().into_iter().flatten().filter_map(|one| one.as_str()).collect();
    check(signer, &der, &usages)?;
    let life_s = spec["expirationSeconds"].as_i64();
    pki.sign(&der, &usages, life_s).map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
        format!("{error}{}", cause.unwrap_or_default())
    })
}

/// Whether `signer` may sign the request, by its rules.
fn check(
    signer: Signer,
    der: &CertificateSigningRequestDer<'_>,
    usages: &[&str],
) -> Result<(), String> {
    let (_, request) = X509CertificationRequest::from_der(der)
        .map_err(|error| format!("the certificate request cannot be read: {error}"))?;
    let subject = &request.certification_request_info.subject;
    let organizations: Vec<&str> =
        subject.iter_organization().filter_map(|one| one.as_str().ok()).collect();
    let name = subject.iter_common_name().next().and_then(|one| one.as_str().ok());
    let name = name.unwrap_or_default();
    let names: Vec<&GeneralName<'_>> = request
        .requested_extensions()
        .into_iter()
        .flatten()
        .filter_map(|extension| match extension {
            ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
            _ => None,
        })
        .flatten()
        .collect();
    let (needed, allowed): (&str, &[&str]) = match signer {
        Signer::Client | Signer::KubeletClient => {
            ("client auth", &["client auth", "digital signature", "key encipherment"])
        }
        Signer::KubeletServing => {
            ("server auth", &["server auth", "digital signature", "key encipherment"])
        }
    };
    if !usages.contains(&needed) {
        return Err(format!("usage `{needed}` is required"));
    }
    if let Some(other) = usages.iter().find(|one| !allowed.contains(one)) {
        return Err(format!("usage `{other}` is not signed here"));
    }
    match signer {
        Signer::Client => {
            if organizations.iter().flat_map(|one| one.split(',')).any(|one| one == MASTERS) {
                return Err(format!("no certificate is signed for organization `{MASTERS}`"));
            }
            if name.is_empty() {
                return Err("the certificate request has no common name".into());
            }
        }
        Signer::KubeletClient | Signer::KubeletServing => {
            if organizations != [NODES] {
                return Err(format!("organization has to be `{NODES}` alone"));
            }
            if name.strip_prefix(NODE_PREFIX).is_none_or(str::is_empty) {
                return Err(format!("common name has to begin with `{NODE_PREFIX}`"));
            }
        }
    }
    let addressed =
        |one: &&GeneralName<'_>| matches!(one, GeneralName::DNSName(_) | GeneralName::IPAddress(_));
    match signer {
        Signer::KubeletClient if !names.is_empty() => {
            Err("alternative names are not allowed".into())
        }
        Signer::KubeletServing if !names.iter().all(addressed) => {
            Err("alternative names other than DNS names and IP addresses are not allowed".into())
        }
        Signer::KubeletServing if names.is_empty() => {
            Err("a DNS name or an IP address is required".into())
        }
        _ => Ok(()),
    }
}

/// Whether `request` has a condition.
fn has(request: &Value, condition: &str) -> bool {
    let conditions = request["status"]["conditions"].as_array();
    conditions.is_some_and(|list| {
        list.iter().any(|one| one["type"] == condition && one["status"] != "False")
    })
}
