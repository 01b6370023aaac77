"""Packed conversations must not attend to each other, with the CPU's eager attention."""

import pytest
import torch

LENGTHS = (150, 7, 40)  # longer than the sliding window, tiny, ordinary


@pytest.fixture(scope="module")
def model(untrained_base):
    from sparselong.model.loading import load_model

    return load_model(untrained_base, device=torch.device("cpu"))


@torch.no_grad()
def difference(model, masks) -> float:
    """Relative difference between logits of packed documents and of each document alone."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 1000, (1, n), generator=generator) for n in LENGTHS]
    alone = torch.cat([model(input_ids=d, use_cache=False).logits for d in documents], dim=1)
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    packed = model(
        input_ids=torch.cat(documents, dim=1),
        position_ids=places,
        attention_mask=masks(model.config, places, torch.float32),
        use_cache=False,
    ).logits
    return float((alone - packed).norm() / alone.norm())


def test_packed_conversations_score_as_if_alone(model):
    from sparselong.model.documents import document_masks

    assert difference(model, document_masks) < 1e-5


def test_position_ids_alone_do_not_keep_them_apart(model):
    """If this fails, transformers supports it and model/documents.py can be removed."""
    assert difference(model, lambda *_: None) > 1e-3
