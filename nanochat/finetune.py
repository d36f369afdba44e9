"""Mid-training and SFT: a base or mid model goes on with conversations, through the same loop as pretraining.

The two stages differ in their settings, their mixture and in what counts as a target: every token of a
conversation in mid-training, what the assistant says in SFT.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from nanochat.common import print0
from nanochat.configurator import option
from nanochat.options import StageConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from nanochat.chat_loader import Conversations
    from nanochat.checkpoint_manager import Checkpoint
    from nanochat.common import World
    from nanochat.gpt import GPT
    from nanochat.optim import MuonAdamW
    from nanochat.schedule import Schedule
    from nanochat.stage import Beginning
    from nanochat.tokenizer import RustBPETokenizer
    from nanochat.training_run import Evaluation

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class PolicyConfig(StageConfig):
    """Learning rates of the stages that shift an already trained model, RL and DPO: small ones."""

    embedding_lr: float = option(0.2, "learning rate of the embedding tables (AdamW)", least=0)
    unembedding_lr: float = option(0.004, "learning rate of the head (AdamW)", least=0)
    matrix_lr: float = option(0.02, "learning rate of the matrices (Muon)", least=0)
    weight_decay: float = option(0.0, "weight decay of the matrices", least=0)
    init_lr_frac: float = option(0.05, "all learning rates are multiplied by this", least=0)


@dataclass(frozen=True)
class FinetuneConfig(StageConfig):
    """Settings that mid-training and SFT share. None: as in the run that made the source model."""

    compile: str = option("auto", "compile the step", choices=("auto", "on", "off"))
    load_optimizer: bool = option(True, "start from the source's optimizer state")
    add_layers: int = option(0, "put this many new layers on top of the source model")
    freeze_layers: int = option(0, "let this many layers, from the lowest, and the tables rest")
    extra_data: str = option("", "JSONL files of more conversations, by commas; here or in the data's folder")
    only_extra_data: bool = option(False, "train on --extra-data alone")
    num_iterations: int = option(-1, "optimizer steps; -1: from --num-epochs", least=1, off=-1)
    num_epochs: int = option(1, "passes over the mixture", least=1)
    max_seq_len: int | None = option(None, "context in tokens", least=1)
    device_batch_size: int | None = option(
        None, "rows per micro-batch and rank; auto: the source's, or on another device the fastest that fits",
        none="auto", least=1,
    )  # fmt: skip
    total_batch_size: int | None = option(None, "tokens per step")
    embedding_lr: float | None = option(None, "learning rate of the embedding tables (AdamW)", least=0)
    unembedding_lr: float | None = option(None, "learning rate of the head (AdamW)", least=0)
    matrix_lr: float | None = option(None, "learning rate of the matrices (Muon)", least=0)
    weight_decay: float = option(0.0, "weight decay of the matrices", least=0)
    init_lr_frac: float = option(1.0, "all learning rates are multiplied by this", least=0)
    warmup_ratio: float = option(0.0, "part of the run with rising learning rate", least=0)
    warmdown_ratio: float = option(0.2, "part of the run with falling learning rate", least=0)
    final_lr_frac: float = option(0.0, "learning rate at the end, relative to the peak", least=0)
    eval_every: int = option(150, "steps between validations; -1: off")
    eval_tokens: int = option(20 * 524288, "validation tokens", least=1)


def finetune(
    cfg: FinetuneConfig,
    stage: str,
    title: str,
    mixture: Callable[[], tuple[Conversations, Conversations]],
    mask: bool,
    more_evaluations: Callable[[GPT, RustBPETokenizer, World], tuple[Evaluation, ...]] = lambda *_: (),
) -> None:
    """Run one stage of training on conversations.

    mixture: builds (training task, validation task). mask: only what the assistant says is a target.
    """
    from nanochat.chat_loader import ChatLoader
    from nanochat.common import device_name, distributed
    from nanochat.lora import merge_adapters
    from nanochat.scaling import REFERENCE_BATCH, accumulation_steps
    from nanochat.stage import announce, announce_batch, announce_model, begin, data_facts, finish
    from nanochat.trainer import TrainingPlan, train

    with distributed(cfg.device_type) as world:
        precision, compiled = announce(world, cfg.compile, cfg.precision)
        beginning = begin(stage, cfg, world)
        source, tokenizer = beginning.source, beginning.source.tokenizer()
        length, total = inherit_sizes(cfg, source, world)
        model = beginning.weights(cfg.lora_rank > 0).model(world.device, precision.dtype, length)
        model = change_layers(cfg, model, source)
        announce_model(model, precision)

        lr_scale = (total / REFERENCE_BATCH) ** 0.5
        rates = inherit_rates(cfg, source)
        optimizer = make_optimizer(cfg, model, source, world, rates, lr_scale)
        rows = choose_rows(cfg, model, optimizer, beginning, world, length, total)
        accumulation = accumulation_steps(total, rows, length, world.size)
        announce_batch(total, rows, length, world, accumulation)
        make_schedule(cfg, 1000)  # says what is wrong with its settings before the steps are counted
        train_task, val_task = mixture()
        num_steps = count_steps(cfg, tokenizer, train_task, length, total, mask, world)
        schedule = make_schedule(cfg, num_steps)
        print0(f"{len(train_task):,} conversations, {num_steps:,} steps; {schedule.describe()}")
        bits_per_byte = validation(cfg, model, tokenizer, val_task, rows, length, world, mask)
        plan = TrainingPlan(
            stage=stage,
            directory=beginning.directory,
            schedule=schedule,
            total_batch_size=total,
            accumulation=accumulation,
            project=f"nanochat-{stage}",
            evaluations=(bits_per_byte, *more_evaluations(model, tokenizer, world)),
            compile=compiled,
            extra_meta={
                "max_seq_len": length,
                "device_batch_size": rows,
                "recompute": model.recompute,
                "device": device_name(world.device),
                "lr_scale": lr_scale,
                "rates": rates,
                "source": {"stage": cfg.source, "step": source.step},
            },
            **cfg.plan_settings(),
        )
        make_loader = partial(ChatLoader, tokenizer, train_task, rows, length, world, mask=mask)
        state, loader = train(plan, world, model, tokenizer, optimizer, make_loader, beginning.resume_from)
        merge_adapters(model)
        facts = {"Training conversations": len(train_task), **data_facts(loader.stats())}
        finish(title, plan, world, model, state, facts)


def change_layers(cfg: FinetuneConfig, model: GPT, source: Checkpoint) -> GPT:
    """The model with the new layers, which a resumed one has already, and its lowest layers frozen, as asked for."""
    from nanochat.common import UserError
    from nanochat.growth import deeper, freeze, grow

    if cfg.lora_rank and (cfg.add_layers or cfg.freeze_layers):
        raise UserError(
            "--lora-rank trains adapters alone; it does not go with --add-layers and --freeze-layers"
        )
    if cfg.add_layers:
        old = source.config()
        if model.config.n_layer != deeper(old, cfg.add_layers).n_layer:
            model = grow(model, cfg.add_layers)
        print0(f"layers: {old.n_layer} of the source and {cfg.add_layers} new ones")
    if cfg.freeze_layers:
        freeze(model, cfg.freeze_layers)
        print0(f"the lowest {cfg.freeze_layers} layers and the tables rest")
    return model


def inherit_sizes(cfg: FinetuneConfig, source: Checkpoint, world: World) -> tuple[int, int]:
    """Tokens of a row and of a step: from the flags, else from the source run, and say so."""
    from nanochat.scaling import whole_rows

    meta = source.meta
    length, origin = _inherited(cfg.max_seq_len, meta.get("max_seq_len"), 2048)
    print0(f"max_seq_len: {length:,} ({origin})")
    total, origin = _inherited(cfg.total_batch_size, meta.get("total_batch_size"), 524288)
    if cfg.total_batch_size is None:  # the source may have used another number of ranks
        total = whole_rows(total, length * world.size)
    print0(f"total_batch_size: {total:,} ({origin})")
    return length, total


def choose_rows(
    cfg: FinetuneConfig,
    model: GPT,
    optimizer: MuonAdamW,
    beginning: Beginning,
    world: World,
    length: int,
    total: int,
) -> int:
    """Rows per micro-batch and rank, and model.recompute: given, as before on this device, or measured."""
    from nanochat.batch_fit import fit_batch
    from nanochat.common import device_name
    from nanochat.scaling import accumulation_steps

    alike = beginning.resume_from, None if cfg.add_layers else beginning.source
    metas = [found.meta for found in alike if found is not None]
    like = {"max_seq_len": length, "device": device_name(world.device)}
    before = next((meta for meta in metas if all(meta.get(k) == v for k, v in like.items())), None)
    # Fewer ranks hold more of the optimizer's state each.
    if before and before.get("world_size", 1) > world.size:
        before = None
    model.recompute = bool(before and before["recompute"])
    if cfg.device_batch_size is not None:
        return cfg.device_batch_size
    if before is None:
        return fit_batch(model, optimizer, world, length, total)
    share = accumulation_steps(total, 1, length, world.size)  # of a rank, in rows
    return max(rows for rows in range(1, min(before["device_batch_size"], share) + 1) if share % rows == 0)


def count_steps(
    cfg: FinetuneConfig,
    tokenizer: RustBPETokenizer,
    task: Conversations,
    length: int,
    total: int,
    mask: bool,
    world: World,
) -> int:
    """Optimizer steps of the run: given, or as many as the packed rows of all epochs fill, which takes a while."""
    from nanochat.chat_loader import count_rows
    from nanochat.metrics import StatusLine, duration

    if cfg.num_iterations > 0:
        return cfg.num_iterations
    print0(f"packing {len(task):,} conversations to count the steps; --num-iterations goes without that")
    status, started = StatusLine(is_main=world.is_main), time.monotonic()

    def report(share: float) -> None:
        left = (time.monotonic() - started) * (1 / share - 1)
        status.show(f"counting the steps: {share:.0%} of the conversations packed | {duration(left)} left")

    rows = count_rows(tokenizer, task, length, mask=mask, epochs=cfg.num_epochs, report=report)
    status.show(
        f"{rows:,} rows of {length:,} tokens, counted in {duration(time.monotonic() - started)}", final=True
    )
    return max(rows // (total // length), 1)


def make_schedule(cfg: FinetuneConfig, num_steps: int) -> Schedule:
    from nanochat.schedule import Schedule

    return Schedule(
        num_steps=num_steps,
        warmup_steps=round(cfg.warmup_ratio * num_steps),
        warmdown_steps=round(cfg.warmdown_ratio * num_steps),
        final_lr_frac=cfg.final_lr_frac,
        momentum_warmup_steps=300,
        momentum_peak=0.95,
        momentum_end=0.95,
        weight_decay=cfg.weight_decay,
    )


def inherit_rates(cfg: FinetuneConfig, source: Checkpoint) -> dict[str, float]:
    """Peak learning rates before scaling: from the flags, else those that the source was trained with."""
    stored = {**source.meta["user_config"], **source.meta.get("rates", {})}
    fallbacks = {
        "embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02, "scalar_lr": 0.5, "smear_lr": 0.2,
    }  # fmt: skip
    found = {}
    for name, fallback in fallbacks.items():
        found[name], origin = _inherited(getattr(cfg, name, None), stored.get(name), fallback)
        print0(f"{name} {found[name]:g} ({origin})")
    return found


def _inherited(given: N | None, stored: N | None, fallback: N) -> tuple[N, str]:
    """A setting and where it comes from: the flag, else the source run, else the default."""
    if given is not None:
        return given, "flag"
    return (fallback, "default") if stored is None else (stored, "as in the source run")


def make_optimizer(
    cfg: FinetuneConfig,
    model: GPT,
    source: Checkpoint,
    world: World,
    rates: dict[str, float],
    lr_scale: float,
) -> MuonAdamW:
    """Rates scaled to this batch, but for smear and backout, which no batch scales; moments from the source.

    With --lora-rank it trains adapters beside the weights, at a rate of their own.
    """
    from nanochat.lora import train_adapters

    if cfg.lora_rank:
        return train_adapters(cfg, model, source, world, cfg.init_lr_frac)
    scaled = {
        name: rate * cfg.init_lr_frac * (1.0 if name == "smear_lr" else lr_scale)
        for name, rate in rates.items()
    }
    print0(", ".join(f"{name} {rate:.2e}" for name, rate in scaled.items()))
    optimizer = model.setup_optimizer(world, weight_decay=cfg.weight_decay, **scaled)
    if cfg.load_optimizer:
        state = source.optimizer_state()
        if state is None or not optimizer.fits(state):
            why = "no optimizer state" if state is None else "an optimizer state of other parameters"
            print0(f"the source has {why}; starting with a fresh one")
        else:
            optimizer.load_full_state_dict(state)
    return optimizer


def make_policy_optimizer(cfg: PolicyConfig, model: GPT, source: Checkpoint, world: World) -> MuonAdamW:
    """Of all weights but the scalars, or of adapters beside them; without the moments of earlier stages."""
    from nanochat.lora import train_adapters

    scale = cfg.init_lr_frac
    if cfg.lora_rank:
        return train_adapters(cfg, model, source, world, scale)
    return model.setup_optimizer(
        world,
        unembedding_lr=cfg.unembedding_lr * scale,
        embedding_lr=cfg.embedding_lr * scale,
        matrix_lr=cfg.matrix_lr * scale,
        # Adam moves a scalar by its whole rate along the noise of a few answers; they stay as SFT left them.
        scalar_lr=0.0,
        smear_lr=0.0,
        weight_decay=cfg.weight_decay,
    )


def validation(
    cfg: FinetuneConfig,
    model: GPT,
    tokenizer: RustBPETokenizer,
    task: Conversations,
    rows: int,
    length: int,
    world: World,
    mask: bool,
) -> Evaluation:
    """Bits per byte on held-out conversations, with the same targets as in training."""
    from nanochat.chat_loader import ChatLoader
    from nanochat.loss_eval import evaluate_bpb
    from nanochat.tokenizer import get_token_bytes
    from nanochat.training_run import Evaluation

    token_bytes = get_token_bytes(world.device, tokenizer)

    def measure() -> dict:
        loader = ChatLoader(tokenizer, task, rows, length, world, mask=mask)
        batches = max(cfg.eval_tokens // (rows * length * world.size), 1)
        bpb = evaluate_bpb(model, loader, batches, token_bytes, world)
        loader.close()
        return {"val/bpb": bpb}

    return Evaluation(cfg.eval_every, measure, at_start=True)
