//! Keeps a cluster as a Git repository says: reads commits, renders them with the core, applies, prunes, reports.
//!
//! [`run`] is the controller; [`render_dir`], [`diff`] and [`status`] are the same functions for the command line. It
//! speaks to any Kubernetes API through the `kube::Client` it is given and never knows which one that is.
//!
//! ```text
//! git (gix) ──► driver ──► core: render, plan ──► release (dry run, apply, prune) ──► cluster (server-side apply)
//!                 ▲ └────► core: health ────────► report (Release, Site, Fleet, events)
//!                 └─────── live (one watch per kind)
//! ```

mod cluster;
mod diff;
mod directory;
mod driver;
mod git;
mod live;
mod os;
mod qualification;
mod release;
mod report;
mod status;

pub use diff::{Action, Change, DiffError, diff};
pub use directory::{ReadError, render_dir};
pub use skerry_reconciler_core::{Problem, Rendered};
pub use status::{FleetStatus, ReleaseRow, SiteRow, StatusError, status};

use kube::Client;
use std::path::PathBuf;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What the controller works on.
#[derive(Debug, Clone)]
pub struct Config {
    /// A path, `file://`, `http://` or `https://`.
    pub remote: String,
    /// Branch in force.
    pub branch: String,
    /// Where copies of http remotes are kept; not used for local ones.
    pub dir: PathBuf,
    /// Pause between two looks at the remote. [`POLL_LOCAL`] and [`POLL_DISTANT`] are good values.
    pub poll: Duration,
}

/// For a remote on this machine: a look reads one small file.
pub const POLL_LOCAL: Duration = Duration::from_millis(250);
/// For a remote over the network: a look is one request.
pub const POLL_DISTANT: Duration = Duration::from_secs(15);

/// Why the controller could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The remote can never be read; another one has to be named.
    #[error("{message}")]
    Remote {
        /// What is wrong.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
}

impl RunError {
    /// What to do about it, shown after the error as `hint: …`.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Remote { hint, .. } => hint.clone(),
        }
    }
}

/// Runs the controller until `stop`. A cluster or a remote that cannot be reached is waited for.
///
/// One process per cluster: there is no leader election yet.
///
/// # Errors
///
/// [`RunError`] for a remote of a kind that is not supported.
pub async fn run(client: Client, config: Config, stop: CancellationToken) -> Result<(), RunError> {
    let remote = git::Remote::new(&config.remote, &config.branch, &config.dir)
        .map_err(|error| RunError::Remote { message: error.to_string(), hint: error.hint() })?;
    if let Some(driver) = driver::Driver::start(client, &config, &stop).await {
        driver.run(remote, config.poll, stop).await;
    }
    Ok(())
}
