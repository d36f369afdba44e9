"""The commands of interoperability, from a trained TinyWorld model out into transformers and back to training."""

from __future__ import annotations

import pytest
import torch

from nanochat.checkpoint_manager import STAGES, Checkpoint, load_model, save_checkpoint
from nanochat.common import UserError
from nanochat.engine import Engine, SamplingParams
from nanochat.gpt import GPT, GPTConfig
from nanochat.interop.model_card import model_card, report_scores
from nanochat.report import Report
from scripts import export_gguf, export_hf, import_hf
from tests.toy_export import toy_model
from tests.training import run_here, weights

pytestmark = pytest.mark.usefixtures("one_seeded_thread")
QUESTIONS = ["What is 2 + 3?", "Spell the word: cat", "Who are you?", "Hello!", "Tell me about a fox."]


def base_checkpoint(architecture: str) -> GPT:
    """An untrained TinyWorld checkpoint of stage sft, tag t."""
    from nanochat.common import get_base_dir
    from nanochat.tokenizer import get_tokenizer

    sizes = dict(sequence_len=128, vocab_size=512, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    model = GPT(getattr(GPTConfig, architecture)(**sizes))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    meta = {"user_config": {}}
    save_checkpoint(get_base_dir() / STAGES["sft"] / "t", 5, model, meta, tokenizer=get_tokenizer())
    return model


@pytest.mark.parametrize("architecture", ["classic", "modern"])
def test_out_and_back_through_the_commands(tiny_run, tmp_path, architecture, capsys):
    model = base_checkpoint(architecture)
    export_hf.main(export_hf.Config(source="sft", output=str(tmp_path / "out")))
    assert "verified:" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not evaluated." in card and ("trust_remote_code" in card) == (architecture == "modern")
    import_hf.main(import_hf.Config(path=str(tmp_path / "out"), stage="rl", step=3))
    again, tokenizer, meta = load_model("rl", torch.device("cpu"), "eval", "out")
    assert meta["imported_from"]["format"] == "hugging face" and meta["step"] == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name  # 512 tokens need no padding
    prompt = tokenizer.encode("Once", prepend="<|bos|>")
    engine = Engine(again, tokenizer, tools={})
    found = engine.complete_many([prompt], SamplingParams(temperature=0, max_tokens=20, extend_context=True))
    wanted = list(model.generate(prompt, len(found[0].tokens), temperature=0))
    assert found[0].tokens == wanted
    if architecture == "modern":
        with pytest.raises(UserError, match="only classic"):
            export_gguf.main(export_gguf.Config(source="sft", output=str(tmp_path / "m.gguf")))
    else:
        export_gguf.main(export_gguf.Config(source="sft", output=str(tmp_path / "m.gguf")))
        assert (tmp_path / "m.gguf").stat().st_size > 0


def test_scores_come_from_the_report_of_this_checkpoint(tiny_run):
    report = Report(tiny_run / "report")
    report.log(
        "Chat evaluation sft",
        [{"model_tag": "t", "step": 5}, {"GSM8K": 0.5, "MMLU": 0.25}, {"ChatCORE metric": 0.3}],
    )
    report.log("Base model evaluation", [{"model": "base model t (step 5)", "CORE metric": 0.1}])
    assert report_scores(tiny_run, "sft", "t", 5) == {"MMLU": 0.25, "GSM8K": 0.5, "ChatCORE metric": 0.3}
    assert report_scores(tiny_run, "base", "t", 5) == {"CORE metric": 0.1}
    for stage, tag, step in (("sft", "t", 6), ("sft", "u", 5), ("base", "u", 5), ("rl", "t", 5)):
        assert report_scores(tiny_run, stage, tag, step) == {}
    card = model_card(
        "m", toy_model("grouped").config, 1234, "sft", 5, report_scores(tiny_run, "sft", "t", 5)
    )
    assert "0.5000" in card and "1,234 parameters" in card and card.startswith("---\nlibrary_name")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", ["classic", "modern"])
def test_a_trained_model_chats_in_transformers_and_trains_on_after_import(tiny_run, tmp_path, architecture):
    from transformers import pipeline

    sizes = {"max_seq_len": 128, "total_batch_size": 2048, "device_batch_size": 8}
    run_here("base_train", arch=architecture, num_iterations=120, eval_every=-1, **sizes)
    run_here("chat_sft", source="base", num_iterations=60, eval_every=-1)
    export_hf.main(export_hf.Config(source="sft", output=str(tmp_path / "out")))

    model, tokenizer, _ = load_model("sft", torch.device("cpu"), "eval")
    engine, chat = (
        Engine(model, tokenizer, tools={}),
        pipeline("text-generation", str(tmp_path / "out"), trust_remote_code=True),
    )
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.render_for_completion(
            {"messages": [*messages, {"role": "assistant", "content": ""}]}
        )
        ours = engine.complete_many([prompt], SamplingParams(temperature=0, max_tokens=40))[0]
        theirs = chat(messages, max_new_tokens=40, do_sample=False)[0]["generated_text"][-1]["content"]
        special = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
        assert theirs == tokenizer.decode([token for token in ours.content if token not in special])

    # the import needs no tokenizer of the base folder, and goes on training
    import_hf.main(import_hf.Config(path=str(tmp_path / "out"), stage="base", model_tag="back"))
    for path in (tiny_run / "tokenizer").iterdir():
        path.unlink()
    run_here("chat_sft", source="base", model_tag="back", num_iterations=2, eval_every=2, **sizes)
    before, after = weights(tiny_run / STAGES["base"] / "back"), weights(tiny_run / STAGES["sft"] / "back")
    assert Checkpoint.open(tiny_run / STAGES["sft"] / "back", 2).meta["source"]["stage"] == "base"
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
