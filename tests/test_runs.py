"""The plans, and the speedrun command."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest

from nanochat import plans
from nanochat.common import UserError, write_json
from nanochat.configurator import parse
from nanochat.environment import Gpu
from nanochat.memory import training_bytes
from nanochat.network_config import GPTConfig
from nanochat.pipeline import Plan
from nanochat.scaling import model_dimensions
from nanochat.tinyworld_plan import tinyworld_plan
from scripts import speedrun

ROOT = Path(__file__).resolve().parent.parent
H100 = Gpu("NVIDIA H100 80GB HBM3", 85_000_000_000)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", 24 * 2**30)
RTX_3060 = Gpu("NVIDIA GeForce RTX 3060", 12 * 2**30)


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name in ("NANOCHAT_DATA", "WANDB_RUN", "NPROC_PER_NODE", "SKIP_SETUP", "SERIES_NAME", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def command(plan: Plan, name: str) -> str:
    return " ".join(plan.stage(name).command)


ALL_PLANS = {
    "flagship": lambda: plans.gpu_plan((H100,) * 8, rl=True),
    "one card": lambda: plans.gpu_plan((RTX_4090,)),
    "run1000": lambda: plans.run1000_plan((H100,) * 8),
    "cpu": plans.cpu_plan,
    "tinyworld": lambda: tinyworld_plan("test"),
}


# --- plans -------------------------------------------------------------------------------------------


def test_eight_h100_give_the_flagship():
    plan = plans.gpu_plan((H100,) * 8)
    assert command(plan, "base_train") == (
        "torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=24"
        " --target-param-data-ratio=8 --device-batch-size=16 --model-tag=d24"
    )
    assert command(plan, "data").endswith("nanochat.dataset -n 8")
    assert plan.stage("data_all").background and "data_all" in plan.stage("base_train").needs
    assert "1,384,122,122 parameters" in plan.facts["model"]
    assert 3600 < plan.stage("base_train").seconds < 3 * 3600
    assert plan.environment == {"NANOCHAT_DATA": "hub"}


def test_one_gpu_needs_no_torchrun_and_gets_a_smaller_model():
    plan = plans.gpu_plan((RTX_4090,))
    assert command(plan, "base_train").startswith("python -m scripts.base_train --depth=12 ")


@pytest.mark.parametrize("gpus", [(H100,), (H100,) * 4, (RTX_4090,) * 2, (RTX_3060,), (RTX_4090,) * 6])
def test_every_choice_fits_its_memory_and_divides_its_batch(gpus):
    choice = plans.choose(gpus)
    assert choice.num_gpus & (choice.num_gpus - 1) == 0 and choice.num_gpus <= len(gpus)
    config = GPTConfig.modern(**model_dimensions(choice.depth))
    assert training_bytes(config, choice.device_batch_size, choice.num_gpus) < gpus[0].memory_bytes
    micro = choice.device_batch_size * config.sequence_len * choice.num_gpus
    assert plans.ratio_horizon(config, 8).total_batch_size % micro == 0


def test_more_or_larger_gpus_never_train_a_smaller_model():
    depths = [plans.choose(gpus).depth for gpus in ((RTX_3060,), (RTX_4090,), (H100,), (H100,) * 8)]
    assert depths == sorted(depths)


def test_a_gpu_too_small_for_anything_is_told_about_tinyworld():
    with pytest.raises(UserError, match="tinyworld"):
        plans.choose((Gpu("toy", 2**28),))


def test_run1000_is_depth_32_with_8_rows():
    plan = plans.run1000_plan((H100,) * 8)
    assert "--depth=32 --target-param-data-ratio=20 --device-batch-size=8" in command(plan, "base_train")
    assert "--max-chars=4000000000 --vocab-size=65536" in command(plan, "tok_train")
    with pytest.raises(UserError, match="needs GPUs"):
        plans.run1000_plan(())


def test_tinyworld_fits_a_quarter_of_an_hour_and_uses_the_seed():
    plan = tinyworld_plan("test", cores=2, seed=7)
    assert sum(stage.seconds for stage in plan.stages) < 14 * 60  # the rest is for the set-up
    assert "--seed=7" in command(plan, "tinyworld") and "--seed=7" in command(plan, "base_train")
    assert plan.environment["NANOCHAT_DATA"] == "tinyworld"
    names = plan.names
    assert (
        names.index("base_train")
        < names.index("mid_train")
        < names.index("chat_sft")
        < names.index("chat_rl")
    )
    assert {"chat_eval_mid", "chat_eval_sft", "chat_eval_rl", "base_eval"} <= set(names)


def test_each_lesson_goes_on_with_the_model_of_the_one_before():
    plan = tinyworld_plan("test")
    taught = ["base_train", *(name for name in plan.names if name.startswith("lesson_")), "mid_train"]
    assert len(taught) == 5
    for before, after in itertools.pairwise(taught):
        folder, tag = plan.stage(before).output.split("/")
        assert f"--model-tag={tag}" in command(plan, after) and before in plan.stage(after).needs
        assert folder == ("mid_checkpoints" if "--source=mid" in command(plan, after) else "base_checkpoints")
    assert plan.stage("mid_train").output == "mid_checkpoints/d4"  # where the evaluation and SFT look for it


def test_more_cores_train_longer():
    def steps(cores):
        return int(command(tinyworld_plan("t", cores), "base_train").split("--num-iterations=")[1].split()[0])

    assert steps(1) == steps(2) < steps(8) <= steps(64) <= 3 * steps(2)


@pytest.mark.parametrize("name", ALL_PLANS)
def test_needs_come_before_and_every_name_is_unique(name):
    plan = ALL_PLANS[name]()
    assert len(set(plan.names)) == len(plan.names)
    assert plan.names[0] == "report_reset" and plan.names[-1] == "report"
    for place, stage in enumerate(plan.stages):
        assert set(stage.needs) <= set(plan.names[:place])


@pytest.mark.parametrize("name", ALL_PLANS)
def test_every_flag_of_every_plan_exists(name):
    """Parse each stage's command line with the configuration of its script."""
    for stage in ALL_PLANS[name]().stages:
        module, *flags = [w for w in stage.command[stage.command.index("-m") + 1 :] if w != "--"]
        if not module.startswith("scripts."):
            continue
        config = parse(importlib.import_module(module).Config, flags)
        assert hasattr(config, "resume") == stage.resumable, stage.name


def test_wandb_run_names_carry_the_stage(monkeypatch):
    monkeypatch.setenv("WANDB_RUN", "jan")
    plan = plans.gpu_plan((H100,) * 8)
    assert "--run=jan-base" in command(plan, "base_train") and "--run=jan-sft" in command(plan, "chat_sft")
    assert "--run" not in command(plan, "chat_eval_sft")


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("nanochat.environment.gpus", lambda: ())


def test_without_a_gpu_the_plan_is_tinyworld_and_says_why(no_gpu):
    plan = speedrun.make_plan(speedrun.Config())
    assert plan.name == "tinyworld" and "no CUDA GPU" in plan.why


def test_hub_data_without_a_gpu_gives_the_cpu_plan(no_gpu, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    assert speedrun.make_plan(speedrun.Config()).name == "cpu"
    monkeypatch.setenv("NANOCHAT_DATA", "elsewhere")
    with pytest.raises(UserError, match="NANOCHAT_DATA"):
        speedrun.make_plan(speedrun.Config())


def test_tinyworld_can_be_asked_for_on_any_machine(monkeypatch):
    monkeypatch.setattr("nanochat.environment.gpus", lambda: (H100,) * 8)
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    assert speedrun.make_plan(speedrun.Config()).name == "tinyworld"


def test_gpus_give_the_speedrun_and_nproc_limits_it(monkeypatch):
    monkeypatch.setattr("nanochat.environment.gpus", lambda: (H100,) * 8)
    assert speedrun.make_plan(speedrun.Config()).name == "speedrun"
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert "--nproc_per_node=2" in command(speedrun.make_plan(speedrun.Config()), "base_train")
    monkeypatch.setenv("NPROC_PER_NODE", "9")
    with pytest.raises(UserError, match="NPROC_PER_NODE"):
        speedrun.make_plan(speedrun.Config())


def test_a_text_that_the_embedded_plan_would_not_train_on_is_a_problem(monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_DATASET", "mine")
    speedrun.main(speedrun.Config(plan="tinyworld", dry_run=True))
    assert (
        "problem: this plan trains on the embedded TinyWorld, not on NANOCHAT_DATASET=mine"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="TinyWorld"):
        speedrun.main(speedrun.Config(plan="tinyworld"))


def test_an_unreachable_hub_is_said_and_tinyworld_offered(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    problem = speedrun.check_hub("hub", ["data", "tok_train"])
    assert "cannot be reached" in problem and "NANOCHAT_DATA=tinyworld bash runs/speedrun.sh" in problem
    assert speedrun.check_hub("hub", ["base_train"]) == ""
    assert speedrun.check_hub("tinyworld", ["data"]) == ""


def test_a_hub_that_answers_with_an_error_is_reachable():
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert speedrun.hub_failure(f"http://127.0.0.1:{server.server_port}") == ""


def test_a_disk_that_is_too_small_is_said_unless_the_data_is_there(tmp_path):
    (tmp_path / "shard").write_bytes(b"x" * 1000)
    assert speedrun.check_disk(500, 600, tmp_path) == ""
    assert speedrun.check_disk(1500, 600, tmp_path) == ""
    assert "NANOCHAT_BASE_DIR" in speedrun.check_disk(1700, 600, tmp_path)


def test_dry_run_starts_nothing(no_gpu, tmp_path, capsys):
    speedrun.main(speedrun.Config(dry_run=True))
    shown = capsys.readouterr().out
    assert "nothing was started" in shown
    for word in ("parameters", "tokens", "memory", "disk", "time", "python -m scripts.base_train"):
        assert word in shown
    assert not (tmp_path / "base" / "run").exists()


def test_closing_words_show_the_scores_and_how_to_chat(tmp_path):
    metrics = {"GSM8K": {"sft": 0.6, "rl": 0.8}}
    write_json(
        tmp_path / "report" / "report.json", {"summary": {"metrics": metrics}, "stage_seconds": {"a": 60.0}}
    )
    words = speedrun.closing(tmp_path)
    assert "0.8000" in words and "scripts.chat_cli -p" in words and "scripts.chat_web" in words
