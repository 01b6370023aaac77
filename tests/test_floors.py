"""Import rules: floors, public names, and the number of modules in a folder.

    errors, figures, files, lazy, registration, provenance
    config, packing, runtime
    run, memory, data, kernels          kernels: gpu, opaque | attention, layer, sweep
    parallel                                     | decode | dense, experts
    checkpoint, processes
    model
    tiny, adapters, generation
    health, compress, finetune, evaluate, export, chat
    report, compare, sweep, axolotl

A module may import lower floors, its own folder and its parent folders, but never a sibling on its
floor. From another folder it takes only names listed in that folder's `__init__`. tests/structure/
holds the other rules: state, module names in strings, sizes.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.structure import tree
from tests.structure.tree import PACKAGE, ROOT, dotted, is_folder, sources

FLOORS = (
    {"errors", "figures", "files", "lazy", "registration", "provenance"},
    {"config", "packing", "runtime"},
    {"run", "memory", "data", "kernels"},
    {"parallel"},
    {"checkpoint", "processes"},
    {"model"},
    {"tiny", "adapters", "generation"},
    {"health", "compress", "finetune", "evaluate", "export", "chat"},
    {"report", "compare", "sweep", "axolotl"},
)
INNER = {
    "kernels": (
        {"gpu", "layout", "expert_stack", "launch", "opaque"},
        {"attention", "layer", "sweep"},
        {"decode"},
        {"dense", "experts"},
    ),
    "parallel": (
        *({"mesh", "collectives", "gradients", "loss", "placement"}, {"sequence"}),
        *({"experts", "vocabulary"}, {"apply"}),
    ),
}
"""Floors within a folder, by names of its modules and subfolders. Single modules on one floor,
e.g. `mesh` and `collectives`, may import one another."""
NO_TORCH = (
    *("errors", "figures", "files", "lazy", "registration", "provenance"),
    *("config", "run", "memory", "data"),
    *("report", "compare"),
)
"""Modules whose import must not import torch."""
OFFERED = re.compile(r"sparselong\.(\w+)")
"""Pattern for public names in the package's docstring."""


def level(name: str, floors: tuple[set[str], ...], where: str) -> int:
    for number, names in enumerate(floors):
        if name in names:
            return number
    raise AssertionError(f"{where}: {name} has no floor; see {Path(__file__).name}")


def breaks_a_floor(here: list[str], there: list[str]) -> bool:
    """Return whether `here` importing `there` (name parts below the package) breaks a floor."""
    if here[0] != there[0]:
        ours, theirs = (level(parts[0], FLOORS, PACKAGE) for parts in (here, there))
        alone = len(here) == len(there) == 1  # single modules on one floor, e.g. errors and files
        return theirs > ours or (theirs == ours and not alone)
    floors = INNER.get(here[0])
    if floors is None or len(here) < 2 or len(there) < 2 or here[1] == there[1]:
        return False
    ours, theirs = (level(parts[1], floors, here[0]) for parts in (here, there))
    alone = len(here) == len(there) == 2
    return theirs > ours or (theirs == ours and not alone)


def floor_breaches(root: Path) -> list[str]:
    found = []
    for path in sources(root):
        here = dotted(path, root).split(".")[1:]
        for each in tree.imports(path):
            there = tree.target(each, root).split(".")
            if there[0] != PACKAGE or len(there) < 2:
                continue
            if breaks_a_floor(here, there[1:]):
                found.append(f"{path.relative_to(root)}:{each.line} imports {'.'.join(there)}")
    return found


def is_inside(module: str, folder: str) -> bool:
    return module.startswith(f"{folder}.")


def attributes_of(path: Path, bound: str) -> set[str]:
    """Attributes of an imported name that a file reads."""
    return {
        node.attr
        for node in ast.walk(tree.parse(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == bound
    }


def outside_names(root: Path, paths: list[Path]) -> dict[str, dict[str, str]]:
    """Map folder → name → importing file, for names taken from outside the folder.

    If a whole folder is imported, the attributes read from it count.
    """
    taken: dict[str, dict[str, str]] = defaultdict(dict)
    for path in paths:
        here = dotted(path, root)
        for each in tree.imports(path):
            if each.module.partition(".")[0] != PACKAGE:
                continue
            who = f"{path.relative_to(root)}:{each.line}"
            whole = f"{each.module}.{each.name}" if each.name else each.module
            if is_folder(whole, root):
                if not is_inside(here, whole) and whole != PACKAGE:
                    taken[whole] |= dict.fromkeys(attributes_of(path, each.bound), who)
            elif is_folder(each.module, root):
                if not is_inside(here, each.module) and each.name:
                    taken[each.module][each.name] = who
            elif not is_inside(here, each.module.rpartition(".")[0]):
                taken[each.module.rpartition(".")[0]][f"{each.module}'s {each.name}"] = who
    return taken


def public_breaches(root: Path) -> list[str]:
    """Names taken from another folder whose `__init__` does not list them."""
    paths = [*sources(root), *tree.scripts(root)]
    found = []
    for folder, names in outside_names(root, paths).items():
        listed = tree.public(folder, root)
        if folder == PACKAGE:  # top-level modules are public
            listed |= {path.stem: "" for path in (root / PACKAGE).glob("*.py")}
            names = {n.partition("'s ")[0].rpartition(".")[2]: who for n, who in names.items()}
        found += [f"{who} takes {name} of {folder}" for name, who in names.items()
                  if name not in listed]  # fmt: skip
    return sorted(found)


def listing_breaches(root: Path) -> list[str]:
    """Names listed in an `__init__` that no module defines or that equal a module's name."""
    found = []
    for init in sources(root, inits=True):
        if init.name != "__init__.py":
            continue
        folder = dotted(init, root)
        for name, module in tree.public(folder, root).items():
            path = tree.find_module(module, root)
            is_module = module == f"{folder}.{name}"
            if path is None:
                found.append(f"{folder} lists {name} of {module}, which there is not")
            elif not is_inside(module, folder):
                found.append(f"{folder} lists {name} of {module}, which is not its own")
            elif not is_module and tree.find_module(f"{folder}.{name}", root) is not None:
                found.append(f"{folder} lists {name} of {module} and has a module of that name")
            elif not is_module and path.name == "__init__.py":
                if name not in tree.public(module, root):
                    found.append(f"{folder} lists {name}, which {module} does not")
            elif not is_module and name not in tree.defined(path):
                found.append(f"{folder} lists {name}, which {module} does not define")
    return found


def unused_names(root: Path) -> list[str]:
    """Listed names neither used outside their folder nor mentioned in the documentation."""
    paths = [*sources(root), *tree.scripts(root), *sorted((root / "benchmarks").rglob("*.py"))]
    taken = outside_names(root, paths)
    api = ast.get_docstring(tree.parse(root / PACKAGE / "__init__.py")) or ""
    shipped = set(OFFERED.findall(api))
    inits = [path for path in sources(root, inits=True) if path.name == "__init__.py"]
    for init in inits:  # a folder may list names of its subfolders
        for name, module in tree.public(dotted(init, root), root).items():
            if is_folder(module, root):
                taken[module][name] = str(init)
    return [
        f"{folder} lists {name}"
        for folder in (dotted(init, root) for init in inits)
        for name, module in tree.public(folder, root).items()
        if not {name, f"{module}'s {name}"} & (shipped if folder == PACKAGE else set(taken[folder]))
    ]


def crowded_folders(root: Path) -> list[str]:
    """Folders with fewer than 2 or more than 16 modules or subfolders, without `__init__`."""
    found = []
    for init in sources(root, inits=True):
        if init.name == "__init__.py":
            modules = [p for p in init.parent.glob("*.py") if p != init]
            folders = [p for p in init.parent.glob("*/__init__.py")]
            if not 2 <= len(modules) + len(folders) or len(modules) > 16:
                found.append(f"{dotted(init, root)}: {len(modules)} modules")
    return found


def test_imports_only_go_to_lower_floors():
    assert floor_breaches(ROOT) == []


def test_other_folders_use_public_names_only():
    assert public_breaches(ROOT) == []


def test_listed_names_exist_and_differ_from_module_names():
    assert listing_breaches(ROOT) == []


def test_listed_names_are_used_or_documented():
    assert unused_names(ROOT) == []


def test_folders_hold_2_to_16_modules():
    assert crowded_folders(ROOT) == []


BROKEN = {
    "an upward import": {"packing/a.py": "def f():\n    from sparselong.model import load\n"},
    "an import for types only": {
        "runtime/a.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from sparselong.parallel import Mesh\n"
    },
    "a sibling stage": {"compress/a.py": "from sparselong.finetune import masks\n"},
    "a sibling of a floor below": {"memory/a.py": "from sparselong.data import corpus\n"},
    "decode from attention": {"kernels/attention/a.py": "import sparselong.kernels.decode.gemv\n"},
    "experts beside dense": {"kernels/dense/a.py": "from sparselong.kernels import experts\n"},
    "gpu from a folder above": {"kernels/gpu.py": "from sparselong.kernels.layer import norm\n"},
    "mesh from sequence": {"parallel/mesh.py": "from sparselong.parallel.sequence import shard\n"},
}


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN)
def test_a_broken_floor_is_detected(tmp_path, files):
    standing = {
        "model/load.py": "",
        "parallel/mesh.py": "",
        "parallel/sequence/shard.py": "",
        "finetune/masks.py": "",
        "data/corpus.py": "",
        "kernels/decode/gemv.py": "",
        "kernels/experts/op.py": "",
        "kernels/layer/norm.py": "",
        "memory/b.py": "from sparselong.config import schema\nfrom sparselong import errors\n",
        "config/schema.py": "",
        "errors.py": "",
    }
    assert floor_breaches(tree.write_tree(tmp_path, standing)) == []
    (name,) = files
    (found,) = floor_breaches(tree.write_tree(tmp_path, files))
    assert found.startswith(f"{PACKAGE}/{name}:")


def test_a_broken_listing_is_detected(tmp_path):
    head = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
    lines = {
        "right": "    from sparselong.data.corpus import texts\n",
        "undefined": "    from sparselong.data.corpus import gone\n",
        "imported": "    from sparselong.data.corpus import Path\n",
        "missing": "    from sparselong.data.nowhere import x\n",
        "foreign": "    from sparselong.files import write\n",
        "module": "    from sparselong.data import corpus\n",
        "clash": "    from sparselong.data.corpus import sources\n",
    }
    files = {
        "data/corpus.py": "from pathlib import Path\ntexts = sources = 1\n",
        "files.py": "write = 1",
    }
    files |= {"data/sources.py": ""}
    wrong = {}
    for kind, line in lines.items():
        root = tree.write_tree(tmp_path / kind, files | {"data/__init__.py": head + line})
        wrong[kind] = len(listing_breaches(root))
    assert wrong == dict.fromkeys(lines, 1) | {"right": 0, "module": 0}


def test_use_of_a_private_name_is_detected(tmp_path):
    head = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sparselong.data.a import b\n"
    )
    files = {"data/__init__.py": head, "data/a.py": "b = c = 1\n", "data/d.py": "", "errors.py": ""}
    takers = {
        "from sparselong.data import b\n": 0,
        "from sparselong.errors import E\n": 0,
        "from sparselong import errors\n": 0,
        "from sparselong import data\nprint(data.b)\n": 0,
        "from sparselong.data import c\n": 1,
        "from sparselong.data import d\n": 1,
        "from sparselong.data.a import b\n": 1,
        "import sparselong.data.a\n": 1,
        "from sparselong import data\nprint(data.c)\n": 1,
    }
    for text, expected in takers.items():
        root = tree.write_tree(tmp_path / str(abs(hash(text))), files | {"model/e.py": text})
        assert len(public_breaches(root)) == expected, text
        assert (unused_names(root) == []) is ("b)" in text or "import b" in text), text
        script = tmp_path / f"script{abs(hash(text))}"
        tree.write_tree(script, files)
        (script / "01_script.py").write_text(text)
        assert len(public_breaches(script)) == expected, f"a script: {text}"


def test_a_crowded_folder_is_detected(tmp_path):
    files = {f"data/m{n}.py": "" for n in range(17)} | {"model/one.py": ""}
    tree.write_tree(tmp_path, files)
    assert crowded_folders(tmp_path) == [
        "sparselong.data: 17 modules",
        "sparselong.model: 1 modules",
    ]


def test_only_the_plugins_import_axolotl():
    importing = {
        path.name
        for path in sources(ROOT)
        if any(each.module.partition(".")[0] == "axolotl" for each in tree.imports(path))
    }
    assert importing == {"axolotl_plugin.py", "axolotl.py"}


def test_the_lowest_floors_do_not_import_torch():
    for path in sources(ROOT):
        if dotted(path, ROOT).split(".")[1] in NO_TORCH:
            body = [n for n in tree.parse(path).body if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {alias.name for n in body if isinstance(n, ast.Import) for alias in n.names}
            names |= {n.module or "" for n in body if isinstance(n, ast.ImportFrom)}
            assert not {name.partition(".")[0] for name in names} & {"torch", "transformers"}, path
