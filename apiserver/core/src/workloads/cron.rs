//! Cron schedules: parsing of the five fields and the search for times, in UTC.
//!
//! Source: crontab(5) and the CronJob documentation: names of months and days, lists, ranges, steps, `@hourly` and its
//! kin, `@every DURATION`; when both day fields are restricted, either may match; 7 is Sunday too.

use jiff::Timestamp;
use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;

/// A parsed schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule(Rule);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Rule {
    Fields {
        minutes: u64,
        hours: u64,
        days: u64,
        months: u64,
        weekdays: u64,
        /// Both day fields are restricted: one match is enough.
        either_day: bool,
    },
    /// Every so many seconds, counted from the given start.
    Every(i64),
}

/// Why a schedule cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CronError {
    /// Not five fields.
    #[error("expected 5 fields, found {0}")]
    Fields(usize),
    /// A field that is no number, name, range or step.
    #[error("cannot read `{field}` as {what}")]
    Field {
        /// The field as written.
        field: String,
        /// `minute`, `hour`, ….
        what: &'static str,
    },
    /// An `@` word that is unknown.
    #[error("unknown schedule `{0}`")]
    Word(String),
    /// A duration after `@every` that cannot be read.
    #[error("cannot read `{0}` as a duration such as `1h30m`")]
    Every(String),
    /// A time zone inside the schedule.
    #[error("a time zone inside a schedule is not supported, use `spec.timeZone`")]
    TimeZone,
}

const MONTHS: [&str; 12] =
    ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
/// Days searched for the next match: the 29th of February on a given weekday comes back within 40 years.
const SEARCH_DAYS: usize = 366 * 41;

impl Schedule {
    /// Parses a schedule.
    ///
    /// # Errors
    ///
    /// [`CronError`] naming the field.
    pub fn parse(text: &str) -> Result<Self, CronError> {
        let text = text.trim();
        if text.starts_with("TZ=") || text.starts_with("CRON_TZ=") {
            return Err(CronError::TimeZone);
        }
        if let Some(duration) = text.strip_prefix("@every ") {
            let seconds = every_seconds(duration.trim())
                .ok_or_else(|| CronError::Every(duration.trim().to_owned()))?;
            return Ok(Self(Rule::Every(seconds)));
        }
        let text = match text {
            "@yearly" | "@annually" => "0 0 1 1 *",
            "@monthly" => "0 0 1 * *",
            "@weekly" => "0 0 * * 0",
            "@daily" | "@midnight" => "0 0 * * *",
            "@hourly" => "0 * * * *",
            word if word.starts_with('@') => return Err(CronError::Word(word.to_owned())),
            fields => fields,
        };
        let fields: Vec<&str> = text.split_whitespace().collect();
        let &[minute, hour, day, month, weekday] = fields.as_slice() else {
            return Err(CronError::Fields(fields.len()));
        };
        let mut weekdays = parse_field(weekday, "day of week", 0, 7, &WEEKDAYS, 0)?;
        if weekdays & (1 << 7) != 0 {
            weekdays = (weekdays | 1) & !(1 << 7);
        }
        let restricted = |field: &str| !field.starts_with(['*', '?']);
        Ok(Self(Rule::Fields {
            minutes: parse_field(minute, "minute", 0, 59, &[], 0)?,
            hours: parse_field(hour, "hour", 0, 23, &[], 0)?,
            days: parse_field(day, "day of month", 1, 31, &[], 0)?,
            months: parse_field(month, "month", 1, 12, &MONTHS, 1)?,
            weekdays,
            either_day: restricted(day) && restricted(weekday),
        }))
    }

    /// The first time after `after`; `None` for a schedule that never comes (30 February).
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        match self.0 {
            Rule::Every(seconds) => {
                Timestamp::from_second(after.as_second().checked_add(seconds)?).ok()
            }
            Rule::Fields { minutes, hours, .. } => {
                let start = Timestamp::from_second((after.as_second().div_euclid(60) + 1) * 60)
                    .ok()?
                    .to_zoned(TimeZone::UTC)
                    .datetime();
                let mut date = start.date();
                let mut from = (start.hour(), start.minute());
                for _ in 0..SEARCH_DAYS {
                    if self.on(date)
                        && let Some((hour, minute)) = first_at_or_after(hours, minutes, from)
                    {
                        let at = DateTime::from_parts(date, jiff::civil::time(hour, minute, 0, 0));
                        return at.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp());
                    }
                    date = date.tomorrow().ok()?;
                    from = (0, 0);
                }
                None
            }
        }
    }

    /// The last time after `after` and at or before `until`.
    ///
    /// Looks in growing windows back from `until`, so that a schedule of every minute that was missed for a year costs
    /// an hour's search.
    pub fn last(&self, after: Timestamp, until: Timestamp) -> Option<Timestamp> {
        if let Rule::Every(seconds) = self.0 {
            let steps = (until.as_second() - after.as_second()).div_euclid(seconds);
            return (steps > 0)
                .then(|| Timestamp::from_second(after.as_second() + steps * seconds).ok())
                .flatten();
        }
        for window in WINDOWS_SECONDS {
            let start = Timestamp::from_second(until.as_second().saturating_sub(window))
                .unwrap_or(Timestamp::MIN)
                .max(after);
            let mut found = None;
            let mut at = self.next(start);
            while let Some(time) = at.filter(|time| *time <= until) {
                found = Some(time);
                at = self.next(time);
            }
            if found.is_some() || start == after {
                return found;
            }
        }
        None
    }

    fn on(&self, date: Date) -> bool {
        let Rule::Fields { days, months, weekdays, either_day, .. } = self.0 else { return false };
        let has = |set: u64, bit: i8| set & (1u64 << bit) != 0;
        let day = has(days, date.day());
        let weekday = has(weekdays, date.weekday().to_sunday_zero_offset());
        has(months, date.month()) && if either_day { day || weekday } else { day && weekday }
    }
}

/// Hour, day, month, year, 40 years.
const WINDOWS_SECONDS: [i64; 5] = [3_600, 86_400, 31 * 86_400, 366 * 86_400, 41 * 366 * 86_400];

fn first_at_or_after(hours: u64, minutes: u64, (hour, minute): (i8, i8)) -> Option<(i8, i8)> {
    let lowest = |set: u64, from: i8| {
        let rest = set & (u64::MAX << from);
        (rest != 0).then(|| i8::try_from(rest.trailing_zeros()).unwrap_or(i8::MAX))
    };
    if hours & (1 << hour) != 0
        && let Some(minute) = lowest(minutes, minute)
    {
        return Some((hour, minute));
    }
    Some((lowest(hours, hour + 1)?, lowest(minutes, 0)?))
}

/// Parses one field into a set of bits. `offset` is the value of the first name.
fn parse_field(
    field: &str,
    what: &'static str,
    min: u32,
    max: u32,
    names: &[&str],
    offset: u32,
) -> Result<u64, CronError> {
    let error = || CronError::Field { field: field.to_owned(), what };
    let value = |text: &str| -> Result<u32, CronError> {
        let lower = text.to_ascii_lowercase();
        if let Some(index) = names.iter().position(|name| *name == lower) {
            return Ok(u32::try_from(index).unwrap_or(0) + offset);
        }
        // `+5` parses as a number, but is none in crontab(5).
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(error());
        }
        text.parse().ok().filter(|n| (min..=max).contains(n)).ok_or_else(error)
    };
    let mut set = 0u64;
    for part in field.split(',') {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => {
                let step = step.parse::<u32>().ok().filter(|step| (1..=max).contains(step));
                (range, Some(step.ok_or_else(error)?))
            }
            None => (part, None),
        };
        let (from, to) = match range.split_once('-') {
            Some((from, to)) => (value(from)?, value(to)?),
            None if range == "*" || range == "?" => (min, if max == 7 { 6 } else { max }),
            None => {
                let from = value(range)?;
                // `5/15` means from 5 to the end.
                (from, if step.is_some() { max } else { from })
            }
        };
        if from > to {
            return Err(error());
        }
        let step = usize::try_from(step.unwrap_or(1)).map_err(|_| error())?;
        for bit in (from..=to).step_by(step) {
            set |= 1 << bit;
        }
    }
    Ok(set)
}

/// Reads `1h30m`, `90s`; at least one second.
fn every_seconds(text: &str) -> Option<i64> {
    let mut total = 0i64;
    let mut digits = String::new();
    for c in text.chars() {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        let unit = match c {
            'h' => 3_600,
            'm' => 60,
            's' => 1,
            _ => return None,
        };
        total = total.checked_add(digits.parse::<i64>().ok()?.checked_mul(unit)?)?;
        digits.clear();
    }
    (digits.is_empty() && total > 0).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn time(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn check(schedule: &str, after: &str, expected: &str) {
        let next = Schedule::parse(schedule).expect("a schedule").next(time(after));
        assert_eq!(next, Some(time(expected)), "{schedule}");
    }

    #[test]
    fn the_next_time_follows_the_fields() {
        check("* * * * *", "2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z");
        check("* * * * *", "2026-01-01T00:00:59.5Z", "2026-01-01T00:01:00Z");
        check("*/15 * * * *", "2026-01-01T00:50:00Z", "2026-01-01T01:00:00Z");
        check("5/20 * * * *", "2026-01-01T00:26:00Z", "2026-01-01T00:45:00Z");
        check("0 9-17/4 * * *", "2026-01-01T13:00:00Z", "2026-01-01T17:00:00Z");
        check("30 2 1,15 * *", "2026-01-02T00:00:00Z", "2026-01-15T02:30:00Z");
        check("0 0 * * mon-FRI", "2026-01-02T00:00:00Z", "2026-01-05T00:00:00Z");
        check("0 0 * * 7", "2026-01-01T00:00:00Z", "2026-01-04T00:00:00Z");
        check("0 0 1 JAN *", "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z");
        check("0 0 29 2 *", "2026-01-01T00:00:00Z", "2028-02-29T00:00:00Z");
        check("@hourly", "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z");
        check("@weekly", "2026-01-01T00:00:00Z", "2026-01-04T00:00:00Z");
        check("@every 90s", "2026-01-01T00:00:00Z", "2026-01-01T00:01:30Z");
    }

    #[test]
    fn two_restricted_day_fields_are_alternatives() {
        check("0 0 13 * 5", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
        check("0 0 13 * 5", "2026-01-09T00:00:00Z", "2026-01-13T00:00:00Z");
        check("0 0 */2 * 5", "2026-01-01T00:00:00Z", "2026-01-09T00:00:00Z");
    }

    #[test]
    fn mistakes_name_the_field() {
        let error = |text| Schedule::parse(text).expect_err("a mistake").to_string();
        assert_eq!(error("* * * *"), "expected 5 fields, found 4");
        assert_eq!(error("60 * * * *"), "cannot read `60` as minute");
        assert_eq!(error("* 5-2 * * *"), "cannot read `5-2` as hour");
        assert_eq!(error("* * 0 * *"), "cannot read `0` as day of month");
        assert_eq!(error("* * * foo *"), "cannot read `foo` as month");
        assert_eq!(error("*/0 * * * *"), "cannot read `*/0` as minute");
        assert_eq!(error("@often"), "unknown schedule `@often`");
        assert_eq!(
            error("TZ=UTC * * * * *"),
            "a time zone inside a schedule is not supported, use `spec.timeZone`"
        );
    }

    #[test]
    fn a_day_that_never_comes_has_no_next_time() {
        let schedule = Schedule::parse("0 0 30 2 *").expect("a schedule");
        assert_eq!(schedule.next(time("2026-01-01T00:00:00Z")), None);
    }

    #[test]
    fn the_last_time_is_found_from_the_end() {
        let last = |schedule: &str, after, until| {
            Schedule::parse(schedule).expect("a schedule").last(time(after), time(until))
        };
        let (after, until) = ("2020-01-01T00:00:00Z", "2026-01-01T12:34:56Z");
        assert_eq!(last("* * * * *", after, until), Some(time("2026-01-01T12:34:00Z")));
        assert_eq!(last("@daily", after, until), Some(time("2026-01-01T00:00:00Z")));
        assert_eq!(last("0 0 29 2 *", after, until), Some(time("2024-02-29T00:00:00Z")));
        assert_eq!(last("@hourly", "2026-01-01T12:00:00Z", until), None);
        assert_eq!(
            last("@every 1h", "2026-01-01T10:30:00Z", until),
            Some(time("2026-01-01T12:30:00Z"))
        );
    }

    proptest! {
        #[test]
        fn the_next_time_is_the_first_matching_minute(
            minute in prop_oneof![Just("*".to_owned()), (0u32..60).prop_map(|n| n.to_string()), (1u32..30).prop_map(|n| format!("*/{n}"))],
            hour in prop_oneof![Just("*".to_owned()), (0u32..24).prop_map(|n| n.to_string())],
            day in prop_oneof![Just("*".to_owned()), (1u32..29).prop_map(|n| n.to_string())],
            start in 1_700_000_000i64..1_800_000_000,
        ) {
            let schedule = Schedule::parse(&format!("{minute} {hour} {day} * *")).expect("a schedule");
            let after = Timestamp::from_second(start).expect("a time");
            let next = schedule.next(after).expect("it comes every month");
            prop_assert!(next > after);
            prop_assert_eq!(next.as_second() % 60, 0);
            // No minute between the two is the next of anything else.
            prop_assert_eq!(schedule.last(after, next), Some(next));
            let before = Timestamp::from_second(next.as_second() - 1).expect("a time");
            prop_assert_eq!(schedule.last(after, before), None);
        }
    }
}
