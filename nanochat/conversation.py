"""The one place where a conversation becomes tokens: for training, evaluation, the terminal and the server.

A conversation is `{"messages": [...]}`; a message is `{"role": ..., "content": ...}`. Roles alternate between
user and assistant, user first; one system message may stand before them and is merged into the first user
message. The content of an assistant message is a string or a list of parts `{"type": ..., "text": ...}` with
type text, python (a tool call) or python_output (what the tool answered).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]
Conversation = dict[str, Any]

_ROLES = ("user", "assistant")
_GREEN, _RED, _GREY, _RESET = "\x1b[92m", "\x1b[91m", "\x1b[90m", "\x1b[0m"


class _Piece(NamedTuple):
    text: str
    is_special: bool
    mask: int  # 1 = a training target


# How each part of an assistant message is fenced, and whether the model learns to write it. A tool's output
# is not learned: at inference the engine inserts it.
_PARTS = {
    "text": ("", "", 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render(
    conversation: Conversation,
    encode: Callable[[str], list[int]],
    special: Callable[[str], int],
    max_tokens: int | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids and loss mask (1 = training target) of a conversation, both cut to max_tokens.

    Every part is encoded on its own. Raises ValueError for a malformed conversation.
    """
    return _render(checked_messages(conversation), encode, special, max_tokens)


def render_prompt(
    conversation: Conversation,
    encode: Callable[[str], list[int]],
    special: Callable[[str], int],
    max_tokens: int,
) -> list[int]:
    """Token ids that ask for the last (assistant) message of a conversation anew.

    A prompt longer than max_tokens loses tokens after the first one (BOS), never the end of the question.
    """
    messages = checked_messages(conversation)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's; it is what will be completed")
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens} leaves no room for the first and the last token")
    ids, _ = _render(messages[:-1], encode, special, None)
    ids.append(special("<|assistant_start|>"))
    excess = len(ids) - max_tokens
    return ids if excess <= 0 else ids[:1] + ids[1 + excess :]


def checked_messages(conversation: Conversation) -> list[Message]:
    """The messages with the system message merged into the first user message; the input stays as it is.

    Raises ValueError, naming the message, if roles do not alternate or a content has the wrong type.
    """
    messages = _merge_system(conversation["messages"])
    if not messages:
        raise ValueError("the conversation has no messages")
    for index, message in enumerate(messages):
        expected = _ROLES[index % 2]
        if message["role"] != expected:
            raise ValueError(f"message {index} must be from {expected}, not {message['role']!r}")
        _check_content(message["content"], expected, index)
    return messages


def visualize(
    ids: Sequence[int], mask: Sequence[int], decode: Callable[[list[int]], str], with_id: bool
) -> str:
    """The tokens joined by `|`, green where the mask is 1 and red elsewhere, optionally with grey ids."""
    elements = []
    for token, is_target in zip(ids, mask, strict=True):
        elements.append(f"{_GREEN if is_target else _RED}{decode([token])}{_RESET}")
        if with_id:
            elements.append(f"{_GREY}({token}){_RESET}")
    return "|".join(elements)


def _merge_system(messages: Sequence[Message]) -> list[Message]:
    messages = list(messages)
    if not messages or messages[0]["role"] != "system":
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise ValueError("a system message must be followed by a user message")
    system, user = messages[0]["content"], messages[1]["content"]
    if not (isinstance(system, str) and isinstance(user, str)):
        raise ValueError(
            "the contents of the system message and of the user message after it must be strings"
        )
    return [{"role": "user", "content": f"{system}\n\n{user}"}, *messages[2:]]


def _check_content(content: object, role: str, index: int) -> None:
    if isinstance(content, str):
        return
    if role == "user":
        raise ValueError(f"message {index}: user content must be a string, not {type(content).__name__}")
    if not isinstance(content, list):
        kind = type(content).__name__
        raise ValueError(
            f"message {index}: assistant content must be a string or a list of parts, not {kind}"
        )
    for part in content:
        if part["type"] not in _PARTS:
            raise ValueError(f"message {index}: unknown part type {part['type']!r}; use {', '.join(_PARTS)}")
        if not isinstance(part["text"], str):
            raise ValueError(f"message {index}: the text of a {part['type']} part must be a string")


def _render(
    messages: Sequence[Message],
    encode: Callable[[str], list[int]],
    special: Callable[[str], int],
    max_tokens: int | None,
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []
    for piece in _pieces(messages):
        tokens = [special(piece.text)] if piece.is_special else encode(piece.text)
        ids += tokens
        mask += [piece.mask] * len(tokens)
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    return ids[:max_tokens], mask[:max_tokens]


def _pieces(messages: Sequence[Message]) -> Iterator[_Piece]:
    yield _Piece("<|bos|>", True, 0)
    for message in messages:
        if message["role"] == "user":
            yield _Piece("<|user_start|>", True, 0)
            yield _Piece(message["content"], False, 0)
            yield _Piece("<|user_end|>", True, 0)
        else:
            yield _Piece("<|assistant_start|>", True, 0)
            yield from _assistant_pieces(message["content"])
            yield _Piece("<|assistant_end|>", True, 1)


def _assistant_pieces(content: str | list[dict[str, str]]) -> Iterator[_Piece]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        start, end, mask = _PARTS[part["type"]]
        if start:
            yield _Piece(start, True, mask)
        yield _Piece(part["text"], False, mask)
        if end:
            yield _Piece(end, True, mask)
