"""Constants of the planner against the code that they describe, which it may not import."""

import inspect

from sparselong import registration
from sparselong.checkpoint import checkpoint
from sparselong.compress import layer
from sparselong.data import demo
from sparselong.evaluate import perplexity
from sparselong.kernels.experts import choice, triton_launch
from sparselong.kernels.experts import op as experts
from sparselong.kernels.layer import cross_entropy
from sparselong.memory import stages, storage, timing, training
from sparselong.tiny.build import TinySpec


def test_batches_and_chunks_are_those_of_the_stages():
    assert stages.COMPRESS_BATCH_TOKENS == layer._TOKENS_PER_FORWARD
    assert stages.EVALUATE_BATCH_TOKENS == perplexity._BATCH_TOKENS
    assert training.LOSS_CHUNK_ROWS == cross_entropy.CHUNK_ROWS
    assert training.SLICE_TOKENS == experts.SLICE_TOKENS
    assert training.BUFFER_BYTES == triton_launch.BUFFER_BYTES


def test_weights_are_decoded_where_the_table_says_so():
    """At that many rows an expert the backend is another than just above it, which decodes."""
    rows = training.DECODED_FROM_ROWS
    for architecture in ("sm_86", *choice.MEASURED):
        below, above = (
            choice.choose_backend(architecture, rows * 32 + more, 32).backend for more in (0, 1)
        )
        assert below != "decode" and above == "decode", architecture


def test_shards_are_linked_up_to_the_same_share():
    assert storage.LINKED_STALE_SHARE == checkpoint._LINKED_STALE_SHARE


def test_the_small_models_work_is_what_it_does():
    spec = TinySpec()
    assert timing.TINY_STEP_TOKENS == spec.batch_sequences * spec.sequence_len
    items = inspect.signature(demo.write_hellaswag).parameters["items"].default
    assert timing.DEMO_ITEMS == items


def test_the_allocator_is_the_one_that_importing_sets(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    registration.set_environment()
    assert registration.os.environ["PYTORCH_ALLOC_CONF"] == training.ALLOCATOR
    assert registration._ENVIRONMENT.items() <= registration.os.environ.items()


def test_optimizers_states_are_those_of_their_tensors():
    """Two fp32 moments a parameter; in 8 bits two bytes."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(64))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(64)
    optimizer.step()
    state = [v for v in optimizer.state[parameter].values() if v.numel() == 64]
    assert sum(v.nbytes for v in state) == 64 * storage._ADAM_BYTES
