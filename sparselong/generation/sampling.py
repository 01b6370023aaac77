"""Sampling of the next token on the device: temperature, then top-k, then top-p.

What may be drawn, and with which probability, is as with transformers' TemperatureLogitsWarper,
TopKLogitsWarper and TopPLogitsWarper in this order: top-k keeps every token whose logit equals the
k-th largest; top-p keeps the most likely tokens up to the one that reaches the probability mass.
Where tokens of equal logits straddle that mass, the lower ones are kept.

Settings and random numbers lie in buffers on the device and nothing waits for it, so one CUDA graph
serves all settings and seeds. The random numbers are drawn from the seed on the CPU, one for each
position: every device and every process of a shared model draws the same.

Weights are summed as integers, in units of 2^-40 of the largest: unlike a parallel sum of fp32
numbers, that sum is the same in every run. A token less than 2^-40 times as likely as the first is
never drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

UNITS = 2.0**40
"""Weight of the most likely token. The sum of 2^22 such weights fits int64."""
SETTINGS = 3
LEAST_SEED, MOST_SEED = -(2**63), 2**64 - 1
"""What torch's generators accept."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the token with the largest logit, the first of ties; above 0 samples.
        top_k: number of most likely tokens to sample from; 0 for all.
        top_p: probability mass to sample from.
        seed: seed of the random numbers.

    Raises:
        ValueError: one of them is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        is_allowed = (
            0 <= self.temperature < math.inf
            and isinstance(self.top_k, int)
            and self.top_k >= 0
            and 0 < self.top_p <= 1
            and isinstance(self.seed, int)
            and LEAST_SEED <= self.seed <= MOST_SEED
        )
        if not is_allowed:
            raise ValueError(
                f"temperature, top_k, top_p, seed: {self.temperature}, {self.top_k}, {self.top_p}, "
                f"{self.seed}; allowed: at least 0 and finite, an integer of at least 0, above 0 "
                "and at most 1, an integer from -2^63 to 2^64 - 1"
            )

    def draw(self, count: int) -> torch.Tensor:
        """Return the settings and `count` random numbers, float64 [SETTINGS + count] on the CPU.

        More numbers of the same seed begin with the same ones.
        """
        settings = torch.tensor([self.temperature, self.top_k, self.top_p], dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.cat([settings, torch.rand(count, dtype=torch.float64, generator=generator)])


class Sampler:
    """Buffers on a device, from which the token after each position is drawn."""

    def __init__(self, vocab: int, positions: int, device: torch.device):
        self.vocab = vocab
        self.temperature = torch.ones(1, device=device)
        self.last = torch.zeros(1, dtype=torch.int64, device=device)
        self.top_p = torch.ones(1, dtype=torch.float64, device=device)
        self.uniforms = torch.zeros(positions, dtype=torch.float64, device=device)

    def load(self, drawn: torch.Tensor, first: int) -> None:
        """Take settings and random numbers as from `Sampling.draw`; the first is for `first`."""
        temperature, top_k, top_p = drawn[:SETTINGS].tolist()
        most = torch.finfo(torch.float32).max
        self.temperature.fill_(min(temperature, most))  # by infinity, -inf would become NaN
        self.last.fill_(min(int(top_k) or self.vocab, self.vocab) - 1)
        self.top_p.fill_(top_p)
        numbers = drawn[SETTINGS:]
        self.uniforms[first : first + len(numbers)].copy_(numbers)

    def pick(self, logits: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Return the token drawn for each position, int64 [n], without waiting for the device.

        Args:
            logits: [vocab] in any floating dtype; with NaN among them the token is arbitrary.
            position: int64 [n].
        """
        ordered, tokens = logits.sort(descending=True, stable=True)
        scores = (ordered.float() - ordered[:1].float()) / self.temperature
        # Infinity minus infinity, and 0 / 0 at a temperature below fp32's range, are the largest.
        weights = (scores.nan_to_num_(nan=0.0).exp_() * UNITS).long()
        weights.masked_fill_(ordered < ordered.index_select(0, self.last), 0)
        sums = weights.cumsum(0)
        total = sums[-1:]
        # A double may round the largest sums up, beyond the last token.
        mass = torch.minimum((total.double() * self.top_p).ceil().long(), total)
        kept = sums.index_select(0, torch.searchsorted(sums, mass))
        uniform = self.uniforms.index_select(0, position)
        point = torch.minimum((kept.double() * uniform).long(), kept - 1)
        return tokens.index_select(0, torch.searchsorted(sums, point, right=True))
