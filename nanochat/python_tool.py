"""What <|python_start|> calls: the calculator, or Python in the sandbox.

The calculator understands what the training data calls it with. The sandbox is for experiments with models
that write programs: it answers the same expressions in the same way, and runs everything else.
"""

from __future__ import annotations

from collections.abc import Mapping

from nanochat.calculator import use_calculator
from nanochat.execution import execute_code
from nanochat.requests import SlowTool, Tool

TIMEOUT_S = 2.0
MEMORY_BYTES = 128 << 20
OUTPUT_BYTES = 1024
TOOLS = ("calculator", "sandbox", "off")

# Runs inside the sandbox: parsing can go wrong too.
_PROGRAM = """
def run(source):
    import ast
    tree = ast.parse(source, "<tool>")
    last = tree.body.pop().value if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<tool>", "exec"), globals())
    if last is not None:
        value = eval(compile(ast.Expression(last), "<tool>", "eval"), globals())
        if value is not None:
            print(value)
run({source!r})
"""


def run_python(source: str) -> str | None:
    """What a program prints and the value of its last expression, cut to 1 KiB; None if it fails or says nothing."""
    if (answer := use_calculator(source)) is not None:
        return answer
    program = _PROGRAM.format(source=source)
    result = execute_code(program, TIMEOUT_S, MEMORY_BYTES, max_output_bytes=OUTPUT_BYTES)
    return (result.stdout.strip() or None) if result.success else None


def tools_of(name: str) -> Mapping[str, Tool]:
    """The tools of an engine by the name of an option: calculator, sandbox or off."""
    tools: dict[str, Mapping[str, Tool]] = {
        "calculator": {"python": use_calculator},
        "sandbox": {"python": SlowTool(run_python)},
        "off": {},
    }
    return tools[name]
