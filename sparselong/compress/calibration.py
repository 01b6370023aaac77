"""Calibration sequences from the training data, and their hidden states between layers.

The encoded training conversations, of any length, are shuffled by the seed, concatenated and cut
into sequences of equal length. Their hidden states after the last finished layer are the only state
that compression carries from layer to layer. They are saved after each layer, beside the next one,
so that an interrupted run resumes with identical values, in any number of processes.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparselong.checkpoint import Checkpoint, begin_file, write_rows
from sparselong.compress.background import Seconds
from sparselong.compress.work import Spread
from sparselong.config import Config
from sparselong.data import Encoded
from sparselong.errors import StageError
from sparselong.runtime import allocate_locked

STATES = "states.safetensors"
"""Name of the file of the states in `02_compress/work`."""
_HASHED_AT_ONCE = 4
"""Batches that are hashed at once, each in a thread."""


def calibration_tokens(config: Config, train: Encoded) -> torch.Tensor:
    """Return calibration sequences, int64 [sequences, sequence_len].

    There are fewer than `calibration.samples` if the training data is too small, but at least one:
    `open_inputs` has refused less.
    """
    rows = list(range(len(train)))
    random.Random(config.seed).shuffle(rows)
    length = config.calibration.sequence_len
    wanted = config.calibration.samples * length
    stream: list[int] = []
    for row in rows:
        if len(stream) >= wanted:
            break
        stream += train[row][0]
    count = min(wanted, len(stream)) // length
    return torch.tensor(stream[: count * length]).reshape(count, length)


class HiddenStates:
    """Hidden states of this process's calibration sequences after the finished layers.

    Two buffers in host memory, page-locked if there is a GPU, take turns: a layer reads one and
    fills the other, while the one that it reads is saved. Sequences belong to batches, which are
    the same for any number of processes; a process has consecutive batches.

    Args:
        path: the file that stores the states of all processes between layers.
        shape: sequences, their length, and the width of a state.
        dtype: of the states.
        device: where layers are computed.
        batch_tokens: most tokens of a batch of more than one sequence.
        spread: the processes that share the sequences.

    Attributes:
        layers_done: number of layers before the states.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        batch_tokens: int,
        spread: Spread,
    ):
        self.path, self.layers_done = path, 0
        self._shape, self._dtype, self._device, self._spread = shape, dtype, device, spread
        starts = range(0, shape[0], max(1, batch_tokens // shape[1]))
        batches = [range(first, min(first + starts.step, shape[0])) for first in starts]
        self._count, self._own = len(batches), spread.share(len(batches))
        self._batches_of_all = batches
        self._batches = batches[self._own.start : self._own.stop]
        self._first = self._batches[0].start if self._batches else 0
        self._now, self._next = (self._allocate() for _ in range(2))
        self._saved = self._now
        # One for all passes: the allocator keeps memory for each stream.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _allocate(self) -> torch.Tensor:
        shape = (sum(map(len, self._batches)), *self._shape[1:])
        size_bytes = max(1, math.prod(shape) * self._dtype.itemsize)
        memory = allocate_locked(-(-size_bytes // 8) * 8)
        return memory[: math.prod(shape) * self._dtype.itemsize].view(self._dtype).view(shape)

    @property
    def states(self) -> torch.Tensor:
        """The states [own sequences, length, hidden] on the CPU."""
        return self._now

    @property
    def tokens(self) -> int:
        """Number of calibration tokens of all processes."""
        return self._shape[0] * self._shape[1]

    def start(self, checkpoint: Checkpoint, tokens: torch.Tensor) -> None:
        """Load the saved states, or embed the tokens [sequences, length] if there are none.

        Raises:
            StageError: the saved states are damaged.
        """
        if self.path.exists():
            self._load()
            return
        own = tokens[self._first : self._first + len(self._now)]
        distinct, place = own.unique(return_inverse=True)
        rows = checkpoint.read_rows("model.embed_tokens.weight", distinct).to(self._dtype)
        torch.index_select(rows, 0, place.flatten(), out=self._now.flatten(0, 1))

    def batches(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield each batch's place in `put` and its states [sequences, length, hidden] on a device.

        On a GPU the next batch is copied while this one is used.
        """
        places = [
            slice(each.start - self._first, each.stop - self._first) for each in self._batches
        ]
        copies = self._copies
        if copies is None:
            yield from ((place, self._now[place]) for place in places)
            return

        def fetch(place: slice) -> tuple[torch.Tensor, Any]:
            with torch.cuda.stream(copies):
                batch = self._now[place].to(self._device, non_blocking=True)
            return batch, copies.record_event()

        fetched = [fetch(place) for place in places[:1]]
        for number, place in enumerate(places):
            batch, arrived = fetched.pop()
            if number + 1 < len(places):
                fetched.append(fetch(places[number + 1]))
            used_in = torch.cuda.current_stream(self._device)
            used_in.wait_event(arrived)
            batch.record_stream(used_in)
            yield place, batch

    def take_turns(self, count: int) -> Iterator[torch.Tensor]:
        """Yield `count` batches, those of all processes in turn, the same in each process.

        Each is [sequences, length, hidden] on the device; after the last batch, the first follows.

        Raises:
            ExchangeError: another process is gone.
        """
        shares = [self._spread.share_of(rank, self._count) for rank in range(self._spread.size)]
        for number in islice(cycle(range(self._count)), count):
            sequences = self._batches_of_all[number]
            owner = next(rank for rank, share in enumerate(shares) if number in share)
            if owner == self._spread.rank:
                place = slice(sequences.start - self._first, sequences.stop - self._first)
                batch = self._now[place].to(self._device, non_blocking=True)
            else:
                shape = (len(sequences), *self._shape[1:])
                batch = torch.empty(shape, dtype=self._dtype, device=self._device)
            yield self._spread.send(batch, owner, "calibration states")

    def put(self, place: slice, states: torch.Tensor) -> None:
        """Keep a batch's states after the layer; on a GPU they are copied later, in its order."""
        self._next[place].copy_(states, non_blocking=True)

    def advance(self) -> None:
        """Take the kept states of all batches as the current ones, after one more layer."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._now, self._next = self._next, self._now
        self.layers_done += 1

    def begin_saving(self) -> None:
        """Begin the file of the current states, which `save` of every process then completes.

        They are the ones that are saved, even if the computation advances before `save` begins.
        """
        self._saved = self._now
        if self._spread.is_first:
            tensors = {
                "states": torch.empty(self._shape, dtype=self._dtype, device="meta"),
                "digests": torch.empty(self._count, 32, dtype=torch.uint8, device="meta"),
                "layers_done": torch.tensor(self.layers_done),
            }
            begin_file(self._partial, tensors)
        self._spread.wait("states")

    def save(self, seconds: Seconds) -> None:
        """Save this process's states, beside the computation of the next layer alone.

        The layer after that one overwrites them.
        """
        if not self._batches:
            return
        states = self._saved
        with seconds.measuring("hash"):
            digests = self._digests(states)
        with seconds.measuring("write"):
            write_rows(self._partial, "states", states, self._first)
            write_rows(self._partial, "digests", digests, self._own.start)

    def commit(self) -> None:
        """Make the file that every process has completed the one from which work resumes."""
        if self._spread.is_first:
            self._partial.replace(self.path)

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    def _digests(self, states: torch.Tensor) -> torch.Tensor:
        """Return each batch's sha256, uint8 [own batches, 32]."""
        parts = states.split([len(each) for each in self._batches])
        with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
            found = list(pool.map(_hash, parts))
        return torch.tensor([list(each) for each in found], dtype=torch.uint8)

    def _load(self) -> None:
        rows = slice(self._first, self._first + len(self._now))
        try:
            with safe_open(self.path, framework="pt") as saved:
                kept = saved.get_slice("states")
                if tuple(kept.get_shape()) != self._shape:
                    raise ValueError(f"states of shape {kept.get_shape()}")
                self._now.copy_(kept[rows])
                digests = saved.get_tensor("digests")[self._own.start : self._own.stop]
                self.layers_done = int(saved.get_tensor("layers_done"))
            if self._batches and not torch.equal(self._digests(self._now), digests):
                raise ValueError("states with another sha256")
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise StageError(
                f"{self.path} is damaged",
                "the states of the calibration sequences, as this stage saved them",
                str(error),
                f"remove {self.path}: the same command then begins at the first layer",
            ) from error


def _hash(states: torch.Tensor) -> bytes:
    raw: Any = states.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).digest()
