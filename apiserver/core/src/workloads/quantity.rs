//! Resource quantities (`100m`, `64Mi`, `1e3`) as whole thousandths, and sums of them per resource.
//!
//! Source: the serialisation format of `resource.Quantity` in the Kubernetes API reference.

use serde_json::Value;
use std::collections::BTreeMap;

/// Amounts per resource name, in thousandths of the unit.
pub type Amounts = BTreeMap<String, i128>;

/// Parses a quantity into thousandths, rounding up; `None` if it is malformed.
pub fn parse(text: &str) -> Option<i128> {
    let text = text.trim();
    let end = text
        .char_indices()
        .find(|(at, c)| !(c.is_ascii_digit() || *c == '.' || (*at == 0 && matches!(c, '+' | '-'))))
        .map_or(text.len(), |(at, _)| at);
    let (number, suffix) = text.split_at(end);
    let (negative, number) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 || whole.len() + fraction.len() > 24 {
        return None;
    }
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (binary, decimal): (u32, i32) = match suffix {
        "" => (0, 0),
        "n" => (0, -9),
        "u" => (0, -6),
        "m" => (0, -3),
        "k" => (0, 3),
        "M" => (0, 6),
        "G" => (0, 9),
        "T" => (0, 12),
        "P" => (0, 15),
        "E" => (0, 18),
        "Ki" => (10, 0),
        "Mi" => (20, 0),
        "Gi" => (30, 0),
        "Ti" => (40, 0),
        "Pi" => (50, 0),
        "Ei" => (60, 0),
        _ => (0, suffix.strip_prefix(['e', 'E'])?.parse().ok().filter(|e| (-18..=18).contains(e))?),
    };
    // The value is digits * 2^binary * 10^(decimal - fraction length); thousandths add three.
    let exponent = decimal - i32::try_from(fraction.len()).ok()? + 3;
    let scaled = digits.checked_mul(1i128 << binary)?;
    let power = 10i128.checked_pow(exponent.unsigned_abs())?;
    let value = if exponent >= 0 {
        scaled.checked_mul(power)?
    } else {
        scaled / power + i128::from(scaled % power != 0)
    };
    Some(if negative { -value } else { value })
}

/// Parses a quantity that may also stand as a JSON number.
pub fn of(value: &Value) -> Option<i128> {
    match value {
        Value::String(text) => parse(text),
        Value::Number(number) => parse(&number.to_string()),
        _ => None,
    }
}

/// The amounts of a resource list; malformed quantities are left out.
pub fn amounts(list: Option<&Value>) -> Amounts {
    let Some(map) = list.and_then(Value::as_object) else { return Amounts::new() };
    map.iter().filter_map(|(name, value)| Some((name.clone(), of(value)?))).collect()
}

/// Adds `more` to `sum`.
pub fn add(sum: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        let total = sum.entry(name.clone()).or_default();
        *total = total.saturating_add(*amount);
    }
}

/// Raises `sum` to at least `floor`, per resource.
pub fn raise(sum: &mut Amounts, floor: &Amounts) {
    for (name, amount) in floor {
        let value = sum.entry(name.clone()).or_insert(*amount);
        *value = (*value).max(*amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_become_thousandths() {
        for (text, expected) in [
            ("1", Some(1_000)),
            ("100m", Some(100)),
            ("0.5", Some(500)),
            ("1.5Gi", Some(1_610_612_736_000)),
            ("64Mi", Some(67_108_864_000)),
            ("2k", Some(2_000_000)),
            ("1e3", Some(1_000_000)),
            ("1E", Some(1_000_000_000_000_000_000_000)),
            ("1u", Some(1)),
            ("-1", Some(-1_000)),
            ("", None),
            ("Mi", None),
            ("1x", None),
            ("1e99", None),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }
}
