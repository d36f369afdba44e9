"""Files and datasets that come over the network, each downloaded once, by one process, whole or not at all.

Task datasets are the hub's automatic Parquet export, kept as
`<root>/task_data/<owner--name>/<subset>/<split>/00000.parquet ...`; `manifest.json` beside the files lists
them and is written last, so its presence means that all are there. The embedded data source does the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError, data_root, data_source, print0, whole_file, write_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import requests

ATTEMPTS = 4
BACKOFF_S = 1.0  # before the second attempt, doubled before each further one
TIMEOUT_S = 30.0  # to connect, and between two arrivals of data
_CHUNK_BYTES = 1 << 20


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
        with _locked(manifest):
            if not manifest.exists():
                _download_split(repo_id, subset, split, folder)
    try:
        names = json.loads(manifest.read_text(encoding="utf-8"))
        return HubDataset(pa.concat_tables(pq.read_table(folder / name) for name in names))
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} is damaged ({reason}); delete it to get it anew") from None


def _download_split(repo_id: str, subset: str, split: str, folder: Path) -> None:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    listing = f"{endpoint.rstrip('/')}/api/datasets/{repo_id}/parquet/{subset}/{split}"
    print0(f"downloading {repo_id} {subset}/{split}")
    urls = _get(listing, lambda response: response.json())
    if not urls:
        raise UserError(f"{listing} lists no files")
    names = [f"{index:05d}.parquet" for index in range(len(urls))]
    for url, name in zip(urls, names, strict=True):
        if not (folder / name).exists():  # left by an interrupted run, and whole
            _download(url, folder / name)
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
        with _locked(path):
            if not path.exists():
                print0(f"downloading {url}")
                part = path.with_name(f"{path.name}.part")
                _download(url, part)
                if postprocess is not None:
                    postprocess(part)
                os.replace(part, path)
    return path


def _require_hub(path: Path) -> None:
    if data_source() != "hub":
        raise UserError(f"{path} is missing; run python -m nanochat.tinyworld to generate it")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


def _download(url: str, path: Path) -> None:
    def store(response: requests.Response) -> None:
        with whole_file(path) as file:
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)

    _get(url, store)


def _get(url: str, use: Callable[[requests.Response], Any]) -> Any:
    """What use makes of the answer to a GET. Tries again after network trouble; gives up with a UserError."""
    import requests
    import tenacity

    @tenacity.retry(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=BACKOFF_S),
        retry=tenacity.retry_if_exception(_is_transient),
        reraise=True,
    )
    def attempt() -> Any:
        with requests.get(url, stream=True, timeout=TIMEOUT_S) as response:
            response.raise_for_status()
            return use(response)

    try:
        return attempt()
    except requests.RequestException as error:
        raise UserError(f"cannot download {url}: {_reason(error)}; is the network reachable?") from error


def _is_transient(error: BaseException) -> bool:
    """Whether another attempt can help: not when the server has understood and refused."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in (408, 425, 429) or error.response.status_code >= 500
    return isinstance(error, requests.RequestException)


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code}"
    return type(error).__name__
