"""The embedding in host memory, beside experts that are there.

A pass reads one row per token from it, 5,760 bytes in gpt-oss's width, which is nothing beside the
experts' copies, while the whole takes 1.08 GiB. The GPU reads the rows from page-locked memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparselong.runtime import allocate_locked, seen_from_gpu


def move_embedding(model: Any) -> None:
    """Move a model's embedding into page-locked host memory, in place; on a CPU it is there.

    One that is shared among processes stays where it is: each has few rows, and sends them.

    Args:
        model: a gpt-oss model with its weights on its device.

    Raises:
        StageError: the memory could not be had, or not be locked.
    """
    embedding = model.get_input_embeddings()
    weight: torch.Tensor = embedding.weight
    if type(embedding) is not nn.Embedding or weight.device.type != "cuda":
        return
    memory = allocate_locked(weight.nbytes)
    memory.copy_(weight.detach().view(torch.uint8).view(-1))
    seen = seen_from_gpu(memory, weight.device).view(weight.dtype).view(weight.shape)
    embedding.weight = nn.Parameter(seen, requires_grad=weight.requires_grad)
