"""Conversations in which the model tells who it is, for finetuning: from templates, or written by another model.

python -m dev.gen_synthetic_data
python -m dev.gen_synthetic_data --base-url=http://localhost:8000/v1 --model=some-model --api-key-env=API_KEY

Without --base-url nothing is asked of the network. Any server that speaks the OpenAI API will do, also scripts.chat_web.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dev.persona_templates import Identity, Messages, draw_dimensions, from_templates
from nanochat.common import UserError, check_writable, data_root, whole_file
from nanochat.configurator import option, run
from tasks.common import RowError, check_dialogue

SIMILAR = 0.9  # Jaccard index of word trigrams from which on two conversations count as the same
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["messages"],
    "properties": {"messages": {"type": "array", "items": {
        "type": "object", "additionalProperties": False, "required": ["role", "content"],
        "properties": {"role": {"type": "string", "enum": ["user", "assistant"]}, "content": {"type": "string"}},
    }}},
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    num: int = option(1000, "conversations to make; duplicates among them are dropped")
    output: str = option(
        "", "JSONL file; default identity_conversations.jsonl in the folder of the data source"
    )
    identity: str = option("", "JSON file with name, creator, year, license, url, facts; default nanochat's")
    ascii_only: bool = option(False, "drop conversations with other characters than ASCII")
    save_metadata: bool = option(
        False, "write objects with the dimensions of each conversation, not bare lists"
    )
    resume: bool = option(False, "keep what an interrupted run has made")
    base_url: str = option(
        "", "OpenAI-compatible API, such as http://localhost:8000/v1; default: templates alone"
    )
    model: str = option("", "model to ask for, with --base-url")
    api_key_env: str = option("", "environment variable that holds the key, with --base-url")
    knowledge: str = option("README.md", "text with more facts for the model that writes, with --base-url")
    workers: int = option(4, "requests at a time, with --base-url")
    attempts: int = option(5, "tries per request, with doubling pauses in between")
    timeout_s: float = option(120.0, "seconds to wait for an answer")
    usd_per_million_in: float = option(0.0, "price of prompt tokens, for the summary")
    usd_per_million_out: float = option(0.0, "price of written tokens, for the summary")


Made = tuple[Messages, dict[str, str]]


def main(cfg: Config) -> None:
    """Make conversations about the model's identity."""
    if cfg.num < 1 or cfg.workers < 1 or cfg.attempts < 1:
        raise UserError("--num, --workers and --attempts must be at least 1")
    identity = Identity.load(Path(cfg.identity)) if cfg.identity else Identity()
    output = Path(cfg.output) if cfg.output else data_root() / "identity_conversations.jsonl"
    writer = Writer(cfg, identity) if cfg.base_url else None
    make: Callable[[int], Made] = writer.make if writer else lambda index: from_templates(index, identity)
    partial = output.with_name(f"{output.name}.partial")
    check_writable(output)  # a model may write for hours
    made = read_partial(partial) if cfg.resume else {}
    todo = [index for index in range(cfg.num) if index not in made]
    failures = []
    with open(partial, "a" if cfg.resume else "w", encoding="utf-8") as file:
        for index, result in run_all(make, todo, cfg.workers if writer else 1):
            if isinstance(result, UserError):
                failures.append(f"conversation {index}: {result}")
                continue
            made[index] = result
            append(file, index, result)
    kept = list(select((made[index] for index in sorted(made) if index < cfg.num), cfg.ascii_only))
    for failure in failures[:3]:
        print(failure)
    if not kept:
        raise UserError(f"no conversation was made; {len(failures)} of {len(todo)} failed")
    with whole_file(output, "w") as file:
        for messages, dimensions in kept:
            line = {"messages": messages, "metadata": dimensions} if cfg.save_metadata else messages
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{len(kept):,} conversations in {output} ({len(made):,} made, {len(failures):,} failed)")
    if writer:
        print(writer.usage.describe(cfg.usd_per_million_in, cfg.usd_per_million_out))
    if failures:
        raise UserError(
            f"{len(failures)} of {len(todo)} requests failed; run again with --resume for the missing ones"
        )
    partial.unlink()


# --- what was made so far ----------------------------------------------------------------------------


def append(file: IO[str], index: int, made: Made) -> None:
    """Add a conversation to the file of an unfinished run, at once."""
    file.write(
        json.dumps({"index": index, "messages": made[0], "metadata": made[1]}, ensure_ascii=False) + "\n"
    )
    file.flush()


def read_partial(path: Path) -> dict[int, Made]:
    """Finished conversations by index; a last line that was cut off is left out."""
    found: dict[int, Made] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["index"]] = (record["messages"], record["metadata"])
    if path.exists():  # without a broken end, which the next line would continue
        with whole_file(path, "w") as file:
            for index, made in found.items():
                append(file, index, made)
    return found


def run_all(
    make: Callable[[int], Made], indices: list[int], workers: int
) -> Iterator[tuple[int, Made | UserError]]:
    """(index, conversation or why there is none) in the order of the indices."""

    def attempt(index: int) -> Made | UserError:
        try:
            return make(index)
        except UserError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        yield from zip(indices, pool.map(attempt, indices), strict=True)


# --- duplicates --------------------------------------------------------------------------------------


def select(conversations: Iterable[Made], ascii_only: bool) -> Iterator[Made]:
    """Conversations that are not nearly the same as an earlier one."""
    kept: list[frozenset] = []
    by_gram: dict[object, list[int]] = {}
    for messages, dimensions in conversations:
        text = " ".join(message["content"] for message in messages)
        if ascii_only and not text.isascii():
            continue
        grams = trigrams(text)
        shared: dict[int, int] = {}
        for gram in grams:
            for other in by_gram.get(gram, ()):
                shared[other] = shared.get(other, 0) + 1
        if any(n / (len(grams) + len(kept[other]) - n) >= SIMILAR for other, n in shared.items()):
            continue
        for gram in grams:
            by_gram.setdefault(gram, []).append(len(kept))
        kept.append(grams)
        yield messages, dimensions


def trigrams(text: str) -> frozenset:
    """Three words in a row; of a shorter text all of it."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


# --- another model -----------------------------------------------------------------------------------


@dataclass
class Usage:
    """Tokens of all answers."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, counts: dict[str, Any]) -> None:
        with self.lock:
            self.prompt_tokens += int(counts.get("prompt_tokens") or 0)
            self.completion_tokens += int(counts.get("completion_tokens") or 0)

    def describe(self, usd_in: float, usd_out: float) -> str:
        text = f"{self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} written tokens"
        usd = (self.prompt_tokens * usd_in + self.completion_tokens * usd_out) / 1e6
        return f"{text}, about ${usd:.2f}" if usd_in or usd_out else text


class Writer:
    """Asks a model for conversations."""

    def __init__(self, cfg: Config, identity: Identity) -> None:
        if not cfg.model:
            raise UserError("--base-url needs --model, the name of the model to ask")
        key = os.environ.get(cfg.api_key_env, "") if cfg.api_key_env else ""
        if cfg.api_key_env and not key:
            raise UserError(f"--api-key-env: the environment variable {cfg.api_key_env} is not set")
        knowledge = Path(cfg.knowledge)
        if not knowledge.is_file():
            raise UserError(f"--knowledge: {knowledge} does not exist")
        self.cfg, self.identity, self.usage = cfg, identity, Usage()
        self.knowledge = knowledge.read_text(encoding="utf-8")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def make(self, index: int) -> Made:
        """One conversation; UserError when the last attempt fails."""
        dimensions = draw_dimensions(index)
        body = {
            "model": self.cfg.model, "temperature": 1.0,
            "messages": [{"role": "user", "content": self.prompt(index, dimensions)}],
            "response_format": {
                "type": "json_schema", "json_schema": {"name": "conversation", "strict": True, "schema": SCHEMA},
            },
        }  # fmt: skip
        return self._ask(body), dimensions

    def prompt(self, index: int, dimensions: dict[str, str]) -> str:
        """What the model is asked to write."""
        example = "\n".join(f"{m['role']}: {m['content']}" for m in from_templates(index, self.identity)[0])
        return (
            f"Write a conversation between a user and the assistant {self.identity.name}.\n\n"
            f"Who the assistant is:\n{self.identity.describe()}\n\nMore about it:\n{self.knowledge}\n\n"
            f"The user: {dimensions['persona']}. The user's opening: {dimensions['opening']}; typing:"
            f" {dimensions['style']}. Talk about: {dimensions['topics']}. Ending: {dimensions['ending']}.\n"
            "Use only facts from above. The assistant fits its depth to the user, is honest about what it cannot do,"
            " corrects wrong assumptions kindly, and is brief. Plain text without emoji. To a user who writes another"
            f" language, the assistant says that English works best.\n\nA short example of the form:\n{example}\n\n"
            'Answer with JSON: {"messages": [{"role": "user", "content": "..."}, ...]}, user and assistant by turns.'
        )

    def _ask(self, body: dict[str, Any]) -> Messages:
        import requests

        reason, pause = "", 1.0
        for attempt in range(self.cfg.attempts):
            if attempt:
                time.sleep(pause)
                pause = min(2 * pause, 60.0)
            try:
                url = f"{self.cfg.base_url.rstrip('/')}/chat/completions"
                response = requests.post(url, json=body, headers=self.headers, timeout=self.cfg.timeout_s)
            except requests.RequestException as error:
                reason = f"{type(error).__name__} at {self.cfg.base_url}"
                continue
            if response.status_code == 429 or response.status_code >= 500:
                reason, pause = f"status {response.status_code}", _retry_after(response.headers, pause)
                continue
            if response.status_code != 200:
                raise UserError(f"{url} answered {response.status_code}: {response.text[:200]}")
            try:
                return self._read(response.json())
            except (
                ValueError,
                LookupError,
                TypeError,
            ) as error:  # a model may write anything; it gets another try
                reason = f"no conversation in the answer: {error}"
        raise UserError(f"{reason}, after {self.cfg.attempts} attempts")

    def _read(self, answer: dict[str, Any]) -> Messages:
        if "choices" not in answer:
            raise RowError(str(answer.get("error", "no choices"))[:200])
        self.usage.add(answer.get("usage") or {})
        text = answer["choices"][0]["message"]["content"]
        # servers that ignore response_format put the object into a fence or behind a sentence
        messages = json.loads(text[text.index("{") : text.rindex("}") + 1])["messages"]
        check_dialogue(messages, "answer")
        if len(messages) % 2 or not all(_has_text(message) for message in messages):
            raise RowError("a message is empty, or the last one is the user's")
        return [{"role": message["role"], "content": message["content"]} for message in messages]


def _has_text(message: dict[str, Any]) -> bool:
    return isinstance(message["content"], str) and bool(message["content"].strip())


def _retry_after(headers: Any, pause: float) -> float:
    """Seconds that the server asks to wait for, at most five minutes; otherwise the pause that is due."""
    value = headers.get("Retry-After", "")
    return min(float(value), 300.0) if re.fullmatch(r"\d+(\.\d+)?", value) else pause


if __name__ == "__main__":
    run(Config, main)
