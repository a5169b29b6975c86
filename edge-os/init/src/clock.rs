//! The wall clock before anybody can be asked: TLS needs a time that is not before the certificates.
//!
//! The latest of three wins: the hardware clock, the time that the image was built at, the time that was last kept in
//! the state. The network sets it right later. Called by the second stage; [`choose`] is pure.

use crate::kernel::{Kernel, line};
use serde::{Deserialize, Serialize};
use std::io;
use std::time::Duration;

/// Where the last known time is kept, Unix seconds.
pub const KEPT: &str = "/state/boot/time";
/// How often it is kept while the machine runs.
pub const KEEP_INTERVAL: Duration = Duration::from_secs(3600);
/// A hardware clock this far ahead of all that is known is not believed: 20 years.
const AHEAD_MAX_S: i64 = 20 * 365 * 86_400;

/// Where the time came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The hardware clock.
    Rtc,
    /// The build of the image; the hardware clock is older or not there.
    Image,
    /// What was kept in the state.
    Kept,
}

/// The time to go on with.
pub fn choose(rtc: Option<i64>, image: i64, kept: Option<i64>) -> (i64, Source) {
    let floor = kept.unwrap_or(0).max(image);
    match rtc {
        Some(rtc) if rtc >= floor && rtc - floor <= AHEAD_MAX_S => (rtc, Source::Rtc),
        _ if kept.is_some_and(|kept| kept > image) => (floor, Source::Kept),
        _ => (floor, Source::Image),
    }
}

/// Sets the clock; `image` is the time of the image's build. A small difference to the hardware clock stays: the kernel
/// has read it to the fraction of a second.
///
/// # Errors
///
/// What the kernel says to a change of the time.
pub fn set(kernel: &dyn Kernel, image: i64) -> io::Result<(i64, Source)> {
    const SMALL_S: i64 = 2;
    let kept = line(kernel, KEPT).parse().ok();
    let (time, source) = choose(kernel.rtc().ok(), image, kept);
    if (kernel.wall() - time).abs() > SMALL_S {
        kernel.set_wall(time)?;
    }
    Ok((time, source))
}

/// Keeps the time for the next boot, unless it is older than what is kept.
pub fn keep(kernel: &dyn Kernel) {
    let now = kernel.wall();
    let kept: i64 = line(kernel, KEPT).parse().unwrap_or(0);
    if now > kept {
        // On a state that is full or read-only there is nothing to be done about it.
        let _ = kernel.write(KEPT, format!("{now}\n").as_bytes(), 0o600);
    }
}

/// Unix seconds of a date in UTC; months and days from 1.
pub fn unix_s(year: i64, month: i64, day: i64, hour: i64, minute: i64, second: i64) -> i64 {
    // Days of the civil calendar, with years that begin in March.
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = era * 146_097 + day_of_era - 719_468;
    days * 86_400 + hour * 3600 + minute * 60 + second
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Machine;

    #[test]
    fn dates_are_counted_from_1970() {
        assert_eq!(unix_s(1970, 1, 1, 0, 0, 0), 0);
        assert_eq!(unix_s(2000, 2, 29, 12, 0, 1), 951_825_601);
        assert_eq!(unix_s(2038, 1, 19, 3, 14, 7), i64::from(i32::MAX));
    }

    #[test]
    fn latest_time_that_is_known_wins_and_a_wild_hardware_clock_is_not_believed() {
        let image = unix_s(2026, 1, 1, 0, 0, 0);
        assert_eq!(choose(Some(image + 5), image, None), (image + 5, Source::Rtc));
        assert_eq!(choose(Some(0), image, None), (image, Source::Image));
        assert_eq!(choose(None, image, Some(image + 9)), (image + 9, Source::Kept));
        assert_eq!(choose(Some(image + 3), image, Some(image + 9)), (image + 9, Source::Kept));
        assert_eq!(choose(None, image, Some(3)), (image, Source::Image));
        let wild = unix_s(2099, 1, 1, 0, 0, 0);
        assert_eq!(choose(Some(wild), image, None), (image, Source::Image));
    }

    #[test]
    fn clock_at_1970_is_set_to_the_image_and_kept_forwards_only() {
        let machine = Machine::new();
        machine.set_time(0, Some(0));
        assert_eq!(set(&machine, 1_700_000_000).expect("set"), (1_700_000_000, Source::Image));
        assert_eq!(machine.wall(), 1_700_000_000);
        keep(&machine);
        machine.set_time(5, None);
        keep(&machine);
        assert_eq!(machine.text(KEPT).as_deref(), Some("1700000000\n"));
        machine.set_time(1_700_000_001, Some(1_700_000_001));
        machine.clear_log();
        set(&machine, 1_600_000_000).expect("fine");
        assert!(machine.log_of("set_wall").is_empty(), "a good clock is left alone");
    }
}
