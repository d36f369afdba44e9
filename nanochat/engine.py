"""Generation with a key/value cache and tools: one request, many samples, many prompts, or a server's stream.

    engine = Engine(model, tokenizer)
    for token_column, mask_column in engine.generate(prompt, num_samples=4, max_tokens=100): ...
    completions = engine.complete_many(prompts, SamplingParams(temperature=0, max_tokens=64))
    request = engine.submit(prompt, SamplingParams()); events = engine.step()

All of them run on the scheduler's continuous batch. `python -m nanochat.engine` checks a checkpoint's cached
generation against the plain one.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nanochat.calculator import ToolFormat, use_calculator
from nanochat.configurator import option, run
from nanochat.gpt import GPT
from nanochat.kv_cache import ContextOverflow
from nanochat.options import STAGES, WhichModel
from nanochat.page_pool import PagePool
from nanochat.prefix_store import PrefixStore
from nanochat.requests import Event, Request, Tool, ToolBox
from nanochat.sampling import SamplingParams
from nanochat.scheduler import Scheduler
from nanochat.tokenizer_base import Tokenizer

__all__ = ["Completion", "ContextOverflow", "Engine", "Event", "Request", "SamplingParams"]

MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class Completion:
    """What was generated for a prompt, the prompt not included. masks: 1 = sampled, 0 = forced by a tool.

    ended_by_token says that the last token is the one that ended it (<|assistant_end|>, <|bos|> or a stop
    token): a training target, but not text; `content` is the tokens without it.
    """

    tokens: list[int]
    masks: list[int]
    finish_reason: str
    ended_by_token: bool
    tool_calls: int

    @property
    def content(self) -> list[int]:
        """The tokens that are the answer."""
        return self.tokens[:-1] if self.ended_by_token else self.tokens


class Engine:
    """A model, a tokenizer and tools. tools maps "python" to a function from expression to text or None.

    tool_format is how the calculator writes numbers. The default "gsm8k" prints 10 for 0.2*50 as the training
    data does; "python" prints 10.0. max_batch is how many requests run at the same time. cache_bytes bounds keys and
    values, half of them may be remembered beginnings; complete_many has as many for itself. chunk_tokens bounds what
    is read at once.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        tools: Mapping[str, Tool] | None = None,
        *,
        tool_format: ToolFormat = "gsm8k",
        max_batch: int = MAX_BATCH,
        cache_bytes: int | None = None,
        chunk_tokens: int | None = None,
        speculate: int = 0,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be at least 1")
        if tools is None:
            tools = {"python": functools.partial(use_calculator, tool_format=tool_format)}
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.toolbox = ToolBox(tokenizer, tools)
        self.cache_bytes, self.chunk_tokens, self.speculate = cache_bytes, chunk_tokens, speculate
        self.prefixes = self._prefix_store()  # of streams and conversations
        self._shared = self._scheduler(max_batch, self.prefixes)
        if speculate and self._shared.run_ahead:
            logging.getLogger(__name__).warning(
                "speculate=%d is left out: this GPU decodes faster without", speculate
            )

    def _prefix_store(self) -> PrefixStore:
        return PrefixStore(PagePool(self.model, self.cache_bytes, self.chunk_tokens))

    def _scheduler(self, max_batch: int, prefixes: PrefixStore) -> Scheduler:
        return Scheduler(self.model, self.toolbox, max_batch, prefixes, self.speculate)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of the stream's requests and of remembered beginnings."""
        return self.prefixes.pool.nbytes

    @property
    def attention(self) -> str:
        """What computes the attention of prompts and of decoding, for the log."""
        return self._shared.cache.describe_attention()

    def prompt_room(self, max_new_tokens: int) -> int:
        """Tokens that a prompt may have if an answer is to follow; at least half the trained context."""
        context = self.model.config.sequence_len
        return max(context - max_new_tokens, context // 2)

    # --- a stream of requests ------------------------------------------------------------------------

    def submit(self, tokens: Sequence[int], params: SamplingParams) -> Request:
        """Queue a request; its tokens come as events of later steps.

        Raises ValueError for an empty or invalid prompt, ContextOverflow for one beyond the rotary table.
        """
        return self._shared.submit(tokens, params)

    def step(self) -> list[Event]:
        """Add one token to every ready request and read a chunk of new prompts, after letting waiting ones in."""
        return self._shared.step()

    def cancel(self, request: Request) -> None:
        """End a request and free its memory; no event follows."""
        self._shared.cancel(request)

    # --- one prompt ----------------------------------------------------------------------------------

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = 42,
        should_stop: Callable[[], bool] | None = None,
        **sampling,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (token column, mask column), one entry per sample, until all samples ended.

        The token that ends a sample is in its column; later columns hold <|assistant_end|>, mask 0, for it.
        sampling: further fields of SamplingParams. should_stop is asked before each column. Samples of one
        seed use its streams 0, 1, ...: sample i is the same for every num_samples > i.
        """
        params = SamplingParams(temperature, top_k, max_tokens, seed, **sampling)
        scheduler, requests = self._start(tokens, num_samples, params)
        return self._columns(scheduler, requests, should_stop)

    def _start(
        self, tokens: Sequence[int], num_samples: int, params: SamplingParams
    ) -> tuple[Scheduler, list[Request]]:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        scheduler = self._scheduler(max(num_samples, self.max_batch), self.prefixes)
        requests = [scheduler.submit(tokens, params, stream) for stream in range(num_samples)]
        return scheduler, requests

    def _columns(
        self, scheduler: Scheduler, requests: list[Request], should_stop: Callable[[], bool] | None
    ) -> Iterator[tuple[list[int], list[int]]]:
        try:
            yield from self._merged(scheduler, requests, should_stop)
        finally:  # whoever stops early leaves nothing in the pool
            if not sys.is_finalizing():  # torch may be gone by then
                for request in requests:
                    scheduler.cancel(request)

    def _merged(
        self, scheduler: Scheduler, requests: list[Request], should_stop: Callable[[], bool] | None
    ) -> Iterator[tuple[list[int], list[int]]]:
        pending = {request: deque[tuple[int, int]]() for request in requests}
        ended = (self.toolbox.assistant_end, 0)
        while any(queue or not request.finish_reason for request, queue in pending.items()):
            if should_stop and should_stop():
                return
            # Samples are not always in step: memory may be too small for all of them at once.
            while not all(queue or request.finish_reason for request, queue in pending.items()):
                for event in scheduler.step():
                    if event.token is not None:
                        pending[event.request].append((event.token, int(event.is_sampled)))
            if not any(pending.values()):  # there was no room for a single token
                return
            column = [queue.popleft() if queue else ended for queue in pending.values()]
            yield [token for token, _ in column], [mask for _, mask in column]

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, **options
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Prompt and answer ids of each sample, and their masks (0 in the prompt); options as in generate.

        Tokens that end a sample are left out, those of tools are included.
        """
        prompt = list(tokens)
        results = [list(prompt) for _ in range(num_samples)]
        masks = [[0] * len(prompt) for _ in range(num_samples)]
        stops = self.toolbox.terminals | options.get("stop_tokens", frozenset())
        ended = [False] * num_samples
        for token_column, mask_column in self.generate(tokens, num_samples, **options):
            for row, (token, mask) in enumerate(zip(token_column, mask_column, strict=True)):
                ended[row] = ended[row] or token in stops
                if not ended[row]:
                    results[row].append(token)
                    masks[row].append(mask)
        return results, masks

    # --- many prompts --------------------------------------------------------------------------------

    def complete_many(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete every prompt, up to max_batch at a time, results in the order of the prompts.

        One SamplingParams for all: prompt i uses stream i of its seed, so that equal prompts differ.
        Prompts of similar length run together, equal ones are read in once.
        """
        shared = isinstance(params, SamplingParams)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} sampling parameters for {len(prompts)} prompts")
        scheduler = self._scheduler(self.max_batch, self._prefix_store())
        requests: dict[int, Request] = {}
        for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i]))):
            requests[i] = scheduler.submit(prompts[i], each[i], stream=i if shared else 0)
        while not scheduler.is_idle:
            scheduler.step()
        if scheduler.run_ahead:
            del scheduler
            torch.cuda.empty_cache()  # torch keeps the memory of recorded steps, but nothing else could use it
        return [_completion(requests[i]) for i in range(len(prompts))]


def _completion(request: Request) -> Completion:
    assert request.finish_reason is not None
    return Completion(
        request.tokens, request.masks, request.finish_reason, request.ended_by_token, request.tool_calls
    )


# --- self-check --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(WhichModel):
    """Options of the self-check."""

    source: str = option("base", "checkpoint family", short="i", choices=STAGES)
    prompt: str = option("The chemical formula of water is", "text to continue")
    max_tokens: int = option(64, "tokens to generate", least=1)


def main(cfg: Config) -> None:
    """Check that the engine's greedy tokens equal those of the plain, cacheless generation.

    In fp32: the two round differently, and in bf16 the best two tokens of a healthy model are often that close.
    """
    import time

    import torch

    from nanochat.checkpoint_manager import load_model
    from nanochat.common import autodetect_device_type, check_device, synchronize

    device = check_device(cfg.device_type or autodetect_device_type())
    model, tokenizer, _ = load_model(
        cfg.source, device, "eval", model_tag=cfg.model_tag, step=cfg.step, dtype=torch.float32
    )
    engine = Engine(model, tokenizer, tools={})
    prompt = tokenizer.encode(cfg.prompt, prepend=tokenizer.get_bos_token_id())

    def timed(name: str, produce: Callable[[], list[int]]) -> list[int]:
        synchronize(device)
        begun = time.perf_counter()
        tokens = produce()
        synchronize(device)
        print(tokenizer.decode(tokens))
        print(f"{name} time: {time.perf_counter() - begun:.2f}s")
        return tokens

    found = timed("Engine", lambda: _greedy(engine, prompt, cfg.max_tokens))
    reference = timed("Reference", lambda: list(model.generate(prompt, len(found), temperature=0)))
    mismatch = next((i for i, (a, b) in enumerate(zip(reference, found, strict=True)) if a != b), None)
    if mismatch is not None:
        print(f"Mismatch at token {mismatch}: {reference[mismatch]} != {found[mismatch]}")
    print(f"Match: {mismatch is None}")
    sys.exit(0 if mismatch is None else 1)


def _greedy(engine: Engine, prompt: list[int], max_tokens: int) -> list[int]:
    return [column[0] for column, _ in engine.generate(prompt, max_tokens=max_tokens, temperature=0)]


if __name__ == "__main__":
    run(Config, main)
