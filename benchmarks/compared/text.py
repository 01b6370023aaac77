"""What the benchmark reads: documents, multiple-choice items, and conversations to fine-tune on.

Documents are those of the proxy's corpus (`corpus.npz.xz`), or JSON lines of {"split": "train" or
"held_out"} with `text` or `input_ids`; without a file they are the documentation of Python's
standard library, on which the small model was trained.
Items are JSON lines in hellaswag's format; without a file they are made from the same held-out
documents. A model is calibrated on training documents and measured on held-out ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.proxy import corpus_file
from sparselong.config import schema
from sparselong.data import corpus, encode_files, select_usable, write_hellaswag
from sparselong.evaluate.perplexity import Sample, load_samples
from sparselong.evaluate.work import Request

CONFIG = Path(__file__).resolve().parent.parent.parent / "configs/tiny.yaml"
RENDERED = "2026-01-01"
"""Date that chat templates write."""
SHORTEST = 32
"""Tokens of the shortest piece of a held-out document that is measured."""


class Documents(NamedTuple):
    """Tokens of documents by split, lists or arrays, each with the token that ends it."""

    train: Sequence[Any]
    held_out: Sequence[Any]


class Items(NamedTuple):
    """Multiple-choice items.

    Attributes:
        requests: context and ending of each item's endings, one item after another.
        characters: of each of these endings.
        labels: number of the right ending of each item.
    """

    requests: list[Request]
    characters: list[int]
    labels: list[int]


def read_documents(path: Path | None, tokenizer: Any) -> Documents:
    """Return the documents of a file, or of the standard library.

    Raises:
        ValueError: a line has another split, or neither text nor tokens.
    """
    if path is None:
        texts = (corpus.texts("train"), corpus.texts("held_out"))
        return Documents(*(_encode(each, tokenizer) for each in texts))
    if path.name == corpus_file.NAME:
        corpus_of, end = corpus_file.load(path), tokenizer.pad_token_id
        streams = (corpus_of.train, corpus_of.held_out)
        return Documents(*(corpus_file.documents_of(each, end) for each in streams))
    found: dict[str, list[list[int]]] = {"train": [], "held_out": []}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if row.get("split") not in found or not (row.get("text") or row.get("input_ids")):
            raise ValueError(
                f"{path}, line {number}: allowed: `split` train or held_out, with `text` or "
                f"`input_ids`; found: {line[:80]}"
            )
        tokens = row.get("input_ids") or _encode([row["text"]], tokenizer)[0]
        found[row["split"]].append(tokens)
    return Documents(**found)


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    ended = [f"{text}<|endoftext|>" for text in texts]
    return tokenizer(ended, add_special_tokens=False)["input_ids"]


def cut(documents: Sequence[Any], length: int, tokens: int) -> list[Sample]:
    """Return pieces of documents of at most `length` tokens, until there are `tokens` of them.

    One piece of each document in turn, so that long documents do not dominate. Every token counts.
    """
    pieces: list[Sample] = []
    found = 0
    for turn in zip_longest(*(_split(document, length) for document in documents)):
        for piece in turn:
            if found >= tokens:
                return pieces
            if piece is not None:
                pieces.append(Sample(piece, [True] * len(piece)))
                found += len(piece)
    return pieces


def _split(document: Any, length: int) -> Iterator[list[int]]:
    for start in range(0, len(document), length):
        piece = document[start : start + length]
        if len(piece) >= SHORTEST:
            yield [int(token) for token in piece]


def write_calibration(
    path: Path, documents: Sequence[Any], length: int, tokens: int, seed: int
) -> None:
    """Write pieces of training documents, drawn by the seed, as rows for stage 02."""
    order = random.Random(seed).sample(documents, len(documents))
    lines = [json.dumps({"input_ids": each.input_ids}) for each in cut(order, length, tokens)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_items(path: Path | None, tokenizer: Any, work: Path, most: int) -> Items:
    """Return a file's first items, or the demo's, which are written into `work`."""
    if path is None:
        path = work / "items.jsonl"
        write_hellaswag(path, tokenizer, seed=0)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:most]
    requests, characters = [], []
    for row in rows:
        sentence = f"{row['ctx_a']} {row['ctx_b'].capitalize()}".strip()
        context = f"{row['activity_label']}: {sentence}"
        prompt = tokenizer.encode(context, add_special_tokens=False)
        for ending in row["endings"]:
            whole = tokenizer.encode(f"{context} {ending}", add_special_tokens=False)
            requests.append(Request(whole, len(whole) - len(prompt)))
            characters.append(len(ending))
    return Items(requests, characters, [int(row["label"]) for row in rows])


def read_conversations(
    source: str, tokenizer: Any, length: int, work: Path
) -> tuple[list[Sample], list[Sample]]:
    """Return training and held-out conversations that fit into `length` tokens.

    Args:
        source: whatever `data.train` takes.
        tokenizer: the base's.
        length: most tokens of a conversation.
        work: folder for the encoded rows.
    """
    given = [f"data.train={source}", f"data.date={RENDERED}", f"sequence_len={length}"]
    encoded = encode_files(schema.load(CONFIG, given), work / "conversations", tokenizer)
    usable = select_usable(encoded, length)
    train = load_samples(encoded.train, usable.train)
    return train, load_samples(encoded.validation, usable.validation)
