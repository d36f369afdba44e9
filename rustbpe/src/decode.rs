//! Token ids back to bytes and text.

use crate::encode::Encoder;
use crate::error::Error;

/// Bytes of all tokens in order.
pub fn decode_bytes(encoder: &Encoder, ids: &[u32]) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::with_capacity(ids.len() * 5);
    for id in ids {
        bytes.extend_from_slice(encoder.token(*id)?);
    }
    Ok(bytes)
}

/// Text of all tokens; an error if the bytes are not UTF-8.
pub fn decode(encoder: &Encoder, ids: &[u32]) -> Result<String, Error> {
    String::from_utf8(decode_bytes(encoder, ids)?).map_err(|error| {
        let found = error.utf8_error();
        let start = found.valid_up_to();
        let bytes = error.into_bytes();
        let end = found.error_len().map_or(bytes.len(), |len| start + len);
        Error::InvalidUtf8 { bytes, start, end }
    })
}

/// Turns a stream of byte strings into text and holds back unfinished characters.
#[derive(Default)]
pub struct Utf8Stream {
    held: Vec<u8>, // at most three bytes between calls
}

impl Utf8Stream {
    /// Text that is complete after `bytes`; what can never become a character is U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = &self.held[..];
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, tail) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = tail;
                    let Some(len) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[len..];
                }
            }
        }
        self.held = rest.to_vec();
        text
    }

    /// What is left at the end of the stream: nothing, or one U+FFFD for an unfinished character.
    pub fn flush(&mut self) -> String {
        let unfinished = !std::mem::take(&mut self.held).is_empty();
        if unfinished {
            char::REPLACEMENT_CHARACTER.into()
        } else {
            String::new()
        }
    }
}
