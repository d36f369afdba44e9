"""The commands of interoperability, from a trained TinyWorld model out into transformers and back to training."""

from __future__ import annotations

import pickle

import pytest
import torch

from nanochat.checkpoint_manager import Checkpoint, list_steps, load_model, save_checkpoint
from nanochat.common import UserError, get_base_dir, write_json
from nanochat.engine import Engine, SamplingParams
from nanochat.gpt import GPT, GPTConfig
from nanochat.interop import hf_export
from nanochat.interop.hf_export import export_folder
from nanochat.interop.model_card import model_card, report_scores
from nanochat.options import STAGE_FOLDERS
from nanochat.report import Report
from scripts import export_gguf, export_hf, import_hf, import_upstream
from tests.toy_export import toy_model
from tests.training import largest_difference, run_here, weights

pytestmark = pytest.mark.usefixtures("one_seeded_thread")
QUESTIONS = ["What is 2 + 3?", "Spell the word: cat", "Who are you?", "Hello!", "Tell me about a fox."]


def base_checkpoint(architecture: str) -> GPT:
    """An untrained TinyWorld checkpoint of stage sft, tag t."""
    from nanochat.tokenizer import get_tokenizer

    sizes = dict(sequence_len=128, vocab_size=512, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    model = GPT(getattr(GPTConfig, architecture)(**sizes))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    meta = {"user_config": {}}
    save_checkpoint(get_base_dir() / STAGE_FOLDERS["sft"] / "t", 5, model, meta, tokenizer=get_tokenizer())
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


# What the flags of tests/training.py describe, as an imported model.
SIZES = dict(sequence_len=64, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def imported(kind: str, stage: str, tmp_path, step: int = 0) -> None:
    """A model of another project imported into a stage under the tag `theirs`."""
    from nanochat.tokenizer import get_tokenizer

    config = (
        GPTConfig.classic(**SIZES)
        if kind == "hugging face"
        else GPTConfig.modern(window_pattern="SL", **SIZES)
    )
    model = GPT.build(config, "cpu", torch.float32)
    model.init_weights()
    if kind == "hugging face":
        folder = tmp_path / "hf"
        if not folder.exists():
            export_folder(model, get_tokenizer(), folder, "", is_chat=True)
        import_hf.main(import_hf.Config(path=str(folder), stage=stage, model_tag="theirs", step=step))
        return
    (tmp_path / "upstream").mkdir(exist_ok=True)
    torch.save(model.state_dict(), tmp_path / "upstream" / f"model_{step:06d}.pt")
    content = {
        "model_config": SIZES | {"window_pattern": "SL"},
        "total_batch_size": 512,
        "device_batch_size": 2,
    }
    rates = {"matrix_lr": 0.03, "embedding_lr": 0.25, "unembedding_lr": 0.005, "total_batch_size": -1}
    write_json(
        tmp_path / "upstream" / f"meta_{step:06d}.json", content | {"user_config": rates | {"run": "x"}}
    )
    (tmp_path / "upstream" / "tokenizer.pkl").write_bytes(pickle.dumps(get_tokenizer().to_tiktoken()))
    import_upstream.main(
        import_upstream.Config(path=str(tmp_path / "upstream"), stage=stage, model_tag="theirs", step=step)
    )


@pytest.mark.parametrize(("kind", "arch"), [("hugging face", "classic"), ("upstream", "modern")])
def test_an_imported_base_model_is_pretrained_further_elsewhere(tiny_run, tmp_path, kind, arch, capsys):
    imported(kind, "base", tmp_path)
    theirs = tiny_run / STAGE_FOLDERS["base"] / "theirs"
    before = weights(theirs)
    flags = dict(arch=arch, num_iterations=2, eval_every=-1, keep_last=1)
    # in its own folder no run starts, continues or deletes
    for resume in ("auto", "never", "0"):
        with pytest.raises(UserError, match=r"step 0 in .* is an imported model.*--init-from=TAG"):
            run_here("base_train", model_tag="theirs", resume=resume, **flags)
    assert largest_difference(before, weights(theirs)) == 0
    with pytest.raises(UserError, match="both what is read and what is written"):
        run_here("base_train", init_from="theirs", model_tag="theirs", **flags)
    with pytest.raises(UserError, match="n_layer 2 instead of 3, n_head 2 instead of 3"):
        run_here("base_train", init_from="theirs", model_tag="further", depth=3, **flags)
    with pytest.raises(UserError, match="--smear-init is for new weights"):
        run_here("base_train", init_from="theirs", model_tag="further", smear_init=0.1, **flags)
    for path in (tiny_run / "tokenizer").iterdir():  # its own tokenizer goes on with it
        path.unlink()
    still = dict(
        matrix_lr=0.0, embedding_lr=0.0, unembedding_lr=0.0, scalar_lr=0.0, smear_lr=0.0, weight_decay=0.0
    )
    run_here("base_train", init_from="theirs", model_tag="still", **(flags | still))
    assert "initial weights: " in capsys.readouterr().out
    assert largest_difference(before, weights(tiny_run / STAGE_FOLDERS["base"] / "still")) == 0
    run_here("base_train", init_from="theirs", model_tag="further", save_every=1, **flags)
    further = tiny_run / STAGE_FOLDERS["base"] / "further"
    assert list_steps(further) == [2] and largest_difference(before, weights(further)) > 0
    run_here("base_train", init_from="theirs", model_tag="further", **(flags | {"num_iterations": 2}))
    assert Checkpoint.open(further, 2).config() == Checkpoint.open(theirs, 0).config()


@pytest.mark.parametrize("kind", ["hugging face", "upstream"])
def test_imported_chat_models_go_on_in_the_later_stages(tiny_run, tmp_path, kind, capsys):
    for stage in ("sft", "rl"):
        imported(kind, stage, tmp_path, step=7)
    flags = dict(model_tag="theirs", num_iterations=1, eval_every=-1)
    sizes = {"max_seq_len": 64, "total_batch_size": 512, "device_batch_size": 2}
    with pytest.raises(UserError, match="--output-tag"):
        run_here("chat_sft", source="sft", **flags, **sizes)
    capsys.readouterr()
    run_here(
        "chat_sft", source="sft", output_tag="further", **flags, **(sizes if kind == "hugging face" else {})
    )
    out = capsys.readouterr().out
    rates = Checkpoint.open(tiny_run / STAGE_FOLDERS["sft"] / "further", 1).meta["rates"]
    if kind == "upstream":
        assert (rates["matrix_lr"], rates["embedding_lr"], rates["unembedding_lr"]) == (0.03, 0.25, 0.005)
        assert "total_batch_size: 512 (as in the source run)" in out and "scalar_lr 0.5 (default)" in out
    else:
        assert rates["matrix_lr"] == 0.02 and "matrix_lr 0.02 (default)" in out
    with pytest.raises(UserError, match=r"step 7 in .*theirs is an imported model"):
        run_here("chat_rl", source="sft", **flags)
    run_here("chat_rl", source="rl", output_tag="further", **flags)
    assert list_steps(tiny_run / STAGE_FOLDERS["rl"] / "further") == [1]
    assert list_steps(tiny_run / STAGE_FOLDERS["rl"] / "theirs") == [7]


def test_a_push_that_failed_is_repeated_without_another_export(tiny_run, tmp_path, monkeypatch, capsys):
    base_checkpoint("classic")
    config = export_hf.Config(source="sft", output=str(tmp_path / "out"), push="me/model")
    done = []

    def refuse(*what):
        raise UserError("cannot push")

    monkeypatch.setattr(hf_export, "check_token", refuse)
    with pytest.raises(UserError, match="cannot push"):  # before gigabytes are written
        export_hf.main(config)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(hf_export, "check_token", done.append)
    monkeypatch.setattr(hf_export, "push", refuse)
    with pytest.raises(UserError, match="cannot push"):
        export_hf.main(config)
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(hf_export, "push", lambda *what: done.append(what))
    capsys.readouterr()
    export_hf.main(config)
    assert done[-1] == (tmp_path / "out", "me/model", True) and "verified:" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written
    base_checkpoint("modern")  # the folder is another model's now
    with pytest.raises(UserError):
        export_hf.main(config)
    assert len(done) == 4


def test_scores_come_from_the_report_of_this_checkpoint(tiny_run):
    report = Report(tiny_run / "report")
    report.log(
        "Chat evaluation sft",
        [{"model_tag": "t", "step": 5}, {"GSM8K": 0.5, "MMLU": 0.25}, {"ChatCORE metric": 0.3}],
    )
    report.log("Base model evaluation", [{"model": "base model u (step 9)", "CORE metric": 0.2}])
    report.log("Base model evaluation", [{"model": "base model t (step 5)", "CORE metric": 0.1}], model="t")
    assert report_scores(tiny_run, "sft", "t", 5) == {"MMLU": 0.25, "GSM8K": 0.5, "ChatCORE metric": 0.3}
    assert report_scores(tiny_run, "base", "t", 5) == {"CORE metric": 0.1}
    report.log(
        "Chat evaluation rl", [{"model_tag": None, "step": 5}, {"GSM8K": 0.5}]
    )  # of whichever was largest
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
    before, after = (
        weights(tiny_run / STAGE_FOLDERS["base"] / "back"),
        weights(tiny_run / STAGE_FOLDERS["sft"] / "back"),
    )
    assert Checkpoint.open(tiny_run / STAGE_FOLDERS["sft"] / "back", 2).meta["source"]["stage"] == "base"
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
