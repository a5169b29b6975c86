//! A box whose link is cut goes on serving; when the link heals, what changed on either side meanwhile arrives.
//!
//! The cable lets nothing pass but the port of the page. During the cut a new greeting is pushed at the hub, and at the
//! box a container ends and has to be started again from local data. After the healing the page must show the push, and
//! the hub must know of the restart. A second app, whose container ends after some seconds, gives the change at the box.

use super::parts;
use anyhow::{Context, Result, ensure};
use skerry_qemu_tests::hub::{self, Hub};
use skerry_qemu_tests::lab::{NAMESPACE, NODE, PATIENCE};
use skerry_qemu_tests::scenario::Stage;
use std::time::{Duration, Instant};

/// How long the link stays cut at least, so that heartbeats are missed.
const CUT: Duration = Duration::from_secs(45);

const RESTLESS: &str = r#"apiVersion: apps/v1
kind: Deployment
metadata:
  name: restless
spec:
  replicas: 1
  selector:
    matchLabels:
      app: restless
  template:
    metadata:
      labels:
        app: restless
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: sleeper
          image: skerry.local/busybox:1
          imagePullPolicy: IfNotPresent
          command: ["/bin/busybox", "sleep", "15"]
"#;
const RESTLESS_APP: &str = "apiVersion: fleet.skerry.dev/v1alpha1\nkind: App\nmetadata:\n  name: restless\nspec:\n  \
    placement:\n    sites:\n      matchLabels:\n        size: large\n";

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let fleet = parts::fleet_with_page(lab)?;
    fleet.write("apps/restless/app.yaml", RESTLESS_APP)?;
    fleet.write("apps/restless/manifests/restless.yaml", RESTLESS)?;
    fleet.push("an app that ends")?;
    let (machine, port) = parts::joined(stage)?;
    stage.ask("the box serves the app's page", || {
        hub::wait("page", parts::PAGE_LIMIT, || hub::page(port).map(Some))
    })?;
    stage.ask("the second app runs", || {
        lab.hub.wait("restless app", PATIENCE, |hub| Ok((restarts(hub)? >= 1).then_some(())))
    })?;

    machine.link().cut_sparing(&[parts::PORT]);
    let begin = Instant::now();
    let known = restarts(&lab.hub)?;
    stage.mark("link cut");
    parts::greet(&fleet, "Changed while you were away")?;
    stage.ask("the hub notices the silence", || {
        lab.hub.wait("Node that is not Ready", PATIENCE, |hub| {
            Ok((!hub.is_ready(NODE)?).then_some(()))
        })
    })?;
    while begin.elapsed() < CUT {
        std::thread::sleep(Duration::from_secs(1));
    }
    let page = stage.ask("the box serves its page all the time", || hub::page(port))?;
    stage.check("the page is the old one", !page.contains("Changed while you were away"))?;

    machine.link().heal();
    let healed = Instant::now();
    stage.mark("link healed");
    stage.ask("the page shows what was pushed during the cut", || {
        parts::page_shows(port, "Changed while you were away", parts::PAGE_LIMIT)
    })?;
    stage.figure("heal_to_page_s", healed.elapsed().as_secs_f64(), "s");
    stage.ask("the hub learns of restarts that happened during the cut", || {
        lab.hub.wait("more restarts", PATIENCE, |hub| {
            let now = restarts(hub)?;
            ensure!(now > known, "{now} restarts, {known} before the cut");
            Ok(Some(()))
        })
    })?;
    stage.ask("the node is Ready again", || {
        lab.hub.wait("Ready node", PATIENCE, |hub| Ok(hub.is_ready(NODE)?.then_some(())))
    })?;
    fleet.remove("apps/restless")?;
    fleet.push("without the app that ends")
}

fn restarts(hub: &Hub) -> Result<u64> {
    let pods = hub.pods(NAMESPACE, "restless")?;
    pods.iter().map(|pod| pod.restarts).max().context("the app has no pod")
}
