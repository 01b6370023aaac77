"""Steps of the proxy's training: loss, optimizer, schedule, state.

AdamW with a linear warm-up, then a constant rate, and from half-way a linear decay to zero; this
shape lets the number of steps be corrected after the speed has been measured. In the last 30 % of
the steps experts are rounded to MXFP4, so that what is exported is what was trained.

Beside the tokens' loss there are two small ones, for each layer's router: that all experts are used
equally, and that its logits stay small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.proxy.batches import ANSWER_WEIGHT, KINDS, Batches, Targets
from benchmarks.proxy.network import Network

_LEARNING_RATE, _WARMUP_STEPS = 2e-3, 200
_DECAY_FROM, ROUND_FROM = 0.5, 0.7
_BALANCE, _SQUARED = 0.02, 1e-4
_WEIGHT_DECAY, _CLIP = 0.1, 1.0


class Losses(NamedTuple):
    """Means of a step, on the device: nats per token, and the least share of an expert.

    Attributes:
        corpus: all predicted tokens of the corpus.
        conversations: those of conversations.
        answers: answers of solved tasks.
        balance: the router's loss, 1 at best, mean over layers.
        least_share: smallest fraction of a layer's routed tokens that an expert got.
    """

    corpus: torch.Tensor
    conversations: torch.Tensor
    answers: torch.Tensor
    balance: torch.Tensor
    least_share: torch.Tensor


class Training:
    """A network in training, step by step.

    Attributes:
        step: steps that are done.
        steps: steps in all; None: not planned yet.
    """

    def __init__(self, network: Network, batches: Batches, steps: int | None = None):
        self.network, self.batches = network, batches
        self.step, self.steps = 0, steps
        decayed = [each for each in network.parameters() if each.ndim > 1]
        others = [each for each in network.parameters() if each.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": _WEIGHT_DECAY},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=_LEARNING_RATE,
            betas=(0.9, 0.95),
            fused=True,
        )

    @property
    def progress(self) -> float:
        """The share of the steps that is done; 0 while they are not planned."""
        return 0.0 if self.steps is None else self.step / self.steps

    @property
    def is_done(self) -> bool:
        """Whether all planned steps are done."""
        return self.steps is not None and self.step >= self.steps

    def learning_rate(self) -> float:
        """Return the rate of the next step."""
        warmup = _WARMUP_STEPS if self.steps is None else min(_WARMUP_STEPS, self.steps // 5 + 1)
        rising = min(1.0, (self.step + 1) / warmup)
        falling = min(1.0, (1.0 - self.progress) / (1.0 - _DECAY_FROM))
        return _LEARNING_RATE * min(rising, falling)

    def run_step(self) -> Losses:
        """Take one step and return its losses."""
        batch, targets = self.batches.make(self.step)
        rate = self.learning_rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        states, routings = self.network(batch, rounds=self.progress >= ROUND_FROM)
        losses = self.network.losses(states.flatten(0, 1), targets.ids.flatten())
        losses = losses.view(targets.ids.shape)
        balance = torch.stack([each.balance for each in routings]).mean()
        squared = torch.stack([each.squared for each in routings]).mean()
        plain = sum(self.batches.rows[:2]) * self.batches.length
        total = (losses * targets.weights).sum() / plain + _BALANCE * balance + _SQUARED * squared
        total.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), _CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        with torch.no_grad():
            least = torch.stack([each.shares for each in routings]).min()
            corpus, conversations, answers = _by_kind(losses.detach(), targets)
            return Losses(corpus, conversations, answers, balance.detach(), least)

    def save(self, path: Path) -> None:
        """Write everything with which training continues as if it had not stopped."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "steps": self.steps,
        }
        unfinished = path.with_name(path.name + ".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a state that `save` wrote."""
        state: dict[str, Any] = torch.load(path, map_location=self.batches.device)
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.steps = state["step"], state["steps"]


def _by_kind(losses: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, ...]:
    """Return the mean loss of corpus, conversations and answers."""
    found = []
    for kind in range(len(KINDS)):
        is_kind = (targets.kinds == kind)[:, None]
        least = ANSWER_WEIGHT if KINDS[kind] == "tasks" else 1.0
        counted = (targets.weights >= least) & is_kind
        found.append((losses * counted).sum() / counted.sum().clamp(min=1))
    return tuple(found)
