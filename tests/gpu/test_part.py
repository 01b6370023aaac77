"""A part of experts and vocabulary on a GPU: tensors, device memory while loading, passes."""

import pytest
import torch

from sparselong.model import chunk_loss, load_model
from sparselong.model.part import Part
from sparselong.runtime import using
from tests.model.exchanges import exchanges

IDS = torch.randint(9, 2000, (2, 60), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("rank", range(4))
def test_a_part_is_loaded_to_the_gpu_and_nothing_more(untrained_base, rank):
    whole = load_model(untrained_base)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with using(**exchanges(rank, 4, whole)):
        part = load_model(untrained_base)
    peak = torch.cuda.max_memory_allocated() - before
    wanted, held = whole.state_dict(), 0
    for name, tensor in part.state_dict().items():
        module = part.get_submodule(name.rpartition(".")[0])
        rows = module.held if isinstance(module, Part) else range(len(wanted[name]))
        assert tensor.is_cuda and tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name][rows.start : rows.stop]), name
        held += tensor.nbytes
    largest = wanted["lm_head.weight"].nbytes
    assert peak < held + largest // 2


def test_a_part_gives_the_loss_of_the_whole_model(untrained_base):
    whole = load_model(untrained_base)
    ids, losses = IDS.cuda(), []
    for rank in (None, 0, 1):
        with using(**(exchanges(rank, 2, whole) if rank is not None else {})), torch.no_grad():
            model = load_model(untrained_base)
            chunk_loss(model)
            losses.append(model(ids, labels=ids, use_cache=False).loss)
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
