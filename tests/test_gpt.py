"""The network against the specification's golden vectors, its own invariants, and its cached form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import ContextOverflow, KVCache
from nanochat.scaling import model_dimensions

SIZES = dict(sequence_len=256, vocab_size=50, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)
INTERMEDIATE = dict(
    window_pattern="SL", rope_base=1e4, qk_scale=1.0, ve_gate_channels=32, ve_gate_scale=2.0, use_smear=False,
    use_backout=False, short_window_divisor=2, short_window_multiple=1,
)  # fmt: skip
SCALARS = {"resid_lambdas": 1.0, "x0_lambdas": 0.1, "smear_lambda": 0.3, "backout_lambda": 0.2}

CONFIGS = {
    "classic, bf16 tables": GPTConfig.classic(rope_dtype="bfloat16", **SIZES),
    "classic": GPTConfig.classic(**SIZES),
    "intermediate": GPTConfig(**INTERMEDIATE, **SIZES),
    "modern": GPTConfig.modern(window_pattern="SL", **SIZES),
    "tied": GPTConfig.modern(window_pattern="SL", tie_embeddings=True, **SIZES),
}
# logits[0,0,:6], logits[0,-1,:6], mean, mean |logit|, loss, gradient norm, FLOPs per token
GOLDEN = {
    "classic, bf16 tables": (
        [1.40392, 1.16587, -0.56822, 1.14638, 1.15640, 1.52365],
        [0.04207, 0.65152, -0.52120, 1.42260, -0.44994, 0.81650],
        0.0716635, 0.9194980, 3.929564, 3.221340, 1_425_408,
    ),
    "classic": (
        [1.40392, 1.16587, -0.56822, 1.14638, 1.15640, 1.52365],
        [0.04182, 0.65134, -0.52119, 1.42317, -0.45010, 0.81684],
        0.0716711, 0.9195026, 3.929603, 3.221385, 1_425_408,
    ),
    "intermediate": (
        [-0.07560, 0.52805, -1.35854, -0.06174, -1.44217, -1.05070],
        [-1.96805, 0.26345, 0.61150, -0.31323, 0.25908, -0.36544],
        -0.0889886, 0.9145395, 4.810139, 3.488292, 1_327_872,
    ),
    "modern": (
        [1.36582, 2.22257, 1.00672, 1.03506, 3.18889, 0.39756],
        [0.06069, 1.37911, -0.68790, -0.75123, 0.22473, 1.21753],
        0.1623825, 0.9108967, 4.333014, 4.088983, 1_327_392,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def golden_model(config: GPTConfig) -> GPT:
    """Weights from the specification's formula: base + A sin(0.7 k^2 + 1.3 j + 0.5)."""
    model = GPT.build(config, "cpu", torch.float32)
    for j, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        k = torch.arange(tensor.numel(), dtype=torch.float64)
        scale = 1.0 if "wte" in name or "value_embeds" in name else 0.05 if name in SCALARS else 0.2
        values = SCALARS.get(name, 0.0) + scale * torch.sin(0.7 * k * k + 1.3 * j + 0.5)
        tensor.copy_(values.view(tensor.shape))
    return model


def golden_ids() -> torch.Tensor:
    t = torch.arange(161)
    return ((37 * t * t + 11 * t + 3) % 50)[None]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name):
    assert_golden(golden_model(CONFIGS[name]), GOLDEN[name])


def assert_golden(model: GPT, numbers: tuple) -> None:
    """The model computes a row of GOLDEN: logits, loss, gradient norm and FLOPs."""
    (first, last, mean, mean_abs, loss_value, grad_norm, flops), ids = numbers, golden_ids()
    logits = model(ids[:, :-1])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0, 0, :6], torch.tensor(first), atol=2e-5, rtol=0)
    torch.testing.assert_close(logits[0, -1, :6], torch.tensor(last), atol=2e-5, rtol=0)
    assert logits.mean().item() == pytest.approx(mean, abs=1e-6)
    assert logits.abs().mean().item() == pytest.approx(mean_abs, abs=1e-6)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(loss_value, abs=1e-5)
    squares = sum(p.grad.double().square().sum().item() for p in model.parameters())
    assert math.sqrt(squares) == pytest.approx(grad_norm, rel=1e-4)
    assert model.estimate_flops() == flops


@pytest.mark.parametrize(
    ("arch", "depth", "vocab", "total", "flops"),
    [
        ("classic", 4, 65536, 36_700_160, 144_703_488),
        ("classic", 20, 65536, 560_988_160, 3_491_758_080),
        ("classic", 34, 65536, 2_217_082_880, 14_265_090_048),
        ("modern", 4, 32768, 36_700_242, 80_216_352),
        ("modern", 12, 32768, 286_261_730, 759_695_904),
        ("modern", 24, 32768, 1_384_122_122, 4_775_225_472),
        ("modern", 32, 32768, 2_818_575_450, 10_770_991_104),
    ],
)
def test_golden_sizes(arch, depth, vocab, total, flops):
    config = getattr(GPTConfig, arch)(vocab_size=vocab, **model_dimensions(depth))
    with torch.device("meta"):
        model = GPT(config)
    counts = model.num_scaling_params()
    assert counts["total"] == total
    assert sum(value for name, value in counts.items() if name != "total") == total
    assert model.estimate_flops() == flops


def test_windows_follow_the_pattern_and_the_last_layer_sees_everything():
    assert GPTConfig(n_layer=8).window_sizes == [512, 512, 512, 2048] * 2
    assert GPTConfig(n_layer=3, window_pattern="S").window_sizes == [512, 512, 2048]
    assert [GPTConfig(sequence_len=t, n_layer=2).window_sizes[0] for t in (256, 1024, 4096)] == [
        128,
        256,
        1024,
    ]


def test_init_leaves_nothing_undefined():
    model = GPT.build(CONFIGS["modern"], "cpu", torch.float32)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.transformer["wte"].weight.std().item() == pytest.approx(0.8, rel=0.05)
    assert model.blocks[0].attn.c_q.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert model.blocks[0].mlp.c_fc.weight.std().item() == pytest.approx(0.4 * 64**-0.5, rel=0.05)
    torch.testing.assert_close(model.resid_lambdas.detach(), torch.tensor([1.15, 1.10, 1.05]))
    torch.testing.assert_close(model.x0_lambdas.detach(), torch.tensor([0.20, 0.125, 0.05]))


@pytest.mark.parametrize("name", ["classic", "intermediate", "modern"])
def test_chunks_through_the_cache_equal_the_full_forward(name):
    model, ids = golden_model(CONFIGS[name]), golden_ids()
    cache = KVCache(1, 2, 256, 16, 3)
    with torch.inference_mode():
        full = model(ids)
        chunks, start = [], 0
        for width in (1, 140, 1, 1, 7, 1, 10):  # single tokens, and chunks on a non-empty cache
            chunks.append(model(ids[:, start : start + width], kv_cache=cache))
            start += width
    torch.testing.assert_close(torch.cat(chunks, dim=1), full, atol=1e-5, rtol=0)
    assert cache.get_pos() == 161


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=4), st.sampled_from(["classic", "modern"]))
def test_ragged_rows_equal_each_row_alone(lengths, name):
    model, ids = golden_model(CONFIGS[name]), golden_ids()[0]
    rows = [ids[7 * i : 7 * i + length] for i, length in enumerate(lengths)]
    width = max(lengths)
    padded = torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])
    cache = KVCache(len(rows), 2, 128, 16, 3)
    with torch.inference_mode():
        prefill = model(padded, kv_cache=cache, lengths=lengths, last_only=True)
        step = model(ids[100 : 100 + len(rows)][:, None], kv_cache=cache)
        for i, row in enumerate(rows):
            alone = model(torch.cat([row, ids[100 + i, None]])[None])
            torch.testing.assert_close(prefill[i, 0], alone[0, -2], atol=1e-5, rtol=0)
            torch.testing.assert_close(step[i, 0], alone[0, -1], atol=1e-5, rtol=0)


def test_loss_reductions_agree_and_ignore_masked_targets():
    model, ids = golden_model(CONFIGS["modern"]), golden_ids()
    targets = ids[:, 1:].clone()
    targets[:, ::3] = -1
    none = model(ids[:, :-1], targets, loss_reduction="none")
    assert none.shape == (160,) and (none[::3] == 0).all()
    total, mean = (model(ids[:, :-1], targets, loss_reduction=r) for r in ("sum", "mean"))
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(total / (targets >= 0).sum(), mean)


def test_padded_vocabulary_rows_change_nothing():
    model, ids = golden_model(CONFIGS["modern"]), golden_ids()
    before = model(ids)
    with torch.no_grad():
        for table in (model.transformer["wte"], model.lm_head, *model.value_embeds.values()):
            table.weight[50:] = 1e3
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_has_logits_that_are_not_rounded_to_bf16(dtype):
    config = GPTConfig.classic(**{**SIZES, "vocab_size": 1200})  # a matrix of several parts
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(config, torch.bfloat16).to(device)
    torch.nn.init.normal_(model.lm_head.weight)
    model.lm_head.to(dtype)
    x = torch.randn(2, 3, config.n_embd, device=device).bfloat16()
    weight = model.lm_head.weight.bfloat16().double()  # stored in bf16 or rounded to it, whichever came first
    exact = 15 * torch.tanh((x.double() @ weight.T)[..., :1200] / 15)
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(x), exact.float(), atol=1e-5, rtol=0)


def test_tokens_beyond_all_windows_are_not_seen():
    config = GPTConfig.modern(window_pattern="S", **{**SIZES, "n_layer": 2})
    model = golden_model(config)
    ids = golden_ids()
    # one short layer (128) below the last: its output at the end depends on the last 129 tokens and the smear
    embed = torch.randn(1, 161, 2, 16)
    from nanochat.flash_attention import causal_attention

    changed = embed.clone()
    changed[:, :32] = torch.randn(1, 32, 2, 16)
    before = causal_attention(embed, embed, embed, 128)[:, -1]
    after = causal_attention(embed, changed, changed, 128)[:, -1]
    assert torch.equal(before, after)
    changed[:, 32] += 1  # 160 - 32 = 128 is still inside
    assert not torch.equal(before, causal_attention(embed, changed, changed, 128)[:, -1])
    assert model(ids).shape == (1, 161, 50)


def test_one_token_prompt_and_greedy_generation():
    model = golden_model(CONFIGS["modern"])
    greedy = list(model.generate([3], max_tokens=5, temperature=0))
    ids = [3]
    for token in greedy:
        assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids.append(token)
    assert list(model.generate([3], 5, seed=1)) == list(model.generate([3], 5, seed=1))


def test_positions_beyond_the_tables_are_refused():
    config = GPTConfig.modern(**{**SIZES, "sequence_len": 4, "window_pattern": "L"})
    model = golden_model(config)
    with pytest.raises(ContextOverflow, match="rotary table of 40"):
        model(torch.zeros(1, 41, dtype=torch.long))
    cache = KVCache(1, 2, 64, 16, 3)
    model(torch.zeros(1, 40, dtype=torch.long), kv_cache=cache)
    with pytest.raises(ContextOverflow, match="position 41"):
        model(torch.zeros(1, 1, dtype=torch.long), kv_cache=cache)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(n_embd=65), "not divisible"),
        (dict(n_kv_head=3), "not a multiple"),
        (dict(window_pattern="SXL"), "only S and L"),
        (dict(n_embd=12), "even"),
    ],
)
def test_impossible_sizes_are_user_errors(sizes, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**{**SIZES, **sizes})


def test_optimizer_covers_every_parameter_in_the_specified_groups():
    model = GPT.build(CONFIGS["modern"], "cpu", torch.float32)
    model.init_weights()
    groups = model.setup_optimizer().param_groups
    assert [group["kind"] for group in groups[:6]] == ["adamw"] * 6
    shapes = [tuple(group["params"][0].shape) for group in groups[6:]]
    assert shapes == sorted(shapes) and (2, 12) in shapes
    scale = (64 / 768) ** -0.5
    assert groups[0]["lr"] == pytest.approx(0.008 * scale)
    assert groups[2]["lr"] == pytest.approx(0.5 * 0.3 * scale)
    assert all(group["initial_lr"] == group["lr"] for group in groups)


def test_a_tied_table_reads_and_writes():
    model = GPT.build(CONFIGS["tied"], "cpu", torch.float32)
    model.init_weights()
    assert model.lm_head.weight is model.wte.weight
    untied = GPT.build(CONFIGS["modern"], "cpu", torch.float32)
    untied.load_state_dict(model.state_dict())
    torch.testing.assert_close(untied(golden_ids()), model(golden_ids()))
    ids = golden_ids()
    for network in (model, untied):
        network(ids, ids.roll(-1, 1)).backward()
    torch.testing.assert_close(model.wte.weight.grad, untied.wte.weight.grad + untied.lm_head.weight.grad)
    counts, before = model.num_scaling_params(), untied.num_scaling_params()
    assert (
        counts["wte"] == 0
        and counts["lm_head"] == before["lm_head"]
        and counts["scalars"] == before["scalars"]
    )
    assert counts["total"] == sum(p.numel() for p in model.parameters()) == before["total"] - before["wte"]
    groups = model.setup_optimizer().param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["params"] == [model.wte.weight]
