//! Settings of a protocol or of a property: the free maps of a Device, read with types.
//!
//! Called by drivers. Numbers may be written as text and text as numbers, as both are usual in
//! Devices (`port: "502"`); a missing or wrong value is an error that names the key.

use serde_json::{Map, Value};

/// One map of configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    map: Map<String, Value>,
}

/// Why a setting cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// The key has to be there.
    #[error("setting `{key}` is missing")]
    Missing {
        /// As a Device would write it.
        key: String,
    },
    /// The key is there with something else.
    #[error("setting `{key}`: `{found}` is no {wanted}")]
    Wrong {
        /// As a Device would write it.
        key: String,
        /// What stands there.
        found: String,
        /// What was expected.
        wanted: String,
    },
}

impl Settings {
    /// Wraps a map.
    pub fn new(map: Map<String, Value>) -> Self {
        Self { map }
    }

    /// Whether there is nothing at all.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The value as it came.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key)
    }

    /// The value as text.
    pub fn text(&self, key: &str) -> Option<String> {
        match self.map.get(key)? {
            Value::String(text) => Some(text.clone()),
            Value::Null => None,
            other => Some(other.to_string()),
        }
    }

    /// The value as text that has to be there and not be empty.
    ///
    /// # Errors
    ///
    /// [`SettingError::Missing`].
    pub fn required(&self, key: &str) -> Result<String, SettingError> {
        let missing = || SettingError::Missing { key: key.to_owned() };
        self.text(key).filter(|text| !text.is_empty()).ok_or_else(missing)
    }

    /// The value as anything that is written as text: numbers, addresses, durations of the caller's own.
    ///
    /// # Errors
    ///
    /// [`SettingError::Wrong`] if it is there and does not parse; `wanted` says what would.
    pub fn parsed<T: std::str::FromStr>(
        &self,
        key: &str,
        wanted: &str,
    ) -> Result<Option<T>, SettingError> {
        let Some(text) = self.text(key) else { return Ok(None) };
        match text.trim().parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(wrong(key, &text, wanted)),
        }
    }

    /// One of several words, in any case; the first if the key is absent.
    ///
    /// # Errors
    ///
    /// [`SettingError::Wrong`] for another word; it lists those that are known.
    pub fn word<'a>(&self, key: &str, words: &[&'a str]) -> Result<&'a str, SettingError> {
        let first = words.first().copied().unwrap_or_default();
        let Some(text) = self.text(key) else { return Ok(first) };
        let known = words.iter().find(|word| word.eq_ignore_ascii_case(text.trim()));
        known.copied().ok_or_else(|| wrong(key, &text, &format!("one of {}", words.join(", "))))
    }
}

fn wrong(key: &str, found: &str, wanted: &str) -> SettingError {
    let found = found.chars().take(64).collect();
    SettingError::Wrong { key: key.to_owned(), found, wanted: wanted.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(value: Value) -> Settings {
        Settings::new(value.as_object().cloned().unwrap_or_default())
    }

    #[test]
    fn numbers_may_be_text_and_text_may_be_numbers() {
        let settings =
            settings(serde_json::json!({"port": "502", "slave": 3, "on": true, "none": null}));
        assert_eq!(settings.parsed::<u16>("port", "port"), Ok(Some(502)));
        assert_eq!(settings.parsed::<u8>("slave", "number"), Ok(Some(3)));
        assert_eq!(settings.parsed::<bool>("on", "switch"), Ok(Some(true)));
        assert_eq!(settings.parsed::<u8>("none", "number"), Ok(None));
        assert_eq!(settings.required("slave"), Ok("3".to_owned()));
    }

    #[test]
    fn mistakes_name_the_key_and_what_would_do() {
        let settings = settings(serde_json::json!({"port": 70000, "parity": "mark"}));
        assert_eq!(
            settings.parsed::<u16>("port", "port").unwrap_err().to_string(),
            "setting `port`: `70000` is no port"
        );
        assert_eq!(
            settings.word("parity", &["none", "even", "odd"]).unwrap_err().to_string(),
            "setting `parity`: `mark` is no one of none, even, odd"
        );
        assert_eq!(settings.word("other", &["none", "even"]), Ok("none"));
        assert_eq!(settings.required("ip").unwrap_err().to_string(), "setting `ip` is missing");
    }
}
