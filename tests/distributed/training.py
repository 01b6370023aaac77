"""Trains a small gpt-oss with LoRA for a few steps, in one process or in shards; single pieces can
be disabled, which the tests must notice."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssConfig, GptOssForCausalLM

from sparselong.kernels.attention import torch_backend as attention_torch
from sparselong.model import attention as _registers  # noqa: F401
from sparselong.model.fused import chunk_loss
from sparselong.parallel.apply import share_batch
from sparselong.parallel.collectives import count_bytes
from sparselong.parallel.gradients import reduce_gradients
from sparselong.parallel.loss import add_losses, count_step, mean_loss, shift_labels
from sparselong.parallel.mesh import Mesh, build_mesh
from sparselong.parallel.sequence import attention as sharded
from sparselong.parallel.sequence.shard import IGNORED
from sparselong.runtime.recompute import checkpoint_contexts
from sparselong.runtime.settings import using

Batch = dict[str, torch.Tensor]
mesh_of = functools.cache(build_mesh)  # create the groups once per process


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        steps: micro-batches by step, accumulation step and data rank.
        window: window of the sliding layers.
        keep: whether checkpointing keeps full attention; None disables checkpointing.
        heads_k_stride: KV heads gathered at a time, of two.
        broken: piece to disable, one of `PIECES` or `CHUNKS`.
        experts_per_token: of four; with four, rounding cannot change the routing.
    """

    steps: list[list[list[Batch]]]
    window: int = 8
    keep: bool | None = None
    heads_k_stride: int = 1
    broken: str | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    vocabulary: int = 96
    layers: int = 4
    experts_per_token: int = 2


@dataclass
class Result:
    """Losses by step, evaluation loss, gradients of the first step, final weights, and bytes sent
    by tag."""

    losses: list[float] = field(default_factory=list)
    eval_loss: float = 0.0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    sent_bytes: dict[str, int] = field(default_factory=dict)


def make_model(run: Run) -> nn.Module:
    """Alternate both kinds of layers; train the sinks, and LoRA on q, k, v and o."""
    torch.manual_seed(0)
    on_gpu = run.device == "cuda"
    config = GptOssConfig(
        num_hidden_layers=run.layers, vocab_size=run.vocabulary,
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64 if on_gpu else 16,
        num_local_experts=4, num_experts_per_tok=run.experts_per_token,
        sliding_window=run.window,
    )  # fmt: skip
    model = GptOssForCausalLM._from_config(
        config, attn_implementation="sparselong", experts_implementation="eager"
    )
    model = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name or "sinks" in name:  # so that no gradient is zero
            nn.init.normal_(parameter, std=1.0 if "sinks" in name else 0.1)
            parameter.requires_grad_(True)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    if run.keep is not None:
        contexts = partial(checkpoint_contexts, run.keep)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        model.enable_input_require_grads()
    return model.to(run.device).train()


def train_alone(run: Run) -> Result:
    """Train in one process on whole sequences with transformers' loss, as the reference."""
    model = make_model(run)

    def loss_of(batch: Batch, count: Any) -> torch.Tensor:
        return model(**batch, num_items_in_batch=count, use_cache=False).loss

    def go(step: list[list[Batch]]) -> float:
        batches = [batch for micro in step for batch in micro]
        count = sum(int((shift_labels(b["labels"]) != IGNORED).sum()) for b in batches)
        losses = [loss_of(to(batch, run.device), max(count, 1)) for batch in batches]
        sum(losses).backward()  # type: ignore[union-attr]
        return float(sum(losses).detach())  # type: ignore[union-attr]

    result = _train(run, model, go)
    with torch.no_grad(), _precision(run):
        last = to(run.steps[-1][0][0], run.device)
        count = int((shift_labels(last["labels"]) != IGNORED).sum())
        result.eval_loss = float(loss_of(last, count)) if count else math.nan
    return result


def train_sharded(run: Run, context_size: int) -> Result:
    """Run this rank's part of the same training."""
    mesh = mesh_of(context_size)
    model = make_model(run)
    if run.broken != "loss in chunks":
        chunk_loss(model.get_base_model())  # type: ignore[operator]
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss_of(local: Batch, count: Any) -> torch.Tensor:
        return model(**local, num_items_in_batch=count, use_cache=False).loss

    def go(step: list[list[Batch]]) -> float:
        batches = [micro[mesh.data_rank] for micro in step]
        count = count_step(batches, mesh, sum(b["input_ids"].numel() for b in batches)).divisor
        total = torch.zeros((), device=run.device)
        for batch in batches:
            local, changes = _share(batch, mesh, run)
            with using(**changes):
                loss = loss_of(local, count)
            loss.backward()  # recomputation uses the forward pass's settings
            total += loss.detach()
        reduce_gradients(trained, mesh)
        return float(add_losses(total, mesh))

    with _piece_off(run.broken), count_bytes() as sent:
        result = _train(run, model, go)
    result.sent_bytes = dict(sent)
    with _piece_off(run.broken), torch.no_grad(), _precision(run):
        # The last evaluation batch is one sequence: the other data ranks get nothing.
        local, changes = _share(run.steps[-1][0][0], mesh, run)
        if mesh.data_rank > 0:
            labels = {key for key in local if key.endswith("labels")}
            local |= {key: torch.full_like(local[key], IGNORED) for key in labels}
        with using(**changes):
            loss = loss_of(local, 1)
        result.eval_loss = mean_loss([(loss, local)], mesh)
    return result


def to(batch: Batch, device: str) -> Batch:
    return {key: tensor.to(device) for key, tensor in batch.items()}


def _share(batch: Batch, mesh: Mesh, run: Run) -> tuple[Batch, dict[str, Any]]:
    shared, changes = share_batch(to(batch, run.device), mesh, run.heads_k_stride)
    local = dict(shared)
    if run.broken == "label pre-shift":
        local["shift_labels"] = shift_labels(local["labels"])
    if run.broken == "position ids":
        positions = torch.arange(local["input_ids"].shape[1], device=run.device)
        local["position_ids"] = positions.expand_as(local["input_ids"])
    return local, changes


def _train(run: Run, model: nn.Module, go: Any) -> Result:
    result = Result()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, eps=1e-3)
    with _precision(run):
        for step in run.steps:
            result.losses.append(go(step))
            if not result.gradients:
                result.gradients = {n: p.grad.cpu().clone() for n, p in trained.items()}  # type: ignore
            optimizer.step()
            optimizer.zero_grad()
    result.weights = {n: p.detach().cpu().clone() for n, p in trained.items()}
    return result


def _precision(run: Run) -> Any:
    if run.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(run.device, run.dtype)


class Largest(TorchDispatchMode):
    """Records the largest element count of any tensor created inside the block, overall and with a
    vocabulary axis. A view counts with the storage it refers to."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.of_all, self.of_vocabulary = vocabulary, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.of_all = max(self.of_all, elements)
                if self.vocabulary in tensor.shape:
                    self.of_vocabulary = max(self.of_vocabulary, elements)
        return made


def largest_tensors(run: Run, context_size: int) -> tuple[int, int]:
    """Return the elements of this rank's largest tensor and of its largest tensor with a vocabulary
    axis, in training and evaluation."""
    with Largest(run.vocabulary) as seen:
        train_sharded(run, context_size)
    return seen.of_all, seen.of_vocabulary


def peak_bytes(run: Run, context_size: int) -> int:
    """Return the peak bytes allocated on this rank's GPU in training and evaluation."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_sharded(run, context_size)
    return torch.cuda.max_memory_allocated() - before


CHUNKS = ("loss in chunks", "queries in chunks")
PIECES = ("halo", "label pre-shift", "position ids", "sink", "sink twice", "returned gradients")


@contextmanager
def _piece_off(piece: str | None) -> Iterator[None]:
    if piece == "halo":
        start = sharded.start_exchange

        def without_halo(own, job, tag):
            pending = start(own, job, tag)
            if tag == sharded.HALO:
                pending.wait().zero_()
            return pending

        patch: Any = mock.patch.object(sharded, "start_exchange", without_halo)
    elif piece in ("sink", "sink twice"):
        load, factor = sharded.load_backend, 0 if piece == "sink" else 2

        def with_other_dsinks(name):
            backend = load(name)

            def attend_backward(dout, done, call):
                *grads, dsinks = backend.attend_backward(dout, done, call)
                return *grads, dsinks * factor

            return backend._replace(attend_backward=attend_backward)

        patch = mock.patch.object(sharded, "load_backend", with_other_dsinks)
    elif piece == "returned gradients":

        class Lost(sharded._Return):
            def finish(self, dkv):
                self.pending.wait().zero_()
                super().finish(dkv)

        patch = mock.patch.object(sharded, "_Return", Lost)
    elif piece == "queries in chunks":
        patch = mock.patch.dict(attention_torch.attention_torch.__kwdefaults__, rows=1 << 30)
    else:
        patch = nullcontext()
    with patch:
        yield
