//! Encoding and decoding against slow, obvious versions.

mod common;

use std::collections::{BTreeMap, HashMap};

use common::{fuzz, Random};
use rustbpe::batch::{encode_batch, Options};
use rustbpe::decode::{decode, decode_bytes};
use rustbpe::encode::{Encoder, Worker};
use rustbpe::error::Error;
use rustbpe::pattern::{Pattern, NANOCHAT_PATTERN};
use rustbpe::vocab::Vocab;

type Ranks = Vec<(Vec<u8>, u32)>;

/// Random concatenations as tokens in random order: most rank tables are unlike a trained one.
fn random_ranks(random: &mut Random) -> Ranks {
    let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    for _ in 0..random.below(60) {
        let alphabet = b"aab \xc3\xa9";
        let token: Vec<u8> = (0..random.below(20) + 2).map(|_| alphabet[random.below(6)]).collect();
        if !tokens.contains(&token) {
            tokens.push(token);
        }
    }
    for at in (1..tokens.len()).rev() {
        tokens.swap(at, random.below(at + 1));
    }
    let gap = random.below(3) as u32 + 1;
    tokens.into_iter().enumerate().map(|(id, token)| (token, id as u32 * gap)).collect()
}

/// Merges the lowest-ranked concatenation of neighbours, leftmost first, one at a time.
fn slow_merge(ranks: &HashMap<Vec<u8>, u32>, piece: &[u8]) -> Vec<u32> {
    if let Some(id) = ranks.get(piece) {
        return vec![*id];
    }
    let mut parts: Vec<Vec<u8>> = piece.iter().map(|byte| vec![*byte]).collect();
    let rank = |pair: &[Vec<u8>]| ranks.get(&pair.concat()).copied();
    while let Some((_, at)) =
        parts.windows(2).enumerate().filter_map(|(at, pair)| Some((rank(pair)?, at))).min()
    {
        let merged = parts[at..at + 2].concat();
        parts.splice(at..at + 2, [merged]);
    }
    parts.iter().map(|part| ranks[part]).collect()
}

fn encoder(ranks: Ranks, specials: &[(&str, u32)]) -> Encoder {
    let specials = specials.iter().map(|(name, id)| ((*name).into(), *id)).collect();
    Encoder::new(Pattern::new(NANOCHAT_PATTERN).unwrap(), Vocab::new(ranks).unwrap(), specials).unwrap()
}

fn encode(encoder: &Encoder, text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    Worker::new(encoder).encode(&encoder.pattern, text, &mut ids).unwrap();
    ids
}

#[test]
fn ids_equal_the_definition_for_any_ranks() {
    fuzz(|random| {
        let ranks = random_ranks(random);
        let table: HashMap<Vec<u8>, u32> = ranks.iter().cloned().collect();
        let encoder = encoder(ranks, &[]);
        // From a few bytes to several hundred, beyond the limit of the scanning merge.
        let len = 1 << random.below(9);
        let text: String = (0..len).map(|_| *random.pick(&[&'a', &'a', &'b', &'\u{e9}', &' '])).collect();
        let mut expected = Vec::new();
        encoder
            .pattern
            .split(&text, |start, end| {
                expected.extend(slow_merge(&table, &text.as_bytes()[start..end]));
                true
            })
            .unwrap();
        assert_eq!(encode(&encoder, &text), expected, "{text:?}");
        assert_eq!(decode(&encoder, &expected).unwrap(), text);
    });
}

#[test]
fn batches_equal_single_texts_and_each_other() {
    let mut random = Random(7);
    let encoder = encoder(random_ranks(&mut random), &[]);
    let texts: Vec<String> = (0..3000).map(|_| random.text(120)).collect();
    let specials = [("'s", 1001)];
    let options = Options { prepend: Some(1000), append: None, specials: &specials };
    let row = |text: &String| {
        let parts = text.split("'s").map(|part| encode(&encoder, part));
        [vec![1000], parts.collect::<Vec<_>>().join(&1001)].concat()
    };
    for threads in [1, 2, 5] {
        assert!(rows(&encoder, &texts, options, threads) == texts.iter().map(row).collect::<Vec<_>>());
    }
}

/// Ids of every text.
fn rows(encoder: &Encoder, texts: &[String], options: Options, threads: usize) -> Vec<Vec<u32>> {
    let mut rows = Vec::new();
    for run in encode_batch::<_, u16>(encoder, texts, options, threads).unwrap() {
        let mut ids = run.ids.iter().map(|id| u32::from(*id));
        rows.extend(run.lens.iter().map(|len| ids.by_ref().take(*len).collect::<Vec<_>>()));
        assert_eq!(ids.next(), None);
    }
    rows
}

#[test]
fn long_texts_are_cut_for_the_threads_and_come_back_whole() {
    let mut random = Random(8);
    let encoder = encoder(random_ranks(&mut random), &[]);
    // Some of one piece, some without a blank, between short ones.
    let chinese = "\u{4eca}\u{5929}\u{5929}\u{6c14}\u{5f88}\u{597d}\u{3002}";
    let units = [chinese, "a", "word, ", "\n", "! ", "12 \u{e9}\n"];
    let mut texts: Vec<String> = units.iter().map(|unit| unit.repeat(900_000 / unit.len())).collect();
    texts.splice(2..2, ["short".into(), String::new(), "texts".into()]);
    texts.push(random.text(60_000));
    texts.push("end".into());
    for threads in [1, 4] {
        let options = Options { prepend: Some(1000), append: Some(1001), specials: &[] };
        let framed = |text: &String| [vec![1000], encode(&encoder, text), vec![1001]].concat();
        assert!(rows(&encoder, &texts, options, threads) == texts.iter().map(framed).collect::<Vec<_>>());
    }
    let options = Options { specials: &[(". ", 1002)], ..Options::default() };
    let one = vec!["Special tokens are never cut. ".repeat(30_000)];
    let num_special = rows(&encoder, &one, options, 4)[0].iter().filter(|id| **id == 1002).count();
    assert_eq!(num_special, 30_000);
}

#[test]
fn a_long_run_without_a_space_is_not_quadratic() {
    let mut tokens: Ranks = (0..=255u8).map(|byte| (vec![byte], u32::from(byte))).collect();
    (1..8).for_each(|k| tokens.push((vec![b'a'; 1 << k], 255 + k)));
    let encoder = encoder(tokens, &[]);
    let ids = encode(&encoder, &"a".repeat((1 << 20) + 3));
    assert_eq!(ids[..1 << 13], vec![262; 1 << 13]);
    assert_eq!(ids[1 << 13..], [256, 97]);
}

#[test]
fn special_tokens_only_where_allowed() {
    let bytes: Ranks = (0..=255u8).map(|byte| (vec![byte], u32::from(byte))).collect();
    let encoder = encoder(bytes, &[("<a>", 256), ("<a>>", 257)]);
    let encode = |text: &str, allowed: &[&str]| {
        let mut ids = Vec::new();
        let specials = encoder.specials_named(allowed)?;
        Worker::new(&encoder).encode_with(&encoder.pattern, &specials, text, &mut ids).map(|()| ids)
    };
    assert_eq!(encode("x<a>y", &[]).unwrap(), b"x<a>y".map(u32::from));
    assert_eq!(encode("x<a>y<a>", &["<a>"]).unwrap(), [120, 256, 121, 256]);
    assert_eq!(encode("<a>><a>", &["<a>", "<a>>"]).unwrap(), [257, 256]);
    assert_eq!(encode("<a>>", &["<a>"]).unwrap(), [256, 62]);
    assert_eq!(encode("x", &["<b>"]), Err(Error::UnknownSpecial("<b>".into())));
    assert_eq!(decode(&encoder, &[120, 257]).unwrap(), "x<a>>");
}

#[test]
fn bad_tables_and_ids_are_errors() {
    let bytes: Ranks = (0..=255u8).map(|byte| (vec![byte], u32::from(byte))).collect();
    assert_eq!(Vocab::new(bytes[..255].to_vec()).err(), Some(Error::MissingByte(255)));
    for extra in [(b"ab".to_vec(), 255), (b"a".to_vec(), 256), (Vec::new(), 256)] {
        let table = [&bytes[..], std::slice::from_ref(&extra)].concat();
        assert!(matches!(Vocab::new(table), Err(Error::DuplicateToken { .. })), "{extra:?}");
    }
    let pattern = || Pattern::new("").unwrap();
    let taken = BTreeMap::from([("x".to_owned(), 5)]);
    assert!(Encoder::new(pattern(), Vocab::bytes_only(), taken).is_err());
    let encoder = encoder(bytes, &[]);
    assert_eq!(decode_bytes(&encoder, &[256]), Err(Error::UnknownId(256)));
    let invalid = Error::InvalidUtf8 { bytes: b"a\xe9b".to_vec(), start: 1, end: 2 };
    assert_eq!(decode(&encoder, &[97, 0xe9, 98]), Err(invalid));
}
