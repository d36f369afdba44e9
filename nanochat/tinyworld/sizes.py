"""How much of everything TinyWorld writes. All proportions and counts are here and nowhere else."""

from __future__ import annotations

FORMAT_VERSION = 3
DEFAULT_CHARS = 6_000_000
SMALLEST_CHARS = 10_000

# Share of the characters of the pretraining text by kind of document.
MIXTURE = (
    ("quick questions", 0.40), ("questions", 0.06), ("encyclopaedia", 0.09),
    ("dialogues", 0.02), ("plays", 0.01), ("letters", 0.01), ("stories", 0.06), ("riddles", 0.01),
    ("sums", 0.12), ("spelling", 0.13), ("programs", 0.09),
)  # fmt: skip

SHARD_CHARS = 6_000_000
ROW_GROUP_DOCUMENTS = 1024
ZSTD_LEVEL = 3
# One document in this many belongs to the validation shard.
VALIDATION_EVERY = 50
SMALLEST_VALIDATION_DOCUMENTS = 16

ARC_EASY = {"train": 1200, "validation": 200, "test": 300}
ARC_CHALLENGE = {"train": 800, "validation": 100, "test": 200}
MMLU = {"auxiliary_train": 2500, "validation": 200, "dev": 50, "test": 400}
GSM8K = {"train": 6000, "test": 300}
GSM8K_PLAIN_SHARE = 0.2  # bare sums among the training problems; the test has word problems only
HUMANEVAL = {"test": 100}
SMOLTALK = {"train": 8000, "test": 300}
SMOLTALK_TEST_EVERY = 20
IDENTITY_CONVERSATIONS = 600
TRAIN_WORDS = 4000
TEST_WORDS = 1000
CORE_EXAMPLES = 200
# What leads to multiple choice: conversations of each lesson, and shares of their kinds.
_EXAM_KINDS = (("exam_words", 0.32), ("exam_letters", 0.28), ("fact_letters", 0.22), ("named_letters", 0.18))
LESSONS = {
    "answers": (1500, (("answers", 1.0),)),
    "letters": (12_000, (("named_letters", 0.7), ("fact_letters", 0.3))),
    "exams": (12_000, _EXAM_KINDS),
    "review": (4000, _EXAM_KINDS),  # among the conversations of mid-training
}
