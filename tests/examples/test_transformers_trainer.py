"""examples/transformers_trainer.py on the small model: losses of separate conversations."""

import runpy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparselong.model import PackedExperts
from tests.conftest import ROOT, write_rows
from tests.examples.separate import MESSAGES, separate_loss

EXAMPLE = runpy.run_path(str(ROOT / "examples/transformers_trainer.py"))


@pytest.fixture(scope="module")
def expected(untrained_base) -> float:
    tokenizer = AutoTokenizer.from_pretrained(untrained_base)
    rows = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in MESSAGES]
    return separate_loss(untrained_base, rows, [[1] * len(row) for row in rows])


@pytest.mark.parametrize("trained", ["lora", "dense", "full"])
def test_the_first_loss_is_that_of_separate_conversations(
    untrained_base, tmp_path, expected, trained
):
    data, out = write_rows(tmp_path / "data.jsonl", MESSAGES), tmp_path / "out"
    trainer = EXAMPLE["train"](
        str(untrained_base), data, out, trained, steps=2, batch=len(MESSAGES)
    )
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert len(losses) == 2 and losses[1] < losses[0]
    modules = list(trainer.model.modules())
    assert any(isinstance(module, PackedExperts) for module in modules) is (trained != "full")
    if trained != "lora":
        written = load_file(out / "model.safetensors")
        for name in ("self_attn.sinks", "mlp.router.weight", "mlp.experts.gate_up_proj_bias"):
            assert f"model.layers.0.{name}" in written, name
        opened, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values())
        for name, tensor in opened.state_dict().items():
            assert torch.equal(tensor, written[name]), name
    else:
        written = load_file(out / "adapter_model.safetensors")
        factors = [value for name, value in written.items() if ".lora_B." in name]
        assert len(factors) == 16 and all(torch.any(value != 0) for value in factors)
