"""The date that chat templates render, fixed once per run.

gpt-oss's template writes today's date into every conversation. A run that lasts longer than a day,
or that is resumed, must not see another date: its tokens would change between stages. The first
stage that renders a conversation therefore records the date in `runs/NAME/date.txt`, and all later
stages read it there. The file is outside `runs/NAME/data`, which may be deleted and made again.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.files import write_atomically

_FILE = "date.txt"


def rendering_date(config: Config, run_dir: Path, *, record: bool = True) -> datetime.date:
    """Return the date that this run's chat templates render.

    Args:
        config: `data.date` is returned if it is set.
        run_dir: the run directory, which must exist if the date is to be recorded.
        record: whether to record today's date if the run has none yet.

    Raises:
        StageError: the recorded date is not a date.
    """
    if config.data.date is not None:
        return config.data.date
    path = run_dir / _FILE
    if not path.exists():
        today = datetime.date.today()
        if record:
            write_atomically(path, f"{today.isoformat()}\n")
        return today
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise StageError(
            f"{path} does not hold this run's date",
            "a date such as 2026-01-31",
            repr(text[:60]),
            "restore the file (a finished stage's manifest.json names the date), or use another "
            "--run-dir",
        ) from error
