//! The API of a room, through kubectl, as an operator would.

use crate::sh;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Namespace of the pods.
pub(super) const NAMESPACE: &str = "interop";

/// A cluster and the rights of its administrator.
#[derive(Clone)]
pub(super) struct Cluster {
    kubectl: PathBuf,
    pub(super) kubeconfig: PathBuf,
    home: PathBuf,
}

impl Cluster {
    pub(super) fn new(kubectl: &Path, kubeconfig: &Path, dir: &Path) -> Self {
        Self {
            kubectl: kubectl.into(),
            kubeconfig: kubeconfig.into(),
            home: dir.join("kubectl-cache"),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig);
        command.env("HOME", &self.home).env("KUBECACHEDIR", &self.home);
        command
    }

    /// `kubectl ARGS`, to be started by somebody else.
    pub(super) fn command_with(&self, args: &[&str]) -> Command {
        let mut command = self.command();
        command.args(args);
        command
    }

    /// Standard output of `kubectl ARGS`.
    pub(super) fn kubectl(&self, args: &[&str]) -> Result<String> {
        sh::output(self.command().args(args))
    }

    /// The object or list that `kubectl get ARGS` finds.
    pub(super) fn get(&self, args: &[&str]) -> Result<Option<Value>> {
        let text = self.kubectl(&[&["get", "-o", "json", "--ignore-not-found"], args].concat())?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&text).context("kubectl printed no JSON")?))
    }

    /// A pod of the script.
    pub(super) fn pod(&self, name: &str) -> Result<Option<Value>> {
        self.get(&["pod", name, "-n", NAMESPACE])
    }

    /// Creates or changes an object.
    pub(super) fn apply(&self, object: &Value) -> Result<()> {
        let mut command = self.command();
        command.args(["apply", "--server-side", "--force-conflicts", "-f", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("could not start kubectl")?;
        let mut stdin = child.stdin.take().context("kubectl has no standard input")?;
        // kubectl may end before it has read everything; its exit code tells.
        let _ = stdin.write_all(object.to_string().as_bytes());
        drop(stdin);
        let done = child.wait_with_output()?;
        if !done.status.success() {
            bail!("kubectl apply failed: {}", String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(())
    }
}
