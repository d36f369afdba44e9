"""How much of everything TinyWorld writes. All proportions and counts are here and nowhere else."""

from __future__ import annotations

FORMAT_VERSION = 2
DEFAULT_CHARS = 6_000_000
SMALLEST_CHARS = 10_000

# Share of the characters of the pretraining text by kind of document.
MIXTURE = (
    ("quick questions", 0.34), ("questions", 0.05), ("encyclopaedia", 0.08), ("lookups", 0.10), ("quizzes", 0.04),
    ("dialogues", 0.02), ("plays", 0.01), ("letters", 0.01), ("stories", 0.04), ("riddles", 0.01),
    ("sums", 0.10), ("spelling", 0.12), ("programs", 0.08),
)  # fmt: skip
# The beginning of the text, which is nothing but practice in finding a letter behind a choice: part of the whole.
LOOKUP_LESSON = 0.20

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
