"""Limits: 400 lines per file, 50 lines and nine arguments per function, 150 lines per kernel.

`*args` and `**kwargs` count as one argument each; a method's `self` does not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure import tree
from tests.structure.tree import ROOT

FILE_LINES, FUNCTION_LINES, KERNEL_LINES, ARGUMENTS = 400, 50, 150, 9
Function = ast.FunctionDef | ast.AsyncFunctionDef

FIXED = {
    "sparselong/model/fused.py _forward": "transformers' GptOssForCausalLM.forward",
    "sparselong/model/attention.py attention_forward": "transformers' attention functions",
}
"""Longer signatures that another library fixes, with what fixes them."""


def functions(path: Path) -> Iterator[tuple[Function, bool, bool]]:
    """Yield (function, is a Triton kernel, is a method) for each function of a file."""
    module = tree.parse(path)
    methods = {
        id(node)
        for each in ast.walk(module)
        if isinstance(each, ast.ClassDef)
        for node in each.body
    }
    for node in ast.walk(module):
        if isinstance(node, Function):
            decorators = [ast.unparse(each) for each in node.decorator_list]
            kernel = any(d.startswith(("triton.jit", "triton.autotune")) for d in decorators)
            static = "staticmethod" in decorators
            yield node, kernel, id(node) in methods and not static


def count_arguments(node: Function, is_method: bool) -> int:
    given = node.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(named) - is_method + (given.vararg is not None) + (given.kwarg is not None)


def too_large(root: Path) -> dict[str, int]:
    """Return the sizes of everything beyond the limits, by name."""
    folders = [root / "sparselong", root / "benchmarks"]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    found = {}
    for path in [*paths, *tree.scripts(root)]:
        name = str(path.relative_to(root))
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            found[name] = lines
        for node, is_kernel, is_method in functions(path):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > (KERNEL_LINES if is_kernel else FUNCTION_LINES):
                found[f"{name} {node.name}"] = lines
            count = count_arguments(node, is_method)
            if count > ARGUMENTS and not is_kernel and f"{name} {node.name}" not in FIXED:
                found[f"{name} {node.name} arguments"] = count
    return found


def test_nothing_is_too_large():
    assert too_large(ROOT) == {}


LONG_FUNCTION = "    x = 1\n" * 50
TEN = "a, b, c, d, e, *, f, g, h, i, j=0"
NINE_AND_REST = "a, b, c, d, e, f, g, h, *i, **j"
CASES = {
    "400 lines": ("x = 1\n" * 400, None, 0),
    "401 lines": ("x = 1\n" * 401, "", 401),
    "50 lines": ("def f():\n" + LONG_FUNCTION[:-10], None, 0),
    "51 lines": ("def f():\n" + LONG_FUNCTION, " f", 51),
    "a method": ("class C:\n async def f(self):\n" + LONG_FUNCTION, " f", 51),
    "a kernel": (f"@triton.jit\ndef f({TEN}):\n" + LONG_FUNCTION, None, 0),
    "a long kernel": ("@triton.jit\ndef f():\n" + 3 * LONG_FUNCTION, " f", 151),
    "nine": ("def f(a, b, c, d, e, f, g, h, i): ...\n", None, 0),
    "nine and self": ("class C:\n def f(self, a, b, c, d, e, f, g, h, i): ...\n", None, 0),
    "ten": (f"def f({TEN}): ...\n", " f arguments", 10),
    "ten with the rest": (f"def f({NINE_AND_REST}): ...\n", " f arguments", 10),
}


@pytest.mark.parametrize(("text", "suffix", "size"), CASES.values(), ids=CASES)
def test_exceeding_a_limit_is_noticed(tmp_path, text, suffix, size):
    found = too_large(tree.write_tree(tmp_path, {"model/a.py": text}))
    assert found == ({} if suffix is None else {f"sparselong/model/a.py{suffix}": size})
