"""Our models as a subject of EleutherAI's lm-evaluation-harness (package lm-eval, optional extra `harness`).

Scoring goes through the batches of our own evaluation, generation through the engine, so that both judge the
same model in the same way. This module imports lm-eval; scripts.harness_eval imports it where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nanochat.answer_parts import PartsDecoder
from nanochat.common import UserError, print0
from nanochat.core_eval import truncated
from nanochat.core_scoring import Scored, score_sequences
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.interop.hf_tokenizer import BOS, END_OF_ANSWER
from nanochat.sampling import SamplingParams
from nanochat.tokenizer import RustBPETokenizer

DEFAULT_MAX_TOKENS = 256  # the harness's own default
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class NanochatLM(TemplateLM):
    """A model for `lm_eval.simple_evaluate(model=NanochatLM(model, tokenizer), tasks=...)`."""

    def __init__(self, model: GPT, tokenizer: RustBPETokenizer) -> None:
        super().__init__()
        self.gpt, self.vocabulary = model, tokenizer
        self.engine = Engine(model, tokenizer)
        specials = sorted(tokenizer.get_special_tokens(), key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, specials))})")

    # --- text ----------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.encode_special(END_OF_ANSWER)

    @property
    def prefix_token_id(self) -> int:
        return self.vocabulary.get_bos_token_id()

    @property
    def max_length(self) -> int:
        return self.gpt.config.sequence_len

    @property
    def tokenizer_name(self) -> str:
        return "nanochat"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Ids of a text, after BOS unless add_special_tokens is False.

        A text that starts with BOS was rendered by apply_chat_template: there, and only there, the strings of
        special tokens are those tokens.
        """
        if string.startswith(BOS):
            pieces = [piece for piece in self._specials.split(string) if piece]
            encoded = [
                [self.vocabulary.encode_special(piece)]
                if self._specials.fullmatch(piece)
                else self.vocabulary.encode(piece)
                for piece in pieces
            ]
            return [token for ids in encoded for token in ids]
        return self.vocabulary.encode(
            string, prepend=None if add_special_tokens is False else self.prefix_token_id
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """A name for the harness's cache of requests; apply_chat_template renders."""
        return "nanochat"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Text of a conversation that asks for the next answer, or that continues the last one."""
        open_answer = {"role": "assistant", "content": ""}
        messages = [*chat_history, open_answer] if add_generation_prompt else chat_history
        ids, _ = self.vocabulary.render_conversation({"messages": messages}, None)
        return self.vocabulary.decode(ids[:-1])  # without <|assistant_end|>

    # --- scoring -------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy) of each continuation given its context."""
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context that do not overlap in what they score."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            # one less than the context, because a window is scored together with the token after it
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1):
                windows.append(make_disjoint_window(pair))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._score(windows), strict=True):
            totals[number] += logprob
        return totals

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        rows = []
        for context, continuation in pairs:
            tokens = [*context, *continuation]
            # a continuation that merged into the context's last token is scored as that token
            start = min(len(context), len(tokens) - 1)
            rows.append(truncated(Scored(tokens, start, len(tokens)), self.max_length))
        bos, vocab_size = self.prefix_token_id, self.vocabulary.get_vocab_size()
        scores = score_sequences(self.gpt, rows, bos, vocab_size, self.gpt.get_device())
        return [
            (-score.loss * (row.end - row.start), score.is_greedy)
            for row, score in zip(rows, scores, strict=True)
        ]

    # --- generating ----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, all running as one continuous batch."""
        running: dict[Request, PartsDecoder] = {}
        decoders, num_cut, num_limited = [], 0, 0
        for number, request in enumerate(requests):
            context, options = cast(tuple[str, dict[str, Any]], request.args)
            params, stop = self._sampling(options, seed=number)  # so that repeated questions differ
            whole, wanted = self.tok_encode(context), params.max_tokens or 0
            # an answer as long as the context would leave nothing of the question: it gets half at most for that
            room = self.max_length - min(wanted, self.max_length // 2)
            prompt = whole[:1] + whole[1:][-(room - 1) :]  # keep BOS and the end of the question
            limit = min(wanted, self.max_length - len(prompt))
            num_cut, num_limited = num_cut + (len(prompt) < len(whole)), num_limited + (limit < wanted)
            decoders.append(PartsDecoder(self.vocabulary, stop=stop))
            running[self.engine.submit(prompt, replace(params, max_tokens=limit))] = decoders[-1]
        if num_cut or num_limited:
            print0(
                f"context of {self.max_length} tokens: {num_cut} of {len(requests)} questions lost their beginning,"
                f" {num_limited} answers may be shorter than their task allows"
            )
        while running:
            for event in self.engine.step():
                decoder = running.get(event.request)
                if decoder is None:  # cancelled while this step ran
                    continue
                if event.token is not None and not event.is_terminal:
                    decoder.push(event.token)
                if decoder.stopped or event.finish_reason is not None:
                    decoder.flush()
                    self.engine.cancel(event.request)
                    del running[event.request]
        self.engine.prefixes.clear()  # scoring may want the memory
        self.engine.prefixes.pool.shrink()
        return [decoder.response for decoder in decoders]

    def _sampling(self, options: dict[str, Any], seed: int) -> tuple[SamplingParams, tuple[str, ...]]:
        options = dict(normalize_gen_kwargs(options, DEFAULT_MAX_TOKENS))
        if unknown := set(options) - _GENERATION_KEYS:
            raise UserError(
                f"generation settings {sorted(unknown)} are not supported; there are {sorted(_GENERATION_KEYS)}"
            )
        temperature = float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0
        params = SamplingParams(
            temperature=temperature, top_k=options.get("top_k"), top_p=float(options.get("top_p") or 1.0),
            max_tokens=options["max_gen_toks"], seed=seed,
        )  # fmt: skip
        return params, tuple(text for text in options["until"] if text)
