//! Text to token ids.

use std::collections::BTreeMap;

use crate::error::Error;
use crate::merge::merge_piece;
use crate::merged::MergedPieces;
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

    /// Appends the ids of `text`; the names in `allowed` become special tokens, longest first.
    pub fn encode(&self, text: &str, allowed: &[&str], out: &mut Vec<u32>) -> Result<(), Error> {
        let mut finds = Vec::with_capacity(allowed.len());
        for name in allowed {
            let id = self.specials.get(*name).ok_or_else(|| Error::UnknownSpecial((*name).into()))?;
            finds.push(Find { name, id: *id, next: text.find(name) });
        }
        let (mut worker, mut start) = (Worker::new(self), 0);
        while let Some((at, len, id)) = first_special(&mut finds, text, start) {
            worker.encode(&self.pattern, &text[start..at], out)?;
            out.push(id);
            start = at + len;
        }
        worker.encode(&self.pattern, &text[start..], out)
    }
}

/// Encodes text in which nothing is special, with scratch memory that is kept between texts.
pub struct Worker<'a> {
    vocab: &'a Vocab,
    batch: Batch,
    merged: Option<MergedPieces>,
}

impl<'a> Worker<'a> {
    /// A worker for short texts.
    pub fn new(encoder: &'a Encoder) -> Worker<'a> {
        Worker { vocab: &encoder.vocab, batch: Batch::default(), merged: None }
    }

    /// A worker for much text, which remembers how pieces were merged.
    pub fn remembering(encoder: &'a Encoder) -> Worker<'a> {
        Worker { merged: Some(MergedPieces::new()), ..Worker::new(encoder) }
    }

    /// Appends the ids of `text`.
    pub fn encode(&mut self, pattern: &Pattern, text: &str, out: &mut Vec<u32>) -> Result<(), Error> {
        let bytes = text.as_bytes();
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
        self.vocab.ids_of_packed(&self.batch.keys[..num], &mut self.batch.ids);
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
        if key == 0 {
            match self.vocab.id_of(text, start, end) {
                Some(id) => out.push(id),
                None => merge_piece(self.vocab, &text[start..end], out),
            }
        } else if let Some(merged) = &mut self.merged {
            merged.append(key, out, |out| merge_piece(self.vocab, &text[start..end], out));
        } else {
            merge_piece(self.vocab, &text[start..end], out);
        }
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
