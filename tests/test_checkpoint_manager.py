"""Checkpoints are complete or absent; the one that is meant is found."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.common import UserError, exclusive, read_json, write_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

SIZES = dict(sequence_len=32, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


@pytest.fixture
def model() -> GPT:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(GPTConfig.modern(**SIZES))
    model.init_weights()
    return model


def save(base, model, stage="base", tag="d2", step=1, **options):
    directory = base / cm.STAGE_FOLDERS[stage] / tag
    cm.save_checkpoint(directory, step, model, {"stage": stage}, **options)
    return directory


def test_round_trip_with_its_own_tokenizer(tiny_run, model):
    state = {
        "state": {0: {"step": 3, "exp_avg": torch.randn(4)}},
        "param_groups": [{"lr": 0.1, "betas": (0.8, 0.9)}],
    }
    directory = save(tiny_run, model, optimizer_state=state, tokenizer=get_tokenizer())
    for file in (tiny_run / "tokenizer").iterdir():
        file.unlink()  # the checkpoint must not need it
    loaded, tokenizer, meta = cm.load_model("base", torch.device("cpu"), "train")
    assert meta["step"] == 1 and tokenizer.get_vocab_size() == 512
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    stored = cm.Checkpoint.open(directory, 1).optimizer_state()
    assert torch.equal(stored["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert stored["param_groups"] == state["param_groups"]


def test_the_context_grows_to_the_rows_of_the_next_stage(tiny_run, model):
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.c_proj.weight)  # zero at first, which hides what attention sees
    checkpoint = cm.Checkpoint.open(save(tiny_run, model), 1)
    cpu, ids = torch.device("cpu"), torch.arange(60)[None]
    longer, same = checkpoint.model(cpu, torch.float32, 64), checkpoint.model(cpu, torch.float32, 16)
    assert longer.config.sequence_len == 64 and same.config.sequence_len == 32
    assert longer.config.window_sizes[-1] == 64
    with torch.no_grad():
        assert torch.allclose(longer(ids[:, :32]), same(ids[:, :32]), atol=1e-5)
        assert not torch.allclose(
            longer(ids)[:, -1], same(ids)[:, -1], atol=1e-5
        )  # sees beyond the old window


def test_eval_phase_computes_the_same_in_bf16(tiny_run, model, monkeypatch):
    save(tiny_run, model, tokenizer=get_tokenizer())
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    ids = torch.arange(20)[None]
    train, _, _ = cm.load_model("base", torch.device("cpu"), "train")
    evaluate, _, _ = cm.load_model("base", torch.device("cpu"), "eval")
    assert evaluate.blocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(train(ids), evaluate(ids))


def test_weights_are_mapped_for_inference_and_copied_for_training(tiny_run, model):
    directory = save(tiny_run, model, tokenizer=get_tokenizer())
    path = directory / "model_000001.pt"
    before = path.read_bytes()
    evaluate, _, _ = cm.load_model("base", torch.device("cpu"), "eval")
    train, _, _ = cm.load_model("base", torch.device("cpu"), "train")
    assert str(path) in Path("/proc/self/maps").read_text() or sys.platform != "linux"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(evaluate(ids), train(ids))
        for parameter in (*evaluate.parameters(), *train.parameters()):
            parameter.add_(1)
    assert path.read_bytes() == before, "a mapping is private"


def test_files_of_the_older_format_still_load(tiny_run, model):
    directory = save(tiny_run, model, tokenizer=get_tokenizer())
    path = directory / "model_000001.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    meta = read_json(directory / "meta_000001.json")
    meta["files"][path.name]["size"] = path.stat().st_size
    write_json(directory / "meta_000001.json", meta)
    loaded, _, _ = cm.load_model("base", torch.device("cpu"), "eval")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_without_meta_a_checkpoint_is_absent(tiny_run, model):
    directory = save(tiny_run, model)
    (directory / "model_000009.pt").write_bytes(b"half")
    assert cm.newest_good_step(directory) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_found_and_the_older_checkpoint_used(tiny_run, model, damage, capsys):
    save(tiny_run, model, step=1)
    directory = save(tiny_run, model, step=2)
    path = directory / "model_000002.pt"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert cm.locate("base") == (directory, 1)
    assert "model_000002.pt" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be used"):
        cm.locate("base", step=2)


def test_a_model_is_used_without_the_optimizer_state_but_not_resumed(tiny_run, model, capsys):
    save(tiny_run, model, step=1, optimizer_state={"state": {}})
    directory = save(tiny_run, model, step=2, optimizer_state={"state": {}})
    (directory / "optim_000002.pt").unlink()
    assert cm.locate("base") == cm.locate("base", step=2) == (directory, 2)
    assert capsys.readouterr().err == ""
    assert cm.newest_good_step(directory) == 1
    assert "optim_000002.pt is missing" in capsys.readouterr().err


def test_nothing_pickled_is_ever_run(tiny_run, model):
    directory = save(tiny_run, model)

    class Hostile:
        def __reduce__(self):
            return (open, ("/tmp/never", "w"))

    torch.save({"wte": Hostile()}, directory / "model_000001.pt")
    with pytest.raises(UserError, match="cannot read"):
        cm.Checkpoint.open(directory, 1).model_state("cpu")


def test_which_tag_is_meant(tiny_run, model):
    base = tiny_run / cm.STAGE_FOLDERS["base"]
    for tag in ("d9", "d10", "d10_old", "experiment"):
        save(tiny_run, model, tag=tag)
    assert cm.find_model_tag(base) == "d10"
    save(tiny_run, model, tag="d24_x")
    assert cm.find_model_tag(base) == "d24_x"
    (base / "d99").mkdir()  # an empty folder is no checkpoint
    assert cm.find_model_tag(base) == "d24_x"


def test_steps_are_numbers_not_text(tiny_run, model):
    directory = save(tiny_run, model, step=999_999)
    save(tiny_run, model, step=1_000_000)
    assert cm.list_steps(directory) == [999_999, 1_000_000]
    assert cm.locate("base")[1] == 1_000_000


def test_keep_last_and_delete(tiny_run, model, capsys):
    for step in (1, 2, 3):
        directory = save(tiny_run, model, step=step, keep_last=2)
    assert cm.list_steps(directory) == [2, 3]
    assert not (directory / "model_000001.pt").exists()
    cm.delete_checkpoints(directory)
    assert cm.list_steps(directory) == [] and "steps [2, 3]" in capsys.readouterr().out


def test_a_damaged_later_checkpoint_does_not_push_out_the_good_ones(tiny_run, model):
    for step in (1, 2, 9):
        directory = save(tiny_run, model, step=step)
    (directory / "model_000009.pt").write_bytes(b"cut")
    save(tiny_run, model, step=3, keep_last=1)
    assert cm.newest_good_step(directory) == 3 and cm.list_steps(directory) == [3, 9]
    save(tiny_run, model, step=9, keep_last=1)
    assert cm.newest_good_step(directory) == 9 and cm.list_steps(directory) == [9]


def test_what_a_killed_run_left_is_cleared_away(tiny_run, model):
    for step in (1, 2, 3):
        directory = save(tiny_run, model, step=step, tokenizer=get_tokenizer())
    (directory / "meta_000001.json").unlink()  # killed while it was deleting step 1
    for name in (".model_000004.pt.x7.tmp", "tokenizer/.tokenizer.json.x8.tmp"):
        (directory / name).write_bytes(b"half")
    (directory / "optim_000004.pt").write_bytes(b"whole, but killed before the meta file")
    cm.remove_leftovers(directory)
    assert not list(directory.rglob(".*.tmp"))
    save(tiny_run, model, step=5, keep_last=2)
    assert cm.list_steps(directory) == [3, 5] and not (directory / "model_000001.pt").exists()
    assert (directory / "optim_000004.pt").exists()  # not older than what is kept


@pytest.mark.parametrize("edit", [{"imported_from": {"format": "upstream"}}, {"files": None}])
def test_what_no_run_made_is_not_deleted(tiny_run, model, edit):
    directory = save(tiny_run, model)
    meta = read_json(directory / "meta_000001.json") | edit
    write_json(directory / "meta_000001.json", {k: v for k, v in meta.items() if v is not None})
    with pytest.raises(UserError, match=r"step 1 in .*, and a run|step 1 in .* is an imported model"):
        cm.delete_checkpoints(directory)
    assert cm.list_steps(directory) == [1]


def test_missing_things_are_one_line(tiny_run, model):
    with pytest.raises(UserError, match="train that stage first"):
        cm.locate("sft")
    with pytest.raises(UserError, match="is not a stage"):
        cm.locate("moon")
    directory = save(tiny_run, model)
    with exclusive(directory.with_name("failed")):
        pass  # and nothing saved
    with pytest.raises(UserError, match=r"there are: d2$"):
        cm.locate("base", "d7")
    with pytest.raises(UserError, match=r"there are: d2$"):
        cm.locate("base", "failed")
    with pytest.raises(UserError, match=r"no step 5 .*\[1\]"):
        cm.locate("base", "d2", 5)


@pytest.mark.parametrize("tag", ["../../evil", "/tmp/evil", "a/b", "a\\b", "..", ".x", "a\nb", "x" * 101])
def test_a_tag_is_the_name_of_one_folder(tiny_run, model, tag):
    save(tiny_run, model)
    with pytest.raises(UserError, match="is no model tag, which names a folder in"):
        cm.locate("base", tag)
    assert cm.model_dir("sft", "d4-v1.2 b=c") == tiny_run / "chatsft_checkpoints" / "d4-v1.2 b=c"


def test_a_tokenizer_of_another_size_is_refused(tiny_run):
    other = GPT(GPTConfig.modern(**{**SIZES, "vocab_size": 300}))
    other.init_weights()
    save(tiny_run, other)
    with pytest.raises(UserError, match=r"512 tokens, the model .* with 300"):
        cm.load_model("base", torch.device("cpu"), "eval")


@pytest.mark.parametrize("copy", [True, False])
def test_another_tokenizer_of_the_same_size_is_refused(tiny_run, model, copy):
    directory = save(tiny_run, model, tokenizer=get_tokenizer())
    other = RustBPETokenizer.train_from_iterator(["".join(map(chr, range(256, 4000)))], SIZES["vocab_size"])
    assert other.get_vocab_size() == get_tokenizer().get_vocab_size()
    if copy:
        other.save(directory / "tokenizer")
    else:
        shutil.rmtree(directory / "tokenizer")
        cm.load_model("base", torch.device("cpu"), "eval")  # with that of the base folder, the same one
        other.save(tiny_run / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer is not the one that the model in .*d2 was trained with"):
        cm.load_model("base", torch.device("cpu"), "eval")
    meta = read_json(directory / "meta_000001.json")
    del meta["tokenizer_sha256"]  # as older checkpoints
    write_json(directory / "meta_000001.json", meta)
    assert cm.load_model("base", torch.device("cpu"), "eval")[1].vocabulary == other.vocabulary


def test_a_newer_format_is_refused(tiny_run, model):
    directory = save(tiny_run, model)
    config = read_json(directory / "meta_000001.json")["model_config"] | {"warp": 9}
    cm.update_meta(directory, 1, {"model_config": config})
    with pytest.raises(UserError, match=r"unknown settings \['warp'\]"):
        cm.Checkpoint.open(directory, 1).config()


def test_latest_stage(tiny_run, model):
    with pytest.raises(UserError, match="train a model first"):
        cm.latest_stage()
    save(tiny_run, model, "base")
    save(tiny_run, model, "sft")
    assert cm.latest_stage() == "sft"
