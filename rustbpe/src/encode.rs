//! Text to token ids.

use std::collections::BTreeMap;

use crate::error::Error;
use crate::merge::merge_piece;
use crate::pattern::Pattern;
use crate::piece_map::{pack, BATCH, MAX_PACKED};
use crate::vocab::Vocab;

/// A split pattern, a rank table and special tokens; never changes once made.
pub struct Encoder {
    /// How text is cut into pieces.
    pub pattern: Pattern,
    /// The learned tokens.
    pub vocab: Vocab,
    /// Special tokens by name.
    pub specials: BTreeMap<String, u32>,
    special_names: BTreeMap<u32, String>,
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
        Ok(Encoder { pattern, vocab, specials, special_names })
    }

    /// Largest id, special tokens included.
    pub fn max_id(&self) -> u32 {
        let learned = self.vocab.ids().last().copied().unwrap_or(0);
        self.special_names.keys().last().copied().unwrap_or(0).max(learned)
    }

    /// Bytes of a learned token, or of a special token's name.
    pub fn token(&self, id: u32) -> Result<&[u8], Error> {
        let special = || self.special_names.get(&id).map(|name| name.as_bytes());
        self.vocab.token(id).or_else(special).ok_or(Error::UnknownId(i64::from(id)))
    }

    /// Appends the ids of `text`, in which nothing is special.
    pub fn encode_ordinary(&self, pattern: &Pattern, text: &str, out: &mut Vec<u32>) -> Result<(), Error> {
        let mut batch = Batch::default();
        pattern.split(text, |start, end| {
            if batch.push(text.as_bytes(), start, end) {
                batch.encode(&self.vocab, text.as_bytes(), out);
            }
            true
        })?;
        batch.encode(&self.vocab, text.as_bytes(), out);
        Ok(())
    }

    /// Appends the ids of `text`; the names in `allowed` become special tokens, longest first.
    pub fn encode(&self, text: &str, allowed: &[&str], out: &mut Vec<u32>) -> Result<(), Error> {
        let mut finds = Vec::with_capacity(allowed.len());
        for name in allowed {
            let id = self.specials.get(*name).ok_or_else(|| Error::UnknownSpecial((*name).into()))?;
            finds.push(Find { name, id: *id, next: text.find(name) });
        }
        let mut start = 0;
        while let Some((at, len, id)) = first_special(&mut finds, text, start) {
            self.encode_ordinary(&self.pattern, &text[start..at], out)?;
            out.push(id);
            start = at + len;
        }
        self.encode_ordinary(&self.pattern, &text[start..], out)
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

    /// Appends the ids of the pieces and forgets them. Most pieces are tokens; the rest is merged.
    #[inline]
    fn encode(&mut self, vocab: &Vocab, text: &[u8], out: &mut Vec<u32>) {
        let num = std::mem::take(&mut self.num);
        vocab.ids_of_packed(&self.keys[..num], &mut self.ids);
        for (id, (start, end)) in self.ids[..num].iter().zip(&self.spans) {
            match id {
                Some(id) => out.push(*id),
                None => encode_rare(vocab, text, *start, *end, out),
            }
        }
    }
}

/// A piece that is longer than a packed one, or no token.
fn encode_rare(vocab: &Vocab, text: &[u8], start: usize, end: usize, out: &mut Vec<u32>) {
    let long = if end - start > MAX_PACKED { vocab.id_of(text, start, end) } else { None };
    match long {
        Some(id) => out.push(id),
        None => merge_piece(vocab, &text[start..end], out),
    }
}

/// Where a special token occurs next.
struct Find<'a> {
    name: &'a str,
    id: u32,
    next: Option<usize>,
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
