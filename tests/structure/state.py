"""Process-wide state, found in the syntax tree: what outlives a call and is written to.

`find_state` lists, as `module:name`, what a module changes beyond the objects that its callers pass
in:

- names rebound through `global`;
- module-level objects, classes and imported objects that code inside functions changes: a mutating
  method, an in-place method or function of tensors (`zero_`), a function that changes its first
  argument (`heappush`), an assignment to a subscript or attribute, `setattr`;
- containers in a class body that methods change through `self`, `cls` or the class;
- caches: functions under `functools.cache` or `lru_cache`, whose results outlive the call;
- mutable default arguments;
- module-level values that are state by their kind (ContextVar, thread-local, weak dictionaries,
  counters) or instances of classes whose methods write to `self`;
- changes of other packages' objects when the module is imported, and calls for their effect;
- calls anywhere for an effect on the whole process (EFFECTS), by the called function's full name.

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
CHANGE_ARGUMENT = frozenset(
    "setattr delattr next shuffle copyto heapify heappop heappush heappushpop heapreplace"
    " insort insort_left insort_right".split()
)
"""Functions that change their first argument."""
CONTAINERS = frozenset("bytearray defaultdict deque dict list set Counter OrderedDict".split())
DISPLAYS = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
EFFECTS = frozenset(
    "atexit.register faulthandler.enable gc.disable gc.freeze gc.set_threshold locale.setlocale"
    " logging.basicConfig logging.captureWarnings logging.disable numpy.random.seed numpy.seterr"
    " os.chdir os.nice os.putenv os.setpriority os.umask os.unsetenv random.seed"
    " resource.setrlimit signal.signal socket.setdefaulttimeout sys.setprofile"
    " sys.setrecursionlimit sys.settrace torch.cuda.manual_seed torch.cuda.manual_seed_all"
    " torch.cuda.reset_peak_memory_stats torch.distributed.init_process_group torch.manual_seed"
    " torch.random.manual_seed torch.seed torch.use_deterministic_algorithms"
    " transformers.set_seed warnings.filterwarnings"
    " warnings.resetwarnings warnings.simplefilter".split()
)
"""Calls whose effect is on the whole process; `torch.set_*` and `torch.x.set_*` belong to them."""
METHOD_EFFECTS = frozenset("addFilter addHandler removeHandler setLevel".split())
"""Methods of loggers, which belong to the process."""
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
        f"{module}:{name}": name in reader.effects or name.partition(".")[0] in reader.imported
        for name in sorted(reader.found | reader.effects)
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
        self.effects = set(_effects(module))
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._read_decorators(node)
            if isinstance(node, Scope):
                self._read_defaults(node)
        self._read_functions(module, frozenset(), None)

    def _read_values(self) -> None:
        for name, value in self.values.items():
            kinds = _called(value)
            if (kinds & (STATE_KINDS | CACHES) or self._changing(kinds)) and not kinds & HARMLESS:
                self.found.add(name)
        for owner, node in self.classes.items():
            held = [pair for each in node.body for pair in tree.assigned(each)]
            self.found |= {f"{owner}.{name}" for name, value in held if _called(value) & CACHES}

    def _changing(self, called: set[str]) -> set[str]:
        """Those of the called names that are classes whose methods write to `self`."""
        return {name for name in called if name in self.classes and self._writes_self(name)}

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

    def _read_defaults(self, function: Scope) -> None:
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        defaults = [
            *zip(reversed(positional), reversed(arguments.defaults), strict=False),
            *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
        ]
        name = getattr(function, "name", "lambda")
        for argument, value in defaults:
            kinds = _called(value)
            if isinstance(value, DISPLAYS) or kinds & CONTAINERS or self._changing(kinds):
                self.found.add(f"{name}.{argument.arg}")

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
        for chain in (*_written(function), *_in_place(function, self.imported)):
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
        elif isinstance(node, ast.Call):
            name = _last_name(node.func)
            if isinstance(node.func, ast.Attribute) and name in MUTATORS:
                yield _chain(node.func.value)
            if node.args and name in CHANGE_ARGUMENT:
                yield _chain(node.args[0])


def _in_place(function: ast.AST, imported: set[str]) -> Iterator[tuple[str, ...]]:
    """Chains of `x` in `x.zero_()`, in `zeros_(x)` and, of an imported module, `init.zeros_(x)`."""
    for node in _own(function):
        if not isinstance(node, ast.Call):
            continue
        name, is_method = _last_name(node.func), isinstance(node.func, ast.Attribute)
        if name.endswith("_") and not name.endswith("__"):
            if is_method and _chain(node.func)[0] not in imported:
                yield _chain(node.func.value)
            elif node.args:
                yield _chain(node.args[0])


def _called(value: ast.expr | None) -> set[str]:
    """Last names of everything that an expression calls."""
    calls = [node for node in ast.walk(value) if isinstance(node, ast.Call)] if value else []
    return {_last_name(call.func) for call in calls}


def _effects(module: ast.Module) -> Iterator[str]:
    """Full names of the functions that are called for an effect on the process."""
    origins: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            origins |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            origins |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        first, *rest = _chain(node.func)
        name = ".".join([origins.get(first, first), *rest])
        is_torch_setting = name.startswith("torch.") and name.split(".")[-1].startswith("set_")
        if name in EFFECTS or is_torch_setting:
            yield name
        elif rest and rest[-1] in METHOD_EFFECTS:
            yield rest[-1]


def _last_name(node: ast.expr) -> str:
    return _chain(node)[-1]


def _told(chain: tuple[str, ...]) -> str:
    """`sys.meta_path` of a written chain: its first two names."""
    return ".".join(chain[:2])
