"""ARC: grade-school science questions, in an easy and a hard set. [Clark 2018, arXiv 1803.05457]"""

from __future__ import annotations

from nanochat.conversation import Conversation
from nanochat.hub import load_hub_dataset
from tasks.common import MultipleChoice


class ARC(MultipleChoice):
    """allenai/ai2_arc: subset ARC-Easy or ARC-Challenge; split train, validation or test."""

    def __init__(
        self, subset: str, split: str, *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        super().__init__(start, stop, step)
        assert subset in ("ARC-Easy", "ARC-Challenge"), f"ARC has no subset {subset!r}"
        assert split in ("train", "validation", "test"), f"ARC has no split {split!r}"
        self.rows = load_hub_dataset("allenai/ai2_arc", subset, split).shuffle(seed=42)

    def num_examples(self) -> int:
        """Number of questions."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """A question; its letters are the row's labels: A to D, also 1 to 4, and three or five of them."""
        row = self.rows[index]
        letters, answer = row["choices"]["label"], row["answerKey"]
        assert answer in letters, f"row {row['id']}: answer {answer!r} is not one of {letters}"
        return self.conversation(row["question"], letters, row["choices"]["text"], answer)
