//! The one error type of the crate.

use std::fmt;
use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::vocab::MAX_ID;

/// Everything that can go wrong, whoever caused it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The split pattern does not compile.
    BadPattern(String),
    /// The regular-expression engine gave up on a text, e.g. at its backtracking limit.
    Split(String),
    /// The distinct pieces do not fit 32-bit positions.
    CorpusTooLarge,
    /// A piece of a text does not fit 32-bit positions.
    PieceTooLong(usize),
    /// The bytes of all tokens together do not fit 32-bit positions.
    VocabTooLarge,
    /// A rank table lacks this single byte.
    MissingByte(u8),
    /// A rank table gives the same bytes or the same id twice.
    DuplicateToken {
        /// Bytes of the second entry.
        token: Vec<u8>,
        /// Id of the second entry.
        id: u32,
    },
    /// A rank table has an id beyond [`crate::vocab::MAX_ID`].
    IdTooLarge(u64),
    /// The system gives no thread to work on.
    NoThread,
    /// A thread of the crate panicked.
    WorkerFailed,
    /// No token has this id.
    UnknownId(u32),
    /// No special token has this name.
    UnknownSpecial(String),
    /// Decoded bytes are not UTF-8.
    InvalidUtf8 {
        /// All decoded bytes.
        bytes: Vec<u8>,
        /// First offending byte.
        start: usize,
        /// One past the last offending byte.
        end: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::BadPattern(reason) => write!(f, "invalid split pattern: {reason}"),
            Error::Split(reason) => write!(f, "the split pattern failed on a text: {reason}"),
            Error::CorpusTooLarge => {
                write!(f, "the distinct pieces of the corpus have 4 GiB or more together; train on less text")
            }
            Error::PieceTooLong(len) => {
                write!(f, "a text has a piece of {len} bytes, but 4 GiB are too many; cut the text")
            }
            Error::VocabTooLarge => write!(f, "the tokens have 4 GiB or more together"),
            Error::MissingByte(byte) => write!(f, "the ranks lack the single byte 0x{byte:02x}"),
            Error::DuplicateToken { token, id } => {
                write!(f, "token {:?} or id {id} occurs twice", String::from_utf8_lossy(token))
            }
            Error::IdTooLarge(id) => write!(f, "id {id} is too large; the largest possible is {MAX_ID}"),
            Error::NoThread => write!(f, "the system starts no further thread; close other programs"),
            Error::WorkerFailed => write!(f, "a thread of rustbpe panicked, which is a defect of rustbpe"),
            Error::UnknownId(id) => write!(f, "no token has id {id}"),
            Error::UnknownSpecial(name) => write!(f, "{name:?} is not a special token"),
            Error::InvalidUtf8 { start, end, .. } => {
                write!(f, "decoded bytes {start}..{end} are not valid UTF-8")
            }
        }
    }
}

impl std::error::Error for Error {}

/// Does `work`; a panic becomes an error, and what `work` has changed must not be used any more.
pub fn caught<R>(work: impl FnOnce() -> Result<R, Error>) -> Result<R, Error> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Error::WorkerFailed))
}
