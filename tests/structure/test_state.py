"""Process-wide state stands in `runtime/` and `processes/`, or in the list here with its reason."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.structure import tree
from tests.structure.state import find_state
from tests.structure.tree import ROOT

ROOMS = ("sparselong.runtime.", "sparselong.processes.")
"""Folders that may hold state of their own."""
OUTWARD = ("sparselong.registration",)
"""Modules that may write to the environment and to registries of other packages, beside scripts."""
DEVICE = "a property of a device, which never changes"
RESTORED = "set back at the end of the block"
ONCE = "a module that is imported on the first call"

ALLOWED = {
    "sparselong:register_when_needed": "what `import sparselong` is for; see registration.py",
    "sparselong.adapters.attach:transformers.set_seed": "PEFT draws A from the global generators",
    "sparselong.chat.server.listen:signal.signal": RESTORED,
    "sparselong.chat.terminal:signal.signal": RESTORED,
    "sparselong.data.corpus:documents": "the standard library's text, which never changes",
    "sparselong.data.ruler.words:load_words": "the words of a package, which never change",
    "sparselong.evaluate.tasks.suite:setLevel": "lm-eval's warnings would hide the stage's lines",
    "sparselong.finetune.watching.functions:sys.modules": "the user's file, as if it were imported",
    "sparselong.generation.graph:_make_stream": "one CUDA stream a device, as long as it lives",
    "sparselong.generation.shared:torch.cuda.set_device": "each process has a GPU of its own",
    "sparselong.kernels.attention.installed:refuse_flash_attn_4": "reading metadata costs 1 ms",
    "sparselong.kernels.attention.mask:_known": "documents by boundary tensor, as long as it lives",
    "sparselong.kernels.attention.op:load_backend": ONCE,
    "sparselong.kernels.attention.torch_operators:torch.use_deterministic_algorithms": RESTORED,
    "sparselong.kernels.dense.factor_gradients:_counters": "every launch leaves them at zero",
    "sparselong.kernels.gpu:architecture_of": DEVICE,
    "sparselong.kernels.gpu:multiprocessors_of": DEVICE,
    "sparselong.kernels.gpu:tiles_of": DEVICE,
    "sparselong.kernels.launch:_variants": "compiled kernels, which never change",
    "sparselong.kernels.layer.cross_entropy:_kernels": ONCE,
    "sparselong.kernels.layer.cross_entropy_shard:_kernels": ONCE,
    "sparselong.kernels.layer.norm:_kernels": ONCE,
    "sparselong.kernels.layer.rotary:_kernels": ONCE,
    "sparselong.kernels.layer.router:_kernels": ONCE,
    "sparselong.lazy:sys.modules": "a public name, once it has been imported",
    "sparselong.model.attention:modeling_gpt_oss.eager_attention_forward": "patch_attention's task",
    "sparselong.parallel.collectives:_Progress.begun": "a counter that the ranks' watch reads",
    "sparselong.parallel.collectives:_Progress.tag": "a counter that the ranks' watch reads",
    "sparselong.parallel.collectives:_counters": "counters of bytes, inside `count_bytes` only",
    "sparselong.parallel.sequence.exchange:plan_exchange": "16 plans: all layers share a step's",
    "sparselong.processes.beside:os.environ": RESTORED,
    "sparselong.processes.beside:torch.set_num_threads": RESTORED,
    "sparselong.processes.failure:sys.excepthook": "a failed rank leaves its explanation in a file",
    "sparselong.processes.launch:os.environ": "a rank hides the others from Axolotl and accelerate",
    "sparselong.processes.world:torch.distributed.init_process_group": "a rank joins the others",
    "sparselong.provenance:torch.cuda.reset_peak_memory_stats": "a stage measures its own peak",
    "sparselong.run.interruption:signal.signal": RESTORED,
    "sparselong.tiny.build:torch.manual_seed": "in a fork of the generators' state",
    "sparselong.tiny.build:torch.use_deterministic_algorithms": RESTORED,
    "sparselong.tiny.build:torch.utils": RESTORED,
}
"""State elsewhere, as module:name, and why it may be there."""


def stray_state(root: Path) -> set[str]:
    """State outside its rooms: a package's own in ROOMS, other packages' in OUTWARD."""
    return {
        name
        for path in tree.sources(root, inits=True)
        for name, is_others in find_state(path, root).items()
        if not (name.startswith(OUTWARD) if is_others else name.startswith(ROOMS))
    }


def test_state_is_in_its_rooms_or_has_a_reason_and_the_list_names_nothing_that_is_gone():
    found = stray_state(ROOT)
    assert sorted(found - ALLOWED.keys()) == []
    assert sorted(ALLOWED.keys() - found) == []


def test_scripts_hold_no_state_of_their_own():
    for path in tree.scripts(ROOT):
        assert all(find_state(path, ROOT).values()), path


WRITES = {
    "global": ("x = 0\ndef f():\n    global x\n    x = 1\n", "x"),
    "global of several, added to": ("x = y = 0\ndef f():\n    global x, y\n    y += 1\n", "y"),
    "append": ("x = []\ndef f(v):\n    x.append(v)\n", "x"),
    "subscript": ("x = {}\ndef f(v):\n    x[v] = 1\n", "x"),
    "deletion": ("x = {}\ndef f(v):\n    del x[v]\n", "x"),
    "nested subscript": ("x = {}\ndef f(v):\n    x['a']['b'] += v\n", "x"),
    "attribute": ("class C: pass\nx = C()\ndef f(v):\n    x.y = v\n", "x.y"),
    "setattr": ("class C: pass\nx = C()\ndef f(v):\n    setattr(x, 'y', v)\n", "x"),
    "function attribute": ("def g(): pass\ndef f(v):\n    g.calls = v\n", "g.calls"),
    "lambda": ("x = []\nf = lambda v: x.append(v)\n", "x"),
    "inner function": ("x = []\ndef f():\n    def g():\n        x.clear()\n    return g\n", "x"),
    "class attribute": ("class C:\n    n = 0\ndef f():\n    C.n += 1\n", "C.n"),
    "cls": ("class C:\n    n = 0\n    @classmethod\n    def f(cls):\n        cls.n = 1\n", "C.n"),
    "type(self)": ("class C:\n    n = 0\n    def f(self):\n        type(self).n = 1\n", "C.n"),
    "a class's list": ("class C:\n    x = []\n    def f(self):\n        self.x.append(1)\n", "C.x"),
    "cache": ("import functools\n@functools.cache\ndef f(t):\n    return t\n", "f"),
    "lru_cache": ("from functools import lru_cache\n@lru_cache(maxsize=1)\ndef f(t): ...\n", "f"),
    "a method's": ("import functools\nclass C:\n    @functools.cache\n    def f(self): ...\n", "f"),
    "ContextVar": ("from contextvars import ContextVar\nx: ContextVar = ContextVar('x')\n", "x"),
    "thread-local": ("import threading\nx = threading.local()\n", "x"),
    "weak keys": ("import weakref\nx = weakref.WeakKeyDictionary()\n", "x"),
    "counter": ("import itertools\nx = itertools.count()\n", "x"),
    "instance": ("class C:\n    def f(self):\n        self.n = 1\nx = C().f\n", "x"),
    "cache as a call": ("from functools import lru_cache\nf = lru_cache(len)\n", "f"),
    "cache of a size": ("import functools\nf = functools.lru_cache(maxsize=2)(len)\n", "f"),
    "cache in a class": ("import functools\nclass C:\n    f = functools.cache(len)\n", "C.f"),
    "default list": ("def f(v, x=[]): ...\n", "f.x"),
    "default dict by keyword": ("def f(v=1, *, x=dict()): ...\n", "f.x"),
    "a lambda's default": ("f = lambda v, x={}: x\n", "lambda.x"),
    "default object": ("class C:\n    def g(self):\n        self.n = 1\ndef f(x=C()): 1\n", "f.x"),
    "in place": ("import torch\nx = torch.zeros(1)\ndef f(v):\n    x.copy_(v)\n", "x"),
    "in place, a part": ("x = {}\ndef f():\n    x['a'].zero_()\n", "x"),
    "function": ("from torch.nn import init\nx = g()\ndef f():\n    init.zeros_(x)\n", "x"),
    "heap": ("import heapq\nx = []\ndef f(v):\n    heapq.heappush(x, v)\n", "x"),
    "next": ("x = (n for n in 'ab')\ndef f():\n    return next(x)\n", "x"),
    "in a block": ("if True:\n    x = []\ndef f():\n    x.append(1)\n", "x"),
}  # fmt: skip
OUTWARD_WRITES = {
    "meta path": ("import sys\ndef f(x):\n    sys.meta_path.insert(0, x)\n", "sys.meta_path"),
    "environment": ("import os\nos.environ['A'] = '1'\n", "os.environ"),
    "a default": ("import os\ndef f():\n    os.environ.setdefault('A', '')\n", "os.environ"),
    "a loop at import": ("import os\nfor n in 'ab':\n    os.environ.pop(n)\n", "os.environ"),
    "registry": ("from transformers.x import ALL\nALL.register('a', 1)\n", "ALL"),
    "imported inside": ("def f():\n    from transformers import ALL\n    ALL.register(1)\n", "ALL"),
    "registering call": ("from transformers import register\nregister('a')\n", "register"),
    "patch": ("from transformers import gpt\ndef f(x):\n    gpt.attention = x\n", "gpt.attention"),
    "putenv": ("import os\ndef f():\n    os.putenv('A', '1')\n", "os.putenv"),
    "hook": ("import sys\ndef f(x):\n    sys.excepthook = x\n", "sys.excepthook"),
    "signal": ("import signal\ndef f(x):\n    return signal.signal(2, x)\n", "signal.signal"),
    "seed": ("import torch\ndef f():\n    torch.manual_seed(1)\n", "torch.manual_seed"),
    "alias": ("import numpy as np\ndef f():\n    np.random.seed(1)\n", "numpy.random.seed"),
    "setting": ("import torch\ndef f():\n    torch.set_num_threads(1)\n", "torch.set_num_threads"),
    "deeper": ("import torch\ndef f():\n    torch.cuda.set_device(1)\n", "torch.cuda.set_device"),
    "from": ("def f():\n    from torch import set_flag as s\n    s(1)\n", "torch.set_flag"),
    "determinism": ("import torch\ndef f():\n    torch.use_deterministic_algorithms(True)\n",
                    "torch.use_deterministic_algorithms"),
    "log level": ("import logging\ndef f():\n    logging.getLogger('a').setLevel(1)\n", "setLevel"),
}  # fmt: skip
HARMLESS = {
    "parameter": "x = []\ndef f(x):\n    x.append(1)\n",
    "local": "x = []\ndef f():\n    x = []\n    x.append(1)\n",
    "instance's own": "class C:\n    def __init__(self):\n        self.x = []\n    def f(self):\n"
    "        self.x.append(1)\n",
    "a field": "class C:\n    x: list = field(default_factory=list)\n    def f(self):\n"
    "        self.x.append(1)\n",
    "set on the instance": "class C:\n    x = 0\n    def f(self):\n        self.x = 1\n",
    "built at import": "x = []\nfor n in range(3):\n    x.append(n)\n",
    "read": "import os\nx = {}\ndef f():\n    return x.get(1), os.environ.get('A')\n",
    "in place, a parameter": "def f(x):\n    x.zero_()\n    x.grad.copy_(x)\n",
    "in place, with a constant": "N = -100\ndef f(x):\n    x.fill_(N)\n",
    "in place, a local": "import torch\ndef f():\n    x = torch.empty(1)\n"
    "    torch.nn.init.zeros_(x)\n",
    "a generator's seed": "import torch\ndef f(n):\n    torch.Generator().manual_seed(n)\n",
    "defaults": "class C: ...\ndef f(x=(), *, v=None, c=C()): ...\n",
    "a local cache": "import functools\ndef f(g):\n    return functools.cache(g)\n",
    "a module's function": "import torch\ndef f(t):\n    return torch.sort(t)\n",
    "a script's main": "def main(): ...\nif __name__ == '__main__':\n    main()\n",
    "outer function's": "def f():\n    x = []\n    def g():\n        x.append(1)\n    return g\n",
}


@pytest.mark.parametrize(("text", "name"), WRITES.values(), ids=WRITES)
def test_state_is_noticed(tmp_path, text, name):
    ast.parse(text)
    root = tree.write_tree(tmp_path, {"model/a.py": text, "runtime/b.py": text})
    assert f"sparselong.model.a:{name}" in stray_state(root)
    assert not any(found.startswith("sparselong.runtime.") for found in stray_state(root))


@pytest.mark.parametrize(("text", "name"), OUTWARD_WRITES.values(), ids=OUTWARD_WRITES)
def test_a_write_to_others_is_noticed_in_the_rooms_too(tmp_path, text, name):
    files = {"model/a.py": text, "runtime/b.py": text, "registration.py": text}
    expected = {f"sparselong.model.a:{name}", f"sparselong.runtime.b:{name}"}
    assert stray_state(tree.write_tree(tmp_path, files)) == expected


@pytest.mark.parametrize("text", HARMLESS.values(), ids=HARMLESS)
def test_what_a_call_owns_is_no_state(tmp_path, text):
    assert stray_state(tree.write_tree(tmp_path, {"model/a.py": text})) == set()
