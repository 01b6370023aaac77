#!/usr/bin/env python3
"""Time, disk traffic and host memory of stage 05 on a model of gpt-oss-20b's true widths.

A base with random weights in the published form and a vocabulary of 201,088 tokens
(`base_checkpoint.py`) gets what stage 02 leaves behind: attention in 2:4 and int4, rounded to the
nearest codes. Then `05_export.py` makes each form in a process of its own.

Work is processor time, user and system, of all the process's threads. The disk's time is what the
process read from and wrote to the disk, as the kernel counted it, at the rates at which this disk
streams just before: a file read with nothing of it in memory, and one written and synced. Work
above 3 minutes or a peak above 4 GiB of resident memory ends the benchmark with exit code 1.

The GGUF file is then opened with the package's reader, and every tensor is compared with the base's
or, for attention, with the compressed model's: experts' bytes put back into the published order,
other tensors as the package decodes them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gguf
import numpy as np
import torch

from benchmarks.base_checkpoint import enlarge_vocabulary, write_base
from benchmarks.command_line import add_result, command_of, machine_of
from benchmarks.record import row, write
from sparselong.checkpoint import PROJECTIONS, Checkpoint, derive
from sparselong.checkpoint.checkpoint import write_tensors
from sparselong.config import load
from sparselong.model import SparseLongConfig
from sparselong.packing import dense, integer
from sparselong.run import Stage, read_manifest
from sparselong.run.directory import finish, prepare

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "20b": "configs/gpt-oss-20b-1x3090.yaml",
    "true": "configs/gpt-oss-120b-4x3090.yaml",
    "tiny": "configs/tiny.yaml",
}
"""Config by the name of the widths in WIDTHS; `true` are those of the 120b."""
FORMS = ("mxfp4", "gguf")
MOST_SECONDS, MOST_BYTES = 180, 4 << 30
"""Limits of work and host memory."""
DISK_BYTES = {"20b": 50e9, "true": 135e9, "tiny": 1e9}
"""Free space that 24 layers need: base, model, one form and the file that is streamed."""
_VOCABULARY = {"20b": 199_990, "true": 199_990, "tiny": 4000}
_STREAMED_BYTES = {"20b": 1 << 32, "true": 1 << 32, "tiny": 1 << 20}
_CHUNK = 1 << 24
_BLOCK = 512  # in which the kernel counts
BEGUN = time.monotonic()


def tell(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - BEGUN:6.1f} s] {text}", file=sys.stderr, flush=True)


def pack_layer(base: Checkpoint, layer: int, storage: SparseLongConfig) -> dict[str, torch.Tensor]:
    """Return a layer's attention projections as stage 02 stores them."""
    found, fmt = {}, storage.dense_format
    for projection in PROJECTIONS:
        module = f"model.layers.{layer}.self_attn.{projection}"
        weight = base.read([f"{module}.weight"])[f"{module}.weight"].float()
        fours = weight.abs().view(len(weight), -1, 4)
        kept = torch.zeros_like(fours, dtype=torch.bool)
        kept.scatter_(-1, fours.topk(2, dim=-1).indices, value=True)
        groups = weight.view(len(weight), -1, fmt.group_size)
        scale = (groups.abs().amax(-1) / 7).bfloat16()
        codes = integer.quantize(weight, scale, 4)
        packed = dense.pack(fmt, codes, kept.view_as(weight), scale)
        found |= {f"{module}.{name}": tensor for name, tensor in packed.items()}
    return found


def make_run(args: argparse.Namespace) -> None:
    """Write the base, and a run directory in which stage 02 is done."""
    folder = args.work / "base"
    write_base(folder, args.widths, args.layers, "cpu", tell)
    enlarge_vocabulary(folder, _VOCABULARY[args.widths])
    stage = Stage("02_compress", load(CONFIGS[args.widths], overrides(args)), args.work / "run")
    prepare(stage, redo=False)
    base, model = Checkpoint(folder), stage.dir / "model"
    model.mkdir()
    storage, dropped = SparseLongConfig(), set()
    for layer in range(args.layers):
        write_tensors(model / f"dense-{layer:05d}.safetensors", pack_layer(base, layer, storage))
        prefix = f"model.layers.{layer}.self_attn"
        dropped |= {f"{prefix}.{projection}.weight" for projection in PROJECTIONS}
    derive(base, model, dropped, sorted(model.glob("dense-*")), storage.to_dict())
    tell("stage 02's model is written")
    stage.inputs, stage.outputs = base.inventory.paths, [model]
    finish(stage, 0.0)
    tell("its files are hashed")


def overrides(args: argparse.Namespace) -> list[str]:
    """Return the config overrides of the run."""
    base = f"model.base={args.work / 'base'}"
    return [base, "data.train=demo", "evaluation.tasks=[demo_hellaswag]"]


def forget(*paths: Path) -> None:
    """Remove files from the kernel's cache, so that reading them again reads the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stream(args: argparse.Namespace) -> dict[str, float]:
    """Return the rates, in bytes per second, at which the disk is read and written."""
    path, size = args.work / "streamed", _STREAMED_BYTES[args.widths]
    chunk, rates = np.random.default_rng(0).bytes(_CHUNK), {}
    begin = time.monotonic()
    with path.open("wb") as file:
        for _ in range(0, size, _CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    rates["write"] = size / (time.monotonic() - begin)
    forget(path)
    begin = time.monotonic()
    with path.open("rb") as file:
        while file.read(_CHUNK):
            pass
    rates["read"] = size / (time.monotonic() - begin)
    path.unlink()
    return rates


def export(args: argparse.Namespace, form: str) -> dict[str, float]:
    """Make one form in a process of its own, and return its figures.

    Raises:
        CalledProcessError: it failed.
    """
    rates = stream(args)
    forget(*(path for path in args.work.rglob("*") if path.is_file() and path.stat().st_size))
    command = [sys.executable, "05_export.py", "--config", CONFIGS[args.widths]]
    command += ["--run-dir", str(args.work / "run"), "--from", "compressed", "--to", form]
    begin = time.monotonic()
    process = subprocess.Popen([*command, *overrides(args)], cwd=ROOT, stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - begin
    if code := os.waitstatus_to_exitcode(status):
        raise subprocess.CalledProcessError(code, command)
    manifest = read_manifest(args.work / "run", "05_export", form)
    assert manifest is not None
    read, written = _BLOCK * used.ru_inblock, _BLOCK * used.ru_oublock
    return {
        "bytes": manifest["metrics"]["bytes"],
        "tensors": manifest["metrics"]["tensors"],
        "wall_seconds": wall,
        "work_seconds": used.ru_utime + used.ru_stime,
        "user_seconds": used.ru_utime,
        "disk_seconds": read / rates["read"] + written / rates["write"],
        "read_bytes": read,
        "written_bytes": written,
        "disk_read_rate": rates["read"],
        "disk_write_rate": rates["write"],
        "peak_host_bytes": manifest["peak_bytes"]["host"],
    }


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_sinks": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_ROWS = {"ffn_gate_exps": slice(0, None, 2), "ffn_up_exps": slice(1, None, 2)}


def check_gguf(path: Path, model: Checkpoint, storage: SparseLongConfig) -> dict[str, int]:
    """Compare every tensor of the file with its source; return how many are equal, by type.

    Raises:
        ValueError: one is not, or is missing.
    """
    equal: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        words = tensor.name.split(".")
        stem, last = words[-2:]
        prefix = f"model.layers.{words[1]}." if words[0] == "blk" else ""
        name, rows = prefix + _NAMES[stem], _ROWS.get(stem, slice(None))
        if tensor.tensor_type.name == "MXFP4":
            same = _is_repacked(np.asarray(tensor.data), model, name, rows)
        else:
            values = _source_values(model, name, last, rows, storage)
            found = gguf.dequantize(tensor.data, tensor.tensor_type)
            same = np.array_equal(found.ravel(), values.float().numpy().ravel())
        if not same:
            raise ValueError(f"{tensor.name} differs from {name}")
        equal[tensor.tensor_type.name] = equal.get(tensor.tensor_type.name, 0) + 1
    layers = model.config["num_hidden_layers"]
    if sum(equal.values()) != 3 + 19 * layers:
        raise ValueError(f"{sum(equal.values())} tensors, not {3 + 19 * layers}")
    return equal


def _source_values(
    model: Checkpoint, name: str, last: str, rows: slice, storage: SparseLongConfig
) -> torch.Tensor:
    stored = f"{name}_bias" if ".experts." in name else f"{name}.{last}"
    stored = name if name.endswith("sinks") else stored
    if stored in model.tensors:
        values = model.read([stored])[stored]
        return values[:, rows] if ".experts." in name else values
    parts = ("weight_packed", "weight_mask", "weight_scale")
    found = model.read(f"{name}.{part}" for part in parts)
    fmt = storage.dense_format
    return dense.unpack(fmt, {part: found[f"{name}.{part}"] for part in parts})


def _is_repacked(data: np.ndarray, model: Checkpoint, name: str, rows: slice) -> bool:
    """Return whether an expert weight's bytes, put back in order, are the published ones."""
    read = (model.read_slices(f"{name}_{part}", step=1) for part in ("blocks", "scales"))
    for packed, blocks, scales in zip(data, *read, strict=True):
        wanted = blocks[0, rows].numpy(), scales[0, rows].numpy()
        packed = packed.reshape(*wanted[1].shape, 17)
        codes = np.concatenate((packed[..., 1:] & 15, packed[..., 1:] >> 4), axis=-1)
        published = codes[..., 0::2] | (codes[..., 1::2] << 4)
        if not (np.array_equal(published, wanted[0]) and np.array_equal(packed[..., 0], wanted[1])):
            return False
    return True


_UNITS = {"bytes": "bytes", "seconds": "s", "rate": "bytes/s", "tensors": "1"}
"""Units by the last word of a metric."""


def measure(args: argparse.Namespace) -> bool:
    """Make the forms, write the rows after each, and return whether all are within the limits."""
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    make_run(args)
    if not torch.cuda.is_available():
        args.machine = args.machine or f"cpu{os.cpu_count()}"
    machine = machine_of(args)
    case = {"widths": args.widths, "layers": args.layers}
    rows, within = [], True
    for form in FORMS:
        found = export(args, form)
        folder = args.work / f"run/05_export/{form}"
        tell(f"{form}: {json.dumps(found)}")
        if form == "gguf":
            model = Checkpoint(args.work / "run/02_compress/model")
            equal = check_gguf(folder / "model.gguf", model, SparseLongConfig())
            tell(f"equal tensors by type: {equal}")
            found["equal_tensors"] = sum(equal.values())
        within &= found["work_seconds"] <= MOST_SECONDS and found["peak_host_bytes"] <= MOST_BYTES
        for metric, value in found.items():
            unit = _UNITS[metric.rpartition("_")[2]]
            rows.append(row(case | {"form": form}, "sparselong", metric, value, unit))
        print(write("export", machine, command_of(__file__, args), rows, args.folder))
        shutil.rmtree(folder)
    shutil.rmtree(args.work)
    return within


def main() -> None:
    """Run the benchmark; exit 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="20b", choices=CONFIGS)
    parser.add_argument("--layers", type=int, default=24)
    text = "directory for base, run and one form, made again and removed"
    parser.add_argument("--work", type=Path, default=ROOT / "runs/export", help=text)
    add_result(parser)
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.parent.mkdir(parents=True, exist_ok=True)
    needed = DISK_BYTES[args.widths] * args.layers / 24
    free = shutil.disk_usage(args.work.parent).free
    if free < needed:
        print(f"benchmarks/export.py needs {needed / 1e9:.0f} GB of disk, and {free / 1e9:.0f} GB "
              "are free: nothing measured; pass fewer --layers")  # fmt: skip
        return
    if not measure(args):
        sys.exit(f"more than {MOST_SECONDS} s of work or {MOST_BYTES >> 30} GiB of host memory")


if __name__ == "__main__":
    main()
