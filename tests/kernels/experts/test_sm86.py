"""Every expert kernel compiled for an RTX 3090 (sm_86), without a GPU.

As in tests/kernels/test_sm86.py: at most 99 KB of shared memory, no spills. sm_90's tiles, which
load operands through tensor descriptors, must fit sm_90's 227 KB.
"""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparselong.kernels.experts import lora_triton as expert_lora_kernels
from sparselong.kernels.experts import routing as expert_routing
from sparselong.kernels.experts import triton_glue as expert_glue_kernels
from sparselong.kernels.experts import triton_parts as expert_part_kernels
from sparselong.kernels.experts import triton_products as expert_kernels
from sparselong.kernels.experts.tiles import FLOAT32, TILES, Tile
from tests.kernels.test_sm86 import LIMIT_BYTES, read_report

INTEGERS = (
    *("words", "starts", "tile_expert", "tile_starts", "positions"),
    *("all_positions", "all_starts"),
)
TYPES = {
    **dict.fromkeys(INTEGERS, "*i32"),
    **dict.fromkeys(("indices", "experts"), "*i64"),
    "scales": "*u8",
    **dict.fromkeys(("inner", "narrow", "grad"), "*fp32"),
}
SINGLE = [
    (expert_glue_kernels.sum_rows_kernel, {"BLOCK": 32, "COLUMNS": 128, "WEIGHTED": True}, 4),
    *(
        (expert_part_kernels.add_parts_kernel, {"PARTS": 8, "EXACT": exact, "BLOCK": 2048}, 4)
        for exact in (False, True)
    ),
    (expert_glue_kernels.window_kernel, {"ROWS": 64, "BLOCK": 128, "EXPERTS": 128}, 4),
]
SORT = {"ROWS": 64, "BLOCK": expert_routing.SORT_BLOCK, "EXPERTS": 128}
TOKEN = {"TOP_K": 4, "BLOCK": 4096}
for partial in (False, True):  # in the second form, this process holds some of the experts
    SINGLE += [
        (
            expert_glue_kernels.sort_kernel,
            {**SORT, "OTHERS": partial},
            expert_routing.SORT_WARPS,
        ),
        (expert_glue_kernels.gather_kernel, {**TOKEN, "INNER": True, "PARTIAL": partial}, 4),
        *(
            (
                expert_glue_kernels.combine_kernel,
                {
                    **{**TOKEN, "WEIGHTED": True, "PARTIAL": partial, "ADD": partial},
                    **{"EXACT": exact, "RESIDUAL": not partial},
                },
                4,
            )
            for exact in (False, True)
        ),
        (expert_glue_kernels.gate_kernel, {"BLOCK": 1024, "PARTIAL": partial}, 4),
        (
            expert_glue_kernels.gate_backward_kernel,
            {"BLOCK": 1024, "WEIGHT_GRADIENT": True, "PARTIAL": partial},
            4,
        ),
        (
            expert_kernels.decode_kernel,
            {"GROUPS": 64, "TURNS": 8, "PTX": True, "PARTIAL": partial},
            8,
        ),
    ]
ADAPTER = {"RANK": 64, "PRECISION": "tf32"}  # the largest rank that the config accepts
SINGLE += [
    (expert_lora_kernels.shrink_kernel, {"ROWS": 128, "DEPTH": 64, **ADAPTER}, 4),
    (expert_lora_kernels.expand_kernel, {"ROWS": 128, "COLUMNS": 64, **ADAPTER}, 4),
    (expert_lora_kernels.gradient_kernel, {"BLOCK": 64, "COLUMNS": 64, **ADAPTER}, 4),
]


def compile_kernel(kernel, constants: dict, arch: int, warps: int, stages: int, **operands: str):
    """Return (shared memory, spilled) in bytes; operands are bf16 unless TYPES names a type."""
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in operands:
            signature[name] = operands[name]
        elif name.endswith("_ptr"):
            signature[name] = TYPES.get(name.removesuffix("_ptr"), operands.get("others", "*bf16"))
        else:
            signature[name] = "fp32" if name in ("alpha", "limit", "scaling") else "i32"
        if signature[name].startswith("*") or name in ("columns", "depth", "width"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    if kernel is expert_glue_kernels.sort_kernel:
        options |= expert_routing.ASSERTING
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    _, spilled = read_report(compiled.asm["ptx"], arch)
    return compiled.metadata.shared, spilled


def compile_product(arch: int, backend: str, direction: str, tile: Tile, dtype: str = "bf16"):
    """Compile one product in gpt-oss's shape as the launcher would and return its report."""
    backward = direction == "backward"
    tma = arch == 90 and tile.rows >= 64 and dtype == "bf16"
    constants = {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "BACKWARD": backward,
        "BIAS": not backward, "TMA": tma, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    block = [1, tile.depth, tile.columns] if backward else [1, tile.columns, tile.depth]
    operands = {
        "a": f"tensordesc<bf16[{tile.rows}, {tile.depth}]>" if tma else f"*{dtype}",
        "w": f"tensordesc<bf16{block}>" if tma else f"*{dtype}",
        "others": f"*{dtype}",
    }
    if backend == "decode":
        kernel = expert_kernels.dense_kernel
    else:
        kernel = expert_kernels.packed_kernel
        constants["PTX"] = dtype == "bf16"
    return compile_kernel(kernel, constants, arch, tile.warps, tile.stages, **operands)


def name_of(value) -> str:
    return f"{value.rows}x{value.columns}" if isinstance(value, Tile) else str(value)


@pytest.mark.parametrize(
    ("arch", "backend", "direction", "tile"),
    [
        (arch, *key, tile)
        for arch, table in ((86, "sm_80"), (90, "sm_90"))
        for key, tile in TILES[table].items()
    ],
    ids=name_of,
)
def test_every_product_fits_without_spills(arch, backend, direction, tile):
    shared, spilled = compile_product(arch, backend, direction, tile)
    assert shared <= LIMIT_BYTES[arch]
    assert spilled == 0


@pytest.mark.parametrize("backend", ["packed", "decode"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_fp32_fits_a_3090(backend, direction):
    shared, spilled = compile_product(86, backend, direction, FLOAT32, "fp32")
    assert shared <= LIMIT_BYTES[86]
    assert spilled == 0


@pytest.mark.parametrize(
    ("kernel", "constants", "warps"), SINGLE, ids=[kernel.__name__ for kernel, *_ in SINGLE]
)
def test_other_kernels_fit_a_3090(kernel, constants, warps):
    shared, spilled = compile_kernel(kernel, constants, 86, warps, 3)
    assert shared <= LIMIT_BYTES[86]
    assert spilled == 0


def test_the_report_shows_a_tile_that_does_not_fit():
    """Check the report reader: it must notice a tile that is far too large."""
    shared, spilled = compile_product(86, "decode", "forward", Tile(256, 256, 64, 4, 3))
    assert shared > LIMIT_BYTES[86]
    assert spilled > 0
