"""Muon's update rule: its mathematics, for every variant."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nanochat.muon import MUON_VARIANTS, MuonVariant, muon_update, orthogonalise
from nanochat.optim import MuonAdamW
from tests.test_optim import MUON, parameter

pytestmark = pytest.mark.usefixtures("one_seeded_thread")


def first_update(gradients: Tensor, variant: MuonVariant, **changes) -> Tensor:
    """What the first step subtracts from zero matrices, divided by the learning rate."""
    num_matrices, num_rows, num_columns = gradients.shape
    params = torch.zeros_like(gradients)
    shape = (num_matrices, num_rows, 1) if num_rows >= num_columns else (num_matrices, 1, num_columns)
    settings = {"lr": 0.5, "momentum": 0.95, "beta2": 0.9, "weight_decay": 0.0} | changes
    muon_update(
        params, gradients.clone(), torch.zeros_like(params), torch.zeros(shape), **settings,
        num_iterations=5, variant=variant, dtype=torch.float32,
    )  # fmt: skip
    return -params / 0.5


@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (8, 32)])
def test_update_is_nearly_orthogonal_with_the_norm_of_an_orthogonal_matrix(shape):
    aspect = math.sqrt(max(1, shape[0] / shape[1]))
    update = first_update(torch.randn(3, *shape), MUON_VARIANTS["r3"]) / aspect
    torch.testing.assert_close(
        torch.linalg.matrix_norm(update), torch.full((3,), math.sqrt(min(shape))), rtol=1e-5, atol=0
    )
    values = torch.linalg.svdvals(update)
    assert (values[:, 0] / values[:, -1]).max() < 4


def test_orthogonalise_approaches_the_polar_factor():
    gradient = torch.randn(4, 12, 30)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    ours = orthogonalise(gradient, MUON_VARIANTS["r3"], 5)
    torch.testing.assert_close(ours, left @ right, rtol=0, atol=0.1)


def test_wide_and_tall_agree_without_row_equalisation():
    gradients = torch.randn(2, 8, 24)
    wide = first_update(gradients, MUON_VARIANTS["r2"])
    tall = first_update(gradients.mT.contiguous(), MUON_VARIANTS["r2"]) / math.sqrt(3)
    torch.testing.assert_close(wide, tall.mT, rtol=1e-4, atol=1e-5)


def test_update_does_not_depend_on_the_scale_of_the_gradient():
    gradients = torch.randn(2, 8, 24)
    torch.testing.assert_close(
        first_update(gradients, MUON_VARIANTS["r3"]), first_update(1000 * gradients, MUON_VARIANTS["r3"]),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("variant", MUON_VARIANTS)
def test_matrices_of_a_stack_do_not_influence_each_other(variant):
    gradients = torch.randn(3, 8, 24) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)
    together = first_update(gradients, MUON_VARIANTS[variant])
    alone = torch.cat([first_update(g[None], MUON_VARIANTS[variant]) for g in gradients])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", MUON_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradient_changes_nothing_and_rank_one_works(variant, dtype):
    param = parameter(8, 24)
    before = param.detach().clone()
    optimizer = MuonAdamW([{**MUON, "variant": variant, "weight_decay": 0.0, "params": [param]}], None, dtype)
    param.grad = torch.zeros(8, 24)
    optimizer.step()
    assert torch.equal(param, before)
    param.grad = torch.ones(8, 24)
    optimizer.step()
    assert param.isfinite().all() and not torch.equal(param, before)


def test_decay_acts_only_where_it_agrees_with_the_update():
    weight, gradients = torch.randn(1, 8, 8), torch.randn(1, 8, 8)
    results = []
    for decay in (0.0, 0.3):
        params = weight.clone()
        muon_update(
            params, gradients.clone(), torch.zeros(1, 8, 8), torch.zeros(1, 8, 1),
            0.02, 0.95, 0.9, decay, 5, MUON_VARIANTS["r3"], torch.float32,
        )  # fmt: skip
        results.append(params)
    plain, decayed = results
    agrees = (weight - plain) * weight >= 0
    expected = plain - 0.02 * 0.3 * weight * agrees
    assert 0.2 < agrees.float().mean() < 0.8
    torch.testing.assert_close(decayed, expected, rtol=0, atol=1e-6)
