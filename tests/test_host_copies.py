"""How benchmarks measure copies of experts from host memory, on a CPU's plain memory."""

import pytest
import torch

from benchmarks import fit_120b_plan, host_copies
from sparselong.model.host_experts import HostExperts

LAYERS = 5


@pytest.fixture
def host():
    experts = HostExperts(LAYERS, {"blocks": (3, 4), "scales": (3,)}, locked=False)
    for number, layer in enumerate(experts.layers):
        layer.fill_(number)
    experts.start(torch.device("cpu"))
    return experts


def step(host) -> list[int]:
    """Return the layers' bytes as a step sees them, forward and backward."""
    order = [(layer, "forward") for layer in range(LAYERS)]
    order += [(layer, "backward") for layer in reversed(range(LAYERS))]
    return [int(host.fetch(layer, passing)[0].unique().item()) for layer, passing in order]


RIGHT = [*range(LAYERS), *reversed(range(LAYERS))]


def test_recorded_copies_are_those_of_a_step(host):
    step(host)
    with host_copies.recording(host) as copies:
        assert step(host) == RIGHT
    assert len(copies) == 2 * LAYERS - 4
    before = host.copied_bytes
    assert host_copies.replay(host, copies) > 0
    assert host.copied_bytes - before == len(copies) * host.layer_bytes
    assert step(host) == RIGHT


def test_a_step_without_copies_sees_what_is_there_and_the_next_one_copies_again(host):
    assert step(host) == RIGHT
    before = host.copied_bytes
    with host_copies.leaving_out(host):
        assert set(step(host)) <= {0, 1} and host.copied_bytes == before
    assert step(host) == RIGHT


def test_parts_of_a_step_are_counted_and_in_turn(host):
    made = []

    def run() -> None:
        made.append(step(host))

    waits: list[None] = []
    found = host_copies.measure_parts(host, run, lambda: waits.append(None), 2)
    assert len(made) == 6 and len(waits) == 8
    assert made[:3] == [RIGHT] * 3 and all(set(each) <= {0, 1, 2} for each in made[3:])
    assert found["copied_bytes"] == (2 * LAYERS - 4) * host.layer_bytes
    longest = max(found["compute_alone_seconds"], found["copies_alone_seconds"])
    assert found["over_longest"] == pytest.approx(found["streamed_step_seconds"] / longest)


def test_resident_memory_includes_the_experts(host):
    found = host_copies.host_memory(host)
    assert found["host_expert_bytes"] == LAYERS * host.layer_bytes
    assert found["host_peak_bytes"] == found["host_expert_bytes"] + found["host_rest_bytes"]
    assert host_copies.host_memory(None)["host_expert_bytes"] == 0


def test_120b_on_one_card_is_planned_with_its_experts_on_the_host():
    case = {"shape": "whole", "arm": "masked", "tokens": 512, "layers": 36, "gpus": 1, "degree": 1}
    planned = fit_120b_plan.plan(case | {"placement": "host", "keep_attention": "always"})
    assert planned["planned_bytes"] < 9.8e9
    on_gpu = fit_120b_plan.plan(case | {"keep_attention": "always"})  # as in the first results
    experts, embedding = 60_914_073_600, 201_088 * 2880 * 2
    saved = experts - 2 * experts // 36 + embedding - (experts + embedding) * 8 // 4096
    assert on_gpu["planned_bytes"] - planned["planned_bytes"] == saved


def test_the_stand_in_for_131072_tokens_offloads_what_the_planner_says():
    case = {"shape": "half", "arm": "masked", "tokens": 65_536, "layers": 36, "gpus": 2}
    case |= {"degree": 2, "placement": "gpu"}
    settled = fit_120b_plan.settle_layers(case)
    assert settled["training.offload_checkpoints"] is True
    case |= settled
    assert fit_120b_plan.rows_of(case) == 32_768
    peak = fit_120b_plan.plan(case | {"keep_attention": "never"})["planned_bytes"]
    assert peak * 1.05 <= fit_120b_plan.CAP_BYTES
