"""Stop training at non-finite router logits, and name the layer and the step.

A NaN before a router makes its routing meaningless, and then that of every later layer. The loss
only shows it after the pass, without the layer. Each router therefore sets its layer's flag on the
device, without a host synchronization. The flags are read once per step, before the optimizer
applies meaningless gradients.
"""

from __future__ import annotations

from torch import nn
from transformers import TrainerCallback

from sparselong.errors import StageError
from sparselong.model import watch_routers


class RouterWatch(TrainerCallback):
    """Raises StageError before an optimizer step or after an evaluation with non-finite logits.

    Args:
        model: a gpt-oss model on its device, wrapped by PEFT or not.
    """

    def __init__(self, model: nn.Module):
        self.names, self.flags = watch_routers(model)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Check the flags of the step's forward passes."""
        self._check(f"step {state.global_step + 1}")

    def on_evaluate(self, args, state, control, **kwargs):
        """Check the flags of the evaluation."""
        self._check(f"the evaluation after step {state.global_step}")

    def _check(self, when: str) -> None:
        flags = self.flags.tolist()
        broken = [name for name, flag in zip(self.names, flags, strict=True) if flag]
        if broken:
            first = broken[0].removeprefix("base_model.model.").removesuffix(".base_layer")
            raise StageError(
                f"the router {first} computed non-finite logits in {when}",
                "finite router logits in every layer",
                f"NaN or infinity in {len(broken)} of {len(self.names)} layers, this one first",
                "lower training.learning_rate and pass --force; at the first step, the compressed "
                "model is damaged: redo stage 02. The same command would fail again",
            )
