"""Which bytes a run is validated on: the names and SHA-256 of the validation shards, kept in its checkpoints.

Bits per byte of other text are other numbers. So a run does not go on with other validation data, as it does not go
on with other training data; what measures a finished model only says that its numbers stand beside no earlier ones.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from nanochat.common import UserError, World, hash_file, print0
from nanochat.dataset import split_files
from nanochat.manifests import read_manifest

KEY = "validation_data"  # in a checkpoint's meta


def find_validation_data(world: World) -> dict[str, str]:
    """`folder/file` -> SHA-256 of the validation shards of the sets in use, which is printed; empty but on rank 0.

    Reads them whole, a tenth of a second or two per 100 MB. Raises UserError for a shard that is not the one recorded
    in the manifest of its set.
    """
    found: dict[str, str] = {}
    if not world.is_main:
        return found
    for path in split_files("val"):
        sha256, recorded = hash_file(path), read_manifest(path.parent).get(path.name)
        if recorded is not None and recorded.sha256 not in (None, sha256):
            raise UserError(
                f"the validation shard {path} is not the one of its manifest (SHA-256 {_short(sha256)} instead of "
                f"{_short(recorded.sha256 or '')}): delete it and fetch, generate or import it again"
            )
        found[f"{path.parent.name}/{path.name}"] = sha256
    print0(f"validation data: {_names(found)}")
    return found


def same_validation_data(meta: Mapping[str, Any], now: dict[str, str], validates: bool) -> dict[str, str]:
    """What the checkpoints of a run that goes on record: the data that it began with.

    Raises UserError where the run would be validated on other data now.
    """
    if validates and _differ(meta, now):
        raise UserError(
            f"this run was validated on {_names(meta[KEY])}, and here is {_names(now)}: its numbers would not be"
            " comparable. Put the old file back, go on without validation (--eval-every=-1), or start over"
            " with --resume=never"
        )
    return meta.get(KEY) or now


def warn_of_other_validation_data(meta: Mapping[str, Any], now: dict[str, str]) -> None:
    """Say that a model is measured on other data than it was validated on while it trained."""
    if _differ(meta, now):
        print0(
            f"warning: this model was validated on {_names(meta[KEY])}, and here is {_names(now)};"
            " bits per byte of validation text cannot be compared with those of its training",
            file=sys.stderr,
        )


def _differ(meta: Mapping[str, Any], now: dict[str, str]) -> bool:
    """Whether the bytes differ; names alone do not matter. Older checkpoints say nothing."""
    return bool(now) and bool(meta.get(KEY)) and sorted(meta[KEY].values()) != sorted(now.values())


def _names(files: Mapping[str, str]) -> str:
    return ", ".join(f"{name} (SHA-256 {_short(sha256)})" for name, sha256 in files.items())


def _short(sha256: str) -> str:
    return f"{sha256[:12]}..."
