//! Byte-pair merging of one piece: always the lowest rank, the leftmost one on ties.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::vocab::{Vocab, NONE};

/// Pieces up to this many bytes are merged by rescanning; the heap pays beyond it.
const MAX_SCANNED: usize = 96;

/// Pieces must be shorter than this, so that positions in them differ from [`NONE`].
pub const MAX_PIECE: usize = NONE as usize;

/// Appends the tokens of `piece` (neither empty nor too long) to `out`, by merges alone.
pub fn merge_piece(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
    match piece.len() {
        0..=16 => merge_by_scanning::<16>(vocab, piece, out),
        17..=MAX_SCANNED => merge_by_scanning::<MAX_SCANNED>(vocab, piece, out),
        _ => merge_by_heap(vocab, piece, out),
    }
}

/// Quadratic, but in a few cache lines: all ranks are looked at for every merge.
fn merge_by_scanning<const N: usize>(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
    let (mut ids, mut ranks) = ([0u32; N], [NONE; N]);
    let mut num = piece.len();
    for (id, byte) in ids.iter_mut().zip(piece) {
        *id = vocab.byte_id(*byte);
    }
    for (rank, pair) in ranks.iter_mut().zip(piece.windows(2)) {
        *rank = vocab.merge_bytes(pair[0], pair[1]);
    }
    while let Some((rank, at)) = lowest(&ranks[..num - 1]) {
        ids[at] = rank;
        num -= 1;
        // Plain loops: the moves are too short for a call of memmove.
        for place in at + 1..num {
            ids[place] = ids[place + 1];
            ranks[place - 1] = ranks[place];
        }
        ranks[num - 1] = NONE;
        if at + 1 < num {
            ranks[at] = vocab.merge(rank, ids[at + 1]);
        }
        if at > 0 {
            ranks[at - 1] = vocab.merge(ids[at - 1], rank);
        }
    }
    out.extend_from_slice(&ids[..num]);
}

/// Lowest rank and its first position.
#[inline]
fn lowest(ranks: &[u32]) -> Option<(u32, usize)> {
    let (mut best, mut position) = (NONE, 0);
    for (at, rank) in ranks.iter().enumerate() {
        if *rank < best {
            (best, position) = (*rank, at);
        }
    }
    (best != NONE).then_some((best, position))
}

/// Symbols of a long piece as a doubly linked list over byte positions.
struct Chain {
    ids: Vec<u32>,
    ranks: Vec<u32>, // what the symbol here and its successor merge into
    next: Vec<u32>,
    previous: Vec<u32>,
}

/// `n log n`: a heap of possible merges, checked against the list when they come up.
fn merge_by_heap(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
    let mut chain = Chain::new(vocab, piece);
    let ranks = chain.ranks.iter().enumerate().filter(|(_, rank)| **rank != NONE);
    let mut heap: BinaryHeap<_> = ranks.map(|(at, rank)| Reverse((*rank, at as u32))).collect();
    while let Some(Reverse((rank, at))) = heap.pop() {
        if chain.ranks[at as usize] == rank {
            chain.merge(vocab, at, rank, |rank, at| heap.push(Reverse((rank, at))));
        }
    }
    let mut at = 0;
    while at != NONE {
        out.push(chain.ids[at as usize]);
        at = chain.next[at as usize];
    }
}

impl Chain {
    fn new(vocab: &Vocab, piece: &[u8]) -> Chain {
        let num = piece.len() as u32;
        let mut ranks: Vec<_> = piece.windows(2).map(|pair| vocab.merge_bytes(pair[0], pair[1])).collect();
        ranks.push(NONE);
        Chain {
            ids: piece.iter().map(|byte| vocab.byte_id(*byte)).collect(),
            ranks,
            next: (1..num).chain([NONE]).collect(),
            previous: [NONE].into_iter().chain(0..num - 1).collect(),
        }
    }

    /// Merges the symbol at `at` with its successor and reports the pairs this makes possible.
    fn merge(&mut self, vocab: &Vocab, at: u32, merged: u32, mut report: impl FnMut(u32, u32)) {
        let here = at as usize;
        let (removed, before) = (self.next[here] as usize, self.previous[here]);
        let after = self.next[removed];
        self.ids[here] = merged;
        self.ranks[removed] = NONE;
        self.next[here] = after;
        self.ranks[here] = NONE;
        if after != NONE {
            self.previous[after as usize] = at;
            self.ranks[here] = vocab.merge(merged, self.ids[after as usize]);
        }
        if before != NONE {
            self.ranks[before as usize] = vocab.merge(self.ids[before as usize], merged);
        }
        for place in [at, before] {
            if place != NONE && self.ranks[place as usize] != NONE {
                report(self.ranks[place as usize], place);
            }
        }
    }
}
