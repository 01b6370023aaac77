"""Generation kernels: in Triton's interpreter against fp64, and compiled for an RTX 3090."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparselong.kernels.decode import attention as generation_attention
from sparselong.kernels.decode import experts as expert_generation
from sparselong.kernels.decode import gemv as packed_gemv
from sparselong.kernels.decode import glue as generation_glue
from sparselong.kernels.dense import unpack as packed_unpack
from tests.kernels.run_interpreted import run_interpreted
from tests.kernels.test_sm86 import LIMIT_BYTES, read_report

FP16_SUMS = 2e-3
"""Experts sum eight products in fp16 and round the gate's output to fp16: at most 1.2e-3 in these
cases. Summing all sixteen products of a lane in fp16 would give 2.8e-3."""


@pytest.fixture(scope="module")
def results(forked_python):
    return run_interpreted(forked_python, "interpreted_generation")


def test_packed_gemv_is_exact_up_to_fp32_sums(results):
    cases = [row for name, row in results.items() if name.startswith("gemv")]
    assert len(cases) == 5
    for row in cases:
        assert row["out"] <= 1e-6 and row["with_residual"] <= 1e-6, row


def test_unpacked_weights_match_plain_torch(results):
    cases = [row for name, row in results.items() if name.startswith("unpack")]
    assert cases == [{"wrong": 0}] * 3


def test_experts_with_few_tokens(results):
    cases = [row for name, row in results.items() if name.startswith("experts")]
    assert len(cases) == 4
    for row in cases:
        assert row["out"] <= min(FP16_SUMS, 2 * row["plain_bf16"]), row


def test_a_wrong_index_of_an_expert_gives_no_number(results):
    assert results["wrong index of an expert"] == {"numbers": 0}


@pytest.mark.parametrize("kind", ["full", "window"])
def test_attention_with_the_cache_position_on_the_device(results, kind):
    row = results[f"attention {kind}"]
    assert row["out"] <= 1e-6 and row["left_in_counter"] == 0, row


def test_router_picks_like_a_stable_sort(results):
    row = results["route"]
    assert row["wrong_experts"] == row["left_in_counter"] == 0, row
    assert row["logits"] <= 1e-6 and row["weights"] <= 1e-6 and row["words"] <= 5e-4, row


def test_head_returns_the_token_and_its_embedding(results):
    row = results["head"]
    assert row["logits"] <= 1e-6 and row["hidden"] == 0, row
    assert row["wrong_token"] == row["wrong_position"] == row["nan_not_seen"] == 0, row


TYPES = {
    **dict.fromkeys(("best", "cleared", "position"), "*i64"),
    **dict.fromkeys(("counter", "indices", "words"), "*i32"),
    **dict.fromkeys(("factors", "logits", "part", "lse"), "*fp32"),
    **{f"{name}_{n}": kind for n in "123"
       for name, kind in (("codes", "*i64"), ("patterns", "*u8"), ("scales", "*i16"))},
    "planes": "*i16",
}  # fmt: skip
GEMV = {
    "ROWS": packed_gemv.ROWS,
    "LANES": 32 * packed_gemv.WARPS,
    "BLOCKS": 90,
    "GROUP": 2,
    "RESIDUAL": False,
    "PDL": False,
}
UNPACK = {"BLOCKS": 90, "GROUP": 2, "ROWS": packed_unpack.UNPACK_ROWS,
          "TILE": packed_unpack.UNPACK_BLOCKS}  # fmt: skip
EXPERTS = {"TOP_K": 4, "GROUPS": 90, "WARPS": expert_generation.TILE.warps, "PDL": False}
PACK = {"BLOCKS": 90, "TILE": 128, "NORM": True, "TOP": 13, "CODES": 14, "PDL": False}
ROUTE = {"BLOCKS": 90, "TILE": 128, "EXPERTS": 128, "TOP_K": 4, "TOP": 13, "CODES": 14}
HEAD = {"WIDTH": 2880, "ROWS": generation_glue.HEAD_ROWS, "COLUMNS": generation_glue.HEAD_COLUMNS}
ATTEND = {"HEADS": 64, "GROUP": 8, "D": 64, "PRECISION": "tf32", "PDL": False}
TILE = expert_generation.TILE
KERNELS = [
    (packed_gemv.gemv_kernel, GEMV | {"SPARSE": True}, packed_gemv.WARPS, {"x": "*i32"}),
    (packed_gemv.gemv_kernel, GEMV | {"SPARSE": True, "BLOCKS": 128, "RESIDUAL": True},
     packed_gemv.WARPS, {"x": "*i32"}),
    (packed_gemv.gemv_kernel, GEMV | {"SPARSE": False}, packed_gemv.WARPS, {"x": "*i32"}),
    (packed_unpack.unpack_kernel, UNPACK | {"SPARSE": True}, 4,
     {"codes": "*u8", "patterns": "*u8", "scales": "*i16"}),
    (generation_glue.pack_kernel, PACK | {"KIND": "pairs"}, 8, {"out": "*i16"}),
    (generation_glue.pack_kernel, PACK | {"KIND": "plain"}, 8, {}),
    (generation_glue.route_kernel, ROUTE | {"PDL": False}, 8, {}),
    (generation_glue.head_kernel,
     HEAD | {"BEST": True, "BIAS": False, "RESIDUAL": False, "PDL": False},
     generation_glue.HEAD_WARPS, {}),
    (generation_glue.embed_kernel, {"WIDTH": 2880, "TILE": 4096, "PDL": False}, 4, {}),
    (expert_generation.gate_up_kernel, EXPERTS | {"ROWS": TILE.gate_up_rows, "WIDE": 5760},
     TILE.warps, {"x": "*i32", "scales": "*u8", "h": "*i16"}),
    (expert_generation.down_kernel,
     EXPERTS | {"ROWS": TILE.down_rows, "WIDTH": 2880, "RESIDUAL": True}, TILE.warps,
     {"h": "*i32", "scales": "*u8"}),
    (generation_attention.attend_kernel,
     ATTEND | {"KEYS": generation_attention.FULL_KEYS, "PARTS": generation_attention.FULL_PARTS,
               "PAIRS": True}, 4, {}),
    (generation_attention.attend_kernel,
     ATTEND | {"KEYS": generation_attention.WINDOW_KEYS, "PAIRS": False,
               "PARTS": generation_attention.WINDOW_PARTS}, 4, {}),
]  # fmt: skip
FLOATS = ("eps", "alpha", "limit", "h_scale", "h_factor", "scale")


@pytest.mark.parametrize(
    ("kernel", "constants", "warps", "types"),
    KERNELS,
    ids=[f"{kernel.__name__}-{n}" for n, (kernel, *_) in enumerate(KERNELS)],
)
def test_every_kernel_fits_a_3090(kernel, constants, warps, types):
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = (TYPES | types).get(name.removesuffix("_ptr"), "*bf16")
            aligned[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 86, 32), options={"num_warps": warps}
    )
    assert compiled.metadata.shared <= LIMIT_BYTES[86]
    assert read_report(compiled.asm["ptx"], 86)[1] == 0
