//! Amounts of resources as users write them: `500m`, `64Mi`, `1e3`.
//!
//! Source: kubernetes/apimachinery pkg/api/resource/quantity.go.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Reads a quantity as thousandths, rounded up. `None` if it is not one.
pub fn milli(text: &str) -> Option<i128> {
    let text = text.trim();
    let digits_end = text
        .char_indices()
        .find(|(at, c)| {
            let sign = *at == 0 && (*c == '+' || *c == '-');
            !(c.is_ascii_digit() || *c == '.' || sign)
        })
        .map_or(text.len(), |(at, _)| at);
    let (number, suffix) = text.split_at(digits_end);
    let (negative, number) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || whole.len() + fraction.len() > DIGITS_MAX {
        return None;
    }
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    // value = digits / 10^fraction.len() * numerator / denominator
    let (mut numerator, mut denominator) = match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let factor = 10_i128.checked_pow(power.unsigned_abs())?;
            if power < 0 { (1, factor) } else { (factor, 1) }
        }
    };
    numerator *= 1000;
    denominator *= 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let product = digits.checked_mul(numerator)?;
    let rounded = product.checked_add(denominator - 1)? / denominator;
    Some(if negative { -rounded } else { rounded })
}

/// Reads a quantity as whole units, rounded up.
pub fn value(text: &str) -> Option<i128> {
    let milli = milli(text)?;
    Some(if milli >= 0 { (milli + 999) / 1000 } else { milli / 1000 })
}

/// Digits taken from a number; more than any amount on earth needs.
const DIGITS_MAX: usize = 24;

/// A list of resources as a container has it in `limits` or `requests`.
pub type ResourceList = BTreeMap<String, Quantity>;

/// Returns the amount of a resource in thousandths; a missing request is the limit.
pub fn request_milli(container: &Container, resource: &str) -> Option<i128> {
    let resources = container.resources.as_ref()?;
    amount(resources.requests.as_ref(), resource)
        .or_else(|| amount(resources.limits.as_ref(), resource))
}

/// Returns the limit of a resource in thousandths.
pub fn limit_milli(container: &Container, resource: &str) -> Option<i128> {
    amount(container.resources.as_ref()?.limits.as_ref(), resource)
}

/// Whether `resources` says nothing.
pub fn is_empty(resources: Option<&ResourceRequirements>) -> bool {
    resources.is_none_or(|resources| {
        let empty = |list: &Option<ResourceList>| list.as_ref().is_none_or(BTreeMap::is_empty);
        empty(&resources.limits) && empty(&resources.requests)
    })
}

fn amount(list: Option<&ResourceList>, resource: &str) -> Option<i128> {
    list?.get(resource).and_then(|quantity| milli(&quantity.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_thousandths_rounded_up() {
        for (text, expected) in [
            ("1", Some(1000)),
            ("500m", Some(500)),
            ("0.5", Some(500)),
            (".5", Some(500)),
            ("1.", Some(1000)),
            ("1e3", Some(1_000_000)),
            ("1E", Some(1_000_000_000_000_000_000_000)),
            ("1E2", Some(100_000)),
            ("2Ki", Some(2_048_000)),
            ("1.5Gi", Some(1_610_612_736_000)),
            ("100u", Some(1)),
            ("1n", Some(1)),
            ("-1", Some(-1000)),
            ("", None),
            ("Mi", None),
            ("1Xi", None),
            ("1e999", None),
            ("999999999999999999999999999", None),
        ] {
            assert_eq!(milli(text), expected, "{text}");
        }
    }

    #[test]
    fn whole_units_are_rounded_up() {
        assert_eq!(value("100m"), Some(1));
        assert_eq!(value("64Mi"), Some(64 << 20));
    }
}
