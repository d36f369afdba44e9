"""What the tests of the server share: a model that answers by script, and a real server over it.

The script is only the network: tokenizer, engine, KV cache, the model's process, HTTP and browser are real.
That process is forked here, where the program starts a fresh interpreter: it has torch at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import httpx
import torch
import uvicorn

from nanochat.engine import Engine
from nanochat.kv_cache import KVCache
from nanochat.serve.app import create_app
from nanochat.serve.launcher import Launcher, ModelProcess
from nanochat.serve.pool import WorkerPool
from nanochat.serve.settings import Defaults, ModelInfo, Replica, Settings
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer, Vocabulary
from nanochat.tokenizer_base import SPLIT_PATTERN

# Answers a conversation given as its user messages; special tokens may be written out.
Script = Callable[[list[str]], str]

CONTEXT = 512


def byte_tokenizer() -> RustBPETokenizer:
    """One token per byte, so that every character outside ASCII is cut by token borders."""
    ranks = {bytes([value]): value for value in range(256)}
    special = {name: 256 + index for index, name in enumerate(SPECIAL_TOKENS)}
    return RustBPETokenizer(Vocabulary(ranks, SPLIT_PATTERN, special))


def encode_marked(tokenizer: RustBPETokenizer, text: str) -> list[int]:
    """Encode text in which special tokens are written out."""
    ids: list[int] = []
    while text:
        at, name = min((text.find(name) % (len(text) + 1), name) for name in SPECIAL_TOKENS)
        ids += tokenizer.encode(text[:at])
        if at < len(text):
            ids.append(tokenizer.encode_special(name))
        text = text[at + len(name) :]
    return ids


class Controls:
    """What a test sets and reads while the model works in its own process: memory that both share.

    pause_s: seconds that each step sleeps. steps: how many there were. fail_next: the next one raises.
    """

    def __init__(self) -> None:
        self._values = multiprocessing.get_context("fork").RawArray("d", 3)

    pause_s = property(lambda self: self._values[0], lambda self, value: self._set(0, value))
    steps = property(lambda self: int(self._values[1]), lambda self, value: self._set(1, value))
    fail_next = property(lambda self: bool(self._values[2]), lambda self, value: self._set(2, value))

    def _set(self, index: int, value: float) -> None:
        self._values[index] = value


class ScriptedModel(torch.nn.Module):
    """A network whose next token follows a script; it reads the conversation from its own KV cache.

    The script's token has probability about 0.7, the token after it in the vocabulary most of the rest.
    """

    compute_dtype = torch.float32

    def __init__(self, tokenizer: RustBPETokenizer, script: Script, context: int = CONTEXT) -> None:
        super().__init__()
        self.tokenizer, self.script, self.controls = tokenizer, script, Controls()
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.config = SimpleNamespace(
            sequence_len=context,
            vocab_size=tokenizer.get_vocab_size(),
            n_layer=1,
            n_head=1,
            n_kv_head=1,
            n_embd=1,
            head_dim=1,
            use_smear=False,
            window_sizes=[context],
        )

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def forward(
        self,
        ids: torch.Tensor,
        kv_cache: KVCache,
        lengths: Sequence[int] | None = None,
        last_only: bool = True,
    ) -> torch.Tensor:
        """Logits (B, 1, V)."""
        assert last_only
        if self.controls.fail_next:
            self.controls.fail_next = False
            raise RuntimeError("scripted failure")
        time.sleep(self.controls.pause_s)
        self.controls.steps += 1
        chunk = kv_cache.begin(ids.size(1), lengths)
        kv_cache.insert(0, chunk, ids[:, :, None, None].float(), ids[:, :, None, None].float())
        keys, _ = kv_cache.visible(0, chunk)
        kv_cache.advance(chunk.lengths)
        logits = torch.full((ids.size(0), 1, self.config.vocab_size), -12.0)
        for row, filled in enumerate(kv_cache.positions):
            token = self._next([int(value) for value in keys[row, :filled, 0, 0].tolist()])
            logits[row, 0, token], logits[row, 0, (token + 1) % self.config.vocab_size] = 2.0, 1.0
        return logits

    def _next(self, history: list[int]) -> int:
        start = self.tokenizer.encode_special("<|assistant_start|>")
        if start not in history:
            return self._next_raw(history)
        turn = len(history) - history[::-1].index(start)
        before = tuple(history[:turn])
        if before not in self.answers:
            text = self.script(self._questions(history[:turn]))
            self.answers[before] = encode_marked(self.tokenizer, text)
        answer = self.answers[before]
        done = len(history) - turn
        return answer[done] if done < len(answer) else self.tokenizer.encode_special("<|assistant_end|>")

    def _next_raw(self, history: list[int]) -> int:
        """Text without markers and without an r is continued by "raw:" and itself; "tool" by a tool call."""
        text = self.tokenizer.decode(history).removeprefix("<|bos|>")
        prompt = "tool" if text.startswith("tool") else text.partition("r")[0]
        written = "<|python_start|>1+1<|python_end|>" if prompt == "tool" else f"raw:{prompt}"
        answer = encode_marked(self.tokenizer, written)
        done = len(history) - 1 - len(self.tokenizer.encode(prompt))
        return answer[done] if done < len(answer) else self.tokenizer.encode_special("<|assistant_end|>")

    def _questions(self, ids: list[int]) -> list[str]:
        text = self.tokenizer.decode(ids)
        return [part.split("<|user_end|>")[0] for part in text.split("<|user_start|>")[1:]]


def scripted_replica(
    script: Script, tokenizer: RustBPETokenizer | None = None, context: int = CONTEXT, max_batch: int = 32
) -> Replica:
    """A replica over a scripted model."""
    tokenizer = tokenizer or byte_tokenizer()
    model = ScriptedModel(tokenizer, script, context)
    info = ModelInfo("nanochat-test", "sft", "test", 7, 1_700_000_000, context, "cpu", "float32")
    return Replica(Engine(model, tokenizer, max_batch=max_batch), tokenizer, info)  # pyright: ignore


class ForkedLauncher(Launcher):
    """Forks the models' processes, without the connections that a fresh interpreter would not inherit either."""

    def __init__(self, load: Callable[[int], Replica], count: int) -> None:
        self.inherited: list[int] = []
        super().__init__(lambda index: self._load_clean(load, index), count, "fork")

    def _launch(self, index: int) -> ModelProcess:
        self.inherited = [int(name) for name in os.listdir("/dev/fd")]
        return super()._launch(index)

    def _load_clean(self, load: Callable[[int], Replica], index: int) -> Replica:
        for number in self.inherited:
            with suppress(OSError):
                mode = os.fstat(number).st_mode
                if number > 2 and (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)):
                    os.close(number)
        return load(index)


class Served:
    """A running server. model controls the scripted model."""

    def __init__(self, url: str, pool: WorkerPool, model: Controls) -> None:
        self.url, self.pool, self.model = url, pool, model
        self.http = httpx.Client(base_url=url, timeout=120)

    def signal(self, number: signal.Signals, worker: int = 0) -> None:
        """Send a signal to the process of a worker's model."""
        process = self.pool.workers[worker]._process
        assert process is not None and process.process.pid is not None
        os.kill(process.process.pid, number)


@contextmanager
def served(
    load: Callable[[int], Replica],
    settings: Settings | None = None,
    num_workers: int = 1,
    pause_s: float = 0.0,
) -> Iterator[Served]:
    """Run the application under uvicorn in a thread, on a free port, over scripted models that load() makes."""
    settings, controls = settings or Settings(), Controls()
    controls.pause_s = pause_s

    def load_controlled(index: int) -> Replica:
        replica = load(index)
        replica.engine.model.controls = controls  # pyright: ignore
        return replica

    pool = WorkerPool(ForkedLauncher(load_controlled, num_workers), settings)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # a slow reader shall be felt
    config = uvicorn.Config(
        create_app(settings, pool), log_level="warning", ws_max_size=1 << 16, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server_handle = Served(url, pool, controls)
    try:
        wait_for(lambda: server.started and pool.ready)
        yield server_handle
    finally:
        server_handle.http.close()
        server.should_exit = True
        thread.join(10)
        listener.close()


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait until a condition holds; fails the test if it does not in time (a busy machine takes its time)."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# --- the model's part, and how tests talk to it -----------------------------------------------------------

TOOL_ANSWER = "27 + 58 = <|python_start|>27+58<|python_end|><|output_start|>85<|output_end|>85."
GREEDY = Defaults(temperature=0.0)


def script(questions: list[str]) -> str:
    """The model's part: echo, count, calculate, talk endlessly."""
    last = questions[-1]
    if last == "sum":
        return TOOL_ANSWER
    if last == "emoji":
        return "\u00e4\u6f22\U0001f600!"
    if last == "empty":
        return ""
    if last == "long":
        return "word " * 200
    if last == "special":
        return "a<|user_end|>b"
    return f"{len(questions)}:{last}"


def events(server: Served, **body) -> list[dict]:
    """The events of POST /chat/completions as upstream's page reads them."""
    response = server.http.post("/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def idle(server: Served) -> bool:
    return all(worker.num_running == 0 for worker in server.pool.workers) and not len(server.pool.queue)
