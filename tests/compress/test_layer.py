"""o_proj is fitted to make up for what compressed q, k and v changed in its inputs."""

from unittest import mock

import pytest
import torch
from transformers import GptOssConfig

from sparselong.checkpoint import Checkpoint, layer_tensors
from sparselong.compress import layer as layer_module
from sparselong.compress.background import Seconds
from sparselong.compress.calibration import HiddenStates
from sparselong.compress.layer import CalibratedLayer
from sparselong.compress.weights.factor import make_up
from sparselong.compress.weights.hessian import Drift, Hessian
from sparselong.compress.work import Spread
from sparselong.config import CalibrationSection
from sparselong.errors import StageError
from sparselong.packing import DenseFormat
from tests.compress.conftest import DAMPENING, IN, OUT, draw

FORMAT = DenseFormat(4, "2:4", 64)
SEQUENCES, LENGTH = 8, 64


@pytest.fixture(scope="module")
def changed(inputs) -> torch.Tensor:
    """The inputs after a change that is partly a linear function of them, and partly noise."""
    mixed = 0.05 * draw(IN, IN, seed=5)
    return inputs + inputs @ mixed / IN**0.5 + 0.02 * draw(*inputs.shape, seed=6)


@pytest.fixture(scope="module")
def moments(inputs, changed) -> tuple[torch.Tensor, torch.Tensor]:
    hessian, drift = Hessian(IN, "layer"), Drift(IN, "layer")
    for before, after in zip(inputs.split(400), changed.split(400), strict=True):
        hessian.add(after)
        drift.add(before, after)
    return hessian.matrix, drift.matrix


def test_the_drift_is_that_of_its_definition(inputs, changed, moments):
    x, y = inputs.double(), changed.double()
    expected = 2 / len(x) * (x - y).T @ y
    torch.testing.assert_close(moments[1].double(), expected, rtol=1e-4, atol=1e-6)


def test_the_weight_is_the_dampened_least_squares_solution(weight, inputs, changed, moments):
    made = make_up(weight, *moments, DAMPENING, "layer").double()
    original, x, y = weight.double(), inputs.double(), changed.double()
    damp = DAMPENING * moments[0].double().diagonal().mean() * len(x) / 2
    # As rows of a plain least-squares problem: the change of the weight is drawn towards zero.
    rows = torch.cat([y, damp.sqrt() * torch.eye(IN, dtype=torch.float64)])
    wanted = torch.cat([(x - y) @ original.T, torch.zeros(IN, OUT, dtype=torch.float64)])
    solved = original + torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(made, solved, rtol=1e-3, atol=1e-5)
    errors = [float((x @ original.T - y @ each.T).norm()) for each in (original, made)]
    assert errors[1] < 0.5 * errors[0]


def test_inputs_that_did_not_change_leave_the_weight_as_it_is(weight, inputs):
    hessian, drift = Hessian(IN, "layer"), Drift(IN, "layer")
    hessian.add(inputs)
    drift.add(inputs, inputs)
    made = make_up(weight, hessian.matrix, drift.matrix, DAMPENING, "layer")
    assert torch.equal(made, weight.float())


def test_an_input_that_is_always_zero_changes_nothing(weight, inputs, changed):
    dead = changed.clone()
    dead[:, 3] = 0.0
    hessian, drift = Hessian(IN, "layer"), Drift(IN, "layer")
    hessian.add(dead)
    drift.add(inputs, dead)
    made = make_up(weight, hessian.matrix, drift.matrix, DAMPENING, "layer")
    assert bool(torch.isfinite(made).all())
    assert torch.equal(made[:, 3], weight[:, 3].float())


def test_inputs_before_compression_that_are_not_finite_are_refused(inputs):
    broken = inputs.clone()
    broken[5, 2] = torch.nan
    with pytest.raises(StageError, match="calibration inputs of o are not finite") as failure:
        Drift(IN, "o").add(broken, inputs)
    assert failure.value.found == f"NaN or infinity in 1 of {len(inputs)} tokens"


@pytest.fixture(scope="module")
def opened(untrained_base) -> tuple[Checkpoint, GptOssConfig, torch.Tensor]:
    base = Checkpoint(untrained_base)
    tokens = torch.randint(0, 2000, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    return base, GptOssConfig.from_pretrained(untrained_base), tokens


def compress_first_layer(opened, folder, solver: str = "sweep"):
    """Return the compressed layer, its result, and its attention's output before and after."""
    base, architecture, tokens = opened
    device, shape = torch.device("cpu"), (SEQUENCES, LENGTH, architecture.hidden_size)
    states = HiddenStates(folder / "states", shape, torch.float32, device, 256, Spread())
    states.start(base, tokens)
    tensors = base.read(layer_tensors(architecture, 0))
    layer = CalibratedLayer(architecture, 0, tensors, device, torch.float32, "eager")
    attended = []
    layer.layer.self_attn.register_forward_hook(lambda _m, _i, out: attended.append(out[0]))
    with torch.no_grad():
        layer._forward(states.states)
        expected = attended.pop()
        calibration = CalibrationSection(dampening=DAMPENING, solver=solver, refinement_steps=0)
        made = layer.compress(states, FORMAT, calibration, Spread(), Seconds())
        attended.clear()
        layer._forward(states.states)
    error = float((attended.pop() - expected).norm() / expected.norm())
    return layer, made, error


def test_attentions_output_is_closer_to_the_bases(opened, tmp_path):
    layer, made, error = compress_first_layer(opened, tmp_path)
    with mock.patch.object(layer_module, "make_up", lambda weight, *_: weight):
        _, plain, plain_error = compress_first_layer(opened, tmp_path)
    assert error < 0.9 * plain_error
    stem = "model.layers.0.self_attn"
    for name in ("q_proj", "k_proj", "v_proj"):  # their inputs did not change
        assert torch.equal(
            made.masters[f"{stem}.{name}.weight"], plain.masters[f"{stem}.{name}.weight"]
        )
    assert not torch.equal(
        made.masters[f"{stem}.o_proj.weight"], plain.masters[f"{stem}.o_proj.weight"]
    )
    packed = made.stored[f"{stem}.q_proj.weight_packed"]
    assert torch.equal(layer.layer.self_attn.q_proj.weight_packed, packed)  # put back after use


def test_the_reference_solver_makes_up_for_nothing(opened, tmp_path):
    with mock.patch.object(layer_module, "make_up", side_effect=AssertionError):
        compress_first_layer(opened, tmp_path, "llmcompressor")
