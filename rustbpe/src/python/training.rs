//! Training from a Python iterator: pulling texts, progress through `logging`, Ctrl-C.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyIterator, PyString};

use crate::count::{count_pieces, Source};
use crate::encode::Encoder;
use crate::pattern::Pattern;
use crate::piece_map::PieceMap;
use crate::train::{learn_merges, Merge, Watch};
use crate::vocab::Vocab;

/// A chunk of texts ends at this size even if more strings may be buffered.
const CHUNK_BYTES: usize = 1 << 20;

/// How often a line tells how much was read.
const REPORT_INTERVAL: Duration = Duration::from_secs(2);

/// How often the merge loop takes the GIL to see signals.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

/// How to learn.
pub struct Options {
    /// Merges to learn at most.
    pub num_merges: usize,
    /// Strings to buffer.
    pub num_strings: usize,
    /// How to split.
    pub pattern: Pattern,
    /// Threads that count.
    pub num_threads: usize,
}

/// Learns a vocabulary; nothing is kept of a training that fails or is interrupted.
pub fn train(py: Python<'_>, iterator: &Bound<'_, PyAny>, options: Options) -> PyResult<Encoder> {
    super::refuse_str(iterator, "iterator")?;
    let Options { num_merges, num_strings, pattern, num_threads } = options;
    let mut log = Log::new(py)?;
    log.info(&format!("Reading texts, {num_strings} strings at a time, {num_threads} threads"))?;
    let mut source = PythonTexts {
        iterator: iterator.try_iter()?.unbind(),
        // Up to twice as many chunks as threads are on their way.
        chunk_strings: (num_strings / (2 * num_threads)).max(1),
        num_texts: 0,
        num_bytes: 0,
        reported: Instant::now(),
        log: &mut log,
    };
    let pieces = py.detach(|| count_pieces(&pattern, num_threads, &mut source))?;
    let (num_texts, num_bytes) = (source.num_texts, source.num_bytes);
    let num_pieces: usize = pieces.iter().map(PieceMap::len).sum();
    log.info(&format!("Read {num_texts} texts, {num_bytes} bytes, with {num_pieces} distinct pieces"))?;
    log.info(&format!("Learning {num_merges} merges"))?;
    let mut progress = Progress { log: &mut log, num_merges, percent: 0, looked: Instant::now() };
    let merges = py.detach(|| learn_merges(pieces, num_merges, &mut progress))?;
    finish(py, log, pattern, &merges, num_merges)
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
struct Progress<'a> {
    log: &'a mut Log,
    num_merges: usize,
    percent: usize,
    looked: Instant,
}

impl Watch for Progress<'_> {
    type Error = PyErr;

    fn counted(&mut self, num_pairs: usize) -> PyResult<()> {
        self.log.info(&format!("The pieces have {num_pairs} distinct pairs"))
    }

    fn chosen(&mut self, done: usize, merge: Merge) -> PyResult<()> {
        let Merge { left, right, count } = merge;
        let percent = (done + 1) * 100 / self.num_merges;
        if percent == self.percent {
            return Ok(());
        }
        self.percent = percent;
        self.log.info(&format!(
            "Learned {} of {} merges ({percent}%): ({left}, {right}) -> {}, frequency {count}",
            done + 1,
            self.num_merges,
            256 + done,
        ))
    }

    fn check(&mut self) -> PyResult<()> {
        if self.looked.elapsed() < SIGNAL_INTERVAL {
            return Ok(());
        }
        self.looked = Instant::now();
        Python::attach(|py| py.check_signals())
    }
}
