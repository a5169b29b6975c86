//! A CA in the form in which KubeEdge keeps it, made before the hub starts, so that certificates for thousands of
//! simulated nodes need no enrolment.

use anyhow::{Context, Result};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{Api, ObjectMeta, PostParams};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use skerry_protocol::enrol::{NODE_ORGANIZATION, common_name};

const NAMESPACE: &str = "kubeedge";
/// Parts of an ECPrivateKey (RFC 5915) on P-256: up to the secret, the curve's name, up to the public point.
const SEC1: [&[u8]; 3] = [
    &[0x30, 0x77, 0x02, 0x01, 0x01, 0x04, 0x20],
    &[0xa0, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07],
    &[0xa1, 0x44, 0x03, 0x42, 0x00],
];
/// Where the secret lies in a PKCS #8 file of a P-256 key with its public point, which is the last 65 bytes.
const PKCS8_SECRET: std::ops::Range<usize> = 36..68;

/// The CA and one key that all simulated nodes share.
pub(crate) struct Pki {
    ca: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    node_key: KeyPair,
}

impl Pki {
    /// Makes the CA and stores it where CloudCore looks for it.
    pub(crate) async fn install(client: &kube::Client) -> Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params("KubeEdge", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages.push(KeyUsagePurpose::KeyCertSign);
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        let ca = params.self_signed(&key)?.der().clone();
        let data = [("cadata", ca.to_vec()), ("cakeydata", sec1(&key)?)];
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let metadata = ObjectMeta { name: Some(NAMESPACE.into()), ..ObjectMeta::default() };
        let namespace = Namespace { metadata, ..Namespace::default() };
        namespaces.create(&PostParams::default(), &namespace).await?;
        let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
        let secret = Secret {
            metadata: ObjectMeta { name: Some("casecret".into()), ..ObjectMeta::default() },
            data: Some(data.map(|(key, value)| (key.into(), ByteString(value))).into()),
            type_: Some("Opaque".into()),
            ..Secret::default()
        };
        secrets.create(&PostParams::default(), &secret).await?;
        let issuer = Issuer::from_ca_cert_der(&ca, key)?;
        Ok(Self { ca, issuer, node_key: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)? })
    }

    /// The CA.
    pub(crate) fn ca(&self) -> CertificateDer<'static> {
        self.ca.clone()
    }

    /// The key of every node.
    pub(crate) fn node_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.node_key.serialize_der()).into()
    }

    /// A certificate for `node`.
    pub(crate) fn certificate(&self, node: &str) -> Result<CertificateDer<'static>> {
        let params = params(&common_name(node), Some(NODE_ORGANIZATION));
        Ok(params.signed_by(&self.node_key, &self.issuer)?.der().clone())
    }
}

fn params(name: &str, organization: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    if let Some(organization) = organization {
        subject.push(DnType::OrganizationName, organization);
    }
    subject.push(DnType::CommonName, name);
    params.distinguished_name = subject;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params
}

fn sec1(key: &KeyPair) -> Result<Vec<u8>> {
    let pkcs8 = key.serialize_der();
    let secret = pkcs8.get(PKCS8_SECRET).context("no P-256 key")?;
    let point = &pkcs8[pkcs8.len() - 65..];
    Ok([SEC1[0], secret, SEC1[1], SEC1[2], point].concat())
}
