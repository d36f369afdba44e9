"""A chat request becomes the tokens of a prompt that fits the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanochat.common import ROTARY_FACTOR
from nanochat.tokenizer import RustBPETokenizer

if TYPE_CHECKING:
    from nanochat.serve.errors import ApiError

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to complete, the room left for the answer, and how many old messages did not fit.

    extended: the answer may go beyond the trained context.
    """

    tokens: list[int]
    max_tokens: int
    truncated_messages: int = 0
    extended: bool = False

    @property
    def notes(self) -> dict[str, Any]:
        """What a client should know about it, as fields of a response."""
        warning = "longer than the model's trained context: the answer may be poor"
        return ({"truncated_messages": self.truncated_messages} if self.truncated_messages else {}) | (
            {"warning": warning} if self.extended else {}
        )


def build_prompt(
    tokenizer: RustBPETokenizer,
    messages: Sequence[Message],
    *,
    system: str = "",
    max_tokens: int,
    context_length: int,
    policy: str = "truncate",
    continue_final: bool = False,
) -> Prompt:
    """Render a conversation and make it fit.

    Policy truncate drops the oldest exchanges until an answer has room, keeping the system text and the last
    user message; policy error refuses what does not fit; policy extend goes as far as the model has positions,
    which is farther than it was trained. With continue_final the last (assistant) message
    stays open. Raises ApiError 400.
    """
    turns = _merge_system(messages, system)
    blocks = [_block(tokenizer, turn) for turn in turns]
    tail = [] if continue_final else [tokenizer.encode_special("<|assistant_start|>")]
    if continue_final:
        blocks[-1].pop()  # <|assistant_end|>
    # Upstream's window is 2048 and 256 of it are kept for the answer; a small window keeps an eighth as well.
    reserve = min(max_tokens, 256, context_length // 8) if policy == "truncate" else 1
    dropped = 0
    while 1 + sum(map(len, blocks)) + len(tail) + reserve > context_length and policy == "truncate":
        count = _oldest_exchange(turns)
        if not count:
            break
        turns, blocks, dropped = turns[count:], blocks[count:], dropped + count
        leading = _leading_system(messages, system)
        if leading and turns[0]["role"] == "user":
            turns[0] = {"role": "user", "content": _joined(leading, turns[0]["content"])}
            blocks[0] = _block(tokenizer, turns[0])
    tokens = [tokenizer.get_bos_token_id(), *(token for block in blocks for token in block), *tail]
    limit = ROTARY_FACTOR * context_length if policy == "extend" else context_length
    room = limit - len(tokens)
    if room < 1:
        raise _refusal(
            "context_length_exceeded",
            f"the prompt has {len(tokens)} tokens, the context of the model {limit}",
        )
    max_tokens = min(max_tokens, room)
    return Prompt(tokens, max_tokens, dropped, extended=len(tokens) + max_tokens > context_length)


def _refusal(code: str, message: str) -> ApiError:
    # Brings FastAPI, for which the start of a chat in the terminal should not wait.
    from nanochat.serve.errors import ApiError

    return ApiError(400, code, message, param="messages")


def _merge_system(messages: Sequence[Message], system: str) -> list[Message]:
    """User and assistant messages only: each system text moves to the head of the next user message."""
    turns: list[Message] = []
    pending = [system] if system else []
    for message in messages:
        if message["role"] == "system":
            pending.append(message["content"])
        elif message["role"] == "user":
            turns.append({"role": "user", "content": _joined(pending, message["content"])})
            pending = []
        else:
            turns.append(message)
    if not turns or len(pending) > (1 if system else 0):
        raise _refusal("invalid_role", "a system message must be followed by a user message")
    return turns


def _leading_system(messages: Sequence[Message], system: str) -> list[str]:
    texts = [system] if system else []
    for message in messages:
        if message["role"] != "system":
            break
        texts.append(message["content"])
    return texts


def _joined(system: Sequence[str], content: str) -> str:
    return "\n\n".join([*system, content])


def _oldest_exchange(turns: Sequence[Message]) -> int:
    """How many messages to drop so that the next user message comes first; 0 when only the last one is left."""
    later_users = (i for i, turn in enumerate(turns) if i > 0 and turn["role"] == "user")
    return next(later_users, 0)


def _block(tokenizer: RustBPETokenizer, message: Message) -> list[int]:
    """The tokens of one message with its fences, by the one function that renders conversations."""
    if message["role"] == "user":
        return tokenizer.render_conversation({"messages": [message]}, None)[0][1:]
    # An assistant message cannot open a conversation: give it an empty question and cut off bos, start, end.
    question = {"role": "user", "content": ""}
    return tokenizer.render_conversation({"messages": [question, message]}, None)[0][3:]
