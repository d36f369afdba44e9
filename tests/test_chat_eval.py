from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import save_checkpoint, stage_dir
from nanochat.common import UserError, World
from nanochat.configurator import parse
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer
from scripts import base_eval, base_loss
from scripts import chat_eval as script
from tasks import chat_eval
from tasks.chat_eval import (
    ALL_TASKS,
    FIVE_TASKS,
    EvalOptions,
    TaskScore,
    chat_core,
    chat_core_interval,
    evaluate_task,
)
from tasks.common import MultipleChoice, Task
from tests.toy_data import make_world

WORDS = ["red", "blue", "stone", "river", "seven", "cloud", "A", "B", "C", "D", "apple", "under"]


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(30)) for _ in range(200)]
    return RustBPETokenizer.train_from_iterator(iter(texts), 320)


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    """A tiny network with weights large enough to have opinions."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    sizes = {"sequence_len": 256, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    model = GPT(GPTConfig.modern(vocab_size=tokenizer.get_vocab_size(), **sizes))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Engine(model.eval(), tokenizer)


class Quiz(MultipleChoice):
    """Questions of very different lengths, with three to five letters."""

    def __init__(self, count: int = 60, words: int = 40, **slices) -> None:
        super().__init__(**slices)
        self.count, self.words = count, words

    def num_examples(self) -> int:
        return self.count

    def get_example(self, index: int) -> dict:
        rng = random.Random(index)
        letters = "ABCDE"[: rng.randint(3, 5)]
        question = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, self.words)))
        return self.conversation(question, letters, [rng.choice(WORDS) for _ in letters], rng.choice(letters))


class Echo(Task):
    """The right answers are the ones whose text has an even number of characters."""

    eval_type = "generative"

    def __init__(self, count: int = 20) -> None:
        super().__init__()
        self.count, self.seen = count, []

    def num_examples(self) -> int:
        return self.count

    def get_example(self, index: int) -> dict:
        text = f"{index} " + " ".join(WORDS[: 1 + index % 9])
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
        return {"messages": messages, "index": index}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        self.seen.append((conversation["index"], completion))
        return len(completion) % 2 == 0


def _passed_one_by_one(engine: Engine, task: Task, count: int) -> int:
    """The letter logits of the last prompt position, one unpadded problem at a time."""
    passed = 0
    for index in range(count):
        conversation = task[index]
        prompt = engine.tokenizer.render_for_completion(conversation)
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt]))[0, -1].tolist()
        values = [logits[engine.tokenizer.encode(letter)[0]] for letter in conversation["letters"]]
        passed += task.evaluate(conversation, conversation["letters"][values.index(max(values))])
    return passed


# --- choosing a letter -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batched_choices_equal_one_problem_at_a_time(engine, batch_size):
    options = EvalOptions(batch_size=batch_size)
    score = evaluate_task("MMLU", Quiz(), engine, make_world(), options)
    assert (score.passed, score.total) == (_passed_one_by_one(engine, Quiz(), 60), 60)
    assert 0 < score.passed < 60 and score.num_cut == 0


def test_the_limit_takes_the_first_problems(engine):
    score = evaluate_task("MMLU", Quiz(), engine, make_world(), EvalOptions(max_problems=13))
    assert (score.passed, score.total) == (_passed_one_by_one(engine, Quiz(), 13), 13)
    assert evaluate_task("MMLU", Quiz(5), engine, make_world(), EvalOptions(max_problems=13)).total == 5


def test_prompts_beyond_the_context_are_cut_and_counted(engine):
    score = evaluate_task("MMLU", Quiz(8, words=900), engine, make_world(), EvalOptions())
    assert score.total == 8 and score.num_cut > 0


def test_a_letter_of_several_tokens_is_an_error(engine):
    class Wordy(Quiz):
        def get_example(self, index):
            return self.conversation("red", ["A", "seven rivers"], ["x", "y"], "A")

    with pytest.raises(UserError, match=r"letter 'seven rivers' is \d tokens"):
        evaluate_task("MMLU", Wordy(), engine, make_world(), EvalOptions())


def test_no_problem_at_all_gives_zero_not_a_division(engine):
    assert evaluate_task("MMLU", Quiz(0), engine, make_world(), EvalOptions()).accuracy == 0.0


# --- generating an answer ----------------------------------------------------------------------------


def test_batched_answers_equal_one_problem_at_a_time(engine):
    task = Echo()
    score = evaluate_task("GSM8K", task, engine, make_world(), EvalOptions(max_new_tokens=12))
    texts = {}
    for index in range(20):
        prompt = engine.tokenizer.render_for_completion(task[index])
        results, _ = engine.generate_batch(prompt, max_tokens=12, temperature=0)
        texts[index] = engine.tokenizer.decode(results[0][len(prompt) :])
    assert dict(task.seen) == texts
    assert score.passed == sum(len(text) % 2 == 0 for text in texts.values())
    assert score.total == 20


def test_one_right_sample_of_several_is_enough(engine):
    options = EvalOptions(max_new_tokens=6, temperature=1.0, num_samples=4)

    class Rare(Echo):
        def evaluate(self, conversation, completion):
            self.seen.append((conversation["index"], completion))
            return sum(index == conversation["index"] for index, _ in self.seen) == 3

    task = Rare(5)
    assert evaluate_task("GSM8K", task, engine, make_world(), options).passed == 5
    assert all(sum(index == i for index, _ in task.seen) == 3 for i in range(5)), "the fourth is not needed"
    assert len(set(task.seen)) > 5, "samples of a problem differ"


@pytest.mark.parametrize(("make", "options"), [
    (Quiz, EvalOptions()),
    (Echo, EvalOptions(max_new_tokens=6, temperature=1.0, num_samples=2)),
])  # fmt: skip
def test_ranks_give_together_what_one_gives(engine, monkeypatch, make, options):
    whole = evaluate_task("MMLU", make(), engine, make_world(), options)
    parts = []
    monkeypatch.setattr(World, "sum", lambda self, tensor: parts.append(tensor.clone()) or tensor)
    for rank in range(3):
        evaluate_task("MMLU", make(), engine, make_world(rank, 3), options)
    assert sum(parts).tolist() == [whole.passed, whole.total, whole.num_cut]


# --- ChatCORE ----------------------------------------------------------------------------------------


def test_chat_core_of_the_published_depth_20_model():
    accuracies = {
        "ARC-Challenge": 0.2807, "ARC-Easy": 0.3876, "GSM8K": 0.0455, "HumanEval": 0.0854, "MMLU": 0.3151,
    }  # fmt: skip
    assert chat_core(accuracies, FIVE_TASKS) == pytest.approx(0.0884, abs=5e-5)
    assert chat_core(accuracies, ALL_TASKS) is None
    assert chat_core(accuracies | {"SpellingBee": 0.99}, ALL_TASKS) == pytest.approx(0.24, abs=0.005)


def test_summary_names_only_what_was_evaluated():
    scores = {name: TaskScore(name, 1, 2, 0, 0.0) for name in FIVE_TASKS}
    assert set(script.summary(scores)) == {"ChatCORE without SpellingBee", "ChatCORE categorical"}
    scores["SpellingBee"] = TaskScore("SpellingBee", 1, 2, 0, 0.0)
    summary = script.summary(scores)
    assert summary["ChatCORE metric"] == pytest.approx((3 * (0.25 / 0.75) + 3 * 0.5) / 6)
    assert script.summary({"GSM8K": scores["GSM8K"]}) == {}


def test_chat_core_has_an_interval_that_narrows_with_more_problems():
    few, many = (
        {name: TaskScore(name, count // 2, count, 0, 0.0) for name in ALL_TASKS} for count in (20, 2000)
    )
    value = script.summary(many)["ChatCORE metric"]
    wide, narrow = chat_core_interval(few), chat_core_interval(many)
    assert wide is not None and narrow is not None
    assert wide.low < narrow.low < value < narrow.high < wide.high
    assert narrow.high - narrow.low == pytest.approx((wide.high - wide.low) / 10, rel=0.1)
    del many["MMLU"]
    assert chat_core_interval(many) is None


# --- the scripts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory, engine) -> Path:
    """A base folder with a small TinyWorld and an untrained model in two stages."""
    from nanochat.tinyworld import generate
    from nanochat.tinyworld.sizes import SMALLEST_CHARS

    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        generate(folder / "tinyworld", seed=0, chars=SMALLEST_CHARS)
        for stage in ("base", "sft"):
            save_checkpoint(stage_dir(stage) / "d2", 7, engine.model, {}, tokenizer=engine.tokenizer)
    return folder


@pytest.fixture
def run_here(base, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return base


def test_chat_eval_scores_all_tasks_of_the_embedded_source(run_here, capsys):
    script.main(script.Config(source="sft", max_problems=3, max_new_tokens=4, device_type="cpu"))
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in ALL_TASKS) and "ChatCORE metric: " in out
    assert "95 % of resampled problems give a ChatCORE of" in out
    path = run_here / "chatsft_checkpoints" / "d2" / "chat_eval_000007.json"
    record = json.loads(path.read_text())
    assert list(record["tasks"]) == list(ALL_TASKS)
    assert all(task["total"] == 3 for task in record["tasks"].values())
    section = json.loads((run_here / "report" / "chat-evaluation-sft.json").read_text())
    accuracies = {name: task["accuracy"] for name, task in record["tasks"].items()}
    problems = {f"{name} problems": task["total"] for name, task in record["tasks"].items()}
    assert section["items"][1] == accuracies | problems
    only = script.Config(source="sft", task_name="MMLU", max_problems=5, device_type="cpu")
    script.main(only)
    record = json.loads(path.read_text())
    assert record["tasks"]["MMLU"]["total"] == 5 and record["tasks"]["GSM8K"]["total"] == 3
    totals = {name: (task["passed"], task["total"]) for name, task in record["tasks"].items()}
    scores = {name: TaskScore(name, *counts, 0, 0.0) for name, counts in totals.items()}
    assert record["metrics"] == script.summary(scores) | script.interval_of(scores), (
        "of all that is in the file"
    )
    assert json.loads((run_here / "report" / "chat-evaluation-sft.json").read_text()) == section
    assert (
        "'Chat evaluation sft' stays, it was made on more: ARC-Easy 3 instead of 0" in capsys.readouterr().out
    )
    script.main(script.Config(source="sft", task_name="MMLU|ARC-Easy", max_problems=4, device_type="cpu"))
    assert (
        f"results: {path} keeps what was made on more problems: MMLU 5 instead of 4\n"
        in capsys.readouterr().out
    )
    trial = json.loads(path.read_text())
    assert trial["tasks"]["MMLU"] == record["tasks"]["MMLU"] and trial["tasks"]["ARC-Easy"]["total"] == 4
    for earlier in ({"weights": "of an earlier training"}, {"weights": None}):
        path.write_text(json.dumps(trial | earlier))
        script.main(script.Config(source="sft", task_name="MMLU", max_problems=1, device_type="cpu"))
        tasks = json.loads(path.read_text())["tasks"]
        assert {name: task["total"] for name, task in tasks.items()} == {"MMLU": 1}


@pytest.mark.parametrize(("change", "message"), [
    ({"task_name": "MMLU|Chess"}, "unknown Chess; there are ARC-Easy"),
    ({"max_problems": 0}, "leaves nothing to evaluate"),
    ({"num_samples": 0}, "--num-samples=0 must be at least 1"),
])  # fmt: skip
def test_chat_eval_refuses_what_makes_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        script.task_names(script.Config(source="sft", **change))


def test_a_negative_number_of_problems_is_none():
    with pytest.raises(UserError, match="max_problems must be at least 1, or -1, not -3"):
        parse(script.Config, ["-i", "sft", "-x", "-3"])


def test_base_eval_writes_table_record_and_report(run_here, capsys):
    config = base_eval.Config(device_batch_size=2, split_tokens=2000, max_per_task=4, device_type="cpu")
    base_eval.main(config)
    out = capsys.readouterr().out
    assert "split tokens: 2,000 rounded down to 1,536" in out
    lines = (run_here / "base_eval" / "base_model_000007.csv").read_text().splitlines()
    assert lines[0] == f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"
    assert lines[-1].startswith(f"{'CORE':<35}, {'':<10}, ")
    record_path = run_here / "base_checkpoints" / "d2" / "base_eval_000007.json"
    record = json.loads(record_path.read_text())
    assert float(lines[-1].split(",")[2]) == pytest.approx(record["CORE metric"], abs=1e-6)
    assert record["train bpb"] > 0 and record["val bpb"] > 0
    assert len(lines) == len(record["centered_results"]) + 2
    base_loss.main(base_loss.Config(device_batch_size=1, split_tokens=512, device_type="cpu"))
    after = json.loads(record_path.read_text())
    assert after["CORE metric"] == record["CORE metric"], "what another mode found stays"
    assert json.loads((run_here / "report" / "base-model-loss.json").read_text())["items"][0]["val bpb"] > 0
    section = run_here / "report" / "base-model-evaluation.json"
    covers = json.loads(section.read_text())["covers"]
    assert covers["CORE examples"] == 4 * len(record["centered_results"]) and covers["tokens"] == 2000
    assert covers == after["covers"], "base_loss measured fewer tokens"
    log, table = (
        record_path.parent / "base_eval_000007_core_examples.jsonl",
        run_here / "base_eval" / "base_model_000007.csv",
    )
    whole = log.read_text(), table.read_text()
    base_eval.main(base_eval.Config(eval="core", max_per_task=1, device_type="cpu"))
    assert json.loads(section.read_text())["covers"] == covers
    num = covers["CORE examples"]
    kept = f"results: {record_path} keeps what was made on more: CORE examples {num} instead of {num // 4}\n"
    assert kept in capsys.readouterr().out
    trial = json.loads(record_path.read_text())
    assert trial["CORE metric"] == after["CORE metric"] and trial["val bpb"] == after["val bpb"]
    assert (log.read_text(), table.read_text()) == whole
    base_eval.main(base_eval.Config(eval="core", max_per_task=5, device_type="cpu"))
    assert log.read_text().count("\n") == json.loads(record_path.read_text())["covers"]["CORE examples"] > num
    record_path.write_text(json.dumps({name: value for name, value in after.items() if name != "weights"}))
    base_eval.main(base_eval.Config(eval="core", max_per_task=1, device_type="cpu"))
    other = json.loads(record_path.read_text())
    assert other["covers"]["CORE examples"] == num // 4 and "val bpb" not in other, "of other weights"


def test_base_eval_refuses_a_split_of_less_than_a_step(run_here):
    with pytest.raises(UserError, match=r"--split-tokens=100 is less than one step of 512 tokens"):
        base_eval.main(base_eval.Config(eval="bpb", device_batch_size=2, split_tokens=100, device_type="cpu"))
    with pytest.raises(UserError, match="--eval: unknown loss; use core, bpb, sample"):
        base_eval.main(base_eval.Config(eval="core,loss"))


def _launch_two_ranks(base: Path, command: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    line = [sys.executable, *launcher, *command, "--device-type=cpu"]
    done = subprocess.run(
        line, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes that import torch, maybe on a busy machine
def test_two_real_ranks_score_bits_and_core_like_one(run_here):
    record = run_here / "base_checkpoints" / "d2" / "base_eval_000007.json"
    config = base_eval.Config(
        eval="core,bpb", max_per_task=9, split_tokens=4096, device_batch_size=4, device_type="cpu"
    )
    base_eval.main(config)
    single = json.loads(record.read_text())
    record.unlink()
    flags = ["--eval=core,bpb", "--max-per-task=9", "--split-tokens=4096", "--device-batch-size=2"]
    _launch_two_ranks(run_here, ["scripts.base_eval", *flags])
    double = json.loads(record.read_text())
    assert double["centered_results"] == single["centered_results"]
    for split in ("train", "val"):
        assert double[f"{split} bpb"] == pytest.approx(single[f"{split} bpb"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes that import torch, maybe on a busy machine
def test_two_real_ranks_score_tasks_like_one(run_here):
    path = run_here / "chatsft_checkpoints" / "d2" / "chat_eval_000007.json"
    path.unlink(missing_ok=True)
    names = "MMLU|GSM8K|SpellingBee"
    script.main(
        script.Config(
            source="sft",
            task_name=names,
            max_problems=25,
            max_new_tokens=8,
            temperature=1.0,
            device_type="cpu",
        )
    )
    single = json.loads(path.read_text())["tasks"]
    path.unlink()
    flags = ["-i", "sft", "-a", names, "-x", "25", "-m", "8", "-t", "1.0"]
    _launch_two_ranks(run_here, ["scripts.chat_eval", *flags])
    double = json.loads(path.read_text())["tasks"]
    assert {n: (t["passed"], t["total"]) for n, t in double.items()} == {
        n: (t["passed"], t["total"]) for n, t in single.items()
    }
    assert list(double) == names.split("|")


def test_make_task_knows_every_name(run_here):
    assert all(len(chat_eval.make_task(name)) > 0 for name in ALL_TASKS)
    with pytest.raises(UserError, match="unknown task 'Chess'"):
        chat_eval.make_task("Chess")
