//! Many texts at once on several threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;

use crate::encode::{Encoder, Worker};
use crate::error::{caught, Error};
use crate::pattern::Pattern;

/// Below this many bytes per thread, starting threads costs more than it saves.
const MIN_BYTES_PER_THREAD: usize = 1 << 15;

/// Below this many bytes per thread, remembering pieces is not worth its memory.
const MIN_BYTES_TO_REMEMBER: usize = 1 << 16;

/// Texts are handed out in runs of about this many bytes, and much longer ones cut into such parts.
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

/// Consecutive texts, or a part of one.
struct Portion<'a> {
    texts: Vec<&'a str>,
    starts: bool, // the first text, if it is a part, is the first part
    ends: bool,   // the last text, if it is a part, is the last part
}

/// Encodes all texts; the runs are in order and together cover them.
pub fn encode_batch<T: AsRef<str> + Sync, I: Id>(
    encoder: &Encoder,
    texts: &[T],
    options: Options,
    num_threads: usize,
) -> Result<Vec<Run<I>>, Error> {
    // A special token might lie across the border of two parts, so they are for texts without any.
    let portions = portions(texts, options.specials.is_empty().then_some(&encoder.pattern));
    let num_bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
    let num_threads = num_threads.min(num_bytes / MIN_BYTES_PER_THREAD).min(portions.len()).max(1);
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Run<I>)>, Error> {
        let (pattern, mut done, mut ids) = (encoder.pattern.clone(), Vec::new(), Vec::new());
        let long = num_bytes / num_threads >= MIN_BYTES_TO_REMEMBER;
        let mut worker = if long { Worker::remembering(encoder) } else { Worker::new(encoder) };
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(portion) = portions.get(at) else { return Ok(done) };
            let mut lens = Vec::with_capacity(portion.texts.len());
            for text in &portion.texts {
                let before = ids.len();
                ids.extend(options.prepend.filter(|_| portion.starts));
                worker.encode_with(&pattern, options.specials, text, &mut ids)?;
                ids.extend(options.append.filter(|_| portion.ends));
                lens.push(ids.len() - before);
            }
            done.push((at, Run { ids: ids.drain(..).map(I::of).collect(), lens }));
        }
    };
    let mut runs = run_on_threads(num_threads, work)?;
    runs.sort_unstable_by_key(|(at, _)| *at);
    let mut whole: Vec<Run<I>> = Vec::with_capacity(runs.len());
    for (at, run) in runs {
        match whole.last_mut().filter(|_| !portions[at].starts) {
            Some(text) => text.append_part(&run),
            None => whole.push(run),
        }
    }
    Ok(whole)
}

impl<I: Id> Run<I> {
    /// Puts the ids of the next part behind those of the one text here.
    fn append_part(&mut self, part: &Run<I>) {
        self.ids.extend_from_slice(&part.ids);
        self.lens = vec![self.ids.len()];
    }
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
        let mut results = caught(&work);
        for other in others {
            let theirs = other.join().unwrap_or(Err(Error::WorkerFailed));
            results = results.and_then(|mut all| {
                all.extend(theirs?);
                Ok(all)
            });
        }
        results
    })
}

/// Texts in portions of about `RUN_BYTES`; without a pattern no text is cut.
fn portions<'a, T: AsRef<str>>(texts: &'a [T], pattern: Option<&Pattern>) -> Vec<Portion<'a>> {
    let (mut portions, mut some, mut num_bytes) = (Vec::new(), Vec::new(), 0);
    let mut texts = texts.iter().map(AsRef::as_ref).peekable();
    while let Some(text) = texts.next() {
        let long = pattern.filter(|_| text.len() > 2 * RUN_BYTES);
        if long.is_none() {
            some.push(text);
            num_bytes += text.len();
        }
        if !some.is_empty() && (long.is_some() || num_bytes >= RUN_BYTES || texts.peek().is_none()) {
            portions.push(Portion { texts: std::mem::take(&mut some), starts: true, ends: true });
            num_bytes = 0;
        }
        if let Some(pattern) = long {
            let parts = pattern.parts(text, RUN_BYTES);
            let last = parts.len() - 1;
            let portion = |(at, part)| Portion { texts: vec![part], starts: at == 0, ends: at == last };
            portions.extend(parts.into_iter().enumerate().map(portion));
        }
    }
    portions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_any_thread_is_an_error() {
        let caller = std::thread::current().id();
        for mine in [false, true] {
            let work = || {
                assert_ne!(std::thread::current().id() == caller, mine, "a panic on purpose");
                Ok(vec![()])
            };
            assert_eq!(run_on_threads(3, work), Err(Error::WorkerFailed));
        }
    }
}
