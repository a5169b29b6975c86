//! Header blocks of HTTP/2: decoding with a bounded dynamic table, encoding without one.
//!
//! Called by the front only. Decoding has to follow every block of a connection, because later
//! blocks refer to earlier ones; encoding keeps no state, so what comes out can be read alone.
//!
//! Source: RFC 7541 (HPACK): section 5 and 6 for the forms, appendix A for the static table,
//! appendix B for the code lengths. The Huffman code is canonical, so its lengths are enough.

use std::collections::VecDeque;
use std::sync::LazyLock;

use bytes::Bytes;

/// Bytes of the dynamic table as section 4.1 counts them; the default of SETTINGS_HEADER_TABLE_SIZE,
/// which the server behind the front never raises.
pub(crate) const TABLE_MAX: usize = 4096;
/// What every entry costs besides its name and value (section 4.1).
const ENTRY_OVERHEAD: usize = 32;

/// Why a block could not be read; the connection cannot be followed after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HpackError {
    /// The block ends inside an integer or a string.
    #[error("header block ends too early")]
    Truncated,
    /// An integer is larger than anything in a block can be.
    #[error("integer in a header block is too large")]
    IntegerTooLarge,
    /// A field refers to an entry that is in neither table.
    #[error("header block refers to unknown entry {index}")]
    UnknownEntry {
        /// As sent; 1 to 61 are static.
        index: usize,
    },
    /// A string is not what its Huffman code says.
    #[error("string in a header block is not valid huffman code")]
    Huffman,
    /// The peer wants a larger table than was allowed, or says so after the first field.
    #[error("table size update in a header block is not allowed")]
    TableSize,
    /// Names and values of the block together are too long.
    #[error("header list is longer than {max} bytes")]
    ListTooLong {
        /// Counted as RFC 9113 counts: 32 bytes per field besides its text.
        max: usize,
    },
}

/// One field as decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) name: Bytes,
    pub(crate) value: Bytes,
    /// Whether the sender asked intermediaries never to index it.
    pub(crate) sensitive: bool,
}

impl Field {
    fn size(&self) -> usize {
        self.name.len() + self.value.len() + ENTRY_OVERHEAD
    }
}

/// The receiving half of one connection's header compression.
#[derive(Debug)]
pub(crate) struct Decoder {
    entries: VecDeque<Field>,
    size: usize,
    size_max: usize,
}

impl Decoder {
    pub(crate) fn new() -> Self {
        Self { entries: VecDeque::new(), size: 0, size_max: TABLE_MAX }
    }

    /// Decodes one complete block of at most `list_max` bytes of fields.
    pub(crate) fn decode(
        &mut self,
        block: &[u8],
        list_max: usize,
    ) -> Result<Vec<Field>, HpackError> {
        let mut input = Reader { bytes: block };
        let mut fields = Vec::new();
        let mut list = 0;
        while let Some(first) = input.peek() {
            let field = if first & 0x80 != 0 {
                let index = input.integer(7)?;
                self.entry(index)?.clone()
            } else if first & 0x40 != 0 {
                let field = self.literal(&mut input, 6, false)?;
                self.insert(field.clone());
                field
            } else if first & 0x20 != 0 {
                let size = input.integer(5)?;
                if size > TABLE_MAX || !fields.is_empty() {
                    return Err(HpackError::TableSize);
                }
                self.size_max = size;
                self.evict();
                continue;
            } else {
                self.literal(&mut input, 4, first & 0x10 != 0)?
            };
            list += field.size();
            if list > list_max {
                return Err(HpackError::ListTooLong { max: list_max });
            }
            fields.push(field);
        }
        Ok(fields)
    }

    fn literal(
        &self,
        input: &mut Reader<'_>,
        prefix: u32,
        sensitive: bool,
    ) -> Result<Field, HpackError> {
        let index = input.integer(prefix)?;
        let name = if index == 0 { input.string()? } else { self.entry(index)?.name.clone() };
        Ok(Field { name, value: input.string()?, sensitive })
    }

    fn entry(&self, index: usize) -> Result<&Field, HpackError> {
        let unknown = HpackError::UnknownEntry { index };
        let place = index.checked_sub(1).ok_or(unknown)?;
        if let Some(field) = STATIC.get(place) {
            return Ok(field);
        }
        self.entries.get(place - STATIC.len()).ok_or(unknown)
    }

    fn insert(&mut self, field: Field) {
        self.size += field.size();
        self.entries.push_front(Field { sensitive: false, ..field });
        self.evict();
    }

    /// Drops the oldest entries until the table is as small as it has to be; a field larger than the
    /// table empties it, itself included.
    fn evict(&mut self) {
        while self.size > self.size_max {
            let Some(field) = self.entries.pop_back() else { break };
            self.size -= field.size();
        }
    }

    #[cfg(test)]
    fn table_size(&self) -> usize {
        self.size
    }
}

/// Appends one field in the form that no table is needed for.
pub(crate) fn encode(field: &Field, out: &mut Vec<u8>) {
    out.push(if field.sensitive { 0x10 } else { 0x00 });
    string(&field.name, out);
    string(&field.value, out);
}

fn string(text: &[u8], out: &mut Vec<u8>) {
    integer(text.len(), 7, 0, out);
    out.extend_from_slice(text);
}

fn integer(mut value: usize, prefix: u32, first: u8, out: &mut Vec<u8>) {
    let full = (1_usize << prefix) - 1;
    if value < full {
        out.push(first | value as u8);
        return;
    }
    out.push(first | full as u8);
    value -= full;
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<u8> {
        self.bytes.first().copied()
    }

    fn byte(&mut self) -> Result<u8, HpackError> {
        let (first, rest) = self.bytes.split_first().ok_or(HpackError::Truncated)?;
        self.bytes = rest;
        Ok(*first)
    }

    /// Reads an integer whose first byte shares `prefix` bits (section 5.1). At most four more bytes,
    /// which is 28 bits and more than any block here is long.
    fn integer(&mut self, prefix: u32) -> Result<usize, HpackError> {
        let full = (1_usize << prefix) - 1;
        let mut value = usize::from(self.byte()?) & full;
        if value < full {
            return Ok(value);
        }
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(HpackError::IntegerTooLarge)
    }

    fn string(&mut self) -> Result<Bytes, HpackError> {
        let huffman = self.peek().ok_or(HpackError::Truncated)? & 0x80 != 0;
        let len = self.integer(7)?;
        if len > self.bytes.len() {
            return Err(HpackError::Truncated);
        }
        let (text, rest) = self.bytes.split_at(len);
        self.bytes = rest;
        if huffman { HUFFMAN.decode(text) } else { Ok(Bytes::copy_from_slice(text)) }
    }
}

/// The Huffman code of appendix B as a canonical code: symbols sorted by length, then by value.
struct Huffman {
    /// Symbols in the order of their codes; 256 is the end of a string.
    symbols: Vec<u16>,
    /// Per length in bits: the first code of that length, and its place in `symbols`.
    lengths: [Length; CODE_MAX + 1],
}

#[derive(Clone, Copy, Default)]
struct Length {
    first: u32,
    place: usize,
    count: usize,
}

/// Bits of the longest code.
const CODE_MAX: usize = 30;
/// Symbol that ends a string, and may not stand in one.
const END: u16 = 256;

static HUFFMAN: LazyLock<Huffman> = LazyLock::new(Huffman::new);

impl Huffman {
    fn new() -> Self {
        let mut symbols: Vec<u16> = (0..=END).collect();
        symbols.sort_by_key(|symbol| (CODE_LENGTHS[usize::from(*symbol)], *symbol));
        let mut lengths = [Length::default(); CODE_MAX + 1];
        let (mut code, mut place) = (0_u32, 0);
        for (bits, length) in lengths.iter_mut().enumerate().skip(1) {
            code <<= 1;
            let count = CODE_LENGTHS.iter().filter(|len| usize::from(**len) == bits).count();
            *length = Length { first: code, place, count };
            code += count as u32;
            place += count;
        }
        Self { symbols, lengths }
    }

    /// Decodes a string (section 5.2): what is left at the end has to be fewer than eight bits, all ones.
    fn decode(&self, text: &[u8]) -> Result<Bytes, HpackError> {
        let mut out = Vec::with_capacity(text.len() * 8 / 5);
        let (mut code, mut bits) = (0_u32, 0_usize);
        for byte in text {
            for shift in (0..8).rev() {
                code = code << 1 | u32::from(byte >> shift & 1);
                bits += 1;
                if bits > CODE_MAX {
                    return Err(HpackError::Huffman);
                }
                let length = self.lengths[bits];
                let Some(offset) = code.checked_sub(length.first) else { continue };
                if (offset as usize) < length.count {
                    let symbol = self.symbols[length.place + offset as usize];
                    out.push(u8::try_from(symbol).map_err(|_| HpackError::Huffman)?);
                    (code, bits) = (0, 0);
                }
            }
        }
        if bits >= 8 || code != (1_u32 << bits) - 1 {
            return Err(HpackError::Huffman);
        }
        Ok(out.into())
    }
}

/// Length in bits of every symbol's code (appendix B), the end of a string last.
const CODE_LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28,
    28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, //
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, //
    7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, //
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, //
    7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21,
    23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24,
    21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];

/// The static table (appendix A); the first entry has index 1.
static STATIC: LazyLock<Vec<Field>> = LazyLock::new(|| {
    let field = |(name, value): &(&'static str, &'static str)| Field {
        name: Bytes::from_static(name.as_bytes()),
        value: Bytes::from_static(value.as_bytes()),
        sensitive: false,
    };
    STATIC_TEXT.iter().map(field).collect()
});

#[rustfmt::skip]
const STATIC_TEXT: [(&str, &str); 61] = [
    (":authority", ""), (":method", "GET"), (":method", "POST"), (":path", "/"),
    (":path", "/index.html"), (":scheme", "http"), (":scheme", "https"), (":status", "200"),
    (":status", "204"), (":status", "206"), (":status", "304"), (":status", "400"),
    (":status", "404"), (":status", "500"), ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"), ("accept-language", ""), ("accept-ranges", ""),
    ("accept", ""), ("access-control-allow-origin", ""), ("age", ""), ("allow", ""),
    ("authorization", ""), ("cache-control", ""), ("content-disposition", ""),
    ("content-encoding", ""), ("content-language", ""), ("content-length", ""),
    ("content-location", ""), ("content-range", ""), ("content-type", ""), ("cookie", ""),
    ("date", ""), ("etag", ""), ("expect", ""), ("expires", ""), ("from", ""), ("host", ""),
    ("if-match", ""), ("if-modified-since", ""), ("if-none-match", ""), ("if-range", ""),
    ("if-unmodified-since", ""), ("last-modified", ""), ("link", ""), ("location", ""),
    ("max-forwards", ""), ("proxy-authenticate", ""), ("proxy-authorization", ""), ("range", ""),
    ("referer", ""), ("refresh", ""), ("retry-after", ""), ("server", ""), ("set-cookie", ""),
    ("strict-transport-security", ""), ("transfer-encoding", ""), ("user-agent", ""), ("vary", ""),
    ("via", ""), ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn texts(fields: &[Field]) -> Vec<(String, String)> {
        let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
        fields.iter().map(|field| (text(&field.name), text(&field.value))).collect()
    }

    fn check(decoder: &mut Decoder, hex: &str, expected: &[(&str, &str)]) {
        let digits: String = hex.split_whitespace().collect();
        let block: Vec<u8> = (0..digits.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hex"))
            .collect();
        let fields = decoder.decode(&block, 1 << 16).expect("a valid block");
        let expected: Vec<_> =
            expected.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        assert_eq!(texts(&fields), expected);
    }

    #[test]
    fn the_three_requests_of_rfc_7541_c_4_share_a_table() {
        let mut decoder = Decoder::new();
        let common = [(":method", "GET"), (":scheme", "http")];
        check(
            &mut decoder,
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            &[common[0], common[1], (":path", "/"), (":authority", "www.example.com")],
        );
        check(
            &mut decoder,
            "8286 84be 5886 a8eb 1064 9cbf",
            &[
                common[0],
                common[1],
                (":path", "/"),
                (":authority", "www.example.com"),
                ("cache-control", "no-cache"),
            ],
        );
        check(
            &mut decoder,
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
            &[
                common[0],
                (":scheme", "https"),
                (":path", "/index.html"),
                (":authority", "www.example.com"),
                ("custom-key", "custom-value"),
            ],
        );
        assert_eq!(decoder.table_size(), 164);
    }

    #[test]
    fn a_smaller_table_evicts_and_a_larger_one_than_allowed_is_refused() {
        let mut decoder = Decoder::new();
        check(&mut decoder, "4003 6162 6303 646566", &[("abc", "def")]);
        assert_eq!(decoder.table_size(), 38);
        check(&mut decoder, "20", &[]);
        assert_eq!(decoder.table_size(), 0);
        assert_eq!(decoder.decode(&[0xbe], 100), Err(HpackError::UnknownEntry { index: 62 }));
        let mut large = Vec::new();
        integer(TABLE_MAX + 1, 5, 0x20, &mut large);
        assert_eq!(decoder.decode(&large, 100), Err(HpackError::TableSize));
        assert_eq!(decoder.decode(&[0x82, 0x20], 100), Err(HpackError::TableSize));
    }

    #[test]
    fn a_short_block_of_references_cannot_grow_without_end() {
        let mut decoder = Decoder::new();
        let mut block = Vec::new();
        block.push(0x40);
        string(b"a", &mut block);
        string(&[b'x'; 3000], &mut block);
        block.extend([0xbe; 1000]);
        assert_eq!(decoder.decode(&block, 1 << 16), Err(HpackError::ListTooLong { max: 1 << 16 }));
    }

    #[test]
    fn bad_strings_are_refused() {
        let mut decoder = Decoder::new();
        for (block, error) in [
            (&[0x00][..], HpackError::Truncated),
            (&[0x00, 0x05, b'a'], HpackError::Truncated),
            (&[0x80], HpackError::UnknownEntry { index: 0 }),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0x01], HpackError::IntegerTooLarge),
            // A whole byte of padding, and padding with a zero in it.
            (&[0x00, 0x82, 0x1f, 0xff, 0x00], HpackError::Huffman),
            (&[0x00, 0x81, 0x18, 0x00], HpackError::Huffman),
            // The end of a string inside one.
            (&[0x00, 0x84, 0xff, 0xff, 0xff, 0xff, 0x00], HpackError::Huffman),
        ] {
            assert_eq!(decoder.decode(block, 1 << 16), Err(error), "{block:02x?}");
        }
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(fields in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..300), prop::collection::vec(any::<u8>(), 0..300), any::<bool>()), 0..20)
        ) {
            let fields: Vec<Field> = fields.into_iter()
                .map(|(name, value, sensitive)| Field { name: name.into(), value: value.into(), sensitive })
                .collect();
            let mut block = Vec::new();
            for field in &fields {
                encode(field, &mut block);
            }
            prop_assert_eq!(Decoder::new().decode(&block, 1 << 20), Ok(fields));
        }

        #[test]
        fn any_bytes_are_read_or_refused_and_the_table_stays_small(
            blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..8)
        ) {
            let mut decoder = Decoder::new();
            for block in blocks {
                if decoder.decode(&block, 1 << 14).is_err() {
                    break;
                }
                prop_assert!(decoder.table_size() <= TABLE_MAX);
            }
        }
    }
}
