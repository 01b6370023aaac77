"""05_export: the exported models answer hellaswag's items as the model in memory does."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparselong.config import load
from sparselong.evaluate.tasks import Suite, load_suite
from sparselong.model import load_model, load_tokenizer
from tests.measuring import measure_tasks
from tests.stages.test_export import MODELS, export
from tests.stages.trained import CPU, Trained

ITEMS = 40


@pytest.fixture(scope="module")
def exported(trained_run) -> Trained:
    assert export(trained_run, "--to", *MODELS) == 0
    return trained_run


@pytest.fixture(scope="module")
def suite(exported, tmp_path_factory) -> Suite:
    tasks = ["evaluation.tasks=[demo_hellaswag]", f"evaluation.limit={ITEMS}"]
    config = load(exported.arguments[1], [*exported.arguments[2:], *tasks])
    tokenizer = load_tokenizer(exported.run_dir / "03_finetune/model")
    return load_suite(config, tmp_path_factory.mktemp("tasks"), tokenizer, 131_072)


def test_hellaswag_is_answered_alike_item_by_item(exported, suite):
    """Where two endings are equally likely to 1e-5, either may be the answer."""

    def answer(model) -> dict:
        return measure_tasks(model.eval(), suite)["demo_hellaswag"]

    packed = load_model(exported.run_dir / "03_finetune/model", device=CPU)
    wanted = answer(packed)
    assert wanted["items"] == ITEMS and 0 < sum(wanted["right"]) < ITEMS
    before = answer(load_model(exported.run_dir / "02_compress/model", device=CPU))
    assert before["right"] != wanted["right"], "the items do not tell models apart"
    expected = torch.tensor(wanted["log_likelihoods"])
    for name in MODELS:
        folder = exported.run_dir / "05_export" / name
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        found = answer(model.float())
        likelihoods = torch.tensor(found["log_likelihoods"])
        assert (likelihoods - expected).norm() < 1e-5 * expected.norm()
        assert (found["right"], found["right_norm"]) == (wanted["right"], wanted["right_norm"])
