"""What a pass through a model must know besides its arguments.

transformers hands no options through to an attention function, and nothing to the experts: what
decides how they run is said around the pass.

    with using(attention_backend="triton", deterministic=True):
        model(ids, labels=ids).loss.backward()

A block holds for the thread that entered it, and there for everything until it ends, whether by an
exception or not. It also holds in the threads in which autograd runs a backward pass that the
block's thread asks for: the settings lie among torch's own thread-local objects, which autograd
copies to its threads, as it does for torch.compile. A checkpointed layer's recomputation has the
settings of its forward pass, wherever and whenever it takes place (`runtime/recompute.py`).

A thread started inside a block begins with the defaults, so that two threads may run models side by
side; `restoring(settings)` gives it the block's. A generator has no settings of its own: one that
yields inside a block lends them to its caller until it goes on. End the block before the yield.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

_KEY = "sparselong settings"


class SequenceShard(Protocol):
    """This process's place in a sequence that several processes share."""

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
        """Return the attention of the shard's queries to the whole sequence's keys."""
        ...


class ExpertExchange(Protocol):
    """Which experts this process holds, and how tokens reach those of other processes."""


class VocabularyExchange(Protocol):
    """Which part of the vocabulary this process holds, and how losses over it are joined."""


@dataclass(frozen=True)
class Settings:
    """What a pass must know.

    Attributes:
        attention_backend: one of `kernels.attention.BACKENDS`, or "auto": the fastest measured one
            for each kind of layer. A call that the named one cannot take raises.
        deterministic: whether attention's gradients must be the same bits in every run.
        sequence: the sequence that this pass's tokens are a shard of; None: sequences are whole.
        inference_tokens: tokens that go through a layer's experts at once where no gradient is
            asked for; None: all. A pass without gradients holds tokens * top_k * (hidden +
            2 * inner) values beside its input and output; fewer tokens make its products slower.
        experts: where experts are; None: all of them here.
        vocabulary: where the vocabulary is; None: all of it here.
    """

    attention_backend: str = "auto"
    deterministic: bool = False
    sequence: SequenceShard | None = None
    inference_tokens: int | None = None
    experts: ExpertExchange | None = None
    vocabulary: VocabularyExchange | None = None


_DEFAULT = Settings()


@dataclass(frozen=True, eq=False)
class _Block:
    """One entered block; told from others by its identity."""

    settings: Settings


def current() -> Settings:
    """Return the settings of the pass that this thread runs."""
    blocks = _blocks()
    return blocks[-1].settings if blocks else _DEFAULT


def using(**changes: Any) -> AbstractContextManager[Settings]:
    """Return a block in which the current settings hold with these changes.

    Args:
        changes: fields of `Settings` by name; the others stay as they are.

    Raises:
        TypeError: there is no such field.
    """
    return restoring(replace(current(), **changes))


@contextmanager
def restoring(settings: Settings) -> Iterator[Settings]:
    """Let exactly these settings hold inside the block, whatever held before.

    Blocks may end in any order, as those of generators do: each takes back its own.
    """
    block = _Block(settings)
    _set_blocks((*_blocks(), block))
    try:
        yield settings
    finally:
        _set_blocks(tuple(other for other in _blocks() if other is not block))


def _blocks() -> tuple[_Block, ...]:
    """The blocks that this thread is in, the innermost last."""
    if not torch._C._is_key_in_tls(_KEY):
        return ()
    return torch._C._get_obj_in_tls(_KEY)


def _set_blocks(blocks: tuple[_Block, ...]) -> None:
    # A thread must not end with an object left there: see torch.autograd.graph. torch 2.11 cannot
    # take one out.
    if blocks or not hasattr(torch._C, "_remove_obj_from_tls"):
        torch._C._stash_obj_in_tls(_KEY, blocks)
    else:
        torch._C._remove_obj_from_tls(_KEY)
