"""Which of the optional packages with attention backends are installed. Imports no torch.

Both flash-attn and flash-attn-4 install a folder flash_attn with a module flash_attn.cute, so
neither can be recognized by whether a module is found.
"""

from __future__ import annotations

import functools
from importlib import metadata, util

FLASH_ATTN_4 = "4.0.0b36"
"""The version that `flash_attn_4.py` is written for and install.sh installs."""


def refuse_flash_attn() -> str | None:
    """Return why there is no flash-attn (FlashAttention-2) to use, or None if there is."""
    spec = util.find_spec("flash_attn")
    if spec is None or spec.origin is None:  # flash-attn-4's folder has no __init__.py
        return "backend: flash_attn is not installed; allowed: an installed backend"
    return None


@functools.cache
def refuse_flash_attn_4() -> str | None:
    """Return why there is no flash-attn-4 to use, or None if there is."""
    try:
        found = metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return "backend: flash-attn-4 is not installed; allowed: an installed backend"
    if found != FLASH_ATTN_4:
        return f"backend: flash-attn-4 {found} is installed; allowed: {FLASH_ATTN_4}"
    return None
