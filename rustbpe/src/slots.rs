//! The distinct pieces of a corpus as one array of symbols that is merged in place.
//!
//! Every byte of every piece has a slot, and one separator stands between pieces. A symbol of
//! several bytes writes its id into its first and its last slot (as an allocator tags its blocks),
//! so both neighbours of a symbol are found in one step and a merge touches a few slots whatever the
//! length of the piece. A slot inside a symbol is dead and never equals an id.

use crate::error::Error;
use crate::piece_map::PieceMap;

/// Separates pieces.
pub const SEPARATOR: u32 = u32::MAX;
const DEAD: u32 = u32::MAX - 1;

/// Slots per entry of the index from slots to pieces.
const BLOCK: usize = 16;

/// Symbols of all distinct pieces, with the number of times each piece occurs.
pub struct Slots {
    slots: Vec<u32>,
    starts: Vec<u32>, // first slot of each piece, and the end
    counts: Vec<u64>,
    block_piece: Vec<u32>, // piece of the first slot of each block
    widths: Vec<u32>,      // bytes of each symbol
}

impl Slots {
    /// Lays out the pieces, one symbol per byte; frees each map as soon as it is read.
    pub fn new(maps: Vec<PieceMap<u64>>) -> Result<Slots, Error> {
        let (mut num_slots, mut num_pieces) = (1usize, 0usize);
        for map in &maps {
            map.for_each(|piece, _| {
                num_slots += piece.len() + 1;
                num_pieces += 1;
            });
        }
        if num_slots >= DEAD as usize {
            return Err(Error::CorpusTooLarge);
        }
        let mut slots = Vec::with_capacity(num_slots);
        let mut starts = Vec::with_capacity(num_pieces + 1);
        let mut counts = Vec::with_capacity(num_pieces);
        slots.push(SEPARATOR);
        for map in maps {
            map.for_each(|piece, count| {
                starts.push(slots.len() as u32);
                counts.push(count);
                slots.extend(piece.iter().map(|byte| u32::from(*byte)));
                slots.push(SEPARATOR);
            });
        }
        starts.push(slots.len() as u32);
        let block_piece = index_blocks(&starts, num_slots);
        Ok(Slots { slots, starts, counts, block_piece, widths: vec![1; 256] })
    }

    /// Number of times any piece occurs in the corpus.
    pub fn num_occurrences(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Calls `visit(position, left, right, count)` for every pair of neighbours, by position.
    pub fn for_each_pair(&self, mut visit: impl FnMut(u32, u32, u32, u64)) {
        for (piece, count) in self.counts.iter().enumerate() {
            let mut at = self.starts[piece];
            let mut left = self.slots[at as usize];
            loop {
                let next = at + self.widths[left as usize];
                let right = self.slots[next as usize];
                if right == SEPARATOR {
                    break;
                }
                visit(at, left, right, *count);
                (at, left) = (next, right);
            }
        }
    }

    /// Adds the next id: a symbol as wide as the two given ones together.
    pub fn add_symbol(&mut self, left: u32, right: u32) {
        self.widths.push(self.widths[left as usize] + self.widths[right as usize]);
    }

    /// Replaces `left right` at `at` by `new`; returns the neighbours and the count of the piece.
    ///
    /// `at` must have been the start of `left` at some time. `None` if the pair is no longer there.
    #[inline]
    pub fn merge(&mut self, at: u32, left: u32, right: u32, new: u32) -> Option<(u32, u32, u64)> {
        let at = at as usize;
        let second = at + self.widths[left as usize] as usize;
        if self.slots[at] != left || self.slots[second] != right {
            return None;
        }
        let last = second + self.widths[right as usize] as usize - 1;
        self.slots[second - 1] = DEAD;
        self.slots[second] = DEAD;
        self.slots[at] = new;
        self.slots[last] = new;
        Some((self.slots[at - 1], self.slots[last + 1], self.count_at(at)))
    }

    /// Bytes of a symbol.
    #[inline]
    pub fn width(&self, symbol: u32) -> u32 {
        self.widths[symbol as usize]
    }

    #[inline]
    fn count_at(&self, at: usize) -> u64 {
        let mut piece = self.block_piece[at / BLOCK] as usize;
        while self.starts[piece + 1] as usize <= at {
            piece += 1;
        }
        self.counts[piece]
    }
}

fn index_blocks(starts: &[u32], num_slots: usize) -> Vec<u32> {
    let mut piece = 0;
    let blocks = (0..num_slots).step_by(BLOCK).map(|slot| {
        while piece + 2 < starts.len() && starts[piece + 1] as usize <= slot {
            piece += 1;
        }
        piece as u32
    });
    blocks.collect()
}
