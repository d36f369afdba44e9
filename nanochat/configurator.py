"""One dataclass per script is its command line, its log and its checkpoint record.

    @dataclass(frozen=True)
    class Config:
        depth: int = option(20, "layers; every other size follows from it")

    if __name__ == "__main__":
        run(Config, main)

Every field is a flag: --depth=20, --depth 20, dashes or underscores. A preset is a file of `name = value`
lines with plain values, given by position or as --config FILE. Later wins: defaults, presets in their
order, command line. Unknown names are errors.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import errno
import gc
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nanochat.common import UserError

ConfigT = TypeVar("ConfigT")
# What a disk, not this program, is to blame for.
_NO_ROOM = {errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}


def option(
    default: Any,
    help: str,
    *,
    short: str = "",
    choices: Sequence[Any] | None = None,
    none: str = "None",
    least: float | None = None,
    off: int | None = None,
    variable: str = "",
) -> Any:
    """A dataclass field that is also a flag. A field whose default is `...` must be given.

    none: the word for None on the command line and in presets, for a field that may be None. least: the smallest value;
    off: the one below it that stands for "no limit" or "not given". variable: of the environment; where it is set its
    text is the default.
    """
    metadata = {"help": help, "short": short, "choices": choices, "none": none, "least": least, "off": off}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    if variable:
        return dataclasses.field(
            default_factory=lambda: os.environ.get(variable) or default, metadata=metadata
        )
    return dataclasses.field(default=default, metadata=metadata)


def run(
    config_class: type[ConfigT],
    main: Callable[[ConfigT], object],
    argv: Sequence[str] | None = None,
    name: str = "",
) -> None:
    """Parse the command line and call main; errors end as ending_well says.

    name: what follows `python -m` in the help, where that is not the module of the config class.
    """
    look_for_garbage_rarely()
    with ending_well():
        main(parse(config_class, sys.argv[1:] if argv is None else argv, main.__doc__ or "", name))


@contextmanager
def ending_well() -> Iterator[None]:
    """What the user or the disk is to blame for becomes one line on stderr and exit status 2, Ctrl-C status 130.

    Where the reader of stdout, such as `head`, has enough of it, the process ends with status 141 and says nothing.
    """
    try:
        yield
        print(end="", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            sys.exit(141)  # 128 + SIGPIPE, as of programs that the signal ends
        if error.errno not in _NO_ROOM:
            raise
        print(f"error: {error.filename or 'cannot write'}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _stdout_is_closed() -> bool:
    """Whether nobody reads stdout any more, which an empty line tells; what is still to be written is then dropped."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def look_for_garbage_rarely() -> None:
    """Importing torch makes many objects that all stay: going through them costs 7 % of a start (LOG 2026-11-26)."""
    gc.set_threshold(50_000)


def parse(config_class: type[ConfigT], argv: Sequence[str], description: str = "", name: str = "") -> ConfigT:
    """Build a config from defaults, preset files and flags, in this order of precedence.

    Raises UserError for anything unknown, of the wrong type or missing.
    """
    options = _options(config_class)
    flags, presets = _split(
        _normalised(argv, options), options, _parser(config_class, description, options, name)
    )
    values: dict[str, Any] = {}
    for preset in presets:
        values |= _read_preset(Path(preset), options)
    values |= flags
    missing = [f"--{_dashed(name)}" for name, o in options.items() if o.required and name not in values]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given; --help lists all options")
    return config_class(**values)


def as_dict(config: Any) -> dict[str, Any]:
    """All settings of a config, for logs and checkpoints."""
    return dataclasses.asdict(config)


# --- the options of a config class -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Option:
    name: str
    kind: type
    optional: bool
    required: bool
    default: Any
    help: str
    short: str
    choices: Sequence[Any] | None
    none: str
    least: float | None
    off: int | None

    def convert(self, value: Any, where: str) -> Any:
        """Check a value from a flag (text) or a preset (already typed). Widens int to float, nothing else."""
        if value is None or (self.optional and value in ("None", self.none)):
            if self.optional:
                return None
            raise UserError(f"{where}: {self.name} must be {self.kind.__name__}, not None")
        try:
            converted = (
                _from_text(value, self.kind) if isinstance(value, str) else _from_literal(value, self.kind)
            )
        except (ValueError, OverflowError):  # 1e400 is infinite
            raise UserError(f"{where}: {self.name} must be {self.kind.__name__}, not {value!r}") from None
        if self.choices is not None and converted not in self.choices:
            raise UserError(
                f"{where}: {self.name} must be one of {', '.join(map(str, self.choices))}, not {value!r}"
            )
        if self.least is not None and converted != self.off and not converted >= self.least:
            unless = "" if self.off is None else f", or {self.off}"
            raise UserError(f"{where}: {self.name} must be at least {self.least:g}{unless}, not {value}")
        return converted


def _from_text(text: str, kind: type) -> Any:
    if kind is bool:
        lowered = text.lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise ValueError(text)
    if kind is int:
        # "5e6" and "524_288" are how people write token counts
        number = float(text) if not text.lstrip("+-").replace("_", "").isdigit() else int(text)
        if number != int(number):
            raise ValueError(text)
        return int(number)
    if kind is float and not math.isfinite(float(text)):
        raise ValueError(text)
    return kind(text)


def _from_literal(value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind is bool and type(value) is int and value in (0, 1):
        return bool(value)
    if type(value) is not kind:
        raise ValueError(value)
    return value


def _options(config_class: type) -> dict[str, _Option]:
    hints = typing.get_type_hints(config_class)
    result = {}
    for field in dataclasses.fields(config_class):
        kind, optional = hints[field.name], False
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind, optional = next(arg for arg in typing.get_args(kind) if arg is not type(None)), True
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        required = default is dataclasses.MISSING
        meta = field.metadata
        result[field.name] = _Option(
            field.name, kind, optional, required, None if required else default,
            meta.get("help", ""), meta.get("short", ""), meta.get("choices"), meta.get("none", "None"), meta.get("least"), meta.get("off"),
        )  # fmt: skip
    return result


# --- command line ------------------------------------------------------------------------------------


def _dashed(name: str) -> str:
    return name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _parser(
    config_class: type, description: str, options: dict[str, _Option], name: str
) -> argparse.ArgumentParser:
    module = sys.modules.get(config_class.__module__)
    spec = getattr(module, "__spec__", None)
    name = name or (spec.name if spec else config_class.__module__).removesuffix(".__main__")
    parser = _Parser(prog=f"python -m {name}", description=description, allow_abbrev=False)
    parser.add_argument(
        "presets", nargs="*", metavar="PRESET", help="files of `name = value` lines, applied in order"
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="the same, as a flag")
    for o in options.values():
        names = [f"--{_dashed(o.name)}"] + ([f"-{o.short}"] if o.short else [])
        shown = "required" if o.required else f"default: {o.none if o.default is None else o.default}"
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if o.kind is bool else {}
        metavar = "{" + ",".join(map(str, o.choices)) + "}" if o.choices else o.kind.__name__.upper()
        parser.add_argument(
            *names, dest=o.name, default=argparse.SUPPRESS, metavar=metavar,
            help=f"{o.help} ({shown})".replace("%", "%%"), **extra,
        )  # fmt: skip
    return parser


def _normalised(argv: Sequence[str], options: dict[str, _Option]) -> list[str]:
    """Turn --some_flag into --some-flag, --no-flag into --flag=false, and drop a lone `--` (torchrun's)."""
    bools = {f"--{_dashed(o)}" for o in options if options[o].kind is bool}
    result = []
    for argument in argv:
        if argument == "--":
            continue
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = _dashed(name)
            if name.startswith("--no-") and f"--{name[5:]}" in bools and not equals:
                name, equals, value = f"--{name[5:]}", "=", "false"
            if name in bools and not equals:
                equals, value = "=", "true"  # so that a bool flag never swallows the next argument
            argument = name + equals + value
        result.append(argument)
    return result


def _split(
    argv: list[str], options: dict[str, _Option], parser: argparse.ArgumentParser
) -> tuple[dict[str, Any], list[str]]:
    known, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        raise UserError(f"{name} is not an option{_nearest(name.lstrip('-'), options, '--')}")
    values = vars(known)
    words = values.pop("presets")
    if "prompt" in options and not all(map(os.path.exists, words)):
        flag = f"-{options['prompt'].short}" if options["prompt"].short else "--prompt"
        text = json.dumps(" ".join(words), ensure_ascii=False)
        raise UserError(f"{text} is no preset file; to have it answered: {flag} {text}")
    presets = [*words, *values.pop("config")]
    for preset in presets:
        if "=" in preset:
            raise UserError(f"{preset!r} is neither a preset file nor a flag; flags start with --")
    return {
        name: options[name].convert(value, f"--{_dashed(name)}") for name, value in values.items()
    }, presets


def _nearest(name: str, options: dict[str, _Option], prefix: str) -> str:
    close = difflib.get_close_matches(_dashed(name), [_dashed(o) for o in options], n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else "; --help lists all options"


# --- preset files ------------------------------------------------------------------------------------


def _read_preset(path: Path, options: dict[str, _Option]) -> dict[str, Any]:
    """Read `name = literal` lines. The file is parsed, never executed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read preset {path}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:  # ValueError: a file that is no text
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{path}:{line}: not a `name = value` line") from None
    values = {}
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            continue  # a docstring
        if not (
            isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        ):
            raise UserError(f"{where}: only `name = value` lines are allowed in a preset")
        name = node.targets[0].id
        if name not in options:
            raise UserError(f"{where}: {name} is not an option{_nearest(name, options, '')}")
        try:
            literal = ast.literal_eval(node.value)
        except (ValueError, TypeError):  # TypeError: {[1]: 2}
            raise UserError(
                f"{where}: the value of {name} must be a plain number, string, bool or None"
            ) from None
        values[name] = options[name].convert(literal, where)
    return values
