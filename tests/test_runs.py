"""Plans, the speedrun command, the sweeps and the shell scripts."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
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
from scripts import speedrun, sweep

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


def test_an_unreachable_hub_is_said_and_tinyworld_offered(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    problem = speedrun.check_hub({"NANOCHAT_DATA": "hub"}, ["data", "tok_train"])
    assert "cannot be reached" in problem and "NANOCHAT_DATA=tinyworld bash runs/speedrun.sh" in problem
    assert speedrun.check_hub({"NANOCHAT_DATA": "hub"}, ["base_train"]) == ""
    assert speedrun.check_hub({"NANOCHAT_DATA": "tinyworld"}, ["data"]) == ""


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


# --- sweeps ------------------------------------------------------------------------------------------

SUMMARY = {
    "depth": 12, "model_dim": 768, "num_scaling_params": 110_100_912, "num_iterations": 100,
    "num_params": {"wte": 1, "value_embeds": 2, "lm_head": 3, "transformer_matrices": 4, "scalars": 5, "total": 15},
    "tokens_trained": 1_101_009_120, "total_batch_size": 524288, "val_bpb": 0.9, "core_score": None,
    "train_time_sec": 12.5, "flops": 1e18,
}  # fmt: skip


def test_sweep_runs():
    runs = sweep.sweep_runs("miniseries", "jan11", "", "")
    assert [one.depth for one in runs] == [12, 14, 16, 18, 20, 22, 24, 26]
    assert runs[0].tag == "jan11_miniseries_d12"
    runs = sweep.sweep_runs("scaling", "jan26", "10,12", "1e18,2.15e18")
    assert [one.tag for one in runs] == [
        "jan26_scaling_1e18_d10", "jan26_scaling_1e18_d12", "jan26_scaling_2.15e18_d10",
        "jan26_scaling_2.15e18_d12",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--depths=x"):
        sweep.sweep_runs("scaling", "s", "x", "1e18")


@pytest.mark.parametrize("kind", ["miniseries", "scaling"])
def test_flags_of_sweeps_exist_and_the_users_win(kind):
    from scripts.base_train import Config as BaseConfig

    cfg = sweep.Config(kind=kind, train_args="--device-batch-size=2 --max-seq-len=64")
    for one in sweep.sweep_runs(kind, "s", "", cfg.flops):
        parsed = parse(BaseConfig, sweep.train_flags(cfg, one).split())
        assert (parsed.depth, parsed.model_tag, parsed.device_batch_size) == (one.depth, one.tag, 2)
        assert (parsed.target_flops > 0) == (kind == "scaling")


def test_setup_stages_are_left_out_when_they_are_done():
    runs = sweep.sweep_runs("miniseries", "s", "12", "")
    names = [sweep.sweep_plan(cfg, "s", runs, 1, has).names for cfg, has in (
        (sweep.Config(), False), (sweep.Config(), True), (sweep.Config(skip_setup=True), False),
    )]  # fmt: skip
    assert [len(n) for n in names] == [3, 2, 1]


@pytest.mark.parametrize("kind", ["miniseries", "scaling"])
def test_rows_come_from_summaries_and_are_not_repeated(kind, tmp_path):
    runs = sweep.sweep_runs(kind, "s", "12,14", "1e18")
    write_json(tmp_path / "base_checkpoints" / runs[0].tag / "run_summary.json", SUMMARY)
    for _ in range(2):
        sweep.write_rows(tmp_path / "results.csv", kind, runs, tmp_path)
    with (tmp_path / "results.csv").open() as file:
        (row,) = list(csv.DictReader(file))
    assert row["depth"] == "12" and row["val_bpb"] == "0.9" and row["core_score"] == ""
    if kind == "miniseries":
        assert row["param_data_ratio"] == "10" and row["num_params"] == "15"
    else:
        assert (
            row["flops_budget"] == "1e18" and row["params_transformer"] == "4" and row["params_total"] == "15"
        )


def test_a_sweep_trains_and_resumes(tmp_path, monkeypatch):
    """The whole sweep with a stand-in for base_train, because real runs take hours."""
    (tmp_path / "trainer.py").write_text(
        "import json, os, sys\n"
        "flags = dict(f[2:].split('=') for f in sys.argv[1:])\n"
        "folder = os.path.join(os.environ['NANOCHAT_BASE_DIR'], 'base_checkpoints', flags['model-tag'])\n"
        "os.makedirs(folder)\n"
        f"json.dump({SUMMARY!r} | {{'depth': int(flags['depth'])}}, open(folder + '/run_summary.json', 'w'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("nanochat.environment.gpus", lambda: ())
    original = sweep.sweep_plan

    def standing_in(*arguments):
        plan = original(*arguments)
        swapped = [
            dataclasses.replace(
                s, command=tuple(w.replace("scripts.base_train", "trainer") for w in s.command)
            )
            for s in plan.stages
        ]
        return dataclasses.replace(plan, stages=tuple(swapped))

    monkeypatch.setattr(sweep, "sweep_plan", standing_in)
    cfg = sweep.Config(series="s", depths="2,4", skip_setup=True)
    for _ in range(2):  # the second time the folders exist and the stand-in would fail
        sweep.main(cfg)
    rows = (tmp_path / "base" / "s_miniseries_results" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["depth", "2", "4"]


def write_isoflops(path, exponent=0.5):
    """A sweep whose best sizes are 1e8 * (flops / 1e18) ** exponent, with bits per byte an exact parabola."""
    rows = [",".join(sweep.SCALING_COLUMNS)]
    for flops in (1e18, 1e19):
        best = 1e8 * (flops / 1e18) ** exponent
        for factor in (0.25, 0.5, 1, 2, 4):
            params = best * factor
            values = dict.fromkeys(sweep.SCALING_COLUMNS, 0) | {
                "flops_budget": flops, "params_transformer": params * 0.8, "params_lm_head": params * 0.2,
                "tokens_trained": flops / (6 * params), "val_bpb": 0.8 + 0.1 * np.log10(factor) ** 2,
            }  # fmt: skip
            rows.append(",".join(str(values[column]) for column in sweep.SCALING_COLUMNS))
    path.write_text("\n".join(rows) + "\n")


def test_scaling_analysis_recovers_a_known_law(tmp_path):
    from dev import scaling_analysis

    write_isoflops(tmp_path / "results.csv")
    budgets = scaling_analysis.read_budgets(tmp_path / "results.csv")
    assert [b.best_params for b in budgets] == pytest.approx([1e8, 1e8 * 10**0.5], rel=1e-6)
    assert [b.best_bpb for b in budgets] == pytest.approx([0.8, 0.8])
    assert budgets[0].best_tokens == pytest.approx(1e18 / 6e8, rel=1e-6)
    text = scaling_analysis.report(budgets)
    assert "best params ~ FLOPs^0.500" in text and "best tokens ~ FLOPs^0.500" in text
    scaling_analysis.main(scaling_analysis.Config(results=str(tmp_path / "results.csv")))
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_scaling_analysis_of_nothing_is_a_clear_error(tmp_path):
    from dev import scaling_analysis

    with pytest.raises(UserError, match="does not exist"):
        scaling_analysis.read_budgets(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text(",".join(sweep.SCALING_COLUMNS) + "\n")
    with pytest.raises(UserError, match="three"):
        scaling_analysis.read_budgets(tmp_path / "empty.csv")


# --- shell scripts -----------------------------------------------------------------------------------

SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
ENTRIES = [path for path in SCRIPTS if path.name != "setup.sh"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.name)
def test_entry_scripts_are_strict_and_thin(path):
    text = path.read_text()
    assert "set -euo pipefail" in text and "exec python -m" in text
    assert len([line for line in text.splitlines() if line and line[0] != "#"]) < 10


@pytest.fixture
def sandbox(tmp_path):
    """A copy of runs/ beside stand-ins for uv and cargo, so that set-up can be tried without installing."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "runs", root / "runs")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    return root, tools


def tool(folder, name, body):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


UV = """case "$1" in
--version) echo uv 1 ;;
sync) echo synced; mkdir -p .venv/bin; echo "PATH=$PWD/.venv/bin:\\$PATH" > .venv/bin/activate
      printf '#!/bin/sh\\necho python "$@" in $NANOCHAT_BASE_DIR\\n' > .venv/bin/python
      /bin/chmod +x .venv/bin/python ;;
esac"""


def speed(root, tools, **environment):
    return subprocess.run(
        [str(tools / "bash"), str(root / "runs" / "speedrun.sh"), "--seed=1"], capture_output=True, text=True,
        cwd=root.parent, timeout=60,
        env={"PATH": str(tools), "HOME": str(root.parent / "home"), "NANOCHAT_BASE_DIR": "base"} | environment,
    )  # fmt: skip


def test_setup_uses_uv_and_runs_the_plan_with_the_flags(sandbox):
    root, tools = sandbox
    tool(tools, "uv", UV)
    tool(tools, "cargo", "echo cargo 1")
    done = speed(root, tools)
    assert done.returncode == 0, done.stderr
    assert "synced" in done.stdout
    assert f"python -m scripts.speedrun --seed=1 in {root.parent / 'base'}" in done.stdout


def test_setup_installs_uv_with_pip_once(sandbox):
    root, tools = sandbox
    tool(tools, "cargo", "echo cargo 1")
    stored = root.parent / "uv-body"
    stored.write_text(f"#!/bin/sh\n{UV}\n")
    pip = f"""case "$*" in
*--version) ;;
*--target*) echo pip "$@"; mkdir -p "$6/bin"; cat {stored} > "$6/bin/uv"; /bin/chmod +x "$6/bin/uv" ;;
esac"""
    tool(tools, "python3", pip)
    done = speed(root, tools)
    assert done.returncode == 0, done.stderr
    assert (
        "uv is missing; installing it" in done.stdout and "pip -m pip install --quiet --target" in done.stdout
    )
    again = speed(root, tools)
    assert again.returncode == 0 and "uv is missing" not in again.stdout


def test_without_rust_it_says_exactly_what_to_do(sandbox):
    root, tools = sandbox
    tool(tools, "uv", UV)
    done = speed(root, tools)
    assert done.returncode == 2
    assert "cargo was not found" in done.stderr and "https://sh.rustup.rs" in done.stderr
    assert "synced" not in done.stdout


def test_rust_outside_the_path_is_found(sandbox):
    root, tools = sandbox
    tool(tools, "uv", UV)
    tool(root.parent / "home" / ".cargo" / "bin", "cargo", "echo cargo 1")
    assert speed(root, tools).returncode == 0


def test_without_uv_and_pip_it_says_what_to_install(sandbox):
    root, tools = sandbox
    done = speed(root, tools)
    assert done.returncode == 2 and "install uv" in done.stderr


def test_skip_setup_needs_an_environment(sandbox):
    root, tools = sandbox
    done = speed(root, tools, SKIP_SETUP="1")
    assert done.returncode == 2 and "SKIP_SETUP" in done.stderr


def test_help_is_fast():
    import time

    for module in ("scripts.speedrun", "scripts.sweep"):
        started = time.monotonic()
        command = [sys.executable, "-m", module, "--help"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ).returncode == 0
        assert time.monotonic() - started < 2
