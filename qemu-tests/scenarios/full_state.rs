//! A pod that fills the whole disk does not take its box down: the node stays at its hub, says that the disk is full, and
//! recovers when the pod is gone.

use super::parts;
use anyhow::{Result, ensure};
use skerry_qemu_tests::hub;
use skerry_qemu_tests::lab::{NODE, PATIENCE};
use skerry_qemu_tests::scenario::Stage;

const GREEDY: &str = r#"apiVersion: apps/v1
kind: Deployment
metadata:
  name: greedy
spec:
  replicas: 1
  selector:
    matchLabels:
      app: greedy
  template:
    metadata:
      labels:
        app: greedy
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: filler
          image: skerry.local/busybox:1
          imagePullPolicy: IfNotPresent
          command:
            - /bin/busybox
            - sh
            - -c
            - "for size in 1g 200m 50m 10m 1m; do n=0; while busybox fallocate -l $size /fill/$size-$n; do n=$((n+1)); done; done; busybox dd if=/dev/zero of=/fill/rest bs=64k; echo full; busybox sleep 100000"
          volumeMounts:
            - name: fill
              mountPath: /fill
      volumes:
        - name: fill
          emptyDir: {}
"#;
const GREEDY_APP: &str = "apiVersion: fleet.skerry.dev/v1alpha1\nkind: App\nmetadata:\n  name: greedy\nspec:\n  \
    placement:\n    sites:\n      matchLabels:\n        size: large\n";

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let fleet = parts::fleet_with_page(lab)?;
    let (machine, port) = parts::joined(stage)?;
    stage.ask("the box serves the app's page", || {
        hub::wait("page", parts::PAGE_LIMIT, || hub::page(port).map(Some))
    })?;
    fleet.write("apps/greedy/app.yaml", GREEDY_APP)?;
    fleet.write("apps/greedy/manifests/greedy.yaml", GREEDY)?;
    fleet.push("an app that fills the disk")?;
    stage.ask("the node reports that its disk is full", || {
        lab.hub.wait("report of a full disk", PATIENCE, |hub| {
            let node = hub.node(NODE)?.unwrap_or_default();
            let pressure = hub::condition(&node, "DiskPressure").as_deref() == Some("True");
            let unhealthy = hub::condition(&node, "ApplianceHealthy").as_deref() == Some("False");
            ensure!(pressure || unhealthy, "{}", node["status"]["conditions"]);
            Ok(Some(()))
        })
    })?;
    stage.ask("the page is still served", || hub::page(port))?;
    stage.check("the box is up", machine.console().cpu().as_secs() > 0)?;
    fleet.remove("apps/greedy")?;
    fleet.push("without the app that fills the disk")?;
    stage.ask("the node recovers when the app is gone", || {
        lab.hub.wait("healthy node", PATIENCE, |hub| {
            let node = hub.node(NODE)?.unwrap_or_default();
            let is = |kind, value| hub::condition(&node, kind).as_deref() == Some(value);
            let healthy = is("Ready", "True") && !is("DiskPressure", "True");
            ensure!(
                healthy && !is("ApplianceHealthy", "False"),
                "{}",
                node["status"]["conditions"]
            );
            Ok(Some(()))
        })
    })
}
