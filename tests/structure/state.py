"""Process-wide state, found in the syntax tree: what outlives a call and is written to.

`find_state` lists, as `module:name`, what a module changes beyond the objects that its callers pass
in:

- names rebound through `global`;
- module-level objects, classes and imported objects that code inside functions changes: a mutating
  method, an assignment to a subscript or attribute, `setattr`;
- containers in a class body that methods change through `self`, `cls` or the class;
- caches: functions under `functools.cache` or `lru_cache`, whose results outlive the call;
- module-level values that are state by their kind (ContextVar, thread-local, weak dictionaries,
  counters) or instances of classes whose methods write to `self`;
- changes of other packages' objects when the module is imported, and calls for their effect.

An object that is reached through a parameter or a local name is the caller's affair.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.structure import tree

MUTATORS = frozenset(
    "add append appendleft clear close discard difference_update enter_context extend extendleft"
    " insert intersection_update move_to_end pop popitem popleft put register remove reverse"
    " rotate set setdefault sort subtract symmetric_difference_update update".split()
)
STATE_KINDS = frozenset(
    "ContextVar local Lock RLock Event Condition Semaphore WeakKeyDictionary WeakValueDictionary"
    " WeakSet ExitStack count cycle iter Generator deque Counter defaultdict".split()
)
CACHES = frozenset({"cache", "lru_cache", "cached"})
HARMLESS = frozenset({"expose"})
"""Calls at module level whose results hold no state beyond sys.modules."""
Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def find_state(path: Path, root: Path) -> dict[str, bool]:
    """`module:name` of everything that the module writes to beyond its calls.

    Returns:
        For each name whether it is another module's or package's.
    """
    module, reader = tree.dotted(path, root), _Reader(tree.parse(path))
    return {
        f"{module}:{name}": name.partition(".")[0] in reader.imported
        for name in sorted(reader.found)
    }


class _Reader:
    """One module: its names, and what its code writes to."""

    def __init__(self, module: ast.Module):
        self.imported, self.modules = _imported(module)
        self.classes = {n.name: n for n in ast.walk(module) if isinstance(n, ast.ClassDef)}
        self.values: dict[str, ast.expr | None] = {}
        functions: set[str] = set()
        for node in tree.top_level(module):
            self.values |= dict(tree.assigned(node))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.add(node.name)
        self.globals = self.imported | set(self.values) | set(self.classes) | functions
        self.found: set[str] = set()
        self._read_values()
        self._read_import_time(module)
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._read_decorators(node)
        self._read_functions(module, frozenset(), None)

    def _read_values(self) -> None:
        for name, value in self.values.items():
            calls = [n for n in ast.walk(value) if isinstance(n, ast.Call)] if value else []
            kinds = {_last_name(call.func) for call in calls}
            written = {kind for kind in kinds if kind in self.classes and self._writes_self(kind)}
            if (kinds & STATE_KINDS or written) and not kinds & HARMLESS:
                self.found.add(name)

    def _writes_self(self, name: str) -> bool:
        for method in self.classes[name].body:
            if isinstance(method, ast.FunctionDef) and method.name not in ("__init__", "__new__"):
                for chain in _written(method):
                    if chain[0] == "self":
                        return True
        return False

    def _read_import_time(self, module: ast.Module) -> None:
        """What importing does to others: writes, and calls for their effect."""
        for node in tree.top_level(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                called = _chain(node.value.func)
                own = called[0] in self.classes.keys() | self.values.keys()
                if not own and (len(called) == 1 or called[-1] not in MUTATORS):
                    self.found.add(_told(called))
            if not isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try):
                self.found |= {_told(c) for c in _written(node) if self._is_others(c)}

    def _is_others(self, chain: tuple[str, ...]) -> bool:
        """Whether a chain leads into an imported object; `torch.sort(x)` changes no module."""
        return chain[0] in self.imported and (len(chain) > 1 or chain[0] not in self.modules)

    def _read_decorators(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            call = decorator.func if isinstance(decorator, ast.Call) else decorator
            if _last_name(call) in CACHES:
                self.found.add(node.name)

    def _read_functions(self, node: ast.AST, local: frozenset[str], owner: str | None) -> None:
        """Goes down with the names that are local there, and the class that methods belong to."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                self._read_functions(child, local, child.name)
            elif isinstance(child, Scope):
                shared = _declared_global(child)
                inside = (local | _bound(child)) - shared
                self._read_writes(child, inside, shared, owner)
                self._read_functions(child, inside, owner)
            else:
                self._read_functions(child, local, owner)

    def _read_writes(
        self, function: Scope, local: frozenset[str], shared: frozenset[str], owner: str | None
    ) -> None:
        assigned = {n.id for n in _own(function) if isinstance(n, ast.Name) and _stores(n)}
        self.found |= shared & assigned
        for chain in _written(function):
            first = chain[0]
            if first in ("self", "cls", "type(self)", "self.__class__") and owner:
                self._read_class_write(chain, owner)
            elif first in self.classes and first not in local and len(chain) > 1:
                self.found.add(f"{first}.{chain[1]}")
            elif first in self.globals and first not in local:
                if first not in self.imported or self._is_others(chain):
                    self.found.add(_told(chain))

    def _read_class_write(self, chain: tuple[str, ...], owner: str) -> None:
        """Writes through an instance count where the class body holds the container."""
        if len(chain) < 2 or owner not in self.classes:
            return
        body = self.classes[owner].body
        held = {name: v for node in body for name, v in tree.assigned(node) if v is not None}
        value = held.get(chain[1])
        is_field = isinstance(value, ast.Call) and _last_name(value.func) == "field"
        through_class = chain[0] != "self"
        set_on_self = any(
            isinstance(node, ast.Attribute) and _stores(node) and _chain(node) == ("self", chain[1])
            for node in ast.walk(self.classes[owner])
        )
        if through_class or (value is not None and not is_field and not set_on_self):
            self.found.add(f"{owner}.{chain[1]}")


def _imported(module: ast.Module) -> tuple[set[str], set[str]]:
    """Imported names, and those of them that are modules for certain (`import torch`)."""
    names, modules = set(), set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = {a.asname or a.name.partition(".")[0] for a in node.names}
            names |= bound
            modules |= bound if isinstance(node, ast.Import) else set()
    return names, modules


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function, without those of functions and classes inside it."""
    pending = list(ast.iter_child_nodes(function))
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, Scope | ast.ClassDef):
            pending += ast.iter_child_nodes(node)


def _stores(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)


def _bound(function: Scope) -> frozenset[str]:
    """Names that are local to a function: parameters, assignments, imports, functions inside it.

    Imported names are not, so that what a function imports and writes to is seen.
    """
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    names = {each.arg for each in (*every, arguments.vararg, arguments.kwarg) if each is not None}
    for node in _own(function):
        if isinstance(node, ast.Name) and _stores(node):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return frozenset(names - {"self", "cls"})


def _declared_global(function: Scope) -> frozenset[str]:
    return frozenset(
        n for node in _own(function) if isinstance(node, ast.Global) for n in node.names
    )


def _chain(node: ast.expr) -> tuple[str, ...]:
    """("a", "b", "c") of `a.b[0].c`; the first is "" where it is no name."""
    parts: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Name):
            parts.append(node.id)
            break
        else:
            parts.append("type(self)" if ast.unparse(node) == "type(self)" else "")
            break
    chain = tuple(reversed(parts))
    return ("self.__class__", *chain[2:]) if chain[:2] == ("self", "__class__") else chain


def _written(function: ast.AST) -> Iterator[tuple[str, ...]]:
    """Chains of names whose last object is written to: `a.b` of `a.b[0] = 1` and `a.b.append(1)`.

    An assigned attribute is part of the chain: `a.b` of `a.b = 1`.
    """
    nodes = [function, *_own(function)] if isinstance(function, ast.stmt) else list(_own(function))
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Subscript) and _stores(node):
            yield _chain(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in MUTATORS:
                yield _chain(node.func.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            if node.func.id in ("setattr", "delattr"):
                yield _chain(node.args[0])


def _last_name(node: ast.expr) -> str:
    return _chain(node)[-1]


def _told(chain: tuple[str, ...]) -> str:
    """`sys.meta_path` of a written chain: its first two names."""
    return ".".join(chain[:2])
