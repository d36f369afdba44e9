//! Split patterns: the built-in ones by hand, any other one by `fancy-regex`.

use fancy_regex::Regex;

use crate::error::Error;
use crate::scanner::Scanner;

macro_rules! pattern_with_digit_groups_of_up_to {
    ($num_digits:literal) => {
        concat!(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,",
            $num_digits,
            r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        )
    };
}

/// Default pattern.
pub const GPT4_PATTERN: &str = pattern_with_digit_groups_of_up_to!(3);

/// The pattern of nanochat.
pub const NANOCHAT_PATTERN: &str = pattern_with_digit_groups_of_up_to!(2);

#[derive(Clone)]
enum Engine {
    Scanner(Scanner),
    Regex(Box<Regex>),
}

/// A compiled split pattern; clone one per thread, a shared regex contends for its scratch memory.
#[derive(Clone)]
pub struct Pattern {
    source: String,
    engine: Engine,
}

impl Pattern {
    /// Compiles `source`; the built-in patterns get the hand-written splitter.
    pub fn new(source: &str) -> Result<Pattern, Error> {
        match source {
            GPT4_PATTERN => Ok(Pattern { source: source.into(), engine: Engine::Scanner(Scanner::new(3)) }),
            NANOCHAT_PATTERN => {
                Ok(Pattern { source: source.into(), engine: Engine::Scanner(Scanner::new(2)) })
            }
            _ => Pattern::with_regex(source),
        }
    }

    /// Compiles `source` for the regex engine even if it is built in: the oracle of the tests.
    pub fn with_regex(source: &str) -> Result<Pattern, Error> {
        let regex = Regex::new(source).map_err(|error| Error::BadPattern(error.to_string()))?;
        Ok(Pattern { source: source.into(), engine: Engine::Regex(Box::new(regex)) })
    }

    /// The pattern as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Calls `piece(start, end)` for every non-empty match, left to right, until it returns false.
    #[inline]
    pub fn split(&self, text: &str, mut piece: impl FnMut(usize, usize) -> bool) -> Result<(), Error> {
        match &self.engine {
            Engine::Scanner(scanner) => {
                let (bytes, mut start) = (text.as_bytes(), 0);
                while start < bytes.len() {
                    let end = scanner.piece_end(bytes, start);
                    if !piece(start, end) {
                        break;
                    }
                    start = end;
                }
            }
            Engine::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|error| Error::Split(error.to_string()))?;
                    if found.start() < found.end() && !piece(found.start(), found.end()) {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Cuts a text into parts of at least `size` bytes that split independently of each other.
    ///
    /// Parts of the built-in patterns end at the first sure border; others get the text in one part.
    pub fn parts<'a>(&self, text: &'a str, size: usize) -> Vec<&'a str> {
        let (mut parts, mut rest) = (Vec::new(), text);
        if let Engine::Scanner(scanner) = &self.engine {
            while let Some(at) = scanner.next_sure_border(rest, size) {
                let (part, remainder) = rest.split_at(at);
                parts.push(part);
                rest = remainder;
            }
        }
        parts.push(rest);
        parts
    }
}
