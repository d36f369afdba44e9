"""The configuration of a network as checkpoints and exported folders store it; all versions stay readable.

1  every field of GPTConfig by its name (checkpoints until November 2026)
2  the same, and the version
3  with tie_embeddings; before, input and output always had tables of their own

A change of GPTConfig adds a version, the migration that gives older ones the same network, and a fixture in
tests/fixtures/checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from nanochat.common import UserError
from nanochat.network_config import GPTConfig

CONFIG_VERSION = 3

# What turns the settings of a version into those of the next one.
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda settings: settings,
    2: lambda settings: settings | {"tie_embeddings": False},
}


def stored_config(config: GPTConfig) -> dict[str, Any]:
    """A configuration as it is stored: its version and every field, defaults included."""
    return {"version": CONFIG_VERSION, **asdict(config)}


def read_config(stored: Mapping[str, Any]) -> GPTConfig:
    """The configuration that was stored, by this code or any earlier one.

    Raises UserError for a newer version, unknown settings, or missing ones: what a default is may change.
    """
    settings = dict(stored)
    version = settings.pop("version", 1)
    if not isinstance(version, int) or not 1 <= version <= CONFIG_VERSION:
        raise UserError(f"model configuration version {version!r} is from a newer nanochat; update this one")
    for step in range(version, CONFIG_VERSION):
        settings = _MIGRATIONS[step](settings)
    known = {field.name for field in fields(GPTConfig)}
    if unknown := set(settings) - known:
        raise UserError(
            f"the model configuration is from a newer nanochat: unknown settings {sorted(unknown)}"
        )
    if missing := known - set(settings):
        raise UserError(
            f"the model configuration lacks {', '.join(sorted(missing))}; if upstream nanochat wrote it, "
            "import the checkpoint with python -m scripts.import_upstream"
        )
    return GPTConfig(**settings)
