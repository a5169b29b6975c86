//! A model of the runtime and a loop of planner and executor over it, driven by seeds.
//!
//! Containers crash, the runtime loses sandboxes, steps fail, the image changes, and the agent is
//! killed between any two steps. After every step no container may have two live instances and no
//! restart count may fall; once the trouble ends, the pod has to come to rest as it was asked to.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::plan::{Facts, Step, backoff_key, plan, plan_stop};
use super::runtime::{Exit, Instance, PodRuntime, Sandbox, State};
use super::{definition_hash, find_container};

/// Small generator with a full period; the same seed gives the same run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }
}

struct World {
    dice: Dice,
    now: Timestamp,
    runtime: PodRuntime,
    pod: Pod,
    /// What the agent has stored: it outlives the agent.
    stored: BTreeMap<String, u32>,
    facts: Facts,
    next_id: u64,
    counts: BTreeMap<String, u32>,
    trouble: bool,
}

fn pod(policy: &str, image: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "n", "uid": "u"},
        "spec": {"restartPolicy": policy,
            "initContainers": [{"name": "i", "image": image},
                               {"name": "s", "image": image, "restartPolicy": "Always"}],
            "containers": [{"name": "a", "image": image}, {"name": "b", "image": image}]},
    }))
    .expect("pod parses")
}

impl World {
    fn new(seed: u64, policy: &str) -> Self {
        Self {
            dice: Dice(seed),
            now: Timestamp::from_second(1_000_000).expect("valid time"),
            runtime: PodRuntime::default(),
            pod: pod(policy, "one"),
            stored: BTreeMap::new(),
            facts: Facts::default(),
            next_id: 0,
            counts: BTreeMap::new(),
            trouble: true,
        }
    }

    fn id(&mut self, kind: &str) -> String {
        self.next_id += 1;
        format!("{kind}{}", self.next_id)
    }

    fn end(&self, code: i32) -> State {
        State::Exited(Exit {
            code,
            reason: String::new(),
            message: String::new(),
            finished_at: self.now,
        })
    }

    /// Does one step; `false` if it failed and the rest of the plan must not be done.
    fn execute(&mut self, step: Step) -> bool {
        if self.trouble && self.dice.one_in(8) {
            return false;
        }
        let dead = self.end(137);
        match step {
            Step::KillPod { .. } => {
                for one in self.runtime.containers.iter_mut().filter(|one| one.may_live()) {
                    one.state = dead.clone();
                }
                for sandbox in &mut self.runtime.sandboxes {
                    sandbox.ready = false;
                }
            }
            Step::Kill { id, .. } => {
                let mut all = self.runtime.containers.iter_mut();
                if let Some(one) = all.find(|one| one.id == id && one.may_live()) {
                    one.state = dead;
                }
            }
            Step::Remove { id } => self.runtime.containers.retain(|one| one.id != id),
            Step::CreateSandbox { attempt } => {
                let id = self.id("s");
                let ips = vec!["10.0.0.2".to_owned()];
                self.runtime.sandboxes.push(Sandbox {
                    id,
                    attempt,
                    ready: true,
                    ips,
                    created_at: self.now,
                    ..Default::default()
                });
            }
            Step::Start { container, init: _, restart_count, after_exit } => {
                self.start(&container, restart_count, after_exit);
            }
        }
        self.check();
        true
    }

    fn start(&mut self, name: &str, restart_count: u32, after_exit: Option<Timestamp>) {
        let spec = self.pod.spec.clone().expect("has a spec");
        let (container, _) = find_container(&spec, name).expect("planner starts known containers");
        let hash = definition_hash(container);
        if let Some(finished) = after_exit {
            self.facts.restarts.raise(&backoff_key(name, &hash), finished, self.now);
        }
        self.stored.insert(name.to_owned(), restart_count);
        self.facts.restart_counts.insert(name.to_owned(), restart_count);
        if self.trouble && self.dice.one_in(10) {
            return; // the agent stored the count, and the runtime refused
        }
        let taken = |one: &Instance| one.name == name && one.restart_count == restart_count;
        assert!(
            !self.runtime.containers.iter().any(taken),
            "the runtime refuses a second {name}-{restart_count}"
        );
        let sandbox = self.runtime.sandbox().expect("a sandbox was made before").id.clone();
        let created = self.trouble && self.dice.one_in(10);
        let id = self.id("c");
        self.runtime.containers.push(Instance {
            id,
            name: name.to_owned(),
            sandbox,
            restart_count,
            state: if created { State::Created } else { State::Running },
            created_at: self.now,
            started_at: Some(self.now),
            image: String::new(),
            image_id: String::new(),
            hash: Some(hash),
            kubelet_hash: None,
            user_image: None,
        });
    }

    fn check(&mut self) {
        let mut live: BTreeMap<&str, usize> = BTreeMap::new();
        for one in self.runtime.containers.iter().filter(|one| one.may_live()) {
            *live.entry(&one.name).or_default() += 1;
        }
        assert!(live.values().all(|count| *count <= 1), "two live instances: {live:?}");
        for name in ["i", "s", "a", "b"] {
            // One that was never started may be removed and made again.
            let ran = self.runtime.instances(name);
            let newest =
                ran.iter().find(|one| one.state != State::Created).map(|one| one.restart_count);
            let (Some(newest), last) = (newest, self.counts.entry(name.to_owned()).or_default())
            else {
                continue;
            };
            assert!(newest >= *last, "restart count of {name} fell from {last} to {newest}");
            *last = newest;
        }
    }

    fn sync(&mut self) {
        for step in plan(&self.pod, &self.runtime, &self.facts, self.now).steps {
            if self.trouble && self.dice.one_in(12) {
                self.kill_agent();
                return;
            }
            if !self.execute(step) {
                return;
            }
        }
    }

    /// The agent loses all it had in memory.
    fn kill_agent(&mut self) {
        self.facts = Facts { restart_counts: self.stored.clone(), ..Default::default() };
    }

    fn misfortune(&mut self) {
        let count = self.runtime.containers.len() as u64;
        match self.dice.roll(10) {
            0..=3 if count > 0 => {
                let at = self.dice.roll(count) as usize;
                let code = self.dice.roll(2) as i32;
                let ended = self.end(code);
                let one = &mut self.runtime.containers[at];
                if one.is_running() {
                    one.state = ended;
                }
            }
            4 if count > 0 => {
                let at = self.dice.roll(count) as usize;
                let one = &mut self.runtime.containers[at];
                if one.is_running() {
                    one.state = State::Unknown;
                }
            }
            5 => {
                // A reboot: nothing lives, sandboxes are not ready.
                let ended = self.end(255);
                for one in self.runtime.containers.iter_mut().filter(|one| one.may_live()) {
                    one.state = ended.clone();
                }
                self.runtime.sandboxes.iter_mut().for_each(|sandbox| sandbox.ready = false);
                self.kill_agent();
            }
            6 => {
                // Dead things are collected, all of them.
                self.runtime.containers.retain(Instance::may_live);
            }
            7 => {
                let image = format!("image{}", self.dice.roll(3));
                let policy = self.pod.spec.as_ref().and_then(|spec| spec.restart_policy.clone());
                self.pod = pod(policy.as_deref().unwrap_or("Always"), &image);
            }
            _ => {}
        }
    }

    fn pass(&mut self, seconds: i64) {
        self.now =
            Timestamp::from_second(self.now.as_second() + seconds).expect("time stays valid");
    }

    fn finish_init(&mut self) {
        let done = self.end(0);
        let mut all = self.runtime.containers.iter_mut();
        if let Some(one) = all.find(|one| one.name == "i" && one.is_running()) {
            one.state = done;
        }
    }
}

fn run(seed: u64, policy: &str) {
    let mut world = World::new(seed, policy);
    for _ in 0..60 {
        world.misfortune();
        world.sync();
        world.finish_init();
        let seconds = world.dice.roll(120);
        world.pass(i64::try_from(seconds).expect("small"));
    }
    world.trouble = false;
    let mut idle = 0;
    for _ in 0..40 {
        world.sync();
        world.finish_init();
        world.pass(400);
        let plan = plan(&world.pod, &world.runtime, &world.facts, world.now);
        idle = if plan.steps.is_empty() { idle + 1 } else { 0 };
    }
    assert!(idle > 10, "the pod does not come to rest");
    if policy == "Always" {
        for name in ["s", "a", "b"] {
            let newest = world.runtime.newest(name).expect("was started");
            assert!(newest.is_running(), "{name} does not run: {:?}", newest.state);
        }
    }
    for step in plan_stop(&world.runtime).steps {
        world.execute(step);
    }
    assert!(!world.runtime.may_live(), "something lives after the stop");
}

#[test]
fn pods_come_to_rest_whatever_happens() {
    for policy in ["Always", "OnFailure", "Never"] {
        for seed in 0..700 {
            let outcome = std::panic::catch_unwind(|| run(seed, policy));
            assert!(outcome.is_ok(), "seed {seed} with policy {policy} failed, see above");
        }
    }
}
