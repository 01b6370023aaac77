"""Stage 02's stream on a GPU: states copied by batch, and layers as on the CPU."""

import pytest
import torch

from sparselong.checkpoint import Checkpoint, open_upstream
from sparselong.compress.background import Seconds
from sparselong.compress.calibration import HiddenStates
from sparselong.compress.layer import CalibratedLayer
from sparselong.compress.reading import LayerReader
from sparselong.compress.work import Spread
from sparselong.config import CalibrationSection
from sparselong.model import NAME
from sparselong.packing import DenseFormat

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture(scope="module")
def base(untrained_base) -> Checkpoint:
    return Checkpoint(untrained_base)


def open_states(tmp_path, sequences: int = 5, width: int = 128) -> HiddenStates:
    path, size = tmp_path / "states.safetensors", (sequences, 96, width)
    states = HiddenStates(path, size, torch.bfloat16, CUDA, 200, Spread())
    states.states.copy_(torch.randn(size, generator=torch.Generator().manual_seed(0)))
    return states


def open_layer(base: Checkpoint, device: torch.device, index: int = 1) -> CalibratedLayer:
    architecture = open_upstream(base)
    with LayerReader(base, architecture, device) as reader:
        reader.begin(index)
        tensors, _ = reader.take()
        dtype = torch.bfloat16
        return CalibratedLayer(architecture, index, tensors, device, dtype, NAME)


def test_states_pass_through_the_gpu_unchanged(tmp_path):
    states = open_states(tmp_path)
    before, places = states.states.clone(), []
    for place, batch in states.batches():
        assert batch.device == CUDA
        places.append(place)
        states.put(place, batch + 1)
    assert [place.stop - place.start for place in places] == [2, 2, 1]
    states.advance()
    assert torch.equal(states.states, before + 1) and states.layers_done == 1


def test_memory_of_the_batches_does_not_grow_with_passes(tmp_path):
    states = open_states(tmp_path, sequences=64, width=2880)
    reserved = []
    for _ in range(4):
        for place, batch in states.batches():
            states.put(place, batch)
        states.advance()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[-1]


def test_the_norm_gives_what_the_projections_read(base, tmp_path):
    """q's Hessian is that of the norm's outputs; the layer itself is not run for it."""
    layer, states, read = open_layer(base, CUDA), open_states(tmp_path), []
    projection = layer.layer.self_attn.q_proj
    projection.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].clone()))
    with torch.no_grad():
        for _, batch in states.batches():
            normed = layer.layer.input_layernorm(batch)
            layer._forward(batch)
            assert torch.equal(read.pop(), normed)


def test_experts_are_pruned_as_on_a_cpu(base):
    stored = [open_layer(base, device).prune_experts() for device in (CUDA, CPU)]
    assert stored[0].keys() == stored[1].keys() and len(stored[0]) == 4
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_a_layer_read_ahead_does_not_disturb_the_one_on_the_gpu(base):
    architecture = open_upstream(base)
    with LayerReader(base, architecture, CUDA) as reader:
        layers = []
        for index in range(3):
            reader.begin(index)
            tensors, seconds = reader.take()
            assert all(tensor.is_pinned() for tensor in tensors.values()) and seconds > 0
            layers.append(CalibratedLayer(architecture, index, tensors, CUDA, torch.bfloat16, NAME))
            torch.cuda.synchronize()
    for index, layer in enumerate(layers):
        name = f"model.layers.{index}.self_attn.q_proj.weight"
        assert torch.equal(layer.layer.self_attn.q_proj.weight.cpu(), base.read([name])[name])


def compress_with(base: Checkpoint, folder, steps: int):
    layer, states = open_layer(base, CUDA), open_states(folder)
    calibration = CalibrationSection(refinement_steps=steps)
    fmt = DenseFormat(4, "2:4", 64)
    return layer.compress(states, fmt, calibration, Spread(), Seconds(CUDA))


def test_refinement_lowers_the_error_and_repeats_to_the_bit(base, tmp_path):
    """An interrupted layer is made again, and must have the same bytes."""
    solved, one, other = (compress_with(base, tmp_path, steps) for steps in (0, 30, 30))
    error = one.attention_error
    assert error["refined"] < 0.95 * error["solved"] and error == other.attention_error
    for name, tensor in (one.stored | one.masters).items():
        assert torch.equal(tensor, (other.stored | other.masters)[name]), name
    changed = [
        name for name in one.masters if not torch.equal(one.masters[name], solved.masters[name])
    ]
    assert len(changed) == 4
