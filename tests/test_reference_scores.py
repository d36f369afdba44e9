"""Published scores: found by name, compared with a verdict, and the command that uses them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.reference_scores import REFERENCES, compare, neighbours, reference_of

ROOT = Path(__file__).parents[1]


def test_models_are_known_by_their_last_name():
    for path in ("openai-community/gpt2-xl", "gpt2-xl", "/models/gpt2-xl/"):
        assert reference_of(path) is REFERENCES["gpt2-xl"]
    assert reference_of("openai-community/gpt2-tiny") is None
    assert REFERENCES["gpt2-xl"].core == 0.256525 and REFERENCES["gpt2"].accuracies["piqa"] == 0.623


def test_the_published_scores_pass_and_others_are_named():
    reference = REFERENCES["gpt2"]
    lines = compare(reference, 0.115, {**reference.accuracies, "copa": 0.5}, True)
    assert lines[-1] == "self-check: passed, the scores are the published ones"
    assert len(lines) == 2 + 6 + 1 and "copa" not in "".join(lines)
    wrong = {**reference.accuracies, "piqa": 0.5}
    assert compare(reference, 0.2, wrong, True)[-1] == "self-check: differs: piqa, CORE"
    assert "only a part of the examples" in compare(reference, 0.2, wrong, False)[-1]
    assert "-0.1230" in next(line for line in compare(reference, 0.1, wrong, True) if "piqa" in line)


@pytest.mark.parametrize(
    ("core", "phrase"),
    [
        (0.05, "below GPT-2 124M (0.1139)"),
        (0.2, "above GPT-2 355M (0.1849), below GPT-2 774M (0.2146)"),
        (0.26, "above GPT-2 1.6B (0.2565)"),
    ],
)
def test_neighbours(core, phrase):
    assert neighbours(core) == phrase


def test_the_command_compares_with_the_model_or_its_neighbours(monkeypatch, capsys):
    from scripts.base_eval import Config, check_known_scores

    reference = REFERENCES["gpt2"]
    outcome = {"core_metric": 0.114, "results": dict(reference.accuracies)}
    known = Config(hf_path="openai-community/gpt2")
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    check_known_scores(known, outcome)
    assert "self-check: passed" in capsys.readouterr().out
    check_known_scores(Config(hf_path="openai-community/gpt2", max_per_task=10), outcome)
    assert "only a part of the examples" in capsys.readouterr().out
    check_known_scores(Config(), outcome)
    assert "above GPT-2 124M (0.1139), below GPT-2 355M (0.1849)" in capsys.readouterr().out
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    check_known_scores(known, outcome)
    assert not capsys.readouterr().out, "another bundle says nothing about these models"


@pytest.mark.slow
def test_without_network_the_command_says_what_to_do(tmp_path):
    environment = {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "scripts.base_eval", "--hf-path=openai-community/gpt2", "--device-type=cpu"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert line.startswith("error: cannot load the model openai-community/gpt2: ")
    assert "without network: a folder of the model; behind a mirror: HF_ENDPOINT" in line
