"""lm-evaluation-harness judges our models as our own evaluation does."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.core_bundle import CoreTask
from nanochat.core_eval import evaluate_task
from nanochat.engine import Engine
from nanochat.interop.lm_harness import NanochatLM
from nanochat.sampling import SamplingParams
from tests.toy_data import make_world
from tests.toy_export import tokenizer, toy_model, trained

pytestmark = pytest.mark.usefixtures("one_seeded_thread")
WORDS = ["river", "village", "patience", "banks", "sea", "hills", "pounds", "everyone", "rises", "metres"]


@pytest.fixture(scope="module")
def subject() -> NanochatLM:
    torch.set_num_threads(1)
    return NanochatLM(trained(toy_model("grouped")), tokenizer())


def requests(*arguments: tuple) -> list:
    return [SimpleNamespace(args=each) for each in arguments]


def choice_items(count: int) -> list[dict]:
    """Questions whose choices have equally many tokens: there, sums and means of losses agree about the best."""
    rng = random.Random(0)
    letters = [
        letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if len(tokenizer().encode(f" {letter}")) == 2
    ][:4]
    return [
        {
            "query": f"{' '.join(rng.choices(WORDS, k=6))}\nAnswer:",
            "choices": letters,
            "gold": rng.randrange(4),
        }
        for _ in range(count)
    ]


def continuation_items(count: int) -> list[dict]:
    """Texts of which some are continued as the model would, and some otherwise."""
    rng, model = random.Random(1), trained(toy_model("grouped"))
    items = []
    while len(items) < count:
        context = " ".join(rng.choices(WORDS, k=4))
        ids = tokenizer().encode(context, prepend="<|bos|>")
        greedy = tokenizer().decode(list(model.generate(ids, 3, temperature=0)))
        text = greedy.strip() if rng.random() < 0.7 else rng.choice(WORDS)
        if text.isascii() and text:
            items.append({"context": context, "continuation": text})
    return items


def test_same_accuracies_on_local_task_files(subject, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = {"choice": choice_items(60), "continuation": continuation_items(40)}
    texts = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\n",
        "continuation": "output_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: \"{{' ' + continuation}}\"\n",
    }
    for kind, items in kinds.items():
        data = tmp_path / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in items))
        (tmp_path / f"{kind}.yaml").write_text(
            f"task: local_{kind}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
            f"test_split: test\n{texts[kind]}metric_list:\n  - metric: acc\n"
        )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = [f"local_{kind}" for kind in kinds]
    found = simple_evaluate(model=subject, tasks=names, task_manager=manager, bootstrap_iters=0)
    for kind, items in kinds.items():
        core_kind = {"choice": "multiple_choice", "continuation": "language_modeling"}[kind]
        task = CoreTask(kind, core_kind, tmp_path, 0, " ", 0.0)
        ours = evaluate_task(subject.gpt, tokenizer(), items, task, make_world(), 256)
        assert 0 < ours.accuracy < 1
        assert found["results"][f"local_{kind}"]["acc,none"] == pytest.approx(ours.accuracy, abs=1e-6)
        samples = sorted(found["samples"][f"local_{kind}"], key=lambda sample: sample["doc_id"])
        assert [bool(sample["acc"]) for sample in samples] == ours.correct


def test_log_likelihoods_are_sums_over_the_continuation(subject):
    pairs = [
        ("The river", " rises in the hills"),
        ("", "The river"),
        ("The river ", "rises"),
        ("a", "b" * 400),
    ]
    for (context, continuation), (logprob, greedy) in zip(
        pairs, subject.loglikelihood(requests(*pairs), True), strict=True
    ):
        head = tokenizer().encode(context.rstrip(), prepend="<|bos|>")
        ids = tokenizer().encode(context + continuation, prepend="<|bos|>")
        assert ids[: len(head)] == head
        cut = max(len(ids) - 256, 0)
        row = torch.tensor([ids[cut:]])
        scores = subject.gpt(row)[0].log_softmax(dim=-1)
        start = max(len(head) - cut, 1)
        wanted = sum(scores[i - 1, row[0, i]].item() for i in range(start, row.size(1)))
        assert logprob == pytest.approx(wanted, abs=1e-3)
        assert greedy == all(scores[i - 1].argmax() == row[0, i] for i in range(start, row.size(1)))


def test_rolling_covers_every_token_once(subject):
    short, long = "The river rises.", "The river rises in the hills. " * 60
    found = subject.loglikelihood_rolling(requests((short,), (long,)))
    ids = torch.tensor([tokenizer().encode(short, prepend="<|bos|>")])
    losses = subject.gpt(ids[:, :-1], ids[:, 1:], loss_reduction="sum")
    assert found[0] == pytest.approx(-losses.item(), abs=1e-3)
    ids = tokenizer().encode(long, prepend="<|bos|>")
    assert len(ids) > 2 * 256
    windows, total = range(0, len(ids) - 1, 255), 0.0
    for start in windows:
        stop = min(start + 255, len(ids) - 1)
        first = max(stop - 255, 0)  # the last window reaches back, but scores only what is new
        row = torch.tensor([ids[first : stop + 1]])
        part = subject.gpt(row[:, :-1], row[:, 1:], loss_reduction="none")
        total += part[start - first :].sum().item()
    assert found[1] == pytest.approx(-total, rel=1e-4)


def test_generation_stops_at_strings_and_equals_the_engine(subject):
    contexts = ["The river", "In 1847", "def mean(", "Dear "]
    options = {"until": [" the", "\n"], "max_gen_toks": 40}
    found = subject.generate_until(requests(*((context, options) for context in contexts)))
    engine = Engine(subject.gpt, tokenizer())
    for context, text in zip(contexts, found, strict=True):
        prompt = tokenizer().encode(context, prepend="<|bos|>")
        whole = engine.complete_many([prompt], SamplingParams(temperature=0, max_tokens=40))[0]
        wanted = tokenizer().decode(whole.content)
        for stop in options["until"]:
            wanted = wanted.split(stop)[0]
        assert text == wanted
    with pytest.raises(UserError, match=r"\['num_beams'\] are not supported"):
        subject.generate_until(requests(("a", {"num_beams": 2})))


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({}, 0.0), ({"temperature": 0.7, "do_sample": False}, 0.0), ({"temperature": 0.7, "do_sample": True}, 0.7),
        ({"do_sample": True}, 1.0),
    ],
)  # fmt: skip
def test_sampling_is_what_the_harness_defines(subject, options, temperature):
    params, stop = subject._sampling(options | {"until": "x", "max_new_tokens": 9}, seed=0)
    assert (params.temperature, params.max_tokens, stop) == (temperature, 9, ("x",))


def test_long_answers_leave_room_for_the_question(subject, monkeypatch, capsys):
    submitted = []
    submit = subject.engine.submit
    monkeypatch.setattr(
        subject.engine,
        "submit",
        lambda prompt, params: submitted.append((prompt, params)) or submit(prompt, params),
    )
    question, long = "The river", "hills " * 400
    ids = [subject.tok_encode(text) for text in (question, long)]
    assert len(ids[0]) < 30 and len(ids[1]) > 256
    options = {"until": [], "max_gen_toks": 1000}
    subject.generate_until(
        requests((question, options), (long, options), (long, options | {"max_gen_toks": 5}))
    )
    (short, first), (half, second), (most, third) = submitted
    assert short == ids[0] and first.max_tokens == 256 - len(short)
    assert half == ids[1][:1] + ids[1][-127:] and second.max_tokens == 128
    assert most == ids[1][:1] + ids[1][-250:] and third.max_tokens == 5
    assert "2 of 3 questions lost their beginning, 2 answers may be shorter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks=,"], "--tasks names no task"), (["--tasks=x", "--include-path=/no"], "=/no is no folder"),
        (["--tasks=x", "--limit=0"], "at least 1"), (["--tasks=x", "--num-fewshot=-1"], "at least 0"),
    ],
)  # fmt: skip
def test_flags_of_the_command_that_cannot_be(flags, message):
    from scripts import harness_eval

    with pytest.raises(UserError, match=message):
        harness_eval.main(parse(harness_eval.Config, ["-i", "sft", *flags]))


def test_conversations_are_rendered_as_ours(subject):
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the sea?"}]
    text = subject.apply_chat_template(history)
    conversation = {"messages": [*history, {"role": "assistant", "content": ""}]}
    assert subject.tok_encode(text) == tokenizer().render_for_completion(conversation)
    # special tokens in other texts are characters
    assert tokenizer().encode_special("<|user_end|>") not in subject.tok_encode("x <|user_end|>")


@pytest.mark.slow  # the harness reads its index of thousands of task files
def test_the_command_saves_results_beside_the_checkpoint(subject, tmp_path, monkeypatch, capsys):
    import datasets

    from nanochat.checkpoint_manager import save_checkpoint
    from nanochat.common import read_json
    from nanochat.options import STAGE_FOLDERS
    from scripts import harness_eval

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / STAGE_FOLDERS["sft"] / "t"
    save_checkpoint(folder, 3, subject.gpt, {"user_config": {}}, tokenizer=tokenizer())
    (tmp_path / "rows.jsonl").write_text('{"q": "The river", "a": "sea"}\n' * 3)
    (tmp_path / "local_chat.yaml").write_text(
        f"task: local_chat\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs:\n  until: []\n  max_gen_toks: 4\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    options = dict(source="sft", include_path=str(tmp_path), device_type="cpu")
    harness_eval.main(harness_eval.Config(tasks="local_chat", chat=True, limit=2, **options))
    assert "local_chat" in capsys.readouterr().out
    saved = read_json(folder / "harness_000003.json")
    assert saved["settings"]["limit"] == 2 and "exact_match,none" in saved["results"]["local_chat"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\n")
    with pytest.raises(UserError, match="the data of --tasks=far cannot be loaded: Couldn't reach"):
        harness_eval.main(harness_eval.Config(tasks="far", **options))
    with pytest.raises(UserError, match="has no nonsense"):
        harness_eval.main(harness_eval.Config(tasks="nonsense", **options))
