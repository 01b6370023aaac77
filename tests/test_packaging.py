"""The package: what a wheel holds, what the library needs, and the extras of the scripts."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from sparselong.run.stages import STAGES
from tests.conftest import ROOT, load_script
from tests.structure import tree

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOLLOWING = {"httpx", "packaging", "regex", "tokenizers"}  # of transformers and huggingface_hub
CHOSEN = {"flash_attn", "triton"}  # never needed without a GPU; torch's CUDA builds bring Triton


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[; ]", each)[0].lower().replace("_", "-") for each in requirements}


packages_of_modules = functools.cache(packages_distributions)


def distributions_of(module: str) -> set[str]:
    found = packages_of_modules()[module]
    return {name.lower().replace("_", "-") for name in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a copy of the tracked files: a build leaves folders beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if name.startswith(("sparselong/", "pyproject", "README", "LICENSE", "configs/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").iterdir()
    return zipfile.ZipFile(built)


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sparselong").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected
    data = {Path(name).name for name in held if not name.endswith(".py")}
    assert {"py.typed", "index.html", "style.css", "harmony.jinja", "harmony.gotmpl"} <= data


def test_a_wheel_names_the_extras(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    lines = wheel.read(name).decode().splitlines()
    found = {line.partition(": ")[2] for line in lines if line.startswith("Provides-Extra")}
    assert found == set(EXTRAS) == {each.extra for each in STAGES.values()} - {""}
    assert any(line.startswith("Requires-Dist: torch<") for line in lines)


def test_versions_are_those_of_the_environment():
    text = (ROOT / "requirements/requirements.in").read_text(encoding="utf-8")
    pinned = {line for line in text.splitlines() if "==" in line and not line.startswith("#")}
    asked = {each for extra in EXTRAS.values() for each in extra}
    assert {each for each in asked if "==" in each} <= pinned
    named = names_of(text.splitlines())
    beside = {"accelerate", "jinja2", "numpy", "safetensors"}  # come with transformers and others
    assert names_of([*asked, *PROJECT["dependencies"]]) <= named | beside


@pytest.mark.parametrize("name", sorted(STAGES))
def test_an_extra_lists_what_its_script_imports(name):
    declared = STAGES[name]
    every = [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]
    listed = names_of(EXTRAS[declared.extra] if declared.extra else every)
    for module in declared.imports:
        assert distributions_of(module) & listed, module


LIBRARY = ("__init__", "adapters", "config", "data/conversations", "generation", "kernels", "model")


def test_the_library_imports_what_it_depends_on():
    """Data files of other formats are the scripts' (data/lines.py, data/sources.py)."""
    base = names_of(PROJECT["dependencies"]) | FOLLOWING
    for path in tree.sources(ROOT, inits=True):
        name = str(path.relative_to(ROOT / "sparselong"))
        if not name.startswith((*LIBRARY, "checkpoint", "packing", "parallel", "runtime")):
            continue
        for each in tree.imports(path):
            top = each.module.partition(".")[0]
            if top in sys.stdlib_module_names or top in {"sparselong", *CHOSEN}:
                continue
            assert distributions_of(top) & base, f"{path}:{each.line} imports {top}"


@pytest.mark.parametrize("name", [name for name in sorted(STAGES) if STAGES[name].extra])
def test_a_script_names_the_extra_that_is_missing(name, monkeypatch, capsys, tmp_path):
    absent, extra = STAGES[name].imports[-1], STAGES[name].extra
    monkeypatch.setitem(sys.modules, absent, None)
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run")]
    assert load_script(name).main(arguments) == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[0] == f"error:    {name} needs packages of the extra `{extra}`"
    assert f"no {absent}" in told.err and f"pip install '.[{extra}]'" in told.err
    assert "Traceback" not in told.err and told.out == "" and not (tmp_path / "run").exists()


@pytest.fixture
def unactivated(tmp_path) -> Path:
    """A checkout with a .venv that does not run."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    return tmp_path


@pytest.mark.parametrize("name", sorted(STAGES))
def test_another_python_is_told_to_activate_the_environment(name, unactivated, monkeypatch, capsys):
    monkeypatch.setattr("sparselong.provenance._ROOT", unactivated)
    monkeypatch.setitem(sys.modules, STAGES[name].imports[0], None)
    run_dir = unactivated / "run"
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(run_dir)]
    assert load_script(name).main(arguments) == 1
    fix = capsys.readouterr().err.splitlines()[-1]
    assert fix == f"fix:      source {unactivated}/.venv/bin/activate" and not run_dir.exists()


def test_a_traceback_of_a_bare_python_ends_with_the_fix(unactivated):
    """Without pydantic no script can be imported, so nothing of ours reports the failure."""
    shutil.copytree(ROOT / "sparselong", unactivated / "sparselong")
    shutil.copy(ROOT / "01_health.py", unactivated)
    bare = subprocess.run(
        [sys.executable, "-S", "01_health.py"],
        cwd=unactivated,
        capture_output=True,
        text=True,
        check=False,
    )
    assert bare.stderr.splitlines()[-2:] == [
        "ModuleNotFoundError: No module named 'pydantic'",
        "fix: source .venv/bin/activate",
    ]


def test_a_plan_needs_no_extra(monkeypatch, capsys, tmp_path):
    for module in STAGES["02_compress"].imports:
        monkeypatch.setitem(sys.modules, module, None)
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run")]
    assert load_script("02_compress").main([*arguments, "--dry-run"]) == 0


ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name.partition(".")[0] in {absent} else real(name, *rest)
)
import runpy, sparselong, torch
base, data, out = sys.argv[1:]
from pathlib import Path
train = runpy.run_path("examples/transformers_trainer.py")["train"]
trainer = train(base, Path(data), Path(out), "lora", steps=1, batch=4)
model = sparselong.model.load_model(Path(base), attn_implementation="sparselong")
made = list(sparselong.generate(model, torch.tensor([[5, 6, 7]]), 4))
print(len(made), set({absent}) & set(sys.modules))
"""


def test_the_library_trains_and_generates_without_the_extras(untrained_base, chat_file, tmp_path):
    absent = {module for each in STAGES.values() if each.extra for module in each.imports}
    absent |= {"trl", "tensorboard", "triton", "pyarrow", "pandas", "bitsandbytes", "wonderwords"}
    code = ALONE.format(absent=sorted(absent))
    command = [sys.executable, "-c", code, str(untrained_base), str(chat_file), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "4 set()"
    assert (tmp_path / "adapter_model.safetensors").is_file()
