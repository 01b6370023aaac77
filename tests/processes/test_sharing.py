"""All ranks decide alike whether to share experts: by the least memory, within one machine."""

import pytest

from sparselong.config.schema import load
from sparselong.errors import StageError
from sparselong.memory import CONTEXT_BYTES, Held, find_shape, finetune_memory
from sparselong.processes import sharing
from tests.conftest import ROOT

GIB = 2**30
BIG = "configs/gpt-oss-120b-4x3090.yaml"


@pytest.fixture
def ranks(monkeypatch):
    """Return a function that sets the ranks' places, available GiB (None: no GPU), and host GiB."""

    def be(places: list[tuple[int, int]], gib: list[float | None], host: float = 16) -> None:
        on_gpu = gib[0] is not None
        monkeypatch.setattr(sharing.torch.cuda, "is_available", lambda: on_gpu)
        monkeypatch.setattr(sharing.torch.cuda, "mem_get_info", lambda: (5 * GIB, 24 * GIB))
        monkeypatch.setattr(sharing.torch.cuda, "memory_reserved", lambda: 0)
        monkeypatch.setattr(sharing, "_decided", None)
        free = [None if one is None else int(one * GIB) for one in gib]
        found = [(*p, one, int(host * GIB)) for p, one in zip(places, free, strict=True)]
        monkeypatch.setattr(sharing.ranks, "collect", lambda own: found)

    return be


def test_on_a_cpu_auto_shares_nothing_and_a_number_is_followed(ranks):
    ranks([(0, 2)] * 2, [None] * 2)
    made = sharing.decide_sharing(load(ROOT / "configs/tiny.yaml"))
    assert (made.asked, made.chosen, made.available_bytes) == ("auto", 1, None)
    assert sharing.decided_sharing() is made
    asked = load(
        ROOT / "configs/tiny.yaml", ["sequence_parallel_degree=2", "expert_parallel_degree=2"]
    )
    made = sharing.decide_sharing(asked)
    assert made.chosen == 2 and "shared by 2" in str(made)


@pytest.mark.parametrize(("gib", "chosen"), [([80] * 4, 1), ([80, 80, 23.6, 80], 4)])
def test_the_rank_with_the_least_memory_decides(ranks, gib, chosen):
    ranks([(0, 4)] * 4, gib)
    config = load(ROOT / BIG)
    made = sharing.decide_sharing(config)
    assert made.chosen == chosen and made.available_bytes == int(min(gib) * GIB)
    whole, shared = (
        finetune_memory(find_shape(config.model), config, held=Held(n)).peak_bytes for n in (1, 4)
    )
    # Layers would have to compute in another way, with less memory, if each held all experts.
    assert whole > 60 * GIB and (chosen == 1) == (made.replicated_peak_bytes >= whole)
    assert made.replicated_peak_bytes > 60 * GIB
    assert made.predicted_peak_bytes >= (shared if chosen == 4 else whole)


def test_what_cannot_fit_is_refused_before_anything_is_loaded(ranks):
    ranks([(0, 4)] * 4, [12.0] * 4)
    with pytest.raises(StageError, match="does not fit in memory") as caught:
        sharing.decide_sharing(load(ROOT / BIG))
    assert "short" in caught.value.found and "shared by 4" in caught.value.found


@pytest.mark.parametrize("processes", [1, 4])
def test_an_evaluation_that_cannot_fit_is_refused_too(ranks, processes):
    ranks([(0, processes)] * processes, [12.0] * processes)
    with pytest.raises(StageError, match=r"evaluating .* does not fit in memory") as caught:
        sharing.decide_evaluation_sharing(load(ROOT / BIG))
    how = "whole on each GPU" if processes == 1 else "shared by 4 processes"
    assert how in caught.value.found and "short" in caught.value.found
    ranks([(0, processes)] * processes, [80.0] * processes)
    assert sharing.decide_evaluation_sharing(load(ROOT / BIG)) == (1, "gpu")
    made = sharing.decided_sharing()  # what an out-of-memory message compares with
    assert made is not None and made.available_bytes == 80 * GIB
    assert made.predicted_peak_bytes == made.replicated_peak_bytes > 60 * GIB


@pytest.mark.parametrize(
    "places",
    [
        [(0, 2), (0, 2), (2, 2), (2, 2)],  # two machines of two
        [(0, 2), (1, 2), (-1, 2), (0, 2)],  # ranks dealt out to two machines in turn
    ],
)
def test_experts_are_shared_within_one_machine_only(ranks, places):
    ranks(places, [None] * 4)
    config = load(
        ROOT / "configs/tiny.yaml", ["sequence_parallel_degree=4", "expert_parallel_degree=4"]
    )
    with pytest.raises(StageError, match="ranks 0 to 3 cannot share experts"):
        sharing.decide_sharing(config)


def test_available_memory_includes_this_processs_own(monkeypatch):
    monkeypatch.setattr(sharing.torch.cuda, "mem_get_info", lambda: (5 * GIB, 24 * GIB))
    monkeypatch.setattr(sharing.torch.cuda, "memory_reserved", lambda: 2 * GIB)
    assert sharing.available_bytes() == 7 * GIB + CONTEXT_BYTES


def test_one_small_gpu_takes_experts_in_host_memory(ranks):
    ranks([(0, 1)], [23.6], host=100)
    config = load(ROOT / BIG, ["sequence_parallel_degree=1"])
    made = sharing.decide_sharing(config)
    assert made.held == (1, "host") and (made.asked_placement, made.placement) == ("auto", "host")
    assert made.predicted_peak_bytes < 23.6 * GIB < 60 * GIB < made.replicated_peak_bytes
    assert made.available_host_bytes == 100 * GIB
    assert str(made).endswith("auto: in host memory, 59.81 GiB of 100.00 GiB available")
    assert sharing.decide_evaluation_sharing(config) == (1, "host")
    asked = load(ROOT / BIG, ["sequence_parallel_degree=1", "experts.placement=gpu"])
    with pytest.raises(StageError, match="does not fit in memory"):
        sharing.decide_sharing(asked)


@pytest.mark.parametrize("decide", ["decide_sharing", "decide_evaluation_sharing"])
@pytest.mark.parametrize("gib", [80.0, None])
def test_host_memory_that_does_not_suffice_is_refused_before_loading(ranks, decide, gib):
    """Also on a CPU, where the memory is the same."""
    ranks([(0, 4)] * 4, [gib] * 4, host=40)
    keys = ["experts.placement=host", "expert_parallel_degree=2", "flash_attention=true"]
    with pytest.raises(StageError, match="host memory does not hold the experts") as caught:
        getattr(sharing, decide)(load(ROOT / BIG, keys))
    assert "121.46 GiB available" in caught.value.expected and "2 copies" in caught.value.expected
    assert caught.value.found == "40.00 GiB: 81.46 GiB short"


def test_on_a_cpu_host_memory_is_taken_only_if_asked_for(ranks):
    ranks([(0, 1)], [None])
    assert sharing.decide_sharing(load(ROOT / "configs/tiny.yaml")).held == (1, "gpu")
    asked = load(ROOT / "configs/tiny.yaml", ["experts.placement=host"])
    made = sharing.decide_sharing(asked)
    assert made.held == (1, "host") and 0 < made.predicted_host_bytes < 3 * GIB
    assert sharing.decide_evaluation_sharing(asked) == (1, "host")


def test_layers_compute_in_slices_where_the_smallest_gpu_needs_it(ranks):
    asked = ["sequence_len=131072", "expert_parallel_degree=1"]
    config = load(ROOT / "configs/gpt-oss-20b-1x3090.yaml", asked)
    ranks([(0, 2)] * 2, [80.0, 23.6], host=200)
    made = sharing.decide_sharing(config)
    assert made.layers is not None and set(made.layers.asked.values()) == {"auto"}
    assert made.layers.chosen == {
        "training.slice_rows": 8192,
        "training.offload_checkpoints": True,
        "attention_backend": "triton",
    }
    assert made.predicted_peak_bytes < 23.6 * GIB
    assert made.predicted_host_bytes > 2 * 24 * 131072 * 2880 * 2  # both ranks' inputs
    settled = made.layers.settle(config)
    assert settled.training.slice_rows == 8192 and settled.attention_backend == "triton"
    assert settled.training.offload_checkpoints is True
    assert (
        settled.model_copy(update={"training": config.training, "attention_backend": "auto"})
        == config
    )
    ranks([(0, 2)] * 2, [80.0, 80.0])
    roomy = sharing.decide_sharing(config).layers
    assert roomy is not None and roomy.settle(config).training.slice_rows == "never"


def test_without_a_gpu_layers_compute_as_asked(ranks):
    ranks([(0, 1)], [None])
    for text, value in (("auto", "never"), ("64", 64)):
        keys = [f"training.slice_rows={text}", "training.gradient_checkpointing=true"]
        layers = sharing.decide_sharing(load(ROOT / "configs/tiny.yaml", keys)).layers
        assert layers is not None and layers.chosen["training.slice_rows"] == value
        assert layers.chosen["training.offload_checkpoints"] is False


def test_host_memory_for_inputs_of_layers_is_checked_before_loading(ranks):
    ranks([(0, 1)], [None], host=1)
    keys = ["training.offload_checkpoints=true", "training.gradient_checkpointing=true"]
    with pytest.raises(StageError, match="does not hold the inputs of checkpointed layers"):
        sharing.decide_sharing(load(ROOT / "configs/tiny.yaml", keys))
