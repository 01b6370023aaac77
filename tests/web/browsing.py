"""Chromium, which the tests of the pages need, and where screenshots go."""

import shutil
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SHOTS = Path(__file__).parent / "screenshots"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip
