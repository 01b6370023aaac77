"""What stages 01 and 02 make of a base folder and a data file, compared with an independent reader.

Everything here runs the stages' own checks in this process; hashes come from folder.py.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparselong.config import Config, load
from sparselong.errors import StageError
from sparselong.health.inputs import probe_inputs
from sparselong.health.sources import Source
from sparselong.tiny import Inputs, check_early, open_inputs
from tests.conftest import ROOT
from tests.inputs.mutations.folder import read_tensors

_DECIDING = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "vocab_size"),
    *("sliding_window", "rms_norm_eps", "head_dim", "layer_types"),
)
"""Keys of config.json that decide a forward pass, beside rope_parameters."""


@dataclass(frozen=True)
class Verdict:
    """What an input was taken for.

    Attributes:
        refusal: the four lines if it was refused.
        tensors: hash of each tensor as stage 02 reads it.
        architecture: the deciding values.
        tokens: hash of all token ids and supervision of the training file.
        ids: the token ids of each conversation.
        spelled: number of control tokens in the training file.
    """

    refusal: str | None = None
    tensors: dict[str, str] | None = None
    architecture: dict[str, Any] | None = None
    tokens: str = ""
    ids: tuple[tuple[int, ...], ...] = ()
    spelled: int = 0


def configure(base: Path, train: Path, validation: Path) -> Config:
    """Return the small config for a base and two data files."""
    named = (f"model.base={base}", f"data.train={train}", f"data.validation={validation}")
    return load(ROOT / "configs/tiny.yaml", [*named, "sequence_len=256", "data.date=2026-01-31"])


def judge(config: Config, run_dir: Path) -> Verdict:
    """Return stage 02's verdict, after asserting that stage 01's is the same."""
    base = Source("base model", config.model.base, "here", "", path=Path(config.model.base))
    files = (config.data.train, str(config.data.validation))
    data = tuple(Source("data", name, "here", "") for name in files)
    findings = probe_inputs(config, run_dir, base, data)
    early = [finding.error for finding in findings if finding.error is not None]
    run_dir.mkdir(exist_ok=True)
    try:
        check_early(config, run_dir)
        inputs = open_inputs(config, run_dir, lambda text: None)
    except StageError as error:
        assert early, f"01 accepts what 02 refuses:\n{error}"
        assert str(error) in map(str, early), f"02 refuses with\n{error}\n01 with\n{early[0]}"
        return Verdict(refusal=str(error))
    assert not early, f"02 accepts what 01 refuses:\n{early[0]}"
    try:
        return _describe(inputs)
    except StageError as error:  # found only when a tensor's values are read
        return Verdict(refusal=str(error))


def _describe(inputs: Inputs) -> Verdict:
    tensors = {name: _hash(t) for name, t in inputs.base.read(inputs.base.tensors).items()}
    architecture = {key: getattr(inputs.architecture, key) for key in _DECIDING}
    architecture["rope_parameters"] = inputs.architecture.rope_parameters
    train = inputs.encoded.train
    rows = [train[row] for row in range(len(train))]
    controls = set(inputs.tokenizer.all_special_ids) | set(inputs.tokenizer.added_tokens_decoder)
    return Verdict(
        None,
        tensors,
        architecture,
        hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        tuple(tuple(ids) for ids, _ in rows),
        sum(token in controls for ids, _ in rows for token in ids),
    )


def _hash(tensor: torch.Tensor) -> str:
    shape = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(shape + data).hexdigest()


def assert_read_as_stored(verdict: Verdict, base: Path) -> None:
    """Assert that an accepted base was read as an independent reader reads it."""
    assert verdict.tensors == read_tensors(base)
    stored = json.loads((base / "config.json").read_text(encoding="utf-8-sig"))
    assert verdict.architecture is not None
    for key in _DECIDING:
        if stored.get(key) is not None:  # else transformers' default
            assert verdict.architecture[key] == stored[key], key
    for key, value in stored["rope_parameters"].items():
        assert verdict.architecture["rope_parameters"][key] == value, key
