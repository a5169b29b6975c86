//! Watches, bare and through kube's watcher.

use crate::support::*;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams, WatchEvent, WatchParams};
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::json;
use std::pin::pin;

/// Word and name of the next event of a bare watch.
async fn next(
    stream: &mut (impl futures::Stream<Item = kube::Result<WatchEvent<ConfigMap>>> + Unpin),
) -> (&'static str, String) {
    let event = within("the next event", stream.next()).await.unwrap().unwrap();
    match event {
        WatchEvent::Added(object) => ("ADDED", object.name_any()),
        WatchEvent::Modified(object) => ("MODIFIED", object.name_any()),
        WatchEvent::Deleted(object) => ("DELETED", object.name_any()),
        WatchEvent::Bookmark(mark) => ("BOOKMARK", mark.metadata.resource_version),
        WatchEvent::Error(status) => ("ERROR", status.message),
    }
}

async fn label(maps: &Api<ConfigMap>, name: &str, value: &str) {
    let patch = Patch::Merge(json!({"metadata": {"labels": {"x": value}}}));
    maps.patch(name, &PatchParams::default(), &patch).await.unwrap();
}

#[tokio::test]
async fn watch_after_a_revision_shows_what_happened_since_and_then_what_happens() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let a = create(&maps, json!({"metadata": {"name": "a"}})).await;
    label(&maps, "a", "1").await;
    create(&maps, json!({"metadata": {"name": "b"}})).await;
    let revision = a.resource_version().unwrap();
    let stream = maps.watch(&WatchParams::default(), &revision).await.unwrap();
    let mut stream = pin!(stream);
    assert_eq!(next(&mut stream).await, ("MODIFIED", "a".into()));
    assert_eq!(next(&mut stream).await, ("ADDED", "b".into()));
    maps.delete("a", &DeleteParams::default()).await.unwrap();
    assert_eq!(next(&mut stream).await, ("DELETED", "a".into()));
}

#[tokio::test]
async fn objects_enter_and_leave_a_selector_as_added_and_deleted() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let a = create(&maps, json!({"metadata": {"name": "a"}})).await;
    let start = a.resource_version().unwrap();
    let live = maps.watch(&WatchParams::default().labels("x=1"), &start).await.unwrap();
    let mut live = pin!(live);
    label(&maps, "a", "1").await;
    let patch = Patch::Merge(json!({"data": {"k": "v"}}));
    maps.patch("a", &PatchParams::default(), &patch).await.unwrap();
    label(&maps, "a", "2").await;
    label(&maps, "a", "3").await;
    label(&maps, "a", "1").await;
    maps.delete("a", &DeleteParams::default()).await.unwrap();
    let expected = ["ADDED", "MODIFIED", "DELETED", "ADDED", "DELETED"];
    for word in expected {
        assert_eq!(next(&mut live).await, (word, "a".into()));
    }
    // The same from the log.
    let past = maps.watch(&WatchParams::default().labels("x=1"), &start).await.unwrap();
    let mut past = pin!(past);
    for word in expected {
        assert_eq!(next(&mut past).await, (word, "a".into()));
    }
}

#[tokio::test]
async fn watch_from_a_compacted_revision_ends_with_410() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    create(&maps, json!({"metadata": {"name": "a"}})).await;
    create(&maps, json!({"metadata": {"name": "b"}})).await;
    server.api.compact().await.unwrap();
    let stream = maps.watch(&WatchParams::default(), "2").await.unwrap();
    let events: Vec<_> = within("the end of the watch", stream.try_collect()).await.unwrap();
    match events.as_slice() {
        [WatchEvent::Error(status)] => {
            assert_eq!((status.code, status.reason.as_str()), (410, "Expired"));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn watch_ends_cleanly_after_its_time_with_a_bookmark() {
    let server = Server::start().await;
    let client = server.admin();
    let maps = config_maps(&client);
    let stream = maps.watch(&WatchParams::default().timeout(1), "0").await.unwrap();
    create(&maps, json!({"metadata": {"name": "late"}})).await;
    let secret: Api<k8s_openapi::api::core::v1::Secret> = Api::namespaced(client, "default");
    let newest = create(&secret, json!({"metadata": {"name": "s"}})).await;
    let events: Vec<_> = within("the end of the watch", stream.try_collect()).await.unwrap();
    let Some(WatchEvent::Bookmark(mark)) = events.last() else { panic!("{events:?}") };
    // A bookmark counts changes of other resources too: nothing of this one is missing up to there.
    assert_eq!(mark.metadata.resource_version, newest.resource_version().unwrap());
}

#[tokio::test]
async fn watch_list_marks_the_end_of_what_was_there() {
    let server = Server::start().await;
    let client = server.admin();
    create(&config_maps(&client), json!({"metadata": {"name": "a"}})).await;
    let path = "/api/v1/namespaces/default/configmaps?&watch=true&sendInitialEvents=true\
        &resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=1\
        &fieldSelector=metadata.name%3Da";
    let (code, _, text) = send(&client, "GET", path, &[], b"").await;
    let text = text.as_str().unwrap();
    let events: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((code, events[0]["type"].as_str()), (200, Some("ADDED")));
    let mark = &events[1]["object"]["metadata"];
    assert_eq!(mark["annotations"]["k8s.io/initial-events-end"], "true");
    assert!(mark["resourceVersion"].is_string());

    let path = "/api/v1/configmaps?watch=true&sendInitialEvents=true";
    assert_eq!(send(&client, "GET", path, &[], b"").await.0, 422);
}

async fn watcher_follows(config: watcher::Config) {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    create(&maps, json!({"metadata": {"name": "before", "labels": {"w": "1"}}})).await;
    let stream = watcher(maps.clone(), config.labels("w"));
    let mut stream = pin!(stream);
    let mut next = async || within("the watcher", stream.next()).await.unwrap().unwrap();
    assert!(matches!(next().await, Event::Init));
    assert!(matches!(next().await, Event::InitApply(object) if object.name_any() == "before"));
    assert!(matches!(next().await, Event::InitDone));
    create(&maps, json!({"metadata": {"name": "after", "labels": {"w": "1"}}})).await;
    assert!(matches!(next().await, Event::Apply(object) if object.name_any() == "after"));
    maps.delete("before", &DeleteParams::default()).await.unwrap();
    assert!(matches!(next().await, Event::Delete(object) if object.name_any() == "before"));
}

#[tokio::test]
async fn watcher_of_kube_follows_by_list_and_watch() {
    watcher_follows(watcher::Config::default()).await;
}

#[tokio::test]
async fn watcher_of_kube_follows_by_streaming_list() {
    watcher_follows(watcher::Config::default().streaming_lists()).await;
}

#[tokio::test]
async fn watcher_that_does_not_read_is_cut_off_and_holds_nobody_up() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    create(&maps, json!({"metadata": {"name": "a"}})).await;
    let stream = maps.watch(&WatchParams::default().fields("metadata.name=a"), "0").await.unwrap();
    // More than the ring, the queue of documents and kube's own buffers hold.
    for n in 0..1500 {
        let patch = Patch::Merge(json!({"data": {"n": n.to_string()}}));
        maps.patch("a", &PatchParams::default(), &patch).await.unwrap();
    }
    let seen: Vec<_> = within("the end of the watch", stream.try_collect()).await.unwrap();
    assert!(!seen.is_empty() && seen.len() < 1500, "{} events", seen.len());
}
