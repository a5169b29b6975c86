use super::*;
use serde_json::json;

fn order(version: &str, policy: serde_json::Value) -> OsOrder {
    let digest = format!("sha256:{:0>64}", version.len() + usize::from(version.as_bytes()[0]));
    serde_json::from_value(json!({"channel": "stable", "version": version, "counter": 2,
        "digest": digest, "policy": policy}))
    .expect("an order")
}

fn digest(version: &str) -> String {
    order(version, json!({})).digest.hex().to_owned()
}

/// A machine that runs version 1.
fn machine() -> Machine {
    let releases = Releases { running: "1".into(), counter: 1, ..Releases::default() };
    Machine { releases, ..Machine::default() }
}

fn at_step(step: &str) -> Machine {
    let update =
        MachineUpdate { version: "2".into(), step: step.into(), ..MachineUpdate::default() };
    Machine { update: Some(update), ..machine() }
}

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// An agent with an order for version 2 that has everything of it.
fn complete(policy: serde_json::Value) -> (OsUpdate, Vec<Output>) {
    let mut os = OsUpdate::default();
    assert_eq!(os.handle(Input::Machine(machine()), s(0)), []);
    let order = order("2", policy);
    let fetch = Output::Fetch(Box::new(order.clone()));
    assert_eq!(os.handle(Input::Order(Some(order)), s(1)), [fetch]);
    let outputs = os.handle(Input::Complete { digest: digest("2") }, s(2));
    (os, outputs)
}

#[test]
fn a_version_is_fetched_installed_started_and_then_the_current_one() {
    let (mut os, outputs) = complete(json!({}));
    assert_eq!(outputs, [Output::Install(digest("2"))]);
    assert_eq!(os.progress().step, OsStep::Installing);
    // What is under way is not asked for again.
    assert_eq!(os.handle(Input::Tick, s(3)), []);
    assert_eq!(os.handle(Input::Machine(at_step("writing")), s(4)), []);
    assert_eq!(os.progress().step, OsStep::Installing);
    let outputs = os.handle(Input::Machine(at_step("committed")), s(5));
    assert_eq!(outputs, [Output::Restart("2".into())]);
    assert_eq!(os.handle(Input::Tick, s(6)), []);

    // After the restart nothing is known but the order and what PID 1 says.
    let mut os = OsUpdate::default();
    let trial = Trial { version: "2".into(), ..Trial::default() };
    let mut new = Machine { trial: Some(trial), ..machine() };
    new.releases.running = "2".into();
    assert_eq!(os.handle(Input::Order(Some(order("2", json!({})))), s(0)), []);
    assert_eq!(os.handle(Input::Machine(new.clone()), s(1)), []);
    assert_eq!(os.progress().step, OsStep::Trial);
    new.trial = None;
    assert_eq!(os.handle(Input::Machine(new), s(60)), []);
    assert_eq!((os.progress().step, os.progress().version.as_str()), (OsStep::Current, "2"));
}

#[test]
fn a_version_that_was_given_up_is_not_tried_again_and_its_reason_is_told() {
    let mut os = OsUpdate::default();
    let mut machine = machine();
    let bad =
        Bad { version: "2".into(), digest: digest("2"), reason: "containerd did not start".into() };
    machine.releases.bad.push(bad);
    os.handle(Input::Machine(machine), s(0));
    assert_eq!(os.handle(Input::Order(Some(order("2", json!({})))), s(1)), []);
    assert_eq!(os.progress().step, OsStep::Failed);
    assert!(os.progress().reason.contains("containerd did not start"));
    // Another version is.
    let outputs = os.handle(Input::Order(Some(order("3", json!({})))), s(2));
    assert!(matches!(&outputs[..], [Output::Fetch(order)] if order.version == "3"), "{outputs:?}");
}

#[test]
fn outside_of_its_window_a_machine_fetches_and_neither_installs_nor_restarts() {
    let night = json!({"windows": [{"from": "02:00", "to": "04:00"}]});
    let (mut os, outputs) = complete(night.clone());
    assert_eq!(outputs, []);
    let noon = Moment { day: 1, minute: 12 * 60 };
    assert_eq!(os.handle(Input::Clock(Ok(noon)), s(3)), []);
    assert_eq!(os.progress().step, OsStep::Waiting);
    let night_time = Moment { day: 1, minute: 3 * 60 };
    assert_eq!(os.handle(Input::Clock(Ok(night_time)), s(4)), [Output::Install(digest("2"))]);
    // It was committed when the window had closed.
    os.handle(Input::Clock(Ok(noon)), s(5));
    assert_eq!(os.handle(Input::Machine(at_step("committed")), s(6)), []);
    assert_eq!(os.progress().step, OsStep::Waiting);
    let outputs = os.handle(Input::Clock(Ok(night_time)), s(7));
    assert_eq!(outputs, [Output::Restart("2".into())]);
    // A zone that nobody knows opens nothing.
    let (mut os, _) = complete(night);
    let failure = Failure { reason: "no zone `X`".into(), hint: "h".into() };
    assert_eq!(os.handle(Input::Clock(Err(failure)), s(3)), []);
    assert_eq!(
        (os.progress().step, os.progress().reason.as_str()),
        (OsStep::Failed, "no zone `X`")
    );
}

#[test]
fn a_hold_stops_everything_and_its_end_goes_on() {
    let mut os = OsUpdate::default();
    os.handle(Input::Machine(machine()), s(0));
    let fetch = os.handle(Input::Order(Some(order("2", json!({})))), s(1));
    assert_eq!(fetch.len(), 1);
    let held = os.handle(Input::Order(Some(order("2", json!({"hold": true})))), s(2));
    assert_eq!((held, os.progress().step), (vec![Output::StopFetch], OsStep::Held));
    // The fetch may have ended just then; that counts for nothing.
    assert_eq!(os.handle(Input::Complete { digest: digest("2") }, s(3)), []);
    let again = os.handle(Input::Order(Some(order("2", json!({})))), s(4));
    assert!(matches!(&again[..], [Output::Fetch(_)]), "{again:?}");
    assert_eq!(os.handle(Input::Order(None), s(5)), [Output::StopFetch]);
    assert_eq!(os.progress(), &OsProgress::default());
}

#[test]
fn the_version_of_the_other_slot_is_gone_back_to_and_not_fetched() {
    let mut os = OsUpdate::default();
    let mut machine = machine();
    machine.releases.other = Some("0".into());
    os.handle(Input::Machine(machine), s(0));
    let outputs = os.handle(Input::Order(Some(order("0", json!({})))), s(1));
    assert_eq!(outputs, [Output::GoBack("0".into())]);
    let failure = Failure { reason: "not now".into(), hint: String::new() };
    assert_eq!(os.handle(Input::Refused(failure), s(2)), []);
    assert_eq!(os.progress().reason, "not now");
    assert_eq!(os.handle(Input::Tick, s(3)), []);
    let outputs = os.handle(Input::Tick, s(2) + RETRY_INTERVAL);
    assert_eq!(outputs, [Output::GoBack("0".into())]);
}

#[test]
fn a_failed_fetch_is_told_and_tried_again_later() {
    let mut os = OsUpdate::default();
    os.handle(Input::Machine(machine()), s(0));
    os.handle(Input::Order(Some(order("2", json!({})))), s(1));
    let failure =
        Failure { reason: "the hub does not have this version".into(), hint: "publish it".into() };
    assert_eq!(os.handle(Input::Missed { digest: digest("2"), failure }, s(2)), []);
    assert_eq!((os.progress().step, os.progress().hint.as_str()), (OsStep::Failed, "publish it"));
    assert_eq!(os.handle(Input::Tick, s(100)), []);
    assert_eq!(os.handle(Input::Tick, s(2) + RETRY_INTERVAL).len(), 1);
    assert_eq!(os.progress().step, OsStep::Fetching);
}

#[test]
fn an_install_that_failed_is_told_and_begun_again_later_from_what_is_still_there() {
    let (mut os, _) = complete(json!({}));
    let mut machine = at_step("failed");
    machine.update.as_mut().expect("set").reason = "no room".into();
    assert_eq!(os.handle(Input::Machine(at_step("writing")), s(3)), []);
    assert_eq!(os.handle(Input::Machine(machine.clone()), s(4)), []);
    assert_eq!((os.progress().step, os.progress().reason.as_str()), (OsStep::Failed, "no room"));
    assert_eq!(os.handle(Input::Machine(machine.clone()), s(60)), []);
    // PID 1 takes away what it has looked at.
    let again = os.handle(Input::Machine(machine.clone()), s(5) + RETRY_INTERVAL);
    assert!(matches!(&again[..], [Output::Fetch(_)]), "{again:?}");
    let outputs = os.handle(Input::Complete { digest: digest("2") }, s(6) + RETRY_INTERVAL);
    assert_eq!(outputs, [Output::Install(digest("2"))]);
}
