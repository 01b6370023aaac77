"""Scores of experts on a GPU: those of the CPU in fp32, repeatable, in bounded memory."""

import torch
from transformers import GptOssConfig

from sparselong.compress.fewer_experts import Scorer
from sparselong.memory import PUBLISHED, stages
from sparselong.model import PackedExperts

EXPERTS, TOP_K, WIDTH = 32, 4, 2880


def make_experts() -> PackedExperts:
    """Random experts of gpt-oss's widths whose outputs are near 1, on the CPU in bf16."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_local_experts": EXPERTS}
    with torch.device("meta"):
        experts = PackedExperts(GptOssConfig(**sizes))
    draw, state = torch.Generator().manual_seed(1), {}
    for name, tensor in experts.state_dict().items():
        if name.endswith("_bias"):
            state[name] = 0.1 * torch.randn(tensor.shape, generator=draw).bfloat16()
        else:
            low, high = (0, 256) if name.endswith("_blocks") else (117, 121)
            state[name] = torch.randint(low, high, tensor.shape, dtype=torch.uint8, generator=draw)
    experts.load_state_dict(state, assign=True)
    return experts.requires_grad_(False)


def draw_call(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(tokens, EXPERTS, generator=draw) + torch.linspace(0, 2, EXPERTS)
    logits[:, 5] = -1e9  # an expert that no token reaches
    best = logits.topk(TOP_K)
    x = torch.randn(tokens, WIDTH, generator=draw).bfloat16()
    return x, best.indices, best.values.softmax(1).bfloat16()


def score(experts: PackedExperts, call: tuple[torch.Tensor, ...]) -> torch.Tensor:
    scorer = Scorer(experts)
    with torch.no_grad():
        assert not scorer(*call).any()
    return scorer.sums


def test_scores_are_those_of_the_cpu_and_repeat():
    x, indices, weights = draw_call(300)
    wanted = score(make_experts().float(), (x.float(), indices, weights.float()))
    on_gpu = make_experts().cuda()
    call = tuple(tensor.cuda() for tensor in (x, indices, weights))
    found = score(on_gpu, call)
    assert found.device.type == "cpu" and torch.equal(found, score(on_gpu, call))
    assert torch.equal(found[:2], wanted[:2]) and found[0, 5] == 0
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-3, atol=0)


def test_memory_does_not_grow_with_the_number_of_tokens():
    """Within what the planner has for the layer's activations in a batch of 4,096 tokens."""
    on_gpu, peaks = make_experts().cuda(), []
    for tokens in (4096, 32_768):
        call = tuple(tensor.cuda() for tensor in draw_call(tokens))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        score(on_gpu, call)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    shape = PUBLISHED["openai/gpt-oss-20b"]
    assert peaks[1] < 1.1 * peaks[0]
    copies = 4096 * TOP_K
    assert peaks[1] < copies * stages.EXPERT_WIDTHS * shape.intermediate * 2
