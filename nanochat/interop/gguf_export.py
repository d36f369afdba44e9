"""A classic model as one GGUF file for a llama.cpp build that has the architecture `nanochat`.

Such builds are forks so far. They expect: the tensor names below, matrices as we store them, norms as tensors of
ones, RoPE in halves with a negative angle, QK norm, ReLU^2, and the softcap from the metadata. Everything is
read back and compared before the file appears.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.common import UserError, print0
from nanochat.gpt import GPT, NORM_EPS, GPTConfig
from nanochat.interop.hf_config import is_classic
from nanochat.interop.hf_tokenizer import BOS, END_OF_ANSWER, chat_template
from nanochat.interop.weights import SIZES, fitted
from nanochat.samples import PARAGRAPHS
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer_base import SPLIT_PATTERN
from nanochat.tokenizer_files import tokenizer_json

ARCHITECTURE = "nanochat"
TYPES = ("f32", "f16", "q8_0", "q4_0")
# Nats per token by which the loss on the sample texts may change; small models lose 0.3 by q4_0, large ones less.
ALLOWED = {"f32": 1e-6, "f16": 0.01, "q8_0": 0.05, "q4_0": 0.5}
BLOCK = 32  # weights that share a scale in q8_0 and q4_0
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}  # llama.cpp's numbers for "mostly this type"
_NORMAL, _CONTROL = 1, 3  # kinds of tokens
_NAMES = {
    "attn.c_q": "attn_q", "attn.c_k": "attn_k", "attn.c_v": "attn_v", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_TABLES = {"transformer.wte.weight": "token_embd.weight", "lm_head.weight": "output.weight"}


def export_gguf(model: GPT, tokenizer: RustBPETokenizer, path: Path, kind: str) -> None:
    """Write a model (fp32, on the CPU) with its tokenizer; kind is one of TYPES.

    Raises UserError if the network is not classic, its width does not divide into blocks, its tokenizer splits
    texts in another way than the builds do, the path exists, or the file that was written is not the model.
    """
    config = model.config
    if not is_classic(config):
        raise UserError("only classic models have a GGUF form; llama.cpp has no graph for the modern network")
    if kind in ("q8_0", "q4_0") and config.n_embd % BLOCK:
        raise UserError(f"{kind} needs a width divisible by {BLOCK}; this model has {config.n_embd}")
    if tokenizer.vocabulary.pattern != SPLIT_PATTERN:
        raise UserError("the builds split texts by nanochat's own pattern, and this tokenizer has another")
    path = path.resolve()
    if path.exists():
        raise UserError(f"{path} is already there; name a new file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            part = Path(scratch) / path.name
            _write(part, model, tokenizer, kind)
            _verify(part, model, tokenizer, kind)
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def gguf_name(name: str) -> str:
    """What a tensor of our state dict is called in the file."""
    if name in _TABLES:
        return _TABLES[name]
    layer = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", name)
    if layer is None or layer[2] not in _NAMES:
        raise UserError(f"{name} has no counterpart in GGUF")
    return f"blk.{layer[1]}.{_NAMES[layer[2]]}.weight"


# --- writing -----------------------------------------------------------------------------------------


def _write(path: Path, model: GPT, tokenizer: RustBPETokenizer, kind: str) -> None:
    gguf = _library()
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _add_settings(writer, model.config, kind)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        rows = tensor[: model.config.vocab_size] if name in _TABLES else tensor
        data = rows.float().numpy()
        # the tables decide most about quality and are read one row at a time: 8 bits in the 4-bit form as well
        stored = "q8_0" if kind == "q4_0" and name in _TABLES else kind
        quantized = getattr(gguf.GGMLQuantizationType, stored.upper())
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(data, quantized), raw_dtype=quantized)
    for name, width in _norms(model.config):
        writer.add_tensor(name, np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _norms(config: GPTConfig) -> list[tuple[str, int]]:
    """Norms have no parameters here; the builds multiply by these ones."""
    width, head = config.n_embd, config.head_dim
    layers = [("attn_norm", width), ("attn_q_norm", head), ("attn_k_norm", head), ("ffn_norm", width)]
    names = [(f"blk.{i}.{name}.weight", size) for i in range(config.n_layer) for name, size in layers]
    return [("token_embd_norm.weight", width), *names, ("output_norm.weight", width)]


def _add_settings(writer: Any, config: GPTConfig, kind: str) -> None:
    writer.add_context_length(config.sequence_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_final_logit_softcapping(config.logit_softcap)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(_FILE_TYPES[kind])


def _add_tokenizer(writer: Any, tokenizer: RustBPETokenizer) -> None:
    content = tokenizer_json(tokenizer.vocabulary)
    names = {token: name for name, token in content["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    ids = range(tokenizer.get_vocab_size())
    if missing := [token for token in ids if token not in names and token not in special]:
        raise UserError(f"the vocabulary has no token {missing[0]}; GGUF numbers tokens without gaps")
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(ARCHITECTURE)  # names our split pattern, which no other model uses
    writer.add_token_list([special.get(token) or names[token] for token in ids])
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in ids])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.encode_special(BOS))
    writer.add_eos_token_id(tokenizer.encode_special(END_OF_ANSWER))
    writer.add_add_bos_token(True)
    # the tags that mark an answer for finetuning are transformers' own
    writer.add_chat_template(re.sub(r"\{%-? (end)?generation -?%\}", "", chat_template()))


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF needs the package gguf; run: uv sync --extra gguf") from None
    return gguf


# --- checking ----------------------------------------------------------------------------------------


def read_gguf(path: Path) -> tuple[GPTConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """(configuration, fp32 tensors under our names, all metadata) of a file that export_gguf wrote."""
    gguf = _library()
    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}

    def setting(name: str) -> Any:
        return meta[f"{ARCHITECTURE}.{name}"]

    config = GPTConfig.classic(
        sequence_len=setting("context_length"), vocab_size=setting("vocab_size"), n_layer=setting("block_count"),
        n_head=setting("attention.head_count"), n_kv_head=setting("attention.head_count_kv"),
        n_embd=setting("embedding_length"), rope_base=setting("rope.freq_base"),
        logit_softcap=setting("final_logit_softcapping"),
    )  # fmt: skip
    norms = {name for name, _ in _norms(config)}
    found = {
        tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
        if tensor.name not in norms
    }
    return config, fitted(found, config, gguf_name), meta


@torch.inference_mode()
def _verify(path: Path, model: GPT, tokenizer: RustBPETokenizer, kind: str) -> None:
    """Compute with what the file holds. Raises UserError if that is not the model, up to the loss of its type."""
    config, state, _ = read_gguf(path)
    names = (*SIZES, "rope_base", "logit_softcap")
    if wrong := [name for name in names if getattr(config, name) != getattr(model.config, name)]:
        raise UserError(f"the file has another {', '.join(wrong)} than the model")
    again, texts = GPT.build(config, "cpu", torch.float32), _texts(model, tokenizer)
    again.load_state_dict(state)
    if kind == "f32" and not all(torch.equal(again(ids), model(ids)) for ids in texts):
        raise UserError("the file's weights are not the model's")
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(f"{broken[0]} holds weights that {kind} cannot express")
    before, after = (mean_loss(network, texts) for network in (model, again))
    if not abs(after - before) <= ALLOWED[kind]:
        raise UserError(
            f"as {kind} the loss on sample texts is {after:.4f} instead of {before:.4f} (allowed change:"
            f" {ALLOWED[kind]}); choose a type with more bits"
        )
    print0(f"verified: loss on sample texts {before:.4f} before, {after:.4f} as {kind}")


def _texts(model: GPT, tokenizer: RustBPETokenizer) -> list[torch.Tensor]:
    rows = (tokenizer.encode(text, prepend=BOS) for text in PARAGRAPHS)
    return [torch.tensor([row[: model.config.sequence_len]]) for row in rows]


def mean_loss(model: GPT, rows: list[torch.Tensor]) -> float:
    """Mean loss in nats per token of some rows (1, T)."""
    losses = [model(row[:, :-1], row[:, 1:], loss_reduction="none") for row in rows]
    return torch.cat(losses).mean().item()
