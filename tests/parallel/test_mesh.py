"""The options of NCCL's process groups, which no test on a CPU creates."""

from types import SimpleNamespace
from typing import Any

import pytest

from sparselong.parallel import mesh as meshes


@pytest.mark.parametrize("expert_size", [1, 2])
def test_nccl_takes_few_buffers(monkeypatch, expert_size):
    made: dict[tuple[int, ...], Any] = {}

    def options(**given: Any) -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace(max_ctas=None), **given)

    def new_group(ranks: list[int], timeout: Any, pg_options: Any) -> str:
        made[tuple(ranks)] = pg_options
        return "group"

    dist = meshes.dist
    nccl = SimpleNamespace(Options=options)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_backend", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(meshes, "_is_near", lambda _: False)
    meshes.build_mesh(2, expert_size=expert_size)
    pairs = {ranks: given for ranks, given in made.items() if ranks in ((0, 1), (2, 3))}
    assert len(pairs) == 2 and all(given.is_high_priority_stream for given in pairs.values())
    for given in made.values():
        assert given.config.max_ctas == meshes.MOST_BLOCKS
