"""transformers' entry points to the attention kernels.

One function has three entry points: `from_pretrained(..., attn_implementation="sparselong")` (plain
transformers, TRL, Axolotl), `sparselong.patch_attention()` for code that does not choose an
implementation, and the plain assignment
`modeling_gpt_oss.eager_attention_forward = sparselong.attention_forward`.

transformers describes which tokens may attend to each other in several ways. All reduce to
boundaries between *documents*, runs of consecutive tokens that may attend to each other:

| argument                     | a token starts a document where …                           |
|------------------------------|-------------------------------------------------------------|
| none                         | its position id is not its predecessor's plus one (packing) |
| 2-d padding mask             | padding begins or ends, or as above                         |
| 4-d mask (eager's, prepared) | it does not see its predecessor                             |

With a cache, keys before the first query have no position ids, so the padding mask alone decides
there. Boundaries are found once per forward pass and cached for its other layers
(`runtime/last_results.py`). A run of padding is a separate document; its outputs are meaningless,
as in every implementation.

Masks that documents cannot express are rejected: 4-d masks that are not causal within documents or
that add anything but minus infinity, documents that continue after padding, and caches with keys
after the last query (transformers' static caches).

`runtime/settings.py` selects the backend and whether gradients must be deterministic. If it names a
sequence, the tokens are a shard of that sequence, whose layout gives the document boundaries; the
same function then attends to the other shards' keys too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import flash_attention_mask

from sparselong.config import Config
from sparselong.kernels import make_opaque
from sparselong.kernels.attention import (
    Choice,
    SavedForward,
    attention,
    mark_starts,
    refuse_gaps,
    run_backward,
    run_forward,
)
from sparselong.runtime import Settings, call_once, current

NAME = "sparselong"
_ROWS_CHECKED = 1024


def implementation(config: Config) -> str:
    """Return the `attn_implementation` that the config selects: ours, or transformers' eager."""
    return NAME if config.flash_attention else "eager"


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
    """Run gpt-oss attention in transformers' calling convention.

    Args:
        module: the GptOssAttention, which provides `sinks`.
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, keys, head_dim].
        value: like key.
        attention_mask: None, bool [batch, keys] (True: token), or a 4-d mask (`find_boundaries`).
        scaling: factor of the scores; None means head_dim ** -0.5.
        dropout: must be 0.
        sliding_window: tokens that a query sees, itself included; None for full attention.
        position_ids: [batch or 1, queries]; positions that restart separate packed documents.

    Returns:
        [batch, queries, heads, head_dim], and None instead of attention weights.

    Raises:
        ValueError: The module has no sinks, or the mask or another argument is not supported.
    """
    sinks = _check_arguments(module, attention_mask, dropout)
    if torch.is_autocast_enabled(query.device.type):  # queries and keys leave rotary in fp32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if torch.compiler.is_compiling():
        kinds = (attention_mask, position_ids, sliding_window, scaling)
        return _attend_in_graph((query, key, value, sinks), *kinds)
    settings = current()
    choice: dict[str, Any] = {"window": sliding_window, "scale": scaling}
    choice["backend"] = _named_backend(settings)
    if settings.sequence is None:
        sizes = _sizes(query, key)
        choice["cu_seqlens"] = _boundaries(attention_mask, position_ids, sizes, sliding_window)
        offset = key.shape[2] - query.shape[2]
        output, _ = attention(query, key, value, sinks, query_offset=offset, **choice)
    else:
        choice["deterministic"] = settings.deterministic
        output = settings.sequence.attend(query, key, value, sinks, **choice)
    return output.transpose(1, 2), None


def _check_arguments(
    module: nn.Module, attention_mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Return the module's sinks, or raise for what `attention_forward` does not support."""
    sinks = getattr(module, "sinks", None)
    if sinks is None:
        raise ValueError(f"module: {type(module).__name__} without sinks; allowed: gpt-oss's")
    if dropout != 0:
        raise ValueError(f"dropout: {dropout!r}; allowed: 0, dropout is not supported")
    if torch.compiler.is_compiling():
        return sinks  # settings are read when the graph runs
    if attention_mask is not None and current().sequence is not None:
        raise ValueError(
            f"attention_mask: {type(attention_mask).__name__} in a shard of a sequence; "
            "allowed: None, the layout gives the document boundaries"
        )
    return sinks


def _named_backend(settings: Settings) -> str | None:
    return None if settings.attention_backend == "auto" else settings.attention_backend


def _sizes(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int, int]:
    """Return the number of rows, and queries and keys per row."""
    return query.shape[0], query.shape[2], key.shape[2]


def _boundaries(
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    sizes: tuple[int, int, int],
    window: int | None,
) -> torch.Tensor | None:
    """Return `find_boundaries`, computed once for all layers; of a 4-d mask for all of a kind."""
    if mask is None or mask.ndim != 4:
        window = None
    return call_once(find_boundaries, (mask, positions), *sizes, window)


def find_boundaries(
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    window: int | None = None,
) -> torch.Tensor | None:
    """Return document boundaries on the flattened [batch, keys] axis; see the module docstring.

    Args:
        mask: bool [batch, keys], True for tokens; or [batch, 1, queries, keys], bool or additive.
        positions: `attention_forward`'s position_ids.
        batch: number of rows.
        queries: queries per row.
        keys: keys per row.
        window: the layer's sliding window, which a 4-d mask must include.

    Returns:
        int32 [n + 1], ending in batch · keys; None if every row is one document.

    Raises:
        ValueError: Documents cannot express the mask.
    """
    tensor = mask if mask is not None else positions
    if tensor is None:
        return None
    starts = torch.zeros(batch, keys, dtype=torch.bool, device=tensor.device)
    known = positions if queries == keys else None
    if mask is not None and mask.ndim == 4:
        visible = _visible(mask, batch, queries, keys)
        starts |= _starts_of_mask(visible)
        mark_starts(starts, None, None)
        _require_documents(visible, starts, window)
    else:
        if mask is not None:
            mask = _real_tokens(mask, known, keys)
        mark_starts(starts, mask, known)
    flat = starts.flatten().nonzero().flatten()
    if len(flat) == batch:
        return None
    return torch.cat([flat, flat.new_tensor([batch * keys])]).to(torch.int32)


def _visible(mask: torch.Tensor, batch: int, queries: int, keys: int) -> torch.Tensor:
    """Convert a 4-d mask to bool [batch, queries, keys]."""
    if mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask: shape {list(mask.shape)}; allowed: [batch, 1, queries, keys]"
        )
    if mask.dtype != torch.bool and ((mask != 0) & (mask > -1e4)).any():
        raise ValueError(
            "attention_mask: adds values between 0 and -10,000, or above 0; "
            "allowed: 0 where a query sees a key, the dtype's lowest or -inf elsewhere"
        )
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    return visible[..., :keys].expand(batch, queries, keys)


def _require_documents(visible: torch.Tensor, starts: torch.Tensor, window: int | None) -> None:
    """Raise unless the mask equals the one that `starts` implies; padding rows may differ."""
    batch, queries, keys = visible.shape
    key = torch.arange(keys, device=visible.device)
    floor = torch.where(starts, key, 0).cummax(1).values[:, keys - queries :]
    position = key[keys - queries :]
    if window is not None:
        floor = torch.maximum(floor, position - window + 1)
    padding = ~visible[:, :, keys - queries :].any(1)  # tokens that no query sees
    # If that holds for all tokens of a row but they see keys, their keys are elsewhere: a static
    # cache.
    padding &= ~padding.all(1, keepdim=True) | ~visible.any(2)
    differs = torch.zeros((), dtype=torch.bool, device=visible.device)
    for first in range(0, queries, _ROWS_CHECKED):
        rows = slice(first, first + _ROWS_CHECKED)
        expected = (key >= floor[:, rows, None]) & (key <= position[rows, None])
        differs |= ((visible[:, rows] != expected) & ~padding[:, rows, None]).any()
    if differs:
        raise ValueError(
            "attention_mask: a 4-d mask with another pattern; allowed: causal within documents or "
            f"padding, window {window}, and keys that end with the last query (no static cache)"
        )


def _real_tokens(mask: torch.Tensor, positions: torch.Tensor | None, keys: int) -> torch.Tensor:
    """Convert a padding mask to bool [batch, keys]."""
    if mask.ndim != 2 or mask.shape[1] < keys:
        raise ValueError(
            f"attention_mask: shape {list(mask.shape)} for {keys} keys; "
            "allowed: [batch, keys] or [batch, 1, queries, keys]"
        )
    real = mask[:, -keys:].bool()
    refuse_gaps(real, positions)
    return real


def _starts_of_mask(visible: torch.Tensor) -> torch.Tensor:
    """Mark tokens that do not see their predecessor, bool [batch, keys]."""
    batch, queries, keys = visible.shape
    starts = torch.zeros(batch, keys, dtype=torch.bool, device=visible.device)
    offset = keys - queries
    if offset:  # cached keys: visibility from the first query separates padding from tokens
        seen = visible[:, 0, : offset + 1]
        starts[:, 1 : offset + 1] = seen[:, 1:] != seen[:, :-1]
    before = torch.diagonal(visible, offset - 1, 1, 2) if offset else None
    if before is None:
        starts[:, 1:] = ~torch.diagonal(visible, -1, 1, 2)
    else:
        starts[:, offset:] = ~before
    return starts


def padding_mask(
    q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0, **arguments: Any
) -> torch.Tensor | None:
    """Build the mask for our attention: FlashAttention's 2-d one, in transformers' convention.

    Raises:
        ValueError: The cache has keys after the last query.
    """
    if kv_offset + kv_length > q_offset + q_length:
        raise ValueError(
            f"past_key_values: {kv_offset + kv_length} keys, and the last query is number "
            f"{int(q_offset) + q_length}; allowed: a cache that ends there (dynamic, not static)"
        )
    if torch.compiler.is_compiling():  # flash_attention_mask looks whether there is padding
        mask = arguments.get("attention_mask")
        return None if mask is None else mask[:, -kv_length:]
    return flash_attention_mask(
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, **arguments
    )


def _attend_in_graph(
    tensors: tuple[torch.Tensor, ...],
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    window: int | None,
    scaling: float | None,
) -> tuple[torch.Tensor, None]:
    """Return what `attention_forward` does, for torch.compile; the documents are found inside."""
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    output, *_ = _attention_operator(*tensors, mask, positions, window, scaling, trains)
    return output.transpose(1, 2), None


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    window: int | None,
    scaling: float | None,
    trains: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `run_forward`'s results with the settings of the pass that runs the graph."""
    settings = current()
    if settings.sequence is not None:
        raise ValueError(
            "sequence: a shard, in a model under torch.compile; allowed: none, because the "
            "processes' exchange is not part of a graph. Run context parallelism without it"
        )
    backend = _named_backend(settings)
    return run_forward(
        *(query, key, value, sinks),
        cu_seqlens=_boundaries(mask, positions, _sizes(query, key), window),
        window=window,
        scale=scaling,
        choice=Choice(backend, settings.deterministic, trains),
    )


def _like_attention(
    query: torch.Tensor, key: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, queries, head_dim = query.shape
    out = query.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty((batch, heads, queries), dtype=wide)
    return out, lse, torch.empty(2, dtype=torch.int64, device="cpu")


def _differentiate_attention(arguments: Any, results: Any, gradients: Any, needs: Any) -> Any:
    query, key, value, sinks, mask, positions, window, scaling, _ = arguments
    out, lse, decided = results
    found = run_backward(
        gradients[0],
        SavedForward(query, key, value, sinks, out, lse),
        decided,
        cu_seqlens=_boundaries(mask, positions, _sizes(query, key), window),
        window=window,
        scale=scaling,
        needs_dsinks=needs[3],
    )
    return *found, *[None] * (len(needs) - 4)  # mask and positions have none


_attention_operator = make_opaque(
    _attention,
    like=_like_attention,
    differentiate=_differentiate_attention,
    reads=(0, 1, 2),
    synchronizes=True,
)


def patch_attention() -> None:
    """Make every gpt-oss model of this process attend through these kernels.

    This includes models configured as `eager`, transformers' default.
    """
    from transformers.models.gpt_oss import modeling_gpt_oss

    modeling_gpt_oss.eager_attention_forward = attention_forward
