"""Experts in host memory: whole layers are copied to the GPU ahead of their use.

A layer's blocks and scales lie in one buffer of exactly their size, page-locked so that the GPU
copies from it at full speed (torch's own page-locked allocator rounds sizes up to powers of two).
The GPU has two buffers of a layer's size. While a layer computes from one, a stream of its own
copies the layer that is needed next into the other:

    pass        next after layer i
    forward     i + 1; nothing after the last: backward begins with the two layers that are there
    backward    i - 1; nothing after the first: so does the next step
    inference   i + 1, and the first after the last

A layer that is on the GPU is not copied again. A step of L layers therefore copies at most 2 L - 2,
in the long run 2 L - 4. A checkpointed layer's recomputation computes nothing in the experts, so
one copy serves recomputation and backward pass.

Streams keep the order: a copy waits until the work that was enqueued before it began to be wanted
has read the buffer, and `fetch` makes the current stream wait for its layer. Kernels that read only
a few experts read them from host memory directly (`HostStack.in_place`).

On a CPU the same code copies plain memory, which saves nothing, but is how it is tested.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import nn

from sparselong.errors import StageError
from sparselong.figures import format_bytes
from sparselong.kernels import Passing

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a layer's uint8 tensors by name, in the order in which they lie in its buffer."""


class _Slot(NamedTuple):
    """A buffer of one layer on the device."""

    parts: tuple[torch.Tensor, ...]
    whole: torch.Tensor
    ready: torch.cuda.Event | None
    """Recorded after the last copy into it."""


class HostExperts:
    """The packed experts of all layers in host memory, and two layers of them on a device.

    One thread at a time runs the model. Memory is unlocked once the model is gone.

    Args:
        layers: number of layers.
        shapes: of a layer's tensors.
        locked: whether to page-lock the memory, which a GPU needs.

    Raises:
        StageError: the memory cannot be allocated or page-locked.
    """

    def __init__(self, layers: int, shapes: Shapes, locked: bool):
        self.shapes, self.copied_bytes = dict(shapes), 0
        self.layer_bytes = sum(map(math.prod, self.shapes.values()))
        self.layers: list[torch.Tensor] = []
        self._streams: list[torch.cuda.Stream] = []
        locks: list[int] = []
        # It refers to the tensors too: memory must not be freed before it is unlocked.
        self.release = weakref.finalize(self, _release, self._streams, locks, self.layers)
        for number in range(layers):
            self.layers.append(_allocate(self.layer_bytes, number, layers))
            if locked:
                _lock(self.layers[-1], number, layers)
                locks.append(self.layers[-1].data_ptr())
        self._slots: tuple[_Slot, _Slot] | None = None
        # Layer and version of its tensor: one that is written to is copied again.
        self._held: list[tuple[int, int] | None] = [None, None]
        self._last = 1

    def start(self, device: torch.device) -> None:
        """Allocate the buffers on the device from which the layers will be read."""
        self.device = device
        if device.type == "cuda":
            self._streams.append(torch.cuda.Stream(device))
        self._slots = (self._make_slot(), self._make_slot())

    def _make_slot(self) -> _Slot:
        whole = torch.empty(self.layer_bytes, dtype=torch.uint8, device=self.device)
        ready = torch.cuda.Event() if self._streams else None
        return _Slot(tuple(self._cut(whole).values()), whole, ready)

    def _cut(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), whole.split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """Return a layer's tensors in host memory by name; views."""
        return self._cut(self.layers[layer])

    def fetch(self, layer: int, passing: Passing) -> tuple[torch.Tensor, ...]:
        """Return a layer's tensors on the device, for work on the current stream.

        They are valid for what is enqueued before the next call for another layer.

        Args:
            layer: index of the layer.
            passing: the pass that asks, which says what is needed next.
        """
        assert self._slots is not None, "opened with the model"
        if self._key(layer) not in self._held:
            self._copy(layer, 1 - self._last)
        self._last = self._held.index(self._key(layer))
        slot = self._slots[self._last]
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        following = self._next(layer, passing)
        if following is not None and self._key(following) not in self._held:
            self._copy(following, 1 - self._last)
        return slot.parts

    def _key(self, layer: int) -> tuple[int, int]:
        return layer, self.layers[layer]._version

    def _next(self, layer: int, passing: Passing) -> int | None:
        if passing == "backward":
            return layer - 1 if layer else None
        if layer + 1 < len(self.layers):
            return layer + 1
        return 0 if passing == "inference" else None

    def _copy(self, layer: int, number: int) -> None:
        """Start to copy a layer into a buffer, after all work that is enqueued so far."""
        assert self._slots is not None
        slot, source = self._slots[number], self.layers[layer]
        self._held[number] = None  # until the copy is enqueued, whatever interrupts this
        if slot.ready is None:
            slot.whole.copy_(source)
        else:
            (stream,) = self._streams
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                slot.whole.copy_(source, non_blocking=True)
            slot.ready.record(stream)
        self._held[number] = self._key(layer)
        self.copied_bytes += source.nbytes

    def hash_tensors(self) -> dict[str, str]:
        """Return a hash of every tensor, by layer and name."""
        named = {
            f"{layer}.{name}": tensor
            for layer in range(len(self.layers))
            for name, tensor in self.tensors(layer).items()
        }
        with ThreadPoolExecutor(_HASHERS) as pool:  # hashing large buffers releases the GIL
            return dict(zip(named, pool.map(_hash, named.values()), strict=True))


_HASHERS = 8


def _hash(tensor: torch.Tensor) -> str:
    array: Any = tensor.numpy()
    return blake2b(array.reshape(-1), digest_size=16).hexdigest()


def find_host_experts(model: nn.Module) -> HostExperts | None:
    """Return the memory of a model's experts, None if they are on its device."""
    found = (getattr(module, "host", None) for module in model.modules())
    return next((host for host in found if host is not None), None)


def check_unchanged(host: HostExperts, before: Mapping[str, str]) -> dict[str, Any]:
    """Return the receipt that training left frozen experts as they were.

    Args:
        host: the experts.
        before: `hash_tensors` of before training.

    Raises:
        StageError: a tensor has changed; the message names it.
    """
    after = host.hash_tensors()
    changed = [name for name in before if after[name] != before[name]]
    if changed:
        raise StageError(
            "experts in host memory have changed during training",
            "the same bytes in every frozen tensor",
            f"{len(changed)} of {len(before)} differ, first that of layer {changed[0]}",
            "train again: python 03_finetune.py --force; if it happens again, test the machine's "
            "memory",
        )
    hashes = (blake2b("".join(each.values()).encode()).hexdigest() for each in (before, after))
    return {"tensors": len(before), **dict(zip(("before", "after"), hashes, strict=True))}


def describe_placement(
    model: nn.Module, collect: Callable[[int], list[int]] = lambda value: [value]
) -> dict[str, Any]:
    """Return where a model's experts are and how many bytes were copied from there, for a manifest.

    Args:
        model: this process's model.
        collect: returns every process's value; all call this.
    """
    host = find_host_experts(model)
    if host is None:
        return {"placement": "gpu"}
    return {
        "placement": "host",
        "host_bytes": collect(host.layer_bytes * len(host.layers)),
        "copied_bytes": collect(host.copied_bytes),
    }


def _allocate(size: int, number: int, layers: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise _refusal("allocated", size, number, layers, str(error)) from error


def _lock(memory: torch.Tensor, number: int, layers: int) -> None:
    """Page-lock memory and make it readable for the GPU."""
    runtime = torch.cuda.cudart()
    code = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if code != runtime.cudaError.success:
        why = runtime.cudaGetErrorString(code)
        raise _refusal("page-locked", memory.nbytes, number, layers, why)


def _refusal(how: str, size: int, number: int, layers: int, why: str) -> StageError:
    total, done = format_bytes(size * layers), format_bytes(size * number)
    return StageError(
        f"host memory for the experts cannot be {how}",
        f"{total}, {format_bytes(size)} for each of {layers} layers",
        f"{done} {how}, then: {' '.join(why.split())}",
        "free host memory or raise the container's limit, share the experts among more processes "
        "(expert_parallel_degree), or set experts.placement=gpu",
    )


def _release(
    streams: Sequence[torch.cuda.Stream], locks: Sequence[int], _memory: Sequence[torch.Tensor]
) -> None:
    """Unlock memory, which no copy may be reading."""
    for stream in streams:
        stream.synchronize()
    for address in locks:
        runtime = torch.cuda.cudart()
        code = runtime.cudaHostUnregister(address)
        if code != runtime.cudaError.success:
            raise RuntimeError(f"cudaHostUnregister: {runtime.cudaGetErrorString(code)}")
