"""The model card: what the manifests of a run say about its base, data, method, figures and files.

Only names and hashes of local files get into the card, never their paths. What no manifest says,
such as the licence of the data, is said to be unknown.
"""

from __future__ import annotations

import os
import re
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sparselong.export.hub.loading import HOW
from sparselong.export.inputs import COMPRESS, FINETUNE, base_rows, origin_of
from sparselong.files import is_local, read_json
from sparselong.memory import PUBLISHED
from sparselong.run import Stage, read_manifest

EVALUATE = "04_eval"
_TINY = "tiny"
_TRAINED = {
    "assistant": "the assistant's turns",
    "final": "the assistant's answers without reasoning and tool calls",
    "last_turn": "each conversation's last turn of the assistant",
    "all": "every token",
}
"""What the loss is of, by `data.train_on`."""
_APACHE = "apache-2.0"
_MODELS = ("base", "compressed", "finetuned")
_ATTENTION = re.compile(r"blk\.\d+\.attn_(q|k|v|output)\.weight")  # in GGUF files
Manifests = dict[str, dict[str, Any]]


def write_card(stage: Stage, exports: Manifests) -> str:
    """Return the text of README.md.

    Args:
        stage: the part `hub`, with the manifests of the stages that it reads.
        exports: manifests of the forms that are uploaded, by name.
    """
    repo = stage.options["repo"]
    kind = "fine-tuned" if origin_of(stage) == FINETUNE else "compressed"
    sections = {
        f"{repo.partition('/')[2]}": f"{_name_base(stage)}, {kind} with Sparse-Long.",
        "Files": _describe_files(exports),
        "How to load it": _describe_loading(stage, exports),
        "Base": _describe_base(stage),
        "Method": _describe_method(stage, exports),
        "Data": _describe_data(stage),
        "Results": _describe_results(stage),
        "Licences": _describe_licences(stage),
    }
    parts = [f"{'#' if n == 0 else '##'} {title}\n\n{text}"
             for n, (title, text) in enumerate(sections.items())]  # fmt: skip
    head = f"---\n{_make_data(stage, exports).to_yaml()}\n---\n\n"
    content = head + "\n\n".join(parts) + "\n"
    ModelCard(content)  # raises if it cannot be read back
    return content


def _make_data(stage: Stage, exports: Manifests) -> ModelCardData:
    model, data = stage.config.model, stage.config.data
    relation = "finetune" if origin_of(stage) == FINETUNE else "quantized"
    on_hub = _is_on_hub(model.base)
    return ModelCardData(
        license=_licence(model.base),
        base_model=model.base if on_hub else None,
        base_model_relation=("adapter" if [*exports] == ["adapter"] else relation)
        if on_hub
        else None,
        datasets=[*filter(_is_on_hub, dict.fromkeys(data.named.values()))] or None,
        library_name="peft" if [*exports] == ["adapter"] else "transformers",
        pipeline_tag="text-generation",
        tags=["gpt-oss", "sparse-long", *exports],
    )


def _is_on_hub(name: str) -> bool:
    return name not in (_TINY, "demo") and not is_local(name)


def _licence(base: str) -> str | None:
    return _APACHE if base == _TINY or base in PUBLISHED else None


def _shown(name: str) -> str:
    """Return a name of the hub, or the last part of a path."""
    return name if _is_on_hub(name) else os.path.basename(os.path.normpath(name))


def _name_base(stage: Stage) -> str:
    base = stage.config.model.base
    return "A small random gpt-oss for tests" if base == _TINY else _shown(base)


def _table(*rows: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _describe_files(exports: Manifests) -> str:
    rows = [("form", "where", "bytes", "compared with its source after writing")]
    for form, manifest in exports.items():
        place = "root" if form == "mxfp4" else f"`{form}/`"
        metrics = manifest["metrics"]
        rows.append((form, place, f"{metrics['bytes']:,}", _describe_check(form, metrics)))
    return _table(*rows)


def _describe_check(form: str, metrics: dict[str, Any]) -> str:
    if form == "adapter":
        return f"{metrics['tensors']} tensors, each with its place in the base"
    text = f"{metrics['tensors']} tensors, every value equal"
    if metrics.get("errors"):
        errors = metrics["errors"]
        largest = max(one["relative_rms"] for one in errors.values())
        text = (f"{metrics['tensors'] - len(errors)} of {metrics['tensors']} tensors with every "
                f"value equal, the others within {largest:.2%} (relative RMS)")  # fmt: skip
    if metrics.get("identical_to_base") is not None:
        text += f"; {metrics['identical_to_base']} have the base's bytes"
    return text


def _describe_loading(stage: Stage, exports: Manifests) -> str:
    repo, base = stage.options["repo"], _shown(stage.config.model.base)
    names = {"repo": repo, "base": base, "name": repo.partition("/")[2].lower()}
    texts = []
    for form in exports:
        text = HOW[form]
        for key, value in names.items():
            text = text.replace(f"{{{key}}}", value)
        texts.append(f"**{form}.** {text}")
    return "\n\n".join(texts)


def _describe_base(stage: Stage) -> str:
    model = stage.config.model
    where = f"`{_shown(model.base)}`"
    where += f", revision `{model.revision}`" if _is_on_hub(model.base) else ", a local directory"
    where = "Made on the spot by Sparse-Long" if model.base == _TINY else where
    rows = [(f"`{name}`", f"`{row['sha256']}`") for name, row in base_rows(stage).items()]
    return f"{where}. Its files, as they were read:\n\n" + _table(("file", "sha256"), *rows)


def _describe_method(stage: Stage, exports: Manifests) -> str:
    config, bits = stage.config, stage.manifests[COMPRESS]["metrics"].get("bits_per_weight", {})
    dense, experts = config.shared_dense, config.experts
    is_trained = origin_of(stage) == FINETUNE
    attention = "bf16" if dense.weight_bits == 16 else f"{dense.weight_bits} bits a kept weight"
    attention += ", 2:4 sparse" if dense.sparsity == "2:4" else ", not sparse"
    if dense.weight_bits < 16:
        attention += f", groups of {dense.group_size} weights with a scale"
    stored = "MXFP4, 2:4 sparse" if experts.sparsity == "2:4" else "MXFP4"
    as_published = experts.sparsity == "none" and not (is_trained and config.lora.expert_targets)
    lines = [
        f"- Attention projections: {attention}. {_describe_attention(exports)}".rstrip(),
        f"- Experts: {stored}{', as published' if as_published else ''}.",
    ]
    if experts.keep is not None:
        lines.append(_describe_dropped(stage))
    if bits:
        parts = {name: value for name, value in bits.items() if name != "masters"}
        shown = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in parts.items())
        lines.append(f"- Bits a weight as stored in the run: {shown}.")
    if is_trained:
        lines += _describe_training(stage)
    if "adapter" in exports:
        lines.append("- `adapter` has the trained change alone: on the base it gives the sums "
                     "before they are rounded.")  # fmt: skip
    return "\n".join(lines)


def _describe_dropped(stage: Stage) -> str:
    found = stage.manifests[COMPRESS]["metrics"]["kept_experts"]
    return (
        f"- Experimental: each layer has {found['experts']} of the base's {found['base']} experts, "
        "those whose weighted outputs were largest on the calibration text. The others had "
        f"{found['lost_weight']:.1%} of the routing weight."
    )


def _describe_attention(exports: Manifests) -> str:
    """Return which forms hold the attention projections' values, and which round them again."""
    equal, texts = [], []
    for form, manifest in exports.items():
        kinds, largest = _find_rounding(manifest["metrics"])
        if kinds:
            texts.append(f"`{form}` rounds them again, to {_join(kinds)} (relative RMS up to "
                         f"{largest:.2%}).")  # fmt: skip
        elif form != "adapter":
            equal.append(f"`{form}`")
    if equal:
        texts.insert(0, f"{_join(equal)} {'hold' if len(equal) > 1 else 'holds'} these values.")
    return " ".join(texts)


def _find_rounding(metrics: dict[str, Any]) -> tuple[list[str], float]:
    """Return the types in which attention differs from its source, and its largest error."""
    found = {
        name: one["relative_rms"]
        for name, one in metrics.get("errors", {}).items()
        if one["largest"] and _ATTENTION.fullmatch(name)
    }
    kinds = [kind for kind, names in metrics.get("tensor_types", {}).items() if {*names} & {*found}]
    return kinds, max(found.values(), default=0.0)


def _join(words: list[str]) -> str:
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _describe_training(stage: Stage) -> list[str]:
    config, metrics = stage.config, stage.manifests[FINETUNE]["metrics"]
    lora, training, dense = config.lora, config.training, config.shared_dense
    through = ""
    if dense.weight_bits < 16 or dense.sparsity != "none":
        through = ", trained through mask and rounding"
    router = f"; rank {lora.r} on routers" if lora.router else ""
    steps = f"{metrics['steps']:,} steps" if "steps" in metrics else "Steps"
    lines = [
        f"- LoRA of rank {lora.r}, alpha {lora.alpha:g}, on {', '.join(lora.target_modules)}"
        f"{through}{router}; merged in all forms but `adapter`.",
        f"- {steps} at {config.sequence_len:,} tokens a sequence, learning rate "
        f"{training.learning_rate:g} ({training.lr_scheduler}), {training.optimizer}, seed "
        f"{config.seed}.",
    ]
    if lora.expert_targets:
        layers = metrics.get("expert_rounding", {}).values()
        lost = [weight["lost"] for layer in layers for weight in layer.values()]
        error = f", which loses {sum(lost) / len(lost):.1%} of the change (mean)" if lost else ""
        targets = ", ".join(lora.expert_targets)
        lines.append(
            f"- LoRA of rank {lora.expert_r} on experts' {targets}; the sums are rounded to MXFP4 "
            f"again{error}."
        )
    if dense.sparsity == "2:4":
        share = config.finetuning_modifiers.MagnitudePruningModifier.update_frequency
        lines.append(f"- The 2:4 masks were reselected every {share:.0%} of the steps.")
    return lines


def _describe_data(stage: Stage) -> str:
    config, manifest = stage.config.data, stage.manifests[origin_of(stage)]
    use = "Trained on" if origin_of(stage) == FINETUNE else "Calibrated with"
    lines = []
    shares = {each.source: each.weight for each in config.shares}
    for key, name in config.named.items():
        row = manifest.get("sources", {}).get(key)
        digest = f", sha256 `{row['sha256']}`" if isinstance(row, dict) else ""
        words = "Validated on" if key == "data.validation" else use
        weight = shares.get(name) if words == use else None
        share = f", weight {weight:g}" if weight else ""
        lines.append(f"- {words} `{_shown(name)}`{share}{digest}.")
    if origin_of(stage) == FINETUNE:
        lines.append(f"- Loss on {_TRAINED[config.train_on]}.")
    if "date" in manifest:
        lines.append(f"- The chat template rendered the date {manifest['date']}.")
    return "\n".join(lines)


def _describe_results(stage: Stage) -> str:
    found = _read_evaluation(stage)
    if found is None:
        stage.log(
            f"{EVALUATE} has not measured this model with this config: the card has no results"
        )
        return "Not measured by stage 04."
    names = [name for name in _MODELS if name in found["perplexity"]]
    rows = [("", *names)]
    for task, models in found["tasks"].items():
        for metric, error in (("acc", "stderr"), ("acc_norm", "acc_norm_stderr")):
            cells = [_show(models[name], metric, error) for name in names]
            rows.append((f"{task}, {metric}", *cells))
        flips = (one.get("paired_flips") for one in (models[name] for name in names))
        cells = [f"+{one['gained']} -{one['lost']}" if one else "" for one in flips]
        rows.append((f"{task}, items that became right, wrong", *cells))
    cells = [f"{found['perplexity'][name]:.3f}" for name in names]
    rows.append(("perplexity of held-out conversations", *cells))
    return "The same items and settings for all models; ± is the standard error.\n\n" + _table(
        *rows
    )


def _read_evaluation(stage: Stage) -> dict[str, Any] | None:
    """Return the metrics of stage 04, or None if it has not measured this model and config."""
    manifest = read_manifest(stage.run_dir, EVALUATE)
    made_from = read_json(stage.dir / "started.json")["made_from"]
    if (
        manifest is None
        or manifest["config_hash"] != Stage(EVALUATE, stage.config, stage.run_dir).hash
    ):
        return None
    is_of_these = all(manifest["made_from"].get(name) == made_from[name] for name in made_from)
    return manifest["metrics"] if is_of_these else None


def _show(figures: dict[str, Any], metric: str, error: str) -> str:
    value, spread = figures.get(metric), figures.get(error)
    if value is None:
        return ""
    return f"{value:.1%}" + (f" ± {spread:.1%}" if spread is not None else "")


def _describe_licences(stage: Stage) -> str:
    known = _licence(stage.config.model.base)
    base = "Apache-2.0" if known else "not recorded; look it up before you share this"
    if stage.config.model.base in PUBLISHED:
        base += f", with the usage policy in https://huggingface.co/{stage.config.model.base}"
    return "\n".join(
        [
            f"- Base: {base}.",
            "- Data: not recorded by the run; look it up before you share this.",
            "- Sparse-Long: Apache-2.0.",
        ]
    )
