"""How many rows are exchanged at once: more where all GPUs of the group reach each other's memory.

tests/distributed covers the exchange itself with either number of chunks.
"""

from typing import Any
from unittest import mock

import pytest
import torch

from sparselong.parallel import apply
from sparselong.parallel import mesh as meshes
from sparselong.parallel.experts import FAR_ROWS, NEAR_ROWS

GROUP: Any = None


@pytest.mark.parametrize(("near", "rows"), [(True, NEAR_ROWS), (False, FAR_ROWS)])
def test_near_gpus_exchange_more_rows_at_once(near, rows):
    mesh = meshes.Mesh(0, 1, 0, 4, GROUP, GROUP, GROUP, 0, 4, GROUP, near, GROUP)
    with mock.patch.object(apply, "ShardedVocabulary"):  # it asks its group
        assert apply.shard_model(mesh)["experts"].chunk_rows == rows


@pytest.mark.parametrize(
    ("backend", "disabled", "reach", "others", "near"),
    [
        ("nccl", None, True, 1, True),
        ("nccl", "0", True, 1, True),
        ("nccl", "1", True, 1, False),
        ("nccl", None, False, 1, False),
        ("nccl", None, True, 0, False),  # another process cannot reach this one's memory
        ("gloo", None, True, 1, False),
    ],
)
def test_near_is_what_all_processes_can(monkeypatch, backend, disabled, reach, others, near):
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    if disabled:
        monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)

    def can_access(own: int, other: int) -> bool:
        return reach and own != other

    cuda = torch.cuda
    with (
        mock.patch.object(meshes.dist, "get_backend", lambda _: backend),
        mock.patch.object(cuda, "current_device", lambda: 1),
        mock.patch.object(cuda, "device_count", lambda: 4),
        mock.patch.object(cuda, "can_device_access_peer", can_access),
        mock.patch.object(meshes, "all_gather", lambda own, *_: [own, torch.tensor([others])]),
    ):
        assert meshes._is_near(GROUP) is near
