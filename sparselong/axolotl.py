"""An Axolotl plugin for anybody's YAML: 4-bit experts, this project's attention, layers and loss.

    plugins:
      - sparselong.axolotl.LibraryPlugin

Nothing else in the YAML changes, and the pipeline is not involved: Axolotl reads the data, attaches
LoRA, trains and saves the adapter. The keys of other ways to open the model are set aside. Axolotl
only logs that a plugin cannot be imported, and then trains without it: look for the line that
begins with `sparselong:`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin

import sparselong
from sparselong.errors import ConfigError
from sparselong.model import NAME, FusedDecoderLayer, PackedExperts

_CONFIG = "sparselong-config"
_SET_ASIDE = {
    "model_quantization_config": None,
    "model_quantization_config_kwargs": None,
    "use_kernels": None,  # replaces modules by those of the hub
    **dict.fromkeys(("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"), False),
}
"""Keys of Axolotl that would open or compute the model in another way, and their values."""
_LIGER = (
    *("rope", "rms_norm", "glu_activation", "swiglu"),
    *("cross_entropy", "fused_linear_cross_entropy"),
)


class LibraryPlugin(BasePlugin):
    """See the module's docstring."""

    def register(self, cfg: Any) -> None:
        """Raise if the YAML asks for what this plugin cannot give.

        Raises:
            ConfigError: the YAML names Axolotl's context parallelism, loading of shards from one
                process's memory, Liger's kernels, or no LoRA.
        """
        for key in ("context_parallel_size", "sequence_parallel_degree"):
            if (cfg.get(key) or 1) > 1:
                raise ConfigError(
                    f"{key}: {cfg[key]} cannot be used with gpt-oss",
                    f"{key}: 1",
                    "Axolotl's context parallelism, in which each process attends to its own part",
                    "shard sequences by this project's stage 03: "
                    f"python 03_finetune.py sequence_parallel_degree={cfg[key]}",
                )
        for key in ("cpu_ram_efficient_loading", "fsdp_cpu_ram_efficient_loading"):
            if (cfg.get("fsdp_config") or {}).get(key):
                raise ConfigError(
                    f"{key}: true cannot be used with packed experts",
                    f"{key}: false",
                    "Axolotl makes every tensor that it loads a parameter, and integers cannot be",
                    f"remove {key}; each process then opens the model in host memory",
                )
        for key in (f"liger_{name}" for name in _LIGER):
            if cfg.get(key):
                raise ConfigError(
                    f"{key} would not be used: this plugin fuses the layers and the loss itself",
                    f"{key}: false",
                    f"{key}: {cfg[key]}",
                    f"remove {key}; BENCHMARKS.md compares Liger's kernels with ours",
                )
        if cfg.get("adapter") != "lora":
            raise ConfigError(
                "this plugin keeps the experts in 4 bits, frozen",
                "adapter: lora",
                f"adapter: {cfg.get('adapter')}",
                "set adapter: lora; examples/transformers_trainer.py trains dense or full",
            )

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Set how the model is opened: Axolotl's first hook after its validation."""
        folder = Path(cfg.output_dir) / _CONFIG
        sparselong.packed_config(cfg.base_model).save_pretrained(folder)
        cfg.base_model_config = str(folder)
        cfg.attn_implementation = NAME  # no name of Axolotl's, which its validation would refuse
        for key, value in _SET_ASIDE.items():
            cfg[key] = value

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Fuse the layers and the loss; raise if the model is not the one that was asked for."""
        kinds = [type(module) for module in model.modules()]
        if PackedExperts not in kinds or model.config._attn_implementation != NAME:
            raise ValueError(f"Axolotl opened {cfg.base_model} in another way; see _SET_ASIDE")
        sparselong.fuse(model)
        sparselong.chunk_loss(model)
        fused = sum(isinstance(module, FusedDecoderLayer) for module in model.modules())
        print(f"sparselong: {kinds.count(PackedExperts)} layers' experts in 4 bits, attention "
              f"{NAME}, {fused} fused layers, chunked loss", flush=True)  # fmt: skip
