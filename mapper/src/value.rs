//! Values of properties: typed inside a mapper, text on the way to EdgeCore.
//!
//! Called by drivers (which return and take [`Value`]) and by the core (which compares and prints
//! them). Text forms are those that KubeEdge's framework produces: integers decimal, floats without
//! exponent, `true` and `false`, bytes as text where they are text.
//!
//! Source: kubeedge/kubeedge, staging/src/github.com/kubeedge/mapper-framework/pkg/common/
//! dataconverter.go.

use std::fmt;

/// Type of a property as its model declares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 64-bit signed.
    Int,
    /// 32-bit in the model's words; held with 64 bits here.
    Float,
    /// 64-bit.
    Double,
    /// Any text.
    Text,
    /// `true` or `false`.
    Boolean,
    /// Bytes; as text they are UTF-8, or hexadecimal after `0x`.
    Bytes,
    /// A stream of pictures; no driver here has one.
    Stream,
}

impl Kind {
    /// Reads the word that a model uses, in any case; the empty word is text.
    pub fn from_model(word: &str) -> Option<Self> {
        Some(match word.to_ascii_uppercase().as_str() {
            "INT" | "INTEGER" => Self::Int,
            "FLOAT" => Self::Float,
            "DOUBLE" => Self::Double,
            "" | "STRING" => Self::Text,
            "BOOLEAN" | "BOOL" => Self::Boolean,
            "BYTES" => Self::Bytes,
            "STREAM" => Self::Stream,
            _ => return None,
        })
    }

    /// The word for metadata of a report.
    pub fn word(self) -> &'static str {
        match self {
            Self::Int => "int",
            Self::Float => "float",
            Self::Double => "double",
            Self::Text => "string",
            Self::Boolean => "boolean",
            Self::Bytes => "bytes",
            Self::Stream => "stream",
        }
    }
}

/// One value of a property.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// For [`Kind::Int`].
    Integer(i64),
    /// For [`Kind::Float`] and [`Kind::Double`]; finite.
    Float(f64),
    /// For [`Kind::Boolean`].
    Boolean(bool),
    /// For [`Kind::Text`].
    Text(String),
    /// For [`Kind::Bytes`].
    Bytes(Vec<u8>),
}

/// Why a text or a value is none of the wanted type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {wanted}")]
pub struct ValueError {
    /// As given, cut to a readable length.
    pub text: String,
    /// Type in the model's words.
    pub wanted: &'static str,
}

/// Longest text repeated in an error.
const SHOWN_MAX: usize = 64;

impl Value {
    /// Reads a desired value.
    ///
    /// # Errors
    ///
    /// [`ValueError`] if the text is none of `kind`; floats have to be finite.
    pub fn parse(kind: Kind, text: &str) -> Result<Self, ValueError> {
        let wrong =
            || ValueError { text: text.chars().take(SHOWN_MAX).collect(), wanted: kind.word() };
        match kind {
            Kind::Int => text.trim().parse().map(Self::Integer).map_err(|_| wrong()),
            Kind::Float | Kind::Double => {
                let number: f64 = text.trim().parse().map_err(|_| wrong())?;
                if number.is_finite() { Ok(Self::Float(number)) } else { Err(wrong()) }
            }
            Kind::Boolean => match text.trim().to_ascii_lowercase().as_str() {
                "true" | "t" | "1" => Ok(Self::Boolean(true)),
                "false" | "f" | "0" => Ok(Self::Boolean(false)),
                _ => Err(wrong()),
            },
            Kind::Text => Ok(Self::Text(text.to_owned())),
            Kind::Bytes => match text.strip_prefix("0x") {
                Some(digits) => unhex(digits).map(Self::Bytes).ok_or_else(wrong),
                None => Ok(Self::Bytes(text.as_bytes().to_vec())),
            },
            Kind::Stream => Err(wrong()),
        }
    }

    /// Converts what a driver read to what the model declares: `21` of a FLOAT becomes `21.0`'s value,
    /// the text `"21.5"` a number, a number 0 or 1 a boolean.
    ///
    /// # Errors
    ///
    /// [`ValueError`] if nothing is a faithful conversion, a fraction for an INT for example.
    pub fn into_kind(self, kind: Kind) -> Result<Self, ValueError> {
        /// Above this, neighbouring integers share one float.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        match (kind, self) {
            (Kind::Int, Self::Float(number)) if number.fract() == 0.0 && number.abs() < EXACT => {
                Ok(Self::Integer(number as i64))
            }
            (Kind::Int, Self::Boolean(value)) => Ok(Self::Integer(i64::from(value))),
            (Kind::Float | Kind::Double, Self::Integer(number)) => Ok(Self::Float(number as f64)),
            (Kind::Float | Kind::Double, Self::Float(number)) if number.is_finite() => {
                Ok(Self::Float(number))
            }
            (Kind::Boolean, Self::Integer(number @ (0 | 1))) => Ok(Self::Boolean(number == 1)),
            (Kind::Int, value @ Self::Integer(_))
            | (Kind::Boolean, value @ Self::Boolean(_))
            | (Kind::Bytes, value @ Self::Bytes(_))
            | (Kind::Text, value @ Self::Text(_)) => Ok(value),
            (Kind::Text, value) => Ok(Self::Text(value.to_string())),
            (kind, value) => Self::parse(kind, &value.to_string()),
        }
    }

    /// The value as a number, where it is one.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Integer(number) => Some(*number as f64),
            Self::Float(number) => Some(*number),
            _ => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(number) => number.fmt(f),
            Self::Float(number) => number.fmt(f),
            Self::Boolean(value) => value.fmt(f),
            Self::Text(text) => f.write_str(text),
            Self::Bytes(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) if !text.starts_with("0x") => f.write_str(text),
                _ => {
                    f.write_str("0x")?;
                    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
                }
            },
        }
    }
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    if !digits.len().is_multiple_of(2) || !digits.is_ascii() {
        return None;
    }
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_become_values_of_their_kind_or_are_refused() {
        let check = |kind, text, expected: Option<Value>| {
            assert_eq!(Value::parse(kind, text).ok(), expected, "{kind:?} {text}");
        };
        check(Kind::Int, " -7 ", Some(Value::Integer(-7)));
        check(Kind::Int, "1.5", None);
        check(Kind::Float, "4.50", Some(Value::Float(4.5)));
        check(Kind::Float, "NaN", None);
        check(Kind::Boolean, "TRUE", Some(Value::Boolean(true)));
        check(Kind::Boolean, "yes", None);
        check(Kind::Bytes, "0x00ff", Some(Value::Bytes(vec![0, 255])));
        check(Kind::Bytes, "0x0", None);
        check(Kind::Bytes, "0x\u{e9}", None);
        check(Kind::Text, "a b=?", Some(Value::Text("a b=?".to_owned())));
        check(Kind::Stream, "x", None);
    }

    #[test]
    fn texts_have_the_forms_that_consumers_parse() {
        assert_eq!(Value::Float(1e21).to_string(), "1000000000000000000000");
        assert_eq!(Value::Float(0.1).to_string(), "0.1");
        assert_eq!(Value::Bytes(b"ok".to_vec()).to_string(), "ok");
        assert_eq!(Value::Bytes(vec![0, 255]).to_string(), "0x00ff");
        assert_eq!(Value::Bytes(b"0x".to_vec()).to_string(), "0x3078");
    }

    #[test]
    fn what_was_read_is_converted_only_faithfully() {
        assert_eq!(Value::Integer(21).into_kind(Kind::Float), Ok(Value::Float(21.0)));
        assert_eq!(Value::Float(21.0).into_kind(Kind::Int), Ok(Value::Integer(21)));
        assert!(Value::Float(21.5).into_kind(Kind::Int).is_err());
        assert!(Value::Float(f64::NAN).into_kind(Kind::Double).is_err());
        assert_eq!(Value::Text("3".to_owned()).into_kind(Kind::Int), Ok(Value::Integer(3)));
        assert_eq!(Value::Integer(1).into_kind(Kind::Boolean), Ok(Value::Boolean(true)));
        assert!(Value::Integer(2).into_kind(Kind::Boolean).is_err());
        assert_eq!(Value::Boolean(true).into_kind(Kind::Text), Ok(Value::Text("true".to_owned())));
    }
}
