"""Open upstream's checkpoints and ours, always with packed experts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, GptOssForCausalLM

from sparselong.checkpoint import METHOD, take_inventory
from sparselong.errors import StageError
from sparselong.files import is_local, why_unusable
from sparselong.model.quantizer import SparseLongConfig
from sparselong.runtime import compute_dtype, default_device


def packed_config(name: Path | str) -> Any:
    """Return a checkpoint's configuration that makes `from_pretrained` keep its experts packed.

    transformers opens an upstream MXFP4 checkpoint with its own quantizer, which on most machines
    expands it to bf16, and accepts no other quantizer than the one named in config.json:

        AutoModelForCausalLM.from_pretrained(name, config=packed_config(name))

    Args:
        name: a directory, or a hub name such as openai/gpt-oss-20b.

    Raises:
        StageError: There is no such directory, the model is not a supported gpt-oss, its files are
            damaged or ambiguous, or tokens use more experts than it has.
    """
    _check_files(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise StageError(
            f"config.json of {name} cannot be used",
            "the config.json of a gpt-oss checkpoint",
            " ".join(str(error).split()),
            "restore config.json from the published checkpoint, or redo the stage that wrote it",
        ) from error
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if config.model_type != "gpt_oss" or method not in ("mxfp4", METHOD):
        raise StageError(
            f"{name} cannot be opened",
            "a gpt-oss checkpoint with mxfp4 or sparselong weights",
            f"model_type {config.model_type}, quantization {method}",
            "check model.base, or redo the stage that wrote it",
        )
    top_k, experts = config.num_experts_per_tok, config.num_local_experts
    if not 1 <= top_k <= experts:
        raise StageError(
            f"{name}: config.json requests more experts than the model has",
            f"num_experts_per_tok from 1 to num_local_experts, {experts}",
            f"num_experts_per_tok {top_k}",
            "restore config.json from the published checkpoint",
        )
    if method == "mxfp4":
        config.quantization_config = SparseLongConfig(16, "none").to_dict()
    return config


def _check_files(name: Path | str) -> None:
    """Raise if a directory is not there, or its files are damaged or ambiguous."""
    if os.path.isdir(name):
        take_inventory(Path(name))
    elif isinstance(name, Path) or is_local(name):
        raise StageError(
            f"{name} cannot be opened as a model",
            "a directory with a checkpoint",
            why_unusable(name, "directory"),
            "correct the path, or run the stage that makes it",
        )


def load_model(
    directory: Path,
    *,
    device: torch.device | None = None,
    attn_implementation: str = "eager",
) -> GptOssForCausalLM:
    """Open a gpt-oss checkpoint, upstream's (MXFP4) or one of stage 02 or 03, frozen.

    Experts stay in four bits in either case. Inside `using(experts=..., vocabulary=...)` the model
    has, and reads, only this process's experts and rows of embedding and lm_head; its passes run
    inside the same setting.

    Returns:
        The model in eval mode on `device`, in `compute_dtype(device)`.

    Raises:
        StageError: See `packed_config`; or tensors are missing, unexpected, truncated or of the
            wrong shape, in whatever part of the checkpoint; or the experts cannot be split evenly.
    """
    device = device or default_device()
    config = packed_config(directory)
    try:
        opened: Any = GptOssForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=compute_dtype(device),
            device_map={"": device},
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, ValueError) as error:  # ValueError: the quantizer's
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise StageError(
            f"{directory} cannot be opened as a model",
            "complete safetensors files whose tensors match config.json",
            " ".join(str(error).split()),
            "download the checkpoint again, or redo the stage that wrote it",
        ) from error
    model, info = opened
    wrong = {key: sorted(info[key]) for key in info if info[key]}
    if wrong:
        raise StageError(
            f"{directory} does not match the model's tensors",
            "every tensor of the model, and no others",
            "; ".join(f"{key}: {', '.join(map(str, names[:4]))}" for key, names in wrong.items()),
            "download the checkpoint again, or redo the stage that wrote it",
        )
    return model.requires_grad_(False).eval()
