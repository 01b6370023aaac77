"""Sparse-Long: long-context fine-tuning of gpt-oss that stays compressed.

After `import sparselong`, `AutoModelForCausalLM.from_pretrained` opens what stages 02 and 03 write,
and takes `attn_implementation="sparselong"` for any gpt-oss.
`sparselong.patch_attention()`, or `sparselong.attention_forward` in place of transformers' eager
attention, is for code that names no implementation. `sparselong.fuse` and `sparselong.chunk_loss`
put fused layers and a loss in chunks into any gpt-oss, `sparselong.packed_config` keeps an upstream
checkpoint's experts packed, and `sparselong.generate` decodes at batch 1.

Telemetry of the packages underneath is off unless the user turns it on, and torch's allocator takes
segments that grow; the environment's own values always win.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose
from sparselong.registration import register_when_needed, set_environment

if TYPE_CHECKING:
    from sparselong.generation import generate
    from sparselong.model.attention import attention_forward, patch_attention
    from sparselong.model.fused import chunk_loss, fuse
    from sparselong.model.loading import packed_config

__version__ = "0.1.0"

set_environment()
register_when_needed()

__getattr__ = expose(__name__)
