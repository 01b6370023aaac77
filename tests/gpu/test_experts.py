"""The experts' pass on a GPU: every backend against fp64, output and all gradients, odd shapes.

The bound is a measured one: plain torch on the same inputs in bf16, expert by expert, makes some
error; our kernels may make twice that, by largest deviation and by relative RMS. Memory that
kernels are to fill is filled with NaN first.
"""

import dataclasses
import subprocess
import sys

import pytest
import torch

from sparselong.kernels.decode import experts as expert_generation
from sparselong.kernels.expert_stack import ExpertStack, Gate, PackedWeight
from sparselong.kernels.experts import routing as expert_routing
from sparselong.kernels.experts import triton_launch
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands
from sparselong.kernels.experts.lora import NO_ADAPTERS
from sparselong.kernels.experts.op import ALPHA, LIMIT, expert_mlp
from sparselong.packing import mxfp4
from tests.poisoned import PoisonedTorch
from tests.references.expert_mlp import expert_mlp_reference

OURS = ("small", "packed", "decode")
LEAVES = ("x", "routing_weights", "gate_up_bias", "down_bias")
CALL = ("x", "expert_indices", "routing_weights")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; the name says why it is here."""

    name: str
    tokens: int
    experts: int = 8
    top_k: int = 4
    hidden: int = 256
    inner: int = 256
    only: tuple[int, ...] | None = None
    buffer_bytes: int | None = None


CASES = [
    *(Case(f"tokens_{n}", n) for n in (1, 2, 8, 31, 127, 128, 129, 1000)),
    Case("tiny_model", 300, hidden=128, inner=128),
    Case("narrow", 100, hidden=32, inner=32),
    Case("widths_no_multiple_of_a_tile", 300, hidden=96, inner=160),
    Case("all_on_one_expert", 500, top_k=1, only=(5,)),
    Case("empty_experts", 400, experts=32, top_k=2, only=(3, 4, 30)),
    Case("first_and_last_empty", 300, experts=8, top_k=2, only=(2, 3, 4)),
    Case("one_expert", 200, experts=1, top_k=1),
    Case("as_many_experts_as_120b", 300, experts=128, hidden=64, inner=64),
    Case("gpt_oss_widths", 300, experts=4, top_k=2, hidden=2880, inner=2880),
    Case("gpt_oss_widths_one_token", 1, experts=8, top_k=4, hidden=2880, inner=2880),
    Case("chunks_of_one_expert", 300, buffer_bytes=1),
    Case("a_last_chunk_that_is_short", 300, buffer_bytes=3 * 2 * 512 * 256),
]


def draw_weight(experts: int, out: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks, and scales that keep outputs near 1."""
    shape = (experts, out, width // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device="cuda")
    low = 123 - (width.bit_length() + 1) // 2
    return blocks, torch.randint(low, low + 5, shape, dtype=torch.uint8, device="cuda")


def draw(case: Case, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The tensors of a call by name, and dout."""
    torch.manual_seed(len(case.name))
    allowed = torch.tensor(case.only or range(case.experts), device="cuda")
    picks = torch.rand(case.tokens, len(allowed), device="cuda").argsort(1)[:, : case.top_k]
    call = {
        "x": torch.randn(case.tokens, case.hidden, device="cuda").to(dtype),
        "expert_indices": allowed[picks],
        "routing_weights": torch.rand(case.tokens, case.top_k, device="cuda").to(dtype),
        "dout": torch.randn(case.tokens, case.hidden, device="cuda").to(dtype),
    }
    stacks = (("gate_up", 2 * case.inner, case.hidden), ("down", case.hidden, case.inner))
    for name, out, width in stacks:
        call[f"{name}_blocks"], call[f"{name}_scales"] = draw_weight(case.experts, out, width)
        call[f"{name}_bias"] = torch.randn(case.experts, out, device="cuda").to(dtype)
    return call


def stack_of(call: dict[str, torch.Tensor]) -> ExpertStack:
    """The stack that a call's tensors make."""
    return ExpertStack(
        *(
            PackedWeight(*(call[f"{name}_{part}"] for part in PackedWeight._fields))
            for name in ExpertStack._fields
        )
    )


def apply(call: dict[str, torch.Tensor], backend: str | None = None) -> torch.Tensor:
    """The public function's output."""
    return expert_mlp(*(call[name] for name in CALL), stack_of(call), backend=backend)


def run(call: dict[str, torch.Tensor], backend: str | None) -> dict[str, torch.Tensor]:
    """Output and gradients through the public function."""
    leaves = {name: call[name].detach().requires_grad_() for name in LEAVES}
    out = apply(call | leaves, backend)
    grads = torch.autograd.grad(out, list(leaves.values()), call["dout"])
    return dict(zip(("out", *LEAVES), (out, *grads), strict=True))


def run_exactly(call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in fp64 by the reference."""
    leaves = {name: call[name].detach().double().requires_grad_() for name in LEAVES}
    given = call | leaves
    out = expert_mlp_reference(*(given[name] for name in CALL), stack_of(given))
    grads = torch.autograd.grad(out, list(leaves.values()), call["dout"].double())
    return dict(zip(("out", *LEAVES), (out, *grads), strict=True))


def deviations(got: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Largest absolute deviation, and RMS relative to the exact RMS."""
    difference = got.double() - exact
    return difference.abs().max().item(), (difference.norm() / (exact.norm() + 1e-300)).item()


def assert_close(name: str, got: dict, yardstick: dict, exact: dict) -> None:
    """That `got` is as near to `exact` as twice what plain torch gave, result by result."""
    rounding = torch.finfo(torch.bfloat16).eps / 2  # for what plain torch happens to get exactly
    for result, want in exact.items():
        assert torch.isfinite(got[result]).all(), f"{name}: {result} is not finite"
        largest, rms = deviations(got[result], want)
        largest_allowed, rms_allowed = deviations(yardstick[result], want)
        scale = want.abs().max().item()
        assert largest <= max(2 * largest_allowed, rounding * scale), (
            f"{name}: {result} is off by {largest:.2e}, plain torch {largest_allowed:.2e}"
        )
        assert rms <= max(2 * rms_allowed, rounding), (
            f"{name}: {result}'s relative RMS error is {rms:.2e}, torch's {rms_allowed:.2e}"
        )


@pytest.fixture
def poison(monkeypatch):
    """torch.empty and torch.empty_like, as the launchers see them, give NaN, or 77."""
    for module in (triton_launch, expert_routing, expert_generation):
        monkeypatch.setattr(module, "torch", PoisonedTorch())


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_err_no_more_than_twice_plain_torch(case, backend, poison, monkeypatch):
    if case.buffer_bytes is not None:
        monkeypatch.setattr(triton_launch, "BUFFER_BYTES", case.buffer_bytes)
    call = draw(case)
    assert_close(case.name, run(call, backend), run(call, "torch"), run_exactly(call))


@pytest.mark.parametrize("case", [c for c in CASES if c.tokens <= 8], ids=lambda case: case.name)
def test_generation_errs_no_more_than_twice_plain_torch(case, poison):
    call = draw(case)
    exact, yardstick = run_exactly(call)["out"], run(call, "torch")["out"]
    got = apply(call, "generation")
    assert torch.equal(got, apply(call, "generation"))
    assert_close(case.name, {"out": got}, {"out": yardstick}, {"out": exact})


def test_a_wrong_index_in_generation_gives_nan_to_its_token_alone():
    call = draw(Case("wrong_index", 3))
    call["expert_indices"][1, 2] = 8
    out = apply(call, "generation")
    assert torch.isnan(out[1]).all() and torch.isfinite(out[[0, 2]]).all()


@pytest.mark.parametrize("backend", OURS)
def test_fp32_is_exact_to_fp32(backend, poison):
    call = draw(Case("fp32", 100, hidden=96, inner=160), torch.float32)
    exact, got = run_exactly(call), run(call, backend)
    for name, want in exact.items():
        assert deviations(got[name], want)[1] < 2e-6, name


def test_every_byte_at_every_scale_decodes_to_the_bit():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    weight = PackedWeight(blocks.cuda(), scales.cuda(), scales.cuda())
    buffer = torch.full((1, 255, 512), float("nan"), dtype=torch.bfloat16, device="cuda")
    triton_launch.decode_into(buffer, weight, 0, 1)
    exact = mxfp4.decode(blocks, scales, torch.bfloat16)
    assert torch.equal(buffer.cpu().view(torch.int16), exact.view(torch.int16))


@pytest.mark.parametrize("backend", ["small", "packed"])
@pytest.mark.parametrize("backward", [False, True])
def test_decoding_in_the_product_is_exact(backend, backward):
    """The unit matrix times every byte at scales whose values bf16 holds as normal numbers."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 512, 1, 1)
    scales = torch.randint(2, 253, (1, 512, 16), dtype=torch.uint8)
    bias = torch.zeros(1, 512, device="cuda", dtype=torch.bfloat16)
    weight = PackedWeight(blocks.cuda(), scales.cuda(), bias)
    unit = torch.eye(512, device="cuda", dtype=torch.bfloat16)
    indices = torch.zeros(512, 1, dtype=torch.int64, device="cuda")
    rows = triton_launch.choose_tile(unit, backend, "forward").rows
    routing = expert_routing.sort_by_expert(indices, 1, rows)
    got = triton_launch.multiply(unit, weight, routing, backend, backward)
    exact = mxfp4.decode(blocks, scales, torch.bfloat16)[0]
    assert torch.equal(got.cpu(), exact if backward else exact.T)


@pytest.mark.parametrize("backend", [*OURS, None])
def test_runs_repeat_to_the_bit(backend):
    call = draw(Case("repeat", 700, experts=16))
    first = run(call, backend)
    for _ in range(3):
        again = run(call, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_sorting_is_stable_and_lists_every_tile():
    indices = torch.randint(0, 32, (5000, 4), device="cuda")
    indices[:, 1] = 7
    routing = expert_routing.sort_by_expert(indices, 32, 64)
    order = torch.sort(indices.flatten(), stable=True).indices
    expected = torch.empty_like(order)
    expected[order] = torch.arange(order.numel(), device="cuda")
    assert torch.equal(routing.positions.flatten().long(), expected)
    counts = torch.bincount(indices.flatten(), minlength=32)
    tiles = (counts + 63) // 64
    assert torch.equal(routing.starts.diff().long(), counts)
    assert torch.equal(routing.tile_starts.diff().long(), tiles)
    expert_of_tile = torch.repeat_interleave(torch.arange(32, device="cuda"), tiles)
    assert torch.equal(routing.tile_expert[: len(expert_of_tile)].long(), expert_of_tile)


def test_frozen_inputs_get_no_gradient_and_cost_none():
    call = draw(Case("frozen", 100))
    x = call["x"].requires_grad_()
    out = apply(call)
    out.backward(call["dout"])
    assert x.grad is not None and call["routing_weights"].grad is None


def test_decoding_never_holds_a_layer():
    """The largest allocation of a 32-expert pass in bf16 stays under a quarter GiB of weights."""
    case = Case("memory", 64, experts=32, top_k=4, hidden=2880, inner=2880)
    call = draw(case)
    for backend in OURS:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(call, backend)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < (1 << 28) + 32 * 64 * 4 * 2880 * 2, backend


def test_d_gate_up_may_take_gate_ups_place():
    """Pieces of a row, many rows at once, gpt-oss's widths: the same bits, less memory."""
    call = draw(Case("in_place", 4000, experts=4, hidden=2880, inner=2880))
    indices, weights = call["expert_indices"], call["routing_weights"]
    operands = ExpertOperands(stack_of(call), NO_ADAPTERS, Gate(ALPHA, LIMIT), "packed")
    rows = ExpertCall(call["x"], indices, weights)
    routing = triton_launch.sort(rows, operands)
    wide = triton_launch.run_gate_up(*rows[:2], operands, routing)
    saved = triton_launch.SavedForward(lambda: (wide, None), routing, indices, weights)
    results, peaks = [], []
    for overwrite in (False, True):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.append((torch.empty_like(call["x"]), torch.empty_like(weights)))
        gradients = triton_launch.Gradients(*results[-1])
        triton_launch.run_backward(call["dout"], saved, operands, gradients, overwrite)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert peaks[0] - peaks[1] > 0.45 * wide.nbytes  # the rows beside it peak elsewhere


def test_an_index_out_of_range_stops_the_device():
    code = (
        "import torch; from sparselong.kernels.experts.routing import sort_by_expert;"
        "sort_by_expert(torch.full((3, 1), 9, device='cuda'), 8, 64); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "none of [0, experts)" in done.stderr or "assert" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_refused(dtype):
    call = draw(Case("refuse", 10))
    with pytest.raises(ValueError, match="allowed with .*: torch.bfloat16, torch.float32"):
        apply(call | {"x": call["x"].to(dtype)})
