"""The most likely token of every supervised position, for the user's function; never logits.

In an evaluation, the final hidden states of each batch are caught on their way to the loss, and
lm_head's products with the supervised ones exist for a chunk of rows at a time, or for this rank's
part of the vocabulary. Ranks hold other batches and other parts of sequences, so each token
travels with its place, and rank 0 puts them in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

from sparselong.finetune.watching.functions import MetricFunction
from sparselong.kernels.layer import IGNORED
from sparselong.model import score_tokens
from sparselong.parallel import Mesh, place_tokens, supervised_labels
from sparselong.processes import world as ranks


class Predictions:
    """Collects an evaluation's predictions, and calls the function with them.

    Args:
        place: `training.metrics`; only rank 0 opens it.

    Attributes:
        figures: what the function returned at the last evaluation; empty on other ranks.
    """

    def __init__(self, place: str):
        self._function = MetricFunction(place) if ranks.is_first() else None
        self._found: list[numpy.ndarray] = []
        self._hidden: torch.Tensor | None = None
        self._batches = 0
        self.figures: dict[str, Any] = {}

    @contextmanager
    def catching(self, model: Any) -> Iterator[None]:
        """Catch the final hidden states of `model`, a GptOssForCausalLM, in the block."""

        def catch(module: Any, inputs: Any, outputs: Any) -> None:
            self._hidden = outputs.last_hidden_state

        self._found, self._batches = [], 0
        hook = model.model.register_forward_hook(catch)
        try:
            yield
        finally:
            hook.remove()
            self._hidden = None

    def add(self, head: Any, shard: Any, shape: tuple[int, int], mesh: Mesh | None) -> None:
        """Add the batch that has just passed, inside its settings block; collective.

        Args:
            head: lm_head, or the part of it that this process holds.
            shard: this rank's part of the batch.
            shape: rows and tokens of the whole batch.
            mesh: this process's place in the mesh; None if it works alone.
        """
        assert self._hidden is not None, "the model has computed this batch's loss"
        labels = supervised_labels(shard)
        hidden, self._hidden = self._hidden[:, : labels.shape[1]], None
        learned = labels != IGNORED
        wanted = labels[learned].to(hidden.device)
        states = hidden[learned.to(hidden.device)].to(head.weight.dtype)
        _, best = score_tokens(head, states, wanted)
        places = place_tokens(*shape, mesh)[:, : labels.shape[1]][learned.cpu()]
        number = self._batches * (mesh.data_size if mesh else 1) + (mesh.data_rank if mesh else 0)
        columns = [torch.full_like(places, number), places, best.cpu(), wanted.cpu()]
        self._found.append(torch.stack(columns).numpy())
        self._batches += 1

    def finish(self) -> None:
        """Call the function on rank 0 with all ranks' tokens in order; collective."""
        mine = numpy.concatenate(self._found, axis=1)
        self._found = []
        parts = ranks.collect(mine)
        if self._function is None:
            return
        batch, place, predictions, labels = numpy.concatenate(parts, axis=1)
        order = numpy.lexsort((place, batch))
        self.figures = self._function(predictions[order], labels[order])
