"""Attention on a GPU: output and gradients of every backend against fp64, on odd shapes.

The error bound is measured: our kernels may err at most twice as much as torch's FlashAttention-2
with the sink correction on the same inputs and dtype, by largest deviation and by relative RMS.
Memory that kernels must fill is filled with NaN first.
"""

import dataclasses

import pytest
import torch

from sparselong.kernels.attention import flash_attn_4
from sparselong.kernels.attention import triton_launch as attention_triton
from sparselong.kernels.attention.mask import AttentionCall, Mask
from sparselong.kernels.attention.op import attention
from sparselong.runtime import using
from tests.poisoned import PoisonedTorch
from tests.references.attention import attention_reference

NAMES = ("out", "dq", "dk", "dv", "dsinks")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; the name says what it covers."""

    name: str
    tokens: int
    batch: int = 1
    heads: int = 16
    kv_heads: int = 2
    keys: int | None = None
    offset: int = 0
    window: int | None = None
    boundaries: tuple[int, ...] | None = None
    sink: float | None = None
    logits: float = 1.0
    layout: str = "token"


def pack(*lengths: int) -> tuple[int, ...]:
    return tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))


CASES = [
    *(Case(f"length_{n}", n) for n in (1, 127, 128, 129, 1000, 4096)),
    *(Case(f"window_length_{n}", n, window=128) for n in (1, 127, 128, 129, 1000, 4096)),
    Case("window_larger_than_sequence", 300, window=1000),
    Case("window_of_one_key", 200, window=1),
    Case("window_not_a_block", 1000, window=77),
    Case("window_wider_than_a_tile", 1000, window=500),
    Case("many_documents", 1000, boundaries=pack(*([1, 2, 63, 64, 65, 5] * 5))),
    Case("many_documents_window", 1000, window=128, boundaries=pack(*([1, 2, 63, 64, 65, 5] * 5))),
    Case("only_documents_of_one", 130, boundaries=tuple(range(131))),
    Case("long_documents", 4096, boundaries=pack(1, 1500, 1, 129, 2465)),
    Case("long_documents_window", 4096, window=128, boundaries=pack(1, 1500, 1, 129, 2465)),
    Case("one_document_as_packing", 777, boundaries=(0, 777)),
    Case("empty_document", 300, boundaries=(0, 100, 100, 300)),
    Case("batch", 333, batch=3),
    Case("batch_window", 333, batch=3, window=128),
    Case("batch_packed", 200, batch=3, boundaries=(0, 50, 350, 400, 401, 600)),
    Case("sinks_high", 1000, sink=40.0),
    Case("sinks_low", 1000, sink=-40.0),
    Case("sinks_high_window", 1000, sink=40.0, window=128),
    Case("sinks_equal", 1000, sink=0.5),
    Case("sinks_matter", 500, sink=6.0),
    Case("large_logits", 1000, logits=30.0),
    Case("large_logits_window", 1000, logits=30.0, window=128),
    Case("shard_of_queries", 300, keys=1000, offset=500),
    Case("shard_of_queries_window", 300, keys=1000, offset=500, window=128),
    Case("last_shard", 300, keys=1000, offset=700),
    Case("just_behind", 64, keys=128, offset=64),
    Case("shard_packed", 300, keys=1000, offset=500, boundaries=pack(400, 150, 1, 200, 249)),
    Case("shard_packed_window", 300, keys=1000, offset=500, window=128,
         boundaries=pack(400, 150, 1, 200, 249)),
    Case("halo", 256, keys=383, offset=127, window=128),
    Case("decode", 1, keys=1000, offset=999),
    Case("decode_window", 1, batch=2, keys=1000, offset=999, window=128),
    Case("decode_long_cache", 1, heads=64, kv_heads=8, keys=5000, offset=4999),
    Case("decode_sinks_high", 1, keys=3000, offset=2999, sink=40.0),
    Case("decode_sinks_low", 1, keys=3000, offset=2999, sink=-40.0),
    Case("decode_large_logits", 1, keys=3000, offset=2999, logits=8.0),
    Case("decode_padded_batch", 1, batch=3, keys=1200, offset=1199,
         boundaries=(0, 700, 1200, 1201, 2400, 3590, 3600)),
    Case("decode_wide_window", 1, batch=2, keys=3000, offset=2999, window=1500),
    Case("decode_five_queries", 5, batch=2, keys=2000, offset=1995),
    Case("decode_five_queries_packed", 5, keys=2000, offset=1995, boundaries=pack(900, 1098, 2)),
    Case("decode_before_the_cache_ends", 2, keys=3000, offset=700),
    Case("decode_group_of_six", 3, heads=12, kv_heads=2, keys=1000, offset=997),
    Case("one_head_a_group", 257, heads=4, kv_heads=4),
    Case("one_head_a_group_window", 257, heads=4, kv_heads=4, window=128),
    Case("group_of_six", 257, heads=12, kv_heads=2, window=128),
    Case("gpt_oss_heads", 600, heads=64, kv_heads=8),
    Case("gpt_oss_heads_window", 600, heads=64, kv_heads=8, window=128),
    Case("head_major", 300, layout="head"),
    Case("every_second_token", 300, layout="strided", window=128),
    Case("dims_not_contiguous", 300, layout="dims"),
]  # fmt: skip


def draw(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw q, k, v, sinks and dout for the case."""
    torch.manual_seed(len(case.name))
    keys = case.keys or case.tokens

    def tensor(heads: int, tokens: int) -> torch.Tensor:
        size = (case.batch, heads, tokens, 64)
        if case.layout == "head":
            return torch.randn(size, device="cuda").to(dtype)
        if case.layout == "strided":
            wide = torch.randn(case.batch, 2 * tokens, heads, 64, device="cuda").to(dtype)
            return wide[:, ::2].transpose(1, 2)
        if case.layout == "dims":
            return torch.randn(case.batch, heads, 64, tokens, device="cuda").to(dtype).mT
        return torch.randn(case.batch, tokens, heads, 64, device="cuda").to(dtype).transpose(1, 2)

    q, k, v = (
        tensor(case.heads, case.tokens),
        tensor(case.kv_heads, keys),
        tensor(case.kv_heads, keys),
    )
    q = q * case.logits
    sinks = torch.randn(case.heads, device="cuda") * 2
    if case.sink is not None:
        sinks = torch.full_like(sinks, case.sink)
    return [q, k, v, sinks, tensor(case.heads, case.tokens)]


def run(case: Case, inputs: list[torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
    """Return output, lse and gradients of the public function."""
    q, k, v, sinks = (t.detach().requires_grad_() for t in inputs[:4])
    cu = case.boundaries and torch.tensor(case.boundaries, dtype=torch.int32, device="cuda")
    out, lse = attention(
        q, k, v, sinks, cu_seqlens=cu, window=case.window, query_offset=case.offset,
        backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(out, (q, k, v, sinks), inputs[4])
    return dict(zip((*NAMES, "lse"), (out, *grads, lse), strict=True))


def run_exactly(case: Case, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same results from the fp64 reference."""
    q, k, v, sinks = (t.detach().double().requires_grad_() for t in inputs[:4])
    out, lse = attention_reference(
        q, k, v, sinks, boundaries=case.boundaries, window=case.window, offset=case.offset
    )
    grads = torch.autograd.grad(out, (q, k, v, sinks), inputs[4].double())
    exact = dict(zip((*NAMES, "lse"), (out, *grads, lse), strict=True))
    # A sink's gradient is a sum of products with `out`: the norm of its terms, fp64 [heads], is how
    # their rounding errors add up.
    terms = torch.exp(sinks[:, None] - lse)[..., None] * inputs[4] * out
    return exact | {"terms of dsinks": terms.detach().square().sum((0, 2, 3)).sqrt()}


def deviations(got: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Return the largest absolute deviation, and the RMS error relative to the exact RMS."""
    difference = got.double() - exact
    rms = exact.norm() + 1e-300
    return difference.abs().max().item(), (difference.norm() / rms).item()


def check(case: Case, got: dict, yardstick: dict, exact: dict, dtype: torch.dtype) -> None:
    # Allow one rounding error where FlashAttention-2 happens to be exact. A sink's gradient is one
    # number a head, so there FlashAttention-2's error says little: allow about three standard
    # deviations of what rounding the probabilities and then `out` makes of the sum.
    rounding = torch.finfo(dtype).eps / 2
    for name in NAMES:
        assert torch.isfinite(got[name]).all(), f"{case.name}: {name} is not finite"
        least, least_rms = rounding * exact[name].abs().max().item(), rounding
        if name == "dsinks":
            by_head = 2 * rounding * exact["terms of dsinks"]
            least = max(least, by_head.max().item())
            least_rms = max(rounding, (by_head.norm() / (exact[name].norm() + 1e-300)).item())
        largest, rms = deviations(got[name], exact[name])
        largest_allowed, rms_allowed = deviations(yardstick[name], exact[name])
        assert largest <= max(2 * largest_allowed, least), (
            f"{case.name}: {name} is off by {largest:.2e}, FlashAttention-2 {largest_allowed:.2e}"
        )
        assert rms <= max(2 * rms_allowed, least_rms), (
            f"{case.name}: {name}'s relative RMS error is {rms:.2e}, FlashAttention-2's "
            f"{rms_allowed:.2e}"
        )
    torch.testing.assert_close(got["lse"].double(), exact["lse"], rtol=1e-5, atol=2e-4)


@pytest.fixture
def needs_flash_attn_4():
    """Skip, with the backend's own words, where FlashAttention-4 cannot run."""
    q = torch.empty(1, 8, 300, 64, device="cuda", dtype=torch.bfloat16)
    refusal = flash_attn_4.refuse(q, AttentionCall(Mask(1, 300, 300, 0, None, None), 0.125))
    if refusal is not None:
        pytest.skip(refusal)


@pytest.fixture
def poison(monkeypatch):
    """Make the launcher's torch.empty and torch.empty_like return NaN."""
    monkeypatch.setattr(attention_triton, "torch", PoisonedTorch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_our_kernels_err_no_more_than_twice_flash_attention(case, dtype, poison):
    inputs = draw(case, dtype)
    exact = run_exactly(case, inputs)
    check(case, run(case, inputs, "triton"), run(case, inputs, "torch_flash"), exact, dtype)


@pytest.mark.parametrize(
    "name", ["length_1000", "window_length_1000", "shard_packed", "decode_five_queries_packed"]
)
def test_fp32_is_accurate_to_fp32(name, poison):
    case = next(c for c in CASES if c.name == name)
    inputs = draw(case, torch.float32)
    exact, got = run_exactly(case, inputs), run(case, inputs, "triton")
    for key in NAMES:
        assert deviations(got[key], exact[key])[1] < 2e-6, key


@pytest.mark.parametrize(
    "name",
    [
        "length_128",
        "length_1000",
        "batch",
        "sinks_high",
        "large_logits",
        "last_shard",
        "just_behind",
    ],
)
def test_cudnn_errs_no_more_than_twice_flash_attention(name):
    case = next(c for c in CASES if c.name == name)
    inputs = draw(case, torch.bfloat16)
    exact, yardstick = run_exactly(case, inputs), run(case, inputs, "torch_flash")
    check(case, run(case, inputs, "torch_cudnn"), yardstick, exact, torch.bfloat16)


@pytest.mark.usefixtures("needs_flash_attn_4")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flash_attention_4_errs_no_more_than_twice_flash_attention_2(case):
    """Windows of several sizes and documents of several lengths run in the same process: they are
    arguments of the compiled kernels, not parts of them."""
    inputs = draw(case, torch.bfloat16)
    exact, yardstick = run_exactly(case, inputs), run(case, inputs, "torch_flash")
    check(case, run(case, inputs, "flash_attn_4"), yardstick, exact, torch.bfloat16)


@pytest.mark.usefixtures("needs_flash_attn_4")
@pytest.mark.parametrize("sinks_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_flash_attention_4_takes_fp16_and_sinks_of_any_type(sinks_dtype):
    case = Case("fp16", 1000)
    inputs = draw(case, torch.float16)
    inputs[3] = inputs[3].to(sinks_dtype)
    exact, yardstick = run_exactly(case, inputs), run(case, inputs, "torch_flash")
    got = run(case, inputs, "flash_attn_4")
    assert got["dsinks"].dtype == sinks_dtype
    check(case, got, yardstick, exact, torch.float16)


@pytest.mark.usefixtures("needs_flash_attn_4")
def test_flash_attention_4_is_chosen_and_compiles_no_kernel_for_another_length():
    from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]

    def count() -> int:
        functions = (interface._flash_attn_fwd, interface._flash_attn_bwd)
        return sum(len(function.compile_cache.cache) for function in functions)

    first = Case("first", 4096, heads=64, kv_heads=8)
    run(first, draw(first, torch.bfloat16), "flash_attn_4")
    before = count()
    assert before >= 2
    for case in (
        first,
        Case("another", 5003, heads=64, kv_heads=8),
        Case("shard", 1024, heads=8, kv_heads=1, keys=8192, offset=7168),
    ):
        inputs = draw(case, torch.bfloat16)
        chosen, named = run(case, inputs, None), run(case, inputs, "flash_attn_4")
        assert torch.equal(chosen["out"], named["out"]), case.name
        assert count() == before, case.name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flash_attention_with_sinks_is_exact(case):
    """The yardstick itself must be as close to fp64 as bf16 allows."""
    inputs = draw(case, torch.bfloat16)
    exact, got = run_exactly(case, inputs), run(case, inputs, "torch_flash")
    for name in NAMES:
        size = exact[name].abs().max().item()
        if size > 1e-6:
            assert deviations(got[name], exact[name])[0] < 0.05 * size, f"{case.name}: {name}"


@pytest.mark.parametrize("backend", ["triton", "torch_flash", "flash_attn_4", None])
@pytest.mark.parametrize(
    "case",
    [
        Case("repeat", 2000, heads=64, kv_heads=8),
        Case("repeat_packed", 2000, heads=64, kv_heads=8, boundaries=pack(300, 1500, 1, 199)),
        Case("repeat_decode", 1, heads=64, kv_heads=8, keys=9000, offset=8999),
    ],
    ids=lambda case: case.name,
)
def test_deterministic_runs_are_bit_identical(case, backend, request):
    if backend == "flash_attn_4":
        request.getfixturevalue("needs_flash_attn_4")
    inputs = draw(case, torch.bfloat16)
    with using(deterministic=True):
        first = run(case, inputs, backend)
        for _ in range(3):
            again = run(case, inputs, backend)
            assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_chosen_backend_handles_every_case():
    for case in CASES:
        inputs = draw(case, torch.bfloat16)
        exact, yardstick = run_exactly(case, inputs), run(case, inputs, "torch_flash")
        check(case, run(case, inputs, None), yardstick, exact, torch.bfloat16)


def test_decoding_uses_the_split_kernel(monkeypatch):
    """One query over a long cache; the tests above rely on it using the split kernel."""
    parts = []
    launch = attention_triton._launch_split
    monkeypatch.setattr(
        attention_triton, "_launch_split", lambda *a: parts.append(a[0].shape) or launch(*a)
    )
    case = next(c for c in CASES if c.name == "decode_long_cache")
    run(case, draw(case, torch.bfloat16), "triton")
    run(case, draw(case, torch.bfloat16), None)
    assert len(parts) == 2


def test_memory_does_not_grow_with_the_square_of_the_length():
    peaks = []
    for tokens in (8192, 16384):
        inputs = draw(Case("memory", tokens), torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(Case("memory", tokens), inputs, "triton")
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del inputs
    assert peaks[1] < 2.1 * peaks[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "torch_cudnn", "window": 128}, "window: 128"),
        ({"backend": "torch_cudnn", "query_offset": 5}, "query_offset: 5"),
        ({"backend": "torch_flash", "query_offset": 5}, "query_offset: 5"),
    ],
)
def test_a_named_backend_is_never_replaced(change, message):
    q, k, v, sinks, _ = draw(Case("refuse", 200), torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, sinks, **change)


def test_a_named_backend_without_a_deterministic_form_is_refused():
    q, k, v, sinks, _ = draw(Case("refuse", 200), torch.bfloat16)
    with using(deterministic=True), pytest.raises(ValueError, match="deterministic: True"):
        attention(q, k, v, sinks, backend="torch_cudnn")


def test_cpu_sinks_and_odd_head_dims_are_refused():
    q, k, v, sinks, _ = draw(Case("refuse", 20), torch.bfloat16)
    with pytest.raises(ValueError, match="sinks: on cpu"):
        attention(q, k, v, sinks.cpu())
    with pytest.raises(ValueError, match="head_dim: 32; allowed on a GPU: 64"):
        attention(q[..., :32], k[..., :32], v[..., :32], sinks)
