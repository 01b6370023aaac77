"""The hub's many ways to fail, told in one way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparselong.errors import StageError


@contextmanager
def explain_hub_failures(what: str, expected: str, fix: str) -> Iterator[None]:
    """Turns a failed look-up or download inside the block into a StageError.

    What an unreachable hub raises depends on where the connection breaks: offline switches and
    refused names are OSErrors, a closed client a RuntimeError, a missing configuration a
    ValueError, a timeout httpx's own. So the block should hold the one call that goes to the hub.
    """
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, RuntimeError, ValueError, DatasetsError, httpx.HTTPError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise StageError(what, expected, f"{type(error).__name__}: {first_line}", fix) from error
