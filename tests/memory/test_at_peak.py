"""The components of a stage's peak add up to it, and leave out what is not in memory then."""

import pytest

from sparselong.config import Config
from sparselong.memory import find_shape, finetune_memory, make_plan

SHAPES = [(256, 1), (4096, 1), (16384, 4), (131072, 8)]


@pytest.mark.parametrize(("tokens", "degree"), SHAPES)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_components_at_the_peak_of_training(tokens, degree, device):
    config = Config(sequence_len=tokens, sequence_parallel_degree=degree)
    memory = finetune_memory(find_shape(config.model), config, device)
    parts = dict(memory.components)
    working = {n: parts.pop(n) for n in ("loss", "layer", "experts_work", "attention_work")}
    layer = working["layer"] + max(working["experts_work"], working["attention_work"])
    assert memory.peak_bytes == sum(parts.values()) + max(working["loss"], layer)
    assert memory.at_peak.items() >= parts.items()
    shown = memory.at_peak.keys() & working.keys()
    assert shown == {"loss"} if working["loss"] > layer else shown > {"layer"} and len(shown) == 2


def test_plans_say_the_components_of_each_stage():
    document = make_plan(Config()).to_dict()
    found = {name: sum(parts.values()) for name, parts in document["components_at_peak"].items()}
    trained = {"03_finetune": document["peak_bytes_per_gpu"]}
    assert found == document["stage_bytes"] | trained
