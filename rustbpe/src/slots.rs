//! The distinct pieces of a corpus as one array of symbols that is merged in place.
//!
//! Every byte of every piece has a slot, and one separator stands between pieces. A symbol of
//! several bytes writes its id into its first and its last slot (as an allocator tags its blocks),
//! so both neighbours of a symbol are found in one step and a merge touches a few slots whatever the
//! length of the piece. A slot inside a symbol is dead and never equals an id. How often the piece
//! occurs stands in each of its slots, so that a merge waits for one cache line and not for four.

use crate::error::Error;
use crate::piece_map::PieceMap;

/// Separates pieces.
pub const SEPARATOR: u32 = u32::MAX;
const DEAD: u32 = u32::MAX - 1;

/// Weights from here on are places in the list of large counts.
const LARGE: u32 = 1 << 31;

/// Slots between two looks at whether to go on, a few milliseconds.
const SLOTS_PER_CHECK: usize = 1 << 20;

#[derive(Clone, Copy)]
struct Slot {
    id: u32,
    weight: u32, // occurrences of the piece, or `LARGE` plus a place in the list of large counts
}

/// Symbols of all distinct pieces, with the number of times each piece occurs.
pub struct Slots {
    slots: Vec<Slot>,
    large: Vec<u64>,
    widths: Vec<u32>, // bytes of each symbol
    num_occurrences: u64,
}

impl Slots {
    /// Lays out the pieces, one symbol per byte; frees each map as soon as it is read.
    ///
    /// `check` is asked after every map whether to go on.
    pub fn new<E: From<Error>>(
        maps: Vec<PieceMap<u64>>,
        mut check: impl FnMut() -> Result<(), E>,
    ) -> Result<Slots, E> {
        let mut num_slots = 1usize;
        for map in &maps {
            map.for_each(|piece, _| num_slots += piece.len() + 1);
            check()?;
        }
        if num_slots >= DEAD as usize {
            return Err(Error::CorpusTooLarge.into());
        }
        let slots = Vec::with_capacity(num_slots);
        let mut all = Slots { slots, large: Vec::new(), widths: vec![1; 256], num_occurrences: 0 };
        all.slots.push(Slot { id: SEPARATOR, weight: 0 });
        for map in maps {
            map.for_each(|piece, count| all.push_piece(piece, count));
            check()?;
        }
        Ok(all)
    }

    fn push_piece(&mut self, piece: &[u8], count: u64) {
        self.num_occurrences += count;
        let weight = u32::try_from(count).ok().filter(|weight| *weight < LARGE).unwrap_or_else(|| {
            self.large.push(count);
            LARGE + (self.large.len() - 1) as u32
        });
        self.slots.extend(piece.iter().map(|byte| Slot { id: u32::from(*byte), weight }));
        self.slots.push(Slot { id: SEPARATOR, weight: 0 });
    }

    /// Sum over all pieces of how often each occurs in the corpus.
    pub fn num_occurrences(&self) -> u64 {
        self.num_occurrences
    }

    /// Calls `visit(position, left, right, count)` for every pair of neighbours, by position.
    ///
    /// `check` is asked now and then whether to go on.
    pub fn for_each_pair<E>(
        &self,
        mut check: impl FnMut() -> Result<(), E>,
        mut visit: impl FnMut(u32, u32, u32, u64),
    ) -> Result<(), E> {
        let mut at = 1;
        while at < self.slots.len() {
            check()?;
            let pause = self.slots.len().min(at + SLOTS_PER_CHECK);
            while at < pause {
                let left = self.slots[at];
                if left.id == SEPARATOR {
                    at += 1;
                    continue;
                }
                let next = at + self.widths[left.id as usize] as usize;
                let right = self.slots[next].id;
                if right != SEPARATOR {
                    visit(at as u32, left.id, right, self.count(left.weight));
                }
                at = next;
            }
        }
        Ok(())
    }

    /// Adds the next id: a symbol as wide as the two given ones together.
    pub fn add_symbol(&mut self, left: u32, right: u32) {
        self.widths.push(self.widths[left as usize] + self.widths[right as usize]);
    }

    /// Reads the slots at some positions without branching on them, so that the cache misses overlap.
    #[inline]
    pub fn touch(&self, positions: &[u32]) {
        std::hint::black_box(positions.iter().fold(0, |all, at| all | self.slots[*at as usize].id));
    }

    /// Replaces `left right` at `at` by `new`; returns the neighbours and the count of the piece.
    ///
    /// `at` must have been the start of `left` at some time. `None` if the pair is no longer there.
    #[inline]
    pub fn merge(&mut self, at: u32, left: u32, right: u32, new: u32) -> Option<(u32, u32, u64)> {
        let at = at as usize;
        let second = at + self.widths[left as usize] as usize;
        let first = self.slots[at];
        if first.id != left || self.slots[second].id != right {
            return None;
        }
        let last = second + self.widths[right as usize] as usize - 1;
        self.slots[second - 1].id = DEAD;
        self.slots[second].id = DEAD;
        self.slots[at].id = new;
        self.slots[last].id = new;
        Some((self.slots[at - 1].id, self.slots[last + 1].id, self.count(first.weight)))
    }

    /// Bytes of a symbol.
    #[inline]
    pub fn width(&self, symbol: u32) -> u32 {
        self.widths[symbol as usize]
    }

    #[inline]
    fn count(&self, weight: u32) -> u64 {
        match weight.checked_sub(LARGE) {
            None => u64::from(weight),
            Some(place) => self.large[place as usize],
        }
    }
}
