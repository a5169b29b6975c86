//! Rotation of container logs.
//!
//! The runtime writes `<n>.log`; a file that grew past the bound is renamed with the time in its
//! name, the runtime is told to open a new one, and the oldest renamed files are removed.
//!
//! Source: kubernetes/kubernetes pkg/kubelet/logs/container_log_manager.go.

use std::path::{Path, PathBuf};

use super::{Board, CONTAINER_ID_PREFIX, EngineConfig};
use crate::cri::Runtime;

/// Bounds of the logs below one directory.
pub(super) struct LogRotation {
    log_root: PathBuf,
    size_max: u64,
    files_max: usize,
}

impl LogRotation {
    pub(super) fn new(config: &EngineConfig) -> Self {
        Self {
            log_root: config.log_root.clone(),
            size_max: config.log_size_max,
            files_max: config.log_files_max.max(2),
        }
    }

    /// Looks at the logs of all running containers.
    pub(super) async fn run(&self, runtime: &Runtime, board: &Board) {
        for (id, path) in self.running(board) {
            let size = tokio::fs::metadata(&path).await.map_or(0, |meta| meta.len());
            if size < self.size_max {
                continue;
            }
            if let Err(error) = self.rotate(runtime, &id, &path).await {
                tracing::warn!(path = %path.display(), error = %error, "could not rotate a log");
            }
        }
    }

    fn running(&self, board: &Board) -> Vec<(String, PathBuf)> {
        let pods = board.pods.read().expect("board lock");
        let mut found = Vec::new();
        for (uid, pod) in pods.iter() {
            let folder = self.log_root.join(format!("{}_{}_{uid}", pod.namespace, pod.name));
            let lists = [&pod.status.container_statuses, &pod.status.init_container_statuses];
            for container in lists.into_iter().flatten().flatten() {
                let runs = container.state.as_ref().is_some_and(|state| state.running.is_some());
                let id = container.container_id.as_deref();
                let Some(id) = id.and_then(|id| id.strip_prefix(CONTAINER_ID_PREFIX)) else {
                    continue;
                };
                if runs {
                    let file = format!("{}.log", container.restart_count);
                    found.push((id.to_owned(), folder.join(&container.name).join(file)));
                }
            }
        }
        found
    }

    async fn rotate(&self, runtime: &Runtime, id: &str, path: &Path) -> Result<(), RotateError> {
        let time = jiff::Timestamp::now().strftime("%Y%m%d-%H%M%S").to_string();
        let rotated = PathBuf::from(format!("{}.{time}", path.display()));
        tokio::fs::rename(path, &rotated).await?;
        if let Err(error) = runtime.reopen_log(id).await {
            tokio::fs::rename(&rotated, path).await?;
            return Err(error.into());
        }
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
        let prefix = format!("{}.", name.to_string_lossy());
        let mut old = Vec::new();
        let mut entries = tokio::fs::read_dir(folder).await?;
        while let Some(entry) = entries.next_entry().await? {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                old.push(entry.path());
            }
        }
        old.sort();
        let surplus = old.len().saturating_sub(self.files_max - 1);
        for path in &old[..surplus] {
            tokio::fs::remove_file(path).await?;
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum RotateError {
    #[error("could not change the log's folder: {0}")]
    Io(#[from] std::io::Error),
    #[error("the runtime did not open the log again: {0}")]
    Runtime(#[from] crate::cri::CriError),
}
