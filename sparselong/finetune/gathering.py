"""Whole adapters and optimizer states of experts that several ranks share, and a rank's part.

Checkpoints hold what one process would write, so any number of ranks can read them. Before rank 0
writes one, the ranks of an expert group send it their parts, one tensor at a time, which it keeps
in host memory. The first dimension of a sharded parameter is that of its experts, so parts are
joined, and cut again, along it. That also holds for 8-bit states and the largest magnitudes of
their blocks of 256 values, because each rank's part is a whole number of blocks. Adapters of which
it would not be are refused before training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sparselong.adapters import sharded_parameters, whole_state_dict
from sparselong.errors import StageError
from sparselong.parallel import Mesh, all_gather
from sparselong.processes import world as ranks

BLOCK_VALUES = 256
"""Values that share a scale in bitsandbytes' 8-bit states."""
_BLOCK_STATES = ("absmax1", "absmax2")
_Change = Callable[[str, torch.Tensor, nn.Parameter], torch.Tensor]


class Whole(NamedTuple):
    """What rank 0 writes: state dicts of the adapters and of the optimizer, with all experts.

    On other ranks they are those of this rank's part.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]


def gather_model(model: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """Return the state dict with the adapters of all experts on rank 0; collective."""
    return whole_state_dict(model, lambda part: _join(part, mesh))


def gather_whole(model: nn.Module, optimizer: Any, mesh: Mesh) -> Whole:
    """Return adapters and optimizer states of all experts on rank 0; collective."""

    def join(name: str, state: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        has_part = name in _BLOCK_STATES or state.shape == parameter.shape
        return _join(state, mesh) if has_part else state

    states = optimizer.state_dict()
    changed = _change_states(states, optimizer, sharded_parameters(model), join)
    return Whole(gather_model(model, mesh), changed)


def cut_states(
    states: dict[str, Any], model: nn.Module, optimizer: Any, mesh: Mesh
) -> dict[str, Any]:
    """Return this rank's part of an optimizer's state dict with the states of all experts.

    Args:
        states: the state dict; its tensors may be memory-mapped, and only the part is read.
        model: the model.
        optimizer: the optimizer that will load it.
        mesh: this process's place in the mesh.
    """

    def cut(name: str, state: torch.Tensor, _: nn.Parameter) -> torch.Tensor:
        if name not in _BLOCK_STATES and state.dim() < 2:  # not one for each value
            return state
        part = len(state) // mesh.expert_size
        return state[mesh.expert_rank * part : (mesh.expert_rank + 1) * part].clone()

    return _change_states(states, optimizer, sharded_parameters(model), cut)


def check_states(optimizer: Any, checkpoint: Path) -> None:
    """Raise unless every loaded state has the shape of its parameter.

    Raises:
        StageError: one has another shape, which optimizers do not check; earlier versions kept B
            of experts in another layout.
    """
    for parameter, states in optimizer.state.items():
        for name, state in states.items():
            if not isinstance(state, torch.Tensor) or state.dim() < 2:  # not one for each value
                continue
            if state.shape != parameter.shape:
                raise StageError(
                    f"the optimizer states of {checkpoint} do not fit the adapters",
                    f"{name} of shape {list(parameter.shape)}",
                    f"{list(state.shape)}",
                    f"move {checkpoint} away: the same command then passes it over; or train "
                    "again: python 03_finetune.py --force",
                )


def check_blocks(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise if 8-bit optimizer states of two ranks' experts would share a block.

    Args:
        parameters: the sharded parameters by name.

    Raises:
        StageError: a rank's part of a parameter is no multiple of BLOCK_VALUES values.
    """
    for name, parameter in parameters.items():
        if parameter.numel() % BLOCK_VALUES:
            raise StageError(
                "8-bit optimizer states of sharded experts cannot be saved whole",
                f"a multiple of {BLOCK_VALUES} adapter values on each process, a block of states",
                f"{parameter.numel()} values of {name}",
                "set lora.expert_r to a multiple of 4, or training.optimizer=adamw_torch_fused",
            )


def _join(part: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the parts of rank 0's expert group in host memory on rank 0, else the own part."""
    parts = all_gather(part.detach(), mesh.expert_group, "checkpoint")
    return torch.cat([each.cpu() for each in parts]) if ranks.is_first() else part


def _change_states(
    states: dict[str, Any], optimizer: Any, parameters: Mapping[str, nn.Parameter], change: _Change
) -> dict[str, Any]:
    """Return a copy of an optimizer's state dict with the states of some parameters changed."""
    chosen = {id(parameter) for parameter in parameters.values()}
    numbers = chain.from_iterable(group["params"] for group in states["param_groups"])
    trained = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    changed = dict(states["state"])
    for number, parameter in zip(numbers, trained, strict=True):
        if id(parameter) in chosen and number in changed:
            changed[number] = _change_tensors(changed[number], parameter, change)
    return {**states, "state": changed}


def _change_tensors(
    states: dict[str, Any], parameter: nn.Parameter, change: _Change
) -> dict[str, Any]:
    """Return one parameter's states, changed; bitsandbytes nests some of them."""
    changed: dict[str, Any] = {}
    for name, state in states.items():
        if isinstance(state, dict):
            changed[name] = _change_tensors(state, parameter, change)
        else:
            is_tensor = isinstance(state, torch.Tensor)
            changed[name] = change(name, state, parameter) if is_tensor else state
    return changed
