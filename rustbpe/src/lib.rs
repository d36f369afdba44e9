//! Exact byte-pair encoding: learn the merges of a corpus, then encode and decode with them.
//!
//! The algorithm lives in plain Rust modules that know nothing of Python; `python` wraps them.
//! Text is cut into pieces ([`pattern`]), distinct pieces are counted on all cores ([`count`]),
//! merges are learned from the counts ([`train`]), and [`encode`] applies them to new text.

#![deny(missing_docs)]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used))]

pub mod batch;
pub mod count;
pub mod decode;
pub mod encode;
pub mod error;
pub mod memory;
pub mod merge;
pub mod pattern;
pub mod piece_map;
mod python;
mod queue;
pub mod scanner;
pub mod slots;
pub mod train;
pub mod unicode;
pub mod vocab;
