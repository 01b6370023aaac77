#!/usr/bin/env python3
"""Collect and encode the proxy's text: tokenizer, tokens, items and a manifest.

    python3 benchmarks/proxy/prepare.py --out FOLDER

The text comes from this machine (`text.py`), so another machine gives another corpus; one file of
tokens is carried to wherever the model is trained. FOLDER then contains:

- `corpus.npz.xz`: the tokens (`corpus_file.py`);
- `tokenizer/`: byte-level BPE with gpt-oss's special tokens and a harmony template;
- `hellaswag.jsonl`: multiple-choice items from held-out documents (`items.py`);
- `ruler.jsonl`: RULER's items as stage 04 makes them, of each task and length;
- `held_out.jsonl`: the held-out documents;
- `manifest.json`: how much there is of each kind and language, and the hash of the tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np

from benchmarks.proxy import conversations, corpus_file, items
from benchmarks.proxy.shape import POSITIONS, VOCABULARY
from benchmarks.proxy.text import Document, read_documents
from sparselong.config import RULER_TASKS
from sparselong.data import make_items
from sparselong.files import write_atomically
from sparselong.tiny.tokenizer import train_tokenizer

_TOKENIZER_CHARACTERS = 30_000_000
_CONTINUATIONS, _TRANSLATIONS = 9_000, 9_000
_ITEMS = 1000
_RULER_LENGTHS, _RULER_ITEMS = (1024, 4096), 50


def main() -> None:
    """Prepare everything in the order in which it is listed above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the prepared text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    documents = read_documents()
    tell(f"{len(documents):,} documents")
    tokenizer = train_tokenizer(_sample(documents, args.seed), VOCABULARY, POSITIONS)
    tokenizer.save_pretrained(args.out / "tokenizer")
    tell("tokenizer trained")
    prepared = encode(documents, tokenizer, args.seed)
    corpus_file.save(prepared, args.out / corpus_file.NAME)
    tell("tokens written")
    _write_rows(args.out / "hellaswag.jsonl", items.make_items(documents, _ITEMS, args.seed))
    _write_rows(args.out / "ruler.jsonl", _ruler_items(tokenizer, args.seed))
    held_out = [each._asdict() for each in documents if each.held_out]
    _write_rows(args.out / "held_out.jsonl", held_out)
    manifest = describe(documents, prepared, args.out / corpus_file.NAME)
    write_atomically(args.out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    tell(f"done: {manifest['tokens']}")


def encode(documents: list[Document], tokenizer: Any, seed: int) -> corpus_file.Prepared:
    """Return documents, conversations and solved tasks as tokens."""
    marks = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    train = _encode([each.text for each in documents if not each.held_out], tokenizer)
    held_out = _encode([each.text for each in documents if each.held_out], tokenizer)
    tell("documents encoded")
    chats = [
        *conversations.write_continuations(documents, _CONTINUATIONS, seed),
        *conversations.write_translations(documents, _TRANSLATIONS, seed),
    ]
    random.Random(seed).shuffle(chats)
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    tell(f"{len(chats):,} conversations")
    examples = list(
        conversations.make_examples(tokenizer, conversations.EXAMPLES, POSITIONS, f"train {seed}")
    )
    random.Random(seed).shuffle(examples)
    tell(f"{len(examples):,} solved tasks")
    return corpus_file.Prepared(
        train=train,
        conversations=_encode(rendered, tokenizer),
        tasks=_flatten([each.tokens for each in examples]),
        answered=np.packbits(np.fromiter(chain(*(each.answered for each in examples)), bool)),
        held_out=held_out,
        marks=np.array(marks, dtype=np.uint16),
    )


def describe(
    documents: list[Document], prepared: corpus_file.Prepared, path: Path
) -> dict[str, Any]:
    """Return the manifest: bytes and documents by kind and language, tokens, size and hash."""
    kinds: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for each in documents:
        counts = kinds[each.kind].setdefault(
            each.language, {"documents": 0, "train_bytes": 0, "held_out_bytes": 0}
        )
        counts["documents"] += 1
        counts["held_out_bytes" if each.held_out else "train_bytes"] += len(each.text.encode())
    return {
        "text": {kind: dict(sorted(found.items())) for kind, found in sorted(kinds.items())},
        "tokens": {
            name: len(getattr(prepared, name))
            for name in ("train", "conversations", "tasks", "held_out")
        },
        "answer_tokens": int(np.unpackbits(prepared.answered).sum()),
        "file_bytes": path.stat().st_size,
        "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def tell(text: str) -> None:
    """Print a line at once."""
    print(text, file=sys.stderr, flush=True)


def _sample(documents: list[Document], seed: int) -> list[str]:
    """Return training texts of the size that the tokenizer is trained on."""
    texts = [each.text for each in documents if not each.held_out]
    random.Random(seed).shuffle(texts)
    taken, total = [], 0
    for each in texts:
        if total >= _TOKENIZER_CHARACTERS:
            break
        taken.append(each)
        total += len(each)
    return taken


def _encode(texts: list[str], tokenizer: Any) -> np.ndarray:
    """Return texts as one stream, each followed by the end of a text."""
    found, end = [], tokenizer.pad_token_id
    for first in range(0, len(texts), 512):
        encoded = tokenizer(texts[first : first + 512], add_special_tokens=False)["input_ids"]
        found += [np.array([*ids, end], dtype=np.uint16) for ids in encoded]
    return np.concatenate(found)


def _flatten(lists: list[list[int]]) -> np.ndarray:
    return np.fromiter(chain(*lists), np.uint16)


def _ruler_items(tokenizer: Any, seed: int) -> list[dict[str, Any]]:
    return [
        {"task": task, "length": length, **item}
        for task in RULER_TASKS
        for length in _RULER_LENGTHS
        for item in make_items(task, length, _RULER_ITEMS, seed, tokenizer)
    ]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text)


if __name__ == "__main__":
    main()
