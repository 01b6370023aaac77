"""Inputs of checkpointed layers, kept on the device or in host memory until their backward pass.

Between two layers, hidden states of a long sequence take much memory: 0.70 GiB at gpt-oss's widths
and 131,072 tokens, once for each layer. `HostInputs` keeps them in page-locked host memory. On the
device there are two buffers: a layer reads one and writes the other. While it computes, its input
is copied to the host, and the next layer writes over it. Backward, a layer's input arrives while
the layer after it is differentiated; the last layer's is still there.

    forward    layer i reads A, writes B      copy A to the host
               layer i+1 reads B, writes A    copy B to the host
    backward   layer i+1 reads B              copy layer i's input to A

Copies run on a stream of their own. All passes must use the same current stream.
"""

from __future__ import annotations

from typing import Any

import torch

from sparselong.runtime.host_memory import allocate_locked


class Kept:
    """A layer's input, from `save`; `take` takes each once.

    Attributes:
        tensor: the input, on the device or on the host.
        before: the input of the layer before, if it was saved in the same pass.
    """

    def __init__(self, tensor: torch.Tensor, before: Kept | None = None):
        self.tensor, self.before = tensor, before


class DeviceInputs:
    """Inputs that stay on the device."""

    copied_bytes = 0

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return memory for the output of the layer with this input, of the same shape."""
        return torch.empty_like(hidden, memory_format=torch.contiguous_format)

    def save(self, hidden: torch.Tensor, is_first: bool) -> Kept:
        """Keep a layer's input; `is_first` tells that no layer came before."""
        return Kept(hidden)

    def take(self, kept: Kept) -> torch.Tensor:
        """Return the input."""
        return kept.tensor


class HostInputs:
    """Inputs in host memory, with two buffers on the device.

    Attributes:
        copied_bytes: bytes copied so far, in both directions.
    """

    def __init__(self) -> None:
        self.copied_bytes = 0
        self._slots = (_Slot(), _Slot())
        self._free: list[torch.Tensor] = []
        self._last: Kept | None = None
        self._stream: torch.cuda.Stream | None = None

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return memory for the output of the layer with this input, of the same shape.

        It is overwritten two layers later.
        """
        slot = self._slots[self._slots[0].holds(hidden)]
        slot.wait()
        slot.kept = None
        return slot.view(hidden)

    def save(self, hidden: torch.Tensor, is_first: bool) -> Kept:
        """Copy a layer's input to the host; `is_first` tells that no layer came before."""
        kept = Kept(self._host_memory(hidden), None if is_first else self._last)
        self._last = kept
        slot = next((slot for slot in self._slots if slot.holds(hidden)), None)
        if slot is not None:
            slot.kept = kept
        self._copy(kept.tensor, hidden, slot)
        return kept

    def take(self, kept: Kept) -> torch.Tensor:
        """Return the input on the device, and begin to fetch the one before it.

        What the other buffer holds must not be needed any more.
        """
        slot = next((slot for slot in self._slots if slot.kept is kept), None)
        if slot is None:
            slot = self._fetch(kept, self._slots[0])
        if kept.before is not None:
            self._fetch(kept.before, self._slots[slot is self._slots[0]])
        slot.wait()
        slot.kept = None
        self._free.append(kept.tensor)  # copies into it run after those out of it
        return slot.view(kept.tensor)

    def _fetch(self, kept: Kept, slot: _Slot) -> _Slot:
        if slot.kept is not kept:
            self._copy(slot.view(kept.tensor), kept.tensor, slot)
            slot.kept = kept
        return slot

    def _copy(self, to: torch.Tensor, source: torch.Tensor, slot: _Slot | None) -> None:
        """Copy after all that the current stream has been given so far."""
        self.copied_bytes += source.nbytes
        device = to.device if to.is_cuda else source.device
        if device.type != "cuda":
            to.copy_(source)
            return
        current = torch.cuda.current_stream(device)
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            copied = self._stream.record_event()
        if slot is None:
            source.record_stream(self._stream)
        else:
            slot.copied = copied

    def _host_memory(self, like: torch.Tensor) -> torch.Tensor:
        """Return memory for a tensor: a free one of this size, else new memory."""
        for place, tensor in enumerate(self._free):
            if tensor.shape == like.shape and tensor.dtype == like.dtype:
                return self._free.pop(place)
        self._free.clear()  # of another size: batches of another shape have begun
        return allocate_locked(like.nbytes).view(like.dtype).view(like.shape)


class _Slot:
    """One of the two buffers on the device.

    Attributes:
        memory: the buffer, as large as the largest tensor that it held.
        kept: whose input it holds; None: another tensor, or nothing.
        copied: when the last copy from or to it ends.
    """

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.kept: Kept | None = None
        self.copied: Any = None

    def view(self, like: torch.Tensor) -> torch.Tensor:
        """Return the buffer as a tensor of this shape and dtype."""
        if self.memory is None or self.memory.nbytes < like.nbytes:
            device = like.device if like.is_cuda or not torch.cuda.is_available() else "cuda"
            self.memory = torch.empty(like.nbytes, dtype=torch.uint8, device=device)
        return self.memory[: like.nbytes].view(like.dtype).view(like.shape)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor lies in the buffer."""
        return self.memory is not None and self.memory.data_ptr() == tensor.data_ptr()

    def wait(self) -> None:
        """Let the current stream wait for the last copy."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None
