"""Training and encoding speed against the peers: `python -m dev.bench.bpe`.

Every measurement runs in a fresh process; the peers (PyPI's rustbpe 0.1.0, tokenizers, tiktoken) live in
virtual environments of their own, made on first use. The libraries take turns within each repeat, and
the table shows medians and ratios; processor time is there for machines that are busy with other things.
Training streams the text from a file, so its peak memory is that of the trainer. The merges must equal
rustbpe 0.1.0's and the ids of every document tiktoken's, or the run fails. Less than 100 MB of text only
counts as a try, which must be asked for with --megabytes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from nanochat.common import UserError, get_base_dir, print0, whole_file
from nanochat.configurator import as_dict, option, run
from nanochat.tokenizer import SPLIT_PATTERN

CHILD = Path(__file__).with_name("bpe_child.py")
SHARED_TEXT = Path(__file__).parents[3] / "shared" / "data" / "text"
PEERS = {"rustbpe 0.1.0": "rustbpe==0.1.0", "tokenizers": "tokenizers", "tiktoken": "tiktoken"}
FALLBACK_BYTES = 120_000_000
ENOUGH_BYTES = 100_000_000


@dataclass(frozen=True)
class Config:
    repeats: int = option(3, "measurements of each library; the median counts")
    threads: int = option(0, "threads of every library; 0 = one per core")
    vocab_size: int = option(32_768, "number of tokens to learn, the 256 bytes included")
    megabytes: int = option(0, "use at most this much text; 0 = all, which must be 100 MB")


def main(cfg: Config) -> None:
    """Compare training and encoding with rustbpe 0.1.0, tokenizers and tiktoken."""
    folder = get_base_dir() / "bench_bpe"
    folder.mkdir(parents=True, exist_ok=True)
    threads = cfg.threads or len(os.sched_getaffinity(0))
    text, source = folder / "text.bin", write_text(folder / "text.bin", cfg.megabytes)
    num_bytes = text.stat().st_size
    enough = num_bytes >= ENOUGH_BYTES
    if not enough and not cfg.megabytes:
        raise UserError(
            f"{num_bytes / 1e6:.0f} MB of {source} are too little; 100 MB count, --megabytes tries"
        )
    print0(
        f"{num_bytes / 1e6:.0f} MB of {source}, {threads} threads, {platform.processor() or platform.machine()}"
    )
    pythons = {"ours": sys.executable} | {name: environment(folder, name) for name in PEERS}
    job = {"text": str(text), "pattern": SPLIT_PATTERN, "vocab_size": cfg.vocab_size, "threads": threads}
    trained = measure(pythons, ["ours", "rustbpe 0.1.0", "tokenizers"], job | {"work": "train"}, cfg, folder)
    encoded = measure(pythons, ["ours", "tiktoken"], job | {"work": "encode"}, cfg, folder)
    check_equal(trained, "rustbpe 0.1.0", "merges")
    check_equal(encoded, "tiktoken", "ids")
    versions = {name: rows[0]["version"] for name, rows in (trained | encoded).items()}
    result = as_dict(cfg) | {
        "bytes": num_bytes, "source": source, "enough_text": enough, "threads": threads,
        "versions": versions, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(json.dumps(result | report(trained, encoded, num_bytes)))


def write_text(path: Path, megabytes: int) -> str:
    """Write the documents of the benchmark, NUL between them; returns what they are."""
    limit = megabytes * 1_000_000 or (1 << 62)
    shared = sorted(SHARED_TEXT.glob("*.parquet"))
    texts = parquet_texts(shared) if shared else fallback_texts()
    size = 0
    with whole_file(path) as file:
        for text in texts:
            data = text.replace("\0", "").encode()
            if size + len(data) > limit:
                break
            size += file.write(data if size == 0 else b"\0" + data)
    return "shared pretraining text" if shared else "TinyWorld and Python's standard library"


def parquet_texts(paths: list[Path]) -> Iterator[str]:
    import pyarrow.parquet as pq

    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column("text").to_pylist()


def fallback_texts() -> Iterator[str]:
    """The standard library's sources, then TinyWorld up to 120 MB."""
    from nanochat.tinyworld.documents import build_authors, documents

    size = 0
    for text in chain(standard_library(), documents(build_authors(seed=0))):
        size += len(text)
        yield text
        if size > FALLBACK_BYTES:
            return


def standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.relative_to(root).parts:
            yield path.read_text(encoding="utf-8", errors="ignore")


def environment(folder: Path, name: str) -> str:
    """Python of a virtual environment that holds one peer, made on first use."""
    directory = folder / f"env-{name.replace(' ', '-')}"
    python = directory / "bin" / "python"
    if not (directory / "complete").exists():
        shutil.rmtree(directory, ignore_errors=True)
        uv = shutil.which("uv")
        call([uv, "venv", "-q", str(directory)] if uv else [sys.executable, "-m", "venv", str(directory)])
        pip = (
            [uv, "pip", "install", "-q", "--python", str(python)]
            if uv
            else [str(python), "-m", "pip", "install", "-q"]
        )
        call([*pip, PEERS[name]])
        (directory / "complete").touch()
    return str(python)


def call(command: list[str], **environ: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environ)
    if done.returncode:
        raise UserError(f"{' '.join(command[:4])} ... failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def measure(
    pythons: dict[str, str], names: list[str], job: dict, cfg: Config, folder: Path
) -> dict[str, list[dict]]:
    """Results of every repeat by library; the libraries take turns."""
    results: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(cfg.repeats):
        for name in names:
            # Everyone encodes with the ranks that ours has learned.
            learner = name if job["work"] == "train" else "ours"
            ranks = folder / f"ranks-{learner.replace(' ', '-')}"
            details = {"library": name.split()[0], "ranks": str(ranks)}
            environ = {"RAYON_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "true"}
            output = call([pythons[name], str(CHILD), json.dumps(job | details)], **environ)
            results[name].append(json.loads(output.splitlines()[-1]))
            print0(f"  {job['work']:6}  {name:14} {results[name][-1]['seconds']:8.2f} s")
    return results


def check_equal(results: dict[str, list[dict]], peer: str, what: str) -> None:
    digests = {row["digest"] for name in ("ours", peer) for row in results[name]}
    if len(digests) != 1:
        raise UserError(f"the {what} differ from those of {peer}")


def report(trained: dict[str, list[dict]], encoded: dict[str, list[dict]], num_bytes: int) -> dict:
    """Print the table; returns its numbers."""
    rows = [
        ("train_seconds", "training, s", trained, "seconds", 1.0),
        ("train_cpu_seconds", "training, CPU s", trained, "cpu_seconds", 1.0),
        ("train_memory_mb", "training, peak MB", trained, "memory_bytes", 1e-6),
        ("encode_seconds", "batch encoding, s", encoded, "seconds", 1.0),
        ("encode_cpu_seconds", "batch encoding, CPU s", encoded, "cpu_seconds", 1.0),
        ("encode_one_thread_seconds", "again, one thread, s", encoded, "one_thread_seconds", 1.0),
        ("encode_again_seconds", "again, all threads, s", encoded, "again_seconds", 1.0),
        ("encode_short_us", "short text, us", encoded, "short_seconds", 1e6),
    ]
    table = {}
    for key, title, results, field, scale in rows:
        medians = {
            name: statistics.median(row[field] for row in runs) * scale for name, runs in results.items()
        }
        ratios = {name: value / medians["ours"] for name, value in medians.items() if name != "ours"}
        table[key] = {"median": medians, "ratio": ratios}
        peers = "   ".join(f"{name} {medians[name]:.2f} ({ratio:.1f}x)" for name, ratio in ratios.items())
        print(f"{title:22} ours {medians['ours']:8.2f}   {peers}")
    seconds = table["encode_seconds"]["median"]["ours"]
    one, many = (table[f"encode_{which}_seconds"]["median"]["ours"] for which in ("one_thread", "again"))
    print(
        f"{'batch encoding':22} ours {num_bytes / 1e6 / seconds:8.0f} MB/s, {one / many:.2f}x one thread; "
        "merges and ids equal to the peers'"
    )
    return table


if __name__ == "__main__":
    run(Config, main)
