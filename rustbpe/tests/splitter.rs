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
    let pairs = [both(GPT4_PATTERN), both(NANOCHAT_PATTERN)];
    let scalars: Vec<char> = (0..0x11_0000).filter_map(char::from_u32).collect();
    let check = |scalars: &[char]| {
        for block in scalars.chunks(1 << 12) {
            // Alone, leading, inside, trailing; after a blank, quote, letter and line break.
            let text: String = block.iter().map(|c| format!("{c} {c}a{c}a{c}'{c}\n")).collect();
            for (by_hand, by_regex) in &pairs {
                assert_same(by_hand, by_regex, &text);
            }
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
    let pairs = [both(GPT4_PATTERN), both(NANOCHAT_PATTERN)];
    fuzz(|random| {
        let (text, size) = (random.text(100), random.below(20));
        for (by_hand, by_regex) in &pairs {
            assert_parts(by_hand, by_regex, &text, size);
        }
    });
}

/// The regex engine splits the parts as it splits the whole.
fn assert_parts(by_hand: &Pattern, by_regex: &Pattern, text: &str, size: usize) {
    let (mut joined, mut start) = (Vec::new(), 0);
    for part in by_hand.parts(text, size) {
        joined.extend(ends(by_regex, part).iter().map(|end| start + end));
        start += part.len();
    }
    assert_eq!(joined, ends(by_regex, text), "{text:?} in parts of {size}");
}

#[test]
fn parts_of_every_short_text_split_like_the_whole() {
    // What the patterns can tell apart: classes, blank and other white space, quote, suffixes.
    let alphabet = ['x', 's', 'l', '7', ' ', '\u{3000}', '\n', '\r', '\'', '!'];
    let pairs = [both(GPT4_PATTERN), both(NANOCHAT_PATTERN)];
    let mut text = String::new();
    for number in 0..alphabet.len().pow(5) {
        text.clear();
        let digit = |power: u32| alphabet[number / alphabet.len().pow(power) % alphabet.len()];
        text.extend((0..5).map(digit));
        for (by_hand, by_regex) in &pairs {
            assert_parts(by_hand, by_regex, &text, 0);
        }
    }
}

#[test]
fn text_of_any_script_and_any_lines_have_parts() {
    let pattern = Pattern::new(NANOCHAT_PATTERN).unwrap();
    let chinese = "\u{4eca}\u{5929}\u{6c14}\u{3002}";
    for unit in ["some words ", chinese, "\u{e01}\u{e33}\u{e31}", "!!!!\n", "12\n34", "! ", "\u{1f600}\n"] {
        let text = unit.repeat(1000);
        let longest = pattern.parts(&text, 100).iter().map(|part| part.len()).max().unwrap();
        assert!(longest < 130, "{unit:?} in parts of {longest}");
    }
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
