"""README's commands run as written, and the files and names it mentions exist."""

import re
import runpy
import shlex
import sys

import pytest

from sparselong.errors import StageError
from tests.conftest import ROOT, load_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split(" #")[0].strip()
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if line.strip()
]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


SCRIPTS = [c for c in COMMANDS if re.match(r"(\.venv/bin/)?python 0", c)]


@pytest.mark.parametrize("command", SCRIPTS)
def test_script_commands_are_accepted(command, tmp_path, capsys):
    """Runs with --dry-run, which neither downloads nor requires anything."""
    _, script, *arguments = shlex.split(command)
    main = load_script(script.removesuffix(".py")).main
    arguments = [str(ROOT / a) if a.startswith("configs/") else a for a in arguments]
    # Last, so that it is not the one that a command names, where a demo may have run.
    assert main([*arguments, "--run-dir", str(tmp_path / "run"), "--dry-run"]) == 0
    assert capsys.readouterr().out


def test_the_readme_has_script_commands():
    assert len(SCRIPTS) >= 5


def test_python_blocks_compile():
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert blocks
    for text in blocks:
        compile(text, "README.md", "exec")


@pytest.mark.parametrize("name", ["train_in_one_file", "generate_together"])
def test_examples_explain_how_they_are_called(name, tmp_path, monkeypatch, capsys):
    path = str(ROOT / f"examples/{name}.py")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code == 0 and f"usage: {name}.py" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [path, str(tmp_path / "gone"), "text"])
    with pytest.raises((SystemExit, StageError), match="(?s)gone.*found: +no such directory"):
        runpy.run_path(path, run_name="__main__")


def test_named_files_exist():
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        folders = r"`((?:sparselong|configs|benchmarks|tests|examples|requirements)/[\w./-]+)`"
        for name in re.findall(folders, text) + re.findall(r"\]\(([\w./-]+)\)", text):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_folder_is_in_the_tree(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    (tree,) = (block for block in blocks if "\nsparselong/" in block)
    folders = [path.parent.name for path in (ROOT / "sparselong").glob("*/__init__.py")]
    assert len(folders) > 10
    assert [name for name in folders if f"{name}/" not in tree] == []


def test_the_readme_stays_short_and_shows_a_small_picture():
    picture = ROOT / "docs/demo-loss.png"
    assert len(README.splitlines()) <= 300 and picture.stat().st_size <= 100_000
    assert f"]({picture.relative_to(ROOT)})" in README


def test_no_placeholder_is_left():
    assert not re.search(r"[A-Z]+_FIGURES|TODO|TBD|XXX", README)


def test_the_entry_points_named_in_the_readme_exist():
    import sparselong

    named = set(re.findall(r"sparselong\.(\w+)\(", README))
    assert {"patch_attention", "fuse", "packed_config", "generate"} <= named
    for name in named:
        assert callable(getattr(sparselong, name)), name
