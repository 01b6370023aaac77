"""The 64-bit word by which a token goes from a decoding step's head to the next embedding.

The upper half orders words by logit; the lower half is 2^31 - 1 minus the token, so that a maximum
over words takes the largest logit and, among equal ones, the lowest token. The kernels of `glue.py`
write and read the same format. This module imports no Triton, for steps on a CPU.
"""

from __future__ import annotations

from typing import TypeVar

import torch

TOKEN_MASK = 0x7FFFFFFF
NAN_BITS, INFINITY_BITS = 0x7FC00000, 0x7F800000
"""Bits of an fp32 NaN and of infinity, which is below every NaN and above every other number."""
Word = TypeVar("Word", int, torch.Tensor)


def encode_token(token: int, *, is_finite: bool = True) -> int:
    """Return a word that decodes to `token` and tells whether the logits were finite."""
    return (0 if is_finite else NAN_BITS << 32) | (TOKEN_MASK - token)


def decode_token(word: Word) -> Word:
    """Return the token in a word, or the tokens in an int64 tensor of words."""
    return TOKEN_MASK - (word & TOKEN_MASK)


def replace_token(words: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return words of other tokens, int64, that still encode the same logits."""
    return (words & ~TOKEN_MASK) | (TOKEN_MASK - tokens)


def holds_finite(word: int) -> bool:
    """Return whether the logit in a word of the head is neither NaN nor infinity.

    As it is the largest, no other one is either; minus infinity is not seen.
    """
    return word >> 32 < INFINITY_BITS
