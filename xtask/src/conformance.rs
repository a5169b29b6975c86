//! The contract between the embedded API and kubectl: every verb that a fleet's people use, driven through a current
//! kubectl. The same suite runs against any cluster that a kubeconfig names, which says what is ours and what is
//! Kubernetes.

use crate::{build, fleet::Fleet, images, setup};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Cluster to check; without it, a fleet is started and stopped
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// kubectl to use; without it, a current one is fetched
    #[arg(long)]
    kubectl: Option<PathBuf>,
    /// Image of the test pods; it has `sh`, `sleep` and `httpd`
    #[arg(long, default_value = "skerry.local/busybox:1")]
    image: String,
    /// Cargo profile of the programs
    #[arg(long, default_value = "dev")]
    profile: String,
    /// `table` or `json` (one line last)
    #[arg(long, default_value = "table")]
    output: String,
}

impl Args {
    /// Against a fleet of our own, with programs of a profile.
    pub(crate) fn embedded(profile: &str) -> Self {
        Self {
            kubeconfig: None,
            kubectl: None,
            image: "skerry.local/busybox:1".into(),
            profile: profile.into(),
            output: "table".into(),
        }
    }
}

/// Runs the suite; exit code 1 when a step failed.
pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let kubectl = match &args.kubectl {
        Some(kubectl) => kubectl.clone(),
        None => {
            setup::run(true)?;
            setup::kubectl()?
        }
    };
    let home = build::target()?.join("conformance");
    let (failed, passed) = match &args.kubeconfig {
        Some(kubeconfig) => suite(&kubectl, kubeconfig, &home, &args.image)?,
        None => {
            let programs = build::programs(&args.profile)?;
            images::pack(&home.join("images"))?;
            let fleet = Fleet::start(&programs, &home)?;
            let outcome = suite(&kubectl, &fleet.kubeconfig()?, &home, &args.image);
            fleet.stop()?;
            outcome?
        }
    };
    if args.output == "json" {
        println!("{}", json!({"passed": passed, "failed": failed}));
    } else {
        println!("{passed} passed, {failed} failed");
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One call of kubectl and what it has to answer.
struct Step {
    args: Vec<String>,
    stdin: Option<String>,
    code: i32,
    /// Texts that standard output and error together have to hold.
    holds: Vec<String>,
}

fn step(line: &str) -> Step {
    // Words in single quotes stay together; nothing else of a shell is needed.
    let args = line
        .split('\'')
        .enumerate()
        .flat_map(|(index, part)| -> Vec<String> {
            if index % 2 == 1 {
                vec![part.into()]
            } else {
                part.split_whitespace().map(str::to_owned).collect()
            }
        })
        .collect();
    Step { args, stdin: None, code: 0, holds: Vec::new() }
}

impl Step {
    fn input(mut self, text: impl Into<String>) -> Self {
        self.stdin = Some(text.into());
        self
    }

    fn exits(mut self, code: i32) -> Self {
        self.code = code;
        self
    }

    fn says(mut self, text: &str) -> Self {
        self.holds.push(text.into());
        self
    }
}

fn suite(kubectl: &Path, kubeconfig: &Path, home: &Path, image: &str) -> Result<(usize, usize)> {
    std::fs::create_dir_all(home)?;
    let cache = home.join("kubectl");
    let namespace = format!("contract-{}", std::process::id());
    let call = |step: &Step| -> Result<(i32, String)> {
        let mut command = Command::new(kubectl);
        command.args(&step.args).arg("--kubeconfig").arg(kubeconfig);
        command.env("HOME", &cache).env("KUBECACHEDIR", &cache).env("KUBE_EDITOR", "true");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("could not start kubectl")?;
        let mut stdin = child.stdin.take().context("kubectl has no standard input")?;
        // kubectl may end before it has read everything; its exit code tells.
        let _ = stdin.write_all(step.stdin.clone().unwrap_or_default().as_bytes());
        drop(stdin);
        let done = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
        Ok((done.status.code().unwrap_or(-1), text.into_owned()))
    };
    let (mut failed, mut passed) = (0, 0);
    for step in steps(&namespace, image) {
        let name = step.args.join(" ");
        let (code, text) = call(&step)?;
        let missing = step.holds.iter().find(|part| !text.contains(*part));
        if code == step.code && missing.is_none() {
            passed += 1;
            eprintln!("ok    kubectl {name}");
            continue;
        }
        failed += 1;
        eprintln!("FAIL  kubectl {name}");
        eprintln!("      exit code {code}, expected {}", step.code);
        if let Some(part) = missing {
            eprintln!("      the output does not hold `{part}`");
        }
        text.lines().take(20).for_each(|line| eprintln!("      | {line}"));
    }
    let (code, text) = call(&step(&format!("delete namespace {namespace} --ignore-not-found")))?;
    if code != 0 {
        bail!("namespace {namespace} could not be deleted: {text}");
    }
    Ok((failed, passed))
}

/// The suite. Steps build on each other; a namespace of its own keeps them apart from everything else.
fn steps(ns: &str, image: &str) -> Vec<Step> {
    let n = |line: &str| step(&format!("{line} -n {ns}"));
    let config = |value: &str| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "conf"},
               "data": {"color": value, "size": "10"}})
        .to_string()
    };
    let owner = |manager: &str, data: Value| {
        n(&format!("apply --server-side --field-manager {manager} -f -")).input(
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "shared"},
                   "data": data})
            .to_string(),
        )
    };
    let web = |replicas: u32, text: &str| {
        json!({"apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "web", "labels": {"app": "web"}},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web"}},
                    "spec": {"terminationGracePeriodSeconds": 2, "containers": [{
                        "name": "web", "image": image, "ports": [{"containerPort": 8080}],
                        "command": ["sh", "-c", format!("echo hello {text}; exec sleep 100000")]}]}}}})
        .to_string()
    };
    let crd = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("boats.{ns}.example.dev")},
        "spec": {"group": format!("{ns}.example.dev"), "scope": "Namespaced",
            "names": {"plural": "boats", "singular": "boat", "kind": "Boat", "shortNames": ["bt"]},
            "versions": [{"name": "v1", "served": true, "storage": true,
                "subresources": {"status": {}},
                "additionalPrinterColumns": [
                    {"name": "Length", "type": "integer", "jsonPath": ".spec.length"}],
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                    "spec": {"type": "object", "required": ["length"], "properties": {
                        "length": {"type": "integer", "minimum": 1},
                        "flag": {"type": "string", "default": "pt"}}},
                    "status": {"type": "object", "properties": {
                        "afloat": {"type": "boolean"}}}}}}}]}})
    .to_string();
    let boat = |name: &str, length: Value| {
        json!({"apiVersion": format!("{ns}.example.dev/v1"), "kind": "Boat",
               "metadata": {"name": name}, "spec": {"length": length}})
        .to_string()
    };
    let job = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once"},
        "spec": {"backoffLimit": 1, "template": {"spec": {"restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "c", "image": image, "command": ["sh", "-c", "echo done once"]}]}}}})
    .to_string();
    let daemon = json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "every"},
        "spec": {"selector": {"matchLabels": {"app": "every"}}, "template": {
            "metadata": {"labels": {"app": "every"}},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": image,
                "command": ["sleep", "100000"]}]}}}})
    .to_string();

    vec![
        step("version -o json").says("serverVersion"),
        step("api-resources").says("deployments").says("deploy").says("NAMESPACED"),
        step("api-versions").says("apps/v1"),
        step("get --raw /readyz").says("ok"),
        step("explain deployment.spec.strategy").says("rollingUpdate"),
        step("explain pod.spec.containers --recursive").says("imagePullPolicy"),
        step(&format!("create namespace {ns}")).says("created"),
        step(&format!("create namespace {ns}")).exits(1).says("already exists"),
        step(&format!("get namespace {ns}")).says("Active"),
        step("get nodes").says("Ready").says("STATUS"),
        step("get nodes -o wide").says("CONTAINER-RUNTIME").says("containerd://"),
        step("describe nodes").says("Allocatable").says("EdgeReady"),
        n("get serviceaccount default").says("default"),
        // ConfigMaps: client-side apply, diff, patches, conflicts of server-side apply.
        n("apply -f -").input(config("red")).says("configmap/conf created"),
        n("apply -f -").input(config("red")).says("configmap/conf unchanged"),
        n("diff -f -").input(config("blue")).exits(1).says("blue"),
        n("diff -f -").input(config("red")),
        n("apply -f -").input(config("blue")).says("configmap/conf configured"),
        n("get configmap conf -o jsonpath={.data.color}").says("blue"),
        n(r#"patch configmap conf -p '{"data":{"size":"11"}}'"#).says("patched"),
        n(r#"patch configmap conf --type merge -p '{"data":{"extra":"1"}}'"#).says("patched"),
        n(r#"patch configmap conf --type json -p '[{"op":"remove","path":"/data/extra"}]'"#)
            .says("patched"),
        n(r#"patch configmap conf --type json -p '[{"op":"test","path":"/data/color","value":"x"}]'"#)
            .exits(1),
        n("label configmap conf tier=front").says("labeled"),
        n("label configmap conf tier=back").exits(1).says("--overwrite"),
        n("annotate configmap conf note=hello").says("annotated"),
        n("get configmaps -l tier=front").says("conf"),
        n("get configmaps -l tier=other").says("No resources found"),
        n("get configmaps --field-selector metadata.name=conf").says("conf"),
        n("describe configmap conf").says("blue"),
        owner("one", json!({"a": "1", "b": "1"})).says("serverside-applied"),
        owner("two", json!({"b": "2"})).exits(1).says("conflict with \"one\""),
        n("apply --server-side --force-conflicts --field-manager two -f -")
            .input(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "shared"},
                          "data": {"b": "2"}}).to_string())
            .says("serverside-applied"),
        owner("one", json!({"a": "1"})).says("serverside-applied"),
        n("get configmap shared -o jsonpath={.data}").says(r#"{"a":"1","b":"2"}"#),
        owner("one", json!({})).says("serverside-applied"),
        n("get configmap shared -o jsonpath={.data}").says(r#"{"b":"2"}"#),
        n("diff --server-side --field-manager two -f -")
            .input(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "shared"},
                          "data": {"b": "3"}}).to_string())
            .exits(1),
        n("create configmap typed --from-literal=k=v").says("created"),
        n("create secret generic pw --from-literal=word=s3cret").says("created"),
        n("get secret pw -o jsonpath={.data.word}").says("czNjcmV0"),
        n("describe secret pw").says("word"),
        n("create serviceaccount robot").says("created"),
        n("apply -f -")
            .input(r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"odd"},"dat":{}}"#)
            .exits(1)
            .says("unknown field"),
        n("apply -f -")
            .input(r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"Bad_Name"}}"#)
            .exits(1)
            .says("RFC 1123"),
        // A Deployment, its ReplicaSet and pods on a real node.
        n("apply -f -").input(web(1, "one")).says("deployment.apps/web created"),
        n("rollout status deployment/web --timeout=90s").says("successfully rolled out"),
        n("wait --for=condition=Available deployment/web --timeout=60s").says("condition met"),
        n("get deployment web").says("1/1").says("UP-TO-DATE"),
        n("get deployment web -o wide").says("SELECTOR"),
        n("get replicasets").says("DESIRED"),
        n("get pods -l app=web").says("Running").says("1/1"),
        n("get pods -o wide").says("NOMINATED NODE"),
        n("describe pods -l app=web").says("Events").says("Started"),
        n("logs deployment/web").says("hello one"),
        n("logs -l app=web --tail=1").says("hello one"),
        n("scale deployment web --replicas=2").says("scaled"),
        n("rollout status deployment/web --timeout=90s").says("successfully rolled out"),
        n("get deployment web").says("2/2"),
        n("apply -f -").input(web(2, "two")).says("configured"),
        n("rollout status deployment/web --timeout=120s").says("successfully rolled out"),
        n("rollout history deployment/web").says("REVISION"),
        n("rollout undo deployment/web").says("rolled back"),
        n("rollout status deployment/web --timeout=120s").says("successfully rolled out"),
        n("rollout restart deployment/web").says("restarted"),
        n("rollout status deployment/web --timeout=120s").says("successfully rolled out"),
        n("get events").says("Started"),
        n("expose deployment web --port=80 --target-port=8080").says("exposed"),
        n("get service web").says("ClusterIP"),
        n("describe service web").says("TargetPort"),
        n("apply -f -").input(web(2, "ssa").replace("\"web\"", "\"ssa\"")).says("created"),
        n("apply --server-side --force-conflicts -f -")
            .input(web(1, "ssa").replace("\"web\"", "\"ssa\""))
            .says("serverside-applied"),
        n("delete deployment ssa --timeout=60s").says("deleted"),
        // Jobs, DaemonSets, leases.
        n("apply -f -").input(job).says("job.batch/once created"),
        n("wait --for=condition=Complete job/once --timeout=90s").says("condition met"),
        n("logs job/once").says("done once"),
        n("get jobs").says("COMPLETIONS").says("1/1"),
        n("apply -f -").input(daemon).says("daemonset.apps/every created"),
        n("rollout status daemonset/every --timeout=90s").says("successfully rolled out"),
        n("get daemonsets").says("NODE SELECTOR"),
        step("get leases -n kube-node-lease").says("HOLDER"),
        // CRDs and custom resources.
        step("apply -f -").input(crd).says("created"),
        step(&format!("wait --for=condition=Established crd/boats.{ns}.example.dev --timeout=30s"))
            .says("condition met"),
        step("get crds").says("CREATED AT"),
        n("apply -f -").input(boat("skiff", json!(4))).says("created"),
        n("apply -f -").input(boat("raft", json!("long"))).exits(1).says("spec.length"),
        n("apply -f -").input(boat("raft", json!(0))).exits(1).says("greater than or equal to 1"),
        n("get bt").says("LENGTH").says("4"),
        n("get boat skiff -o jsonpath={.spec.flag}").says("pt"),
        n(r#"patch boat skiff --type merge --subresource status -p '{"status":{"afloat":true}}'"#)
            .says("patched"),
        n("get boat skiff -o jsonpath={.status.afloat}").says("true"),
        step("explain boat.spec").says("length"),
        n("delete boat skiff").says("deleted"),
        step(&format!("delete crd boats.{ns}.example.dev --timeout=30s")).says("deleted"),
        // Deletion.
        n("delete pods -l app=every --timeout=60s").says("deleted"),
        n("delete deployment web --timeout=60s").says("deleted"),
        n("wait --for=delete pod -l app=web --timeout=60s"),
        n("get deployment web").exits(1).says("NotFound"),
        n("delete configmap,secret --all").says("deleted"),
        step("auth can-i delete pods").says("yes"),
        step(&format!("delete namespace {ns} --timeout=90s")).says("deleted"),
        step(&format!("get namespace {ns}")).exits(1).says("not found"),
    ]
}
