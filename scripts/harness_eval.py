"""Evaluate a checkpoint on tasks of EleutherAI's lm-evaluation-harness (uv sync --extra harness).

python -m scripts.harness_eval -i base --tasks=hellaswag,arc_easy
python -m scripts.harness_eval -i sft --tasks=gsm8k --chat --limit=100
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, write_json
from nanochat.configurator import as_dict, option, run
from nanochat.options import STAGES, WhichModel


@dataclass(frozen=True)
class Config(WhichModel):
    source: str = option(..., "stage of the checkpoint", short="i", choices=STAGES)
    tasks: str = option(..., "names of the harness's tasks, separated by commas")
    include_path: str | None = option(None, "folder with task files of your own")
    num_fewshot: int | None = option(None, "examples before each question; default as the task says", least=0)
    limit: int | None = option(None, "only the first examples of each task", least=1)
    chat: bool = option(False, "ask in the form of a conversation (mid, sft and rl models)")


def main(cfg: Config) -> None:
    """Run tasks of lm-evaluation-harness and save its results beside the checkpoint."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise UserError("this needs the package lm-eval; run: uv sync --extra harness") from None
    from nanochat.checkpoint_manager import load_model, locate
    from nanochat.common import autodetect_device_type, check_device, print0
    from nanochat.interop.lm_harness import NanochatLM

    if cfg.chat and cfg.source == "base":
        raise UserError("--chat: a base model has never seen a conversation")
    if cfg.include_path and not Path(cfg.include_path).is_dir():
        raise UserError(f"--include-path={cfg.include_path} is no folder")
    names = [name.strip() for name in cfg.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task")
    device = check_device(cfg.device_type or autodetect_device_type())
    directory, step = locate(cfg.source, cfg.model_tag, cfg.step, contents=False)
    print0(f"model: {directory} step {step}")
    model, tokenizer, _ = load_model(cfg.source, device, "eval", directory.name, step)
    manager = TaskManager(include_path=cfg.include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"--tasks: the harness has no {', '.join(unknown)}; --include-path adds tasks of your own"
        )
    try:
        found = simple_evaluate(
            model=NanochatLM(model, tokenizer), tasks=list(names), task_manager=manager,
            num_fewshot=cfg.num_fewshot, limit=cfg.limit, apply_chat_template=cfg.chat, log_samples=False,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"the data of --tasks={cfg.tasks} cannot be loaded: {error}; it needs the network, HF_ENDPOINT set to a"
            " mirror, or local files"
        ) from None
    assert found is not None, "only ranks other than 0 get nothing"
    print(make_table(found))
    path = Path(directory) / f"harness_{step:06d}.json"
    write_json(path, {"settings": as_dict(cfg), "results": found["results"], "versions": found["versions"]})
    print0(f"results: {path}")


if __name__ == "__main__":
    run(Config, main)
