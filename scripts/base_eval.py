"""Evaluate a base model: CORE, bits per byte of the training and validation text, and samples to look at.

python -m scripts.base_eval
python -m scripts.base_eval --hf-path=openai-community/gpt2 --eval=core     # self-check: published scores beside
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError, get_base_dir, read_json, whole_file, write_json
from nanochat.configurator import option, run
from nanochat.options import CPU_TOKENS, WhichModel
from scripts.base_train import PROMPTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from nanochat.checkpoint_manager import Checkpoint
    from nanochat.common import World
    from nanochat.document_reader import DocumentTokenizer
    from nanochat.gpt import GPT
    from nanochat.hf_eval import HuggingFaceModel
    from nanochat.tokenizer_base import Tokenizer

MODES = ("core", "bpb", "sample")
# Tokens in a row of bits per byte of a Hugging Face model: its context, unless it names none or one beyond training here.
ROW, LONGEST_ROW = 1024, 8192
TOKENS = 40 * 524288  # of a split


@dataclass(frozen=True)
class Config(WhichModel):
    eval: str = option("core,bpb,sample", "what to evaluate: core, bpb, sample, separated by commas")
    hf_path: str | None = option(None, "a Hugging Face model to evaluate instead of our own")
    max_per_task: int = option(-1, "examples per CORE task; -1 = all", least=1, off=-1)
    device_batch_size: int = option(32, "rows per forward pass and rank, for bits per byte", least=1)
    split_tokens: int | None = option(
        None, f"tokens per split, for bits per byte; auto: {TOKENS:,}, on a CPU {CPU_TOKENS:,}",
        none="auto", least=1,
    )  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """The model under evaluation and what belongs to it."""

    name: str
    slug: str
    model: GPT | HuggingFaceModel
    tokenizer: Tokenizer
    encoder: DocumentTokenizer
    token_bytes: torch.Tensor
    seq_len: int
    record: Path  # the JSON file of the results
    checkpoint: Checkpoint | None = None  # None for a Hugging Face model


def main(cfg: Config) -> None:
    """Evaluate a base model: CORE, bits per byte and samples."""
    evaluate(cfg, "Base model evaluation")


def evaluate(cfg: Config, section: str, usual_tokens: int = TOKENS) -> None:
    """Evaluate as configured and log the section of the report. usual_tokens: of a split, not on a CPU."""
    from nanochat.common import data_source, distributed, print0
    from nanochat.loss_eval import tokens_by_default
    from nanochat.report import get_report
    from nanochat.validation_data import find_validation_data, warn_of_other_validation_data

    modes = parse_modes(cfg.eval)
    with distributed(cfg.device_type) as world:
        subject = load_subject(cfg, world)
        print0(f"model: {subject.name} | data source: {data_source()}")
        results: dict = {"model": subject.name}
        covers: dict[str, int] = {}
        parts: dict[str, dict] = {}  # of the results, under the names in covers
        samples = sample(subject, world) if "sample" in modes else {}
        if "bpb" in modes:
            meta = subject.checkpoint.meta if subject.checkpoint else {}
            warn_of_other_validation_data(meta, find_validation_data(world))
            tokens = cfg.split_tokens or tokens_by_default(usual_tokens, world.device)
            parts["tokens"] = {
                f"{split} bpb": bits_per_byte(cfg, subject, split, tokens, world)
                for split in ("train", "val")
            }
            results |= parts["tokens"]
            covers["tokens"] = tokens
        outcome: dict[str, Any] = {}
        if "core" in modes:
            outcome = core(cfg, subject, world)
            low, high = outcome["core_interval"]
            metrics = {"CORE metric": outcome["core_metric"], "CORE 95% low": low, "CORE 95% high": high}
            parts["CORE examples"] = metrics | {"centered_results": outcome["centered_results"]}
            results |= metrics
            covers["CORE examples"] = len(outcome["examples"])
        covers["samples"], parts["samples"] = len(samples), samples
        if world.is_main:
            save(subject, parts, covers, outcome)
        model = subject.checkpoint or subject.name
        get_report().log(
            section=section,
            data=[results, outcome.get("centered_results"), samples],
            model=model,
            covers=covers,
        )


def parse_modes(text: str) -> list[str]:
    """The modes of --eval. Raises UserError for an unknown one."""
    modes = [mode.strip() for mode in text.split(",") if mode.strip()]
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"--eval: unknown {', '.join(unknown)}; use {', '.join(MODES)}")
    if not modes:
        raise UserError(f"--eval names nothing to do; use {', '.join(MODES)}")
    return modes


# --- the model ---------------------------------------------------------------------------------------


def load_subject(cfg: Config, world: World) -> Subject:
    """Our checkpoint, or with --hf-path a Hugging Face model."""
    if cfg.hf_path is not None:
        return _load_hugging_face(cfg.hf_path, world)
    from nanochat.checkpoint_manager import Checkpoint, load_model, locate
    from nanochat.tokenizer import get_token_bytes

    directory, step = locate("base", cfg.model_tag, cfg.step, contents=False)
    model, tokenizer, _ = load_model("base", world.device, "eval", directory.name, step)
    return Subject(
        f"base model {directory.name} (step {step})", f"base_model_{step:06d}", model, tokenizer, tokenizer,
        get_token_bytes(world.device, tokenizer), model.config.sequence_len,
        directory / f"base_eval_{step:06d}.json", Checkpoint.open(directory, step),
    )  # fmt: skip


def _load_hugging_face(path: str, world: World) -> Subject:
    from nanochat.hf_eval import DocumentEncoder, HuggingFaceModel, token_bytes
    from nanochat.tokenizer import HuggingFaceTokenizer

    model = HuggingFaceModel.from_pretrained(path, world.device)
    context = model.max_seq_len or ROW
    if Path(path).is_dir():
        tokenizer = HuggingFaceTokenizer.from_directory(path)
    else:
        tokenizer = HuggingFaceTokenizer.from_pretrained(path)
    slug = path.strip("/").replace("/", "-")
    return Subject(
        path, slug, model, tokenizer, DocumentEncoder(tokenizer), token_bytes(tokenizer).to(world.device),
        context if context <= LONGEST_ROW else ROW, get_base_dir() / "base_eval" / f"{slug}.json",
    )  # fmt: skip


# --- what is measured --------------------------------------------------------------------------------


def sample(subject: Subject, world: World) -> dict[str, str]:
    """Greedy continuations of the prompts and free samples, made and printed on rank 0 (own models only)."""
    from nanochat.engine import Engine, SamplingParams
    from nanochat.gpt import GPT

    if not world.is_main or not isinstance(subject.model, GPT):
        return {}
    engine, tokenizer = Engine(subject.model, subject.tokenizer, tools={}), subject.tokenizer
    bos = tokenizer.get_bos_token_id()
    prompts = [tokenizer.encode(text, prepend=bos) for text in PROMPTS]
    greedy = engine.complete_many(prompts, SamplingParams(temperature=0.0, max_tokens=16))
    free = engine.complete_many([[bos]] * 8, SamplingParams(temperature=1.0, max_tokens=128, seed=42))
    texts = {
        f"sample {i}": prompt + tokenizer.decode(completion.content)
        for i, (prompt, completion) in enumerate(zip(PROMPTS, greedy, strict=True))
    }
    texts |= {f"unconditioned {i}": tokenizer.decode(c.content) for i, c in enumerate(free)}
    for name, text in texts.items():
        print(f"{name}: {text!r}", flush=True)
    return texts


def bits_per_byte(cfg: Config, subject: Subject, split: str, tokens: int, world: World) -> float:
    """Bits per byte of that many tokens of a split, or of the whole number of steps in them. Collective."""
    from contextlib import closing

    from nanochat.common import print0
    from nanochat.dataloader import PretrainLoader
    from nanochat.loss_eval import evaluate_bpb

    rows, length = cfg.device_batch_size, subject.seq_len
    per_step = rows * length * world.size
    steps = tokens // per_step
    if steps < 1:
        raise UserError(
            f"--split-tokens={tokens:,} is less than one step of {per_step:,} tokens "
            f"({rows} rows x {length} tokens x {world.size} ranks); lower --device-batch-size"
        )
    if steps * per_step != tokens:
        print0(f"split tokens: {tokens:,} rounded down to {steps * per_step:,}")
    print0(f"{split} bpb of {steps * per_step:,} tokens, in {steps:,} batches of {per_step:,}:")
    with closing(PretrainLoader(subject.encoder, rows, length, split, world)) as loader:
        bpb = evaluate_bpb(subject.model, loader, steps, subject.token_bytes, world)
    print0(f"{split} bpb: {bpb:.6f}")
    return bpb


def core(cfg: Config, subject: Subject, world: World) -> dict[str, Any]:
    """What evaluate_core returns, after saying the metric. Collective."""
    from nanochat.common import print0
    from nanochat.core_eval import evaluate_core

    outcome = evaluate_core(subject.model, subject.tokenizer, world, cfg.max_per_task)
    low, high = outcome["core_interval"]
    print0(f"CORE metric: {outcome['core_metric']:.4f} (95 % of resampled examples: {low:.4f} to {high:.4f})")
    check_known_scores(cfg, outcome)
    return outcome


def check_known_scores(cfg: Config, outcome: dict) -> None:
    """Print the published scores of the model, or of the models that it lies between; only of the real bundle."""
    from nanochat.common import data_source, print0
    from nanochat.reference_scores import compare, neighbours, reference_of

    if data_source() != "hub":
        return
    reference = reference_of(cfg.hf_path) if cfg.hf_path else None
    if reference is not None:
        lines = compare(reference, outcome["core_metric"], outcome["results"], cfg.max_per_task < 0)
        print0("\n".join(lines))
    elif cfg.max_per_task < 0:
        print0(f"for comparison: {neighbours(outcome['core_metric'])}")


# --- what is kept ------------------------------------------------------------------------------------


def save(subject: Subject, parts: Mapping[str, dict], covers: Mapping[str, int], outcome: dict) -> None:
    """Write the results beside the checkpoint, with a log and a table of CORE, and say where they are.

    What another mode found earlier stays, and so does what was made on more of the same weights.
    """
    from nanochat.report import covered_less

    weights = subject.checkpoint and subject.checkpoint.weights_sha256
    log = subject.record.with_name(f"{subject.record.stem}_core_examples.jsonl")
    before = read_json(subject.record) if subject.record.exists() else {}
    if before.get("weights") != weights:
        before = {}
    covered = before.get("covers", {})
    less = covered_less(covers, {name: count for name, count in covered.items() if parts.get(name)})
    record = before | {"model": subject.name, "weights": weights}
    for name, part in parts.items():
        if part and name not in less:
            record |= part
            covered = covered | {name: covers[name]}
    if "CORE examples" in parts and "CORE examples" not in less:
        with whole_file(log, "w") as file:
            file.writelines(f"{line}\n" for line in outcome["examples"])
        print(f"examples: {log}", flush=True)
        path = get_base_dir() / "base_eval" / f"{subject.slug}.csv"
        write_table(path, outcome["results"], outcome["centered_results"], outcome["core_metric"])
        print(f"table: {path}", flush=True)
    write_json(subject.record, record | {"covers": covered})
    kept = f" keeps what was made on more: {', '.join(less.values())}" if less else ""
    print(f"results: {subject.record}{kept}", flush=True)


def write_table(path: Path, accuracies: dict[str, float], centered: dict[str, float], metric: float) -> None:
    """Write the results of CORE as aligned comma-separated values."""
    rows = [("Task", "Accuracy", "Centered")]
    rows += [(label, f"{accuracies[label]:.6f}", f"{centered[label]:.6f}") for label in accuracies]
    rows.append(("CORE", "", f"{metric:.6f}"))
    with whole_file(path, "w") as file:
        file.writelines(f"{label:<35}, {accuracy:<10}, {value:<10}\n" for label, accuracy, value in rows)


if __name__ == "__main__":
    run(Config, main)
