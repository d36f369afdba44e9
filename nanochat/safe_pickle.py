"""Reading upstream's tokenizer.pkl without running what a stranger put into it.

A pickle is a program: loading one may call anything. This reader knows a single class, tiktoken's Encoding, which
it replaces by a container without behaviour, and refuses every other name before anything happens.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

from nanochat.common import UserError
from nanochat.tokenizer import Vocabulary

MAX_BYTES = 64 << 20  # a vocabulary of 65,536 tokens takes about 1 MB


class _EncodingState:
    """What a pickled Encoding leaves behind: its state, and no methods worth calling."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingState
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_tokenizer_pickle(path: Path) -> Vocabulary:
    """The vocabulary of a pickled tiktoken Encoding.

    Raises UserError if the file is damaged, asks for any other class, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for a tokenizer")
        found = _RestrictedUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is not a pickled tiktoken tokenizer: {error}") from None
    state = found.state if isinstance(found, _EncodingState) else None
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a pickled tiktoken tokenizer: it holds {type(found).__name__}")
    return _vocabulary(path, state)


def _vocabulary(path: Path, state: dict) -> Vocabulary:
    name, pattern = state.get("name"), state.get("pat_str")
    ranks, special = state.get("mergeable_ranks"), state.get("special_tokens")
    if not (isinstance(name, str) and isinstance(pattern, str) and ranks and special):
        raise UserError(f"{path} lacks parts of a tokenizer")
    if not (_maps(ranks, bytes) and _maps(special, str)):
        raise UserError(f"{path} holds something else than tokens and their ids")
    return Vocabulary(dict(ranks), pattern, dict(special), name)


def _maps(value: object, key_type: type) -> bool:
    """Whether value is a dict from key_type to non-negative integers."""
    return type(value) is dict and all(
        type(key) is key_type and type(token) is int and token >= 0 for key, token in value.items()
    )
