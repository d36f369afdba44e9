"""The inference benchmark runs everywhere, counts what its specification says, and ends with one line of JSON."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch

from nanochat.common import UserError, read_json
from nanochat.configurator import parse
from nanochat.gpt import GPT, GPTConfig
from nanochat.load_bench import distribution, make_clients, serve
from nanochat.roofline import ModelCost, peak_bandwidth, percentile
from nanochat.sampling import SamplingParams
from nanochat.sweep_bench import NoTokenizer, bench_engine, english_prompt, run_or_oom, timed_run
from scripts.infer_bench import Config, main
from tests.toy_model import ByteTokenizer, random_model

pytestmark = pytest.mark.usefixtures("one_seeded_thread")
TINY = dict(
    source="random", depth=2, n_embd=64, vocab_size=128, sequence_len=64, prompt_tokens=20, decode_tokens=8,
    warmup=2, repeats=2, device_type="cpu", dtype="float32",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    """The environment as it was, and a small probe of the memory."""
    monkeypatch.setattr("nanochat.roofline._PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(
        "nanochat.common.keep_freed_memory", lambda: None
    )  # it would last for the whole process
    for name in ("NANOCHAT_ATTN", "NANOCHAT_DTYPE"):
        monkeypatch.setenv(name, "auto")


def measured(capsys, **options) -> dict:
    main(Config(**{**TINY, **options}))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_weights_beyond_the_memory_are_refused_before_they_are_made():
    with pytest.raises(UserError, match=r"500 layers, 32,000 wide, take [\d,.]+ GiB, and [\d.]+ GiB of"):
        main(Config(source="random", depth=500, device_type="cpu"))


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_sweep_and_load_on_a_processor(capsys, tmp_path, arch):
    found = measured(
        capsys, arch=arch, batch_sizes="1,3", prefill_lengths="5", temperature=1.0, distinct=arch == "modern",
        clients=5, arrivals="uniform:0:0.002", load_prompts="uniform:1:30", load_tokens="uniform:1:9",
        json=str(tmp_path / "out.json"),
    )  # fmt: skip
    assert found == read_json(tmp_path / "out.json")
    assert [entry["batch_size"] for entry in found["sweep"]] == [1, 3]
    for entry in found["sweep"]:
        assert entry["decode_steps"] == 7 and entry["tok_per_sec"] > 0
        assert 0 < entry["tpot_sec"] <= entry["tpot_p90_sec"] <= entry["tpot_p99_sec"]
        assert entry["mbu_measured_percent"] > 0 and entry["mbu_percent"] is None
    assert found["prefill"]["prompt_tokens"] == 20 and found["prefills"][0]["prompt_tokens"] == 5
    load = found["load"]
    assert load["together"]["new_tokens"] == load["one_by_one"]["new_tokens"] and load["speedup"] > 0


@pytest.mark.slow  # starting transformers takes ten seconds
def test_the_peer_runs_the_same_weights(capsys):
    pytest.importorskip("transformers")
    found = measured(capsys, batch_sizes="2", repeats=1)
    assert "transformers" not in found["sweep"][0]
    found = measured(capsys, batch_sizes="2", repeats=1, peer="transformers")
    peer = found["sweep"][0]["transformers"]
    assert peer["tok_per_sec"] > 0 and peer["ours_over_peer"] > 0
    with pytest.raises(UserError, match="classic"):
        measured(capsys, arch="modern", peer="transformers")


def test_accounting_follows_the_formulas():
    config = GPTConfig.modern(
        sequence_len=64, vocab_size=128, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, short_window_multiple=8
    )
    model = GPT.build(config, "cpu", torch.bfloat16)
    cost = ModelCost.of(model)
    windows = config.window_sizes
    assert windows == [16, 64]
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert cost.matrix_params == matrices and cost.weight_bytes_read == 4 * matrices
    assert cost.num_params == sum(p.numel() for p in model.parameters())
    assert cost.weight_bytes == 4 * cost.num_params and cost.param_dtypes == {"float32": cost.num_params}
    assert cost.kv_bytes_per_token == 2 * 2 * 1 * 32 * 2
    assert cost.kv_read_bytes(40) == (16 + 40) * 2 * 32 * 2
    assert cost.decode_flops(40) == 2 * matrices + 4 * 64 * (16 + 40)
    seen = sum(min(i, w) for w in windows for i in range(1, 31))
    assert cost.prefill_flops(30) == 2 * matrices * 30 + 4 * 64 * seen


@pytest.mark.parametrize(
    ("name", "speed"),
    [("NVIDIA H200", 4.8e12), ("NVIDIA H100 PCIe", 2.0e12), ("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA L4", 300e9), ("NVIDIA L40S", 864e9), ("NVIDIA L40", 864e9), ("NVIDIA A100-SXM4-40GB", 1.555e12), ("NVIDIA A100-SXM4-80GB", 2.0e12), ("Tesla T4", 320e9), ("NVIDIA RTX A4000", None), ("abacus", None)],
)  # fmt: skip
def test_peak_bandwidth(name, speed):
    assert peak_bandwidth(name) == speed


def test_prompts_have_exactly_the_length():
    for length in (1, 2, 9, 500):
        ids = english_prompt(ByteTokenizer(), length)
        assert len(ids) == length and ids[0] == 256


def test_memory_that_ends_is_an_entry():
    def fail() -> dict:
        raise torch.OutOfMemoryError("no more")

    assert run_or_oom(fail, 7) == {"batch_size": 7, "error": "oom"}


def test_memory_that_ends_takes_its_requests_along(monkeypatch):
    engine = bench_engine(random_model("classic"), NoTokenizer(), 8)
    cache = engine._shared.cache
    decode, device = cache.decode, torch.device("cpu")

    def bounded(rows: int, ids: list[int]) -> torch.Tensor:
        if rows > 4 and cache.positions[0] > 5:
            raise torch.OutOfMemoryError("no more")
        return decode(rows, ids)

    monkeypatch.setattr(cache, "decode", bounded)
    for batch, steps in ((2, 9), (8, None), (2, 9)):
        params = SamplingParams(temperature=0, max_tokens=10)

        def work(batch=batch, params=params) -> dict:
            run = timed_run(engine, [[1, 2, 3]] * batch, params, device)
            assert run.step_tokens == batch * len(run.steps)
            return {"steps": len(run.steps)}

        assert run_or_oom(work, batch).get("steps") == steps
        assert engine._shared.is_idle and not cache.positions


def test_attention_is_the_users_choice_and_said(capsys, monkeypatch):
    monkeypatch.setattr("nanochat.flash_attention._CHOSEN", {})
    monkeypatch.setenv("NANOCHAT_ATTN", "sdpa")
    said = measured(capsys, batch_sizes="1", repeats=1)["attention"]
    assert os.environ["NANOCHAT_ATTN"] == "sdpa"
    assert said.startswith("prompts: torch SDPA") and "decoding: " in said
    with pytest.raises(UserError, match="'fa9' is unknown; use auto, cpp"):
        monkeypatch.setattr("nanochat.flash_attention._CHOSEN", {})
        measured(capsys, attn="fa9")


def test_every_client_gets_its_tokens():
    model = random_model("classic", sequence_len=64)
    engine = bench_engine(model, NoTokenizer(), 4)
    clients = make_clients(
        9, "exponential:0.001", "uniform:1:80", "uniform:1:80", SamplingParams(temperature=0), 64, 250
    )
    for at_once in (9, 1):
        summary = serve(engine, clients, at_once)
        assert [len(c.token_times) for c in clients] == [c.params.max_tokens for c in clients]
        assert all(len(c.prompt) + len(c.token_times) <= 64 for c in clients)
        assert summary["ttft_p50_sec"] <= summary["latency_p50_sec"] <= summary["seconds"]


def test_distributions():
    rng = random.Random(0)
    assert distribution("64")(rng) == 64
    assert all(3 <= distribution("uniform:3:5")(rng) <= 5 for _ in range(20))
    draws = [distribution("exponential:2")(rng) for _ in range(2000)]
    assert 1.8 < sum(draws) / len(draws) < 2.2
    for wrong in ("", "uniform:3", "uniform:5:3", "poisson:2", "exponential:-1", "x", "uniform:0:inf", "nan"):
        with pytest.raises(UserError, match="is no distribution"):
            distribution(wrong)


def test_a_context_shorter_than_the_answer_halves_it(capsys):
    main(Config(**{**TINY, "decode_tokens": 64}))
    assert "32 new tokens instead of 64" in capsys.readouterr().out


def test_percentiles():
    assert [percentile([4.0, 1.0, 3.0, 2.0], share) for share in (0, 0.5, 0.99, 1)] == [1, 3, 4, 4]


def test_a_context_needs_room_for_two_tokens_to_read_and_two_to_write(capsys):
    assert measured(capsys, sequence_len=4, batch_sizes="1", repeats=1)["sweep"][0]["decode_steps"] == 1
    with pytest.raises(UserError, match="sequence_len must be at least 4, not 3"):
        parse(Config, ["--sequence-len=3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-sizes=0", "batch-sizes"), ("--repeats=0", "repeats must be at least 1"),
        ("--decode-tokens=1", "at least 2"), ("--prompt-tokens=0", "at least 1"), ("--clients=-2", "at least 0"),
        ("--prefill-lengths=5,x", "--prefill-lengths='5,x' must be"), ("--arrivals=foo", "--arrivals: 'foo' is no"),
        ("--load-prompts=uniform:9", "--load-prompts: 'uniform:9' is no"), ("--load-tokens=", "--load-tokens: '' is"),
        ("--json=/dev/null/x", "cannot create /dev/null"), ("--json=/dev/null", "/dev/null: it is not a file"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line_before_anything_is_measured(flags, message, monkeypatch, capsys):
    monkeypatch.setattr("nanochat.roofline.measured_bandwidth", lambda device: pytest.fail("it measures"))
    with pytest.raises(UserError, match=message):
        main(parse(Config, ["--source=random", "--device-type=cpu", flags]))
    assert capsys.readouterr().out == ""


def test_what_eight_bits_save_is_said(capsys):
    main(Config(**{**TINY, "quantize": "int8", "n_embd": 128, "batch_sizes": "1", "repeats": 1}))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("int8 weights: ") and json.loads(said[-1])["note"] == said[0]
