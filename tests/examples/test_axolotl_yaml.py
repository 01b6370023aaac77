"""examples/axolotl_lora.yaml on the small model: the loss of separate conversations."""

import pytest

from tests.examples.axolotl_runs import (
    CPU,
    EXAMPLE,
    FORMS,
    axolotl,
    document_of,
    keys_of,
    tokenize,
    train,
)
from tests.examples.separate import separate_loss

SLOTS = {"packing": 1024, "padding-free": 800, "padding": 6 * 192}
"""Tokens of a step, with those that fill up rows, to multiples of 64."""


@pytest.mark.parametrize("form", FORMS)
def test_the_first_loss_is_that_of_separate_conversations(
    form, small_base, tmp_path, forked_python
):
    rows = tokenize(small_base)
    document = document_of(small_base, tmp_path, rows, **keys_of(form, len(rows)))
    steps, told = train(forked_python, tmp_path, document)
    expected = separate_loss(small_base, rows, [[1] * len(row) for row in rows])
    assert steps[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert steps[0]["tokens/total"] == SLOTS[form] and "graphs: 0" in told


@pytest.mark.parametrize("changed, why, way", [
    pytest.param(
        {"context_parallel_size": 2}, "context_parallel_size: 2 cannot be used with gpt-oss",
        "python 03_finetune.py sequence_parallel_degree=2", id="context parallelism"),
    pytest.param(
        {"adapter": None}, "this plugin keeps the experts in 4 bits, frozen",
        "examples/transformers_trainer.py trains dense or full", id="full"),
    pytest.param(
        {"fsdp_config": {"cpu_ram_efficient_loading": True}},
        "cpu_ram_efficient_loading: true cannot be used with packed experts",
        "remove cpu_ram_efficient_loading", id="loading"),
])  # fmt: skip
def test_what_the_plugin_cannot_give_is_refused(changed, why, way, tmp_path, forked_python):
    (done,) = axolotl(forked_python, tmp_path, EXAMPLE | CPU | changed)
    assert done.returncode != 0
    assert why in done.stderr and way in done.stderr


def test_ligers_kernels_are_refused_by_name(tmp_path, forked_python):
    liger = {"plugins": [*EXAMPLE["plugins"], "axolotl.integrations.liger.LigerPlugin"]}
    (done,) = axolotl(forked_python, tmp_path, EXAMPLE | CPU | liger | {"liger_rms_norm": True})
    assert done.returncode != 0
    assert "liger_rms_norm would not be used" in done.stderr
    assert "remove liger_rms_norm" in done.stderr
