//! Fuzzing of everything that reads what a peer sends.
//!
//! A [`Target`] is a function of bytes that must return, whatever the bytes are: it panics when a promise is broken.
//! [`campaign`] feeds it with inputs made from a corpus by a seeded [`mutate::Mutator`]; the recorded session in
//! `protocol/golden` is the corpus, together with what our own encoders make of it. Targets that take a whole
//! conversation ([`conversations`]) read their input as a list of small choices, so that a mutation changes the
//! order of events and not only their text.
//!
//! There is no coverage to follow, on purpose: this runs on the stable toolchain, in `cargo test`, in a few seconds.
//! `cargo xtask fuzz` runs the same for longer. The same seed makes the same inputs.

mod conversations;
mod corpus;
mod mutate;
mod wire;

use mutate::Mutator;
use std::cell::RefCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::{Duration, Instant};

/// Longest input that is made by mutation.
pub const INPUT_LEN_MAX: usize = 64 * 1024;
/// An input that takes longer than this has found something that does not scale; unoptimised code on a busy machine
/// needs a hundredth of it.
pub const CASE_TIME_MAX: Duration = Duration::from_secs(20);

/// Something that takes bytes of a peer.
pub struct Target {
    /// How it is called on the command line.
    pub name: &'static str,
    /// Runs one input; panics when a promise is broken.
    pub run: fn(&[u8]),
    corpus: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "message", run: wire::message, corpus: corpus::messages },
    Target { name: "websocket", run: wire::websocket, corpus: corpus::websocket },
    Target { name: "handshake", run: wire::handshake, corpus: corpus::handshakes },
    Target { name: "frame", run: wire::frame, corpus: corpus::frames },
    Target { name: "batch", run: wire::batch, corpus: corpus::batches },
    Target { name: "hello", run: wire::hello, corpus: corpus::hellos },
    Target { name: "tunnel", run: wire::tunnel, corpus: corpus::tunnel },
    Target { name: "resource", run: wire::resource, corpus: corpus::resources },
    Target { name: "capabilities", run: wire::capabilities, corpus: corpus::capabilities },
    Target { name: "contents", run: wire::contents, corpus: corpus::contents },
    Target { name: "token", run: wire::token, corpus: corpus::tokens },
    Target { name: "upstream", run: wire::upstream, corpus: corpus::contents },
    Target { name: "edge", run: conversations::edge, corpus: corpus::choices },
    Target { name: "hub", run: conversations::hub, corpus: corpus::choices },
];

/// An input that broke a promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Name of the target.
    pub target: &'static str,
    /// The input.
    pub input: Vec<u8>,
    /// What the panic said.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, input, what } = self;
        let hex = to_hex(input);
        write!(f, "{target}: {what}; replay with `cargo xtask fuzz {target} --input {hex}`")
    }
}

impl std::error::Error for Failure {}

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

impl Target {
    /// Runs one input.
    ///
    /// # Errors
    ///
    /// [`Failure`], when it panicked or took more than [`CASE_TIME_MAX`].
    pub fn check(&'static self, input: &[u8]) -> Result<(), Failure> {
        let fail = |what| Err(Failure { target: self.name, input: input.to_vec(), what });
        let start = Instant::now();
        hear_panics();
        IS_FUZZING.set(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.run)(input)));
        IS_FUZZING.set(false);
        match outcome {
            Err(_) => fail(LAST_PANIC.take()),
            Ok(()) if start.elapsed() > CASE_TIME_MAX => fail("took too long".into()),
            Ok(()) => Ok(()),
        }
    }

    /// Runs the corpus, then at most `cases` mutated inputs, and no longer than `time`. Returns how many inputs ran.
    ///
    /// # Errors
    ///
    /// [`Failure`], the first input that broke a promise.
    pub fn campaign(&'static self, seed: u64, cases: u64, time: Duration) -> Result<u64, Failure> {
        let start = Instant::now();
        let corpus = (self.corpus)();
        for input in &corpus {
            self.check(input)?;
        }
        let mut done = corpus.len() as u64;
        let mut mutator = Mutator::new(seed, corpus);
        for _ in 0..cases {
            if start.elapsed() > time {
                break;
            }
            self.check(&mutator.next_input())?;
            done += 1;
        }
        Ok(done)
    }
}

/// Bytes as text.
pub fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes of [`to_hex`]; `None` when it is no such text.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.chunks(2).map(byte).collect()
}

thread_local! {
    static IS_FUZZING: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps the words of panics in a target, which are told with the input, and lets all others through.
fn hear_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| match IS_FUZZING.get() {
            true => LAST_PANIC.set(info.to_string().replace('\n', " ")),
            false => others(info),
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trips(bytes: &[u8]) {
        assert!(!bytes.windows(2).any(|pair| pair == b"{}"), "an empty object");
    }

    static TRIPS: Target =
        Target { name: "trips", run: trips, corpus: || vec![br#"{"a":{"b":1}}"#.to_vec()] };

    #[test]
    fn a_broken_promise_is_found_told_and_replayed() {
        let failure = TRIPS.campaign(1, 100_000, Duration::from_secs(60)).expect_err("it trips");
        assert!(failure.what.contains("an empty object"), "{failure}");
        let hex = to_hex(&failure.input);
        assert!(failure.to_string().ends_with(&format!("fuzz trips --input {hex}`")));
        let again = from_hex(&hex).expect("our own text");
        assert_eq!(TRIPS.check(&again).expect_err("it trips again").input, failure.input);
    }

    #[test]
    fn hex_that_is_none_is_refused() {
        for text in ["a", "zz", "+1", "0g"] {
            assert_eq!(from_hex(text), None, "{text}");
        }
    }
}
