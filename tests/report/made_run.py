"""A finished run as files, without any model: what the page and the comparison read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.provenance import describe_files
from sparselong.run.manifests import FORMAT_VERSION, hash_outputs

EVIL = "</td><script>document.title='run'</script><img src=http://x.invalid/a.png onerror=alert(1)>"
MODELS = ("base", "compressed", "finetuned")
HARDWARE = {"machine": "x86_64", "cpu_count": 2, "host_bytes": 24 * 2**30, "gpus": ["H200, 141 GB"]}
PLAN = {
    "device": "cuda",
    "components_at_peak": {
        "02_compress": {"one layer's weights": 2 * 2**30, "CUDA context": 2**29},
        "03_finetune": {"experts": 12 * 2**30, "activation checkpoints": 3 * 2**30, "gaps": 2**20},
        "04_eval": {"experts": 12 * 2**30, "logits": 2**30},
    },
    "bytes_on_disk": {"base model": 13 * 2**30},
    "estimated_seconds": {"02_compress": 300, "03_finetune": 3600, "04_eval": 600},
    "estimated_for": "RTX 3090",
    "expert_placement": "gpu",
    "held_reason": "one process holds them all",
    "kept": "experts' gate_up in the last 3 of 24 layers",
}


def default_config() -> dict[str, Any]:
    config = Config().model_dump(mode="json")
    config["lora"]["r"] = 24
    config["model"]["base"] = "openai/gpt-oss-20b"
    return config


def write_stage(
    run_dir: Path, name: str, metrics: dict[str, Any], files: dict[str, str], **more: Any
) -> None:
    """Write a stage's or part's files and its manifest."""
    folder, stage = run_dir / name, name.partition("/")[0]
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    manifest = {
        "format_version": FORMAT_VERSION,
        **{"stage": stage, "status": "done", "config_hash": "0", "made_from": {}},
        **{"config": default_config(), "inputs": [], "seed": 42, "seconds": 90.0},
        "outputs": describe_files([folder / file for file in files], run_dir),
        **{"git_commit": "a" * 40, "git_dirty": False, "versions": {"torch": "2.13.0"}},
        **{"hardware": HARDWARE, "peak_bytes": {"host": 3 * 2**30, "cuda:0": 11 * 2**30}},
        **{"date": "2026-01-31", "metrics": metrics, **more},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(run_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((run_dir / name / "manifest.json").read_text())


def _trained(run_dir: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": 2.0, "eval_perplexity": 7.389}]
    rows += [
        {
            **{
                "step": step,
                "loss": 3.0 - step / 100,
                "learning_rate": 1e-4,
                "my_figure": step**0.5,
            },
            **{"grad_norm": 1.0, "tokens_per_second": 1234.0, "peak_bytes_cuda:0": 9 * 2**30},
        }
        for step in range(1, 61)
    ]
    rows.append({"step": 60, "eval_loss": 1.5, "eval_perplexity": 4.4817})
    updates = [
        {"step": s, "flipped": s / 5000, "flipped_by_kind": {"q_proj": s / 5000}}
        for s in range(3, 60, 3)
    ]
    metrics = {
        **{"steps": 60, "train_loss": 2.4, "best_step": 60, "best_eval_perplexity": 4.4817},
        **{"tokens": 983_040, "tokens_per_second": 1234.0, "mask_updates": updates},
        **{"two_four_conforming": 1.0, "supervised_token_fraction": 0.37},
        **{"remarks": ["train: 2 left out"], "warnings": [f"5 items like {EVIL}"]},
    }
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = {"metrics.jsonl": lines, "supervision.txt": f"asked ⟦answered {EVIL}⟧ end"}
    hashes = [{"path": f"data/{name}.jsonl", "bytes": 1, "sha256": name} for name in
              ("train", "validation")]  # fmt: skip
    made_from = {"02_compress": hash_outputs(read(run_dir, "02_compress"))}
    write_stage(run_dir, "03_finetune", metrics, files, inputs=hashes, made_from=made_from)


def _task(right: list[int], base: list[int]) -> dict[str, Any]:
    gained = sum(b < a for a, b in zip(right, base, strict=True))
    lost = sum(b > a for a, b in zip(right, base, strict=True))
    pair = {"difference": (gained - lost) / 4, "stderr": 0.25, "gained": gained, "lost": lost,
            "p": 0.5}  # fmt: skip
    accuracy = {"acc": sum(right) / 4, "acc_stderr": 0.2171}
    return {"items": 4, "chance": 0.25, "requests_sha256": "r", **accuracy, "acc_to_base": pair}


def results(**more: Any) -> dict[str, Any]:
    """Stage 04's results.json."""
    rights = {"base": [1, 1, 0, 0], "compressed": [1, 0, 0, 0], "finetuned": [1, 0, 1, 1]}
    perplexity = {}
    for model, value in zip(MODELS, (7.5, 8.25, 4.125), strict=True):
        counted = {"nll": 10.0, "tokens": 7248, "perplexity": value}
        positions = [
            {"first": first, "last": 2 * first - 1, **counted, "perplexity": value + first / 1024}
            for first in (64, 128, 256, 512)
        ]
        pair = {"ratio": value / 7.5, "difference": 0.0125, "stderr": 0.0023}
        perplexity[model] = {"supervised": counted, "all": counted, "by_position": positions,
                             "to_base": pair}  # fmt: skip
    return {
        "settings": {"num_fewshot": 0, "seed": 42, "conversations": 100},
        "warnings": ["5 of the 4 items share words"],
        "tasks": {"demo_hellaswag": {m: _task(r, rights["base"]) for m, r in rights.items()}},
        "perplexity": perplexity,
        **more,
    }


def _evaluated(run_dir: Path, more: dict[str, Any]) -> None:
    found = results(**more)
    files = {"results.json": json.dumps(found)}
    rights = {"base": [1, 1, 0, 0], "compressed": [1, 0, 0, 0], "finetuned": [1, 0, 1, 1]}
    for model, right in rights.items():
        task = {"right": right, "log_likelihoods": [[-9.0 - i, -8.0, -7.0, -6.5] for i in range(4)]}
        files[f"{model}.json"] = json.dumps({"tasks": {"demo_hellaswag": task}})
    items = [{"ctx": f"Context {i} {EVIL}", "endings": ["one", EVIL, "three", "four"], "label": 2}
             for i in range(4)]  # fmt: skip
    files["tasks/items.jsonl"] = "".join(json.dumps(item) + "\n" for item in items)
    tasks = {
        task: {m: {"acc": row["acc"], "stderr": 0.2171, "items": 4, "chance": 0.25,
                   "paired_flips": {k: row["acc_to_base"][k] for k in ("gained", "lost", "p")}}
               for m, row in rows.items()}
        for task, rows in found["tasks"].items() if task == "demo_hellaswag"
    }  # fmt: skip
    perplexity = {m: row["supervised"]["perplexity"] for m, row in found["perplexity"].items()}
    write_stage(run_dir, "04_eval", {"tasks": tasks, "perplexity": perplexity}, files)


def write_run(run_dir: Path, **more: Any) -> Path:
    """Write a run in which all stages are done; `more` goes into results.json."""
    checks = [{"check": "python", "status": "ok", "found": "3.11", "fix": ""},
              {"check": "disk", "status": "warn", "found": EVIL, "fix": "free some"}]  # fmt: skip
    write_stage(run_dir, "01_health", {"ready": True, "rows": checks, "plan": PLAN}, {})
    errors = [{"q_proj": 0.2 + layer / 100, "o_proj": 0.1} for layer in range(24)]
    compressed = {
        **{"name": "gpt-oss-20b-2of4", "bytes_on_disk": 12 * 2**30, "relative_error": errors},
        **{"base_bytes_on_disk": 13 * 2**30, "bits_per_weight": {"experts": 4.25, "lm_head": 16.0}},
        **{"experts_bit_exact": True, "two_four_conforming": 1.0, "masters_match": True},
    }
    write_stage(run_dir, "02_compress", compressed, {"model.txt": "weights"})
    _trained(run_dir)
    _evaluated(run_dir, more)
    exported = {"bytes": 12 * 2**30, "reloaded": True, "tensors_identical": True}
    write_stage(run_dir, "05_export/gguf", exported, {}, part="gguf", options={"from": "finetuned"})
    return run_dir
