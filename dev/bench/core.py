"""How much faster CORE is than one example at a time, on the real evaluation bundle with an untrained model.

    python -m dev.bench.core --bundle=DIR

Both give the same answers, which is checked. CPU seconds, the two by turns, the median of the repeats.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError
from nanochat.configurator import option, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nanochat.common import World
    from nanochat.core_bundle import CoreTask, Item
    from nanochat.gpt import GPT
    from nanochat.tokenizer import RustBPETokenizer


@dataclass(frozen=True)
class Config:
    bundle: str = option("", "evaluation bundle; default that of the data source")
    tasks: str = option("", "labels of tasks, separated by commas; default all")
    examples: int = option(32, "examples per task")
    repeats: int = option(3, "measurements; the median counts")
    layers: int = option(4, "layers of the model")
    width: int = option(256, "width of the model")
    vocab_size: int = option(8192, "vocabulary, trained on the bundle's own text")


def main(cfg: Config) -> None:
    """Measure batched CORE against one example at a time."""
    from nanochat.common import distributed
    from nanochat.core_bundle import bundle_dir, load_items, load_tasks
    from nanochat.core_eval import evaluate_task

    tasks = load_tasks(Path(cfg.bundle) if cfg.bundle else bundle_dir())
    wanted = cfg.tasks.split(",") if cfg.tasks else [task.label for task in tasks]
    tasks = [task for task in tasks if task.label in wanted]
    if len(tasks) < len(wanted):
        raise UserError(f"--tasks={cfg.tasks}: not all of these are in the bundle")
    items = {task.label: load_items(task, cfg.examples) for task in tasks}
    with distributed("cpu") as world:
        model, tokenizer = build(cfg, list(items.values()), world)
        totals = [0.0, 0.0]
        for task in tasks:
            seconds: tuple[list[float], list[float]] = ([], [])
            for _ in range(cfg.repeats):
                started = time.process_time()
                slow = one_at_a_time(model, tokenizer, items[task.label], task, world)
                between = time.process_time()
                fast = evaluate_task(model, tokenizer, items[task.label], task, world)
                seconds[0].append(between - started)
                seconds[1].append(time.process_time() - between)
                assert fast.correct == slow, f"{task.label}: the two disagree"
            one, batched = map(statistics.median, seconds)
            totals = [totals[0] + one, totals[1] + batched]
            print(
                f"{task.label:<33} {task.kind:<18} {one:7.2f} s {batched:7.2f} s {one / batched:6.1f}x",
                flush=True,
            )
    print(f"{'all':<52} {totals[0]:7.2f} s {totals[1]:7.2f} s {totals[0] / totals[1]:6.1f}x")


def build(cfg: Config, items: Sequence[Sequence[Item]], world: World) -> tuple[GPT, RustBPETokenizer]:
    """An untrained model whose context fits every prompt, so that nothing is cut."""
    import json

    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import RustBPETokenizer

    texts = (json.dumps(item, ensure_ascii=False) for group in items for item in group)
    tokenizer = RustBPETokenizer.train_from_iterator(texts, cfg.vocab_size)
    heads = max(cfg.width // 64, 1)
    config = replace(
        GPTConfig.modern(sequence_len=8192, vocab_size=tokenizer.get_vocab_size(), n_layer=cfg.layers, n_head=heads,
                         n_kv_head=heads, n_embd=cfg.width),
        window_pattern="L",
    )  # fmt: skip
    import torch

    model = GPT.build(config, world.device, torch.float32)
    model.init_weights()
    return model.eval(), tokenizer


def one_at_a_time(
    model: GPT, tokenizer: RustBPETokenizer, items: Sequence[Item], task: CoreTask, world: World
) -> list[bool]:
    """The options of one example as one padded batch, with logits everywhere."""
    import torch
    import torch.nn.functional as F

    from nanochat.core_eval import fewshot_indices, render_prompts, scored_ranges

    correct, bos = [], tokenizer.get_bos_token_id()
    for index, item in enumerate(items):
        shots = [items[i] for i in fewshot_indices(index, len(items), task.num_fewshot)]
        tokens = tokenizer.encode(render_prompts(item, shots, task.kind, task.delimiter), prepend=bos)
        rows, _ = scored_ranges(tokens, task.kind)
        width = max(len(row.tokens) for row in rows)
        inputs = torch.tensor([row.tokens + [bos] * (width - len(row.tokens)) for row in rows])
        with torch.no_grad():
            logits = model(inputs)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(rows), -1)
        if task.kind == "language_modeling":
            span = slice(rows[0].start - 1, rows[0].end - 1)
            correct.append(bool((logits[0, span].argmax(-1) == inputs[0, 1:][span]).all()))
            continue
        means = [losses[i, row.start - 1 : row.end - 1].mean().item() for i, row in enumerate(rows)]
        correct.append(means.index(min(means)) == item["gold"])
    return correct


if __name__ == "__main__":
    run(Config, main)
