"""FlashAttention-4 and the choice of it, on a CPU with a stand-in for its package.

tests/gpu runs the package itself.
"""

import dataclasses
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparselong.kernels.attention import choice, flash_attn_4, installed
from sparselong.kernels.attention import flash_attn as flash_attn_2
from sparselong.kernels.attention import op as kernels
from sparselong.kernels.attention.mask import AttentionCall, Mask, find_documents
from tests.distributed import flash_attn_stand_in
from tests.kernels.attention.test_torch_operators import LAYOUTS, compare

ROOT = Path(__file__).parents[3]
Q = torch.zeros(1, 8, 4096, 64, dtype=torch.bfloat16)
PLAIN = AttentionCall(Mask(1, 4096, 4096, 0, None, None), 0.125)


def shaped(*sizes) -> AttentionCall:
    """Return a call with this mask: queries, keys, offset, window, documents."""
    return dataclasses.replace(PLAIN, mask=Mask(1, *sizes))


@pytest.fixture
def hopper(monkeypatch):
    """Make tensors appear to lie on an H100 and flash-attn-4 to be installed."""
    for module in (kernels, flash_attn_4):
        monkeypatch.setattr(module, "architecture_of", lambda _: "sm_90")
    set_version(monkeypatch, installed.FLASH_ATTN_4)


def set_version(monkeypatch, version: str | None) -> None:
    def find(name: str) -> str:
        assert name == "flash-attn-4"
        if version is None:
            raise metadata.PackageNotFoundError
        return version

    stand_in = SimpleNamespace(version=find, PackageNotFoundError=metadata.PackageNotFoundError)
    monkeypatch.setattr(installed, "metadata", stand_in)
    installed.refuse_flash_attn_4.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    """Forget what a test found installed."""
    yield
    installed.refuse_flash_attn_4.cache_clear()


@pytest.mark.parametrize("batch, queries, keys, offset, window, boundaries", LAYOUTS)
def test_output_and_gradients_match_the_reference(batch, queries, keys, offset, window, boundaries):
    functions = (flash_attn_4.attend, flash_attn_4.attend_backward)
    with flash_attn_stand_in.installed():
        compare(functions, batch, queries, keys, offset, window, boundaries)


def test_refusals_say_what_is_allowed(monkeypatch, hopper):
    refuse = flash_attn_4.refuse
    documents = find_documents(torch.tensor([0, 96, 4096]), 1, 4096)
    for call in (PLAIN, shaped(4096, 4096, 0, 128, None), shaped(4096, 4096, 0, None, documents)):
        assert refuse(Q, call) is None
    assert refuse(Q, dataclasses.replace(PLAIN, deterministic=True)) is None
    assert refuse(Q, shaped(64, 4096, 4032, None, None)) is None
    assert "float32" in str(refuse(Q.float(), PLAIN))
    assert "query_offset: 5" in str(refuse(Q, shaped(4096, 4096, 5, None, None)))
    set_version(monkeypatch, None)
    assert "flash-attn-4 is not installed" in str(refuse(Q, PLAIN))
    set_version(monkeypatch, "4.0.0b37")
    assert refuse(Q, PLAIN) == (
        f"backend: flash-attn-4 4.0.0b37 is installed; allowed: {installed.FLASH_ATTN_4}"
    )
    set_version(monkeypatch, installed.FLASH_ATTN_4)
    for architecture in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "cpu"):
        monkeypatch.setattr(flash_attn_4, "architecture_of", lambda _, name=architecture: name)
        assert refuse(Q, PLAIN) == f"device: {architecture}; allowed: sm_90"


def test_it_is_chosen_for_long_full_layers_in_training(monkeypatch, hopper):
    def choose(call: AttentionCall) -> str:
        return kernels.choose_backend(Q[:, :, : call.mask.queries], call)

    documents = find_documents(torch.tensor([0, 96, 4096]), 1, 4096)
    assert choose(PLAIN) == "flash_attn_4"
    assert choose(shaped(1024, 16384, 8192 + 77, None, None)) == "flash_attn_4"  # a shard
    assert choose(shaped(2999, 4999, 2000, None, None)) == "flash_attn_4"  # any length
    assert choose(shaped(4096, 4096, 0, 128, None)) == "triton"
    assert choose(shaped(4096, 4096, 0, None, documents)) == "triton"
    assert choose(shaped(4095, 4095, 0, None, None)) == "triton"
    assert choose(shaped(128, 8192, 8064, None, None)) != "flash_attn_4"
    assert choose(shaped(1, 8192, 8191, None, None)) == "triton"
    assert choose(dataclasses.replace(PLAIN, deterministic=True)) == "triton"
    with torch.no_grad():
        assert choose(PLAIN) == "triton"
    set_version(monkeypatch, None)
    assert choose(PLAIN) == "torch_cudnn"


def test_the_description_names_it_only_where_it_is_installed(monkeypatch, hopper):
    def full(tokens: int = 16384, **options) -> str:
        return choice.describe_choice("sm_90", False, tokens, **options)["full"]

    assert full().startswith("flash_attn_4 (")
    assert full(2048).startswith("torch_cudnn (")
    assert full(deterministic=True).startswith("triton (")
    set_version(monkeypatch, None)
    assert full().startswith("torch_cudnn (") and "flash_attn_4 14.3 ms" in full()


def test_its_folder_is_not_mistaken_for_flash_attn(monkeypatch, tmp_path):
    """Both packages install a folder flash_attn; flash-attn-4's has no __init__.py."""
    assert "flash_attn is not installed" in str(flash_attn_2.refuse(Q, PLAIN))
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert "flash_attn is not installed" in str(flash_attn_2.refuse(Q, PLAIN))
    with flash_attn_stand_in.installed():
        assert flash_attn_2.refuse(Q, PLAIN) is None


def test_the_installer_installs_the_version_that_is_allowed():
    pins = re.findall(r"flash-attn-4==([^ )]+)", (ROOT / "install.sh").read_text())
    assert pins == [installed.FLASH_ATTN_4]
