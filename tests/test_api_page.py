"""docs/api.md, which is generated, and the changelog."""

import re
import runpy
import tomllib

import sparselong
from sparselong.lazy import public_names
from tests.conftest import ROOT


def test_the_page_is_up_to_date_and_describes_every_public_name():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs/api.py"))["render"]() == page, "run python docs/api.py"
    names = public_names("sparselong", ROOT / "sparselong/__init__.py")
    assert re.findall(r"^## `sparselong\.(\w+)`", page, re.MULTILINE) == sorted(names)
    for part in page.split("\n## ")[1:]:  # a signature, and a sentence below it
        assert re.search(r"```python\ndef \w+\((.|\n)*\) -> .+\n```\n\n[A-Z].+\.", part), part


def test_the_newest_version_is_the_packages():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (
        versions[:2] == ["Unreleased", project["version"]] == ["Unreleased", sparselong.__version__]
    )
