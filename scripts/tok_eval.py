"""Compare the compression of our tokenizer with those of GPT-2 and GPT-4.

python -m scripts.tok_eval
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError, get_base_dir
from nanochat.configurator import run
from scripts.tok_samples import SAMPLES

if TYPE_CHECKING:
    from nanochat.tokenizer import RustBPETokenizer

BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # tiktoken's names
BASELINE_TIMEOUT_S = 10.0  # each is a download of 2 MB on first use
_GREEN, _RED, _RESET = "\x1b[92m", "\x1b[91m", "\x1b[0m"


@dataclass(frozen=True)
class Config:
    """There is nothing to set."""


@dataclass(frozen=True)
class Size:
    """One text under one tokenizer."""

    num_bytes: int
    num_tokens: int

    @property
    def ratio(self) -> float:
        """Bytes per token: higher is better."""
        return self.num_bytes / self.num_tokens


Sizes = dict[str, Size]  # by text


def main(cfg: Config) -> None:
    """Compare the compression of our tokenizer with those of GPT-2 and GPT-4."""
    from nanochat.report import get_report
    from nanochat.tokenizer import get_tokenizer

    baselines, reasons = load_baselines()
    tokenizers = {"ours": get_tokenizer(), **baselines}
    texts = {**SAMPLES, **data_texts()}
    print("vocabulary: " + "   ".join(f"{name} {t.get_vocab_size():,}" for name, t in tokenizers.items()))
    sizes = {name: measure(tokenizer, texts) for name, tokenizer in tokenizers.items()}
    ours = sizes.pop("ours")

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(own_table(ours))
    for name, theirs in sizes.items():
        print(comparison_table(name, theirs, ours, colour))
    folder = get_base_dir() / "report" / "report_files"
    plot({"ours": ours, **sizes}, folder / "tokenizer.png")
    sections = [comparison_markdown(name, theirs, ours) for name, theirs in sizes.items()]
    if reasons:
        print(missing_note(reasons))
        sections.append(f"{missing_note(reasons)}\n\n")
    picture = "![Bytes per token by kind of text](report_files/tokenizer.png)\n\n"
    get_report().log(
        section="Tokenizer evaluation", data=[*sections, *([] if sizes else [own_markdown(ours)]), picture]
    )


def load_baselines() -> tuple[dict[str, RustBPETokenizer], dict[str, str]]:
    """The tokenizers of GPT-2 and GPT-4, as far as tiktoken has or gets them in time, and why others are not here."""
    from nanochat.tokenizer import RustBPETokenizer

    found: dict[str, RustBPETokenizer] = {}
    reasons: dict[str, str] = {}

    def load(name: str) -> None:
        try:
            found[name] = RustBPETokenizer.from_pretrained(BASELINES[name])
        except Exception as error:  # whatever the network, a proxy or the cache folder comes up with
            reasons[name] = type(error).__name__

    for name in BASELINES:
        # tiktoken downloads without a timeout, so it does that in a thread that may be left behind.
        thread = threading.Thread(target=load, args=(name,), daemon=True)
        thread.start()
        thread.join(BASELINE_TIMEOUT_S)
    loaded = {name: found[name] for name in BASELINES if name in found}
    return loaded, {name: reasons.get(name, "too slow") for name in BASELINES if name not in loaded}


def missing_note(reasons: Mapping[str, str]) -> str:
    """Which baselines could not be had, and why."""
    missing = " and ".join(f"{name} ({reason})" for name, reason in reasons.items())
    return f"no comparison with {missing}: tiktoken could not get the vocabulary"


def data_texts() -> dict[str, str]:
    """The first row group of the training and of the validation split; nothing, with a line, without data."""
    from nanochat.dataset import parquets_iter_batched

    texts = {}
    try:
        name = data_name()
        for split in ("train", "val"):
            texts[f"{name}-{split}"] = "\n".join(next(parquets_iter_batched(split), []))
    except UserError as error:
        print(f"no data rows: {error}")
    return {name: text for name, text in texts.items() if text}


def data_name() -> str:
    """What the rows of the pretraining data are called in the tables."""
    from nanochat.dataset import data_folders, data_sets_in_use
    from nanochat.manifests import FINEWEB_EDU

    if data_folders() == [FINEWEB_EDU.path]:
        return "fwe"
    return "+".join(named.name for named in data_sets_in_use())


def measure(tokenizer: RustBPETokenizer, texts: Mapping[str, str]) -> Sizes:
    """Encode every text; it must come back unchanged."""
    sizes = {}
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, f"the text {name} does not survive encoding and decoding"
        sizes[name] = Size(len(text.encode()), len(ids))
    return sizes


def relative_difference(theirs: Size, ours: Size) -> float:
    """By how many percent of their tokens ours are fewer."""
    return (theirs.num_tokens - ours.num_tokens) / theirs.num_tokens * 100


# --- the terminal --------------------------------------------------------------------------------------


def own_table(ours: Sizes) -> str:
    """Our tokenizer alone: bytes, tokens and bytes per token."""
    lines = ["", f"{'text type':<16} {'bytes':>10} {'tokens':>10} {'ratio':>7}"]
    lines += [f"{n:<16} {s.num_bytes:>10,} {s.num_tokens:>10,} {s.ratio:>7.2f}" for n, s in ours.items()]
    return "\n".join(lines)


def comparison_table(name: str, theirs: Sizes, ours: Sizes, colour: bool) -> str:
    """One line per text: both sizes, the relative difference and which of the two is better."""
    head = f"{'text type':<16} {'bytes':>10} {name:>10} {'ratio':>7} {'ours':>10} {'ratio':>7} {'diff %':>8}"
    lines = ["", f"Comparison with {name}", head]
    for text, our in ours.items():
        difference = relative_difference(theirs[text], our)
        better = "tie" if difference == 0 else "ours" if difference > 0 else name
        their_cell, our_cell = (f"{s.num_tokens:>10,} {s.ratio:>7.2f}" for s in (theirs[text], our))
        if colour and better != "tie":
            their_paint, our_paint = (_RED, _GREEN) if better == "ours" else (_GREEN, _RED)
            their_cell, our_cell = f"{their_paint}{their_cell}{_RESET}", f"{our_paint}{our_cell}{_RESET}"
        lines.append(f"{text:<16} {our.num_bytes:>10,} {their_cell} {our_cell} {difference:>+8.1f} {better}")
    return "\n".join(lines)


# --- the report ----------------------------------------------------------------------------------------


def own_markdown(ours: Sizes) -> str:
    """Our tokenizer alone as a Markdown table, for reports made offline."""
    lines = ["### Compression", "", "| Text Type | Bytes | Tokens | Ratio |", "|---|---|---|---|"]
    lines += [f"| {n} | {s.num_bytes:,} | {s.num_tokens:,} | {s.ratio:.2f} |" for n, s in ours.items()]
    return "\n".join(lines) + "\n\n"


def comparison_markdown(name: str, theirs: Sizes, ours: Sizes) -> str:
    """A heading and a Markdown table for one baseline."""
    columns = ["Text Type", "Bytes", f"{name} Tokens", f"{name} Ratio"]
    columns += ["Ours Tokens", "Ours Ratio", "Relative Diff %"]
    lines = [f"### Comparison with {name}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for text, our in ours.items():
        their = theirs[text]
        lines.append(
            f"| {text} | {our.num_bytes:,} | {their.num_tokens:,} | {their.ratio:.2f} "
            f"| {our.num_tokens:,} | {our.ratio:.2f} | {relative_difference(their, our):+.1f}% |"
        )
    return "\n".join(lines) + "\n\n"


def plot(sizes: Mapping[str, Sizes], path: Path) -> None:
    """Bars of bytes per token: a group for each text, a bar for each tokenizer."""
    from nanochat.plots import compression_figure, save

    ratios = {name: {text: size.ratio for text, size in by_text.items()} for name, by_text in sizes.items()}
    save(compression_figure(ratios), path)
    print(f"plot: {path}")


if __name__ == "__main__":
    run(Config, main)
