"""Settings of a pass through a model that cannot be passed as arguments.

transformers passes no options to an attention function, and none to the experts. A block around
the pass sets them instead.

    with using(attention_backend="triton", deterministic=True):
        model(ids, labels=ids).loss.backward()

A block applies to the thread that entered it, until the block ends or raises. It also applies in
the threads where autograd runs a backward pass. Autograd does not say which thread started one, so
these threads use the settings of the threads that run models, which must agree; otherwise
`current` raises. A checkpointed layer's recomputation always uses the settings of its forward pass,
whatever thread it runs in and however late (`runtime/recompute.py`).

A thread started inside a block begins with the defaults, so that two threads can run models
concurrently; `restoring(settings)` gives it the block's settings. A generator shares its caller's
settings: if it yields inside a block, the block applies to the caller until the generator resumes.
End the block before the yield.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch


class SequenceShard(Protocol):
    """This process's shard of a sequence that is sharded over several processes."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor,
        *,
        window: int | None,
        scale: float | None,
        backend: str | None,
        deterministic: bool,
    ) -> torch.Tensor:
        """Return the shard's queries' attention to the keys of the whole sequence."""
        ...


class ExpertExchange(Protocol):
    """The experts that this process holds, and the exchange of rows with those that hold others.

    A model that is opened while the setting applies holds only these experts; its passes need it.
    """

    def divide(self, most: int) -> Sequence[ExpertExchange] | None:
        """Return exchanges for slices of at most `most` rows, the same number in every process.

        None: all processes bring as many rows, and can divide them without an exchange for each.
        """
        ...

    def held(self, experts: int) -> range:
        """Return which of a layer's experts this process holds."""
        ...

    def run(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        stack: Any,
        adapters: Any,
        *,
        experts: int,
        alpha: float,
        limit: float,
    ) -> torch.Tensor:
        """Return all experts' weighted sum for this process's rows.

        The arguments are those of `kernels.experts.expert_mlp`, with the held experts in the stack
        and the adapters, and the layer's number of experts.
        """
        ...


class VocabularyExchange(Protocol):
    """The vocabulary shard that this process holds, and how results over shards are combined.

    Tables are the rows of embedding and lm_head that this process holds. A model that is opened
    while the setting applies holds only these rows; its passes need it.
    """

    def held(self, vocab: int) -> range:
        """Return which of the vocabulary's rows this process holds."""
        ...

    def embed(self, ids: torch.Tensor, table: torch.Tensor, vocab: int) -> torch.Tensor:
        """Return the embeddings of this process's tokens, [..., width]."""
        ...

    def sum_losses(
        self, hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor, vocab: int
    ) -> torch.Tensor:
        """Return the summed cross-entropy of this process's rows, as `linear_cross_entropy`."""
        ...

    def score(
        self, hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor, vocab: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's log-probability of its label, and the token of its largest logit."""
        ...


@dataclass(frozen=True)
class Settings:
    """Settings of one pass.

    Attributes:
        attention_backend: one of `kernels.attention.BACKENDS`, or "auto": the fastest measured one
            for each kind of layer. A named backend raises on a call that it does not support.
        deterministic: whether attention's gradients must be the same bits in every run.
        sequence: this process's shard of the sequence; None: sequences are not sharded.
        inference_tokens: tokens that a layer's experts process at once when no gradient is needed;
            None: all. A pass without gradients holds tokens * top_k * (hidden + 2 * inner) values
            in addition to its input and output; fewer tokens make its matmuls slower.
        experts: how experts are sharded; None: this process holds all of them.
        vocabulary: how the vocabulary is sharded; None: this process holds all of it.
        expert_placement: where a model that is opened keeps the packed weights of its experts: on
            its device, or in host memory, from which layers are copied ahead of use. Passes do not
            depend on it.
    """

    attention_backend: str = "auto"
    deterministic: bool = False
    sequence: SequenceShard | None = None
    inference_tokens: int | None = None
    experts: ExpertExchange | None = None
    vocabulary: VocabularyExchange | None = None
    expert_placement: Literal["gpu", "host"] = "gpu"


_DEFAULT = Settings()


@dataclass(frozen=True, eq=False)
class _Block:
    """One entered block; blocks compare by identity."""

    settings: Settings


def _is_foreign() -> bool:
    """Return whether this thread was started by other means than Python's."""
    return isinstance(threading.current_thread(), threading._DummyThread)


class _Thread(threading.local):
    """The blocks that a thread has open, innermost last."""

    def __init__(self) -> None:
        self.blocks = _Blocks()
        if not _is_foreign():
            with _lock:
                _all_blocks.add(self.blocks)


class _Blocks(list[_Block]):
    """A list that can be referred to weakly, and is equal to itself alone."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = object.__eq__


_all_blocks: weakref.WeakSet[_Blocks] = weakref.WeakSet()
"""Those of every live thread of Python's that has asked for its settings."""
_lock = threading.Lock()
_thread = _Thread()


def current() -> Settings:
    """Return the settings of the pass that this thread runs.

    Raises:
        RuntimeError: this thread is autograd's, and several threads have different settings.
    """
    blocks = _thread.blocks
    if blocks:
        return blocks[-1].settings
    return _settings_of_others() if _is_autograds() else _DEFAULT


def _is_autograds() -> bool:
    """Return whether autograd started this thread, for a backward pass that is running in it."""
    return torch._C._current_graph_task_id() != -1 and _is_foreign()


def _settings_of_others() -> Settings:
    with _lock:
        threads = list(_all_blocks)
    found = [blocks[-1].settings if blocks else _DEFAULT for blocks in threads]
    if any(settings != found[0] for settings in found):
        raise RuntimeError(
            "a backward pass runs in autograd's thread while several threads have different "
            "settings: checkpoint layers with runtime.checkpoint_contexts, or run one at a time"
        )
    return found[0] if found else _DEFAULT


def using(**changes: Any) -> AbstractContextManager[Settings]:
    """Return a block that applies the current settings with these changes.

    Args:
        **changes: fields of `Settings` by name; the others keep their values.

    Raises:
        TypeError: there is no such field.
    """
    return restoring(replace(current(), **changes))


@contextmanager
def restoring(settings: Settings) -> Iterator[Settings]:
    """Apply exactly these settings inside the block, whatever applied before.

    Blocks may end in any order, as those of generators do: each removes only its own settings.

    Args:
        settings: the settings to apply, usually another thread's `current()`.
    """
    block, blocks = _Block(settings), _thread.blocks
    blocks.append(block)
    try:
        yield settings
    finally:
        blocks.remove(block)
