"""8-bit optimizers: real steps on a CPU, the state that the planner counts, and refused names."""

import io

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sparselong.config.schema import load
from sparselong.errors import ConfigError
from sparselong.memory.storage import optimizer_bytes
from tests.conftest import ROOT

SIZE = 96  # A of rank 96 on 96 inputs: above the 4,096 values below which states stay in fp32


def start(name: str) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """Return a weight and its optimizer, as transformers makes it by name."""
    arguments = TrainingArguments(output_dir="out", optim=name, learning_rate=1e-2, report_to=[])
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    weight = torch.nn.Parameter(torch.zeros(SIZE, SIZE))
    return weight, kind([weight], **options)


def train(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Return the losses of steps towards a fixed random matrix."""
    wanted = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = (weight - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "lion_8bit"])
def test_an_8_bit_optimizer_trains_resumes_and_takes_the_planned_bytes(name):
    weight, optimizer = start(name)
    losses = train(weight, optimizer, 20)
    assert losses[-1] < 0.8 * losses[0]
    config = load(ROOT / "configs/tiny.yaml", [f"training.optimizer={name}"])
    states = [each for each in optimizer.state[weight].values() if torch.is_tensor(each)]
    sizes = [each.nbytes for each in states if each.shape == weight.shape]
    assert sum(sizes) == optimizer_bytes(config) * weight.numel()

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, other = start(name)
    again.data.copy_(weight.data)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert train(again, other, 5) == train(weight, optimizer, 5)


@pytest.mark.parametrize(
    "name", ["paged_adamw_8bit", "adamw_8bit", "ao_adamw_8bit", "adamw_torch_8bit", "ademamix_8bit"]
)
def test_other_8_bit_optimizers_are_refused_with_those_there_are(name):
    with pytest.raises(ConfigError) as refusal:
        load(ROOT / "configs/tiny.yaml", [f"training.optimizer={name}"])
    assert name in refusal.value.found and "training.optimizer" in refusal.value.what
    assert "'adamw_bnb_8bit' or 'lion_8bit'" in refusal.value.expected
