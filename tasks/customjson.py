"""Conversations of your own, one per line; with it the model learns who it is.

A line is a JSON array of messages, or an object that holds it as `messages`, beside whatever else it likes.
"""

from __future__ import annotations

import json
from pathlib import Path

from nanochat.common import UserError, data_root, print0
from nanochat.conversation import Conversation, Message
from nanochat.hub import data_file
from tasks.common import RowError, Task, check_dialogue

IDENTITY_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"


class CustomJSON(Task):
    """The conversations of a UTF-8 JSONL file in their order. For training only.

    A missing file is an empty task, with a warning; a malformed line is a RowError with its number.
    """

    def __init__(
        self, filepath: str | Path, *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        super().__init__(start, stop, step)
        path = Path(filepath)
        if not path.exists():
            print0(
                f"warning: {path} does not exist, so nothing is learned from it; an example to start from:"
            )
            print0(f"  curl -L -o {path} {IDENTITY_URL}")
        self.conversations = _read(path) if path.exists() else []

    def num_examples(self) -> int:
        """Number of conversations."""
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        """A conversation of the file."""
        return {"messages": self.conversations[index]}


def identity_file() -> Path:
    """The conversations that tell the model who it is, downloaded if the data source is the hub."""
    return data_file("identity_conversations.jsonl", IDENTITY_URL)


def extra_conversations(names: str) -> list[Task]:
    """A task for each of the files, by commas; each is sought as it is named, then in the data source's folder.

    Raises UserError for one that does not exist.
    """
    tasks: list[Task] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        found = next((path for path in (Path(name), data_root() / name) if path.is_file()), None)
        if found is None:
            problem = "is a folder" if Path(name).is_dir() else f"does not exist, here or in {data_root()}"
            raise UserError(f"{name} {problem}; --extra-data names files")
        tasks.append(CustomJSON(found))
    return tasks


def _read(path: Path) -> list[list[Message]]:
    lines = path.read_bytes().split(b"\n")
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(line: bytes, where: str) -> list[Message]:
    try:
        messages = json.loads(line.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise RowError(f"{where}: not valid JSON: {error}") from None
    if isinstance(messages, dict) and "messages" in messages:
        messages = messages["messages"]
    if not isinstance(messages, list):
        raise RowError(f"{where}: a line must be a list of messages, not {type(messages).__name__}")
    check_dialogue(messages, where)
    return messages
