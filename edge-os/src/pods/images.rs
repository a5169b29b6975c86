//! Getting a container's image onto the node.
//!
//! The rule for nodes that are offline differs from kubelet's on purpose: an image that is here
//! is started although the pod says `Always` and the registry cannot be reached, and users are
//! told by an event. A node that was rebooted without a link could otherwise not start `:latest`.
//!
//! Source: kubernetes/kubernetes pkg/kubelet/images/image_manager.go.

use jiff::Timestamp;
use skerry_edge_core::pods::backoff::Backoff;
use skerry_edge_core::pods::image::{self, Keyring, PullPolicy};
use skerry_edge_core::pods::plan::Waiting;
use tokio::sync::Semaphore;

use crate::cri::{self, CriError, Runtime, v1};

/// Pulls at the same time on this node; more only compete for one link and one disk.
const PULLS_MAX: usize = 2;

static PULLS: Semaphore = Semaphore::const_new(PULLS_MAX);

/// Something to tell users while an image is got.
pub(super) struct Note {
    pub(super) warning: bool,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// What came of getting an image.
pub(super) enum Outcome {
    Ready(v1::Image),
    /// The container waits; try again then.
    Waits {
        waiting: Waiting,
        retry_at: Option<Timestamp>,
    },
}

/// Delays and last errors of one pod's pulls, by image.
#[derive(Default)]
pub(super) struct Pulls {
    backoff: Backoff,
    errors: std::collections::BTreeMap<String, (String, Timestamp)>,
}

impl Pulls {
    /// Makes the next try of every image free, because the link came up.
    pub(super) fn reset(&mut self) {
        self.backoff.clear();
        self.errors.clear();
    }

    /// Gets `image`, and says on the way what users should know.
    pub(super) async fn get(
        &mut self,
        runtime: &Runtime,
        image: &str,
        policy: Option<&str>,
        keyring: &Keyring,
        sandbox: Option<&v1::PodSandboxConfig>,
        notes: &mut Vec<Note>,
    ) -> Outcome {
        let name = match image::with_tag(image) {
            Ok(name) => name,
            Err(error) => {
                let message = format!("Failed to apply default image tag \"{image}\": {error}");
                notes.push(Note {
                    warning: true,
                    reason: "InspectFailed",
                    message: message.clone(),
                });
                return waits("InvalidImageName", message, None);
            }
        };
        let policy = image::pull_policy(policy, image);
        let present = match runtime.image_status(&name).await {
            Ok(present) => present,
            Err(error) => {
                let message = format!("Failed to inspect image \"{name}\": {error}");
                notes.push(Note {
                    warning: true,
                    reason: "InspectFailed",
                    message: message.clone(),
                });
                return waits("ImageInspectError", message, None);
            }
        };
        match (policy, present) {
            (PullPolicy::Never, None) => {
                let message =
                    format!("Container image \"{image}\" is not present with pull policy of Never");
                notes.push(Note {
                    warning: true,
                    reason: "ErrImageNeverPull",
                    message: message.clone(),
                });
                waits("ErrImageNeverPull", message, None)
            }
            (PullPolicy::Never | PullPolicy::IfNotPresent, Some(found)) => {
                let message = format!("Container image \"{image}\" already present on machine");
                notes.push(Note { warning: false, reason: "Pulled", message });
                Outcome::Ready(found)
            }
            (PullPolicy::Always | PullPolicy::IfNotPresent, present) => {
                self.pull(runtime, image, &name, present, keyring, sandbox, notes).await
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    async fn pull(
        &mut self,
        runtime: &Runtime,
        image: &str,
        name: &str,
        present: Option<v1::Image>,
        keyring: &Keyring,
        sandbox: Option<&v1::PodSandboxConfig>,
        notes: &mut Vec<Note>,
    ) -> Outcome {
        let now = Timestamp::now();
        if let Some((error, since)) = self.errors.get(name)
            && let Some(until) = self.backoff.blocked_until(name, *since, now)
        {
            if let Some(present) = present {
                return Outcome::Ready(present);
            }
            let message = format!("Back-off pulling image \"{image}\"");
            notes.push(Note { warning: false, reason: "BackOff", message: message.clone() });
            notes.push(Note {
                warning: true,
                reason: "Failed",
                message: "Error: ImagePullBackOff".to_owned(),
            });
            return waits("ImagePullBackOff", format!("{message}: {error}"), Some(until));
        }
        let message = format!("Pulling image \"{image}\"");
        notes.push(Note { warning: false, reason: "Pulling", message });
        let waiting_since = std::time::Instant::now();
        let permit = PULLS.acquire().await.expect("the semaphore is never closed");
        let started = std::time::Instant::now();
        let pulled = try_credentials(runtime, name, keyring, sandbox).await;
        drop(permit);
        let error = match pulled {
            Ok(_) => match runtime.image_status(name).await {
                Ok(Some(found)) => {
                    self.backoff.reset(name);
                    self.errors.remove(name);
                    let (took, whole) = (started.elapsed(), waiting_since.elapsed());
                    let message = format!(
                        "Successfully pulled image \"{image}\" in {took:.1?} ({whole:.1?} \
                         including waiting). Image size: {} bytes.",
                        found.size
                    );
                    notes.push(Note { warning: false, reason: "Pulled", message });
                    return Outcome::Ready(found);
                }
                Ok(None) => "the image is not there after the pull".to_owned(),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        let now = Timestamp::now();
        self.backoff.raise(name, now, now);
        if let Some(present) = present {
            self.errors.insert(name.to_owned(), (error.clone(), now));
            let message = format!(
                "Image \"{image}\" could not be pulled, starting the copy on this node: {error}"
            );
            notes.push(Note { warning: true, reason: "ImagePullSkippedOffline", message });
            return Outcome::Ready(present);
        }
        let message = format!("Failed to pull image \"{image}\": {error}");
        notes.push(Note { warning: true, reason: "Failed", message: message.clone() });
        let event = "Error: ErrImagePull".to_owned();
        notes.push(Note { warning: true, reason: "Failed", message: event });
        self.errors.insert(name.to_owned(), (format!("ErrImagePull: {error}"), now));
        waits("ErrImagePull", error, Some(now))
    }
}

async fn try_credentials(
    runtime: &Runtime,
    name: &str,
    keyring: &Keyring,
    sandbox: Option<&v1::PodSandboxConfig>,
) -> Result<String, CriError> {
    let found = keyring.find(name);
    if found.is_empty() {
        return runtime.pull_image(name, None, sandbox.cloned()).await;
    }
    let mut last = None;
    for credentials in found {
        match runtime.pull_image(name, Some(cri::auth(credentials)), sandbox.cloned()).await {
            Ok(reference) => return Ok(reference),
            Err(error) => last = Some(error),
        }
    }
    Err(last.expect("at least one was tried"))
}

fn waits(reason: &str, message: String, retry_at: Option<Timestamp>) -> Outcome {
    Outcome::Waits { waiting: Waiting { reason: reason.to_owned(), message }, retry_at }
}
