"""config.json of a gpt-oss checkpoint, read strictly and the same way by every stage.

transformers accepts more than it computes with: it fills in missing sizes, lets the last of two
contradicting keys win, and ignores keys such as `swiglu_limit`. A model read that way is not the
one that the file describes. Here every key that decides a result is checked, and whatever is
missing, contradictory or not gpt-oss is refused. Needs no torch, so that a refusal is immediate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sparselong.errors import StageError
from sparselong.files import read_json

SIZES = (
    *("num_hidden_layers", "num_local_experts", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "num_experts_per_tok"),
    *("vocab_size", "sliding_window"),
)
DROPPED_EXPERTS = "sparselong_experts"
"""Key that stage 02 adds if it keeps some of the experts: how many there were, and which are kept.
Exports in the published form have it too."""
_MOST_LAYERS = 1000
_ALIASES = {"num_experts": "num_local_experts"}
"""Keys that transformers reads as another one."""
_REPEATED = {"experts_per_token": "num_experts_per_tok"}
"""Keys that the published files carry beside transformers' own; transformers ignores them."""
_DIVISORS = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 2}
_LAYER_TYPES = ("sliding_attention", "full_attention")
_FIXED: dict[str, Any] = {
    "attention_bias": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "is_causal": True,
    "output_router_logits": False,  # stage 03's loss is that of the tokens alone
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    **dict.fromkeys(("text_config", "decoder", "generator", "text_encoder", "per_layer_config")),
    "transformers_weights": None,
}
"""Keys that may be left out or null, and the only value that this project computes with."""
_NOT_NULL = {"is_causal"}
"""Of these, keys whose null transformers takes for false."""
_ROPE = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
_ROPE_OPTIONAL = ("rope_theta", "attention_factor", "mscale", "mscale_all_dim")
_PRECISIONS = ("bfloat16", "float16", "float32")
_FIX = "restore config.json from the published checkpoint"


class _Fault(Exception):
    """What was expected of a key, and what was found."""

    def __init__(self, expected: str, found: str):
        super().__init__(expected, found)
        self.expected, self.found = expected, found


class BaseConfig(NamedTuple):
    """A checked config.json: its sizes by transformers' names, and the type of every layer."""

    sizes: dict[str, int]
    layer_types: list[str]


def read_base_config(path: Path) -> BaseConfig:
    """Return the sizes and layer types in the config.json of a published gpt-oss checkpoint.

    Raises:
        StageError: the file cannot be read, describes another model or another form of gpt-oss, or
            a key is missing, of the wrong type, out of range or contradicts another.
    """
    document = read_json(path)
    _refuse_other_models(path, document)
    checks: tuple[Callable[[dict[str, Any]], None], ...] = (
        *(_check_sizes, _check_proportions, _check_layer_types, _check_fixed),
        *(_check_rope, _check_numbers),
    )
    try:
        values = _resolve_aliases(document)
        for check in checks:
            check(values)
    except _Fault as fault:
        raise StageError(
            f"{path} does not describe a gpt-oss model that can be used",
            fault.expected,
            fault.found,
            _FIX,
        ) from fault
    check_token_ids(path, values, values["vocab_size"])
    sizes = {key: values[key] for key in SIZES}
    types = values.get("layer_types") or [
        _LAYER_TYPES[layer % 2] for layer in range(sizes["num_hidden_layers"])
    ]
    return BaseConfig(sizes, types)


def check_token_ids(path: Path, document: dict[str, Any], rows: int) -> None:
    """Raise if a token id in config.json or generation_config.json has no row in the embeddings.

    Raises:
        StageError: an id is not a number from 0 to `rows` - 1.
    """
    for key, value in document.items():
        if not key.endswith("_token_id") or value is None:
            continue
        tokens: list[Any] = value if isinstance(value, list) and value else [value]
        for token in tokens:
            if not _is_int(token) or not 0 <= token < rows:
                raise StageError(
                    f"{path}: {key} is not a token of the model",
                    f"ids from 0 to {rows - 1}, since the embeddings have {rows} rows (vocab_size)",
                    f"{key}: {_show(value)}",
                    f"restore {path.name} from the published checkpoint",
                )


def _refuse_other_models(path: Path, document: dict[str, Any]) -> None:
    quantization = document.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    architectures = document.get("architectures")
    found, wanted = None, "openai/gpt-oss-20b or -120b, or a fine-tune of them"
    if document.get("model_type") != "gpt_oss":
        found = f"model_type {document.get('model_type')!r}"
    elif method == "sparselong":
        found, wanted = "already compressed (quant_method sparselong)", "the base model"
    elif method != "mxfp4":
        found, wanted = f"quant_method {method!r}", "a checkpoint with MXFP4 experts"
    elif architectures is not None and architectures != ["GptOssForCausalLM"]:
        found = f"architectures {architectures!r}"
    if found:
        raise StageError(
            f"{path.parent} cannot be compressed: {path.name} is not that of a base gpt-oss",
            "a gpt-oss checkpoint as published: bf16 with MXFP4 experts",
            found,
            f"set model.base to {wanted}",
        )


def _resolve_aliases(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with transformers' name for every key that has two."""
    for alias, name in (_ALIASES | _REPEATED).items():
        if {alias, name} <= set(document) and not _equal(document[name], document[alias]):
            raise _Fault(
                f"the same value for {name} and {alias}",
                f"{name}: {_show(document[name])}, {alias}: {_show(document[alias])}",
            )
    return {_ALIASES.get(key, key): value for key, value in document.items()}


def _check_sizes(values: dict[str, Any]) -> None:
    wrong = [key for key in SIZES if not _is_int(values.get(key)) or values[key] < 1]
    if wrong:
        found = ", ".join(
            f"{key}: {_show(values[key])}" if key in values else f"no {key}" for key in wrong
        )
        raise _Fault(f"positive integers for {', '.join(SIZES)}", found)
    if values["num_hidden_layers"] > _MOST_LAYERS:
        expected = f"at most {_MOST_LAYERS} layers"
        raise _Fault(expected, f"num_hidden_layers: {values['num_hidden_layers']}")
    longest = values.get("max_position_embeddings", 1)
    if not _is_int(longest) or longest < 1:
        expected = "a positive integer for max_position_embeddings"
        raise _Fault(expected, f"max_position_embeddings: {_show(longest)}")


def _check_proportions(values: dict[str, Any]) -> None:
    for key, divisor in _DIVISORS.items():
        if values[key] % divisor:
            raise _Fault(f"{key} divisible by {divisor}", f"{key}: {values[key]}")
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        raise _Fault(
            "num_attention_heads divisible by num_key_value_heads", f"{heads} and {kv_heads}"
        )
    top_k, experts = values["num_experts_per_tok"], values["num_local_experts"]
    if top_k > experts:
        raise _Fault(
            f"num_experts_per_tok from 1 to num_local_experts, {experts}",
            f"num_experts_per_tok: {top_k}",
        )


def _check_layer_types(values: dict[str, Any]) -> None:
    types, layers = values.get("layer_types"), values["num_hidden_layers"]
    if types is None:
        return
    expected = (
        f"layer_types: a list of {layers} (num_hidden_layers), each {' or '.join(_LAYER_TYPES)}"
    )
    if not isinstance(types, list):
        raise _Fault(expected, f"layer_types: {_show(types)}")
    unknown = [_show(name) for name in types if name not in _LAYER_TYPES]
    if unknown:
        raise _Fault(expected, f"unknown: {', '.join(dict.fromkeys(unknown))}")
    if len(types) != layers:
        raise _Fault(expected, f"a list of {len(types)}")


def _check_fixed(values: dict[str, Any]) -> None:
    for key, only in _FIXED.items():
        is_given = key in values and (values[key] is not None or key in _NOT_NULL)
        if is_given and not _equal(values[key], only):
            expected = f"{key}: {_show(only)}" if only is not None else f"no {key}"
            raise _Fault(expected, f"{key}: {_show(values[key])}")
    for key in ("dtype", "torch_dtype"):
        if values.get(key) is not None and values[key] not in _PRECISIONS:
            expected = f"{key}: {', '.join(_PRECISIONS)}"
            raise _Fault(expected, f"{key}: {_show(values[key])}")


def _check_rope(values: dict[str, Any]) -> None:
    """Check the one description of the rotary embedding, in its new or its old form."""
    forms = {key: values[key] for key in ("rope_parameters", "rope_scaling") if key in values}
    expected = "rope_parameters (or rope_scaling): an object with rope_type yarn"
    if not forms or not all(isinstance(form, dict) for form in forms.values()):
        found = ", ".join(f"{key}: {_show(form)}" for key, form in forms.items())
        raise _Fault(expected, found or "neither")
    (name, rope), *other = forms.items()
    if other and not _equal(rope, other[0][1]):
        raise _Fault("one description of the rotary embedding", "two that differ")
    kinds = [rope[key] for key in ("rope_type", "type") if key in rope]
    if not kinds or any(kind != "yarn" for kind in kinds):
        raise _Fault(expected, f"rope_type: {', '.join(map(_show, kinds)) or 'none'}")
    for key in (*_ROPE, *(key for key in _ROPE_OPTIONAL if rope.get(key) is not None)):
        if not _is_positive(rope.get(key)):
            found = _show(rope[key]) if key in rope else "none"
            raise _Fault(f"{name}.{key}: a positive number", found)
    if not isinstance(rope.get("truncate"), bool):
        raise _Fault(f"{name}.truncate: true or false", _show(rope.get("truncate")))
    unknown = sorted(set(rope) - {*_ROPE, *_ROPE_OPTIONAL, "truncate", "rope_type", "type"})
    if unknown:
        raise _Fault(f"the keys of YaRN in {name}", f"unknown: {', '.join(unknown)}")
    if not _is_int(rope["original_max_position_embeddings"]) or rope["factor"] < 1:
        raise _Fault(f"{name}: an integer original length, and a factor of at least 1", _show(rope))
    for key, inner in (
        ("rope_theta", "rope_theta"),
        ("initial_context_length", "original_max_position_embeddings"),
        ("original_max_position_embeddings", "original_max_position_embeddings"),
    ):
        if values.get(key) is not None and inner in rope and not _equal(values[key], rope[inner]):
            found = f"{_show(values[key])} and {_show(rope[inner])}"
            raise _Fault(f"the same value for {key} and {name}.{inner}", found)


def _check_numbers(values: dict[str, Any]) -> None:
    for key in ("rms_norm_eps", "rope_theta"):
        if key in values and not _is_positive(values[key]):
            raise _Fault(f"{key}: a positive number", _show(values[key]))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    is_number = _is_int(value) or isinstance(value, float)
    return is_number and math.isfinite(value) and value > 0


def _equal(one: Any, other: Any) -> bool:
    """Compare two values; unlike in Python, true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _show(value: Any) -> str:
    return json.dumps(value)
