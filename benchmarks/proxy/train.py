#!/usr/bin/env python3
"""Train the proxy from scratch on one GPU, within some minutes.

    python3 benchmarks/proxy/train.py --corpus corpus.npz.xz --minutes 8 --folder OUT

The speed of the first steps decides how many there are in all; it is measured once more before
the learning rate falls. OUT receives a checkpoint in gpt-oss's published layout, half-way and at
the end (at most seven files of at most 16 MiB), and `training.json` with the losses. A run that is
out of time before its last step ends with what it has.

With `--state FILE --runs 2` the steps are planned for two runs of so many minutes; the first leaves
its exact state in FILE (0.5 GB), from which the second continues. `--miniature` tries the same
commands on a CPU with a very small network.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from benchmarks.proxy import corpus_file
from benchmarks.proxy.batches import Batches
from benchmarks.proxy.export import write_checkpoint
from benchmarks.proxy.network import Network, initialise
from benchmarks.proxy.shape import MINIATURE, POSITIONS, describe
from benchmarks.proxy.training import Losses, Training
from sparselong import provenance
from sparselong.files import write_atomically

_RESERVE_SECONDS = 20
"""For imports, before `main`, and for the checkpoint."""
_IGNORED_STEPS, _TIMED_STEPS = 30, 30
"""First steps, which compile, and those that are timed."""
_ROUNDED_COST = 1.08
"""Mean seconds of a step in units of one without rounding."""
_REPLANNED_AT = 0.3
_EXPORTED_AT = (0.5, 0.85)
_PRINTED_SECONDS = 10
_ROWS = (12, 1, 3)
_MINIATURE_ROWS, _MINIATURE_LENGTH = (2, 1, 1), 1024


def main() -> None:
    """Train until all steps are done or the time is up, and write the checkpoint."""
    args = _parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    training = build(args, device)
    if args.state and args.state.exists():
        training.load(args.state)
        tell(f"continuing after step {training.step} of {training.steps}")
    deadline = args.begun + 60 * args.minutes - _RESERVE_SECONDS
    history = Run(training, args, deadline).train()
    if args.state:
        training.save(args.state)
    _finish(training, args, history)


def build(args: argparse.Namespace, device: torch.device) -> Training:
    """Return the training of a command line at its first step."""
    prepared = corpus_file.load(args.corpus)
    marks = prepared.marks.tolist()
    config = describe(marks, **(MINIATURE if args.miniature else {}))
    rows, length = (_ROWS, POSITIONS)
    if args.miniature:
        rows, length = _MINIATURE_ROWS, _MINIATURE_LENGTH
    network = Network(config, compiles=device.type == "cuda" and not args.eager)
    initialise(network, args.seed)
    count = sum(each.numel() for each in network.parameters())
    tell(f"{count:,} parameters, {len(prepared.train):,} tokens of text, on {device}")
    batches = Batches(prepared, rows, length, args.seed, device)
    return Training(network.to(device), batches, args.steps)


class Run:
    """One run of a training.

    Args:
        training: at its first step, or where the last run stopped.
        args: the command line.
        deadline: when to stop, in `time.monotonic`'s seconds.
    """

    def __init__(self, training: Training, args: argparse.Namespace, deadline: float):
        self.training, self.args, self.deadline = training, args, deadline
        self.done = 0
        self._timed_from = 0.0
        self._is_planned = training.steps is not None
        self._is_replanned = self._is_planned
        self._exported = [share for share in _EXPORTED_AT if training.progress >= share]
        self._printed = (time.monotonic(), 0)
        self._sums: list[torch.Tensor] = []
        self.history: list[dict[str, Any]] = []

    def train(self) -> list[dict[str, Any]]:
        """Take steps until they are done or the time is up; return what was printed."""
        training = self.training
        while not training.is_done and time.monotonic() < self.deadline:
            self._sums.append(torch.stack(training.run_step()))
            self.done += 1
            self._plan()
            if time.monotonic() - self._printed[0] > _PRINTED_SECONDS or training.is_done:
                self._print()
            due = [share for share in _EXPORTED_AT if training.progress >= share]
            if len(due) > len(self._exported):
                self._exported = due
                write_checkpoint(training.network, self.args.folder)
                tell(f"checkpoint written at step {training.step}")
        if self._sums:
            self._print()
        return self.history

    def _plan(self) -> None:
        """Decide the number of steps once their speed is known, and correct it once."""
        if self.done in (_IGNORED_STEPS, _IGNORED_STEPS + _TIMED_STEPS):
            _synchronize()
            now = time.monotonic()
            if self.done == _IGNORED_STEPS:
                self._timed_from = now
            elif not self._is_planned:
                self._set_steps((now - self._timed_from) / _TIMED_STEPS, now)
                self._is_planned = True
        if not self._is_replanned and self.training.progress >= _REPLANNED_AT:
            _synchronize()
            now = time.monotonic()
            self._set_steps((now - self._timed_from) / (self.done - _IGNORED_STEPS), now)
            self._is_replanned = True

    def _set_steps(self, seconds: float, now: float) -> None:
        left = self.deadline - now + 60 * self.args.minutes * (self.args.runs - 1)
        steps = self.training.step + int(left / seconds / _ROUNDED_COST)
        self.training.steps = max(steps, self.training.step + 1)
        tell(f"{1000 * seconds:.1f} ms a step: {self.training.steps} steps planned")

    def _print(self) -> None:
        training = self.training
        means = torch.stack(self._sums).mean(0).tolist()  # waits for the device
        if not all(map(math.isfinite, means)):
            raise FloatingPointError(f"the loss is not finite at step {training.step}: {means}")
        now = time.monotonic()
        steps = self.done - self._printed[1]
        rate = steps * training.batches.tokens / (now - self._printed[0])
        self._sums, self._printed = [], (now, self.done)
        losses = dict(zip(Losses._fields, (round(value, 4) for value in means), strict=True))
        line = {
            "step": training.step,
            "of": training.steps,
            "tokens": training.step * training.batches.tokens,
            **losses,
            "tokens_per_second": round(rate),
            "learning_rate": round(training.learning_rate(), 6),
            "seconds": round(now - self.args.begun, 1),
        }
        self.history.append(line)
        tell("  ".join(f"{key} {value}" for key, value in line.items()))


def _finish(training: Training, args: argparse.Namespace, history: list[dict[str, Any]]) -> None:
    """Write the checkpoint and the record of the training."""
    write_checkpoint(training.network, args.folder)
    record = {
        "complete": training.is_done,
        "steps": training.step,
        "planned_steps": training.steps,
        "seconds": round(time.monotonic() - args.begun, 1),
        "seed": args.seed,
        "corpus": args.corpus.name,
        "hardware": provenance.describe_hardware(),
        "history": history,
    }
    if torch.cuda.is_available():
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
    write_atomically(args.folder / "training.json", json.dumps(record, indent=1) + "\n")
    tell(f"done after {training.step} steps, complete: {training.is_done}")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tell(text: str) -> None:
    """Print a line with the time of day."""
    print(f"{datetime.now():%H:%M:%S}  {text}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="tokens written by prepare.py")
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this run, all included")
    parser.add_argument("--steps", type=int, help="do not plan, but take so many")
    parser.add_argument("--state", type=Path, help="read if it exists, and written at the end")
    parser.add_argument("--runs", type=int, default=1, help="runs among which steps are planned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--miniature", action="store_true", help="a very small network")
    parser.set_defaults(begun=time.monotonic())
    return parser.parse_args()


if __name__ == "__main__":
    main()
