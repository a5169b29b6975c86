//! Many worlds, and worlds in which one end does something wrong, which must not stay unnoticed.

use skerry_testkit::sim::{self, Sabotage};
use std::sync::atomic::{AtomicU64, Ordering};

/// Worlds of one run; `cargo xtask sim --seeds 10000` runs more.
const SEEDS: u64 = 1000;
/// Worlds in which a sabotage has to be found.
const SABOTAGED_SEEDS: u64 = 300;

/// Runs `seeds` worlds on all processors; returns the first that breaks a promise, in the order of finding.
fn first_violation(
    seeds: u64,
    run: impl Fn(u64) -> Result<sim::Summary, sim::Violation> + Sync,
) -> Option<(u64, sim::Violation)> {
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                return None;
            }
            if let Err(violation) = run(seed) {
                next.store(seeds, Ordering::Relaxed);
                return Some((seed, violation));
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().find_map(|worker| worker.join().expect("a world does not panic"))
    })
}

#[test]
fn every_promise_holds_in_a_thousand_worlds() {
    if let Some((seed, violation)) = first_violation(SEEDS, sim::run) {
        panic!("seed {seed}: {violation}; replay with `cargo xtask sim --seed {seed}`");
    }
}

#[test]
fn the_same_seed_is_the_same_world() {
    assert_eq!(sim::run(7), sim::run(7));
}

fn is_found(sabotage: Sabotage) {
    let found = first_violation(SABOTAGED_SEEDS, |seed| sim::run_sabotaged(seed, sabotage));
    let (seed, violation) = found.unwrap_or_else(|| panic!("{sabotage:?} stays unnoticed"));
    println!("{sabotage:?}: seed {seed}: {violation}");
}

#[test]
fn an_agent_that_acknowledges_before_it_writes_is_found() {
    is_found(Sabotage::AcksBeforeItWrites);
}

#[test]
fn an_agent_that_forgets_what_was_deleted_is_found() {
    is_found(Sabotage::KeepsNoTombstones);
}

#[test]
fn an_agent_that_forgets_what_it_owes_is_found() {
    is_found(Sabotage::KeepsNoOutbox);
}

#[test]
fn an_agent_that_believes_in_no_restored_cluster_is_found() {
    is_found(Sabotage::DisputesNothing);
}

#[test]
fn a_hub_that_loses_deletes_is_found() {
    is_found(Sabotage::LosesDeletes);
}

#[test]
fn a_hub_that_asks_its_cache_where_it_should_ask_the_api_is_found() {
    is_found(Sabotage::ReadsFromItsCache);
}
