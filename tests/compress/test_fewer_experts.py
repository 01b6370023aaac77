"""Which experts are kept: scores against their definition in fp64, ranks, chunks, bad sums."""

from pathlib import Path

import pytest
import torch

from sparselong.checkpoint import Checkpoint, layer_tensors, open_upstream, show_ranges
from sparselong.checkpoint.kept_experts import read_ranges
from sparselong.compress import fewer_experts
from sparselong.compress.calibration import HiddenStates
from sparselong.compress.fewer_experts import choose
from sparselong.compress.layer import CalibratedLayer
from sparselong.compress.work import Spread
from sparselong.errors import StageError
from sparselong.kernels.experts import ALPHA, LIMIT, op
from sparselong.packing import mxfp4
from tests.compress.conftest import draw

CPU = torch.device("cpu")
TOP_K = 4


def open_layer(base) -> tuple[CalibratedLayer, dict[str, torch.Tensor]]:
    """Layer 1 of a base, and its tensors by their names in the layer."""
    checkpoint = Checkpoint(base)
    architecture = open_upstream(checkpoint)
    tensors = checkpoint.read(layer_tensors(architecture, 1))
    layer = CalibratedLayer(architecture, 1, tensors, CPU, torch.float32, "eager")
    return layer, {name.removeprefix("model.layers.1."): one for name, one in tensors.items()}


def hold(states: torch.Tensor) -> HiddenStates:
    """States before a layer, in batches of two sequences."""
    shape = (len(states), states.shape[1], states.shape[2])
    held = HiddenStates(Path("unused"), shape, torch.float32, CPU, 2 * shape[1], Spread())
    held.states.copy_(states)
    return held


def run_layer(layer: CalibratedLayer, states: torch.Tensor) -> torch.Tensor:
    held = hold(states)
    layer.run(held)
    return held.states


def define_sums(
    x: torch.Tensor, router: tuple[torch.Tensor, torch.Tensor], experts: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Routed tokens, weights, and weights times norms by expert, token by token in fp64.

    Args:
        x: rows after the layer's second norm, [tokens, hidden].
        router: weight and bias.
        experts: the layer's expert tensors by their last name.
    """
    values = {
        name: mxfp4.decode(experts[f"{name}_blocks"], experts[f"{name}_scales"], torch.float64)
        for name in ("gate_up_proj", "down_proj")
    }
    weight, bias = (tensor.double() for tensor in router)
    sums = torch.zeros(3, len(bias), dtype=torch.float64)
    for row in x.double():
        logits = weight @ row + bias
        best = logits.topk(TOP_K)
        for share, expert in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
            both = values["gate_up_proj"][expert] @ row + experts["gate_up_proj_bias"][expert]
            gate, up = both[0::2].clamp(max=LIMIT), both[1::2].clamp(-LIMIT, LIMIT)
            inner = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
            out = values["down_proj"][expert] @ inner + experts["down_proj_bias"][expert]
            sums[:, expert] += torch.stack((torch.ones(()), share, share * out.norm())).double()
    return sums


@pytest.mark.parametrize("at_once", [7, 4096])
def test_sums_are_those_of_the_definition(untrained_base, monkeypatch, at_once):
    """In chunks of uneven length and in one, on the rows that the layer's experts get."""
    monkeypatch.setattr(fewer_experts, "_TOKENS_AT_ONCE", at_once)
    given: list[int] = []

    def expert_mlp(x, *rest, **more):
        given.append(len(x))
        return op.expert_mlp(x, *rest, **more)

    monkeypatch.setattr(fewer_experts, "expert_mlp", expert_mlp)
    layer, tensors = open_layer(untrained_base)
    states, rows = 0.5 * draw(3, 40, 128, seed=11), []
    experts = layer.layer.mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    out = run_layer(layer, states)
    handle.remove()
    sums = layer.score_experts(hold(states), Spread())
    assert layer.layer.mlp.experts is experts and torch.equal(run_layer(layer, states), out)
    stem = "mlp.experts."
    wanted = define_sums(
        torch.cat(rows),
        (tensors["mlp.router.weight"], tensors["mlp.router.bias"]),
        {name.removeprefix(stem): t for name, t in tensors.items() if name.startswith(stem)},
    )
    assert max(given) <= at_once * TOP_K and sum(given) == 120 * TOP_K
    assert sums.dtype == torch.float64 and torch.equal(sums[0], wanted[0])
    assert sums[0].sum() == 120 * TOP_K and len(set(wanted[0].tolist())) > 3
    torch.testing.assert_close(sums[1:], wanted[1:], rtol=1e-5, atol=0)


def test_the_layer_without_experts_routes_to_those_that_are_left(untrained_base):
    """As if the router could not choose the others; bytes of the kept ones are the same."""
    layer, tensors = open_layer(untrained_base)
    states, kept = 0.5 * draw(2, 40, 128, seed=12), [0, 2, 3, 5, 7]
    with torch.no_grad():
        layer.layer.mlp.router.bias[[1, 4, 6]] = -1e30
    wanted = run_layer(layer, states)
    fewer, _ = open_layer(untrained_base)
    left = fewer.keep_experts(kept)
    torch.testing.assert_close(run_layer(fewer, states), wanted, rtol=1e-5, atol=1e-6)
    assert left.keys() == {f"model.layers.1.{n}" for n in tensors if n.startswith("mlp.")}
    for name, tensor in left.items():
        of_all = tensors[name.removeprefix("model.layers.1.")]
        assert tensor.dtype == of_all.dtype and torch.equal(tensor, of_all[kept]), name
    assert fewer.layer.mlp.router.num_experts == fewer.layer.mlp.experts.num_experts == 5


def make_sums(tokens: list[int], means: list[float]) -> torch.Tensor:
    counts = torch.tensor(tokens, dtype=torch.float64)
    return torch.stack((counts, counts / 4, counts * torch.tensor(means, dtype=torch.float64)))


def test_the_mean_decides_and_not_the_number_of_tokens():
    found = choose(make_sums([100, 1, 50, 50], [0.1, 9.0, 2.0, 1.0]), 2, 0)
    assert found.kept == [1, 2] and found.unreached == 0
    assert found.lost_weight == pytest.approx(150 / 201)
    assert found.scores == pytest.approx([0.1, 9.0, 2.0, 1.0])


def test_equal_scores_keep_the_first():
    assert choose(make_sums([3] * 6, [1.0] * 6), 4, 0).kept == [0, 1, 2, 3]


def test_experts_that_no_token_reached_rank_last_and_are_told():
    """A score of zero is a score: an expert whose outputs are all zero ranks before them."""
    sums, lines = make_sums([0, 5, 0, 5, 5, 0], [0.0, 2.0, 0.0, 1.0, 0.0, 0.0]), []
    found = choose(sums, 3, 7)
    assert found.kept == [1, 3, 4] and found.lost_weight == 0.0
    assert found.describe()["scores"] == "- 2 - 1 0 -" and found.describe()["unreached"] == 3
    fewer_experts.tell(found, 7, lines.append)
    assert len(lines) == 1 and "3 were reached by no calibration token" in lines[0]
    found = choose(sums, 5, 7)
    assert found.kept == [0, 1, 2, 3, 4]
    fewer_experts.tell(found, 7, lines.append)
    assert lines[2].startswith("warning: layer 7: calibration reached only 3 experts, so 2 were")


@pytest.mark.parametrize("row", [1, 2])
def test_sums_that_are_not_finite_are_refused(row):
    sums = make_sums([5, 5], [1.0, 1.0])
    sums[row, 1] = torch.nan
    with pytest.raises(StageError, match="scoring the experts of layer 3 failed"):
        choose(sums, 1, 3)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0], "0"), ([0, 1], "0-1"), ([0, 1, 2, 5, 8, 9], "0-2 5 8-9"), ([3, 5, 7], "3 5 7")],
)
def test_ranges_are_read_as_they_were_shown(numbers, text):
    assert show_ranges(numbers) == text and read_ranges(text) == numbers
