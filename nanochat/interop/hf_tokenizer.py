"""Our vocabulary as the files of a Hugging Face tokenizer, and back.

Written: tokenizer.json (byte-level BPE), tokenizer_config.json, special_tokens_map.json, chat_template.jinja.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat.common import UserError, read_json, whole_file, write_json
from nanochat.interop.samples import PROBES
from nanochat.tokenizer import RustBPETokenizer, Vocabulary
from nanochat.tokenizer_base import SPECIAL_TOKENS
from nanochat.tokenizer_hf import HuggingFaceTokenizer, byte_level_alphabet

BOS, END_OF_ANSWER = "<|bos|>", "<|assistant_end|>"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


# --- out ---------------------------------------------------------------------------------------------


def write_tokenizer(tokenizer: RustBPETokenizer, directory: Path, context: int) -> None:
    """Write the tokenizer files of a folder. Raises UserError if a vocabulary cannot be expressed exactly."""
    vocabulary = tokenizer.vocabulary
    if missing := set(SPECIAL_TOKENS) - set(vocabulary.special_tokens):
        raise UserError(f"the tokenizer lacks the special tokens {sorted(missing)}, which chats are made of")
    with whole_file(directory / "tokenizer.json", "w") as file:
        json.dump(tokenizer_json(vocabulary), file, ensure_ascii=False, indent=1)
    names = {
        "bos_token": BOS,
        "eos_token": END_OF_ANSWER,
        # not the end of an answer: collators hide padding from the loss, and a finetuned model would never stop
        "pad_token": BOS,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", **names, "add_bos_token": False, "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "special_tokens_map.json", names)
    with whole_file(directory / "chat_template.jinja", "w") as file:
        file.write(chat_template())


def chat_template() -> str:
    """The template of chat_template.jinja, with which transformers and vLLM render conversations."""
    return TEMPLATE.read_text(encoding="utf-8")


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of tokenizer.json: ids, merges in the order of their ranks, split pattern, special tokens."""
    char_of = byte_level_alphabet()

    def name(token: bytes) -> str:
        return "".join(char_of[byte] for byte in token)

    added = [
        {
            "id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for text, token in sorted(vocabulary.special_tokens.items(), key=lambda item: item[1])
    ]  # fmt: skip
    split = {
        "type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, as in our encoder
            "vocab": {name(token): rank for token, rank in vocabulary.ranks.items()},
            "merges": [[name(left), name(right)] for left, right in merges(vocabulary.ranks)],
        },
    }  # fmt: skip


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, by the rank of what it makes.

    Not only the pair that training merged: our encoder joins any two neighbours whose bytes are a token.
    """
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


# --- in ----------------------------------------------------------------------------------------------


def read_tokenizer(directory: Path) -> RustBPETokenizer:
    """Our tokenizer from the tokenizer.json of a folder.

    Raises UserError if it is not a byte-level BPE with a split pattern, or encodes the probe texts differently.
    """
    path = directory / "tokenizer.json"
    content = read_json(path)
    try:
        vocabulary = _vocabulary(content)
        tokenizer = RustBPETokenizer(vocabulary)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a tokenizer that nanochat can express: {error!r}") from None
    differing = first_difference(tokenizer, HuggingFaceTokenizer.from_directory(directory), PROBES)
    if differing is not None:
        raise UserError(f"{path} encodes {differing!r} differently from what nanochat makes of it")
    return tokenizer


def first_difference(
    ours: RustBPETokenizer, theirs: HuggingFaceTokenizer, texts: Sequence[str]
) -> str | None:
    """The first text that two tokenizers encode differently, or None."""
    return next((text for text in texts if ours.encode(text) != theirs.encode(text)), None)


def _vocabulary(content: dict[str, Any]) -> Vocabulary:
    model, steps = content["model"], content["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if model["type"] != "BPE" or [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        raise ValueError("it must be a BPE after a Split and a ByteLevel step")
    if content.get("normalizer") is not None or steps[1].get("use_regex", True):
        raise ValueError("it must not normalize or split a second time")
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    byte_of = {char: byte for byte, char in enumerate(byte_level_alphabet())}
    ranks = {
        bytes(byte_of[char] for char in name): rank
        for name, rank in model["vocab"].items()
        if name not in special
    }
    return Vocabulary(ranks, steps[0]["pattern"]["Regex"], special, "imported")
