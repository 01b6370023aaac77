"""Sparse-Long: long-context fine-tuning of gpt-oss that stays compressed.

After `import sparselong`, `AutoModelForCausalLM.from_pretrained` opens what stages 02 and 03 write,
and takes `attn_implementation="sparselong"` for any gpt-oss.
Telemetry of the packages underneath is off unless the user turns it on, and torch's allocator takes
segments that grow; the environment's own values always win.
"""

import os
from typing import TYPE_CHECKING

from sparselong.lazy import expose
from sparselong.registration import register_when_needed

if TYPE_CHECKING:
    from sparselong.generation import generate
    from sparselong.model.attention import attention_forward, patch_attention
    from sparselong.model.fused import chunk_loss, fuse
    from sparselong.model.loading import packed_config

__version__ = "0.1.0"

for _name, _value in {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    # libgomp's threads spin while they wait, for one another and for other processes' sake: on a
    # busy machine with few cores that made a small model's forward pass 60 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}.items():
    os.environ.setdefault(_name, _value)
# memory.ALLOCATOR, whose module is slow to import: torch reads it when it first allocates. Without
# it the blocks of 20b's weights alone take 59 MB more than the weights.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

register_when_needed()

__getattr__ = expose(__name__)
