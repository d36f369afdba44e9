"""Reinforcement learning: sample answers to questions, reward the right ones (a simplified GRPO).

    python -m scripts.chat_rl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl

For each question the model writes several answers; an answer's advantage is its reward minus the mean of its
group; the update is REINFORCE on the sampled tokens, normalised by their number over the whole step. It is
on-policy, so there is no ratio and no clipping, and there is no reference model. To compare: --num-updates with
--clip, and --kl, make it PPO-like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.configurator import option, run
from nanochat.finetune import PolicyConfig, make_policy_optimizer
from nanochat.options import SAVED

if TYPE_CHECKING:
    from nanochat.common import World
    from nanochat.engine import Engine
    from nanochat.schedule import Schedule
    from nanochat.tokenizer import RustBPETokenizer
    from tasks.common import Task


TASKS = ("GSM8K", "SpellingBee", "HumanEval", "SimpleSpelling", "ARC-Easy", "ARC-Challenge", "MMLU")


@dataclass(frozen=True)
class Config(PolicyConfig):
    source: str = option("sft", "stage whose model to start from", choices=("mid", "sft", "dpo", "rl"))
    task: str = option("GSM8K", "what is rewarded: the number of GSM8K, SpellingBee; unit tests passed in HumanEval;"
        " an exact match in SimpleSpelling, ARC, MMLU", choices=TASKS)  # fmt: skip
    num_epochs: int = option(1, "passes over the questions", least=1)
    num_iterations: int = option(-1, "optimizer steps; -1: from --num-epochs", least=1, off=-1)
    device_batch_size: int = option(8, "sequences per forward and backward pass", least=1)
    examples_per_step: int = option(16, "questions per step over all ranks", least=1)
    num_samples: int = option(16, "answers per question", least=2)
    max_new_tokens: int = option(256, "tokens per answer", least=1)
    temperature: float = option(1.0, "of the sampled answers", least=0.01)
    top_k: int = option(50, "of the sampled answers; 0: off", least=0)
    num_updates: int = option(1, "optimizer steps on the same answers", least=1)
    clip: float = option(0.0, "a token's probability ratio counts up to 1 +- this (PPO); 0: off")
    kl: float = option(0.0, "weight of the divergence from the source model, which is kept in memory; 0: off")
    eval_every: int = option(60, "steps between evaluations; -1: off")
    eval_examples: int = option(400, "test questions per evaluation", least=1)
    eval_samples: int = option(8, "answers per test question, for pass@1 to pass@8", least=1)
    save_every: int = option(60, f"steps between checkpoints, besides {SAVED}; -1: only those")
    keep_last: int = option(1, "checkpoints to keep; 0: all", least=0)


def main(cfg: Config) -> None:
    """Reinforcement learning: sample answers to questions, reward the right ones."""
    from nanochat.common import UserError, distributed, print0
    from nanochat.engine import Engine
    from nanochat.rl import GroupSampler, RLPlan, Surrogate, train_rl
    from nanochat.stage import announce, announce_model, begin
    from nanochat.training_run import Evaluation

    with distributed(cfg.device_type) as world:
        precision, _ = announce(world, "off", cfg.precision)  # the shapes change with every batch of answers
        if cfg.examples_per_step % world.size:
            raise UserError(
                f"--examples-per-step={cfg.examples_per_step} is not a multiple of {world.size} ranks"
            )
        if cfg.clip < 0 or cfg.kl < 0:
            raise UserError("--clip and --kl cannot be negative")
        if cfg.clip > 0 and cfg.num_updates == 1:
            raise UserError("--clip changes nothing with --num-updates=1: no probability has moved yet")
        beginning = begin("rl", cfg, world)
        source, tokenizer = beginning.source, beginning.source.tokenizer()
        model = beginning.weights(cfg.lora_rank > 0).model(world.device, precision.dtype)
        announce_model(model, precision)
        reference = (
            source.model(world.device, precision.dtype).eval().requires_grad_(False) if cfg.kl > 0 else None
        )

        train_task, test_task = questions(cfg.task)
        num_steps = cfg.num_iterations
        if num_steps < 1:
            num_steps = max(len(train_task) // cfg.examples_per_step * cfg.num_epochs, 1)
        schedule = make_schedule(num_steps)
        optimizer = make_policy_optimizer(cfg, model, source, world)
        print0(f"{num_steps} steps of {cfg.examples_per_step} questions x {cfg.num_samples} answers")
        engine = Engine(model, tokenizer, max_batch=max(cfg.num_samples, 64))

        def evaluate() -> dict:
            return pass_at_k(cfg, engine, tokenizer, test_task, world)

        plan = RLPlan(
            stage="rl",
            directory=beginning.directory,
            schedule=schedule,
            project="nanochat-rl",
            evaluations=(Evaluation(cfg.eval_every, evaluate, at_start=True),),
            extra_meta={"device_batch_size": cfg.device_batch_size},
            task=cfg.task,
            examples_per_step=cfg.examples_per_step,
            device_batch_size=cfg.device_batch_size,
            surrogate=Surrogate(cfg.num_updates, cfg.clip, cfg.kl, reference),
            **cfg.plan_settings(),
        )
        sampler = GroupSampler(
            engine, tokenizer, cfg.num_samples, cfg.max_new_tokens, cfg.temperature, cfg.top_k
        )
        train_rl(plan, world, model, tokenizer, optimizer, train_task, sampler, beginning.resume_from)


def questions(name: str) -> tuple[Task, Task]:
    """The task to train on and the one to evaluate on."""
    from tasks.arc import ARC
    from tasks.gsm8k import GSM8K
    from tasks.humaneval import HumanEval
    from tasks.mmlu import MMLU
    from tasks.spellingbee import SimpleSpelling, SpellingBee

    if name == "GSM8K":
        return GSM8K("main", "train"), GSM8K("main", "test")
    if name == "HumanEval":  # there is a test split only: every second problem is held out
        return HumanEval(step=2), HumanEval(start=1, step=2)
    if name == "MMLU":
        return MMLU("all", "auxiliary_train"), MMLU("all", "test")
    if name.startswith("ARC"):
        return ARC(name, "train"), ARC(name, "test")
    kind = {"SpellingBee": SpellingBee, "SimpleSpelling": SimpleSpelling}[name]
    return kind(10_000, "train"), kind(1000, "test")


def make_schedule(num_steps: int) -> Schedule:
    """Learning rate linearly to zero, momentum constant."""
    from nanochat.schedule import Schedule

    return Schedule(
        num_steps, warmdown_steps=num_steps, momentum_warmup_steps=0, momentum_peak=0.95, momentum_end=0.95
    )


def pass_at_k(
    cfg: Config, engine: Engine, tokenizer: RustBPETokenizer, task: Task, world: World
) -> dict[str, float]:
    """Unbiased pass@k (Chen et al. 2021, arXiv 2107.03374) on the first test questions, k = 1..eval_samples."""
    from math import comb

    import torch

    from nanochat.engine import SamplingParams

    questions = range(world.rank, min(cfg.eval_examples, len(task)), world.size)
    conversations = [task[i] for i in questions]
    rendered, _ = tokenizer.completion_prompts(conversations, engine.prompt_room(cfg.max_new_tokens))
    prompts = [prompt for prompt in rendered for _ in range(cfg.eval_samples)]
    # a question's seed does not depend on the number of ranks
    params = [
        SamplingParams(cfg.temperature, cfg.top_k, cfg.max_new_tokens, seed=1_000_003 * i + sample)
        for i in questions
        for sample in range(cfg.eval_samples)
    ]
    answers = engine.complete_many(prompts, params)
    n = cfg.eval_samples
    totals = torch.zeros(n + 1)
    for i, conversation in enumerate(conversations):
        texts = [tokenizer.decode(answer.content) for answer in answers[i * n : (i + 1) * n]]
        right = sum(task.reward(conversation, text) == 1.0 for text in texts)
        totals += torch.tensor([1.0, *(1 - comb(n - right, k) / comb(n, k) for k in range(1, n + 1))])
    totals = world.sum(totals.to(world.device)).cpu()
    return {f"pass@{k}": float(totals[k] / totals[0].clamp(min=1)) for k in range(1, n + 1)}


if __name__ == "__main__":
    run(Config, main)
