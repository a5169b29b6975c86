//! Which transport: QUIC and WebSocket are dialled side by side, and what became of it is remembered.
//!
//! QUIC gets a head start, because it is the better one where UDP passes; where it did not pass the last time, both
//! begin at once, so that nobody waits for it. A link over WebSocket looks for QUIC again now and then, less often
//! each time.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

/// How much earlier QUIC begins.
pub(super) const HEAD_START: Duration = Duration::from_millis(250);
/// First time after which a link over WebSocket tries QUIC again.
pub(super) const RETRY_MIN: Duration = Duration::from_secs(10 * 60);
/// Longest time between two such tries.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(6 * 3600);

/// What is remembered about QUIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    failed: bool,
    retry: Duration,
}

impl Memory {
    /// Nothing is known: as after the start, and after a change of the network.
    pub(super) fn new(retry: Duration) -> Self {
        Self { failed: false, retry }
    }

    /// How much earlier QUIC begins this time.
    pub(super) fn head_start(&self) -> Duration {
        if self.failed { Duration::ZERO } else { HEAD_START }
    }

    /// QUIC is up.
    pub(super) fn handle_success(&mut self, retry: Duration) {
        *self = Self::new(retry);
    }

    /// QUIC was slower than WebSocket, or did not get through.
    pub(super) fn handle_failure(&mut self) {
        self.failed = true;
    }

    /// Time until a link over WebSocket tries QUIC; the next time is twice as long.
    pub(super) fn next_retry(&mut self) -> Duration {
        let retry = self.retry;
        self.retry = retry.saturating_mul(2).min(RETRY_MAX);
        retry
    }
}

/// Who was up first.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Won<Q, W> {
    Quic(Q),
    WebSocket(W),
}

/// Runs both, QUIC `head_start` earlier, until one of them is up; the other is given up. WebSocket begins at once when
/// QUIC has failed before.
///
/// # Errors
///
/// When both failed: QUIC's error, then WebSocket's.
pub(super) async fn race<Q, W, E>(
    quic: impl Future<Output = Result<Q, E>>,
    head_start: Duration,
    websocket: impl Future<Output = Result<W, E>>,
) -> Result<Won<Q, W>, (E, E)> {
    let (mut quic, mut websocket) = (pin!(quic), pin!(websocket));
    let mut wait = pin!(tokio::time::sleep(head_start));
    let mut begun = head_start.is_zero();
    let (mut quic_error, mut websocket_error) = (None, None);
    loop {
        if quic_error.is_some()
            && let Some(error) = websocket_error.take()
        {
            return Err((quic_error.take().expect("looked at just now"), error));
        }
        tokio::select! {
            biased;
            result = &mut quic, if quic_error.is_none() => match result {
                Ok(quic) => return Ok(Won::Quic(quic)),
                Err(error) => {
                    quic_error = Some(error);
                    begun = true;
                }
            },
            result = &mut websocket, if begun && websocket_error.is_none() => match result {
                Ok(websocket) => return Ok(Won::WebSocket(websocket)),
                Err(error) => websocket_error = Some(error),
            },
            () = &mut wait, if !begun => begun = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};
    use tokio::time::{Instant, sleep};

    type Outcome = Result<&'static str, &'static str>;

    const LONG: Duration = Duration::from_secs(3600);

    async fn later(outcome: Outcome) -> Outcome {
        sleep(Duration::from_millis(20)).await;
        outcome
    }

    #[tokio::test]
    async fn first_that_is_up_is_kept_and_quic_has_a_head_start() {
        let won = race(later(Ok("q")), LONG, ready(Outcome::Ok("w"))).await;
        assert_eq!(won, Ok(Won::Quic("q")));
        let start = Instant::now();
        let won = race(pending::<Outcome>(), HEAD_START, ready(Outcome::Ok("w"))).await;
        assert_eq!(won, Ok(Won::WebSocket("w")));
        assert!(start.elapsed() >= HEAD_START);
        let won = race(pending::<Outcome>(), Duration::ZERO, later(Ok("w"))).await;
        assert_eq!(won, Ok(Won::WebSocket("w")));
    }

    #[tokio::test]
    async fn failure_of_one_makes_way_for_the_other() {
        let won = race(ready(Outcome::Err("q")), LONG, later(Ok("w"))).await;
        assert_eq!(won, Ok(Won::WebSocket("w")));
        let won = race(later(Ok("q")), Duration::ZERO, ready(Outcome::Err("w"))).await;
        assert_eq!(won, Ok(Won::Quic("q")));
        let won = race(later(Err("q")), Duration::ZERO, ready(Outcome::Err("w"))).await;
        assert_eq!(won, Err(("q", "w")));
        let won = race(ready(Outcome::Err("q")), LONG, later(Err("w"))).await;
        assert_eq!(won, Err(("q", "w")));
    }

    #[test]
    fn quic_is_tried_again_less_and_less_often_until_it_is_up() {
        let mut memory = Memory::new(RETRY_MIN);
        assert_eq!(memory.head_start(), HEAD_START);
        memory.handle_failure();
        assert_eq!(memory.head_start(), Duration::ZERO, "nobody waits for what failed last time");
        let minutes: Vec<_> = (0..8).map(|_| memory.next_retry().as_secs() / 60).collect();
        assert_eq!(minutes, [10, 20, 40, 80, 160, 320, 360, 360]);
        memory.handle_success(RETRY_MIN);
        assert_eq!(memory, Memory::new(RETRY_MIN));
    }
}
