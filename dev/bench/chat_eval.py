"""How much faster the generative tasks are with many problems at once than with one at a time.

    NANOCHAT_DATA=tinyworld python -m dev.bench.chat_eval --source=sft

The same model, problems and greedy answers, which must be equal; CPU seconds of generation, checking left out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from nanochat.common import UserError
from nanochat.configurator import option, run


@dataclass(frozen=True)
class Config:
    source: str = option("sft", "stage of the checkpoint", choices=("mid", "sft", "rl"))
    model_tag: str | None = option(None, "checkpoint folder; default the largest model")
    tasks: str = option("GSM8K,SpellingBee,HumanEval", "generative tasks, separated by commas")
    problems: int = option(64, "problems of each task")
    max_new_tokens: int = option(128, "longest answer")


def main(cfg: Config) -> None:
    """Measure generation over many problems against one problem at a time."""
    from nanochat.checkpoint_manager import load_model, locate
    from nanochat.common import distributed
    from nanochat.engine import Engine, SamplingParams
    from tasks.chat_eval import make_task

    with distributed("cpu") as world:
        directory, step = locate(cfg.source, cfg.model_tag, contents=False)
        model, tokenizer, _ = load_model(cfg.source, world.device, "eval", directory.name, step)
        params = SamplingParams(0.0, None, cfg.max_new_tokens)
        totals = [0.0, 0.0]
        for name in cfg.tasks.split(","):
            task = make_task(name.strip())
            count = min(cfg.problems, len(task))
            prompts = [tokenizer.render_for_completion(task[i]) for i in range(count)]
            started = time.process_time()
            single = [Engine(model, tokenizer).complete_many([prompt], params)[0] for prompt in prompts]
            between = time.process_time()
            batched = Engine(model, tokenizer).complete_many(prompts, params)
            one, many = between - started, time.process_time() - between
            differing = sum(a.content != b.content for a, b in zip(single, batched, strict=True))
            if differing:
                raise UserError(f"{name}: {differing} of {count} answers differ between the two")
            tokens = sum(len(completion.content) for completion in batched)
            print(
                f"{name:<12} {count} problems, {tokens:,} tokens {one:7.2f} s {many:7.2f} s {one / many:6.1f}x",
                flush=True,
            )
            totals = [totals[0] + one, totals[1] + many]
    print(f"{'all':<12} {totals[0]:7.2f} s {totals[1]:7.2f} s {totals[0] / totals[1]:6.1f}x")


if __name__ == "__main__":
    run(Config, main)
