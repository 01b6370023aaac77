"""`launch` finds a compiled kernel again by what Triton compiles for, and by nothing else."""

import pytest
import torch

from sparselong.kernels import launch as launching
from sparselong.kernels.launch import launch


class Kernel:
    """Stands in for a compiled kernel: records calls through Triton's search, and direct ones."""

    arg_names = ("x", "n", "scale", "WIDE", "BLOCK")

    def __init__(self, compiles: bool = True):
        self.compiles, self.searched, self.direct = compiles, [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.searched.append((grid, args, constants))
            return Variant(self) if self.compiles else None

        return run


class Variant:
    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.direct.append((grid, args))


@pytest.fixture(autouse=True)
def _no_variants(monkeypatch):
    monkeypatch.setattr(launching, "_variants", {})


X = torch.zeros(64)


def test_a_known_variant_is_launched_with_its_constants_in_order():
    kernel = Kernel()
    for n in (32, 48):
        launch(kernel, (5, 2), X, n, 0.5, BLOCK=16, WIDE=True, num_warps=4)
    assert len(kernel.searched) == 1
    assert kernel.searched[0][2] == {"BLOCK": 16, "WIDE": True, "num_warps": 4}
    ((grid, args),) = kernel.direct
    assert grid == (5, 2, 1)
    assert args[0] is X
    assert args[1:] == (48, 0.5, True, 16)


@pytest.mark.parametrize(
    "other",
    [
        {"x": X.double()},
        {"x": X[1:]},  # not aligned to 16 bytes
        {"n": 1},
        {"n": 33},
        {"n": 2**33},
        {"n": torch.zeros(1)},
        {"WIDE": False},
        {"BLOCK": 32},
        {"num_warps": 8},
        {"x": torch.zeros(64, device="meta")},
    ],
    ids=str,
)
def test_what_triton_compiles_for_is_another_variant(other):
    kernel = Kernel()
    usual = {"x": X, "n": 32, "scale": 0.5, "WIDE": True, "BLOCK": 16, "num_warps": 4}
    for given in (usual, usual | other):
        x, n, scale, *_ = given.values()
        launch(kernel, (1,), x, n, scale, **dict(list(given.items())[3:]))
    assert len(kernel.searched) == 2
    assert not kernel.direct


def test_kernels_are_told_apart_and_interpreted_ones_run_every_time():
    one, other, interpreted = Kernel(), Kernel(), Kernel(compiles=False)
    for kernel in (one, other, interpreted, interpreted):
        launch(kernel, (1,), X, 32, 0.5, WIDE=True, BLOCK=16)
    assert [len(kernel.searched) for kernel in (one, other, interpreted)] == [1, 1, 2]


def test_an_argument_of_another_kind_is_left_to_triton():
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, (1,), X, "descriptor", 0.5, WIDE=True, BLOCK=16)
    assert len(kernel.searched) == 2
