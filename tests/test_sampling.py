"""Sampling: settings, distributions, and randomness that does not depend on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.native import load_library
from nanochat.sampling import SamplingBatch, SamplingParams, sample, stream_key, top_logprobs, uniforms

torch.set_num_threads(1)
CPU = torch.device("cpu")
NONE = ((), ())


def draw(logits, params, uniform, histories=None):
    batch = SamplingBatch.of(params, CPU)
    values = torch.as_tensor(uniform, dtype=torch.float32)
    return sample(logits, batch, values, histories or [NONE] * len(params)).tolist()


def frequencies(logits: torch.Tensor, params: SamplingParams, count: int = 20_000) -> torch.Tensor:
    """How often each token is drawn for evenly spread uniforms: the distribution up to 1/count."""
    uniform = (torch.arange(count) + 0.5) / count
    ids = draw(logits.expand(count, -1), [params] * count, uniform)
    return torch.bincount(torch.tensor(ids), minlength=logits.numel()) / count


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"max_tokens": -1},
        {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"logprobs": -1}, {"stop": ("a", "")}, {"stop": "ab"},
        {"repetition_penalty": float("inf")}, {"repetition_penalty": 1e-300}, {"presence_penalty": float("nan")},
        {"frequency_penalty": -float("inf")}, {"logit_bias": {3: float("nan")}}, {"logit_bias": {1: 0.0, 3: 1e300}},
    ],
)  # fmt: skip
def test_meaningless_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_greedy_ignores_randomness_and_filters():
    logits = torch.randn(5, 40)
    params = [SamplingParams(temperature=0, top_k=3, top_p=0.5)] * 5
    assert draw(logits, params, [0.99] * 5) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("temperature", [1e-6, 1e-7, 1e-38, 1e-46])
def test_the_coldest_temperatures_take_the_best(temperature, top_k):
    logits = torch.tensor([[0.0, 15.0, 14.0, 1.0]])
    assert draw(logits, [SamplingParams(temperature, top_k)], [0.99]) == [1]


def test_distribution_without_filters_is_the_softmax():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 2
    expected = (logits / 0.7).softmax(-1)
    assert torch.allclose(frequencies(logits, SamplingParams(temperature=0.7)), expected, atol=2e-4)


def test_top_k_keeps_exactly_k_even_with_ties():
    logits = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    found = frequencies(logits, SamplingParams(top_k=2))
    assert sorted(found.tolist())[-2:] == pytest.approx([0.5, 0.5], abs=1e-3) and (found > 0).sum() == 2


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What SamplingParams mean, written down once more."""
    order = np.argsort(-logits, kind="stable")[: params.top_k or None]
    weights = np.exp((logits[order] - logits[order[0]]) / params.temperature)
    probs = weights / weights.sum()
    probs[weights < np.float32(params.min_p)] = 0
    probs[(np.cumsum(probs) - probs >= params.top_p) & (params.top_p < 1)] = 0
    whole = np.zeros(len(logits))
    whole[order] = probs / probs.sum()
    return whole


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    size=st.integers(1, 400),
    levels=st.integers(1, 1000),
    share=st.floats(0, 1),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.35]),
    min_p=st.sampled_from([0.0, 0.03]),
)
def test_draws_follow_the_settings(size, levels, share, temperature, top_p, min_p):
    rng = np.random.default_rng(size)
    logits = rng.integers(levels, size=size) * rng.choice([8 / levels, 30 / levels]) + rng.normal() * 9
    logits[1:][logits[1:] < np.quantile(logits, 0.1)] = -np.inf
    top_k = max(1, round(share * size)) if share < 0.7 else None
    logits = (
        logits if top_k and load_library("cpu_sampling") else logits + 1e-4 * rng.permutation(size)
    )  # no ties
    params = SamplingParams(temperature, top_k, top_p=top_p, min_p=min_p)
    logits = logits.astype(np.float32)
    found = frequencies(torch.from_numpy(logits), params, 5000).numpy()
    expected = distribution(logits.astype(float), params)
    assert np.abs(found - expected).max() <= 2 / 5000 + 1e-9
    assert not found[expected == 0].any()


@pytest.mark.parametrize("top_k", [None, 50])
def test_what_is_no_number_still_gives_an_id(top_k):
    for value in (torch.nan, -torch.inf):
        (chosen,) = draw(torch.full((1, 70), value), [SamplingParams(top_k=top_k)], [0.5])
        assert 0 <= chosen < 70


@pytest.mark.skipif(load_library("cpu_sampling") is None, reason="PyTorch's softmax is NaN as a whole")
@pytest.mark.parametrize("top_k", [None, 69])
def test_one_nan_is_no_candidate(top_k):
    logits = torch.zeros(70)
    logits[-1] = torch.nan
    found = frequencies(logits, SamplingParams(top_k=top_k))
    assert found[-1] == 0 and found[:-1].tolist() == pytest.approx([1 / 69] * 69, abs=1e-3)


def test_top_k_zero_none_and_beyond_the_vocabulary_are_off():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(2))
    for top_k in (0, None, -1, 12, 100):
        found = frequencies(logits, SamplingParams(top_k=top_k))
        assert torch.allclose(found, logits.softmax(-1), atol=2e-4)


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert frequencies(logits, SamplingParams(top_p=0.7)).tolist() == pytest.approx(
        [0.625, 0.375, 0, 0], abs=1e-3
    )
    assert frequencies(logits, SamplingParams(top_p=0.01)).tolist() == [1, 0, 0, 0]


def test_min_p_drops_what_is_unlikely_beside_the_best():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert frequencies(logits, SamplingParams(min_p=0.5)).tolist() == pytest.approx(
        [0.625, 0.375, 0, 0], abs=1e-3
    )


def test_penalties_and_bias():
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.0]])
    cases = [
        (SamplingParams(repetition_penalty=2.0), ((0,), (2,)), [1.0, 1.0, -2.0, 0.0]),
        (SamplingParams(presence_penalty=0.5), ((0,), (1, 1)), [2.0, 0.5, -1.0, 0.0]),
        (SamplingParams(frequency_penalty=0.5), ((0,), (1, 1)), [2.0, 0.0, -1.0, 0.0]),
        (SamplingParams(logit_bias={3: 5.0, 0: -9.0}), NONE, [-7.0, 1.0, -1.0, 5.0]),
    ]
    for params, history, expected in cases:
        uniform = (torch.arange(4000) + 0.5) / 4000
        ids = draw(logits.expand(4000, -1), [params] * 4000, uniform, [history] * 4000)
        found = torch.bincount(torch.tensor(ids), minlength=4) / 4000
        assert torch.allclose(found, torch.tensor(expected).softmax(-1), atol=2e-3), params


def test_penalties_leave_the_logits_and_other_rows_alone():
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    before = logits.clone()
    params = [SamplingParams(temperature=0, logit_bias={0: -5.0}), SamplingParams(temperature=0)]
    assert draw(logits, params, [0.5, 0.5]) == [1, 0]
    assert torch.equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_do_not_influence_each_other(data):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    row = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.5, 1.0]),
        top_k=st.sampled_from([None, 1, 3, 50]),
        top_p=st.sampled_from([1.0, 0.6]),
        min_p=st.sampled_from([0.0, 0.2]),
    )
    params = data.draw(st.lists(row, min_size=2, max_size=5))
    logits = torch.randint(-20, 20, (len(params), 99), generator=rng) / 8  # many are equal, as in bf16
    uniform = torch.rand(len(params), generator=rng)
    together = draw(logits, params, uniform)
    for i, one in enumerate(params):
        assert [together[i]] == draw(logits[i : i + 1], [one], uniform[i : i + 1])


@pytest.mark.parametrize("params", [SamplingParams(top_k=4), SamplingParams(top_p=0.9), SamplingParams()])
def test_candidates_that_nearly_tie_keep_their_draws(params):
    """Another rounding of the logits, which comes with other company, makes another one the larger."""
    uniform = (torch.arange(100) + 0.5) / 100
    found = [
        draw((torch.tensor([3.0, 0.0, 3.0, 2.0, 1.0]) + noise).expand(100, -1), [params] * 100, uniform)
        for noise in (torch.tensor([1e-6, 0, 0, 0, 0]), torch.tensor([0, 0, 1e-6, 0, 0]))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_extreme_draws_never_pick_an_impossible_token(uniform):
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        logits = torch.randn(1, 50, generator=generator) * 20
        logits[0, -10:] = -torch.inf
        logits[0, :10] = -torch.inf
        for params in (SamplingParams(), SamplingParams(top_k=45), SamplingParams(top_p=0.9)):
            chosen = draw(logits, [params], [uniform])[0]
            assert 10 <= chosen < 40


def test_uniforms_are_uniform_and_depend_on_key_and_step_only():
    keys = np.array([stream_key(1, i) for i in range(200)], np.uint64)
    drawn = np.stack([uniforms(keys, np.full(200, step)) for step in range(200)])
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 50, "chi-square with 19 degrees of freedom"
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.02
    assert uniforms(keys[3:4], np.array([7]))[0] == drawn[7, 3]


def test_stream_keys():
    assert stream_key(5, 0) == stream_key(5, 0) != stream_key(5, 1)
    assert len({stream_key(seed, i) for seed in range(50) for i in range(50)}) == 2500
    assert stream_key(None) != stream_key(None)
    assert 0 <= stream_key(-3) < 2**64


def test_top_logprobs_are_those_of_the_model():
    logits = torch.tensor([0.2, 0.7, 0.1]).log()
    logprob, best = top_logprobs(logits, 0, 2)
    assert logprob == pytest.approx(np.log(0.2), abs=1e-6)
    assert [token for token, _ in best] == [1, 0]
    assert [np.exp(value) for _, value in best] == pytest.approx([0.7, 0.2], abs=1e-6)
