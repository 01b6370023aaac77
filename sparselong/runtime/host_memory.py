"""Page-locked host memory of exact size, from and to which a GPU copies at full rate.

torch's own allocator of such memory rounds sizes up to powers of two. Without a GPU the memory is
ordinary.
"""

from __future__ import annotations

import mmap

import torch

from sparselong.errors import StageError


class _Locked(mmap.mmap):
    """Memory that is released to the GPU's driver when the last tensor in it is gone."""

    address: int | None = None

    def __del__(self) -> None:
        if self.address is not None:
            torch.cuda.cudart().cudaHostUnregister(self.address)  # pyright: ignore[reportOptionalMemberAccess]


def allocate_locked(size_bytes: int) -> torch.Tensor:
    """Return uint8 [size_bytes] of zeros in host memory, page-locked if there is a GPU.

    Raises:
        StageError: the memory could not be had, or not be locked.
    """
    try:
        memory = _Locked(-1, size_bytes)
    except OSError as error:
        raise _refusal(size_bytes, str(error)) from error
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    if torch.cuda.is_available():
        torch.cuda.current_stream()  # the driver must be initialized
        code = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size_bytes, 0)  # pyright: ignore[reportOptionalMemberAccess]
        if int(code) != 0:
            raise _refusal(size_bytes, f"cudaHostRegister: error {int(code)}")
        memory.address = tensor.data_ptr()
    return tensor


def _refusal(size_bytes: int, found: str) -> StageError:
    return StageError(
        "host memory for copies to the GPU could not be allocated",
        f"{size_bytes / 2**30:.2f} GiB of page-locked memory",
        found,
        "free host memory, or raise the limit of locked memory (`ulimit -l`)",
    )
