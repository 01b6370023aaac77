"""Text that machines of this project have: documentation and sources, in several languages.

The Python installation and its packages give sources and documentation; the system's manual pages,
catalogues of messages, headers and scripts give prose in some thirty languages and code in a
dozen. What a machine lacks is left out, and `prepare.py` records how much there was of each kind.

A document's own hash decides whether it is held out (one in 25); modules of the standard library
are split as `sparselong.data.corpus` splits them, because the demo's questions come from there.
Paragraphs are then compared with all earlier ones, held-out documents first: one that was seen
before, or most of whose lines were, is removed. Therefore no held-out document shares a paragraph
with the training text, and licences, copied code and translated boilerplate occur once.

The order of documents depends on nothing but their content.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.proxy.readers import read_manual, read_messages, read_text
from sparselong.data import corpus

HELD_OUT_ONE_IN = 25
LEAST_CHARACTERS = 40
"""Shorter paragraphs, such as "Returns", may occur again."""
_FEWEST_CHARACTERS, _MOST_CHARACTERS = 400, 60_000
_PIECE_CHARACTERS = 12_000
_MOST_READ_BYTES = 2_000_000
_KNOWN_LINES = 0.6
"""A paragraph is removed if more than this share of its lines occurred before."""
_SHARE = Path("/usr/share")
_SITE, _LIBRARY = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))
_SKIPPED = {"__pycache__", "node_modules.bak", "package-lists", "licenses", "zoneinfo", "icons"}
LANGUAGES = {
    **{"bg": "Bulgarian", "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German"},
    **{"el": "Greek", "es": "Spanish", "fi": "Finnish", "fr": "French", "hr": "Croatian"},
    **{"hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean"},
    **{"nb": "Norwegian", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian"},
    **{"pt_BR": "Brazilian Portuguese", "ru": "Russian", "sk": "Slovak", "sv": "Swedish"},
    **{"tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh_CN": "Chinese"},
}
"""Languages of manual pages and messages that are read. Others are left out: their scripts take
three bytes a letter, for which a small vocabulary has hardly any tokens."""
_LANGUAGE = re.compile(r"^[a-z]{2,3}(_[A-Z]{2})?(@[a-z]+)?$")


class Source(NamedTuple):
    """Files of one kind.

    Attributes:
        kind: such as `python` or `manual`.
        roots: directories that are searched.
        endings: what file names end with.
        most_bytes: text that is kept, for each language.
        read: a file's text.
    """

    kind: str
    roots: tuple[Path, ...]
    endings: tuple[str, ...]
    most_bytes: int
    read: Callable[[Path], str] = read_text


class Document(NamedTuple):
    """A text, its kind, its language (or programming language) and where it belongs."""

    kind: str
    language: str
    held_out: bool
    text: str


SOURCES = (
    Source("python", (_SITE, _LIBRARY), (".py",), 44_000_000),
    Source("docs", (_SITE, _SHARE, Path("/usr/lib/node_modules")), (".md", ".rst"), 9_000_000),
    Source("docs", (_SHARE / "doc", _SHARE / "vim", _SITE), (".txt", "README.gz"), 8_000_000),
    Source("docs", (_SHARE / "doc",), ("changelog.gz", "NEWS.gz"), 4_000_000),
    Source("manual", (_SHARE / "man",), (".gz",), 14_000_000, read_manual),
    Source("messages", (_SHARE / "locale", _SITE), (".mo",), 1_600_000, read_messages),
    Source("code", (Path("/usr/include"),), (".h", ".hpp"), 5_000_000),
    Source("code", (_SHARE, _SITE, Path("/usr/lib/node_modules")), (".js",), 3_000_000),
    Source("code", (_SHARE, Path("/usr/lib")), (".pl", ".pm"), 4_000_000),
    Source("code", (_SHARE, Path("/usr/lib/ruby")), (".rb",), 2_000_000),
    Source("code", (_SHARE, _SITE, Path("/usr/lib")), (".sh", ".cmake", ".vim"), 4_000_000),
    Source("code", (_SITE,), (".cpp", ".cu", ".cuh", ".pyi"), 5_000_000),
)


def read_documents(sources: Iterable[Source] = SOURCES) -> list[Document]:
    """Return all documents without repetitions, held-out ones first, each part by its hash."""
    found: dict[bytes, Document] = {}
    for document in _read_library():
        found.setdefault(_digest(document.text), document)
    for source in sources:
        for path, language in _take(source):
            for text in _cut(source, _hide_marks(source.read(path)).strip("\n")):
                digest = _digest(text)
                if len(text) >= _FEWEST_CHARACTERS and digest not in found:
                    held_out = _is_held_out(path, digest)
                    found[digest] = Document(source.kind, language, held_out, text)
    ordered = sorted(found.items(), key=lambda item: (not item[1].held_out, item[0]))
    return list(remove_repetitions(document for _, document in ordered))


def _cut(source: Source, text: str) -> Iterator[str]:
    """Yield a file's documents: pieces of a catalogue, and the beginning of any other file."""
    if source.kind != "messages":
        yield text[:_MOST_CHARACTERS]
        return
    while text:
        end = text.find("\n\n", _PIECE_CHARACTERS)
        piece, text = (text, "") if end < 0 else (text[:end], text[end + 2 :])
        yield piece


def remove_repetitions(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield documents without the paragraphs that an earlier one has; short rests are left out."""
    paragraphs: set[int] = set()
    lines: set[int] = set()
    for document in documents:
        kept = []
        for paragraph in document.text.split("\n\n"):
            plain = " ".join(paragraph.split())
            if len(plain) < LEAST_CHARACTERS:
                kept.append(paragraph)
                continue
            own = {hash(line.strip()) for line in paragraph.split("\n") if len(line) > 20}
            known = sum(line in lines for line in own)
            if hash(plain) not in paragraphs and known <= _KNOWN_LINES * len(own):
                kept.append(paragraph)
            paragraphs.add(hash(plain))
            lines |= own
        text = "\n\n".join(kept)
        if len(text) >= _FEWEST_CHARACTERS:
            yield document._replace(text=text)


def list_paragraphs(text: str) -> list[str]:
    """Return a document's paragraphs that no other document has, with single spaces."""
    plain = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return [paragraph for paragraph in plain if len(paragraph) >= LEAST_CHARACTERS]


def list_files(source: Source) -> Iterator[tuple[Path, str]]:
    """Yield a source's files with their language, in the order of a hash of their paths."""
    found: dict[str, Path] = {}
    for root in source.roots:
        if not root.is_dir():
            continue
        for path in root.rglob("*"):
            relative = path.relative_to(root)
            is_nested = root == _LIBRARY and "site-packages" in relative.parts
            if path.name.endswith(source.endings) and not _SKIPPED & {*relative.parts}:
                if not is_nested and path.is_file() and not path.is_symlink():
                    found[f"{root.name}/{relative.as_posix()}"] = path
    for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield found[name], _language(source, name)


def _take(source: Source) -> Iterator[tuple[Path, str]]:
    """Yield a source's files until each language has as much as is kept."""
    taken: dict[str, int] = defaultdict(int)
    for path, language in list_files(source):
        size = path.stat().st_size
        is_wanted = source.kind in ("python", "code") or language in LANGUAGES or language == "en"
        if is_wanted and size <= _MOST_READ_BYTES and taken[language] < source.most_bytes:
            unpacked = 3 * size if path.suffix == ".gz" else size
            taken[language] += (
                unpacked if source.kind == "messages" else min(unpacked, _MOST_CHARACTERS)
            )
            yield path, language


def _language(source: Source, name: str) -> str:
    """Return the language of a file: from its directories, or a programming language's ending."""
    if source.kind in ("python", "code"):
        return name.rpartition(".")[2]
    if source.kind in ("manual", "messages"):
        for part in name.split("/")[1:-1]:
            if _LANGUAGE.match(part):
                return part
    return "en"


def _read_library() -> Iterator[Document]:
    """Yield the documentation of the standard library, split as for the demo."""
    for document in corpus.documents():
        if len(document.text) >= _FEWEST_CHARACTERS:
            held_out = document.split == "held_out"
            text = _hide_marks(document.text)[:_MOST_CHARACTERS]
            yield Document("reference", "en", held_out, text)


def _hide_marks(text: str) -> str:
    """Return a text in which no special token is written, as sources of tokenizers have them."""
    return text.replace("<|", "< |")


def _is_held_out(path: Path, digest: bytes) -> bool:
    if path.is_relative_to(_LIBRARY) and not path.is_relative_to(_SITE):
        return corpus.split_of(path.relative_to(_LIBRARY).as_posix()) == "held_out"
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def _digest(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).encode()).digest()
