"""Checkpoints that are complete or absent, and finding the one that is meant.

<base>/<stage>_checkpoints/<tag>/model_000123.pt    weights
                                 optim_000123.pt    optimizer state, the same for any number of ranks
                                 meta_000123.json   configuration, loop and loader state, the size and SHA-256 of
                                                    the other files, and the SHA-256 of the vocabulary; written last
                                 tokenizer/         the tokenizer that the weights belong to
"""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanochat.common import (
    UserError,
    compute_dtype,
    get_base_dir,
    hash_file,
    print0,
    read_json,
    whole_file,
    write_json,
)
from nanochat.config_versions import read_config, stored_config
from nanochat.gpt import GPT, GPTConfig
from nanochat.options import STAGE_FOLDERS, STAGES
from nanochat.snapshot import weights_copy

if TYPE_CHECKING:
    from nanochat.tokenizer import RustBPETokenizer, Vocabulary

FORMAT_VERSION = 1


def stage_dir(stage: str) -> Path:
    """The folder of a stage's checkpoints."""
    if stage not in STAGE_FOLDERS:
        raise UserError(f"{stage!r} is not a stage; use {', '.join(STAGES)}")
    return get_base_dir() / STAGE_FOLDERS[stage]


def model_dir(stage: str, tag: str) -> Path:
    """The folder of a model's checkpoints. Raises UserError for a tag that is not the name of one folder."""
    if not 0 < len(tag) <= 100 or tag.startswith(".") or set(tag) & set("/\\") or not tag.isprintable():
        raise UserError(
            f"{tag!r} is no model tag, which names a folder in {stage_dir(stage)}: at most 100 characters, none of them"
            " / or \\, the first no dot"
        )
    return stage_dir(stage) / tag


# --- writing -----------------------------------------------------------------------------------------


class _HashingWriter:
    """Hashes what passes through, so that a checkpoint is not read back to be hashed."""

    def __init__(self, file) -> None:
        self._file, self.sha256, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None  # torch turns it into one that says nothing about the disk

    def write(self, data) -> int:
        self.sha256.update(data)
        self.size += len(memoryview(data).cast("B"))
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save_tensors(path: Path, value: object) -> dict:
    with whole_file(path) as file:
        writer = _HashingWriter(file)
        # A file would be sought in to align its tensors; a writer gets the zip format as a plain stream.
        try:
            torch.save(value, writer)  # pyright: ignore[reportArgumentType]
        except RuntimeError:
            if writer.error is not None:
                raise writer.error from None
            raise
    return {"size": writer.size, "sha256": writer.sha256.hexdigest()}


def save_checkpoint(
    directory: Path,
    step: int,
    model: GPT,
    meta: dict,
    optimizer_state: dict | None = None,
    tokenizer: RustBPETokenizer | None = None,
    keep_last: int = 0,
) -> None:
    """Write a checkpoint of a model (rank 0 calls this), as write_checkpoint does."""
    write_checkpoint(
        directory, step, model.config, weights_copy(model), meta, optimizer_state, tokenizer, keep_last
    )


def write_checkpoint(
    directory: Path,
    step: int,
    config: GPTConfig,
    weights: dict[str, torch.Tensor],
    meta: dict,
    optimizer_state: dict | None = None,
    tokenizer: RustBPETokenizer | None = None,
    keep_last: int = 0,
) -> None:
    """Write a checkpoint from copies, in any thread. It counts only once its meta file is there.

    weights: on the host; nobody else may change them or the optimizer state meanwhile.
    keep_last: how many checkpoints to keep in the folder, this one being the last; 0 keeps all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Another checkpoint of this step (damaged, or of a run that went back) is absent before it is replaced.
    (directory / f"meta_{step:06d}.json").unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save(directory / "tokenizer")
        meta = meta | {"tokenizer_sha256": tokenizer.vocabulary.sha256}
    files = {f"model_{step:06d}.pt": _save_tensors(directory / f"model_{step:06d}.pt", weights)}
    if optimizer_state is not None:
        name = f"optim_{step:06d}.pt"
        files[name] = _save_tensors(directory / name, optimizer_state)
    complete = {
        "format": FORMAT_VERSION,
        "step": step,
        "model_config": stored_config(config),
        **meta,
        "files": files,
    }
    write_json(directory / f"meta_{step:06d}.json", complete)
    if keep_last > 0:
        _prune(directory, step, keep_last)


def update_meta(directory: Path, step: int, changes: dict) -> None:
    """Replace entries of a checkpoint's meta file, which stays whole throughout."""
    path = directory / f"meta_{step:06d}.json"
    write_json(path, read_json(path) | changes)


def delete_checkpoints(directory: Path, after: int = -1) -> None:
    """Delete the checkpoints of a folder after a step and say so. Raises UserError where that would be for ever."""
    refuse_irreplaceable(directory)
    if steps := [step for step in list_steps(directory) if step > after]:
        print0(f"deleting the checkpoints of an earlier run in {directory}: steps {steps}")
    for step in steps:
        _delete(directory, step)


def remove_leftovers(directory: Path) -> None:
    """Delete the half-written files that a killed run left behind. Only whoever holds the folder may call it."""
    for folder in (directory, directory / "tokenizer"):
        for path in folder.glob(".*.tmp"):  # see whole_file
            path.unlink(missing_ok=True)


def _prune(directory: Path, step: int, keep_last: int) -> None:
    """Delete all but the newest checkpoints up to a step, and what a run killed while pruning has left of older ones.

    Later steps are there when a run went back because they are damaged; they do not count.
    """
    kept = [saved for saved in list_steps(directory) if saved <= step][-keep_last:]
    for old in _steps_of(directory, r"(?:meta|model|optim)_(\d+)\.(?:json|pt)"):
        if old < kept[0]:
            _delete(directory, old)


def _delete(directory: Path, step: int) -> None:
    # meta first: from then on the checkpoint is absent, whatever happens next
    for name in (f"meta_{step:06d}.json", f"model_{step:06d}.pt", f"optim_{step:06d}.pt"):
        (directory / name).unlink(missing_ok=True)


# --- finding -----------------------------------------------------------------------------------------


def list_steps(directory: Path) -> list[int]:
    """Steps of all checkpoints with a meta file, ascending."""
    return _steps_of(directory, r"meta_(\d+)\.json")


def _steps_of(directory: Path, pattern: str) -> list[int]:
    matches = (re.fullmatch(pattern, path.name) for path in directory.glob("*_*"))
    return sorted({int(match[1]) for match in matches if match})


def refuse_irreplaceable(directory: Path) -> None:
    """Raise a UserError if a folder holds checkpoints that no run of ours made: imports, and upstream's own."""
    for step in list_steps(directory):
        try:
            meta = read_json(directory / f"meta_{step:06d}.json")
        except UserError:  # damaged: whoever looks for a checkpoint there names it
            continue
        if "imported_from" in meta:
            raise UserError(
                f"step {step} in {directory} is an imported model, which a run in that folder could delete; start"
                " from it into another one: base_train --init-from=TAG --model-tag=NEW, later stages --output-tag=NEW"
            )
        if "files" not in meta:
            raise UserError(
                f"step {step} in {directory} was not written by this code, and a run in that folder could delete it;"
                " choose another one with --model-tag or --output-tag"
            )


def check_files(directory: Path, step: int, contents: bool = True, to_resume: bool = True) -> str | None:
    """None if a checkpoint's files are as they were written, else what is wrong with them.

    contents: whether to read and hash them, a second or more per GB, or to look at their sizes only. to_resume: whether
    the optimizer state is needed, which may have been deleted to save space.
    """
    meta = directory / f"meta_{step:06d}.json"
    try:
        files = read_json(meta).get("files")
    except UserError as error:
        return str(error)
    if files is None:
        return (
            f"{meta} is not ours; if upstream wrote it: python -m scripts.import_upstream --path={directory}"
        )
    for name, expected in files.items():
        path = directory / name
        if not path.exists():
            if name.startswith("optim_") and not to_resume:
                continue
            return f"{path} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{path} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
        if contents and hash_file(path) != expected["sha256"]:
            return f"{path} is damaged (its SHA-256 is not the recorded one)"
    return None


def newest_good_step(directory: Path, contents: bool = True, to_resume: bool = True) -> int | None:
    """The last step whose files are whole; others are named and passed over. None if there is none. As check_files."""
    for step in reversed(list_steps(directory)):
        problem = check_files(directory, step, contents, to_resume)
        if problem is None:
            return step
        print0(f"warning: checkpoint {step} in {directory} is not usable: {problem}", file=sys.stderr)
    return None


def find_model_tag(checkpoints: Path) -> str:
    """The tag to use when none is given: the largest d<number>, exact names first, else the newest folder."""
    tags = [path for path in checkpoints.glob("*") if path.is_dir() and list_steps(path)]
    if not tags:
        raise UserError(
            f"no checkpoint in {checkpoints}; train that stage first (bash runs/speedrun.sh does all)"
        )

    def preference(path: Path) -> tuple:
        depth = re.match(r"d(\d+)", path.name)
        exact = re.fullmatch(r"d\d+", path.name) is not None
        return (int(depth[1]) if depth else -1, exact, path.stat().st_mtime, path.name)

    return max(tags, key=preference).name


def locate(
    stage: str, model_tag: str | None = None, step: int | None = None, contents: bool = True
) -> tuple[Path, int]:
    """Folder and step of a checkpoint of a stage, for its model. Raises UserError if there is none or it is damaged.

    contents as in check_files.
    """
    checkpoints = stage_dir(stage)
    directory = model_dir(stage, model_tag or find_model_tag(checkpoints))
    if not list_steps(directory):
        have = sorted(path.name for path in checkpoints.glob("*") if list_steps(path))
        raise UserError(f"no {stage} checkpoint {directory}; there are: {', '.join(have) or 'none'}")
    if step is None:
        step = newest_good_step(directory, contents, to_resume=False)
        if step is None:
            raise UserError(f"every checkpoint in {directory} is damaged; train that stage again")
        return directory, step
    if step not in list_steps(directory):
        raise UserError(f"no step {step} in {directory}; there are: {list_steps(directory)}")
    if problem := check_files(directory, step, contents, to_resume=False):
        raise UserError(f"checkpoint cannot be used: {problem}")
    return directory, step


def latest_stage() -> str:
    """The last stage that has a checkpoint."""
    for stage in reversed(STAGES):
        if any(list_steps(path) for path in stage_dir(stage).glob("*")):
            return stage
    raise UserError(f"no checkpoint below {get_base_dir()}; train a model first: bash runs/speedrun.sh")


def models_with(vocabulary: Vocabulary) -> list[str]:
    """Stage and tag of the models in the base folder whose own copy of the tokenizer has this vocabulary."""
    from nanochat.tokenizer import Vocabulary

    found = []
    for stage in STAGES:
        for path in sorted(stage_dir(stage).glob("*")):
            with suppress(UserError):  # a damaged copy is found by whoever loads the model
                if list_steps(path) and Vocabulary.load(path / "tokenizer").sha256 == vocabulary.sha256:
                    found.append(f"{stage} {path.name}")
    return found


# --- reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint is and what its meta file says; tensors are read on demand."""

    directory: Path
    step: int
    meta: dict

    @classmethod
    def open(cls, directory: Path, step: int) -> Checkpoint:
        return cls(directory, step, read_json(directory / f"meta_{step:06d}.json"))

    @property
    def weights_sha256(self) -> str:
        """Of the file of its weights, as recorded."""
        return self.meta["files"][f"model_{self.step:06d}.pt"]["sha256"]

    def config(self) -> GPTConfig:
        try:
            return read_config(self.meta["model_config"])
        except UserError as error:
            raise UserError(f"{self.directory} step {self.step}: {error}") from None

    def model_state(self, device: torch.device | str, mapped: bool = False) -> dict[str, torch.Tensor]:
        """The weights; `mapped` as in load_tensors."""
        return load_tensors(self.directory / f"model_{self.step:06d}.pt", device, mapped)

    def optimizer_state(self) -> dict | None:
        """On the CPU; None if this checkpoint was saved without."""
        name = f"optim_{self.step:06d}.pt"
        return load_tensors(self.directory / name, "cpu") if (self.directory / name).exists() else None

    def tokenizer(self) -> RustBPETokenizer:
        """The one in its folder, else that of the base folder. Raises UserError if it was trained with another."""
        from nanochat.tokenizer import get_tokenizer

        own = self.directory / "tokenizer"
        folder = own if own.exists() else get_base_dir() / "tokenizer"
        tokenizer = get_tokenizer(folder)
        if tokenizer.get_vocab_size() != self.config().vocab_size:
            raise UserError(
                f"the tokenizer in {folder} has {tokenizer.get_vocab_size():,} tokens, the model in {self.directory}"
                f" was trained with {self.config().vocab_size:,}"
            )
        if not self.was_trained_with(tokenizer):
            raise UserError(
                f"the tokenizer in {folder} is not the one that the model in {self.directory} was trained with: its"
                f" vocabulary is another; put the right one into {own} (other stages of its run have copies)"
            )
        return tokenizer

    def was_trained_with(self, tokenizer: RustBPETokenizer) -> bool:
        """Whether its metadata names this vocabulary. True where it names none, as before November 2026."""
        return self.meta.get("tokenizer_sha256", tokenizer.vocabulary.sha256) == tokenizer.vocabulary.sha256

    def model(
        self,
        device: torch.device,
        dtype: torch.dtype | None = None,
        min_sequence_len: int = 1,
        mapped: bool = False,
    ) -> GPT:
        """The network with its weights, fp32 masters, computing in `dtype` (default by hardware).

        min_sequence_len: tokens that it will be trained on; a shorter context, and its windows, grow to that.
        mapped: on a CPU the weights are those of the file, read where they are first used, and not to be trained.
        """
        config = self.config()
        if min_sequence_len > config.sequence_len:
            print0(f"the context grows from {config.sequence_len:,} to {min_sequence_len:,} tokens")
            config = replace(config, sequence_len=min_sequence_len)
        model = GPT.build(config, device, dtype or compute_dtype(device)[0])
        try:
            mapped = mapped and torch.device(device).type == "cpu"
            model.load_state_dict(self.model_state(device, mapped), assign=mapped)
        except RuntimeError as error:
            raise UserError(
                f"weights in {self.directory} do not fit their own configuration: {error}"
            ) from None
        return model


def load_tensors(path: Path, device: torch.device | str, mapped: bool = False) -> Any:
    """What torch.save wrote. The restricted reader builds tensors and plain containers and calls nothing else.

    mapped: leave the tensors in the file until they are used, where its format (zip, ours until November 2026
    was another) allows that.
    """
    try:
        mapped = mapped and zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # torch raises many kinds for a broken file, with advice to read it without restriction
        raise UserError(f"cannot read {path}: it is damaged, or holds more than tensors") from None


def load_model(
    source: str,
    device: torch.device,
    phase: str,
    model_tag: str | None = None,
    step: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[GPT, RustBPETokenizer, dict]:
    """(model, tokenizer, meta) of a stage's checkpoint; phase is "train" or "eval", dtype what it computes in.

    For "eval" the matrices are stored in the compute dtype once instead of being cast in every forward pass, the
    file is mapped, and its size alone is checked: the first answer should not wait for a hash of all weights.
    """
    evaluating = phase == "eval"
    directory, step = locate(source, model_tag, step, contents=not evaluating)
    checkpoint = Checkpoint.open(directory, step)
    model = checkpoint.model(device, dtype, mapped=evaluating)
    if evaluating:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(model.compute_dtype)
        model.eval().requires_grad_(False)
    return model, checkpoint.tokenizer(), checkpoint.meta
