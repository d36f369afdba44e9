"""Talk to a model in the terminal.

python -m scripts.chat_cli                          a conversation; /help lists the commands
python -m scripts.chat_cli -p "What is 27 + 58?"    one answer on stdout, everything else on stderr
echo "Tell me a story" | python -m scripts.chat_cli
python -m scripts.chat_cli --url http://127.0.0.1:8000   the same with the model of a running server
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from nanochat.common import UserError, autodetect_device_type, check_device, read_json, write_json
from nanochat.configurator import option, run
from nanochat.dialogue import Display, printable
from nanochat.options import STAGES, WhichWeights

if TYPE_CHECKING:
    from nanochat.dialogue import Dialogue, Reply

HELP = """\
/clear               forget the conversation          /retry   answer the last question again
/undo                take back the last exchange      /system TEXT   instructions; /system off: none
/temperature X, /topk N, /topp X, /maxtokens N, /seed N   show or set; /topk 0 and /topp 1 are off,
                     /maxtokens 0 is to the end of the context, /seed 0 another seed each time
/save FILE, /load FILE   the conversation as JSON     /tokens  how much of the context is used
/stats               speed of each answer on or off   /quit    leave (so do quit, exit, Ctrl-D)
End a line with \\ to continue it, or write \"\"\" before and after several lines. Ctrl-C stops an answer."""

COMMANDS = (
    "clear", "help", "load", "maxtokens", "new", "quit", "retry", "save", "seed", "stats", "system",
    "temperature", "tokens", "topk", "topp", "undo",
)  # fmt: skip


@dataclass(frozen=True)
class Config(WhichWeights):
    source: str | None = option(
        None, "stage of the checkpoint; default: the last there is", short="i",
        choices=(*STAGES, None),
    )  # fmt: skip
    prompt: str = option("", "answer this, print the answer on stdout, and exit", short="p")
    temperature: float = option(0.6, "0 is greedy", short="t", least=0)
    top_k: int = option(50, "sample among this many tokens; 0 = all", short="k", least=0)
    max_tokens: int = option(512, "longest answer; 0 = to the end of the context", short="m", least=0)
    top_p: float = option(1.0, "sample among the likeliest tokens of this total probability; 1 = all")
    seed: int | None = option(None, "makes answers repeatable; default: random")
    system: str = option("", "instructions put before the first message")
    color: bool = option(True, "tool calls in grey, on a terminal")
    stop: str = option("", "end the answer before this text")
    python_tool: str = option(
        "calculator", "what <|python_start|> calls", choices=("calculator", "sandbox", "off")
    )
    raw: bool = option(False, "show special tokens as text")
    json: bool = option(False, "with a prompt: one JSON object instead of text")
    stats: bool = option(False, "speed and context use after each answer, on stderr")
    markdown: bool = option(True, "on a terminal, show Markdown formatted while it is written")
    history: str = option("", "file that keeps the lines you typed; default: they are forgotten at the end")
    url: str = option("", "ask the server there instead of loading a model, such as http://127.0.0.1:8000")
    api_key: str = option("", "key for --url (or NANOCHAT_API_KEYS)")
    speculate: int = option(
        0, "tokens to guess ahead from the conversation; faster where answers repeat it", least=0
    )


@dataclass
class Screen(Display):
    """Where the answer and the tool calls are written."""

    text: IO[str]
    tools: IO[str]
    color: bool

    def begin(self) -> None:
        """Before an answer of a conversation."""
        print("Assistant: ", end="", file=self.text, flush=True)

    def end(self) -> None:
        """After it."""
        self.flush()
        print("\n", file=self.text, flush=True)

    def write_text(self, text: str) -> None:
        shown = printable(text) if self.text.isatty() else text
        print(shown, end="", file=self.text, flush=True)

    def write_tool(self, text: str) -> None:
        self.text.flush()
        print(f"\x1b[2m{text}\x1b[0m" if self.color else text, end="", file=self.tools, flush=True)


# --- the terminal ------------------------------------------------------------------------------------


@dataclass
class Terminal:
    """The interactive loop: read a line, obey a command or answer."""

    chat: Dialogue
    read: Callable[[str], str]
    screen: Display
    stats: bool = False

    def loop(self) -> None:
        """Until quit, end of input, or Ctrl-C twice at the prompt."""
        interrupted = False
        while True:
            try:
                line = self._read_message().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                self._say("Ctrl-C again or /quit leaves")
                continue
            interrupted = False
            if line.lower() in ("quit", "exit") or line.lower().split()[:1] in (["/quit"], ["/exit"]):
                return
            try:
                self._obey(line)
            except UserError as error:
                self._say(f"error: {error}")
            except KeyboardInterrupt:  # before the answer began
                self._say("stopped")

    def _read_message(self) -> str:
        line = self.read("User: ")
        if line.startswith('"""'):
            lines = [line[3:]]
            while not lines[-1].rstrip().endswith('"""'):
                lines.append(self.read("...   "))
            return "\n".join(lines).rstrip().removesuffix('"""')
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self.read("...   "))
        return "\n".join(lines)

    def _obey(self, line: str) -> None:
        if line.lower() in ("clear", "/clear", "/new"):
            self.chat.messages.clear()
            self._say("a new conversation")
        elif line.startswith("//"):
            self._answer(line[1:])
        elif line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            self._command(name.lower(), argument.strip())
        elif line:
            self._answer(line)

    def _answer(self, question: str) -> None:
        self.screen.begin()
        try:
            reply = self.chat.answer(question, self.screen.show, self._say)
        finally:
            self.screen.end()
        if self.stats:
            self._say(reply.summary(self.chat.context))

    def _command(self, name: str, argument: str) -> None:
        chat = self.chat
        number = {"temperature": float, "topk": int, "topp": float, "maxtokens": int, "seed": int}
        if name in number:
            self._set(name, argument, number[name])
        elif name in ("retry", "undo"):
            question = chat.undo()
            if question is None:
                self._say("there is nothing to take back")
            elif name == "retry":
                self._answer(question)
            else:
                self._say(f"taken back: {question}")
        elif name == "system":
            if argument:
                chat.system = "" if argument.lower() == "off" else argument
            self._say(f"system: {chat.system or '(none)'}")
        elif name == "save":
            write_json(_file(argument), {"system": chat.system, "messages": chat.messages})
            self._say(f"saved {len(chat.messages)} messages to {argument}")
        elif name == "load":
            chat.system, chat.messages = _read_conversation(_file(argument))
            self._say(f"loaded {len(chat.messages)} messages from {argument}")
        elif name == "tokens":
            self._say(f"{chat.used_tokens()} of {chat.context} tokens")
        elif name == "stats":
            self.stats = not self.stats
            self._say(f"stats are {'on' if self.stats else 'off'}")
        else:
            self._say(HELP if name == "help" else f"/{name} is not a command; /help lists them, // sends a /")

    def _set(self, name: str, argument: str, kind: type) -> None:
        attribute = {"topk": "top_k", "topp": "top_p", "maxtokens": "max_tokens"}.get(name, name)
        if argument:
            try:
                value = kind(argument)
            except ValueError:
                number = "a whole number" if kind is int else "a number"
                raise UserError(f"/{name} needs {number}, not {argument!r}") from None
            _check_settings(**{attribute: value})
            setattr(self.chat, attribute, (value or None) if name == "seed" else value)
        self._say(f"{name}: {getattr(self.chat, attribute)}")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _read_conversation(path: str) -> tuple[str, list[dict]]:
    from nanochat.conversation import checked_messages

    stored = read_json(path)
    try:
        system, messages = stored.get("system") or "", list(stored["messages"])
        if not isinstance(system, str):
            raise ValueError("its system is not text")
        if messages:
            checked_messages({"messages": messages})
    except ValueError as error:
        raise UserError(f"{path} is not a saved conversation: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a saved conversation: /save writes it in another form") from None
    return system, messages


def _file(argument: str) -> str:
    if not argument:
        raise UserError("a file name is missing")
    return os.path.expanduser(argument)


def _check_settings(
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, max_tokens: int = 0, seed: int | None = None
) -> None:
    wrong = {
        f"temperature {temperature} must be at least 0": not 0 <= temperature < float("inf"),
        f"top-k {top_k} must be at least 0": top_k < 0,
        f"top-p {top_p} must be above 0 and at most 1, which is off": not 0 < top_p <= 1,
        f"max-tokens {max_tokens} must be at least 0": max_tokens < 0,
    }
    for text, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(text)


def _reader(history: str) -> Callable[[str], str]:
    """Line input with editing, history and Tab where there is a terminal and the library, else input()."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        if history:
            _check_history(history)
        try:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.completion import WordCompleter
            from prompt_toolkit.history import FileHistory, InMemoryHistory
        except ImportError:
            return input
        commands = WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
        past = FileHistory(history) if history else InMemoryHistory()
        return PromptSession(history=past, completer=commands, complete_while_typing=False).prompt
    return input


def _check_history(path: str) -> None:
    try:
        open(path, "ab").close()  # as every line that is typed will be added
    except OSError as error:
        raise UserError(f"--history={path}: {error.strerror}; name a file in a folder that exists") from None


# --- one answer --------------------------------------------------------------------------------------


def answer_once(chat: Dialogue, question: str, screen: Screen, as_json: bool, stats: bool) -> int:
    """Answer one question: text on the screen or one JSON object on stdout. Returns the exit status."""

    def notice(text: str) -> None:
        print(text, file=sys.stderr)

    reply = chat.answer(question, (lambda kind, text: None) if as_json else screen.show, notice)
    screen.flush()
    if as_json:
        print(json.dumps(_as_json(reply, chat), ensure_ascii=False))
    else:
        print(file=screen.text, flush=True)
    if stats:
        notice(reply.summary(chat.context))
    return 130 if reply.finish_reason == "cancelled" else 0


def _as_json(reply: Reply, chat: Dialogue) -> dict:
    return {
        "response": reply.text,
        "finish_reason": reply.finish_reason,
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        },
        "parts": reply.parts,
        "timings": {
            "ttft_ms": round(1000 * reply.first_token_s, 1),
            "tokens_per_second": round(reply.tokens_per_second, 1),
        },
        "seed": chat.last_seed,
    }


def _connect(cfg: Config) -> Dialogue:
    from nanochat.remote_chat import RemoteChat

    given = {
        "source": cfg.source,
        "model_tag": cfg.model_tag,
        "step": cfg.step,
        "device_type": cfg.device_type,
        "raw": cfg.raw,
        "python_tool": cfg.python_tool != "calculator",
        "quantize": cfg.quantize != "none",
        "speculate": cfg.speculate,
    }
    for name, value in given.items():
        if value:
            raise UserError(f"--url asks the server as it is: leave out --{name.replace('_', '-')}")
    key = cfg.api_key or os.environ.get("NANOCHAT_API_KEYS", "").partition(",")[0].strip()
    chat = RemoteChat(cfg.url, key, **_settings(cfg))
    print(f"model: {chat.config['model']} step {chat.config['step']} at {chat.url}", file=sys.stderr)
    return chat


def _settings(cfg: Config) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "max_tokens", "seed", "stop", "system", "raw")
    return {name: getattr(cfg, name) for name in names}


def _load(cfg: Config) -> Dialogue:
    from nanochat.chat import Chat
    from nanochat.checkpoint_manager import latest_stage, load_model, locate
    from nanochat.engine import Engine
    from nanochat.python_tool import tools_of

    source = cfg.source or latest_stage()
    device = check_device(cfg.device_type or autodetect_device_type())
    directory, step = locate(source, cfg.model_tag, cfg.step, contents=False)
    model, tokenizer, _ = load_model(source, device, "eval", directory.name, step)
    print(f"model: {source} {directory.name} step {step} on {device}", file=sys.stderr)
    if cfg.quantize != "none":
        from nanochat.quantize import quantize

        print(quantize(model, cfg.quantize, tokenizer), file=sys.stderr)
    engine = Engine(model, tokenizer, tools_of(cfg.python_tool), speculate=cfg.speculate)
    return Chat(engine, tokenizer, **_settings(cfg))


def main(cfg: Config) -> None:
    """Talk to a model: a conversation in the terminal, or one answer with --prompt or piped input."""
    _check_settings(cfg.temperature, cfg.top_k, cfg.top_p, cfg.max_tokens)
    question = cfg.prompt
    if not question and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise UserError("nothing to answer: standard input is empty; give -p TEXT or type in a terminal")
    if cfg.json and not question:
        raise UserError("--json needs a prompt: -p TEXT or piped input")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not end the answer
    read = input if question else _reader(cfg.history)
    chat = _connect(cfg) if cfg.url else _load(cfg)
    color = cfg.color and "NO_COLOR" not in os.environ
    if question:
        screen = Screen(sys.stdout, sys.stderr, color and sys.stderr.isatty())
        sys.exit(answer_once(chat, question, screen, cfg.json, cfg.stats))
    print("nanochat: /help lists the commands, /quit leaves, Ctrl-C stops an answer", file=sys.stderr)
    color = color and sys.stdout.isatty()
    Terminal(chat, read, _display(cfg, color), cfg.stats).loop()


def _display(cfg: Config, color: bool) -> Display:
    """Formatted while it is written where that is possible and wanted, else as it comes."""
    if cfg.markdown and color and not cfg.raw and os.environ.get("TERM") != "dumb":
        from nanochat.live_markdown import LiveMarkdown

        return LiveMarkdown(sys.stdout)
    return Screen(sys.stdout, sys.stdout, color)


if __name__ == "__main__":
    run(Config, main)
