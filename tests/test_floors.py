"""A module imports its own floor or lower ones, never a sibling stage or a higher floor."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    {"errors", "files", "lazy", "registration", "provenance"},
    {"config", "packing", "runtime"},
    {"run", "memory", "data", "kernels"},
    {"parallel"},
    {"checkpoint", "processes"},
    {"model"},
    {"tiny", "adapters", "generation"},
    {"health", "compress", "finetune", "evaluate", "export", "chat"},
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
NO_TORCH = (
    "errors",
    "lazy",
    "files",
    "registration",
    "provenance",
    "config",
    "run",
    "memory",
    "data",
)
DOOR = ("registration", "model")  # registers the packed format once transformers is imported


def imports(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names += [
                f"{module}.{a.name}" if module == "sparselong" else module for a in node.names
            ]
    return names


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "sparselong").with_suffix("").parts[0]


def breaches(files: list[Path]) -> list[str]:
    found = []
    for path in files:
        here = package_of(path)
        for name in imports(path):
            if not name.startswith("sparselong."):
                continue
            there = name.split(".")[1]
            higher = LEVEL[there] > LEVEL[here]
            sibling = LEVEL[there] == LEVEL[here] == len(FLOORS) - 1 and there != here
            if (higher or sibling) and (here, there) != DOOR:
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def sources() -> list[Path]:
    return [
        p
        for p in (ROOT / "sparselong").rglob("*.py")
        if p.name != "__init__.py" or p.parent.name != "sparselong"
    ]


def test_every_module_has_a_floor():
    assert {package_of(path) for path in sources()} <= set(LEVEL)


def test_imports_go_down():
    assert breaches(sources()) == []


def test_a_breach_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for name, text in {
        "compress/a.py": "from sparselong.finetune import masks\n",
        "packing/b.py": "def f():\n    from sparselong import model\n",
    }.items():
        path = tmp_path / "sparselong" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert len(breaches(list((tmp_path / "sparselong").rglob("*.py")))) == 2


def test_the_lowest_floors_do_not_import_torch():
    for path in sources():
        if package_of(path) in NO_TORCH:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
            assert not {n.split(".")[0] for n in names} & {"torch", "transformers"}, path


def test_only_the_plugin_imports_axolotl():
    importing = {p.name for p in sources() if any(n.split(".")[0] == "axolotl" for n in imports(p))}
    assert importing <= {"axolotl_plugin.py"}
