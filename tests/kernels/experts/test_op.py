"""Experts on a CPU: the reference by hand, torch's backend against it, the interpreted kernels,
argument checks and the choice of backend. tests/gpu covers the compiled kernels."""

from typing import Any

import numpy as np
import pytest
import torch

from sparselong.kernels.expert_stack import ExpertStack, PackedWeight
from sparselong.kernels.experts import op as experts_op
from sparselong.kernels.experts import triton_launch
from sparselong.kernels.experts.choice import BACKENDS, MEASURED, NO_LIMIT, choose_backend
from sparselong.kernels.experts.op import expert_mlp
from sparselong.packing import mxfp4
from sparselong.runtime.settings import using
from tests.kernels.emulated_ptx import run_ptx
from tests.kernels.run_interpreted import run_interpreted
from tests.references.expert_mlp import decode_reference, expert_mlp_reference

EXPERTS, HIDDEN, INNER = 5, 64, 96


def draw(tokens: int = 37, top_k: int = 4) -> dict[str, Any]:
    """Return expert_mlp's arguments by name; x is fp64 and large enough to reach the clamps."""
    torch.manual_seed(0)
    picks = [torch.randperm(EXPERTS)[:top_k] for _ in range(tokens)]
    found = {
        "x": torch.randn(tokens, HIDDEN, dtype=torch.float64) * 3,
        "expert_indices": torch.stack(picks),
        "routing_weights": torch.rand(tokens, top_k, dtype=torch.float64),
    }
    weights = []
    for out, width in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        shape = (EXPERTS, out, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, shape, dtype=torch.uint8)
        weights.append(PackedWeight(blocks, scales, torch.randn(EXPERTS, out, dtype=torch.float64)))
    return {**found, "stack": ExpertStack(*weights)}


def replace(stack: ExpertStack, **changes: torch.Tensor) -> ExpertStack:
    """Return the stack with some tensors replaced, by names such as gate_up_bias."""
    for name, tensor in changes.items():
        weight, part = name.rsplit("_", 1)
        stack = stack._replace(**{weight: getattr(stack, weight)._replace(**{part: tensor})})
    return stack


def test_the_reference_by_hand():
    """One token, one expert; each weight row selects one input."""
    codes = torch.zeros(64, 32, dtype=torch.uint8)
    codes[0, 3], codes[1, 4] = 2, 4  # gate 0 is x_3, up 0 is 2 x_4
    gate_up = mxfp4.pack_codes(codes)[None], torch.full((1, 64, 1), 127, dtype=torch.uint8)
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[5, 0] = 15  # output 5 is -6 h_0
    down = mxfp4.pack_codes(codes)[None], torch.full((1, 32, 1), 126, dtype=torch.uint8)
    x = torch.zeros(1, 32, dtype=torch.float64)
    x[0, 3], x[0, 4] = 9.0, -1.5
    out = expert_mlp_reference(
        x, torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 0.25),
        ((*gate_up, torch.zeros(1, 64)), (*down, torch.zeros(1, 32))),
    )  # fmt: skip
    h = (-3 + 1) * 7 / (1 + torch.exp(torch.tensor(-1.702 * 7, dtype=torch.float64)))
    expected = torch.zeros(1, 32, dtype=torch.float64)
    expected[0, 5] = 0.25 * -6 * 0.5 * h
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)


def test_reference_decoding_matches_packing():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1).repeat(1, 16)
    expected = mxfp4.decode(blocks, scales, torch.float32)
    assert torch.equal(decode_reference(blocks, scales).float(), expected)


def test_ptx_decodes_every_pair_of_codes_in_every_byte():
    """Emulate the PTX text: eight codes per word become four words of two bf16 values."""
    from sparselong.kernels.experts import triton_products as expert_kernels

    generator = np.random.default_rng(0)
    words = generator.integers(0, 1 << 32, 4096, dtype=np.uint32)
    words[:512:2] = np.arange(256, dtype=np.uint32) * 0x01010101  # every byte in every position
    found = run_ptx(expert_kernels.LOOK_UP_PTX.value, 4, [words])
    halves = [half for word in found for half in (word & 0xFFFF, word >> 16)]
    bits = torch.from_numpy(np.stack(halves, 1).astype(np.uint16).view(np.int16))
    blocks = torch.from_numpy(words.view(np.uint8)).view(-1, 1, 16)
    expected = mxfp4.decode(blocks, torch.full(blocks.shape[:2], 127, dtype=torch.uint8))
    assert torch.equal(bits.flatten(), expected.flatten().view(torch.int16))


@pytest.mark.parametrize("tokens", [1, 37])
def test_torch_backend_matches_the_reference(tokens):
    call = draw(tokens)
    stack, upstream = call["stack"], torch.randn_like(call["x"])
    given = (call["x"], call["routing_weights"], stack.gate_up.bias, stack.down.bias)
    results = []
    for function in (expert_mlp, expert_mlp_reference):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        x, weights, gate_up_bias, down_bias = leaves
        biased = replace(stack, gate_up_bias=gate_up_bias, down_bias=down_bias)
        out = function(x, call["expert_indices"], weights, biased)
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("tokens", [0, 37])
def test_a_residual_is_added_and_gets_the_gradient_of_the_sum(tokens):
    call = draw(tokens) if tokens else {name: each[:0] for name, each in draw().items()}
    call["stack"] = draw()["stack"]
    residual, upstream = torch.randn(2, tokens, HIDDEN, dtype=torch.float64)
    residual.requires_grad_()
    call["x"].requires_grad_()
    out, alone = expert_mlp(**call, residual=residual), expert_mlp(**call)
    assert torch.equal(out, residual + alone)
    dx, dresidual = torch.autograd.grad(out, (call["x"], residual), upstream)
    assert torch.equal(dresidual, upstream)
    assert torch.equal(dx, torch.autograd.grad(alone, call["x"], upstream)[0])


@pytest.fixture(scope="module")
def interpreted(forked_python) -> dict[str, dict[str, float]]:
    """Return the kernels' errors in Triton's interpreter, by case and backend."""
    return run_interpreted(forked_python, "interpreted_experts")


def test_interpreted_kernels_agree_with_fp64(interpreted):
    others = ("decoding", "held", "refused", "sorted")
    cases = {name: errors for name, errors in interpreted.items() if name not in others}
    assert len(cases) == 18
    for name, errors in cases.items():
        for result, error in errors.items():
            assert error < 1e-6, f"{name}: {result} is off by {error:.1e}"


def test_interpreted_decoding_is_exact_for_every_byte_and_scale(interpreted):
    assert interpreted["decoding"] == {"inexact": 0}


def test_interpreted_sort_is_stable_over_blocks_and_lists_every_tile(interpreted):
    assert all(all(found.values()) for found in interpreted["sorted"]), interpreted["sorted"]


def test_interpreted_sort_asserts_that_every_index_is_an_experts(interpreted):
    assert interpreted["refused"] == [-2, -1, 5, 6, 7, 1 << 32]


def test_without_gradients_gate_up_output_is_freed_before_down_runs(interpreted):
    assert interpreted["held"] == {"kept": 1, "not kept": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(37, 64, 1)}, r"x: torch.float32 \[37, 64, 1\]; allowed: floating"),
        ({"x": torch.zeros(36, 64)}, "expert_indices: 37 tokens; allowed: x's 36"),
        ({"x": torch.zeros(37, 40)}, "x: hidden size 40; allowed: a multiple of 32"),
        ({"expert_indices": torch.zeros(37, 4)}, "expert_indices: torch.float32"),
        (
            {"expert_indices": torch.zeros(37, 6, dtype=torch.int64)},
            "expert_indices: 6 experts per token; allowed: 1 to the layer's 5",
        ),
        ({"expert_indices": torch.full((37, 4), 5)}, "expert_indices: holds 5; allowed: 0 to 4"),
        ({"routing_weights": torch.zeros(37, 3)}, "routing_weights: torch.float32"),
        (
            {"residual": torch.zeros(37, 64)},
            r"residual: torch.float32 \[37, 64\]; allowed: x's torch.float64 \[37, 64\]",
        ),
        ({"backend": "fast"}, "backend: 'fast'; allowed: None, generation, small, packed"),
        ({"backend": "packed"}, "backend: packed with cpu tensors; allowed: torch"),
    ],
)
def test_bad_calls_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        expert_mlp(**(draw() | change))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "gate_up_blocks",
            torch.zeros(5, 192, 1, 16, dtype=torch.uint8),
            r"stack.gate_up.blocks: shape \[5, 192, 1, 16\]; allowed: \[5, 192, 2, 16\]",
        ),
        (
            "gate_up_blocks",
            torch.zeros(5, 96, 2, 16, dtype=torch.uint8),
            "stack.gate_up.blocks: 96 rows; allowed: a multiple of 64",
        ),
        (
            "gate_up_scales",
            torch.zeros(5, 192, 3, dtype=torch.uint8),
            r"stack.gate_up.scales: shape \[5, 192, 3\]; allowed: \[5, 192, 2\]",
        ),
        ("gate_up_bias", torch.zeros(5, 96), r"stack.gate_up.bias: .*allowed: \[5, 192\]"),
        (
            "down_blocks",
            torch.zeros(5, 64, 3, 16),
            "stack.down.blocks: torch.float32; allowed: tor",
        ),
        (
            "down_blocks",
            torch.zeros(5, 64, 6, 16, dtype=torch.uint8)[:, :, ::2],
            "stack.down.blocks: strides .*; allowed: contiguous",
        ),
        (
            "down_scales",
            torch.zeros(4, 64, 3, dtype=torch.uint8),
            r"stack.down.scales: shape \[4, 64, 3\]; allowed: \[5, 64, 3\]",
        ),
        ("down_bias", torch.zeros(5, 64).byte(), "stack.down.bias: torch.uint8; allowed: floating"),
        ("down_bias", torch.zeros(5, 64, device="meta"), "stack.down.bias: on meta; allowed: x's"),
    ],
)
def test_bad_stacks_are_named(name, tensor, message):
    call = draw()
    call["stack"] = replace(call["stack"], **{name: tensor})
    with pytest.raises(ValueError, match=message):
        expert_mlp(**call)


def test_no_tokens_give_no_output():
    call = draw()
    empty = {name: call[name][:0] for name in ("x", "expert_indices", "routing_weights")}
    assert expert_mlp(**(call | empty)).shape == (0, HIDDEN)


def test_inference_runs_in_slices_if_set(monkeypatch):
    call, sizes = draw(), []
    residual = torch.randn_like(call["x"])

    def run(part, operands, out, keep, exact, residual):
        assert operands.backend == "packed" and not keep and exact
        sizes.append(tuple(map(len, part)))
        torch.mul(part.x, 2, out=out)
        if residual is not None:
            out += residual

    monkeypatch.setattr(experts_op, "choose", lambda *_: "packed")
    monkeypatch.setattr(triton_launch, "run_forward", run)
    with using(inference_tokens=16):
        out = expert_mlp(**call)
    assert sizes == [(12,) * 3, (12,) * 3, (13,) * 3]
    assert torch.equal(out, 2 * call["x"])
    expert_mlp(**call)
    assert sizes[3:] == [(37,) * 3]
    with using(inference_tokens=16):
        assert torch.equal(expert_mlp(**call, residual=residual), out + residual)


def test_kernels_get_contiguous_inputs(monkeypatch):
    """Kernels index rows, routed tokens and weights as flat arrays."""
    call, seen = draw(), []
    for name in ("x", "expert_indices", "routing_weights"):
        call[name] = call[name].T.contiguous().T
    monkeypatch.setattr(experts_op, "choose", lambda *_: "packed")
    monkeypatch.setattr(triton_launch, "run_forward", lambda given, *_, **__: seen.append(given))
    expert_mlp(**call)
    (given,) = seen
    for got, name in zip(given, ("x", "expert_indices", "routing_weights"), strict=True):
        assert (
            got.is_contiguous() and torch.equal(got, call[name]) and not call[name].is_contiguous()
        )


def test_every_call_matches_a_row_of_the_table():
    assert choose_backend("cpu", 1, 32).backend == "torch"
    for architecture in (*MEASURED, "sm_80", "sm_86", "sm_89"):
        rows = [
            choose_backend(architecture, 32 * n, 32) for n in (0.125, 8, 100, 128, 512, 1 << 40)
        ]
        assert all(row.backend in BACKENDS and row.evidence for row in rows)
        assert rows[-1].up_to_rows == NO_LIMIT
        limits = [row.up_to_rows for row in rows]
        assert limits == sorted(limits)
