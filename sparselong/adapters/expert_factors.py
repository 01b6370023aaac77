"""The matrices A and B of expert adapters, expert by expert, and their form in a state dict.

In memory the first dimension of each is experts, so one expert's values are contiguous: the parts
of several processes are concatenated along it, and an optimizer that quantizes its states in blocks
keeps experts apart. A state dict has PEFT's layout, in which B is [out, r * experts] with one
rank's columns for all experts at a time. A process that holds only some experts takes their slices
from a state dict of all experts; its own state dict has only them (`whole_state_dict` has all).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sparselong.model import Part


class ExpertFactor(Part, ABC):
    """One of the two matrices for the held experts of a layer.

    Args:
        whole: the matrix of all experts, in PEFT's layout.
        held: the experts that this process holds.
        total: the layer's number of experts.
        dtype: in which the weight is trained.
    """

    def __init__(
        self,
        whole: torch.Tensor,
        held: range,
        total: int,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(held, total)
        self.dtype = dtype
        self.weight = nn.Parameter(self._take(whole.detach(), total, held).to(dtype, copy=True))

    @abstractmethod
    def _take(self, matrix: torch.Tensor, experts: int, wanted: range) -> torch.Tensor:
        """Return the weight of the wanted experts, from a matrix of `experts` in PEFT's layout."""

    @abstractmethod
    def to_peft(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight of any number of experts in PEFT's layout."""

    def _count_experts(self, matrix: torch.Tensor) -> float:
        """Return the number of experts of a matrix in PEFT's layout."""
        return len(self.held) * matrix.numel() / self.weight.numel()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.to_peft(destination[f"{prefix}weight"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        matrix = state_dict.get(f"{prefix}weight")
        if matrix is not None:
            experts = self._count_experts(matrix)
            if experts == self.total:
                state_dict[f"{prefix}weight"] = self._take(matrix, self.total, self.held)
            elif experts == len(self.held):
                held = range(len(self.held))
                state_dict[f"{prefix}weight"] = self._take(matrix, len(held), held)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ExpertA(ExpertFactor):
    """A [experts * r, in], expert by expert, which is PEFT's layout."""

    def _take(self, matrix: torch.Tensor, experts: int, wanted: range) -> torch.Tensor:
        by_expert = matrix.reshape(experts, -1, matrix.shape[-1])
        return by_expert[wanted.start : wanted.stop].flatten(0, 1)

    def to_peft(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight itself."""
        return weight


class ExpertB(ExpertFactor):
    """B [experts, out, r]; [out, r * experts] in PEFT's layout."""

    def _take(self, matrix: torch.Tensor, experts: int, wanted: range) -> torch.Tensor:
        by_expert = matrix.reshape(len(matrix), -1, experts).permute(2, 0, 1)
        return by_expert[wanted.start : wanted.stop].contiguous()

    def to_peft(self, weight: torch.Tensor) -> torch.Tensor:
        """[experts, out, r] → [out, r * experts]."""
        return weight.permute(1, 2, 0).flatten(1)


def keep_dtypes(model: nn.Module) -> None:
    """Give the matrices of experts their dtype again, which PEFT changes to fp32 when it loads."""
    for module in model.modules():
        if isinstance(module, ExpertFactor):
            module.weight.data = module.weight.data.to(module.dtype)


def _sharded_factors(model: nn.Module) -> dict[str, ExpertFactor]:
    """Return the factors that hold only some experts, by name of their weight."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, ExpertFactor) and not module.is_whole
    }


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter parameters of which other processes hold other experts, by name.

    Their first dimension is that of the held experts in order, for A times r, so the parameters of
    an expert group, concatenated along it in rank order, are those of all experts.
    """
    return {name: factor.weight for name, factor in _sharded_factors(model).items()}


def whole_state_dict(
    model: nn.Module, gather: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """Return the model's state dict with the adapters of all experts, in PEFT's layout.

    Packed weights are not gathered: pass the result to `PeftModel.save_pretrained(state_dict=...)`,
    which takes the adapters from it. Collective if `gather` is; every process calls it in the same
    order.

    Args:
        model: the model, wrapped by PEFT.
        gather: concatenates a tensor of every process of the expert group along dimension 0.
    """
    state: dict[str, Any] = dict(model.state_dict())
    for name, factor in _sharded_factors(model).items():
        state[name] = factor.to_peft(gather(factor.weight.detach()))
    return state


def count_whole(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> int:
    """Return the number of values of the parameters, with those of all experts.

    Args:
        parameters: some of the model's parameters by name.
        model: the model.
    """
    sharded = _sharded_factors(model)
    count = 0
    for name, parameter in parameters.items():
        factor = sharded.get(name)
        experts = (factor.total, len(factor.held)) if factor is not None else (1, 1)
        count += parameter.numel() * experts[0] // experts[1]
    return count
