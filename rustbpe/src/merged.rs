//! Remembers how recent pieces were merged; bounded, one per thread.

use crate::piece_map::hash;

/// Number of remembered pieces; 48 bytes each.
const NUM_ENTRIES: usize = 1 << 13;

/// Pieces of more tokens are not remembered.
const MAX_IDS: usize = 6;

#[derive(Clone, Copy, Default)]
struct Entry {
    key: u128, // packed piece; zero if empty
    num: u32,
    ids: [u32; MAX_IDS],
}

/// A direct-mapped cache from packed pieces to their tokens.
pub struct MergedPieces {
    entries: Vec<Entry>,
}

impl MergedPieces {
    /// An empty cache.
    pub fn new() -> MergedPieces {
        MergedPieces { entries: vec![Entry::default(); NUM_ENTRIES] }
    }

    /// Appends the tokens of the packed piece `key`, which `merge` appends if they are not known.
    #[inline]
    pub fn append(&mut self, key: u128, out: &mut Vec<u32>, merge: impl FnOnce(&mut Vec<u32>)) {
        let place = (hash(key as u64, (key >> 64) as u64) >> 32) as usize % NUM_ENTRIES;
        let entry = &mut self.entries[place];
        if entry.key == key {
            out.extend_from_slice(&entry.ids[..entry.num as usize]);
            return;
        }
        let start = out.len();
        merge(out);
        let ids = &out[start..];
        if ids.len() <= MAX_IDS {
            (entry.key, entry.num) = (key, ids.len() as u32);
            entry.ids[..ids.len()].copy_from_slice(ids);
        }
    }
}

impl Default for MergedPieces {
    fn default() -> MergedPieces {
        MergedPieces::new()
    }
}
