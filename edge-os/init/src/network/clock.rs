//! The system's clock: reading it, setting it, turning it slowly.
//!
//! After a correction the kernel is told that the clock is right, so that it also writes the
//! battery's clock from time to time (where it has a driver for one).

#![allow(unsafe_code)]

use nix::libc;
use std::io;
use std::time::{Duration, SystemTime};

/// Bounds of one slow correction; the kernel turns by 0.5 ms a second.
const SLEW_MAX_US: f64 = 500_000.0;

/// What the service does to the clock.
pub trait Clock {
    /// Time since 1970.
    fn now(&self) -> Duration;
    /// Adds `seconds` at once.
    fn step(&mut self, seconds: f64) -> io::Result<()>;
    /// Adds `seconds` little by little.
    fn slew(&mut self, seconds: f64) -> io::Result<()>;
}

/// The clock of this machine.
#[derive(Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }

    fn step(&mut self, seconds: f64) -> io::Result<()> {
        let now = self.now();
        let change = Duration::try_from_secs_f64(seconds.abs())
            .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let target = if seconds < 0.0 { now.checked_sub(change) } else { now.checked_add(change) };
        let target = target.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let time = libc::timespec {
            tv_sec: libc::time_t::try_from(target.as_secs())
                .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
            tv_nsec: target.subsec_nanos().into(),
        };
        // SAFETY: `time` is a valid timespec that outlives the call.
        if unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) } != 0 {
            return Err(io::Error::last_os_error());
        }
        mark_good()
    }

    fn slew(&mut self, seconds: f64) -> io::Result<()> {
        let mut change = empty();
        change.modes = libc::ADJ_OFFSET_SINGLESHOT;
        change.offset = (seconds * 1e6).clamp(-SLEW_MAX_US, SLEW_MAX_US) as libc::c_long;
        adjust(&mut change)?;
        mark_good()
    }
}

fn mark_good() -> io::Result<()> {
    let mut state = empty();
    adjust(&mut state)?;
    let mut change = empty();
    change.modes = libc::ADJ_STATUS | libc::ADJ_MAXERROR | libc::ADJ_ESTERROR;
    change.status = state.status & !libc::STA_UNSYNC;
    adjust(&mut change)
}

fn empty() -> libc::timex {
    // SAFETY: `timex` is made of integers, and all bits zero is a value of each.
    unsafe { std::mem::zeroed() }
}

fn adjust(change: &mut libc::timex) -> io::Result<()> {
    // SAFETY: `change` is a valid timex that outlives the call.
    if unsafe { libc::adjtimex(change) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_steps_are_refused() {
        for seconds in [f64::NAN, f64::INFINITY, -1e12] {
            assert!(SystemClock.step(seconds).is_err(), "{seconds}");
        }
        assert!(SystemClock.now() > Duration::ZERO);
    }
}
