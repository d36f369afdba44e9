"""Direct preference optimisation: learn from pairs of answers, the first better than the second.

    python -m scripts.chat_dpo --data=pairs.jsonl --val-data=held_out.jsonl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_dpo

A line of such a file is {"prompt": ..., "chosen": ..., "rejected": ...}; `messages` instead of `prompt` for longer
dialogues. Without files, the pairs are the word problems of GSM8K: the solution, and the same with a slip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nanochat.configurator import option, run
from nanochat.finetune import PolicyConfig, make_policy_optimizer
from nanochat.options import STAGES

if TYPE_CHECKING:
    from nanochat.dpo import Pairs
    from nanochat.schedule import Schedule


@dataclass(frozen=True)
class Config(PolicyConfig):
    compile: str = option("auto", "compile the step", choices=("auto", "on", "off"))
    source: str = option("sft", "stage whose model to start from", choices=STAGES)
    data: str = option("", "JSONL file of pairs; empty: word problems with right and wrong solutions")
    val_data: str = option("", "JSONL file of held-out pairs; needed with --data")
    max_pairs: int = option(-1, "train on the first pairs only; -1: all", least=1, off=-1)
    max_val_pairs: int = option(400, "held-out pairs per validation; -1: all", least=1, off=-1)
    # At five times this the margin grows further, and the rest of what the model can do is lost (LOG 2026-11-26).
    init_lr_frac: float = option(0.01, "all learning rates are multiplied by this", least=0)
    beta: float = option(0.1, "how dear departing from the source model is")
    num_iterations: int = option(-1, "optimizer steps; -1: from --num-epochs", least=1, off=-1)
    num_epochs: int = option(1, "passes over the pairs", least=1)
    max_seq_len: int | None = option(
        None, "longest row in tokens; default the source's, or the longest pair", least=1
    )
    device_batch_size: int = option(8, "pairs per micro-batch and rank", least=1)
    pairs_per_step: int = option(32, "pairs per step over all ranks", least=1)
    warmup_ratio: float = option(0.1, "part of the run with rising learning rate", least=0)
    warmdown_ratio: float = option(0.5, "part of the run with falling learning rate", least=0)
    eval_every: int = option(50, "steps between validations; -1: off")


def main(cfg: Config) -> None:
    """Direct preference optimisation: learn from pairs of answers, the first better than the second."""
    from nanochat.common import distributed, print0
    from nanochat.dpo import PairData, PairLoader, Preference, evaluate_pairs
    from nanochat.lora import merge_adapters
    from nanochat.stage import announce, announce_batch, announce_model, begin, data_facts, finish
    from nanochat.trainer import TrainingPlan, train
    from nanochat.training_run import Evaluation

    with distributed(cfg.device_type) as world:
        precision, compiled = announce(world, cfg.compile, cfg.precision)
        accumulation = count_micro_batches(cfg, world.size)
        beginning = begin("dpo", cfg, world)
        source, tokenizer = beginning.source, beginning.source.tokenizer()

        longest = cfg.max_seq_len or source.meta.get("max_seq_len") or source.config().sequence_len
        train_pairs, val_pairs = pairs(cfg)
        data, held_out = (PairData(tokenizer, found, longest) for found in (train_pairs, val_pairs))
        model = beginning.weights(cfg.lora_rank > 0).model(
            world.device, precision.dtype, max(data.seq_len, held_out.seq_len)
        )
        announce_model(model, precision)
        reference = source.model(world.device, precision.dtype, max(data.seq_len, held_out.seq_len))
        preference = Preference(reference.eval().requires_grad_(False), cfg.beta)
        optimizer = make_policy_optimizer(cfg, model, source, world)

        total = 2 * cfg.pairs_per_step * data.seq_len
        announce_batch(total, 2 * cfg.device_batch_size, data.seq_len, world, accumulation)
        schedule = make_schedule(cfg, len(data.pairs))
        print0(f"{len(data.pairs):,} pairs, {schedule.num_steps:,} steps; {schedule.describe()}")

        def measure() -> dict:
            return dict(evaluate_pairs(model, preference, held_out, cfg.device_batch_size, world))

        plan = TrainingPlan(
            stage="dpo",
            directory=beginning.directory,
            schedule=schedule,
            total_batch_size=total,
            accumulation=accumulation,
            project="nanochat-dpo",
            evaluations=(Evaluation(cfg.eval_every, measure, at_start=True),),
            compile=compiled,
            objective=preference,
            extra_meta={"max_seq_len": longest, "source": {"stage": cfg.source, "step": source.step}},
            **cfg.plan_settings(),
        )
        make_loader = partial(PairLoader, data, cfg.device_batch_size, world)
        state, loader = train(plan, world, model, tokenizer, optimizer, make_loader, beginning.resume_from)
        merge_adapters(model)
        facts = {"Training pairs": len(train_pairs), **data_facts(loader.stats())}
        finish("Chat DPO", plan, world, model, state, facts)


def count_micro_batches(cfg: Config, num_ranks: int) -> int:
    """Micro-batches per step and rank. Raises UserError for numbers that do not go together."""
    from nanochat.common import UserError

    if cfg.beta <= 0:
        raise UserError(f"--beta={cfg.beta} must be positive")
    per_pass = cfg.device_batch_size * num_ranks
    if cfg.device_batch_size < 1 or cfg.pairs_per_step < 1 or cfg.pairs_per_step % per_pass:
        raise UserError(
            f"--pairs-per-step={cfg.pairs_per_step} is not a multiple of --device-batch-size={cfg.device_batch_size}"
            f" x {num_ranks} ranks"
        )
    return cfg.pairs_per_step // per_pass


def pairs(cfg: Config) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs."""
    from nanochat.common import UserError
    from scripts.mid_train import first
    from tasks.gsm8k import GSM8K
    from tasks.preferences import PreferenceJSON, SlippedSolutions

    limits = first(cfg.max_pairs), first(cfg.max_val_pairs)
    if bool(cfg.data) != bool(cfg.val_data):
        raise UserError("--data and --val-data belong together: the margin is measured on held-out pairs")
    if cfg.data:
        return PreferenceJSON(cfg.data, stop=limits[0]), PreferenceJSON(cfg.val_data, stop=limits[1])
    train, test = (
        GSM8K("main", split, stop=stop) for split, stop in zip(("train", "test"), limits, strict=True)
    )
    return SlippedSolutions(train), SlippedSolutions(test)


def make_schedule(cfg: Config, num_pairs: int) -> Schedule:
    from nanochat.schedule import Schedule

    num_steps = cfg.num_iterations
    if num_steps < 1:
        num_steps = max(num_pairs * cfg.num_epochs // cfg.pairs_per_step, 1)
    return Schedule(
        num_steps,
        warmup_steps=round(cfg.warmup_ratio * num_steps),
        warmdown_steps=round(cfg.warmdown_ratio * num_steps),
        momentum_warmup_steps=0,
        momentum_peak=0.95,
        momentum_end=0.95,
        weight_decay=cfg.weight_decay,
    )


if __name__ == "__main__":
    run(Config, main)
