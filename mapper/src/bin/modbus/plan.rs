//! Which requests read a set of registers: neighbours together, within what one request may ask for.
//!
//! Pure; the driver is the caller. Reading two properties of one table that lie close together with
//! one request halves the time on a slow line.

use crate::register::{Range, Table, WORDS_MAX};

/// Most bits that one request can read.
const BITS_MAX: u16 = 2000;
/// Words between two properties that are read and thrown away rather than asked around: as much time
/// on a line of 9600 baud as the head of another request.
const GAP_MAX: u16 = 8;

/// One request and what its answer is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) range: Range,
    pub(crate) parts: Vec<Part>,
}

/// One property's share of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// The property's number as it was given.
    pub(crate) index: usize,
    /// Where its words begin in the answer.
    pub(crate) at: usize,
    /// How many they are.
    pub(crate) len: usize,
}

/// Returns the requests for `wanted`; with `join`, neighbours share one.
pub(crate) fn plan(wanted: &[(usize, Range)], join: bool) -> Vec<Request> {
    let mut sorted = wanted.to_vec();
    sorted.sort_by_key(|(_, range)| (range.table, range.offset, range.len));
    let mut requests: Vec<Request> = Vec::new();
    for (index, range) in sorted {
        let joined = requests.last_mut().filter(|_| join).and_then(|last| {
            let whole = united(last.range, range)?;
            last.range = whole;
            Some(last)
        });
        let request = match joined {
            Some(request) => request,
            None => {
                requests.push(Request { range, parts: Vec::new() });
                requests.last_mut().expect("just pushed")
            }
        };
        let at = usize::from(range.offset - request.range.offset);
        request.parts.push(Part { index, at, len: usize::from(range.len) });
    }
    requests
}

/// One range over both, if they are close enough and the whole is not too long. `first` begins first.
fn united(first: Range, second: Range) -> Option<Range> {
    if first.table != second.table {
        return None;
    }
    let (max, gap) = match first.table {
        Table::Coils | Table::Discrete => (BITS_MAX, GAP_MAX * 16),
        Table::Input | Table::Holding => (WORDS_MAX, GAP_MAX),
    };
    let end = |range: Range| u32::from(range.offset) + u32::from(range.len);
    let whole = end(first).max(end(second)) - u32::from(first.offset);
    let far = u32::from(second.offset) > end(first) + u32::from(gap);
    (!far && whole <= u32::from(max)).then_some(Range { len: whole as u16, ..first })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(table: Table, offset: u16, len: u16) -> Range {
        Range { table, offset, len }
    }

    #[test]
    fn neighbours_share_a_request_and_strangers_do_not() {
        let wanted = [
            (0, range(Table::Holding, 10, 2)),
            (1, range(Table::Input, 11, 1)),
            (2, range(Table::Holding, 12, 1)),
            (3, range(Table::Holding, 100, 1)),
            (4, range(Table::Holding, 11, 1)),
        ];
        let requests = plan(&wanted, true);
        let ranges: Vec<_> = requests.iter().map(|request| request.range).collect();
        assert_eq!(
            ranges,
            [
                range(Table::Input, 11, 1),
                range(Table::Holding, 10, 3),
                range(Table::Holding, 100, 1)
            ]
        );
        assert_eq!(
            requests[1].parts,
            [
                Part { index: 0, at: 0, len: 2 },
                Part { index: 4, at: 1, len: 1 },
                Part { index: 2, at: 2, len: 1 }
            ]
        );
        assert_eq!(plan(&wanted, false).len(), 5);
    }

    proptest! {
        #[test]
        fn every_property_is_read_once_and_no_request_is_too_long(
            wanted in prop::collection::vec((0_u16..500, 1_u16..=125, any::<bool>()), 0..40)
        ) {
            let wanted: Vec<_> = wanted.into_iter().enumerate()
                .map(|(index, (offset, len, words))| {
                    (index, range(if words { Table::Holding } else { Table::Coils }, offset, len))
                })
                .collect();
            let requests = plan(&wanted, true);
            let mut seen = vec![0; wanted.len()];
            for request in &requests {
                let max = if request.range.table.is_bits() { BITS_MAX } else { WORDS_MAX };
                prop_assert!(request.range.len <= max);
                for part in &request.parts {
                    seen[part.index] += 1;
                    let range = wanted[part.index].1;
                    prop_assert_eq!(usize::from(request.range.offset) + part.at, usize::from(range.offset));
                    prop_assert!(part.at + part.len <= usize::from(request.range.len));
                }
            }
            prop_assert!(seen.iter().all(|count| *count == 1));
        }
    }
}
