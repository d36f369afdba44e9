"""How much of the test sets stands in the training text: word n-grams that both have.

python -m scripts.contamination
python -m scripts.contamination --sets=GSM8K,MMLU --max-shards=20
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from nanochat.common import UserError, get_base_dir, write_json
from nanochat.configurator import option, run

if TYPE_CHECKING:
    from nanochat.contamination import TestSet
    from nanochat.conversation import Conversation
    from nanochat.core_bundle import CoreTask, Item


@dataclass(frozen=True)
class Config:
    sets: str = option("tasks,core", "tasks, core, or names of test sets, separated by commas")
    n: int = option(13, "words per n-gram", least=2)
    max_shards: int = option(-1, "training shards to read, from the first on; -1 = all", least=1, off=-1)
    max_examples: int = option(-1, "examples per test set; -1 = all", least=1, off=-1)
    workers: int = option(0, "processes; 0 = one per core", least=0)
    show: int = option(5, "examples to print, the most complete ones first", least=0)


def main(cfg: Config) -> None:
    """Report the overlap of the training shards with the test sets, and save it as JSON."""
    from nanochat.contamination import Index, judge, scan
    from nanochat.dataset import split_files
    from nanochat.machine import usable_cores
    from nanochat.report import get_report
    from nanochat.report_render import table

    paths = split_files("train")
    paths = paths[: cfg.max_shards] if cfg.max_shards >= 0 else paths
    sets = load_sets(cfg.sets, cfg.max_examples)
    index = Index.build(sets, cfg.n)
    print(
        f"{len(paths)} shards against {len(index.grams):,} {cfg.n}-grams of {len(sets)} test sets", flush=True
    )
    reports, overlaps = judge(sets, index, scan(paths, index, cfg.workers or usable_cores()))
    rows = []
    for report in reports:
        judged = max(report.num_examples - report.num_short, 1)
        rows.append(
            [report.name, f"{report.num_examples:,}", f"{report.num_short:,}",
             f"{report.num_touched:,} ({report.num_touched / judged:.1%})",
             f"{report.num_dirty:,} ({report.num_dirty / judged:.1%})"]
        )  # fmt: skip
    columns = ["Test set", "Examples", "Too short", f"One {cfg.n}-gram seen", "Half or more seen"]
    text = table(columns, rows, align="<>>>>")
    print(text, end="")
    for overlap in overlaps[: max(cfg.show, 0)]:
        where = f"{overlap.seen_in.shard} row {overlap.seen_in.row}"
        print(f"{overlap.test_set} example {overlap.example}: {overlap.share:.0%} seen, first in {where}")
    path = get_base_dir() / "contamination.json"
    write_json(
        path,
        {"n": cfg.n, "shards": [path.name for path in paths], "sets": [asdict(r) for r in reports],
         "overlaps": [asdict(overlap) for overlap in overlaps]},
    )  # fmt: skip
    print(f"results: {path}")
    get_report().log(section="Contamination", data=[f"{text}\n", {"Shards read": len(paths), "n": cfg.n}])


# --- the test sets -----------------------------------------------------------------------------------


def load_sets(text: str, max_examples: int = -1) -> list[TestSet]:
    """The test sets named in --sets. Raises UserError for an unknown one."""
    from nanochat.contamination import TestSet
    from nanochat.core_bundle import bundle_dir, load_items, load_tasks
    from tasks.chat_eval import ALL_TASKS, make_task

    wanted = [name.strip() for name in text.split(",") if name.strip()]
    # SpellingBee is made of random words: nothing of it can be known by heart
    names = [name for name in ALL_TASKS if name != "SpellingBee"]
    chosen = [name for name in names if name in wanted or "tasks" in wanted]
    others = [name for name in wanted if name not in names and name not in ("tasks", "core")]
    core: dict[str, CoreTask] = {}
    if others or "core" in wanted:
        core = {task.label: task for task in load_tasks(bundle_dir())}
    if unknown := [name for name in others if name not in core]:
        known = ", ".join(["tasks", "core", *names, *core])
        raise UserError(f"--sets: unknown {', '.join(unknown)}; there are {known}")
    found = []
    for name in chosen:
        task = make_task(name)
        count = len(task) if max_examples < 0 else min(max_examples, len(task))
        found.append(TestSet(name, [conversation_texts(task[i]) for i in range(count)]))
    for label, task in core.items():
        if "core" in wanted or label in others:
            found.append(
                TestSet(f"CORE {label}", [item_texts(i, task.kind) for i in load_items(task, max_examples)])
            )
    if not found:
        raise UserError("--sets names nothing; use tasks, core, or names of test sets")
    return found


def conversation_texts(conversation: Conversation) -> list[str]:
    """Question, choices and answer of a task's example, without what our own rendering adds."""
    texts = []
    for message in conversation["messages"]:
        content = message["content"]
        texts.append(content if isinstance(content, str) else "".join(part["text"] for part in content))
    if "letters" not in conversation:
        return texts
    question, _, rest = texts[0].removeprefix("Multiple Choice question: ").partition("\n- ")
    choices = rest.rpartition("\n\n")[0]
    return [question, *(line.removeprefix("- ").rpartition("=")[0] for line in choices.split("\n"))]


def item_texts(item: Item, kind: str) -> list[str]:
    """Question and right answer of an example of CORE, as one text where text would have them so."""
    if kind == "multiple_choice":
        return [f"{item['query']} {item['choices'][item['gold']]}"]
    if kind == "schema":
        return [f"{item['context_options'][item['gold']]} {item['continuation']}"]
    return [f"{item['context']} {item['continuation']}"]


if __name__ == "__main__":
    run(Config, main)
