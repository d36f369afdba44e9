"""How much of everything TinyWorld writes. All proportions and counts are here and nowhere else."""

from __future__ import annotations

FORMAT_VERSION = 2
DEFAULT_CHARS = 9_000_000
SMALLEST_CHARS = 10_000

# Share of the characters of the pretraining text by kind of document.
Mixture = tuple[tuple[str, float], ...]
MIXTURE: Mixture = (
    ("quizzes", 0.30), ("lookups", 0.02), ("bridges", 0.02), ("questions", 0.14), ("encyclopaedia", 0.12),
    ("dialogues", 0.03), ("plays", 0.02), ("letters", 0.02), ("stories", 0.06), ("riddles", 0.02),
    ("sums", 0.09), ("spelling", 0.09), ("programs", 0.07),
)  # fmt: skip
# The beginning of the text, which teaches multiple choice in steps: part of the whole, and shares within it.
CURRICULUM: tuple[tuple[float, Mixture], ...] = (
    (0.22, (("lookups", 0.50), ("questions", 0.25), ("encyclopaedia", 0.05), ("sums", 0.06), ("spelling", 0.05),
            ("programs", 0.04), ("stories", 0.05))),
    (0.22, (("lookups", 0.06), ("bridges", 0.40), ("questions", 0.22), ("encyclopaedia", 0.06), ("sums", 0.08),
            ("spelling", 0.07), ("programs", 0.05), ("stories", 0.06))),
)  # fmt: skip

SHARD_CHARS = 6_000_000
ROW_GROUP_DOCUMENTS = 1024
ZSTD_LEVEL = 3
# One document in this many belongs to the validation shard.
VALIDATION_EVERY = 50
SMALLEST_VALIDATION_DOCUMENTS = 16

ARC_EASY = {"train": 4000, "validation": 200, "test": 300}
ARC_CHALLENGE = {"train": 2000, "validation": 100, "test": 200}
MMLU = {"auxiliary_train": 6000, "validation": 200, "dev": 50, "test": 400}
GSM8K = {"train": 6000, "test": 300}
GSM8K_PLAIN_SHARE = 0.2  # bare sums among the training problems; the test has word problems only
HUMANEVAL = {"test": 100}
SMOLTALK = {"train": 8000, "test": 300}
SMOLTALK_TEST_EVERY = 20
IDENTITY_CONVERSATIONS = 600
TRAIN_WORDS = 4000
TEST_WORDS = 1000
CORE_EXAMPLES = 200
