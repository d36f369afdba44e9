"""POST /v1/completions: text continued as it stands, without the markers of a conversation and without tools."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanochat.serve.errors import ApiError
from nanochat.serve.jobs import Choice, Job, Scored
from nanochat.serve.native_api import EVENTS, ServiceOf, score_body
from nanochat.serve.openai_reply import Reply, checked_name, sampling_params
from nanochat.serve.openai_schemas import TextCompletionRequest, refuse_unsupported_text
from nanochat.serve.schemas import stop_strings
from nanochat.serve.service import Service
from nanochat.tokenizer import RustBPETokenizer

router = APIRouter(prefix="/v1")
DEFAULT_MAX_TOKENS = 16  # the API's
NEVER = -100.0


@router.post("/completions", responses=EVENTS)
async def completions(body: TextCompletionRequest, request: Request, service: ServiceOf) -> Response:
    """Continue one or several prompts, in one piece or as a stream of chunks."""
    checked_name(service, body.model)
    refuse_unsupported_text(body)
    service.check_ready()
    tokenizer, limits = service.replica.tokenizer, service.settings.limits
    prompts = _prompts(tokenizer, body.prompt)
    if len(prompts) * body.num_choices > limits.max_choices:
        text = (
            f"{len(prompts)} prompts with n={body.num_choices}: at most {limits.max_choices} answers at once"
        )
        raise ApiError(400, "invalid_value", text, param="prompt")
    room = service.replica.info.context_length - max(map(len, prompts))
    if room < 1:
        text = f"the prompt has {max(map(len, prompts))} tokens, the context of the model {service.replica.info.context_length}"
        raise ApiError(400, "context_length_exceeded", text, param="prompt")
    # Without these tokens there is no tool call, and every token that is sampled is text.
    markers = ("<|python_start|>", "<|output_start|>")
    no_tools = {tokenizer.encode_special(name): NEVER for name in markers}
    sampling = body.model_copy(update={"logit_bias": {**(body.logit_bias or {}), **no_tools}})
    max_tokens = min(body.max_tokens or DEFAULT_MAX_TOKENS, room)
    params = sampling_params(service, sampling, max_tokens, body.logprobs, len(prompts))
    job = service.submit(prompts, params, stop_strings(body.stop))
    return await _TextReply(service, job, body).respond(request)


def _prompts(
    tokenizer: RustBPETokenizer, prompt: str | list[str] | list[int] | list[list[int]]
) -> list[list[int]]:
    """The ids of each prompt: text behind <|bos|>, ids as they are. Raises ApiError 400."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompts: list = [prompt]
    else:
        prompts = list(prompt)
    bos = tokenizer.get_bos_token_id()
    ids = [[bos, *tokenizer.encode(one)] if isinstance(one, str) else list(one) for one in prompts]
    if not ids or not all(ids):
        raise ApiError(400, "invalid_value", "a prompt has no tokens", param="prompt")
    size = tokenizer.get_vocab_size()
    wrong = next((token for one in ids for token in one if not 0 <= token < size), None)
    if wrong is not None:
        raise ApiError(400, "invalid_value", f"token {wrong} is not below {size}", param="prompt")
    return ids


class _TextReply(Reply):
    """Bare text, and log probabilities as parallel lists."""

    kind = chunk_kind = "text_completion"
    id_prefix, endpoint = "cmpl", "/v1/completions"

    def __init__(self, service: Service, job: Job, body: TextCompletionRequest) -> None:
        super().__init__(service, job, body)
        self._echo, self._wants_scores = bool(body.echo), body.logprobs is not None
        self._offsets = [_Offsets() for _ in job.choices]

    def choice(self, index: int, choice: Choice, scores: Sequence[Scored]) -> dict:
        return {
            "text": self._echoed(index) + choice.decoder.response,
            "logprobs": self._logprobs(index, scores),
        }

    def opening(self, index: int) -> dict | None:
        return {"text": self._echoed(index), "logprobs": None} if self._echo else None

    def content(self, index: int, text: str, scores: Sequence[Scored]) -> dict:
        return {"text": text, "logprobs": self._logprobs(index, scores) if scores else None}

    def _echoed(self, index: int) -> str:
        if not self._echo:
            return ""
        tokenizer, prompt = self.service.replica.tokenizer, self.job.prompt_of(index)
        return tokenizer.decode(prompt[1:] if prompt[0] == tokenizer.get_bos_token_id() else prompt)

    def _logprobs(self, index: int, scores: Sequence[Scored]) -> dict | None:
        if not self._wants_scores:
            return None
        bodies = [score_body(self.service, score) for score in scores]
        return {
            "tokens": [body["token"] for body in bodies],
            "token_logprobs": [body["logprob"] for body in bodies],
            "top_logprobs": [
                {one["token"]: one["logprob"] for one in [*body["top_logprobs"], body]} for body in bodies
            ],
            "text_offset": [self._offsets[index].next(bytes(body["bytes"])) for body in bodies],
        }


class _Offsets:
    """Where in the generated text each token begins, in characters. A character may take several tokens."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def next(self, raw: bytes) -> int:
        begin = self._at
        self._at += len(self._decoder.decode(raw))
        return begin
