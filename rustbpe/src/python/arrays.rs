//! Many texts to numpy arrays, without a Python integer in between.

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyByteArray;

use crate::batch::{encode_batch, Id, Options, Run};
use crate::encode::Encoder;

/// Texts to be encoded together, with the GIL released.
pub struct Batch<'py> {
    py: Python<'py>,
    texts: Vec<PyBackedStr>,
    num_threads: usize,
}

impl<'py> Batch<'py> {
    /// Takes the texts of an iterable of str.
    pub fn new(texts: &Bound<'py, PyAny>, num_threads: Option<&Bound<'py, PyAny>>) -> PyResult<Batch<'py>> {
        let (py, num_threads) = (texts.py(), super::threads(num_threads)?);
        super::refuse_str(texts, "texts")?;
        let texts = texts.try_iter()?.map(|text| super::repaired(&text?)).collect::<PyResult<Vec<_>>>()?;
        Ok(Batch { py, texts, num_threads })
    }

    /// Ids of all texts, in runs.
    pub fn encode<I: Id>(&self, encoder: &Encoder, options: Options) -> PyResult<Vec<Run<I>>> {
        let (texts, num_threads) = (&self.texts, self.num_threads);
        Ok(self.py.detach(|| encode_batch(encoder, texts, options, num_threads))?)
    }

    /// Arrays of the ids, of this dtype, and of the int64 offsets.
    pub fn encode_arrays<I: Id, const N: usize>(
        &self,
        dtype: &str,
        encoder: &Encoder,
        options: Options,
        bytes_of: impl Fn(I) -> [u8; N] + Sync,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let runs = self.encode(encoder, options)?;
        let (mut offsets, mut sum) = (Vec::with_capacity(self.texts.len() + 1), 0i64);
        offsets.push(sum);
        for len in runs.iter().flat_map(|run| &run.lens) {
            sum += *len as i64;
            offsets.push(sum);
        }
        let ids: Vec<&[I]> = runs.iter().map(|run| &run.ids[..]).collect();
        Ok((array(self.py, dtype, &ids, bytes_of)?, array(self.py, "int64", &[&offsets], i64::to_ne_bytes)?))
    }
}

/// A writable one-dimensional numpy array of all values of the slices.
fn array<'py, T: Copy + Sync, const N: usize>(
    py: Python<'py>,
    dtype: &str,
    slices: &[&[T]],
    bytes_of: impl Fn(T) -> [u8; N] + Sync,
) -> PyResult<Bound<'py, PyAny>> {
    let num: usize = slices.iter().map(|slice| slice.len()).sum();
    let buffer = PyByteArray::new_with(py, num * N, |buffer| {
        py.detach(|| {
            let mut rest = buffer;
            for slice in slices {
                let (target, after) = rest.split_at_mut(slice.len() * N);
                for (target, value) in target.chunks_exact_mut(N).zip(*slice) {
                    target.copy_from_slice(&bytes_of(*value));
                }
                rest = after;
            }
        });
        Ok(())
    })?;
    py.import("numpy")?.call_method1("frombuffer", (buffer, dtype))
}
