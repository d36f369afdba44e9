"""Our vocabulary as the files of a Hugging Face tokenizer, and back.

Written: tokenizer.json (byte-level BPE), tokenizer_config.json, special_tokens_map.json, chat_template.jinja.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nanochat.common import UserError, whole_file, write_json
from nanochat.interop.imported import usable_tokenizer
from nanochat.samples import PROBES
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer_base import SPECIAL_TOKENS
from nanochat.tokenizer_files import read_tokenizer_json, write_tokenizer_json
from nanochat.tokenizer_hf import HuggingFaceTokenizer

BOS, END_OF_ANSWER = "<|bos|>", "<|assistant_end|>"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


# --- out ---------------------------------------------------------------------------------------------


def write_tokenizer(tokenizer: RustBPETokenizer, directory: Path, context: int) -> None:
    """Write the tokenizer files of a folder. Raises UserError if a vocabulary cannot be expressed exactly."""
    vocabulary = tokenizer.vocabulary
    if missing := set(SPECIAL_TOKENS) - set(vocabulary.special_tokens):
        raise UserError(f"the tokenizer lacks the special tokens {sorted(missing)}, which chats are made of")
    write_tokenizer_json(vocabulary, directory / "tokenizer.json")
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


# --- in ----------------------------------------------------------------------------------------------


def read_tokenizer(directory: Path) -> RustBPETokenizer:
    """Our tokenizer from the tokenizer.json of a folder.

    Raises UserError if it is not a byte-level BPE with a split pattern, or encodes the probe texts differently.
    """
    path = directory / "tokenizer.json"
    tokenizer = usable_tokenizer(read_tokenizer_json(path))
    try:
        theirs = HuggingFaceTokenizer.from_directory(directory)
    except UserError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"the library tokenizers cannot read {path}: {error}") from None
    differing = first_difference(tokenizer, theirs, PROBES)
    if differing is not None:
        raise UserError(f"{path} encodes {differing!r} differently from what nanochat makes of it")
    return tokenizer


def first_difference(
    ours: RustBPETokenizer, theirs: HuggingFaceTokenizer, texts: Sequence[str]
) -> str | None:
    """The first text that two tokenizers encode differently, or None."""
    return next((text for text in texts if ours.encode(text) != theirs.encode(text)), None)
