"""A rank of stage 03, without Axolotl and without other ranks."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from sparselong.errors import StageError
from sparselong.finetune import rank
from sparselong.finetune.training_run import RUN_KEY
from sparselong.processes import sharing
from sparselong.processes.sharing import Sharing

GIB = 2**30
PLAN = Sharing("auto", 2, 60 * GIB, 21 * GIB, 23 * GIB, "auto", "gpu", 0, 64 * GIB)


def test_other_ranks_see_a_lack_of_memory_with_plan_and_use(tmp_path, monkeypatch):
    """The watch tells them what its block raised: the failure must be explained inside of it."""
    seen: list[BaseException] = []

    @contextmanager
    def watched(_: Any) -> Any:
        try:
            yield
        except BaseException as error:
            seen.append(error)
            raise

    def train(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    config = SimpleNamespace(sequence_parallel_degree=2)
    run = SimpleNamespace(work=tmp_path, config=config)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(rank.TrainingRun, "open", lambda _: run)
    for name in ("tell_failures", "end_at_once"):
        monkeypatch.setattr(rank, name, lambda *_: None)
    monkeypatch.setattr(rank, "decide_sharing", lambda _: PLAN)
    monkeypatch.setattr(sharing, "_decided", PLAN)
    monkeypatch.setattr(rank, "shard_model", lambda _: {})
    monkeypatch.setattr(rank, "_train", train)
    for name in ("connect", "join"):
        monkeypatch.setattr(rank.ranks, name, lambda *_: None)
    monkeypatch.setattr(rank.ranks, "watched", watched)
    path = tmp_path / "axolotl.yaml"
    path.write_text(yaml.safe_dump({RUN_KEY: str(tmp_path)}))
    with pytest.raises(StageError, match="the GPU ran out of memory"):
        rank.main(path)
    (told,) = seen
    assert isinstance(told, StageError) and "21.00 GiB by the plan" in told.expected
    assert told.found.startswith("CUDA out of memory") and "(plan: 21.00 GiB)" in told.found
