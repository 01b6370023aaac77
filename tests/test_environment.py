"""The environment: the library leaves it alone, and each program of the project sets its own."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

from sparselong import registration
from sparselong.lazy import public_names
from sparselong.registration import ALLOCATOR
from tests.conftest import ROOT, load_script

SET = {*registration._ENVIRONMENT, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
PUBLIC = public_names("sparselong", ROOT / "sparselong/__init__.py")
ASKING = "import torch, transformers.models.gpt_oss.modeling_gpt_oss as _"
LIBRARY = f"""
import json, logging, os, sys, time, warnings
def state():
    quiet = [logging.getLogger(name).level for name in {sorted(registration._HARMLESS_LOGGERS)}]
    return [dict(os.environ), quiet, list(map(str, warnings.filters))]
before, start = state(), time.process_time()
import sparselong
seconds = time.process_time() - start
assert state() == before, "import sparselong"
{ASKING}
import peft
before = state()  # those packages may change what they like
for name in {sorted(PUBLIC)}:
    getattr(sparselong, name)
    assert state() == before, name
print(json.dumps([seconds, "sparselong.model.quantizer" in sys.modules]))
"""


@pytest.fixture
def plain_environment() -> dict[str, str]:
    """This process's environment without what conftest.py has set."""
    return {name: value for name, value in os.environ.items() if name not in SET}


def test_the_library_changes_no_environment_and_is_imported_at_once(plain_environment):
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY],
        env=plain_environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seconds, registered = json.loads(done.stdout)
    assert registered and seconds <= 0.2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None), (ALLOCATOR, None)),
        (("max_split_size_mb:64", None), ("max_split_size_mb:64", None)),
        ((None, "backend:cudaMallocAsync"), (None, "backend:cudaMallocAsync")),
    ],
)
def test_segments_expand_unless_the_user_configures_the_allocator(given, expected):
    found = {name: value for name, value in zip(NAMES, given, strict=True) if value}
    registration.add_defaults(found)
    assert tuple(found.get(name) for name in NAMES) == expected
    assert registration._ENVIRONMENT.items() <= found.items()


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("0[1-6]_*.py")))
def test_each_script_sets_the_environment_before_anything_heavy(plain_environment, name):
    """The config is wrong, so the script ends where the first check does."""
    code = (
        f"import os, runpy, sys; sys.argv = ['{name}.py', '--config', '/no/such']\n"
        f"try: runpy.run_path('{name}.py', run_name='__main__')\n"
        f"except SystemExit as end: print(end.code)\n"
        "print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))\n"
        "print(os.environ['PYTORCH_ALLOC_CONF'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=plain_environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["2", "set()", f"{ALLOCATOR} 1"], done.stderr


@pytest.mark.parametrize("name", ["03_finetune", "04_eval", "06_chat"])
def test_a_process_of_torchrun_sets_it_before_it_meets_the_others(monkeypatch, name):
    """Their store is torch's."""
    script = load_script(name)
    order: list[str] = []
    joined = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for variable, value in (joined | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("sparselong.processes.follow.begin_program", lambda: order.append("set"))

    def refuse(stage: str) -> None:
        order.append(f"launcher of {stage}")
        raise SystemExit(3)

    monkeypatch.setattr("sparselong.processes.follow._check_launcher", refuse)
    with pytest.raises(SystemExit):
        script.main([])
    assert order == ["set", f"launcher of {name}"]


def test_every_program_of_the_package_and_every_benchmark_sets_it():
    programs = [
        path
        for path in (ROOT / "sparselong").rglob("*.py")
        if "__main__" in path.read_text() and path.parent.name != "config"
    ]
    assert len(programs) >= 5
    for path in programs:
        tree = ast.parse(path.read_text())
        (main,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
        first = next(n for n in main.body if not isinstance(getattr(n, "value", 0), ast.Constant))
        assert ast.unparse(first) in ("set_environment()", "begin_program()"), path
    for path in (ROOT / "benchmarks").rglob("*.py"):
        text = path.read_text()
        if "__main__" in text:
            assert re.search(r"^ *(from|import) benchmarks\b", text, re.MULTILINE), path
