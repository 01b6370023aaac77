"""Stage 03: LoRA trained through the 2:4 mask and the quantizer, with Axolotl as the trainer.

masks.py and schedule of updates are pure maths, lora.py the layer, callbacks.py what happens at
steps, axolotl_plugin.py the only file that imports axolotl, masked_trainer.py what is ours in its
trainer, batches.py the data's order, axolotl_config.py its generated YAML, trainer.py the stage,
training_run.py what the stage and its trainers share.

Of several processes, processes/launch.py says which there are, processes/process.py starts and
listens to them, rank.py is one of them, processes/world.py what they tell each other,
processes/follow.py what torchrun's others do.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.finetune.batches import EpochOrder, make_batches
    from sparselong.finetune.trainer import finetune
    from sparselong.finetune.training_run import trainer_arguments

__getattr__ = expose(__name__)
