"""Each trainer on each form of batches: the first loss is that of separate conversations.

Compiled, all losses are those of the trainer without torch.compile, and nothing breaks the graph.
All that is trained under `full` is then bf16: transformers does not compile experts in fp32, and
TRL its own chunked loss (docs/upstream.md).
"""

import pytest
import torch
from torch._dynamo.utils import counters

from sparselong.tiny.build import TinySpec, build_tiny
from tests.conftest import write_rows
from tests.examples.forms import FORMS, ROWS, losses_of, tokenize, train
from tests.examples.separate import MESSAGES, separate_loss

KINDS = [
    *(("transformers", trained) for trained in ("lora", "dense", "full")),
    *(("TRL", trained) for trained in ("lora", "full")),
]
CASES = [(front, trained, form) for front, trained in KINDS for form in FORMS]
ELSEWHERE = [  # the examples' own tests
    *(("transformers", trained, "padding-free") for trained in ("lora", "dense", "full")),
    *(("TRL", "lora", form) for form in ("packing", "padding-free")),
]
NEW_LENGTHS = [("transformers", "lora", "padding-free"), ("TRL", "lora", "packing")]
"""Three steps of three lengths."""


@pytest.fixture(scope="module")
def expected(small_base) -> float:
    rows = tokenize(small_base)
    return separate_loss(small_base, rows, [[1] * len(row) for row in rows])


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A base whose one layer attends in a window, to trace less than half as long."""
    spec = TinySpec(steps=0, layers=1, hidden=64, intermediate=64, experts=4)
    return build_tiny(tmp_path_factory.mktemp("one") / "base", spec, seed=1)


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("front, trained, form", [case for case in CASES if case not in ELSEWHERE])
def test_the_first_loss(front, trained, form, small_base, tmp_path, expected):
    data = write_rows(tmp_path / "data.jsonl", MESSAGES)
    trainer = train(front, trained, form, small_base, data, tmp_path / "out", 1, len(MESSAGES))
    assert len(trainer.train_dataset) == (ROWS if form == "packing" else len(MESSAGES))
    assert losses_of(trainer) == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("front, trained, form", CASES)
def test_compiled(front, trained, form, one_layer, tmp_path):
    """One graph, and one more once there is a new length.

    The backward pass is the same in all forms, so it is traced with one of them only.
    """
    data = write_rows(tmp_path / "data.jsonl", MESSAGES)
    given = (front, trained, form, one_layer, data, tmp_path / "out")
    is_new = (front, trained, form) in NEW_LENGTHS
    given = (*given, *((3, 1) if is_new else (2, len(MESSAGES))))
    options = {"dtype": torch.bfloat16 if trained == "full" else torch.float32, "seed": 1}
    options |= {"loss_type": "nll"} if front == "TRL" else {}
    eager = train(*given, **options)
    assert not counters["stats"]
    backend = "aot_eager" if form == "padding-free" else "eager"
    compiled = train(*given, **options, torch_compile=True, torch_compile_backend=backend)
    for key in ("loss", "grad_norm"):
        found, wanted = (
            [row[key] for row in trainer.state.log_history if "loss" in row]
            for trainer in (compiled, eager)
        )
        assert found == pytest.approx(wanted, rel=1e-6) and len(found) == given[-2]
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == (2 if is_new else 1)
