//! Who is started, stopped and started again, and when the machine ends.
//!
//! No clock and no system calls: `handle_*` takes what happened, `poll_action` gives what is to be done now, until it
//! gives nothing; then the owner sleeps until `poll_timeout`. Times are since the start of the machine.
//!
//! A service:
//!
//! ```text
//! Off --wanted--> Waiting --what it waits for is ready, or AFTER_MAX--> Starting --> Running
//!                    ^                                                      |           |
//!                    +------------------- Backoff (1 to 30 s) <-------------+---ended---+
//! ```
//!
//! The machine: `Running` -> agent -> pods -> services -> everybody -> `Finish`, each with a time of its own, all
//! together within [`SHUTDOWN_MAX`].
//!
//! The watchdog is petted while this loop runs and the vital services are alive, or have not been dead for
//! [`DEAD_MAX`]. After that the machine is started again in order, at most [`REBOOTS_MAX`] times an hour: a box that
//! cannot be helped by that stays up and says what is wrong.

use crate::console::{Problem, Word};
use crate::kernel::{Ending, Exit};
use crate::service::{AGENT, BROKER, CONTAINERD, NETWORK, Service};
use std::collections::VecDeque;
use std::time::Duration;

/// Wait before the second start.
pub const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// Longest wait between two starts.
pub const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A service that ran this long starts again without a wait.
pub const GOOD_RUN: Duration = Duration::from_secs(60);
/// Longest wait for another service.
pub const AFTER_MAX: Duration = Duration::from_secs(45);
/// A vital service may be dead this long.
pub const DEAD_MAX: Duration = Duration::from_secs(300);
/// The agent's sign of life may be this old.
pub const BEAT_MAX: Duration = Duration::from_secs(60);
/// Starts of the machine for a dead service, at most, within [`REBOOTS_WITHIN`].
pub const REBOOTS_MAX: usize = 3;
/// See [`REBOOTS_MAX`].
pub const REBOOTS_WITHIN: Duration = Duration::from_secs(3600);
/// Time between two signs of life to the watchdog.
pub const PET_INTERVAL: Duration = Duration::from_secs(10);
/// Time of the watchdog at the end.
pub const WATCHDOG_AT_END: Duration = Duration::from_secs(120);
/// Pods get this long to end.
pub const PODS_MAX: Duration = Duration::from_secs(30);
/// Everything together at the end; then the machine ends as it is.
pub const SHUTDOWN_MAX: Duration = Duration::from_secs(60);
/// Whoever is left gets this long.
const REST_MAX: Duration = Duration::from_secs(2);
/// Time between two looks at a socket that is not there yet, and at one that was.
const PROBE_SOON: Duration = Duration::from_millis(100);
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two counts of what is left of the pods.
const COUNT_INTERVAL: Duration = Duration::from_millis(250);
/// Starts in a row that failed, until a person is told.
const FAILURES_TOLD: u32 = 3;
const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// What the owner has to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Start this service, then call [`Supervisor::handle_started`] or [`Supervisor::handle_start_failed`].
    Start(&'static str),
    /// Send a signal to a service.
    Signal {
        /// To whom.
        pid: i32,
        /// Which.
        signal: i32,
    },
    /// See whether the service's socket takes connections, then call [`Supervisor::handle_probe`].
    Probe(&'static str),
    /// Tell the watchdog that all is well.
    Pet,
    /// Give the watchdog another time.
    ArmWatchdog(Duration),
    /// Send a signal to all pods, then call [`Supervisor::handle_pods`] with what is left; 0 only counts.
    Pods(i32),
    /// Send a signal to everybody but this process.
    Everybody(i32),
    /// Note on the disk that the machine starts again because of a dead service.
    NoteReboot,
    /// Say so on the console.
    Say(Word, String),
    /// Tell of a problem of this part.
    Tell(&'static str, Problem),
    /// The part has no problem any more.
    Solved(&'static str),
    /// Keep what has to be kept, unmount, end the machine.
    Finish(Ending),
}

/// What the agent says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Beat {
    /// There is a link to the hub.
    pub connected: bool,
    /// The cluster has taken the Node.
    pub registered: bool,
    /// Pods that it runs.
    pub pods: u32,
    /// What keeps it from the above.
    pub problem: Option<Problem>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Off,
    Waiting { since: Duration },
    Starting,
    Backoff { until: Duration },
    Running { pid: i32, since: Duration, ready: bool, next_probe: Duration },
    Stopping { pid: i32, kill_at: Duration, killed: bool },
}

#[derive(Debug)]
struct Unit {
    service: Service,
    state: State,
    /// Starts in a row that did not last.
    failures: u32,
    /// When it was last alive, or was first wanted.
    alive: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Agent,
    Pods,
    Services,
    Rest,
    Finished,
}

#[derive(Debug, Clone, Copy)]
struct End {
    ending: Ending,
    stage: Stage,
    /// When the stage is over at the latest.
    until: Duration,
    /// When all is.
    at_most: Duration,
    next_count: Duration,
}

/// The owner of all services.
#[derive(Debug)]
pub struct Supervisor {
    units: Vec<Unit>,
    end: Option<End>,
    next_pet: Duration,
    /// When the machine was started again for a dead service, as times of this boot; those before it are negative.
    reboots: Vec<i64>,
    connected: bool,
    ready: bool,
    given_up: bool,
    actions: VecDeque<Action>,
}

impl Supervisor {
    /// Nothing is wanted yet. `reboots` are the ages of the starts for a dead service before this one.
    pub fn new(services: Vec<Service>, now: Duration, reboots: &[Duration]) -> Self {
        let unit = |service| Unit { service, state: State::Off, failures: 0, alive: now };
        let at = |age: &Duration| seconds(now) - seconds(*age);
        Self {
            units: services.into_iter().map(unit).collect(),
            end: None,
            next_pet: now,
            reboots: reboots.iter().map(at).collect(),
            connected: false,
            ready: false,
            given_up: false,
            actions: VecDeque::new(),
        }
    }

    /// The service of this name.
    pub fn service(&self, name: &str) -> Option<&Service> {
        self.units.iter().map(|unit| &unit.service).find(|service| service.name == name)
    }

    /// Services that run, with their process ids.
    pub fn running(&self) -> impl Iterator<Item = (&'static str, i32)> + '_ {
        self.units.iter().filter_map(|unit| Some((unit.service.name, unit.pid()?)))
    }

    /// Whether this process belongs to a service.
    pub fn name_of(&self, pid: i32) -> Option<&'static str> {
        self.running().find(|(_, one)| *one == pid).map(|(name, _)| name)
    }

    /// Whether the agent has said that it is connected and registered.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Whether this service runs and takes connections.
    pub fn is_up(&self, name: &str) -> bool {
        self.units.iter().any(|unit| unit.service.name == name && unit.is_ready())
    }

    /// Whether everything that the node needs and that is wanted has been alive for [`GOOD_RUN`] without a stop.
    pub fn is_sound(&self, now: Duration) -> bool {
        let mut wanted = self.units.iter().filter(|unit| unit.service.vital).peekable();
        let alive = |unit: &Unit| match unit.state {
            State::Off => true, // such as the agent of a box that was not told what it is for
            State::Running { since, ready, .. } => {
                let fresh = now.saturating_sub(unit.alive) <= BEAT_MAX;
                ready && fresh && now.saturating_sub(since) >= GOOD_RUN
            }
            _ => false,
        };
        wanted.peek().is_some() && wanted.all(alive)
    }

    /// Whether the machine is about to end.
    pub fn is_ending(&self) -> bool {
        self.end.is_some()
    }

    /// The service is wanted from now on; it is started when what it waits for is ready.
    pub fn want(&mut self, now: Duration, name: &str) {
        if let Some(unit) = self.unit(name).filter(|unit| unit.state == State::Off) {
            unit.state = State::Waiting { since: now };
            unit.alive = now;
        }
    }

    /// Stops the service and starts it again, for example with another configuration.
    pub fn restart(&mut self, now: Duration, name: &str) {
        let Some(unit) = self.unit(name) else { return };
        match unit.state {
            State::Running { pid, .. } => {
                let kill_at = now + Duration::from_secs(unit.service.stop_s);
                unit.state = State::Stopping { pid, kill_at, killed: false };
                self.actions.push_back(Action::Signal { pid, signal: SIGTERM });
            }
            State::Off | State::Backoff { .. } => {
                unit.state = State::Waiting { since: now };
                unit.alive = now;
            }
            _ => {}
        }
    }

    /// A service that runs already, from before this process was started again.
    pub fn adopt(&mut self, now: Duration, name: &str, pid: i32) {
        if let Some(unit) = self.unit(name) {
            let ready = unit.service.socket.is_none();
            unit.state = State::Running { pid, since: now, ready, next_probe: now };
            unit.alive = now;
        }
    }

    /// Ends the machine. A second order changes nothing but the way it ends.
    pub fn order(&mut self, now: Duration, ending: Ending, reason: &str) {
        if let Some(end) = &mut self.end {
            end.ending = ending;
            return;
        }
        let how = match ending {
            Ending::Reboot => "starting again",
            Ending::Poweroff => "powering off",
        };
        self.actions.push_back(Action::Say(Word::Shutdown, format!("{how}: {reason}")));
        self.actions.push_back(Action::ArmWatchdog(WATCHDOG_AT_END));
        for unit in &mut self.units {
            if unit.pid().is_none() {
                unit.state = State::Off;
            }
        }
        self.end = Some(End {
            ending,
            stage: Stage::Agent,
            until: now,
            at_most: now + SHUTDOWN_MAX,
            next_count: now,
        });
        self.stop(now, AGENT);
        let until = self.stop_limit(now, AGENT);
        self.end.as_mut().expect("just set").until = until;
    }

    /// The service was started.
    pub fn handle_started(&mut self, now: Duration, name: &str, pid: i32) {
        let Some(unit) = self.unit(name) else { return };
        let ready = unit.service.socket.is_none();
        unit.state = State::Running { pid, since: now, ready, next_probe: now };
        let word = word(name);
        self.actions.push_back(Action::Say(word, format!("{name} started (pid {pid})")));
        if self.end.is_some() {
            self.stop(now, name);
        }
    }

    /// The service could not be started at all.
    pub fn handle_start_failed(&mut self, now: Duration, name: &str, reason: &str) {
        self.failed(now, name, Duration::ZERO, format!("could not be started: {reason}"));
    }

    /// A process has ended, of a service or of somebody else's.
    pub fn handle_exit(&mut self, now: Duration, pid: i32, exit: Exit) {
        let Some(at) = self.units.iter().position(|unit| unit.pid() == Some(pid)) else { return };
        let unit = &mut self.units[at];
        let name = unit.service.name;
        match unit.state {
            State::Running { since, .. } => {
                self.failed(now, name, now.saturating_sub(since), format!("ended with {exit}"));
            }
            State::Stopping { .. } if self.end.is_some() => unit.state = State::Off,
            // It was told to, and is wanted again.
            State::Stopping { .. } => {
                unit.state = State::Waiting { since: now };
                unit.alive = now;
            }
            _ => {}
        }
        if name == AGENT {
            self.set_link(false, false);
        }
    }

    /// Whether the service's socket takes connections.
    pub fn handle_probe(&mut self, now: Duration, name: &str, accepts: bool) {
        let Some(unit) = self.unit(name) else { return };
        let State::Running { ready, next_probe, .. } = &mut unit.state else { return };
        *next_probe = now + if accepts { PROBE_INTERVAL } else { PROBE_SOON };
        if accepts {
            unit.alive = now;
            if !std::mem::replace(ready, true) {
                self.actions.push_back(Action::Say(word(name), format!("{name} is ready")));
                self.actions.push_back(Action::Solved(part(name)));
            }
        } else if *ready && now.saturating_sub(unit.alive) > PROBE_INTERVAL * 3 {
            *ready = false;
        }
    }

    /// The agent is alive and says how it is.
    pub fn handle_beat(&mut self, now: Duration, beat: &Beat) {
        if let Some(unit) = self.unit(AGENT) {
            unit.alive = now;
        }
        self.set_link(beat.connected, beat.connected && beat.registered);
        if let Some(problem) = &beat.problem {
            self.actions.push_back(Action::Tell("link", problem.clone()));
        }
        // One that has just been started has no word yet about what is wrong.
        if beat.connected {
            self.actions.push_back(Action::Solved("link"));
            self.actions.push_back(Action::Solved(part(AGENT)));
        }
    }

    /// So many processes of pods are left, as [`Action::Pods`] has asked.
    pub fn handle_pods(&mut self, now: Duration, left: usize) {
        let Some(end) = &mut self.end else { return };
        if end.stage == Stage::Pods {
            end.next_count = now + COUNT_INTERVAL;
            if left == 0 {
                end.until = now;
            }
        }
    }

    /// What to do now; call it until there is nothing.
    pub fn poll_action(&mut self, now: Duration) -> Option<Action> {
        if self.actions.is_empty() {
            match self.end {
                None => self.advance(now),
                Some(end) => self.advance_end(now, end),
            }
        }
        self.actions.pop_front()
    }

    /// When to call [`Self::poll_action`] again, if nothing happens before.
    pub fn poll_timeout(&self) -> Duration {
        if let Some(end) = &self.end {
            let kill = self.units.iter().filter_map(|unit| match unit.state {
                State::Stopping { kill_at, killed: false, .. } => Some(kill_at),
                _ => None,
            });
            let count = (end.stage == Stage::Pods).then_some(end.next_count);
            return kill.chain(count).fold(end.until.min(end.at_most), Duration::min);
        }
        let next = self.units.iter().filter_map(|unit| match unit.state {
            State::Waiting { since } => Some(since + AFTER_MAX),
            State::Backoff { until } => Some(until),
            State::Running { next_probe, .. } if unit.service.socket.is_some() => Some(next_probe),
            State::Stopping { kill_at, killed: false, .. } => Some(kill_at),
            _ => None,
        });
        next.fold(self.next_pet, Duration::min)
    }

    fn advance(&mut self, now: Duration) {
        let ready: Vec<_> = self
            .units
            .iter()
            .filter(|unit| unit.is_ready())
            .map(|unit| unit.service.name)
            .collect();
        for unit in &mut self.units {
            if let State::Backoff { until } = unit.state
                && until <= now
            {
                unit.state = State::Waiting { since: until };
            }
            match &mut unit.state {
                State::Waiting { since } => {
                    let waits = unit.service.after.iter().any(|after| !ready.contains(after));
                    if !waits || *since + AFTER_MAX <= now {
                        unit.state = State::Starting;
                        self.actions.push_back(Action::Start(unit.service.name));
                    }
                }
                State::Running { since, ready, next_probe, .. } => {
                    if unit.service.socket.is_some() && *next_probe <= now {
                        // Set again by the answer.
                        *next_probe = now + PROBE_INTERVAL;
                        self.actions.push_back(Action::Probe(unit.service.name));
                    }
                    if now.saturating_sub(*since) > GOOD_RUN && *ready {
                        unit.failures = 0;
                    }
                }
                State::Stopping { pid, kill_at, killed } if *kill_at <= now && !*killed => {
                    *killed = true;
                    self.actions.push_back(Action::Signal { pid: *pid, signal: SIGKILL });
                }
                _ => {}
            }
        }
        if self.next_pet <= now {
            self.next_pet = now + PET_INTERVAL;
            self.look_for_the_dead(now);
        }
    }

    /// Pets the watchdog, or has the machine started again because a vital service stays dead.
    fn look_for_the_dead(&mut self, now: Duration) {
        let dead = |unit: &&Unit| {
            unit.service.vital
                && unit.state != State::Off
                && now.saturating_sub(unit.alive) > DEAD_MAX
        };
        let Some(name) = self.units.iter().find(dead).map(|unit| unit.service.name) else {
            self.given_up = false;
            self.actions.push_back(Action::Pet);
            return;
        };
        let recent = seconds(now) - seconds(REBOOTS_WITHIN);
        self.reboots.retain(|at| *at > recent);
        let minutes = DEAD_MAX.as_secs() / 60;
        if self.reboots.len() < REBOOTS_MAX {
            self.reboots.push(seconds(now));
            self.actions.push_back(Action::NoteReboot);
            self.order(now, Ending::Reboot, &format!("{name} has been dead for {minutes} minutes"));
            return;
        }
        // Another start would not help; whoever comes finds a machine that can be talked to.
        self.actions.push_back(Action::Pet);
        if !std::mem::replace(&mut self.given_up, true) {
            let what = format!("{name} stays dead, also after {REBOOTS_MAX} starts of the machine");
            let hint = "the log of the service is in /state/log; reflash or replace the machine";
            self.actions.push_back(Action::Tell("dead", Problem::new(what, hint)));
        }
    }

    fn advance_end(&mut self, now: Duration, end: End) {
        if end.stage == Stage::Finished {
            return;
        }
        for unit in &mut self.units {
            if let State::Stopping { pid, kill_at, killed } = &mut unit.state
                && *kill_at <= now
                && !*killed
            {
                *killed = true;
                self.actions.push_back(Action::Signal { pid: *pid, signal: SIGKILL });
            }
        }
        let over = now >= end.at_most;
        let stopped = self.units.iter().all(|unit| unit.pid().is_none());
        let agent_stopped =
            self.units.iter().all(|unit| unit.service.name != AGENT || unit.pid().is_none());
        let (stage, until) = match end.stage {
            _ if over => (Stage::Finished, now),
            Stage::Agent if agent_stopped || now >= end.until => (Stage::Pods, now + PODS_MAX),
            Stage::Pods if now >= end.until => {
                let limits = self.units.iter().map(|unit| unit.service.stop_s).max();
                // A moment more, for the kill to be noticed.
                (Stage::Services, now + Duration::from_secs(limits.unwrap_or(0) + 1))
            }
            Stage::Services if stopped || now >= end.until => (Stage::Rest, now + REST_MAX),
            Stage::Rest if now >= end.until => (Stage::Finished, now),
            stage => {
                if stage == Stage::Pods && end.next_count <= now {
                    self.actions.push_back(Action::Pods(0));
                    self.end.as_mut().expect("it is ending").next_count = now + COUNT_INTERVAL;
                }
                return;
            }
        };
        match stage {
            Stage::Pods => self.actions.push_back(Action::Pods(SIGTERM)),
            Stage::Services => {
                self.actions.push_back(Action::Pods(SIGKILL));
                let names: Vec<_> = self.running().map(|(name, _)| name).collect();
                names.into_iter().for_each(|name| self.stop(now, name));
            }
            Stage::Rest => self.actions.push_back(Action::Everybody(SIGTERM)),
            Stage::Finished => {
                self.actions.push_back(Action::Everybody(SIGKILL));
                self.actions.push_back(Action::Finish(end.ending));
            }
            Stage::Agent => {}
        }
        self.end = Some(End { stage, until, next_count: now, ..end });
    }

    fn stop(&mut self, now: Duration, name: &str) {
        let Some(unit) = self.unit(name) else { return };
        if let State::Running { pid, .. } = unit.state {
            let kill_at = now + Duration::from_secs(unit.service.stop_s);
            unit.state = State::Stopping { pid, kill_at, killed: false };
            self.actions.push_back(Action::Signal { pid, signal: SIGTERM });
        }
    }

    fn stop_limit(&mut self, now: Duration, name: &str) -> Duration {
        let seconds = self.service(name).map_or(0, |service| service.stop_s + 1);
        now + Duration::from_secs(seconds)
    }

    fn failed(&mut self, now: Duration, name: &str, ran: Duration, how: String) {
        let ending = self.end.is_some();
        let Some(unit) = self.unit(name) else { return };
        if ending {
            unit.state = State::Off;
            return;
        }
        unit.failures = if ran >= GOOD_RUN { 1 } else { unit.failures.saturating_add(1) };
        let wait = match ran >= GOOD_RUN {
            true => BACKOFF_MIN,
            false => BACKOFF_MIN.saturating_mul(1 << (unit.failures - 1).min(16)).min(BACKOFF_MAX),
        };
        unit.state = State::Backoff { until: now + wait };
        let failures = unit.failures;
        let wait = wait.as_secs();
        let say = format!("{name} {how}, starting it again in {wait} s");
        self.actions.push_back(Action::Say(word(name), say));
        if failures == FAILURES_TOLD {
            let problem = Problem::new(
                format!("{name} does not stay up: it {how}"),
                format!("its last words are in /state/log/{name}.log; it is tried for ever"),
            );
            self.actions.push_back(Action::Tell(part(name), problem));
        }
    }

    fn set_link(&mut self, connected: bool, ready: bool) {
        if std::mem::replace(&mut self.connected, connected) != connected {
            let text = if connected { "connected to the hub" } else { "not connected to the hub" };
            self.actions.push_back(Action::Say(Word::Online, text.into()));
        }
        if std::mem::replace(&mut self.ready, ready) != ready && ready {
            let text = "connected, and the node is registered";
            self.actions.push_back(Action::Say(Word::Ready, text.into()));
        }
    }

    fn unit(&mut self, name: &str) -> Option<&mut Unit> {
        self.units.iter_mut().find(|unit| unit.service.name == name)
    }
}

impl Unit {
    fn pid(&self) -> Option<i32> {
        match self.state {
            State::Running { pid, .. } | State::Stopping { pid, .. } => Some(pid),
            _ => None,
        }
    }

    fn is_ready(&self) -> bool {
        matches!(self.state, State::Running { ready: true, .. })
    }
}

fn word(name: &str) -> Word {
    match name {
        NETWORK => Word::Network,
        CONTAINERD => Word::Containerd,
        AGENT => Word::Agent,
        BROKER => Word::Broker,
        _ => Word::Stage1,
    }
}

/// The part that a problem of a service belongs to.
fn part(name: &str) -> &'static str {
    match name {
        NETWORK => "network service",
        CONTAINERD => CONTAINERD,
        AGENT => AGENT,
        BROKER => BROKER,
        _ => "service",
    }
}

fn seconds(time: Duration) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::services;

    /// The owner and its world, in a time that the test moves.
    struct World {
        supervisor: Supervisor,
        now: Duration,
        next_pid: i32,
        /// Everything that was done, with the second.
        done: Vec<(u64, Action)>,
        /// Services that cannot be started.
        broken: Vec<&'static str>,
        /// Services whose socket is silent.
        silent: Vec<&'static str>,
        /// Pods that do not end by themselves.
        pods: usize,
        beats: bool,
        /// Services that do not hear SIGTERM.
        deaf: bool,
    }

    impl World {
        fn new() -> Self {
            Self::after(&[])
        }

        fn after(reboots: &[Duration]) -> Self {
            let now = Duration::from_secs(5);
            Self {
                supervisor: Supervisor::new(services(false), now, reboots),
                now,
                next_pid: 100,
                done: Vec::new(),
                broken: Vec::new(),
                silent: Vec::new(),
                pods: 0,
                beats: true,
                deaf: false,
            }
        }

        fn want_all(mut self) -> Self {
            for name in [NETWORK, CONTAINERD, AGENT] {
                self.supervisor.want(self.now, name);
            }
            self
        }

        fn settle(&mut self) {
            while let Some(action) = self.supervisor.poll_action(self.now) {
                self.done.push((self.now.as_secs(), action.clone()));
                match action {
                    Action::Start(name) if self.broken.contains(&name) => {
                        self.supervisor.handle_start_failed(self.now, name, "not there");
                    }
                    Action::Start(name) => {
                        self.next_pid += 1;
                        self.supervisor.handle_started(self.now, name, self.next_pid);
                    }
                    Action::Probe(name) => {
                        let accepts = !self.silent.contains(&name);
                        self.supervisor.handle_probe(self.now, name, accepts);
                    }
                    Action::Signal { pid, signal } if signal == SIGKILL || !self.deaf => {
                        self.supervisor.handle_exit(self.now, pid, Exit::Signal(signal));
                    }
                    Action::Pods(signal) => {
                        if signal == SIGKILL {
                            self.pods = 0;
                        }
                        self.supervisor.handle_pods(self.now, self.pods);
                    }
                    _ => {}
                }
            }
        }

        fn run_until(&mut self, end_s: u64) {
            let end = Duration::from_secs(end_s);
            let mut next_beat = self.now;
            loop {
                self.settle();
                if self.beats && next_beat <= self.now {
                    next_beat = self.now + Duration::from_secs(10);
                    if self.pid(AGENT).is_some() {
                        let beat = Beat { connected: true, registered: true, ..Beat::default() };
                        self.supervisor.handle_beat(self.now, &beat);
                    }
                    continue;
                }
                let mut next = self.supervisor.poll_timeout();
                if self.beats {
                    next = next.min(next_beat);
                }
                if self.finished() {
                    return;
                }
                assert!(next > self.now, "it would spin at {:?}", self.now);
                if next > end {
                    self.now = end;
                    return;
                }
                self.now = next;
            }
        }

        fn finished(&self) -> bool {
            matches!(self.done.last(), Some((_, Action::Finish(_))))
        }

        fn pid(&self, name: &str) -> Option<i32> {
            self.supervisor.running().find(|(one, _)| *one == name).map(|(_, pid)| pid)
        }

        fn times(&self, wanted: impl Fn(&Action) -> bool) -> Vec<u64> {
            self.done.iter().filter(|(_, action)| wanted(action)).map(|(at, _)| *at).collect()
        }

        fn starts(&self, wanted: &'static str) -> Vec<u64> {
            self.times(|action| *action == Action::Start(wanted))
        }

        fn said(&self, text: &str) -> bool {
            self.done
                .iter()
                .any(|(_, action)| matches!(action, Action::Say(_, said) if said.contains(text)))
        }
    }

    #[test]
    fn agent_starts_when_containerd_takes_connections() {
        let mut world = World::new().want_all();
        world.silent.push(CONTAINERD);
        world.run_until(8);
        assert_eq!(world.starts(CONTAINERD), [5]);
        assert!(world.starts(AGENT).is_empty());
        world.silent.clear();
        world.run_until(30);
        assert_eq!(world.starts(AGENT), [8]);
        assert!(world.said("containerd is ready"));
        assert!(world.said("connected to the hub") && world.said("the node is registered"));
    }

    #[test]
    fn agent_is_started_without_containerd_after_a_while() {
        let mut world = World::new().want_all();
        world.broken.push(CONTAINERD);
        world.run_until(90);
        assert_eq!(world.starts(AGENT), [5 + AFTER_MAX.as_secs()]);
    }

    #[test]
    fn waits_between_starts_grow_from_1_to_30_s_and_a_good_run_forgets_them() {
        let mut world = World::new();
        world.broken.push(NETWORK);
        world.supervisor.want(world.now, NETWORK);
        world.run_until(130);
        assert_eq!(world.starts(NETWORK), [5, 6, 8, 12, 20, 36, 66, 96, 126]);
        let told = world.times(|action| matches!(action, Action::Tell("network service", _)));
        assert_eq!(told, [8], "told once, after three failures");
        world.broken.clear();
        world.run_until(300);
        let pid = world.pid(NETWORK).expect("runs");
        world.done.clear();
        world.supervisor.handle_exit(world.now, pid, Exit::Code(1));
        let at = world.now.as_secs();
        world.run_until(at + 5);
        assert_eq!(world.starts(NETWORK), [at + 1]);
    }

    #[test]
    fn ends_of_strangers_change_nothing() {
        let mut world = World::new().want_all();
        world.run_until(20);
        world.done.clear();
        world.supervisor.handle_exit(world.now, 4242, Exit::Code(0));
        world.run_until(25);
        assert!(world.starts(CONTAINERD).is_empty() && world.starts(AGENT).is_empty());
    }

    #[test]
    fn watchdog_is_petted_every_ten_seconds_while_all_is_well() {
        let mut world = World::new().want_all();
        world.run_until(305);
        let pets = world.times(|action| *action == Action::Pet);
        assert_eq!(pets.len(), 31);
    }

    #[test]
    fn agent_without_a_sign_of_life_for_five_minutes_starts_the_machine_again() {
        let mut world = World::new().want_all();
        world.run_until(100);
        world.beats = false;
        world.run_until(1000);
        let noted = world.times(|action| *action == Action::NoteReboot);
        assert_eq!(noted.len(), 1);
        assert!((400..=412).contains(&noted[0]), "{noted:?}");
        assert!(world.finished());
        assert!(world.said("starting again: edgecore has been dead for 5 minutes"));
    }

    #[test]
    fn machine_is_started_again_at_most_three_times_an_hour() {
        let minutes = |count: u64| Duration::from_secs(60 * count);
        let mut world = World::after(&[minutes(10), minutes(20), minutes(30)]).want_all();
        world.broken.push(CONTAINERD);
        world.run_until(1500);
        assert!(!world.finished());
        let told = world.times(|action| matches!(action, Action::Tell("dead", _)));
        assert_eq!(told.len(), 1, "told once");
        let last = world.times(|action| *action == Action::Pet).last().copied();
        assert!(last.expect("petted") > 1400, "the machine stays up");
        // The oldest is an hour old after half an hour.
        world.run_until(2000);
        assert!(world.finished());

        let mut world = World::after(&[minutes(10), minutes(90), minutes(100)]).want_all();
        world.broken.push(CONTAINERD);
        world.run_until(1500);
        assert!(world.finished(), "old ones do not count");
    }

    #[test]
    fn services_that_are_not_wanted_are_not_missed() {
        let mut world = World::new();
        world.supervisor.want(world.now, NETWORK);
        world.run_until(2000);
        assert!(!world.finished());
        assert!(world.starts(AGENT).is_empty());
    }

    #[test]
    fn end_is_agent_then_pods_then_services_then_everybody() {
        let mut world = World::new().want_all();
        world.run_until(20);
        world.done.clear();
        let [agent, containerd] = [AGENT, CONTAINERD].map(|name| world.pid(name).expect("runs"));
        world.supervisor.order(world.now, Ending::Poweroff, "the power button");
        world.run_until(200);
        let order: Vec<_> = world
            .done
            .iter()
            .map(|(_, action)| action.clone())
            .filter(|action| {
                !matches!(action, Action::Say(..) | Action::Solved(_) | Action::Tell(..))
            })
            .collect();
        let at = |wanted: &Action| order.iter().position(|one| one == wanted).expect("done");
        let steps = [
            at(&Action::ArmWatchdog(WATCHDOG_AT_END)),
            at(&Action::Signal { pid: agent, signal: SIGTERM }),
            at(&Action::Pods(SIGTERM)),
            at(&Action::Pods(SIGKILL)),
            at(&Action::Signal { pid: containerd, signal: SIGTERM }),
            at(&Action::Everybody(SIGTERM)),
            at(&Action::Everybody(SIGKILL)),
            at(&Action::Finish(Ending::Poweroff)),
        ];
        assert!(steps.is_sorted(), "{order:#?}");
        assert!(world.now < Duration::from_secs(30), "nothing was left to wait for");
    }

    #[test]
    fn end_is_bounded_whoever_does_not_listen() {
        let mut world = World::new().want_all();
        world.run_until(20);
        world.deaf = true;
        world.pods = 7;
        world.supervisor.order(world.now, Ending::Reboot, "the agent asks for it");
        world.supervisor.order(world.now, Ending::Reboot, "again");
        world.run_until(500);
        assert!(world.finished());
        assert!(world.now <= Duration::from_secs(20) + SHUTDOWN_MAX, "{:?}", world.now);
        let pods = world.times(|action| *action == Action::Pods(SIGTERM));
        let killed = world.times(|action| *action == Action::Pods(SIGKILL));
        assert_eq!(killed[0] - pods[0], PODS_MAX.as_secs());
        let ends = world.times(|action| matches!(action, Action::Finish(_)));
        assert_eq!(ends.len(), 1);
    }

    #[test]
    fn restart_waits_for_the_end_and_kills_after_its_time() {
        let mut world = World::new().want_all();
        world.run_until(20);
        world.deaf = true;
        let before = world.pid(AGENT).expect("runs");
        world.done.clear();
        world.supervisor.restart(world.now, AGENT);
        world.run_until(40);
        assert_ne!(world.pid(AGENT).expect("runs again"), before);
        let killed =
            world.times(|action| *action == Action::Signal { pid: before, signal: SIGKILL });
        assert_eq!(killed, [25]);
        assert_eq!(world.starts(AGENT), [25]);
    }

    #[test]
    fn adopted_services_are_not_started_twice() {
        let mut world = World::new();
        world.supervisor.adopt(world.now, CONTAINERD, 77);
        for name in [NETWORK, CONTAINERD, AGENT] {
            world.supervisor.want(world.now, name);
        }
        world.run_until(30);
        assert!(world.starts(CONTAINERD).is_empty());
        assert_eq!(world.starts(AGENT).len(), 1);
        assert_eq!(world.supervisor.name_of(77), Some(CONTAINERD));
    }
}
