"""`python -m sparselong.report RUN`: write a run's page again, and print where it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparselong.errors import ExpectedError
from sparselong.registration import begin_program
from sparselong.report.page import write_page


def main(argv: list[str] | None = None) -> int:
    """Write the page; return 0, or 1 if it cannot be."""
    begin_program()
    parser = argparse.ArgumentParser(prog="python -m sparselong.report", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="such as runs/NAME")
    try:
        print(write_page(parser.parse_args(argv).run_dir), flush=True)
    except ExpectedError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
