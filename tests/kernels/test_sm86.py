"""Every attention kernel compiled for an RTX 3090 (sm_86), on a machine without a GPU.

The compiler's report must show at most 99 KB of shared memory per block and no register spills, so
none in an inner loop. sm_90's tiles must fit 227 KB; there dk and dv of a full layer spill a few
bytes and are still the fastest measured.
"""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparselong.kernels.attention import join as attention_join
from sparselong.kernels.attention import triton_backward as attention_backward
from sparselong.kernels.attention import triton_forward as attention_kernels
from sparselong.kernels.attention import triton_split as attention_split
from sparselong.kernels.attention.tiles import FLOAT32, FLOAT32_WINDOW, SPLIT, TILES, Tile
from sparselong.kernels.layer import cross_entropy_shard_triton as cross_entropy_shard_kernels
from sparselong.kernels.layer import cross_entropy_triton as cross_entropy_kernels
from sparselong.kernels.layer import norm_triton as norm_kernels
from sparselong.kernels.layer import rotary_triton as rotary_kernels
from sparselong.kernels.layer import router
from sparselong.kernels.layer import router_triton as router_kernels

LIMIT_BYTES = {86: 99 * 1024, 90: 227 * 1024}
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
FIXED_TYPES = {
    **dict.fromkeys(("starts", "ends", "order"), "i32"),
    **dict.fromkeys(("lse", "delta", "dsink"), "fp32"),
}
KERNELS = {
    "forward": attention_kernels.forward_kernel,
    "split": attention_split.part_kernel,
    "dq": attention_backward.dq_kernel,
    "dkdv": attention_backward.dkdv_kernel,
}


def compile_for(arch: int, stage: str, kind: str, tile: Tile, dtype: str, docs: bool, sinks: bool):
    """Return (shared memory in bytes, registers, spilled bytes) for gpt-oss's heads."""
    kernel = KERNELS[stage]
    constants = {
        "GROUP": 8,
        "HEADS": tile.heads,
        "QUERIES": tile.rows // tile.heads,
        "KEYS": tile.keys,
        "D": 64,
        "HAS_DOCS": docs,
        "HAS_WINDOW": kind == "window",
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    if stage != "split":
        constants["SPLIT"] = tile.split
    if stage == "dq":
        constants["SINK_GRADIENT"] = sinks
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + FIXED_TYPES.get(name.removesuffix("_ptr"), dtype)
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name.endswith("_ptr") or name.startswith("stride_"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return compiled.metadata.shared, *read_report(compiled.asm["ptx"], arch)


def read_report(ptx: str, arch: int) -> tuple[int, int]:
    """Return registers per thread and spilled bytes, as the assembler reports them."""
    command = [PTXAS, "-v", f"--gpu-name=sm_{arch}{'a' if arch == 90 else ''}", "-o", "/dev/null"]
    shown = subprocess.run([*command, "/dev/stdin"], input=ptx, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    registers = re.search(r"Used (\d+) registers", shown.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", shown.stderr)
    assert registers and spills, shown.stderr
    return int(registers[1]), int(spills[1]) + int(spills[2])


def variants(architecture: str):
    """Yield (stage, kind, tile, documents, sink gradients) of every kernel that can launch."""
    for (stage, kind), tile in TILES[architecture].items():
        for docs in {"full": (False,), "packed": (True,), "window": (False, True)}[kind]:
            for sinks in (False, True) if stage == "dq" else (False,):
                yield stage, kind, tile, docs, sinks
    yield from (("split", kind, SPLIT, True, False) for kind in ("packed", "window"))


def name_of(value) -> str:
    return f"{value.rows}x{value.keys}" if isinstance(value, Tile) else str(value)


@pytest.mark.parametrize(
    ("stage", "kind", "tile", "docs", "sinks"), list(variants("sm_80")), ids=name_of
)
def test_every_kernel_fits_a_3090(stage, kind, tile, docs, sinks):
    shared, _, spilled = compile_for(86, stage, kind, tile, "bf16", docs, sinks)
    assert shared <= LIMIT_BYTES[86]
    assert spilled == 0


@pytest.mark.parametrize(
    ("stage", "kind", "tile", "docs", "sinks"),
    [each for each in variants("sm_90") if not each[-1]],
    ids=name_of,
)
def test_h200_tiles_fit_an_h200(stage, kind, tile, docs, sinks):
    shared, _, spilled = compile_for(90, stage, kind, tile, "bf16", docs, sinks)
    assert shared <= LIMIT_BYTES[90]
    assert spilled <= (64 if stage == "dkdv" else 0)


def compile_simply(
    kernel, constants: dict, fp32: tuple[str, ...], arch: int, dtype="bf16", others=None
) -> tuple[int, int]:
    """Return (shared memory, spilled) in bytes with four warps. Pointers have `dtype` unless named,
    integers are int32, and no divisibility is assumed."""
    types = dict.fromkeys(fp32, "*fp32") | (others or {})
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*" + dtype if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    return compiled.metadata.shared, read_report(compiled.asm["ptx"], arch)[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_join_kernel_fits_a_3090(dtype):
    constants = {"PARTS": attention_split.MOST_PARTS, "D": 64}
    fp32 = ("part_out_ptr", "part_lse_ptr", "lse_ptr")
    shared, spilled = compile_simply(attention_split.combine_kernel, constants, fp32, 86, dtype)
    assert shared <= LIMIT_BYTES[86] and spilled == 0


@pytest.mark.parametrize("parts", [1, 2])
def test_sink_kernel_fits_a_3090(parts):
    constants = {"HAS_MORE": parts == 2, "QUERIES": attention_join.QUERIES, "D": 64}
    fp32 = ("lse_ptr", "more_lse_ptr", "sinks_ptr", "total_ptr")
    assert attention_join.WARPS == 4
    shared, spilled = compile_simply(attention_join.join_kernel, constants, fp32, 86)
    assert shared <= LIMIT_BYTES[86] and spilled == 0


@pytest.mark.parametrize("stage", ["forward", "split", "dq", "dkdv"])
@pytest.mark.parametrize(("kind", "tile"), [("packed", FLOAT32), ("window", FLOAT32_WINDOW)])
def test_fp32_fits_a_3090(stage, kind, tile):
    shared, _, spilled = compile_for(86, stage, kind, tile, "fp32", True, True)
    assert shared <= LIMIT_BYTES[86]
    assert spilled == 0


def test_the_report_shows_a_tile_that_does_not_fit():
    """Check the report reader: it must notice a tile that is far too large."""
    shared, _, spilled = compile_for(86, "dkdv", "full", Tile(128, 128, 4, 4), "bf16", False, False)
    assert shared > LIMIT_BYTES[86]
    assert spilled > 0


NEIGHBOURS = [
    (norm_kernels.forward_kernel, {"HAS_RESIDUAL": True, "BLOCK": 4096}, 8),
    (
        norm_kernels.backward_kernel,
        {"HAS_TOTAL": True, "WEIGHT_GRADIENT": True, "BLOCK": 4096},
        8,
    ),
    *(
        (
            rotary_kernels.rotate_kernel,
            {"BACK": True, "HAS_VALUES": values, "TOKENS": 4, "HEADS": 8, "BLOCK": 32},
            4,
        )
        for values in (False, True)
    ),
    *(
        (
            router_kernels.route_kernel,
            {"WATCHED": True, "TOP_K": 4, "ROWS": router.ROWS, "EXPERTS": experts, "BLOCK": 64},
            router.WARPS,
        )
        for experts in (32, 128)
    ),
    (
        router_kernels.route_backward_kernel,
        {"TOP_K": 4, "HAS_OTHERS": True, "BLOCK": 4096},
        router.WARPS,
    ),
    (cross_entropy_kernels.softmax_kernel, {"NEEDS_GRADIENT": True, "BLOCK": 4096}, 8),
    (cross_entropy_shard_kernels.statistics_kernel, {"BLOCK": 4096}, 8),
    (cross_entropy_shard_kernels.gradient_kernel, {"BLOCK": 4096}, 8),
]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("kernel", "constants", "warps"), NEIGHBOURS, ids=lambda v: str(v)[:40])
def test_norm_rotary_router_and_loss_kernels_fit_a_3090(kernel, constants, warps, dtype):
    """Compile norm, rotary, router and loss as launched in gpt-oss's shape."""
    fixed = {"target_ptr": "i64", "indices_ptr": "i32", "broken_ptr": "u8"} | dict.fromkeys(
        ("inverse_ptr", "dweight_ptr", "loss_ptr", "statistics_ptr", "normalizer_ptr"), "fp32"
    )
    signature, aligned = {}, {}
    if kernel is router_kernels.route_kernel:
        itemsize = {"bf16": 2, "fp32": 4}[dtype]
        constants = constants | {"BLOCK": router.BLOCK_BYTES // itemsize}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + fixed.get(name, dtype)
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
        if name.endswith("_ptr") or name.startswith("stride_") or name == "hidden":
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 86, 32), options={"num_warps": warps}
    )
    _, spilled = read_report(compiled.asm["ptx"], 86)
    assert compiled.metadata.shared <= LIMIT_BYTES[86]
    assert spilled == 0
