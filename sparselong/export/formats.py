"""The table of formats. No torch."""

from __future__ import annotations

import difflib

from sparselong.errors import ConfigError
from sparselong.export.adapter import AdapterFormat
from sparselong.export.form import Format
from sparselong.export.gguf import GgufFormat, OllamaFormat
from sparselong.export.hf_bf16 import Bf16Format
from sparselong.export.hub import HubFormat
from sparselong.export.mxfp4 import Mxfp4Format

FORMATS: tuple[Format, ...] = (
    *(Mxfp4Format(), Bf16Format(), AdapterFormat()),
    *(GgufFormat(), OllamaFormat(), HubFormat()),
)


def find_format(name: str) -> Format:
    """Return a format by its name.

    Raises:
        ConfigError: there is no such format.
    """
    names = [each.name for each in FORMATS]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(
            f"--to {ascii(name)[1:-1]}: there is no such format",
            ", ".join(names),
            ascii(name)[1:-1],
            f"did you mean --to {near[0]}?" if near else "pass one of these names",
        )
    return FORMATS[names.index(name)]
