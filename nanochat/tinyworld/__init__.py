"""TinyWorld, the embedded data source: a closed world in the formats of the hub, from a seed alone."""

from nanochat.tinyworld.sizes import DEFAULT_CHARS
from nanochat.tinyworld.writer import generate, is_generated

__all__ = ["DEFAULT_CHARS", "generate", "is_generated"]
