//! Node jobs, edge half: what is asked, what may be done, and how it is reported.
//!
//! [`Order::read`] takes a message of the cloud in either version of the jobs; the shell (`edge-os/src/jobs.rs`) does
//! the work, and [`Order::report`] says in the words of that version how an action went. Reports go through the durable
//! outbox: a job that ended while the link was down is told when it is back, which KubeEdge's edge forgets.
//!
//! Images are fetched and the configuration is changed. New versions of the edge are refused: the appliance gets them
//! with its system (`OsRelease`), other nodes from their packages.
//!
//! No I/O.
//!
//! Source: kubeedge/kubeedge, edge/pkg/taskmanager, common/types/types.go; `skerry_protocol::job`.

use serde_json::{Value, json};
use skerry_protocol::bus::{self, CallResult};
use skerry_protocol::job::{self, ActionReport, ImageStatus, Kind, TaskReport, TaskRequest};
use skerry_protocol::{Message, Operation};
use std::collections::BTreeMap;

/// Images of one job at most.
pub const IMAGES_MAX: usize = 256;
/// Times that a failed image is tried again at most, whatever the job says.
pub const RETRIES_MAX: u32 = 10;
/// Changed fields of one job at most.
pub const FIELDS_MAX: usize = 256;
/// Share of a resource in use over which a check fails, in percent, as in KubeEdge.
pub const USAGE_MAX: f64 = 80.0;

const NO_UPGRADES: &str = "this edge is not upgraded by node jobs: the appliance gets new versions with its system \
     (OsRelease), other nodes from their packages";
const NO_EVENT_BUS: &str = "this edge has no event bus yet; nothing was published or followed";
const NO_SERVICE_BUS: &str = "this edge has no service bus yet; nothing was called";

/// What the cloud wants of this node.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    /// What kind of job.
    pub kind: Kind,
    /// Its name.
    pub job: String,
    /// What is to be done.
    pub work: Work,
    is_older: bool,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// Check, then fetch images.
    Images(Images),
    /// Only the check, as a stage of an older task.
    Check(Vec<String>),
    /// Nothing: the first stage of an older task asks whether the node is there.
    Begin,
    /// Change these fields of the configuration.
    Configure(BTreeMap<String, String>),
    /// What this edge does not do; the action to report, and why.
    Refuse(Operation, String),
}

/// Images to fetch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Images {
    /// Their names.
    pub names: Vec<String>,
    /// What has to have room: `cpu`, `mem`, `disk`; empty for no check.
    pub checks: Vec<String>,
    /// Namespace and name of a pull secret.
    pub secret: Option<(String, String)>,
    /// How often a failed one is tried again.
    pub retries: u32,
}

/// A report, for the outbox.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// A later report with the same key replaces an earlier one that was not sent.
    pub key: String,
    /// `route.operation`.
    pub operation: Operation,
    /// `route.resource`.
    pub resource: String,
    /// The content.
    pub content: Value,
}

impl Order {
    /// Reads a message of the groups of node jobs.
    ///
    /// # Errors
    ///
    /// A text, when it is none for this node.
    pub fn read(message: &Message, node: &str) -> Result<Self, String> {
        let resource = &message.route.resource;
        if let Some((kind, job, of)) = job::parse_path(resource) {
            own(of, node)?;
            let spec: Value = message.content_as().map_err(|error| error.to_string())?;
            let work = current(kind, &spec);
            return Ok(Self { kind, job: job.into(), work, is_older: false });
        }
        let (kind, job, of) = job::parse_stage_path(resource)
            .ok_or_else(|| format!("`{resource}` is no path of a node job"))?;
        own(of, node)?;
        let request: TaskRequest = message.content_as().map_err(|error| error.to_string())?;
        Ok(Self { kind, job: job.into(), work: older(kind, &request), is_older: true })
    }

    /// Says how `action` went. `at` is RFC 3339.
    pub fn report(
        &self,
        node: &str,
        action: Operation,
        went: &Result<(), String>,
        images: &[ImageStatus],
        at: &str,
    ) -> Report {
        let reason = went.as_ref().err().cloned().unwrap_or_default();
        let succ = went.is_ok();
        let key = format!("job/{}/{}/{}", self.kind.token(), self.job, action.as_str());
        if !self.is_older {
            let extend = match action {
                Operation::JobPull => json!(images).to_string(),
                _ => String::new(),
            };
            let action = action.as_str().to_owned();
            let report = ActionReport { action, succ, finish_time: at.into(), reason, extend };
            let resource = job::path(self.kind, &self.job, node);
            let operation = Operation::UpdateNodeActionStatus;
            return Report { key, operation, resource, content: json!(report) };
        }
        let event = match (&self.work, action) {
            (Work::Begin | Work::Refuse(..), _) => "Init",
            (_, Operation::JobPull) => "Pull",
            _ => "Check",
        };
        let older = |image: &ImageStatus| {
            let state = if image.status == "True" { "Successful" } else { "Failed" };
            let mut value = json!({"image": image.image, "state": state});
            if !image.reason.is_empty() {
                value["reason"] = image.reason.as_str().into();
            }
            value
        };
        let report = TaskReport {
            node_name: node.into(),
            event: event.into(),
            action: if succ { "Success" } else { "Failure" }.into(),
            reason,
            external_message: match images.is_empty() {
                true => String::new(),
                false => Value::from(images.iter().map(older).collect::<Vec<_>>()).to_string(),
            },
            ..TaskReport::default()
        };
        Report {
            key: format!("{key}/{event}"),
            operation: self.kind.task().unwrap_or(Operation::Upgrade),
            resource: format!("task/{}/node/{node}", self.job),
            content: json!(report),
        }
    }

    /// The order of a change of the configuration that was taken before this process, for its last reports.
    pub fn configured(job: &str) -> Self {
        let work = Work::Configure(BTreeMap::new());
        Self { kind: Kind::ConfigUpdate, job: job.into(), work, is_older: false }
    }

    /// Whether it came in the older version, where each stage is an order of its own.
    pub fn is_older(&self) -> bool {
        self.is_older
    }
}

/// The answer to a message for the buses of this edge, which it does not have.
pub fn refuse_data(now_ms: i64, message: &Message) -> Message {
    let route = &message.route;
    if route.source != bus::SERVICE_ROUTER {
        return message.error(now_ms, bus::EVENT_BUS, bus::GROUP, NO_EVENT_BUS);
    }
    match message.operation().is_some_and(bus::is_method) {
        // Somebody in the cloud waits for an answer of HTTP.
        true => {
            let body = NO_SERVICE_BUS.as_bytes().to_vec();
            let result = CallResult { status_code: 501, body, ..CallResult::default() };
            bus::result(now_ms, message, &result)
        }
        false => message.error(now_ms, bus::SERVICE_BUS, bus::GROUP, NO_SERVICE_BUS),
    }
}

/// Says whether what a job wants checked has room. `usage` gives the share in use, in percent.
///
/// # Errors
///
/// A text that names the first that has not, or is not known.
pub fn check(items: &[String], usage: impl Fn(&str) -> Option<f64>) -> Result<(), String> {
    for item in items {
        if !["cpu", "mem", "disk"].contains(&item.as_str()) {
            return Err(format!("there is no check `{item}`"));
        }
        let share = usage(item).ok_or_else(|| format!("the use of `{item}` is not known"))?;
        if share > USAGE_MAX {
            return Err(format!("{share:.2} % of `{item}` are in use, more than {USAGE_MAX} %"));
        }
    }
    Ok(())
}

/// Sets fields of a configuration by their paths: keys joined with dots, `[n]` for an entry of a list. A value keeps
/// the type that the field has; of a new field it is a number, boolean or list when it looks like one.
///
/// # Errors
///
/// A text that names the field that cannot be set.
pub fn set_fields(config: &mut Value, fields: &BTreeMap<String, String>) -> Result<(), String> {
    for (path, text) in fields {
        set_field(config, path, text).map_err(|error| format!("`{path}`: {error}"))?;
    }
    Ok(())
}

fn set_field(config: &mut Value, path: &str, text: &str) -> Result<(), &'static str> {
    let mut at = config;
    for segment in path.split('.') {
        let (key, mut rest) =
            segment.split_once('[').map_or((segment, ""), |(key, rest)| (key, rest));
        if key.is_empty() {
            return Err("the path has an empty key");
        }
        if at.is_null() {
            *at = json!({});
        }
        at = at
            .as_object_mut()
            .ok_or("a field on the way is no map")?
            .entry(key)
            .or_insert(Value::Null);
        while !rest.is_empty() {
            let (index, more) = rest.split_once(']').ok_or("a `[` is not closed")?;
            let index: usize = index.parse().map_err(|_| "what is in `[]` is no number")?;
            let list = at.as_array_mut().ok_or("a field on the way is no list")?;
            let len = list.len();
            if index > len {
                return Err("the list is shorter");
            }
            if index == len {
                list.push(Value::Null);
            }
            at = &mut list[index];
            rest = more.strip_prefix('[').unwrap_or(more);
            if !rest.is_empty() && !more.starts_with('[') {
                return Err("something follows `]`");
            }
        }
    }
    *at = match at {
        Value::String(_) => text.into(),
        Value::Object(_) => return Err("it is a map; set its fields"),
        _ => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
    };
    Ok(())
}

fn own(of: &str, node: &str) -> Result<(), String> {
    match of == node {
        true => Ok(()),
        false => Err(format!("the job is for node `{of}`")),
    }
}

fn current(kind: Kind, spec: &Value) -> Work {
    match kind {
        Kind::NodeUpgrade => Work::Refuse(Operation::JobCheck, NO_UPGRADES.into()),
        Kind::ImagePrePull => {
            let template = &spec["imagePrePullTemplate"];
            images(
                &template["images"],
                &template["checkItems"],
                &template["imageSecrets"],
                &template["retryTimes"],
            )
            .unwrap_or_else(|reason| Work::Refuse(Operation::JobCheck, reason))
        }
        Kind::ConfigUpdate => {
            let fields: BTreeMap<String, String> = spec["updateFields"]
                .as_object()
                .into_iter()
                .flatten()
                .filter_map(|(path, text)| Some((path.clone(), text.as_str()?.to_owned())))
                .collect();
            match fields.len() {
                0 => Work::Refuse(Operation::JobCheck, "`updateFields` is empty".into()),
                1..=FIELDS_MAX => Work::Configure(fields),
                _ => Work::Refuse(
                    Operation::JobCheck,
                    format!("there are more than {FIELDS_MAX} fields"),
                ),
            }
        }
    }
}

fn older(kind: Kind, request: &TaskRequest) -> Work {
    let item = &request.item;
    match (kind, request.state.as_str()) {
        (Kind::ImagePrePull, "" | "Init") => Work::Begin,
        (Kind::ImagePrePull, "Checking") => Work::Check(texts(&item["CheckItem"])),
        (Kind::ImagePrePull, "Pulling") => {
            // Checked in a stage of its own.
            images(&item["Images"], &Value::Null, &item["Secret"], &item["RetryTimes"])
                .unwrap_or_else(|reason| Work::Refuse(Operation::JobPull, reason))
        }
        (Kind::ImagePrePull, state) => {
            Work::Refuse(Operation::JobCheck, format!("there is no stage `{state}`"))
        }
        _ => Work::Refuse(Operation::JobCheck, NO_UPGRADES.into()),
    }
}

fn images(names: &Value, checks: &Value, secret: &Value, retries: &Value) -> Result<Work, String> {
    let names = texts(names);
    if names.len() > IMAGES_MAX {
        return Err(format!("there are more than {IMAGES_MAX} images"));
    }
    let secret = match secret.as_str().unwrap_or_default() {
        "" => None,
        text => {
            let parts = text.split_once('/').filter(|(namespace, name)| {
                !namespace.is_empty() && !name.is_empty() && !name.contains('/')
            });
            let bad = || format!("`{text}` is no secret of the form `namespace/name`");
            let (namespace, name) = parts.ok_or_else(bad)?;
            Some((namespace.to_owned(), name.to_owned()))
        }
    };
    let retries = retries.as_u64().and_then(|times| u32::try_from(times).ok()).unwrap_or(0);
    let retries = retries.min(RETRIES_MAX);
    Ok(Work::Images(Images { names, checks: texts(checks), secret, retries }))
}

fn texts(list: &Value) -> Vec<String> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: &str = "2026-01-01T00:00:00Z";

    fn read(message: &Message) -> Order {
        Order::read(message, "edge1").expect("an order")
    }

    #[test]
    fn a_pre_pull_of_the_newer_version_is_read_and_reported() {
        let spec = json!({"imagePrePullTemplate": {"images": ["a:1", "b:2"], "checkItems": ["disk"],
            "imageSecrets": "ns/s", "retryTimes": 99}});
        let order = read(&job::order(5, Kind::ImagePrePull, "j", "edge1", &spec));
        let Work::Images(images) = &order.work else { panic!("{order:?}") };
        assert_eq!(images.names, ["a:1", "b:2"]);
        assert_eq!(images.secret, Some(("ns".into(), "s".into())));
        assert_eq!(
            (images.checks.as_slice(), images.retries),
            (&["disk".to_owned()][..], RETRIES_MAX)
        );
        let images =
            [ImageStatus { image: "a:1".into(), status: "True".into(), reason: String::new() }];
        let report = order.report("edge1", Operation::JobPull, &Ok(()), &images, AT);
        assert_eq!(report.operation, Operation::UpdateNodeActionStatus);
        assert_eq!(report.resource, "operations.kubeedge.io/v1alpha2/imageprepulljob/j/node/edge1");
        assert_eq!(
            report.content,
            json!({"action": "Pull", "succ": true, "finishTime": AT, "reason": "",
                "extend": r#"[{"image":"a:1","status":"True"}]"#})
        );
    }

    #[test]
    fn an_older_pre_pull_is_done_stage_by_stage() {
        let stage = |state: &str, item: Value| {
            read(&job::stage(5, Kind::ImagePrePull, "j", "edge1", state, item).expect("a task"))
        };
        let done = |order: &Order, action| order.report("edge1", action, &Ok(()), &[], AT).content;
        let begin = stage("", json!({"Images": ["a"]}));
        assert_eq!(begin.work, Work::Begin);
        assert_eq!(done(&begin, Operation::JobCheck)["Event"], "Init");
        let check = stage("Checking", json!({"CheckItem": null}));
        assert_eq!(check.work, Work::Check(Vec::new()));
        assert_eq!(done(&check, Operation::JobCheck)["Event"], "Check");
        let pull = stage(
            "Pulling",
            json!({"Images": ["a"], "RetryTimes": 1, "Secret": "", "CheckItems": ["x"]}),
        );
        let images =
            [ImageStatus { image: "a".into(), status: "False".into(), reason: "r".into() }];
        let report = pull.report("edge1", Operation::JobPull, &Err("no".into()), &images, AT);
        assert_eq!(
            (report.operation, report.resource.as_str()),
            (Operation::Prepull, "task/j/node/edge1")
        );
        assert_eq!(
            report.content,
            json!({"NodeName": "edge1", "State": "", "Event": "Pull", "Action": "Failure", "Reason": "no", "Time": "",
                "ExternalMessage": r#"[{"image":"a","reason":"r","state":"Failed"}]"#})
        );
    }

    #[test]
    fn upgrades_are_refused_in_the_words_of_their_version() {
        let order =
            read(&job::order(5, Kind::NodeUpgrade, "up", "edge1", &json!({"version": "v1.23.0"})));
        let Work::Refuse(action, reason) = &order.work else { panic!("{order:?}") };
        let report = order.report("edge1", *action, &Err(reason.clone()), &[], AT);
        assert_eq!(
            (&report.content["action"], &report.content["succ"]),
            (&json!("Check"), &json!(false))
        );
        assert!(
            report.content["reason"].as_str().is_some_and(|reason| reason.contains("OsRelease"))
        );
        let order = read(
            &job::stage(5, Kind::NodeUpgrade, "up", "edge1", "Init", json!({})).expect("a task"),
        );
        let Work::Refuse(action, reason) = &order.work else { panic!("{order:?}") };
        let report = order.report("edge1", *action, &Err(reason.clone()), &[], AT);
        assert_eq!(report.operation, Operation::Upgrade);
        assert_eq!(
            (&report.content["Event"], &report.content["Action"]),
            (&json!("Init"), &json!("Failure"))
        );
    }

    #[test]
    fn what_is_no_order_for_this_node_is_told_from_one() {
        let foreign = job::order(5, Kind::ImagePrePull, "j", "edge2", &json!({}));
        assert!(Order::read(&foreign, "edge1").is_err_and(|error| error.contains("edge2")));
        let mut message = job::order(5, Kind::ImagePrePull, "j", "edge1", &json!({}));
        message.route.resource = "operations.kubeedge.io/v1alpha2/x".into();
        assert!(Order::read(&message, "edge1").is_err());
        for spec in [
            json!({"imagePrePullTemplate": {"images": vec!["a"; IMAGES_MAX + 1]}}),
            json!({"imagePrePullTemplate": {"imageSecrets": "s"}}),
        ] {
            let order = read(&job::order(5, Kind::ImagePrePull, "j", "edge1", &spec));
            assert!(matches!(order.work, Work::Refuse(Operation::JobCheck, _)), "{order:?}");
        }
        let order =
            read(&job::order(5, Kind::ConfigUpdate, "c", "edge1", &json!({"updateFields": {}})));
        assert!(matches!(order.work, Work::Refuse(..)));
    }

    #[test]
    fn checks_name_what_has_no_room() {
        let usage = |item: &str| Some(if item == "disk" { 90.0 } else { 10.0 });
        assert_eq!(check(&["cpu".into(), "mem".into()], usage), Ok(()));
        assert!(
            check(&["mem".into(), "disk".into()], usage)
                .is_err_and(|why| why.contains("90.00 % of `disk`"))
        );
        assert!(check(&["fan".into()], usage).is_err_and(|why| why.contains("no check")));
        assert!(check(&["cpu".into()], |_| None).is_err());
    }

    #[test]
    fn fields_keep_their_type() {
        let mut config = json!({"beat": 25, "labels": {"zone": "7"}, "hub": ["a", "b"]});
        let fields = [
            ("beat", "30"),
            ("labels.zone", "8"),
            ("labels.floor", "2"),
            ("hub[1]", "c"),
            ("new.deep", "true"),
            ("x", "text"),
        ];
        let fields =
            fields.into_iter().map(|(path, text)| (path.to_owned(), text.to_owned())).collect();
        set_fields(&mut config, &fields).expect("set");
        assert_eq!(
            config,
            json!({"beat": 30, "labels": {"zone": "8", "floor": 2}, "hub": ["a", "c"], "new": {"deep": true}, "x": "text"})
        );
        for path in ["", "labels", "beat.x", "hub[9]", "hub[x]", "hub[0", "hub[0]x", "labels..a"] {
            let fields = BTreeMap::from([(path.to_owned(), "1".to_owned())]);
            assert!(set_fields(&mut config.clone(), &fields).is_err(), "{path}");
        }
    }

    #[test]
    fn data_for_buses_that_are_not_there_is_answered() {
        let answer = refuse_data(6, &bus::publish(5, "t", "x"));
        assert_eq!(
            (answer.route.operation.as_str(), answer.route.source.as_str()),
            ("error", "bus")
        );
        let call = bus::Call { method: "GET".into(), ..bus::Call::default() };
        let call = bus::call(5, "80", "/", &call).expect("a call");
        let answer = refuse_data(6, &call);
        assert_eq!(answer.header.parent_msg_id, call.header.msg_id);
        assert_eq!(
            (answer.route.operation.as_str(), answer.route.source.as_str()),
            ("upload", "servicebus")
        );
        let result: CallResult = answer.content_as().expect("a result");
        assert_eq!(result.status_code, 501);
        let answer = refuse_data(6, &bus::serve(5, "u", true));
        assert_eq!(
            (answer.route.operation.as_str(), answer.route.source.as_str()),
            ("error", "servicebus")
        );
    }
}
