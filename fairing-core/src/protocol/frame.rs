//! The bytes of the protocol: a fixed header before every payload, all numbers little-endian.
//!
//! ```text
//! offset  0    1        2..4      4..8    8..16
//!         kind version  reserved  detail  payload length in bytes
//! ```
//!
//! What `detail` means depends on the kind; most leave it 0.
//!
//! Lengths are checked against the kind's limit before anything is allocated.

/// Version of everything on the wire; both ends must have the same.
pub(crate) const VERSION: u8 = 3;

/// Size of the header before each payload.
pub(crate) const HEADER_BYTES: usize = 16;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A control message, CBOR.
    Message = 1,
    /// The bytes of a model file.
    Model = 2,
    /// Frozen parameters as bytes.
    Frozen = 3,
    /// A gradient: [`PushHead`], presence bits, then `f32` values.
    Push = 4,
    /// Parameters, `f32` values; the answer to a push, or rank 0's at join. The detail of an answer is the staleness of the
    /// push: how many updates of others came between the worker's last pull and it.
    Parameters = 5,
    /// Parameters as with `Parameters`, and the run stops with the round that they close.
    LastParameters = 6,
    /// The bytes of a safetensors file.
    Tensors = 7,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Kind::Message,
            2 => Kind::Model,
            3 => Kind::Frozen,
            4 => Kind::Push,
            5 => Kind::Parameters,
            6 => Kind::LastParameters,
            7 => Kind::Tensors,
            _ => return None,
        })
    }

    /// The longest payload that is legal for this kind.
    fn limit_bytes(self) -> u64 {
        match self {
            // Metrics, collectives and layouts: megabytes at most in any real run.
            Kind::Message => 64 << 20,
            // A model's parameters; receivers check the exact length, or grow as bytes arrive.
            Kind::Model | Kind::Tensors | Kind::Frozen | Kind::Push | Kind::Parameters | Kind::LastParameters => {
                1 << 40
            }
        }
    }
}

/// What stands before each payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) detail: u32,
    pub(crate) length_bytes: u64,
}

/// Bytes that are not a frame of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("unknown frame kind {0}; is this a fairing process?")]
    UnknownKind(u8),
    #[error("protocol version {0}, but this program speaks {VERSION}")]
    Version(u8),
    #[error("a {kind:?} frame of {length_bytes} bytes is over the limit of {limit_bytes}")]
    TooLong { kind: Kind, length_bytes: u64, limit_bytes: u64 },
}

impl Header {
    /// The header before a payload of `length_bytes`, without a detail.
    pub(crate) fn of(kind: Kind, length_bytes: usize) -> Self {
        Self { kind, detail: 0, length_bytes: length_bytes as u64 }
    }

    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[1] = VERSION;
        bytes[4..8].copy_from_slice(&self.detail.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length_bytes.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: [u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let [kind, version, _, _, a, b, c, d, length @ ..] = bytes;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let kind = Kind::from_byte(kind).ok_or(FrameError::UnknownKind(kind))?;
        let (length_bytes, limit_bytes) = (u64::from_le_bytes(length), kind.limit_bytes());
        if length_bytes > limit_bytes {
            return Err(FrameError::TooLong { kind, length_bytes, limit_bytes });
        }
        Ok(Self { kind, detail: u32::from_le_bytes([a, b, c, d]), length_bytes })
    }
}

/// What stands before the presence bits and the values of a push.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct PushHead {
    /// The round that this push belongs to, from 0: the number of the worker's steps before it. With the connection's rank
    /// and incarnation it names the push, so that one that comes twice is applied once.
    pub(crate) round: u64,
    /// Number of examples that the gradient is the mean of.
    pub(crate) examples: u64,
    /// Learning rate of this round.
    pub(crate) learning_rate: f64,
    /// Epoch of the batch that the gradient is of.
    pub(crate) epoch: u64,
    /// Batches of that epoch that are done with this step: where a worker that is started again goes on.
    pub(crate) batches_done: u64,
}

impl PushHead {
    pub(crate) const BYTES: usize = 40;

    pub(crate) fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let words = [self.round, self.examples, self.learning_rate.to_bits(), self.epoch, self.batches_done];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn decode(bytes: [u8; Self::BYTES]) -> Self {
        let word = |at: usize| {
            let bytes = bytes[at..at + 8].try_into().expect("eight bytes");
            u64::from_le_bytes(bytes)
        };
        Self {
            round: word(0),
            examples: word(8),
            learning_rate: f64::from_bits(word(16)),
            epoch: word(24),
            batches_done: word(32),
        }
    }
}

/// Packs one bit per tensor, lowest bit first.
pub(crate) fn pack_bits(bits: &[bool], out: &mut Vec<u8>) {
    out.clear();
    out.resize(bits.len().div_ceil(8), 0);
    for (index, _) in bits.iter().enumerate().filter(|(_, bit)| **bit) {
        out[index / 8] |= 1 << (index % 8);
    }
}

/// Inverse of [`pack_bits`] for one bit.
pub(crate) fn bit(bytes: &[u8], index: usize) -> bool {
    bytes[index / 8] >> (index % 8) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_header_decodes_to_what_was_encoded(kind in 1u8..=7, detail: u32, length in 0u64..1 << 41) {
            let kind = Kind::from_byte(kind).unwrap();
            let header = Header { kind, detail, length_bytes: length };
            match Header::decode(header.encode()) {
                Ok(read) => prop_assert_eq!(read, header),
                Err(error) => {
                    let limit_bytes = kind.limit_bytes();
                    prop_assert!(length > limit_bytes);
                    prop_assert_eq!(error, FrameError::TooLong { kind, length_bytes: length, limit_bytes });
                }
            }
        }

        #[test]
        fn any_sixteen_bytes_are_a_header_or_an_error(bytes: [u8; HEADER_BYTES]) {
            if let Ok(header) = Header::decode(bytes) {
                prop_assert!(header.length_bytes <= header.kind.limit_bytes());
            }
        }

        #[test]
        fn a_push_head_keeps_its_bits(words: [u64; 5]) {
            let [round, examples, rate, epoch, batches_done] = words;
            let head = PushHead { round, examples, learning_rate: f64::from_bits(rate), epoch, batches_done };
            let read = PushHead::decode(head.encode());
            let rate = read.learning_rate.to_bits();
            prop_assert_eq!([read.round, read.examples, rate, read.epoch, read.batches_done], words);
        }

        #[test]
        fn presence_bits_survive_packing(bits in proptest::collection::vec(any::<bool>(), 0..70)) {
            let mut packed = vec![0xff; 3];
            pack_bits(&bits, &mut packed);
            prop_assert_eq!(packed.len(), bits.len().div_ceil(8));
            let read: Vec<bool> = (0..bits.len()).map(|index| bit(&packed, index)).collect();
            prop_assert_eq!(read, bits);
        }
    }

    #[test]
    fn another_version_is_refused_with_both_numbers() {
        let mut bytes = Header::of(Kind::Message, 0).encode();
        bytes[1] = 9;
        assert_eq!(Header::decode(bytes).unwrap_err().to_string(), "protocol version 9, but this program speaks 2");
    }
}
