"""An evaluation's predictions, collected by a process that holds parts of model and sequences."""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sparselong.finetune.watching import predictions
from sparselong.finetune.watching.predictions import Predictions
from sparselong.model import NAME
from sparselong.model.fused import chunk_loss
from sparselong.model.loading import load_model
from sparselong.parallel.apply import shard_model, share_batch
from sparselong.parallel.mesh import Mesh, build_mesh
from sparselong.processes import world
from sparselong.runtime.settings import using

IGNORED = -100
Row = tuple[list[int], list[bool]]
mesh_of = functools.cache(lambda context, experts: build_mesh(context, expert_size=experts))


def collect(
    base: Path,
    rows: list[Row],
    place: str,
    context_size: int,
    expert_size: int,
    broken: str | None = None,
) -> dict[str, Any]:
    """Evaluate this rank's part of the rows, two in a batch; return the function's figures."""
    mesh = mesh_of(context_size, expert_size)
    with (
        mock.patch.object(world, "_mesh", mesh),
        PIECES[broken]() if broken else nullcontext(),
        using(**shard_model(mesh)),
    ):
        model = load_model(base, device=torch.device("cpu"), attn_implementation=NAME)
        return collect_with(model, rows, place, mesh)


@torch.no_grad()
def collect_with(model: Any, rows: list[Row], place: str, mesh: Mesh | None) -> dict[str, Any]:
    """Do so with an opened model."""
    chunk_loss(model)
    collected = Predictions(place)
    batches = [make_batch(rows[at : at + 2]) for at in range(0, len(rows), 2)]
    size, number = (mesh.data_size, mesh.data_rank) if mesh else (1, 0)
    nothing = {**batches[0], "labels": torch.full_like(batches[0]["labels"], IGNORED)}
    batches += [nothing] * (-len(batches) % size)
    with collected.catching(model):
        for batch in batches[number::size]:
            shard, changes = share_batch(batch, mesh)
            with using(**changes):
                model(**shard, num_items_in_batch=1, use_cache=False)
                rows_and_tokens = tuple(batch["input_ids"].shape)
                collected.add(model.lm_head, shard, rows_and_tokens, mesh)
    collected.finish()
    return collected.figures


def make_batch(rows: list[Row]) -> dict[str, torch.Tensor]:
    longest = max(len(tokens) for tokens, _ in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
    }
    for row, (tokens, supervised) in enumerate(rows):
        ids = torch.tensor(tokens)
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = ids.where(torch.tensor(supervised), IGNORED)
    return batch


@contextmanager
def _in_order_of_ranks() -> Any:
    """Join the ranks' tokens without sorting them."""
    with mock.patch.object(predictions.numpy, "lexsort", lambda keys: range(len(keys[0]))):
        yield


@contextmanager
def _own_tokens_only() -> Any:
    with mock.patch.object(world, "collect", lambda value: [value]):
        yield


PIECES = {"order": _in_order_of_ranks, "tokens of others": _own_tokens_only}
