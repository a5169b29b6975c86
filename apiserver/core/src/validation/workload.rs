//! Kinds that make pods, and those that watch over them.

use super::pod::check_template;
use super::{Errors, text};
use crate::selector::LabelSelector;
use crate::workloads::cron::Schedule;
use serde_json::Value;

/// Deployment, ReplicaSet, StatefulSet, DaemonSet.
pub(super) fn check(kind: &str, spec: &Value, old: Option<&Value>, errors: &mut Errors) {
    errors.not_negative(spec, "replicas", "spec");
    errors.not_negative(spec, "minReadySeconds", "spec");
    errors.not_negative(spec, "revisionHistoryLimit", "spec");
    check_selector(kind, spec, errors);
    check_template(&spec["template"], "spec.template", errors);
    let template = &spec["template"]["spec"];
    if template["restartPolicy"].is_string() {
        errors.one_of(template, "restartPolicy", "spec.template.spec", &["Always"]);
    }
    match kind {
        "Deployment" => {
            let strategy = &spec["strategy"];
            errors.one_of(strategy, "type", "spec.strategy", &["Recreate", "RollingUpdate"]);
            if strategy["type"] == "Recreate" && strategy["rollingUpdate"].is_object() {
                let detail = "may not be specified when strategy `type` is 'Recreate'";
                errors.forbidden("spec.strategy.rollingUpdate", detail);
            }
            let rolling = &strategy["rollingUpdate"];
            if is_zero(&rolling["maxUnavailable"]) && is_zero(&rolling["maxSurge"]) {
                let detail = "may not be 0 when `maxSurge` is 0";
                let field = "spec.strategy.rollingUpdate.maxUnavailable";
                errors.invalid(field, &rolling["maxUnavailable"], detail);
            }
        }
        "StatefulSet" | "DaemonSet" => {
            let types = ["OnDelete", "RollingUpdate"];
            errors.one_of(&spec["updateStrategy"], "type", "spec.updateStrategy", &types);
        }
        _ => {}
    }
    let Some(old) = old else { return };
    if old["selector"] != spec["selector"] {
        errors.immutable("spec.selector", &spec["selector"]);
    }
    if kind == "StatefulSet" {
        for field in ["serviceName", "podManagementPolicy", "volumeClaimTemplates"] {
            if old[field] != spec[field] {
                let detail = "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', \
                     'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and \
                     'minReadySeconds' are forbidden";
                errors.forbidden("spec", detail);
                return;
            }
        }
    }
}

fn check_selector(kind: &str, spec: &Value, errors: &mut Errors) {
    let selector = &spec["selector"];
    if !selector.is_object() {
        errors.required("spec.selector", "");
        return;
    }
    let parsed = match LabelSelector::from_object(selector) {
        Ok(parsed) => parsed,
        Err(problem) => {
            errors.invalid("spec.selector", selector, problem.to_string());
            return;
        }
    };
    if parsed.is_empty() {
        let detail = format!("empty selector is invalid for {}", kind.to_lowercase());
        errors.invalid("spec.selector", selector, detail);
        return;
    }
    let labels = &spec["template"]["metadata"]["labels"];
    if !parsed.matches(labels.as_object()) {
        let detail = "`selector` does not match template `labels`";
        errors.invalid("spec.template.metadata.labels", labels, detail);
    }
}

/// A Job's spec at `path`; a CronJob's template has no selector yet.
pub(super) fn check_job(spec: &Value, old: Option<&Value>, path: &str, errors: &mut Errors) {
    for field in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
    ] {
        errors.not_negative(spec, field, path);
    }
    errors.one_of(spec, "completionMode", path, &["NonIndexed", "Indexed"]);
    if spec["completionMode"] == "Indexed" && spec["completions"].is_null() {
        errors.required(&format!("{path}.completions"), "when completion mode is Indexed");
    }
    match old {
        None => {
            check_template(&spec["template"], &format!("{path}.template"), errors);
            let policy = &spec["template"]["spec"]["restartPolicy"];
            if !matches!(policy.as_str(), Some("OnFailure" | "Never")) {
                let field = format!("{path}.template.spec.restartPolicy");
                errors.required(&field, "valid values: \"OnFailure\", \"Never\"");
            }
        }
        Some(old) => {
            for field in ["selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex"]
            {
                if old[field] != spec[field] {
                    errors.immutable(&format!("{path}.{field}"), &spec[field]);
                }
            }
            // A suspended job may still be told where to run.
            if old["template"] != spec["template"] && old["suspend"] != true {
                errors.immutable(&format!("{path}.template"), &spec["template"]);
            }
            let elastic =
                spec["completionMode"] == "Indexed" && spec["completions"] == spec["parallelism"];
            if old["completions"] != spec["completions"] && !elastic {
                errors.immutable(&format!("{path}.completions"), &spec["completions"]);
            }
        }
    }
}

pub(super) fn check_cron_job(spec: &Value, errors: &mut Errors) {
    let schedule = &spec["schedule"];
    if text(schedule).is_empty() {
        errors.required("spec.schedule", "");
    } else if let Err(problem) = Schedule::parse(text(schedule)) {
        errors.invalid("spec.schedule", schedule, problem.to_string());
    }
    let policies = ["Allow", "Forbid", "Replace"];
    errors.one_of(spec, "concurrencyPolicy", "spec", &policies);
    errors.not_negative(spec, "startingDeadlineSeconds", "spec");
    errors.not_negative(spec, "successfulJobsHistoryLimit", "spec");
    errors.not_negative(spec, "failedJobsHistoryLimit", "spec");
    check_job(&spec["jobTemplate"]["spec"], None, "spec.jobTemplate.spec", errors);
}

pub(super) fn check_autoscaler(spec: &Value, errors: &mut Errors) {
    let target = &spec["scaleTargetRef"];
    errors.require(target, "kind", "spec.scaleTargetRef");
    errors.require(target, "name", "spec.scaleTargetRef");
    let (least, most) = (spec["minReplicas"].as_i64(), spec["maxReplicas"].as_i64().unwrap_or(0));
    if most < 1 {
        errors.invalid("spec.maxReplicas", &Value::from(most), "must be greater than 0");
    }
    if least.is_some_and(|least| least < 1) {
        errors.invalid(
            "spec.minReplicas",
            &spec["minReplicas"],
            "must be greater than or equal to 1",
        );
    }
    if least.is_some_and(|least| least > most) {
        let detail = "must be greater than or equal to `minReplicas`";
        errors.invalid("spec.maxReplicas", &Value::from(most), detail);
    }
}

pub(super) fn check_budget(spec: &Value, errors: &mut Errors) {
    if !spec["minAvailable"].is_null() && !spec["maxUnavailable"].is_null() {
        errors.invalid("spec", spec, "minAvailable and maxUnavailable cannot be both set");
    }
}

fn is_zero(value: &Value) -> bool {
    value.as_i64() == Some(0) || matches!(value.as_str(), Some("0" | "0%"))
}
