"""SmolTalk: general conversations for finetuning. [Allal 2025, arXiv 2502.02737]"""

from __future__ import annotations

from nanochat.conversation import Conversation
from nanochat.hub import load_hub_dataset
from tasks.common import Task, check_dialogue


class SmolTalk(Task):
    """HuggingFaceTB/smol-smoltalk: split train or test. For training only."""

    def __init__(self, split: str, *, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        super().__init__(start, stop, step)
        assert split in ("train", "test"), f"SmolTalk has no split {split!r}"
        self.rows = load_hub_dataset("HuggingFaceTB/smol-smoltalk", "default", split).shuffle(seed=42)

    def num_examples(self) -> int:
        """Number of conversations."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """A conversation as it is in the data, system message included. RowError if it is malformed."""
        messages = self.rows[index]["messages"]
        check_dialogue(messages, f"SmolTalk conversation {index}")
        return {"messages": messages}
