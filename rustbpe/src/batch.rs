//! Many texts at once on several threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;

use crate::encode::{Encoder, Worker};
use crate::error::Error;

/// Below this many bytes per thread, starting threads costs more than it saves.
const MIN_BYTES_PER_THREAD: usize = 1 << 15;

/// Below this many bytes per thread, remembering pieces is not worth its memory.
const MIN_BYTES_TO_REMEMBER: usize = 1 << 16;

/// Texts are handed out in runs of about this many bytes.
const RUN_BYTES: usize = 1 << 17;

/// A type of array elements that token ids are narrowed to.
pub trait Id: Copy + Send + Sync {
    /// The id, which must fit.
    fn of(id: u32) -> Self;
}

impl Id for u8 {
    fn of(id: u32) -> u8 {
        id as u8
    }
}

impl Id for u16 {
    fn of(id: u32) -> u16 {
        id as u16
    }
}

impl Id for u32 {
    fn of(id: u32) -> u32 {
        id
    }
}

/// Ids of consecutive texts.
pub struct Run<I> {
    /// Ids of all texts, one after the other.
    pub ids: Vec<I>,
    /// Number of ids of each text.
    pub lens: Vec<usize>,
}

/// What is done to every text.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// Id in front.
    pub prepend: Option<u32>,
    /// Id behind.
    pub append: Option<u32>,
    /// Strings that become special tokens, with their ids.
    pub specials: &'a [(&'a str, u32)],
}

/// Encodes all texts; the runs are in order and together cover them.
pub fn encode_batch<T: AsRef<str> + Sync, I: Id>(
    encoder: &Encoder,
    texts: &[T],
    options: Options,
    num_threads: usize,
) -> Result<Vec<Run<I>>, Error> {
    let ranges = cut(texts, RUN_BYTES);
    let num_bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
    let num_threads = num_threads.min(num_bytes / MIN_BYTES_PER_THREAD).min(ranges.len()).max(1);
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Run<I>)>, Error> {
        let (pattern, mut done, mut ids) = (encoder.pattern.clone(), Vec::new(), Vec::new());
        let long = num_bytes / num_threads >= MIN_BYTES_TO_REMEMBER;
        let mut worker = if long { Worker::remembering(encoder) } else { Worker::new(encoder) };
        while let Some(range) = ranges.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut lens = Vec::with_capacity(range.len());
            for text in &texts[range.clone()] {
                let before = ids.len();
                ids.extend(options.prepend);
                worker.encode_with(&pattern, options.specials, text.as_ref(), &mut ids)?;
                ids.extend(options.append);
                lens.push(ids.len() - before);
            }
            done.push((range.start, Run { ids: ids.drain(..).map(I::of).collect(), lens }));
        }
        Ok(done)
    };
    let mut runs = run_on_threads(num_threads, work)?;
    runs.sort_unstable_by_key(|(start, _)| *start);
    Ok(runs.into_iter().map(|(_, run)| run).collect())
}

/// Runs `work` on this thread and `num_threads - 1` more, and joins the results.
fn run_on_threads<R: Send>(
    num_threads: usize,
    work: impl Fn() -> Result<Vec<R>, Error> + Sync,
) -> Result<Vec<R>, Error> {
    std::thread::scope(|scope| {
        // This thread works anyway, so none is missed that the system does not give.
        let start = |_| Builder::new().spawn_scoped(scope, &work).ok();
        let others: Vec<_> = (1..num_threads).map_while(start).collect();
        let mut results = work();
        for other in others {
            let theirs = other.join().expect("a worker does not panic");
            results = results.and_then(|mut all| {
                all.extend(theirs?);
                Ok(all)
            });
        }
        results
    })
}

/// Ranges of consecutive texts with about `size` bytes each.
fn cut<T: AsRef<str>>(texts: &[T], size: usize) -> Vec<std::ops::Range<usize>> {
    let (mut ranges, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (at, text) in texts.iter().enumerate() {
        bytes += text.as_ref().len();
        if bytes >= size {
            ranges.push(start..at + 1);
            (start, bytes) = (at + 1, 0);
        }
    }
    if start < texts.len() {
        ranges.push(start..texts.len());
    }
    ranges
}
