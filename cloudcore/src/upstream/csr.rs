//! Certificate requests of nodes, for the certificate with which a node serves.
//!
//! KubeEdge's edge asks for one when its local API authorizes requests. KubeEdge approves every request of that
//! signer; here a node gets approval for its own name and for addresses that are its own, and for no other.
//!
//! Source: kubeedge/kubeedge, edge/pkg/metamanager/metaserver/certificate/manager.go,
//! cloud/pkg/csrapprovercontroller/csrapprover.go; kubernetes/kubernetes, pkg/apis/certificates/helpers.go.

use super::answer::Refused;
use super::rest::{self, Done};
use super::{Outcome, Upstream, content_object};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use skerry_cloudcore_core::upstream::answer::{Status, without_type};
use skerry_protocol::{Message, Operation, ResourcePath};
use std::collections::BTreeSet;
use std::net::IpAddr;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

const ROOT: &str = "/apis/certificates.k8s.io/v1";
const SIGNER: &str = "kubernetes.io/kubelet-serving";
const GROUP: &str = "system:nodes";
/// The usages of a serving certificate; `key encipherment` is for RSA keys and may be left out.
const USAGES: [&str; 2] = ["digital signature", "server auth"];
const RSA_USAGE: &str = "key encipherment";

/// What a request asks to be called, beside the node's name.
#[derive(Debug, Default, PartialEq, Eq)]
struct Names {
    dns: BTreeSet<String>,
    addresses: BTreeSet<IpAddr>,
}

impl Upstream {
    pub(super) async fn csr(&self, node: &str, path: &ResourcePath, request: &Message) -> Outcome {
        match request.operation() {
            Some(Operation::Insert) => {
                let done = self.insert_csr(node, path, request).await;
                Outcome::Object { done, version: false }
            }
            Some(Operation::Query) => Outcome::Read(self.query_csr(node, path).await),
            _ => Outcome::unsupported(request),
        }
    }

    async fn insert_csr(&self, node: &str, path: &ResourcePath, request: &Message) -> Done {
        let object = content_object(request)?;
        let names = check(node, &object["spec"])?;
        // Only what a node may ask for; metadata could hold an owner, status an approval.
        let mut spec = json!({"signerName": SIGNER, "request": object["spec"]["request"],
            "usages": object["spec"]["usages"]});
        if object["spec"]["expirationSeconds"].is_number() {
            spec["expirationSeconds"] = object["spec"]["expirationSeconds"].clone();
        }
        let metadata = match object["metadata"]["generateName"].as_str() {
            Some(prefix) if object["metadata"]["name"].as_str().unwrap_or_default().is_empty() => {
                json!({"generateName": prefix})
            }
            _ => json!({"name": rest::segment(path.name().unwrap_or_default())?}),
        };
        let csr = json!({"kind": "CertificateSigningRequest", "apiVersion": "certificates.k8s.io/v1",
            "metadata": metadata, "spec": spec});
        let place = rest::path(ROOT, "", "certificatesigningrequests", "")?;
        let created = self.rest(node).create(&place, &csr).await?;
        self.approve(node, &created, names).await;
        Ok(without_type(created))
    }

    /// Approves again what could not be approved when it was made.
    async fn query_csr(&self, node: &str, path: &ResourcePath) -> Done {
        let name = rest::segment(path.name().unwrap_or_default())?;
        let place = rest::path(ROOT, "", "certificatesigningrequests", name)?;
        let mut csr = self.rest(node).get(&place).await?;
        let Ok(names) = check(node, &csr["spec"]) else {
            let reason = format!("certificate request `{name}` is not of node `{node}`");
            return Err(Refused::Forbidden(reason));
        };
        if csr["status"]["conditions"].as_array().is_none_or(Vec::is_empty) {
            self.approve(node, &csr, names).await;
        }
        csr["kind"] = "CertificateSigningRequest".into();
        csr["apiVersion"] = "certificates.k8s.io/v1".into();
        Ok(csr)
    }

    async fn approve(&self, node: &str, csr: &Value, names: Names) {
        let name = csr["metadata"]["name"].as_str().unwrap_or_default();
        let approved = async {
            self.check_names(node, &names).await?;
            let mut csr = csr.clone();
            csr["kind"] = "CertificateSigningRequest".into();
            csr["apiVersion"] = "certificates.k8s.io/v1".into();
            csr["status"] = json!({"conditions": [{"type": "Approved", "status": "True",
                "reason": "AutoApproved", "message": "The node asks for its own serving certificate."}]});
            let place = rest::path(ROOT, "", "certificatesigningrequests", rest::segment(name)?)?;
            self.own_rest().replace(&format!("{place}/approval"), &csr).await
        };
        match approved.await {
            Ok(_) => tracing::info!(node, csr = name, "certificate request approved"),
            Err(error) => {
                tracing::warn!(node, csr = name, %error, "certificate request not approved; an administrator may");
            }
        }
    }

    /// Addresses of this machine alone are nobody's; others have to be in the status of the Node.
    async fn check_names(&self, node: &str, names: &Names) -> Result<(), Refused> {
        let is_local = |address: &IpAddr| match address {
            IpAddr::V4(address) => address.is_loopback() || address.is_link_local(),
            IpAddr::V6(address) => address.is_loopback() || address.is_unicast_link_local(),
        };
        let foreign_names: Vec<_> =
            names.dns.iter().filter(|name| *name != node && *name != "localhost").collect();
        let foreign_addresses: Vec<_> =
            names.addresses.iter().filter(|address| !is_local(address)).collect();
        if foreign_names.is_empty() && foreign_addresses.is_empty() {
            return Ok(());
        }
        let object = self.own_rest().get(&rest::core("", "nodes", node)?).await?;
        let known = |text: &str| {
            let addresses = object["status"]["addresses"].as_array();
            addresses.into_iter().flatten().any(|known| known["address"] == text)
        };
        let unknown = foreign_names.iter().find(|name| !known(name)).map(|name| (*name).clone());
        let unknown = unknown.or_else(|| {
            foreign_addresses.iter().map(ToString::to_string).find(|address| !known(address))
        });
        match unknown {
            None => Ok(()),
            Some(name) => {
                Err(Refused::Forbidden(format!("`{name}` is not known to be of node `{node}`")))
            }
        }
    }
}

/// Checks that a request is for the serving certificate of `node`.
fn check(node: &str, spec: &Value) -> Result<Names, Refused> {
    if spec["signerName"] != SIGNER {
        let found = spec["signerName"].as_str().unwrap_or_default();
        return Err(Refused::Forbidden(format!(
            "a node may ask signer `{SIGNER}` only, not `{found}`"
        )));
    }
    let usages: BTreeSet<&str> =
        spec["usages"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let (needed, with_rsa) =
        (BTreeSet::from(USAGES), USAGES.into_iter().chain([RSA_USAGE]).collect());
    if usages != needed && usages != with_rsa {
        return Err(Refused::Forbidden("these are not the usages of a serving certificate".into()));
    }
    let bad = || Refused::Invalid("`spec.request` is no certificate request".into());
    let pem = STANDARD.decode(spec["request"].as_str().unwrap_or_default()).map_err(|_| bad())?;
    let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).map_err(|_| bad())?;
    let (_, csr) = X509CertificationRequest::from_der(&pem.contents).map_err(|_| bad())?;
    let subject = &csr.certification_request_info.subject;
    let common: Vec<_> = subject.iter_common_name().filter_map(|name| name.as_str().ok()).collect();
    let groups: Vec<_> =
        subject.iter_organization().filter_map(|name| name.as_str().ok()).collect();
    if common != [format!("system:node:{node}")] || groups != [GROUP] {
        let found = common.join(" ");
        return Err(Refused::Forbidden(format!(
            "node `{node}` may not ask for a certificate of `{found}`"
        )));
    }
    let mut names = Names::default();
    for extension in csr.requested_extensions().into_iter().flatten() {
        let ParsedExtension::SubjectAlternativeName(alternatives) = extension else { continue };
        for name in &alternatives.general_names {
            match name {
                GeneralName::DNSName(name) => {
                    names.dns.insert((*name).to_owned());
                }
                GeneralName::IPAddress(bytes) => {
                    names.addresses.insert(address(bytes).ok_or_else(bad)?);
                }
                _ => {
                    let reason = "a serving certificate holds DNS names and addresses only";
                    return Err(Refused::Forbidden(reason.into()));
                }
            }
        }
    }
    if names == Names::default() {
        let message = "a serving certificate needs a DNS name or an address";
        return Err(Refused::Api(Box::new(Status::new(400, "BadRequest", message))));
    }
    Ok(names)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(bytes.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    fn spec(common: &str, group: &str, alternatives: Vec<SanType>) -> Value {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.distinguished_name.push(DnType::CommonName, common);
        params.subject_alt_names = alternatives;
        let pem = params.serialize_request(&key).expect("a request").pem().expect("text");
        json!({"signerName": SIGNER, "usages": ["server auth", "digital signature"],
            "request": STANDARD.encode(pem)})
    }

    fn local() -> Vec<SanType> {
        vec![
            SanType::IpAddress([127, 0, 0, 1].into()),
            SanType::IpAddress([169, 254, 30, 10].into()),
        ]
    }

    #[test]
    fn a_node_asks_for_its_own_name() {
        let names = check("edge1", &spec("system:node:edge1", GROUP, local())).expect("its own");
        assert_eq!(names.addresses.len(), 2);
        for (common, group) in [
            ("system:node:edge2", GROUP),
            ("system:node:edge1", "system:masters"),
            ("admin", GROUP),
        ] {
            let refused = check("edge1", &spec(common, group, local()));
            assert!(matches!(refused, Err(Refused::Forbidden(_))), "{common} {group}");
        }
    }

    #[test]
    fn only_serving_certificates_are_asked_for() {
        let good = spec("system:node:edge1", GROUP, local());
        let changed = |field: &str, value: Value| {
            let mut spec = good.clone();
            spec[field] = value;
            check("edge1", &spec)
        };
        assert!(
            changed("usages", json!(["digital signature", "key encipherment", "server auth"]))
                .is_ok()
        );
        assert!(changed("usages", json!(["client auth", "digital signature"])).is_err());
        assert!(changed("signerName", json!("kubernetes.io/kube-apiserver-client")).is_err());
        assert!(matches!(changed("request", json!("AAAA")), Err(Refused::Invalid(_))));
        assert!(matches!(changed("request", json!(7)), Err(Refused::Invalid(_))));
        assert!(check("edge1", &spec("system:node:edge1", GROUP, vec![])).is_err());
        let uri = vec![SanType::URI("spiffe://x".try_into().expect("ASCII"))];
        assert!(check("edge1", &spec("system:node:edge1", GROUP, uri)).is_err());
    }
}
