//! Text to token ids.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::memory::Memory;
use crate::merge::{merge_piece, MAX_PIECE};
use crate::pattern::Pattern;
use crate::piece_map::{pack, BATCH, MAX_PACKED};
use crate::vocab::Vocab;

/// A split pattern, a rank table and special tokens, which never change once made.
pub struct Encoder {
    /// How text is cut into pieces.
    pub pattern: Pattern,
    /// The learned tokens.
    pub vocab: Vocab,
    /// Special tokens by name.
    pub specials: BTreeMap<String, u32>,
    special_names: BTreeMap<u32, String>,
    memories: Mutex<Vec<Memory>>, // of workers that are done, at most one for each that ever worked at once
}

impl Encoder {
    /// Puts the parts together; a special token may not take the id of a learned one.
    pub fn new(pattern: Pattern, vocab: Vocab, specials: BTreeMap<String, u32>) -> Result<Encoder, Error> {
        let mut special_names = BTreeMap::new();
        for (name, id) in &specials {
            let taken = special_names.insert(*id, name.clone()).is_some();
            if taken || name.is_empty() || vocab.token(*id).is_some() {
                return Err(Error::DuplicateToken { token: name.clone().into_bytes(), id: *id });
            }
        }
        Ok(Encoder { pattern, vocab, specials, special_names, memories: Mutex::default() })
    }

    /// Largest id, special tokens included.
    pub fn max_id(&self) -> u32 {
        let learned = self.vocab.ids().last().copied().unwrap_or(0);
        self.special_names.keys().last().copied().unwrap_or(0).max(learned)
    }

    /// Bytes of a learned token, or of a special token's name.
    pub fn token(&self, id: u32) -> Result<&[u8], Error> {
        let special = || self.special_names.get(&id).map(|name| name.as_bytes());
        self.vocab.token(id).or_else(special).ok_or(Error::UnknownId(id))
    }

    /// Names and ids of special tokens; an error for a name that is none.
    pub fn specials_named<'b>(&self, names: &[&'b str]) -> Result<Vec<(&'b str, u32)>, Error> {
        let named = |name: &&'b str| match self.specials.get(*name) {
            Some(id) => Ok((*name, *id)),
            None => Err(Error::UnknownSpecial((*name).into())),
        };
        names.iter().map(named).collect()
    }

    fn memories(&self) -> MutexGuard<'_, Vec<Memory>> {
        self.memories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Encodes one text after the other, and remembers how pieces were merged if there is much text.
pub struct Worker<'a> {
    encoder: &'a Encoder,
    batch: Batch,
    memory: Option<Memory>,
}

impl<'a> Worker<'a> {
    /// A worker for short texts.
    pub fn new(encoder: &'a Encoder) -> Worker<'a> {
        Worker { encoder, batch: Batch::default(), memory: None }
    }

    /// A worker for much text, with the memory of an earlier one if that is done.
    pub fn remembering(encoder: &'a Encoder) -> Worker<'a> {
        let memory = encoder.memories().pop().unwrap_or_default();
        Worker { encoder, batch: Batch::default(), memory: Some(memory) }
    }

    /// Appends the ids of `text`, in which nothing is special.
    pub fn encode(&mut self, pattern: &Pattern, text: &str, out: &mut Vec<u32>) -> Result<(), Error> {
        let bytes = text.as_bytes();
        if bytes.len() >= MAX_PIECE {
            check_pieces(pattern, text, MAX_PIECE)?;
        }
        self.batch.num = 0;
        pattern.split(text, |start, end| {
            if self.batch.push(bytes, start, end) {
                self.encode_batch(bytes, out);
            }
            true
        })?;
        self.encode_batch(bytes, out);
        Ok(())
    }

    /// Appends the ids of the pieces of the batch. Most pieces are tokens; the rest is merged.
    #[inline]
    fn encode_batch(&mut self, text: &[u8], out: &mut Vec<u32>) {
        let num = std::mem::take(&mut self.batch.num);
        let keys = &self.batch.keys[..num];
        self.encoder.vocab.ids_of_packed(keys, &mut self.batch.ids);
        if let Some(memory) = &self.memory {
            let ids = self.batch.ids.iter();
            memory.touch(keys.iter().zip(ids).filter(|(_, id)| id.is_none()).map(|(key, _)| *key));
        }
        for at in 0..num {
            match self.batch.ids[at] {
                Some(id) => out.push(id),
                None => self.encode_rare(text, at, out),
            }
        }
    }

    /// A piece of the batch that is longer than a packed one, or no token.
    fn encode_rare(&mut self, text: &[u8], at: usize, out: &mut Vec<u32>) {
        let (key, (start, end)) = (self.batch.keys[at], self.batch.spans[at]);
        let vocab = &self.encoder.vocab;
        if key == 0 {
            match vocab.id_of(text, start, end) {
                Some(id) => out.push(id),
                None => merge_piece(vocab, &text[start..end], out),
            }
        } else if let Some(memory) = &mut self.memory {
            memory.append(key, out, |out| merge_piece(vocab, &text[start..end], out));
        } else {
            merge_piece(vocab, &text[start..end], out);
        }
    }

    /// Appends the ids of `text`, in which the given strings are special tokens, longest first.
    pub fn encode_with(
        &mut self,
        pattern: &Pattern,
        specials: &[(&str, u32)],
        text: &str,
        out: &mut Vec<u32>,
    ) -> Result<(), Error> {
        let mut finds: Vec<_> = specials.iter().map(|special| Find::first(text, special)).collect();
        let mut start = 0;
        while let Some((at, len, id)) = first_special(&mut finds, text, start) {
            self.encode(pattern, &text[start..at], out)?;
            out.push(id);
            start = at + len;
        }
        self.encode(pattern, &text[start..], out)
    }
}

/// An error if a piece has `limit` bytes or more.
fn check_pieces(pattern: &Pattern, text: &str, limit: usize) -> Result<(), Error> {
    let mut too_long = None;
    pattern.split(text, |start, end| {
        too_long = Some(end - start).filter(|len| *len >= limit);
        too_long.is_none()
    })?;
    too_long.map_or(Ok(()), |len| Err(Error::PieceTooLong(len)))
}

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        self.encoder.memories().extend(self.memory.take());
    }
}

/// Consecutive pieces of a text, looked up together.
struct Batch {
    num: usize,
    keys: [u128; BATCH], // zero, which is never found, for pieces that are too long to be packed
    spans: [(usize, usize); BATCH],
    ids: [Option<u32>; BATCH],
}

impl Default for Batch {
    fn default() -> Batch {
        Batch { num: 0, keys: [0; BATCH], spans: [(0, 0); BATCH], ids: [None; BATCH] }
    }
}

impl Batch {
    /// Adds a piece; true if the batch is full.
    #[inline]
    fn push(&mut self, text: &[u8], start: usize, end: usize) -> bool {
        self.keys[self.num] = if end - start <= MAX_PACKED { pack(text, start, end) } else { 0 };
        self.spans[self.num] = (start, end);
        self.num += 1;
        self.num == BATCH
    }
}

/// Where a special token occurs next.
struct Find<'a> {
    name: &'a str,
    id: u32,
    next: Option<usize>,
}

impl<'a> Find<'a> {
    fn first(text: &str, (name, id): &(&'a str, u32)) -> Find<'a> {
        Find { name, id: *id, next: text.find(name) }
    }
}

/// Leftmost, then longest special token from `start` on: its position, length and id.
fn first_special(finds: &mut [Find], text: &str, start: usize) -> Option<(usize, usize, u32)> {
    for find in finds.iter_mut() {
        if find.next.is_some_and(|next| next < start) {
            find.next = text[start..].find(find.name).map(|at| start + at);
        }
    }
    let found = finds.iter().filter_map(|find| Some((find.next?, find.name.len(), find.id)));
    found.min_by_key(|(at, len, _)| (*at, std::cmp::Reverse(*len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_long_a_piece_is_an_error() {
        let pattern = Pattern::new(crate::pattern::NANOCHAT_PATTERN).unwrap();
        assert_eq!(check_pieces(&pattern, "some words", 7), Ok(()));
        assert_eq!(check_pieces(&pattern, "some words and", 6), Err(Error::PieceTooLong(6)));
    }
}
