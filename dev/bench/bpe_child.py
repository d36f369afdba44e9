"""One measurement of `dev.bench.bpe`, in a process and environment of its own; prints one JSON object.

python bpe_child.py '{"work": "train", "library": "rustbpe", "text": "...", ...}'
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import logging
import resource
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TypeVar

Ranks = list[tuple[bytes, int]]
Rows = Iterable[list[int]]
Result = TypeVar("Result")
SHORT_TEXT = "The quick brown fox doesn't jump over 12 lazy dogs."


def documents(path: str) -> Iterator[str]:
    """Documents of a file in which NUL separates them, without holding more than a few."""
    rest = b""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            *whole, rest = (rest + block).split(b"\0")
            for document in whole:
                yield document.decode()
    yield rest.decode()


def train(job: dict) -> dict:
    """Seconds and peak memory (bytes) of a training that streams the text; writes the ranks."""
    learn = {"ours": train_ours, "rustbpe": train_rustbpe, "tokenizers": train_huggingface}[job["library"]]
    start, cpu_start = time.perf_counter(), time.process_time()
    ranks = learn(documents(job["text"]), job)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks]
    with open(job["ranks"], "wb") as file:
        file.writelines(lines)
    digest = hashlib.sha256(b"".join(lines)).hexdigest() if lines else ""
    memory = peak_memory()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "memory_bytes": memory, "digest": digest}


def peak_memory() -> int:
    """Peak resident bytes of this program; getrusage would include the process that started it."""
    if sys.platform.startswith("linux"):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def train_ours(texts: Iterator[str], job: dict) -> Ranks:
    return train_rustbpe(texts, job, num_threads=job["threads"])


def train_rustbpe(texts: Iterator[str], job: dict, **threads: int) -> Ranks:
    """Trains a rustbpe; that of PyPI learns its number of threads from the environment."""
    import rustbpe

    logging.getLogger("rustbpe").setLevel(logging.WARNING)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, job["vocab_size"], pattern=job["pattern"], **threads)
    return [(bytes(token), rank) for token, rank in tokenizer.get_mergeable_ranks()]


def train_huggingface(texts: Iterator[str], job: dict) -> Ranks:
    """Trains without keeping ranks: ties are broken differently, so they are not comparable."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(job["pattern"]), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=job["vocab_size"], min_frequency=0, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return []


def ranks_of(path: str) -> dict[bytes, int]:
    with open(path, "rb") as file:
        return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file)}


def encode(job: dict) -> dict:
    """Seconds for all documents in batches, seconds per call for a short text, digest of all ids."""
    make = tiktoken_encoder if job["library"] == "tiktoken" else our_encoder
    in_batches, one_text, rows_of = make(ranks_of(job["ranks"]), job["pattern"])
    texts, threads = list(documents(job["text"])), job["threads"]
    cpu_start = time.process_time()
    seconds, encoded = timed(lambda: in_batches(texts, num_threads=threads))
    cpu_seconds = time.process_time() - cpu_start
    # The first call is the one that counts; these two are equally warm.
    one_thread = timed(lambda: in_batches(texts, num_threads=1))[0]
    again = timed(lambda: in_batches(texts, num_threads=threads))[0]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "one_thread_seconds": one_thread,
        "again_seconds": again,
        "short_seconds": seconds_per_call(one_text, SHORT_TEXT),
        "digest": digest(rows_of(encoded)),
    }


def our_encoder(ranks: dict[bytes, int], pattern: str) -> tuple[Callable, Callable, Callable]:
    """Functions for a batch, for one text, and to get rows of ids out of an encoded batch."""
    import numpy  # noqa: F401  # the first array would import it, which is no part of encoding

    import rustbpe

    tokenizer = rustbpe.Tokenizer.from_ranks(ranks.items(), pattern)
    return tokenizer.encode_batch_arrays, tokenizer.encode_ordinary, rows_of_arrays


def rows_of_arrays(arrays: tuple) -> Iterator[list[int]]:
    ids, offsets = arrays
    for start, stop in pairwise(offsets.tolist()):
        yield ids[start:stop].tolist()


def tiktoken_encoder(ranks: dict[bytes, int], pattern: str) -> tuple[Callable, Callable, Callable]:
    """The same with tiktoken, which gives the rows at once."""
    import tiktoken

    encoding = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary_batch, encoding.encode_ordinary, lambda rows: rows


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def seconds_per_call(function: Callable[[str], object], text: str, calls: int = 20_000) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function(text)
    return (time.perf_counter() - start) / calls


def digest(rows: Rows) -> str:
    """Of all ids and of how many each document has."""
    total = hashlib.sha256()
    for row in rows:
        total.update(array("I", [len(row), *row]).tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    result = {"train": train, "encode": encode}[job["work"]](job)
    package = {"ours": "rustbpe"}.get(job["library"], job["library"])
    print(json.dumps(result | {"version": importlib.metadata.version(package)}))
