//! Training from a Python iterator: pulling texts, progress through `logging`, Ctrl-C.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyIterator, PyString};

use crate::count::{count_pieces, Source};
use crate::encode::Encoder;
use crate::error::Error;
use crate::pattern::{Pattern, GPT4_PATTERN};
use crate::piece_map::PieceMap;
use crate::train::{learn_merges, Merge};
use crate::vocab::Vocab;

/// A chunk of texts ends at this size even if more strings may be buffered.
const CHUNK_BYTES: usize = 1 << 20;

/// How often a line tells how much was read.
const REPORT_INTERVAL: Duration = Duration::from_secs(2);

/// How often the merge loop takes the GIL to see signals.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

/// Learns a vocabulary; nothing is kept of a training that fails or is interrupted.
pub fn train(
    py: Python<'_>,
    iterator: &Bound<'_, PyAny>,
    vocab_size: i64,
    buffer_size: usize,
    pattern: Option<&str>,
    num_threads: usize,
) -> PyResult<Encoder> {
    if vocab_size < 256 {
        return Err(Error::VocabTooSmall(vocab_size).into());
    }
    if buffer_size == 0 {
        return Err(PyValueError::new_err("buffer_size is 0; give the number of strings to buffer"));
    }
    super::refuse_str(iterator, "iterator")?;
    let pattern = Pattern::new(pattern.unwrap_or(GPT4_PATTERN))?;
    let mut log = Log::new(py)?;
    log.info(&format!("Reading texts, {buffer_size} strings at a time, {num_threads} threads"))?;
    // Up to twice as many chunks as threads are on their way.
    let chunk_strings = (buffer_size / (2 * num_threads)).max(1);
    let iterator = iterator.try_iter()?.unbind();
    let mut source = PythonTexts {
        iterator,
        chunk_strings,
        num_texts: 0,
        num_bytes: 0,
        reported: Instant::now(),
        log: &mut log,
    };
    let pieces = py.detach(|| count_pieces(&pattern, num_threads, &mut source))?;
    let (num_texts, num_bytes) = (source.num_texts, source.num_bytes);
    let num_pieces: usize = pieces.iter().map(PieceMap::len).sum();
    log.info(&format!("Read {num_texts} texts, {num_bytes} bytes, with {num_pieces} distinct pieces"))?;
    let num_merges = vocab_size as usize - 256;
    log.info(&format!("Learning {num_merges} merges"))?;
    let mut progress = Progress::new(log, num_merges);
    let learned = py.detach(|| learn_merges(pieces, num_merges, |done, merge| progress.step(done, merge)));
    if let Some(error) = progress.error {
        return Err(error);
    }
    finish(py, progress.log, pattern, &learned?, num_merges)
}

fn finish(
    py: Python<'_>,
    mut log: Log,
    pattern: Pattern,
    merges: &[Merge],
    num_merges: usize,
) -> PyResult<Encoder> {
    if merges.len() < num_merges {
        log.warning(&format!("No pairs left: learned {} of {num_merges} merges", merges.len()))?;
    } else {
        log.info(&format!("Learned {num_merges} merges"))?;
    }
    let ranks = spell(merges);
    Ok(py.detach(|| Encoder::new(pattern, Vocab::new(ranks)?, BTreeMap::new()))?)
}

/// Bytes and id of every token.
fn spell(merges: &[Merge]) -> Vec<(Vec<u8>, u32)> {
    let mut ranks: Vec<_> = (0..=255u8).map(|byte| (vec![byte], u32::from(byte))).collect();
    for merge in merges {
        let token = [&ranks[merge.left as usize].0[..], &ranks[merge.right as usize].0].concat();
        ranks.push((token, ranks.len() as u32));
    }
    ranks
}

/// The Python logger `rustbpe`.
struct Log {
    logger: Py<PyAny>,
}

impl Log {
    fn new(py: Python<'_>) -> PyResult<Log> {
        let logger = py.import("logging")?.call_method1("getLogger", ("rustbpe",))?;
        Ok(Log { logger: logger.unbind() })
    }

    fn info(&mut self, message: &str) -> PyResult<()> {
        Python::attach(|py| self.logger.call_method1(py, "info", (message,)).map(drop))
    }

    fn warning(&mut self, message: &str) -> PyResult<()> {
        Python::attach(|py| self.logger.call_method1(py, "warning", (message,)).map(drop))
    }
}

/// Texts of a Python iterator, pulled with the GIL held for one chunk at a time.
struct PythonTexts<'a> {
    iterator: Py<PyIterator>,
    chunk_strings: usize,
    num_texts: u64,
    num_bytes: usize,
    reported: Instant,
    log: &'a mut Log,
}

impl Source for PythonTexts<'_> {
    type Text = PyBackedStr;
    type Error = PyErr;

    fn next_chunk(&mut self) -> PyResult<Option<Vec<PyBackedStr>>> {
        Python::attach(|py| {
            py.check_signals()?;
            let (mut chunk, mut num_bytes) = (Vec::new(), 0);
            for item in self.iterator.bind(py).clone() {
                let text = PyBackedStr::try_from(item?.cast_into::<PyString>()?)?;
                num_bytes += text.len();
                chunk.push(text);
                if chunk.len() >= self.chunk_strings || num_bytes >= CHUNK_BYTES {
                    break;
                }
            }
            self.count(chunk.len() as u64, num_bytes)?;
            Ok((!chunk.is_empty()).then_some(chunk))
        })
    }

    fn check(&mut self) -> PyResult<()> {
        Python::attach(|py| py.check_signals())
    }
}

impl PythonTexts<'_> {
    /// Counts what was read, with a line of progress now and then.
    fn count(&mut self, num_texts: u64, num_bytes: usize) -> PyResult<()> {
        self.num_texts += num_texts;
        self.num_bytes += num_bytes;
        if self.reported.elapsed() < REPORT_INTERVAL {
            return Ok(());
        }
        self.reported = Instant::now();
        self.log.info(&format!("Read {} texts so far, {} MB", self.num_texts, self.num_bytes / 1_000_000))
    }
}

/// Progress of the merge loop: one line per percent, and a look at signals now and then.
struct Progress {
    log: Log,
    num_merges: usize,
    percent: usize,
    looked: Instant,
    error: Option<PyErr>,
}

impl Progress {
    fn new(log: Log, num_merges: usize) -> Progress {
        Progress { log, num_merges, percent: 0, looked: Instant::now(), error: None }
    }

    /// Reports a merge; false if training must stop, with the reason in `error`.
    fn step(&mut self, done: usize, merge: Merge) -> bool {
        let percent = (done + 1) * 100 / self.num_merges;
        let mut outcome = Ok(());
        if percent > self.percent {
            self.percent = percent;
            outcome = self.report(done + 1, merge);
        }
        if done % 64 == 0 && self.looked.elapsed() >= SIGNAL_INTERVAL {
            self.looked = Instant::now();
            outcome = outcome.and_then(|()| Python::attach(|py| py.check_signals()));
        }
        self.error = outcome.err();
        self.error.is_none()
    }

    fn report(&mut self, done: usize, merge: Merge) -> PyResult<()> {
        let Merge { left, right, count } = merge;
        let new = 255 + done;
        self.log.info(&format!(
            "Learned {done} of {} merges ({}%): ({left}, {right}) -> {new}, frequency {count}",
            self.num_merges, self.percent
        ))
    }
}
