#!/usr/bin/env python3
"""One layer's experts in gpt-oss's shape: 32 experts of 2,880 / 2,880, top-4, weights in MXFP4.

The whole pass is timed: sorting, gathering, products, biases, gate, weighted sum; forward without
gradients, and forward with gradients of the input and the routing weights. `balanced` routing gives
every expert the same number of rows, `random` draws each token's experts. Our backends are compared
with transformers' grouped_mm experts over bf16 weights (four times the memory), and with two lower
bounds that compute only the products: torch's grouped product in bf16, and a dense matmul of equal
FLOPs. Arms whose names begin with `lora` have rank-8 adapters in bf16 on both projections, and
gradients of these too: ours, and those of two packages if installed (`expert_lora_arms.py`).

Each backend's error against fp64 is measured first. No speed is reported if it exceeds twice that
of plain torch in bf16; that of a package with adapters is, with a row that says so. TFLOP/s count 2
FLOPs per weight and row, and twice that with gradients. GB/s count the packed bytes of the selected
experts, each read once; adapters count as nothing. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.attention import measure_peak, tell, time_in_turn
from benchmarks.command_line import add_result, command_of, has_device, machine_of
from benchmarks.expert_lora_arms import (
    FACTORS,
    PACKAGES,
    LoraRun,
    adapters_of,
    draw_factors,
    make_lora,
    make_lora_runs,
    not_measured,
)
from benchmarks.record import row, write
from sparselong.kernels.expert_stack import ExpertStack, PackedWeight
from sparselong.kernels.experts.op import MOST_CHOICES, expert_mlp
from sparselong.packing import mxfp4
from tests.references.expert_mlp import expert_mlp_reference

EXPERTS, TOP_K, WIDTH = 32, 4, 2880
WEIGHTS = 3 * WIDTH * WIDTH
"""Weights of one expert: gate, up and down."""
PACKED_BYTES = WEIGHTS * 17 // 32
OURS = ("generation", "small", "packed", "decode", "chosen")
LEAVES = ("x", "routing_weights")
GRADIENTS = ("dx", "dweights", *(f"d{factor}" for factor in FACTORS))
Call = dict[str, torch.Tensor]
Run = Callable[[Call], torch.Tensor]


def draw_stack() -> ExpertStack:
    """Return the layer's packed weights, drawn at random."""
    torch.manual_seed(0)
    weights = []
    for out in (2 * WIDTH, WIDTH):
        shape = (EXPERTS, out, WIDTH // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device="cuda")
        scales = torch.randint(116, 121, shape, dtype=torch.uint8, device="cuda")
        bias = torch.randn(EXPERTS, out, device="cuda").bfloat16()
        weights.append(PackedWeight(blocks, scales, bias))
    return ExpertStack(*weights)


def draw(tokens: int, routing: str) -> Call:
    """Return x, indices, weights and dout for a number of tokens."""
    torch.manual_seed(tokens)
    if routing == "balanced":  # consecutive entries of one repeated permutation: all different
        turn = torch.randperm(EXPERTS, device="cuda")
        indices = turn[torch.arange(tokens * TOP_K, device="cuda") % EXPERTS].view(tokens, TOP_K)
        indices = indices[torch.randperm(tokens, device="cuda")]
    else:
        indices = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, device="cuda").softmax(1).bfloat16()
    x, dout = (torch.randn(tokens, WIDTH, device="cuda").bfloat16() for _ in range(2))
    return {
        "x": x.requires_grad_(),
        "expert_indices": indices,
        "routing_weights": weights.requires_grad_(),
        "dout": dout,
    }


def make_ours(name: str, stack: ExpertStack) -> Run:
    """Return one of our backends as a function of a call."""
    backend = None if name == "chosen" else name

    def run(call: Call) -> torch.Tensor:
        inputs = {key: tensor for key, tensor in call.items() if key != "dout"}
        return expert_mlp(**inputs, stack=stack, backend=backend)

    return run


def make_transformers(stack: ExpertStack) -> Run:
    """Return transformers' grouped_mm experts over the decoded weights."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = GptOssExperts(config)
    for name, packed in zip(stack._fields, stack, strict=True):
        parts = [mxfp4.decode(packed.blocks[e], packed.scales[e]).T for e in range(EXPERTS)]
        weight = torch.stack([part.contiguous() for part in parts])
        for suffix, tensor in (("", weight), ("_bias", packed.bias)):
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            setattr(module, f"{name}_proj{suffix}", parameter)
    return lambda call: module(call["x"], call["expert_indices"], call["routing_weights"])


def list_floors(entries: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Return functions that compute only the products of balanced rows, by backend and pass."""
    rows, pairs = (torch.randn(entries, n, device="cuda").bfloat16() for n in (WIDTH, 2 * WIDTH))
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16)
    down = gate_up[:, :WIDTH]
    ends = torch.arange(1, EXPERTS + 1, device="cuda", dtype=torch.int32) * (entries // EXPERTS)

    def grouped(backward: bool) -> None:
        torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
        torch._grouped_mm(rows, down.transpose(1, 2), offs=ends)
        if backward:
            torch._grouped_mm(rows, down, offs=ends)
            torch._grouped_mm(pairs, gate_up, offs=ends)

    def dense(backward: bool) -> None:
        torch.mm(rows, gate_up[0].T)
        torch.mm(rows, down[0].T)
        if backward:
            torch.mm(rows, down[0])
            torch.mm(pairs, gate_up[0])

    return {
        name: {
            "forward": functools.partial(function, False),
            "forward_backward": functools.partial(function, True),
        }
        for name, function in (("torch_grouped_mm", grouped), ("dense_matmul", dense))
    }


def forward(run: Run, call: Call) -> tuple[torch.Tensor, ...]:
    """Return the output, computed without gradients."""
    with torch.no_grad():
        return (run(call),)


def forward_backward(run: Run, call: Call) -> tuple[torch.Tensor, ...]:
    """Return the output and the gradients of LEAVES and of the adapters' factors."""
    out, factors = run(call), run.factors if isinstance(run, LoraRun) else ()
    leaves = [call[name] for name in LEAVES]
    return (out, *torch.autograd.grad(out, [*leaves, *factors], call["dout"]))


def refer(stack: ExpertStack, call: Call) -> torch.Tensor:
    """Return the output of the reference, in the dtype of `call`."""
    return expert_mlp_reference(call["x"], call["expert_indices"], call["routing_weights"], stack)


def make_adapted_reference(stack: ExpertStack) -> LoraRun:
    """Return the reference with adapters, in fp64."""
    leaves = [factor.double().requires_grad_() for factor in draw_factors(stack)]

    def compute(call: Call) -> torch.Tensor:
        inputs = (call["x"], call["expert_indices"], call["routing_weights"])
        return expert_mlp_reference(*inputs, stack, adapters_of(leaves))

    return LoraRun(compute, leaves, list)


class Part(NamedTuple):
    """Backends whose errors have one yardstick: plain torch's in the same dtype."""

    runs: dict[str, Run]
    reference: Run
    yardstick: str
    torch: Run
    tokens: int = 128
    trained: bool = True


def list_parts(runs: dict[str, Run], stack: ExpertStack) -> list[Part]:
    """Return the backends by what their errors are compared with."""
    plain, torch_run = functools.partial(refer, stack), make_ours("torch", stack)
    lora = {name: run for name, run in runs.items() if isinstance(run, LoraRun)}
    decoding = {name: run for name, run in runs.items() if name == "generation"}
    trained = {name: run for name, run in runs.items() if name not in lora | decoding}
    few = MOST_CHOICES // TOP_K
    parts = [Part(decoding, plain, "torch", torch_run, few, False)] if decoding else []
    parts += [Part(trained, plain, "torch", torch_run)] if trained else []
    if lora:
        adapted_torch = make_lora(stack, draw_factors(stack), "torch")
        parts.append(Part(lora, make_adapted_reference(stack), "lora_torch", adapted_torch))
    return parts


def measure_errors(runs: dict[str, Run], stack: ExpertStack) -> tuple[list[dict], set[str]]:
    """Return rows of relative L2 errors against fp64, and the backends that fail."""
    rows, failed = [], set()
    for part in list_parts(runs, stack):
        call = draw(part.tokens, "random")
        exact_call = call | {name: call[name].detach().double().requires_grad_() for name in LEAVES}
        exact_call["dout"] = call["dout"].double()
        function = forward_backward if part.trained else forward
        exact = function(part.reference, exact_call)
        case = {"rows_per_expert": part.tokens * TOP_K / EXPERTS, "tokens": part.tokens}
        case |= {"routing": "random"}
        limits = [2 * error for error in find_errors(function, part.torch, call, exact)]
        for name, run in {part.yardstick: part.torch, **part.runs}.items():
            try:
                errors = find_errors(function, run, call, exact)
            except Exception as error:
                if name not in PACKAGES:
                    raise
                rows.append(not_measured(name, error))
                failed.add(name)
                continue
            for what, value in zip(("out", *GRADIENTS), errors, strict=False):
                rows.append(row(case, name, f"error_{what}", value, "1"))
            if all(error <= limit for error, limit in zip(errors, limits, strict=True)):
                continue
            tell(f"{name}: errors {errors}, allowed {limits}")
            rows.append(row(case, name, "error_exceeds_limit", 1, "1"))
            if name not in PACKAGES:
                failed.add(name)
    return rows, failed


def find_errors(
    function: Callable[..., tuple[torch.Tensor, ...]],
    run: Run,
    call: Call,
    exact: tuple[torch.Tensor, ...],
) -> list[float]:
    """Return relative L2 errors of the output and of the gradients that are computed."""
    found = list(function(run, call))
    if isinstance(run, LoraRun):
        found[3:] = run.restore(found[3:])
    pairs = zip(found, exact, strict=True)
    return [float(((g - e).norm() / e.norm()).detach()) for g, e in pairs]


def measure_case(runs: dict[str, Run], tokens: int, routing: str, floors: bool) -> list[dict]:
    """Return rows of one case for every backend, timed alternately."""
    call = draw(tokens, routing)
    entries = tokens * TOP_K
    active = int(call["expert_indices"].unique().numel())
    case: dict[str, Any] = {"rows_per_expert": entries / EXPERTS, "tokens": tokens}
    case |= {"routing": routing}
    others = list_floors(entries) if floors else {}
    rows = []
    for function, factor in ((forward, 1), (forward_backward, 2)):
        what = function.__name__
        calls = {
            name: functools.partial(function, run, call)
            for name, run in runs.items()
            if function is forward or name != "generation"
        }
        for each in calls.values():
            each()  # kernels that are tuned at their first call take memory for that
        peaks = {name: measure_peak(each) for name, each in calls.items()}
        taken = time_in_turn(calls | {name: passes[what] for name, passes in others.items()})
        for name, ms in taken.items():
            rate = factor * 2 * entries * WEIGHTS / ms / 1e9
            rows.append(row(case, name, f"{what}_ms", ms, "ms"))
            rows.append(row(case, name, f"{what}_rate", rate, "TFLOP/s"))
            if function is forward and name in OURS:
                bandwidth = active * PACKED_BYTES / ms / 1e6
                rows.append(row(case, name, f"{what}_bandwidth", bandwidth, "GB/s"))
            if name in peaks:
                rows.append(row(case, name, f"{what}_peak_bytes", peaks[name], "bytes"))
        shown = "  ".join(f"{name} {ms:.3f}" for name, ms in taken.items())
        tell(f"{tokens:6} tokens {routing:8} {what:16} {shown}")
    return rows


def select(runs: dict[str, Run], tokens: int) -> dict[str, Run]:
    """Return the backends worth timing: of ours, those that might be chosen."""
    rows = tokens * TOP_K / EXPERTS
    skipped = {"small"} if rows > 64 else {"decode"} if rows < 64 else set()
    skipped |= {"generation"} if tokens * TOP_K > MOST_CHOICES else set()
    if rows < 32:  # only training has adapters
        skipped |= {name for name, run in runs.items() if isinstance(run, LoraRun)}
    return {name: run for name, run in runs.items() if name not in skipped}


def main() -> None:
    """Measure all cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rows", nargs="*", type=int, default=[32, 64, 128, 256, 512, 1024, 2048])
    add_result(parser)
    args = parser.parse_args()
    if not has_device(__file__):
        return
    stack = draw_stack()
    runs: dict[str, Run] = {name: make_ours(name, stack) for name in OURS}
    runs["transformers"] = make_transformers(stack)
    adapted, rows = make_lora_runs(stack)
    runs |= adapted
    errors, failed = measure_errors(runs, stack)
    rows += errors
    runs = {name: run for name, run in runs.items() if name not in failed}
    machine = machine_of(args)
    cases = [(tokens, "random", False) for tokens in args.tokens]
    for number, routing in itertools.product(args.rows, ("balanced", "random")):
        cases.append((number * EXPERTS // TOP_K, routing, routing == "balanced"))
    for tokens, routing, has_floors in cases:
        rows += measure_case(select(runs, tokens), tokens, routing, has_floors)
        path = write("expert_gemm", machine, command_of(__file__, args), rows, args.folder)
        print(path, file=sys.stderr)  # written each time, in case a later case fails


if __name__ == "__main__":
    main()
