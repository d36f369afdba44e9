//! The hand-written splitter against the regular-expression engine.

mod common;

use common::fuzz;
use rustbpe::pattern::{Pattern, GPT4_PATTERN, NANOCHAT_PATTERN};

fn ends(pattern: &Pattern, text: &str) -> Vec<usize> {
    let (mut ends, mut last) = (Vec::new(), 0);
    pattern
        .split(text, |start, end| {
            assert_eq!(start, last, "a gap in {text:?}");
            last = end;
            ends.push(end);
            true
        })
        .unwrap();
    assert_eq!(last, text.len(), "the end of {text:?} is missing");
    ends
}

fn assert_same(by_hand: &Pattern, by_regex: &Pattern, text: &str) {
    let (hand, regex) = (ends(by_hand, text), ends(by_regex, text));
    if let Some(at) = (0..hand.len().max(regex.len())).find(|at| hand.get(*at) != regex.get(*at)) {
        let start = if at == 0 { 0 } else { hand[at - 1] };
        panic!(
            "from byte {start}: {:?}, {:?} against {:?}",
            text.get(start..start + 40),
            hand[at],
            regex[at]
        );
    }
}

fn both(source: &str) -> (Pattern, Pattern) {
    (Pattern::new(source).unwrap(), Pattern::with_regex(source).unwrap())
}

#[test]
fn random_texts_split_as_the_regex_says() {
    let pairs = [both(GPT4_PATTERN), both(NANOCHAT_PATTERN)];
    fuzz(|random| {
        let text = random.text(60);
        for (by_hand, by_regex) in &pairs {
            assert_same(by_hand, by_regex, &text);
        }
    });
}

#[test]
fn every_scalar_value_in_every_position_of_a_piece() {
    let (by_hand, by_regex) = both(NANOCHAT_PATTERN);
    let scalars: Vec<char> = (0..0x11_0000).filter_map(char::from_u32).collect();
    let check = |scalars: &[char]| {
        for block in scalars.chunks(1 << 12) {
            // Alone, leading, inside, trailing; after a blank, quote, letter and line break.
            let text: String = block.iter().map(|c| format!("{c} {c}a{c}a{c}'{c}\n")).collect();
            assert_same(&by_hand, &by_regex, &text);
        }
    };
    let (first, second) = scalars.split_at(scalars.len() / 8);
    std::thread::scope(|scope| {
        scope.spawn(|| check(second));
        check(first);
    });
}

#[test]
fn long_runs_are_linear() {
    let (by_hand, by_regex) = both(NANOCHAT_PATTERN);
    for unit in ["a", "\u{e9}", "7", " ", "\n", "!", "\u{3000}", "'", " \n"] {
        assert_same(&by_hand, &by_regex, &unit.repeat(20_000));
        assert_same(&by_hand, &by_regex, &format!("{}x", unit.repeat(20_000)));
        ends(&by_hand, &unit.repeat(3_000_000));
    }
}

#[test]
fn parts_split_like_the_whole() {
    let pattern = Pattern::new(NANOCHAT_PATTERN).unwrap();
    fuzz(|random| {
        let (text, size) = (random.text(100), random.below(20) + 1);
        let (mut joined, mut start) = (Vec::new(), 0);
        for part in pattern.parts(&text, size) {
            joined.extend(ends(&pattern, part).iter().map(|end| start + end));
            start += part.len();
        }
        assert_eq!(joined, ends(&pattern, &text), "{text:?} in parts of {size}");
    });
}

#[test]
fn other_patterns_drop_what_they_do_not_match() {
    let pattern = Pattern::new("[a-z]+|x*").unwrap();
    let mut pieces = Vec::new();
    let text = "ab, cd!";
    pattern
        .split(text, |start, end| {
            pieces.push(&text[start..end]);
            true
        })
        .unwrap();
    assert_eq!(pieces, ["ab", "cd"]);
    assert!(Pattern::new("(").is_err());
}
