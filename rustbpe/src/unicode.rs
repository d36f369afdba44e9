//! Character classes of the built-in split patterns, from the very tables the regex engine uses.

use std::sync::OnceLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

/// What the split patterns can tell apart about a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// Neither letter, number nor white space.
    Other,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s` except CR and LF.
    Space,
    /// CR or LF.
    Newline,
    /// The text ends here.
    End,
}

const PAGE: usize = 256;
const NUM_PAGES: usize = 0x11_0000 / PAGE;

/// Class of every code point, in pages of 256 with equal pages stored once.
pub struct Classes {
    page_of: Vec<u16>,
    pages: Vec<[Class; PAGE]>,
}

impl Classes {
    /// The tables, built from `regex-syntax` on first use (well under a millisecond).
    pub fn get() -> &'static Classes {
        static CLASSES: OnceLock<Classes> = OnceLock::new();
        CLASSES.get_or_init(Classes::build)
    }

    /// Class of a code point below 0x110000.
    #[inline]
    pub fn of(&self, code: u32) -> Class {
        let page = self.page_of[code as usize / PAGE] as usize;
        self.pages[page][code as usize % PAGE]
    }

    fn build() -> Classes {
        let mut flat = vec![Class::Other; NUM_PAGES * PAGE];
        for (pattern, class) in [
            (r"\p{L}", Class::Letter),
            (r"\p{N}", Class::Number),
            (r"\s", Class::Space),
            (r"[\r\n]", Class::Newline),
        ] {
            for (first, last) in ranges(pattern) {
                flat[first as usize..=last as usize].fill(class);
            }
        }
        let (mut page_of, mut pages) = (Vec::with_capacity(NUM_PAGES), Vec::<[Class; PAGE]>::new());
        for page in flat.chunks_exact(PAGE) {
            let known = pages.iter().position(|p| p == page).unwrap_or_else(|| {
                let mut copy = [Class::Other; PAGE];
                copy.copy_from_slice(page);
                pages.push(copy);
                pages.len() - 1
            });
            page_of.push(known as u16);
        }
        Classes { page_of, pages }
    }
}

/// Inclusive code point ranges of a one-class pattern.
fn ranges(pattern: &str) -> Vec<(u32, u32)> {
    let hir = regex_syntax::parse(pattern).expect("a constant, valid class");
    match hir.kind() {
        HirKind::Class(HirClass::Unicode(class)) => {
            class.iter().map(|range| (range.start() as u32, range.end() as u32)).collect()
        }
        HirKind::Class(HirClass::Bytes(class)) => {
            class.iter().map(|range| (u32::from(range.start()), u32::from(range.end()))).collect()
        }
        other => panic!("{pattern} parsed to {other:?}, not to a class"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_known_characters() {
        let classes = Classes::get();
        for (c, class) in [
            ('a', Class::Letter),
            ('7', Class::Number),
            ('\u{2167}', Class::Number),
            ('\u{3000}', Class::Space),
            ('\u{85}', Class::Space),
            ('\u{200b}', Class::Other),
            ('\r', Class::Newline),
            ('\u{301}', Class::Other),
            ('\u{10ffff}', Class::Other),
        ] {
            assert_eq!(classes.of(c as u32), class, "{c:?}");
        }
    }
}
