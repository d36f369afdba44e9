"""Pretrain a model on the pretraining shards, from scratch or from the weights of another.

python -m scripts.base_train --depth=12
python -m scripts.base_train --depth=12 --init-from=imported --model-tag=further
torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth=24
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nanochat.configurator import as_dict, option, run
from nanochat.options import CPU_TOKENS, SAVED

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from nanochat.checkpoint_manager import Checkpoint
    from nanochat.common import World
    from nanochat.gpt import GPT
    from nanochat.network_config import GPTConfig
    from nanochat.optim import MuonAdamW
    from nanochat.scaling import Horizon
    from nanochat.schedule import Schedule
    from nanochat.tokenizer import RustBPETokenizer
    from nanochat.training_run import Evaluation

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)
EVAL_TOKENS = 80 * 524288


@dataclass(frozen=True)
class Config:
    run: str = option("dummy", "wandb run name, else WANDB_RUN; dummy: no wandb", variable="WANDB_RUN")
    dry_run: bool = option(
        False, "print sizes, expected memory, time and cost, and stop; without a tokenizer for 32,768 tokens"
    )
    device_type: str = option("", "cuda, mps or cpu; empty: the best there is")
    compile: str = option("auto", "compile the step", choices=("auto", "on", "off"))
    precision: str = option(
        "auto", "numbers that are multiplied", choices=("auto", "fp32", "bf16", "fp16", "fp8", "mxfp4")
    )
    # model
    arch: str = option("modern", "architecture", choices=("modern", "classic"))
    depth: int = option(20, "layers; every other size follows from it")
    aspect_ratio: int = option(64, "width = depth x this, rounded up to whole heads")
    head_dim: int = option(128, "size of an attention head")
    kv_heads: int = option(0, "key/value heads; 0: as many as query heads")
    max_seq_len: int = option(2048, "context in tokens", least=1)
    window_pattern: str = option("SSSL", "attention windows of the layers: S short, L full (modern only)")
    qk_scale: float = option(1.2, "factor on queries and on keys; small heads need more (modern only)")
    tie_embeddings: bool = option(False, "one table for input and output, which learns at --embedding-lr")
    # horizon, in order of precedence
    num_iterations: int = option(-1, "optimizer steps; -1: from the next two", least=1, off=-1)
    target_flops: float = option(-1.0, "train for this many FLOPs; -1: off")
    target_param_data_ratio: float = option(12.0, "tokens per parameter (matrices and head)")
    # optimization
    device_batch_size: int | None = option(
        None, "rows per micro-batch and rank; auto: the fastest that fits, measured", none="auto", least=1
    )
    recompute: bool = option(
        False,
        "compute activations again instead of keeping them; auto batches turn it on when nothing else fits",
    )
    total_batch_size: int = option(-1, "tokens per step; -1: from the scaling law")
    embedding_lr: float = option(0.3, "learning rate of the embedding tables (AdamW)", least=0)
    unembedding_lr: float = option(0.008, "learning rate of the head (AdamW)", least=0)
    matrix_lr: float = option(0.02, "learning rate of the matrices (Muon)", least=0)
    scalar_lr: float = option(0.5, "learning rate of the residual scalars (AdamW)", least=0)
    smear_lr: float = option(
        0.2, "learning rate of smear and backout, for any batch; small batches need less", least=0
    )
    smear_init: float = option(
        0.0, "strength of the previous token in each embedding at the start (modern only)"
    )
    weight_decay: float = option(0.28, "weight decay of the matrices at depth 12", least=0)
    warmup_steps: int = option(40, "steps of rising learning rate, at most a tenth of the run", least=0)
    warmdown_ratio: float = option(0.65, "part of the run with falling learning rate", least=0)
    final_lr_frac: float = option(0.05, "learning rate at the end, relative to the peak", least=0)
    momentum_warmup_steps: int = option(400, "steps over which Muon's momentum rises")
    clip_norm: float = option(0.0, "clip the gradient to this norm; 0: off", least=0)
    # data
    packing: str = option("bestfit", "rows start with BOS, or one stream", choices=("bestfit", "stream"))
    # evaluation
    eval_every: int = option(250, "steps between validations; -1: off")
    eval_tokens: int | None = option(
        None, f"validation tokens; auto: {EVAL_TOKENS:,}, on a CPU {CPU_TOKENS:,}", none="auto", least=1
    )
    core_metric_every: int = option(2000, "steps between CORE evaluations; -1: off")
    core_metric_max_per_task: int = option(500, "examples per CORE task; -1: all", least=1, off=-1)
    sample_every: int = option(2000, "steps between samples; -1: off")
    # checkpoints
    init_from: str | None = option(
        None, "folder of a base model of the same sizes whose weights, tokenizer and constants to start with"
    )
    model_tag: str | None = option(None, "name of the checkpoint folder; default d<depth>")
    save_every: int = option(-1, f"steps between checkpoints, besides {SAVED}; -1: only those")
    keep_last: int = option(2, "checkpoints to keep; 0: all", least=0)
    resume: str = option("auto", "auto: continue the run in the folder; never: start over; or a step")
    seed: int = option(42, "seed of the initial weights")


def main(cfg: Config) -> None:
    """Pretrain a model on the pretraining shards, from scratch or from the weights of another."""
    from nanochat.common import device_name, distributed, print0
    from nanochat.dataloader import PretrainLoader
    from nanochat.dry_run import announce_time
    from nanochat.scaling import accumulation_steps
    from nanochat.sizing import scaling_parameters
    from nanochat.stage import announce, announce_batch, announce_model, finish
    from nanochat.tokenizer import get_tokenizer
    from nanochat.trainer import TrainingPlan, train
    from nanochat.validation_data import KEY, find_validation_data, same_validation_data

    with distributed(cfg.device_type, cfg.seed) as world:
        precision, compiled = announce(world, cfg.compile, cfg.precision)
        if cfg.dry_run:
            dry_run(cfg, world, precision.dtype, compiled)
            return
        directory, initial, resume_from = find_start(cfg, world)
        validation_data = find_validation_data(world)
        if resume_from is not None:
            validation_data = same_validation_data(resume_from.meta, validation_data, cfg.eval_every > 0)
        origin = resume_from or initial
        tokenizer = get_tokenizer() if origin is None else origin.tokenizer()
        model = start_model(cfg, origin, tokenizer.get_vocab_size(), world.device, precision.dtype)
        announce_model(model, precision)

        config = network(cfg, model.config.vocab_size)
        horizon = plan_run(cfg, config, world.size)
        length, total = cfg.max_seq_len, horizon.total_batch_size
        print0(f"horizon: {horizon.num_steps:,} steps, {horizon.num_tokens:,} tokens (from {horizon.source})")
        steps_done = resume_from.step if resume_from else 0
        announce_time(config, horizon, steps_done, world.size, world.device, precision.dtype)
        schedule = make_schedule(cfg, horizon)
        print0(schedule.describe())
        scale = horizon.lr_scale
        optimizer = model.setup_optimizer(
            world,
            unembedding_lr=cfg.unembedding_lr * scale,
            embedding_lr=cfg.embedding_lr * scale,
            matrix_lr=cfg.matrix_lr * scale,
            scalar_lr=cfg.scalar_lr * scale,
            smear_lr=cfg.smear_lr,
            weight_decay=schedule.weight_decay,
        )
        rows = choose_rows(cfg, model, optimizer, world, total, resume_from)
        accumulation = accumulation_steps(total, rows, length, world.size)
        announce_batch(total, rows, length, world, accumulation)
        plan = TrainingPlan(
            stage="base",
            directory=directory,
            schedule=schedule,
            total_batch_size=total,
            accumulation=accumulation,
            settings=as_dict(cfg),
            run=cfg.run,
            evaluations=evaluations(cfg, rows, model, tokenizer, world),
            save_every=cfg.save_every,
            keep_last=cfg.keep_last,
            start_over=cfg.resume == "never",
            compile=compiled,
            clip_norm=cfg.clip_norm,
            extra_meta={
                "device_batch_size": rows,
                "recompute": model.recompute,
                "max_seq_len": length,
                "device": device_name(world.device),
                "lr_scale": scale,
                KEY: validation_data,
            },
        )
        make_loader = partial(PretrainLoader, tokenizer, rows, length, "train", world, packing=cfg.packing)
        state, loader = train(plan, world, model, tokenizer, optimizer, make_loader, resume_from)
        facts = {
            "Tokens : Scaling params ratio": horizon.num_tokens / scaling_parameters(config),
            "Tokens dropped by packing": f"{100 * loader.stats()['fraction_dropped']:.1f} %",
        }
        finish("Base model training", plan, world, model, state, facts)


def find_start(cfg: Config, world: World) -> tuple[Path, Checkpoint | None, Checkpoint | None]:
    """The folder to write, the checkpoint of --init-from, and the one to resume from."""
    from nanochat.checkpoint_manager import Checkpoint, locate
    from nanochat.common import UserError, print0
    from nanochat.stage import checkpoint_folder, output_folder
    from nanochat.training_run import find_resume_point

    tag, initial = cfg.model_tag or f"d{cfg.depth}", None
    if cfg.init_from is None:
        directory = checkpoint_folder("base", tag)
    else:
        if cfg.smear_init:
            raise UserError("--smear-init is for new weights; --init-from takes those of another model")
        initial = Checkpoint.open(*locate("base", cfg.init_from))
        directory = output_folder("base", initial.directory, tag)
    resume_from = find_resume_point(directory, world, cfg.resume)
    if initial is not None and resume_from is None:
        print0(f"initial weights: {initial.directory} step {initial.step}; the optimizer starts fresh")
    return directory, initial, resume_from


def start_model(
    cfg: Config, origin: Checkpoint | None, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> GPT:
    """The network at the start: drawn at random, or that of a checkpoint.

    A checkpoint also decides what no flag names, such as the RoPE base of an import. Raises UserError if it
    is of another size than the flags describe.
    """
    from nanochat.common import UserError
    from nanochat.gpt import GPT

    wanted = network(cfg, vocab_size)
    if origin is None:
        model = GPT.build(wanted, device, dtype)
        model.init_weights(cfg.smear_init)
        return model
    found = origin.config()
    names = (
        "sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern", "use_lambdas",
        "tie_embeddings",
    )  # fmt: skip
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in names]
    if other := [f"{name} {ours} instead of {flags}" for name, ours, flags in pairs if ours != flags]:
        way_out = "train another one with --model-tag=NAME, or give --resume=never to start over"
        if origin.directory.name == cfg.init_from:
            way_out = "give the flags that it was trained with"
        raise UserError(
            f"the model in {origin.directory} is not the one that the flags describe: {', '.join(other)}; {way_out}"
        )
    return origin.model(device, dtype)


def network(cfg: Config, vocab_size: int) -> GPTConfig:
    """The network that the flags describe."""
    from nanochat.network_config import GPTConfig
    from nanochat.scaling import model_dimensions

    sizes = {
        "sequence_len": cfg.max_seq_len,
        "vocab_size": vocab_size,
        "tie_embeddings": cfg.tie_embeddings,
        **model_dimensions(cfg.depth, cfg.aspect_ratio, cfg.head_dim, cfg.kv_heads),
    }
    if cfg.arch == "classic":
        return GPTConfig.classic(**sizes)
    return GPTConfig.modern(window_pattern=cfg.window_pattern, qk_scale=cfg.qk_scale, **sizes)


def plan_run(cfg: Config, config: GPTConfig, world_size: int) -> Horizon:
    """Steps, batch and scale of the learning rates; the 12-layer model with the same flags is the reference."""
    from dataclasses import replace

    from nanochat.scaling import REFERENCE_DEPTH, plan_horizon
    from nanochat.sizing import flops_per_token, scaling_parameters

    # It need not be a network that can be built: its few heads may not be a multiple of --kv-heads.
    reference = network(replace(cfg, depth=REFERENCE_DEPTH, kv_heads=0), config.vocab_size)
    return plan_horizon(
        scaling_parameters(config),
        scaling_parameters(reference, cfg.kv_heads),
        flops_per_token(config),
        num_iterations=cfg.num_iterations,
        target_flops=cfg.target_flops,
        param_data_ratio=cfg.target_param_data_ratio,
        total_batch_size=cfg.total_batch_size,
        row_tokens=cfg.max_seq_len * world_size,
    )


def choose_rows(
    cfg: Config, model: GPT, optimizer: MuonAdamW, world: World, total: int, resume_from: Checkpoint | None
) -> int:
    """Rows per micro-batch and rank, and model.recompute: given, as before the interruption, or measured."""
    from nanochat.batch_fit import fit_batch

    model.recompute = cfg.recompute
    if cfg.device_batch_size is not None:
        return cfg.device_batch_size
    before = resume_from.meta if resume_from else {}
    if before.get("world_size") == world.size and "recompute" in before:
        model.recompute = before["recompute"]
        return before["device_batch_size"]  # another one would round differently
    return fit_batch(model, optimizer, world, cfg.max_seq_len, total)


def dry_run(cfg: Config, world: World, dtype: torch.dtype, compiled: bool) -> None:
    """Print what a run with these flags would train and take, without building or writing anything."""
    from nanochat.batch_fit import MEMORY_SHARE, candidates, memory_for_this_process
    from nanochat.common import UserError
    from nanochat.dry_run import describe, fitting_batch
    from nanochat.memory import Setting
    from nanochat.scaling import accumulation_steps
    from nanochat.tokenizer import get_tokenizer

    try:
        vocab_size = get_tokenizer().get_vocab_size()
    except UserError:
        vocab_size = 32768
    config = network(cfg, vocab_size)
    horizon = plan_run(cfg, config, world.size)
    setting = Setting(
        rows=1, world_size=world.size, compute_bytes=dtype.itemsize, on_gpu=world.device.type == "cuda",
        compiled=compiled, recompute=cfg.recompute,
    )  # fmt: skip
    total = horizon.total_batch_size
    rows = candidates(accumulation_steps(total, 1, cfg.max_seq_len, world.size))
    if cfg.device_batch_size is not None:
        rows = [cfg.device_batch_size]
    limit = MEMORY_SHARE * memory_for_this_process(world.device)
    batch = fitting_batch(config, setting, total, rows, limit)
    describe(config, horizon, batch, world.size, world.device, dtype, limit)


def make_schedule(cfg: Config, horizon: Horizon) -> Schedule:
    from nanochat.schedule import Schedule

    return Schedule(
        num_steps=horizon.num_steps,
        warmup_steps=min(cfg.warmup_steps, horizon.num_steps // 10),
        warmdown_steps=round(cfg.warmdown_ratio * horizon.num_steps),
        final_lr_frac=cfg.final_lr_frac,
        momentum_warmup_steps=cfg.momentum_warmup_steps,
        momentum_end=0.90,
        weight_decay=cfg.weight_decay * horizon.weight_decay_scale,
    )


def evaluations(
    cfg: Config, rows: int, model: GPT, tokenizer: RustBPETokenizer, world: World
) -> tuple[Evaluation, ...]:
    """Bits per byte on the validation shard, CORE, and a few continuations to look at."""
    from nanochat.common import print0
    from nanochat.core_eval import evaluate_core
    from nanochat.dataloader import PretrainLoader
    from nanochat.engine import Engine, SamplingParams
    from nanochat.loss_eval import evaluate_bpb, tokens_by_default
    from nanochat.tokenizer import get_token_bytes
    from nanochat.training_run import Evaluation

    token_bytes = get_token_bytes(world.device, tokenizer)
    tokens = cfg.eval_tokens or tokens_by_default(EVAL_TOKENS, world.device)

    def bits_per_byte() -> dict:
        loader = PretrainLoader(tokenizer, rows, cfg.max_seq_len, "val", world)
        batches = max(tokens // (rows * cfg.max_seq_len * world.size), 1)
        bpb = evaluate_bpb(model, loader, batches, token_bytes, world)
        loader.close()
        return {"val/bpb": bpb}

    def core() -> dict:
        outcome = evaluate_core(model, tokenizer, world, max_per_task=cfg.core_metric_max_per_task)
        return {"core_metric": outcome["core_metric"], "centered_results": outcome["centered_results"]}

    def samples() -> dict:
        if world.is_main:
            engine = Engine(model, tokenizer, tools={})
            prompts = [tokenizer.encode(text, prepend=tokenizer.get_bos_token_id()) for text in PROMPTS]
            greedy = SamplingParams(temperature=0.0, max_tokens=16)
            for prompt, completion in zip(PROMPTS, engine.complete_many(prompts, greedy), strict=True):
                print0(f"  {prompt + tokenizer.decode(completion.content)!r}")
        return {}

    return (
        Evaluation(cfg.eval_every, bits_per_byte, at_start=True),
        Evaluation(cfg.core_metric_every, core),
        Evaluation(cfg.sample_every, samples),
    )


if __name__ == "__main__":
    run(Config, main)
