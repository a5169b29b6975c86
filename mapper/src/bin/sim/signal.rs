//! The signal behind a simulated property: a shape, and faults on top of it.
//!
//! Called by the driver with the time since the device was opened; no clock here. All settings are
//! optional and stand in the property's visitors.
//!
//! | setting | what it does | default |
//! |---|---|---|
//! | `value` | the middle of the signal; for text and bytes the value itself | 0, `false`, empty |
//! | `amplitude`, `periodMs` | a sine around it; booleans change once per half period | 0, 60000 |
//! | `drift` | added per second | 0 |
//! | `noise` | at most so much more or less, anew at each read | 0 |
//! | `stuckAfterMs` | from then on the value does not change any more | never |
//! | `dropRate` | share of reads that give nothing, 0 to 1 | 0 |
//! | `outlierRate`, `outlier` | share of reads that give this value instead | 0, 99999 |
//!
//! Of the device (its protocol's `configData`): `seed`; `outageEveryMs` and `outageMs`, how often and
//! how long it cannot be reached. A value that is written becomes the middle of the signal.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use skerry_mapper::{Kind, SettingError, Settings, Value};

/// One property's signal.
pub(crate) struct Signal {
    kind: Kind,
    middle: Middle,
    amplitude: f64,
    period: f64,
    drift: f64,
    noise: f64,
    stuck_after: Option<f64>,
    stuck: Option<Value>,
    drop_rate: f64,
    outlier_rate: f64,
    outlier: f64,
    random: StdRng,
}

enum Middle {
    Number(f64),
    Switch(bool),
    Text(Value),
}

impl Signal {
    /// Reads a property's settings.
    ///
    /// # Errors
    ///
    /// [`SettingError`] for a number that is none, or a rate outside of 0 to 1.
    pub(crate) fn parse(kind: Kind, settings: &Settings, seed: u64) -> Result<Self, SettingError> {
        let number = |key: &str, default: f64| -> Result<f64, SettingError> {
            let value = settings.parsed::<f64>(key, "number")?.unwrap_or(default);
            if value.is_finite() { Ok(value) } else { Err(wrong(settings, key, "finite number")) }
        };
        let rate = |key: &str| match number(key, 0.0)? {
            rate if (0.0..=1.0).contains(&rate) => Ok(rate),
            _ => Err(wrong(settings, key, "share from 0 to 1")),
        };
        let middle = match kind {
            Kind::Int | Kind::Float | Kind::Double => Middle::Number(number("value", 0.0)?),
            Kind::Boolean => {
                Middle::Switch(settings.parsed("value", "true or false")?.unwrap_or(false))
            }
            Kind::Text | Kind::Bytes | Kind::Stream => {
                let text = settings.text("value").unwrap_or_default();
                let value = Value::parse(kind, &text);
                Middle::Text(value.map_err(|_| wrong(settings, "value", kind.word()))?)
            }
        };
        Ok(Self {
            kind,
            middle,
            amplitude: number("amplitude", 0.0)?,
            period: number("periodMs", 60_000.0)?.max(1.0) / 1000.0,
            drift: number("drift", 0.0)?,
            noise: number("noise", 0.0)?.abs(),
            stuck_after: settings
                .parsed::<u64>("stuckAfterMs", "time in ms")?
                .map(|ms| ms as f64 / 1000.0),
            stuck: None,
            drop_rate: rate("dropRate")?,
            outlier_rate: rate("outlierRate")?,
            outlier: number("outlier", 99_999.0)?,
            random: StdRng::seed_from_u64(seed),
        })
    }

    /// The value `age` after the device was opened; `None` for a read that is lost.
    pub(crate) fn read(&mut self, age: Duration) -> Option<Value> {
        let age = age.as_secs_f64();
        if self.drop_rate > 0.0 && self.random.random_bool(self.drop_rate) {
            return None;
        }
        if let Some(stuck) = &self.stuck {
            return Some(stuck.clone());
        }
        let outlier = self.outlier_rate > 0.0 && self.random.random_bool(self.outlier_rate);
        let phase = age / self.period;
        let value = match &self.middle {
            Middle::Number(_) if outlier => self.number(self.outlier),
            Middle::Number(middle) => {
                let wave = self.amplitude * (phase * std::f64::consts::TAU).sin();
                let mut number = middle + wave + self.drift * age;
                if self.noise > 0.0 {
                    number += self.random.random_range(-self.noise..=self.noise);
                }
                self.number(number)
            }
            Middle::Switch(middle) => {
                let second_half = self.amplitude != 0.0 && phase.fract() >= 0.5;
                Value::Boolean(middle ^ second_half ^ outlier)
            }
            Middle::Text(value) => value.clone(),
        };
        if self.stuck_after.is_some_and(|after| age >= after) {
            self.stuck = Some(value.clone());
        }
        Some(value)
    }

    /// Makes `value` the middle of the signal. A stuck one stays stuck.
    pub(crate) fn write(&mut self, value: &Value) -> Result<(), String> {
        self.middle = match (&self.middle, value) {
            (Middle::Number(_), value) => {
                Middle::Number(value.number().ok_or_else(|| format!("`{value}` is no number"))?)
            }
            (Middle::Switch(_), Value::Boolean(value)) => Middle::Switch(*value),
            (Middle::Switch(_), value) => {
                return Err(format!("`{value}` is neither true nor false"));
            }
            (Middle::Text(_), value) => Middle::Text(value.clone()),
        };
        Ok(())
    }

    fn number(&self, number: f64) -> Value {
        match self.kind {
            Kind::Int => Value::Integer(number.round() as i64),
            // As a sensor with three digits behind the point.
            _ => Value::Float((number * 1000.0).round() / 1000.0),
        }
    }
}

/// When a device cannot be reached.
pub(crate) struct Outage {
    every: Duration,
    length: Duration,
}

impl Outage {
    pub(crate) fn parse(settings: &Settings) -> Result<Self, SettingError> {
        let time = |key| settings.parsed::<u64>(key, "time in ms").map(Option::unwrap_or_default);
        Ok(Self {
            every: Duration::from_millis(time("outageEveryMs")?),
            length: Duration::from_millis(time("outageMs")?),
        })
    }

    /// Whether the device is away `age` after it was opened: at the end of each period.
    pub(crate) fn is_at(&self, age: Duration) -> bool {
        if self.every.is_zero() || self.length.is_zero() {
            return false;
        }
        let into = age.as_nanos() % self.every.as_nanos();
        into + self.length.as_nanos() >= self.every.as_nanos()
    }
}

/// A number for a name that is the same on every machine (FNV-1a).
pub(crate) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn wrong(settings: &Settings, key: &str, wanted: &str) -> SettingError {
    let found = settings.text(key).unwrap_or_default();
    SettingError::Wrong { key: key.to_owned(), found, wanted: wanted.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signal(kind: Kind, settings: serde_json::Value) -> Signal {
        let settings = Settings::new(settings.as_object().cloned().unwrap_or_default());
        Signal::parse(kind, &settings, 7).expect("valid settings")
    }

    fn run(signal: &mut Signal, count: u64) -> Vec<Option<Value>> {
        (0..count).map(|second| signal.read(Duration::from_secs(second))).collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_values() {
        let settings = serde_json::json!({"value": 4, "amplitude": 1, "noise": 0.5, "dropRate": 0.2, "outlierRate": "0.1"});
        let one = run(&mut signal(Kind::Float, settings.clone()), 200);
        assert_eq!(one, run(&mut signal(Kind::Float, settings), 200));
        let dropped = one.iter().filter(|value| value.is_none()).count();
        let outliers = one.iter().filter(|value| **value == Some(Value::Float(99_999.0))).count();
        assert!((20..60).contains(&dropped) && (5..40).contains(&outliers), "{dropped} {outliers}");
    }

    #[test]
    fn drift_moves_and_a_stuck_value_stays() {
        let mut signal = signal(
            Kind::Float,
            serde_json::json!({"value": 1, "drift": 0.5, "stuckAfterMs": 4000}),
        );
        let values: Vec<_> =
            run(&mut signal, 7).into_iter().flatten().map(|v| v.to_string()).collect();
        assert_eq!(values, ["1", "1.5", "2", "2.5", "3", "3", "3"]);
    }

    #[test]
    fn a_written_value_is_read_back() {
        let mut number = signal(Kind::Int, serde_json::json!({"value": 1}));
        number.write(&Value::Integer(5)).unwrap();
        assert_eq!(number.read(Duration::ZERO), Some(Value::Integer(5)));
        let mut switch = signal(Kind::Boolean, serde_json::json!({}));
        switch.write(&Value::Boolean(true)).unwrap();
        assert_eq!(switch.read(Duration::ZERO), Some(Value::Boolean(true)));
        assert!(switch.write(&Value::Integer(2)).is_err());
    }

    #[test]
    fn an_outage_comes_at_the_end_of_each_period() {
        let settings = serde_json::json!({"outageEveryMs": 1000, "outageMs": 200});
        let outage = Outage::parse(&Settings::new(settings.as_object().cloned().unwrap())).unwrap();
        let away: Vec<_> =
            (0..20).map(|tenth| outage.is_at(Duration::from_millis(tenth * 100))).collect();
        assert_eq!(away.iter().filter(|away| **away).count(), 4);
        assert!(away[8] && away[9] && !away[10] && away[18]);
    }

    #[test]
    fn rates_outside_of_0_to_1_are_refused() {
        let settings =
            Settings::new(serde_json::json!({"dropRate": 2}).as_object().cloned().unwrap());
        assert!(Signal::parse(Kind::Int, &settings, 0).is_err());
    }
}
