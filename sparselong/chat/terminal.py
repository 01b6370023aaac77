"""A conversation in a terminal: lines are messages, and those that begin with / are commands.

Ctrl-C stops an answer and keeps its text so far; while typing it clears the line. Ctrl-D or /exit
ends the program. A line that ends with a backslash continues on the next line. A line of three
quotation marks starts a message of several lines, and another one ends it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from sparselong.chat import conversation as files
from sparselong.chat.answer import Answer
from sparselong.chat.conversation import Conversation
from sparselong.chat.engine import Engine
from sparselong.chat.settings import EFFORTS, Settings
from sparselong.chat.stream import Display, printable
from sparselong.errors import ExpectedError

QUOTES = '"""'
PROMPT, CONTINUED = "> ", ". "
HISTORY = "history"
COMMANDS: dict[str, tuple[str, str]] = {
    "/help": ("", "these commands"),
    "/clear": ("", "begin a new conversation; the system message stays"),
    "/retry": ("", "generate the last answer again"),
    "/save": ("NAME", "keep the conversation in the run directory"),
    "/load": ("NAME", "go on with a kept conversation; without NAME, list them"),
    "/system": ("TEXT", "set the system message; without TEXT, show it; - removes it"),
    "/reasoning": ("low|medium|high", "set the effort; without it, show or hide thinking"),
    "/settings": ("NAME=VALUE ...", "set, or show: temperature, top_p, top_k, seed, ..."),
    "/stats": ("", "tokens and seconds of the last answer"),
    "/exit": ("", "end"),
}


class Terminal:
    """A conversation in a terminal.

    Args:
        engine: what answers.
        settings: how, to begin with.
        folder: where conversations and the history of lines are kept.
        console: the terminal.
        show_thinking: whether the analysis channel is shown, to begin with.
        system: the system message; None: the template's own.
        read_line: shows a prompt and returns a line; raises EOFError at the end of input.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        folder: Path,
        console: Console,
        *,
        show_thinking: bool = False,
        system: str | None = None,
        read_line: Callable[[str], str] = input,
    ):
        self.engine, self.settings, self.folder = engine, settings, folder
        self.console, self.display = console, Display(console, show_thinking)
        self.conversation = Conversation(model=engine.name)
        self.answer: Answer | None = None
        self._read_line = read_line
        self._answering = self._cancelled = False
        if system:
            self._set_system(system)

    def run(self) -> None:
        """Read messages and commands until the end."""
        self._say(f"{self.engine.name}, {self.engine.most_tokens:,} tokens. /help lists commands.")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._interrupts(), _history(self.folder / HISTORY):
            while True:
                try:
                    text = self._read()
                except EOFError:
                    self._say("")
                    return
                except KeyboardInterrupt as signalled:
                    if signalled.args:  # another signal than Ctrl-C, which ends the program
                        raise
                    self._say("\n(/exit or Ctrl-D ends)")
                    continue
                if not _is_text(text):
                    self._say("that is no text in this terminal's encoding; nothing was sent")
                elif text.startswith("/") and "\n" not in text:
                    if self._command(text):
                        return
                elif text.strip():
                    self.conversation.messages.append({"role": "user", "content": text})
                    if not self._reply():
                        self.conversation.messages.pop()

    def _read(self) -> str:
        line = self._read_line(PROMPT)
        if line.strip() == QUOTES:
            lines = []
            while (line := self._read_line(CONTINUED)).strip() != QUOTES:
                lines.append(line)
            return "\n".join(lines)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read_line(CONTINUED))
        return "\n".join(lines)

    def _reply(self) -> bool:
        """Answer the conversation; return whether that was possible."""
        messages = self.conversation.messages
        self._answering, self._cancelled = True, False
        try:
            reply = self.engine.reply(messages, self.settings, is_cancelled=lambda: self._cancelled)
            self.display.show(reply)
        except ExpectedError as error:
            if self.engine.broken is not None:
                raise
            self._say(str(error))
            return False
        finally:
            self._answering = False
        self.answer = reply.answer
        messages.append(self.answer.message())
        self.conversation.settings = self.settings.document()
        if self.answer.reason == "cancelled":
            self._say("(stopped)")
        elif self.answer.is_silent:
            self._say("(no answer; /reasoning shows what the model thought, if it did)")
        for fault in self.answer.faults(self.settings.max_new_tokens, self.engine.most_tokens):
            self._say(f"({fault})")
        return True

    def _command(self, text: str) -> bool:
        """Carry out a command; return whether the program ends."""
        name, _, argument = text.partition(" ")
        if name == "/exit":
            return True
        action: Callable[[str], None] | None = {
            "/help": self._help,
            "/clear": self._clear,
            "/retry": self._retry,
            "/save": self._save,
            "/load": self._load,
            "/system": self._system,
            "/reasoning": self._reasoning,
            "/settings": self._change,
            "/stats": self._stats,
        }.get(name)
        if action is None:
            self._say(f"{name} is no command; /help lists them")
            return False
        try:
            action(argument.strip())
        except (ExpectedError, OSError) as error:
            self._say(str(error))
        return False

    def _help(self, _: str) -> None:
        for name, (argument, text) in COMMANDS.items():
            self._say(f"{f'{name} {argument}'.strip():28} {text}")
        self._say("A line that ends with \\ continues on the next one.")
        self._say('A line of """ starts a message of several lines, and another one ends it.')
        self._say("Ctrl-C stops an answer, Ctrl-D ends.")

    def _clear(self, _: str) -> None:
        kept = [m for m in self.conversation.messages if m["role"] in ("system", "developer")]
        self.conversation = Conversation(kept, self.engine.name)
        self.answer = None
        self._say("a new conversation")

    def _retry(self, _: str) -> None:
        messages = self.conversation.messages
        if not messages or messages[-1]["role"] != "assistant":
            self._say("there is no answer yet")
            return
        last = messages.pop()
        if not self._reply():
            messages.append(last)

    def _save(self, name: str) -> None:
        self._say(f"saved to {files.save(self.conversation, self.folder / files.FOLDER, name)}")

    def _load(self, name: str) -> None:
        folder = self.folder / files.FOLDER
        if not name:
            names = sorted(path.stem for path in folder.glob("*.json"))
            self._say("\n".join(names) or f"no conversation in {folder}")
            return
        self.conversation = files.load(files.path_of(folder, name))
        self.answer = None
        for message in self.conversation.messages:
            self._say(f"{message['role']}: {message.get('content') or ''}")

    def _system(self, text: str) -> None:
        if text:
            self._set_system("" if text == "-" else text)
        first = next((m for m in self.conversation.messages if m["role"] == "system"), None)
        self._say(first["content"] if first else "no system message but the template's own")

    def _set_system(self, text: str) -> None:
        rest = [m for m in self.conversation.messages if m["role"] != "system"]
        added = [{"role": "system", "content": text}] if text else []
        self.conversation.messages = [*added, *rest]

    def _reasoning(self, effort: str) -> None:
        if effort:
            self.settings = self.settings.changed({"reasoning": effort})
        else:
            self.display.show_thinking = not self.display.show_thinking
        shown = "shown" if self.display.show_thinking else "hidden"
        self._say(f"reasoning {self.settings.reasoning} of {', '.join(EFFORTS)}; thinking {shown}")

    def _change(self, text: str) -> None:
        pairs = [word.partition("=") for word in text.split()]
        self.settings = self.settings.changed({key: value for key, _, value in pairs})
        self._say("\n".join(f"{key}={value}" for key, value in self.settings.document().items()))

    def _stats(self, _: str) -> None:
        if self.answer is None:
            self._say("there is no answer yet")
            return
        for name, value in self.answer.usage.document().items():
            self._say(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value:,}")
        self._say(f"seed: {self.answer.seed}")

    def _say(self, text: str) -> None:
        self.console.print(printable(text), style="dim", soft_wrap=True)

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Let Ctrl-C stop an answer; elsewhere it raises KeyboardInterrupt."""

        def interrupt(*_: Any) -> None:
            if not self._answering:
                raise KeyboardInterrupt
            self._cancelled = True

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


@contextmanager
def _history(path: Path) -> Iterator[None]:
    """Keep lines of the terminal in a file, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    if path.exists():
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        readline.write_history_file(path)


def _is_text(line: str) -> bool:
    """Return whether all bytes of a line could be decoded."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True
