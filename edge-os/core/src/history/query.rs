//! What is asked of the history, and which rows answer it.
//!
//! A question is a path and a query, as those about logs are:
//! `/deviceHistory/<namespace>/<device>?property=…&from=…&to=…&every=…&limit=…`, times in Unix milliseconds. An answer is
//! one [`Page`] as JSON, with at most [`ROWS_MAX`] rows and where the next one begins.
//!
//! No I/O, no clock. Callers: the node's end of the tunnel asks the history with it, the store feeds [`Pager`].

use super::Lost;
use super::block::{Sample, Value};
use serde::{Deserialize, Serialize};
use skerry_protocol::tunnel::HISTORY_PATH;

/// Rows of one page.
pub const ROWS_MAX: usize = 2_000;
/// Bytes of the values of one page; one row always fits.
pub const PAGE_LEN_MAX: usize = 256 * 1024;

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// `namespace/name` of the device.
    pub device: String,
    /// The property.
    pub property: String,
    /// First moment, Unix milliseconds.
    pub from_ms: i64,
    /// First moment that is not asked for.
    pub to_ms: i64,
    /// Length of the pieces of time that become one row each, in milliseconds; `None` asks for every sample.
    pub every_ms: Option<i64>,
    /// Rows at most, 1 to [`ROWS_MAX`].
    pub limit: usize,
}

/// Why a question is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuestionError {
    /// Not a path of this API.
    #[error("`{0}` is not /deviceHistory/<namespace>/<device>")]
    Path(String),
    /// There is no property in it.
    #[error("no property is named")]
    NoProperty,
    /// A parameter that is not what its name says.
    #[error("parameter {name}=`{value}` is not {expected}")]
    Parameter {
        /// Its name.
        name: String,
        /// As sent.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
}

impl Question {
    /// Reads a decoded path and a raw query; unknown parameters are ignored. Without times it is about all there is.
    ///
    /// # Errors
    ///
    /// [`QuestionError`].
    pub fn parse(path: &str, query: &str) -> Result<Self, QuestionError> {
        let bad = || QuestionError::Path(path.chars().take(200).collect());
        let device = path.strip_prefix(HISTORY_PATH).ok_or_else(bad)?;
        match device.split('/').collect::<Vec<_>>().as_slice() {
            [namespace, name] if !namespace.is_empty() && !name.is_empty() => {}
            _ => return Err(bad()),
        }
        let mut question = Self {
            device: device.into(),
            property: String::new(),
            from_ms: i64::MIN,
            to_ms: i64::MAX,
            every_ms: None,
            limit: ROWS_MAX,
        };
        for pair in query.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = crate::logs::decoded(value);
            let bad = |expected| QuestionError::Parameter {
                name: name.into(),
                value: value.chars().take(100).collect(),
                expected,
            };
            let time = || value.parse::<i64>().map_err(|_| bad("a time in Unix milliseconds"));
            match name {
                "property" => question.property = value,
                "from" => question.from_ms = time()?,
                "to" => question.to_ms = time()?,
                "every" => {
                    let every = value.parse().ok().filter(|every| *every > 0);
                    question.every_ms =
                        Some(every.ok_or_else(|| bad("a number of milliseconds over 0"))?);
                }
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=ROWS_MAX).contains(limit));
                    question.limit = limit.ok_or_else(|| bad("a number of rows, 1 to 2000"))?;
                }
                _ => {}
            }
        }
        match question.property.is_empty() {
            true => Err(QuestionError::NoProperty),
            false => Ok(question),
        }
    }
}

/// One row of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Unix milliseconds: of the sample, or when its piece of time begins.
    pub at: i64,
    /// The value; of a piece of time the mean of numbers, and of texts the last.
    pub value: String,
    /// Samples in the piece of time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// The least number in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// The greatest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

/// An answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Page {
    /// In order of time.
    pub rows: Vec<Row>,
    /// Where the next page begins, if there is more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<i64>,
    /// The oldest sample that is kept of the property.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest: Option<i64>,
    /// What this node has lost of all its histories.
    #[serde(default)]
    pub lost: Lost,
    /// Why there is no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Makes rows of samples.
#[derive(Debug)]
pub struct Pager {
    question: Question,
    rows: Vec<Row>,
    len: usize,
    next: Option<i64>,
    piece: Option<Piece>,
}

#[derive(Debug)]
struct Piece {
    at: i64,
    count: u64,
    numbers: u64,
    sum: f64,
    min: f64,
    max: f64,
    last: Value,
}

impl Pager {
    /// For one question.
    pub fn new(question: Question) -> Self {
        Self { question, rows: Vec::new(), len: 0, next: None, piece: None }
    }

    /// Takes the next sample, in order of time. Returns whether more are wanted.
    pub fn take(&mut self, sample: &Sample) -> bool {
        if self.next.is_some() || sample.at_ms >= self.question.to_ms {
            return false;
        }
        if sample.at_ms < self.question.from_ms {
            return true;
        }
        let Some(every) = self.question.every_ms else {
            let value = sample.value.to_string();
            if !self.has_room(value.len()) {
                self.next = Some(sample.at_ms);
                return false;
            }
            self.push(Row { at: sample.at_ms, value, count: None, min: None, max: None });
            return true;
        };
        let at = sample.at_ms.saturating_sub(sample.at_ms.rem_euclid(every));
        if self.piece.as_ref().is_some_and(|piece| piece.at != at) {
            self.end_piece();
            if !self.has_room(0) {
                // The beginning of the piece, so that it is whole on the next page; never before what was asked for.
                self.next = Some(at.max(self.question.from_ms));
                return false;
            }
        }
        let piece = self.piece.get_or_insert_with(|| Piece {
            at,
            count: 0,
            numbers: 0,
            sum: 0.0,
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
            last: sample.value.clone(),
        });
        piece.count += 1;
        piece.last = sample.value.clone();
        if let Value::Number(number) = sample.value {
            piece.numbers += 1;
            piece.sum += number;
            piece.min = piece.min.min(number);
            piece.max = piece.max.max(number);
        }
        true
    }

    /// The answer.
    pub fn finish(mut self, oldest: Option<i64>, lost: Lost) -> Page {
        self.end_piece();
        Page { rows: self.rows, next: self.next, oldest, lost, error: None }
    }

    fn has_room(&self, len: usize) -> bool {
        let is_first = self.rows.is_empty();
        is_first || (self.rows.len() < self.question.limit && self.len + len <= PAGE_LEN_MAX)
    }

    fn end_piece(&mut self) {
        let Some(piece) = self.piece.take() else { return };
        let all_numbers = piece.numbers == piece.count;
        let value = match all_numbers {
            #[allow(clippy::cast_precision_loss)] // far less than 2^53 samples
            true => (piece.sum / piece.numbers as f64).to_string(),
            false => piece.last.to_string(),
        };
        self.push(Row {
            at: piece.at,
            value,
            count: Some(piece.count),
            min: all_numbers.then_some(piece.min),
            max: all_numbers.then_some(piece.max),
        });
    }

    fn push(&mut self, row: Row) {
        self.len += row.value.len();
        self.rows.push(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn question(query: &str) -> Question {
        let question = Question::parse("/deviceHistory/site-a/fridge", query);
        question.unwrap_or_else(|error| panic!("{query}: {error}"))
    }

    fn samples(count: i64) -> Vec<Sample> {
        let number = |n: i64| Value::of(&format!("{}", n % 10));
        (0..count).map(|n| Sample { at_ms: n * 1000, value: number(n) }).collect()
    }

    fn page(query: &str, samples: &[Sample]) -> Page {
        let mut pager = Pager::new(question(query));
        let _ = samples.iter().all(|sample| pager.take(sample));
        pager.finish(None, Lost::default())
    }

    #[test]
    fn questions_are_read_and_bad_ones_say_what_is_wrong() {
        let asked = question("property=a%2Fb&from=5&to=9&every=60000&limit=7&x=y");
        assert_eq!((asked.device.as_str(), asked.property.as_str()), ("site-a/fridge", "a/b"));
        assert_eq!(
            (asked.from_ms, asked.to_ms, asked.every_ms, asked.limit),
            (5, 9, Some(60_000), 7)
        );
        let refused =
            |path: &str, query: &str| Question::parse(path, query).expect_err("bad").to_string();
        assert!(refused("/deviceHistory/a", "property=t").contains("is not /deviceHistory/"));
        assert!(refused("/containerLogs/a/b", "property=t").contains("is not /deviceHistory/"));
        assert!(refused("/deviceHistory/a/b", "").contains("no property"));
        for query in ["from=x", "every=0", "every=-1", "limit=0", "limit=2001", "to="] {
            let text = refused("/deviceHistory/a/b", &format!("property=t&{query}"));
            assert!(text.contains("is not a"), "{query}: {text}");
        }
    }

    #[test]
    fn pages_follow_each_other_without_gap_or_repeat() {
        let all = samples(25);
        let first = page("property=t&limit=10", &all);
        assert_eq!((first.rows.len(), first.next), (10, Some(10_000)));
        let second = page("property=t&limit=10&from=10000&to=20000", &all);
        assert_eq!((second.rows.len(), second.next, second.rows[0].at), (10, None, 10_000));
    }

    #[test]
    fn pieces_of_time_have_mean_least_and_greatest() {
        let answer = page("property=t&every=10000&from=3000", &samples(20));
        assert_eq!(answer.rows.len(), 2);
        let row = &answer.rows[1];
        assert_eq!((row.at, row.value.as_str(), row.count), (10_000, "4.5", Some(10)));
        assert_eq!((row.min, row.max), (Some(0.0), Some(9.0)));
        assert_eq!(answer.rows[0].count, Some(7));
        let texts: Vec<Sample> = [(1, "open"), (2, "closed")]
            .map(|(at_ms, text)| Sample { at_ms, value: Value::of(text) })
            .into();
        let row = &page("property=t&every=10000", &texts).rows[0];
        assert_eq!((row.value.as_str(), row.count, row.min), ("closed", Some(2), None));
    }

    proptest! {
        #[test]
        fn all_pages_together_are_the_whole(count in 0_i64..200, limit in 1_usize..20, every in prop::option::of(500_i64..9000)) {
            let every = every.map(|every| format!("&every={every}")).unwrap_or_default();
            let all = samples(count);
            let whole = page(&format!("property=t{every}"), &all);
            let mut rows = Vec::new();
            let mut from = Some(0);
            while let Some(at) = from {
                let part = page(&format!("property=t&limit={limit}&from={at}{every}"), &all);
                prop_assert!(part.rows.len() <= limit && part.next.is_none_or(|next| next > at));
                rows.extend(part.rows);
                from = part.next;
            }
            prop_assert_eq!(rows, whole.rows);
        }

        #[test]
        fn any_question_is_read_or_refused(path in "\\PC{0,40}", query in "\\PC{0,60}") {
            let _ = Question::parse(&path, &query);
            let _ = Question::parse("/deviceHistory/a/b", &query);
        }
    }
}
