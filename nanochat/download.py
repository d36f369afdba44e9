"""One file over HTTP, whole and right or not at all.

The bytes go to `.<name>.part` beside the file and are synced, checked and renamed at the end. A part that an
interruption left is continued by range, if the server still offers the same file (its ETag, kept beside the
part, or a SHA-256 known beforehand). Trouble is retried with growing pauses; what cannot be mended is a UserError.

HF_ENDPOINT is a mirror of the hub, HF_TOKEN is sent to it, HF_HUB_OFFLINE=1 forbids the network.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nanochat.common import UserError, hash_file

if TYPE_CHECKING:
    import requests
    import tenacity

ATTEMPTS = 4  # in a row that bring nothing new
BACKOFF_S = 1.0  # before the second attempt, doubled before each further one
LONGEST_WAIT_S = 120.0  # that a server may ask for
TIMEOUT_S = 30.0  # to connect, and between two arrivals of data
_CHUNK_BYTES = 1 << 16  # what a dropped connection or a kill may lose

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a file; None where unknown."""

    num_bytes: int | None = None
    sha256: str | None = None

    def problem(self, path: Path) -> str:
        """How the file at path differs, empty if it does not."""
        size = path.stat().st_size
        if self.num_bytes is not None and size != self.num_bytes:
            return f"{size:,} bytes instead of {self.num_bytes:,}"
        if self.sha256 is not None and (found := hash_file(path)) != self.sha256:
            return f"its SHA-256 is {found[:12]}... instead of {self.sha256[:12]}..."
        return ""


class _WrongBytes(Exception):
    """What arrived is not the file."""


def hub_endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, which may be a mirror, without a slash at the end."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only process that makes the file at path; the system frees the lock of a process that is killed."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


def check_space(folder: Path, num_bytes: int) -> None:
    """UserError unless the disk of an existing folder has room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, but {num_bytes / 1e9:.1f} GB are to come; free some, "
            "fetch less, or set NANOCHAT_BASE_DIR to another disk"
        )


def fetch(
    url: str, path: Path, known: Facts | None = None, on_bytes: Callable[[int], None] | None = None
) -> Facts:
    """Download url to path, under the caller's lock; returns size and SHA-256 of the file.

    known: what the file must be; what the server says of it beyond that is checked too. on_bytes is told now
    and then how many bytes of the file are here, and may raise to stop. UserError when it cannot be had.
    """
    part = _part(path)
    known, tell = known or Facts(), on_bytes or (lambda num_bytes: None)

    def attempt() -> Facts:
        facts = _continue(url, part, known, tell)
        if problem := facts.problem(part):
            _discard(part)
            raise _WrongBytes(problem)
        return Facts(part.stat().st_size, facts.sha256 or hash_file(part))

    try:
        facts = _retried(url, attempt, lambda: part_size(path))
        os.replace(part, path)
        _discard(part)
        return facts
    except OSError as error:  # of the disk: those of the network have become UserErrors
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def part_size(path: Path) -> int:
    """Bytes of the file at path that an interrupted download has left."""
    part = _part(path)
    return part.stat().st_size if part.exists() else 0


def get_json(url: str, missing: Any = None) -> Any:
    """The JSON value behind a URL; a list that comes in pages is put together. missing: instead of a 404."""
    pages: list[Any] = []
    following: str | None = url
    while following is not None:
        page, following = _retried(following, lambda address=following: _get_page(address, missing))
        pages.append(page)
    return pages[0] if len(pages) == 1 else [entry for page in pages for entry in page]


def _get_page(url: str, missing: Any) -> tuple[Any, str | None]:
    import requests

    with requests.get(url, timeout=TIMEOUT_S, headers=_authorization(url)) as response:
        if response.status_code == 404 and missing is not None:
            return missing, None
        response.raise_for_status()
        return response.json(), response.links.get("next", {}).get("url")


# --- one attempt -------------------------------------------------------------------------------------


def _continue(url: str, part: Path, known: Facts, tell: Callable[[int], None]) -> Facts:
    """Append what is missing to the part, or write it anew; returns what the server says of the file."""
    import requests

    etag_file = _etag_file(part)
    etag = etag_file.read_text(encoding="utf-8") if etag_file.exists() else ""
    offset = part.stat().st_size if part.exists() and (etag or known.sha256) else 0
    if offset and offset == known.num_bytes:
        return known  # killed between the last byte and the renaming
    headers = {"Accept-Encoding": "identity", **_authorization(url)}
    if offset:
        headers |= {"Range": f"bytes={offset}-"} | ({"If-Range": etag} if etag else {})
    with requests.get(url, stream=True, timeout=TIMEOUT_S, headers=headers) as response:
        if response.status_code == 416:  # longer than the file is by now
            _discard(part)
            raise _WrongBytes(f"the server has no bytes beyond {offset:,}")
        response.raise_for_status()
        if response.status_code != 206:
            offset = 0
        elif not _goes_on(response, offset, etag):
            _discard(part)
            raise _WrongBytes("the server sends another range, or another file, than the one asked for")
        facts = _facts(response, known, offset)
        if facts.num_bytes is not None:
            check_space(part.parent, facts.num_bytes - offset)
        if not offset:
            _discard(part)
            if (etag := response.headers.get("ETag", "")) and not etag.startswith("W/"):
                etag_file.write_text(etag, encoding="utf-8")
        with open(part, "ab") as file:
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                tell(file.tell())
            file.flush()
            os.fsync(file.fileno())
    return facts


def _goes_on(response: requests.Response, offset: int, etag: str) -> bool:
    """Whether a partial answer starts at the offset and belongs to the file with the ETag (empty: unknown)."""
    starts_there = response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
    return starts_there and (not etag or response.headers.get("ETag", etag) == etag)


def _facts(response: requests.Response, known: Facts, offset: int) -> Facts:
    """Size and hash of the whole file: those known before, else those in the headers of the answer.

    The hub gives both on the redirect to its store, as X-Linked-Size and X-Linked-ETag.
    """
    num_bytes, digest = known.num_bytes, known.sha256
    for answer in (*response.history, response):
        linked = answer.headers.get("X-Linked-Size", "")
        num_bytes = int(linked) if num_bytes is None and linked.isdigit() else num_bytes
        found = re.fullmatch(r'"?([0-9a-f]{64})"?', answer.headers.get("X-Linked-ETag", ""))
        digest = found[1] if digest is None and found else digest
    length = response.headers.get("Content-Length", "")
    if num_bytes is None and length.isdigit() and "Content-Encoding" not in response.headers:
        num_bytes = offset + int(length)
    return Facts(num_bytes, digest)


def _authorization(url: str) -> dict[str, str]:
    token = os.environ.get("HF_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token and url.startswith(f"{hub_endpoint()}/") else {}


def _etag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _etag_file(part).unlink(missing_ok=True)


# --- again and again ---------------------------------------------------------------------------------


def _retried(url: str, attempt: Callable[[], ValueT], progress: Callable[[], int] = lambda: 0) -> ValueT:
    """What attempt returns. Tried again after trouble, until ATTEMPTS in a row have not raised progress."""
    import requests
    import tenacity

    if is_offline():
        raise UserError(f"HF_HUB_OFFLINE is set, but {url} is not here yet; unset it to download")
    best, failures = progress(), 0

    def count(state: tenacity.RetryCallState) -> None:
        nonlocal best, failures
        failures, best = (1, progress()) if progress() > best else (failures + 1, best)

    def pause(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(BACKOFF_S * 2 ** (failures - 1), _asked_wait(error))

    again = tenacity.Retrying(
        after=count,
        stop=lambda state: failures >= ATTEMPTS,
        wait=pause,
        retry=tenacity.retry_if_exception(_is_transient),
        reraise=True,
    )
    try:
        return again(attempt)
    except (_WrongBytes, requests.RequestException) as error:
        raise UserError(f"cannot download {url}: {_reason(error)}") from error


def _asked_wait(error: BaseException | None) -> float:
    """Seconds of the Retry-After of an answer, 0 without."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT_S) if asked.isdigit() else 0.0


def _is_transient(error: BaseException) -> bool:
    """Whether another attempt can help: not when the server has understood and refused."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in (408, 425, 429) or error.response.status_code >= 500
    return isinstance(error, requests.RequestException | _WrongBytes)


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        hint = {401: "; set HF_TOKEN", 403: "; set HF_TOKEN", 429: "; try later, or set HF_TOKEN"}.get(
            status, ""
        )
        return f"the server answered {status}{hint}"
    if isinstance(error, _WrongBytes):
        return f"wrong bytes arrived: {error}"
    if isinstance(error, requests.JSONDecodeError):
        return "the answer is not JSON"
    return f"{type(error).__name__}; is the network reachable?"
