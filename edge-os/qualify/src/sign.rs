//! Signing a report with the key of the node's certificate, and checking such a signature.
//!
//! EdgeCore signs; `skerry qualify verify` and whoever reads the object in the cluster check. What is signed is the digest of
//! the stable part, the time and the boot, behind a line that no other signature of the node's key begins with. The
//! certificate lies beside it, so that the CA is all that a verifier needs.
//!
//! Facts: RFC 5480 (ECDSA with P-256 and SHA-256, ASN.1); RFC 5280 (chains); the subject of a node's certificate is
//! Kubernetes' `O=system:nodes, CN=system:node:<name>`.

use crate::report::{File, Report, Volatile};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// First line of what is signed.
const CONTEXT: &str = "skerry qualification report v1";
/// The one algorithm.
pub const ALGORITHM: &str = "ecdsa-p256-sha256";
/// What the common name of a node's certificate begins with.
const NODE_PREFIX: &str = "system:node:";
/// What its organization is.
const NODE_ORGANIZATION: &str = "system:nodes";

/// A node's signature over a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Signature {
    /// [`ALGORITHM`].
    pub algorithm: String,
    /// When the report was made, seconds since 1970.
    pub at_s: u64,
    /// Id of the boot in which it was made.
    #[serde(default)]
    pub boot_id: String,
    /// The signature, ASN.1, in hexadecimal.
    pub value: String,
    /// PEM of the node's certificate.
    pub certificate: String,
}

/// Who signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signer {
    /// Name of the node.
    pub node: String,
    /// Serial number of its certificate, hexadecimal.
    pub serial: String,
}

/// Why a report could not be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The key is no ECDSA key of P-256 in PKCS #8, or there is none.
    #[error("the node's key cannot sign: {0}")]
    Key(String),
    /// The certificate is none.
    #[error("the node's certificate cannot be read: {0}")]
    Certificate(String),
}

/// Why a signature does not hold.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// There is none.
    #[error("the report is not signed")]
    NotSigned,
    /// The report says another digest than it has.
    #[error("the report was changed: it says `{said}` and is `{found}`")]
    Changed {
        /// What stands there.
        said: String,
        /// What it is.
        found: String,
    },
    /// Not one of ours.
    #[error("the signature is of kind `{0}`, expected `{ALGORITHM}`")]
    Algorithm(String),
    /// A certificate that is none.
    #[error("{of} cannot be read: {reason}")]
    Certificate {
        /// Whose.
        of: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The CA did not sign this certificate, or it was not good then.
    #[error("the CA does not vouch for the certificate: {0}")]
    Chain(String),
    /// The certificate is not a node's.
    #[error("the certificate is of `{0}`, which is no node")]
    NoNode(String),
    /// The signature does not fit.
    #[error("the signature does not fit the report")]
    Signature,
}

impl VerifyError {
    /// What a person can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotSigned => {
                "EdgeCore signs what it judges; take the report from the node or from the cluster"
            }
            Self::Changed { .. } | Self::Signature => "take the report from the node again",
            Self::Chain(_) => {
                "name the CA of the cluster that the node joined, all of them if it was replaced"
            }
            Self::Algorithm(_) | Self::Certificate { .. } | Self::NoNode(_) => {
                "take a report that a node's EdgeCore wrote"
            }
        }
    }
}

/// What is signed.
fn message(digest: &str, at_s: u64, boot_id: &str) -> String {
    format!("{CONTEXT}\n{digest}\n{at_s}\n{boot_id}\n")
}

/// Signs a report with `pem`, which holds the node's key and its certificate. Of the volatile part time and boot count.
///
/// # Errors
///
/// [`SignError`] when either part is missing or of another kind.
pub fn sign(report: &Report, volatile: &Volatile, pem: &str) -> Result<Signature, SignError> {
    let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| SignError::Key(error.to_string()))?;
    let random = SystemRandom::new();
    let key =
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, key.secret_pkcs8_der(), &random)
            .map_err(|error| SignError::Key(error.to_string()))?;
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| SignError::Certificate(error.to_string()))?;
    let (at_s, boot_id) = (volatile.at_s, volatile.boot_id.clone().unwrap_or_default());
    let signed = key
        .sign(&random, message(&report.digest(), at_s, &boot_id).as_bytes())
        .map_err(|error| SignError::Key(error.to_string()))?;
    Ok(Signature {
        algorithm: ALGORITHM.into(),
        at_s,
        boot_id,
        value: hex(signed.as_ref()),
        certificate: pem_of(&certificate),
    })
}

/// Checks that a node which one of the CAs of `ca_pem` vouches for has signed the report of `file`. Certificates are judged
/// at the time of the report: a node's is renewed long before a report is of no more use.
///
/// # Errors
///
/// [`VerifyError`], the first thing that does not hold.
pub fn verify(file: &File, ca_pem: &str) -> Result<Signer, VerifyError> {
    let signature = file.signature.as_ref().ok_or(VerifyError::NotSigned)?;
    let found = file.report.digest();
    if file.digest != found {
        return Err(VerifyError::Changed { said: file.digest.clone(), found });
    }
    if file.volatile.as_ref().is_some_and(|volatile| volatile.at_s != signature.at_s) {
        return Err(VerifyError::Signature);
    }
    if signature.algorithm != ALGORITHM {
        return Err(VerifyError::Algorithm(signature.algorithm.clone()));
    }
    let bad = |of: &'static str| move |reason: String| VerifyError::Certificate { of, reason };
    let node = "the node's certificate";
    let der = CertificateDer::from_pem_slice(signature.certificate.as_bytes())
        .map_err(|error| bad(node)(error.to_string()))?;
    let cas: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(ca_pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| bad("the CA")(error.to_string()))?;
    if cas.is_empty() {
        return Err(bad("the CA")("the file holds no certificate".into()));
    }
    let anchors: Vec<_> = cas
        .iter()
        .map(webpki::anchor_from_trusted_cert)
        .collect::<Result<_, _>>()
        .map_err(|error| bad("the CA")(error.to_string()))?;
    let end =
        webpki::EndEntityCert::try_from(&der).map_err(|error| bad(node)(error.to_string()))?;
    let time = UnixTime::since_unix_epoch(Duration::from_secs(signature.at_s));
    end.verify_for_usage(
        &[webpki::ring::ECDSA_P256_SHA256, webpki::ring::ECDSA_P384_SHA384],
        &anchors,
        &[],
        time,
        webpki::KeyUsage::client_auth(),
        None,
        None,
    )
    .map_err(|error| VerifyError::Chain(error.to_string()))?;
    let (_, parsed) =
        x509_parser::parse_x509_certificate(&der).map_err(|error| bad(node)(error.to_string()))?;
    let subject = parsed.subject();
    let name =
        subject.iter_common_name().next().and_then(|name| name.as_str().ok()).unwrap_or_default();
    let is_node = subject
        .iter_organization()
        .any(|organization| organization.as_str().is_ok_and(|text| text == NODE_ORGANIZATION));
    let node = name
        .strip_prefix(NODE_PREFIX)
        .filter(|node| is_node && !node.is_empty())
        .ok_or_else(|| VerifyError::NoNode(subject.to_string()))?;
    let value = unhex(&signature.value).ok_or(VerifyError::Signature)?;
    let key = parsed.public_key().subject_public_key.data.as_ref();
    ring::signature::UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
        .verify(message(&found, signature.at_s, &signature.boot_id).as_bytes(), &value)
        .map_err(|_| VerifyError::Signature)?;
    Ok(Signer { node: node.to_owned(), serial: parsed.raw_serial_as_string().replace(':', "") })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    // Bytes, not characters: whoever wrote this may have put anything there.
    let bytes = text.as_bytes();
    if !bytes.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    bytes.chunks(2).map(|pair| Some((digit(pair[0])? * 16 + digit(pair[1])?) as u8)).collect()
}

/// PEM of a certificate, 64 characters a line.
fn pem_of(der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in der.chunks(3) {
        let bits = three
            .iter()
            .enumerate()
            .fold(0u32, |all, (at, byte)| all | u32::from(*byte) << (16 - 8 * at));
        for at in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * at) & 63) as usize];
            text.push(if at <= three.len() { char::from(digit) } else { '=' });
        }
    }
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::Evidence;
    use crate::report::{Mode, Report, Subject, Volatile};
    use crate::table::Table;
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    };

    fn signed(file: &File, pem: &str) -> Signature {
        sign(&file.report, file.volatile.as_ref().expect("there"), pem).expect("signs")
    }

    fn file() -> File {
        let table = Table::built_in();
        let report = Report::new(&table, &Evidence::default(), Mode::Live, Subject::default());
        let volatile =
            Volatile { at_s: 1_795_402_089, boot_id: Some("b".into()), ..Volatile::default() };
        File { digest: report.digest(), report, volatile: Some(volatile), signature: None }
    }

    struct Authority {
        pem: String,
        issuer: Issuer<'static, KeyPair>,
    }

    fn authority() -> Authority {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("signs itself").pem();
        Authority { pem, issuer: Issuer::new(params, key) }
    }

    fn node(ca: &Authority, name: &str, organization: &str) -> String {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, organization);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &ca.issuer).expect("signed");
        format!("{}{}", key.serialize_pem(), certificate.pem())
    }

    #[test]
    fn a_nodes_signature_holds_and_every_change_breaks_it() {
        let ca = authority();
        let mut file = file();
        let pem = node(&ca, "system:node:edge1", "system:nodes");
        assert!(matches!(verify(&file, &ca.pem), Err(VerifyError::NotSigned)));
        file.signature = Some(signed(&file, &pem));
        let text = serde_json::to_string(&file).expect("texts");
        let read: File = serde_json::from_str(&text).expect("reads back");
        assert_eq!(verify(&read, &ca.pem).expect("holds").node, "edge1");

        let mut changed = file.clone();
        changed.report.subject.kernel = "6.99".into();
        assert!(matches!(verify(&changed, &ca.pem), Err(VerifyError::Changed { .. })));
        changed.digest = changed.report.digest();
        assert!(matches!(verify(&changed, &ca.pem), Err(VerifyError::Signature)));
        let mut later = file.clone();
        later.volatile.as_mut().expect("there").at_s += 1;
        assert!(matches!(verify(&later, &ca.pem), Err(VerifyError::Signature)));
        later.volatile = None;
        later.signature.as_mut().expect("there").at_s += 1;
        assert!(matches!(verify(&later, &ca.pem), Err(VerifyError::Signature)));
        let mut other = file.clone();
        other.signature.as_mut().expect("there").value = "zz".into();
        assert!(matches!(verify(&other, &ca.pem), Err(VerifyError::Signature)));
        assert!(matches!(verify(&file, &authority().pem), Err(VerifyError::Chain(_))));
        assert!(matches!(verify(&file, "no PEM"), Err(VerifyError::Certificate { .. })));
    }

    #[test]
    fn only_nodes_can_sign() {
        let ca = authority();
        let mut file = file();
        for (name, organization) in [
            ("admin", "system:masters"),
            ("system:node:edge1", "system:masters"),
            ("edge1", "system:nodes"),
        ] {
            file.signature = Some(signed(&file, &node(&ca, name, organization)));
            assert!(matches!(verify(&file, &ca.pem), Err(VerifyError::NoNode(_))), "{name}");
        }
        let (report, volatile) = (&file.report, &Volatile::default());
        assert!(matches!(sign(report, volatile, "nothing"), Err(SignError::Key(_))));
    }

    #[test]
    fn a_time_outside_of_the_certificate_is_refused() {
        let ca = authority();
        let mut file = file();
        let pem = node(&ca, "system:node:edge1", "system:nodes");
        file.volatile.as_mut().expect("there").at_s = 99_999_999_999;
        file.signature = Some(signed(&file, &pem));
        assert!(matches!(verify(&file, &ca.pem), Err(VerifyError::Chain(_))));
    }
}
