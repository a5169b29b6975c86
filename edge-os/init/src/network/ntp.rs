//! The time from the network: asks several servers and says how far the clock is off.
//!
//! A round asks up to [`SERVERS_MAX`] servers once each and ends when all have answered or after
//! [`ROUND_WAIT`]. Of the answers that pass the checks of the specification, those count whose
//! intervals (offset ± half the delay and the server's own dispersion) meet the intervals of most
//! others, so that one false clock among three is outvoted; of these the one with the shortest
//! delay is taken. The first result sets the clock ([`Correction::Step`]); later ones turn it
//! slowly ([`Correction::Slew`]), unless they are off by more than [`STEP_MIN`] twice in a row.
//!
//! No socket and no clock. The transmit time of a question is a random number, not the time: it
//! tells nothing about the box, and an answer without it is not for us. Source: RFC 4330, RFC 5905
//! sections 7 and 8, draft-ietf-ntp-data-minimization.

use std::net::IpAddr;
use std::time::Duration;

/// Servers that are asked in a round.
pub const SERVERS_MAX: usize = 4;
/// How long a round waits for answers.
pub const ROUND_WAIT: Duration = Duration::from_secs(2);
/// Pause after the first round without a result; doubled up to [`RETRY_MAX`].
pub const RETRY_FIRST: Duration = Duration::from_secs(2);
/// Longest pause between rounds without a result.
pub const RETRY_MAX: Duration = Duration::from_secs(64);
/// Pause after the first good round; doubled up to [`POLL_MAX`].
pub const POLL_FIRST: Duration = Duration::from_secs(64);
/// Longest pause between good rounds.
pub const POLL_MAX: Duration = Duration::from_secs(1024);
/// Offsets from here on are set, not turned away: slewing one second takes half an hour.
pub const STEP_MIN: Duration = Duration::from_millis(500);
/// Largest delay or dispersion of a server that is believed.
pub const ERROR_MAX: Duration = Duration::from_millis(1500);
/// Length of question and answer; extensions after it are not read.
pub const MESSAGE_LEN: usize = 48;
/// Seconds from 1900, where the protocol counts from, to 1970.
const EPOCH: u64 = 2_208_988_800;

/// What to do with the clock.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Correction {
    /// Add this many seconds at once.
    Step(f64),
    /// Add this many seconds little by little.
    Slew(f64),
}

/// The result of the last good round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Whose answer was taken.
    pub server: IpAddr,
    /// Seconds that the clock was behind.
    pub offset: f64,
    /// Seconds that question and answer were on the way.
    pub delay: f64,
}

/// Why an answer does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AnswerError {
    /// It is no answer of a server, or not to the question.
    #[error("no answer to the question")]
    Foreign,
    /// The server has no time itself.
    #[error("server has no time itself")]
    Unsynchronised,
    /// The server asks to be asked less or not at all.
    #[error("server does not want to be asked")]
    KissOfDeath,
    /// The server's own error is too large, or its times contradict each other.
    #[error("server's time is not good enough")]
    Inaccurate,
}

#[derive(Debug, Clone, Copy)]
struct Question {
    server: IpAddr,
    nonce: u64,
    sent: Option<Duration>,
    answer: Option<Answer>,
    closed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Answer {
    offset: f64,
    delay: f64,
    error: f64,
}

/// The client.
#[derive(Debug)]
pub struct Client {
    servers: Vec<IpAddr>,
    round: Vec<Question>,
    round_ends: Option<Duration>,
    next_round: Duration,
    pause: Duration,
    last: Option<Sample>,
    far_off: bool,
    synced: bool,
    unwanted: Vec<IpAddr>,
}

impl Default for Client {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            round: Vec::new(),
            round_ends: None,
            next_round: Duration::ZERO,
            pause: RETRY_FIRST,
            last: None,
            far_off: false,
            synced: false,
            unwanted: Vec::new(),
        }
    }
}

impl Client {
    /// Takes the servers to ask, the best first. New ones are asked at once.
    pub fn set_servers(&mut self, now: Duration, servers: &[IpAddr]) {
        if self.servers == servers {
            return;
        }
        self.servers = servers.to_vec();
        self.unwanted.clear();
        self.round.clear();
        self.round_ends = None;
        self.next_round = now;
        self.pause = RETRY_FIRST;
    }

    /// Whether the clock was set from the network.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// The last good result.
    pub fn last(&self) -> Option<Sample> {
        self.last
    }

    /// Asks at once, for example because the network has come back.
    pub fn hurry(&mut self, now: Duration) {
        if self.round_ends.is_none() && !self.synced {
            self.next_round = now;
            self.pause = RETRY_FIRST;
        }
    }

    /// Returns a question to send to port 123 of a server. `random` has to be unguessable and is
    /// used when there is one to send.
    pub fn poll_transmit(
        &mut self,
        now: Duration,
        random: impl Fn() -> u64,
    ) -> Option<(IpAddr, [u8; MESSAGE_LEN])> {
        if self.round_ends.is_none() && self.next_round <= now && !self.servers.is_empty() {
            let meant = self.servers.iter().filter(|server| !self.unwanted.contains(server));
            self.round = meant
                .take(SERVERS_MAX)
                .map(|server| Question {
                    server: *server,
                    nonce: random() | 1,
                    sent: None,
                    answer: None,
                    closed: false,
                })
                .collect();
            self.round_ends = Some(now + ROUND_WAIT);
        }
        let question = self.round.iter_mut().find(|question| question.sent.is_none())?;
        question.sent = Some(now);
        let mut bytes = [0; MESSAGE_LEN];
        bytes[0] = 4 << 3 | 3; // version 4, client
        bytes[40..48].copy_from_slice(&question.nonce.to_be_bytes());
        Some((question.server, bytes))
    }

    /// A question could not be sent: its answer is not waited for.
    pub fn handle_unreachable(&mut self, server: IpAddr) {
        for question in self.round.iter_mut().filter(|question| question.server == server) {
            question.closed = true;
        }
    }

    /// Takes an answer that came from `server` at the time `now`, `wall` on the clock (since 1970).
    /// Between question and answer the clock must not have been set.
    pub fn handle_answer(
        &mut self,
        now: Duration,
        wall: Duration,
        server: IpAddr,
        bytes: &[u8],
    ) -> Result<(), AnswerError> {
        let waiting = |question: &&mut Question| question.server == server && !question.closed;
        let question = self.round.iter_mut().find(waiting).ok_or(AnswerError::Foreign)?;
        let sent = question.sent.ok_or(AnswerError::Foreign)?;
        let result = read_answer(bytes, question.nonce, sent, now, wall);
        match result {
            Err(AnswerError::Foreign) => {}
            Err(AnswerError::KissOfDeath) => {
                question.closed = true;
                self.unwanted.push(server);
            }
            Err(_) => question.closed = true,
            Ok(answer) => {
                question.closed = true;
                question.answer = Some(answer);
            }
        }
        result.map(|_| ())
    }

    /// Returns what to do with the clock once a round is over.
    pub fn poll_correction(&mut self, now: Duration) -> Option<Correction> {
        let ends = self.round_ends?;
        let is_over = ends <= now || self.round.iter().all(|question| question.closed);
        if !is_over {
            return None;
        }
        self.round_ends = None;
        let chosen = choose(&self.round);
        self.round.clear();
        let Some(sample) = chosen else {
            self.next_round = now + self.pause;
            self.pause = (self.pause * 2).min(RETRY_MAX);
            if self.servers.iter().all(|server| self.unwanted.contains(server)) {
                // Nobody wants to be asked; that may change, but not soon.
                self.unwanted.clear();
                self.next_round = now + POLL_MAX;
            }
            return None;
        };
        self.last = Some(sample);
        let is_far = sample.offset.abs() >= STEP_MIN.as_secs_f64();
        let correction = if !self.synced || (is_far && self.far_off) {
            self.pause = POLL_FIRST;
            self.far_off = false;
            Some(Correction::Step(sample.offset))
        } else if is_far {
            // Once may be a mistake on the way.
            self.far_off = true;
            self.pause = RETRY_FIRST;
            None
        } else {
            self.far_off = false;
            self.pause = (self.pause * 2).clamp(POLL_FIRST, POLL_MAX);
            Some(Correction::Slew(sample.offset))
        };
        self.synced = true;
        self.next_round = now + self.pause;
        correction
    }

    /// Returns when something is due.
    pub fn poll_timeout(&self) -> Option<Duration> {
        if self.servers.is_empty() {
            return None;
        }
        Some(self.round_ends.unwrap_or(self.next_round))
    }
}

fn read_answer(
    bytes: &[u8],
    nonce: u64,
    sent: Duration,
    now: Duration,
    wall: Duration,
) -> Result<Answer, AnswerError> {
    let bytes = bytes.first_chunk::<MESSAGE_LEN>().ok_or(AnswerError::Foreign)?;
    let word = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().expect("48 bytes"));
    let short = |at: usize| {
        let value = u32::from_be_bytes(*bytes[at..].first_chunk().expect("48 bytes"));
        f64::from(value) / 65_536.0
    };
    let (leap, version, mode) = (bytes[0] >> 6, bytes[0] >> 3 & 7, bytes[0] & 7);
    if word(24) != nonce || mode != 4 || !(3..=4).contains(&version) {
        return Err(AnswerError::Foreign);
    }
    let stratum = bytes[1];
    if stratum == 0 {
        return Err(AnswerError::KissOfDeath);
    }
    let (received, transmitted) = (word(32), word(40));
    if leap == 3 || stratum > 15 || received == 0 || transmitted == 0 {
        return Err(AnswerError::Unsynchronised);
    }
    let (root_delay, root_dispersion) = (short(4), short(8));
    let elapsed = now.saturating_sub(sent).as_secs_f64();
    let at_server = seconds_between(received, transmitted);
    let delay = elapsed - at_server;
    let limit = ERROR_MAX.as_secs_f64();
    if at_server < 0.0 || delay < -0.01 || root_delay > limit || root_dispersion > limit {
        return Err(AnswerError::Inaccurate);
    }
    let delay = delay.max(0.0);
    // The server sent its answer half the way ago.
    let own = timestamp(wall);
    let offset = seconds_between(own, transmitted) + delay / 2.0;
    Ok(Answer { offset, delay, error: delay / 2.0 + root_delay / 2.0 + root_dispersion + 0.001 })
}

/// The clock in the protocol's format: 32 bits of seconds since 1900 (which wrap), 32 of fraction.
pub fn timestamp(wall: Duration) -> u64 {
    let seconds = wall.as_secs().wrapping_add(EPOCH) & 0xffff_ffff;
    let fraction = (u64::from(wall.subsec_nanos()) << 32) / 1_000_000_000;
    seconds << 32 | fraction
}

/// Seconds from `earlier` to `later`, right while they are less than 68 years apart.
fn seconds_between(earlier: u64, later: u64) -> f64 {
    later.wrapping_sub(earlier).cast_signed() as f64 / 4_294_967_296.0
}

fn choose(round: &[Question]) -> Option<Sample> {
    let answers: Vec<(IpAddr, Answer)> =
        round.iter().filter_map(|question| Some((question.server, question.answer?))).collect();
    let agreeing = |one: &Answer| {
        let meets = |other: &Answer| (one.offset - other.offset).abs() <= one.error + other.error;
        answers.iter().filter(|(_, other)| meets(other)).count()
    };
    let most = answers.iter().map(|(_, answer)| agreeing(answer)).max()?;
    let best = answers
        .iter()
        .filter(|(_, answer)| agreeing(answer) == most)
        .min_by(|(_, one), (_, other)| one.delay.total_cmp(&other.delay))?;
    Some(Sample { server: best.0, offset: best.1.offset, delay: best.1.delay })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-01-01.
    const TRUE_TIME: Duration = Duration::from_secs(1_767_225_600);

    fn ip(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    fn reply(question: &[u8; MESSAGE_LEN], time: Duration) -> [u8; MESSAGE_LEN] {
        let mut bytes = [0; MESSAGE_LEN];
        bytes[0] = 4 << 3 | 4;
        bytes[1] = 2;
        bytes[24..32].copy_from_slice(&question[40..48]);
        bytes[32..40].copy_from_slice(&timestamp(time).to_be_bytes());
        bytes[40..48].copy_from_slice(&timestamp(time).to_be_bytes());
        bytes
    }

    /// A round in which the clock shows `wall` and server `n` the time `times[n]`; answers take 20 ms,
    /// 30 ms, ….
    fn round(
        client: &mut Client,
        wall: Duration,
        times: &[Option<Duration>],
    ) -> Option<Correction> {
        let start = client.poll_timeout().expect("it has servers");
        let mut questions = Vec::new();
        let mut random = 40;
        while let Some(question) = client.poll_transmit(start, || random) {
            questions.push(question);
            random += 2;
        }
        for (at, (server, question)) in questions.iter().enumerate() {
            let Some(time) = times.get(at).copied().flatten() else { continue };
            let way = Duration::from_millis(20 + 10 * at as u64);
            let answer = reply(question, time + way / 2);
            client
                .handle_answer(start + way, wall + way, *server, &answer)
                .expect("it is a good answer");
        }
        client.poll_correction(start + ROUND_WAIT)
    }

    fn seconds(correction: Option<Correction>) -> f64 {
        match correction {
            Some(Correction::Step(seconds) | Correction::Slew(seconds)) => seconds,
            None => panic!("no correction"),
        }
    }

    #[test]
    fn a_clock_at_1970_is_set_at_once_and_then_turned() {
        let mut client = Client::default();
        client.set_servers(Duration::ZERO, &[ip(1)]);
        let wall = Duration::from_secs(5);
        let first = round(&mut client, wall, &[Some(TRUE_TIME)]);
        assert!(matches!(first, Some(Correction::Step(_))), "{first:?}");
        assert!((seconds(first) - (TRUE_TIME - wall).as_secs_f64()).abs() < 0.001);
        assert!(client.is_synced());
        let late = Some(TRUE_TIME + Duration::from_millis(100));
        let next = round(&mut client, TRUE_TIME, &[late]);
        assert!(matches!(next, Some(Correction::Slew(_))), "{next:?}");
        assert!((seconds(next) - 0.1).abs() < 0.001);
        // A jump needs two rounds that say so.
        let far = Some(TRUE_TIME + Duration::from_secs(9));
        assert_eq!(round(&mut client, TRUE_TIME, &[far]), None);
        assert!(matches!(round(&mut client, TRUE_TIME, &[far]), Some(Correction::Step(_))));
    }

    #[test]
    fn one_false_clock_of_three_is_outvoted() {
        let mut client = Client::default();
        client.set_servers(Duration::ZERO, &[ip(1), ip(2), ip(3)]);
        let wrong = Some(TRUE_TIME + Duration::from_secs(3600));
        let right = Some(TRUE_TIME + Duration::from_secs(2));
        let correction = round(&mut client, TRUE_TIME, &[wrong, right, right]);
        assert!((seconds(correction) - 2.0).abs() < 0.01);
        assert_eq!(client.last().map(|sample| sample.server), Some(ip(2)));
    }

    #[test]
    fn silence_is_asked_again_with_growing_pauses() {
        let mut client = Client::default();
        client.set_servers(Duration::ZERO, &[ip(1)]);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let start = client.poll_timeout().expect("it has servers");
            assert_eq!(round(&mut client, TRUE_TIME, &[None]), None);
            let next = client.poll_timeout().expect("it goes on");
            pauses.push((next - start - ROUND_WAIT).as_secs());
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 64, 64, 64]);
        assert!(!client.is_synced());
    }

    #[test]
    fn answers_that_fail_the_checks_do_not_count() {
        let check = |change: &dyn Fn(&mut [u8; MESSAGE_LEN])| {
            let mut client = Client::default();
            client.set_servers(Duration::ZERO, &[ip(1)]);
            let (_, question) = client.poll_transmit(Duration::ZERO, || 77).expect("a question");
            let mut answer = reply(&question, TRUE_TIME);
            change(&mut answer);
            let way = Duration::from_millis(10);
            client.handle_answer(way, TRUE_TIME, ip(1), &answer)
        };
        assert_eq!(check(&|_| ()), Ok(()));
        assert_eq!(check(&|answer| answer[31] ^= 1), Err(AnswerError::Foreign));
        assert_eq!(check(&|answer| answer[0] = 4 << 3 | 3), Err(AnswerError::Foreign));
        assert_eq!(check(&|answer| answer[1] = 0), Err(AnswerError::KissOfDeath));
        assert_eq!(check(&|answer| answer[1] = 16), Err(AnswerError::Unsynchronised));
        assert_eq!(check(&|answer| answer[0] |= 0xc0), Err(AnswerError::Unsynchronised));
        assert_eq!(check(&|answer| answer[40..48].fill(0)), Err(AnswerError::Unsynchronised));
        assert_eq!(check(&|answer| answer[9] = 2), Err(AnswerError::Inaccurate));
        // Sent before it was received.
        assert_eq!(check(&|answer| answer[35] ^= 1), Err(AnswerError::Inaccurate));
        let mut client = Client::default();
        assert_eq!(
            client.handle_answer(Duration::ZERO, TRUE_TIME, ip(9), &[0; 48]),
            Err(AnswerError::Foreign)
        );
    }

    #[test]
    fn a_server_that_does_not_want_to_is_left_alone() {
        let mut client = Client::default();
        client.set_servers(Duration::ZERO, &[ip(1), ip(2)]);
        let (server, question) = client.poll_transmit(Duration::ZERO, || 1).expect("a question");
        let mut answer = reply(&question, TRUE_TIME);
        answer[1] = 0;
        client.handle_answer(Duration::ZERO, TRUE_TIME, server, &answer).expect_err("a kiss");
        while client.poll_transmit(Duration::ZERO, || 3).is_some() {}
        assert_eq!(client.poll_correction(ROUND_WAIT), None);
        let next = client.poll_timeout().expect("it goes on");
        assert_eq!(client.poll_transmit(next, || 5).map(|(server, _)| server), Some(ip(2)));
        assert_eq!(client.poll_transmit(next, || 5), None);
    }

    #[test]
    fn times_after_2036_are_right() {
        let late = Duration::from_secs(2_200_000_000); // 2039
        let now = Duration::from_secs(2_085_000_000); // 2036, before the counter wraps
        assert_eq!(seconds_between(timestamp(now), timestamp(late)), 115_000_000.0);
    }
}
