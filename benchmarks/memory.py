#!/usr/bin/env python3
"""Predicted and measured peak memory of stage 03's training step, in gpt-oss-20b's shape.

Each case is `train_step.py`'s `masked` arm in a new process: random packed weights, a few real
steps, the peak GPU memory (torch's reserved memory and the CUDA context). It is compared with the
planner's prediction for the same length, batch, layers, rank and checkpointing. Cases run one after
another because the context is measured as memory of the whole GPU, which no other process may use;
the next process only imports meanwhile. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command_line import add_result, has_device, machine_of
from benchmarks.record import row, write
from sparselong import memory
from sparselong.config import schema as config

CASES: tuple[dict[str, Any], ...] = (
    {"tokens": 1024, "batch": 2},
    {"tokens": 4096},
    {"tokens": 8192, "rank": 64},
    {"tokens": 16384},
    {"tokens": 16384, "keep_attention": "never"},
    {"tokens": 16384, "layers": 12},
    {"tokens": 8192, "batch": 2, "layers": 6, "keep_attention": "never"},
    {"tokens": 32768, "offload": True, "keep_attention": "never"},
    {"tokens": 32768, "offload": True},
    {"tokens": 32768, "slice_rows": 8192, "keep_attention": "never"},
    {"tokens": 65536, "slice_rows": 8192, "offload": True, "keep_attention": "never"},
    {"tokens": 4096, "keep_experts": "always"},
    {"tokens": 8192, "keep_experts": 15},
    {"tokens": 16384, "keep_experts": 3},
)
DEFAULTS = {
    "batch": 1,
    "layers": 24,
    "rank": 16,
    "cap_gib": None,
    "keep_attention": "always",
    "keep_experts": "never",
    "offload": False,
    "slice_rows": "never",
    "placement": "gpu",
    "attention_backend": "auto",
}
FILE = Path(__file__).resolve().parent.parent / "configs" / "gpt-oss-20b-1x3090.yaml"


def predict(case: dict[str, Any], *further: str) -> memory.Memory:
    """Return the planner's memory of a case, by component; `further` are more overrides."""
    shape, asked = describe(case, *further)
    return memory.finetune_memory(shape, asked, held=held_in(case), kept=kept_in(case))


def kept_in(case: dict[str, Any]) -> memory.Kept:
    """Return what the case's layers keep.

    `keep_experts` is `always`, `never` or a number of layers; older files lack it: `never`.
    """
    asked = case.get("keep_experts", "never")
    experts = {"always": case["layers"], "never": 0}.get(asked, asked)
    return memory.Kept(case["keep_attention"] == "always", int(experts))


def held_in(case: dict[str, Any]) -> memory.Held:
    """Return how the case's process holds the experts."""
    return memory.Held(1, case.get("placement", "gpu"))


def describe(case: dict[str, Any], *further: str) -> tuple[Any, config.Config]:
    """Return a case's shape and config, as the planner takes them.

    Cases in older files have no `slice_rows`, which means `never`, and neither a placement nor an
    attention backend: experts on the GPU, and the fastest.
    """
    overrides = {
        "sequence_len": case["tokens"],
        "micro_batch_size": case["batch"],
        "lora.r": case["rank"],
        "training.offload_checkpoints": str(case["offload"]).lower(),
        "training.slice_rows": case.get("slice_rows", "never"),
        "attention_backend": case.get("attention_backend", "auto"),
    }
    asked = config.load(FILE, [f"{key}={value}" for key, value in overrides.items()] + [*further])
    layers = case["layers"]
    shape = dataclasses.replace(
        memory.PUBLISHED["openai/gpt-oss-20b"], layers=layers, full_layers=layers // 2
    )
    return shape, asked


def settle(case: dict[str, Any], cap_bytes: int) -> dict[str, Any]:
    """Return how stage 03 would let the layers of a case compute within a GPU's memory.

    What the case says of it itself does not matter, but `keep_experts` is `auto`, `always` or
    `never`.
    """
    asked_to_keep = f"training.keep_experts={case['keep_experts']}"
    shape, asked = describe(case | {"offload": "auto", "slice_rows": "auto"}, asked_to_keep)
    held = held_in(case)
    settled = memory.settle(shape, asked, held, 1, cap_bytes)
    kept = memory.decide_kept(shape, settled, cap_bytes, held=held)
    return {
        "slice_rows": str(settled.training.slice_rows),
        "offload": settled.training.offload_checkpoints is True,
        "attention_backend": settled.attention_backend,
        "keep_attention": "always" if kept.attention else "never",
        "keep_experts": kept.experts,
    }


def measure(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one case in this process, after the parent signals that the GPU is free."""
    from benchmarks import train_step

    sys.stdin.readline()
    args = argparse.Namespace(**case, arm="masked", spare=0, profile=False, warm_up=2, rounds=1)
    rows = train_step.measure(args)
    kept = ("allocated_bytes", "context_bytes", "device_bytes")
    found = {r["metric"]: r["value"] for r in rows if r["metric"] in kept}
    predicted = predict(case).peak_bytes
    error = predicted / found["device_bytes"] - 1
    name = "masked"
    results = [row(case, name, metric, value, "bytes") for metric, value in found.items()]
    results.append(row(case, name, "predicted_bytes", predicted, "bytes"))
    results.append(row(case, name, "relative_error", error, "1"))
    print(f"  predicted {predicted / 2**30:.2f} GiB: {error:+.1%}", file=sys.stderr, flush=True)
    return results


def start(number: int, folder: Path) -> subprocess.Popen[str]:
    """Start the process of one case, which waits for a line on stdin before it uses the GPU."""
    command = [sys.executable, __file__, "--case", str(number), "--out", folder / f"{number}.json"]
    return subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, text=True)


def main() -> None:
    """Measure the chosen cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    add_result(parser)
    for name in ("--case", "--out"):  # for the process of one measurement
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        rows = measure(DEFAULTS | CASES[int(args.case)])
        Path(args.out).write_text(json.dumps(rows), encoding="utf-8")
        return
    if not has_device(__file__):
        return
    machine = machine_of(args)
    rows: list[dict[str, Any]] = []
    numbers = " ".join(map(str, args.cases))
    command = f"python3 benchmarks/memory.py --machine {machine} --cases {numbers}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ahead = start(args.cases[0], folder)
        for place, number in enumerate(args.cases):
            process, following = ahead, args.cases[place + 1 : place + 2]
            if following:
                ahead = start(following[0], folder)
            process.communicate("go\n")
            if process.returncode != 0:
                ahead.kill()
                sys.exit(f"case {number} failed: {CASES[number]}")
            rows += json.loads((folder / f"{number}.json").read_text(encoding="utf-8"))
            write("memory", machine, command, rows, args.folder)  # in case a later one fails


if __name__ == "__main__":
    main()
