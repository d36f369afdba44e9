"""Files and datasets that come over the network, each downloaded once, by one process, whole or not at all.

Task datasets are the hub's automatic Parquet export, kept as
`<root>/task_data/<owner--name>/<subset>/<split>/00000.parquet ...`; `manifest.json` beside the files lists
them and is written last, so its presence means that all are there. The embedded data source does the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError, data_root, data_source, print0, write_json
from nanochat.download import fetch, get_json, hub_endpoint, locked

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


class HubDataset:
    """Rows of a table as dicts of Python values, read one at a time, in an order of their own."""

    def __init__(self, table: pa.Table, order: np.ndarray | None = None) -> None:
        self._table = table
        self._order = order

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = index if self._order is None else int(self._order[index])
        return self._table.slice(row, 1).to_pylist()[0]

    def shuffle(self, seed: int) -> HubDataset:
        """The same rows permuted, in the order that the library `datasets` gives for this seed."""
        import numpy as np

        permutation = np.random.default_rng(seed).permutation(len(self))
        return HubDataset(self._table, permutation if self._order is None else self._order[permutation])


def load_hub_dataset(repo_id: str, subset: str = "default", split: str = "train") -> HubDataset:
    """One split of a hub dataset, downloaded first if the data source is the hub and it is not here yet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = data_root() / "task_data" / repo_id.replace("/", "--") / subset / split
    manifest = folder / "manifest.json"
    if not manifest.exists():
        _require_hub(manifest)
        with locked(manifest):
            if not manifest.exists():
                _download_split(repo_id, subset, split, folder)
    try:
        names = json.loads(manifest.read_text(encoding="utf-8"))
        return HubDataset(pa.concat_tables(pq.read_table(folder / name) for name in names))
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} is damaged ({reason}); delete it to get it anew") from None


def _download_split(repo_id: str, subset: str, split: str, folder: Path) -> None:
    listing = f"{hub_endpoint()}/api/datasets/{repo_id}/parquet/{subset}/{split}"
    print0(f"downloading {repo_id} {subset}/{split}")
    urls = get_json(listing)
    if not urls:
        raise UserError(f"{listing} lists no files")
    names = [f"{index:05d}.parquet" for index in range(len(urls))]
    for url, name in zip(urls, names, strict=True):
        if not (folder / name).exists():  # left by an interrupted run, and whole
            fetch(url, folder / name)
    write_json(folder / "manifest.json", names)


def data_file(name: str, url: str) -> Path:
    """Path of a single file of the data source, downloaded from url if the source is the hub."""
    path = data_root() / name
    if not path.exists():
        _require_hub(path)
    return download_file_with_lock(url, path)


def download_file_with_lock(url: str, path: Path, postprocess: Callable[[Path], None] | None = None) -> Path:
    """Make sure that path exists, downloading it in one process while the others wait. Returns path.

    postprocess gets the path of the complete download before it is renamed to `path`, under the lock.
    """
    if not path.exists():
        with locked(path):
            if not path.exists():
                print0(f"downloading {url}")
                whole = path.with_name(f".{path.name}.whole")
                fetch(url, whole)
                if postprocess is not None:
                    postprocess(whole)
                os.replace(whole, path)
    return path


def _require_hub(path: Path) -> None:
    if data_source() != "hub":
        raise UserError(f"{path} is missing; run python -m nanochat.tinyworld to generate it")
