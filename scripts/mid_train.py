"""Mid-training: teach a base model conversations, multiple choice and tool use.

python -m scripts.mid_train
torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.common import UserError
from nanochat.configurator import option, run
from nanochat.finetune import FinetuneConfig, finetune

if TYPE_CHECKING:
    from collections.abc import Callable

    from tasks.common import Task, TaskMixture


@dataclass(frozen=True)
class Config(FinetuneConfig):
    supervise: str = option(
        "all", "targets: all tokens, or what the assistant says", choices=("all", "assistant")
    )
    mmlu_epochs: int = option(1, "times that the MMLU training questions are in the mixture")
    smoltalk_stop: int = option(-1, "conversations of SmolTalk; -1: all")
    gsm8k_stop: int = option(-1, "word problems of GSM8K; -1: all")
    simple_spelling_size: int = option(200_000, "conversations that spell a word")
    spelling_bee_size: int = option(80_000, "conversations that count letters")


def main(cfg: Config) -> None:
    """Mid-training: teach a base model conversations, multiple choice and tool use."""
    finetune(cfg, "mid", "Midtraining", lambda: mixture(cfg), mask=cfg.supervise == "assistant")


def mixture(cfg: Config) -> tuple[TaskMixture, TaskMixture]:
    """Training and validation conversations."""
    return with_extra_data(cfg, lambda: usual_tasks(cfg)), validation_mixture()


def usual_tasks(cfg: Config) -> list[Task]:
    """What mid-training is about: talk, knowledge, and the tools."""
    from tasks.customjson import CustomJSON, identity_file
    from tasks.gsm8k import GSM8K
    from tasks.mmlu import MMLU
    from tasks.smoltalk import SmolTalk
    from tasks.spellingbee import SimpleSpelling, SpellingBee

    identity = CustomJSON(identity_file())
    return [
        SmolTalk("train", stop=first(cfg.smoltalk_stop)),
        *[MMLU("all", "auxiliary_train")] * cfg.mmlu_epochs,
        GSM8K("main", "train", stop=first(cfg.gsm8k_stop)),
        identity,
        identity,
        SimpleSpelling(cfg.simple_spelling_size, "train"),
        SpellingBee(cfg.spelling_bee_size, "train"),
    ]


def with_extra_data(cfg: FinetuneConfig, usual: Callable[[], list[Task]]) -> TaskMixture:
    """The usual tasks mixed with those of --extra-data, or the latter alone, which downloads nothing else."""
    from tasks.common import TaskMixture
    from tasks.customjson import extra_conversations

    extra = extra_conversations(cfg.extra_data)
    if cfg.only_extra_data and not extra:
        raise UserError("--only-extra-data needs files; name them with --extra-data")
    return TaskMixture(extra if cfg.only_extra_data else usual() + extra)


def first(count: int) -> int | None:
    """The end of a slice that takes `count` rows, or all of them if it is negative."""
    return count if count >= 0 else None


def validation_mixture() -> TaskMixture:
    """Held-out conversations of mid-training and SFT."""
    from tasks.common import TaskMixture
    from tasks.gsm8k import GSM8K
    from tasks.mmlu import MMLU
    from tasks.smoltalk import SmolTalk

    return TaskMixture([SmolTalk("test"), MMLU("all", "test", stop=5200), GSM8K("main", "test", stop=420)])


if __name__ == "__main__":
    run(Config, main)
