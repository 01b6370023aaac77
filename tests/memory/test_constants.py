"""Constants of the planner against the code they describe, which it may not import."""

import inspect

import torch

from sparselong.checkpoint import derivation
from sparselong.data import EFFORTS, demo
from sparselong.evaluate import perplexity
from sparselong.kernels.experts import choice, held, triton_launch
from sparselong.kernels.experts import op as experts
from sparselong.kernels.layer import cross_entropy
from sparselong.memory import evaluated, exchange, stages, storage, timing, training
from sparselong.parallel.experts import pipeline
from sparselong.tiny.build import TinySpec


def test_batches_and_chunks_match_the_stages():
    assert stages.EVALUATE_BATCH_TOKENS == perplexity._BATCH_TOKENS
    assert evaluated.EFFORTS == len(EFFORTS)
    assert training.LOSS_CHUNK_ROWS == cross_entropy.CHUNK_ROWS
    assert training.SLICE_TOKENS == experts.SLICE_TOKENS
    assert training.BUFFER_BYTES == triton_launch.BUFFER_BYTES


def test_what_is_exchanged_at_once_matches_the_exchange():
    assert exchange.INFERENCE_ROWS == pipeline.INFERENCE_ROWS
    assert exchange.TRAINED_ROWS == max(pipeline.FAR_ROWS + pipeline.NEAR_ROWS)
    assert pipeline.share_dtype(torch.bfloat16, "inference").itemsize == exchange.EXACT_BYTES
    assert pipeline.share_dtype(torch.bfloat16, "forward").itemsize == storage.BF16_BYTES
    assert exchange.WINDOW_ROWS == held.WINDOW_ROWS
    assert exchange.LOSS_ROWS == cross_entropy.CHUNK_ROWS


def test_decoding_threshold_matches_the_table():
    """The backend decodes above that many rows per expert, but not at it."""
    rows = training.DECODED_FROM_ROWS
    for architecture in ("sm_86", *choice.MEASURED):
        below, above = (
            choice.choose_backend(architecture, rows * 32 + more, 32).backend for more in (0, 1)
        )
        assert below != "decode" and above == "decode", architecture


def test_stale_share_for_links_matches_the_checkpoint():
    assert storage.LINKED_STALE_SHARE == derivation._LINKED_STALE_SHARE


def test_work_of_the_tiny_model_matches_its_spec():
    spec = TinySpec()
    assert timing.TINY_STEP_TOKENS == spec.batch_sequences * spec.sequence_len
    items = inspect.signature(demo.write_hellaswag).parameters["items"].default
    assert timing.DEMO_ITEMS == items


def test_optimizer_state_sizes_match_the_optimizers():
    """Two fp32 moments per parameter, or two bytes with 8-bit states."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(64))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(64)
    optimizer.step()
    state = [v for v in optimizer.state[parameter].values() if v.numel() == 64]
    assert sum(v.nbytes for v in state) == 64 * storage._ADAM_BYTES
