"""How an answer is generated: reasoning effort, length and sampling. No torch."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sparselong.errors import ConfigError

EFFORTS = ("low", "medium", "high")
_SEEDS = 1 << 63


@dataclass(frozen=True)
class Settings:
    """How an answer is generated.

    Attributes:
        max_new_tokens: most tokens of an answer, thinking included.
        temperature: 0 takes the most likely token; 1 is what gpt-oss was published with.
        top_p: probability mass to sample from.
        top_k: number of most likely tokens to sample from; 0 is all.
        seed: of sampling; None draws one for each answer.
        reasoning: effort, which the system message names.
    """

    max_new_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    reasoning: str = "medium"

    def seeded(self) -> Settings:
        """Return the settings with a seed, drawn if they have none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(1 << 31))

    def changed(
        self, values: Mapping[str, Any], names: Mapping[str, str] | None = None
    ) -> Settings:
        """Return the settings with other values, given as texts or as numbers.

        Args:
            values: by attribute.
            names: what the attributes are called where the values come from.

        Raises:
            ConfigError: an attribute is unknown, or a value is out of range.
        """
        found = {
            key: _check(key, value, (names or {}).get(key, key)) for key, value in values.items()
        }
        return replace(self, **found)

    def document(self) -> dict[str, Any]:
        """Return the values by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def _whole(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)


def _seed(value: Any) -> int | None:
    return None if value in (None, "none", "") else _whole(value)


_RULES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool], str]] = {
    "max_new_tokens": (_whole, lambda n: n >= 1, "a whole number, at least 1"),
    "temperature": (_real, lambda t: 0 <= t <= 100, "a number from 0 to 100"),
    "top_p": (_real, lambda p: 0 < p <= 1, "a number above 0, at most 1"),
    "top_k": (_whole, lambda k: k >= 0, "a whole number; 0 is all tokens"),
    "seed": (_seed, lambda s: s is None or 0 <= s < _SEEDS, "a whole number from 0, or none"),
    "reasoning": (str, lambda r: r in EFFORTS, ", ".join(EFFORTS)),
}
"""By attribute: what reads a value, whether it is allowed, and what is."""


def _check(key: str, value: Any, name: str) -> Any:
    if key not in _RULES:
        raise ConfigError(
            f"{name} is not a setting", ", ".join(_RULES), name, "choose one of these settings"
        )
    read, allows, expected = _RULES[key]
    try:
        found = read(value)
        fits = allows(found)
    except (TypeError, ValueError, OverflowError):
        fits, found = False, None
    if not fits:
        raise ConfigError(f"{name} is out of range", expected, repr(value)[:80], f"correct {name}")
    return found
