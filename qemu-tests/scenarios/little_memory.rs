//! A box with 192 MiB of memory runs two pods without running out of memory.
//!
//! The kernel must not kill anything while the pods are watched (`--hold MINUTES`; the figure of the product is an hour).

use super::parts;
use anyhow::{Result, ensure};
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::hub;
use skerry_qemu_tests::lab::{APP, NAMESPACE, NODE, PATIENCE, READY};
use skerry_qemu_tests::scenario::Stage;
use std::time::{Duration, Instant};

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let fleet = parts::fleet_with_page(lab)?;
    fleet.write("apps/second/app.yaml", SECOND_APP)?;
    fleet.write("apps/second/manifests/second.yaml", SECOND)?;
    fleet.push("a second app")?;
    let port = hub::free_port()?;
    let plan = lab.kernel_machine(NODE).disk(lab.joined_disk()?).forward(port, parts::PORT);
    let machine = stage.boot(&plan.memory_mib(192))?;
    stage.expect(&machine, "the node is back at its hub", Want::Word("ready"), READY)?;
    stage.ask("two pods run", || {
        lab.hub.wait("two pods", PATIENCE, |hub| {
            let pods = [hub.pods(NAMESPACE, APP)?, hub.pods(NAMESPACE, "second")?].concat();
            ensure!(pods.iter().filter(|pod| pod.ready).count() == 2, "{pods:?}");
            Ok(Some(()))
        })
    })?;
    let restarts = |stage: &Stage<'_>| -> Result<u64> {
        let hub = &stage.lab.hub;
        let pods = [hub.pods(NAMESPACE, APP)?, hub.pods(NAMESPACE, "second")?].concat();
        Ok(pods.iter().map(|pod| pod.restarts).sum())
    };
    let before = restarts(stage)?;
    let begin = Instant::now();
    stage.mark(format!("watched for {} s", lab.inputs.hold.as_secs()));
    while begin.elapsed() < lab.inputs.hold {
        std::thread::sleep(Duration::from_secs(5));
    }
    stage.ask("the page is served", || hub::page(port))?;
    stage.check("no container was restarted", restarts(stage)? == before)?;
    stage.silent(&machine, "the kernel killed nothing", Want::Text("Out of memory"))?;
    stage.silent(&machine, "no memory cgroup was full", Want::Text("oom-kill"))?;
    fleet.remove("apps/second")?;
    fleet.push("without the second app")
}

const SECOND: &str = r#"apiVersion: apps/v1
kind: Deployment
metadata:
  name: second
spec:
  replicas: 1
  selector:
    matchLabels:
      app: second
  template:
    metadata:
      labels:
        app: second
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: sleeper
          image: skerry.local/busybox:1
          imagePullPolicy: IfNotPresent
          command: ["/bin/busybox", "sleep", "1000000"]
"#;
const SECOND_APP: &str = "apiVersion: fleet.skerry.dev/v1alpha1\nkind: App\nmetadata:\n  name: second\nspec:\n  \
    placement:\n    sites:\n      matchLabels:\n        size: large\n";
