//! Many texts at once on several threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::encode::{Encoder, Worker};
use crate::error::Error;

/// Below this many bytes per thread, starting threads costs more than it saves.
const MIN_BYTES_PER_THREAD: usize = 1 << 15;

/// Below this many bytes per thread, the memory for remembered pieces is not worth setting up.
const MIN_BYTES_TO_REMEMBER: usize = 1 << 18;

/// Texts are handed out in runs of about this many bytes.
const RUN_BYTES: usize = 1 << 17;

/// Ids of consecutive texts.
#[derive(Default)]
pub struct Run {
    /// Ids of all texts, one after the other.
    pub ids: Vec<u32>,
    /// Number of ids of each text.
    pub lens: Vec<usize>,
}

/// What is put around every text.
#[derive(Clone, Copy, Default)]
pub struct Frame {
    /// Id in front.
    pub prepend: Option<u32>,
    /// Id behind.
    pub append: Option<u32>,
}

/// Encodes all texts; the runs are in order and together cover them.
pub fn encode_batch<T: AsRef<str> + Sync>(
    encoder: &Encoder,
    texts: &[T],
    frame: Frame,
    num_threads: usize,
) -> Result<Vec<Run>, Error> {
    let ranges = cut(texts, RUN_BYTES);
    let num_bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
    let num_threads = num_threads.min(num_bytes / MIN_BYTES_PER_THREAD).min(ranges.len()).max(1);
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Run)>, Error> {
        let (pattern, mut done) = (encoder.pattern.clone(), Vec::new());
        let long = num_bytes / num_threads >= MIN_BYTES_TO_REMEMBER;
        let mut worker = if long { Worker::remembering(encoder) } else { Worker::new(encoder) };
        while let Some(range) = ranges.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut run = Run::default();
            for text in &texts[range.clone()] {
                let before = run.ids.len();
                run.ids.extend(frame.prepend);
                worker.encode(&pattern, text.as_ref(), &mut run.ids)?;
                run.ids.extend(frame.append);
                run.lens.push(run.ids.len() - before);
            }
            done.push((range.start, run));
        }
        Ok(done)
    };
    let mut runs = run_on_threads(num_threads, work)?;
    runs.sort_by_key(|(start, _)| *start);
    Ok(runs.into_iter().map(|(_, run)| run).collect())
}

/// Runs `work` on this thread and `num_threads - 1` more, and joins the results.
fn run_on_threads<R: Send>(
    num_threads: usize,
    work: impl Fn() -> Result<Vec<R>, Error> + Sync,
) -> Result<Vec<R>, Error> {
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..num_threads).map(|_| scope.spawn(&work)).collect();
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
