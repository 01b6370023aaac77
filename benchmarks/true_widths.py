#!/usr/bin/env python3
"""The four scripts on a checkpoint of gpt-oss-120b's true widths, with experts shared by all GPUs.

A base with random weights in the published form (`base_checkpoint.py`: 128 experts, vocabulary
201,088, fewer layers) goes through 01_health, 02_compress, 03_finetune and 04_eval as configured
for a user, with few samples and steps; sequence, experts and vocabulary are shared by all GPUs.
Stage 04 is then repeated with one process that holds everything, in a second run directory of links
to the first one's files. Both must agree: perplexities, the losses of
each conversation and the log-likelihood of every ending to 1e-3 relative, and the most likely
ending of every item, except where the best two are closer than that. `contrast` says how far apart
base and compressed model are, which are different: a comparison that does not see much more there
sees nothing.

Exit code 1 if a stage fails, a manifest is missing, the comparison fails, or stage 04 takes more
memory of a GPU than stage 03 does. Each stage's rows are
written as soon as it is done. `--widths tiny` runs the same on a CPU, in two processes and to 1e-6.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.base_checkpoint import write_base
from benchmarks.command_line import add_result, command_of, machine_of
from benchmarks.record import row, write
from sparselong.run import read_manifest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("01_health", "02_compress", "03_finetune", "04_eval")
MODELS = ("base", "compressed", "finetuned")
TOLERANCES = {"true": 1e-3, "tiny": 1e-6}
"""Relative difference that rounding explains, in bf16 and in fp32."""
CONFIGS = {"true": "configs/gpt-oss-120b-4x3090.yaml", "tiny": "configs/tiny.yaml"}
FEW = {
    **{"calibration.samples": 8, "data.train": "demo", "training.gradient_accumulation_steps": 1},
    **{"training.max_steps": 4, "training.eval_steps": 4, "training.save_steps": 4},
    **{"evaluation.tasks": "[demo_hellaswag]", "evaluation.limit": 32},
    **{"evaluation.perplexity_samples": 16, "evaluation.batch_size": 8},
    "evaluation.health_prompts": 0,
}
"""Overrides with which the stages take as little time as they can."""
CALIBRATED = 1024
"""Tokens of a calibration sample."""
BEGUN = time.monotonic()
Rows = list[dict[str, Any]]


def tell(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - BEGUN:6.1f} s] {text}", file=sys.stderr, flush=True)


def run_stage(stage: str, args: argparse.Namespace, run_dir: Path, processes: int) -> float:
    """Run a stage's script with experts and sequence shared by processes; return its seconds.

    Raises:
        CalledProcessError: the stage failed.
    """
    overrides = FEW | {
        "model.base": args.work / "base",
        "sequence_len": args.sequence_len,
        "calibration.sequence_len": min(CALIBRATED, args.sequence_len),
        "sequence_parallel_degree": processes,
        "expert_parallel_degree": processes,
    }
    command = [sys.executable, f"{stage}.py", "--config", CONFIGS[args.widths]]
    command += ["--run-dir", str(run_dir), *(f"{key}={value}" for key, value in overrides.items())]
    tell(f"{stage} for {processes} processes")
    begin = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    seconds = time.monotonic() - begin
    tell(f"{stage} done in {seconds:.1f} s")
    return seconds


def read_rows(stage: str, case: dict[str, Any], run_dir: Path, seconds: float) -> Rows:
    """Return a finished stage's rows: seconds of the script and of its manifest, peak bytes.

    Raises:
        FileNotFoundError: the stage has no manifest.
    """
    manifest = read_manifest(run_dir, stage)
    if manifest is None or manifest["status"] != "done":
        raise FileNotFoundError(f"{stage} wrote no manifest to {run_dir}")
    case = case | {"stage": stage}
    rows = [
        row(case, "sparselong", "script_seconds", seconds, "s"),
        row(case, "sparselong", "seconds", manifest["seconds"], "s"),
    ]
    for device, peak in manifest["peak_bytes"].items():
        rows.append(row(case, "sparselong", f"peak_bytes: {device}", peak, "bytes"))
    return rows


def fits_as_training(run_dir: Path) -> bool:
    """Return whether stage 04 took no more memory of any GPU than stage 03 did."""
    trained, evaluated = (
        (read_manifest(run_dir, stage) or {})["peak_bytes"] for stage in ("03_finetune", "04_eval")
    )
    more = {
        device: peak
        for device, peak in evaluated.items()
        if device != "host" and peak > trained[device]
    }
    if more:
        tell(f"04_eval took more memory than 03_finetune: {more}, {trained}")
    return not more


def check_shared(run_dir: Path, processes: int) -> None:
    """Raise ValueError unless stage 04 measured in these processes, which its log says."""
    said = f"measuring in {processes} processes"
    if said not in (run_dir / "04_eval/log.txt").read_text(encoding="utf-8"):
        raise ValueError(f"04_eval did not say that it was {said}")


def link_run(run_dir: Path, folder: Path) -> None:
    """Make a run directory with links to the files of stages 01 to 03."""
    shutil.copytree(
        run_dir,
        folder,
        symlinks=True,
        copy_function=os.link,
        ignore=shutil.ignore_patterns("04_eval*"),
    )


def compare(one: dict[str, Any], shared: dict[str, Any], tolerance: float) -> dict[str, float]:
    """Compare a model's results (`04_eval/<model>.json`) of one process with those of several.

    Returns:
        Largest relative differences, `flips` (items with another most likely ending), the smallest
        and the largest flipped `margin` between the best two endings, relative to the best, and
        `failures`: figures beyond the tolerance and flips at a larger margin.

    Raises:
        ValueError: the two were measured on different items or conversations.
    """
    pairs = {
        "perplexity": [[r["perplexity"]["supervised"]["perplexity"] for r in (one, shared)]],
        "conversation_nll": [
            [a[0], b[0]] for a, b in _both(one, shared, "perplexity", "conversations")
        ],
        "log_likelihood": [],
    }
    margins, flipped = [], []
    for task in one["tasks"]:
        for a, b in _both(one, shared, "tasks", task, "log_likelihoods"):
            pairs["log_likelihood"] += zip(a, b, strict=True)
            best, second = sorted(a, reverse=True)[:2]
            margins.append((best - second) / abs(best))
            if a.index(best) != b.index(max(b)):
                flipped.append(margins[-1])
    differences = {name: [abs(b - a) / abs(a) for a, b in values] for name, values in pairs.items()}
    # Written so that a difference that is no number counts.
    beyond = sum(not d <= tolerance for values in differences.values() for d in values)
    return {
        **{f"{name}_difference": max(values) for name, values in differences.items()},
        "log_likelihood_difference_median": statistics.median(differences["log_likelihood"]),
        "items": len(margins),
        "flips": len(flipped),
        "smallest_margin": min(margins),
        "largest_flipped_margin": max(flipped, default=0.0),
        "failures": beyond + sum(not margin < tolerance for margin in flipped),
    }


def _both(one: dict[str, Any], other: dict[str, Any], *path: str) -> list[tuple[Any, Any]]:
    for key in path:
        one, other = one[key], other[key]
    return list(zip(one, other, strict=True))


def compare_runs(shared: Path, one: Path, case: dict[str, Any]) -> tuple[Rows, bool]:
    """Return the rows of all models' comparisons, and whether all agree."""
    rows, failures, tolerance = [], 0.0, TOLERANCES[case["widths"]]
    results = {
        name: [
            json.loads((folder / f"04_eval/{name}.json").read_text("utf-8"))
            for folder in (one, shared)
        ]
        for name in MODELS
    }
    for name, pair in results.items():
        found = compare(pair[0], pair[1], tolerance)
        failures += found["failures"]
        tell(f"{name}: {json.dumps(found)}")
        for metric, value in found.items():
            rows.append(row(case | {"model": name}, "sparselong", metric, value, "1"))
    contrast = compare(results["base"][0], results["compressed"][0], tolerance)
    for metric in ("log_likelihood_difference_median", "flips"):
        tell(f"contrast {metric}: {contrast[metric]}")
        rows.append(row(case | {"model": "contrast"}, "sparselong", metric, contrast[metric], "1"))
    return rows, failures == 0


def measure(args: argparse.Namespace) -> bool:
    """Run everything, write the rows after each stage, and return whether all went well."""
    processes = args.processes
    for name in ("base", "shared", "one"):
        shutil.rmtree(args.work / name, ignore_errors=True)
    case = {"widths": args.widths, "layers": args.layers, "processes": processes}
    machine, command = machine_of(args), command_of(__file__, args)
    rows: Rows = []
    tell("writing the base checkpoint")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.monotonic()
    write_base(args.work / "base", args.widths, args.layers, device, tell)
    rows.append(row(case, "sparselong", "base_seconds", time.monotonic() - begin, "s"))
    size = sum(path.stat().st_size for path in (args.work / "base").iterdir())
    rows.append(row(case, "sparselong", "base_bytes", size, "bytes"))
    if device == "cuda":
        torch.cuda.empty_cache()  # the scripts use this GPU
    run_dir, alone = args.work / "shared", args.work / "one"
    try:
        for stage in STAGES:
            seconds = run_stage(stage, args, run_dir, processes)
            rows += read_rows(stage, case, run_dir, seconds)
            write("true_widths", machine, command, rows, args.folder)
        check_shared(run_dir, processes)
        link_run(run_dir, alone)
        seconds = run_stage("04_eval", args, alone, 1)
        rows += read_rows("04_eval", case | {"processes": 1}, alone, seconds)
    except (subprocess.CalledProcessError, FileNotFoundError, ValueError) as error:
        tell(f"failed: {error}")
        write("true_widths", machine, command, rows, args.folder)
        return False
    compared, agree = compare_runs(run_dir, alone, case)
    write("true_widths", machine, command, [*rows, *compared], args.folder)
    tell("one process and several agree" if agree else "one process and several DISAGREE")
    return fits_as_training(run_dir) and agree


def main() -> None:
    """Run the benchmark; exit 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="true", choices=CONFIGS)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequence-len", type=int, default=8192)
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs/true_widths",
        help="directory for `base`, `shared` and `one`, made again; 8 layers take about 20 GB",
    )
    add_result(parser)
    args = parser.parse_args()
    args.work = args.work.resolve()
    gpus = torch.cuda.device_count()
    if args.widths == "true" and gpus < 2:
        print("benchmarks/true_widths.py needs two or four CUDA devices: nothing measured")
        return
    args.processes = gpus if gpus > 1 else 2
    if not measure(args):
        sys.exit(1)


if __name__ == "__main__":
    main()
