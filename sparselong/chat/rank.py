"""One of several processes that share a model, other than rank 0, which has the conversation.

    RANK=r WORLD_SIZE=n ... python -m sparselong.chat.rank FOLDER

FOLDER takes a failure's explanation. See processes/beside.py.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from sparselong.chat.opening import take_part
from sparselong.processes import end_at_once, tell_failures, write_failure
from sparselong.registration import set_environment


def main(folder: Path) -> None:
    """Follow rank 0 until it ends."""
    set_environment()
    rank = int(os.environ["RANK"])
    tell_failures(folder, rank)
    end_at_once()
    take_part(None, _lead, partial(write_failure, folder, rank))


def _lead(*_: Any) -> Any:
    raise AssertionError("rank 0 leads, in the process of 06_chat.py")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
