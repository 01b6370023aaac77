"""Experts over packed MXFP4 with LoRA on both projections, of this project and of two packages.

| arm           | code                                                                           |
|---------------|--------------------------------------------------------------------------------|
| lora_chosen   | this project's `expert_mlp` with adapters, the backend by its table            |
| lora_axolotl  | axolotl 0.19's scattermoe_lora: its MXFP4 + LoRA kernels, its sort, its gate   |
| lora_nf4_gemm | grouped-nf4-gemm 0.51's ExpertsMxfp4LoRA over the published bytes, mode fused  |

Adapters are in bf16, those of lora_nf4_gemm in fp32, which is its default.

axolotl's own gpt-oss pass takes bf16 weights. Here its functions are called in the same order, with
the packed weights that they take for other models; nothing is copied or decoded beforehand. Its
kernels are tuned among the configurations in FORWARD and BACKWARD, which include all that axolotl
lists for this architecture, and not among the 144 and 16 that it tries for shapes it has no list
for: compiling them takes minutes.

Neither is ever imported by sparselong. An arm that cannot be imported, or fails, is recorded as not
measured, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.record import row
from sparselong.kernels.expert_stack import ExpertStack
from sparselong.kernels.experts.lora import Adapter, Adapters
from sparselong.kernels.experts.op import expert_mlp

Call = dict[str, torch.Tensor]
RANK, SCALING = 8, 2.0
AXOLOTL = "axolotl.integrations.kernels.libs.scattermoe_lora"
FORWARD = ((128, 64, 32, 4, 2), (128, 32, 64, 4, 2), (128, 32, 64, 8, 3), (128, 64, 64, 4, 2),
           (64, 64, 64, 4, 3), (64, 64, 128, 8, 2), (32, 64, 64, 4, 3))  # fmt: skip
"""Rows, columns and depth of a tile, warps and stages: axolotl's four for sm_90 and three more."""
BACKWARD = ((32, 64, 32, 4, 2), (64, 64, 32, 4, 2), (32, 32, 32, 4, 2), (64, 32, 32, 8, 3))
"""Rows, depth and columns likewise: axolotl's four."""
PACKAGES = ("lora_axolotl", "lora_nf4_gemm")
FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")


class LoraRun(NamedTuple):
    """An arm as a function of a call.

    Attributes:
        compute: returns the output.
        factors: A and B of gate_up and of down in the arm's own layouts; they require gradients.
        restore: turns the factors' gradients into [experts, r, in] and [experts, out, r].
    """

    compute: Callable[[Call], torch.Tensor]
    factors: Sequence[torch.Tensor]
    restore: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]

    def __call__(self, call: Call) -> torch.Tensor:
        """Return the output."""
        return self.compute(call)


def draw_factors(stack: ExpertStack) -> list[torch.Tensor]:
    """Return random A and B of gate_up and down in bf16, [experts, r, in] and [experts, out, r]."""
    generator = torch.Generator(device=stack.gate_up.blocks.device).manual_seed(7)
    factors = []
    for weight in stack:
        experts, out, groups, _ = weight.blocks.shape
        for shape, size in (((experts, RANK, 32 * groups), (32 * groups) ** -0.5),
                            ((experts, out, RANK), RANK**-0.5)):  # fmt: skip
            drawn = torch.randn(shape, generator=generator, device=generator.device)
            factors.append((drawn * size).bfloat16())
    return factors


def adapters_of(factors: Sequence[torch.Tensor]) -> Adapters:
    """Return the factors as this project's adapters."""
    pairs = (factors[:2], factors[2:])
    return Adapters(*(Adapter(a, b, SCALING) for a, b in pairs))


def make_lora_runs(stack: ExpertStack) -> tuple[dict[str, LoraRun], list[dict[str, Any]]]:
    """Return the arms that can be imported, and rows with the reasons why others cannot."""
    factors, runs, rows = draw_factors(stack), {}, []
    runs["lora_chosen"] = make_lora(stack, factors, None)
    for name, make in (("lora_axolotl", make_axolotl), ("lora_nf4_gemm", make_nf4_gemm)):
        try:
            runs[name] = make(stack, factors)
        except Exception as error:  # whatever a package's import raises, the others are measured
            rows.append(not_measured(name, error))
    return runs, rows


def not_measured(name: str, error: Exception) -> dict[str, Any]:
    """Return the row that says why an arm has no figures."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row({"reason": reason}, name, "not_measured", 1, "1")


def make_lora(stack: ExpertStack, factors: list[torch.Tensor], backend: str | None) -> LoraRun:
    """Return a backend of this project."""
    leaves = _leaves(factors)

    def compute(call: Call) -> torch.Tensor:
        inputs: dict[str, Any] = {key: tensor for key, tensor in call.items() if key != "dout"}
        return expert_mlp(**inputs, stack=stack, adapters=adapters_of(leaves), backend=backend)

    return LoraRun(compute, leaves, list)


def make_axolotl(stack: ExpertStack, factors: list[torch.Tensor]) -> LoraRun:
    """Return axolotl's kernels; its import raises without axolotl or what it needs itself."""
    names = (
        "experts",
        "kernels.lora_ops",
        "mx_weights",
        "parallel_experts",
        "parallel_linear_lora",
    )
    experts, operators, weights, routing, linear = (
        importlib.import_module(f"{AXOLOTL}.{name}") for name in names
    )
    multiply = linear.parallel_linear_lora
    _limit_tuning(operators)
    count = stack.experts
    packed = []
    for weight in stack:
        _, out, groups, _ = weight.blocks.shape
        blocks = weight.blocks.view(count, out, 16 * groups)
        packed.append(weights.MXWeights(blocks, weight.scales, K=32 * groups, N=out))
    leaves = _leaves(
        each.reshape(-1, each.shape[2]) if n % 2 == 0 else each.transpose(0, 1).flatten(1)
        for n, each in enumerate(factors)
    )

    def compute(call: Call) -> torch.Tensor:
        order = routing.flatten_sort_count(call["expert_indices"], num_experts=count)
        top_k = call["expert_indices"].shape[1]
        gate_up = multiply(
            call["x"], packed[0], top_k, *order, *leaves[:2], SCALING,
            expert_biases=stack.gate_up.bias, grouped_in=False, grouped_out=True,
        )  # fmt: skip
        return multiply(
            experts._gptoss_glu(gate_up, 1.702, 7.0), packed[1], 1, *order, *leaves[2:], SCALING,
            expert_biases=stack.down.bias, gates=call["routing_weights"],
            grouped_in=True, grouped_out=False,
        )  # fmt: skip

    def restore(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        a, b = (gradients[::2], gradients[1::2])
        a = [each.view(count, RANK, -1) for each in a]
        b = [each.unflatten(1, (count, RANK)).transpose(0, 1) for each in b]
        return [a[0], b[0], a[1], b[1]]

    return LoraRun(compute, leaves, restore)


def _limit_tuning(operators: Any) -> None:
    """Let the two packed kernels try only the configurations above."""
    from triton import Config

    kernels = (
        (operators._scatter2scatter_lora_mx, FORWARD, ("BLOCK_M", "BLOCK_N", "BLOCK_K")),
        (operators._scatter2scatter_lora_dX_mx, BACKWARD, ("BLOCK_M", "BLOCK_K", "BLOCK_N")),
    )
    for kernel, sizes, names in kernels:
        kernel.configs = [
            Config(dict(zip(names, each[:3], strict=True)), num_warps=each[3], num_stages=each[4])
            for each in sizes
        ]


def make_nf4_gemm(stack: ExpertStack, factors: list[torch.Tensor], mode: str = "fused") -> LoraRun:
    """Return grouped-nf4-gemm's experts; raise ImportError without the package."""
    package = importlib.import_module("mxfp4_qlora")
    flat = [tensor for weight in stack for tensor in (weight.blocks.flatten(2), weight.scales)]
    biases = [weight.bias for weight in stack]
    base = package.ExpertsMxfp4(*flat, *biases)
    module = package.ExpertsMxfp4LoRA(
        base, r=RANK, alpha=SCALING * RANK, dtype=torch.float32, mode=mode
    ).to(stack.gate_up.blocks.device)
    leaves = package.adapter_parameters(module)
    with torch.no_grad():
        for leaf, factor in zip(leaves, factors, strict=True):
            leaf.copy_(factor)

    def compute(call: Call) -> torch.Tensor:
        return module(call["x"], call["expert_indices"], call["routing_weights"])

    return LoraRun(compute, leaves, list)


def _leaves(factors: Any) -> list[torch.Tensor]:
    return [each.detach().contiguous().clone().requires_grad_() for each in factors]
