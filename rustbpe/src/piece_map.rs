//! Hash map from pieces of text to small values.
//!
//! Nearly all pieces are shorter than 16 bytes. They are packed, with their length, into one 128-bit
//! key that is compared in two instructions and needs no allocation; longer ones go to a plain map.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Mutex, PoisonError};

/// Longest piece that is packed into a key.
pub const MAX_PACKED: usize = 15;

const K0: u64 = 0x9e37_79b9_7f4a_7c15;
const K1: u64 = 0xd6e8_feb8_6659_fd93;

/// Folded 64 x 64 -> 128 bit product, the mixing step of the wyhash family.
#[inline]
pub fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

/// Hasher for byte strings and integers inside `std` maps.
#[derive(Default)]
pub struct MixHasher(u64);

impl Hasher for MixHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = mix(self.0 ^ word ^ K0, K1);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A `std` map with the fast hasher.
pub type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<MixHasher>>;

/// Pieces that are looked up together.
pub const BATCH: usize = 64;

/// Packed form of `text[start..end]`, at most [`MAX_PACKED`] bytes; the length is in the top byte.
#[inline]
pub fn pack(text: &[u8], start: usize, end: usize) -> u128 {
    let len = end - start;
    let word = match text[start..].first_chunk::<16>() {
        Some(chunk) => u128::from_le_bytes(*chunk),
        None => {
            let mut chunk = [0; 16];
            chunk[..len].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(chunk)
        }
    };
    (word & ((1 << (8 * len)) - 1)) | (len as u128) << 120
}

/// The bytes of a packed piece.
pub fn unpack(key: u128) -> ([u8; 16], usize) {
    (key.to_le_bytes(), (key >> 120) as usize)
}

#[derive(Clone, Copy, Default)]
struct Slot<V> {
    low: u64,
    high: u64, // zero only in empty slots, because the length is part of it
    value: V,
}

impl<V> Slot<V> {
    fn key(&self) -> u128 {
        u128::from(self.high) << 64 | u128::from(self.low)
    }
}

/// Hash of a packed piece, given in two halves.
#[inline]
pub fn hash(low: u64, high: u64) -> u64 {
    mix(low ^ K0, high ^ K1)
}

/// Map from pieces to values; open addressing with linear probing for packed pieces.
#[derive(Clone)]
pub struct PieceMap<V> {
    slots: Vec<Slot<V>>,
    num_packed: usize,
    long: FastMap<Box<[u8]>, V>,
}

impl<V: Copy + Default> PieceMap<V> {
    /// An empty map with room for `capacity` short pieces.
    pub fn with_capacity(capacity: usize) -> PieceMap<V> {
        let size = (capacity * 2).next_power_of_two().max(64);
        PieceMap { slots: vec![Slot::default(); size], num_packed: 0, long: FastMap::default() }
    }

    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.num_packed + self.long.len()
    }

    /// Whether there is no piece.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Value of `text[start..end]`; the surrounding text lets short pieces be read in one load.
    #[inline]
    pub fn get(&self, text: &[u8], start: usize, end: usize) -> Option<V> {
        if end - start > MAX_PACKED {
            return self.long.get(&text[start..end]).copied();
        }
        self.get_packed(pack(text, start, end))
    }

    /// Value of a packed piece.
    #[inline]
    pub fn get_packed(&self, key: u128) -> Option<V> {
        let slot = &self.slots[self.find(key)];
        (slot.high != 0).then_some(slot.value)
    }

    /// The value of `text[start..end]`, inserted as default if new.
    #[inline]
    pub fn entry(&mut self, text: &[u8], start: usize, end: usize) -> &mut V {
        if end - start > MAX_PACKED {
            return self.long_entry(&text[start..end]);
        }
        self.packed_entry(pack(text, start, end))
    }

    /// The value of a packed piece, inserted as default if new.
    #[inline]
    pub fn packed_entry(&mut self, key: u128) -> &mut V {
        let mut at = self.find(key);
        if self.slots[at].high == 0 {
            if self.num_packed * 3 >= self.slots.len() * 2 {
                self.grow();
                at = self.find(key);
            }
            self.num_packed += 1;
            self.slots[at] = Slot { low: key as u64, high: (key >> 64) as u64, value: V::default() };
        }
        &mut self.slots[at].value
    }

    fn long_entry(&mut self, piece: &[u8]) -> &mut V {
        if !self.long.contains_key(piece) {
            self.long.insert(piece.into(), V::default());
        }
        self.long.get_mut(piece).expect("present or just inserted")
    }

    /// Calls `visit(piece, value)` for every piece, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], V)) {
        for slot in self.slots.iter().filter(|slot| slot.high != 0) {
            let (bytes, len) = unpack(slot.key());
            visit(&bytes[..len], slot.value);
        }
        for (piece, value) in &self.long {
            visit(piece, *value);
        }
    }

    /// Index of the slot that holds `key`, or of the empty slot where it belongs.
    #[inline]
    fn find(&self, key: u128) -> usize {
        let (low, high) = (key as u64, (key >> 64) as u64);
        let mask = self.slots.len() - 1;
        // The high bits, because the low ones choose the shard in which a map may be.
        let mut at = (hash(low, high) >> 32) as usize & mask;
        loop {
            let slot = &self.slots[at];
            if (slot.low == low && slot.high == high) || slot.high == 0 {
                return at;
            }
            at = (at + 1) & mask;
        }
    }

    /// Reads the first slot of every key without branching on it.
    ///
    /// The processor overlaps these loads; in the lookups that follow, a wrongly predicted branch
    /// would make each of them wait for the one before.
    #[inline]
    fn touch(&self, keys: &[u128]) {
        let mask = self.slots.len() - 1;
        let first = |key: &u128| (hash(*key as u64, (*key >> 64) as u64) >> 32) as usize & mask;
        std::hint::black_box(keys.iter().fold(0, |all, key| all | self.slots[first(key)].high));
    }

    /// Puts the values of packed pieces into `values`; [`Option::None`] for a piece not here.
    #[inline]
    pub fn get_batch(&self, keys: &[u128], values: &mut [Option<V>]) {
        self.touch(keys);
        for (key, value) in keys.iter().zip(values) {
            *value = self.get_packed(*key);
        }
    }

    #[cold]
    fn grow(&mut self) {
        let size = self.slots.len() * 2;
        let old = std::mem::replace(&mut self.slots, vec![Slot::default(); size]);
        for slot in old.into_iter().filter(|slot| slot.high != 0) {
            let at = self.find(slot.key());
            self.slots[at] = slot;
        }
    }
}

impl PieceMap<u64> {
    /// Counts every packed piece once more.
    #[inline]
    pub fn count_batch(&mut self, keys: &[u128]) {
        self.touch(keys);
        for key in keys {
            *self.packed_entry(*key) += 1;
        }
    }

    /// Moves all counts into `shards`, which several threads share, and empties the map.
    pub fn flush(&mut self, shards: &[Mutex<PieceMap<u64>>]) {
        let shard = |hash: u64| {
            let shard = &shards[hash as usize % shards.len()];
            shard.lock().unwrap_or_else(PoisonError::into_inner)
        };
        for slot in self.slots.iter_mut().filter(|slot| slot.high != 0) {
            *shard(hash(slot.low, slot.high)).packed_entry(slot.key()) += slot.value;
            *slot = Slot::default();
        }
        self.num_packed = 0;
        for (piece, count) in self.long.drain() {
            let mut hasher = MixHasher::default();
            hasher.write(&piece);
            *shard(hasher.finish()).long.entry(piece).or_default() += count;
        }
    }
}
