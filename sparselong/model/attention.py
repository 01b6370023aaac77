"""The attention kernels behind transformers' doors.

Three ways in, one function: `from_pretrained(..., attn_implementation="sparselong")` (plain
transformers, TRL, Axolotl), `sparselong.patch_attention()` for code that does not choose an
implementation, and the plain assignment
`modeling_gpt_oss.eager_attention_forward = sparselong.attention_forward`.

transformers says which tokens belong together in different ways, and all of them come down to
boundaries between *documents*, neighbouring tokens that may see each other:

| what arrives                 | a token starts a document where …                           |
|------------------------------|-------------------------------------------------------------|
| nothing                      | its position id is not its predecessor's plus one (packing) |
| 2-d padding mask             | padding begins or ends, or as above                         |
| 4-d mask (eager's, prepared) | it does not see its predecessor                             |

With a cache, the keys before the first query have no position ids; the padding mask alone decides
there. Boundaries are found once per forward pass and kept for its other layers. A padded stretch is
a document of its own: its outputs mean nothing, as with every implementation.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparselong.config import Config
from sparselong.kernels.attention import attention
from sparselong.kernels.attention_choice import BACKENDS
from sparselong.kernels.attention_mask import mark_starts

NAME = "sparselong"


@dataclass(frozen=True)
class Choice:
    """Which backend attends ("auto": the fastest measured one for each kind of layer), and whether
    its gradients must be the same to the bit in every run."""

    backend: str = "auto"
    deterministic: bool = False


_choice = Choice()


def implementation(config: Config) -> str:
    """The `attn_implementation` that the config asks for: ours, or transformers' eager."""
    return NAME if config.flash_attention else "eager"


def choose_attention(backend: str, deterministic: bool) -> None:
    """Makes every model of this process attend by this backend from now on.

    For the process, as `torch.use_deterministic_algorithms` is: transformers hands no options
    through to an attention function. A call that the backend cannot take raises there; nothing else
    is put in its place.

    Raises:
        ValueError: there is no such backend.
    """
    global _choice
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: {backend!r}; allowed: auto, {', '.join(BACKENDS)}")
    _choice = Choice(backend, deterministic)


def chosen_attention() -> Choice:
    """What `choose_attention` was last told."""
    return _choice


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """gpt-oss attention in transformers' calling convention.

    Args:
        module: the GptOssAttention, whose `sinks` take part.
        query: [batch, heads, queries, head_dim]; key, value: [batch, kv_heads, keys, head_dim].
        attention_mask: none, bool [batch, keys] (True where a token is), or [batch, 1, queries,
            keys], bool or additive.
        position_ids: [batch or 1, queries]; positions that start anew separate packed documents.

    Returns:
        [batch, queries, heads, head_dim], and no attention weights.

    Raises:
        ValueError: from `kernels.attention.attention`, for what it cannot take (dropout, …).
    """
    queries, keys = query.shape[2], key.shape[2]
    boundaries = _boundaries(attention_mask, position_ids, query.shape[0], queries, keys)
    output, _ = attention(
        query,
        key,
        value,
        module.sinks,  # type: ignore[arg-type]
        cu_seqlens=boundaries,
        window=sliding_window,
        scale=scaling,
        query_offset=keys - queries,
        dropout=dropout,
        backend=None if _choice.backend == "auto" else _choice.backend,
        deterministic=_choice.deterministic,
    )
    return output.transpose(1, 2), None


class _LastBoundaries:
    """The boundaries of the tensors seen last: every layer of a forward pass asks for the same."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.value: torch.Tensor | None = None

    def find(
        self,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        batch: int,
        queries: int,
        keys: int,
    ) -> torch.Tensor | None:
        tensors = (mask, positions)
        known = len(self.key) == 5 and self.key[2:] == (batch, queries, keys)
        for reference, tensor in zip(self.key[:2], tensors, strict=False):
            known = known and (reference() if reference else None) is tensor
        if not known:
            self.value = find_boundaries(mask, positions, batch, queries, keys)
            references = [None if t is None else weakref.ref(t) for t in tensors]
            self.key = (*references, batch, queries, keys)
        return self.value


_boundaries = _LastBoundaries().find


def find_boundaries(
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    batch: int,
    queries: int,
    keys: int,
) -> torch.Tensor | None:
    """Where documents begin on the flattened [batch, keys] axis; see the module's table.

    Returns:
        int32 [n + 1], ending in batch · keys; None where every row is one document.
    """
    tensor = mask if mask is not None else positions
    if tensor is None:
        return None
    starts = torch.zeros(batch, keys, dtype=torch.bool, device=tensor.device)
    known = positions if queries == keys else None
    if mask is not None and mask.ndim == 4:
        starts |= _starts_of_mask(mask, batch, queries, keys)
        mark_starts(starts, None, None)
    else:
        mark_starts(starts, None if mask is None else mask[:, -keys:], known)
    flat = starts.flatten().nonzero().flatten()
    if len(flat) == batch:
        return None
    return torch.cat([flat, flat.new_tensor([batch * keys])]).to(torch.int32)


def _starts_of_mask(mask: torch.Tensor, batch: int, queries: int, keys: int) -> torch.Tensor:
    """bool [batch, keys] from a 4-d mask: tokens that do not see the one before them."""
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    visible = visible[..., :keys].expand(batch, queries, keys)
    starts = torch.zeros(batch, keys, dtype=torch.bool, device=mask.device)
    offset = keys - queries
    if offset:  # keys from a cache: what the first query sees tells padding from tokens
        seen = visible[:, 0, : offset + 1]
        starts[:, 1 : offset + 1] = seen[:, 1:] != seen[:, :-1]
    before = torch.diagonal(visible, offset - 1, 1, 2) if offset else None
    if before is None:
        starts[:, 1:] = ~torch.diagonal(visible, -1, 1, 2)
    else:
        starts[:, offset:] = ~before
    return starts


def patch_attention() -> None:
    """Makes every gpt-oss model of this process attend through these kernels.

    Also one whose configuration says `eager`, which is what transformers chooses by default.
    """
    from transformers.models.gpt_oss import modeling_gpt_oss

    modeling_gpt_oss.eager_attention_forward = attention_forward


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
