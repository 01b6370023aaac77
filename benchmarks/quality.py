#!/usr/bin/env python3
"""What compression costs, and what fine-tuning recovers: one table of methods on one base.

Rows are the methods of `compared/methods.py` with the experts as they are, 2:4, or fewer; then the
arms of `compared/tuning.py`, all of the same data, steps and seeds. Each row has perplexity on
held-out documents, in all and by position, divergence and top-1 agreement with the base on some of
them, accuracy on multiple-choice items with its standard error, perplexity on held-out
conversations of the fine-tuning data, bytes, and seconds.

A row's figures are written as soon as it is measured. After `--minutes` no row begins; the same
command on the same day continues with the rows that are missing, and so does one that takes the
file as `--earlier`. A row that fails is told, and the others are measured; the exit code is then 1.
Below the table stands what it decides (`compared/verdicts.py`).

benchmarks/quality.py --base FOLDER [--text FILE] [--items FILE] [--tune FILE] [--minutes M]
                      [--earlier FILE] [--only TEXT …] [--machine NAME] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers.utils import logging

from benchmarks.command_line import add_result, command_of, has_device, machine_of
from benchmarks.compared.compressing import REFINEMENT_STEPS, Compressor, Recipe
from benchmarks.compared.measuring import Figures, Measures
from benchmarks.compared.rows import CEILING, Row, list_rows
from benchmarks.compared.table import Table, read_earlier, show, show_row
from benchmarks.compared.text import cut, read_conversations, read_documents, read_items
from benchmarks.compared.tuning import Arm, Settings, attention, tune
from benchmarks.compared.verdicts import show_verdicts
from benchmarks.record import path_of, write
from sparselong.model import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NATIVE_BITS, TWO_FOUR_BITS = 4.25, 3.0
"""Bits per weight of experts in MXFP4, as they are and with 2:4."""


class Bench:
    """Everything that rows share: the base, the data and the table.

    Args:
        args: the command line.
        work: folder for compressed models.
    """

    def __init__(self, args: argparse.Namespace, work: Path):
        tokenizer = load_tokenizer(args.base)
        documents = read_documents(args.text, tokenizer)
        self.settings = Settings(args.steps, args.packs, args.length, args.rate)
        self.rows, validation = read_conversations(args.tune, tokenizer, args.length, work)
        held_out = cut(documents.held_out, args.measured_length, args.held_out_tokens)
        compared = cut(documents.held_out, args.measured_length, args.compared_tokens)
        items = read_items(args.items, tokenizer, work, args.most_items)
        self.measures = Measures(held_out, compared, items, validation, work / "states")
        self.compressor = Compressor(args.base, documents, work, args.samples, args.length)
        self.base = load_model(args.base, attn_implementation=attention())
        self.measures.note_base(self.base)
        self.ceilings: dict[int, Any] = {}

    def run(self, row: Row) -> Figures:
        """Make a row's model and return its figures."""
        teacher = self.base
        if row.arm is not None and row.arm.teacher == "ceiling":
            teacher = self._tune_ceiling(row.recipe.seed)
        made = self.compressor.make(row.recipe)
        seconds, extra = made.seconds, {}
        if row.arm is None:
            model = load_model(made.model, attn_implementation=attention())
        else:
            begin = time.monotonic()
            model, losses = self._tune(row.recipe, row.arm, teacher)
            seconds = time.monotonic() - begin
            last = losses[-max(1, len(losses) // 10) :]
            extra = {"last training loss": (sum(last) / len(last), "nats")}
        return {
            **self.measures.measure(model),
            **extra,
            "bytes": (made.metrics["bytes_on_disk"], "bytes"),
            "2:4 groups": (made.metrics["two_four_conforming"], "1"),
            "seconds": (seconds, "s"),
        }

    def _tune_ceiling(self, seed: int) -> Any:
        """Return the base after the fine-tuning of a seed, made again for another seed."""
        if seed not in self.ceilings:
            self.ceilings = {seed: self._tune(Recipe("base", seed), CEILING, self.base)[0]}
        return self.ceilings[seed]

    def _tune(self, recipe: Recipe, arm: Arm, teacher: Any) -> tuple[Any, list[float]]:
        made = self.compressor.make(recipe)
        return tune(made, self.rows, arm, self.settings, recipe.seed, teacher)


def describe(args: argparse.Namespace, keep: int) -> dict[str, float]:
    """Return the numbers on which all figures depend, by name."""
    names = (
        *("steps", "packs", "length", "rate", "samples", "measured_length", "held_out_tokens"),
        *("compared_tokens", "most_items"),
    )
    files = [*sorted(args.base.glob("*.safetensors")), args.text, args.items]
    files += [] if args.tune == "demo" else [Path(args.tune)]
    digest = hashlib.sha256()
    for path in filter(None, files):
        digest.update(path.read_bytes())
    found = {name: float(getattr(args, name)) for name in names}
    found["refinement steps"] = float(REFINEMENT_STEPS)
    return {**found, "kept experts": float(keep), "files": float(int(digest.hexdigest()[:12], 16))}


def parse() -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("--base", type=Path, help="a gpt-oss in the published form")
    parser.add_argument("--text", type=Path, help="documents; default: Python's documentation")
    parser.add_argument("--items", type=Path, help="multiple-choice items; default: from it")
    parser.add_argument("--tune", default="demo", help="conversations, as data.train takes them")
    parser.add_argument("--earlier", type=Path, help="result to continue; default: today's")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="no row but the first begins later"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only rows with one of these in their description"
    )
    parser.add_argument("--steps", type=int, default=150, help="of a fine-tuning")
    parser.add_argument("--packs", type=int, default=4, help="packs of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of packs and calibration")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--measured-length", type=int, default=4096, help="of a held-out piece")
    parser.add_argument("--held-out-tokens", type=int, default=262_144)
    parser.add_argument("--compared-tokens", type=int, default=65_536)
    parser.add_argument("--most-items", type=int, default=1000)
    add_result(parser)
    return parser.parse_args()


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Help that keeps the lines of the description."""


def measure(args: argparse.Namespace, work: Path) -> tuple[Table, int]:
    """Measure the missing rows until the time is over; return the table and how many failed."""
    begin = time.monotonic()
    keep = count_kept(args.base)
    settings = describe(args, keep)
    named = ("quality", machine_of(args), command_of(__file__, args))
    begun = path_of(*named[:2], args.folder)  # by a run that was killed
    earlier = args.earlier or (begun if begun.exists() else None)
    table = Table(settings, read_earlier(earlier, settings) if earlier else [])
    rows = list_rows(args.seeds, keep)
    rows = [row for row in rows if any(text in str(row.case) for text in args.only)]
    missing = [row for row in rows if not table.has(row.case)]
    failed = 0
    if missing:
        bench = Bench(args, work)
    for number, row in enumerate(missing, 1):
        if number > 1 and time.monotonic() - begin > 60 * args.minutes:
            print(f"{len(missing) - number + 1} of {len(rows)} rows are left for the next run")
            break
        try:
            figures = bench.run(row)
        except Exception:  # whatever it was, hours of other rows are not lost for it
            failed += 1
            print(f"{number}/{len(missing)} {row.case} failed", flush=True)
            traceback.print_exc()
        else:
            table.add(row.case, figures)
            write(*named, table.rows, args.folder)
            print(f"{number}/{len(missing)} {show_row(row.case, figures)}", flush=True)
        gc.collect()
    return table, failed


def count_kept(base: Path) -> int:
    """Return how many experts of a layer take the bytes of all experts in 2:4 form."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return round(config["num_local_experts"] * TWO_FOUR_BITS / NATIVE_BITS)


def main() -> None:
    """Measure, and print the table; exit 1 if a row failed."""
    args = parse()
    if args.base is None:
        if not has_device(__file__):
            return
        args.base = ROOT / "runs/demo/base"
    logging.disable_progress_bar()  # one for every model that is opened
    with tempfile.TemporaryDirectory() as work:
        table, failed = measure(args, Path(work))
    print(show(table.rows), show_verdicts(table.rows), sep="\n")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
