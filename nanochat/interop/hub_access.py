"""The Hugging Face hub's failures as one line that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from nanochat.common import UserError


@contextmanager
def hub_errors(failed: str) -> Iterator[None]:
    """Turn what the hub's library raises into a UserError that begins with `failed`."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  of whichever client the library uses
        LocalTokenNotFoundError,
    )

    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        needs_token = refused or isinstance(error, LocalTokenNotFoundError)
        hint = " (set HF_TOKEN or run: hf auth login)" if needs_token else ""
        raise UserError(f"{failed}: {first_line(error)}{hint}") from None


def first_line(error: Exception) -> str:
    """What an exception says, in one line: of the hub's answers the status and the reason below it."""
    from huggingface_hub.errors import HfHubHTTPError

    text = re.sub(r"\s*\(Request ID: [^)]*\)", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    shown = lines[: 2 if isinstance(error, HfHubHTTPError) else 1]
    return " ".join(shown) or type(error).__name__
