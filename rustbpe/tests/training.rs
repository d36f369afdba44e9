//! Counting and merging against slow, obvious versions.

mod common;

use std::collections::BTreeMap;

use common::{fuzz, Random};
use rustbpe::count::{count_pieces, Source};
use rustbpe::error::Error;
use rustbpe::pattern::{Pattern, NANOCHAT_PATTERN};
use rustbpe::piece_map::PieceMap;
use rustbpe::train::{learn_merges, Merge, Watch};
use rustbpe::vocab::MAX_ID;

/// Stands for whatever error ends the work.
const STOPPED: Error = Error::UnknownId(7);

/// Lets learning go on for a number of calls.
struct Calls {
    left: usize,
    num_pairs: usize,
}

impl Watch for Calls {
    type Error = Error;
    fn counted(&mut self, num_pairs: usize) -> Result<(), Error> {
        self.num_pairs = num_pairs;
        self.check()
    }
    fn chosen(&mut self, _: usize, _: Merge) -> Result<(), Error> {
        self.check()
    }
    fn check(&mut self) -> Result<(), Error> {
        self.left = self.left.checked_sub(1).ok_or(STOPPED)?;
        Ok(())
    }
}

fn learn(pieces: Vec<PieceMap<u64>>, num_merges: usize) -> Vec<Merge> {
    learn_merges(pieces, num_merges, &mut Calls { left: usize::MAX, num_pairs: 0 }).unwrap()
}

struct Texts<'a> {
    chunks: std::slice::Chunks<'a, String>,
    stop_at_check: bool,
}

impl Source for Texts<'_> {
    type Text = String;
    type Error = Error;
    fn next_chunk(&mut self) -> Result<Option<Vec<String>>, Error> {
        Ok(self.chunks.next().map(|chunk| chunk.to_vec()))
    }
    fn check(&mut self) -> Result<(), Error> {
        if self.stop_at_check {
            Err(STOPPED)
        } else {
            Ok(())
        }
    }
}

fn count(texts: &[String], chunk: usize, threads: usize) -> Vec<PieceMap<u64>> {
    let pattern = Pattern::new(NANOCHAT_PATTERN).unwrap();
    let mut source = Texts { chunks: texts.chunks(chunk), stop_at_check: false };
    count_pieces(&pattern, threads, &mut source).unwrap()
}

fn slow_count(texts: &[String]) -> BTreeMap<Vec<u8>, u64> {
    let (pattern, mut counts) = (Pattern::new(NANOCHAT_PATTERN).unwrap(), BTreeMap::new());
    for text in texts {
        let count = |start, end| {
            *counts.entry(text.as_bytes()[start..end].to_vec()).or_default() += 1;
            true
        };
        pattern.split(text, count).unwrap();
    }
    counts
}

/// Recounts all pairs before every merge.
fn slow_merges(pieces: &BTreeMap<Vec<u8>, u64>, num_merges: usize) -> Vec<Merge> {
    let to_ids = |(piece, count): (&Vec<u8>, &u64)| (piece.iter().map(|b| u32::from(*b)).collect(), *count);
    let mut words: Vec<(Vec<u32>, u64)> = pieces.iter().map(to_ids).collect();
    let mut merges = Vec::new();
    while merges.len() < num_merges {
        let mut pairs = BTreeMap::<(u32, u32), u64>::new();
        for (word, count) in &words {
            word.windows(2).for_each(|pair| *pairs.entry((pair[0], pair[1])).or_default() += count);
        }
        // In order of pairs, so the last maximum of the reversed order is the smallest pair.
        let Some((pair, count)) = pairs.into_iter().rev().max_by_key(|(_, count)| *count) else { break };
        let new = 256 + merges.len() as u32;
        words.iter_mut().for_each(|(word, _)| replace(word, pair, new));
        merges.push(Merge { left: pair.0, right: pair.1, count });
    }
    merges
}

fn replace(word: &mut Vec<u32>, pair: (u32, u32), new: u32) {
    let (mut merged, mut at) = (Vec::new(), 0);
    while at < word.len() {
        let found = at + 1 < word.len() && (word[at], word[at + 1]) == pair;
        merged.push(if found { new } else { word[at] });
        at += if found { 2 } else { 1 };
    }
    *word = merged;
}

/// Texts over a small alphabet, full of ties and runs.
fn tied_texts(random: &mut Random) -> Vec<String> {
    let alphabets = ["ab", "aab ", "abcd  ", "a\u{e9}\u{65e5} ", "ab1!\n "];
    let alphabet: Vec<char> = random.pick(&alphabets).chars().collect();
    let mut text = |_| (0..random.below(60)).map(|_| alphabet[random.below(alphabet.len())]).collect();
    (0..12).map(&mut text).collect()
}

#[test]
fn merges_equal_the_definition() {
    let mut cases = 0;
    fuzz(|random| {
        cases += 1;
        if cases % 8 != 0 && cases < 2000 {
            return; // the slow version is slow
        }
        let texts = tied_texts(random);
        let num_merges = random.below(200) + 1;
        let expected = slow_merges(&slow_count(&texts), num_merges);
        let counts = count(&texts, random.below(12) + 1, random.below(3) + 1);
        assert_eq!(learn(counts, num_merges), expected, "{texts:?}");
    });
}

#[test]
fn rare_pairs_are_found_when_their_turn_comes() {
    // The first threshold is far above one here, so the corpus is searched again several times.
    let mut texts = vec!["the cat ".repeat(2000), "dog dig ".repeat(90)];
    texts.push("unlikely words come last, each of them once or twice".into());
    let expected = slow_merges(&slow_count(&texts), 100);
    assert_eq!(learn(count(&texts, 1, 2), 100), expected);
}

#[test]
fn counts_equal_the_definition() {
    // Enough distinct pieces to empty the threads' own maps many times, some beyond 15 bytes.
    let word = |k: usize| {
        format!(" w{}", "abcdefghijklmnopq"[..k % 17].to_owned() + &"xyz".repeat(k % 4) + &to_word(k))
    };
    let texts: Vec<String> =
        (0..400).map(|at| (0..1000).map(|k| word((at * 617 + k * k) % 90_000)).collect()).collect();
    let expected = slow_count(&texts);
    for threads in [1, 3] {
        let mut counts = BTreeMap::new();
        for map in count(&texts, 7, threads) {
            map.for_each(|piece, count| assert!(counts.insert(piece.to_vec(), count).is_none()));
        }
        assert!(counts == expected);
    }
}

fn to_word(mut number: usize) -> String {
    let mut word = String::new();
    while number > 0 {
        word.push(char::from(b'a' + (number % 26) as u8));
        number /= 26;
    }
    word
}

#[test]
fn one_huge_text_is_shared_and_equal() {
    let text = "Some words, 123 numbers and more words; \u{65e5}\u{672c}\u{8a9e}.\n".repeat(60_000);
    let mut counts = BTreeMap::new();
    for map in count(std::slice::from_ref(&text), 1, 2) {
        map.for_each(|piece, count| assert!(counts.insert(piece.to_vec(), count).is_none()));
    }
    assert!(counts == slow_count(&[text]));
}

#[test]
fn a_caller_can_stop_counting_and_merging() {
    let texts = vec!["word ".repeat(3_000_000); 8];
    let pattern = Pattern::new(NANOCHAT_PATTERN).unwrap();
    let mut source = Texts { chunks: texts.chunks(1), stop_at_check: true };
    assert_eq!(count_pieces(&pattern, 1, &mut source).err(), Some(STOPPED));
    let learn = |left| {
        let counts = count(&["some words here".into()], 1, 1);
        learn_merges(counts, 10, &mut Calls { left, num_pairs: 0 })
    };
    let enough = (0..).find(|left| learn(*left).is_ok()).unwrap();
    assert!((0..enough).all(|left| learn(left) == Err(STOPPED)));
}

#[test]
fn learning_is_watched_in_all_long_loops() {
    // Ten million slots and a first merge at a million places; most other pairs are never followed.
    let mut counts = PieceMap::with_capacity(0);
    for number in 0..1_000_000u32 {
        *counts.entry(format!("aa{number:08}").as_bytes(), 0, 10) = 1;
    }
    let mut watch = Calls { left: 1 << 32, num_pairs: 0 };
    learn_merges(vec![counts], 1, &mut watch).unwrap();
    let num_calls = (1 << 32) - watch.left;
    assert!((35..60).contains(&num_calls), "{num_calls} calls");
    assert_eq!(watch.num_pairs, 102); // aa, a0, and any two digits
}

#[test]
fn more_merges_than_ids_are_refused_at_once() {
    let mut watch = Calls { left: 0, num_pairs: 0 };
    let last = u64::from(MAX_ID) + 1;
    assert_eq!(learn_merges(vec![], last as usize - 255, &mut watch), Err(Error::IdTooLarge(last)));
}

#[test]
fn texts_of_one_word_are_counted_together() {
    // With eight threads, each of which would otherwise hold a copy of all words.
    let texts: Vec<String> = (0..400_000).map(|k| to_word(k * 7919 % 150_000 + 1)).collect();
    let expected = slow_count(&texts);
    let mut counts = BTreeMap::new();
    for map in count(&texts, 500, 8) {
        map.for_each(|piece, count| assert!(counts.insert(piece.to_vec(), count).is_none()));
    }
    assert!(counts == expected);
}

/// A text that only the thread that made it can read.
struct Private(std::thread::ThreadId);

impl AsRef<str> for Private {
    fn as_ref(&self) -> &str {
        assert_eq!(self.0, std::thread::current().id(), "a panic on purpose");
        "text"
    }
}

struct PrivateTexts(usize);

impl Source for PrivateTexts {
    type Text = Private;
    type Error = Error;
    fn next_chunk(&mut self) -> Result<Option<Vec<Private>>, Error> {
        self.0 = self.0.wrapping_sub(1);
        Ok((self.0 < usize::MAX).then(|| vec![Private(std::thread::current().id())]))
    }
    fn check(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

#[test]
fn a_panic_of_a_worker_is_an_error() {
    let pattern = Pattern::new(NANOCHAT_PATTERN).unwrap();
    for (num_chunks, threads) in [(1, 1), (100, 1), (100, 3)] {
        let counted = count_pieces(&pattern, threads, &mut PrivateTexts(num_chunks));
        assert_eq!(counted.err(), Some(Error::WorkerFailed));
    }
}

#[test]
fn counts_beyond_32_bits() {
    let mut counts = PieceMap::with_capacity(0);
    *counts.entry(b"ab", 0, 2) = 5_000_000_000;
    *counts.entry(b"bc", 0, 2) = 4_999_999_999;
    let merges = learn(vec![counts], 2);
    assert_eq!(merges[0], Merge { left: 97, right: 98, count: 5_000_000_000 });
    assert_eq!(merges[1].count, 4_999_999_999);
}
