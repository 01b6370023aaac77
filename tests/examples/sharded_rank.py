"""One process of a sharded training on a CPU: `python -m tests.examples.sharded_rank`.

Its argument is JSON: `environment`, that of `accelerate launch`; `cases`, each a training's words
for `forms.train`; base and data. accelerate shards on GPUs only, so it is made to take this CPU for
one; everything else is as on a GPU. With `fused`, layers compute as on a GPU too, where they read
parameters of modules that are not called. Rank 0 writes each case's losses and gradient norms.
"""

import gc
import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Train each case."""
    given = json.loads(sys.argv[1])
    os.environ.update(given["environment"])
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from sparselong.model.fused import FusedDecoderLayer
    from tests.examples.forms import train

    gc.freeze()  # or each training collects what was imported
    torch.set_num_threads(1)
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if given["fused"]:
        FusedDecoderLayer.forward = FusedDecoderLayer._forward_fused
    for *words, steps in given["cases"]:
        out = Path(given["out"]) / "-".join(words)
        paths = (Path(given["base"]), Path(given["data"]), out)
        trainer = train(*words, *paths, steps, given["batch"])
        sharded = [
            name
            for name, parameter in trainer.model.named_parameters()
            if type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id")
        ]
        if trainer.is_world_process_zero():
            steps = [r for r in trainer.state.log_history if "loss" in r]
            found = {"losses": [r["loss"] for r in steps], "norms": [r["grad_norm"] for r in steps]}
            whole = len(list(trainer.model.parameters())) - len(sharded)
            out.with_suffix(".json").write_text(json.dumps({**found, "whole": whole}))


main()
