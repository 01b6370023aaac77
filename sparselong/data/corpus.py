"""Text from the machine itself: the documentation of the Python standard library.

The demo's small gpt-oss needs text that exists on every machine without a download and is regular
enough to be learned in a minute. The docstrings of the standard library and the language reference
in `pydoc_data.topics` meet both needs: about two megabytes of English about Python. Each module
becomes one document, with each docstring under its name and signature. Each topic is one more.
Hand-wrapped paragraphs are joined into one line, because their line breaks carry no meaning and
multiple-choice items have none.

A hash of the document's path decides whether it is for training or held out (about one in eight).
The split is thus the same for everyone with the same Python and does not change when a module is
added.

Left out: test suites, idlelib, code page tables, packages that only some Pythons have, generated
and vendored files, and raw source code. `demo.py` makes the demo's chat rows and multiple-choice
items from these documents.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from sparselong.errors import StageError

Split = Literal["train", "held_out"]

_HELD_OUT_ONE_IN = 8
_LEAST_TRAINING_BYTES = 500_000
_EXCLUDED_FOLDERS = {
    *("__pycache__", "site-packages", "dist-packages", "lib-dynload", "ensurepip", "pydoc_data"),
    *("test", "tests", "idlelib", "idle_test", "turtledemo", "encodings"),
    *("distutils", "lib2to3", "tkinter"),  # not in every Python
}
_GENERATED_FILES = re.compile(r"_sysconfigdata.*|_pyrepl.*|entities\.py|pydoc_topics\.py")
# Lines that start with one of these are layout, not prose: lists, doctests, rules, tables.
_LAYOUT_LINE = re.compile(r"\s|>>>|\.\.\.|[-*=~#|+@]|\w+\)|\(?\d+[.)]|[\w.]+ *(--|::=)|:\w+")
_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    """One documented name: a module, class, function or method, or a topic of the reference.

    Attributes:
        kind: "module", "class", "function", "method" or "topic".
        name: the full dotted name, such as `shutil.copyfile`, or a topic's keyword.
        signature: the parameters in parentheses, or an empty string.
        paragraphs: the documentation, with each prose paragraph on one line.
    """

    kind: str
    name: str
    signature: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A module or topic: its path (stable, with forward slashes), split and entries."""

    path: str
    split: Split
    entries: tuple[Entry, ...]

    @property
    def text(self) -> str:
        """The document as text: each entry's name and signature, then its paragraphs."""
        parts = []
        for entry in self.entries:
            heading = f"{entry.name}{entry.signature}"
            if entry.kind in ("module", "topic"):
                heading = f"# {entry.kind} {entry.name}"
            parts.append("\n".join([heading, *entry.paragraphs]))
        return "\n\n".join(parts) + "\n"


def texts(split: Split) -> list[str]:
    """Return the documents of one split as text, sorted by path."""
    return [document.text for document in documents() if document.split == split]


@lru_cache(maxsize=1)
def documents() -> tuple[Document, ...]:
    """Return all documents of both splits, sorted by path; read once per process.

    Raises:
        StageError: this Python's standard library has too little documentation.
    """
    found = sorted([*_read_modules(), *_read_topics()], key=lambda document: document.path)
    size_bytes = sum(len(document.text) for document in found if document.split == "train")
    if size_bytes < _LEAST_TRAINING_BYTES:
        raise StageError(
            "the text for the small model could not be collected",
            f"at least {_LEAST_TRAINING_BYTES:,} bytes of docstrings under {_library_root()}",
            f"{size_bytes:,} bytes (a Python stripped of sources or docstrings)",
            "use a Python that includes its standard library's .py files, such as uv's",
        )
    return tuple(found)


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is running text: one line of at least six words."""
    return "\n" not in paragraph and paragraph.count(" ") >= 5 and not _LAYOUT_LINE.match(paragraph)


def split_of(path: str) -> Split:
    """Return the split of a document, which depends only on a hash of its path."""
    digest = hashlib.sha256(path.encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0 else "train"


def _library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _read_modules() -> Iterator[Document]:
    root = _library_root()
    for file in root.rglob("*.py"):
        path = file.relative_to(root)
        if (
            _EXCLUDED_FOLDERS.intersection(path.parts)
            or path.parts[0].startswith("config-")
            or _GENERATED_FILES.fullmatch(path.name)
        ):
            continue
        parts = path.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        entries = tuple(_read_entries(ast.parse(file.read_bytes()), module, "module"))
        if entries:
            yield Document(path.as_posix(), split_of(path.as_posix()), entries)


def _read_entries(node: _Definition, name: str, kind: str) -> Iterator[Entry]:
    """Yield the entry of a definition, if documented, then those of nested definitions."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield Entry(kind, name, _signature(node), _paragraphs(docstring))
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield from _read_entries(child, f"{name}.{child.name}", "class")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                child_kind = "method" if isinstance(node, ast.ClassDef) else "function"
                yield from _read_entries(child, f"{name}.{child.name}", child_kind)


def _signature(node: _Definition) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"({ast.unparse(node.args)})"
    if isinstance(node, ast.ClassDef) and node.bases:
        return f"({', '.join(ast.unparse(base) for base in node.bases)})"
    return ""


def _read_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for keyword, text in topics.items():
        path = f"topics/{keyword}"
        entry = Entry("topic", keyword, "", _paragraphs(text))
        yield Document(path, split_of(path), (entry,))


def _paragraphs(text: str) -> tuple[str, ...]:
    """Split at blank lines and join each hand-wrapped prose paragraph into one line."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = [line.rstrip() for line in block.expandtabs().splitlines() if line.strip()]
        if not lines:
            continue
        if any(_LAYOUT_LINE.match(line) for line in lines):
            paragraphs.append("\n".join(lines))
        else:
            paragraphs.append(" ".join(" ".join(lines).split()))
    return tuple(paragraphs)
