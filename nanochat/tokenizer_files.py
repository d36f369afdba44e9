"""A vocabulary in the files of others: Hugging Face's `tokenizer.json` out and in, upstream's pickle in.

Nothing here runs code of a file: the pickle is read by an unpickler that knows one class, and that is a
stand-in which only keeps the data.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError, read_json, whole_file
from nanochat.tokenizer_hf import byte_level_alphabet

if TYPE_CHECKING:
    from nanochat.tokenizer import Vocabulary

# The instructions that build a tiktoken encoding: two tables of strings or bytes and numbers, and the object.
_PICKLE_OPCODES = {
    "PROTO", "FRAME", "MARK", "STOP", "GLOBAL", "STACK_GLOBAL", "EMPTY_TUPLE", "NEWOBJ", "BUILD", "EMPTY_DICT",
    "SETITEM", "SETITEMS", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BININT", "BININT1",
    "BININT2", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MEMOIZE",
}  # fmt: skip
# What pickling a tiktoken encoding stores.
_STATE = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


# --- tokenizer.json, out -------------------------------------------------------------------------------


def write_tokenizer_json(vocabulary: Vocabulary, path: str | Path) -> None:
    """Write a tokenizer.json with which the library `tokenizers` gives the same ids.

    Raises UserError for the rare vocabulary of which there is none.
    """
    with whole_file(path, "w") as file:
        json.dump(tokenizer_json(vocabulary), file, ensure_ascii=False, indent=1)


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of tokenizer.json: split pattern, ids, merges by rank, special tokens."""
    names = _names(vocabulary)
    special = sorted(vocabulary.special_tokens.items(), key=lambda item: item[1])
    split = {
        "type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": True,  # a piece that is a token is that token, even if merges lead elsewhere
        "vocab": {name: rank for rank, name in names.items()} | _special_entries(vocabulary),
        "merges": [[names[left], names[right]] for left, right, _ in _merges(vocabulary)],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": token, "content": text, **_ADDED} for text, token in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None, "decoder": byte_level, "model": model,
    }  # fmt: skip


def _names(vocabulary: Vocabulary) -> dict[int, str]:
    """Every learned token as the byte-level alphabet spells it, by id."""
    alphabet = byte_level_alphabet()
    return {rank: "".join(alphabet[byte] for byte in token) for token, rank in vocabulary.ranks.items()}


def _special_entries(vocabulary: Vocabulary) -> dict[str, int]:
    """Special tokens that must also stand in the model's vocabulary, because its ids leave a gap before them.

    The library numbers other special tokens on from the last id, whatever their own ids say.
    """
    special, num_learned = vocabulary.special_tokens, len(vocabulary.ranks)
    if spelled := special.keys() & set(_names(vocabulary).values()):
        raise UserError(f"tokenizer.json cannot tell the special tokens {spelled} from learned ones")
    if sorted(special.values()) == list(range(num_learned, num_learned + len(special))):
        return {}
    for text in special:
        if _is_one_piece(text, vocabulary.pattern):
            raise UserError(f"tokenizer.json cannot say that {text!r} in a text is no special token")
    return special


def _is_one_piece(text: str, pattern: str) -> bool:
    import rustbpe

    ranks = {bytes([byte]): byte for byte in range(256)}
    token = ranks.setdefault(text.encode(), 256)
    return rustbpe.Tokenizer.from_ranks(ranks.items(), pattern).encode_ordinary(text) == [token]


def _merges(vocabulary: Vocabulary) -> list[tuple[int, int, int]]:
    import rustbpe

    return rustbpe.Tokenizer.from_ranks(vocabulary.ranks.items(), vocabulary.pattern).get_merges()


# --- tokenizer.json, in --------------------------------------------------------------------------------


def read_tokenizer_json(path: str | Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json whose tokenizer works as ours: a byte-level BPE after one split.

    Raises UserError if it is anything else, or if its merges do not follow from its ids.
    """
    content = read_json(path)
    try:
        vocabulary = _vocabulary(content)
        pairs = [_pair(merge) for merge in content["model"]["merges"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a byte-level BPE that nanochat can read: {error}") from None
    _check(vocabulary, path)
    names, merges = _names(vocabulary), _merges(vocabulary)
    if not content["model"].get("ignore_merges"):
        merged = {token for _, _, token in merges}
        for token, rank in vocabulary.ranks.items():
            if len(token) > 1 and rank not in merged:
                raise UserError(
                    f"{path} has the token {names[rank]!r}, which no merge gives; nanochat's would"
                )
    found = [(names[left], names[right]) for left, right, _ in merges]
    # A file may list further pairs that spell a token but never meet; those that do must be in our order.
    wanted = set(found)
    if [pair for pair in pairs if pair in wanted] != found:
        raise UserError(f"{path} merges in an order that its ids do not tell, so nanochat cannot read it")
    return vocabulary


def _vocabulary(content: dict[str, Any]) -> Vocabulary:
    from nanochat.tokenizer import Vocabulary

    model, steps = content["model"], content["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if model["type"] != "BPE" or [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        raise ValueError("it needs a BPE after the steps Split and ByteLevel")
    split, byte_level = steps
    if content.get("normalizer") is not None or byte_level["use_regex"] or byte_level["add_prefix_space"]:
        raise ValueError("it changes the text or splits it a second time")
    if split["behavior"] != "Isolated" or split["invert"]:
        raise ValueError("its Split step is not an isolated one")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"it has {key} {model[key]!r}")
    if plain := [token["content"] for token in content["added_tokens"] if not token.get("special")]:
        raise ValueError(f"its added tokens {plain} are not special, so they are found in any text")
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    byte_of = {char: byte for byte, char in enumerate(byte_level_alphabet())}
    ranks = {
        bytes(byte_of[char] for char in name): rank
        for name, rank in model["vocab"].items()
        if name not in special
    }
    return Vocabulary(ranks, split["pattern"]["Regex"], special)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge, which older files write as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


# --- upstream's pickle ---------------------------------------------------------------------------------


class _Encoding:
    """Stands in for tiktoken's class while a pickle is read, and keeps the state."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> type:
        if (module_name, global_name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def read_tokenizer_pickle(path: str | Path) -> Vocabulary:
    """The vocabulary of upstream's tokenizer.pkl, a pickled tiktoken encoding, without running its code.

    Raises UserError if the file is missing, damaged or holds anything but such an encoding.
    """
    from nanochat.tokenizer import Vocabulary

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        _check_instructions(data)
        encoding = _Unpickler(io.BytesIO(data)).load()
    # The format is a little machine; damaged programs fail in every one of these ways.
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, MemoryError,
        OverflowError, ImportError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is not a pickled tiktoken encoding: {error}") from None
    state = encoding.state if isinstance(encoding, _Encoding) else None
    if isinstance(state, str):
        raise UserError(f"{path} only names tiktoken's encoding {state!r}; it holds no vocabulary")
    if not isinstance(state, dict) or not all(isinstance(state.get(k), kind) for k, kind in _STATE.items()):
        raise UserError(f"{path} is not a pickled tiktoken encoding: its content is of another kind")
    vocabulary = Vocabulary(
        state["mergeable_ranks"], state["pat_str"], state["special_tokens"], state["name"]
    )
    _check(vocabulary, path)
    return vocabulary


def _check_instructions(data: bytes) -> None:
    """Raise for a pickle that could exhaust the stack or the memory before it fails."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _PICKLE_OPCODES:
            raise pickle.UnpicklingError(f"it holds the instruction {opcode.name}")
        if opcode.name == "LONG_BINPUT" and (argument or 0) > len(data):  # a table of that size would be made
            raise pickle.UnpicklingError("it numbers more values than it has bytes")


def _check(vocabulary: Vocabulary, path: str | Path) -> None:
    """Raise a UserError for a table that is no vocabulary."""
    import rustbpe

    if not (_is_table(vocabulary.ranks, bytes) and _is_table(vocabulary.special_tokens, str)):
        raise UserError(f"{path} is damaged: its tables do not map tokens to ids")
    try:
        rustbpe.Tokenizer.from_ranks(
            vocabulary.ranks.items(), vocabulary.pattern, dict(vocabulary.special_tokens)
        )
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _is_table(table: Mapping[bytes, int] | Mapping[str, int], kind: type) -> bool:
    return all(type(k) is kind and type(v) is int and 0 <= v < 1 << 32 for k, v in table.items())
