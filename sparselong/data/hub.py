"""One error type for the many ways in which the Hugging Face Hub can fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparselong.errors import StageError


@contextmanager
def explain_hub_failures(what: str, expected: str, fix: str) -> Iterator[None]:
    """Raise a StageError if a lookup or download inside the block fails.

    The exception of an unreachable hub depends on where the connection breaks: offline mode and
    refused names raise OSError, a closed client RuntimeError, a missing configuration ValueError, a
    timeout httpx's own error. The block should therefore contain only the call to the hub.
    """
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, RuntimeError, ValueError, DatasetsError, httpx.HTTPError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise StageError(what, expected, f"{type(error).__name__}: {first_line}", fix) from error
