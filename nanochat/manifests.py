"""The pretraining sets that have a name, and what is known of their files.

The hub lists size and SHA-256 of its shards; the list is kept as `manifest.json` in the folder of the set, so that
every shard is checked when it arrives and can be checked again later without network. Sets that are made here
have the same file.

    {"name": ..., "licence": ..., "files": [{"name": "shard_00000.parquet", "bytes": ..., "sha256": ...}, ...]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, get_base_dir, read_json, write_json
from nanochat.download import Facts, get_json, hub_endpoint, locked

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class PretrainingSet:
    """A named set of shards. Without a repository on the hub it is made on this machine."""

    name: str
    summary: str
    licence: str
    folder: str  # below the base folder
    repo: str = ""
    last_shard: int = 0  # always the validation split
    shard_bytes: int = 100_000_000  # about, where the exact size is not known

    def shards(self, count: int) -> list[int]:
        """Indices of the first `count` training shards of the hub, or all for less than 0, and of the validation shard."""
        return [*range(self.last_shard if count < 0 else min(count, self.last_shard)), self.last_shard]

    def file_name(self, index: int) -> str:
        return f"shard_{index:05d}.parquet"

    def url(self, index: int) -> str:
        return f"{hub_endpoint()}/datasets/{self.repo}/resolve/main/{self.file_name(index)}"

    @property
    def path(self) -> Path:
        """Its folder, whether it exists or not."""
        return get_base_dir() / self.folder


CLIMBMIX = PretrainingSet(
    "climbmix", "ClimbMix, 400 billion tokens of web text, shuffled",
    "CC BY-NC 4.0, as nvidia/Nemotron-ClimbMix", "base_data_climbmix", "karpathy/climbmix-400b-shuffle", 6542,
)  # fmt: skip
FINEWEB_EDU = PretrainingSet(
    "fineweb-edu", "FineWeb-Edu, 100 billion tokens of educational web text, shuffled",
    "ODC-By 1.0, as HuggingFaceFW/fineweb-edu", "base_data", "karpathy/fineweb-edu-100b-shuffle", 1822,
)  # fmt: skip
TINYWORLD = PretrainingSet(
    "tinyworld", "a small made-up world, generated without network", "MIT, as nanochat", "tinyworld/base_data"
)
NAMED_SETS = {named.name: named for named in (CLIMBMIX, FINEWEB_EDU, TINYWORLD)}


def imported_set(name: str) -> PretrainingSet:
    """A set that was made of one's own text or will be."""
    return PretrainingSet(name, "imported text", "that of its sources", f"imported_data/{name}")


def imported_sets() -> list[PretrainingSet]:
    """The imported sets on this machine."""
    root = get_base_dir() / "imported_data"
    folders = (path for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))
    return [imported_set(path.name) for path in sorted(folders)]


# --- what is known of the files ----------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Facts]:
    """File name -> size and SHA-256, as recorded in a folder; empty without a record."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        files = read_json(path)["files"]
        return {file["name"]: Facts(file.get("bytes"), file.get("sha256")) for file in files}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; delete it to have it made anew") from None


def record_files(named: PretrainingSet, folder: Path, files: Mapping[str, Facts]) -> None:
    """Add to the manifest of a folder; what is known already stays unless it is told again."""
    with locked(folder / MANIFEST):
        known = read_manifest(folder) | dict(files)
        entries = [
            {"name": name, "bytes": facts.num_bytes, "sha256": facts.sha256}
            for name, facts in sorted(known.items())
        ]
        about = {"name": named.name, "repo": named.repo, "licence": named.licence}
        write_json(folder / MANIFEST, {**about, "files": entries})


def list_hub_files(named: PretrainingSet) -> dict[str, Facts]:
    """The shards of a set with size and SHA-256, as the hub lists them; empty if a mirror has no list."""
    url = f"{hub_endpoint()}/api/datasets/{named.repo}/tree/main"
    entries = get_json(url, missing=[])
    try:
        return {
            entry["path"]: Facts(entry["size"], entry.get("lfs", {}).get("oid"))
            for entry in entries
            if re.fullmatch(r"shard_\d{5}\.parquet", entry["path"])
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{url} is not a list of files") from None
