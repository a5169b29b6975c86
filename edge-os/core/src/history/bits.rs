//! Numbers as bytes and as bits, most significant bit first. Readers take any bytes and never read beyond them.

use super::block::BlockError;

pub(super) fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)).cast_unsigned()
}

pub(super) fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ -((number & 1).cast_signed())
}

pub(super) fn write_u64(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

pub(super) fn write_i64(bytes: &mut Vec<u8>, number: i64) {
    write_u64(bytes, zigzag(number));
}

pub(super) fn read_u64(rest: &mut &[u8]) -> Result<u64, BlockError> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = *rest.split_off_first().ok_or(BlockError::Short)?;
        let part = u64::from(byte & 0x7f);
        if shift == 63 && part > 1 {
            return Err(BlockError::Bad);
        }
        number |= part << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(BlockError::Bad)
}

pub(super) fn read_i64(rest: &mut &[u8]) -> Result<i64, BlockError> {
    read_u64(rest).map(unzigzag)
}

/// Bits that become bytes; the last byte is filled with zeros.
#[derive(Default)]
pub(super) struct BitWriter {
    bytes: Vec<u8>,
    /// Bits that are not in `bytes` yet, and how many; less than 8 between calls.
    held: u8,
    count: u32,
}

impl BitWriter {
    /// Writes the low `width` bits of a number, at most 64.
    pub(super) fn write(&mut self, number: u64, width: u32) {
        let mut left = width;
        while left > 0 {
            let take = left.min(8 - self.count);
            let part = (number >> (left - take)) & ((1 << take) - 1);
            self.held = if take == 8 { part as u8 } else { (self.held << take) | part as u8 };
            self.count += take;
            left -= take;
            if self.count == 8 {
                self.bytes.push(self.held);
                (self.held, self.count) = (0, 0);
            }
        }
    }

    /// Writes so many ones, at most 64.
    pub(super) fn ones(&mut self, count: u32) {
        self.write(u64::MAX, count);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        if self.count > 0 {
            self.write(0, 8 - self.count);
        }
        self.bytes
    }
}

/// Bits of bytes.
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    /// Bits that were read.
    at: usize,
}

impl<'a> BitReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Reads a number of `width` bits, at most 64.
    pub(super) fn read(&mut self, width: u32) -> Result<u64, BlockError> {
        let mut number = 0_u64;
        let mut left = width;
        while left > 0 {
            let byte = *self.bytes.get(self.at / 8).ok_or(BlockError::Short)?;
            let room = 8 - (self.at % 8) as u32;
            let take = left.min(room);
            let part = (u64::from(byte) >> (room - take)) & ((1 << take) - 1);
            number = (number << take) | part;
            self.at += take as usize;
            left -= take;
        }
        Ok(number)
    }

    /// Counts ones up to a zero, which is read too, or up to `most`, where nothing more is read.
    pub(super) fn read_ones(&mut self, most: u32) -> Result<u32, BlockError> {
        for count in 0..most {
            let byte = *self.bytes.get(self.at / 8).ok_or(BlockError::Short)?;
            let bit = byte >> (7 - self.at % 8) & 1;
            self.at += 1;
            if bit == 0 {
                return Ok(count);
            }
        }
        Ok(most)
    }

    /// The bytes of which nothing was read.
    pub(super) fn rest(self) -> &'a [u8] {
        &self.bytes[self.at.div_ceil(8)..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_and_bits_come_back(
            numbers: Vec<(u64, i64)>,
            parts in prop::collection::vec((any::<u64>(), 0_u32..=64, 0_u32..=24), 0..50),
        ) {
            let mut bytes = Vec::new();
            for (one, two) in &numbers {
                write_u64(&mut bytes, *one);
                write_i64(&mut bytes, *two);
            }
            let mut rest = bytes.as_slice();
            for (one, two) in &numbers {
                prop_assert_eq!((read_u64(&mut rest), read_i64(&mut rest)), (Ok(*one), Ok(*two)));
            }
            prop_assert!(rest.is_empty());
            let low = |number: u64, width: u32| number & u64::MAX.checked_shr(64 - width).unwrap_or(0);
            let mut bits = BitWriter::default();
            for (number, width, ones) in &parts {
                bits.write(*number, *width);
                bits.ones(*ones);
                if *ones < 24 {
                    bits.write(0, 1);
                }
            }
            let bytes = bits.finish();
            let mut bits = BitReader::new(&bytes);
            for (number, width, ones) in &parts {
                prop_assert_eq!(bits.read(*width), Ok(low(*number, *width)));
                prop_assert_eq!(bits.read_ones(24), Ok(*ones));
            }
            prop_assert!(bits.rest().is_empty());
        }
    }
}
