"""Calibration: real text, and the hidden states it has reached so far.

The training conversations are rendered by the model's chat template, shuffled by the seed, strung
together and cut into sequences of equal length. Their hidden states after the last finished layer
are the only state that compression carries from layer to layer; they are saved after each, so that
a killed run goes on with exactly the numbers it had.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from sparselong.checkpoint import Checkpoint, write_tensors
from sparselong.config import Config
from sparselong.data import conversations
from sparselong.errors import StageError


def calibration_tokens(
    config: Config, run_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Calibration sequences, int64 [sequences, sequence_len].

    Fewer than `calibration.samples` when the training data is smaller than that.

    Raises:
        StageError: the data cannot be read, or does not fill one sequence.
    """
    rows = conversations.read(conversations.prepare(config, run_dir).train)
    random.Random(config.seed).shuffle(rows)
    length = config.calibration.sequence_len
    wanted = config.calibration.samples * length
    stream: list[int] = []
    for messages in rows:
        if len(stream) >= wanted:
            break
        stream += conversations.tokenize(messages, tokenizer, "all")[0]
    if len(stream) < length:
        raise StageError(
            "the calibration data is shorter than one sequence",
            f"at least {length} tokens (calibration.sequence_len)",
            f"{len(stream)} tokens in {len(rows)} conversations of {config.data.train}",
            "use more training data, or lower calibration.sequence_len",
        )
    count = min(wanted, len(stream)) // length
    return torch.tensor(stream[: count * length]).reshape(count, length)


class HiddenStates:
    """The calibration sequences' hidden states after the layers done so far, on disk and in memory.

    Args:
        path: the file that keeps them between layers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.layers_done = 0
        self.states: torch.Tensor = torch.empty(0)

    def start(self, checkpoint: Checkpoint, tokens: torch.Tensor, dtype: torch.dtype) -> None:
        """Takes up the saved states, or embeds the tokens [sequences, length] where none are."""
        if self.path.exists():
            saved = load_file(self.path)
            self.layers_done, self.states = int(saved["layers_done"]), saved["states"]
            return
        distinct, place = tokens.unique(return_inverse=True)
        rows = checkpoint.read_rows("model.embed_tokens.weight", distinct)
        self.states = rows.to(dtype)[place]

    def save(self, layers_done: int) -> None:
        """Keeps the present states as those after `layers_done` layers, atomically."""
        self.layers_done = layers_done
        write_tensors(
            self.path, {"states": self.states, "layers_done": torch.tensor(self.layers_done)}
        )
