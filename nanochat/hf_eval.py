"""A Hugging Face causal language model behind the interface that our evaluations use."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.common import UserError, read_json
from nanochat.tokenizer_hf import HuggingFaceTokenizer

_LOGIT_BYTES = 2**30  # of fp32 logits at once; the loss makes as much again


class HuggingFaceModel:
    """Logits or losses of a `transformers` model. max_seq_len is None where nothing limits it."""

    def __init__(self, model: torch.nn.Module, max_seq_len: int | None) -> None:
        self.model, self.max_seq_len = model, max_seq_len

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device) -> HuggingFaceModel:
        """Load a model of the hub or of a local folder. Raises UserError, also if it needs code of its own."""
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise UserError("--hf-path needs the package transformers; run: uv sync --extra hf") from None
        try:
            model: Any = _class_for(path, AutoModelForCausalLM).from_pretrained(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot load the model {path}: {str(error).splitlines()[0]} "
                "(without network: a folder of the model; behind a mirror: HF_ENDPOINT)"
            ) from None
        context = getattr(model.config, "max_position_embeddings", None)
        return cls(cast(torch.nn.Module, model).to(device).eval(), context)

    def get_device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def __call__(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, loss_reduction: str = "mean"
    ) -> torch.Tensor:
        """Logits (B, T, V), or the loss at targets (B, T) with -1 ignored; the loss of each only a few rows at a time."""
        if targets is None:
            return self.model(idx).logits
        if loss_reduction == "none" and len(idx) > 1:
            vocab_size = cast(Any, self.model).get_output_embeddings().weight.size(0)
            rows = max(_LOGIT_BYTES // (4 * idx.size(1) * vocab_size), 1)
            parts = zip(idx.split(rows), targets.split(rows), strict=True)
            return torch.cat([self._losses(*part, loss_reduction) for part in parts])
        return self._losses(idx, targets, loss_reduction)

    def _losses(self, idx: torch.Tensor, targets: torch.Tensor, loss_reduction: str) -> torch.Tensor:
        flat = self.model(idx).logits.float().flatten(0, 1)
        return F.cross_entropy(flat, targets.flatten(), ignore_index=-1, reduction=loss_reduction)


def _class_for(path: str, otherwise: Any) -> Any:
    """The class that loads a model: ours for our exports, so that no code of a folder is run."""
    from nanochat.interop.hf_config import MODERN_TYPE

    config = Path(path, "config.json")
    if not config.is_file() or read_json(config).get("model_type") != MODERN_TYPE:
        return otherwise
    from nanochat.interop.modeling_nanochat_modern import NanoChatModernForCausalLM

    return NanoChatModernForCausalLM


class DocumentEncoder:
    """A Hugging Face tokenizer as the pretraining loader wants it."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self.tokenizer = tokenizer

    def get_bos_token_id(self) -> int:
        return self.tokenizer.get_bos_token_id()

    def encode_arrays(self, texts: list[str], prepend: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.tokenizer.encode(texts, prepend=prepend)
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return np.concatenate([np.array(row, dtype=np.int64) for row in rows]), offsets


def token_bytes(tokenizer: HuggingFaceTokenizer) -> torch.Tensor:
    """int32 (vocabulary,): bytes of text of each token of a byte-level vocabulary, 0 for special tokens."""
    special = {tokenizer.encode_special(text) for text in tokenizer.get_special_tokens()}
    lengths = [
        0 if token in special else len(tokenizer.decode_single_token_bytes(token))
        for token in range(tokenizer.get_vocab_size())
    ]
    return torch.tensor(lengths, dtype=torch.int32)
