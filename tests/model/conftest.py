"""One checkpoint of each kind that is opened as a model."""

from pathlib import Path

import pytest

from tests.conftest import load_script

KINDS = ("upstream", "stage 02", "stage 02, 2:4", "stage 03")


@pytest.fixture(scope="session")
def checkpoints(untrained_base, small_arguments, tmp_path_factory) -> dict[str, Path]:
    """One checkpoint of each kind that is opened."""
    import torch

    from sparselong.adapters import (
        ExtraAdapters,
        Masters,
        add_masked_lora,
        bake_checkpoint,
        tuned_layers,
    )
    from sparselong.model import load_model

    runs = tmp_path_factory.mktemp("runs")
    for name, extra in (("plain", []), ("sparse", ["experts.sparsity=2:4"])):
        arguments = [*small_arguments, *extra, "--run-dir", str(runs / name)]
        assert load_script("02_compress").main(arguments) == 0
    compressed = runs / "plain/02_compress"
    tuned, _ = add_masked_lora(
        load_model(compressed / "model", device=torch.device("cpu")),
        targets=("q_proj",), r=2, alpha=4.0,
        master_of=Masters(compressed / "masters").read, seed=1,
        extra=ExtraAdapters(("down_proj",), 2),
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    bake_checkpoint(compressed / "model", tuned_layers(tuned), runs / "model")
    paths = (untrained_base, compressed / "model", runs / "sparse/02_compress/model")
    return dict(zip(KINDS, (*paths, runs / "model"), strict=True))
