#!/usr/bin/env python3
"""Write docs/api.md: the package's public names, with their signatures and docstrings.

    python docs/api.py

It reads the source and imports neither torch nor the package's modules. A test fails if the page is
out of date.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sparselong.lazy import public_names  # noqa: E402

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):")
ENTRY = re.compile(r"(\*{0,2}\w+): (.*)")


def render() -> str:
    """Return the page."""
    init = ROOT / "sparselong/__init__.py"
    about = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
    rows = ["# API", "", "Generated from the docstrings: `python docs/api.py`.", "", about, ""]
    for name, module in sorted(public_names("sparselong", init).items()):
        rows += describe(name, find(name, module), module)
    return "\n".join(rows).rstrip() + "\n"


def find(name: str, module: str) -> ast.FunctionDef:
    """Return the function that a public name is; a folder's name is looked up in its module."""
    path = ROOT.joinpath(*module.split("."))
    if path.is_dir():
        return find(name, public_names(module, path / "__init__.py")[name])
    tree = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    return found


def describe(name: str, function: ast.FunctionDef, module: str) -> list[str]:
    """Return the lines about one function."""
    signature = ast.unparse(
        ast.FunctionDef(name, function.args, [ast.Pass()], [], function.returns, lineno=0)
    ).removesuffix("\n    pass")
    rows = [f"## `sparselong.{name}`", "", "```python", break_lines(signature[:-1]), "```", ""]
    section = ""
    for line in inspect.cleandoc(ast.get_docstring(function) or "").splitlines():
        text, entry = line.strip(), ENTRY.fullmatch(line.strip())
        if SECTION.fullmatch(line):
            section = text
            rows += [f"**{text}**", ""]
        elif not section:
            rows.append(line)
        elif entry and not line.startswith("     ") and section not in ("Returns:", "Yields:"):
            rows.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            rows.append(f"  {text}" if line.startswith("        ") else text)
    return [*rows, ""]


def break_lines(signature: str) -> str:
    """Return a signature with one argument a line if it is longer than a line of this project."""
    if len(signature) <= 100:
        return signature
    head, rest = signature.split("(", 1)
    inside, end = rest.rsplit(")", 1)
    arguments, depth, start = [], 0, 0
    for place, letter in enumerate(inside):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            arguments.append(inside[start:place].strip())
            start = place + 1
    arguments.append(inside[start:].strip())
    return "\n".join([f"{head}(", *(f"    {each}," for each in arguments), f"){end}"])


if __name__ == "__main__":
    (ROOT / "docs/api.md").write_text(render(), encoding="utf-8")
