//! From a push to the cluster, against the embedded API: real Git repositories, the real controller, no sockets between.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Node};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams,
};
use kube::{Client, ResourceExt};
use serde_json::json;
use skerry_api::fleet::os::{ORDER_ANNOTATION, PROGRESS_ANNOTATION, VERSION_ANNOTATION};
use skerry_api::fleet::v1alpha1::{
    Fleet, NodeQualification, Release, ReleaseStatus, SITE_LABEL, Site, SiteNetwork, SiteOs,
};
use skerry_apiserver::{ApiServer, Durability};
use skerry_reconciler::{Action, Config, diff, render_dir, run, status};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const FLEET: &str = "apiVersion: fleet.skerry.dev/v1alpha1\nkind: Fleet\nmetadata: {name: test}\n";

/// A remote, a clone to work in, a cluster and a running controller.
struct World {
    dir: tempfile::TempDir,
    server: Option<ApiServer>,
    client: Client,
    controller: Option<(CancellationToken, JoinHandle<()>)>,
}

impl World {
    async fn new() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let server = ApiServer::start(skerry_apiserver::Config {
            dir: dir.path().join("api"),
            listen: "127.0.0.1:0".parse().unwrap(),
            hostnames: Vec::new(),
            node_streams: None,
            durability: Durability::Relaxed,
            controllers: false,
        })
        .await
        .unwrap();
        let client = server.client("admin", &["system:masters"]);
        let mut world = Self { dir, server: Some(server), client, controller: None };
        git(
            world.dir.path(),
            &["init", "--quiet", "--bare", "--initial-branch=main", "remote.git"],
        );
        git(world.dir.path(), &["clone", "--quiet", "remote.git", "work"]);
        git(&world.work(), &["checkout", "--quiet", "-b", "main"]);
        world.start_controller();
        world
    }

    fn start_controller(&mut self) {
        let client =
            self.server.as_ref().unwrap().client("skerry-reconciler", &["skerry:reconciler"]);
        let stop = CancellationToken::new();
        let config = Config {
            remote: self.dir.path().join("remote.git").display().to_string(),
            branch: "main".to_owned(),
            dir: self.dir.path().join("copies"),
            poll: Duration::from_millis(20),
        };
        let stopping = stop.clone();
        let task = tokio::spawn(async move { run(client, config, stopping).await.unwrap() });
        self.controller = Some((stop, task));
    }

    async fn stop_controller(&mut self) {
        let (stop, task) = self.controller.take().unwrap();
        stop.cancel();
        task.await.unwrap();
    }

    fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    fn write(&self, path: &str, content: &str) {
        let path = self.work().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn remove(&self, path: &str) {
        let path = self.work().join(path);
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap()
        } else {
            std::fs::remove_file(path).unwrap()
        }
    }

    fn push(&self) -> String {
        git(&self.work(), &["add", "--all"]);
        git(&self.work(), &["commit", "--quiet", "--allow-empty", "--message", "change"]);
        git(&self.work(), &["push", "--quiet", "--force", "origin", "main"]);
        git(&self.work(), &["rev-parse", "HEAD"])
    }

    fn site(&self, name: &str, spec: &str) {
        let text = format!(
            "apiVersion: fleet.skerry.dev/v1alpha1\nkind: Site\nmetadata: {{name: {name}}}\nspec: {spec}\n"
        );
        self.write(&format!("sites/{name}.yaml"), &text);
    }

    fn app(&self, name: &str, manifest: &str) {
        let text = format!(
            "apiVersion: fleet.skerry.dev/v1alpha1\nkind: App\nmetadata: {{name: {name}}}\nspec: {{placement: {{sites: {{}}}}}}\n"
        );
        self.write(&format!("apps/{name}/app.yaml"), &text);
        self.write(&format!("apps/{name}/manifests/all.yaml"), manifest);
    }

    /// One site, one app that is one ConfigMap.
    fn small_fleet(&self) {
        self.write("fleet.yaml", FLEET);
        self.site("a", "{vars: {greeting: hello}}");
        self.app("page", &config_map("page", "${site.vars.greeting}"));
    }

    fn config_maps(&self, site: &str) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &format!("site-{site}"))
    }

    async fn text(&self, site: &str, name: &str) -> Option<String> {
        self.config_maps(site).get_opt(name).await.ok()??.data?.get("text").cloned()
    }

    async fn wait_for_text(&self, site: &str, name: &str, text: &str) {
        wait(&format!("ConfigMap {name} of {site} says `{text}`"), async || {
            (self.text(site, name).await.as_deref() == Some(text)).then_some(())
        })
        .await;
    }

    async fn wait_gone(&self, site: &str, name: &str) {
        wait(&format!("ConfigMap {name} of {site} is gone"), async || {
            self.config_maps(site).get_opt(name).await.unwrap().is_none().then_some(())
        })
        .await;
    }

    /// The release's status once `good` likes it.
    async fn wait_for_release(
        &self,
        site: &str,
        app: &str,
        good: impl Fn(&ReleaseStatus) -> bool,
    ) -> ReleaseStatus {
        let api: Api<Release> = Api::namespaced(self.client.clone(), &format!("site-{site}"));
        let last = std::sync::Mutex::new(None);
        let found = async || {
            let status = api.get_opt(app).await.ok()??.status?;
            *last.lock().unwrap() = Some(status.clone());
            good(&status).then_some(status)
        };
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = found().await {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "release {site}/{app} stays at {:#?}",
                last.lock().unwrap()
            );
            tokio::time::sleep(STEP).await;
        }
    }

    async fn wait_for_fleet(&self, what: &str, good: impl Fn(&Fleet) -> bool) -> Fleet {
        let api: Api<Fleet> = Api::namespaced(self.client.clone(), "skerry-system");
        // Between the object and its status there is a moment without one.
        let told = |fleet: &Fleet| fleet.status.is_some() && good(fleet);
        wait(what, async || api.get_opt("fleet").await.ok()?.filter(&told)).await
    }

    async fn events(&self, reason: &str) -> Vec<Event> {
        let all =
            Api::<Event>::all(self.client.clone()).list(&ListParams::default()).await.unwrap();
        all.items.into_iter().filter(|event| event.reason.as_deref() == Some(reason)).collect()
    }

    async fn end(mut self) {
        self.stop_controller().await;
        self.server.take().unwrap().shutdown().await;
    }
}

const DEADLINE: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(10);

async fn wait<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(STEP).await;
    }
}

fn git(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .args([
            "-c",
            "user.name=Test",
            "-c",
            "user.email=test@example.com",
            "-c",
            "commit.gpgsign=false",
        ])
        .args(arguments)
        .current_dir(dir)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn config_map(name: &str, text: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata: {{text: \"{text}\"}}\n"
    )
}

fn condition<'a>(status: &'a ReleaseStatus, kind: &str) -> &'a str {
    status
        .conditions
        .iter()
        .find(|condition| condition.kind == kind)
        .map_or("", |condition| &condition.status)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_reaches_the_cluster_and_a_change_and_a_removal_follow() {
    let world = World::new().await;
    world.small_fleet();
    world.site("b", "{vars: {greeting: salut}}");
    let first = world.push();
    world.wait_for_text("a", "page", "hello").await;
    world.wait_for_text("b", "page", "salut").await;
    let status = world.wait_for_release("a", "page", |status| status.revision.is_some()).await;
    assert_eq!(status.revision.as_deref(), Some(first.as_str()));
    assert_eq!(status.inventory.len(), 1);
    assert_eq!(status.inventory[0].kind, "ConfigMap");
    let object = world.config_maps("a").get("page").await.unwrap();
    assert_eq!(object.labels()[SITE_LABEL], "a");

    world.site("b", "{vars: {greeting: bonjour}}");
    let second = world.push();
    world.wait_for_text("b", "page", "bonjour").await;
    world.wait_for_release("a", "page", |status| status.revision.as_deref() == Some(&second)).await;
    assert_eq!(
        world.config_maps("a").get("page").await.unwrap().resource_version(),
        object.resource_version()
    );

    world.app("page", &config_map("other", "x"));
    world.push();
    world.wait_for_text("a", "other", "x").await;
    world.wait_gone("a", "page").await;

    world.app("more", &config_map("more", "y"));
    world.remove("apps/page");
    world.push();
    world.wait_for_text("b", "more", "y").await;
    world.wait_gone("b", "other").await;
    let releases: Api<Release> = Api::namespaced(world.client.clone(), "site-b");
    wait("the release is gone", async || {
        releases.get_opt("page").await.unwrap().is_none().then_some(())
    })
    .await;

    world.remove("sites/b.yaml");
    world.push();
    let namespaces: Api<Namespace> = Api::all(world.client.clone());
    wait("the site's namespace goes", async || match namespaces.get_opt("site-b").await.unwrap() {
        None => Some(()),
        Some(namespace) => namespace.metadata.deletion_timestamp.map(drop),
    })
    .await;
    world.wait_for_text("a", "more", "y").await;
    assert!(!world.events("Applied").await.is_empty());
    assert!(!world.events("Pruned").await.is_empty());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_the_api_refuses_stalls_alone_and_nothing_of_it_is_applied() {
    let world = World::new().await;
    world.small_fleet();
    world.app("bad", &config_map("before", "1"));
    world.push();
    world.wait_for_text("a", "before", "1").await;

    let widget = "apiVersion: example.com/v1\nkind: Widget\nmetadata: {name: w}\n";
    world.app("bad", &format!("{}---\n{widget}", config_map("after", "2")));
    world.site("a", "{vars: {greeting: changed}}");
    let second = world.push();
    world.wait_for_text("a", "page", "changed").await;
    let status =
        world.wait_for_release("a", "bad", |status| condition(status, "Stalled") == "True").await;
    assert_eq!(status.health, "Stalled");
    assert!(status.message.contains("apps/bad/manifests/all.yaml:6"), "{}", status.message);
    assert!(status.message.contains("Widget"), "{}", status.message);
    assert_ne!(status.revision.as_deref(), Some(second.as_str()));
    assert_eq!(status.attempted_revision.as_deref(), Some(second.as_str()));
    assert_eq!(world.text("a", "before").await.as_deref(), Some("1"), "nothing is pruned");
    assert_eq!(world.text("a", "after").await, None, "nothing is half-applied");
    assert!(!world.events("Stalled").await.is_empty());
    let shown = status_of(&world).await;
    assert!(!shown.ready);
    let row = shown.releases.iter().find(|row| row.app == "bad").unwrap();
    assert_eq!(row.health, "Stalled");

    world.app("bad", &config_map("after", "2"));
    world.push();
    world.wait_for_text("a", "after", "2").await;
    world.wait_gone("a", "before").await;
    world.wait_for_release("a", "bad", |status| condition(status, "Stalled") == "False").await;
    world.end().await;
}

async fn status_of(world: &World) -> skerry_reconciler::FleetStatus {
    status(world.client.clone()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_with_a_wrong_type_is_named_with_the_words_of_the_api() {
    let world = World::new().await;
    world.small_fleet();
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: {port: eighty}}\n";
    world.app("bad", &format!("{}---\n{service}", config_map("after", "2")));
    world.push();
    world.wait_for_text("a", "page", "hello").await;
    let status =
        world.wait_for_release("a", "bad", |status| condition(status, "Stalled") == "True").await;
    assert!(status.message.contains("Service s"), "{}", status.message);
    assert_eq!(world.text("a", "after").await, None, "nothing is half-applied");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_in_the_repository_are_shown_and_take_nothing_away() {
    let world = World::new().await;
    world.small_fleet();
    world.site("b", "{vars: {greeting: salut}}");
    world.push();
    world.wait_for_text("b", "page", "salut").await;

    world.write("sites/b.yaml", "kind: Site\nmetadata: {name: b\n");
    world.app("page", &config_map("page", "${site.vars.greeting}!"));
    world.push();
    world.wait_for_text("a", "page", "hello!").await;
    let fleet = world
        .wait_for_fleet("the problem is shown", |fleet| {
            !fleet.status.as_ref().unwrap().problems.is_empty()
        })
        .await;
    let held = world.wait_for_release("b", "page", |status| status.health == "Stalled").await;
    assert!(held.message.contains("held back by sites/b.yaml:2"), "{}", held.message);
    let problem = &fleet.status.unwrap().problems[0];
    assert_eq!((problem.file.as_str(), problem.line), ("sites/b.yaml", 2), "{problem}");
    assert_eq!(world.text("b", "page").await.as_deref(), Some("salut"));

    world.write("fleet.yaml", "apiVersion: fleet.skerry.dev/v1alpha1\nkind: Fleet\nmetadata: {name: test}\nspec: {prunes: true}\n");
    world.push();
    world
        .wait_for_fleet("the typing error is shown", |fleet| {
            let problems = &fleet.status.as_ref().unwrap().problems;
            problems.iter().any(|problem| problem.hint.as_deref() == Some("did you mean `prune`?"))
        })
        .await;
    assert_eq!(world.text("a", "page").await.as_deref(), Some("hello!"));
    assert_eq!(world.text("b", "page").await.as_deref(), Some("salut"));
    let shown = status_of(&world).await;
    assert!(!shown.ready && !shown.problems.is_empty());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rewritten_history_is_followed_and_recorded() {
    let world = World::new().await;
    world.small_fleet();
    let first = world.push();
    world.app("page", &config_map("page", "second"));
    world.push();
    world.wait_for_text("a", "page", "second").await;
    git(&world.work(), &["reset", "--quiet", "--hard", &first]);
    world.app("page", &config_map("page", "rewritten"));
    world.push();
    world.wait_for_text("a", "page", "rewritten").await;
    wait("the event is there", async || world.events("HistoryRewritten").await.pop()).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_that_is_gone_is_shown_and_what_runs_stays() {
    let world = World::new().await;
    world
        .wait_for_fleet("the missing branch is shown", |fleet| {
            let status = fleet.status.as_ref().unwrap();
            status.conditions.iter().any(|condition| condition.reason == "BranchMissing")
        })
        .await;
    world.small_fleet();
    world.push();
    world.wait_for_text("a", "page", "hello").await;
    let remote = world.dir.path().join("remote.git");
    let away = world.dir.path().join("away.git");
    std::fs::rename(&remote, &away).unwrap();
    let fleet = world
        .wait_for_fleet("the missing remote is shown", |fleet| {
            let status = fleet.status.as_ref().unwrap();
            status
                .conditions
                .iter()
                .any(|condition| condition.kind == "Fetched" && condition.reason == "RemoteGone")
        })
        .await;
    assert!(fleet.status.unwrap().problems[0].hint.is_some());
    assert_eq!(world.text("a", "page").await.as_deref(), Some("hello"));
    std::fs::rename(&away, &remote).unwrap();
    world.app("page", &config_map("page", "back"));
    world.push();
    world.wait_for_text("a", "page", "back").await;
    world
        .wait_for_fleet("the remote answers again", |fleet| {
            let status = fleet.status.as_ref().unwrap();
            status
                .conditions
                .iter()
                .any(|condition| condition.kind == "Ready" && condition.status == "True")
        })
        .await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_else_changes_or_deletes_is_put_back() {
    let world = World::new().await;
    world.small_fleet();
    world.push();
    world.wait_for_text("a", "page", "hello").await;
    world.wait_for_release("a", "page", |status| status.revision.is_some()).await;
    let api = world.config_maps("a");
    api.patch("page", &PatchParams::default(), &Patch::Merge(json!({"data": {"text": "mine"}})))
        .await
        .unwrap();
    world.wait_for_text("a", "page", "hello").await;
    api.delete("page", &DeleteParams::default()).await.unwrap();
    world.wait_for_text("a", "page", "hello").await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reports_that_somebody_deletes_come_back_with_the_inventory() {
    let world = World::new().await;
    world.small_fleet();
    world.push();
    let first = world.wait_for_release("a", "page", |status| status.revision.is_some()).await;
    let releases: Api<Release> = Api::namespaced(world.client.clone(), "site-a");
    releases.delete("page", &DeleteParams::default()).await.unwrap();
    let again = world.wait_for_release("a", "page", |status| !status.inventory.is_empty()).await;
    assert_eq!((again.inventory, again.revision), (first.inventory, first.revision));

    let sites: Api<Site> = Api::namespaced(world.client.clone(), "site-a");
    sites.delete("a", &DeleteParams::default()).await.unwrap();
    wait("the Site is back with its status", async || {
        sites.get_opt("a").await.ok()??.status.filter(|status| !status.health.is_empty())
    })
    .await;

    let fleets: Api<Fleet> = Api::namespaced(world.client.clone(), "skerry-system");
    fleets.delete("fleet", &DeleteParams::default()).await.unwrap();
    world.wait_for_fleet("the Fleet is back", |fleet| fleet.status.is_some()).await;

    let definitions: Api<CustomResourceDefinition> = Api::all(world.client.clone());
    let name = "releases.fleet.skerry.dev";
    definitions.delete(name, &DeleteParams::default()).await.unwrap();
    wait("the definition goes", async || {
        definitions
            .get_opt(name)
            .await
            .unwrap()
            .is_none_or(|definition| definition.metadata.deletion_timestamp.is_some())
            .then_some(())
    })
    .await;
    let again = world.wait_for_release("a", "page", |status| !status.inventory.is_empty()).await;
    assert_eq!(again.inventory.len(), 1);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changed_while_no_controller_ran_is_put_back_at_the_start() {
    let mut world = World::new().await;
    world.small_fleet();
    world.push();
    world.wait_for_release("a", "page", |status| status.revision.is_some()).await;
    world.stop_controller().await;
    let api = world.config_maps("a");
    api.patch("page", &PatchParams::default(), &Patch::Merge(json!({"data": {"text": "mine"}})))
        .await
        .unwrap();
    world.start_controller();
    world.wait_for_text("a", "page", "hello").await;
    api.delete("page", &DeleteParams::default()).await.unwrap();
    world.wait_for_text("a", "page", "hello").await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_was_down_prunes_what_left_meanwhile_and_only_what_is_ours() {
    let mut world = World::new().await;
    world.small_fleet();
    world.app("more", &format!("{}---\n{}", config_map("one", "1"), config_map("two", "2")));
    world.push();
    world.wait_for_text("a", "two", "2").await;
    world.wait_for_release("a", "more", |status| status.revision.is_some()).await;
    world.stop_controller().await;

    let api = world.config_maps("a");
    let foreign: ConfigMap =
        serde_json::from_value(json!({"metadata": {"name": "foreign"}})).unwrap();
    api.create(&PostParams::default(), &foreign).await.unwrap();
    let unlabel = json!({"metadata": {"labels": {"fleet.skerry.dev/app": null}}});
    api.patch("one", &PatchParams::default(), &Patch::Merge(unlabel)).await.unwrap();
    world.remove("apps/more");
    world.push();
    world.start_controller();
    world.wait_gone("a", "two").await;
    let releases: Api<Release> = Api::namespaced(world.client.clone(), "site-a");
    wait("the release is gone", async || {
        releases.get_opt("more").await.unwrap().is_none().then_some(())
    })
    .await;
    assert!(api.get_opt("one").await.unwrap().is_some(), "it does not carry our label any more");
    assert!(api.get_opt("foreign").await.unwrap().is_some());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_follows_the_site_and_its_workloads() {
    let world = World::new().await;
    world.write("fleet.yaml", FLEET);
    world.site("a", "{nodes: [n1]}");
    let web = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  selector: {matchLabels: {app: web}}\n  template:\n    metadata: {labels: {app: web}}\n    spec: {containers: [{name: web, image: x}]}\n";
    world.app("web", web);
    world.push();
    let status = world.wait_for_release("a", "web", |status| status.health == "Pending").await;
    assert!(status.message.contains("none of 1 nodes has joined"), "{}", status.message);

    let nodes: Api<Node> = Api::all(world.client.clone());
    let node: Node = serde_json::from_value(json!({"metadata": {"name": "n1"}})).unwrap();
    nodes.create(&PostParams::default(), &node).await.unwrap();
    let ready = json!({"status": {"conditions": [{
        "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
        "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z",
    }]}});
    nodes.patch_status("n1", &PatchParams::default(), &Patch::Merge(&ready)).await.unwrap();
    wait("the node carries the site's label", async || {
        (nodes.get("n1").await.unwrap().labels().get(SITE_LABEL)? == "a").then_some(())
    })
    .await;
    world.wait_for_release("a", "web", |status| status.health == "Progressing").await;

    let deployments: Api<Deployment> = Api::namespaced(world.client.clone(), "site-a");
    let live = deployments.get("web").await.unwrap();
    let done = json!({"status": {
        "observedGeneration": live.metadata.generation, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1,
        "availableReplicas": 1,
    }});
    deployments.patch_status("web", &PatchParams::default(), &Patch::Merge(&done)).await.unwrap();
    let status = world.wait_for_release("a", "web", |status| status.health == "Ready").await;
    assert_eq!((status.pods_ready, status.pods_total), (1, 1));
    assert_eq!(condition(&status, "Ready"), "True");
    wait("the fleet is ready", async || status_of(&world).await.ready.then_some(())).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diff_names_what_a_push_would_do_and_changes_nothing() {
    let world = World::new().await;
    world.small_fleet();
    world.push();
    world.wait_for_text("a", "page", "hello").await;
    world.wait_for_release("a", "page", |status| status.revision.is_some()).await;
    let same = diff(world.client.clone(), &render_dir(&world.work()).unwrap()).await.unwrap();
    assert_eq!(same, []);

    world.app("page", &format!("{}---\n{}", config_map("page", "other"), config_map("new", "1")));
    world.app("more", &config_map("more", "1"));
    world.site("b", "{vars: {greeting: hi}}");
    let changes = diff(world.client.clone(), &render_dir(&world.work()).unwrap()).await.unwrap();
    let found: Vec<_> = changes
        .iter()
        .map(|change| (change.site.as_str(), change.name.as_str(), change.action))
        .collect();
    assert_eq!(
        found,
        [
            ("a", "more", Action::Create),
            ("a", "new", Action::Create),
            ("a", "page", Action::Update),
            ("b", "more", Action::Create),
            ("b", "new", Action::Create),
            ("b", "page", Action::Create),
        ]
    );
    assert_eq!(changes[2].fields, ["data.text: \"hello\" -> \"other\""]);

    world.remove("apps/page");
    let changes = diff(world.client.clone(), &render_dir(&world.work()).unwrap()).await.unwrap();
    assert!(changes.iter().any(|change| change.name == "page" && change.action == Action::Prune));
    assert_eq!(world.text("a", "page").await.as_deref(), Some("hello"));
    world.end().await;
}

/// A node with a kernel, and what it reports of it.
async fn report(world: &World, node: &str, kernel: &str, rows: &[(&str, &str, &str)]) {
    let nodes: Api<Node> = Api::all(world.client.clone());
    let object = serde_json::from_value(json!({"metadata": {"name": node}})).unwrap();
    let _ = nodes.create(&PostParams::default(), &object).await;
    let status = json!({"status": {"nodeInfo": {
        "kernelVersion": kernel, "machineID": "", "systemUUID": "", "bootID": "", "osImage": "",
        "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "", "operatingSystem": "",
        "architecture": "",
    }}});
    nodes.patch_status(node, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    let profiles: Vec<_> = rows
        .iter()
        .map(|(profile, verdict, missing)| {
            json!({"profile": profile, "verdict": verdict, "missing": missing, "hint": "another kernel"})
        })
        .collect();
    let facts = json!({"link.vcan": {"state": "missing", "source": "probe", "evidence": ""}});
    let object = json!({
        "apiVersion": "fleet.skerry.dev/v1alpha1", "kind": "NodeQualification",
        "metadata": {"name": node}, "spec": {"node": node},
        "status": {"kernel": "6.12.1", "arch": "x86_64", "verdict": "Qualified", "profiles": profiles,
            "report": {"facts": facts}},
    });
    let reports: Api<NodeQualification> = Api::all(world.client.clone());
    let apply = PatchParams::apply("test").force();
    wait("the report is taken", async || {
        reports.patch(node, &apply, &Patch::Apply(&object)).await.ok()
    })
    .await;
}

async fn network(world: &World, site: &str, what: &str, good: impl Fn(&SiteNetwork) -> bool) {
    let sites: Api<Site> = Api::namespaced(world.client.clone(), &format!("site-{site}"));
    wait(what, async || sites.get_opt(site).await.ok()??.status?.network.filter(&good)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_whose_node_does_not_carry_its_network_is_stopped_at_the_gate_until_it_does() {
    let world = World::new().await;
    report(&world, "a-1", "6.12.1", &[("cilium", "unsupported", "bpf.btf missing")]).await;
    world.small_fleet();
    world.site("a", "{nodes: [a-1], cni: cilium, vars: {greeting: hello}}");
    world.site("b", "{vars: {greeting: hello}}");
    world.push();

    let stopped = world.wait_for_release("a", "page", |status| status.health == "Stalled").await;
    for word in ["`cilium`", "`a-1`", "bpf.btf missing", "hint: another kernel"] {
        assert!(stopped.message.contains(word), "{}", stopped.message);
    }
    let reason = &stopped.conditions.iter().find(|one| one.kind == "Ready").unwrap().reason;
    assert_eq!(reason, "NetworkNotQualified");
    network(&world, "a", "the site says that it is stopped", |network| network.stopped).await;
    // Its neighbours are none of its business.
    world.wait_for_text("b", "page", "hello").await;
    assert_eq!(world.text("a", "page").await, None, "nothing of it was applied");
    let row = status_of(&world).await.sites.into_iter().find(|row| row.site == "a").unwrap();
    assert!(row.message.starts_with("stopped at the gate"), "{}", row.message);

    report(&world, "a-1", "6.12.1", &[("cilium", "degraded", "without tracing")]).await;
    world.wait_for_text("a", "page", "hello").await;
    network(&world, "a", "the gate is open", |network| !network.stopped).await;

    // What is applied stays, and what is new waits, when the node comes back with a worse kernel.
    report(&world, "a-1", "6.12.1", &[("cilium", "unsupported", "bpf.btf missing")]).await;
    network(&world, "a", "the gate is closed", |network| network.stopped).await;
    world.site("a", "{nodes: [a-1], cni: cilium, vars: {greeting: changed}}");
    world.push();
    world.wait_for_release("a", "page", |status| status.health == "Stalled").await;
    assert_eq!(world.text("a", "page").await.as_deref(), Some("hello"));

    // A report of another kernel than the node runs says nothing; unknown nodes are let through.
    report(&world, "a-1", "6.99.0", &[("cilium", "unsupported", "bpf.btf missing")]).await;
    world.wait_for_text("a", "page", "changed").await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_with_auto_gets_the_best_network_of_its_nodes_and_own_profiles_are_judged() {
    let world = World::new().await;
    let good = [("flannel-vxlan", "qualified", ""), ("kube-proxy-nftables", "qualified", "")];
    report(&world, "a-1", "6.12.1", &good).await;
    world.small_fleet();
    world.site("a", "{nodes: [a-1, a-2], cni: auto, vars: {greeting: hello}}");
    let own = "[[profile]]\nid = \"line-4\"\ntitle = \"Line 4\"\nneeds = [\"link.vcan\"]\n";
    world.write("profiles/line-4.toml", own);
    world.push();
    network(&world, "a", "flannel is chosen", |network| {
        network.cni.as_deref() == Some("flannel-vxlan")
            && network.proxy.as_deref() == Some("kube-proxy-nftables")
            && network.message.contains("`a-2` has not reported")
    })
    .await;
    world.wait_for_text("a", "page", "hello").await;

    let old =
        [("flannel-vxlan", "unsupported", "link.vxlan missing"), ("cni-bridge", "qualified", "")];
    report(&world, "a-2", "6.12.1", &old).await;
    report(&world, "a-1", "6.12.1", &[("cni-bridge", "qualified", "")]).await;
    network(&world, "a", "what both carry is chosen", |network| {
        network.cni.as_deref() == Some("cni-bridge")
    })
    .await;

    // The fleet's own profile, over the checks of the report: no node knows it.
    world.site("a", "{nodes: [a-1], cni: line-4, vars: {greeting: hello}}");
    world.push();
    network(&world, "a", "the own profile is not carried", |network| {
        network.stopped && network.message.contains("link.vcan")
    })
    .await;

    // Mistakes in such a file, and a network that does not exist, are problems with a place.
    world.write("profiles/line-4.toml", &own.replace("vcan", "vacn"));
    world.push();
    let fleet = world
        .wait_for_fleet("the mistakes are shown", |fleet| {
            fleet.status.as_ref().is_some_and(|status| status.problems.len() == 2)
        })
        .await;
    let problems = fleet.status.unwrap().problems;
    assert!(
        problems.iter().any(|p| p.file == "profiles/line-4.toml" && p.message.contains("vacn"))
    );
    assert!(
        problems.iter().any(|p| p.message.contains("`line-4`") && p.site.as_deref() == Some("a"))
    );
    world.end().await;
}

/// The API of KubeEdge's devices in a site.
async fn devices(world: &World, site: &str, kind: &str, plural: &str) -> Api<DynamicObject> {
    let resource = ApiResource {
        group: "devices.kubeedge.io".to_owned(),
        version: "v1beta1".to_owned(),
        api_version: "devices.kubeedge.io/v1beta1".to_owned(),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    };
    Api::namespaced_with(world.client.clone(), &format!("site-{site}"), &resource)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_of_a_site_follow_the_repository_and_keep_what_people_desire() {
    let world = World::new().await;
    let definitions: Api<CustomResourceDefinition> = Api::all(world.client.clone());
    for definition in skerry_api::crds().into_iter().chain(skerry_api::kubeedge::crds()) {
        if definition["spec"]["group"] != "devices.kubeedge.io" {
            continue;
        }
        let name = definition["metadata"]["name"].as_str().unwrap().to_owned();
        let apply = PatchParams::apply("test").force();
        definitions.patch(&name, &apply, &Patch::Apply(definition)).await.unwrap();
    }
    world.small_fleet();
    world.site("a", "{nodes: [a-1], vars: {greeting: hello, cycle: 1000}}");
    world.write(
        "devices/models/fridge.yaml",
        "apiVersion: devices.kubeedge.io/v1beta1\nkind: DeviceModel\nmetadata: {name: fridge}\n\
         spec: {properties: [{name: setpoint, type: INT, accessMode: ReadWrite, maximum: \"8\"}, \
         {name: fan, type: INT, accessMode: ReadWrite}]}\n",
    );
    let device = |fan: &str| {
        format!(
            "apiVersion: devices.kubeedge.io/v1beta1\nkind: Device\nmetadata: {{name: cold}}\n\
             spec: {{deviceModelRef: {{name: fridge}}, protocol: {{protocolName: sim}}, properties: [\
             {{name: setpoint, collectCycle: \"${{site.vars.cycle}}\"}}, \
             {{name: fan, desired: {{value: \"{fan}\"}}}}]}}\n"
        )
    };
    world.write("devices/a/cold.yaml", &device("1"));
    world.push();
    let api = devices(&world, "a", "Device", "devices").await;
    let models = devices(&world, "a", "DeviceModel", "devicemodels").await;
    let live = wait("the device is there", async || api.get_opt("cold").await.ok()?).await;
    assert_eq!(live.data["spec"]["nodeName"], "a-1");
    assert_eq!(live.data["spec"]["properties"][0]["collectCycle"], 1000);
    assert!(models.get_opt("fridge").await.unwrap().is_some());

    // Somebody desires something of one property, and changes another one that is the repository's.
    let mut properties = live.data["spec"]["properties"].clone();
    properties[0]["desired"] = json!({"value": "4"});
    properties[1]["desired"] = json!({"value": "9"});
    let patch = json!({"spec": {"properties": properties}});
    api.patch("cold", &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    let desired = async |setpoint: &str, fan: &str| {
        wait(&format!("setpoint {setpoint} and fan {fan} are desired"), async || {
            let live = api.get("cold").await.unwrap();
            let properties = &live.data["spec"]["properties"];
            let same = properties[0]["desired"]["value"] == setpoint
                && properties[1]["desired"]["value"] == fan;
            same.then_some(())
        })
        .await;
    };
    desired("4", "1").await;
    world.write("devices/a/cold.yaml", &device("2"));
    world.push();
    desired("4", "2").await;

    // What is wrong is shown, and what runs stays.
    world.write("devices/a/cold.yaml", &device("2").replace("name: setpoint", "name: setpiont"));
    world.push();
    let fleet = world
        .wait_for_fleet("the mistake is shown", |fleet| {
            let problems = fleet.status.as_ref().map(|status| status.problems.clone());
            problems
                .is_some_and(|problems| problems.iter().any(|p| p.message.contains("`setpiont`")))
        })
        .await;
    assert!(fleet.status.is_some());
    desired("4", "2").await;

    world.remove("devices/a");
    world.push();
    wait("the device and its model are gone", async || {
        let device = api.get_opt("cold").await.unwrap();
        let model = models.get_opt("fridge").await.unwrap();
        (device.is_none() && model.is_none()).then_some(())
    })
    .await;
    world.wait_for_text("a", "page", "hello").await;
    world.end().await;
}

/// A Node's order for its OS.
async fn order(world: &World, node: &str) -> Option<serde_json::Value> {
    let nodes: Api<Node> = Api::all(world.client.clone());
    let node = nodes.get_opt(node).await.ok()??;
    serde_json::from_str(node.annotations().get(ORDER_ANNOTATION)?).ok()
}

/// What an appliance says of its OS.
async fn runs(world: &World, node: &str, version: &str, progress: serde_json::Value) {
    let nodes: Api<Node> = Api::all(world.client.clone());
    let said = json!({VERSION_ANNOTATION: version, PROGRESS_ANNOTATION: progress.to_string()});
    let patch = json!({"metadata": {"annotations": said}});
    nodes.patch(node, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
}

async fn os(world: &World, what: &str, good: impl Fn(&SiteOs) -> bool) {
    let sites: Api<Site> = Api::namespaced(world.client.clone(), "site-a");
    wait(what, async || sites.get_opt("a").await.ok()??.status?.os.filter(|os| good(os)).map(drop))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_reaches_the_nodes_of_its_sites_unless_its_kernel_lost_their_network() {
    let world = World::new().await;
    report(&world, "a-1", "6.12.1", &[("cilium", "qualified", "")]).await;
    world.small_fleet();
    let release = |version: &str, verdict: &str| {
        let digest = "ab".repeat(32);
        world.write("os/stable.yaml", &format!(
            "apiVersion: fleet.skerry.dev/v1alpha1\nkind: OsRelease\nmetadata: {{name: stable}}\nspec:\n  version: \"{version}\"\n  counter: {version}\n  digest: sha256:{digest}\n  kernel: {{cilium: {verdict}}}\n"
        ));
    };
    release("2", "degraded");
    let site = |channel: &str| {
        format!(
            "{{nodes: [a-1], cni: cilium, osChannel: {channel}, os: {{zone: Europe/Lisbon, windows: [{{from: \"02:00\", to: \"04:00\"}}]}}, vars: {{greeting: hello}}}}"
        )
    };
    world.site("a", &site("stable"));
    world.push();

    let told = wait("the node has its order", async || order(&world, "a-1").await).await;
    assert_eq!((told["version"].as_str(), told["counter"].as_u64()), (Some("2"), Some(2)));
    assert_eq!(told["policy"]["windows"][0]["from"], "02:00");
    runs(&world, "a-1", "1 (debug)", json!({"version": "2", "step": "fetching", "percent": 40}))
        .await;
    os(&world, "the site says how far it is", |os| os.message.contains("`a-1` fetching 40 %"))
        .await;
    let failed = json!({"version": "2", "step": "failed", "reason": "containerd did not start"});
    runs(&world, "a-1", "1", failed).await;
    os(&world, "the site says why", |os| os.message == "node `a-1`: containerd did not start")
        .await;
    runs(&world, "a-1", "2", json!({"version": "2", "step": "current"})).await;
    os(&world, "all of it is current", |os| (os.nodes_current, os.nodes_total) == (1, 1)).await;
    let rows = status_of(&world).await.sites;
    assert_eq!(rows[0].os.as_ref().map(|os| os.version.as_str()), Some("2"));

    release("3", "unsupported");
    world.push();
    os(&world, "the gate is closed", |os| os.stopped && os.message.contains("`cilium`")).await;
    assert_eq!(order(&world, "a-1").await.unwrap()["version"], "2", "it keeps what it had");
    release("4", "qualified");
    world.push();
    wait("the order goes on", async || {
        order(&world, "a-1").await.filter(|order| order["version"] == "4").map(drop)
    })
    .await;

    world.site("a", &site("stabel"));
    world.push();
    wait("the mistake is shown", async || {
        let problems = status_of(&world).await.problems;
        let hint = problems.iter().find(|one| one.message.contains("`stabel`"))?.hint.clone()?;
        (hint == "did you mean `stable`?").then_some(())
    })
    .await;
    wait("nothing is ordered any more", async || {
        order(&world, "a-1").await.is_none().then_some(())
    })
    .await;
}
