//! The protobuf wire format: a message is a list of numbered payloads.

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum WireError {
    #[error("the message ends in the middle of a field")]
    Truncated,
    #[error("a number is longer than 64 bits")]
    Varint,
    #[error("field number {0} is out of range")]
    Number(u64),
    #[error("wire type {0} is unknown")]
    Type(u8),
}

/// What one field carries.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Payload<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32,
}

/// The fields of a message in their order; ends after the first error.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    fn field(&mut self) -> Result<(u32, Payload<'a>), WireError> {
        let key = varint(&mut self.rest)?;
        let number =
            u32::try_from(key >> 3).ok().filter(|number| (1..=0x1fff_ffff).contains(number));
        let number = number.ok_or(WireError::Number(key >> 3))?;
        let payload = match (key & 7) as u8 {
            0 => Payload::Varint(varint(&mut self.rest)?),
            1 => {
                let bytes: [u8; 8] =
                    self.take(8)?.try_into().expect("`take` returns what it was asked for");
                Payload::Fixed64(u64::from_le_bytes(bytes))
            }
            2 => {
                let len = usize::try_from(varint(&mut self.rest)?);
                Payload::Bytes(self.take(len.map_err(|_| WireError::Truncated)?)?)
            }
            5 => {
                self.take(4)?;
                Payload::Fixed32
            }
            other => return Err(WireError::Type(other)),
        };
        Ok((number, payload))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<(u32, Payload<'a>), WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

/// The numbers of a packed list.
pub(super) fn packed_varints(
    mut rest: &[u8],
) -> impl Iterator<Item = Result<u64, WireError>> + use<'_> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let number = varint(&mut rest);
        if number.is_err() {
            rest = &[];
        }
        Some(number)
    })
}

fn varint(rest: &mut &[u8]) -> Result<u64, WireError> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first().ok_or(WireError::Truncated)?;
        *rest = after;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(WireError::Varint)
}
