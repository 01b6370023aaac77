"""Modules that hold only some rows of their stored tensors, and reading exactly those rows.

Inside `using(experts=..., vocabulary=...)` a model is made with the experts and the rows of
embedding and lm_head that this process holds. transformers reads whole tensors, so the quantizer
withholds these from it: their places in the model are empty while transformers loads the others.
Then they are read from the memory-mapped files, a few rows at a time, straight into their final
memory on the device. Neither the host nor the device ever holds a row of another process.

Experts that stay in host memory, whole or in part, are withheld as well, and read from the files
into that memory without a map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparselong.checkpoint import Checkpoint, unpack_two_four_experts
from sparselong.errors import StageError


class Part(nn.Module):
    """Module whose tensors are the rows `held` of its stored tensors.

    Args:
        held: indices of the rows, or experts, that this process holds.
        total: number of rows of the stored tensors.
    """

    def __init__(self, held: range, total: int):
        super().__init__()
        self.held, self.total = held, total

    @property
    def is_whole(self) -> bool:
        """Whether the module holds all rows."""
        return len(self.held) == self.total

    @property
    def is_withheld(self) -> bool:
        """Whether the module's tensors are read here and not by transformers."""
        return not self.is_whole

    def is_in_host_memory(self, name: str) -> bool:
        """Whether a tensor stays in host memory on whatever device the model is."""
        return False

    def place(self, name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the memory into which a withheld tensor is read.

        Args:
            name: the tensor.
            like: the tensor on the meta device.
            device: that of the model.
        """
        return torch.empty(like.shape, dtype=like.dtype, device=device)

    def check_setting(self, setting: str, exchange: Any) -> None:
        """Raise unless a pass's setting has this process hold what the module holds.

        Args:
            setting: "experts" or "vocabulary".
            exchange: the setting of the running pass.

        Raises:
            ValueError: it is missing, or is that of another part.
        """
        expected = range(self.total) if exchange is None else exchange.held(self.total)
        if expected != self.held:
            runs = "without the setting" if exchange is None else "with another setting"
            raise ValueError(
                f"{setting}: this model holds {show_rows(self.held)} of {self.total}, but the pass "
                f"runs {runs}, which expects {show_rows(expected)}; allowed: a pass inside "
                f"using({setting}=...) of the exchange with which the model was opened"
            )


def show_rows(rows: range) -> str:
    """Return the first and last of the rows, as text."""
    return f"{rows[0]} to {rows[-1]}" if rows else "none"


def withhold(model: nn.Module) -> dict[str, torch.Tensor]:
    """Take the tensors that transformers must not load out of a model.

    Returns:
        The tensors, on the meta device, by full name.
    """
    withheld = {}
    for path, module in model.named_modules():
        if isinstance(module, Part) and module.is_withheld:
            for name, tensor in module.state_dict().items():
                withheld[f"{path}.{name}"] = tensor
                setattr(module, name, None)
    return withheld


def read_withheld(
    model: nn.Module, withheld: dict[str, torch.Tensor], directory: Path, sparse_experts: bool
) -> None:
    """Read the rows that the model holds into the places that `withhold` emptied.

    Args:
        model: the model, with all its other tensors on their device.
        withheld: result of `withhold`; the tensors' dtypes are those to load.
        directory: the checkpoint.
        sparse_experts: whether experts are stored as kept codes and patterns.

    Raises:
        StageError: the model is spread over several devices, or a file is damaged.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        raise StageError(
            "a model with a part of experts or vocabulary, or with experts in host memory, needs "
            "one device",
            'a device_map of one device, such as {"": 0}',
            f"tensors on {', '.join(sorted(map(str, devices)))}",
            "give each process a GPU of its own",
        )
    checkpoint, device = Checkpoint(directory), devices.pop()
    for name, like in withheld.items():
        path, _, last = name.rpartition(".")
        module: Any = model.get_submodule(path)
        tensor = module.place(last, like, device)
        if sparse_experts and name.endswith("_blocks"):
            _copy_rows(tensor, _expanded_slices(checkpoint, name, module.held, device))
        elif module.is_in_host_memory(last):
            checkpoint.read_into(tensor, name, module.held)
        else:
            _copy_rows(tensor, checkpoint.read_slices(name, module.held))
        if last in module._parameters:
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(module, last, tensor)


def _copy_rows(tensor: torch.Tensor, slices: Iterable[torch.Tensor]) -> None:
    first = 0
    for part in slices:
        tensor[first : first + len(part)].copy_(part)
        first += len(part)


def _expanded_slices(
    checkpoint: Checkpoint, name: str, held: range, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield MXFP4 blocks of experts that are stored in 2:4 form, one at a time, on the device."""
    stem = name.removesuffix("_blocks")
    stored = (checkpoint.read_slices(f"{stem}_{kind}", held, 1) for kind in ("kept", "patterns"))
    for kept, patterns in zip(*stored, strict=True):
        yield unpack_two_four_experts(kept.to(device), patterns.to(device))
