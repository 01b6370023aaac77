"""The file's name, and the types that its dense weights may have. No torch.

Experts stay in MXFP4 and vectors, biases and the router in f32, as llama.cpp has them in every
gpt-oss file. The choice is about attention projections, the embedding and the output layer.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.util import find_spec
from typing import Any

from sparselong.errors import ConfigError, StageError

FILE = "model.gguf"
TYPED = ("gguf", "ollama")
"""The formats that have the file."""
DENSE_TYPE = "dense-type"
"""The option that names the type."""
DENSE_TYPES = {
    "bf16": "BF16",
    "f32": "F32",
    "f16": "F16",
    "q8_0": "Q8_0",
    "q6_k": "Q6_K",
    "q5_k": "Q5_K",
    "q4_k": "Q4_K",
}
"""GGML's name of each choice; the first is the default."""
EXACT = ("BF16", "F32", "MXFP4")
"""Types that hold the source's values."""
BITS = {"F32": 32, "BF16": 16, "F16": 16, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5,
        "Q5_0": 5.5, "Q5_1": 6}  # fmt: skip
"""Bits per weight, scales included."""
_INSTALL = ".uv/bin/uv pip install --python .venv/bin/python llama-cpp-python"
_K_ROW = 256
_SHORT_ROWS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Types for rows that no K-quant fits, those that llama.cpp takes; 2,880 is no multiple of 256."""


def type_for_rows(choice: str, columns: int) -> str:
    """Return the GGML type of a dense weight.

    Args:
        choice: a key of DENSE_TYPES.
        columns: length of the weight's rows.
    """
    wanted = DENSE_TYPES[choice]
    return wanted if columns % _K_ROW == 0 else _SHORT_ROWS.get(wanted, wanted)


def check_dense_type(choice: str) -> None:
    """Raise unless dense weights can be written in a type.

    Raises:
        ConfigError: there is no such type, or the package that writes it is not installed.
        StageError: the package is installed, but cannot be loaded.
    """
    listed, option = ", ".join(DENSE_TYPES), f"--{DENSE_TYPE}"
    if choice not in DENSE_TYPES:
        near = difflib.get_close_matches(choice, DENSE_TYPES, n=1)
        shown = ascii(choice)[1:-1]
        raise ConfigError(
            f"{option} {shown}: there is no such type",
            listed,
            shown,
            f"did you mean {option} {near[0]}?" if near else "pass one of these names",
        )
    if DENSE_TYPES[choice] not in _SHORT_ROWS:
        return
    if find_spec("llama_cpp") is None:
        raise ConfigError(
            f"{option} {choice} is written by llama.cpp's own routines, which are not installed",
            "the package llama-cpp-python",
            "no module named llama_cpp",
            f"{_INSTALL} (it compiles for a quarter of an hour), or pass {option} q8_0",
        )
    load_quantizer()


def load_quantizer() -> Any:
    """Return llama.cpp's function that quantizes rows.

    Raises:
        StageError: the package that has it cannot be loaded.
    """
    try:  # no public name leads to it
        return importlib.import_module("llama_cpp._ggml").libggml.ggml_quantize_chunk
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise StageError(
            "llama.cpp's own routines, which write K-quants, cannot be loaded",
            "an installed llama-cpp-python that can be imported",
            " ".join(f"{type(error).__name__}: {error}".split()),
            f"{_INSTALL} --reinstall-package llama-cpp-python, or pass --{DENSE_TYPE} q8_0",
        ) from error
