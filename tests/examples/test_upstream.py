"""docs/upstream.md: each program shows the fault that it is about, with the locked versions."""

import re
import subprocess

import pytest

from sparselong.processes import process
from tests.conftest import ROOT

PAGE = (ROOT / "docs/upstream.md").read_text(encoding="utf-8")
PROGRAMS = {
    about: code
    for about, code in re.findall(r"^\*\*(.+?)\*\*.*?```python\n(.*?)```", PAGE, re.M | re.S)
}


@pytest.mark.parametrize("about", PROGRAMS)
def test_the_fault_is_still_there(about, untrained_base, forked_python):
    code = PROGRAMS[about]
    if "axolotl." not in code:
        exec(compile(code, about, "exec"), {"base": untrained_base})
        return
    environment = process._environment()  # as stage 03's, to share its imports
    command = [forked_python, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_fault_has_a_program_and_a_change():
    assert len(PROGRAMS) == PAGE.count("```python") == PAGE.count("*Change:*") >= 9
    lock = (ROOT / "requirements/requirements.lock").read_text(encoding="utf-8")
    for name, version in re.findall(r"^## (\w+) ([\d.]+)$", PAGE, re.M):
        assert f"\n{name.lower()}=={version}\n" in lock, "look whether the faults are still there"
