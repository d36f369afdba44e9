//! Hand-written splitter for the two built-in patterns.
//!
//! The patterns differ only in how many digits form a group:
//!
//! ```text
//! '(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,K}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+
//! ```
//!
//! Every character is a letter, a number, white space or something else, so the class of the first
//! character (and of the one after it) decides which alternative matches, without backtracking.

use crate::unicode::{Class, Classes};

/// Splits text as one of the built-in patterns does.
#[derive(Clone, Copy)]
pub struct Scanner {
    classes: &'static Classes,
    ascii: [Class; 128],
    max_digits: usize,
}

impl Scanner {
    /// A splitter with digit groups of at most `max_digits`.
    pub fn new(max_digits: usize) -> Scanner {
        let classes = Classes::get();
        let ascii = std::array::from_fn(|byte| classes.of(byte as u32));
        Scanner { classes, ascii, max_digits }
    }

    /// End of the piece that starts at `start`; `text` is UTF-8, `start` a boundary before its end.
    #[inline]
    pub fn piece_end(&self, text: &[u8], start: usize) -> usize {
        ascii_word_end(text, start).unwrap_or_else(|| self.any_piece_end(text, start))
    }

    /// First sure border after the character at byte `from` or later.
    pub fn next_sure_border(&self, text: &str, from: usize) -> Option<usize> {
        let bytes = text.as_bytes();
        let mut at = (from..bytes.len()).find(|at| text.is_char_boundary(*at))?;
        let (mut before, mut width) = self.class_at(bytes, at);
        while at + width < bytes.len() {
            at += width;
            let (after, next_width) = self.class_at(bytes, at);
            if is_sure_border(before, after) {
                return Some(at);
            }
            (before, width) = (after, next_width);
        }
        None
    }

    fn any_piece_end(&self, text: &[u8], start: usize) -> usize {
        let (class, width) = self.class_at(text, start);
        let next = start + width;
        match class {
            Class::Letter => self.letters(text, next),
            Class::Number => self.digits(text, next),
            Class::Newline | Class::End => self.blanks(text, start),
            Class::Space | Class::Other => self.prefixed(text, start, next, class),
        }
    }

    /// A piece whose first character may lead a word: blanks and symbols.
    #[inline]
    fn prefixed(&self, text: &[u8], start: usize, next: usize, class: Class) -> usize {
        if text[start] == b'\'' {
            if let Some(end) = contraction(text, next) {
                return end;
            }
        }
        let (following, width) = self.class_at(text, next);
        match (class, following) {
            (_, Class::Letter) => self.letters(text, next + width),
            (Class::Other, _) => self.symbols(text, next),
            (_, Class::Other) if text[start] == b' ' => self.symbols(text, next + width),
            _ => self.blanks(text, start),
        }
    }

    #[inline]
    fn letters(&self, text: &[u8], mut at: usize) -> usize {
        loop {
            at += ascii_letters(text, at);
            match text.get(at) {
                Some(byte) if *byte >= 0x80 => match self.class_at(text, at) {
                    (Class::Letter, width) => at += width,
                    _ => return at,
                },
                _ => return at,
            }
        }
    }

    #[inline]
    fn digits(&self, text: &[u8], mut at: usize) -> usize {
        for _ in 1..self.max_digits {
            match self.class_at(text, at) {
                (Class::Number, width) => at += width,
                _ => break,
            }
        }
        at
    }

    fn symbols(&self, text: &[u8], mut at: usize) -> usize {
        while let (Class::Other, width) = self.class_at(text, at) {
            at += width;
        }
        while matches!(text.get(at), Some(b'\r' | b'\n')) {
            at += 1;
        }
        at
    }

    /// A run of white space: up to its last line break, else all but the blank before a word.
    fn blanks(&self, text: &[u8], start: usize) -> usize {
        let (mut at, mut last, mut newline_end) = (start, start, None);
        loop {
            let (class, width) = self.class_at(text, at);
            match class {
                Class::Newline => newline_end = Some(at + width),
                Class::Space => {}
                _ => break,
            }
            last = at;
            at += width;
        }
        match newline_end {
            Some(end) => end,
            None if at < text.len() && last > start => last,
            None => at,
        }
    }

    /// Class and UTF-8 width of the character at `at`; `(End, 0)` at the end of the text.
    #[inline]
    fn class_at(&self, text: &[u8], at: usize) -> (Class, usize) {
        match text.get(at) {
            None => (Class::End, 0),
            Some(byte) if *byte < 0x80 => (self.ascii[*byte as usize], 1),
            Some(byte) => {
                let (code, width) = decode(text, at, *byte);
                (self.classes.of(code), width)
            }
        }
    }
}

/// Whether two neighbours of these classes are in different pieces of every text, and the text up to
/// the first of them splits in the same way if it ends there.
///
/// Nothing looks back, so the second text always splits alike. For the first one, let `p` be the place
/// between them. A piece that ends before `p` has looked at no more than a run of its own class, the
/// character after it and, after a quote, two letters; what it may see of the second character must
/// decide as the end of the text does:
///
/// - After a letter or number: it is the last of `\p{L}+`, `\p{N}{1,K}` or a contraction, none of which
///   goes on with another class, nor with the end. No look-ahead reaches over a letter or number.
/// - After CR or LF, before no white space: it is the last of ` ?[^\s\p{L}\p{N}]++[\r\n]*`, or the run of
///   white space that it ends is one piece by `\s*[\r\n]`, which goes back to the last line break of the
///   run: here. `\s+(?!\S)` is not asked.
/// - After anything else but white space, before a number or blank that is no line break: it is the last
///   of ` ?[^\s\p{L}\p{N}]++[\r\n]*`. It leads no word and no contraction, because no letter follows.
///
/// After a blank there is none: how `\s+(?!\S)` cuts a run depends on what follows it.
fn is_sure_border(before: Class, after: Class) -> bool {
    match before {
        Class::Letter | Class::Number => before != after,
        Class::Newline => !matches!(after, Class::Space | Class::Newline),
        Class::Other => matches!(after, Class::Number | Class::Space),
        Class::Space | Class::End => false,
    }
}

/// End of a contraction suffix (`s`, `d`, `m`, `t`, `ll`, `ve`, `re` in any case) at `at`.
fn contraction(text: &[u8], at: usize) -> Option<usize> {
    let first = *text.get(at)?;
    match first.to_ascii_lowercase() {
        b's' | b'd' | b'm' | b't' => Some(at + 1),
        // U+017F, the long s, is the one other character that folds to an ASCII letter used here.
        0xc5 if text.get(at + 1) == Some(&0xbf) => Some(at + 2),
        first => {
            let second = text.get(at + 1)?.to_ascii_lowercase();
            matches!([first, second], [b'l', b'l'] | [b'v', b'e'] | [b'r', b'e']).then_some(at + 2)
        }
    }
}

const ONES: u128 = u128::from_ne_bytes([0x01; 16]);
const HIGH: u128 = u128::from_ne_bytes([0x80; 16]);

/// The high bit of every byte that is not an ASCII letter, sixteen bytes at once.
#[inline]
fn non_letters(chunk: &[u8; 16]) -> u128 {
    let word = u128::from_le_bytes(*chunk);
    // Each byte is below 0x80 after masking, so the additions cannot carry into the next one.
    let lower = (word | (ONES * 0x20)) & !HIGH;
    let from_a = lower + ONES * u128::from(0x80 - b'a');
    let beyond_z = lower + ONES * u128::from(0x7f - b'z');
    !(from_a & !beyond_z & !word) & HIGH
}

/// How an ASCII byte can start a word: 2 as its first letter, 1 in front of it, 0 not at all.
const WORD_START: [u8; 256] = {
    let (mut table, mut byte) = ([0; 256], 0u8);
    while byte < 0x80 {
        table[byte as usize] = match byte {
            b'a'..=b'z' | b'A'..=b'Z' => 2,
            b'0'..=b'9' | b'\r' | b'\n' | b'\'' => 0,
            _ => 1,
        };
        byte += 1;
    }
    table
};

/// End of the piece at `start` if it is a short ASCII word, by far the most frequent case.
#[inline]
fn ascii_word_end(text: &[u8], start: usize) -> Option<usize> {
    let chunk = text[start..].first_chunk::<16>()?;
    let num_letters = (non_letters(chunk) >> 8).trailing_zeros() as usize / 8; // after the first byte
    let end = start + 1 + num_letters;
    let is_word = WORD_START[chunk[0] as usize] + u8::from(num_letters > 0) >= 2;
    // Up to the end of the chunk the word might go on, and after it a letter that is not ASCII.
    (is_word && num_letters < 15 && text[end] < 0x80).then_some(end)
}

/// Number of ASCII letters from `at` on.
#[inline]
fn ascii_letters(text: &[u8], at: usize) -> usize {
    let mut count = 0;
    while let Some(chunk) = text[at + count..].first_chunk::<16>() {
        let others = non_letters(chunk);
        if others != 0 {
            return count + others.trailing_zeros() as usize / 8;
        }
        count += 16;
    }
    count + text[at + count..].iter().take_while(|byte| byte.is_ascii_alphabetic()).count()
}

/// Code point and width of the multi-byte character at `at`.
#[inline]
fn decode(text: &[u8], at: usize, first: u8) -> (u32, usize) {
    let tail = |k: usize| u32::from(text[at + k] & 0x3f);
    match first {
        0..=0xdf => (u32::from(first & 0x1f) << 6 | tail(1), 2),
        0xe0..=0xef => (u32::from(first & 0x0f) << 12 | tail(1) << 6 | tail(2), 3),
        _ => (u32::from(first & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
    }
}
