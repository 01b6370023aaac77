"""`adapter`: the trained LoRA for PEFT and what reads PEFT's files, with its base named and hashed.

Only a run whose dense layers have neither mask nor rounding can give it. Otherwise the trained
layer is round(mask ∘ (M + s·B·A)), which is no low-rank change of any base: the adapter on the base
would be a model that nobody trained or measured. `03_finetune/adapter`, from which this project
continues training, is something else.

On the base, the adapter gives the sum W + s·B·A. The model of stage 03 holds that sum rounded, to
bf16 or, for experts, to MXFP4. The manifest reports the distance between the two for each adapted
weight (`adapters.Rounding.summarize`); for experts it is what stage 03 measured when it rounded.

adapter_config.json gets a key that PEFT does not know, and says so when it opens the adapter:
`sparselong_base`, with the sha256 of the base's files.

vLLM scales every adapter of a file by one alpha / rank, and not by the ranks of `rank_pattern`.
With those of experts or router, of another rank than attention's, it would compute another model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselong.errors import ConfigError, StageError
from sparselong.export.form import Work
from sparselong.export.inputs import (
    FINETUNE,
    base_rows,
    check_outputs,
    find_base,
    model_directory,
    origin_of,
)
from sparselong.files import copy_atomically, is_local, read_json, write_atomically
from sparselong.memory import adapter_bytes, compressed_shape
from sparselong.provenance import find_change
from sparselong.run import Stage

if TYPE_CHECKING:
    from sparselong.adapters import Rounding

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_KEY = "sparselong_base"
_PREFIX = "base_model.model."
_OTHERS = "pass --to mxfp4, gguf or hf-bf16, which hold the trained model itself"


class AdapterFormat:
    """LoRA in PEFT's layout."""

    name = "adapter"
    summary = "LoRA for PEFT, on the base that its config names"

    def check(self, stage: Stage) -> None:
        """Raise unless the trained model is the base plus a low-rank change."""
        dense, experts = stage.config.shared_dense, stage.config.experts
        if origin_of(stage) != FINETUNE:
            raise ConfigError(
                "--to adapter: the compressed model has no adapter",
                "--from finetuned",
                f"--from {stage.options['from']}",
                "leave out --from, or export another form",
            )
        if dense.weight_bits != 16 or dense.sparsity != "none":
            raise ConfigError(
                "--to adapter: this run trained through mask and rounding. Its layers are "
                "round(mask * (M + s*B*A)), which is no low-rank change of any base",
                "shared_dense.weight_bits=16 shared_dense.sparsity=none",
                f"shared_dense.weight_bits={dense.weight_bits} "
                f"shared_dense.sparsity={dense.sparsity}",
                _OTHERS,
            )
        if experts.sparsity != "none" or experts.keep is not None:
            raise ConfigError(
                "--to adapter: this run trained on experts that stage 02 pruned, so that its "
                "adapter does not fit the base",
                "experts.sparsity=none experts.keep=null",
                f"experts.sparsity={experts.sparsity} experts.keep={experts.keep or 'null'}",
                _OTHERS,
            )

    def plan(self, stage: Stage) -> Work:
        """Return the adapter's bytes; it is read, and compared after it was written."""
        size = adapter_bytes(compressed_shape(stage.config), stage.config)
        return Work(size, 2 * size)

    def write(self, stage: Stage) -> None:
        """Write the adapter and its config."""
        folder = _trained(stage)
        find_base(stage)  # raises if the base here is another one
        check_outputs(stage, folder)
        copy_atomically(folder / WEIGHTS, stage.dir / WEIGHTS)
        config = {**read_json(folder / CONFIG, _redo()), **_describe_base(stage)}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomically(stage.dir / CONFIG, text)
        if config.get("rank_pattern"):
            stage.log("open it with PEFT alone: it has adapters of several ranks, which vLLM would "
                      "scale wrongly, without a message")  # fmt: skip
        stage.inputs = [model_directory(stage), folder]

    def verify(self, stage: Stage) -> dict[str, Any]:
        """Open the adapter with PEFT on a model without weights; measure the distance."""
        row = next(
            row
            for row in stage.manifests[FINETUNE]["outputs"]
            if row["path"] == f"{FINETUNE}/adapter/{WEIGHTS}"
        )
        found = find_change(stage.dir / WEIGHTS, {**row, "mtime_ns": None})
        if found:
            raise StageError(
                f"{stage.dir / WEIGHTS} does not read as it was written",
                f"{row['bytes']} bytes with sha256 {row['sha256']}",
                found,
                "check the disk, then run the same command again",
            )
        return {
            "tensors": _open_with_peft(stage),
            "base": _describe_base(stage)[BASE_KEY],
            "distance": _measure(stage),
        }


def _trained(stage: Stage) -> Path:
    return stage.run_dir / FINETUNE / "adapter"


def _redo() -> str:
    return f"redo stage 03: python {FINETUNE}.py --force"


def _describe_base(stage: Stage) -> dict[str, Any]:
    """Return the keys of adapter_config.json that name the base."""
    model = stage.config.model
    if model.base == "tiny":
        name = str((stage.run_dir / "base").absolute())
    else:
        name = str(Path(model.base).absolute()) if is_local(model.base) else model.base
    files = {path: row["sha256"] for path, row in base_rows(stage).items()}
    return {
        "base_model_name_or_path": name,
        "revision": None if is_local(name) else model.revision,
        BASE_KEY: {"name": name, "sha256": files},
    }


def _open_with_peft(stage: Stage) -> int:
    """Return the number of tensors after PEFT has found a place for each, and one for each place.

    Raises:
        StageError: a tensor has no place in the model, or a place has no tensor of its shape.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, GptOssConfig

    from sparselong.checkpoint import read_header

    document = read_json(model_directory(stage) / "config.json", _redo())
    del document["quantization_config"]
    config = {**read_json(stage.dir / CONFIG), "base_model_name_or_path": None}
    del config[BASE_KEY]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GptOssConfig(**document), dtype=torch.bfloat16)
        tuned: Any = get_peft_model(model, LoraConfig(**config))
    # PEFT would look for the named base, and warn that this model without weights is another.
    state = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: one.shape for name, one in read_header(stage.dir / WEIGHTS).items()}
    if wanted != found:
        differing = sorted({name for name, _ in set(wanted.items()) ^ set(found.items())})
        raise StageError(
            f"{stage.dir / WEIGHTS} does not fit the base",
            f"{len(wanted)} tensors where PEFT puts them",
            f"differences in {', '.join(differing[:4])}",
            "install the peft of requirements/requirements.lock",
        )
    return len(found)


def _measure(stage: Stage) -> dict[str, dict[str, float]]:
    """Return the distance of each adapted weight to stage 03's model, by name."""
    from safetensors import safe_open

    from sparselong.checkpoint import Checkpoint

    compressed = Checkpoint(stage.run_dir / "02_compress" / "model")
    baked = Checkpoint(model_directory(stage))
    config = read_json(stage.dir / CONFIG)
    scaling = config["lora_alpha"] / config["r"]
    distances = {}
    with safe_open(stage.dir / WEIGHTS, framework="pt") as file:
        for key in file.keys():
            module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            name = f"{module}.weight"
            if not key.endswith(".lora_A.weight") or name not in baked.tensors:
                continue  # B, or an adapter of experts
            before, after = (one.read([name])[name].float() for one in (compressed, baked))
            a, b = (file.get_tensor(key.replace("lora_A", part)) for part in ("lora_A", "lora_B"))
            rounding = _compare(before, scaling * (b.float() @ a.float()), after)
            distances[name] = rounding.summarize()
    for module, weights in stage.manifests[FINETUNE]["metrics"].get("expert_rounding", {}).items():
        distances |= {f"{module}.{weight}": one for weight, one in weights.items()}
    return distances


def _compare(before: Any, change: Any, after: Any) -> Rounding:
    from sparselong.adapters import Rounding

    rounding = Rounding()
    rounding.add(before, change, after)
    return rounding
