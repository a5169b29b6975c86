//! TLS to the broker: a Unix socket in the agent's folder, and behind it a connection with TLS.
//!
//! The MQTT library's own TLS would bring a second version of the crate that judges certificates, so the library talks
//! to this socket instead, which only this user may open, and knows nothing of TLS. Files are read again for each
//! connection, so that renewed certificates count from the next one on.
//!
//! [`super::run`] is the only caller.

use super::BusConfig;
use crate::link::chain;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

/// Connections at once: two, and two that are about to end.
const CONNECTIONS_MAX: usize = 4;
/// Time for TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time after which a socket that could not be made is tried again.
const BIND_RETRY: Duration = Duration::from_secs(10);

/// What is needed for TLS; all files are PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusTls {
    /// CAs of brokers; no others are trusted.
    pub ca: PathBuf,
    /// Certificate of this client and its key, if the broker wants one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Where the MQTT library is met.
    pub socket: PathBuf,
}

#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("could not read `{path}`")]
    File { path: PathBuf, source: rustls_pki_types::pem::Error },
    #[error("there is no certificate in `{0}`")]
    Empty(PathBuf),
    #[error("the certificate or key of this client cannot be used")]
    Tls(#[from] rustls::Error),
    #[error("`{0}` is no name of a server")]
    Name(String),
    #[error("could not connect")]
    Connect(#[from] io::Error),
    #[error("no connection in {} s", CONNECT_TIMEOUT.as_secs())]
    Slow,
}

/// Serves the socket for ever.
pub(super) async fn serve(config: &BusConfig, tls: &BusTls) {
    let told = Arc::new(AtomicBool::new(false));
    let listener = loop {
        match bind(&tls.socket) {
            Ok(listener) => break listener,
            Err(error) => {
                let socket = tls.socket.display();
                tracing::error!(%socket, %error, "no way to the MQTT broker; trying again");
                tokio::time::sleep(BIND_RETRY).await;
            }
        }
    };
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        let Ok((near, _)) = listener.accept().await else {
            tokio::time::sleep(BIND_RETRY).await; // too many open files
            continue;
        };
        let (host, port, tls) = (config.host.clone(), config.port, tls.clone());
        let told = Arc::clone(&told);
        connections.spawn(async move {
            match carry(near, &host, port, &tls).await {
                Ok(()) => told.store(false, Ordering::Relaxed),
                // Once per outage; who dials says that it goes on trying.
                Err(error) if !told.swap(true, Ordering::Relaxed) => {
                    tracing::warn!(host, port, error = chain(&error), "no TLS to the MQTT broker");
                }
                Err(_) => {}
            }
        });
    }
}

fn bind(socket: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

async fn carry(
    mut near: UnixStream,
    host: &str,
    port: u16,
    tls: &BusTls,
) -> Result<(), ConnectError> {
    let connect = async {
        let connector = TlsConnector::from(Arc::new(client(tls)?));
        let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(name).map_err(|_| ConnectError::Name(host.to_owned()))?;
        let far = TcpStream::connect(format!("{host}:{port}")).await?;
        far.set_nodelay(true)?;
        Ok::<_, ConnectError>(connector.connect(name, far).await?)
    };
    let mut far = match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
        Ok(connected) => connected?,
        Err(_) => return Err(ConnectError::Slow),
    };
    // With TLS 1.3 a broker that does not want us says so only now, as an error of the first read.
    match tokio::io::copy_bidirectional(&mut near, &mut far).await {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(error.into()),
        // How connections end, else.
        _ => Ok(()),
    }
}

fn client(tls: &BusTls) -> Result<ClientConfig, ConnectError> {
    let certificates = |path: &PathBuf| -> Result<Vec<CertificateDer<'static>>, ConnectError> {
        let file = |source| ConnectError::File { path: path.clone(), source };
        let found = CertificateDer::pem_file_iter(path).map_err(file)?;
        let found: Vec<_> = found.collect::<Result<_, _>>().map_err(file)?;
        if found.is_empty() { Err(ConnectError::Empty(path.clone())) } else { Ok(found) }
    };
    let mut roots = RootCertStore::empty();
    for ca in certificates(&tls.ca)? {
        roots.add(ca)?;
    }
    let builder = ClientConfig::builder().with_root_certificates(roots);
    Ok(match &tls.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates(certificate)?;
            let file = |source| ConnectError::File { path: key.clone(), source };
            let key = PrivateKeyDer::from_pem_file(key).map_err(file)?;
            builder.with_client_auth_cert(chain, key)?
        }
    })
}
