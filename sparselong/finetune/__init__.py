"""Stage 03: train LoRA through the 2:4 mask and the quantizer, with Axolotl as the trainer.

trainer.py is the stage. It generates Axolotl's YAML (axolotl_config.py) and shares the run with the
trainers (training_run.py). supervision.py labels the rows, and one_line.py shows one of them on
request. axolotl_plugin.py is the only file that imports axolotl;
masked_trainer.py changes its trainer, batches.py orders the data, callbacks.py, keeping.py and
routers.py act at training steps, watching/ records the run and ends it early, and state.py saves
and restores checkpoints. The adapters are in sparselong/adapters.

For several processes, processes/launch.py finds them, processes/process.py starts and watches them,
rank.py runs in each, processes/sharing.py decides whether they share experts and vocabulary,
processes/world.py exchanges values between them, and processes/follow.py runs the other ranks of
torchrun. gathering.py makes checkpoints of shared experts whole.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.finetune.batches import EpochOrder, make_batches
    from sparselong.finetune.one_line import preview_first, preview_line
    from sparselong.finetune.trainer import finetune
    from sparselong.finetune.training_run import check_compressed, trainer_arguments

__getattr__ = expose(__name__)
