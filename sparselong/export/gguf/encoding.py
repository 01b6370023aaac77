"""Published tensors as the bytes of a GGUF file, slice by slice.

MXFP4 keeps its codes and scales. Only their order differs: a block of the published form has its 16
bytes apart from the scale, and byte i holds elements 2i (low nibble) and 2i + 1. A block of the
file is the scale followed by 16 bytes of which byte j holds elements j and j + 16. Nothing is
quantized again; `unpack_blocks` gives the source's bytes.

Q8_0 stores 32 values as integers in steps of an f16 scale. Values are divided by the scale as it is
stored, so that each is within half a step; the usual routine divides by the scale before it is
rounded to f16. A scale that rounding made too small for the largest value is raised by one f16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from sparselong.errors import StageError
from sparselong.export.gguf.layout import BLOCK_BYTES, Tensor
from sparselong.export.gguf.quantization import quantize
from sparselong.export.source import Source

if TYPE_CHECKING:
    from collections.abc import Callable

_LOW, _HIGH = 0x0F, 0xF0
_Q8_BLOCK = 32
_SLICE_WEIGHTS = 1 << 23
_F16_MAX = 65504.0


def encoded_parts(source: Source, tensor: Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a tensor's slices along the first dimension: what the file holds, and its source.

    Args:
        source: the model.
        tensor: of the file.

    Returns:
        Pairs of uint8 [rows, bytes of a row], and the source: bf16 values [rows, columns], or for
        MXFP4 uint8 [rows, 17 x blocks of a row] with the scale before each published block.

    Raises:
        StageError: a value overflows the tensor's type.
    """
    if tensor.kind == "MXFP4":
        for published in _expert_blocks(source, tensor):
            yield pack_blocks(published).flatten(-2), published.flatten(-2)
        return
    for values in dense_parts(source, tensor):
        yield encode(values, tensor.kind, tensor.source), values


def dense_parts(source: Source, tensor: Tensor) -> Iterator[torch.Tensor]:
    """Yield the bf16 values [rows, columns] of a tensor that is not in MXFP4."""
    for part in source.parts(tensor.source):
        chosen = part[:, tensor.rows] if tensor.rows != slice(None) else part
        rows = chosen.reshape(-1, tensor.shape[-1]).contiguous()
        yield from rows.split(max(1, _SLICE_WEIGHTS // tensor.shape[-1]))


def _expert_blocks(source: Source, tensor: Tensor) -> Iterator[torch.Tensor]:
    """Yield uint8 [rows, blocks, 17] of one expert at a time: scale, then published block."""
    read = (source.parts(f"{tensor.source}_{part}", step=1) for part in ("blocks", "scales"))
    for blocks, scales in zip(*read, strict=True):
        for one, its_scales in zip(blocks, scales, strict=True):
            chosen = its_scales[tensor.rows].unsqueeze(-1)
            yield torch.cat((chosen, one[tensor.rows]), -1)


def pack_blocks(published: torch.Tensor) -> torch.Tensor:
    """Return blocks in the file's order.

    Args:
        published: uint8 [..., 17], the scale and a published block.

    Returns:
        uint8 [..., 17].
    """
    packed = torch.empty_like(published)
    packed[..., 0] = published[..., 0]
    first, second = published[..., 1:9], published[..., 9:]
    packed[..., 1::2] = (first & _LOW) | (second << 4)
    packed[..., 2::2] = (first >> 4) | (second & _HIGH)
    return packed


def unpack_blocks(packed: torch.Tensor) -> torch.Tensor:
    """Return blocks in the published order, the inverse of `pack_blocks`."""
    published = torch.empty_like(packed)
    published[..., 0] = packed[..., 0]
    even, odd = packed[..., 1::2], packed[..., 2::2]
    published[..., 1:9] = (even & _LOW) | (odd << 4)
    published[..., 9:] = (even >> 4) | (odd & _HIGH)
    return published


def split_blocks(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of MXFP4 bytes [rows, bytes] as blocks [rows, blocks, 17]."""
    return rows.view(len(rows), -1, BLOCK_BYTES)


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
        "Q8_0": _encode_q8,
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


def _encode_q8(values: torch.Tensor) -> torch.Tensor:
    blocks = values.float().view(len(values), -1, _Q8_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = (largest / 127).half()
    short = scale.float() * 127.5 < largest
    scale = torch.where(short, torch.nextafter(scale, torch.tensor(torch.inf).half()), scale)
    if not bool(torch.isfinite(scale).all()):
        _refuse_overflow("a dense weight", "Q8_0", float(largest.max()), 127 * _F16_MAX)
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
