"""What a manifest says about the code that ran."""

import subprocess

import pytest

from sparselong import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a package, and provenance.py in it."""
    package = tmp_path / "sparselong"
    package.mkdir()
    (package / "provenance.py").write_text("")
    (tmp_path / "README.md").write_text("")
    (tmp_path / ".gitignore").write_text("runs/\n")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "one")):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "dirty"),
    [
        ("mydata/rows.jsonl", False),
        ("runs/mine/config.yaml", False),
        ("README.md", True),
        ("sparselong/provenance.py", True),
        ("sparselong/new.py", True),
    ],
)
def test_only_the_repositorys_files_make_it_changed(checkout, path, dirty):
    assert provenance.describe_software()["git_dirty"] is False
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text("changed")
    found = provenance.describe_software()
    assert found["git_dirty"] is dirty and len(found["git_commit"]) == 40
