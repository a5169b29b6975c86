//! Blocks: a run of samples of one property as few bytes.
//!
//! ```text
//! kind u8 │ count uvarint │ first time zigzag ms │ [step zigzag ms │ k u8 │ residuals] │ values
//! ```
//!
//! Times are what each step differs from the most usual step; values of numbers are decimals (a scale, then differences
//! of whole numbers) where that gives exactly the same number back, else the bits that changed (`f64`, XOR); texts are
//! indices into a dictionary. Differences are Rice codes with the parameter that costs least in the block. All of it is
//! exact: what [`encode`] takes, [`decode`] returns, bit by bit.
//!
//! No I/O, no clock. Callers: [`super::History`], and whoever reads what it wrote. Bytes may come from a broken disk:
//! [`decode`] takes any, without a panic and with at most [`BLOCK_SAMPLES_MAX`] samples of memory and the texts that are in
//! the bytes.
//!
//! Source: the idea of steps and XOR is from "Gorilla: A Fast, Scalable, In-Memory Time Series Database" (VLDB 2015), that
//! of decimals from "ALP: Adaptive Lossless floating-Point Compression" (SIGMOD 2024).

use super::bits::{
    BitReader, BitWriter, read_i64, read_u64, unzigzag, write_i64, write_u64, zigzag,
};
use std::collections::HashMap;
use std::sync::Arc;

/// Samples of one block.
pub const BLOCK_SAMPLES_MAX: usize = 4096;
/// Bytes of one block; longer ones are not read.
pub const BLOCK_LEN_MAX: usize = 4 * 1024 * 1024;

const DECIMALS: u8 = 0x11;
const FLOATS: u8 = 0x12;
const TEXTS: u8 = 0x13;
/// Digits behind the point that are tried.
const SCALE_MAX: u8 = 12;
/// Whole numbers up to this are exact in an `f64`.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
/// Largest Rice parameter that is tried; larger residuals are escapes.
const K_MAX: u8 = 40;
/// Ones before a number that is written as it is.
const ESCAPE: u32 = 24;

/// What a property was.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A finite number.
    Number(f64),
    /// Anything else.
    Text(Arc<str>),
}

impl Value {
    /// Reads what a mapper or client said. A number is one only if nothing is lost by it.
    pub fn of(text: &str) -> Self {
        match text.parse::<f64>() {
            // `inf` and `nan` are words; whole numbers beyond this would come back as others.
            Ok(number) if number.is_finite() && number.abs() <= EXACT_MAX => {
                Self::Number(if number == 0.0 { 0.0 } else { number })
            }
            _ => Self::Text(text.into()),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Number(one), Self::Number(two)) => one.to_bits() == two.to_bits(),
            (Self::Text(one), Self::Text(two)) => one == two,
            _ => false,
        }
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

/// What a property was at a moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Unix milliseconds.
    pub at_ms: i64,
    /// The value.
    pub value: Value,
}

/// Why bytes are no block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// They end too early.
    #[error("the block ends too early")]
    Short,
    /// Made by another version, or by nobody.
    #[error("`{0:#04x}` is no kind of block")]
    Kind(u8),
    /// A number that cannot be.
    #[error("the block says something that cannot be")]
    Bad,
    /// More than [`BLOCK_SAMPLES_MAX`] samples or [`BLOCK_LEN_MAX`] bytes, or none.
    #[error("the block is empty or too large")]
    Size,
    /// Bytes follow it.
    #[error("the block does not end where it should")]
    Long,
}

/// Writes samples of one class (all numbers, or all texts) as a block.
///
/// # Panics
///
/// Never for 1 to [`BLOCK_SAMPLES_MAX`] samples of one class with rising times; in a debug build for others.
pub fn encode(samples: &[Sample]) -> Vec<u8> {
    debug_assert!(!samples.is_empty() && samples.len() <= BLOCK_SAMPLES_MAX);
    debug_assert!(samples.windows(2).all(|pair| pair[0].at_ms < pair[1].at_ms));
    let numbers: Option<Vec<f64>> = samples
        .iter()
        .map(|sample| match sample.value {
            Value::Number(number) => Some(number),
            Value::Text(_) => None,
        })
        .collect();
    let decimals = numbers.as_deref().and_then(decimals);
    let mut bytes = Vec::with_capacity(64 + samples.len() * 2);
    bytes.push(match (&numbers, &decimals) {
        (_, Some(_)) => DECIMALS,
        (Some(_), None) => FLOATS,
        (None, None) => TEXTS,
    });
    write_u64(&mut bytes, samples.len() as u64);
    write_times(&mut bytes, samples);
    match (numbers, decimals) {
        (_, Some((scale, whole))) => {
            bytes.push(scale);
            write_i64(&mut bytes, whole[0]);
            let steps = whole.windows(2).map(|pair| zigzag(pair[1].wrapping_sub(pair[0])));
            write_rice(&mut bytes, &steps.collect::<Vec<_>>());
        }
        (Some(numbers), None) => {
            let mut before = 0_u64;
            for number in numbers {
                let bits = number.to_bits();
                // Sign, exponent and first digits seldom change: turned around, what is left is a small number.
                write_u64(&mut bytes, (bits ^ before).reverse_bits());
                before = bits;
            }
        }
        (None, None) => write_texts(&mut bytes, samples),
    }
    bytes
}

/// Reads a block.
///
/// # Errors
///
/// [`BlockError`].
pub fn decode(bytes: &[u8]) -> Result<Vec<Sample>, BlockError> {
    if bytes.len() > BLOCK_LEN_MAX {
        return Err(BlockError::Size);
    }
    let mut rest = bytes;
    let kind = *rest.split_off_first().ok_or(BlockError::Short)?;
    if !matches!(kind, DECIMALS | FLOATS | TEXTS) {
        return Err(BlockError::Kind(kind));
    }
    let count = usize::try_from(read_u64(&mut rest)?).map_err(|_| BlockError::Size)?;
    if count == 0 || count > BLOCK_SAMPLES_MAX {
        return Err(BlockError::Size);
    }
    let times = read_times(&mut rest, count)?;
    let values = match kind {
        DECIMALS => read_decimals(&mut rest, count)?,
        FLOATS => read_floats(&mut rest, count)?,
        _ => read_texts(&mut rest, count)?,
    };
    if !rest.is_empty() {
        return Err(BlockError::Long);
    }
    let samples = times.into_iter().zip(values);
    Ok(samples.map(|(at_ms, value)| Sample { at_ms, value }).collect())
}

fn write_times(bytes: &mut Vec<u8>, samples: &[Sample]) {
    write_i64(bytes, samples[0].at_ms);
    if samples.len() == 1 {
        return;
    }
    let steps: Vec<i64> =
        samples.windows(2).map(|pair| pair[1].at_ms.wrapping_sub(pair[0].at_ms)).collect();
    let mut sorted = steps.clone();
    let middle = sorted.len() / 2;
    let usual = *sorted.select_nth_unstable(middle).1;
    write_i64(bytes, usual);
    let residuals = steps.iter().map(|step| zigzag(step.wrapping_sub(usual)));
    write_rice(bytes, &residuals.collect::<Vec<_>>());
}

fn read_times(rest: &mut &[u8], count: usize) -> Result<Vec<i64>, BlockError> {
    let mut at = read_i64(rest)?;
    let mut times = Vec::with_capacity(count);
    times.push(at);
    if count > 1 {
        let usual = read_i64(rest)?;
        for residual in read_rice(rest, count - 1)? {
            let step = usual.wrapping_add(unzigzag(residual));
            let next = at.checked_add(step).filter(|next| *next > at);
            at = next.ok_or(BlockError::Bad)?;
            times.push(at);
        }
    }
    Ok(times)
}

/// The numbers as whole ones at the smallest scale that gives all of them back exactly.
fn decimals(numbers: &[f64]) -> Option<(u8, Vec<i64>)> {
    // Few numbers need the largest scale, so the first that does not fit ends a try early.
    (0..=SCALE_MAX).find_map(|scale| {
        let power = 10_f64.powi(i32::from(scale));
        let whole = numbers.iter().map(|number| {
            let whole = (number * power).round();
            let exact = whole.abs() <= EXACT_MAX && (whole / power).to_bits() == number.to_bits();
            #[allow(clippy::cast_possible_truncation)] // whole and within 2^53
            exact.then_some(whole as i64)
        });
        Some((scale, whole.collect::<Option<Vec<_>>>()?))
    })
}

fn read_decimals(rest: &mut &[u8], count: usize) -> Result<Vec<Value>, BlockError> {
    let scale = *rest.split_off_first().ok_or(BlockError::Short)?;
    if scale > SCALE_MAX {
        return Err(BlockError::Bad);
    }
    let power = 10_f64.powi(i32::from(scale));
    let mut whole = read_i64(rest)?;
    let mut values = Vec::with_capacity(count);
    let mut push = |whole: i64| {
        #[allow(clippy::cast_precision_loss)] // checked to be exact
        let number = whole as f64;
        if number.abs() > EXACT_MAX {
            return Err(BlockError::Bad);
        }
        values.push(Value::Number(number / power));
        Ok(())
    };
    push(whole)?;
    for step in read_rice(rest, count - 1)? {
        whole = whole.wrapping_add(unzigzag(step));
        push(whole)?;
    }
    Ok(values)
}

fn read_floats(rest: &mut &[u8], count: usize) -> Result<Vec<Value>, BlockError> {
    let mut bits = 0_u64;
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        bits ^= read_u64(rest)?.reverse_bits();
        let number = f64::from_bits(bits);
        if !number.is_finite() {
            return Err(BlockError::Bad);
        }
        values.push(Value::Number(number));
    }
    Ok(values)
}

fn write_texts(bytes: &mut Vec<u8>, samples: &[Sample]) {
    let mut known: HashMap<&str, u64> = HashMap::new();
    let mut words: Vec<&str> = Vec::new();
    let mut indices = Vec::with_capacity(samples.len());
    for sample in samples {
        let Value::Text(text) = &sample.value else { continue };
        let index = *known.entry(text).or_insert_with(|| {
            words.push(text);
            words.len() as u64 - 1
        });
        indices.push(index);
    }
    write_u64(bytes, words.len() as u64);
    for word in &words {
        write_u64(bytes, word.len() as u64);
        bytes.extend_from_slice(word.as_bytes());
    }
    let mut bits = BitWriter::default();
    indices.iter().for_each(|index| bits.write(*index, width(words.len())));
    bytes.extend(bits.finish());
}

fn read_texts(rest: &mut &[u8], count: usize) -> Result<Vec<Value>, BlockError> {
    let known = usize::try_from(read_u64(rest)?).map_err(|_| BlockError::Bad)?;
    if known == 0 || known > count {
        return Err(BlockError::Bad);
    }
    let mut words: Vec<Arc<str>> = Vec::with_capacity(known);
    for _ in 0..known {
        let len = usize::try_from(read_u64(rest)?).map_err(|_| BlockError::Short)?;
        let word = rest.split_off(..len).ok_or(BlockError::Short)?;
        words.push(std::str::from_utf8(word).map_err(|_| BlockError::Bad)?.into());
    }
    let mut bits = BitReader::new(rest);
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        let index = bits.read(width(known))?;
        let word = usize::try_from(index).ok().and_then(|index| words.get(index));
        values.push(Value::Text(word.ok_or(BlockError::Bad)?.clone()));
    }
    *rest = bits.rest();
    Ok(values)
}

/// Bits of an index into so many.
fn width(count: usize) -> u32 {
    usize::BITS - count.saturating_sub(1).leading_zeros()
}

fn write_rice(bytes: &mut Vec<u8>, numbers: &[u64]) {
    let cost = |k: u8| -> u64 {
        let one = |number: &u64| match number >> k {
            high if high < u64::from(ESCAPE) => high + 1 + u64::from(k),
            _ => u64::from(ESCAPE) + 64,
        };
        numbers.iter().map(one).sum()
    };
    let k = (0..=K_MAX).min_by_key(|k| cost(*k)).unwrap_or(0);
    bytes.push(k);
    let mut bits = BitWriter::default();
    for number in numbers {
        let high = number >> k;
        if high < u64::from(ESCAPE) {
            #[allow(clippy::cast_possible_truncation)] // less than 24
            bits.ones(high as u32);
            bits.write(0, 1);
            bits.write(*number, u32::from(k));
        } else {
            bits.ones(ESCAPE);
            bits.write(*number, 64);
        }
    }
    bytes.extend(bits.finish());
}

fn read_rice(rest: &mut &[u8], count: usize) -> Result<Vec<u64>, BlockError> {
    let k = *rest.split_off_first().ok_or(BlockError::Short)?;
    if k > K_MAX {
        return Err(BlockError::Bad);
    }
    let mut bits = BitReader::new(rest);
    let mut numbers = Vec::with_capacity(count);
    for _ in 0..count {
        let high = bits.read_ones(ESCAPE)?;
        numbers.push(match high {
            ESCAPE => bits.read(64)?,
            high => (u64::from(high) << k) | bits.read(u32::from(k))?,
        });
    }
    *rest = bits.rest();
    Ok(numbers)
}

/// Whether two samples may be in one block.
pub(super) fn same_class(one: &Value, two: &Value) -> bool {
    matches!((one, two), (Value::Number(_), Value::Number(_)) | (Value::Text(_), Value::Text(_)))
}

/// Whether a value is another one, by more than `deadband` if both are numbers.
pub(super) fn differs(one: &Value, two: &Value, deadband: f64) -> bool {
    match (one, two) {
        (Value::Number(one), Value::Number(two)) if deadband > 0.0 => (one - two).abs() > deadband,
        _ => !one.is_same(two),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(values: &[(i64, f64)]) -> Vec<Sample> {
        let sample =
            |(at_ms, number): &(i64, f64)| Sample { at_ms: *at_ms, value: Value::Number(*number) };
        values.iter().map(sample).collect()
    }

    fn texts(values: &[(i64, &str)]) -> Vec<Sample> {
        let sample = |(at_ms, text): &(i64, &str)| Sample {
            at_ms: *at_ms,
            value: Value::Text((*text).into()),
        };
        values.iter().map(sample).collect()
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What is on disks in the field: these bytes are read by every later version.
    #[test]
    fn blocks_have_the_bytes_that_they_always_had() {
        let golden = |samples: &[Sample], bytes: &str| {
            let encoded = encode(samples);
            assert_eq!(hex(&encoded), bytes);
            assert_eq!(decode(&encoded).as_deref(), Ok(samples));
        };
        let fridge = [(1_700_000_000_000, 4.5), (1_700_000_001_000, 4.6), (1_700_000_002_003, 4.4)];
        golden(&numbers(&fridge), GOLDEN_DECIMALS);
        golden(&numbers(&[(5, 1.0 / 3.0), (6, 1.0 / 3.0)]), GOLDEN_FLOATS);
        golden(&texts(&[(-1, "closed"), (0, "open"), (9, "closed"), (10, "open")]), GOLDEN_TEXTS);
        golden(&numbers(&[(0, 0.0)]), "110100000000");
    }

    const GOLDEN_DECIMALS: &str = "110380a0abfef962d60f01d0015a0194";
    const GOLDEN_FLOATS: &str = "12020a020000fcd7aad5aad5aad5aa0100";
    const GOLDEN_TEXTS: &str = "13040102021e000206636c6f736564046f70656e50";

    #[test]
    fn a_number_is_one_only_if_it_comes_back() {
        assert_eq!(Value::of("4.50"), Value::Number(4.5));
        assert_eq!(Value::of("-0"), Value::Number(0.0));
        assert_eq!(Value::of("1e3").to_string(), "1000");
        for text in ["", "nan", "inf", "9007199254740993000", "0x10", "4,5", "true"] {
            assert_eq!(Value::of(text), Value::Text(text.into()), "{text}");
        }
    }

    #[test]
    fn a_quiet_thermometer_costs_less_than_two_bytes_a_sample() {
        // Steps of up to 0.05 degrees, times that are late by up to 4 ms.
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut hundredths = 2_100_i64;
        let samples: Vec<Sample> = (0..512)
            .map(|second| {
                hundredths += random(11) as i64 - 5;
                let at_ms = 1_700_000_000_000 + second * 1000 + random(5) as i64;
                Sample { at_ms, value: Value::of(&format!("{}", hundredths as f64 / 100.0)) }
            })
            .collect();
        let bytes = encode(&samples);
        assert!(bytes.len() < 512 * 7 / 5, "{} bytes", bytes.len());
        assert_eq!(decode(&bytes), Ok(samples));
    }

    fn rising(steps: Vec<u32>, first: i64) -> impl Iterator<Item = i64> {
        let mut at = first;
        steps.into_iter().map(move |step| {
            at += i64::from(step) + 1;
            at
        })
    }

    proptest! {
        #[test]
        fn any_numbers_come_back_bit_by_bit(
            steps in prop::collection::vec(any::<u32>(), 1..200),
            first in -(1_i64 << 50)..(1 << 50),
            raw in prop::collection::vec(prop_oneof![any::<f64>(), (-1000_i32..1000).prop_map(|n| f64::from(n) / 10.0)], 200),
        ) {
            let numbers = raw.into_iter().map(|n| if n.is_finite() && n != 0.0 { n } else { 0.0 });
            let samples: Vec<Sample> = rising(steps, first)
                .zip(numbers)
                .map(|(at_ms, number)| Sample { at_ms, value: Value::Number(number) })
                .collect();
            let back = decode(&encode(&samples)).unwrap();
            prop_assert_eq!(back.len(), samples.len());
            for (one, two) in back.iter().zip(&samples) {
                prop_assert!(one.at_ms == two.at_ms && one.value.is_same(&two.value), "{one:?} {two:?}");
            }
        }

        #[test]
        fn any_texts_come_back(
            steps in prop::collection::vec(any::<u32>(), 1..100),
            words in prop::collection::vec("\\PC{0,12}", 1..6),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 100),
        ) {
            let samples: Vec<Sample> = rising(steps, 0)
                .zip(picks)
                .map(|(at_ms, pick)| Sample { at_ms, value: Value::Text(pick.get(&words).as_str().into()) })
                .collect();
            prop_assert_eq!(decode(&encode(&samples)), Ok(samples));
        }

        #[test]
        fn mangled_bytes_never_panic(bytes: Vec<u8>, flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
            let _ = decode(&bytes);
            let mut block = encode(&texts(&[(1, "a"), (2, "b"), (5, "a")]));
            block.extend(encode(&numbers(&[(1, 0.5), (2, 0.25), (9, 1e300)])));
            for (place, byte) in flips {
                let place = place.index(block.len());
                block[place] ^= byte;
            }
            let _ = decode(&block);
            for kind in [DECIMALS, FLOATS, TEXTS] {
                let mut bytes = bytes.clone();
                bytes.insert(0, kind);
                if let Ok(samples) = decode(&bytes) {
                    prop_assert!(samples.windows(2).all(|pair| pair[0].at_ms < pair[1].at_ms));
                }
            }
        }
    }
}
