"""MMLU: multiple-choice questions on 57 subjects. [Hendrycks 2020, arXiv 2009.03300]"""

from __future__ import annotations

from nanochat.conversation import Conversation
from nanochat.hub import load_hub_dataset
from tasks.common import MultipleChoice

_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security
    conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts
    high_school_biology high_school_chemistry high_school_computer_science high_school_european_history
    high_school_geography high_school_government_and_politics high_school_macroeconomics
    high_school_mathematics high_school_microeconomics high_school_physics high_school_psychology
    high_school_statistics high_school_us_history high_school_world_history human_aging human_sexuality
    international_law jurisprudence logical_fallacies machine_learning management marketing medical_genetics
    miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
    professional_law professional_medicine professional_psychology public_relations security_studies sociology
    us_foreign_policy virology world_religions
"""


class MMLU(MultipleChoice):
    """cais/mmlu, subset all: split auxiliary_train (for training), dev, validation or test.

    The older call MMLU("auxiliary_train", "train") names the training rows too.
    """

    letters = ("A", "B", "C", "D")
    groups = tuple(_SUBJECTS.split())

    def __init__(
        self, subset: str, split: str, *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        super().__init__(start, stop, step)
        if (subset, split) == ("auxiliary_train", "train"):
            subset, split = "all", "auxiliary_train"
        assert subset == "all", f"MMLU has no subset {subset!r}"
        assert split in ("auxiliary_train", "validation", "dev", "test"), f"MMLU has no split {split!r}"
        self.rows = load_hub_dataset("cais/mmlu", subset, split).shuffle(seed=42)

    def num_examples(self) -> int:
        """Number of questions."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """A question with its subject."""
        row = self.rows[index]
        choices = row["choices"]
        assert len(choices) == 4, f"row {index}: {len(choices)} choices instead of four"
        conversation = self.conversation(row["question"], self.letters, choices, self.letters[row["answer"]])
        return {**conversation, "subject": row["subject"]}
