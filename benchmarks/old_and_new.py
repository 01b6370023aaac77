#!/usr/bin/env python3
"""Compare this checkout with another one of the project on one GPU.

    git archive --prefix=sparselong-before/ COMMIT sparselong benchmarks configs | tar x -C ..
    python3 benchmarks/old_and_new.py --old ../sparselong-before

Each checkout runs in its own process, with its own package and its own benchmarks/shape_20b. Both
processes stay alive and measure alternately, so that a slowdown of the machine affects both.
Measured in gpt-oss-20b's shape with random weights: training steps (wall time, kernel times and
their share of it, kernels, the host's launches of kernels, graphs and copies, peak memory), the
host's time for launching an empty kernel, one expert pass, attention of a full and of a window
layer (forward and backward, device time), and greedy generation. With `--cap-gib`, torch may
reserve only what the cap leaves of a card after the CUDA context, in either process, and the layers
of arm `masked` keep for the backward pass what each checkout's planner decides for that card, if it
computes whole layers: both checkouts get the same memory.

Only functions that both have are used, but for what layers keep. Needs memory for two models.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 128
STEP_METRICS = {
    "wall_ms": "ms",
    "kernel_ms": "ms",
    "kernel_share": "1",
    "tokens_per_second": "tokens/s",
    "launches": "1",
    "host_launches": "1",
    "peak_bytes": "bytes",
    "layers_keeping_experts": "1",
    "loss": "nats",
}

SPARE_BYTES = 700 << 20
"""Left for the CUDA context by a cap."""
HOST_LAUNCHES = ("LaunchKernel", "GraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
"""Parts of the names of runtime calls that start something on the GPU."""


class Worker:
    """A process that runs one checkout's measurements and answers over pipes."""

    def __init__(self, tree: Path):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env={
                **os.environ,
                "PYTHONPATH": f"{tree}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            },
        )

    def ask(self, **what: Any) -> dict[str, float]:
        """Send one request and wait for its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the worker exited with {self.process.wait()} during {what}")
        return json.loads(line)


class Measured:
    """The measurements of a worker; `handle` selects one by name."""

    def __init__(self) -> None:
        self.model: Any = None
        self.arm, self.layers = "", 0
        self.cap_bytes: int | None = None
        self.calls: dict[str, Callable[[], float]] = {}

    def build(self, arm: str, layers: int) -> dict[str, float]:
        """Build the model of an arm of shape_20b, or the model for generation."""
        import torch

        import sparselong
        from benchmarks import shape_20b

        self.model, self.calls = None, {}
        self.arm, self.layers = arm, layers
        gc.collect()
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        if arm == "generate":
            self.model = shape_20b.build_packed(shape_20b.config_20b(layers), "lora")
            sparselong.fuse(self.model)  # pyright: ignore[reportCallIssue]
            self.model.eval()
        else:
            self.model = shape_20b.build(arm, layers=layers)
        torch.cuda.synchronize()
        return {"bytes": torch.cuda.memory_allocated()}

    def step(self, tokens: int) -> dict[str, float]:
        """Measure wall time and peak memory of an optimizer step; then profile another one."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        kept = self._keep_as_planned(tokens) if self.cap_bytes and self.arm == "masked" else 0
        name = f"step {tokens}"
        if name not in self.calls:
            self.calls[name] = self._make_step(tokens)
        call = self.calls[name]
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        loss = call()
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - begin) * 1e3
        peak = torch.cuda.max_memory_allocated()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
        events: Any = trace.events()
        kernels = [e for e in events if e.device_time > 0]
        kernel_ms = sum(e.device_time for e in kernels) / 1e3
        calls = sum(any(part in e.name for part in HOST_LAUNCHES) for e in events)
        found = (wall_ms, kernel_ms, kernel_ms / wall_ms, tokens / wall_ms * 1e3)
        found += (len(kernels), calls, peak, kept, loss)
        return dict(zip(STEP_METRICS, found, strict=True))

    def launch(self) -> dict[str, float]:
        """Measure the host's time for launching a kernel that does nothing."""
        import torch

        seconds = []
        for _ in range(3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(500):
                torch.cuda._sleep(0)
            seconds.append((time.perf_counter() - begin) / 500)
        return {"launch_ms": statistics.median(seconds) * 1e3}

    def cap(self, gib: float) -> dict[str, float]:
        """Let torch reserve no more than a card of this size would have left.

        Layers of the model `masked` then keep what the planner decides for such a card.
        """
        import torch

        self.cap_bytes = int(gib * 2**30)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((gib * 2**30 - SPARE_BYTES) / total)
        return {}

    def _keep_as_planned(self, tokens: int) -> int:
        """Let layers keep what this checkout's planner decides for the capped card.

        Return how many of them keep their experts' output.
        """
        from benchmarks import memory, shape_20b

        assert self.cap_bytes is not None and self.layers is not None
        case = memory.DEFAULTS | {"tokens": tokens, "layers": self.layers, "keep_experts": "auto"}
        if not hasattr(memory, "settle"):
            return self._keep_as_planned_before_slices(case)
        settled = memory.settle(case, self.cap_bytes)
        if settled["slice_rows"] != "never" or settled["offload"]:  # whole layers do not fit
            settled |= {"keep_attention": "never", "keep_experts": "never"}
        # Older checkouts say `always` or `never`, newer ones a number of layers.
        asked = settled["keep_experts"]
        experts = {"always": self.layers, "never": 0}.get(asked, asked)
        kept = shape_20b.Kept(settled["keep_attention"] == "always", experts)
        shape_20b.compute_layers(self.model.get_base_model(), kept)
        return experts

    def _keep_as_planned_before_slices(self, case: dict[str, Any]) -> int:
        """Do the same in checkouts whose layers cannot compute in slices of rows."""
        from benchmarks import memory
        from sparselong.memory import fit
        from sparselong.runtime.recompute import checkpoint_contexts

        asked = memory.config.load(memory.FILE, [f"sequence_len={case['tokens']}"])
        shape = dataclasses.replace(
            memory.memory.PUBLISHED["openai/gpt-oss-20b"],
            layers=self.layers,
            full_layers=self.layers // 2,
        )
        kept = fit.decide_kept(shape, asked, self.cap_bytes)
        contexts = functools.partial(checkpoint_contexts, *kept)
        arguments = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
        self.model.get_base_model().gradient_checkpointing_enable(arguments)
        return self.layers * bool(kept.experts)

    def _make_step(self, tokens: int) -> Callable[[], float]:
        import torch

        torch.manual_seed(1)
        ids = torch.randint(self.model.config.vocab_size, (1, tokens), device="cuda")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def step() -> float:
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        for _ in range(2):  # compile the kernels and reserve memory
            step()
        return step

    def experts(self, tokens: int) -> dict[str, float]:
        """Measure the first layer's expert pass, forward and backward to its input."""
        import torch

        found = [m for n, m in self.model.named_modules() if n.endswith("mlp.experts")][0]
        config = self.model.config
        generator = torch.Generator(device="cuda").manual_seed(2)
        shape = (tokens, config.hidden_size)
        x = torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_()
        scores = torch.rand((tokens, config.num_local_experts), generator=generator, device="cuda")
        weights, chosen = scores.topk(config.num_experts_per_tok)
        upstream = torch.randn(shape, generator=generator, device="cuda").bfloat16()

        def call() -> object:
            return torch.autograd.grad(found(x, chosen, weights.bfloat16()), x, upstream)

        return {"device_ms": device_ms(call)}

    def attention(self, tokens: int, window: int | None) -> dict[str, float]:
        """Measure attention of 64/8 heads, forward and backward."""
        import torch

        from sparselong.kernels.attention import attention

        generator = torch.Generator(device="cuda").manual_seed(3)
        q, k, v = (
            torch.randn((1, heads, tokens, 64), generator=generator, device="cuda")
            .bfloat16()
            .requires_grad_()
            for heads in (64, 8, 8)
        )
        sinks = torch.randn(64, generator=generator, device="cuda")
        upstream = torch.randn(q.shape, generator=generator, device="cuda").bfloat16()

        def call() -> object:
            return torch.autograd.grad(
                attention(q, k, v, sinks, window=window)[0], (q, k, v), upstream
            )

        return {"device_ms": device_ms(call)}

    def generate(self, prompt: int, tokens: int) -> dict[str, float]:
        """Measure tokens per second of greedy generation after the first token."""
        import torch

        import sparselong

        torch.manual_seed(4)
        ids = torch.randint(self.model.config.vocab_size, (1, prompt), device="cuda")
        seconds = []
        for count in (2, 1, tokens):  # the first one compiles and captures
            torch.cuda.synchronize()
            begin = time.perf_counter()
            made = list(sparselong.generate(self.model, ids, count))  # pyright: ignore[reportCallIssue]
            seconds.append(time.perf_counter() - begin)
        return {"tokens_per_second": (len(made) - 1) / (seconds[2] - seconds[1])}

    def handle(self, what: dict[str, Any]) -> dict[str, float]:
        """Run the method that a request names."""
        return getattr(self, what.pop("do"))(**what)


def device_ms(call: Callable[[], object]) -> float:
    """Return the median device time of nine calls in ms, flushing the L2 cache before each."""
    import torch

    flush = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(12):
        for _ in range(4):  # also lets the host run ahead, as within a model
            flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def serve() -> None:
    """Answer requests from standard input until it ends."""
    import benchmarks.shape_20b  # noqa: F401  configures torch's allocator, which must precede CUDA

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not be taken for an answer
    measured = Measured()
    for line in sys.stdin:
        answers.write(json.dumps(measured.handle(json.loads(line))) + "\n")
        answers.flush()


def compare(workers: dict[str, Worker], pairs: int, **what: Any) -> list[dict[str, Any]]:
    """Ask each checkout `pairs` times, alternately; return rows of medians, extremes and ratios."""
    from benchmarks.record import row

    found: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for n in range(pairs):
        order = list(workers) if n % 2 == 0 else list(reversed(workers))
        for name in order:
            found[name].append(workers[name].ask(**what))
    case, rows = {"what": what.pop("do"), **what, "pairs": pairs}, []
    for metric in found["new"][0]:
        medians = {}
        for name, answers in found.items():
            values = [answer[metric] for answer in answers]
            medians[name] = statistics.median(values)
            unit = STEP_METRICS.get(metric, "ms" if metric.endswith("_ms") else "tokens/s")
            rows.append(row(case, name, metric, medians[name], unit))
            rows += [
                row(case, name, f"{metric}_lowest", min(values), unit),
                row(case, name, f"{metric}_highest", max(values), unit),
            ]
        ratio = medians["new"] / medians["old"] if medians["old"] else 1.0
        rows.append(row(case, "new", f"{metric}_ratio", ratio, "1"))
        print(
            f"{case} {metric}: old {medians['old']:.6g}, new {medians['new']:.6g}, "
            f"ratio {ratio:.4f}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def main() -> None:
    """Compare the checkouts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, help="the other checkout")
    parser.add_argument("--arms", nargs="+", default=["masked", "experts"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16_384])
    parser.add_argument("--layers", type=int, default=24, help="24 is the 20b")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--cap-gib", type=float, help="limit of each process")
    parser.add_argument("--steps-only", action="store_true", help="training steps and launches")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    sys.path.insert(0, str(ROOT))
    if "--worker" in sys.argv:
        sys.path.insert(0, str(parser.parse_args().worker))
        serve()
        return
    from benchmarks.command_line import add_result, command_of, has_device, machine_of
    from benchmarks.record import write

    add_result(parser)
    args = parser.parse_args()
    if not has_device(__file__):
        return
    if args.old is None:
        parser.error("--old: a checkout to compare with")
    machine, rows = machine_of(args), []
    workers = {"old": Worker(args.old.resolve()), "new": Worker(ROOT)}
    if args.cap_gib:
        for worker in workers.values():
            worker.ask(do="cap", gib=args.cap_gib)
    rows += compare(workers, args.pairs, do="launch")
    for kind in () if args.steps_only else (None, WINDOW):
        for tokens in args.lengths:
            rows += compare(workers, args.pairs, do="attention", tokens=tokens, window=kind)
    for arm in (*args.arms, *(() if args.steps_only else ("generate",))):
        for worker in workers.values():
            worker.ask(do="build", arm=arm, layers=args.layers)
        if arm == "generate":
            rows += compare(workers, args.pairs, do="generate", prompt=1024, tokens=256)
            continue
        for tokens in args.lengths:
            for entry in compare(workers, args.pairs, do="step", tokens=tokens):
                entry["case"] |= {"arm": arm, "cap_gib": args.cap_gib}
                rows.append(entry)
            if arm == args.arms[0] and not args.steps_only:
                rows += compare(workers, args.pairs, do="experts", tokens=tokens)
            path = write("old_and_new", machine, command_of(__file__, args), rows, args.folder)
            print(path, file=sys.stderr, flush=True)
    write("old_and_new", machine, command_of(__file__, args), rows, args.folder)


if __name__ == "__main__":
    main()
