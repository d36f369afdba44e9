"""MuonAdamW over real gloo processes equals MuonAdamW in one process that sees the summed gradients."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import World
from nanochat.optim import MuonAdamW

SIZES = (
    2,
    3,
    4,
    6,
)  # divides everything, divides little, divides some, more ranks than matrices of some shapes
ADAMW = {"kind": "adamw", "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
MUON = {"kind": "muon", "lr": 0.02, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.1}


def menagerie(dtype: torch.dtype = torch.float32) -> list[dict]:
    """Parameters of every kind: large and small, rows and counts that divide and do not, one bf16 table."""
    generator = torch.Generator().manual_seed(7)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
        return torch.nn.Parameter((0.1 * torch.randn(*shape, generator=generator)).to(dtype))

    return [
        {**ADAMW, "params": [make(240, 8), make(250, 8), make(64, 24)]},
        # With a large eps AdamW is not blind to the scale of its gradient: a mean in place of a sum would show.
        {**ADAMW, "params": [make(130, 8), make(5)], "eps": 1.0},
        {**ADAMW, "params": [make(7), make(1), make(1, 24)]},
        {**ADAMW, "params": [make(200, 8, dtype=dtype)]},
        {**MUON, "params": [make(16, 16) for _ in range(5)]},
        {**MUON, "params": [make(32, 8) for _ in range(3)]},
        {**MUON, "params": [make(8, 32) for _ in range(2)]},
        {**MUON, "params": [make(4, 12)]},
    ]


def params_of(groups: list[dict]) -> list[torch.nn.Parameter]:
    return [param for group in groups for param in group["params"]]


def gradient(step: int, rank: int, index: int, param: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(100_000 * step + 1000 * rank + index)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer: MuonAdamW, steps: range, ranks: range, **options) -> Tensor:
    """Steps with the sum of what these ranks would contribute; returns the last step's norm."""
    norm = torch.zeros(())
    for step in steps:
        for i, param in enumerate(params_of(optimizer.param_groups)):
            param.grad = sum((gradient(step, rank, i, param) for rank in ranks), torch.zeros_like(param))
        norm = optimizer.step(**options)
    return norm


def values(groups: list[dict]) -> list[Tensor]:
    return [param.detach().clone() for param in params_of(groups)]


def restore(groups: list[dict], saved: list[Tensor]) -> None:
    for param, value in zip(params_of(groups), saved, strict=True):
        param.data.copy_(value)


# --- what runs in the processes ----------------------------------------------------------------------


def worker(rank: int, size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=size)
    world = World(rank, rank, size, torch.device("cpu"))
    results = {
        "fp32": scenario_steps(world, torch.float32),
        "bf16": scenario_steps(world, torch.bfloat16),
        "resumed": scenario_resume(world, directory / "own.pt"),
        "foreign": scenario_foreign_state(world, directory / "foreign.pt"),
        "missing": scenario_missing_gradient(world),
        "guard": scenario_guard(world),
    }
    torch.save(results, directory / f"rank{rank}.pt")
    dist.barrier()  # destroying the group while a peer still communicates aborts that peer
    dist.destroy_process_group()


def fingerprint(groups: list[dict]) -> str:
    data = b"".join(value.contiguous().view(torch.uint8).numpy().tobytes() for value in values(groups))
    return hashlib.sha256(data).hexdigest()


def scenario_steps(world: World, dtype: torch.dtype) -> dict:
    groups = menagerie(dtype)
    optimizer = MuonAdamW(groups, world, dtype)
    fingerprints = []
    for step in range(10):
        train(optimizer, range(step, step + 1), range(world.rank, world.rank + 1))
        fingerprints.append(fingerprint(groups))
    elements = sum(b.numel() for _, unit in optimizer._units for b in unit._buffers.values())
    state = optimizer.full_state_dict()
    return {"fingerprints": fingerprints, "values": values(groups), "state": state, "elements": elements}


def scenario_resume(world: World, path: Path) -> list[Tensor]:
    own = range(world.rank, world.rank + 1)
    first = menagerie()
    optimizer = MuonAdamW(first, world)
    train(optimizer, range(5), own)
    state = optimizer.full_state_dict()
    if world.is_main:
        torch.save({"state": state, "values": values(first)}, path)
    dist.barrier()
    return resume(world, torch.load(path, weights_only=True), own)


def scenario_foreign_state(world: World, path: Path) -> list[Tensor]:
    """Continue what one process has begun."""
    return resume(world, torch.load(path, weights_only=True), range(world.rank, world.rank + 1))


def resume(world: World | None, saved: dict, ranks: range) -> list[Tensor]:
    groups = menagerie()
    restore(groups, saved["values"])
    optimizer = MuonAdamW(groups, world)
    optimizer.load_full_state_dict(saved["state"])
    train(optimizer, range(5, 10), ranks)
    return values(groups)


def scenario_missing_gradient(world: World) -> str:
    groups = menagerie()
    optimizer = MuonAdamW(groups, world)
    for param in params_of(groups):
        param.grad = torch.ones_like(param)
    groups[5]["params"][1].grad = None
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def scenario_guard(world: World) -> dict:
    """A clipped step, then one in which a single rank has a single NaN."""
    groups = menagerie()
    optimizer = MuonAdamW(groups, world)
    norm = train(optimizer, range(1), range(world.rank, world.rank + 1), clip_norm=1.0)
    clipped = values(groups)
    for i, param in enumerate(params_of(groups)):
        param.grad = gradient(1, world.rank, i, param)
    if world.rank == world.size - 1:
        groups[5]["params"][0].grad.view(-1)[3] = float("nan")
    optimizer.step(skip=torch.tensor(False))
    unchanged = all(torch.equal(a, b) for a, b in zip(values(groups), clipped, strict=True))
    steps = optimizer.full_state_dict()["state"].get(0, {}).get("step")
    return {"norm": norm, "clipped": clipped, "unchanged": unchanged, "steps": steps}


# --- the comparisons ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    size: int
    directory: Path
    ranks: list[dict]


def wait_for(processes: list, seconds: float = 120) -> None:
    """Until all have ended; when one fails or time is up, the others would wait for it in vain and are killed."""
    deadline = time.monotonic() + seconds
    while alive := [process for process in processes if process.is_alive()]:
        if time.monotonic() > deadline or any(process.exitcode for process in processes):
            for process in alive:
                process.kill()
        wait([process.sentinel for process in alive], timeout=1)


@pytest.fixture(scope="module", params=SIZES)
def run(request, tmp_path_factory) -> Run:
    """All scenarios on one number of processes, started once."""
    size, directory = request.param, tmp_path_factory.mktemp(f"ranks{request.param}")
    torch.set_num_threads(1)
    begun = menagerie()
    optimizer = MuonAdamW(begun)
    train(optimizer, range(5), range(size))
    torch.save({"state": optimizer.full_state_dict(), "values": values(begun)}, directory / "foreign.pt")
    # The fork server imports torch once, while it has one thread; its children then start in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nanochat.optim"])
    processes = [context.Process(target=worker, args=(rank, size, directory)) for rank in range(size)]
    for process in processes:
        process.start()
    wait_for(processes)
    assert [process.exitcode for process in processes] == [0] * size
    ranks = [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(size)]
    return Run(size, directory, ranks)


def reference(size: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict]:
    groups = menagerie(dtype)
    optimizer = MuonAdamW(groups, None, dtype)
    train(optimizer, range(10), range(size))
    return values(groups), optimizer.full_state_dict()


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance, msg=lambda text, i=i: f"parameter {i}: {text}"
        )


def test_many_ranks_equal_one_that_sees_the_sum(run):
    expected, _ = reference(run.size)
    assert_near(run.ranks[0]["fp32"]["values"], expected, 1e-6)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_ranks_are_bit_identical_after_every_step(run, mode):
    histories = [result[mode]["fingerprints"] for result in run.ranks]
    assert all(history == histories[0] for history in histories)
    assert len(set(histories[0])) == 10


def test_gradients_are_summed_not_averaged(run):
    _, expected = reference(run.size)
    state = run.ranks[0]["fp32"]["state"]["state"]
    assert state.keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        for name, value in entry.items():
            ours, theirs = torch.as_tensor(state[index][name]), torch.as_tensor(value)
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda t, i=index, n=name: f"{i} {n} {t}"
            )


def test_state_is_dealt_out(run):
    whole = sum(v.numel() for e in reference(1)[1]["state"].values() for k, v in e.items() if k != "step")
    # two moments of the four parameters below 1024 elements
    replicated = 2 * (5 + 7 + 1 + 24)
    total = sum(result["fp32"]["elements"] for result in run.ranks)
    assert total == whole + (run.size - 1) * replicated
    # No rank holds more than its share and the rounding up of whole rows and matrices.
    largest = 2 * 32 * 8 + 2 * 16 * 16 + 2 * 8 * 32 + 2 * 4 * 12 + 2 * 5 * 24
    assert max(result["fp32"]["elements"] for result in run.ranks) <= whole / run.size + replicated + largest


def test_resumed_training_is_bit_for_bit(run):
    for result in run.ranks:
        straight = result["fp32"]["values"]
        assert all(torch.equal(a, b) for a, b in zip(result["resumed"], straight, strict=True))


def test_state_moves_between_numbers_of_ranks(run):
    expected, _ = reference(run.size)
    assert_near(run.ranks[0]["foreign"], expected, 1e-6)
    saved = torch.load(run.directory / "own.pt", weights_only=True)
    assert_near(resume(None, saved, range(run.size)), expected, 1e-6)


def test_a_missing_gradient_is_an_error_that_names_the_parameter(run):
    for result in run.ranks:
        assert "parameter 15 of shape (32, 8) has no gradient" in result["missing"]


def test_norm_and_clipping_are_those_of_the_whole_gradient(run):
    groups = menagerie()
    norm = train(MuonAdamW(groups), range(1), range(run.size), clip_norm=1.0)
    for result in run.ranks:
        torch.testing.assert_close(result["guard"]["norm"], norm, rtol=1e-5, atol=0)
    assert_near(run.ranks[0]["guard"]["clipped"], values(groups), 1e-6)


def test_one_nan_on_one_rank_stops_the_step_on_all(run):
    assert all(result["guard"]["unchanged"] for result in run.ranks)
    assert run.ranks[0]["guard"]["steps"] == 1
