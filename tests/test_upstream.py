"""Upstream's checkpoints of every revision are recognised and compute what upstream computed."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.interop.imported import save_as_checkpoint
from nanochat.interop.upstream import migrate
from nanochat.interop.upstream_import import read_upstream
from scripts import import_upstream
from tests.test_gpt import GOLDEN, assert_golden, golden_ids
from tests.toy_export import VOCAB_SIZE, tokenizer, toy_model
from tests.upstream_reference import REVISIONS, model_config, reference_logits, state_dict

pytestmark = pytest.mark.usefixtures("one_seeded_thread")

# The specification's numbers as in test_gpt.py, with tables rounded as upstream rounded them.
SPECIFIED = {
    "classic": GOLDEN["classic, bf16 tables"],
    "R2": (
        [-0.07560, 0.52805, -1.35854, -0.06174, -1.44217, -1.05070],
        [-1.96828, 0.26371, 0.61150, -0.31324, 0.25911, -0.36531],
        -0.0889946, 0.9145379, 4.810133, 3.488338, 1_327_872,
    ),
    "modern": GOLDEN["modern"],
}  # fmt: skip


def load(name: str, state=None, **changes) -> tuple[GPT, tuple[str, ...]]:
    revision = REVISIONS[name]
    softcap = None if revision.softcap == 15 else revision.softcap
    migration = migrate(state or state_dict(revision), model_config(revision) | changes, softcap)
    model = GPT.build(migration.config, "cpu", torch.float32)
    model.load_state_dict(migration.state)
    return model, migration.assumptions


@pytest.mark.parametrize("name", SPECIFIED)
def test_the_specified_numbers(name):
    assert_golden(load(name)[0], SPECIFIED[name])


@pytest.mark.parametrize("name", ["classic", "R2"])
def test_rounded_tables_work_in_every_compute_dtype(name):
    """Old checkpoints round their rotary tables to bf16; q and k stay in the dtype of the computation."""
    wanted, revision = load(name)[0], REVISIONS[name]
    migration = migrate(state_dict(revision), model_config(revision))
    for dtype in (torch.float16, torch.bfloat16):
        model = GPT.build(migration.config, "cpu", dtype)
        model.load_state_dict(migration.state)
        assert model.cos.dtype == dtype
        torch.testing.assert_close(model.cos.float(), wanted.cos, atol=1e-6, rtol=0)
        ids = golden_ids()[:, :160]
        assert (model(ids) - wanted(ids)).abs().mean() < 0.1


@pytest.mark.parametrize("name", REVISIONS)
def test_every_revision_computes_what_upstream_did(name):
    revision, ids = REVISIONS[name], golden_ids()[0, :160]
    wanted = reference_logits(revision, state_dict(revision), ids)
    model, assumptions = load(name)
    torch.testing.assert_close(model(ids[None])[0], wanted, atol=1e-4, rtol=0)
    assert assumptions[0].startswith(f"revision {name.split(' ')[0]}:")
    assert any("softcap 15" in note for note in assumptions) == (revision.softcap == 15)


def test_prefixes_and_precisions_of_real_files():
    state = state_dict(REVISIONS["modern"])
    prefixed = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    for name in ("transformer.wte.weight", "value_embeds.0.weight", "value_embeds.2.weight"):
        prefixed[f"_orig_mod.{name}"] = prefixed[f"_orig_mod.{name}"].bfloat16()
    ids = golden_ids()[:, :160]
    torch.testing.assert_close(load("modern", prefixed)[0](ids), load("modern")[0](ids), atol=0.1, rtol=0)


def test_tables_without_padding_and_scalars_that_were_patched_in():
    state = state_dict(REVISIONS["lambdas"])
    wanted = load("lambdas")[0](golden_ids()[:, :160])
    state |= {name: state[name][:50] for name in ("transformer.wte.weight", "lm_head.weight")}
    model, notes = load("lambdas", dict(state))
    assert torch.equal(model(golden_ids()[:, :160]), wanted) and any(
        "padded with zeros" in note for note in notes
    )
    del state["x0_lambdas"]
    model, notes = load("lambdas", state)
    assert not model.x0_lambdas.any() and any("x0_lambdas are missing" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "edit", "complaint"),
    [
        ("R2", {"bigram_lambdas": torch.zeros(3)}, "bigram experiment"),
        ("R2", {"transformer.h.0.attn.ve_gate.weight": torch.zeros(2, 7)}, "do not belong together"),
        ("R2", {"transformer.h.0.attn.ve_gate.weight": torch.tensor(0.0)}, "do not belong together"),
        ("classic", {"value_embeds.0.weight": torch.zeros(64, 32)}, "do not belong together"),
        ("modern", {"lm_head.weight": torch.zeros(64, 32)}, r"\(64, 32\), its configuration says \(64, 64\)"),
        ("modern", {"transformer.h.3.mlp.c_fc.weight": torch.zeros(1)}, "does not have"),
        ("modern", {"smear_lambda": torch.zeros(1, dtype=torch.int64)}, "is torch.int64"),
        ("modern", {"smear_lambda": torch.zeros(1, dtype=torch.float64)}, "is torch.float64"),
        ("modern", {"lm_head.weight": torch.zeros(1).expand(64, 64)}, "not stored value by value"),
        ("modern", {"smear_lambda": None}, "lack smear_lambda"),
        ("modern", {"_orig_mod.smear_lambda": torch.zeros(1)}, "twice"),
    ],
)
def test_what_no_revision_wrote_is_refused(name, edit, complaint):
    state = {key: value for key, value in (state_dict(REVISIONS[name]) | edit).items() if value is not None}
    with pytest.raises(UserError, match=complaint):
        load(name, state)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n_layer": "3"}, "impossible sizes"),
        ({"n_layer": 1 << 40}, "impossible sizes"),
        ({"n_layer": 1 << 19}, "too few"),
        ({"n_embd": 32}, "its configuration says"),
        ({"window_pattern": 3}, "impossible window"),
        ({"use_moe": True}, "unknown settings"),
        ({"sequence_len": 255}, "not a window"),
    ],
)
def test_wrong_metadata_is_refused(change, complaint):
    with pytest.raises(UserError, match=complaint):
        load("R2", **change)


# --- files -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base folder as upstream leaves it: a classic model without our metadata, a pickled tokenizer."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    model = toy_model("grouped")
    directory = tmp_path / "theirs" / "chatsft_checkpoints" / "d3"
    directory.mkdir(parents=True)
    for step in (9, 1_000_000):
        torch.save(model.state_dict(), directory / f"model_{step:06d}.pt")
    sizes = {
        name: getattr(model.config, name)
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    }
    (directory / "meta_1000000.json").write_text(json.dumps({"step": 1_000_000, "model_config": sizes}))
    (tmp_path / "theirs" / "tokenizer").mkdir()
    (tmp_path / "theirs" / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer().to_tiktoken()))
    return directory


def test_a_folder_becomes_a_checkpoint(folder, capsys):
    import_upstream.main(import_upstream.Config(path=str(folder), stage="sft"))
    out = capsys.readouterr().out
    assert (
        "assumed: revision classic: RoPE base 10,000, tables rounded to bfloat16" in out
        and "softcap 15" in out
    )
    model, ours, meta = load_model("sft", torch.device("cpu"), "eval", "d3-imported")
    assert meta["step"] == 1_000_000 and meta["imported_from"]["meta"]["step"] == 1_000_000
    assert ours.encode("The river rises") == tokenizer().encode("The river rises")
    assert model.config.rope_dtype == "bfloat16"
    torch.testing.assert_close(model.lm_head.weight, toy_model("grouped").lm_head.weight)
    with pytest.raises(UserError, match="already holds checkpoints"):
        import_upstream.main(import_upstream.Config(path=str(folder), stage="sft"))


def test_truncated_hostile_and_wrong_files_are_one_line_and_run_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = folder / "model_1000000.pt"
    whole = weights.read_bytes()

    class Hostile:
        def __reduce__(self):
            return (open, ("pwned", "w"))

    def read():
        return read_upstream(folder, None, None, None)

    for content in (whole[:-200], b"", pickle.dumps(Hostile()), b"not a file of torch"):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*model_1000000\.pt") as caught:
            read()
        # torch's own advice is to switch the restriction off
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    torch.save({"wte": Hostile()}, weights)
    with pytest.raises(UserError, match="cannot read"):
        read()
    torch.save([1, 2], weights)
    with pytest.raises(UserError, match="not a state dict"):
        read()
    weights.write_bytes(whole)
    with pytest.raises(UserError, match="logit_softcap cannot be 0"):
        read_upstream(folder, None, None, 0.0)
    with pytest.raises(UserError, match="--step=-3 must be"):
        save_as_checkpoint(read()[0], "sft", "t", -3, {})
    assert not (tmp_path / "pwned").exists()


def test_missing_parts_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"meta_000009\.json does not exist"):
        read_upstream(folder, 9, None, None)
    pkl = tmp_path / "theirs" / "tokenizer" / "tokenizer.pkl"
    pkl.rename(tmp_path / "moved.pkl")
    with pytest.raises(UserError, match="name it with --tokenizer"):
        read_upstream(folder, None, None, None)
    assert read_upstream(folder, None, tmp_path / "moved.pkl", None)[1] == 1_000_000
    with pytest.raises(UserError, match="no model_<step>"):
        read_upstream(tmp_path, None, None, None)
    meta = json.loads((folder / "meta_1000000.json").read_text())
    meta["model_config"]["vocab_size"] = VOCAB_SIZE - 20  # the tables have as many rows, padded
    (folder / "meta_1000000.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"390 tokens, the model was trained with 370|its configuration says"):
        read_upstream(folder, None, tmp_path / "moved.pkl", None)


def test_upstream_folders_in_place_say_how_to_import_them(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "theirs"))
    with pytest.raises(UserError):
        load_model("sft", torch.device("cpu"), "eval")
    assert "scripts.import_upstream --path=" in capsys.readouterr().err
