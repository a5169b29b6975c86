//! Events that a node reports.
//!
//! KubeEdge answers none of them; a peer with receipts is told what became of each. An event that is there already
//! counts as recorded, because an outbox sends again what was not answered.

use super::answer::Refused;
use super::rest::{self, Merge};
use super::{Outcome, Upstream, content, patch_of};
use serde_json::Value;
use skerry_cloudcore_core::downstream::{Key, Kind};
use skerry_cloudcore_core::upstream::event::{self as rules, Subject};
use skerry_cloudcore_core::upstream::pod;
use skerry_protocol::{Message, Operation, ResourcePath};

impl Upstream {
    pub(super) async fn event(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Outcome {
        let done = match request.operation() {
            Some(Operation::Insert | Operation::Update) => self.record(node, path, request).await,
            Some(Operation::Patch) => self.record_again(node, path, request).await,
            _ => return Outcome::unsupported(request),
        };
        Outcome::Silent(done)
    }

    async fn record(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Result<(), Refused> {
        let event: Value = content(request)?;
        self.check_event(node, path, &event).await?;
        if request.operation() == Some(Operation::Insert) {
            return self.create_event(node, path, event).await;
        }
        let name = path.name().unwrap_or_default();
        rules::check_name(name, &event).map_err(forbidden)?;
        let place = rest::core(path.namespace(), "events", rest::segment(name)?)?;
        match self.rest(node).replace(&place, &typed(path, event.clone())).await {
            // It has been forgotten meanwhile: events live for an hour.
            Err(refused) if refused.is_not_found() => self.create_event(node, path, event).await,
            done => done.map(drop),
        }
    }

    /// A repetition: the content is `{event, patchData}`, the event whole and what changes of it.
    async fn record_again(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Result<(), Refused> {
        let both: Value = content(request)?;
        let event = both["event"].clone();
        let patch = patch_of(both["patchData"].clone())?;
        self.check_event(node, path, &event).await?;
        let name = path.name().unwrap_or_default();
        rules::check_name(name, &event)
            .and_then(|()| rules::check_patch(&patch))
            .map_err(forbidden)?;
        let place = rest::core(path.namespace(), "events", rest::segment(name)?)?;
        match self.rest(node).patch(&place, Merge::Strategic, &patch).await {
            Err(refused) if refused.is_not_found() => self.create_event(node, path, event).await,
            done => done.map(drop),
        }
    }

    async fn create_event(
        &self,
        node: &str,
        path: &ResourcePath,
        event: Value,
    ) -> Result<(), Refused> {
        let mut event = typed(path, event);
        if let Some(metadata) = event.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("resourceVersion");
            metadata.remove("uid");
        }
        let place = rest::core(path.namespace(), "events", "")?;
        match self.rest(node).create(&place, &event).await {
            Err(refused) if refused.is_already_exists() => Ok(()),
            done => done.map(drop),
        }
    }

    /// Events are about the node, or about a pod of it. Of a pod that is gone nobody knows any more whose it was; the
    /// last events about a pod come when it is.
    async fn check_event(
        &self,
        node: &str,
        path: &ResourcePath,
        event: &Value,
    ) -> Result<(), Refused> {
        if !event["metadata"].is_object() {
            return Err(Refused::Invalid(format!("content of `{path}` is no event")));
        }
        let Subject::Pod { namespace, name, uid } =
            rules::subject(node, path.namespace(), event).map_err(forbidden)?
        else {
            return Ok(());
        };
        let key = Key::new(Kind::Pod, &namespace, &name)
            .ok_or_else(|| Refused::Invalid(format!("`{namespace}/{name}` is no pod")))?;
        if let Some((bound_to, _)) = self.hub.binding(&key).await
            && bound_to == node
        {
            return Ok(());
        }
        let found = match self
            .rest(node)
            .get(&rest::core(&namespace, "pods", rest::segment(&name)?)?)
            .await
        {
            Err(refused) if refused.is_not_found() => return Ok(()),
            found => found?,
        };
        let is_gone = !uid.is_empty() && found["metadata"]["uid"] != *uid;
        if is_gone {
            return Ok(());
        }
        pod::check_bound(node, &found).map_err(|denied| Refused::Forbidden(denied.to_string()))
    }
}

fn forbidden(denied: rules::Denied) -> Refused {
    Refused::Forbidden(denied.to_string())
}

fn typed(path: &ResourcePath, mut event: Value) -> Value {
    event["kind"] = "Event".into();
    event["apiVersion"] = "v1".into();
    event["metadata"]["namespace"] = path.namespace().into();
    if let Some(name) = path.name() {
        event["metadata"]["name"] = name.into();
    }
    event
}
