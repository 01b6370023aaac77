"""What the model card says of a form's values, by what the form's manifest says."""

import pytest

from sparselong.export.hub.card import _describe_attention

EXACT = {"metrics": {"tensors": 79}}
QUERY, OUTPUT, TABLE = "blk.0.attn_q.weight", "blk.11.attn_output.weight", "token_embd.weight"


def gguf(types: dict[str, list[str]], **errors: tuple[float, float]) -> dict:
    measured = {
        name: {"relative_rms": relative, "largest": largest}
        for name, (relative, largest) in errors.items()
    }
    return {"metrics": {"tensors": 79, "tensor_types": types, "errors": measured}}


ROUNDED = gguf(
    {"Q5_0": [TABLE, QUERY], "Q4_K": [OUTPUT], "F32": ["blk.0.attn_norm.weight"]},
    **{QUERY: (0.04, 0.1), OUTPUT: (0.0712, 0.2), TABLE: (0.3, 1.0)},
)
HALF = gguf(
    {"F16": [TABLE, QUERY, OUTPUT]}, **{QUERY: (0.0, 0.0), OUTPUT: (0.0, 0.0), TABLE: (1e-9, 1e-12)}
)


@pytest.mark.parametrize(
    ("exports", "wanted"),
    [
        ({"mxfp4": EXACT}, "`mxfp4` holds these values."),
        (
            {"mxfp4": EXACT, "hf-bf16": EXACT, "adapter": EXACT, "gguf": HALF},
            "`mxfp4`, `hf-bf16` and `gguf` hold these values.",
        ),
        (
            {"mxfp4": EXACT, "ollama": ROUNDED},
            "`mxfp4` holds these values. `ollama` rounds them again, to Q5_0 and Q4_K (relative "
            "RMS up to 7.12%).",
        ),
        (
            {"gguf": ROUNDED},
            "`gguf` rounds them again, to Q5_0 and Q4_K (relative RMS up to 7.12%).",
        ),
        ({"adapter": EXACT}, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_only_forms_with_the_values_of_attention_are_said_to_hold_them(exports, wanted):
    """F16 has the values that it does not change; what the embedding loses is not attention's."""
    assert _describe_attention(exports) == wanted
