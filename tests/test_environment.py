"""Environment variables after `import sparselong`."""

import json
import os
import subprocess
import sys

import pytest

from sparselong.memory import ALLOCATOR

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SCRIPT = "import json, os, sparselong; print(json.dumps(dict(os.environ)))"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None), (ALLOCATOR, None)),
        (("max_split_size_mb:64", None), ("max_split_size_mb:64", None)),
        ((None, "backend:cudaMallocAsync"), (None, "backend:cudaMallocAsync")),
    ],
)
def test_segments_expand_unless_the_user_configures_the_allocator(given, expected):
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {name: value for name, value in zip(NAMES, given, strict=True) if value}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert tuple(found.get(name) for name in NAMES) == expected
