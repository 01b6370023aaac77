"""What the benchmarks' command lines have in common: where a result goes, how it is named, and the
command that it says it came from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.record import RESULTS
from sparselong import provenance


def add_result(parser: argparse.ArgumentParser) -> None:
    """Arguments `machine` and `folder`, for `record.write`."""
    text = "short name for the result's file, for example h200"
    parser.add_argument("--machine", type=short_name, help=text)
    parser.add_argument("--folder", type=Path, default=RESULTS)


def short_name(text: str) -> str:
    """A machine's name; refused before anything is measured where it would part a file's name."""
    if not text.isalnum():
        raise argparse.ArgumentTypeError(f"{text}: allowed are letters and digits, as in h200x4")
    return text


def has_device(file: str) -> bool:
    """Whether there is a CUDA device; says where there is none that nothing was measured.

    `make bench` then goes on with what the machine can measure.
    """
    if not torch.cuda.is_available():
        print(f"benchmarks/{Path(file).name} needs a CUDA device: nothing measured")
        return False
    return True


def machine_of(args: argparse.Namespace) -> str:
    """`--machine`, or the last word of the first GPU's name, as in h200.

    From nvidia-smi, because a process that asks CUDA takes a part of the memory it may be to
    measure.
    """
    gpus = provenance.describe_hardware()["gpus"]
    if not args.machine and not gpus:
        sys.exit("nvidia-smi names no GPU: pass --machine, a short name for the result's file")
    return args.machine or gpus[0].split(",")[0].split()[-1].lower()


def command_of(file: str, args: argparse.Namespace) -> str:
    """The command line as it was given.

    But for `--folder`: where the figures were put is one machine's path, and no part of what gave
    them.
    """
    given = " ".join(sys.argv[1:]).replace(f"--folder {args.folder}", "").split()
    return " ".join(["python3", f"benchmarks/{Path(file).name}", *given])
