"""Command line options that the benchmarks share: location and name of the result, and command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.record import RESULTS
from sparselong import provenance


def add_result(parser: argparse.ArgumentParser) -> None:
    """Add the options `machine` and `folder` for `record.write`."""
    text = "short name for the result file, for example h200"
    parser.add_argument("--machine", type=short_name, help=text)
    parser.add_argument("--folder", type=Path, default=RESULTS)


def short_name(text: str) -> str:
    """Return a machine's name; raise if it has characters that would break the file name."""
    if not text.isalnum():
        raise argparse.ArgumentTypeError(f"{text}: allowed are letters and digits, as in h200x4")
    return text


def has_device(file: str) -> bool:
    """Return whether there is a CUDA device; print a message if not.

    `make bench` then continues with the benchmarks that the machine can run.
    """
    if not torch.cuda.is_available():
        print(f"benchmarks/{Path(file).name} needs a CUDA device: nothing measured")
        return False
    return True


def machine_of(args: argparse.Namespace) -> str:
    """Return `--machine`, or the last word of the first GPU's name, as in h200.

    The name comes from nvidia-smi because initializing CUDA would take memory that the benchmark
    may have to measure.
    """
    gpus = provenance.describe_hardware()["gpus"]
    if not args.machine and not gpus:
        sys.exit("nvidia-smi lists no GPU: pass --machine, a short name for the result file")
    return args.machine or gpus[0].split(",")[0].split()[-1].lower()


def command_of(file: str, args: argparse.Namespace) -> str:
    """Return the command line without `--folder`, a local path that does not affect the figures."""
    program = Path(file).resolve().relative_to(RESULTS.parent.parent)
    given = " ".join(sys.argv[1:]).replace(f"--folder {args.folder}", "").split()
    return " ".join(["python3", str(program), *given])
