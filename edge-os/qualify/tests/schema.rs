//! The published schema of a report (schema/report.json) and real reports: of this machine, and of every kernel that is kept.

use serde_json::{Value, json};
use skerry_apiserver_core::schema::{Node, Schemas};
use skerry_apiserver_core::structural::{compile, unknown_fields, validate};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

fn node() -> Node {
    let text = include_str!("../schema/report.json");
    let mut schema: Value = serde_json::from_str(text).expect("JSON");
    // What only tells tools which dialect this is.
    let fields = schema.as_object_mut().expect("an object");
    fields.remove("$schema");
    // The compiler wants the root of a Kubernetes object; a report is a field of it here.
    let root = json!({"type": "object", "properties": {"file": schema}});
    match compile(&root) {
        Ok(schema) => Node::Inline(Arc::new(schema)),
        Err(errors) => panic!("the schema is none: {errors:?}"),
    }
}

/// What is wrong with a report, as text.
fn faults(node: &Node, report: &Value) -> Vec<String> {
    let object = json!({ "file": report });
    let errors = validate(&object, node, &Schemas::default());
    let unknown = unknown_fields(&object, node, &Schemas::default());
    let errors = errors.into_iter().map(|error| format!("{}: {}", error.field, error.message));
    errors.chain(unknown.into_iter().map(|field| format!("{field}: not in the schema"))).collect()
}

fn report(args: &[&str]) -> Value {
    let program = env!("CARGO_BIN_EXE_skerry-qualify");
    let out = Command::new(program).args(args).args(["--output", "json"]).output().expect("starts");
    serde_json::from_slice(&out.stdout).expect("a report")
}

#[test]
fn real_reports_follow_the_schema() {
    let node = node();
    let none: Vec<String> = Vec::new();
    assert_eq!(faults(&node, &report(&["--autoload", "none"])), none, "this machine");
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernels"));
    for entry in std::fs::read_dir(folder).expect("folder") {
        let path = entry.expect("entry").path();
        if path.extension().is_some_and(|ending| ending == "gz") {
            let file = report(&["--config", &path.display().to_string()]);
            assert_eq!(faults(&node, &file), none, "{}", path.display());
        }
    }
}

#[test]
fn what_is_no_report_does_not() {
    let node = node();
    let good = report(&["--autoload", "none"]);
    let wrong = |change: &dyn Fn(&mut Value)| {
        let mut file = good.clone();
        change(&mut file);
        assert!(!faults(&node, &file).is_empty(), "{}", file["report"]["kind"]);
    };
    wrong(&|file| file["report"]["kind"] = "Pod".into());
    wrong(&|file| file["digest"] = "sha256:1".into());
    wrong(&|file| file["report"]["facts"] = json!({}));
    wrong(&|file| file["report"]["facts"]["base.epoll"]["state"] = "fine".into());
    wrong(&|file| file["report"]["profiles"][0]["verdict"] = "good".into());
    wrong(&|file| file["report"]["more"] = 1.into());
    wrong(&|file| file["signature"] = json!({"algorithm": "none"}));
}
