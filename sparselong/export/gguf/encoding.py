"""Published tensors as the bytes of a GGUF file, slice by slice.

MXFP4 keeps its codes and scales. Only their order differs: a block of the published form has its 16
bytes apart from the scale, and byte i holds elements 2i (low nibble) and 2i + 1. A block of the
file is the scale followed by 16 bytes of which byte j holds elements j and j + 16. Nothing is
quantized again.

Q8_0 stores 32 values as integers in steps of an f16 scale. Values are divided by the scale as it is
stored, so that each is within half a step; the usual routine divides by the scale before it is
rounded to f16. A scale that rounding made too small for the largest value is raised by one f16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from sparselong.errors import StageError
from sparselong.export.gguf.layout import Tensor
from sparselong.export.gguf.quantization import quantize
from sparselong.export.source import Source, decode_exactly

_CODES = np.dtype("V16")
_BLOCK = np.dtype([("scale", "u1"), ("codes", _CODES)])
_PACKED_ROWS = 1024
_Q8_BLOCK = 32
_SLICE_WEIGHTS = 1 << 23
_F16_MAX = 65504.0


class Slice(NamedTuple):
    """Consecutive rows of a tensor.

    Attributes:
        data: uint8 [rows, bytes of a row], as in the file.
        values: count → fp32 [count, columns], the source's values of the first rows.
    """

    data: torch.Tensor
    values: Callable[[int], torch.Tensor]


def encoded_parts(source: Source, tensor: Tensor) -> Iterator[Slice]:
    """Yield a tensor's slices in the order of the file.

    Raises:
        StageError: a value overflows the tensor's type.
    """
    if tensor.kind == "MXFP4":
        for blocks, scales in _experts(source, tensor):
            yield Slice(pack_blocks(blocks, scales), partial(_decode_first, blocks, scales))
        return
    for values in dense_parts(source, tensor):
        data = encode(values, tensor.kind, tensor.source)
        yield Slice(data, lambda count, values=values: values[:count].float())


def dense_parts(source: Source, tensor: Tensor) -> Iterator[torch.Tensor]:
    """Yield the bf16 values [rows, columns] of a tensor that is not in MXFP4."""
    for part in source.parts(tensor.source):
        chosen = part[:, tensor.rows] if tensor.rows != slice(None) else part
        rows = chosen.reshape(-1, tensor.shape[-1]).contiguous()
        yield from rows.split(max(1, _SLICE_WEIGHTS // tensor.shape[-1]))


def _experts(source: Source, tensor: Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield blocks [rows, groups, 16] and scales [rows, groups] of one expert at a time."""
    read = (source.parts(f"{tensor.source}_{part}", step=1) for part in ("blocks", "scales"))
    for blocks, scales in zip(*read, strict=True):
        yield blocks[0, tensor.rows], scales[0, tensor.rows]


def _decode_first(blocks: torch.Tensor, scales: torch.Tensor, count: int) -> torch.Tensor:
    return decode_exactly(blocks[:count], scales[:count]).float()


def pack_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return MXFP4 weights in the file's order.

    In 16 bits, a published byte i < 8 gives the low nibbles and byte i + 8 the high nibbles of the
    file's bytes 2i and 2i + 1. numpy does that in place, some rows at a time, which takes a
    twentieth of the time that torch takes for one nibble after the other.

    Args:
        blocks: uint8 [rows, groups, 16].
        scales: uint8 [rows, groups].

    Returns:
        uint8 [rows, 17 * groups].
    """
    packed = np.empty(scales.shape, _BLOCK)
    packed["scale"] = scales.numpy()
    halves = blocks.numpy().view(np.uint64)
    for start in range(0, len(halves), _PACKED_ROWS):
        rows = slice(start, start + _PACKED_ROWS)
        low, high = (_spread(halves[rows, :, half]) for half in (0, 1))
        high <<= 4
        low |= high
        packed["codes"][rows] = low.view(_CODES)
    return torch.from_numpy(packed.view(np.uint8))


def _spread(eights: np.ndarray) -> np.ndarray:
    """Return the nibbles of eight bytes, each in a byte of its own: uint64 → 8 x uint16."""
    wide = np.ascontiguousarray(eights).view(np.uint8).astype(np.uint16)
    wide |= wide << 4
    wide &= 0x0F0F
    return wide


def encode(values: torch.Tensor, kind: str, name: str) -> torch.Tensor:
    """Return bf16 values [rows, columns] as a type's bytes, uint8 [rows, bytes of a row].

    Args:
        values: of a tensor that is not in MXFP4.
        kind: GGML type.
        name: of the tensor, for messages.

    Raises:
        StageError: a value overflows the type.
    """
    own: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "BF16": lambda bf16: bf16,
        "F32": torch.Tensor.float,
        "F16": torch.Tensor.half,
        "Q8_0": lambda bf16: _encode_q8(bf16, name),
    }
    if kind not in own:
        return quantize(values.float(), kind)
    found = own[kind](values)
    if kind == "F16" and not bool(torch.isfinite(found).all()):
        _refuse_overflow(name, "F16", float(values.abs().max()), _F16_MAX)
    return found.view(torch.uint8)


def check_range(source: Source, tensors: list[Tensor]) -> None:
    """Raise if a value is too large for f16, before anything is written.

    Raises:
        StageError: there is one.
    """
    for tensor in tensors:
        for values in dense_parts(source, tensor) if tensor.kind == "F16" else ():
            encode(values, tensor.kind, tensor.source)


def _encode_q8(values: torch.Tensor, name: str) -> torch.Tensor:
    blocks = values.float().view(len(values), -1, _Q8_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = (largest / 127).half()
    short = scale.float() * 127.5 < largest
    scale = torch.where(short, torch.nextafter(scale, torch.tensor(torch.inf).half()), scale)
    if not bool(torch.isfinite(scale).all()):
        _refuse_overflow(name, "Q8_0", float(largest.max()), 127 * _F16_MAX)
    divisor = torch.where(scale == 0, 1.0, scale.float())
    codes = (blocks / divisor).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), -1).flatten(-2)


def _refuse_overflow(name: str, kind: str, found: float, limit: float) -> None:
    raise StageError(
        f"{name} cannot be stored as {kind}",
        f"values up to {limit:g}",
        f"{found:g}",
        "pass --dense-type bf16, which holds every value",
    )
