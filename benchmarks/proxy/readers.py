"""Text of the files of a machine: plain text, manual pages, and catalogues of messages.

Manual pages are rendered plainly: headings and paragraphs remain, fonts and tables go. A compiled
catalogue of messages (`.mo`) gives the translations, one a line, and with them pairs of the English
sentence and its translation.
"""

from __future__ import annotations

import gettext
import gzip
import re
from pathlib import Path

_ESCAPE = re.compile(r"\\f\[[^]]*\]|\\f\(..|\\f.|\\s[-+]?\d+|\\[&|^/,:%]|\\m\[[^]]*\]")
_NAMED = re.compile(r"\\\((..)|\\\[([^]]+)\]")
_CHARACTERS = {
    **{"bu": "*", "em": "-", "en": "-", "hy": "-", "mi": "-", "aq": "'", "dq": '"', "lq": '"'},
    **{"rq": '"', "oq": "'", "cq": "'", "ti": "~", "ha": "^", "rs": "\\", "co": "(c)", "tm": "TM"},
}
_BREAKS = {"PP", "P", "LP", "TP", "IP", "HP", "TQ", "Pp", "It", "sp", "RS", "RE", "nf", "fi", "br"}
_INLINE = {"B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "SB"}
_CONTEXT = "\4"
"""gettext's separator of a message's context and the message."""


def read_text(path: Path) -> str:
    """Return a plain text file's content; empty if it is not UTF-8."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8").replace("\r\n", "\n").replace("\0", "")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, OSError):
        return ""


def read_manual(path: Path) -> str:
    """Return a manual page as paragraphs separated by empty lines; empty if it is a link."""
    text = read_text(path)
    if text.startswith((".so ", "'\\\" t\n.so ")):
        return ""
    blocks: list[str] = []
    words: list[str] = []

    def end_paragraph() -> None:
        if words:
            blocks.append(" ".join(" ".join(words).split()))
            words.clear()

    for line in text.split("\n"):
        if line.startswith((".", "'")):
            name, _, rest = line[1:].strip().partition(" ")
            if name in ("SH", "SS", "Sh", "Ss"):
                end_paragraph()
                blocks.append(_clean(rest).upper())
            elif name in _BREAKS:
                end_paragraph()
            elif name in _INLINE:
                words.append(_clean(rest).replace(" ", "") if len(name) == 2 else _clean(rest))
        elif not line.strip():
            end_paragraph()
        else:
            words.append(_clean(line))
    end_paragraph()
    return "\n\n".join(block for block in blocks if block)


def _clean(line: str) -> str:
    line = _ESCAPE.sub("", line.replace('"', "").replace("\\-", "-").replace("\\ ", " "))
    line = _NAMED.sub(lambda found: _CHARACTERS.get(found[1] or found[2], ""), line)
    return line.replace("\\e", "\\").replace("\\(", "(").replace("\\'", "'").replace("\\`", "`")


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Return (English, translation) of a compiled catalogue's messages, in its order.

    Translations shorter than 16 characters, and those that equal the English text, are left out.
    """
    try:
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)
    except (OSError, UnicodeDecodeError, ValueError, IndexError, LookupError, SyntaxError):
        return []  # GNUTranslations evaluates a formula of the file's header
    found = []
    for key, text in vars(catalogue)["_catalog"].items():
        english = key[0] if isinstance(key, tuple) else key
        english = english.rpartition(_CONTEXT)[2]
        if english and isinstance(text, str) and len(text) >= 16 and text != english:
            found.append((english, text))
    return found


def read_messages(path: Path) -> str:
    """Return the translations of a compiled catalogue, separated by empty lines."""
    return "\n\n".join(translation for _, translation in read_pairs(path))
