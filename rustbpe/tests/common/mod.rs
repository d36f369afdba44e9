//! Deterministic random texts.

#![allow(dead_code)] // every test file uses a part of this

use std::time::{Duration, Instant};

/// SplitMix64, small and good enough to draw test inputs.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub fn pick<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        items[self.below(items.len())]
    }

    /// Any Unicode scalar value, all planes alike.
    pub fn scalar(&mut self) -> char {
        loop {
            if let Some(c) = char::from_u32(self.below(0x11_0000) as u32) {
                return c;
            }
        }
    }

    /// A text of up to `max_parts` parts that are near the borders of the split patterns.
    pub fn text(&mut self, max_parts: usize) -> String {
        let mut text = String::new();
        for _ in 0..self.below(max_parts) + 1 {
            match self.below(12) {
                0 => text.push(self.scalar()),
                1 => text.push(char::from(self.below(128) as u8)),
                2 => (0..self.below(40)).for_each(|_| text.push(char::from(b'a' + self.below(26) as u8))),
                _ => text.push_str(self.pick(&PARTS)),
            }
        }
        text
    }
}

/// Runs `test` with different seeds: 2,000 times, or as long as `RUSTBPE_FUZZ_SECONDS` says.
pub fn fuzz(mut test: impl FnMut(&mut Random)) {
    let seconds = std::env::var("RUSTBPE_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let (start, limit) = (Instant::now(), Duration::from_secs(seconds.unwrap_or(0)));
    let mut seed = if limit.is_zero() { 0 } else { u64::from(std::process::id()) << 32 };
    let last = seed + 2000;
    while seed < last || start.elapsed() < limit {
        test(&mut Random(seed));
        seed += 1;
    }
    println!("{} random cases", seed + 2000 - last);
}

#[rustfmt::skip]
const PARTS: [&str; 64] = [
    " ", " ", "  ", "    ", "\t", "\n", "\r", "\r\n", "\n\n", "\u{b}", "\u{c}", "\u{85}", "\u{a0}", "\u{1680}", "\u{2003}",
    "\u{2028}", "\u{2029}", "\u{202f}", "\u{205f}", "\u{3000}", "\u{200b}", "\u{feff}", "\u{180e}", "'", "'s", "'S", "'\u{17f}",
    "'ll", "'Ll", "'lL", "'ve", "'VE", "'re", "'t", "'d", "'M", "'l", "'v", "\u{2019}s", "a", "Z", "the", "word", "\u{e9}",
    "\u{df}", "\u{130}", "\u{212a}", "\u{301}", "\u{65e5}\u{672c}", "\u{ac00}", "\u{e01}\u{e33}", "\u{1f600}", "\u{1f468}\u{200d}\u{1f469}",
    "0", "12", "345", "\u{0664}", "\u{bd}", "\u{2167}", "...", "!", "_", "\u{d7ff}", "\u{10ffff}",
];
