//! Remembers how recent pieces were merged; bounded, one per thread.

use crate::piece_map::hash;

/// Number of remembered pieces, 48 bytes each.
const NUM_ENTRIES: usize = 1 << 15;

/// Pieces of more tokens are not remembered.
const MAX_IDS: usize = 7;

#[derive(Clone, Copy, Default)]
struct Entry {
    low: u64,
    high: u64, // zero if empty, because the length of the piece is part of it
    num: u32,
    ids: [u32; MAX_IDS],
}

/// A direct-mapped cache from packed pieces to their tokens.
pub struct Memory {
    entries: Vec<Entry>,
}

impl Memory {
    /// Nothing remembered yet.
    pub fn new() -> Memory {
        Memory { entries: vec![Entry::default(); NUM_ENTRIES] }
    }

    /// Reads the entries of some pieces without branching on them, so that the cache misses overlap.
    #[inline]
    pub fn touch(&self, keys: impl Iterator<Item = u128>) {
        std::hint::black_box(keys.fold(0, |all, key| all | self.entries[place(key)].num));
    }

    /// Appends the tokens of the packed piece `key`, which `merge` appends if they are not known.
    #[inline]
    pub fn append(&mut self, key: u128, out: &mut Vec<u32>, merge: impl FnOnce(&mut Vec<u32>)) {
        let (low, high) = (key as u64, (key >> 64) as u64);
        let entry = &mut self.entries[place(key)];
        if entry.low == low && entry.high == high {
            // All places are copied, because a fixed number of bytes needs no call of memcpy.
            let end = out.len() + entry.num as usize;
            out.extend_from_slice(&entry.ids);
            out.truncate(end);
            return;
        }
        let start = out.len();
        merge(out);
        let tokens = &out[start..];
        if let Some(ids) = entry.ids.get_mut(..tokens.len()) {
            ids.copy_from_slice(tokens);
            (entry.low, entry.high, entry.num) = (low, high, tokens.len() as u32);
        }
    }
}

#[inline]
fn place(key: u128) -> usize {
    (hash(key as u64, (key >> 64) as u64) >> 32) as usize % NUM_ENTRIES
}

impl Default for Memory {
    fn default() -> Memory {
        Memory::new()
    }
}
