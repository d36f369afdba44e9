"""The sweeps: their runs, what a dry run says, and the rows they collect; and the fit of scaling laws."""

from __future__ import annotations

import csv
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from nanochat.common import UserError, write_json
from nanochat.configurator import parse
from nanochat.environment import Gpu
from scripts import sweep


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name in ("NANOCHAT_DATA", "WANDB_RUN", "NPROC_PER_NODE", "SKIP_SETUP", "SERIES_NAME", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


SUMMARY = {
    "depth": 12, "model_dim": 768, "num_scaling_params": 110_100_912, "num_iterations": 100,
    "num_params": {"wte": 1, "value_embeds": 2, "lm_head": 3, "transformer_matrices": 4, "scalars": 5, "total": 15},
    "tokens_trained": 1_101_009_120, "total_batch_size": 524288, "val_bpb": 0.9, "core_score": None,
    "train_time_sec": 12.5, "flops": 1e18,
}  # fmt: skip


SPEED = sweep.Speed(1e12, "for tests")


def test_sweep_runs():
    runs = sweep.sweep_runs("miniseries", "jan11", "", "")
    assert [one.depth for one in runs] == [12, 14, 16, 18, 20, 22, 24, 26]
    assert runs[0].tag == "jan11_miniseries_d12"
    runs = sweep.sweep_runs("scaling", "jan26", "10,12", "1e18,2.15e18")
    assert [one.tag for one in runs] == [
        "jan26_scaling_1e18_d10", "jan26_scaling_1e18_d12", "jan26_scaling_2.15e18_d10",
        "jan26_scaling_2.15e18_d12",
    ]  # fmt: skip
    assert len(sweep.sweep_runs("miniseries", "s", "4,4,2", "")) == 2
    with pytest.raises(UserError, match=r"--series=\.\./x must be letters"):
        sweep.sweep_runs("miniseries", "../x", "", "")
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
    names = [sweep.sweep_plan(cfg, "s", runs, 1, has, SPEED).names for cfg, has in (
        (sweep.Config(), False), (sweep.Config(), True), (sweep.Config(skip_setup=True), False),
    )]  # fmt: skip
    assert [len(n) for n in names] == [3, 2, 1]


def test_times_follow_from_flops_and_the_speed_of_the_machine(monkeypatch):
    monkeypatch.setattr("nanochat.environment.gpus", lambda: ())
    runs = sweep.sweep_runs("scaling", "s", "10,12", "1e18,2e18")
    plan = sweep.sweep_plan(sweep.Config(kind="scaling"), "s", runs, 1, True, SPEED)
    seconds = [stage.seconds for stage in plan.stages if stage.name != "data"]
    assert seconds == pytest.approx([1e6, 1e6, 2e6, 2e6], rel=0.01)
    h100 = sweep.expected_speed((Gpu("NVIDIA H100 80GB HBM3", 85_000_000_000),), 2)
    assert h100.flops == 2 * 0.45 * 989e12 and str(h100).endswith(
        "(2 x NVIDIA H100 80GB HBM3, by its data sheet)"
    )
    assert "a guess" in str(sweep.expected_speed((Gpu("abacus", 1),), 1))
    assert sweep.expected_speed((), 1).flops > 1e8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dept=3", "did you mean --depth"), ("'", "No closing quotation"), ("--num-iterations=0", "at least 1"),
        ("--model-tag=x", "s_miniseries_d12: --depth, --model-tag and"),
        ("--total-batch-size=7", "not a multiple of 32 rows"),
    ],
)  # fmt: skip
def test_flags_that_base_train_would_refuse_are_told_before_the_first_run(flags, message):
    with pytest.raises(UserError, match=message):
        sweep.main(sweep.Config(series="s", depths="12,12", train_args=flags))


def test_a_dry_run_says_which_data_is_missing_and_what_is_in_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nanochat.environment.gpus", lambda: ())
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    sweep.main(sweep.Config(depths="4", dry_run=True))
    said = capsys.readouterr().out
    assert "1. data (about 33m22s): 1,000 shards of climbmix\n" in said and "evaluations left out" in said
    assert "problem: the hub cannot be reached" in said and " free and the plan needs 93.6 GB" in said
    with pytest.raises(UserError, match=r"the hub cannot be reached.*set NANOCHAT_BASE_DIR to a larger disk"):
        sweep.main(sweep.Config(depths="4"))
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    sweep.main(sweep.Config(depths="4", dry_run=True))
    said = capsys.readouterr().out
    assert "1. data (about 5s): generate the embedded text\n" in said and "problem" not in said
    shard = tmp_path / "base" / "tinyworld" / "base_data" / "shard_00000.parquet"
    shard.parent.mkdir(parents=True)
    shard.touch()
    sweep.main(sweep.Config(depths="4", dry_run=True))
    assert ". data" not in capsys.readouterr().out, "it may be of another seed, and was not to be replaced"
    assert not (tmp_path / "base" / "run").exists()


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
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: .*Is a directory"):
        scaling_analysis.read_budgets(tmp_path)
    (tmp_path / "empty.csv").write_text(",".join(sweep.SCALING_COLUMNS) + "\n")
    with pytest.raises(UserError, match="three"):
        scaling_analysis.read_budgets(tmp_path / "empty.csv")
