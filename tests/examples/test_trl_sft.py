"""examples/trl_sft.py on the small model: losses of separate conversations, assistant's tokens."""

import runpy
import shutil

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import gptoss_chat_template, gptoss_training_chat_template

from sparselong.model import PackedExperts
from tests.conftest import ROOT, write_rows
from tests.examples.separate import MESSAGES, separate_loss

EXAMPLE = runpy.run_path(str(ROOT / "examples/trl_sft.py"))


@pytest.fixture(scope="module")
def base(untrained_base, tmp_path_factory):
    """The small model with the published chat template, which TRL recognizes."""
    folder = tmp_path_factory.mktemp("trl") / "base"
    shutil.copytree(untrained_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = gptoss_chat_template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(base) -> float:
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = [
        tokenizer.apply_chat_template(
            row["messages"],
            chat_template=gptoss_training_chat_template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        for row in MESSAGES
    ]
    learned = [each["assistant_masks"] for each in encoded]
    assert all(0 < sum(each) < len(each) / 2 or len(each) > 200 for each in learned)
    return separate_loss(base, [each["input_ids"] for each in encoded], learned)


@pytest.mark.parametrize("padding_free", [False, True], ids=["packing", "padding-free"])
def test_the_first_loss_is_that_of_separate_conversations(base, tmp_path, expected, padding_free):
    data = write_rows(tmp_path / "data.jsonl", MESSAGES)
    length, batch = 400, len(MESSAGES)  # packed: all rows in one batch, some of several documents
    trainer = EXAMPLE["train"](
        str(base), data, tmp_path / "out", padding_free, steps=2, batch=batch, length=length
    )
    if not padding_free:
        assert 1 < len(trainer.train_dataset) < len(MESSAGES)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert len(losses) == 2 and losses[1] < losses[0]
    assert any(isinstance(module, PackedExperts) for module in trainer.model.modules())
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
