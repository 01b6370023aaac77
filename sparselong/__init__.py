"""Sparse-Long: long-context fine-tuning of compressed gpt-oss models.

After `import sparselong`, `AutoModelForCausalLM.from_pretrained` opens the models that stages 02
and 03 write, and accepts `attn_implementation="sparselong"` for any gpt-oss model. For code that
does not choose an implementation, call `sparselong.patch_attention()`, or replace transformers'
eager attention by `sparselong.attention_forward`. `sparselong.fuse` and `sparselong.chunk_loss`
install fused layers and a chunked loss in any gpt-oss model, `sparselong.packed_config` keeps the
experts of an upstream checkpoint packed, and `sparselong.generate` generates text at batch 1.
`sparselong.share_model` opens a model for it that several processes share. A model that is opened
inside `sparselong.using(expert_placement="host")` keeps its experts in host memory.
The folder examples/ shows them in transformers' Trainer, TRL's SFTTrainer and Axolotl.

Importing the package takes milliseconds and changes nothing in the environment of the program.
`sparselong.set_environment()` sets what the pipeline's own scripts set before torch is imported:
telemetry of its dependencies off, and expandable segments in torch's allocator, with which long
sequences take less memory. Variables that are already set keep their values.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose
from sparselong.registration import register_when_needed

if TYPE_CHECKING:
    from sparselong.generation import generate, share_model
    from sparselong.model.attention import attention_forward, patch_attention
    from sparselong.model.fused import chunk_loss, fuse
    from sparselong.model.loading import packed_config
    from sparselong.registration import set_environment
    from sparselong.runtime.settings import using

__version__ = "0.1.0"

register_when_needed()

__getattr__ = expose(__name__)
