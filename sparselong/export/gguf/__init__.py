"""The model as one GGUF file, for llama.cpp and what is built on it, and for Ollama.

layout.py says which tensors the file has, and of which types. metadata.py has its keys: shape,
tokenizer, chat template. encoding.py turns published tensors into the file's bytes and
quantization.py calls llama.cpp's own routines for types that only it can write. file.py writes the
file, and reading.py compares it with its source. form.py and ollama.py are the two formats of
stage 05.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.export.gguf.form import GgufFormat
    from sparselong.export.gguf.ollama import MODELFILE, OllamaFormat
    from sparselong.export.gguf.types import DENSE_TYPE, DENSE_TYPES, FILE, TYPED

__getattr__ = expose(__name__)
