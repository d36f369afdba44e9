"""Exported folders compute what our models compute, in transformers and after coming back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from nanochat import hf_eval
from nanochat.common import UserError, read_json, write_json
from nanochat.gpt import GPT
from nanochat.hf_eval import HuggingFaceModel
from nanochat.interop import hf_config, hf_export, hf_import
from nanochat.interop.verification import load_with_transformers, logit_difference
from tests.toy_export import CLASSIC, MODERN, VOCAB_SIZE, random_ids, tokenizer, toy_model, trained
from tests.toy_model import random_model

pytestmark = pytest.mark.usefixtures("one_seeded_thread")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> (model, folder); each is exported (and with that verified) once."""
    made = {}

    def get(name: str, weights: str = "random"):
        key = (name, weights)
        if key not in made:
            model = toy_model(name) if weights == "random" else trained(toy_model(name))
            folder = tmp_path_factory.mktemp("hf") / "model"
            hf_export.export_folder(model, tokenizer(), folder, "# card\n", is_chat=True)
            made[key] = (model, folder)
        return made[key]

    return get


def load(folder, model: GPT):
    return load_with_transformers(folder, trust_remote_code=not hf_config.is_classic(model.config))


def greedy(loaded, prompt: torch.Tensor, count: int, **options) -> list[list[int]]:
    options = {"attention_mask": torch.ones_like(prompt), "eos_token_id": None, "do_sample": False, **options}
    return loaded.generate(prompt, max_new_tokens=count, **options)[:, prompt.size(1) :].tolist()


CASES = [
    pytest.param(
        name,
        weights,
        marks=() if weights == "random" or name in ("grouped", "all features") else pytest.mark.slow,
    )
    for name in (*CLASSIC, *MODERN)
    for weights in ("random", "trained")
]


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_same_logits_and_the_same_two_hundred_tokens(exported, name, weights):
    model, folder = exported(name, weights)
    loaded = load(folder, model)
    expected = "NanoChatForCausalLM" if name in CLASSIC else "NanoChatModernForCausalLM"
    assert type(loaded).__name__ == expected
    for seed in range(3):
        assert logit_difference(loaded, model, random_ids(1, 200, seed)[0].tolist()) < 1e-4
    prompt = random_ids(1, 20, seed=9)
    assert greedy(loaded, prompt, 200)[0] == list(model.generate(prompt[0].tolist(), 200, temperature=0))


@pytest.mark.parametrize("name", [*CLASSIC, *MODERN])
def test_the_way_there_and_back_changes_no_bit(exported, name):
    model, folder = exported(name)
    back = hf_import.read_folder(folder)
    assert back.config == model.config
    rows = VOCAB_SIZE
    for key, tensor in model.state_dict().items():
        if tensor.size(0) == model.config.padded_vocab_size:  # rows behind the vocabulary belong to no token
            assert torch.equal(back.state[key][:rows], tensor[:rows]) and not back.state[key][rows:].any()
        else:
            assert torch.equal(back.state[key], tensor)
    again = GPT.build(back.config, "cpu", torch.float32)
    again.load_state_dict(back.state)
    ids = random_ids(2, 100)
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("name", ["grouped", "all features"])
def test_our_evaluations_take_an_export_as_it_is(exported, name):
    model, folder = exported(name)
    loaded = HuggingFaceModel.from_pretrained(str(folder), torch.device("cpu"))
    ids = random_ids(1, 50)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), model(ids), atol=1e-4, rtol=1e-4)
    assert loaded.max_seq_len == model.config.sequence_len


def test_losses_of_an_export_a_few_rows_at_a_time(exported, monkeypatch):
    model, folder = exported("grouped")
    loaded = HuggingFaceModel.from_pretrained(str(folder), torch.device("cpu"))
    ids, targets = random_ids(5, 20), random_ids(5, 20)
    targets[:, 7] = -1
    sizes = []
    forward = type(loaded.model).forward
    monkeypatch.setattr(
        type(loaded.model), "forward", lambda self, ids: sizes.append(len(ids)) or forward(self, ids)
    )
    with torch.no_grad():
        monkeypatch.setattr(hf_eval, "_LOGIT_BYTES", 2 * 20 * 4 * model.config.vocab_size)
        ours = loaded(ids, targets, loss_reduction="none")
        wanted = model(ids, targets, loss_reduction="none")
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(ours.flatten(), wanted.flatten(), atol=1e-4, rtol=1e-4)


def test_no_code_of_a_folder_is_run(exported, tmp_path):
    """Neither what an export says to be ours nor what another kind of model brings along."""
    model, folder = exported("all features")
    changed = shutil.copytree(folder, tmp_path / "changed")
    for name in ("modeling_nanochat_modern.py", "evil.py"):
        (changed / name).write_text("raise SystemExit('this ran')\n", encoding="utf-8")
    content = read_json(changed / "config.json")
    evil = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    write_json(changed / "config.json", content | {"auto_map": evil})
    loaded = HuggingFaceModel.from_pretrained(str(changed), torch.device("cpu"))
    assert loaded.max_seq_len == model.config.sequence_len
    write_json(changed / "config.json", content | {"auto_map": evil, "model_type": "another"})
    with pytest.raises(UserError, match=r"cannot load the model .*changed"):
        HuggingFaceModel.from_pretrained(str(changed), torch.device("cpu"))


@pytest.mark.parametrize("architecture", ["classic", "modern"])
def test_tied_embeddings_become_a_table_and_a_head(architecture, tmp_path):
    """Both may then be finetuned apart, and nothing of it is lost when the model comes back."""
    model = random_model(architecture, vocab_size=VOCAB_SIZE, tie_embeddings=True)
    hf_export.export_folder(model, tokenizer(), tmp_path / "model", "# card\n", is_chat=True)
    ids = random_ids(1, 50)
    assert logit_difference(load(tmp_path / "model", model), model, ids[0].tolist()) < 1e-4
    back = hf_import.read_folder(tmp_path / "model")
    assert not back.config.tie_embeddings
    again = GPT.build(back.config, "cpu", torch.float32)
    again.load_state_dict(back.state)
    assert torch.equal(again(ids), model(ids))


def test_modern_cache_in_chunks_static_padded_and_with_beams(exported):
    from transformers import DynamicCache

    model, folder = exported("all features")
    loaded, ids = load(folder, model), random_ids(2, 60)
    with torch.inference_mode():
        whole, cache, parts = loaded(ids).logits, DynamicCache(config=loaded.config), []
        for start, stop in ((0, 1), (1, 25), (25, 26), (26, 27), (27, 60)):
            parts.append(loaded(ids[:, start:stop], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)
    wanted = greedy(loaded, ids, 30, use_cache=False)
    assert greedy(loaded, ids, 30) == wanted
    assert greedy(loaded, ids, 30, cache_implementation="static", disable_compile=True) == wanted
    # padding on the left neither shifts positions nor smears into the first token
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 7, dtype=torch.long), torch.ones_like(ids)], dim=1)
    assert greedy(loaded, padded, 30, attention_mask=mask) == wanted
    beams = [greedy(loaded, ids, 12, num_beams=3, use_cache=use) for use in (True, False)]
    assert beams[0] == beams[1]


@pytest.mark.parametrize(
    "name",
    [name if name == "all features" else pytest.param(name, marks=pytest.mark.slow) for name in MODERN],
)
def test_modern_survives_transformers_own_saving(exported, tmp_path, name):
    model, folder = exported(name)
    load(folder, model).save_pretrained(tmp_path / "again")
    loaded, prompt = load(tmp_path / "again", model), random_ids(1, 20, seed=9)
    assert logit_difference(loaded, model, random_ids(1, 120)[0].tolist()) < 1e-4
    assert greedy(loaded, prompt, 200)[0] == list(model.generate(prompt[0].tolist(), 200, temperature=0))
    # and it can still become ours
    (tmp_path / "again" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert hf_import.read_folder(tmp_path / "again").config == model.config


def test_modern_has_a_loss_and_gradients(exported):
    model, folder = exported("all features", "trained")
    ids = random_ids(2, 50)
    loss = load(folder, model)(ids, labels=ids).loss
    torch.testing.assert_close(loss, model(ids[:, :-1], ids[:, 1:]), atol=1e-5, rtol=0)
    loss.backward()


def test_modern_runs_in_bf16(exported):
    from transformers import AutoModelForCausalLM

    model, folder = exported("all features", "trained")
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert loaded.model.resid_lambdas.dtype == torch.float32  # rounding it would change every layer
    ours = GPT.build(model.config, "cpu", torch.bfloat16)
    ours.load_state_dict(model.state_dict())
    ids = random_ids(2, 60)
    with torch.inference_mode():
        difference = (loaded(ids).logits - ours(ids)).abs()
    assert difference.mean() < 0.05 and greedy(loaded, ids, 3)


def test_windows_longer_than_the_context_are_no_windows():
    from nanochat.network_config import GPTConfig

    config = GPTConfig.modern(sequence_len=64, n_layer=4, n_head=1, n_kv_head=1, n_embd=32)
    assert config.window_sizes == [128, 128, 128, 64]
    content = hf_config.to_hf_config(config)
    assert content["sliding_window"] is None and set(content["layer_types"]) == {"hybrid", "full_attention"}
    assert hf_config.from_hf_config(content) == config


@pytest.mark.slow
@pytest.mark.timeout(1200)  # compiling takes minutes on a busy machine
@pytest.mark.parametrize("name", ["grouped", *MODERN])
def test_compiled_models_compute_the_same(exported, name):
    model, folder = exported(name)
    loaded, ids = load(folder, model), random_ids(1, 40)
    wanted = greedy(loaded, ids, 20)
    with torch.inference_mode():
        found = torch.compile(loaded)(ids).logits
    torch.testing.assert_close(found, model(ids), atol=1e-4, rtol=0)
    loaded.forward = torch.compile(loaded.forward, dynamic=True)
    assert greedy(loaded, ids, 20) == wanted
    assert greedy(loaded, ids, 20, cache_implementation="static") == wanted


def test_large_models_are_cut_into_shards(tmp_path):
    model, folder = toy_model("grouped"), tmp_path / "model"
    hf_export.export_folder(model, tokenizer(), folder, "", is_chat=False, shard_bytes=150_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = read_json(folder / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 4 * sum(
        t.numel() for t in hf_config.to_hf_state(model.state_dict(), model.config).values()
    )
    assert torch.equal(
        hf_import.read_folder(folder).state["lm_head.weight"][:VOCAB_SIZE], model.lm_head.weight[:VOCAB_SIZE]
    )
    assert hf_export.SHARD_BYTES == 5_000_000_000


def test_others_may_read_an_export(exported):
    (usual := exported("grouped")[1].parent / "usual").touch()
    folder = usual.with_name("model")
    modes = {file.name: file.stat().st_mode for file in folder.iterdir()}
    assert set(modes.values()) == {usual.stat().st_mode}, modes


def test_generation_settings(exported, tmp_path):
    bos, end = tokenizer().encode_special("<|bos|>"), tokenizer().encode_special("<|assistant_end|>")
    _, folder = exported("grouped")
    settings = read_json(folder / "generation_config.json")
    assert (
        settings["eos_token_id"] == [end, bos] and settings["pad_token_id"] == bos and settings["do_sample"]
    )
    # a padding token would have no gradient in its embedding
    assert read_json(folder / "config.json")["pad_token_id"] is None


# --- refusals ----------------------------------------------------------------------------------------


def test_a_folder_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    model, true_state = toy_model("ungrouped"), hf_config.to_hf_state

    def slightly_wrong(state, config):
        result = true_state(state, config)
        name = "model.layers.1.mlp.fc1.weight"
        result[name] = result[name] * 1.01
        return result

    monkeypatch.setattr(hf_config, "to_hf_state", slightly_wrong)
    with pytest.raises(UserError, match="logits differ"):
        hf_export.export_folder(model, tokenizer(), tmp_path / "out", "", is_chat=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"sliding_window": 514}, {"layer_types": ["hybrid"] + ["full_attention"] * 2}]
)
def test_short_windows_are_verified_at_real_sizes(tmp_path, monkeypatch, change):
    sizes = dict(n_layer=3, n_head=2, n_kv_head=1, n_embd=32, sequence_len=2048, vocab_size=VOCAB_SIZE)
    model = random_model("modern", window_pattern="SSL", **sizes)  # 512 tokens
    write = hf_config.to_hf_config
    monkeypatch.setattr(hf_config, "to_hf_config", lambda config: write(config) | change)
    with pytest.raises(UserError, match="logits differ"):
        hf_export.export_folder(model, tokenizer(), tmp_path / "out", "", is_chat=True)
    monkeypatch.setattr(hf_config, "to_hf_config", write)
    hf_export.export_folder(model, tokenizer(), tmp_path / "out", "", is_chat=True)


def test_what_transformers_cannot_run_is_one_line(tmp_path, monkeypatch):
    write = hf_config.to_hf_config
    monkeypatch.setattr(
        hf_config, "to_hf_config", lambda config: write(config) | {"num_attention_heads": "x"}
    )
    with pytest.raises(UserError, match=r"transformers cannot run .*out: \w+") as caught:
        hf_export.export_folder(toy_model("ungrouped"), tokenizer(), tmp_path / "out", "", is_chat=True)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_nothing_is_lost_on_the_way():
    model = toy_model("ungrouped")
    state = model.state_dict()
    with pytest.raises(UserError, match=r"bigram_lambdas has no counterpart"):
        hf_config.to_hf_state(state | {"bigram_lambdas": torch.zeros(2)}, model.config)
    for dtype in (torch.float64, torch.float8_e4m3fn, torch.int8):  # fp8 needs scales beside it
        odd = state | {"lm_head.weight": torch.zeros(448, 32).to(dtype)}
        with pytest.raises(UserError, match=rf"lm_head.weight is {dtype}"):
            hf_config.to_hf_state(odd, model.config)
        with pytest.raises(UserError, match=rf"lm_head.weight is {dtype}"):
            hf_config.from_hf_state({hf_config.hf_name(k): v for k, v in odd.items()}, model.config)
    import dataclasses

    rounded = dataclasses.replace(model.config, rope_dtype="bfloat16")
    with pytest.raises(UserError, match="--unround-rope"):
        hf_export.exportable_config(rounded, False)
    assert hf_export.exportable_config(rounded, True) == model.config


def test_an_export_does_not_mix_with_other_files(tmp_path):
    (tmp_path / "other").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        hf_export.export_folder(toy_model("ungrouped"), tokenizer(), tmp_path, "", is_chat=True)


@pytest.fixture
def copy(exported, tmp_path):
    import shutil

    _, folder = exported("ungrouped")
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "llama"}, "not a NanoChat model"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        ({"rope_parameters": {"type": "yarn", "rope_theta": 1e4}}, "rope_parameters is .*yarn"),
        (
            {"rope_scaling": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_parameters is .*yarn",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters is .*linear"),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters is .*500000"),
        ({"partial_rotary_factor": 0.5}, "rope_parameters is .*partial"),
        ({"rope_parameters": [1]}, "no RoPE settings but"),
        ({"rope_parameters": {"rope_theta": "x"}, "nanochat_config": None}, "incomplete"),
        ({"final_logit_softcapping": 0, "nanochat_config": None}, "logit_softcap cannot be 0"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ({"num_hidden_layers": 10**9, "nanochat_config": None}, "impossible sizes"),
        ({"vocab_size": -5, "nanochat_config": None}, "vocab_size cannot be -5"),
        ({"num_hidden_layers": 10**5, "nanochat_config": None}, "too few for 100000 layers"),
        ({"num_attention_heads": 0, "nanochat_config": None}, "n_head cannot be 0"),
        ({"vocab_size": 400}, "vocab_size is 400"),
        ({"nanochat_config": {"n_layer": 2}}, "lacks"),
    ],
)
def test_other_networks_are_refused(copy, change, complaint):
    write_json(copy / "config.json", read_json(copy / "config.json") | change)
    with pytest.raises(UserError, match=complaint):
        hf_import.read_folder(copy)


def test_folders_that_transformers_wrote_need_nothing_of_ours(copy):
    config = read_json(copy / "config.json")
    del config["nanochat_config"]
    write_json(copy / "config.json", config | {"rms_norm_eps": 1e-6})
    assert hf_import.read_folder(copy).config == toy_model("ungrouped").config


def test_damaged_and_hostile_weights_are_one_line(copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        hf_import.read_folder(copy)
    weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are not read"):
        hf_import.read_folder(copy)
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="own folder"):
        hf_import.read_folder(copy)
    index.write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        hf_import.read_folder(copy)
    weights.write_bytes(whole)  # transformers reads the file, others the index
    with pytest.raises(UserError, match=r"holds both model\.safetensors and an index"):
        hf_import.read_folder(copy)
    (copy / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        hf_import.read_folder(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json holds no JSON object"):
        hf_import.read_folder(copy)


def test_tokenizers_that_cannot_be_used_are_one_line(copy):
    path = copy / "tokenizer.json"
    content = read_json(path)
    without = [token for token in content["added_tokens"] if token["content"] != "<|bos|>"]
    write_json(path, content | {"added_tokens": without})
    with pytest.raises(UserError, match=r"has no token '<\|bos\|>'"):
        hf_import.read_folder(copy)
    write_json(path, content | {"version": "9.0"})
    with pytest.raises(UserError, match=r"the library tokenizers cannot read .*tokenizer\.json"):
        hf_import.read_folder(copy)


def test_missing_and_superfluous_tensors_are_named():
    model = toy_model("ungrouped")
    state = hf_config.to_hf_state(model.state_dict(), model.config)
    with pytest.raises(UserError, match=r"hold model\.layers\.9\.x"):
        hf_config.from_hf_state(state | {"model.layers.9.x": torch.zeros(1)}, model.config)
    head = state.pop("lm_head.weight")
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        hf_config.from_hf_state(state | {"model.norm.weight": torch.zeros(1)}, model.config)
    with pytest.raises(UserError, match=r"lm_head\.weight is \(9, 32\)"):
        hf_config.from_hf_state(state | {"lm_head.weight": head[:9]}, model.config)
