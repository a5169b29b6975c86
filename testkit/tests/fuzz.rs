//! A short campaign against every parser and both conversations; `cargo xtask fuzz` runs longer ones.

use skerry_testkit::fuzz::{TARGETS, from_hex, target};
use std::time::Duration;

/// Inputs per target and run.
const CASES: u64 = 2000;
/// Time per target, whatever the machine.
const TIME: Duration = Duration::from_secs(2);
const SEED: u64 = 1;

#[test]
fn no_peer_breaks_a_promise_of_a_parser_or_a_conversation() {
    for target in TARGETS {
        match target.campaign(SEED, CASES, TIME) {
            Ok(cases) => println!("{}: {cases} inputs", target.name),
            Err(failure) => panic!("{failure}"),
        }
    }
}

/// Inputs that once broke a promise.
#[test]
fn what_was_found_stays_mended() {
    let found = [
        // Registration of a Node that is a text: an index into it panicked.
        ("upstream", "2270696e6722"),
        ("upstream", "7b226d65746164617461223a5b5d7d"),
    ];
    for (name, hex) in found {
        let target = target(name).expect("a target");
        let input = from_hex(hex).expect("hex");
        if let Err(failure) = target.check(&input) {
            panic!("{failure}");
        }
    }
}
