"""GGUF files hold the model, as the package gguf reads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.interop.gguf_export import ALLOWED, export_gguf, mean_loss, read_gguf
from nanochat.samples import PARAGRAPHS
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from tests.toy_export import CLASSIC, VOCAB_SIZE, tokenizer, toy_model, trained

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_seeded_thread")


def reread(path) -> GPT:
    config, state, _ = read_gguf(path)
    model = GPT.build(config, "cpu", torch.float32)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", CLASSIC)
def test_f32_is_exact(name, tmp_path):
    model = toy_model(name)
    export_gguf(model, tokenizer(), tmp_path / "model.gguf", "f32")
    ids = torch.arange(100)[None]
    assert torch.equal(reread(tmp_path / "model.gguf")(ids), model(ids))
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("kind", "bits", "nats"), [("f16", 16, 1e-3), ("q8_0", 8.5, 0.02), ("q4_0", 4.5, 0.3)]
)
def test_quantized_forms_are_small_and_close(kind, bits, nats, tmp_path):
    model = trained(toy_model("grouped"))
    export_gguf(model, tokenizer(), tmp_path / "model.gguf", kind)
    texts = [torch.tensor([tokenizer().encode(text, prepend="<|bos|>")[:100]]) for text in PARAGRAPHS]
    with torch.inference_mode():
        assert mean_loss(reread(tmp_path / "model.gguf"), texts) == pytest.approx(
            mean_loss(model, texts), abs=nats
        )
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    for tensor in reader.tensors:
        is_norm = len(tensor.shape) == 1
        is_table = tensor.name in ("token_embd.weight", "output.weight")
        wanted = 32 if is_norm else 8.5 if is_table and kind == "q4_0" else bits
        assert tensor.n_bytes * 8 / tensor.n_elements == wanted, tensor.name


def test_names_settings_and_tokenizer(tmp_path):
    model = toy_model("grouped")
    export_gguf(model, tokenizer(), tmp_path / "model.gguf", "q8_0")
    _, _, meta = read_gguf(tmp_path / "model.gguf")
    assert meta["general.architecture"] == "nanochat" and meta["nanochat.block_count"] == 3
    assert meta["nanochat.attention.head_count_kv"] == 2 and meta["nanochat.feed_forward_length"] == 256
    assert meta["nanochat.rope.freq_base"] == 10_000 and meta["nanochat.final_logit_softcapping"] == 15
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCAB_SIZE
    for name in SPECIAL_TOKENS:
        token = tokenizer().encode_special(name)
        assert tokens[token] == name and types[token] == 3
    assert types.count(1) == VOCAB_SIZE - len(SPECIAL_TOKENS)
    assert "generation -%}" not in meta["tokenizer.chat_template"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    norms = [tensor for tensor in reader.tensors if "norm" in tensor.name]
    assert len(norms) == 4 * 3 + 2 and all(np.all(tensor.data == 1) for tensor in norms)
    assert len(reader.tensors) == len(norms) + 6 * 3 + 2


def test_the_template_without_its_tags_says_the_same(tmp_path):
    import jinja2

    from nanochat.samples import CONVERSATIONS

    export_gguf(toy_model("grouped"), tokenizer(), tmp_path / "model.gguf", "f32")
    template = jinja2.Template(
        read_gguf(tmp_path / "model.gguf")[2]["tokenizer.chat_template"], trim_blocks=True
    )
    for conversation in CONVERSATIONS:
        ids, _ = tokenizer().render_conversation(conversation, 10_000)
        assert template.render(messages=conversation["messages"]) == tokenizer().decode(ids)


def test_what_has_no_gguf_form_is_refused(tmp_path):
    with pytest.raises(UserError, match="only classic models"):
        export_gguf(toy_model("all features"), tokenizer(), tmp_path / "model.gguf", "f32")
    with pytest.raises(UserError, match="divisible by 32; this model has 48"):
        export_gguf(
            toy_model("one key head, other RoPE and cap"), tokenizer(), tmp_path / "model.gguf", "q8_0"
        )
    with pytest.raises(UserError, match="is already there"):
        export_gguf(toy_model("grouped"), tokenizer(), tmp_path, "f32")
    other = RustBPETokenizer(replace(tokenizer().vocabulary, pattern=r"\S+|\s+"))
    with pytest.raises(UserError, match="this tokenizer has another"):
        export_gguf(toy_model("grouped"), other, tmp_path / "model.gguf", "f32")
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.gguf").write_text("dear")
    with pytest.raises(UserError, match="is already there"):
        export_gguf(toy_model("grouped"), tokenizer(), tmp_path / "model.gguf", "f32")
    assert (tmp_path / "model.gguf").read_text() == "dear"


def test_a_form_that_loses_too_much_is_refused(tmp_path, monkeypatch):
    model = toy_model("grouped")
    monkeypatch.setitem(ALLOWED, "q4_0", 1e-4)
    with pytest.raises(UserError, match=r"as q4_0 the loss .* instead of .*more bits"):
        export_gguf(model, tokenizer(), tmp_path / "model.gguf", "q4_0")
    model.lm_head.weight.data[3, 5] = 1e30  # beyond half precision
    with pytest.raises(UserError, match=r"lm_head\.weight holds weights that f16 cannot express"):
        export_gguf(model, tokenizer(), tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.iterdir())
