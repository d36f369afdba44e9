//! A rank table: token bytes, ids, and which neighbours merge into which token.

use crate::error::Error;
use crate::merge::merge_piece;
use crate::piece_map::{hash, PieceMap};

/// "No token": larger than every id, so that it loses every comparison for the lowest rank.
pub const NONE: u32 = u32::MAX;

/// Largest id of a learned token: tables are indexed by id, so one wild id would exhaust the memory.
pub const MAX_ID: u32 = (1 << 24) - 1;

/// Tokens by id, ids by bytes, and merges by pair of ids.
pub struct Vocab {
    ids: Vec<u32>,           // in increasing order
    starts: Vec<(u32, u32)>, // by id: span of the token in `bytes`, empty if there is none
    bytes: Vec<u8>,
    lookup: PieceMap<u32>,
    byte_ids: [u32; 256],
    byte_pairs: Vec<u32>, // merged id by two bytes
    pairs: PairMap,
}

impl Vocab {
    /// The 256 single bytes with their own values as ids.
    pub fn bytes_only() -> Vocab {
        let ranks = (0..=255u8).map(|byte| (vec![byte], u32::from(byte))).collect();
        Vocab::new(ranks).expect("256 distinct bytes")
    }

    /// Builds all tables; the single bytes must be among the tokens, ids may have gaps.
    pub fn new(mut ranks: Vec<(Vec<u8>, u32)>) -> Result<Vocab, Error> {
        ranks.sort_by_key(|(_, id)| *id);
        let mut vocab = Vocab::index_tokens(&ranks)?;
        for byte in 0..=255u8 {
            vocab.byte_ids[byte as usize] =
                vocab.lookup.get(&[byte], 0, 1).ok_or(Error::MissingByte(byte))?;
        }
        vocab.index_pairs(ranks);
        Ok(vocab)
    }

    fn index_tokens(ranks: &[(Vec<u8>, u32)]) -> Result<Vocab, Error> {
        let num_ids = match ranks.last() {
            Some((_, id)) if *id > MAX_ID => return Err(Error::IdTooLarge(u64::from(*id))),
            last => last.map_or(0, |(_, id)| *id as usize + 1),
        };
        let mut vocab = Vocab {
            ids: Vec::with_capacity(ranks.len()),
            starts: vec![(0, 0); num_ids],
            bytes: Vec::new(),
            lookup: PieceMap::with_capacity(ranks.len()),
            byte_ids: [NONE; 256],
            byte_pairs: vec![NONE; 1 << 16],
            pairs: PairMap::with_capacity(ranks.len()),
        };
        for (token, id) in ranks {
            let duplicate = || Error::DuplicateToken { token: token.clone(), id: *id };
            let known = vocab.lookup.len();
            *vocab.lookup.entry(token, 0, token.len()) = *id;
            if token.is_empty() || vocab.lookup.len() == known || vocab.ids.last() == Some(id) {
                return Err(duplicate());
            }
            let start = vocab.bytes.len() as u32; // as the end of the token before
            vocab.bytes.extend_from_slice(token);
            let end = u32::try_from(vocab.bytes.len()).map_err(|_| Error::VocabTooLarge)?;
            vocab.starts[*id as usize] = (start, end);
            vocab.ids.push(*id);
        }
        Ok(vocab)
    }

    /// Finds the one pair of tokens that merges into each token.
    ///
    /// Inside a stretch whose borders no merge has crossed yet, the order of merges depends on the
    /// bytes of the stretch alone. So if two neighbours together spell a token, they are what is
    /// left just before the last merge of that token's own bytes, and no other split can ever be
    /// seen. By increasing length, because the steps before use shorter tokens only.
    fn index_pairs(&mut self, mut ranks: Vec<(Vec<u8>, u32)>) {
        ranks.sort_by_key(|(token, _)| token.len());
        let mut parts = Vec::new();
        for (token, id) in ranks.iter().filter(|(token, _)| token.len() > 1) {
            parts.clear();
            merge_piece(self, token, &mut parts);
            if let [left, right] = parts[..] {
                self.pairs.insert(left, right, *id);
                if let [first, second] = token[..] {
                    self.byte_pairs[usize::from(first) << 8 | usize::from(second)] = *id;
                }
            }
        }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no token; never true.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Ids in increasing order.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Bytes of a token.
    #[inline]
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        let (start, end) = *self.starts.get(id as usize)?;
        (start < end).then(|| &self.bytes[start as usize..end as usize])
    }

    /// Id of the token `text[start..end]`.
    #[inline]
    pub fn id_of(&self, text: &[u8], start: usize, end: usize) -> Option<u32> {
        self.lookup.get(text, start, end)
    }

    /// Ids of packed pieces.
    #[inline]
    pub fn ids_of_packed(&self, keys: &[u128], ids: &mut [Option<u32>]) {
        self.lookup.get_batch(keys, ids);
    }

    /// (left, right, merged) of every merge, in the order in which they are preferred.
    pub fn merges(&self) -> Vec<(u32, u32, u32)> {
        let mut merges: Vec<_> = self.pairs.slots.iter().copied().filter(|slot| slot.2 != NONE).collect();
        merges.sort_unstable_by_key(|(_, _, merged)| *merged);
        merges
    }

    /// Id of a single byte.
    #[inline]
    pub fn byte_id(&self, byte: u8) -> u32 {
        self.byte_ids[byte as usize]
    }

    /// What two bytes merge into, or [`NONE`].
    #[inline]
    pub fn merge_bytes(&self, left: u8, right: u8) -> u32 {
        self.byte_pairs[usize::from(left) << 8 | usize::from(right)]
    }

    /// What two tokens merge into, or [`NONE`].
    #[inline]
    pub fn merge(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(left, right)
    }
}

/// Map from pairs of ids to ids; open addressing with linear probing.
struct PairMap {
    slots: Vec<(u32, u32, u32)>, // left, right, merged; `NONE` as merged marks an empty slot
}

impl PairMap {
    fn with_capacity(capacity: usize) -> PairMap {
        PairMap { slots: vec![(0, 0, NONE); (capacity * 2).next_power_of_two()] }
    }

    #[inline]
    fn find(&self, left: u32, right: u32) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = hash(u64::from(left) << 32 | u64::from(right), 0) as usize & mask;
        loop {
            let (slot_left, slot_right, merged) = self.slots[at];
            if merged == NONE || (slot_left == left && slot_right == right) {
                return at;
            }
            at = (at + 1) & mask;
        }
    }

    #[inline]
    fn get(&self, left: u32, right: u32) -> u32 {
        self.slots[self.find(left, right)].2
    }

    fn insert(&mut self, left: u32, right: u32, merged: u32) {
        let at = self.find(left, right);
        self.slots[at] = (left, right, merged);
    }
}
