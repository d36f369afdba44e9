//! The Python module: argument checking, the GIL, exceptions and arrays.

use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::available_parallelism;

use pyo3::exceptions::{
    PyOverflowError, PyRuntimeError, PyTypeError, PyUnicodeDecodeError, PyUnicodeEncodeError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyList, PyString};

use crate::batch::Options;
use crate::decode::{decode, decode_bytes};
use crate::encode::{Encoder, Worker};
use crate::error::Error;
use crate::pattern::{Pattern, GPT4_PATTERN};
use crate::vocab::{Vocab, MAX_ID};
use arrays::Batch;

mod arrays;
mod training;

/// Longer texts are encoded with the GIL released.
const MIN_BYTES_TO_DETACH: usize = 1 << 12;

/// More threads than this are not started, whatever is asked for.
const MAX_THREADS: usize = 256;

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match error {
            Error::InvalidUtf8 { bytes, start, end } => {
                PyUnicodeDecodeError::new_err(("utf-8", bytes, start, end, "invalid UTF-8 in tokens"))
            }
            Error::Split(_) | Error::CorpusTooLarge | Error::NoThread | Error::WorkerFailed => {
                PyRuntimeError::new_err(error.to_string())
            }
            _ => PyValueError::new_err(error.to_string()),
        }
    }
}

/// Learns a byte-pair encoding and encodes with it.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    encoder: RwLock<Arc<Encoder>>,
}

#[pymethods]
impl Tokenizer {
    /// A tokenizer that knows the 256 bytes and has no pattern yet.
    #[new]
    fn new() -> PyResult<Tokenizer> {
        let encoder = Encoder::new(Pattern::new("")?, Vocab::bytes_only(), BTreeMap::new())?;
        Ok(Tokenizer { encoder: RwLock::new(Arc::new(encoder)) })
    }

    /// A tokenizer with given (bytes, id) ranks, as tiktoken has them, and special tokens.
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern, special_tokens=BTreeMap::new()))]
    fn from_ranks(
        py: Python<'_>,
        ranks: &Bound<'_, PyAny>,
        pattern: &str,
        special_tokens: BTreeMap<String, Bound<'_, PyAny>>,
    ) -> PyResult<Tokenizer> {
        let rank = |pair: PyResult<Bound<'_, PyAny>>| {
            let (token, id): (Vec<u8>, Bound<'_, PyAny>) = pair?.extract()?;
            Ok((token, new_id(&id)?))
        };
        let ranks = ranks.try_iter()?.map(rank).collect::<PyResult<Vec<_>>>()?;
        let special = |(name, id): (String, Bound<'_, PyAny>)| Ok((name, new_id(&id)?));
        let specials = special_tokens.into_iter().map(special).collect::<PyResult<_>>()?;
        let encoder = py.detach(|| Encoder::new(Pattern::new(pattern)?, Vocab::new(ranks)?, specials))?;
        Ok(Tokenizer { encoder: RwLock::new(Arc::new(encoder)) })
    }

    /// Learns up to vocab_size - 256 merges from an iterable of str; replaces earlier training.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, *, num_threads=None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = num_tokens)] vocab_size: usize,
        #[pyo3(from_py_with = num_strings)] buffer_size: usize,
        pattern: Option<&str>,
        num_threads: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let options = training::Options {
            num_merges: vocab_size - 256,
            num_strings: buffer_size,
            pattern: Pattern::new(pattern.unwrap_or(GPT4_PATTERN))?,
            num_threads: threads(num_threads)?,
        };
        let trained = training::train(py, iterator, options)?;
        *self.encoder.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(trained);
        Ok(())
    }

    /// The split pattern; empty before training.
    fn get_pattern(&self) -> String {
        self.encoder().pattern.source().to_owned()
    }

    /// (bytes, id) of every learned token, in order of ids.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> PyResult<Vec<(Bound<'py, PyBytes>, u32)>> {
        let encoder = self.encoder();
        let pair = |id: &u32| Ok((PyBytes::new(py, encoder.token(*id)?), *id));
        encoder.vocab.ids().iter().map(pair).collect()
    }

    /// Number of learned tokens, the 256 bytes included, special tokens not.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder().vocab.len()
    }

    /// Ids of the special tokens by name.
    #[getter]
    fn special_tokens(&self) -> BTreeMap<String, u32> {
        self.encoder().specials.clone()
    }

    /// Ids of a text in which nothing is special.
    fn encode_ordinary<'py>(&self, text: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        self.encode_text(text, &[])
    }

    /// Ids of a text in which the names in allowed_special become special tokens.
    #[pyo3(signature = (text, allowed_special=HashSet::new()))]
    fn encode<'py>(
        &self,
        text: &Bound<'py, PyAny>,
        allowed_special: HashSet<String>,
    ) -> PyResult<Bound<'py, PyList>> {
        let allowed: Vec<&str> = allowed_special.iter().map(String::as_str).collect();
        self.encode_text(text, &allowed)
    }

    /// (left, right, merged) of every merge, in the order in which they are preferred.
    fn get_merges(&self) -> Vec<(u32, u32, u32)> {
        self.encoder().vocab.merges()
    }

    /// Ids of each text, encoded in parallel.
    #[pyo3(signature = (texts, *, num_threads=None))]
    fn batch_encode<'py>(
        &self,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyList>> {
        let rows = PyList::empty(texts.py());
        for run in Batch::new(texts, num_threads)?.encode::<u32>(&self.encoder(), Options::default())? {
            let mut ids = &run.ids[..];
            for len in run.lens {
                let (row, rest) = ids.split_at(len);
                rows.append(PyList::new(texts.py(), row)?)?;
                ids = rest;
            }
        }
        Ok(rows)
    }

    /// Ids of all texts in one array, and int64 offsets of length len(texts) + 1.
    ///
    /// The ids have the smallest unsigned dtype that fits every id of the tokenizer. The names in
    /// allowed_special become special tokens; the ids prepend and append are put around every text.
    #[pyo3(signature = (texts, prepend=None, append=None, num_threads=None, allowed_special=HashSet::new()))]
    fn encode_batch_arrays<'py>(
        &self,
        texts: &Bound<'py, PyAny>,
        prepend: Option<&Bound<'py, PyAny>>,
        append: Option<&Bound<'py, PyAny>>,
        num_threads: Option<&Bound<'py, PyAny>>,
        allowed_special: HashSet<String>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let (encoder, batch) = (self.encoder(), Batch::new(texts, num_threads)?);
        let allowed: Vec<&str> = allowed_special.iter().map(String::as_str).collect();
        let specials = encoder.specials_named(&allowed)?;
        let known = |id| token_id(id).and_then(|id| Ok(encoder.token(id).map(|_| id)?));
        let (prepend, append) = (prepend.map(known).transpose()?, append.map(known).transpose()?);
        let options = Options { prepend, append, specials: &specials };
        match encoder.max_id() {
            0..=0xff => batch.encode_arrays("uint8", &encoder, options, |id: u8| [id]),
            0x100..=0xffff => batch.encode_arrays("uint16", &encoder, options, u16::to_ne_bytes),
            _ => batch.encode_arrays("uint32", &encoder, options, u32::to_ne_bytes),
        }
    }

    /// Text of the ids; UnicodeDecodeError if the bytes are not UTF-8, unless errors="replace".
    #[pyo3(signature = (ids, errors="strict"))]
    fn decode(&self, ids: &Bound<'_, PyAny>, errors: &str) -> PyResult<String> {
        let (encoder, ids) = (self.encoder(), id_list(ids)?);
        match errors {
            "strict" => Ok(decode(&encoder, &ids)?),
            "replace" => Ok(String::from_utf8_lossy(&decode_bytes(&encoder, &ids)?).into_owned()),
            _ => Err(PyValueError::new_err(format!("errors is {errors:?}; use 'strict' or 'replace'"))),
        }
    }

    /// Bytes of the ids.
    fn decode_bytes<'py>(&self, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(ids.py(), &decode_bytes(&self.encoder(), &id_list(ids)?)?))
    }

    /// Bytes of one token; the name of a special one.
    fn token_bytes<'py>(&self, id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(id.py(), self.encoder().token(token_id(id)?)?))
    }
}

impl Tokenizer {
    fn encoder(&self) -> Arc<Encoder> {
        self.encoder.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn encode_text<'py>(&self, text: &Bound<'py, PyAny>, allowed: &[&str]) -> PyResult<Bound<'py, PyList>> {
        let (py, encoder, text) = (text.py(), self.encoder(), repaired(text)?);
        let specials = encoder.specials_named(allowed)?;
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        let mut encode = || Worker::new(&encoder).encode_with(&encoder.pattern, &specials, &text, &mut ids);
        if text.len() < MIN_BYTES_TO_DETACH {
            encode()?;
        } else {
            py.detach(encode)?;
        }
        PyList::new(py, ids)
    }
}

/// An integer of Python; the `refusal` of one out of `range`, however large, is a ValueError.
fn integer(
    value: &Bound<'_, PyAny>,
    range: RangeInclusive<i64>,
    refusal: impl Fn(String) -> String,
) -> PyResult<i64> {
    match value.extract() {
        Ok(number) if range.contains(&number) => Ok(number),
        Err(error) if !error.is_instance_of::<PyOverflowError>(value.py()) => Err(error),
        _ => Err(PyValueError::new_err(refusal(value.str()?.extract()?))),
    }
}

fn num_tokens(vocab_size: &Bound<'_, PyAny>) -> PyResult<usize> {
    const MAX_TOKENS: i64 = MAX_ID as i64 + 1;
    let refusal =
        |given: String| format!("vocab_size is {given}; give 256, for the single bytes, to {MAX_TOKENS}");
    Ok(integer(vocab_size, 256..=MAX_TOKENS, refusal)? as usize)
}

fn num_strings(buffer_size: &Bound<'_, PyAny>) -> PyResult<usize> {
    let refusal = |given: String| format!("buffer_size is {given}; give a number of strings, 1 or more");
    Ok(integer(buffer_size, 1..=i64::MAX, refusal)? as usize)
}

fn threads(num_threads: Option<&Bound<'_, PyAny>>) -> PyResult<usize> {
    let refusal = |given: String| format!("num_threads is {given}; give at least 1, or None for all cores");
    match num_threads {
        Some(num) => Ok(MAX_THREADS.min(integer(num, 1..=i64::MAX, refusal)? as usize)),
        None => Ok(available_parallelism().map_or(1, usize::from)),
    }
}

/// A lone string is iterable, but surely not what was meant.
fn refuse_str(value: &Bound<'_, PyAny>, name: &str) -> PyResult<()> {
    if value.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err(format!("{name} is one str; give an iterable of str")));
    }
    Ok(())
}

/// The text, with lone surrogates replaced by U+FFFD as tiktoken does.
fn repaired(text: &Bound<'_, PyAny>) -> PyResult<PyBackedStr> {
    let text = text.cast::<PyString>()?;
    match PyBackedStr::try_from(text.clone()) {
        Err(error) if error.is_instance_of::<PyUnicodeEncodeError>(text.py()) => {
            let units = text.call_method1("encode", ("utf-16-le", "surrogatepass"))?;
            units.call_method1("decode", ("utf-16-le", "replace"))?.extract()
        }
        other => other,
    }
}

const IDS: RangeInclusive<i64> = 0..=u32::MAX as i64;

fn token_id(id: &Bound<'_, PyAny>) -> PyResult<u32> {
    Ok(integer(id, IDS, |given: String| format!("no token has id {given}"))? as u32)
}

fn new_id(id: &Bound<'_, PyAny>) -> PyResult<u32> {
    Ok(integer(id, IDS, |given: String| format!("a token cannot have id {given}"))? as u32)
}

fn id_list(ids: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    ids.try_iter()?.map(|id| token_id(&id?)).collect()
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("GPT4_PATTERN", crate::pattern::GPT4_PATTERN)?;
    module.add("NANOCHAT_PATTERN", crate::pattern::NANOCHAT_PATTERN)?;
    module.add_class::<Tokenizer>()
}
