"""One measurement of `dev.bench.bpe`, in a process and environment of its own; prints one JSON object.

python bpe_child.py '{"work": "train", "library": "rustbpe", "text": "...", ...}'
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import resource
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
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
    learn = train_huggingface if job["library"] == "tokenizers" else train_rustbpe
    start, cpu_start = time.perf_counter(), time.process_time()
    ranks = learn(documents(job["text"]), job["vocab_size"])
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


def train_rustbpe(texts: Iterator[str], vocab_size: int) -> list[tuple[bytes, int]]:
    import rustbpe

    logging.getLogger("rustbpe").setLevel(logging.WARNING)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, pattern=PATTERN)
    return [(bytes(token), rank) for token, rank in tokenizer.get_mergeable_ranks()]


def train_huggingface(texts: Iterator[str], vocab_size: int) -> list[tuple[bytes, int]]:
    """Trains without keeping ranks: ties are broken differently, so they are not comparable."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=0, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return []


def ranks_of(path: str) -> dict[bytes, int]:
    with open(path, "rb") as file:
        return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file)}


def encode(job: dict) -> dict:
    """Seconds for all documents in batches, seconds per call for a short text, digest of all ids."""
    if job["library"] == "tiktoken":
        return encode_tiktoken(job)
    import rustbpe

    tokenizer = rustbpe.Tokenizer.from_ranks(ranks_of(job["ranks"]).items(), PATTERN)
    texts = list(documents(job["text"]))
    cpu_start = time.process_time()
    seconds, (ids, _) = timed(lambda: tokenizer.encode_batch_arrays(texts, num_threads=job["threads"]))
    cpu_seconds = time.process_time() - cpu_start
    one_thread = timed(lambda: tokenizer.encode_batch_arrays(texts, num_threads=1))[0]
    short = seconds_per_call(tokenizer.encode_ordinary, SHORT_TEXT)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "one_thread_seconds": one_thread,
        "short_seconds": short,
        "digest": digest([ids.tolist()]),
    }


def encode_tiktoken(job: dict) -> dict:
    import tiktoken

    ranks = ranks_of(job["ranks"])
    encoding = tiktoken.Encoding("bench", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    texts = list(documents(job["text"]))
    cpu_start = time.process_time()
    seconds, rows = timed(lambda: encoding.encode_ordinary_batch(texts, num_threads=job["threads"]))
    cpu_seconds = time.process_time() - cpu_start
    one_thread = timed(lambda: encoding.encode_ordinary_batch(texts, num_threads=1))[0]
    short = seconds_per_call(encoding.encode_ordinary, SHORT_TEXT)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "one_thread_seconds": one_thread,
        "short_seconds": short,
        "digest": digest(rows),
    }


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def seconds_per_call(function, text: str, calls: int = 20_000) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function(text)
    return (time.perf_counter() - start) / calls


def digest(rows: Iterable[list[int]]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(array("I", row).tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps({"train": train, "encode": encode}[job["work"]](job)))
