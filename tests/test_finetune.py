"""What reaches the model in training, stage by stage: the mask of every row, and the counts in the log."""

from __future__ import annotations

import json
import re

import pytest
import torch

from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.rl import Group, GroupSampler
from nanochat.tokenizer import get_tokenizer
from tests.training import run_here


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def received(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All (inputs, targets) that a network is trained with from now on. It computes as ever."""
    batches, forward = [], GPT.forward

    def spy(self, idx, targets=None, *args, **options):
        if targets is not None and torch.is_grad_enabled():
            batches.append((idx.clone(), targets.clone()))
        return forward(self, idx, targets, *args, **options)

    monkeypatch.setattr(GPT, "forward", spy)
    return batches


def golden_mask(tokens: list[int]) -> list[bool]:
    """Whether each token of a row is learned, from the specification: what the assistant writes and its end,
    tool calls with their fences; not what a tool answers, and nothing of the user."""
    tokenizer, mask, where = get_tokenizer(), [], "outside"
    special = {tokenizer.encode_special(f"<|{name}|>"): name for name in (
        "bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end",
        "output_start", "output_end",
    )}  # fmt: skip
    after = {
        "bos": "outside", "user_start": "user", "user_end": "outside", "assistant_start": "assistant",
        "assistant_end": "outside", "output_start": "output", "output_end": "assistant",
    }  # fmt: skip
    for token in tokens:
        name = special.get(token, "")
        inside = where == "assistant" and name not in ("bos", "output_start", "user_start", "assistant_start")
        mask.append(inside)
        where = after.get(name, where)
    return mask


def rows_of(batches):
    return [
        (x.tolist(), y.tolist()) for inputs, targets in batches for x, y in zip(inputs, targets, strict=True)
    ]


@pytest.mark.parametrize(("stage", "flags"), [("mid_train", {"supervise": "assistant"}), ("chat_sft", {})])
def test_the_mask_in_training_is_the_golden_one(tiny_run, received, stage, flags):
    run_here("base_train", num_iterations=1, eval_every=-1)
    received.clear()
    run_here(
        stage,
        source="base",
        max_seq_len=256,
        eval_every=-1,
        total_batch_size=4096,
        device_batch_size=2,
        **flags,
    )
    seen = set()
    for inputs, targets in rows_of(received):
        mask = golden_mask(inputs)
        assert targets[:-1] == [t if learn else -1 for t, learn in zip(inputs[1:], mask[1:], strict=True)]
        seen |= set(inputs)
    tokenizer = get_tokenizer()
    tools = {
        tokenizer.encode_special(f"<|{name}|>") for name in ("python_start", "output_start", "output_end")
    }
    assert tools <= seen, "the rows hold tool calls"


def test_mid_training_on_everything_leaves_out_only_the_padding(tiny_run, received):
    run_here("base_train", num_iterations=1, eval_every=-1)
    received.clear()
    run_here(
        "mid_train",
        supervise="all",
        max_seq_len=256,
        eval_every=-1,
        total_batch_size=4096,
        device_batch_size=2,
    )
    bos, num_padded = get_tokenizer().get_bos_token_id(), 0
    for inputs, targets in rows_of(received):
        padding = targets.index(-1) if -1 in targets else len(targets)
        assert targets[: min(padding, len(inputs) - 1)] == inputs[1 : padding + 1]
        assert set(targets[padding:]) <= {-1} and set(inputs[padding + 1 :]) <= {bos}
        num_padded += padding < len(targets)
    assert num_padded > 0


def test_reinforcement_learns_exactly_the_sampled_tokens(tiny_run, received, monkeypatch):
    """What the engine forced (tool outputs), the question and padding are no targets; the ending token is one."""
    from tasks.gsm8k import GSM8K

    groups: list[Group] = []
    sample = GroupSampler.sample
    monkeypatch.setattr(GroupSampler, "sample", lambda *a: groups.extend((found := sample(*a))[0]) or found)
    monkeypatch.setattr(GSM8K, "reward", lambda self, conversation, text: float(len(text) % 2 == 0))
    run_here("base_train", num_iterations=1, eval_every=-1)
    run_here("mid_train", num_iterations=1, eval_every=-1)
    received.clear()
    run_here("chat_rl", source="mid", eval_every=-1, num_iterations=1)
    expected = []
    for group in groups:
        for answer in group.answers if group.is_informative else ():
            tokens, mask = group.prompt + answer.tokens, [0] * len(group.prompt) + answer.masks
            expected.append((tokens[:-1], [t if m else -1 for t, m in zip(tokens, mask, strict=True)][1:]))
    assert expected

    def until_the_last_target(inputs, targets):
        end = max(place for place, target in enumerate(targets) if target >= 0) + 1
        assert set(targets[end:]) <= {-1}
        return inputs[:end], targets[:end]

    found = sorted(until_the_last_target(*row) for row in rows_of(received))
    assert found == sorted(until_the_last_target(*row) for row in expected)


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("mid_train", "rows conversations_used conversations_truncated conversations_dropped tokens_supervised"),
        ("chat_sft", "rows conversations_used conversations_truncated conversations_dropped tokens_supervised"),
        ("chat_dpo", "pairs_used pairs_truncated pairs_dropped tokens_supervised"),
        ("chat_rl", "questions answers answers_cut groups_skipped tokens_supervised"),
    ],
)  # fmt: skip
def test_every_stage_says_what_it_trained_on(tiny_run, capsys, stage, names):
    run_here("base_train", num_iterations=1, eval_every=-1)
    source = "base"
    if stage == "chat_rl":
        run_here("mid_train", num_iterations=1, eval_every=-1)
        source = "mid"
    run_here(stage, source=source, num_iterations=1, eval_every=-1)
    shown = capsys.readouterr().out
    for name in names.split():
        assert re.search(rf"Data: {name}: [\d,]+\n", shown), name
    report = next(
        (tiny_run / "report").glob(
            f"{'midtraining' if stage == 'mid_train' else stage.replace('_', '-')}.json"
        )
    )
    assert "Data: tokens_supervised" in report.read_text()


@pytest.mark.parametrize("stage", ["mid_train", "chat_sft"])
def test_your_own_conversations_are_mixed_in_or_are_all_there_is(tiny_run, received, capsys, stage):
    run_here("base_train", num_iterations=1, eval_every=-1)
    own = tiny_run / "own.jsonl"
    messages = [{"role": "user", "content": "Zyx?"}, {"role": "assistant", "content": "Qqq."}]
    own.write_text((json.dumps(messages) + "\n") * 40)
    flags = {"source": "base", "num_iterations": 1, "eval_every": -1, "resume": "never"}
    received.clear()
    run_here(stage, **flags, extra_data=str(own), only_extra_data=True)
    assert "40 conversations" in capsys.readouterr().out
    whole = get_tokenizer().render_conversation({"messages": messages})[0]
    texts = [list(x) for x, _ in rows_of(received)]
    assert texts and all(row[: len(whole)] == whole for row in texts)
    run_here(stage, **flags, extra_data=str(own))
    counted = re.search(r"([\d,]+) conversations", capsys.readouterr().out)
    assert counted and int(counted[1].replace(",", "")) > 1000
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist, here or in"):
        run_here(stage, **flags, extra_data="nowhere.jsonl")
    with pytest.raises(UserError, match=r"base is a folder; --extra-data names files"):
        run_here(stage, **flags, extra_data=str(tiny_run))
    with pytest.raises(UserError, match="--only-extra-data needs files"):
        run_here(stage, **flags, only_extra_data=True)


@pytest.mark.parametrize("flag", ["model_tag", "output_tag"])
def test_nothing_is_read_or_written_outside_the_folder_of_the_stage(tiny_run, flag):
    run_here("base_train", num_iterations=1, eval_every=-1)
    with pytest.raises(UserError, match=r"evil' is no model tag"):
        run_here("mid_train", **{flag: "../../evil"})
    with pytest.raises(UserError, match=r"evil' is no model tag"):
        run_here("base_train", model_tag="../../evil")
    assert not (tiny_run.parent / "evil").exists()


def test_counting_the_steps_says_so_and_comes_after_what_is_wrong_with_the_schedule(tiny_run, capsys):
    run_here("base_train", num_iterations=1, eval_every=-1)
    own = tiny_run / "own.jsonl"
    messages = [{"role": "user", "content": "Zyx?"}, {"role": "assistant", "content": "Qqq."}]
    own.write_text((json.dumps(messages) + "\n") * 400)
    flags = {"source": "base", "eval_every": -1, "extra_data": str(own), "only_extra_data": True}
    with pytest.raises(UserError, match="do not fit a run"):
        run_here("mid_train", **flags, num_iterations=-1, warmdown_ratio=1.5)
    assert "counted in" not in capsys.readouterr().out
    run_here("mid_train", **flags, num_iterations=-1)
    shown = capsys.readouterr().out
    assert "packing 400 conversations to count the steps" in shown
    assert re.search(r"rows of 64 tokens, counted in \d+s\n", shown)


def test_rows_are_the_sources_or_measured_where_the_rows_are_longer(tiny_run, capsys):
    run_here("base_train", num_iterations=1, eval_every=-1)
    with pytest.raises(UserError, match="total batch 7 is not a multiple of 1 rows x 64 tokens x 1 ranks"):
        run_here("mid_train", num_iterations=1, eval_every=-1, total_batch_size=7)
    run_here("mid_train", num_iterations=1, eval_every=-1)
    assert "2 rows x 64 tokens x 1 ranks x 4 accumulation" in capsys.readouterr().out
    run_here("chat_sft", num_iterations=1, eval_every=-1, max_seq_len=128, source="mid", total_batch_size=512)
    output = capsys.readouterr().out
    assert "tried 1 rows" in output and "(auto, of " in output
