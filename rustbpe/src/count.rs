//! Counts the distinct pieces of a stream of texts on several threads.
//!
//! The calling thread pulls texts and queues them in small chunks. Every worker counts into a map of
//! its own that stays in its cache and is emptied into shared maps when full. Only a few chunks are in
//! flight, so the memory needed depends on the number of distinct pieces, not on the size of the corpus.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use crate::error::Error;
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

/// Counts the pieces of all texts of `source` with `num_threads` workers; a piece is in one map only.
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
        let start = |_| {
            let (shared, pattern) = (&shared, pattern.clone());
            Builder::new().spawn_scoped(scope, move || shared.work(&pattern))
        };
        // A busy system may give fewer threads than asked for; one is enough.
        let fed = match (0..num_threads).map(start).take_while(Result::is_ok).count() {
            0 => Err(Error::NoThread.into()),
            _ => shared.feed(pattern, source),
        };
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

impl<T: AsRef<str> + Send + Sync> Shared<T> {
    fn feed<S: Source<Text = T>>(&self, pattern: &Pattern, source: &mut S) -> Result<(), S::Error> {
        while let Some(texts) = source.next_chunk()? {
            let mut small = Vec::with_capacity(texts.len());
            for text in texts {
                if text.as_ref().len() <= 2 * PART_BYTES {
                    small.push(text);
                } else {
                    self.push_parts(pattern, text, source)?;
                }
            }
            self.push(Work::Texts(small), source)?;
        }
        while !self.queue.wait_idle(PATIENCE) {
            source.check()?;
        }
        Ok(())
    }

    fn push_parts<S: Source<Text = T>>(
        &self,
        pattern: &Pattern,
        text: T,
        source: &mut S,
    ) -> Result<(), S::Error> {
        let text = Arc::new(text);
        let mut start = 0;
        for part in pattern.parts((*text).as_ref(), PART_BYTES) {
            let end = start + part.len();
            self.push(Work::Part(text.clone(), start..end), source)?;
            source.check()?; // one text may last for minutes
            start = end;
        }
        Ok(())
    }

    fn push<S: Source<Text = T>>(&self, mut work: Work<T>, source: &mut S) -> Result<(), S::Error> {
        loop {
            if let Some(error) = self.failure().take() {
                return Err(error.into());
            }
            match self.queue.push(work, PATIENCE) {
                Ok(()) => return Ok(()),
                Err(back) => work = back,
            }
            source.check()?;
        }
    }

    fn work(&self, pattern: &Pattern) {
        let mut counts = PieceMap::with_capacity(MAX_OWN_PIECES);
        while let Some(work) = self.queue.pop() {
            let outcome = match &work {
                Work::Texts(texts) => {
                    texts.iter().try_for_each(|text| self.count(pattern, text.as_ref(), &mut counts))
                }
                Work::Part(text, range) => {
                    self.count(pattern, &(**text).as_ref()[range.clone()], &mut counts)
                }
            };
            if let Err(error) = outcome {
                self.stop.store(true, Ordering::Relaxed);
                self.failure().get_or_insert(error);
            }
            drop(work);
            self.queue.finish_one();
        }
        counts.flush(&self.shards);
    }

    fn count(&self, pattern: &Pattern, text: &str, counts: &mut PieceMap<u64>) -> Result<(), Error> {
        let (bytes, mut keys, mut num) = (text.as_bytes(), [0; BATCH], 0);
        pattern.split(text, |start, end| {
            if end - start > MAX_PACKED {
                *counts.entry(bytes, start, end) += 1;
                return true;
            }
            keys[num] = pack(bytes, start, end);
            num += 1;
            if num < BATCH {
                return true;
            }
            num = 0;
            counts.count_batch(&keys);
            if counts.len() > MAX_OWN_PIECES {
                counts.flush(&self.shards);
            }
            !self.stop.load(Ordering::Relaxed)
        })?;
        counts.count_batch(&keys[..num]);
        Ok(())
    }

    fn failure(&self) -> std::sync::MutexGuard<'_, Option<Error>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
