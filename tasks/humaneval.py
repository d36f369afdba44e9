"""HumanEval: complete a Python function so that its tests pass. [Chen 2021, arXiv 2107.03374]"""

from __future__ import annotations

import re

from nanochat.conversation import Conversation
from nanochat.execution import execute_code
from nanochat.hub import load_hub_dataset
from tasks.common import Task

_FENCED = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


class HumanEval(Task):
    """openai/openai_humaneval, 164 problems. Completions run in the sandbox."""

    def __init__(self, *, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        super().__init__(start, stop, step)
        self.rows = load_hub_dataset("openai/openai_humaneval", "openai_humaneval", "test").shuffle(seed=42)

    @property
    def eval_type(self) -> str:
        return "generative"

    def num_examples(self) -> int:
        """Number of problems."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """A function's head and docstring; the answer is the whole function."""
        row = self.rows[index]
        prompt = row["prompt"]
        return {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": f"{prompt}\n{row['canonical_solution']}"},
            ],
            "entry_point": row["entry_point"],
            "test": row["test"],
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the function in the completion passes the tests."""
        imports = extract_imports(conversation["messages"][0]["content"])
        tests = f"{conversation['test']}\ncheck({conversation['entry_point']})"
        return execute_code(f"{imports}\n\n{extract_program(completion)}\n\n{tests}").success


def extract_imports(prompt: str) -> str:
    """The import lines at the head of a prompt; comments and empty lines among them are passed over."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def extract_program(completion: str) -> str:
    """The first fenced block (untagged or tagged python) of a completion, else all of it; stripped."""
    fenced = _FENCED.search(completion)
    return (fenced.group(1) if fenced else completion).strip()
