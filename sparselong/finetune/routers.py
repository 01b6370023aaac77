"""Stop training at non-finite router logits, and name the layer and the step.

A NaN before a router makes its routing meaningless, and then that of every later layer. The loss
only shows it after the pass, without the layer. Each router therefore sets its layer's flag on the
device, without a host synchronization. The flags are read once per step, before the optimizer
applies meaningless gradients.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from sparselong.errors import StageError


class RouterWatch(TrainerCallback):
    """Raises StageError before an optimizer step or after an evaluation with non-finite logits.

    Args:
        model: a gpt-oss model, wrapped by PEFT or not; its routers get a hook.
    """

    def __init__(self, model: nn.Module):
        routers = {n: m for n, m in model.named_modules() if isinstance(m, GptOssTopKRouter)}
        self.names = list(routers)
        self.flags: torch.Tensor | None = None
        for number, router in enumerate(routers.values()):
            router.register_forward_hook(self._make_hook(number))

    def _make_hook(self, number: int):
        @torch.no_grad()
        def hook(_module: nn.Module, _inputs: tuple, outputs: tuple) -> None:
            logits = outputs[0].detach()
            if self.flags is None:
                self.flags = torch.zeros(len(self.names), dtype=torch.bool, device=logits.device)
            self.flags[number].logical_or_(torch.isfinite(logits).all().logical_not())

        return hook

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Check the flags of the step's forward passes."""
        self._check(f"step {state.global_step + 1}")

    def on_evaluate(self, args, state, control, **kwargs):
        """Check the flags of the evaluation."""
        self._check(f"the evaluation after step {state.global_step}")

    def _check(self, when: str) -> None:
        flags = [] if self.flags is None else self.flags.tolist()
        broken = [name for name, flag in zip(self.names, flags, strict=False) if flag]
        if broken:
            first = broken[0].removeprefix("base_model.model.").removesuffix(".base_layer")
            raise StageError(
                f"the router {first} computed non-finite logits in {when}",
                "finite router logits in every layer",
                f"NaN or infinity in {len(broken)} of {len(self.names)} layers, this one first",
                "lower training.learning_rate and pass --force; at the first step, the compressed "
                "model is damaged: redo stage 02. The same command would fail again",
            )
