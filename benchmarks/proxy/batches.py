"""Rows of packed documents for each step of training, a function of the step alone.

A row holds `length` tokens. Rows of the corpus and of conversations are cut from their streams,
with other borders in every pass; rows of solved tasks hold whole tasks and are filled up with ends
of texts. Everything lies on the device, so that a batch costs a few gathers.

The weight of a token says how much predicting it counts: 1 in the corpus and in conversations, and
in tasks little for the prompt and much for the answer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from benchmarks.proxy.corpus_file import Prepared, documents_of
from benchmarks.proxy.network import Batch

KINDS = ("corpus", "conversations", "tasks")
PROMPT_WEIGHT, ANSWER_WEIGHT = 0.1, 10.0
_PADDING, _PROMPT, _ANSWER = 0, 1, 2
_OPEN_ROWS = 64


class Targets(NamedTuple):
    """What is to be predicted after each token of a batch.

    Attributes:
        ids: int64 [B, T].
        weights: fp32 [B, T], 0 where nothing is to be predicted.
        kinds: int64 [B], each row's index in KINDS.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    kinds: torch.Tensor


class Batches:
    """All batches of a training.

    Args:
        prepared: the text.
        rows: rows of each kind in a batch, in the order of KINDS.
        length: tokens of a row.
        seed: decides the order.
        device: of the batches.
    """

    def __init__(
        self,
        prepared: Prepared,
        rows: tuple[int, int, int],
        length: int,
        seed: int,
        device: torch.device,
    ):
        self.rows, self.length, self.seed, self.device = rows, length, seed, device
        self.end = int(prepared.marks[2])
        tasks, codes = pack_tasks(prepared, length)
        streams = (prepared.train, prepared.conversations, tasks)
        self._streams = [torch.from_numpy(each.astype(np.int32)).to(device) for each in streams]
        self._codes = torch.from_numpy(codes).to(device)
        self._orders: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}
        table = {_PADDING: 0.0, _PROMPT: PROMPT_WEIGHT, _ANSWER: ANSWER_WEIGHT}
        self._table = torch.tensor([table[code] for code in sorted(table)], device=device)
        kinds = [torch.full((count,), kind) for kind, count in enumerate(rows)]
        self._kinds = torch.cat(kinds).to(device)

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return sum(self.rows) * self.length

    def make(self, step: int) -> tuple[Batch, Targets]:
        """Return the batch of a step, counted from 0."""
        columns = torch.arange(self.length, device=self.device)
        parts, weights = [], []
        for kind, count in enumerate(self.rows):
            begins = self._begins(kind, step, count)
            places = begins.to(self.device)[:, None] + columns
            parts.append(self._streams[kind][places].long())
            if KINDS[kind] == "tasks":
                weights.append(self._table[self._codes[places].long()])
            else:
                weights.append(torch.ones(places.shape, device=self.device))
        ids, weight = torch.cat(parts), torch.cat(weights)
        ends = ids == self.end
        starts = torch.zeros_like(ends)
        starts[:, 0] = True
        starts[:, 1:] = ends[:, :-1]
        first = torch.where(starts, columns, 0).cummax(1).values
        flat = starts.flatten().nonzero().flatten()
        boundaries = torch.cat([flat, flat.new_tensor([ids.numel()])]).int()
        targets = ids.roll(-1, 1)
        weight = weight.roll(-1, 1).masked_fill(ends, 0.0)
        weight[:, -1] = 0.0
        return Batch(ids, columns - first, boundaries), Targets(targets, weight, self._kinds)

    def _begins(self, kind: int, step: int, count: int) -> torch.Tensor:
        """Return where a step's rows of a kind begin in their stream, int64 [count]."""
        begins = []
        for number in range(step * count, (step + 1) * count):
            each_pass = self._row_count(kind)
            shift, order = self._order(kind, number // each_pass)
            begins.append(shift + int(order[number % each_pass]) * self.length)
        return torch.tensor(begins, dtype=torch.long)

    def _row_count(self, kind: int) -> int:
        room = len(self._streams[kind]) - (0 if KINDS[kind] == "tasks" else self.length - 1)
        return max(1, room // self.length)

    def _order(self, kind: int, number: int) -> tuple[int, torch.Tensor]:
        """Return by how much a pass over a kind is shifted, and the order of its rows."""
        if (kind, number) not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number * 10 + kind)
            order = torch.randperm(self._row_count(kind), generator=generator)
            shift = int(torch.randint(self.length, (), generator=generator))
            self._orders[kind, number] = (0 if KINDS[kind] == "tasks" else shift, order)
        return self._orders[kind, number]


def pack_tasks(prepared: Prepared, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of whole tasks as uint16 tokens [rows * length], and a uint8 code of each.

    A task longer than a row is left out.

    Raises:
        ValueError: no task fits.
    """
    end = int(prepared.marks[2])
    bits = np.unpackbits(prepared.answered)[: len(prepared.tasks)]
    rows: list[list[tuple[int, int]]] = []
    filled: list[int] = []
    begin = 0
    for task in documents_of(prepared.tasks, end):
        size, place = len(task), (begin, begin + len(task))
        begin += size
        if size > length:
            continue
        recent = range(max(0, len(rows) - _OPEN_ROWS), len(rows))
        row = next((i for i in recent if filled[i] + size <= length), None)
        if row is None:
            rows.append([])
            filled.append(0)
            row = len(rows) - 1
        rows[row].append(place)
        filled[row] += size
    if not rows:
        raise ValueError(f"no solved task fits a row of {length} tokens")
    tokens = np.full((len(rows), length), end, dtype=np.uint16)
    codes = np.full((len(rows), length), _PADDING, dtype=np.uint8)
    for number, places in enumerate(rows):
        at = 0
        for first, last in places:
            tokens[number, at : at + last - first] = prepared.tasks[first:last]
            codes[number, at : at + last - first] = _PROMPT + bits[first:last]
            at += last - first
    return tokens.reshape(-1), codes.reshape(-1)
