//! Where a property's value lies in a Modbus device, and what the bits mean.
//!
//! Settings of a property (its visitors):
//!
//! | setting | what it is | default |
//! |---|---|---|
//! | `register` | `coil`, `discrete`, `input` or `holding`; KubeEdge's `CoilRegister` and so on too | `holding` |
//! | `offset` | address of the first one, counted from 0 | needed |
//! | `dataType` | `int16`, `uint16`, `int32`, `uint32`, `int64`, `uint64`, `float32`, `float64`, `boolean`, `string`, `bytes` | by the model's type and `limit` |
//! | `limit` | how many registers, for text, bytes and KubeEdge's `int` and `float` | 1, 2 for numbers with a point |
//! | `scale` | a number read is multiplied by it, a number written divided | 1 |
//! | `isSwap` | the two bytes of each register are the other way round | false |
//! | `isRegisterSwap` | the registers of one value are the other way round | false |
//!
//! Source: the Modbus application protocol V1.1b3, sections 4.3 (tables) and 4.2 (big-endian words);
//! kubeedge/mappers-go, mappers/modbus (names of settings).

use skerry_mapper::{Kind, Property, SettingError, Value};

/// Most registers that one request can read.
pub(crate) const WORDS_MAX: u16 = 125;

/// One of the four tables of a Modbus device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Table {
    /// Bits, readable and writable.
    Coils,
    /// Bits, readable.
    Discrete,
    /// Words, readable.
    Input,
    /// Words, readable and writable.
    Holding,
}

impl Table {
    pub(crate) fn is_bits(self) -> bool {
        matches!(self, Self::Coils | Self::Discrete)
    }

    pub(crate) fn is_writable(self) -> bool {
        matches!(self, Self::Coils | Self::Holding)
    }
}

/// A run of bits or words in one table; it does not go past the last address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) table: Table,
    pub(crate) offset: u16,
    pub(crate) len: u16,
}

/// One property's place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Register {
    range: Range,
    data: Data,
    scale: f64,
    swap_bytes: bool,
    swap_words: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Data {
    Boolean,
    Signed,
    Unsigned,
    Float,
    Text,
    Bytes,
}

impl Register {
    /// Reads a property's settings.
    ///
    /// # Errors
    ///
    /// [`SettingError`] naming the setting.
    pub(crate) fn parse(property: &Property) -> Result<Self, SettingError> {
        let settings = &property.settings;
        let wrong = |key: &str, wanted: &str| SettingError::Wrong {
            key: key.to_owned(),
            found: settings.text(key).unwrap_or_default(),
            wanted: wanted.to_owned(),
        };
        let words = [
            ("holding", Table::Holding),
            ("coil", Table::Coils),
            ("discrete", Table::Discrete),
            ("input", Table::Input),
            ("HoldingRegister", Table::Holding),
            ("CoilRegister", Table::Coils),
            ("DiscreteInputRegister", Table::Discrete),
            ("InputRegister", Table::Input),
        ];
        let word = settings.word("register", &words.map(|(word, _)| word))?;
        let table = words.iter().find(|(known, _)| *known == word).map_or(Table::Holding, |w| w.1);
        let offset = settings.required("offset")?;
        let offset: u16 = offset.parse().map_err(|_| wrong("offset", "address from 0 to 65535"))?;
        let limit = settings.parsed::<u16>("limit", "number of registers")?;
        let default = match property.kind {
            Kind::Int => "int",
            Kind::Float | Kind::Double => "float",
            Kind::Boolean => "boolean",
            Kind::Bytes => "bytes",
            Kind::Text | Kind::Stream => "string",
        };
        let data = settings.text("dataType").unwrap_or_else(|| default.to_owned());
        let (data, len) = match data.to_ascii_lowercase().as_str() {
            "int16" => (Data::Signed, 1),
            "uint16" => (Data::Unsigned, 1),
            "int32" => (Data::Signed, 2),
            "uint32" => (Data::Unsigned, 2),
            "int64" => (Data::Signed, 4),
            "uint64" => (Data::Unsigned, 4),
            "float32" => (Data::Float, 2),
            "float64" | "double" => (Data::Float, 4),
            "int" | "integer" => (Data::Signed, limit.unwrap_or(1)),
            "float" => match limit {
                // A number with a point in one register is an integer with a scale.
                Some(1) => (Data::Signed, 1),
                limit => (Data::Float, limit.unwrap_or(2)),
            },
            "boolean" | "bool" => (Data::Boolean, 1),
            "string" => (Data::Text, limit.unwrap_or(1)),
            "bytes" => (Data::Bytes, limit.unwrap_or(1)),
            _ => return Err(wrong("dataType", "known type, int16 or float32 for example")),
        };
        let (data, len) = if table.is_bits() { (Data::Boolean, 1) } else { (data, len) };
        let fits = match data {
            Data::Signed | Data::Unsigned => matches!(len, 1 | 2 | 4),
            Data::Float => matches!(len, 2 | 4),
            Data::Boolean => true,
            Data::Text | Data::Bytes => (1..=WORDS_MAX).contains(&len),
        };
        if !fits {
            return Err(wrong("limit", "length of such a value"));
        }
        if u32::from(offset) + u32::from(len) > 0x1_0000 {
            return Err(wrong("offset", "address with room for the whole value"));
        }
        let scale = settings.parsed::<f64>("scale", "number")?.unwrap_or(1.0);
        if !scale.is_finite() || scale == 0.0 {
            return Err(wrong("scale", "number other than 0"));
        }
        let switch = |key| settings.parsed::<bool>(key, "true or false");
        Ok(Self {
            range: Range { table, offset, len },
            data,
            scale,
            swap_bytes: switch("isSwap")?.unwrap_or(false),
            swap_words: switch("isRegisterSwap")?.unwrap_or(false),
        })
    }

    pub(crate) fn range(&self) -> Range {
        self.range
    }

    /// What the registers mean; bits come as words 0 and 1.
    pub(crate) fn decode(&self, words: &[u16]) -> Result<Value, String> {
        if words.len() != usize::from(self.range.len) {
            return Err(format!(
                "{} registers came, {} were asked for",
                words.len(),
                self.range.len
            ));
        }
        if self.range.table.is_bits() {
            return Ok(Value::Boolean(words[0] != 0));
        }
        let bytes = self.bytes(words);
        let raw = bytes.iter().take(8).fold(0_u64, |raw, byte| raw << 8 | u64::from(*byte));
        Ok(match self.data {
            Data::Boolean => Value::Boolean(raw != 0),
            Data::Signed => {
                let unused = 64 - 8 * bytes.len().min(8) as u32;
                self.integer(i128::from((raw << unused) as i64 >> unused))
            }
            Data::Unsigned => self.integer(i128::from(raw)),
            Data::Float => {
                // The shortest text of a 32-bit number, not of its 64-bit form: 4.1 and not 4.099999904632568.
                let number = if bytes.len() == 4 {
                    f32::from_bits(raw as u32).to_string().parse().unwrap_or(f64::NAN)
                } else {
                    f64::from_bits(raw)
                };
                if !number.is_finite() {
                    return Err(format!("the device says {number}"));
                }
                Value::Float(self.scaled(number))
            }
            Data::Text => {
                let text = String::from_utf8_lossy(&bytes);
                Value::Text(text.trim_end_matches(['\0', ' ']).to_owned())
            }
            Data::Bytes => Value::Bytes(bytes),
        })
    }

    /// The registers that mean `value`.
    pub(crate) fn encode(&self, value: &Value) -> Result<Vec<u16>, String> {
        let len = usize::from(self.range.len);
        if !self.range.table.is_writable() {
            return Err("this table of a device can only be read".to_owned());
        }
        if let Value::Boolean(value) = value {
            let mut words = vec![0; len];
            words[len - 1] = u16::from(*value);
            return Ok(if self.swap_words || self.swap_bytes {
                self.words(&self.bytes(&words))
            } else {
                words
            });
        }
        let mut bytes = match (self.data, value) {
            (Data::Signed | Data::Unsigned | Data::Boolean, value) => {
                let number = value.number().ok_or_else(|| format!("`{value}` is no number"))?;
                let whole = match value {
                    Value::Integer(number) if self.scale == 1.0 => i128::from(*number),
                    _ => (number / self.scale).round() as i128,
                };
                let bits = 16 * self.range.len as u32;
                let range = if self.data == Data::Signed {
                    -(1_i128 << (bits - 1))..1_i128 << (bits - 1)
                } else {
                    0..1_i128 << bits
                };
                if !range.contains(&whole) {
                    return Err(format!("`{value}` does not fit into {len} registers"));
                }
                whole.to_be_bytes()[16 - 2 * len..].to_vec()
            }
            (Data::Float, value) => {
                let number = value.number().ok_or_else(|| format!("`{value}` is no number"))?;
                let number = number / self.scale;
                if len == 2 {
                    (number as f32).to_be_bytes().to_vec()
                } else {
                    number.to_be_bytes().to_vec()
                }
            }
            (Data::Bytes, Value::Bytes(bytes)) => bytes.clone(),
            (Data::Text | Data::Bytes, value) => value.to_string().into_bytes(),
        };
        if bytes.len() > 2 * len {
            return Err(format!("{} bytes do not fit into {len} registers", bytes.len()));
        }
        bytes.resize(2 * len, 0);
        Ok(self.words(&bytes))
    }

    fn integer(&self, whole: i128) -> Value {
        if self.scale == 1.0 {
            return i64::try_from(whole).map_or(Value::Float(whole as f64), Value::Integer);
        }
        Value::Float(self.scaled(whole as f64))
    }

    /// `number` with the scale, without the tail that binary multiplication leaves: 215 x 0.1 is 21.5.
    fn scaled(&self, number: f64) -> f64 {
        let scaled = number * self.scale;
        if self.scale == 1.0 { scaled } else { format!("{scaled:.12e}").parse().unwrap_or(scaled) }
    }

    fn bytes(&self, words: &[u16]) -> Vec<u8> {
        let mut words = words.to_vec();
        if self.swap_words {
            words.reverse();
        }
        let bytes =
            |word: u16| if self.swap_bytes { word.to_le_bytes() } else { word.to_be_bytes() };
        words.into_iter().flat_map(bytes).collect()
    }

    fn words(&self, bytes: &[u8]) -> Vec<u16> {
        let word = |pair: &[u8]| {
            let pair = [pair[0], pair[1]];
            if self.swap_bytes { u16::from_le_bytes(pair) } else { u16::from_be_bytes(pair) }
        };
        let mut words: Vec<u16> = bytes.chunks_exact(2).map(word).collect();
        if self.swap_words {
            words.reverse();
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use skerry_mapper::Settings;

    use super::*;

    fn property(kind: Kind, settings: serde_json::Value) -> Property {
        Property {
            name: "p".to_owned(),
            kind,
            writable: true,
            range: (None, None),
            settings: Settings::new(settings.as_object().cloned().unwrap_or_default()),
            desired: None,
            collect: Duration::from_secs(1),
            report: Duration::from_secs(1),
            to_cloud: true,
            deadband: None,
            on_change: false,
        }
    }

    fn register(kind: Kind, settings: serde_json::Value) -> Register {
        Register::parse(&property(kind, settings)).expect("valid settings")
    }

    fn check(kind: Kind, settings: serde_json::Value, words: &[u16], expected: Value) {
        let register = register(kind, settings.clone());
        assert_eq!(register.decode(words), Ok(expected.clone()), "{settings}");
        if register.range.table.is_writable() {
            assert_eq!(register.encode(&expected), Ok(words.to_vec()), "{settings}");
        }
    }

    #[test]
    fn registers_mean_what_their_settings_say() {
        let json = |text: &str| serde_json::from_str(text).expect("JSON");
        check(Kind::Int, json(r#"{"offset": 0}"#), &[0xfff9], Value::Integer(-7));
        check(
            Kind::Int,
            json(r#"{"offset": 0, "dataType": "uint16"}"#),
            &[0xfff9],
            Value::Integer(65_529),
        );
        check(
            Kind::Int,
            json(r#"{"offset": 0, "dataType": "int32"}"#),
            &[0xffff, 0xfffe],
            Value::Integer(-2),
        );
        check(
            Kind::Int,
            json(r#"{"offset": "3", "limit": 2, "isRegisterSwap": true}"#),
            &[2, 1],
            Value::Integer(65_538),
        );
        check(Kind::Int, json(r#"{"offset": 0, "isSwap": true}"#), &[0x0100], Value::Integer(1));
        check(Kind::Float, json(r#"{"offset": 0}"#), &[0x4083, 0x3333], Value::Float(4.1));
        check(
            Kind::Float,
            json(r#"{"offset": 0, "dataType": "int16", "scale": 0.1}"#),
            &[215],
            Value::Float(21.5),
        );
        check(
            Kind::Float,
            json(r#"{"offset": 0, "limit": 1, "scale": "0.1"}"#),
            &[0xffd8],
            Value::Float(-4.0),
        );
        check(
            Kind::Double,
            json(r#"{"offset": 0, "dataType": "float64"}"#),
            &[0x3ff8, 0, 0, 0],
            Value::Float(1.5),
        );
        check(
            Kind::Text,
            json(r#"{"offset": 0, "limit": 3}"#),
            &[0x6f6b, 0, 0],
            Value::Text("ok".to_owned()),
        );
        check(
            Kind::Bytes,
            json(r#"{"offset": 0, "limit": 1}"#),
            &[0x00ff],
            Value::Bytes(vec![0, 255]),
        );
        check(
            Kind::Boolean,
            json(r#"{"offset": 0, "register": "CoilRegister"}"#),
            &[1],
            Value::Boolean(true),
        );
        check(
            Kind::Boolean,
            json(r#"{"offset": 0, "register": "discrete"}"#),
            &[0],
            Value::Boolean(false),
        );
        check(
            Kind::Int,
            json(r#"{"offset": 9, "register": "InputRegister"}"#),
            &[9],
            Value::Integer(9),
        );
    }

    #[test]
    fn wrong_settings_are_named() {
        let check = |settings: serde_json::Value, key: &str| {
            let error =
                Register::parse(&property(Kind::Int, settings)).expect_err("wrong settings");
            assert!(error.to_string().contains(&format!("`{key}`")), "{error}");
        };
        check(serde_json::json!({}), "offset");
        check(serde_json::json!({"offset": 70_000}), "offset");
        check(serde_json::json!({"offset": 65_535, "dataType": "int32"}), "offset");
        check(serde_json::json!({"offset": 1, "register": "coal"}), "register");
        check(serde_json::json!({"offset": 1, "dataType": "int24"}), "dataType");
        check(serde_json::json!({"offset": 1, "limit": 3}), "limit");
        check(serde_json::json!({"offset": 1, "scale": 0}), "scale");
    }

    #[test]
    fn what_does_not_fit_is_not_written() {
        let small = register(Kind::Int, serde_json::json!({"offset": 0}));
        assert!(small.encode(&Value::Integer(40_000)).is_err());
        let read_only = register(Kind::Int, serde_json::json!({"offset": 0, "register": "input"}));
        assert!(read_only.encode(&Value::Integer(1)).is_err());
        let text = register(Kind::Text, serde_json::json!({"offset": 0, "limit": 1}));
        assert!(text.encode(&Value::Text("abc".to_owned())).is_err());
        let float = register(Kind::Float, serde_json::json!({"offset": 0}));
        assert!(float.decode(&[0x7fc0, 0]).is_err());
        assert!(float.decode(&[0]).is_err());
    }

    proptest! {
        #[test]
        fn integers_come_back_as_they_were_written(number in any::<i32>(), swap: bool, turn: bool) {
            let settings = serde_json::json!({"offset": 0, "dataType": "int32", "isSwap": swap, "isRegisterSwap": turn});
            let register = register(Kind::Int, settings);
            let words = register.encode(&Value::Integer(number.into())).unwrap();
            prop_assert_eq!(register.decode(&words), Ok(Value::Integer(number.into())));
        }
    }
}
