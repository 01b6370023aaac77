"""Strings that name modules: each must resolve, and none may bypass the import rules."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.structure import tree
from tests.structure.tree import PACKAGE, ROOT, dotted
from tests.test_floors import breaks_a_floor

NAMING = re.compile(r"(sparselong|benchmarks|tests)(\.\w+)+")
DOORS = {
    ("sparselong.registration", "sparselong.model.packed_experts"),
    ("sparselong.registration", "sparselong.model.quantizer"),
    ("sparselong.registration", "sparselong.model.attention"),
}
"""(module, name) pairs that may name a module of a higher floor."""


def named(path: Path) -> list[tuple[int, str]]:
    """Return (line, dotted name) of the strings that are exactly a dotted name of ours."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree.parse(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree.parse(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
        and NAMING.fullmatch(node.value)
    ]


def resolve(name: str, root: Path) -> str | None:
    """Return the module of a dotted name, or the one that defines its last part."""
    if tree.find_module(name, root) is not None:
        return name
    module, _, attribute = name.rpartition(".")
    path = tree.find_module(module, root)
    if path is None:
        return None
    if path.name == "__init__.py":
        return tree.public(module, root).get(attribute)
    return module if attribute in tree.defined(path) else None


def string_breaches(root: Path) -> list[str]:
    found = []
    for path in [*tree.sources(root, inits=True), *tree.scripts(root)]:
        module = dotted(path, root)
        for line, name in named(path):
            reached, where = resolve(name, root), f"{path.relative_to(root)}:{line}"
            if reached is None:
                found.append(f"{where} names {name}, which does not exist")
            elif module.startswith(f"{PACKAGE}.") and (module, name) not in DOORS:
                if breaks_a_floor(module.split(".")[1:], reached.split(".")[1:]):
                    found.append(f"{where} names {name} of a higher or the same floor")
    return found


def test_strings_name_modules_that_exist_and_obey_the_floors():
    assert string_breaches(ROOT) == []


def test_every_exempt_pair_is_used():
    used = {(dotted(path, ROOT), name) for path in tree.sources(ROOT) for _, name in named(path)}
    assert used >= DOORS


def test_the_plugin_and_the_rank_program_are_found():
    """Only strings refer to these two."""
    names = {name for path in tree.sources(ROOT) for _, name in named(path)}
    assert "sparselong.finetune.axolotl_plugin.SparseLongPlugin" in names
    assert "sparselong.finetune.rank" in names


def test_imports_of_tests_and_benchmarks_resolve_without_a_gpu():
    """tests/gpu does not run without a GPU, so a moved module would go unnoticed."""
    missing = []
    for path in sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]):
        for each in tree.imports(path):
            if each.module.partition(".")[0] not in (PACKAGE, "tests", "benchmarks"):
                continue
            file = tree.find_module(each.module, ROOT)
            whole = f"{each.module}.{each.name}"
            if each.name is None or tree.find_module(whole, ROOT) is not None:
                exists = file is not None or each.name is not None
            elif file is None:
                exists = (ROOT.joinpath(*whole.split("."))).is_dir()
            else:
                names = {found.bound for found in tree.imports(file)} | tree.defined(file)
                if file.name == "__init__.py":
                    names |= tree.public(each.module, ROOT).keys()
                exists = each.name in names
            if not exists:
                missing.append(f"{path.relative_to(ROOT)}:{each.line}: {whole}")
    assert missing == []


@pytest.mark.parametrize(
    ("text", "breach"),
    [
        ("x = 'sparselong.finetune.gone'\n", "which does not exist"),
        ("x = 'sparselong.finetune.rank.gone'\n", "which does not exist"),
        ("x = ['-m', 'sparselong.finetune.rank']\n", "of a higher or the same floor"),
        ("x = 'sparselong.finetune.rank.main'\n", "of a higher or the same floor"),
        ("x = 'sparselong.config.schema'\n", None),
        ("'''sparselong.finetune.rank'''\n", None),
        ("x = 'see sparselong.finetune.rank'\n", None),
    ],
)
def test_a_string_that_breaks_a_rule_is_noticed(tmp_path, text, breach):
    files = {"finetune/rank.py": "def main(): ...\n", "config/schema.py": "", "model/a.py": text}
    found = string_breaches(tree.write_tree(tmp_path, files))
    assert [line.partition("names ")[0] for line in found] == (
        [] if breach is None else ["sparselong/model/a.py:1 "]
    )
    assert breach is None or breach in found[0]
