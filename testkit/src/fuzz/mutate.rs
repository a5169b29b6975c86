//! Inputs from a corpus: bytes that are turned, cut, repeated and joined, and JSON whose parts are exchanged.

use super::INPUT_LEN_MAX;
use serde_json::{Value, json};
use skerry_edge_core::backoff::Random;

/// Bytes that parsers trip over.
const TOKENS: &[&[u8]] = &[
    b"{}",
    b"[]",
    b"null",
    b"true",
    b"-1",
    b"0",
    b"18446744073709551616",
    b"-9223372036854775808",
    b"1e400",
    b"\"\"",
    b"\"\\u0000\"",
    b"\"\\ud800\"",
    b"\xff",
    b"\xed\xa0\x80",
    b"\0",
    b"/",
    b"//",
    b"../",
    b",",
    b":",
    b";",
    b"=",
    b".",
    b"\r\n",
    b"\n",
    b"{\"a\":",
    b"[[[[[[[[",
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\x7f",
    b"\x80\x00\x00\x00",
    b"resource",
    b"metadata",
    b"content",
    b"header",
    b"uid",
    b"membership",
    b"null/node/edge1",
    b"default/pod/web",
    b"insert",
    b"update",
    b"delete",
    b"response",
    b"skerry/digest",
];

/// Makes one input after the other.
pub(super) struct Mutator {
    random: Random,
    corpus: Vec<Vec<u8>>,
}

impl Mutator {
    pub(super) fn new(seed: u64, mut corpus: Vec<Vec<u8>>) -> Self {
        corpus.push(Vec::new());
        Self { random: Random::new(seed), corpus }
    }

    pub(super) fn next_input(&mut self) -> Vec<u8> {
        let mut input = self.pick().clone();
        if self.random.below(3) == 0
            && let Ok(mut value) = serde_json::from_slice::<Value>(&input)
        {
            for _ in 0..=self.random.below(4) {
                self.mutate_json(&mut value);
            }
            input = serde_json::to_vec(&value).unwrap_or_default();
            if self.random.below(2) == 0 {
                input.truncate(INPUT_LEN_MAX);
                return input;
            }
        }
        for _ in 0..=self.random.below(6) {
            self.mutate_bytes(&mut input);
        }
        input.truncate(INPUT_LEN_MAX);
        input
    }

    fn pick(&mut self) -> &Vec<u8> {
        let index = self.below(self.corpus.len());
        &self.corpus[index]
    }

    fn below(&mut self, len: usize) -> usize {
        self.random.below(len.max(1) as u64) as usize
    }

    fn mutate_bytes(&mut self, input: &mut Vec<u8>) {
        let at = self.below(input.len() + 1);
        let end = (at + self.below(32)).min(input.len());
        match self.random.below(9) {
            0 if at < input.len() => input[at] ^= 1 << self.random.below(8),
            1 if at < input.len() => input[at] = self.random.below(256) as u8,
            2 => drop(input.drain(at..end)),
            3 => {
                let copy = input[at..end].to_vec();
                let to = self.below(input.len() + 1);
                input.splice(to..to, copy);
            }
            4 => input.truncate(at),
            5 => {
                // The rest of another one.
                let other = self.pick().clone();
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            6 => {
                let token = TOKENS[self.below(TOKENS.len())];
                input.splice(at..end, token.iter().copied());
            }
            7 => {
                let token = TOKENS[self.below(TOKENS.len())];
                let count = 1 + self.below(200);
                input.splice(at..at, token.repeat(count));
            }
            _ => {
                let len = self.below(16);
                let bytes: Vec<u8> = (0..len).map(|_| self.random.below(256) as u8).collect();
                input.splice(at..at, bytes);
            }
        }
    }

    /// Changes one part of a value, or its own text when the part is a text with JSON in it, as patches are.
    fn mutate_json(&mut self, value: &mut Value) {
        let goes_deeper = self.random.below(5) > 0;
        match value {
            Value::Object(fields) if goes_deeper && !fields.is_empty() => {
                let index = self.below(fields.len());
                let name = fields.keys().nth(index).expect("below the length").clone();
                match self.random.below(8) {
                    0 => drop(fields.remove(&name)),
                    1 => {
                        let part = fields.remove(&name).unwrap_or_default();
                        fields.insert(format!("{name}x"), part);
                    }
                    _ => self.mutate_json(&mut fields[&name]),
                }
            }
            Value::Array(parts) if goes_deeper && !parts.is_empty() => {
                let index = self.below(parts.len());
                match self.random.below(6) {
                    0 => drop(parts.remove(index)),
                    1 => parts.push(parts[index].clone()),
                    _ => self.mutate_json(&mut parts[index]),
                }
            }
            Value::String(text) if goes_deeper => match serde_json::from_str::<Value>(text) {
                Ok(mut inner) if inner.is_object() || inner.is_array() => {
                    self.mutate_json(&mut inner);
                    *text = inner.to_string();
                }
                _ => *value = self.json(),
            },
            _ => *value = self.json(),
        }
    }

    fn json(&mut self) -> Value {
        match self.random.below(12) {
            0 => Value::Null,
            1 => json!(true),
            2 => json!(0),
            3 => json!(-1.5e300),
            4 => json!(u64::MAX),
            5 => json!(""),
            6 => json!("a/b/../c\0\u{10ffff}"),
            7 => json!("x".repeat(300)),
            8 => json!([]),
            9 => json!({}),
            10 => json!([null, {"metadata": []}, [[]]]),
            _ => json!({"metadata": {"name": "web", "uid": 7}, "status": "none", "spec": []}),
        }
    }
}
