"""Supervised finetuning: train on what the assistant says in conversations.

python -m scripts.chat_sft
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.configurator import option, run
from nanochat.finetune import FinetuneConfig, finetune
from scripts.mid_train import first, validation_mixture, with_extra_data

if TYPE_CHECKING:
    from nanochat.common import World
    from nanochat.gpt import GPT
    from nanochat.tokenizer import RustBPETokenizer
    from nanochat.training_run import Evaluation
    from tasks.common import Task, TaskMixture


@dataclass(frozen=True)
class Config(FinetuneConfig):
    source: str = option("mid", "stage whose model to start from", choices=("base", "mid", "sft"))
    init_lr_frac: float = option(0.8, "all learning rates are multiplied by this", least=0)
    warmdown_ratio: float = option(0.5, "part of the run with falling learning rate", least=0)
    eval_every: int = option(200, "steps between validations; -1: off")
    eval_tokens: int = option(40 * 524288, "validation tokens", least=1)
    chatcore_every: int = option(200, "steps between ChatCORE evaluations; -1: off")
    chatcore_max_cat: int = option(-1, "problems per multiple-choice task; -1: all", least=1, off=-1)
    chatcore_max_sample: int = option(24, "problems per generative task; -1: all", least=1, off=-1)
    mmlu_epochs: int = option(3, "times that the MMLU training questions are in the mixture")
    gsm8k_epochs: int = option(4, "times that GSM8K is in the mixture")
    gsm8k_stop: int = option(-1, "word problems of GSM8K; -1: all")
    smoltalk_stop: int = option(-1, "conversations of SmolTalk; -1: all")
    simple_spelling_size: int = option(200_000, "conversations that spell a word")
    spelling_bee_size: int = option(80_000, "conversations that count letters")


def main(cfg: Config) -> None:
    """Supervised finetuning: train on what the assistant says in conversations."""

    def chatcore(model: GPT, tokenizer: RustBPETokenizer, world: World) -> tuple[Evaluation, ...]:
        return (chatcore_evaluation(cfg, model, tokenizer, world),)

    finetune(cfg, "sft", "Chat SFT", lambda: mixture(cfg), mask=True, more_evaluations=chatcore)


def mixture(cfg: Config) -> tuple[TaskMixture, TaskMixture]:
    """Training and validation conversations."""
    return with_extra_data(cfg, lambda: usual_tasks(cfg)), validation_mixture()


def usual_tasks(cfg: Config) -> list[Task]:
    """What finetuning is about: that of mid-training, and the exams of ARC."""
    from tasks.arc import ARC
    from tasks.customjson import CustomJSON, identity_file
    from tasks.gsm8k import GSM8K
    from tasks.mmlu import MMLU
    from tasks.smoltalk import SmolTalk
    from tasks.spellingbee import SimpleSpelling, SpellingBee

    identity, mmlu, gsm8k = (
        CustomJSON(identity_file()),
        MMLU("all", "auxiliary_train"),
        GSM8K("main", "train", stop=first(cfg.gsm8k_stop)),
    )
    return [
        SmolTalk("train", stop=first(cfg.smoltalk_stop)),
        ARC("ARC-Easy", "train"),
        ARC("ARC-Challenge", "train"),
        identity,
        identity,
        *[mmlu] * cfg.mmlu_epochs,
        *[gsm8k] * cfg.gsm8k_epochs,
        SimpleSpelling(cfg.simple_spelling_size, "train"),
        SpellingBee(cfg.spelling_bee_size, "train"),
    ]


def chatcore_evaluation(cfg: Config, model: GPT, tokenizer: RustBPETokenizer, world: World) -> Evaluation:
    """All chat tasks, shortened by the limits."""
    from nanochat.engine import Engine
    from nanochat.training_run import Evaluation
    from tasks.chat_eval import ALL_TASKS, CATEGORICAL_TASKS, EvalOptions, chat_core, run_chat_eval

    def measure() -> dict:
        engine, scores = Engine(model, tokenizer), {}
        generative = [name for name in ALL_TASKS if name not in CATEGORICAL_TASKS]
        for names, limit in (
            (CATEGORICAL_TASKS, cfg.chatcore_max_cat),
            (generative, cfg.chatcore_max_sample),
        ):
            scores |= run_chat_eval(names, engine, world, EvalOptions(max_problems=limit))
        accuracies = {name: score.accuracy for name, score in scores.items()}
        return {
            "chatcore_metric": chat_core(accuracies),
            "chatcore_cat": chat_core(accuracies, CATEGORICAL_TASKS),
            **{f"chatcore/{name}": accuracy for name, accuracy in accuracies.items()},
        }

    return Evaluation(cfg.chatcore_every, measure)


if __name__ == "__main__":
    run(Config, main)
