"""Shows an answer in a terminal while it is generated: markdown by blocks, thinking dimmed.

A block (a paragraph, a list, a table, a code block) is redrawn as it grows, and printed for good
when the next one begins, so that long answers scroll as any output does and a resized window only
affects the last block. Text of the model is never read as rich's own markup. Where the output is no
terminal, text is written as it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from markdown_it import MarkdownIt
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from sparselong.data import Delta

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
_CONTROL = {n: f"\\x{n:02x}" for n in (*range(9), *range(11, 32), *range(127, 160))}
"""Control characters but tab and newline: a terminal would obey them."""
_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable(["reference", "image"])
)
"""What rich reads, but for HTML, link definitions and images, which it would not show as text."""


def printable(text: str) -> str:
    """Return a text with control characters shown as escapes."""
    return text.translate(_CONTROL)


def split_blocks(text: str) -> tuple[list[str], str]:
    """Return markdown's finished blocks, and the one that may still grow.

    Blocks end at blank lines outside of code fences.
    """
    blocks: list[str] = []
    lines: list[str] = []
    fence: str | None = None
    *whole, last = text.split("\n")
    for line in whole:
        found = _FENCE.match(line)
        if found and fence is None:
            fence = found[1]
        elif found and fence and found[1].startswith(fence) and not line.strip(" `~"):
            fence = None
        if line.strip() or fence:
            lines.append(line)
        elif lines:
            blocks.append("\n".join(lines))
            lines = []
    return blocks, "\n".join([*lines, last])


class Display:
    """Where answers are shown.

    Args:
        console: the terminal.
        show_thinking: whether the analysis channel is shown.
    """

    def __init__(self, console: Console, show_thinking: bool):
        self.console, self.show_thinking = console, show_thinking

    def show(self, deltas: Iterable[Delta]) -> None:
        """Show an answer as it comes."""
        for channel, texts in _by_channel(deltas):
            if channel == "analysis" and not self.show_thinking:
                self._wait(texts)
            elif not self.console.is_terminal:
                self._write(texts)
            else:
                self._draw(channel, texts)

    def _wait(self, texts: Iterator[str]) -> None:
        if not self.console.is_terminal:
            for _ in texts:
                pass
            return
        with self.console.status("thinking"):
            for _ in texts:
                pass

    def _write(self, texts: Iterator[str]) -> None:
        for text in texts:
            self.console.file.write(printable(text))
            self.console.file.flush()
        self.console.file.write("\n")
        self.console.file.flush()

    def _draw(self, channel: str, texts: Iterator[str]) -> None:
        rest = ""
        with self._growing() as live:
            for text in texts:
                blocks, rest = split_blocks(rest + printable(text))
                for block in blocks:
                    live.update(Text(""))
                    live.console.print(_render(channel, block))
                live.update(_render(channel, rest))
            live.update(Text(""))
        if rest.strip():
            self.console.print(_render(channel, rest))

    @contextmanager
    def _growing(self) -> Iterator[Live]:
        live = Live(
            console=self.console,
            transient=True,
            refresh_per_second=12,
            vertical_overflow="ellipsis",
        )
        with live:
            yield live


def _render(channel: str, block: str) -> RenderableType:
    if channel == "analysis":
        return Text(block, style="dim italic")
    if channel == "commentary":
        return Text(block, style="cyan")
    shown = Markdown("", hyperlinks=False)
    shown.parsed = _MARKDOWN.parse(block)
    return shown


def _by_channel(deltas: Iterable[Delta]) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield each run of pieces of one channel and recipient as a name and an iterator of texts."""
    source = iter(deltas)
    held: list[Delta] = [first] if (first := next(source, None)) is not None else []

    def texts(kind: tuple[str, str | None]) -> Iterator[str]:
        while held:
            delta = held.pop()
            if (delta.channel, delta.recipient) != kind:
                held.append(delta)
                return
            yield delta.text
            following = next(source, None)
            if following is not None:
                held.append(following)

    while held:
        kind = (held[0].channel, held[0].recipient)
        yield kind[0], texts(kind)


def make_console() -> Console:
    """Return the console of stdout, with what its encoding cannot show written as escapes."""
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
