//! Counts the distinct pieces of a stream of texts on several threads.
//!
//! The calling thread pulls texts and queues them in small chunks, and starts a worker whenever all are
//! busy. Every worker counts into a map of its own that stays in its cache and is emptied into shared
//! maps when full. Only a few chunks are in flight, so the memory needed depends on the number of
//! distinct pieces, not on the size of the corpus.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use crate::error::{caught, Error};
use crate::pattern::Pattern;
use crate::piece_map::{pack, PieceMap, BATCH, MAX_PACKED};
use crate::queue::Queue;

/// How often a waiting caller looks for an interrupt.
const PATIENCE: Duration = Duration::from_millis(50);

/// A worker's map is emptied beyond this many pieces: larger ones leave the cache, smaller ones are
/// emptied too often (measured: 2^13 20 % slower, 2^20 12 % slower).
const MAX_OWN_PIECES: usize = 1 << 16;

/// Shared maps, so that threads seldom wait for each other.
const NUM_SHARDS: usize = 64;

/// Longer texts are cut into parts of about this many bytes, so that threads can share them.
const PART_BYTES: usize = 1 << 20;

/// Where texts come from, and who is asked whether to go on.
pub trait Source {
    /// One text.
    type Text: AsRef<str> + Send + Sync;
    /// What stops the stream early.
    type Error: From<Error>;
    /// The next chunk of texts; `None` at the end.
    fn next_chunk(&mut self) -> Result<Option<Vec<Self::Text>>, Self::Error>;
    /// Called now and then while waiting; an error stops everything.
    fn check(&mut self) -> Result<(), Self::Error>;
}

enum Work<T> {
    Texts(Vec<T>),
    Part(Arc<T>, std::ops::Range<usize>),
}

struct Shared<T> {
    queue: Queue<Work<T>>,
    shards: Vec<Mutex<PieceMap<u64>>>,
    stop: AtomicBool,
    failure: Mutex<Option<Error>>,
}

/// Counts the pieces of all texts of `source` with up to `num_threads` workers; a piece is in one map only.
pub fn count_pieces<S: Source>(
    pattern: &Pattern,
    num_threads: usize,
    source: &mut S,
) -> Result<Vec<PieceMap<u64>>, S::Error> {
    let shared = Shared {
        queue: Queue::new(num_threads),
        shards: (0..NUM_SHARDS).map(|_| Mutex::new(PieceMap::with_capacity(0))).collect(),
        stop: AtomicBool::new(false),
        failure: Mutex::new(None),
    };
    let fed = std::thread::scope(|scope| {
        let start_worker = || {
            let (shared, pattern) = (&shared, pattern.clone());
            Builder::new().spawn_scoped(scope, move || shared.work(&pattern)).is_ok()
        };
        let mut feeder =
            Feeder { shared: &shared, source, start_worker, num_workers: 0, max_workers: num_threads };
        let fed = feeder.feed(pattern);
        if fed.is_err() {
            shared.stop.store(true, Ordering::Relaxed);
            shared.queue.abandon();
        }
        shared.queue.close();
        fed
    });
    if let Some(error) = shared.failure().take() {
        return Err(error.into());
    }
    fed?;
    let own = |shard: Mutex<PieceMap<u64>>| shard.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(shared.shards.into_iter().map(own).collect())
}

/// Queues what the source gives.
struct Feeder<'a, S: Source, F> {
    shared: &'a Shared<S::Text>,
    source: &'a mut S,
    start_worker: F, // false if the system gives no thread
    num_workers: usize,
    max_workers: usize,
}

impl<S: Source, F: Fn() -> bool> Feeder<'_, S, F> {
    fn feed(&mut self, pattern: &Pattern) -> Result<(), S::Error> {
        while let Some(texts) = self.source.next_chunk()? {
            let mut small = Vec::with_capacity(texts.len());
            for text in texts {
                if text.as_ref().len() <= 2 * PART_BYTES {
                    small.push(text);
                } else {
                    self.push_parts(pattern, text)?;
                }
            }
            self.push(Work::Texts(small))?;
        }
        while !self.shared.queue.wait_idle(PATIENCE) {
            self.source.check()?;
        }
        Ok(())
    }

    fn push_parts(&mut self, pattern: &Pattern, text: S::Text) -> Result<(), S::Error> {
        let text = Arc::new(text);
        let mut start = 0;
        for part in pattern.parts((*text).as_ref(), PART_BYTES) {
            let end = start + part.len();
            self.push(Work::Part(text.clone(), start..end))?;
            self.source.check()?; // one text may last for minutes
            start = end;
        }
        Ok(())
    }

    fn push(&mut self, mut work: Work<S::Text>) -> Result<(), S::Error> {
        loop {
            if let Some(error) = self.shared.failure().take() {
                return Err(error.into());
            }
            match self.shared.queue.push(work, PATIENCE) {
                Ok(num_unfinished) => return self.ensure_workers(num_unfinished),
                Err(back) => work = back,
            }
            self.source.check()?;
        }
    }

    /// Starts another worker if all are busy.
    fn ensure_workers(&mut self, num_unfinished: usize) -> Result<(), S::Error> {
        if num_unfinished > self.num_workers && self.num_workers < self.max_workers {
            if (self.start_worker)() {
                self.num_workers += 1;
            } else if self.num_workers == 0 {
                return Err(Error::NoThread.into());
            } else {
                self.max_workers = self.num_workers; // the system is busy; one worker is enough
            }
        }
        Ok(())
    }
}

impl<T: AsRef<str> + Send + Sync> Shared<T> {
    fn work(&self, pattern: &Pattern) {
        let mut counter = Counter::new(&self.shards, &self.stop);
        while let Some(work) = self.queue.pop() {
            self.attempt(|| counter.count_all(pattern, work));
            self.queue.finish_one();
        }
        self.attempt(|| {
            counter.empty();
            Ok(())
        });
    }

    /// Makes everyone stop if `step` fails or panics.
    fn attempt(&self, step: impl FnOnce() -> Result<(), Error>) {
        if let Err(error) = caught(step) {
            self.stop.store(true, Ordering::Relaxed);
            self.failure().get_or_insert(error);
        }
    }
}

impl<T> Shared<T> {
    fn failure(&self) -> MutexGuard<'_, Option<Error>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one worker counts.
struct Counter<'a> {
    shards: &'a [Mutex<PieceMap<u64>>],
    stop: &'a AtomicBool,
    counts: PieceMap<u64>,
    keys: [u128; BATCH], // short pieces, of one text or several, that are looked up together
    num_keys: usize,
}

impl<'a> Counter<'a> {
    fn new(shards: &'a [Mutex<PieceMap<u64>>], stop: &'a AtomicBool) -> Counter<'a> {
        Counter { shards, stop, counts: PieceMap::with_capacity(0), keys: [0; BATCH], num_keys: 0 }
    }

    fn count_all<T: AsRef<str>>(&mut self, pattern: &Pattern, work: Work<T>) -> Result<(), Error> {
        match work {
            Work::Texts(texts) => texts.iter().try_for_each(|text| self.count(pattern, text.as_ref())),
            Work::Part(text, range) => self.count(pattern, &(*text).as_ref()[range]),
        }
    }

    fn count(&mut self, pattern: &Pattern, text: &str) -> Result<(), Error> {
        let bytes = text.as_bytes();
        pattern.split(text, |start, end| {
            if end - start > MAX_PACKED {
                *self.counts.entry(bytes, start, end) += 1;
                return self.go_on();
            }
            self.keys[self.num_keys] = pack(bytes, start, end);
            self.num_keys += 1;
            self.num_keys < BATCH || {
                self.count_keys();
                self.go_on()
            }
        })
    }

    fn count_keys(&mut self) {
        self.counts.count_batch(&self.keys[..self.num_keys]);
        self.num_keys = 0;
    }

    /// Empties the map if it is full; false if the work must stop.
    fn go_on(&mut self) -> bool {
        if self.counts.len() > MAX_OWN_PIECES {
            self.counts.flush(self.shards);
        }
        !self.stop.load(Ordering::Relaxed)
    }

    /// Moves everything counted so far to the shared maps.
    fn empty(&mut self) {
        self.count_keys();
        self.counts.flush(self.shards);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern::NANOCHAT_PATTERN;

    /// Counts distinct words `of` 0 to 199,999 in texts of `per_text`, with a look at the counter after each.
    fn count_words(of: impl Fn(usize) -> String, per_text: usize, look: impl Fn(&Counter, &AtomicBool)) {
        let shards: Vec<_> = (0..4).map(|_| Mutex::new(PieceMap::with_capacity(0))).collect();
        let (stop, pattern) = (AtomicBool::new(false), Pattern::new(NANOCHAT_PATTERN).unwrap());
        let mut counter = Counter::new(&shards, &stop);
        for start in (0..200_000).step_by(per_text) {
            let text: String = (start..start + per_text).map(&of).collect();
            counter.count(&pattern, &text).unwrap();
            look(&counter, &stop);
        }
        counter.empty();
        let num_shared: usize = shards.iter().map(|shard| shard.lock().unwrap().len()).sum();
        assert!(num_shared == 200_000 || stop.into_inner());
    }

    fn word(number: usize, prefix: &str) -> String {
        let letter = |power| char::from(b'a' + (number / 26usize.pow(power) % 26) as u8);
        prefix.chars().chain((0..4).map(letter)).collect()
    }

    #[test]
    fn own_maps_stay_small_whatever_the_texts_are() {
        let small = |counter: &Counter, _: &AtomicBool| {
            assert!(counter.counts.len() <= MAX_OWN_PIECES + BATCH);
        };
        count_words(|number| word(number, ""), 1, small);
        count_words(|number| word(number, " "), 1000, small);
        let long = " abcdefghijklmnopqrstuvwxyz";
        count_words(|number| word(number, long), 1, small);
        count_words(|number| word(number, long), 200_000, small);
    }

    #[test]
    fn a_text_of_long_pieces_is_left_when_work_must_stop() {
        for prefix in [" ", " abcdefghijklmnopqrstuvwxyz"] {
            let stop_early = |counter: &Counter, stop: &AtomicBool| {
                assert!(counter.counts.len() <= 1000 + 200 * BATCH);
                stop.store(true, Ordering::Relaxed);
            };
            count_words(|number| word(number, prefix), 1000, stop_early);
        }
    }
}
