"""Types of the config's numbers, with their limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Length = Annotated[int, Field(ge=2, le=2**31 - 1)]
Scale = Annotated[float, Field(gt=0.0, le=1e6)]
