"""The evaluation bundle of CORE: where it is, its tasks and their examples.

core.yaml               the tasks
eval_meta_data.csv      the accuracy of guessing, by task
eval_data/<uri>.jsonl   the examples
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nanochat.common import UserError, data_root, data_source, get_base_dir
from nanochat.hub import download_file_with_lock

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
KINDS = ("multiple_choice", "schema", "language_modeling")

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CoreTask:
    """One entry of core.yaml. baseline is the accuracy of guessing, in [0, 1)."""

    label: str
    kind: str
    path: Path
    num_fewshot: int
    delimiter: str
    baseline: float


def bundle_dir() -> Path:
    """The evaluation bundle of the data source in use, downloaded and unpacked on first use (hub, 162 MB)."""
    folder = data_root() / "eval_bundle"
    if (folder / "core.yaml").is_file():
        return folder
    if data_source() != "hub":
        raise UserError(f"no evaluation bundle in {folder}; run: python -m nanochat.dataset")
    _fetch_bundle(folder)
    return folder


def _fetch_bundle(folder: Path) -> None:
    from filelock import FileLock

    base = get_base_dir()
    with FileLock(base / "eval_bundle.lock"):
        if (folder / "core.yaml").is_file():  # another process was first
            return
        archive = download_file_with_lock(BUNDLE_URL, base / "eval_bundle.zip")  # continued after a kill
        with TemporaryDirectory(dir=base, prefix=".eval_bundle.") as scratch:
            try:
                zipfile.ZipFile(archive).extractall(scratch)
            except zipfile.BadZipFile as error:
                raise UserError(f"{BUNDLE_URL} is not a zip archive: {error}") from None
            finally:
                archive.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(Path(scratch) / "eval_bundle", folder)


def load_tasks(bundle: Path) -> list[CoreTask]:
    """The tasks of core.yaml with their baselines from eval_meta_data.csv, in file order."""
    try:
        import yaml
    except ImportError:
        raise UserError("CORE needs the package pyyaml; run: uv sync") from None
    try:
        entries = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
        return [_task(bundle, entry, baselines) for entry in entries]
    except (OSError, KeyError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"the evaluation bundle in {bundle} is damaged: {error!r}") from None


def _task(bundle: Path, entry: Item, baselines: dict[str, float]) -> CoreTask:
    if entry["icl_task_type"] not in KINDS:
        raise ValueError(f"{entry['label']} is of the unknown kind {entry['icl_task_type']}")
    return CoreTask(
        entry["label"],
        entry["icl_task_type"],
        bundle / "eval_data" / entry["dataset_uri"],
        entry["num_fewshot"][0],
        entry.get("continuation_delimiter", " "),
        0.01 * baselines[entry["label"]],
    )


def load_items(task: CoreTask, max_items: int = -1) -> list[Item]:
    """The examples of a task in their shuffled order, the first max_items of them if that is positive."""
    try:
        lines = task.path.read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {task.path}: {error}") from None
    if not items:
        raise UserError(f"{task.path} holds no example")
    random.Random(1337).shuffle(items)
    return items[:max_items] if max_items > 0 else items
