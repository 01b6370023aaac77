"""Embeds, scores and takes the loss of rows whose vocabulary is sharded over the ranks of a group.

Single pieces can be disabled, which the tests must notice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from sparselong.kernels.experts import sum_parts
from sparselong.kernels.layer.cross_entropy import linear_cross_entropy
from sparselong.parallel.collectives import count_bytes
from sparselong.parallel.mesh import build_mesh
from sparselong.parallel.placement import Placement
from sparselong.parallel.vocabulary import embedding as embedding_module
from sparselong.parallel.vocabulary import loss as loss_module
from sparselong.parallel.vocabulary.replicated import ReplicatedVocabulary
from sparselong.parallel.vocabulary.sharded import ShardedVocabulary
from tests.distributed.training import Largest
from tests.poisoned import PoisonedTorch

mesh_of = functools.cache(lambda size: build_mesh(1, expert_size=size))


@dataclass(frozen=True)
class Case:
    """Rows of every rank of a group.

    Attributes:
        rows: number of every rank's rows.
        supervised: share of every rank's rows that have a label.
        vocab: number of tokens.
        labels: which tokens are labels; None: any.
        width: of a row.
        chunk_rows: rows of a rank that are processed at once.
        dtype: of rows and tables.
        whole_numbers: rows and tables are small whole numbers, so that products are exact and equal
            table rows have equal logits.
        scale: of the logits.
        broken: the piece that is disabled.
    """

    rows: tuple[int, ...]
    supervised: tuple[float, ...] = ()
    vocab: int = 31
    labels: range | None = None
    width: int = 12
    chunk_rows: int = 4
    dtype: torch.dtype = torch.float64
    whole_numbers: bool = False
    scale: float = 1.0
    broken: str | None = None


@dataclass(frozen=True)
class Inputs:
    """What a rank computes on, and the upstream gradient of its loss."""

    ids: torch.Tensor
    hidden: torch.Tensor
    labels: torch.Tensor
    upstream: float


@dataclass(frozen=True)
class Outcome:
    """What a rank computed; `sent` is by tag, `largest` in elements."""

    embedded: torch.Tensor
    loss: torch.Tensor
    dhidden: torch.Tensor
    loss_without_gradient: torch.Tensor
    scores: torch.Tensor
    best: torch.Tensor
    sent: dict[str, int]
    largest: int
    largest_of_vocabulary: int


def draw(case: Case) -> tuple[list[Inputs], torch.Tensor, torch.Tensor]:
    """Return every rank's inputs, and the whole tables of embedding and lm_head."""
    generator = torch.Generator().manual_seed(len(case.rows) + case.vocab)

    def tensor(*shape: int) -> torch.Tensor:
        if case.whole_numbers:
            return torch.randint(-2, 3, shape, generator=generator).to(case.dtype)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    embedding, head = tensor(case.vocab, case.width), tensor(case.vocab, case.width) * case.scale
    if case.whole_numbers:  # every token of the first half again
        head[-(case.vocab // 2) :] = head[: case.vocab // 2]
    inputs = []
    allowed = case.labels or range(case.vocab)
    for rank, count in enumerate(case.rows):
        ids = torch.randint(0, case.vocab, (1, count), generator=generator)
        labels = torch.randint(allowed.start, allowed.stop, (count,), generator=generator)
        share = case.supervised[rank] if case.supervised else 1.0
        labels[torch.rand(count, generator=generator) >= share] = -100
        inputs.append(Inputs(ids, tensor(count, case.width), labels, 0.3 * (rank + 1)))
    return inputs, embedding, head


def compute_alone(case: Case) -> list[Outcome]:
    """Return every rank's outcome on the whole tables, without exchanges."""
    found = []
    inputs, embedding, head = draw(case)
    for each in inputs:
        hidden = each.hidden.clone().requires_grad_()
        loss = linear_cross_entropy(hidden, head, each.labels)
        (dhidden,) = torch.autograd.grad(loss * each.upstream, hidden)
        logits = each.hidden @ head.T
        chosen = each.labels.clamp(min=0)[:, None]
        scores = logits.log_softmax(1).gather(1, chosen)[:, 0]
        embedded = embedding[each.ids]
        best = logits.argmax(1)
        found.append(Outcome(embedded, loss.detach(), dhidden, loss, scores, best, {}, 0, 0))
    return found


def compute(case: Case, device: str = "cpu") -> Outcome:
    """Return this rank's outcome; groups of as many ranks as the case has."""
    size = len(case.rows)
    mesh = mesh_of(size)
    placement = Placement(mesh.expert_rank, size)
    vocabulary = ShardedVocabulary(placement, mesh.expert_group, case.rows, case.chunk_rows)
    inputs, *tables = draw(case)
    mine = inputs[mesh.expert_rank]
    held = vocabulary.held(case.vocab)
    embedding, head = (t[held.start : held.stop].clone().to(device) for t in tables)
    ids, labels = mine.ids.to(device), mine.labels.to(device)
    hidden = mine.hidden.to(device).requires_grad_()
    poisoned = mock.patch.object(loss_module, "torch", PoisonedTorch())
    with Largest(case.vocab) as seen, count_bytes() as sent, _piece_off(case.broken), poisoned:
        embedded = vocabulary.embed(ids, embedding, case.vocab)
        loss = vocabulary.sum_losses(hidden, head, labels, case.vocab)
        (dhidden,) = torch.autograd.grad(loss * mine.upstream, hidden)
        counted = dict(sent)
        with torch.no_grad():
            again = vocabulary.sum_losses(hidden, head, labels, case.vocab)
        scores, best = vocabulary.score(hidden, head, labels.clamp(min=0), case.vocab)
    return Outcome(
        embedded.cpu(),
        loss.detach().cpu(),
        dhidden.cpu(),
        again.cpu(),
        scores.cpu(),
        best.cpu(),
        counted,
        seen.of_all,
        seen.of_vocabulary,
    )


def compute_replicated(case: Case, device: str = "cpu") -> list[torch.Tensor]:
    """Return embeddings, first row's logits, loss, scores and best tokens of rank 0's rows, which
    all ranks have."""
    mesh = mesh_of(len(case.rows))
    placement = Placement(mesh.expert_rank, len(case.rows))
    vocabulary = ReplicatedVocabulary(placement, mesh.expert_group, case.chunk_rows)
    inputs, *tables = draw(case)
    held = vocabulary.held(case.vocab)
    embedding, head = (t[held.start : held.stop].clone().to(device) for t in tables)
    ids, hidden, labels = (
        t.to(device) for t in (inputs[0].ids, inputs[0].hidden, inputs[0].labels)
    )
    with _piece_off(case.broken):
        found = (
            vocabulary.embed(ids, embedding, case.vocab),
            vocabulary.logits(hidden[:1][None], head, case.vocab),
            vocabulary.sum_losses(hidden, head, labels, case.vocab),
            *vocabulary.score(hidden, head, labels.clamp(min=0), case.vocab),
        )
    return [each.cpu() for each in found]


def replicated_never_synchronizes() -> bool:
    """Return True if embedding and logits of replicated rows do not wait for the GPU."""
    mesh = mesh_of(2)
    vocabulary = ReplicatedVocabulary(Placement(mesh.expert_rank, 2), mesh.expert_group)
    ids, table = torch.tensor([7], device="cuda"), torch.ones(5, 4, device="cuda")

    def step() -> torch.Tensor:
        return vocabulary.logits(vocabulary.embed(ids, table, 10), table, 10)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return logits.tolist() == [[4.0] * 10]


def peak_bytes(rows: int, vocab: int, width: int, chunk_rows: int) -> int:
    """Return the peak bytes that a loss in bf16 allocates on this rank's GPU of two."""
    mesh = mesh_of(2)
    place, group = Placement(mesh.expert_rank, 2), mesh.expert_group
    vocabulary = ShardedVocabulary(place, group, chunk_rows=chunk_rows)
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    held = len(vocabulary.held(vocab))
    table = torch.randn(held, width, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    vocabulary.sum_losses(hidden, table, labels, vocab)  # cuBLAS's workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vocabulary.sum_losses(hidden, table, labels, vocab).backward()
    return torch.cuda.max_memory_allocated() - before


def refused(case: Case, what: str, device: str = "cpu") -> str:
    """Return the error that this rank raises for an id or label out of range on the last rank."""
    size = len(case.rows)
    mesh = mesh_of(size)
    vocabulary = ShardedVocabulary(Placement(mesh.expert_rank, size), mesh.expert_group, case.rows)
    inputs, embedding, head = draw(case)
    mine = inputs[mesh.expert_rank]
    held = vocabulary.held(case.vocab)
    if mesh.expert_rank == size - 1:
        wrong = -1 if what.endswith("negative") else case.vocab
        (mine.ids[0] if what.startswith("id") else mine.labels)[-1] = wrong
    rows = slice(held.start, held.stop)
    try:
        if what.startswith("id"):
            ids, table = mine.ids.to(device), embedding[rows].to(device)
            vocabulary.embed(ids, table, case.vocab).cpu()
        elif what.startswith("label"):
            vocabulary.sum_losses(mine.hidden, head[rows], mine.labels, case.vocab)
        elif what.startswith("score"):
            vocabulary.score(mine.hidden, head[rows], mine.labels, case.vocab)
    except (IndexError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused_alone(name: str) -> str:
    """Return the error of arguments that are wrong on every rank."""
    size = 2
    mesh = mesh_of(size)
    place, group = Placement(mesh.expert_rank, size), mesh.expert_group
    vocabulary, replicated = ShardedVocabulary(place, group), ReplicatedVocabulary(place, group)
    table, hidden, labels = torch.zeros(5, 4), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    trained = torch.zeros(5, 4, requires_grad=True)
    calls = {
        "placement": lambda: ShardedVocabulary(Placement(0, 3), group),
        "rows": lambda: ShardedVocabulary(place, group, (3, 4)).embed(labels[:2], table, 10),
        "share": lambda: vocabulary.embed(labels, table, 13),
        "trained embedding": lambda: vocabulary.embed(labels, trained, 10),
        "trained head": lambda: vocabulary.sum_losses(hidden, trained, labels, 10),
        "dtype": lambda: vocabulary.score(hidden.half(), table, labels, 10),
        "two rows": lambda: replicated.logits(hidden[:2], table, 10),
        "gradient": lambda: replicated.sum_losses(
            hidden.clone().requires_grad_(), table, labels, 10
        ),
        "label": lambda: replicated.score(hidden, table, labels - 1, 10),
    }
    try:
        calls[name]()
    except ValueError as error:
        return str(error)
    return ""


def embed_with_checkpointing() -> bool:
    """Return whether a hook may require a gradient of the embedding's output, as transformers'."""
    size = 2
    mesh = mesh_of(size)
    vocabulary = ShardedVocabulary(Placement(mesh.expert_rank, size), mesh.expert_group)
    out = vocabulary.embed(torch.arange(4), torch.ones(5, 3), 10).requires_grad_(True)
    (gradient,) = torch.autograd.grad((2 * out).sum(), out)
    return bool((gradient == 2).all())


PIECES = ("label offset", "maximum", "sum of parts", "owner", "home", "first of ties")


@contextmanager
def _piece_off(piece: str | None) -> Iterator[None]:
    patch: Any = nullcontext()
    if piece == "label offset":
        original = loss_module.shard_statistics
        patch = mock.patch.object(
            loss_module, "shard_statistics", lambda logits, targets, _: original(logits, targets, 0)
        )
    elif piece == "maximum":
        combine = loss_module.combine_statistics

        def without_maximum(parts):
            mine = parts.clone()
            mine[..., 0] = parts[:1, :, 0]
            return combine(mine)

        patch = mock.patch.object(loss_module, "combine_statistics", without_maximum)
    elif piece == "sum of parts":
        patch = mock.patch.object(
            loss_module, "sum_parts", lambda parts, out: sum_parts(parts[:1], out)
        )
    elif piece == "home":
        start = loss_module.start_return

        def to_others(partial, counts, rank, group, tag):
            return start(partial.roll(1, 0), counts, rank, group, tag)

        patch = mock.patch.object(loss_module, "start_return", to_others)
    elif piece == "owner":
        patch = mock.patch.object(
            embedding_module, "take_owners", lambda parts, ids, _: parts[0].clone()
        )
    elif piece == "first of ties":
        gather = loss_module.start_all_gather

        def reversed_tokens(tensor, group, tag):
            pending = gather(tensor, group, tag)
            if tag == loss_module.BEST:
                pending.wait().copy_(pending.wait().flip(0))
            return pending

        patch = mock.patch.object(loss_module, "start_all_gather", reversed_tokens)
    with patch:
        yield
