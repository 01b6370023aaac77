"""Stage 05 decodes experts on the GPU to the bytes that the CPU gives."""

import torch

from sparselong.export.source import decode_exactly


def test_experts_are_decoded_to_the_same_bytes_on_the_gpu():
    scales = torch.arange(253, dtype=torch.uint8)[:, None].repeat(1, 16)
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(253, 1, 1)
    here, there = decode_exactly(blocks, scales), decode_exactly(blocks.cuda(), scales.cuda())
    assert torch.equal(here.view(torch.int16), there.cpu().view(torch.int16))
    limits = torch.aminmax(there)  # as stage 05 looks for values beyond bf16
    assert (limits.min.cpu(), limits.max.cpu()) == torch.aminmax(here)
    too_large = decode_exactly(blocks.cuda(), torch.full_like(scales, 254).cuda())
    assert torch.isinf(torch.aminmax(too_large).max)
