"""States of 8-bit optimizers of shared experts: joined as one process has them, and cut again."""

from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from sparselong.errors import StageError
from sparselong.finetune import gathering

SIZE, EXPERTS, R, WIDTH = 2, 4, 2, 1280
"""Two processes; each expert's A has ten blocks of 256 values, and so has its B."""


def factors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return A and B of all experts, and a replicated parameter."""
    shapes = {"a": (EXPERTS * R, WIDTH), "b": (EXPERTS, WIDTH, R), "router": (8, 600)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def part_of(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor if name == "router" else tensor.chunk(SIZE)[rank]


class Process:
    """A process's parameters and optimizer; with `rank` None it has all experts."""

    def __init__(self, rank: int | None):
        generator = torch.Generator().manual_seed(0)
        self.rank, self.model = rank, nn.ParameterDict()
        for name, value in factors(generator).items():
            own = value if rank is None else part_of(name, value, rank)
            self.model[name] = nn.Parameter(own.clone())
        decayed = {"params": [self.model["a"], self.model["router"]], "weight_decay": 0.1}
        groups = [decayed, {"params": [self.model["b"]], "weight_decay": 0.0}]
        self.optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=0.01)
        self.mesh: Any = SimpleNamespace(expert_rank=rank, expert_size=SIZE, expert_group="group")

    def train(self, steps: range) -> None:
        for step in steps:
            grads = factors(torch.Generator().manual_seed(step))
            for name, grad in grads.items():
                own = grad if self.rank is None else part_of(name, grad, self.rank)
                self.model[name].grad = own.clone()
            self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.items()}


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """A and B are shared, in the processes of this test."""

    def sharded(model: Any) -> dict[str, nn.Parameter]:
        return {name: model[name] for name in ("a", "b")}

    monkeypatch.setattr(gathering, "sharded_parameters", sharded)
    monkeypatch.setattr(gathering, "gather_model", lambda model, mesh: {})


def gather(processes: list[Process], monkeypatch) -> dict[str, Any]:
    """Return rank 0's whole state: first note what every process sends, then answer with it."""
    sent: list[list[torch.Tensor]] = []

    def note(tensor: torch.Tensor, _group: Any, _tag: str) -> list[torch.Tensor]:
        sent[-1].append(tensor)
        return [tensor]

    monkeypatch.setattr(gathering, "all_gather", note)
    for process in processes:
        sent.append([])
        gathering.gather_whole(process.model, process.optimizer, process.mesh)
    answers = iter(zip(*sent, strict=True))
    monkeypatch.setattr(gathering, "all_gather", lambda *_: list(next(answers)))
    first = processes[0]
    return gathering.gather_whole(first.model, first.optimizer, first.mesh).optimizer


def same(left: Any, right: Any) -> bool:
    if isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in right)
    return torch.equal(left, right) if isinstance(right, torch.Tensor) else left == right


def test_joined_states_are_one_process_s_and_their_parts_continue_alike(monkeypatch, tmp_path):
    whole, parts = Process(None), [Process(rank) for rank in range(SIZE)]
    for process in (whole, *parts):
        process.train(range(1, 4))
    states = gather(parts, monkeypatch)
    assert same(states, whole.optimizer.state_dict())
    assert states["state"][0]["__bnb_optimizer_quant_state__"]["absmax1"].numel() == 40
    torch.save(states, tmp_path / "optimizer.pt")
    stored = torch.load(tmp_path / "optimizer.pt", mmap=True, map_location="cpu")
    again = [Process(rank) for rank in range(SIZE)]
    for before, process in zip(parts, again, strict=True):
        given = process.model, process.optimizer, process.mesh
        process.optimizer.load_state_dict(gathering.cut_states(stored, *given))
        gathering.check_states(process.optimizer, tmp_path)
        for name, weight in before.weights().items():
            process.model[name].data.copy_(weight)
    for process in (whole, *again):
        process.train(range(4, 6))
    for name, weight in whole.weights().items():
        found = [process.weights()[name] for process in again]
        assert torch.equal(weight, found[0] if name == "router" else torch.cat(found))


def test_states_of_another_shape_are_refused(tmp_path):
    """An optimizer takes them without complaint."""
    part = Process(0)
    part.train(range(1, 2))
    whole = Process(None)
    whole.train(range(1, 2))
    part.optimizer.load_state_dict(whole.optimizer.state_dict())
    with pytest.raises(StageError, match="do not fit the adapters") as caught:
        gathering.check_states(part.optimizer, tmp_path)
    assert "[4, 1280]" in caught.value.expected and "[8, 1280]" in caught.value.found


def test_states_of_an_earlier_layout_are_refused(tmp_path):
    """B of all experts was a matrix [out, r * experts]."""
    process = Process(None)
    process.train(range(1, 2))
    gathering.check_states(process.optimizer, tmp_path)
    states = process.optimizer.state[process.model["b"]]
    states["state1"] = states["state1"].permute(1, 2, 0).flatten(1)
    with pytest.raises(StageError, match="do not fit the adapters") as caught:
        gathering.check_states(process.optimizer, tmp_path)
    assert caught.value.found == "[1280, 8]"


def test_experts_whose_values_would_share_a_block_are_refused():
    fits, crosses = nn.Parameter(torch.empty(4, 320)), nn.Parameter(torch.empty(2, 320))
    gathering.check_blocks({"fits": fits})
    with pytest.raises(StageError, match="8-bit optimizer states") as caught:
        gathering.check_blocks({"fits": fits, "crosses": crosses})
    assert caught.value.found == "640 values of crosses"
