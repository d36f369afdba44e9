"""The OpenAI-compatible endpoints: models and chat completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanochat.serve.jobs import Choice, Scored
from nanochat.serve.native_api import EVENTS, ServiceOf, score_body
from nanochat.serve.openai_reply import Reply, checked_name, model_names, sampling_params
from nanochat.serve.openai_schemas import ChatCompletionRequest, plain_messages, refuse_unsupported
from nanochat.serve.schemas import stop_strings
from nanochat.serve.service import Service

router = APIRouter(prefix="/v1")


@router.get("/models")
async def list_models(service: ServiceOf) -> dict:
    """The model under each of its names."""
    return {"object": "list", "data": [_model(service, name) for name in model_names(service)]}


@router.get("/models/{model}")
async def get_model(model: str, service: ServiceOf) -> dict:
    """One model; 404 for a name that is not served."""
    return _model(service, checked_name(service, model))


@router.post("/chat/completions", responses=EVENTS)
async def chat_completions(body: ChatCompletionRequest, request: Request, service: ServiceOf) -> Response:
    """Answer a conversation, in one piece or as a stream of chunks."""
    checked_name(service, body.model)
    refuse_unsupported(body)
    wanted = body.max_completion_tokens or body.max_tokens
    prompt = service.prompt(plain_messages(body.messages), None, wanted, policy="error")
    params = sampling_params(service, body, prompt.max_tokens, body.num_logprobs)
    job = service.submit([prompt.tokens], params, stop_strings(body.stop))
    return await _ChatReply(service, job, body).respond(request)


class _ChatReply(Reply):
    """Messages with a role, and log probabilities as a list of tokens."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    id_prefix, endpoint = "chatcmpl", "/v1/chat/completions"

    def choice(self, index: int, choice: Choice, scores: Sequence[Scored]) -> dict:
        message = {
            "role": "assistant",
            "content": choice.decoder.response,
            "refusal": None,
            "nanochat_parts": choice.decoder.parts,
        }
        return {"message": message, "logprobs": self._logprobs(scores, always=True)}

    def opening(self, index: int) -> dict | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def content(self, index: int, text: str, scores: Sequence[Scored]) -> dict:
        delta = {"content": text} if text or scores else {}
        return {"delta": delta, "logprobs": self._logprobs(scores)}

    def _logprobs(self, scores: Sequence[Scored], always: bool = False) -> dict | None:
        assert isinstance(self.body, ChatCompletionRequest)
        if self.body.num_logprobs is None or not (scores or always):
            return None
        return {"content": [score_body(self.service, score) for score in scores], "refusal": None}


def _model(service: Service, name: str) -> dict:
    info = service.replica.info
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": "nanochat",
        "context_length": info.context_length,
        "source": info.source,
        "step": info.step,
    }
