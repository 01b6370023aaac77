"""Slowed copies of experts: the rate that was asked for, and the same bytes."""

import pytest
import torch

from benchmarks import host_copies
from sparselong.model.host_experts import HostExperts

LAYERS, LAYER_BYTES = 4, 300 << 20
RATE = 5e9


def test_slowed_copies_have_the_rate_and_bring_the_bytes():
    host = HostExperts(LAYERS, {"blocks": (LAYER_BYTES,)}, locked=True)
    device = torch.device("cuda", torch.cuda.current_device())
    host.start(device)
    for layer in host.layers:
        layer.copy_(torch.randint(0, 256, layer.shape, dtype=torch.uint8, device=device))
    cycles = host_copies.find_cycles(host, RATE)
    assert cycles > 0
    with host_copies.slowing(host, cycles):
        with host_copies.recording(host) as copies:
            for number in range(LAYERS):
                (found,) = host.fetch(number, "forward")
                assert torch.equal(found.cpu(), host.layers[number])
        took = host_copies.replay(host, copies)
    assert len(copies) * LAYER_BYTES / took == pytest.approx(RATE, rel=0.1)
