"""Stage 05: write a run's model in the forms that other tools open, and prove that it is the model.

A format is one class (form.py says what it must have) and a line in formats.py: hf_bf16.py,
mxfp4.py and adapter.py have one each, gguf/ has `gguf` and `ollama`, and hub/ uploads any of them.
inputs.py finds what is exported and compares it with what earlier stages recorded, source.py reads
its tensors under their published names, shards.py writes them file by file and reads each file
back, and base.py says which are the base's. stage.py runs one format, command.py reads `--to`,
`--from`, `--dense-type` and `--repo`, and plan.py says what would be written.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.export.command import CHOICE, check_formats
    from sparselong.export.plan import plan_export
    from sparselong.export.stage import export

__getattr__ = expose(__name__)
