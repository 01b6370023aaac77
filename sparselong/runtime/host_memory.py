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


def seen_from_gpu(memory: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return page-locked memory as a tensor of a GPU, which reads and writes it over its bus.

    Kernels take it as they take any tensor of the device, in captured graphs too. Right for what
    is read rarely: nothing is cached on the GPU.

    Args:
        memory: uint8 [bytes], from `allocate_locked`; it lives as long as the result.
        device: the GPU.
    """
    seen = torch.as_tensor(_Address(memory), device=device)
    assert seen.data_ptr() == memory.data_ptr(), "seen under its own address, not copied"
    return seen


class _Address:
    """Memory in the form in which torch takes the memory of other packages."""

    def __init__(self, memory: torch.Tensor):
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.numel(),),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 3,
        }


def _refusal(size_bytes: int, found: str) -> StageError:
    return StageError(
        "host memory for copies to the GPU could not be allocated",
        f"{size_bytes / 2**30:.2f} GiB of page-locked memory",
        found,
        "free host memory, or raise the limit of locked memory (`ulimit -l`)",
    )
