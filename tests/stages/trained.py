"""A stand-in for stage 03: adapters with random values, saved and baked as training does it.

Axolotl takes half a minute to start, and no export can tell how an adapter got its values.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel

from sparselong.adapters.attach import ExtraAdapters, Masters, add_masked_lora, tuned_layers
from sparselong.adapters.bake import bake_checkpoint, name_adapter, put_baked_experts
from sparselong.adapters.expert_lora import ExpertLora
from sparselong.config import Config, load
from sparselong.model import load_model
from sparselong.run import Stage
from sparselong.run.directory import finish, prepare

TOKENS = (torch.arange(3, 83) * 17 % 500)[None]
CPU = torch.device("cpu")


class Trained(NamedTuple):
    """A run with stages 02 and 03.

    Attributes:
        run_dir: its directory.
        arguments: of every stage, without the run directory.
        logits: fp32 logits of the baked model in memory for TOKENS.
    """

    run_dir: Path
    arguments: list[str]
    logits: torch.Tensor


def open_training(run_dir: Path, config: Config) -> PeftModel:
    """Return the model in training, with the same random adapters in every call."""
    compressed, lora = run_dir / "02_compress", config.lora
    tuned, _ = add_masked_lora(
        load_model(compressed / "model", device=CPU),
        targets=lora.target_modules,
        r=lora.r,
        alpha=lora.alpha,
        master_of=Masters(compressed / "masters").read,
        seed=5,
        extra=ExtraAdapters(tuple(lora.expert_targets), lora.expert_r, lora.router),
    )
    _randomize(tuned)
    return tuned


@torch.no_grad()
def finish_training(run_dir: Path, arguments: list[str]) -> Trained:
    """Write what stage 03 leaves behind to a run in which stage 02 is done."""
    config = load(arguments[1], arguments[2:])
    stage = Stage("03_finetune", config, run_dir)
    assert not prepare(stage, redo=False)
    compressed = run_dir / "02_compress"
    tuned = open_training(run_dir, config)
    layers = tuned_layers(tuned)
    baked, rounding = bake_checkpoint(compressed / "model", layers, stage.dir / "model")
    tuned.save_pretrained(str(stage.dir / "adapter"))
    name_adapter(stage.dir / "adapter", "stand-in")
    put_baked_experts(baked, layers)
    stage.metrics = {"expert_rounding": rounding}
    stage.inputs = [compressed / "model", compressed / "masters"]
    stage.outputs = [stage.dir / "model", stage.dir / "adapter"]
    finish(stage, 1.0)
    return Trained(run_dir, arguments, tuned(input_ids=TOKENS).logits)


@torch.no_grad()
def _randomize(tuned: PeftModel) -> None:
    torch.manual_seed(0)
    for layer in tuned_layers(tuned).values():
        if isinstance(layer, ExpertLora):
            for adapter in layer.adapters().values():
                adapter.b.normal_(std=0.2)
        else:
            layer.adapter()[1].normal_(std=0.05)
