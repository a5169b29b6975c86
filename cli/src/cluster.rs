//! The cluster that a verb speaks to.

use crate::fault::hinted;
use anyhow::{Context, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use std::path::PathBuf;

/// A client from a kubeconfig file; without one, from `$KUBECONFIG`, `~/.kube/config` or the pod's own account.
pub(crate) async fn connect(kubeconfig: Option<PathBuf>) -> Result<kube::Client> {
    let config = match kubeconfig {
        Some(file) => {
            let text = Kubeconfig::read_from(&file)
                .with_context(|| format!("could not read the kubeconfig `{}`", file.display()))?;
            kube::Config::from_custom_kubeconfig(text, &KubeConfigOptions::default()).await?
        }
        None => kube::Config::infer().await.map_err(|error| {
            hinted(
                format!("no cluster to speak to: {error}"),
                "name one with --kubeconfig, or start a fleet of your own with `cargo xtask up`",
            )
        })?,
    };
    Ok(kube::Client::try_from(config)?)
}
