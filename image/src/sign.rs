//! Signatures: Authenticode for what the firmware starts, Ed25519 for what an appliance installs.
//!
//! [`Signer::sign`] puts a signature into a program of the firmware (UKI, loader), as Secure Boot wants it: the digest
//! of the program inside a PKCS#7 message, RSA with SHA-256. There is no time in it, so equal input gives equal bytes.
//! [`enrolment`] makes the files with which systemd-boot or a test brings the keys into a firmware. Called by
//! [`crate::build`]; nothing here ever makes or keeps a private key but [`TestKeys`].
//!
//! Source: Microsoft's "Windows Authenticode Portable Executable Signature Format"; RFC 5652; UEFI specification 2.10,
//! sections 8.2.2 and 32.4.

use crate::trust::Key;
use crate::uki::{Pe, PeError};
use base64::Engine;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use skerry_init::gpt::Guid;
use std::path::{Path, PathBuf};

/// An RSA key and the certificate that the firmware knows it by.
pub struct Signer {
    key: RsaKeyPair,
    certificate: Vec<u8>,
    /// Name of the issuer, DER.
    issuer: Vec<u8>,
    /// Serial number, DER.
    serial: Vec<u8>,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").finish_non_exhaustive()
    }
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignError {
    /// A file cannot be read.
    #[error("could not read `{path}`")]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not a key, or of a kind that firmware does not take.
    #[error("`{path}` is not a key that can be used here: {what}")]
    Key {
        /// Which file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// Not a certificate.
    #[error("`{path}` is not a certificate: {what}")]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// They do not belong together.
    #[error("the certificate `{certificate}` is not that of the key `{key}`")]
    Pair {
        /// File of the key.
        key: PathBuf,
        /// File of the certificate.
        certificate: PathBuf,
    },
    /// Not a program of the firmware.
    #[error(transparent)]
    Program(#[from] PeError),
    /// The cryptography refused.
    #[error("the key did not sign")]
    Signature,
}

impl SignError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Key { .. } => Some(
                "an RSA key of 2048 to 4096 bits in PEM form: `openssl genrsa -out db.key 2048`",
            ),
            Self::Certificate { .. } => Some(
                "PEM: `openssl req -new -x509 -key db.key -out db.crt -days 7300 -subj \"/CN=db/\"`",
            ),
            Self::Program(PeError::Signed) => Some("sign programs that are not signed yet"),
            _ => None,
        }
    }
}

impl Signer {
    /// Reads key and certificate, both PEM.
    ///
    /// # Errors
    ///
    /// [`SignError`] when they are not what they should be or do not belong together.
    pub fn read(key: &Path, certificate: &Path) -> Result<Self, SignError> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|source| SignError::Read { path: path.into(), source })
        };
        Self::from_pem(&read(key)?, &read(certificate)?, key, certificate)
    }

    /// As [`Signer::read`]; the paths are for errors.
    fn from_pem(
        key: &[u8],
        certificate: &[u8],
        key_path: &Path,
        path: &Path,
    ) -> Result<Self, SignError> {
        let bad_key = |what: String| SignError::Key { path: key_path.into(), what };
        let bad = |what: String| SignError::Certificate { path: path.into(), what };
        let parsed =
            PrivateKeyDer::from_pem_slice(key).map_err(|error| bad_key(error.to_string()))?;
        let pair = match &parsed {
            PrivateKeyDer::Pkcs8(der) => RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()),
            PrivateKeyDer::Pkcs1(der) => RsaKeyPair::from_der(der.secret_pkcs1_der()),
            _ => return Err(bad_key("firmware knows RSA only".into())),
        };
        let pair = pair.map_err(|error| bad_key(error.to_string()))?;
        let der =
            CertificateDer::from_pem_slice(certificate).map_err(|error| bad(error.to_string()))?;
        let (_, x509) =
            x509_parser::parse_x509_certificate(&der).map_err(|error| bad(error.to_string()))?;
        let public: Vec<u8> = ring::signature::KeyPair::public_key(&pair).as_ref().to_vec();
        if x509.public_key().subject_public_key.data != public.as_slice() {
            return Err(SignError::Pair { key: key_path.into(), certificate: path.into() });
        }
        Ok(Self {
            key: pair,
            issuer: x509.issuer().as_raw().to_vec(),
            serial: der::integer(x509.raw_serial()),
            certificate: der.to_vec(),
        })
    }

    /// The certificate, DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// Gives back `program` with a signature at its end.
    ///
    /// # Errors
    ///
    /// [`SignError::Program`] when it is no program, or is signed already.
    pub fn sign(&self, program: &[u8]) -> Result<Vec<u8>, SignError> {
        let mut padded = program.to_vec();
        padded.resize(program.len().next_multiple_of(8), 0);
        let mut pe = Pe::parse(&padded)?;
        let digest = program_digest(&pe)?;
        let content = indirect_data(&digest);
        // What is signed is the content without its own tag and length.
        let attributes = [
            der::sequence(&[der::oid(CONTENT_TYPE), der::set(&[der::oid(SPC_INDIRECT_DATA)])]),
            der::sequence(&[
                der::oid(MESSAGE_DIGEST),
                der::set(&[der::octets(&Sha256::digest(der::inside(&content)))]),
            ]),
        ];
        let message =
            self.signed_data(Some((SPC_INDIRECT_DATA, &content)), Some(&attributes), &[])?;
        let message = der::sequence(&[der::oid(SIGNED_DATA), der::explicit(0, &message)]);
        let length = (8 + message.len()).next_multiple_of(8);
        let offset = u32::try_from(pe.bytes.len()).map_err(|_| PeError::Large)?;
        let at = pe.certificates_at();
        pe.set_u32(at, offset);
        pe.set_u32(at + 4, length as u32);
        let mut signed = pe.bytes;
        signed.extend_from_slice(&(length as u32).to_le_bytes());
        signed.extend_from_slice(&[0x00, 0x02, 0x02, 0x00]);
        signed.extend_from_slice(&message);
        signed.resize(offset as usize + length, 0);
        Ok(signed)
    }

    /// PKCS#7's SignedData: around `content`, or, without, over `detached`.
    fn signed_data(
        &self,
        content: Option<(&[u64], &[u8])>,
        attributes: Option<&[Vec<u8>]>,
        detached: &[u8],
    ) -> Result<Vec<u8>, SignError> {
        let sha256 = der::sequence(&[der::oid(SHA256), der::null()]);
        let rsa = der::sequence(&[der::oid(RSA), der::null()]);
        let content = match content {
            Some((kind, content)) => der::sequence(&[der::oid(kind), der::explicit(0, content)]),
            None => der::sequence(&[der::oid(DATA)]),
        };
        let set = attributes.map(der::set);
        let signed = set.as_deref().unwrap_or(detached);
        let mut signature = vec![0; self.key.public().modulus_len()];
        let random = ring::rand::SystemRandom::new();
        // Random numbers blind the calculation; the result does not depend on them.
        self.key
            .sign(&RSA_PKCS1_SHA256, &random, signed, &mut signature)
            .map_err(|_| SignError::Signature)?;
        let mut signer = vec![
            der::integer(&[1]),
            der::sequence(&[self.issuer.clone(), self.serial.clone()]),
            sha256.clone(),
        ];
        if let Some(set) = &set {
            signer.push(der::tagged(0xa0, der::inside(set)));
        }
        signer.extend([rsa, der::octets(&signature)]);
        Ok(der::sequence(&[
            der::integer(&[1]),
            der::set(&[sha256]),
            content,
            der::tagged(0xa0, &self.certificate),
            der::set(&[der::sequence(&signer)]),
        ]))
    }

    /// An update of a firmware variable that this key allows: a file for `loader/keys/auto`.
    fn variable_update(
        &self,
        variable: &str,
        vendor: Guid,
        list: &[u8],
    ) -> Result<Vec<u8>, SignError> {
        // Year, month, day, and zeros. Firmware takes an update only when it is later than the last one.
        let mut time = [0_u8; 16];
        time[..2].copy_from_slice(&UPDATE_YEAR.to_le_bytes());
        time[2..4].copy_from_slice(&[1, 1]);
        let mut signed: Vec<u8> = variable.encode_utf16().flat_map(u16::to_le_bytes).collect();
        signed.extend_from_slice(&vendor.0);
        // Non-volatile, at boot, at run time, with authentication by time.
        signed.extend_from_slice(&0x27_u32.to_le_bytes());
        signed.extend_from_slice(&time);
        signed.extend_from_slice(list);
        let message = self.signed_data(None, None, &signed)?;
        let mut file = time.to_vec();
        file.extend_from_slice(&(24 + message.len() as u32).to_le_bytes());
        file.extend_from_slice(&[0x00, 0x02, 0xf1, 0x0e]);
        file.extend_from_slice(&guid(CERTIFICATE_PKCS7).0);
        file.extend_from_slice(&message);
        file.extend_from_slice(list);
        Ok(file)
    }
}

/// The year of every update of a firmware variable made here.
const UPDATE_YEAR: u16 = 2024;

/// Certificates of the owner of a machine, from the top down: platform key, key exchange key, and the one that signs
/// programs.
#[derive(Debug)]
pub struct Owner<'a> {
    /// Allows changes of the next one.
    pub platform: &'a Signer,
    /// Allows changes of the list of programs' signers.
    pub exchange: &'a Signer,
    /// Signs programs.
    pub programs: &'a Signer,
}

/// One file for the ESP's `loader/keys/auto`, or for tools that write a firmware's variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFile {
    /// `PK`, `KEK` or `db`.
    pub variable: &'static str,
    /// The signature list alone (`.esl`).
    pub list: Vec<u8>,
    /// The signed update (`.auth`).
    pub update: Vec<u8>,
}

/// What brings the owner's keys into a firmware that is in setup mode.
///
/// # Errors
///
/// [`SignError::Signature`].
pub fn enrolment(owner: &Owner<'_>) -> Result<Vec<KeyFile>, SignError> {
    let (global, images) = (guid(GLOBAL_VARIABLE), guid(IMAGE_SECURITY));
    let file = |variable, vendor, certificate: &Signer, by: &Signer| {
        let list = signature_list(certificate.certificate());
        let update = by.variable_update(variable, vendor, &list)?;
        Ok::<_, SignError>(KeyFile { variable, list, update })
    };
    Ok(vec![
        file("db", images, owner.programs, owner.exchange)?,
        file("KEK", global, owner.exchange, owner.platform)?,
        // The last one: it ends the setup mode.
        file("PK", global, owner.platform, owner.platform)?,
    ])
}

/// A signature list with one certificate.
fn signature_list(certificate: &[u8]) -> Vec<u8> {
    let mut list = guid(CERTIFICATE_X509).0.to_vec();
    let entry = 16 + certificate.len() as u32;
    for number in [28 + entry, 0, entry] {
        list.extend_from_slice(&number.to_le_bytes());
    }
    list.extend_from_slice(&Guid::derive(&["skerry secure boot owner"]).0);
    list.extend_from_slice(certificate);
    list
}

/// Three keys for tests of Secure Boot, in a folder. Never for machines that matter: whoever has the folder owns them.
#[derive(Debug)]
pub struct TestKeys {
    /// Platform key.
    pub platform: Signer,
    /// Key exchange key.
    pub exchange: Signer,
    /// Signs programs; `db.key` and `db.crt` of the folder, for `--sign-key` and `--sign-cert`.
    pub programs: Signer,
}

impl TestKeys {
    /// Makes the keys in `dir` (PK, KEK and db, each `.key`, `.crt`, `.esl` and `.auth`), or reads those that are there.
    ///
    /// RSA keys are made by the host's `openssl`: none of the libraries here makes them.
    ///
    /// # Errors
    ///
    /// [`SignError`] when there is no `openssl`, or files cannot be written.
    pub fn in_folder(dir: &Path) -> Result<Self, SignError> {
        let failed = |path: &Path, what: String| SignError::Key { path: path.into(), what };
        std::fs::create_dir_all(dir).map_err(|error| failed(dir, error.to_string()))?;
        for name in ["PK", "KEK", "db"] {
            let (key, certificate) =
                (dir.join(format!("{name}.key")), dir.join(format!("{name}.crt")));
            if certificate.exists() {
                continue;
            }
            let mut command = std::process::Command::new("openssl");
            command.args([
                "genpkey",
                "-algorithm",
                "RSA",
                "-pkeyopt",
                "rsa_keygen_bits:2048",
                "-out",
            ]);
            let output = command.arg(&key).stdin(std::process::Stdio::null()).output();
            let output = output
                .map_err(|error| failed(&key, format!("`openssl` did not start: {error}")))?;
            if !output.status.success() {
                let told = String::from_utf8_lossy(&output.stderr);
                return Err(failed(&key, format!("`openssl` did not make it: {}", told.trim())));
            }
            let read = |path: &Path| {
                std::fs::read_to_string(path).map_err(|error| failed(path, error.to_string()))
            };
            let pair =
                rcgen::KeyPair::from_pkcs8_pem_and_sign_algo(&read(&key)?, &rcgen::PKCS_RSA_SHA256)
                    .map_err(|error| failed(&key, error.to_string()))?;
            let mut parameters = rcgen::CertificateParams::default();
            parameters.distinguished_name = rcgen::DistinguishedName::new();
            let common = format!("Skerry test {name}");
            parameters.distinguished_name.push(rcgen::DnType::CommonName, common);
            parameters.not_before = rcgen::date_time_ymd(2024, 1, 1);
            parameters.not_after = rcgen::date_time_ymd(2054, 1, 1);
            let made = parameters
                .self_signed(&pair)
                .map_err(|error| failed(&certificate, error.to_string()))?;
            std::fs::write(&certificate, made.pem())
                .map_err(|error| failed(&certificate, error.to_string()))?;
        }
        let read = |name: &str| {
            Signer::read(&dir.join(format!("{name}.key")), &dir.join(format!("{name}.crt")))
        };
        let keys = Self { platform: read("PK")?, exchange: read("KEK")?, programs: read("db")? };
        for file in enrolment(&keys.owner())? {
            for (ending, bytes) in [("esl", &file.list), ("auth", &file.update)] {
                let path = dir.join(format!("{}.{ending}", file.variable));
                std::fs::write(&path, bytes).map_err(|error| failed(&path, error.to_string()))?;
            }
        }
        Ok(keys)
    }

    /// For [`enrolment`].
    pub fn owner(&self) -> Owner<'_> {
        Owner { platform: &self.platform, exchange: &self.exchange, programs: &self.programs }
    }
}

/// The digest that a signature is over: everything but checksum, place of the signatures, and signatures.
fn program_digest(pe: &Pe) -> Result<[u8; 32], PeError> {
    if pe.certificates() != (0, 0) {
        return Err(PeError::Signed);
    }
    let (checksum, certificates, headers) =
        (pe.checksum_at(), pe.certificates_at(), pe.headers_len());
    let mut hash = Sha256::new();
    hash.update(&pe.bytes[..checksum]);
    hash.update(&pe.bytes[checksum + 4..certificates]);
    hash.update(&pe.bytes[certificates + 8..headers]);
    let mut sections: Vec<_> = pe.sections().filter(|section| section.raw_size > 0).collect();
    sections.sort_by_key(|section| section.raw_offset);
    let mut end = headers;
    for section in sections {
        // The usual way of hashing all of the file gives the same digest only without gaps.
        if section.raw_offset as usize != end {
            return Err(PeError::Format("there are gaps or overlaps between its sections"));
        }
        let next = end + section.raw_size as usize;
        hash.update(pe.bytes.get(end..next).ok_or(PeError::Short)?);
        end = next;
    }
    hash.update(&pe.bytes[end..]);
    Ok(hash.finalize().into())
}

/// Authenticode's content: what kind of file it is, and its digest.
fn indirect_data(digest: &[u8; 32]) -> Vec<u8> {
    let obsolete: Vec<u8> = "<<<Obsolete>>>".encode_utf16().flat_map(u16::to_be_bytes).collect();
    let file = der::explicit(2, &der::tagged(0x80, &obsolete));
    let image = der::sequence(&[der::tagged(0x03, &[0]), der::explicit(0, &file)]);
    let algorithm = der::sequence(&[der::oid(SHA256), der::null()]);
    der::sequence(&[
        der::sequence(&[der::oid(SPC_PE_IMAGE_DATA), image]),
        der::sequence(&[algorithm, der::octets(digest)]),
    ])
}

const SIGNED_DATA: &[u64] = &[1, 2, 840, 113549, 1, 7, 2];
const DATA: &[u64] = &[1, 2, 840, 113549, 1, 7, 1];
const CONTENT_TYPE: &[u64] = &[1, 2, 840, 113549, 1, 9, 3];
const MESSAGE_DIGEST: &[u64] = &[1, 2, 840, 113549, 1, 9, 4];
const RSA: &[u64] = &[1, 2, 840, 113549, 1, 1, 1];
const SHA256: &[u64] = &[2, 16, 840, 1, 101, 3, 4, 2, 1];
const SPC_INDIRECT_DATA: &[u64] = &[1, 3, 6, 1, 4, 1, 311, 2, 1, 4];
const SPC_PE_IMAGE_DATA: &[u64] = &[1, 3, 6, 1, 4, 1, 311, 2, 1, 15];

const GLOBAL_VARIABLE: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
const IMAGE_SECURITY: &str = "d719b2cb-3d3a-4596-a3bc-dad00e67656f";
const CERTIFICATE_X509: &str = "a5c059a1-94e4-4aa7-87b5-ab155c2bf072";
const CERTIFICATE_PKCS7: &str = "4aafd29d-68df-49ee-8aa9-347d375665a7";

fn guid(text: &str) -> Guid {
    Guid::parse(text).expect("the GUIDs of the specification are written in this file")
}

/// The few forms of DER that a signature is made of.
mod der {
    /// A value with its tag and length.
    pub(super) fn tagged(tag: u8, content: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        match content.len() {
            short @ 0..=127 => out.push(short as u8),
            long => {
                let bytes = long.to_be_bytes();
                let bytes = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
                out.push(0x80 | bytes.len() as u8);
                out.extend_from_slice(bytes);
            }
        }
        out.extend_from_slice(content);
        out
    }

    /// What is inside of a value that was made here.
    pub(super) fn inside(value: &[u8]) -> &[u8] {
        let length = match value[1] {
            short @ 0..=127 => return &value[2..2 + usize::from(short)],
            long => usize::from(long & 0x7f),
        };
        &value[2 + length..]
    }

    pub(super) fn sequence(parts: &[Vec<u8>]) -> Vec<u8> {
        tagged(0x30, &parts.concat())
    }

    pub(super) fn set(parts: &[Vec<u8>]) -> Vec<u8> {
        let mut sorted = parts.to_vec();
        sorted.sort();
        tagged(0x31, &sorted.concat())
    }

    pub(super) fn explicit(number: u8, value: &[u8]) -> Vec<u8> {
        tagged(0xa0 | number, value)
    }

    pub(super) fn octets(bytes: &[u8]) -> Vec<u8> {
        tagged(0x04, bytes)
    }

    /// `bytes` are the number as DER wants it: as few as possible, the first bit clear.
    pub(super) fn integer(bytes: &[u8]) -> Vec<u8> {
        tagged(0x02, bytes)
    }

    pub(super) fn null() -> Vec<u8> {
        vec![0x05, 0x00]
    }

    pub(super) fn oid(numbers: &[u64]) -> Vec<u8> {
        let mut bytes = vec![(numbers[0] * 40 + numbers[1]) as u8];
        for number in &numbers[2..] {
            let groups = (u64::BITS - number.leading_zeros()).div_ceil(7).max(1);
            for group in (0..groups).rev() {
                let more = if group == 0 { 0 } else { 0x80 };
                bytes.push((number >> (7 * group) & 0x7f) as u8 | more);
            }
        }
        tagged(0x06, &bytes)
    }
}

/// Why a manifest is not signed.
#[derive(Debug, thiserror::Error)]
#[error("`{path}` is not an Ed25519 key in PEM form: {what}")]
pub struct ReleaseKeyError {
    path: PathBuf,
    what: String,
}

impl ReleaseKeyError {
    /// What a person can do about it.
    pub fn hint(&self) -> &'static str {
        "`skerry image release-key FILE` makes a key, and its public half beside it"
    }
}

/// The key whose signature an appliance wants on what it installs.
pub struct ReleaseKey(ring::signature::Ed25519KeyPair);

impl std::fmt::Debug for ReleaseKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReleaseKey(..)")
    }
}

impl ReleaseKey {
    /// Reads PKCS#8 in PEM form.
    ///
    /// # Errors
    ///
    /// [`ReleaseKeyError`].
    pub fn read(path: &Path) -> Result<Self, ReleaseKeyError> {
        let bad = |what: String| ReleaseKeyError { path: path.into(), what };
        let pem = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
        let key = rustls_pki_types::PrivatePkcs8KeyDer::from_pem_slice(&pem);
        let key = key.map_err(|error| bad(error.to_string()))?;
        let pair =
            ring::signature::Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.secret_pkcs8_der());
        Ok(Self(pair.map_err(|error| bad(error.to_string()))?))
    }

    /// Makes a key and writes it to `path` (PEM, for its owner only), and its public half to `path` with `.pub`.
    ///
    /// # Errors
    ///
    /// [`ReleaseKeyError`]; a key that is there is never written over.
    pub fn make(path: &Path) -> Result<Self, ReleaseKeyError> {
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        let bad = |what: String| ReleaseKeyError { path: path.into(), what };
        let random = ring::rand::SystemRandom::new();
        let mut seed = [0; 32];
        ring::rand::SecureRandom::fill(&random, &mut seed)
            .map_err(|_| bad("there are no random numbers".into()))?;
        let pair = ring::signature::Ed25519KeyPair::from_seed_unchecked(&seed);
        let key = Self(pair.map_err(|error| bad(error.to_string()))?);
        // The first version of the format, without the public key: OpenSSL 3.0 reads no other.
        let der = [&ED25519_PKCS8[..], &seed].concat();
        let mut file = std::fs::OpenOptions::new();
        let file = file.write(true).create_new(true).mode(0o600).open(path);
        file.and_then(|mut file| {
            file.write_all(pem("PRIVATE KEY", &der).as_bytes())?;
            file.sync_all()
        })
        .map_err(|error| bad(error.to_string()))?;
        let mut public = path.as_os_str().to_owned();
        public.push(".pub");
        let text = pem("PUBLIC KEY", &[&ED25519_SPKI[..], &key.public()].concat());
        std::fs::write(&public, text).map_err(|error| bad(error.to_string()))?;
        Ok(key)
    }

    /// The public half.
    pub fn public(&self) -> Key {
        let public = ring::signature::KeyPair::public_key(&self.0);
        public.as_ref().try_into().expect("Ed25519 has keys of 32 bytes")
    }

    /// The signature, 64 bytes.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(message).as_ref().to_vec()
    }
}

/// What comes before the 32 bytes of an Ed25519 key in a SubjectPublicKeyInfo (RFC 8410).
const ED25519_SPKI: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// What comes before the 32 bytes of an Ed25519 seed in PKCS#8 (RFC 8410).
const ED25519_PKCS8: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect::<Vec<_>>();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// Reads an Ed25519 public key, PEM.
///
/// # Errors
///
/// [`ReleaseKeyError`].
pub fn public_key(path: &Path) -> Result<Key, ReleaseKeyError> {
    let bad = |what: &str| ReleaseKeyError { path: path.into(), what: what.into() };
    let pem = std::fs::read(path).map_err(|error| bad(&error.to_string()))?;
    let der = rustls_pki_types::SubjectPublicKeyInfoDer::from_pem_slice(&pem);
    let der = der.map_err(|error| bad(&error.to_string()))?;
    let key = der.as_ref().strip_prefix(&ED25519_SPKI[..]);
    key.and_then(|key| key.try_into().ok()).ok_or_else(|| bad("it is no Ed25519 public key"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uki;
    use std::process::Command;
    use std::sync::OnceLock;

    /// Keys take a while; the tests here share them.
    fn keys() -> Option<&'static (tempfile::TempDir, TestKeys)> {
        static KEYS: OnceLock<Option<(tempfile::TempDir, TestKeys)>> = OnceLock::new();
        let keys = KEYS.get_or_init(|| {
            Command::new("openssl").arg("version").output().ok()?;
            let dir = tempfile::tempdir().unwrap();
            let keys = TestKeys::in_folder(dir.path()).unwrap();
            Some((dir, keys))
        });
        if keys.is_none() {
            eprintln!("not tested: there is no openssl here");
        }
        keys.as_ref()
    }

    #[test]
    fn der_is_that_of_the_standard() {
        assert_eq!(der::oid(SIGNED_DATA), [0x06, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 7, 2]);
        assert_eq!(der::oid(SHA256), [0x06, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1]);
        assert_eq!(der::tagged(4, &[0; 128])[..3], [4, 0x81, 128]);
        assert_eq!(der::tagged(4, &[0; 300])[..4], [4, 0x82, 1, 44]);
        assert_eq!(der::inside(&der::tagged(4, &[7; 300])), [7; 300]);
        assert_eq!(der::inside(&der::tagged(4, &[7; 3])), [7; 3]);
    }

    #[test]
    fn signed_program_is_taken_by_sbverify_and_a_changed_one_is_not() {
        let Some((dir, keys)) = keys() else { return };
        let stub = uki::tests::stub();
        let signed = keys.programs.sign(&stub).unwrap();
        assert!(signed == keys.programs.sign(&stub).unwrap(), "equal input gives equal bytes");
        assert!(matches!(keys.programs.sign(&signed), Err(SignError::Program(PeError::Signed))));
        let path = dir.path().join("signed.efi");
        let verify = |bytes: &[u8], certificate: &str| {
            std::fs::write(&path, bytes).unwrap();
            let mut command = Command::new("sbverify");
            command.arg("--cert").arg(dir.path().join(certificate)).arg(&path);
            command.output().ok().map(|output| output.status.success())
        };
        let Some(good) = verify(&signed, "db.crt") else {
            eprintln!("not compared: there is no sbverify here");
            return;
        };
        assert!(good);
        assert_eq!(verify(&signed, "KEK.crt"), Some(false), "another certificate");
        let mut changed = signed;
        changed[1500] ^= 1;
        assert_eq!(verify(&changed, "db.crt"), Some(false), "another program");
    }

    #[test]
    fn enrolment_is_signed_by_the_key_above() {
        let Some((dir, keys)) = keys() else { return };
        let files = enrolment(&keys.owner()).unwrap();
        let names: Vec<_> = files.iter().map(|file| file.variable).collect();
        assert_eq!(names, ["db", "KEK", "PK"]);
        for (file, vendor, by) in
            [(&files[0], IMAGE_SECURITY, "KEK"), (&files[2], GLOBAL_VARIABLE, "PK")]
        {
            let length = u32::from_le_bytes(file.update[16..20].try_into().unwrap()) as usize;
            assert_eq!(file.update[16 + length..], file.list);
            let mut signed: Vec<u8> =
                file.variable.encode_utf16().flat_map(u16::to_le_bytes).collect();
            signed.extend_from_slice(&guid(vendor).0);
            signed.extend_from_slice(&0x27_u32.to_le_bytes());
            signed.extend_from_slice(&file.update[..16]);
            signed.extend_from_slice(&file.list);
            // openssl wants the message inside of a ContentInfo.
            let message = &file.update[40..16 + length];
            let wrapped = der::sequence(&[der::oid(SIGNED_DATA), der::explicit(0, message)]);
            let (content, message) = (dir.path().join("content"), dir.path().join("message"));
            std::fs::write(&content, signed).unwrap();
            std::fs::write(&message, wrapped).unwrap();
            let mut command = Command::new("openssl");
            command
                .args(["smime", "-verify", "-binary", "-inform", "DER", "-noverify", "-in"])
                .arg(&message);
            command
                .arg("-content")
                .arg(&content)
                .arg("-certfile")
                .arg(dir.path().join(format!("{by}.crt")));
            let output = command.args(["-out", "/dev/null"]).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    #[test]
    fn keys_that_do_not_fit_are_refused() {
        let Some((dir, _)) = keys() else { return };
        let at = |name: &str| dir.path().join(name);
        assert!(matches!(Signer::read(&at("db.key"), &at("PK.crt")), Err(SignError::Pair { .. })));
        assert!(matches!(Signer::read(&at("db.crt"), &at("db.crt")), Err(SignError::Key { .. })));
        assert!(matches!(
            Signer::read(&at("db.key"), &at("db.key")),
            Err(SignError::Certificate { .. })
        ));
        assert!(matches!(Signer::read(&at("none"), &at("db.crt")), Err(SignError::Read { .. })));
        assert!(ReleaseKey::read(&at("db.key")).is_err(), "RSA signs no releases");
    }

    #[test]
    fn release_key_is_made_once_and_read_back_with_its_public_half() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("release.key");
        let made = ReleaseKey::make(&path).unwrap();
        assert_eq!(ReleaseKey::read(&path).unwrap().public(), made.public());
        assert_eq!(public_key(&dir.path().join("release.key.pub")).unwrap(), made.public());
        let error = ReleaseKey::make(&path).unwrap_err();
        assert!(error.to_string().contains("exists"), "{error}");
        assert!(public_key(&path).is_err(), "a private key is not published by mistake");
        if let Ok(output) =
            Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(&path).output()
        {
            let ours = std::fs::read(dir.path().join("release.key.pub")).unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&ours));
        }
    }

    #[test]
    fn manifest_is_signed_so_that_ring_and_openssl_agree() {
        let Some((dir, _)) = keys() else { return };
        let path = dir.path().join("release.key");
        let mut command = Command::new("openssl");
        assert!(
            command
                .args(["genpkey", "-algorithm", "ed25519", "-out"])
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        let key = ReleaseKey::read(&path).unwrap();
        let signature = key.sign(b"manifest");
        let public =
            ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, key.public());
        assert!(public.verify(b"manifest", &signature).is_ok());
        assert!(public.verify(b"another", &signature).is_err());
    }
}
