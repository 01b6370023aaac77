#!/usr/bin/env python3
"""Stage 02 on layers of gpt-oss's true widths: seconds of each part, peak memory, resumption.

A base with random weights in the published form (`base_checkpoint.py`) and random tokens go through
`02_compress.py`, as a user would call it. The rows say, for each layer, what the computation waited
for (`load`, `calibrate`, `solve`, `refine`, `pack`, `forward`, `wait`) and what ran beside (`read`,
`write`, `hash`); for the whole script its seconds, the planner's prediction of them for this GPU,
and peak bytes; and, from the median layer, the seconds of all layers of the published model. The
first layer compiles kernels.

`--kill-at N` then compresses the base in a second run directory, kills the script once layer N is
finished, runs it again, and compares every file of the two results: exit code 1 if one differs.

    benchmarks/compress_rate.py --shape 120b --layers 9 [--kill-at 2] [--machine NAME]

Nine layers of the 120b take 24 GB of disk. `--shape tiny` runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.base_checkpoint import TOKENS, write_base
from benchmarks.command_line import add_result, command_of, machine_of
from benchmarks.record import row, write
from sparselong.config import Config, load
from sparselong.memory import PUBLISHED, make_plan
from sparselong.provenance import gpu_name
from sparselong.run import read_manifest

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = {"120b": "true", "20b": "20b", "tiny": "tiny"}
CONFIGS = {
    "120b": "configs/gpt-oss-120b-4x3090.yaml",
    "20b": "configs/gpt-oss-20b-1x3090.yaml",
    "tiny": "configs/tiny.yaml",
}
SUBJECTS = {
    "120b": "compress_rate",
    "20b": "compress_rate_20b",
    "tiny": "compress_rate_tiny",
}
"""Subjects of the results: one for each shape."""
COMPUTED = ("load", "calibrate", "solve", "refine", "pack", "forward", "wait")
"""Parts whose sum is a layer's time."""
BESIDE = ("read", "write", "hash")
"""Parts that run beside them."""
STAGE = "02_compress"
BEGUN = time.monotonic()
Rows = list[dict[str, Any]]


def tell(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - BEGUN:6.1f} s] {text}", file=sys.stderr, flush=True)


def write_data(path: Path, samples: int, length: int) -> None:
    """Write rows of random tokens, of which enough for the calibration are for training."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(samples + samples // 8 + 4):
            ids = [draw.randrange(TOKENS // 2) for _ in range(length)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")


def arguments(args: argparse.Namespace) -> list[str]:
    """Return the config and the overrides of the command."""
    overrides = {
        "model.base": args.work / "base",
        "data.train": args.work / "data.jsonl",
        "calibration.samples": args.samples,
        "calibration.sequence_len": args.sequence_len,
        "evaluation.tasks": "[demo_hellaswag]",
    }
    words = [f"{key}={value}" for key, value in overrides.items()]
    return ["--config", str(ROOT / CONFIGS[args.shape]), *words, *args.set]


def run_stage(args: argparse.Namespace, run_dir: Path) -> float:
    """Run the script and return its seconds.

    Raises:
        CalledProcessError: it failed.
    """
    command = [sys.executable, f"{STAGE}.py", *arguments(args), "--run-dir", str(run_dir)]
    begun = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return time.monotonic() - begun


def kill_and_resume(args: argparse.Namespace, run_dir: Path, layer: int) -> float:
    """Kill the script once a layer is finished, run it again, and return the second's seconds.

    Raises:
        RuntimeError: it ended before.
        CalledProcessError: the second run failed.
    """
    command = [sys.executable, f"{STAGE}.py", *arguments(args), "--run-dir", str(run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    while not (run_dir / STAGE / f"work/layer-{layer:05d}.json").exists():
        if process.poll() is not None:
            raise RuntimeError(f"{STAGE} ended before layer {layer} was finished")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tell(f"killed after layer {layer}")
    return run_stage(args, run_dir)


def compare(run_dir: Path, other: Path) -> tuple[int, list[str]]:
    """Return the number of equal files of two results, and the names of those that differ."""
    found = []
    for folder in (run_dir, other):
        manifest = read_manifest(folder, STAGE) or {}
        found.append({row["path"]: row["sha256"] for row in manifest["outputs"]})
    names = sorted({*found[0], *found[1]})
    different = [name for name in names if found[0].get(name) != found[1].get(name)]
    return len(names) - len(different), different


def layer_rows(case: dict[str, Any], run_dir: Path) -> tuple[Rows, float]:
    """Return rows of each layer's parts, and the median seconds of the layers after the first."""
    rows, totals = [], []
    for path in sorted((run_dir / STAGE / "work").glob("layer-*.json")):
        seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        of_layer = case | {"layer": int(path.stem.split("-")[1])}
        for part in (*COMPUTED, *BESIDE):
            rows.append(row(of_layer, "sparselong", f"{part}_seconds", seconds.get(part, 0.0), "s"))
        totals.append(sum(seconds.get(part, 0.0) for part in COMPUTED))
        rows.append(row(of_layer, "sparselong", "layer_seconds", totals[-1], "s"))
    return rows, statistics.median(totals[1:] or totals)


def run_rows(case: dict[str, Any], config: Config, run_dir: Path, seconds: float) -> Rows:
    """Return rows of a finished run: seconds, their prediction, and peak memory."""
    manifest = read_manifest(run_dir, STAGE)
    assert manifest is not None, "the script succeeded"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    planned = make_plan(config, device, gpu_name())
    figures = {
        "script_seconds": seconds,
        "seconds": manifest["seconds"],
        "predicted_seconds": planned.seconds[STAGE],
        "hash_seconds": manifest["metrics"]["seconds_by_part"]["hash"],
    }
    rows = [row(case, "sparselong", name, value, "s") for name, value in figures.items()]
    peaks = {"planned": planned.stage_memory(STAGE)[1], **manifest["peak_bytes"]}
    for name, peak in peaks.items():
        rows.append(row(case, "sparselong", f"peak_bytes: {name}", peak, "bytes"))
    return rows


def measure(args: argparse.Namespace) -> bool:
    """Write the base, run the stage and write the rows; return whether all went well."""
    machine, command, subject = machine_of(args), command_of(__file__, args), SUBJECTS[args.shape]
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tell("writing the base checkpoint")
    write_base(args.work / "base", WIDTHS[args.shape], args.layers, device, tell)
    write_data(args.work / "data.jsonl", args.samples, args.sequence_len)
    if device == "cuda":
        torch.cuda.empty_cache()  # the script uses this GPU
    case = {
        "shape": args.shape,
        "layers": args.layers,
        "samples": args.samples,
        "sequence_len": args.sequence_len,
    }
    given, run_dir, killed = arguments(args), args.work / "run", args.work / "killed"
    config, different = load(given[1], given[2:]), []
    seconds = run_stage(args, run_dir)
    rows, median = layer_rows(case, run_dir)
    rows += run_rows(case, config, run_dir, seconds)
    rows.append(row(case, "sparselong", "median_layer_seconds", median, "s"))
    published = PUBLISHED.get(f"openai/gpt-oss-{args.shape}")
    if published is not None:
        whole = median * published.layers
        rows.append(row(case, "sparselong", "all_layers_seconds", whole, "s"))
    write(subject, machine, command, rows, args.folder)
    if args.kill_at is not None:
        again = kill_and_resume(args, killed, args.kill_at)
        equal, different = compare(run_dir, killed)
        of_kill = case | {"killed_after_layer": args.kill_at}
        rows.append(row(of_kill, "sparselong", "resumed_seconds", again, "s"))
        rows.append(row(of_kill, "sparselong", "equal_files", equal, "1"))
        rows.append(row(of_kill, "sparselong", "different_files", len(different), "1"))
        tell(f"{equal} files equal, {len(different)} differ: {different[:4]}")
    for each in rows:
        if "layer" not in each["case"]:
            tell(f"{each['metric']}: {each['value']:.6g} {each['unit']}")
    tell(str(write(subject, machine, command, rows, args.folder)))
    return not different


def main() -> None:
    """Run the benchmark; exit 1 if a resumed run's files differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", default="120b", choices=WIDTHS)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--sequence-len", type=int, default=2048, help="tokens of each")
    parser.add_argument("--kill-at", type=int, help="kill after this layer, and resume")
    parser.add_argument("--set", nargs="*", default=[], help="further config overrides")
    text = "directory for the base and the runs, made again"
    parser.add_argument("--work", type=Path, default=ROOT / "runs/compress_rate", help=text)
    add_result(parser)
    args = parser.parse_args()
    args.work = args.work.resolve()
    if args.kill_at is not None and not 0 <= args.kill_at < args.layers - 1:
        parser.error(f"--kill-at: allowed are 0 to {args.layers - 2}, a layer before the last")
    if args.shape != "tiny" and not torch.cuda.is_available():
        print("benchmarks/compress_rate.py needs a CUDA device: nothing measured")
        return
    if not measure(args):
        sys.exit(1)


if __name__ == "__main__":
    main()
