"""Components are looked up by key; labels are only displayed."""

import pytest

from sparselong import memory
from sparselong.config import schema
from sparselong.memory import labels, stages
from tests.conftest import ROOT


def load(name: str, *overrides: str):
    return schema.load(ROOT / f"configs/{name}.yaml", overrides)


CONFIGS = {
    "tiny": load("tiny"),
    "20b": load("gpt-oss-20b-1x3090"),
    "120b": load("gpt-oss-120b-4x3090"),
    "whole activations": load("gpt-oss-20b-1x3090", "training.gradient_checkpointing=false"),
}


def parts_of(plan: memory.Plan) -> list[dict[str, int]]:
    sharded = [plan.sharded.components] if plan.sharded else []
    groups = [plan.disk, plan.linkable, plan.compressed, plan.compress_host, plan.memory.components]
    return [*groups, *plan.stages.values(), *sharded]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_component_has_a_distinct_label(config, device):
    for parts in parts_of(memory.make_plan(config, device)):
        assert len(labels.label(parts)) == len(parts)


def test_every_label_is_used_in_a_plan():
    plans = [memory.make_plan(c, d) for c in CONFIGS.values() for d in ("cpu", "cuda")]
    used = {key for plan in plans for parts in parts_of(plan) for key in parts}
    assert used == labels.LABELS.keys()


def test_changing_labels_changes_no_figure(monkeypatch, tmp_path):
    def figures() -> list:
        plan = memory.make_plan(CONFIGS["20b"])
        document = memory.plan_stage(CONFIGS["20b"], tmp_path, "03_finetune")
        sizes = [row["bytes"] for row in document["writes"]]
        return [plan.memory.peak_bytes, plan.host_bytes, plan.seconds, sizes, document["notes"]]

    before = figures()
    for key in labels.LABELS:
        monkeypatch.setitem(labels.LABELS, key, f"renamed {key}")
    assert figures() == before
    shown = stages.evaluation_memory(memory.PUBLISHED["openai/gpt-oss-20b"], CONFIGS["20b"], "cuda")
    assert all(name.startswith("renamed ") for name in labels.label(shown))
