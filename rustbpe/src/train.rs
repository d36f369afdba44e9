//! Learns merges: repeatedly joins the most frequent pair of neighbours, the smallest pair on ties.
//!
//! A heap holds one job per pair. A pair is queued when its right count is known, at the merge that
//! created its newer half; afterwards the count can only fall, so a job whose stored count is out of
//! date is corrected and queued again when it comes up, and the first up-to-date job is the maximum.
//!
//! The same argument allows to ignore rare pairs, which are by far the most: what is below a threshold
//! when created cannot be the maximum until everything above it is used up. Only then is the threshold
//! lowered and the corpus, much shorter by now, searched once more for pairs that reach it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::error::Error;
use crate::piece_map::{FastMap, PieceMap};
use crate::slots::{Slots, SEPARATOR};
use crate::vocab::MAX_ID;

/// One learned merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// Left symbol.
    pub left: u32,
    /// Right symbol.
    pub right: u32,
    /// How often the pair occurred.
    pub count: u64,
}

/// Hears how learning goes, and can end it with an error.
pub trait Watch {
    /// What ends learning early.
    type Error: From<Error>;
    /// The corpus has this many distinct pairs.
    fn counted(&mut self, num_pairs: usize) -> Result<(), Self::Error>;
    /// Another merge was chosen, after `done` others.
    fn chosen(&mut self, done: usize, merge: Merge) -> Result<(), Self::Error>;
    /// Called at least every few milliseconds of work.
    fn check(&mut self) -> Result<(), Self::Error>;
}

#[derive(Default)]
struct Pair {
    count: u64,
    positions: Vec<u32>, // where the pair is or was; checked when used
}

/// Pairs below the threshold have no index.
const UNFOLLOWED: u32 = u32::MAX;

/// Positions whose slots are fetched together.
const BLOCK: usize = 32;

/// Positions merged, or pairs taken off the heap, between two looks at whether to go on.
const STEPS_PER_CHECK: usize = 1 << 16;

/// What is known of one neighbour of the merged pair.
#[derive(Clone, Copy)]
struct Tally {
    count: u64,
    num_positions: u32,
    pair: u32, // index of the new pair with it
}

impl Default for Tally {
    fn default() -> Tally {
        Tally { count: 0, num_positions: 0, pair: UNFOLLOWED }
    }
}

/// Neighbours met on one side of the merged pair.
#[derive(Default)]
struct Side {
    tallies: Vec<Tally>, // by symbol
    seen: Vec<u32>,
    events: Vec<(u32, u32)>, // (neighbour, position of the new pair)
}

struct Trainer {
    slots: Slots,
    threshold: u64,    // pairs that occur less often are not followed
    num_popped: usize, // off the heap
    pairs: Vec<Pair>,
    index: FastMap<u64, u32>,
    heap: BinaryHeap<(u64, Reverse<u64>, u32)>,
    left: Side,
    right: Side,
}

/// Learns up to `num_merges` merges, as many as there are ids.
pub fn learn_merges<W: Watch>(
    pieces: Vec<PieceMap<u64>>,
    num_merges: usize,
    watch: &mut W,
) -> Result<Vec<Merge>, W::Error> {
    let last = num_merges as u64 + 255;
    if last > u64::from(MAX_ID) {
        return Err(Error::IdTooLarge(last).into());
    }
    let slots = Slots::new(pieces, || watch.check())?;
    let mut trainer = Trainer::new(slots, num_merges);
    let num_pairs = trainer.queue_all(watch)?;
    watch.counted(num_pairs)?;
    let mut merges = Vec::new();
    while merges.len() < num_merges {
        let Some((merge, pair)) = trainer.next_merge(watch)? else { break };
        watch.chosen(merges.len(), merge)?;
        trainer.apply(merge, pair, 256 + merges.len() as u32, watch)?;
        merges.push(merge);
    }
    Ok(merges)
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl Trainer {
    fn new(slots: Slots, num_merges: usize) -> Trainer {
        // By Zipf's law the last merge occurs about n / (10 num_merges) times; a lower start is cheap.
        let threshold = slots.num_occurrences() / (num_merges as u64).saturating_mul(32).max(1);
        Trainer {
            slots,
            threshold: threshold.max(1),
            num_popped: 0,
            pairs: Vec::new(),
            index: FastMap::default(),
            heap: BinaryHeap::new(),
            left: Side::default(),
            right: Side::default(),
        }
    }

    /// Finds and queues all pairs that reach the threshold, in place of those known; returns how many
    /// distinct pairs there are.
    fn queue_all<W: Watch>(&mut self, watch: &mut W) -> Result<usize, W::Error> {
        let mut counts = FastMap::<u64, (u64, u32)>::default();
        let count_pair = |_, left, right, count| {
            let entry = counts.entry(key(left, right)).or_default();
            entry.0 += count;
            entry.1 += 1;
        };
        self.slots.for_each_pair(|| watch.check(), count_pair)?;
        let num_pairs = counts.len();
        (self.pairs, self.index, self.heap) = Default::default();
        for (key, (count, num_positions)) in counts {
            if count >= self.threshold {
                self.queue(key, count, Vec::with_capacity(num_positions as usize));
            }
        }
        let note_position = |at, left, right, _| {
            if let Some(pair) = self.index.get(&key(left, right)) {
                self.pairs[*pair as usize].positions.push(at);
            }
        };
        self.slots.for_each_pair(|| watch.check(), note_position)?;
        Ok(num_pairs)
    }

    fn queue(&mut self, key: u64, count: u64, positions: Vec<u32>) -> u32 {
        let pair = self.pairs.len() as u32;
        self.pairs.push(Pair { count, positions });
        self.index.insert(key, pair);
        self.heap.push((count, Reverse(key), pair));
        pair
    }

    /// The most frequent pair, smallest first, and its index.
    fn next_merge<W: Watch>(&mut self, watch: &mut W) -> Result<Option<(Merge, u32)>, W::Error> {
        loop {
            while let Some((queued, Reverse(key), pair)) = self.heap.pop() {
                self.num_popped += 1;
                if self.num_popped % STEPS_PER_CHECK == 0 {
                    watch.check()?;
                }
                let count = self.pairs[pair as usize].count;
                if count < self.threshold {
                    self.pairs[pair as usize].positions = Vec::new();
                    self.index.remove(&key);
                } else if count < queued {
                    self.heap.push((count, Reverse(key), pair));
                } else {
                    let merge = Merge { left: (key >> 32) as u32, right: key as u32, count };
                    return Ok(Some((merge, pair)));
                }
            }
            if self.threshold == 1 {
                return Ok(None);
            }
            self.threshold = (self.threshold / 8).max(1);
            self.queue_all(watch)?;
        }
    }

    fn apply<W: Watch>(&mut self, merge: Merge, pair: u32, new: u32, watch: &mut W) -> Result<(), W::Error> {
        let Merge { left, right, .. } = merge;
        let positions = std::mem::take(&mut self.pairs[pair as usize].positions);
        self.index.remove(&key(left, right));
        self.slots.add_symbol(left, right);
        self.left.tallies.resize(new as usize + 1, Tally::default());
        self.right.tallies.resize(new as usize + 1, Tally::default());
        // Count of (new, new): each such pair was first counted as (new, left) by its left half.
        let mut doubled = 0;
        for some in positions.chunks(STEPS_PER_CHECK) {
            watch.check()?;
            for block in some.chunks(BLOCK) {
                self.slots.touch(block);
                doubled += block.iter().map(|at| self.replace(*at, merge, new)).sum::<u64>();
            }
        }
        // The left side first: (new, left) must not be queued yet when (before, left) is decreased.
        let (mut lefts, mut rights) = (std::mem::take(&mut self.left), std::mem::take(&mut self.right));
        self.settle(&mut lefts, |before| key(before, left), |before| key(before, new), |_, count| count);
        let single = |after, count| if after == left { count - doubled } else { count };
        self.settle(&mut rights, |after| key(right, after), |after| key(new, after), single);
        (self.left, self.right) = (lefts, rights);
        Ok(())
    }

    /// Merges one occurrence and notes its neighbours; returns how often it doubles the new symbol.
    #[inline]
    fn replace(&mut self, at: u32, merge: Merge, new: u32) -> u64 {
        let Some((before, after, count)) = self.slots.merge(at, merge.left, merge.right, new) else {
            return 0;
        };
        if before != SEPARATOR {
            self.left.add(before, at - self.slots.width(before), count);
        }
        if after != SEPARATOR {
            self.right.add(after, at, count);
        }
        if before == new {
            count
        } else {
            0
        }
    }

    /// Turns the neighbours met on one side into decreased old pairs and new pairs.
    fn settle(
        &mut self,
        side: &mut Side,
        old_key: impl Fn(u32) -> u64,
        new_key: impl Fn(u32) -> u64,
        new_count: impl Fn(u32, u64) -> u64,
    ) {
        for neighbour in side.seen.iter().copied() {
            let tally = &mut side.tallies[neighbour as usize];
            self.decrease(old_key(neighbour), tally.count);
            let count = new_count(neighbour, tally.count);
            if count >= self.threshold {
                let positions = Vec::with_capacity(tally.num_positions as usize);
                tally.pair = self.queue(new_key(neighbour), count, positions);
            }
        }
        for (neighbour, at) in side.events.drain(..) {
            let pair = side.tallies[neighbour as usize].pair;
            if pair != UNFOLLOWED {
                self.pairs[pair as usize].positions.push(at);
            }
        }
        for neighbour in side.seen.drain(..) {
            side.tallies[neighbour as usize] = Tally::default();
        }
    }

    fn decrease(&mut self, key: u64, count: u64) {
        if let Some(pair) = self.index.get(&key) {
            self.pairs[*pair as usize].count -= count;
        }
    }
}

impl Side {
    #[inline]
    fn add(&mut self, neighbour: u32, position: u32, count: u64) {
        let tally = &mut self.tallies[neighbour as usize];
        if tally.num_positions == 0 {
            self.seen.push(neighbour);
        }
        tally.count += count;
        tally.num_positions += 1;
        self.events.push((neighbour, position));
    }
}
