"""Quantization by llama.cpp's own routines, through llama-cpp-python."""

from __future__ import annotations

import ctypes

import torch

from sparselong.export.gguf.types import load_quantizer


def quantize(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Return rows as a type's bytes, uint8 [rows, bytes of a row].

    Args:
        values: contiguous fp32 [rows, columns].
        kind: GGML type.
    """
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows, columns = values.shape
    found = torch.empty(rows, columns // block * size, dtype=torch.uint8)
    routine = load_quantizer()
    routine.restype = ctypes.c_size_t
    routine.argtypes = (
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    )
    number = int(gguf.GGMLQuantizationType[kind])
    written = routine(number, values.data_ptr(), found.data_ptr(), 0, rows, columns, None)
    if written != found.numel():
        raise RuntimeError(f"{kind}: llama.cpp wrote {written} bytes, not {found.numel()}")
    return found
