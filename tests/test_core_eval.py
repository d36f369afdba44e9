from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from nanochat import core_bundle, core_eval
from nanochat.common import UserError
from nanochat.core_bundle import CoreTask, bundle_dir, load_items, load_tasks
from nanochat.core_eval import (
    centered,
    evaluate_core,
    evaluate_task,
    fewshot_indices,
    render_prompts,
    scored_ranges,
    truncated,
)
from nanochat.core_scoring import Scored
from nanochat.gpt import GPT
from tests.toy_data import ByteTokenizer, make_world
from tests.toy_model import opinionated_network

REAL_BUNDLE = Path(__file__).parents[2] / "shared" / "data" / "eval_bundle"


class Tokenizer(ByteTokenizer):
    def get_vocab_size(self) -> int:
        return 257


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.set_num_threads(1)
    return opinionated_network()


def _write_bundle(folder: Path, tasks: list[dict], items: dict[str, list[dict]]) -> Path:
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}))
    rows = [f"{task['label']},x,{25 if 'choice' in task['icl_task_type'] else 0}" for task in tasks]
    (folder / "eval_meta_data.csv").write_text("Eval Task,Kind,Random baseline\n" + "\n".join(rows) + "\n")
    for uri, lines in items.items():
        path = folder / "eval_data" / uri
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return folder


def _items(kind: str, count: int) -> list[dict]:
    rng = random.Random(kind)
    words = ["red", "blue bird", "old", "stone", "a b", "river", "sky", "green leaf"]

    def text(length: int) -> str:
        return " ".join(rng.choice(words) for _ in range(length))

    if kind == "multiple_choice":
        return [
            {"query": text(rng.randint(1, 6)), "choices": [text(rng.randint(1, 3)) for _ in range(4)],
             "gold": rng.randrange(4)}
            for _ in range(count)
        ]  # fmt: skip
    if kind == "schema":
        return [
            {"context_options": [text(3), text(2)], "continuation": text(2), "gold": rng.randrange(2)}
            for _ in range(count)
        ]
    return [{"context": f" {text(4)} ", "continuation": text(1)} for _ in range(count)]


@pytest.fixture
def bundle(tmp_path) -> Path:
    kinds = core_bundle.KINDS
    tasks = [
        {"label": f"{kind}_{shots}", "dataset_uri": f"things/{kind}.jsonl", "num_fewshot": [shots],
         "icl_task_type": kind, **({"continuation_delimiter": "\nAnswer: "} if shots else {})}
        for kind in kinds
        for shots in (0, 3)
    ]  # fmt: skip
    return _write_bundle(tmp_path / "bundle", tasks, {f"things/{k}.jsonl": _items(k, 23) for k in kinds})


# --- a slow, direct reference ------------------------------------------------------------------------


def _reference(model, tokenizer, items: list[dict], index: int, task: CoreTask) -> tuple[bool, list[float]]:
    """One example at a time, one sequence at a time, as the specification says it: right or not, and losses."""
    others = [i for i in range(len(items)) if i != index]
    shots = [items[i] for i in random.Random(1234 + index).sample(others, task.num_fewshot)]
    item, d = items[index], task.delimiter
    if task.kind == "multiple_choice":
        head = "".join(s["query"] + d + s["choices"][s["gold"]] + "\n\n" for s in shots)
        texts = [head + item["query"] + d + choice for choice in item["choices"]]
    elif task.kind == "schema":
        head = "".join(s["context_options"][s["gold"]] + d + s["continuation"] + "\n\n" for s in shots)
        texts = [head + context + d + item["continuation"] for context in item["context_options"]]
    else:
        head = "".join(s["context"].strip() + d + s["continuation"] + "\n\n" for s in shots)
        texts = [(head + item["context"].strip() + d).strip()]
        texts.append(head + item["context"].strip() + d + item["continuation"])
    sequences = [tokenizer.encode(text, prepend=tokenizer.get_bos_token_id()) for text in texts]

    def log_probabilities(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([tokens]))[0].double(), dim=-1)

    if task.kind == "language_modeling":
        start, tokens = len(sequences[0]), sequences[1]
        table = log_probabilities(tokens)
        predicted = table.argmax(dim=-1).tolist()
        nats = [-table[t - 1, tokens[t]].item() for t in range(start, len(tokens))]
        return all(predicted[t - 1] == tokens[t] for t in range(start, len(tokens))), [sum(nats) / len(nats)]
    losses = []
    for tokens in sequences:
        if task.kind == "multiple_choice":
            start = 0
            while all(start < len(s) - 1 and s[start] == sequences[0][start] for s in sequences):
                start += 1
        else:
            shared = 0
            while all(shared < len(s) - 1 and s[-1 - shared] == sequences[0][-1 - shared] for s in sequences):
                shared += 1
            start = len(tokens) - shared
        table = log_probabilities(tokens)
        nats = [-table[t - 1, tokens[t]].item() for t in range(start, len(tokens))]
        losses.append(sum(nats) / len(nats))
    return losses.index(min(losses)) == item["gold"], losses


def test_batched_evaluation_equals_one_example_at_a_time(model, bundle):
    tokenizer, centred = Tokenizer(), []
    any_correct = any_wrong = False
    for task in load_tasks(bundle):
        items = load_items(task)
        outcome = evaluate_task(model, tokenizer, items, task, make_world())
        expected = [_reference(model, tokenizer, items, i, task) for i in range(len(items))]
        right = [is_right for is_right, _ in expected]
        assert outcome.correct == right, task.label
        for found, (_, losses) in zip(outcome.losses, expected, strict=True):
            assert found == pytest.approx(losses, abs=1e-5), task.label  # fp32 against doubles
        centred.append((sum(right) / len(right) - task.baseline) / (1 - task.baseline))
        any_correct |= any(right)
        any_wrong |= not all(right)
    assert any_correct and any_wrong, "the examples cannot tell right from wrong"
    metric = evaluate_core(model, tokenizer, make_world(), bundle=bundle)["core_metric"]
    assert metric == pytest.approx(sum(centred) / len(centred), abs=1e-6)


def test_one_example_is_one_line_of_the_log_and_intervals_hold_the_score(model, bundle):
    outcome = evaluate_core(model, Tokenizer(), make_world(), bundle=bundle)
    lines = [json.loads(line) for line in outcome["examples"]]
    assert len(lines) == sum(len(o.correct) for o in outcome["outcomes"].values())
    for label, accuracy in outcome["results"].items():
        own = [line for line in lines if line["task"] == label]
        assert sum(line["correct"] for line in own) / len(own) == pytest.approx(accuracy)
        low, high = outcome["intervals"][label]
        assert 0 <= low <= accuracy <= high <= 1
    chosen = [line for line in lines if "chosen" in line]
    assert chosen and all(line["correct"] == (line["chosen"] == line["gold"]) for line in chosen)
    low, high = outcome["core_interval"]
    assert low < outcome["core_metric"] < high


# --- order, prompts, ranges --------------------------------------------------------------------------


def test_shuffle_and_fewshot_goldens(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(str(i) for i in range(10)))
    task = CoreTask("x", "schema", path, 0, " ", 0.0)
    assert load_items(task) == [0, 3, 7, 2, 1, 6, 4, 5, 8, 9]
    assert load_items(task, 4) == [0, 3, 7, 2]
    assert fewshot_indices(0, 12, 3) == [8, 2, 1]
    assert fewshot_indices(3, 12, 3) == [2, 7, 5]


@pytest.mark.parametrize("count", [2, 5, 40, 3000])
def test_fewshot_equals_sampling_the_list_of_the_others(count):
    for index in {0, count // 2, count - 1}:
        others = [i for i in range(count) if i != index]
        shots = min(10, count - 1)
        assert fewshot_indices(index, count, 10) == random.Random(1234 + index).sample(others, shots)


def test_language_modeling_prompt_golden():
    shot = {"context": "fc ", "continuation": "fk"}
    item = {"context": " ctx \n", "continuation": "cont"}
    assert render_prompts(item, [shot], "language_modeling", "\nAnswer: ") == [
        "fc\nAnswer: fk\n\nctx\nAnswer:",
        "fc\nAnswer: fk\n\nctx\nAnswer: cont",
    ]


def test_multiple_choice_and_schema_prompts():
    shot = {"query": "q1", "choices": ["a", "b"], "gold": 1}
    item = {"query": "q2", "choices": ["c", "d"], "gold": 0}
    assert render_prompts(item, [shot], "multiple_choice", ": ") == [
        "q1: b\n\nq2: c",
        "q1: b\n\nq2: d",
    ]
    shot = {"context_options": ["x", "y"], "continuation": "k", "gold": 0}
    item = {"context_options": ["u", "v "], "continuation": "m", "gold": 0}
    assert render_prompts(item, [shot], "schema", " ") == ["x k\n\nu m", "x k\n\nv  m"]


@pytest.mark.parametrize(
    ("kind", "sequences", "ranges", "merged"),
    [
        ("multiple_choice", [[0, 1, 2, 3], [0, 1, 4]], [(2, 4), (2, 3)], False),
        # one option begins all others: its last token is scored, not nothing
        ("multiple_choice", [[0, 1, 2], [0, 1, 2, 3]], [(2, 3), (2, 4)], False),
        ("schema", [[0, 1, 7, 8], [0, 1, 2, 7, 8]], [(2, 4), (3, 5)], False),
        ("schema", [[0, 7, 8], [0, 7, 8]], [(1, 3), (1, 3)], False),
        ("schema", [[0, 7], [0, 8]], [(1, 2), (1, 2)], False),
        ("language_modeling", [[0, 1, 2], [0, 1, 2, 3, 4]], [(3, 5)], False),
        # a tokenizer that merges across the border
        ("language_modeling", [[0, 1, 2], [0, 1, 9, 4]], [(2, 4)], True),
        ("language_modeling", [[0, 1, 2], [0, 1, 2]], [(2, 3)], False),
    ],
)
def test_scored_ranges(kind, sequences, ranges, merged):
    scored, is_merged = scored_ranges(sequences, kind)
    assert [(s.start, s.end) for s in scored] == ranges
    assert is_merged == merged
    assert all(1 <= s.start < s.end <= len(s.tokens) for s in scored)


def test_truncation_keeps_the_end_and_moves_the_range():
    assert truncated(Scored([0, 1, 2, 3, 4, 5], 4, 6), 4) == Scored([2, 3, 4, 5], 2, 4)
    assert truncated(Scored([0, 1, 2, 3], 1, 4), 2) == Scored([2, 3], 1, 2)
    assert truncated(Scored([0, 1], 1, 2), 9) == Scored([0, 1], 1, 2)


def test_prompts_beyond_the_context_are_cut_and_counted(model, bundle):
    task = next(t for t in load_tasks(bundle) if t.label == "multiple_choice_3")
    seen = []

    def recording(idx):
        seen.append(idx.size(1))
        return model(idx)

    outcome = evaluate_task(recording, Tokenizer(), load_items(task), task, make_world(), context=64)
    assert outcome.num_truncated > 0
    assert max(seen) <= 64


def test_too_few_examples_for_the_shots_use_what_there_is(model, bundle):
    task = next(t for t in load_tasks(bundle) if t.label == "schema_3")
    outcome = evaluate_task(model, Tokenizer(), load_items(task, 2), task, make_world())
    assert outcome.num_fewshot == 1 and len(outcome.correct) == 2
    outcome = evaluate_task(model, Tokenizer(), load_items(task, 1), task, make_world())
    assert outcome.num_fewshot == 0


# --- the metric --------------------------------------------------------------------------------------


def test_core_of_the_published_d10_run():
    accuracies = [
        0.304023, 0.009920, 0.320407, 0.510522, 0.258532, 0.60, 0.285012, 0.620239, 0.296, 0.252086, 0.304621,
        0.553114, 0.516180, 0.143, 0.269565, 0.368939, 0.109524, 0, 0.035478, 0.078542, 0.542813, 0.2523,
    ]  # fmt: skip
    baselines = [25, 0, 0, 25, 25, 50, 20, 50, 25, 0, 25, 50, 50, 0, 20, 0, 0, 0, 0, 0, 62, 9.1]
    values = [centered(a, 0.01 * b) for a, b in zip(accuracies, baselines, strict=True)]
    assert sum(values) / 22 == pytest.approx(0.119520, abs=1e-6)


def test_evaluate_core_averages_centred_accuracies(model, bundle, capsys):
    outcome = evaluate_core(model, Tokenizer(), make_world(), max_per_task=7, bundle=bundle)
    assert list(outcome["results"]) == [task.label for task in load_tasks(bundle)]
    for label, accuracy in outcome["results"].items():
        baseline = 0.25 if "choice" in label else 0.0
        assert outcome["centered_results"][label] == pytest.approx((accuracy - baseline) / (1 - baseline))
    assert outcome["core_metric"] == pytest.approx(sum(outcome["centered_results"].values()) / 6)
    assert capsys.readouterr().out.count("accuracy") == 6


def test_ranks_cover_the_examples_between_them(model, bundle, monkeypatch):
    task = load_tasks(bundle)[0]
    items = load_items(task)
    parts = []
    monkeypatch.setattr(core_eval.World, "sum", lambda self, tensor: parts.append(tensor) or tensor)
    for rank in range(3):
        evaluate_task(model, Tokenizer(), items, task, make_world(rank, 3))
    whole = evaluate_task(model, Tokenizer(), items, task, make_world())
    assert [bool(row[0]) for row in sum(parts[0:6:2])] == whole.correct  # every second sum is of the counts


# --- the bundle --------------------------------------------------------------------------------------


def test_a_missing_or_damaged_bundle_is_one_clear_line(tmp_path, monkeypatch, bundle):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    with pytest.raises(UserError, match="no evaluation bundle"):
        bundle_dir()
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n")
    with pytest.raises(UserError, match="damaged"):
        load_tasks(bundle)
    (bundle / "eval_data/things/schema.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match=r"cannot read .*schema\.jsonl"):
        load_items(CoreTask("x", "schema", bundle / "eval_data/things/schema.jsonl", 0, " ", 0.0))


def test_the_bundle_is_fetched_and_unpacked_whole(tmp_path, monkeypatch, bundle):
    import shutil

    archive = shutil.make_archive(str(tmp_path / "served"), "zip", bundle.parent, "bundle")
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("NANOCHAT_DATA", "hub")

    def fetch(url, path):
        import zipfile

        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name.replace("bundle/", "eval_bundle/", 1), old.read(name))
        return path

    (base / "eval_bundle").mkdir(parents=True)  # left by an interrupted unpacking
    monkeypatch.setattr(core_bundle, "download_file_with_lock", fetch)
    folder = bundle_dir()
    assert folder == base / "eval_bundle"
    assert len(load_tasks(folder)) == 6
    monkeypatch.setattr(core_bundle, "download_file_with_lock", None)
    assert bundle_dir() == folder
    assert sorted(path.name for path in base.iterdir()) == ["eval_bundle", "eval_bundle.lock"]


@pytest.mark.skipif(not REAL_BUNDLE.exists(), reason="the real bundle is not here")
def test_the_real_bundle_has_the_22_tasks():
    tasks = load_tasks(REAL_BUNDLE)
    assert len(tasks) == 22
    assert {task.label: task.baseline for task in tasks}["boolq"] == pytest.approx(0.62)
    sizes = {task.label: len(load_items(task)) for task in tasks}
    assert sizes["copa"] == 100 and sizes["bigbench_qa_wikidata"] == 20321


@pytest.mark.skipif(not REAL_BUNDLE.exists(), reason="the real bundle is not here")
def test_the_real_bundle_gives_the_reference_results(model):
    tokenizer = Tokenizer()
    for task in load_tasks(REAL_BUNDLE):
        if task.label in ("hellaswag_zeroshot", "winograd", "bigbench_operators", "copa"):
            items = load_items(task, 12)
            outcome = evaluate_task(model, tokenizer, items, task, make_world(), context=100_000)
            expected = [_reference(model, tokenizer, items, i, task)[0] for i in range(12)]
            assert outcome.correct == expected, task.label
