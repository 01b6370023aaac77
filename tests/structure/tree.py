"""The repository as syntax trees: modules, what they import, and what they define.

Functions take a root or path, so that tests can pass a tree that breaks a rule.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparselong.lazy import public_names

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sparselong"


class Import(NamedTuple):
    """One imported name: `from module import name`, or `import module` with no name."""

    path: Path
    line: int
    module: str
    name: str | None
    bound: str
    """Name bound in the importing module."""


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return _parse(path.read_text(encoding="utf-8"))


@functools.cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def sources(root: Path, *, inits: bool = False) -> list[Path]:
    """Return the package's modules, and with `inits` also each folder's `__init__`."""
    found = sorted((root / PACKAGE).rglob("*.py"))
    return [path for path in found if inits or path.name != "__init__.py"]


def scripts(root: Path) -> list[Path]:
    """Return the numbered scripts and the examples."""
    return sorted([*root.glob("[0-9]*.py"), *root.glob("examples/*.py")])


def dotted(path: Path, root: Path) -> str:
    """Return `sparselong.data.corpus` for sparselong/data/corpus.py, the folder for `__init__`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_module(name: str, root: Path) -> Path | None:
    """Return the file of a dotted name; a folder's file is its `__init__`."""
    base = root.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def is_folder(name: str, root: Path) -> bool:
    """Return whether a dotted name is a folder of modules."""
    return (root.joinpath(*name.split(".")) / "__init__.py").is_file()


def imports(path: Path) -> Iterator[Import]:
    """Yield every import of a file, including those in functions and under TYPE_CHECKING."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                yield Import(path, node.lineno, alias.name, None, bound)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                bound = alias.asname or alias.name
                yield Import(path, node.lineno, node.module or "", alias.name, bound)


def public(folder: str, root: Path) -> dict[str, str]:
    """Return the public names of a folder with the modules that define them."""
    return public_names(folder, root.joinpath(*folder.split("."), "__init__.py"))


def target(found: Import, root: Path) -> str:
    """Return the module that an import reaches; a folder's public name resolves to its module.

    Names that the folder's `__init__` defines, and other packages, are returned unchanged.
    """
    if found.name is None or not is_folder(found.module, root):
        return found.module
    submodule = f"{found.module}.{found.name}"
    if find_module(submodule, root) is not None:
        return submodule
    return public(found.module, root).get(found.name, found.module)


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run on import, including those in `if`, `try` and loops.

    Excludes `if __name__ == "__main__"` blocks.
    """
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        yield node
        if isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try):
            for field in ("body", "orelse", "finalbody"):
                pending += getattr(node, field, [])
            for handler in getattr(node, "handlers", []):
                pending += handler.body


def assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield names that a statement binds, with their values where they can be separated."""
    if isinstance(node, ast.Assign):
        for each in node.targets:
            names = each.elts if isinstance(each, ast.Tuple) else [each]
            pair = isinstance(each, ast.Tuple) and isinstance(node.value, ast.Tuple)
            values = node.value.elts if pair else [node.value] * len(names)  # type: ignore[union-attr]
            for name, value in zip(names, values, strict=True):
                if isinstance(name, ast.Name):
                    yield name.id, value
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id, node.value


def defined(path: Path) -> set[str]:
    """Return the names that a module defines itself, without imported ones."""
    names: set[str] = set()
    for node in top_level(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        names |= {name for name, _ in assigned(node)}
    return names


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Write a package to a temporary directory, for a test that breaks a rule."""
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        folder = path.parent
        while folder != root:
            if not (folder / "__init__.py").exists():
                (folder / "__init__.py").write_text("", encoding="utf-8")
            folder = folder.parent
    return root
