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
